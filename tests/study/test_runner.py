"""Jobs in processes: done only once, resumed, diverged, failed, stopped, refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from refbn_d2.study.plan import Job, Stage
from refbn_d2.study.runner import Record, Runner
from refbn_d2.utils.errors import ConfigError
from refbn_d2.utils.lock import locked

FAKE = """
import pathlib, signal, sys, time
what, folder = sys.argv[-2], pathlib.Path(sys.argv[-1])
with open(folder / "said", "a") as file:
    file.write(" ".join(sys.argv[1:-1]) + "\\n")
def stop(number, frame):
    (folder / "last_checkpoint").write_text("model_0000001.pth")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
if what == "slow" and "--resume" not in sys.argv:
    (folder / "started").touch()
    for _ in range(600):  # one long sleep misses a signal that comes just before it
        time.sleep(0.1)
if what == "diverge":  # the imports take seconds
    from refbn_d2.utils.arguments import run_or_exit
    from refbn_d2.utils.errors import DivergedError
    def diverge(args):
        raise DivergedError("Training diverged at iteration 3: the loss is infinite or NaN")
    run_or_exit(diverge, None)
if what == "fail":
    sys.exit("ConfigError: nothing fits")
(folder / "model_0000001.pth").touch()
(folder / "model_final.pth").touch()
"""


@pytest.fixture(autouse=True)
def fake(tmp_path, monkeypatch):
    """Make a module that behaves as its second to last argument says."""
    (tmp_path / "fake.py").write_text(FAKE)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    return tmp_path


def job(tmp_path, name, what="fine", needs="", stages=1, recipe=None):
    folder = tmp_path / name.replace("/", "-")
    listed = [
        Stage(f"stage{i}", "fake", (what, str(folder)), i == 0, folder) for i in range(stages)
    ]
    return Job(name, folder, tuple(listed), recipe or {"lr": 1}, needs)


def said(job):
    return (job.folder / "said").read_text().splitlines()


def test_what_is_done_is_not_done_again(tmp_path, capfd):
    jobs = [job(tmp_path, "run/a", stages=2), job(tmp_path, "run/b")]
    Runner(jobs, 2).run()
    Runner(jobs, 2).run()
    assert said(jobs[0]) == ["fine", "fine"] and said(jobs[1]) == ["fine"]
    status = json.loads((jobs[0].folder / "status.json").read_text())
    assert status["status"] == "done" and status["recipe"] == {"lr": 1} and status["seconds"] > 0
    assert not (jobs[0].folder / "model_0000001.pth").exists()
    assert (jobs[0].folder / "model_final.pth").exists()
    err = capfd.readouterr().err
    assert "2 jobs: 0 already done, 2 to run, 2 at a time" in err
    assert "2 jobs: 2 already done, 0 to run" in err and "[2/2] run/" in err


def test_a_stage_that_was_killed_after_its_file_was_written_is_done(tmp_path, capfd):
    one = job(tmp_path, "convert/a")
    stage = dataclasses.replace(one.stages[0], leaves=one.folder / "left")
    one = dataclasses.replace(one, stages=(stage,))
    one.folder.mkdir()
    (one.folder / "left").touch()
    Runner([one]).run()
    assert not (one.folder / "said").exists() and Record(one).done
    assert capfd.readouterr().err.count("convert/a done") == 1


def test_diverged_and_failed_do_not_stop_the_others(tmp_path, capfd):
    jobs = [
        job(tmp_path, "pretrain/p", "fail"),
        job(tmp_path, "run/of p", needs="pretrain/p"),
        job(tmp_path, "run/d", "diverge", stages=2),
        job(tmp_path, "run/fine"),
    ]
    Runner(jobs, 1).run()
    records = [Record(j) for j in jobs]
    assert [r.status for r in records] == ["failed", "failed", "diverged", "done"]
    assert "nothing fits (exit code 1)" in records[0].content["error"]
    assert "pretrain/p failed" in records[1].content["error"]
    assert len(said(jobs[2])) == 1 and not (jobs[1].folder / "said").exists()
    assert "1 diverged, 2 failed" in capfd.readouterr().err
    Runner(jobs, 1).run()  # failed jobs run again; diverged ones do not
    assert len(said(jobs[0])) == 2 and len(said(jobs[2])) == 1


def test_a_chain_that_failed_is_tried_again_from_its_start(tmp_path):
    chain = [
        job(tmp_path, "pretrain/p", "fail"),
        job(tmp_path, "convert/p", needs="pretrain/p"),
        job(tmp_path, "run/of p", needs="convert/p"),
    ]
    Runner(chain, 2).run()
    assert [Record(one).status for one in chain] == ["failed"] * 3
    chain[0] = job(tmp_path, "pretrain/p")
    Runner(chain, 2).run()
    assert [Record(one).status for one in chain] == ["done"] * 3


def test_a_pretraining_goes_first(tmp_path):
    jobs = [job(tmp_path, "run/a", needs="pretrain/p"), job(tmp_path, "pretrain/p")]
    Runner(jobs, 2).run()
    times = [(j.folder / "model_final.pth").stat().st_mtime_ns for j in jobs]
    assert times[1] < times[0]


def test_results_of_another_version_are_refused(tmp_path):
    Runner([job(tmp_path, "run/a")], 1).run()
    changed = job(tmp_path, "run/a", recipe={"lr": 2, "code": "x"})
    with pytest.raises(ConfigError, match=r"run-a holds run/a .*code: None there, 'x' now; lr: 1"):
        Runner([changed], 1)


def test_a_checkpoint_of_unknown_settings_is_refused(tmp_path):
    """Otherwise the training would resume it, and its results would be those of other settings."""
    one = job(tmp_path, "a")
    one.folder.mkdir(parents=True)
    (one.folder / "last_checkpoint").write_text("model_final.pth")
    with pytest.raises(ConfigError, match="has a checkpoint, but no status.json"):
        Record(one).check()


def test_code_that_changes_meanwhile(tmp_path):
    with pytest.raises(ConfigError, match="code was changed while the study ran"):
        Runner([job(tmp_path, "run/a", recipe={"code": "of before"})], 1).run()
    assert not (tmp_path / "run-a").exists()


def test_threads_and_gpus(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("refbn_d2.study.runner.gpus", lambda: ["4", "7"])
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    runner = Runner([])
    assert runner.slots == 2
    environments = [runner._environment(slot) for slot in (0, 1)]
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments] == ["4", "7"]
    assert {e["OMP_NUM_THREADS"] for e in environments} == {"6"}


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_stopped_and_resumed(tmp_path, number):
    (tmp_path / "main.py").write_text(
        "import sys\nfrom pathlib import Path\nfrom test_job import jobs\n"
        "from refbn_d2.study.runner import Runner\nRunner(jobs, 2).run()\n"
    )
    (tmp_path / "test_job.py").write_text(
        "from pathlib import Path\nfrom refbn_d2.study.plan import Job, Stage\n"
        f"jobs = [Job(n, Path({str(tmp_path)!r}) / n, (Stage('train', 'fake', ('slow', "
        f"{str(tmp_path)!r} + '/' + n), True, Path({str(tmp_path)!r}) / n),), {{'lr': 1}})"
        " for n in ('a', 'b', 'c')]\n"
    )
    program = subprocess.Popen(
        [sys.executable, "main.py"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not all((tmp_path / n / "started").exists() for n in "ab"):
        assert time.monotonic() < deadline and program.poll() is None
        time.sleep(0.05)
    program.send_signal(number)
    _, err = program.communicate(timeout=60)
    assert program.returncode == 128 + number, err
    assert "Stopping 2 runs" in err
    status = json.loads((tmp_path / "a" / "status.json").read_text())
    assert (status["status"], status["error"]) == ("not run", "interrupted")
    for name in "ab":
        assert (tmp_path / name / "last_checkpoint").exists()
    assert not (tmp_path / "c").exists()
    jobs = [
        Job(n, tmp_path / n, (Stage("train", "fake", ("slow", str(tmp_path / n)), True,
                                    tmp_path / n),), {"lr": 1})
        for n in "ab"
    ]  # fmt: skip
    Runner(jobs, 2).run()
    assert (tmp_path / "a" / "said").read_text().splitlines() == ["slow", "--resume slow"]
    assert (tmp_path / "b" / "model_final.pth").exists()


def test_a_training_that_outlived_its_study_is_named(tmp_path):
    one = job(tmp_path, "run/a")
    one.folder.mkdir()
    with locked(one.folder), pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        Runner([one]).run()
    assert not (one.folder / "said").exists()
    Runner([one]).run()
    assert said(one) == ["fine"]
