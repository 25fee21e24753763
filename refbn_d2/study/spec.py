"""Read and check a study file: what to train, with which norms, seeds and conditions.

docs/measuring.md explains every key. The whole file is checked before anything runs.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from refbn_d2.checkpoint.convert import TARGET_NORMS
from refbn_d2.data import catalog
from refbn_d2.data.corruptions import CORRUPTIONS, SEVERITIES, SUBSET
from refbn_d2.engines.select import ENGINES
from refbn_d2.utils.errors import ConfigError

TASKS = ("detection", "classification")
METRICS = {
    "detection": tuple(f"{t}/{m}" for t in ("bbox", "segm") for m in ("AP", "AP50", "AP75")),
    "classification": ("error", "loss"),
}
CURVES = {  # names in metrics.json that `steps_to` can use
    "detection": (
        "total_loss", "loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc",
        "bbox/AP", "bbox/AP50", "segm/AP", "segm/AP50",
    ),
    "classification": ("total_loss", "train/top1", "val/top1", "val/loss"),
}  # fmt: skip
_DEFAULT_METRICS = {"detection": ["bbox/AP", "segm/AP"], "classification": ["error"]}
_NOT_IN_NAMES = set(',=/"\\$')  # of norms and conditions: `--only`, CSV files, charts

Overrides = dict[str, Any]  # full config key -> value


@dataclass(frozen=True)
class Norm:
    name: str
    overrides: Overrides
    pretrain: Overrides  # of the pretraining; norms with equal overrides share one
    convert: str  # norm that the pretrained backbone is converted to; "": none
    text: str  # description for the report


@dataclass(frozen=True)
class Condition:
    name: str
    overrides: Overrides
    norms: tuple[str, ...]  # the norms that are trained under it
    pretrained: bool  # False: from scratch
    hold_out: str | None  # a domain that is left out of the training set
    text: str  # description for the report


@dataclass(frozen=True)
class Data:
    """The data of a study, and how much of it is used."""

    register: dict[str, tuple[str, str]]  # name -> (json, image folder) in $DETECTRON2_DATASETS
    train_images: int  # 0: all
    test_images: int  # 0: all
    tuning: float  # share of the training set to evaluate on instead of the test set; 0: none


@dataclass(frozen=True)
class Evaluate:
    metrics: tuple[str, ...]
    domains: bool
    corruptions: tuple[str, ...]
    severities: tuple[int, ...]
    images: int  # number of pictures to corrupt; 0: all of the test set
    steps_to: dict[str, tuple[float, ...]]  # name in metrics.json -> targets


@dataclass(frozen=True)
class Timing:
    """A measurement of seconds a step and memory, after the training runs; none with rounds 0."""

    rounds: int
    steps: int
    conditions: tuple[str, ...]
    baseline: str  # the norm whose ratio is 1


@dataclass(frozen=True)
class Pretrain:
    config: Path
    overrides: Overrides


@dataclass(frozen=True)
class Study:
    name: str
    file: Path
    title: str
    text: str
    task: str
    engine: str
    config: Path
    overrides: Overrides
    seeds: tuple[int, ...]
    norms: dict[str, Norm]
    baseline: str
    conditions: dict[str, Condition]
    data: Data
    evaluate: Evaluate
    timing: Timing
    pretrain: Pretrain | None = field(default=None)


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice: the last one would win silently."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names = [str(key.value) for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"{name!r} stands twice in one section; remove or rename one",
                    problem_mark=node.start_mark,
                )
        return node


def load_study(path: str | Path) -> Study:
    """Read and check a study file.

    Raises:
        FileNotFoundError: it does not exist.
        ConfigError: it is not YAML, or a key or value cannot be used; names it, and the closest
            known one.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(), _Loader)
    except FileNotFoundError:
        raise FileNotFoundError(f"study file {path} does not exist; check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"study file {path} is not valid YAML: {error}") from error
    return _Reader(path).study(content)


def closest(name: object, known: Iterable[str]) -> str:
    """Return "; did you mean X? Known: ..." for an error message."""
    known = list(map(str, known))
    lower = {k.lower(): k for k in known}
    match = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.4)
    hint = f"did you mean {lower[match[0]]!r}? " if match else ""
    return f"; {hint}Known: {', '.join(known)}"


class _Reader:
    """The checks of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def error(self, where: str, why: str) -> ConfigError:
        return ConfigError(f"study file {self.path}, {where}: {why}")

    def section(self, value: Any, where: str, keys: Iterable[str]) -> dict:
        """Return the mapping `value`, {} for None, after a check that it has only these keys."""
        keys = list(keys)
        if not isinstance(value, Mapping | None):
            raise self.error(where, f"is {value!r}; write `key: value` lines")
        for key in value or {}:
            if key not in keys:
                raise self.error(where, f"key {key!r} is unknown{closest(key, keys)}")
        return dict(value or {})

    def study(self, content: Any) -> Study:
        keys = [name for name in Study.__dataclass_fields__ if name not in ("name", "file")]
        top = self.section(content, "top level", keys)
        for key in ("task", "config", "norms", "seeds"):
            if not top.get(key):
                raise self.error(key, "is missing; every study needs it")
        task = self.choice(top["task"], "task", TASKS)
        norms = self.norms(top["norms"])
        baseline = self.choice(str(top.get("baseline") or next(iter(norms))), "baseline", norms)
        conditions = self.conditions(top.get("conditions"), norms)
        pretrain = top.get("pretrain")
        if pretrain:
            if task == "classification":
                raise self.error("pretrain", "is only for task: detection; remove it")
            section = self.section(pretrain, "pretrain", ("config", "overrides"))
            pretrain = Pretrain(
                self.config(section.get("config"), "pretrain.config"),
                self.overrides(section.get("overrides"), "pretrain.overrides"),
            )
        elif keys := [
            f"norms.{norm.name}.{key}"
            for norm in norms.values()
            for key in ("pretrain", "convert")
            if getattr(norm, key)
        ]:
            if task == "classification":
                raise self.error(keys[0], "is only for task: detection; remove it")
            raise self.error(keys[0], "the study has no section `pretrain`; add it")
        return Study(
            name=self.path.stem, file=self.path, title=str(top.get("title") or self.path.stem),
            text=str(top.get("text") or ""), task=task,
            engine=self.choice(top.get("engine", "auto"), "engine", ENGINES),
            config=self.config(top["config"], "config"),
            overrides=self.overrides(top.get("overrides"), "overrides"),
            seeds=self.seeds(top["seeds"]), norms=norms, baseline=baseline, conditions=conditions,
            data=self.data(top.get("data"), task),
            evaluate=self.evaluate(top.get("evaluate"), task),
            timing=self.timing(top.get("timing"), conditions, norms, baseline),
            pretrain=pretrain or None,
        )  # fmt: skip

    def choice(self, value: Any, where: str, known: Iterable[str]) -> str:
        if value not in list(known):
            raise self.error(where, f"{value!r} is unknown{closest(value, known)}")
        return value

    def choices(
        self, value: Any, where: str, known: Iterable[str], default: Iterable[str] = ()
    ) -> tuple[str, ...]:
        if value is None:
            return tuple(default)
        if not isinstance(value, list):
            raise self.error(where, f"is {value!r}; write a list: [{value}]")
        if not value:
            raise self.error(where, f"is empty; choose from {', '.join(known)}")
        chosen = tuple(self.choice(str(name), where, known) for name in value)
        if len(set(chosen)) < len(chosen):
            raise self.error(where, f"{value} names one twice; remove it")
        return chosen

    def config(self, value: Any, where: str) -> Path:
        if not isinstance(value, str):
            raise self.error(where, f"is {value!r}; name a config file, relative to the study file")
        path = self.path.parent / value
        if not path.is_file():
            raise self.error(where, f"{path} does not exist; paths start from the study file")
        return path

    def overrides(self, value: Any, where: str) -> Overrides:
        if not isinstance(value, Mapping | None):
            raise self.error(where, f"is {value!r}; write `FULL.KEY: value` lines")
        for key, inner in (value or {}).items():
            if not isinstance(key, str) or isinstance(inner, Mapping):
                raise self.error(where, f"{key}: {inner!r}; write full keys: `SOLVER.BASE_LR: 1`")
            if key in ("SEED", "OUTPUT_DIR") or key.startswith("DATASETS.REGISTER"):
                raise self.error(where, f"{key} is set by the study itself; remove it")
        return dict(value or {})

    def seeds(self, value: Any) -> tuple[int, ...]:
        if not isinstance(value, list) or not all(type(v) is int and 0 <= v < 2**32 for v in value):
            raise self.error(
                "seeds", f"is {value!r}; write a list of integers from 0 to 2^32 - 1: [1, 2, 3]"
            )
        if len(set(value)) < len(value):
            raise self.error("seeds", f"{value} names a seed twice; remove one")
        return tuple(value)

    def named(self, value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, Mapping) or not value:
            raise self.error(where, f"is {value!r}; write `name:` sections")
        sections = {str(name): section for name, section in value.items()}
        for name in sections:
            if (
                not any(map(str.isalnum, name)) or not name.isprintable() or name != name.strip()
                or _NOT_IN_NAMES & set(name)
            ):  # fmt: skip
                raise self.error(
                    where,
                    f"the name {name!r} must have a letter or a digit, no blank at its ends, and "
                    'none of , = / \\ $ " and control characters',
                )
        return sections

    def norms(self, value: Any) -> dict[str, Norm]:
        norms = {}
        for name, section in self.named(value, "norms").items():
            where = f"norms.{name}"
            section = self.section(section, where, ("overrides", "pretrain", "convert", "text"))
            if convert := str(section.get("convert") or ""):
                self.choice(convert, f"{where}.convert", TARGET_NORMS)
            norms[name] = Norm(
                name,
                self.overrides(section.get("overrides"), f"{where}.overrides"),
                self.overrides(section.get("pretrain"), f"{where}.pretrain"),
                convert,
                str(section.get("text") or ""),
            )
        return norms

    def conditions(self, value: Any, norms: Mapping[str, Norm]) -> dict[str, Condition]:
        conditions = {}
        for name, section in self.named(value or {"default": None}, "conditions").items():
            where = f"conditions.{name}"
            keys = ("overrides", "norms", "pretrained", "hold_out", "text")
            section = self.section(section, where, keys)
            chosen = self.choices(section.get("norms"), f"{where}.norms", norms, norms)
            pretrained = section.get("pretrained", True)
            if not isinstance(pretrained, bool):
                raise self.error(f"{where}.pretrained", f"is {pretrained!r}; write true or false")
            hold_out = section.get("hold_out")
            if hold_out is not None and not str(hold_out).strip():
                raise self.error(f"{where}.hold_out", "is empty; name a domain, or remove it")
            conditions[name] = Condition(
                name, self.overrides(section.get("overrides"), f"{where}.overrides"),
                chosen, pretrained, None if hold_out is None else str(hold_out),
                str(section.get("text") or ""),
            )  # fmt: skip
        return conditions

    def data(self, value: Any, task: str) -> Data:
        section = self.section(value, "data", Data.__dataclass_fields__)
        register = section.get("register") or {}
        if task == "classification" and register:
            raise self.error(
                "data.register", "is only for task: detection; set DATASETS.ROOT instead"
            )
        if not isinstance(register, Mapping):
            raise self.error("data.register", f"is {register!r}; write `name: [json, images]`")
        entries = {}
        for name, files in register.items():
            if not (isinstance(files, list) and len(files) == 2 and all(map(str, files))):
                raise self.error(f"data.register.{name}", f"is {files!r}; write [json, images]")
            if catalog.builtin(str(name)):
                raise self.error(f"data.register.{name}", "is a built-in data set; rename it")
            entries[str(name)] = (str(files[0]), str(files[1]))
        tuning = section.get("tuning", 0)
        if not isinstance(tuning, int | float) or not 0 <= tuning < 1:
            raise self.error("data.tuning", f"is {tuning!r}; allowed: a number in [0, 1)")
        return Data(
            entries, self.count(section, "data", "train_images"),
            self.count(section, "data", "test_images"), float(tuning),
        )  # fmt: skip

    def count(self, section: dict, where: str, key: str, default: int = 0, least: int = 0) -> int:
        value = section.get(key, default)
        if type(value) is not int or value < least:
            raise self.error(f"{where}.{key}", f"is {value!r}; allowed: an integer from {least}")
        return value

    def evaluate(self, value: Any, task: str) -> Evaluate:
        section = self.section(value, "evaluate", ("metrics", "domains", "corruptions", "steps_to"))
        metrics = self.choices(
            section.get("metrics"), "evaluate.metrics", METRICS[task], _DEFAULT_METRICS[task]
        )
        domains = section.get("domains", False)
        if not isinstance(domains, bool):
            raise self.error("evaluate.domains", f"is {domains!r}; write true or false")
        names, severities, images = self.corruptions(section.get("corruptions"))
        steps_to = {}
        for curve, targets in self.section_of_targets(section.get("steps_to")).items():
            self.choice(curve, "evaluate.steps_to", CURVES[task])
            targets = targets if isinstance(targets, list) else [targets]
            if not targets or not all(type(t) in (int, float) and abs(t) < 1e9 for t in targets):
                raise self.error(f"evaluate.steps_to.{curve}", f"is {targets!r}; write numbers")
            steps_to[curve] = tuple(map(float, targets))
        return Evaluate(metrics, domains, names, severities, images, steps_to)

    def section_of_targets(self, value: Any) -> dict:
        if not isinstance(value, Mapping | None):
            raise self.error("evaluate.steps_to", f"is {value!r}; write `total_loss: 1.0`")
        return {str(key): inner for key, inner in (value or {}).items()}

    def corruptions(self, value: Any) -> tuple[tuple[str, ...], tuple[int, ...], int]:
        if not value:
            return (), (), 0
        where = "evaluate.corruptions"
        section = self.section(value, where, ("names", "severities", "images"))
        names = section.get("names", "subset")
        if isinstance(names, str):
            self.choice(names, f"{where}.names", ("subset", "full", *CORRUPTIONS))
            names = list({"subset": SUBSET, "full": CORRUPTIONS}.get(names, (names,)))
        names = self.choices(names, f"{where}.names", CORRUPTIONS)
        severities = section.get("severities", list(SEVERITIES))
        if (
            not isinstance(severities, list) or not severities
            or not all(type(s) is int and s in SEVERITIES for s in severities)
            or len(set(severities)) < len(severities)
        ):  # fmt: skip
            raise self.error(
                f"{where}.severities", f"is {severities!r}; allowed: some of 1 to 5, each once"
            )
        return names, tuple(severities), self.count(section, where, "images")

    def timing(
        self, value: Any, conditions: Mapping, norms: Mapping[str, Norm], baseline: str
    ) -> Timing:
        section = self.section(value, "timing", Timing.__dataclass_fields__)
        chosen = self.choices(
            section.get("conditions"), "timing.conditions", conditions, list(conditions)[:1]
        )
        return Timing(
            self.count(section, "timing", "rounds", 3 if value else 0),
            self.count(section, "timing", "steps", 40, least=20), chosen,
            self.choice(str(section.get("baseline") or baseline), "timing.baseline", norms),
        )  # fmt: skip
