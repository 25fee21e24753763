"""One round: start a run, break it at a random moment, resume it, and judge the end."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from refbn_d2.checkpoint.files import load_checkpoint
from tests.reliability.faults import Fault
from tests.reliability.forked import Forked
from tests.reliability.targets import ROOT, State, Target, python

LIMIT = 1200.0  # seconds for a program; more is a hang, even on a busy machine
LINGER = 300.0  # seconds that its processes have to end after it
SENTENCE = re.compile(r"\w+(Error|Interrupt): \S.*\S")


class Failure(Exception):
    """The round broke a promise; says which."""


@dataclass
class Ended:
    code: int
    output: str
    seconds: float

    @property
    def last_line(self) -> str:
        return next((line for line in reversed(self.output.splitlines()) if line.strip()), "")


def unbroken(target: Target) -> tuple[State, float]:
    """Run `target` without a fault; return its weights and seconds."""
    target.out.mkdir()
    target.prepare()
    ended = _run(target, None, None)
    if ended.code != 0:
        raise Failure(f"the unbroken run ended with {ended.code}:\n{ended.output}")
    return target.weights(), ended.seconds


def play(target: Target, fault: Fault, rng: random.Random, seconds: float, expected: State) -> str:
    """Break a run after up to `seconds`, resume it, and return how it ended.

    Raises:
        Failure: it did not end with the weights of the unbroken run, or said why in no sentence.
    """
    target.out.mkdir()
    start = fault.prepare()
    try:
        target.prepare()
        moment = rng.uniform(0, 0.95 * seconds)

        def strike(process: subprocess.Popen) -> None:
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                fault.strike(process)
                struck.append(fault)

        struck: list[Fault] = []
        broken = _run(target, start, strike)
        if not struck and broken.code != 0:
            raise Failure(f"it ended with {broken.code} before the fault: {broken.last_line}")
        _check_end(target, broken, fault.ends_by())
        _check_checkpoints(target.out)
        if struck:
            fault.undo()
        if broken.code == 0:
            return _finished(target, expected, "unharmed" if struck else "had ended before")
        if target.is_complete():  # the program ended between its last file and its exit
            return _finished(target, expected, "had ended before")
        for _ in range(100):
            resumed = _run(target, start, None)
            if resumed.code == 0:
                break
            _check_end(target, resumed, set())
            if "is in use by process" not in resumed.output:  # a killed parent's child
                raise Failure(f"the resumed run ended with {resumed.code}: {resumed.last_line}")
            time.sleep(5)
        said = SENTENCE.fullmatch(broken.last_line)
        return _finished(target, expected, "a sentence, then resumed" if said else "resumed")
    finally:
        subprocess.run(["umount", target.out], capture_output=True)  # if it is a disk


def _run(
    target: Target,
    start: Callable[[], None] | None,
    strike: Callable[[subprocess.Popen], None] | None,
) -> Ended:
    number = len(list(target.folder.glob("output.*.txt")))
    log = target.folder / f"output.{number}.txt"
    began = time.monotonic()
    with open(log, "wb") as file:
        process = Forked(
            python(target), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=start,
        )  # fmt: skip
        try:
            if strike:
                strike(process)
            code = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            raise Failure(f"a program did not end within {LIMIT:.0f} s") from None
        finally:
            left = _left(process.pid, LINGER if process.poll() is not None else 0)
            if left:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if left:
        raise Failure(f"processes {left} were left {LINGER:.0f} s after the program's end")
    return Ended(code, log.read_text(errors="replace"), time.monotonic() - began)


def _left(session: int, seconds: float) -> list[int]:
    """Return the processes of `session` that are alive after up to `seconds`."""
    end = time.monotonic() + seconds
    while True:
        left = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, group = path.read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(group) == session and state not in "ZX":
                left.append(int(path.parent.name))
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.1)


def _check_end(target: Target, ended: Ended, ends_by: set[int]) -> None:
    output = re.sub(target.tolerated, "", ended.output) if target.tolerated else ended.output
    if "Traceback (most recent call last)" in output:
        raise Failure(f"a traceback (exit code {ended.code}): {ended.last_line}")
    if ended.code in ends_by:
        return
    if not SENTENCE.fullmatch(ended.last_line):
        raise Failure(f"exit code {ended.code} and no sentence: {ended.last_line!r}")
    if "Errno" in ended.last_line and "/" not in ended.last_line:
        raise Failure(f"a sentence without the file: {ended.last_line}")


def _check_checkpoints(folder: Path) -> None:
    for last in folder.rglob("last_checkpoint"):
        name = last.read_text()
        try:
            load_checkpoint(last.with_name(name))
        except Exception as error:
            raise Failure(f"the last checkpoint {name!r} does not load: {error!r}") from error


def _finished(target: Target, expected: State, how: str) -> str:
    try:
        weights = target.weights()
    except Exception as error:
        raise Failure(f"the run ended well, but has no result: {error!r}") from error
    if weights.keys() != expected.keys():
        raise Failure("the result has other tensors than that of the unbroken run")
    if target.compared:
        other = [name for name in expected if not torch.equal(expected[name], weights[name])]
        if other:
            raise Failure(f"{len(other)} tensors are not those of the unbroken run: {other[0]}")
    return how


def new_folder(target: type[Target], data: Path, folder: Path, workers: int = 0) -> Target:
    """Return a round of `target` in the new `folder`, with its own copy of the pictures."""
    folder.mkdir(mode=0o755)
    shutil.copytree(data, folder / "data")
    return target(folder, workers)
