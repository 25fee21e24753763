"""Derive a study's data sets: parts, sets without a domain, and corrupted copies.

They are made once, in the study's folder, and all runs share them. A detection set is a COCO json;
only corrupted sets have their own images. A classification set is a folder of class folders.

Names:

    label       "corruption/severity"
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from refbn_d2.data import catalog, shapes
from refbn_d2.data.coco import check_pictures, read_coco
from refbn_d2.data.corruptions import corrupt
from refbn_d2.data.images import read_image
from refbn_d2.study.class_folders import copy_images, write_png
from refbn_d2.study.sampling import SEED, split, stratified
from refbn_d2.study.spec import Study, closest
from refbn_d2.utils.errors import ConfigError, DataError
from refbn_d2.utils.file_io import write_text


class Sets(ABC):
    """The sets on which the runs of a study are trained and evaluated."""

    def __init__(self, study: Study, cfg, folder: Path) -> None:
        self.study, self.cfg, self.folder = study, cfg, Path(folder) / "data"

    @abstractmethod
    def training(self, hold_out: str | None) -> list:
        """Return the config overrides [KEY, VALUE, ...] that set the data of a training run."""

    @abstractmethod
    def make(self, hold_outs: Sequence[str | None]) -> None:
        """Write all derived sets that are missing."""

    @abstractmethod
    def digests(self) -> dict[str, str]:
        """Return a hash of each source set, to detect changes of the data."""

    def corrupted_labels(self) -> list[str]:
        evaluate = self.study.evaluate
        return [f"{name}/{s}" for name in evaluate.corruptions for s in evaluate.severities]

    def _only(self, key: str) -> str:
        names = list(self.cfg.DATASETS[key])
        if len(names) != 1:
            raise ConfigError(
                f"study file {self.study.file}: {self.study.config} has DATASETS.{key} = {names}; "
                "a study needs exactly one data set there"
            )
        return names[0]

    def _check_domain(self, domain: str, domains: Sequence[str | None], where: object) -> None:
        if domain not in domains:
            known = sorted({str(d) for d in domains if d is not None})
            raise ConfigError(
                f"study file {self.study.file}: hold_out {domain!r} is not a domain of {where}"
                + closest(domain, known)
            )


class DetectionSets(Sets):
    """Sets that are COCO jsons."""

    @cached_property
    def source(self) -> dict[str, catalog.Dataset]:
        """Return the sets that the config names, "train" and "test"."""
        root, found = shapes.datasets_root(), {}
        for part, key in (("train", "TRAIN"), ("test", "TEST")):
            name = self._only(key)
            if name in self.study.data.register:
                json_file, images = self.study.data.register[name]
                found[part] = catalog.Dataset(name, root / json_file, root / images)
            else:
                try:
                    found[part] = catalog.get(name)
                except ConfigError as error:
                    raise ConfigError(
                        f"study file {self.study.file}, DATASETS.{key}: {error.args[0]}"
                    ) from None
        used = [dataset.name for dataset in found.values()]
        for name in set(self.study.data.register) - set(used):
            raise ConfigError(
                f"study file {self.study.file}, data.register.{name}: the study does not use it; "
                f"name it in DATASETS.TRAIN or TEST (now {' and '.join(used)}), or remove it"
            )
        return found

    def _derived(self, name: str, images: Path | None = None) -> catalog.Dataset:
        json_file = self.folder / f"{name}.json"
        return catalog.Dataset(f"{self.study.name}_{name}", json_file, images or self.folder / name)

    def train_set(self, hold_out: str | None) -> catalog.Dataset:
        data, source = self.study.data, self.source["train"]
        if not (data.train_images or data.tuning or hold_out):
            return source
        name = f"train_without_{hold_out}" if hold_out else "train"
        return self._derived(name, source.image_root)

    @cached_property
    def test(self) -> catalog.Dataset:
        """Return the set for the in-domain metrics."""
        data = self.study.data
        if not (data.test_images or data.tuning):
            return self.source["test"]
        return self._derived("test", self.source["train" if data.tuning else "test"].image_root)

    @cached_property
    def corrupted(self) -> dict[str, catalog.Dataset]:
        """Return {label: corrupted set}."""
        return {label: self._derived(label.replace("/", "_")) for label in self.corrupted_labels()}

    def training(self, hold_out: str | None) -> list:
        train = self.train_set(hold_out)
        return [
            "DATASETS.TRAIN", (train.name,), "DATASETS.TEST", (self.test.name,),
            "DATASETS.REGISTER", _entries(train, self.test),
        ]  # fmt: skip

    def evaluation(self) -> list:
        """Return the config overrides for an evaluation on all corrupted sets."""
        sets = list(self.corrupted.values())
        return [
            "DATASETS.TEST", tuple(s.name for s in sets), "DATASETS.REGISTER", _entries(*sets),
        ]  # fmt: skip

    def domains(self) -> dict[int, str | None]:
        """Return {image id in the test set: its domain}."""
        field = self.cfg.DATALOADER.DOMAIN_FIELD
        return {image["id"]: image.get(field) for image in read_set(self.test)["images"]}

    def digests(self) -> dict[str, str]:
        missing = [s.json_file for s in self.source.values() if not s.json_file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{missing[0]} does not exist; data sets are looked for in the folder that the "
                "environment variable DETECTRON2_DATASETS names"
            )
        return {
            part: hashlib.sha256(dataset.json_file.read_bytes()).hexdigest()[:16]
            for part, dataset in self.source.items()
        }

    def _check_domains(self, part: str, content: dict) -> None:
        field = self.cfg.DATALOADER.DOMAIN_FIELD
        for image in content["images"]:
            if not isinstance(image.get(field), str | int):
                where = f"{self.source[part].json_file}: image {image['id']} ({image['file_name']})"
                raise DataError(f"{where} has no {field!r}; evaluate.domains and hold_out need it")

    def make(self, hold_outs: Sequence[str | None]) -> None:
        data, field = self.study.data, self.cfg.DATALOADER.DOMAIN_FIELD
        content = read_set(self.source["train"])
        domains = [image.get(field) for image in content["images"]]
        if self.study.evaluate.domains or any(hold_outs):
            self._check_domains("train", content)
        if self.study.evaluate.domains and not data.tuning:
            self._check_domains("test", read_set(self.source["test"]))
        train, held = split(domains, data)
        for hold_out in hold_outs:
            dataset = self.train_set(hold_out)
            if hold_out:
                self._check_domain(hold_out, domains, self.source["train"].json_file)
            if dataset is not self.source["train"] and not dataset.json_file.exists():
                kept = [
                    content["images"][i] for i in train if domains[i] != hold_out or not hold_out
                ]
                write_subset(content, kept, dataset.json_file)
        if self.test is not self.source["test"] and not self.test.json_file.exists():
            whole = content if held is not None else read_set(self.source["test"])
            images = [whole["images"][i] for i in held] if held is not None else whole["images"]
            chosen = stratified([image.get(field) for image in images], data.test_images)
            write_subset(whole, [images[i] for i in chosen], self.test.json_file)
        if hold_outs:  # there are runs
            for dataset in (*map(self.train_set, hold_outs), self.test):
                names = [image["file_name"] for image in read_set(dataset)["images"]]
                paths = [str(dataset.image_root / name) for name in names]
                check_pictures(paths, str(dataset.json_file))
        self._corrupt(field)

    def _corrupt(self, field: str) -> None:
        missing = {k: d for k, d in self.corrupted.items() if not d.json_file.exists()}
        if not missing:
            return
        content = read_set(self.test)
        groups = [image.get(field) for image in content["images"]]
        images = [content["images"][i] for i in stratified(groups, self.study.evaluate.images)]
        annotated = {a["image_id"] for a in content.get("annotations", []) if not a.get("iscrowd")}
        if not any(image["id"] in annotated for image in images):
            raise DataError(
                f"{self.test.json_file}: the {len(images)} pictures for the corruptions have no "
                "object, so that no AP is defined; raise evaluate.corruptions.images"
            )
        for label, dataset in tqdm(missing.items(), "corrupting pictures", disable=None):
            name, severity = label.split("/")
            dataset.image_root.mkdir(parents=True, exist_ok=True)
            renamed = []
            for place, image in enumerate(images):
                path = self.test.image_root / image["file_name"]
                rgb = corrupt(read_image(str(path), "RGB", image["id"]), name, int(severity),
                              [SEED, place])  # fmt: skip
                renamed.append(image | {"file_name": f"{place}.png"})
                write_png(rgb, dataset.image_root / f"{place}.png")
            # Last: if the json exists, the set is complete.
            write_subset(content, renamed, dataset.json_file)


class ClassificationSets(Sets):
    """Sets that are folders of class folders."""

    def _images(self, part: str):
        from refbn_d2.pretrain.data.datasets import ImageSet  # imports timm

        datasets = self.cfg.DATASETS
        root = (
            shapes.datasets_root() / datasets.ROOT
            if datasets.ROOT
            else shapes.make_classification()
        )
        return ImageSet(Path(root) / getattr(datasets, part.upper()))

    def training(self, hold_out: str | None) -> list:
        data = self.study.data
        train, test = self.cfg.DATASETS.TRAIN, self.cfg.DATASETS.TEST
        if data.train_images or data.tuning or hold_out:
            train = str(self._train_folder(hold_out).resolve())
        if data.test_images or data.tuning:
            test = str((self.folder / "test").resolve())
        root = shapes.datasets_root() / self.cfg.DATASETS.ROOT if self.cfg.DATASETS.ROOT else None
        return [
            *(["DATASETS.ROOT", str(root.resolve())] if root else []),
            "DATASETS.TRAIN", train, "DATASETS.TEST", test,
        ]  # fmt: skip

    def _train_folder(self, hold_out: str | None) -> Path:
        return self.folder / (f"train_without_{hold_out}" if hold_out else "train")

    def evaluation(self) -> dict[str, str]:
        """Return {label: folder}: corrupted pictures, the same ones "clean", all in "domains"."""
        labels = self.corrupted_labels()
        if labels:
            labels.insert(0, "clean")
        folders = {label: str((self.folder / _file(label)).resolve()) for label in labels}
        if self.study.evaluate.domains:
            folders["domains"] = str(self._test_path().resolve())
        return folders

    def short(self, steps: int, batch: int) -> list:
        """Write the sets of a training of about `steps` steps, and return its config overrides."""
        images, folders = self._images("train"), []
        for name, number in (("short", steps * batch), ("short_test", 8 * images.num_classes)):
            folder = self.folder / f"{name}_{number}"
            copy_images(images, stratified(images.labels, number), folder)
            folders.append(str(folder.resolve()))
        return [
            "DATASETS.TRAIN", folders[0], "DATASETS.TEST", folders[1], "SOLVER.EPOCHS", 1,
            "SOLVER.WARMUP_EPOCHS", 0.0, "TEST.VAL_INTERVAL", 0,
        ]  # fmt: skip

    def _test_path(self) -> Path:
        """Return the path of the pictures for the in-domain metrics."""
        data = self.study.data
        if data.test_images or data.tuning:
            return self.folder / "test"
        return self._images("test").path

    def test_images(self):
        """Return the pictures for the in-domain metrics."""
        from refbn_d2.pretrain.data.datasets import ImageSet

        return ImageSet(self._test_path())

    def _domains(self, images) -> list[str]:
        """Return the domain of each picture, by its name."""
        found: list = [shapes.domain_of(name) for name in images.reader.filenames()]
        if None in found:
            raise DataError(
                f"{images.path}: the name of {images.reader.filename(found.index(None))} has no "
                f"domain; evaluate.domains and hold_out need names as *_{shapes.DOMAINS[0]}.png"
            )
        return found

    def digests(self) -> dict[str, str]:
        found = {}
        for part in ("train", "test"):
            images = self._images(part)
            names = "\n".join(images.reader.filenames(absolute=False))
            found[part] = hashlib.sha256(names.encode()).hexdigest()[:16]
        return found

    def make(self, hold_outs: Sequence[str | None]) -> None:
        data, evaluate = self.study.data, self.study.evaluate
        train_images = self._images("train")
        train, held = split(train_images.labels, data)
        for hold_out in hold_outs:
            keep = train
            if hold_out:
                domains = self._domains(train_images)
                self._check_domain(hold_out, domains, train_images.path)
                keep = [i for i in train if domains[i] != hold_out]
            if data.train_images or data.tuning or hold_out:
                copy_images(train_images, keep, self._train_folder(hold_out))
        test_images = train_images if held is not None else self._images("test")
        test = held if held is not None else list(range(len(test_images)))
        chosen = stratified([test_images.labels[i] for i in test], data.test_images)
        test = [test[i] for i in chosen]
        if data.test_images or data.tuning:
            copy_images(test_images, test, self.folder / "test")
        if evaluate.domains:
            self._domains(test_images)
        if evaluate.corruptions and 0 < evaluate.images < test_images.num_classes:
            raise ConfigError(
                f"study file {self.study.file}, evaluate.corruptions.images: is {evaluate.images}; "
                f"allowed: 0, or at least the number of classes, {test_images.num_classes}"
            )
        few = [test[i] for i in stratified([test_images.labels[i] for i in test], evaluate.images)]
        if evaluate.corruptions:
            copy_images(test_images, few, self.folder / _file("clean"))
        for label in tqdm(self.corrupted_labels(), "corrupting pictures", disable=None):
            copy_images(test_images, few, self.folder / _file(label), label)


def sets_of(study: Study, cfg, folder: Path) -> DetectionSets | ClassificationSets:
    """Return the sets of a study; `cfg` is its base config."""
    kind = DetectionSets if study.task == "detection" else ClassificationSets
    return kind(study, cfg, folder)


def _entries(*datasets: catalog.Dataset) -> tuple:
    """Return DATASETS.REGISTER for the data sets that a new process does not know."""
    return tuple(
        {
            d.name: (d.name, str(d.json_file.resolve()), str(d.image_root.resolve()))
            for d in datasets
            if d != catalog.builtin(d.name)
        }.values()
    )


def _file(label: str) -> str:
    return label.replace("/", "_")


def read_set(dataset: catalog.Dataset) -> dict:
    """Return the content of a set's file, repaired as a run repairs it, with all of its fields.

    Raises:
        FileNotFoundError: the file is missing.
        DataError: it is not in COCO's format, or has no pictures.
    """
    file = read_coco(dataset.json_file, dataset.name, annotated=False)
    file.warn()
    if not file.content["images"]:
        raise DataError(f"{dataset.json_file} has no pictures: its list `images` must not be empty")
    return file.content


def write_subset(content: dict, images: list[dict], path: Path) -> None:
    """Write `content` with only these images and their annotations."""
    ids = {image["id"] for image in images}
    kept = [a for a in content.get("annotations", []) if a["image_id"] in ids]
    write_text(path, json.dumps(content | {"images": images, "annotations": kept}))
