"""Run a study's unfinished jobs in processes, several at a time; an interrupted study resumes.

Each job's folder holds `status.json`, {"status", "recipe", "seconds", "stages", "error"}, and
`output.txt`, the output of its processes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from refbn_d2.study.fingerprint import code_hash
from refbn_d2.study.plan import Job
from refbn_d2.utils.errors import ConfigError, DivergedError
from refbn_d2.utils.file_io import naming, read_record, write_text
from refbn_d2.utils.lock import check_free

POLL = 0.1  # seconds between two checks of the processes
ENDED = ("done", "diverged")


class Record:
    """A job's status.json.

    Raises:
        DataError: it cannot be read.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.path = job, job.folder / "status.json"
        self.content: dict[str, Any] = {
            "status": "not run",
            "seconds": 0.0,
            "stages": {},
            "error": "",
        }
        if self.path.exists():
            self.content |= read_record(self.path, dict, f"delete {job.folder}")

    @property
    def status(self) -> str:
        return self.content["status"]

    @property
    def done(self) -> bool:
        """Whether the folder has the results of this recipe."""
        return self.status == "done" and self.content.get("recipe") == self.job.recipe

    def check(self) -> None:
        """Return if the results in the folder, if any, were made by this recipe.

        Raises:
            ConfigError: they were not; names the differences.
        """
        before = self.content.get("recipe")
        if before is None and (self.job.folder / "last_checkpoint").exists():
            raise ConfigError(
                f"{self.job.folder} has a checkpoint, but no status.json that says which settings "
                "and code made it; delete that folder"
            )
        if before is None or before == self.job.recipe:
            return
        keys = sorted(before.keys() | self.job.recipe.keys())
        changed = [
            f"{key}: {before.get(key)!r} there, {self.job.recipe.get(key)!r} now"
            for key in keys
            if before.get(key) != self.job.recipe.get(key)
        ]
        raise ConfigError(
            f"{self.job.folder} holds {self.job.id} of another version of the study or of the code "
            f"({'; '.join(changed)}). Results of two versions are not mixed: give another "
            "--output-dir, or delete that folder"
        )

    def write(self, **changes) -> None:
        self.content |= {"recipe": self.job.recipe, **changes}
        write_text(self.path, json.dumps(self.content, indent=1))


@dataclass
class _Running:
    job: Job
    slot: int
    record: Record
    output: IO[bytes]
    stages: Iterator
    process: subprocess.Popen | None = None
    stage: str = ""
    start: float = field(default_factory=time.monotonic)


def gpus() -> list[str]:
    """Return the GPUs for the runs, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name] if torch.cuda.is_available() else []
    return list(map(str, range(torch.cuda.device_count())))


class Runner:
    """Run jobs in their order, `slots` at a time; a failed job does not stop the others."""

    def __init__(self, jobs: Iterable[Job], slots: int = 0) -> None:
        self.jobs = list(jobs)
        self.gpus = gpus()
        self.slots = slots or max(1, len(self.gpus))
        self.records = {job.id: Record(job) for job in self.jobs}
        for record in self.records.values():
            record.check()
        self.stopped = 0
        self.durations: dict[str, list[float]] = {}

    def run(self) -> None:
        """Run all jobs that are not done.

        Raises:
            SystemExit: stopped by SIGINT or SIGTERM (128 + signal), after every process has been
                asked to write its checkpoint.
        """
        waiting = [job for job in self.jobs if self.records[job.id].status not in ENDED]
        for failed in waiting:  # in an earlier call
            self.records[failed.id].content["status"] = "not run"
        done = len(self.jobs) - len(waiting)
        say(f"{len(self.jobs)} jobs: {done} already done, {len(waiting)} to run, "
             f"{self.slots} at a time.")  # fmt: skip
        running: list[_Running] = []
        before = {n: signal.signal(n, self._stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            while (running or waiting) and not self.stopped:
                while waiting and len(running) < self.slots:
                    job = self._next(waiting)
                    if job is None:
                        break
                    waiting.remove(job)
                    free = set(range(self.slots)) - {r.slot for r in running}
                    running.append(self._start(job, min(free)))
                time.sleep(POLL)
                for one in running[:]:
                    if self._advance(one):
                        running.remove(one)
                        self._report(one, waiting, running)
        finally:
            self._end(running)
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.stopped:
            raise SystemExit(128 + self.stopped)

    def _next(self, waiting: list[Job]) -> Job | None:
        """Return the first job whose pretraining is done; fail jobs whose pretraining failed."""
        for job in waiting[:]:
            status = self.records[job.needs].status if job.needs else "done"
            if status == "done":
                return job
            if status in ("failed", "diverged"):
                waiting.remove(job)
                self.records[job.id].write(status="failed", error=f"its {job.needs} {status}")
                say(f"{job.id}: not run, its {job.needs} {status}")
        return None

    def _start(self, job: Job, slot: int) -> _Running:
        if job.recipe.get("code") not in (None, code_hash.__wrapped__()):
            raise ConfigError(
                "the package's code was changed while the study ran; start again with another "
                "--output-dir, from a copy of the code that nobody edits"
            )
        job.folder.mkdir(parents=True, exist_ok=True)
        check_free(job.folder, "--output-dir")  # of a training that outlived its study
        record = self.records[job.id]
        record.write(status="not run", error="")
        todo = [
            stage for stage in job.stages
            if record.content["stages"].get(stage.name) != "done"
            and not (stage.leaves and stage.leaves.exists())
        ]  # fmt: skip
        output = open(job.folder / "output.txt", "ab", buffering=0)  # noqa: SIM115
        return _Running(job, slot, record, output, iter(todo))

    def _advance(self, one: _Running) -> bool:
        """Start the next stage if one has ended; return whether the job has ended."""
        if one.process is not None:
            code = one.process.poll()
            if code is None:
                return False
            if code != 0:
                return self._close(one, *_why(code, one))
            one.record.content["stages"][one.stage] = "done"
            one.record.write()
        stage = next(one.stages, None)
        if stage is None:
            for file in one.job.folder.glob("model_[0-9]*.pth"):  # all checkpoints but the last
                file.unlink()
            return self._close(one, "done", "")
        resume = bool(
            stage.resumable and stage.output_dir and (stage.output_dir / "last_checkpoint").exists()
        )
        command = stage.command(resume)
        with naming(one.job.folder / "output.txt"):
            one.output.write(f"$ {stage.shown()}\n".encode())
        one.stage = stage.name
        one.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=one.output, stderr=subprocess.STDOUT,
            env=self._environment(one.slot),
            start_new_session=True,  # Ctrl-C reaches only the study, which passes it on once
        )  # fmt: skip
        return False

    def _environment(self, slot: int) -> dict[str, str]:
        threads = max(1, (os.cpu_count() or 1) // self.slots)
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        return environment

    def _close(self, one: _Running, status: str, error: str) -> bool:
        one.output.close()
        seconds = time.monotonic() - one.start
        if status == "done":
            self.durations.setdefault(one.job.kind, []).append(seconds)
        total = one.record.content["seconds"] + seconds
        one.record.write(status=status, error=error, seconds=total)
        return True

    def _report(self, one: _Running, waiting: list[Job], running: list[_Running]) -> None:
        counts = [r.status for r in self.records.values()]
        bad = [f"{counts.count(s)} {s}" for s in ("diverged", "failed") if s in counts]
        error = f": {one.record.content['error']}" if one.record.content["error"] else ""
        say(
            f"[{len(counts) - len(waiting) - len(running)}/{len(counts)}] {one.job.id} "
            f"{one.record.status}{error} ({one.record.content['seconds']:.0f} s)"
            + "".join(f", {text}" for text in bad)
            + self._estimate(waiting, running)
        )

    def _estimate(self, waiting: list[Job], running: list[_Running]) -> str:
        """Return how long the rest will take, by the mean times of finished jobs."""
        known = [s for seconds in self.durations.values() for s in seconds]
        if not known or not (waiting or running):
            return ""
        mean = sum(known) / len(known)

        def expected(job: Job) -> float:
            own = self.durations.get(job.kind)
            return sum(own) / len(own) if own else mean

        left = sum(expected(job) for job in waiting)
        left += sum(max(0.0, expected(r.job) - (time.monotonic() - r.start)) for r in running)
        return f"; about {max(1, round(left / self.slots / 60))} min left"

    def _stop(self, number: int, frame) -> None:
        if self.stopped:  # a second signal, while the processes end
            raise SystemExit(128 + number)
        self.stopped = number

    def _end(self, running: list[_Running]) -> None:
        """End the running processes; each writes a checkpoint."""
        if running:
            say(f"Stopping {len(running)} runs; each writes a checkpoint. Start again to continue.")
        for one in running:
            if one.process and one.process.poll() is None:
                one.process.terminate()
        for one in running:
            if one.process:
                one.process.wait()
            self._close(one, "not run", "interrupted")


def _why(code: int, one: _Running) -> tuple[str, str]:
    """Return "diverged" or "failed", and the last line of the process's output."""
    lines = (one.job.folder / "output.txt").read_text(errors="replace").splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "")
    diverged = last.startswith(f"{DivergedError.__name__}:")  # as `run_or_exit` prints it
    status = "diverged" if diverged else "failed"
    return status, f"{one.stage}: {last[:500]} (exit code {code})"


def say(text: str) -> None:
    """Print a line of progress on stderr at once."""
    print(text, file=sys.stderr, flush=True)
