"""Plan the runs of a study: their folders, their commands, and what their results depend on.

Names:

    recipe      everything that a run's numbers depend on, as a flat dict; results of another
                recipe are refused
"""

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from refbn_d2.config import get_cfg, refbn_options
from refbn_d2.config.cfg_node import leaves
from refbn_d2.config.pretrain import check_pretrain_config, get_pretrain_cfg
from refbn_d2.study.checks import check_backbone, check_masks
from refbn_d2.study.data import DetectionSets, sets_of
from refbn_d2.study.fingerprint import code_hash, weights_hash
from refbn_d2.study.made_from import check_made_from
from refbn_d2.study.spec import Condition, Norm, Overrides, Study, closest
from refbn_d2.utils.errors import ConfigError

# Config keys that change no number, or that the recipe holds in another form.
_NOT_IN_RECIPE = ("OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.DEVICE", "DATASETS.REGISTER")


@dataclass(frozen=True)
class Stage:
    """One process of a job: `python -m <module> <arguments>`."""

    name: str
    module: str
    arguments: tuple[str, ...]
    resumable: bool = False  # takes --resume if its output folder holds a checkpoint
    output_dir: Path | None = None
    leaves: Path | None = None  # a file that exists, complete, once the stage is done

    def command(self, resume: bool = False) -> list[str]:
        more = ["--resume"] if resume else []
        return [sys.executable, "-m", self.module, *more, *self.arguments]

    def shown(self) -> str:
        return shlex.join(["python", "-m", self.module, *self.arguments])


@dataclass(frozen=True)
class Job:
    """The work in one folder: a pretraining, its conversion, or a run with its evaluation."""

    id: str
    folder: Path
    stages: tuple[Stage, ...]
    recipe: Mapping[str, Any]
    needs: str = ""  # id of the job whose backbone it starts from
    norm: str = ""
    condition: str = ""
    seed: int = -1
    tags: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        return self.id.partition("/")[0]

    @property
    def run(self) -> tuple[str, str, int]:
        return self.norm, self.condition, self.seed


@dataclass(frozen=True)
class Only:
    """A selection of a study's runs; an empty set selects all."""

    norm: frozenset[str] = frozenset()
    condition: frozenset[str] = frozenset()
    seed: frozenset[str] = frozenset()

    def __contains__(self, run: tuple[str, str, int]) -> bool:
        norm, condition, seed = run
        return (
            (not self.norm or norm in self.norm)
            and (not self.condition or condition in self.condition)
            and (not self.seed or str(seed) in self.seed)
        )


def parse_only(text: str, study: Study) -> Only:
    """Parse `norm=BN,seed=1,condition=2 iid`; a key given twice selects both values.

    Raises:
        ConfigError: the study does not have a key or a value.
    """
    known = {
        "norm": list(study.norms),
        "condition": list(study.conditions),
        "seed": list(map(str, study.seeds)),
    }
    chosen: dict[str, set[str]] = {key: set() for key in known}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key.strip() not in known:
            raise ConfigError(
                f"--only {text!r}: {part!r} is not allowed; write norm=, seed= or condition="
            )
        key, value = key.strip(), value.strip()
        if value not in known[key]:
            raise ConfigError(
                f"--only {text!r}: {study.file} has no {key} {value!r}{closest(value, known[key])}"
            )
        chosen[key].add(value)
    return Only(**{key: frozenset(values) for key, values in chosen.items()})


def runs_of(study: Study) -> list[tuple[Norm, Condition, int]]:
    """Return norms x seeds x conditions, seed by seed: an unfinished study compares all norms."""
    return [
        (study.norms[norm], condition, seed)
        for seed in study.seeds
        for condition in study.conditions.values()
        for norm in condition.norms
    ]


class Plan:
    """The jobs of a study in a folder. All configs are built at once, so that errors show now.

    Raises:
        ConfigError: a config cannot be used; names norm and condition.
    """

    def __init__(self, study: Study, folder: Path, engine: str) -> None:
        self.study, self.folder, self.engine = study, Path(folder), engine
        self.cfg = self._resolved(study.overrides, "")
        self.sets = sets_of(study, self.cfg, self.folder)
        self.digests = self.sets.digests()
        self.runs = [self._run(*run) for run in runs_of(study)]
        backbones = {job.id: job for norm in study.norms.values() for job in self._backbones(norm)}
        self.pretrainings = list(backbones.values())
        folders = [job.folder for job in self.jobs()]
        if len(set(folders)) < len(folders):
            raise ConfigError(
                f"study file {study.file}: the names of two norms or conditions differ only in "
                "characters that a folder's name leaves out; rename one"
            )

    def jobs(
        self, only: Only | None = None, done: Collection[tuple[str, str, int]] = ()
    ) -> list[Job]:
        """Return the runs of `only` that are not `done`, after the pretrainings that are needed.

        Of the whole study, the timing needs some too.
        """
        only = only or Only()
        runs = [run for run in self.runs if run.run in only and run.run not in done]
        return self._needed([*runs, *(self.timed() if only == Only() else ())]) + runs

    def timed(self) -> list[Job]:
        """Return the runs whose training is timed: the first seed of each norm."""
        timing, seed = self.study.timing, self.study.seeds[0]
        chosen = timing.conditions if timing.rounds else ()
        return [run for run in self.runs if run.condition in chosen and run.seed == seed]

    def settings(self) -> dict[str, str]:
        """Return {"norm=X,condition=Y": hash of what its numbers depend on but seed and code}."""
        pretrained = {job.id: {**job.recipe, "code": ""} for job in self.pretrainings}
        varying = ("SEED", "code", "pretraining", "pretraining.recipe")
        found = {}
        for run in self.runs:
            fixed = {key: value for key, value in run.recipe.items() if key not in varying}
            fixed["pretraining"] = pretrained.get(run.needs)
            found[cell_name(run.norm, run.condition)] = digest(fixed)[:8]
        return found

    def make_data(self, jobs: Iterable[Job]) -> None:
        """Write the derived sets that the jobs need and that are missing.

        Raises:
            RefBNError, OSError: the data cannot be used, or sets of other settings are there.
        """
        hold_outs = {self.study.conditions[job.condition].hold_out for job in jobs if job.condition}
        field = dict(leaves(self.cfg)).get("DATALOADER.DOMAIN_FIELD", "")
        check_made_from(self.sets.folder, self.study, self.digests, field, any(hold_outs))
        self.sets.make(sorted(hold_outs, key=str))

    # ---- parts

    def _needed(self, runs: Iterable[Job]) -> list[Job]:
        """Return the pretrainings and conversions that the runs start from, in their order."""
        needed = {run.needs for run in runs}
        needed |= {job.needs for job in self.pretrainings if job.id in needed}
        return [job for job in self.pretrainings if job.id in needed]

    def _run(self, norm: Norm, condition: Condition, seed: int) -> Job:
        study = self.study
        overrides = study.overrides | condition.overrides | norm.overrides
        cfg = self._resolved(overrides, f", norm {norm.name!r}, condition {condition.name!r}")
        folder = self.folder / "runs" / slug(condition.name) / slug(norm.name) / f"seed{seed}"
        where = f"study file {study.file}, norm {norm.name!r}, condition {condition.name!r}"
        if study.task == "detection":
            check_masks(study.evaluate, cfg.MODEL.MASK_ON, where)
        backbones = self._backbones(norm) if condition.pretrained else []
        pretraining = backbones[-1] if backbones else None
        opts = [*flat(overrides), "SEED", seed, *self.sets.training(condition.hold_out)]
        if pretraining:
            made = norm.convert or backbones[0].recipe["MODEL.NORM"]
            check_backbone(made, cfg.MODEL.RESNETS.NORM, where)
            weights = pretraining.folder / "backbone.pkl"
            opts += ["MODEL.WEIGHTS", str(weights.resolve())]
        elif cfg.MODEL.WEIGHTS and not condition.pretrained:
            opts += ["MODEL.WEIGHTS", ""]
        if pretraining or not condition.pretrained:
            cfg.MODEL.WEIGHTS = ""  # the run does not load what the config names
        recipe = {
            **self._recipe(cfg), "SEED": seed, "engine": self.engine,
            "hold_out": condition.hold_out, "data": self.digests,
            "register": study.data.register, "train_images": study.data.train_images,
            "test_images": study.data.test_images, "tuning": study.data.tuning,
            "evaluate": self._predicted_on(), "code": code_hash(),
            "pretraining": pretraining and pretraining.id,
            "pretraining.recipe": pretraining and digest(pretraining.recipe),
        }  # fmt: skip
        stages = [self._training(folder, study.config, opts), *self._evaluation(folder, opts)]
        return Job(
            f"run/{norm.name}/{condition.name}/{seed}", folder, tuple(stages), plain(recipe),
            pretraining.id if pretraining else "", norm.name, condition.name, seed,
            {"max_dets": cfg.TEST.MAX_DETS_PER_IMAGE} if study.task == "detection" else {},
        )  # fmt: skip

    def _predicted_on(self) -> dict[str, Any]:
        """Return the part of `evaluate` that a run's processes do; the rest uses their files."""
        evaluate = self.study.evaluate
        return {
            "corruptions": evaluate.corruptions, "severities": evaluate.severities,
            "images": evaluate.images,
            "domains": evaluate.domains and self.study.task == "classification",
        }  # fmt: skip

    def _training(self, folder: Path, config: Path, opts: Sequence, name: str = "train") -> Stage:
        arguments = ["--config-file", str(config), *words([*opts, "OUTPUT_DIR", str(folder)])]
        if self.study.task == "classification" or name == "pretrain":
            return Stage(name, "refbn_d2.pretrain", tuple(arguments), True, folder)
        engine = ("--engine", self.engine)
        return Stage(name, "refbn_d2.engines", (*engine, *arguments), True, folder)

    def _evaluation(self, folder: Path, opts: Sequence) -> list[Stage]:
        """Return the processes that predict on everything but the whole test set."""
        study, final = self.study, str(folder / "model_final.pth")
        config = ("--config-file", str(study.config))
        if isinstance(self.sets, DetectionSets):
            if not self.sets.corrupted:
                return []
            more = ["MODEL.WEIGHTS", final, "OUTPUT_DIR", str(folder / "corrupted")]
            arguments = words([*opts, *self.sets.evaluation(), *more])
            first = ("--engine", self.engine, "--eval-only", *config)
            return [Stage("evaluate", "refbn_d2.engines", (*first, *arguments))]
        if not (study.evaluate.corruptions or study.evaluate.domains):
            return []
        more = ["MODEL.WEIGHTS", final, "OUTPUT_DIR", str(folder / "others")]
        sets = ("--sets", json.dumps(self.sets.evaluation()))
        arguments = words([*opts, *more])
        return [Stage("evaluate", "refbn_d2.study.classification", (*config, *sets, *arguments))]

    def _backbones(self, norm: Norm) -> list[Job]:
        """Return the pretraining of a norm and, if there is one, the conversion of its backbone."""
        section = self.study.pretrain
        if section is None:
            return []
        overrides = section.overrides | norm.pretrain
        cfg = self._pretrain_cfg(section.config, overrides, f", pretrain of norm {norm.name!r}")
        recipe = plain({**self._recipe(cfg), "code": code_hash()})
        name = f"{slug(cfg.MODEL.NORM)}-{digest(recipe)[:6]}"
        folder = self.folder / "pretrain" / name
        stage = self._training(folder, section.config, flat(overrides), "pretrain")
        pretraining = Job(f"pretrain/{name}", folder, (stage,), recipe)
        if not norm.convert:
            return [pretraining]
        if cfg.MODEL.NORM in ("GN", "RefIN"):
            raise ConfigError(
                f"study file {self.study.file}, norms.{norm.name}.convert: a backbone that is "
                f"pretrained with {cfg.MODEL.NORM} cannot be converted to {norm.convert}; only one "
                "with a batch norm can"
            )
        return [pretraining, _conversion(pretraining, norm.convert)]

    def _recipe(self, cfg) -> dict[str, Any]:
        recipe = {k: v for k, v in leaves(cfg) if not k.startswith(_NOT_IN_RECIPE)}
        if cfg.MODEL.WEIGHTS:
            with _named(f"study file {self.study.file}"):
                recipe["MODEL.WEIGHTS"] = weights_hash(cfg.MODEL.WEIGHTS)
        return recipe

    def _resolved(self, overrides: Overrides, where: str):
        study = self.study
        if study.task == "classification":
            return self._pretrain_cfg(study.config, overrides, where)
        with _named(f"study file {study.file}{where}"):
            cfg = get_cfg()
            cfg.merge_from_file(str(study.config))
            cfg.merge_from_list(flat(overrides))
            self._check_norms(overrides)
            if self.engine == "torchvision":
                from refbn_d2.engines.torchvision.supported import check_supported

                check_supported(cfg)
            refbn_options(cfg)
        return cfg

    def _pretrain_cfg(self, config: Path, overrides: Overrides, where: str):
        with _named(f"study file {self.study.file}{where}"):
            cfg = get_pretrain_cfg()
            cfg.merge_from_file(str(config))
            cfg.merge_from_list(flat(overrides))
            self._check_norms(overrides)
            check_pretrain_config(cfg)
            refbn_options(cfg)
        return cfg

    def _check_norms(self, overrides: Overrides) -> None:
        from refbn_d2.engines.torchvision.supported import NORMS

        known = NORMS + (("LN", "nnSyncBN", "naiveSyncBN") if self.engine == "detectron2" else ())
        for key, value in overrides.items():
            if key.endswith(".NORM") and value not in known:
                raise ConfigError(f"{key} = {value!r} is not a known norm{closest(value, known)}")


class _named:
    """Add the place in the study to a config's error."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, ValueError | KeyError):
            raise ConfigError(f"{self.where}: {error}") from error


def _conversion(pretraining: Job, norm: str) -> Job:
    name = f"{pretraining.folder.name}-to-{norm}"
    folder = pretraining.folder.with_name(name)
    converted = folder / "backbone.pkl"
    source = pretraining.folder / converted.name
    arguments = (str(source), str(converted), "--to", "detectron2", "--norm", norm)
    stage = Stage("convert", "refbn_d2.export", arguments, leaves=converted)
    recipe = {**pretraining.recipe, "convert": norm}
    return Job(f"convert/{name}", folder, (stage,), recipe, needs=pretraining.id)


def cell_name(norm: str, condition: str) -> str:
    """Return the name of all runs of a norm under a condition, as `--only` takes it."""
    return f"norm={norm},condition={condition}"


def flat(overrides: Mapping[str, Any]) -> list:
    """Return [KEY, VALUE, KEY, VALUE, ...]."""
    return [item for pair in overrides.items() for item in pair]


def words(opts: Sequence) -> list[str]:
    """Return overrides as the words of a command line."""
    return [item if isinstance(item, str) else repr(item) for item in opts]


def slug(name: str) -> str:
    """Return the name with only letters, digits, dots and dashes, for a folder."""
    return re.sub(r"[^\w.]+", "-", name).strip("-") or "-"


def plain(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe as it comes back from a JSON file."""
    return json.loads(json.dumps(recipe, sort_keys=True))


def digest(recipe: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain(recipe), sort_keys=True).encode()).hexdigest()[:16]
