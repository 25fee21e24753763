"""Adapt the detectors of a study to new cameras, and measure what that changes.

    python -m refbn_d2.study.adaptation --study configs/studies/nuclei_final.yaml

Run it after the study. A run that left out a domain meets the pictures of that domain. Any other
run meets the study's corruptions and, as "same camera", pictures like those of its training. The
norms' moments are adapted to 32 training pictures of this kind without their annotations
(`refbn_d2.reference.adapt_reference`), and AP is measured on the test pictures of this kind.

Norms in `adaptation/results.csv`:

    BN            not adapted; so are all norms that have nothing to adapt
    BN, N = 16    adapted; the old moments count as 16 pictures
    BN, N = 0     adapted; the old moments are forgotten, as in BN with recomputed statistics

BN and FrozenBN become RefBN first, which computes the same.

Metrics: the study's APs, and "bbox/AP gain", the difference that the adaptation makes.
"""

import argparse
import json
import shlex
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from torch import nn
from tqdm import tqdm

from refbn_d2.checkpoint import load_checkpoint, load_weights
from refbn_d2.config import get_cfg
from refbn_d2.data import catalog
from refbn_d2.data.corruptions import corrupt
from refbn_d2.data.images import read_image
from refbn_d2.engines.torchvision.data import Mapper
from refbn_d2.engines.torchvision.evaluation import Evaluator
from refbn_d2.engines.torchvision.modeling import build_model
from refbn_d2.layers import convert_to_refbn, has_refbn
from refbn_d2.reference import adapt_reference
from refbn_d2.study.data import DetectionSets, read_set, write_subset
from refbn_d2.study.evaluation import evaluate_run
from refbn_d2.study.fingerprint import code_hash
from refbn_d2.study.plan import Job, Plan, parse_only, slug
from refbn_d2.study.report import About
from refbn_d2.study.results import Row, read_csv, write_csv
from refbn_d2.study.runner import Record
from refbn_d2.study.sampling import SEED
from refbn_d2.study.spec import Study, load_study
from refbn_d2.utils.arguments import run_or_exit
from refbn_d2.utils.config_files import find_config_file
from refbn_d2.utils.device import resolve_device
from refbn_d2.utils.errors import ConfigError
from refbn_d2.utils.file_io import read_record, write_text
from refbn_d2.utils.lock import locked

SAME = "same camera"
IMAGES, PRIORS = 32, [16, 0]
TEXT = (
    "The norms' moments adapted to {} unlabeled training pictures of the kind of the test ones. "
    "N is the number of pictures that the old moments count as; BN with N = 0 has recomputed "
    "statistics. A column names the condition of the training and the kind of the pictures."
)


def measure(args: argparse.Namespace) -> None:
    """Write the results of the runs that are done.

    Raises:
        RefBNError, OSError: the study, its data or its folder cannot be used; no run is done.
    """
    _check_numbers(args)
    study = load_study(args.study)
    only = parse_only(args.only, study)
    folder = Path(args.output_dir or f"output/studies/{study.name}")
    plan = Plan(study, folder, "torchvision")
    if not isinstance(plan.sets, DetectionSets):
        raise ConfigError(f"study file {study.file}: adaptation needs task: detection")
    if not any(metric.endswith("/AP") for metric in study.evaluate.metrics):
        raise ConfigError(
            f"study file {study.file}: adaptation needs bbox/AP or segm/AP in evaluate.metrics"
        )
    jobs = [job for job in plan.runs if job.run in only and Record(job).status == "done"]
    if not jobs:
        raise ConfigError(f"{folder} has no run that is done: run the study first")
    about = About(
        f"{study.name}_adaptation", f"{study.title}, a new camera", study.baseline,
        TEXT.format(args.images), _command(study, args.images, args.prior_images),
        code=code_hash("study/adaptation.py"),
    )  # fmt: skip
    header = yaml.safe_dump(vars(about), sort_keys=False, width=100)
    folder /= "adaptation"
    with locked(folder, "--output-dir"):
        rows = _earlier_rows(folder, header)
        for job in tqdm(jobs, "adapting", disable=None):
            measured = Adaptation(plan, plan.sets, job, args.images, args.prior_images).rows()
            rows |= {_key(row): row for row in measured}
        write_csv(rows.values(), folder / "results.csv")
        write_text(folder / "results.yaml", header)
    print(f"Wrote {folder / 'results.csv'} ({len(rows)} rows).")


def _check_numbers(args: argparse.Namespace) -> None:
    if args.images < 1:
        raise ConfigError(f"--images is {args.images}; allowed: 1 or more.")
    if min(args.prior_images) < 0:
        raise ConfigError(f"--prior-images is {min(args.prior_images)}; allowed: 0 or more.")


def _earlier_rows(folder: Path, header: str) -> dict[tuple, Row]:
    """Return the rows that the same command wrote with the same code, as with another --only.

    Raises:
        ConfigError: another command or another version of the code wrote them.
    """
    file, about = folder / "results.csv", folder / "results.yaml"
    if not file.is_file():
        return {}
    if not about.is_file() or about.read_text() != header:
        raise ConfigError(
            f"{file} has the results of other options or of another version of the code (see "
            f"{about.name}). They are not mixed: move both files"
        )
    return {_key(row): row for row in read_csv(file)}


def _key(row: Row) -> tuple:
    return row.norm, row.seed, row.condition, row.metric


class Adaptation:
    """What adaptation changes in one detector."""

    def __init__(
        self, plan: Plan, sets: DetectionSets, job: Job, images: int, priors: Sequence[int]
    ) -> None:
        Record(job).check()
        self.plan, self.job, self.images, self.priors = plan, job, images, priors
        self.sets, self.folder = sets, plan.folder / "adaptation"
        self.measured = evaluate_run(plan.study, sets, job)
        self.hold_out = plan.study.conditions[job.condition].hold_out
        self.metrics = [m for m in plan.study.evaluate.metrics if m.endswith("/AP")]
        self.cfg = get_cfg()
        self.cfg.merge_from_file(str(job.folder / "config.yaml"))
        self.cfg.MODEL.DEVICE = resolve_device(self.cfg.MODEL.DEVICE)
        if self.cfg.MODEL.RESNETS.NORM == "FrozenBN":
            self.cfg.MODEL.RESNETS.NORM = "BN"
            self.cfg.MODEL.BACKBONE.FREEZE_AT = 0

    def rows(self) -> Iterator[Row]:
        job, name = self.job, f"{self.plan.study.name}_adaptation"
        only = f"norm={job.norm},seed={job.seed},condition={job.condition}"
        command = _command(self.plan.study, self.images, self.priors, "--only", only)
        for target in self._targets():
            if missing := [m for m in self.metrics if self._metric(m, target) not in self.measured]:
                raise ConfigError(
                    f"{job.id} has no {self._metric(missing[0], target)}: the adaptation needs "
                    "`evaluate: {domains: true}` and test pictures of the domain that is held out"
                )
            before = {m: self.measured[self._metric(m, target)] for m in self.metrics}
            found = [(job.norm, m, value, n) for m, (value, n, _) in before.items()]
            for prior, after in self._after(target).items():
                norm = f"{job.norm}, N = {prior}"
                for metric, (value, n, _) in before.items():
                    found.append((norm, metric, after[metric], n))
                    found.append((norm, f"{metric} gain", after[metric] - value, n))
            for norm, metric, value, n in found:
                condition = f"{job.condition}: {target}"
                yield Row(name, norm, job.seed, condition, metric, value, n, "done", command)

    def _targets(self) -> list[str]:
        return [self.hold_out] if self.hold_out else [*self.sets.corrupted, SAME]

    def _metric(self, metric: str, target: str) -> str:
        """Return the study's name for `metric` on the test pictures of a kind."""
        if self.hold_out:
            return f"{metric}@{target}"
        return metric if target == SAME else f"{metric}~{target}"

    def _after(self, target: str) -> dict[int, dict[str, float]]:
        """Return {prior images: {metric: AP}}; {} if the detector has nothing to adapt."""
        if not has_refbn(self._model()):
            return {}
        head = {"images": self.images, "priors": list(self.priors), "recipe": self.job.recipe}
        name = "_".join(map(slug, (self.job.norm, self.job.condition, target)))
        file = self.folder / f"{name}_{self.job.seed}.json"
        known = read_record(file, dict, "delete it") if file.exists() else {}
        if known.get("of") == head:
            return {int(prior): values for prior, values in known["after"].items()}
        after = {}
        with tempfile.TemporaryDirectory() as temporary:
            samples = self._samples(target, Path(temporary))
            evaluator = Evaluator(self._test_cfg(target), Path(temporary))
            for prior in self.priors:
                model = self._model()
                adapt_reference(model, samples, len(samples) / (len(samples) + prior), model)
                (found,) = evaluator(model).values()
                after[prior] = {m: found[m.partition("/")[0]]["AP"] for m in self.metrics}
        write_text(file, json.dumps({"of": head, "after": after}, indent=1))
        return after

    def _model(self) -> nn.Module:
        model = build_model(self.cfg)
        weights = str(self.job.folder / "model_final.pth")
        load_weights(model, load_checkpoint(weights)["model"], weights)
        return convert_to_refbn(model).eval()

    def _samples(self, target: str, folder: Path) -> list[dict]:
        """Return training pictures of the kind `target`, as the model takes them."""
        files = self._training_pictures()
        if len(files) < self.images:
            raise ConfigError(
                f"--images {self.images}: {target} has {len(files)} training pictures"
            )
        order = np.random.default_rng(self.job.seed).permutation(len(files))
        files = [files[i] for i in order[: self.images]]
        if not self.hold_out and target != SAME:
            name, severity = target.split("/")
            for place, file in enumerate(files):
                rgb = corrupt(read_image(str(file), "RGB"), name, int(severity), [SEED + 1, place])
                files[place] = folder / f"{place}.png"
                Image.fromarray(rgb).save(files[place])
        mapper = Mapper(self.cfg, is_train=False)
        samples = [mapper({"file_name": str(file), "image_id": None}) for file in files]
        # No mask is pasted into a picture of full size: for all at once that may be gigabytes.
        return [{**sample, "height": 1, "width": 1} for sample in samples]

    def _training_pictures(self) -> list[Path]:
        source, field = self.sets.source["train"], self.cfg.DATALOADER.DOMAIN_FIELD
        images = read_set(source)["images"]
        if self.hold_out:
            images = [image for image in images if image[field] == self.hold_out]
        if self.plan.study.data.tuning:
            tested = {image["id"] for image in read_set(self.sets.test)["images"]}
            images = [image for image in images if image["id"] not in tested]
        return [source.image_root / image["file_name"] for image in images]

    def _test_cfg(self, target: str):
        """Return the config for an evaluation on the test pictures of the kind `target`."""
        cfg, test = self.cfg.clone(), self.sets.corrupted.get(target, self.sets.test)
        if self.hold_out:
            content, field = read_set(test), cfg.DATALOADER.DOMAIN_FIELD
            own = [image for image in content["images"] if image[field] == target]
            file = self.folder / f"test_{slug(target)}.json"
            write_subset(content, own, file)
            test = catalog.Dataset(f"{test.name}_{target}", file, test.image_root)
        cfg.DATASETS.TEST = (test.name,)
        if test.name not in [name for name, *_ in cfg.DATASETS.REGISTER]:
            entry = (test.name, str(test.json_file), str(test.image_root))
            cfg.DATASETS.REGISTER = (*cfg.DATASETS.REGISTER, entry)
        return cfg


def _command(study: Study, images: int, priors: Sequence[int], *more: str) -> str:
    command = ["python", "-m", "refbn_d2.study.adaptation", "--study", str(study.file)]
    if images != IMAGES:
        command += ["--images", str(images)]
    if list(priors) != PRIORS:
        command += ["--prior-images", *map(str, priors)]
    return shlex.join([*command, *more])


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--study", required=True, metavar="FILE", type=find_config_file)
    p.add_argument("--output-dir", default="", help="the study's; default: as the study's default")
    p.add_argument(
        "--only", default="", metavar="norm=X,seed=N,condition=Y", help="only these runs"
    )
    p.add_argument("--images", type=int, default=IMAGES, help="pictures to adapt to; default: 32")
    p.add_argument(
        "--prior-images", type=int, nargs="+", default=PRIORS, metavar="N",
        help="pictures that the old moments count as; default: 16 and 0",
    )  # fmt: skip
    run_or_exit(measure, p.parse_args(), extra="study")


if __name__ == "__main__":
    main()
