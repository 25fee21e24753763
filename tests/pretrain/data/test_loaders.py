"""Batches, and images that cannot be read."""

import shutil
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from refbn_d2.config import ConfigError
from refbn_d2.data.shapes.drawing import CLASSES, DOMAINS
from refbn_d2.pretrain.data.datasets import ImageSet, load_images
from refbn_d2.pretrain.data.loaders import (
    Samples,
    Unreadable,
    build_test_loader,
    build_train_loader,
    build_transform,
)
from tests.pretrain.data.helpers import pack, webdataset_shards


def samples(cfg, images, training=True, **kwargs):
    return Samples(images, build_transform(cfg, training), 3, **kwargs)


def batches(cfg, number, start=0, seed=3):
    images = load_images(cfg, training=True).train
    return list(islice(build_train_loader(cfg, samples(cfg, images), seed, start), number))


def assert_same(a, b):
    assert len(a) == len(b)
    for (x, y, _), (u, v, _) in zip(a, b, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


def test_worker_processes_read_tars_and_shards(cfg, tiny_classes, tmp_path):
    train = tiny_classes / "train"
    pack(tmp_path / "tar/train.tar", train, sorted(train.glob("*/*.png")))
    val = tiny_classes / "val"
    pack(tmp_path / "tar/val.tar", val, sorted(val.glob("*/*.png")))
    webdataset_shards(tmp_path / "wds", train), webdataset_shards(tmp_path / "wds", val, "val")
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 2, "SOLVER.IMS_PER_BATCH", 1])
    wanted = None
    for root, names in (
        (tiny_classes, ("train", "val")),
        (tmp_path / "tar", ("train.tar", "val.tar")),
        (tmp_path / "wds", ("train-*.tar", "val-*.tar")),
    ):
        cfg.DATASETS.ROOT, (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) = str(root), names
        sets = load_images(cfg, training=True)
        batches = list(build_test_loader(cfg, sets.test))
        got = Counter(
            (image.numpy().tobytes(), label)
            for images, labels, _ in batches
            for image, label in zip(images, labels.tolist(), strict=True)
        )
        assert len(got) == 24 and got == (wanted or got)
        wanted = got
        images, labels, _ = next(iter(build_train_loader(cfg, samples(cfg, sets.train), 0, 0)))
        assert images.shape == (1, 3, 32, 32) and images.dtype == torch.uint8


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augmentation", ["", "rand-m7-mstd0.5-inc1"])
def test_resumed_is_uninterrupted_whatever_the_workers(cfg, workers, augmentation):
    cfg.INPUT.AUTO_AUGMENT = augmentation
    whole = batches(cfg, 14)  # over the end of an epoch
    assert not torch.equal(whole[0][0], whole[1][0])
    cfg.DATALOADER.NUM_WORKERS = workers
    assert_same(whole[5:], batches(cfg, 9, start=5))


def test_repeated_augmentation(cfg):
    cfg.merge_from_list(["DATALOADER.AUG_REPEATS", 4, "INPUT.SCALE", [0.5, 0.9]])
    for images, labels, _ in batches(cfg, 3):
        assert len(labels.view(2, 4).unique(dim=1)[0]) == 1  # two images, four times each
        assert not torch.equal(images[0], images[1])


@pytest.mark.parametrize("composition, groups", [("iid", 8), ("domain", 1), ("class", 1)])
def test_batch_composition(cfg, composition, groups, monkeypatch):
    cfg.merge_from_list(
        ["DATALOADER.BATCH_COMPOSITION", composition, "DATALOADER.CLASSES_PER_BATCH", 3]
    )
    images = load_images(cfg, training=True).train
    monkeypatch.setattr(Samples, "__getitem__", lambda self, item: (torch.tensor(item[0]), 0, []))
    seen = []
    for indices, _, _ in islice(build_train_loader(cfg, samples(cfg, images), 0, 0), 40):
        names = [images[i]["file_name"] for i in indices.tolist()]
        if composition == "domain":
            seen.append({name.removesuffix(".png").split("_")[1] for name in names})
        else:
            seen.append({sorted(CLASSES).index(name.split("/")[0]) // 3 for name in names})
    assert max(map(len, seen)) == 1 if composition != "iid" else max(map(len, seen)) > 2
    expected = {"domain": set(DOMAINS)}.get(composition, {0, 1, 2, 3})
    assert set().union(*seen) == expected


def test_data_without_domains(cfg, tiny_classes, tmp_path):
    for split in ("train", "val"):
        for name in CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            source = next((tiny_classes / split / name).iterdir())
            shutil.copy(source, tmp_path / split / name / "n01440764_10026.png")
    cfg.merge_from_list(["DATASETS.ROOT", str(tmp_path), "DATALOADER.BATCH_COMPOSITION", "domain"])
    with pytest.raises(ConfigError, match="'domain': the name of arrow/n01440764_10026.png"):
        batches(cfg, 1)


def test_training_transforms_follow_the_config(cfg, tiny_classes):
    image = Image.open(next((tiny_classes / "train/ell").iterdir()))
    cfg.merge_from_list(
        ["INPUT.SCALE", [1.0, 1.0], "INPUT.RATIO", [1.0, 1.0], "INPUT.COLOR_JITTER", 0.0,
         "INPUT.RANDOM_FLIP", "none"]
    )  # fmt: skip
    plain = torch.tensor(np.asarray(image.convert("RGB"))).permute(2, 0, 1)
    assert torch.equal(build_transform(cfg, training=True)(image), plain)
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    seen = {tuple(build_transform(cfg, True)(image).flatten().tolist()) for _ in range(20)}
    assert seen == {tuple(p.flatten().tolist()) for p in (plain, plain.flip(2))}
    cfg.INPUT.SIZE = 40
    assert build_transform(cfg, training=True)(image).shape == (3, 40, 40)
    cfg.INPUT.SIZE_TEST = 48
    assert build_transform(cfg, training=False)(image).shape == (3, 48, 48)


def test_every_test_image_once(cfg, tiny_classes):
    images = load_images(cfg, training=False).test
    labels = torch.cat([labels for _, labels, _ in build_test_loader(cfg, images)])
    assert labels.tolist() == images.labels


@pytest.mark.parametrize("notation", ["rnd-m7", "rand-q7", "foo"])
def test_unknown_augmentation(cfg, notation):
    cfg.INPUT.AUTO_AUGMENT = notation
    with pytest.raises(ConfigError, match=f"INPUT.AUTO_AUGMENT = '{notation}'.*rand-m7"):
        build_transform(cfg, training=True)


def test_16_bit_gray_keeps_its_high_byte(cfg, copy):
    file = next((copy / "val/arrow").iterdir())
    gray = np.asarray(Image.open(file).convert("L"))
    found = []
    for pixels in (gray, gray.astype(np.uint16) * 256 + 77):
        Image.fromarray(pixels).save(file)
        images = load_images(cfg, training=False).test
        index = images.reader.filenames().index(f"arrow/{file.name}")
        transform = build_transform(cfg, training=False)
        found.append(Samples(images, transform, replace=False).sample(index, 0)[0])
    assert torch.equal(*found) and found[0].float().std() > 0


# ---- images that cannot be read


def spoil(folder, number, content=b"\x89PNG not really"):
    files = sorted(folder.glob("*/*.png"))[:number]
    for file in files:
        file.write_bytes(content)
    return files


@pytest.mark.parametrize("content", [b"", b"\x89PNG not really", "cut off"])
def test_an_unreadable_image_is_named_and_replaced(cfg, copy, content):
    file = next((copy / "train/arrow").iterdir())
    file.write_bytes(file.read_bytes()[:200] if content == "cut off" else content)
    images = load_images(cfg, training=True).train
    index = images.reader.filenames().index(f"arrow/{file.name}")
    image, label, unreadable = samples(cfg, images)[index, 5]
    assert label == images.labels[(index + 1) % 84]
    assert torch.equal(image, samples(cfg, images)[(index + 1) % 84, 5][0])
    assert [name for name, _ in unreadable] == [f"arrow/{file.name}"]


def test_many_in_a_row(cfg, copy):
    spoil(copy / "train", 10)
    images = load_images(cfg, training=True).train
    with pytest.raises(ValueError, match="10 images in a row cannot be read: arrow/"):
        samples(cfg, images)[0, 0]


def test_unreadable_images_are_not_evaluated(cfg, copy):
    spoil(copy / "val", 3)
    images = load_images(cfg, training=False).test
    got = list(build_test_loader(cfg, images))
    assert sum(len(labels) for _, labels, _ in got) == 21
    assert sum(len(what) for _, _, what in got) == 3
    cfg.SOLVER.IMS_PER_BATCH = 1
    assert sum(len(labels) for _, labels, _ in build_test_loader(cfg, images)) == 21


def test_unreadable_images_up_to_a_share(tiny_classes, caplog):
    images = ImageSet(tiny_classes / "train")
    unreadable = Unreadable(images, 0.025)
    with caplog.at_level("WARNING"):
        for _ in range(3):
            unreadable.note([("a.png", "cut off")])
        unreadable.note([("b.png", "empty")])
    assert caplog.text.count("a.png") == 1
    assert "Unreadable image number 2 is skipped: b.png (empty)" in caplog.text
    with pytest.raises(ValueError, match="3 of 84 images .*MAX_UNREADABLE = 0.025 of .*a.png.*c.p"):
        unreadable.note([("c.png", "empty")])
