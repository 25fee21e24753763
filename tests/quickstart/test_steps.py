import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from html import unescape
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest

from refbn_d2.config import get_cfg
from refbn_d2.configs import get_config_file
from refbn_d2.quickstart.steps import (
    NORMS,
    PRETRAINED,
    Record,
    Step,
    run,
    steps,
    write_report,
)

ROOT = Path(__file__).parents[2]
NO_CHANGES = {"pretrain": [], "finetune": []}


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Return a function that writes a script: it adds its arguments to `said`, then runs `code`."""

    def make(name, code="", **fields):
        path = tmp_path / f"{name}.py"
        path.write_text(
            f"import sys\nopen({str(tmp_path / 'said')!r}, 'a').write('{name} ' + "
            f"' '.join(sys.argv[1:]) + '\\n')\nprint('{name} speaks')\n{code}\n"
        )
        return Step(name, name, "", ("-m", name, "KEY", "1"), 1, **fields)

    monkeypatch.chdir(tmp_path)  # where `python -m` finds them
    make.said = lambda: (tmp_path / "said").read_text().splitlines()
    return make


def test_done_once_and_gone_on_with(tmp_path, script):
    fails_once = "import os\nmark = sys.argv[0] + '.tried'\nif not os.path.exists(mark):\n"
    fails_once += "    open(mark, 'w')\n    sys.exit(3)"
    todo = [script("first"), script("second", fails_once), script("third")]
    with pytest.raises(ChildProcessError, match=r"'second'.* code 3.*-m second KEY 1"):
        run(tmp_path, todo)
    assert script.said() == ["first KEY 1", "second KEY 1"]
    record = run(tmp_path, todo)
    assert script.said() == ["first KEY 1", "second KEY 1", "second KEY 1", "third KEY 1"]
    assert record.steps["third"]["output"] == "third speaks\n"
    on_disk = json.loads((tmp_path / "steps.json").read_text())
    assert on_disk == record.steps and all(step["done"] for step in on_disk.values())
    before = script.said()
    run(tmp_path, todo)
    assert script.said() == before


def test_seconds_add_up_over_tries(tmp_path, script):
    record = Record(tmp_path / "steps.json")
    step = script("training")
    record.note(step, 2.0, False, "")
    record.note(step, 3.0, True, "")
    assert Record(tmp_path / "steps.json").steps["training"]["seconds"] == 5.0


def test_a_training_that_was_interrupted_is_resumed(tmp_path, script):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last_checkpoint").write_text("model_0000003.pth")
    run(tmp_path, [script("training", output_dir=str(tmp_path / "run"))])
    assert script.said() == ["training --resume KEY 1"]


def test_a_file_that_is_there_is_not_written_again(tmp_path, script):
    (tmp_path / "weights.pkl").write_text("whole")
    record = run(tmp_path, [script("convert", leaves=str(tmp_path / "weights.pkl"))])
    assert not (tmp_path / "said").exists() and record.steps["convert"]["done"]


def test_other_commands_are_refused(tmp_path, script):
    step = script("training")
    run(tmp_path, [step])
    changed = Step("training", "", "", (*step.command[:-1], "2"), 1)
    with pytest.raises(ValueError, match=r"KEY 1 there, .*KEY 2 now.*--output-dir"):
        run(tmp_path, [changed])
    assert script.said() == ["training KEY 1"]


def test_a_record_that_is_none(tmp_path, script):
    (tmp_path / "steps.json").write_text('{"training": ')
    with pytest.raises(ValueError, match=r"steps\.json is not a record"):
        run(tmp_path, [script("training")])


def test_estimate(tmp_path, script):
    """Three shares took a minute each, so the last two take two minutes."""
    todo = [Step(name, "", "", (name,), share) for name, share in {"a": 1, "b": 3, "c": 2}.items()]
    record = Record(tmp_path / "steps.json")
    record.note(todo[0], 60.0, True, "")
    assert record.estimate(todo) == ""  # too early
    record.note(todo[1], 180.0, True, "")
    assert record.estimate(todo) == " (about 2 min left)"


def test_the_signal_handlers_are_restored(tmp_path, script):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    run(tmp_path, [script("first")])
    with pytest.raises(ChildProcessError):
        run(tmp_path, [script("first"), script("fails", "sys.exit(3)")])
    assert {number: signal.getsignal(number) for number in before} == before
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.parametrize(
    "stop, code, to_all, before",
    [
        (signal.SIGTERM, 143, False, signal.SIG_DFL),
        (signal.SIGTERM, 143, True, signal.SIG_DFL),  # some batch systems send it to all processes
        (signal.SIGINT, -signal.SIGINT, True, signal.SIG_DFL),  # as a terminal does
        (signal.SIGINT, -signal.SIGINT, True, signal.SIG_IGN),  # of a job in the background
        (signal.SIGINT, -signal.SIGINT, False, signal.SIG_IGN),
    ],
)
def test_stopped_from_outside(tmp_path, script, stop, code, to_all, before):
    """The step is stopped too, may finish its work, and is not recorded as done."""
    waits = (
        "import signal, time\nfrom pathlib import Path\ndef end(*_): Path(sys.argv[0] + '.saved')"
        ".write_text(''); sys.exit(1)\nsignal.signal(signal.SIGTERM, end)\n"
        "signal.signal(signal.SIGINT, end)\nPath(sys.argv[0] + '.up').write_text('')\n"
        "for _ in range(600): time.sleep(0.1)"  # one long sleep misses a signal just before it
    )
    step = script("training", waits)
    code_of_parent = (
        "from pathlib import Path\nfrom refbn_d2.quickstart.steps import Step, run\n"
        f"run(Path({str(tmp_path)!r}), [Step('training', '', '', {step.command!r}, 1)])"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code_of_parent], cwd=tmp_path, start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, before),
    )  # fmt: skip
    up = tmp_path / "training.py.up"
    deadline = time.monotonic() + 60
    while not up.exists():
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    (os.killpg if to_all else os.kill)(parent.pid, stop)
    assert parent.wait(timeout=30) == code
    assert (tmp_path / "training.py.saved").exists()
    assert not json.loads((tmp_path / "steps.json").read_text())["training"]["done"]


# ---- the steps


def settings(step):
    at = step.command.index("--config-file") + 1
    keys, values = step.command[at + 1 :: 2], step.command[at + 2 :: 2]
    return step.command[at], dict(zip(keys, values, strict=True))


def test_steps_build_on_each_other():
    todo = {step.name: step for step in steps("output/q", NO_CHANGES)}
    for step in todo.values():
        assert step.command[0] == "-m" and find_spec(step.command[1]), step
    backbones = {
        settings(todo[name])[1]["OUTPUT_DIR"] + "/backbone.pkl": norm
        for name, norm in PRETRAINED.items()
    }
    taken = {norm: settings(todo[name])[1]["MODEL.WEIGHTS"] for name, norm in NORMS.items()}
    for norm, weights in taken.items():
        assert backbones[weights] == ("BN" if norm in ("RefBN", "FrozenBN") else norm)
    assert set(taken.values()) == set(backbones), "pretrained for nothing"
    assert todo["export"].command[2] == "output/q/refbn/model_final.pth"


def test_detectors_differ_in_norm_and_backbone_alone():
    detectors = [settings(step) for step in steps("output/q", NO_CHANGES) if step.name in NORMS]
    assert len({config for config, _ in detectors}) == 1
    assert {values.pop("MODEL.RESNETS.NORM") for _, values in detectors} == set(NORMS.values())
    assert all(set(values) == {"MODEL.WEIGHTS", "OUTPUT_DIR"} for _, values in detectors)
    cfg = get_cfg()
    cfg.merge_from_file(get_config_file(detectors[0][0].removeprefix("configs/")))
    assert cfg.SOLVER.IMS_PER_BATCH == 2 and cfg.DATALOADER.BATCH_COMPOSITION == "domain"
    assert cfg.MODEL.FPN.NORM == cfg.MODEL.ROI_MASK_HEAD.NORM == ""


def test_changes_stand_behind_the_rest():
    changes = {"pretrain": ["SOLVER.EPOCHS", "1"], "finetune": ["SEED", "2"]}
    for step in steps("output/q", changes):
        name = "pretrain" if step.name.startswith("pretrain") else "finetune"
        assert step.output_dir == "" or list(step.command[-2:]) == changes[name]


# ---- the report


@pytest.fixture
def measured(tmp_path):
    """Write the folder of a run, with numbers that identify their source."""
    todo, record = steps("output/q", NO_CHANGES), Record(tmp_path / "steps.json")
    for number, step in enumerate(todo):
        record.note(step, 60.0 * number, True, "res5  largest difference 1.5e-06 & <less>\n")
    for number, name in enumerate([*NORMS, *PRETRAINED], start=1):
        folder = tmp_path / name
        folder.mkdir()
        names = [f"{task}/{ap}" for task in ("bbox", "segm") for ap in ("AP", "AP50", "AP75")]
        names += ["val/top1", "val/top5"]
        values = {name: 10 * number + i + 0.25 for i, name in enumerate(names)}
        lines = [{"iteration": 19, "total_loss": 2.0, "loss_cls": 1.0}, {"iteration": 39}]
        (folder / "metrics.json").write_text(
            "".join(json.dumps(line) + "\n" for line in [*lines, {"iteration": 39, **values}])
        )
        cv2.imwrite(str(folder / "samples.png"), np.full((8, 8, 3), 10 * number, np.uint8))
    return tmp_path, todo, record


def test_report_shows_what_was_measured(measured):
    page = unescape(write_report(*measured).read_text())
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", page, re.S)]
    rows = [row for row in rows if row]
    expected = []
    for number, norm in enumerate(NORMS.values(), start=1):
        expected.append([norm, *(f"{10 * number + i + 0.25:.1f}" for i in range(6))])
    for number, norm in enumerate(PRETRAINED.values(), start=len(NORMS) + 1):
        expected.append([norm, *(f"{10 * number + i + 0.25:.1f}" for i in (6, 7))])
    assert rows == expected
    folder, todo, _ = measured
    commands = re.findall(r"<pre>(.*?)</pre>", page)
    assert commands == [" ".join(["python", *step.command]) for step in todo]
    assert f"{sum(range(len(todo))):.1f}\nminutes" in page and "40 iterations" in page
    assert page.count("1.5e-06 & <less>") == 1  # the export
    assert [p.name for p in folder.glob("*.html*")] == ["report.html"]


def test_report_needs_no_other_file(measured):
    page = write_report(*measured).read_text()
    sources = re.findall(r'(?:src|href)="(.*?)"', page)
    assert len(sources) == 3 + len(NORMS) and "url(" not in page and "@import" not in page
    prefix = "data:image/png;base64,"
    pictures = [base64.b64decode(source.removeprefix(prefix)) for source in sources]
    folder = measured[0]
    files = ["norms.png", "finetuning.png", "pretraining.png"]
    files += [f"{name}/samples.png" for name in NORMS]
    assert sorted(pictures) == sorted((folder / file).read_bytes() for file in files)
    assert pictures[0] == (folder / "norms.png").read_bytes()  # leads


# ---- the tool


@pytest.mark.slow
def test_the_tool_from_end_to_end(tmp_path):
    """The whole quickstart with tiny data, killed during a fine-tuning and started again."""
    out = tmp_path / "out"
    command = [
        sys.executable, "tools/quickstart", "--output-dir", str(out),
        "--pretrain", "SOLVER.EPOCHS 1 INPUT.SIZE 32 INPUT.SIZE_TEST 32 SOLVER.IMS_PER_BATCH 512",
        "--finetune", "SOLVER.MAX_ITER 30 SOLVER.IMS_PER_BATCH 2",
    ]  # fmt: skip
    first = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    log = out / "refbn" / "log.txt"
    while not (log.exists() and "iter: 19" in log.read_text()):
        assert first.poll() is None, "it ended early"
        time.sleep(0.2)
    os.killpg(first.pid, signal.SIGINT)
    assert first.wait(timeout=60) != 0
    assert (out / "refbn" / "last_checkpoint").exists() and not (out / "report.html").exists()
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "refbn_d2.engines --resume" in second.stdout
    assert "refbn_d2.pretrain" not in second.stdout
    page = (out / "report.html").read_text()
    for name in NORMS:
        last = (out / name / "metrics.json").read_text().splitlines()[-1]
        assert f"<td>{json.loads(last)['bbox/AP']:.1f}</td>" in page
