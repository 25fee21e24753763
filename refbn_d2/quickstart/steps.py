"""Run the steps of the quickstart: data, pretraining, conversion, fine-tuning, and a report.

Each step is a command that a user could type. `steps.json` in the output folder records which steps
are done, so that an interrupted run resumes.
"""

import base64
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from refbn_d2.utils.errors import ConfigError, DataError
from refbn_d2.utils.file_io import read_metrics, write_text
from refbn_d2.utils.lock import locked
from refbn_d2.visualization.curves import compare_curves
from refbn_d2.visualization.intervals import plot_intervals

TEMPLATE = Path(__file__).with_name("report.html.jinja")


BACKBONES = (  # name, norm, text
    ("bn", "BN", "Three of the detectors start from it."),
    ("refin", "RefIN", "The same recipe with RefIN, for the detector with RefIN."),
    ("gn", "GN", "The same recipe with GroupNorm, for the detector with GN."),
)
DETECTORS = (  # name, norm, backbone, text
    (
        "refin", "RefIN", "refin",
        "Each picture is normalized by its own moments, mixed with those of the reference batch: "
        "32 training pictures, drawn once.",
    ),
    (
        "refbn", "RefBN", "bn",
        "The moments of the reference batch are mixed into those of every batch. RefBN has BN's "
        "parameters, so it starts from BN's backbone.",
    ),
    ("gn", "GN", "gn", "Each picture is normalized by its own moments, in groups of channels."),
    (
        "frozenbn", "FrozenBN", "bn",
        "Detectron2's default: the moments and parameters of the pretraining, fixed.",
    ),
    ("bn", "BN", "bn", "Each batch is normalized by its own moments: two similar pictures'."),
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A command, its purpose, and its time relative to that of the shortest step."""

    name: str
    title: str
    text: str
    command: tuple[str, ...]
    share: float
    leaves: str = ""  # a file that exists, complete, after the step
    output_dir: str = ""  # the folder of a training, which `--resume` continues


def steps(out: str, changes: dict[str, list[str]]) -> list[Step]:
    """Return the steps in order.

    Args:
        out: the output folder.
        changes: overrides of the configs, KEY VALUE ..., for "pretrain" and "finetune".
    """
    listed = [
        Step(
            "detection", "Data for detection",
            "A data set in COCO format: 12 shapes in 7 photometric domains, 4,000 pictures for "
            "training and 500 for evaluation. They are the same on every machine.",
            ("-m", "refbn_d2.data.shapes"), 1,
        ),
        Step(
            "classification", "Data for pretraining",
            "The same shapes in ImageNet's layout: one object a picture, one folder a class.",
            ("-m", "refbn_d2.data.shapes", "--classification"), 1,
        ),
    ]  # fmt: skip
    for name, norm, text in BACKBONES:
        folder = f"{out}/pretrain_{name}"
        listed.append(
            Step(
                f"pretrain_{name}", f"Pretrain ResNet-18 with {norm}",
                f"A classifier, from random weights. {text}",
                (
                    "-m", "refbn_d2.pretrain",
                    "--config-file", "configs/pretrain/shapes_resnet18_bn.yaml",
                    "MODEL.NORM", norm, "SOLVER.EPOCHS", "3", "OUTPUT_DIR", folder,
                    *changes["pretrain"],
                ), 14, output_dir=folder,
            )
        )  # fmt: skip
    for name, norm, backbone, text in DETECTORS:
        listed.append(
            Step(
                name, f"Fine-tune Mask R-CNN with {norm}", text,
                (
                    "-m", "refbn_d2.engines", "--engine", "torchvision",
                    "--config-file", "configs/quickstart/mask_rcnn_R_18_FPN_2_similar.yaml",
                    "MODEL.RESNETS.NORM", norm,
                    "MODEL.WEIGHTS", f"{out}/pretrain_{backbone}/backbone.pkl",
                    "OUTPUT_DIR", f"{out}/{name}", *changes["finetune"],
                ), 10, output_dir=f"{out}/{name}",
            )
        )  # fmt: skip
    exported = f"{out}/mask_rcnn_frozenbn.pth"
    listed.append(
        Step(
            "export", "Export to a stock Detectron2",
            "In evaluation RefBN is an affine map. Converted to FrozenBN, the detector loads into "
            "a stock Detectron2 without this package and gives the same detections.",
            (
                "-m", "refbn_d2.export", f"{out}/refbn/model_final.pth", exported,
                "--to", "detectron2", "--norm", "FrozenBN", "--verify",
            ), 1, leaves=exported,
        )
    )  # fmt: skip
    return listed


def run(folder: Path, todo: list[Step]) -> "Record":
    """Run the steps that are not recorded as done in `folder`.

    Raises:
        ChildProcessError: a step failed; names its command.
        ConfigError: `folder` holds a quickstart with other commands, or another process runs one.
    """
    with _ended_by_sigterm(), locked(folder, "--output-dir"):
        record = Record(folder / "steps.json")
        record.check(todo)
        for number, step in enumerate(todo, start=1):
            if record.is_done(step):
                continue
            print(f"\n[{number}/{len(todo)}] {step.title}{record.estimate(todo)}", flush=True)
            _do(step, record)
        return record


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, so that the step that runs is stopped too."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Record:
    """A steps.json: {name: {"command", "seconds", "done", "output"}}, written after every step.

    Raises:
        DataError: the file is not such a record.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps: dict[str, dict[str, Any]] = {}
        if path.exists():
            try:
                self.steps = json.loads(path.read_text())
            except ValueError as error:
                raise DataError(
                    f"{path} is not a record of a quickstart ({error}): delete it, or give "
                    "--output-dir"
                ) from error

    def check(self, todo: Iterable[Step]) -> None:
        for step in todo:
            before = self.steps.get(step.name, {}).get("command", list(step.command))
            if before != list(step.command):
                raise ConfigError(
                    f"{self.path.parent} holds a quickstart with other commands "
                    f"({shlex.join(before)}"
                    f" there, {shlex.join(step.command)} now): move it away, or give --output-dir."
                )

    def is_done(self, step: Step) -> bool:
        return self.steps.get(step.name, {}).get("done", False)

    def note(self, step: Step, seconds: float, done: bool, output: str) -> None:
        before = self.steps.get(step.name, {"seconds": 0.0})
        self.steps[step.name] = {
            "command": list(step.command),
            "seconds": before["seconds"] + seconds,
            "done": done,
            "output": output,
        }
        write_text(self.path, json.dumps(self.steps, indent=1))

    def estimate(self, todo: list[Step]) -> str:
        """Return " (about N min left)", by the pace so far; "" if it is too early to say."""
        done = [step for step in todo if self.is_done(step)]
        shares = sum(step.share for step in done)
        if shares < 3:  # too early
            return ""
        pace = sum(self.steps[step.name]["seconds"] for step in done) / shares
        left = pace * sum(step.share for step in todo if not self.is_done(step))
        return f" (about {max(1, round(left / 60))} min left)"


def _do(step: Step, record: Record) -> None:
    command = list(step.command)
    if step.output_dir and Path(step.output_dir, "last_checkpoint").exists():
        command.insert(2, "--resume")  # after "-m" and the module
    print(f"$ {_typed(command)}", flush=True)
    if step.leaves and Path(step.leaves).exists():  # it was killed after its last write
        record.note(step, 0.0, True, "")
        return
    start = time.time()
    code, output = None, ""
    try:
        code, output = _call(command)
    finally:
        record.note(step, time.time() - start, code == 0, output)
    if code != 0:
        raise ChildProcessError(
            f"step {step.name!r} ended with exit code {code}; its output above says why. The "
            f"command was: {_typed(command)}"
        )


def _call(command: list[str]) -> tuple[int, str]:
    """Run `command`, show its output, and return its exit code and what it printed on stdout."""
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    lines = []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        return process.wait(), "".join(lines)
    except BaseException:  # stop the child, which then writes a checkpoint
        process.terminate()
        process.communicate()
        raise


def _typed(command: Iterable[str]) -> str:
    return f"python {shlex.join(command)}"


# ---- the report

PRETRAINED = {f"pretrain_{name}": norm for name, norm, _ in BACKBONES}
NORMS = {name: norm for name, norm, *_ in DETECTORS}


def write_report(folder: Path, todo: list[Step], record: Record) -> Path:
    """Write report.html from the files in `folder`: a single file with its pictures."""
    detectors, classifiers = (
        [
            {"name": name, "norm": norm, **_last(folder / name / "metrics.json")}
            for name, norm in runs
        ]
        for runs in (NORMS.items(), PRETRAINED.items())
    )
    plot_intervals(
        {
            title: {run["norm"]: (run[metric], None) for run in detectors}
            for title, metric in (("boxes", "bbox_AP"), ("masks", "segm_AP"))
        },
        "average precision (%)", folder / "norms.png",
    )  # fmt: skip
    for runs, metrics, picture in (
        (NORMS, {"total_loss": "Loss", "loss_cls": "Classification loss"}, "finetuning.png"),
        (PRETRAINED, {"total_loss": "Loss", "val/top1": "Top-1 (%)"}, "pretraining.png"),
    ):
        files = {norm: folder / name / "metrics.json" for name, norm in runs.items()}
        compare_curves(files, metrics, folder / picture)
    pictures = {name: folder / f"{name}.png" for name in ("norms", "finetuning", "pretraining")}
    pictures |= {name: folder / name / "samples.png" for name in NORMS}
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text()).render(
        detectors=detectors,
        classifiers=classifiers,
        steps=[
            {
                "title": step.title,
                "text": step.text,
                "command": _typed(step.command),
                "name": step.name,
                "minutes": record.steps[step.name]["seconds"] / 60,
                "output": record.steps[step.name]["output"] if step.leaves else "",
            }
            for step in todo
        ],
        minutes=sum(record.steps[step.name]["seconds"] for step in todo) / 60,
        pictures={name: _embedded(path) for name, path in pictures.items()},
    )
    write_text(folder / "report.html", page)
    return folder / "report.html"


def _last(metrics_json: Path) -> dict[str, float]:
    """Return the last value of every metric that a run logged, with "_" for "/" in the names."""
    values: dict[str, float] = {}
    for record in read_metrics(metrics_json):
        values |= record
    return {name.replace("/", "_"): value for name, value in values.items()}


def _embedded(png: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"
