"""Where images come from, what makes a batch, and what is said of data that cannot be used."""

import os
import shutil
import tarfile
from collections import Counter
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder

from refbn_d2.config import ConfigError
from refbn_d2.data import shapes
from refbn_d2.data.shapes.drawing import CLASSES, DOMAINS
from refbn_d2.pretrain.data.datasets import ImageSet, load_images
from refbn_d2.pretrain.data.loaders import (
    Samples,
    Unreadable,
    build_test_loader,
    build_train_loader,
    build_transform,
)


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB"))


def contents(images):
    """{pixels: label} of a set, whatever names its files have."""
    return {
        pixels(BytesIO(images.read(i))).tobytes(): images[i]["label"] for i in range(len(images))
    }


def by_folders(folder):
    """The same from the files, classes numbered by their sorted names."""
    numbers = {name: i for i, name in enumerate(sorted(CLASSES))}
    return {pixels(f).tobytes(): numbers[f.parent.name] for f in folder.glob("*/*.png")}


def pack(file, folder, members, name=lambda path: f"{path.parent.name}/{path.name}"):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for path in members:
            tar.add(path, name(path))
    return file


def webdataset_shards(root, folder, split="train", number=3):
    """By the webdataset library; classes numbered by their sorted names."""
    webdataset = pytest.importorskip("webdataset")
    root.mkdir(parents=True, exist_ok=True)
    files = sorted(folder.glob("*/*.png"))
    numbers = {name: i for i, name in enumerate(sorted(CLASSES))}
    for k in range(number):
        with webdataset.TarWriter(str(root / f"{split}-{k:03d}.tar")) as writer:
            for path in files[k::number]:
                sample = {"png": path.read_bytes(), "cls": numbers[path.parent.name]}
                writer.write({"__key__": f"{path.parent.name}.d/{path.stem}", **sample})
    return root


# ---- layouts


def test_a_folder_of_classes(tiny_classes):
    images = ImageSet(tiny_classes / "train")
    assert contents(images) == by_folders(tiny_classes / "train") and len(images) == 84
    assert list(images.class_to_idx) == sorted(CLASSES) and images.num_classes == 12
    first = images[0]
    assert first["image_id"] == first["file_name"] == "arrow/000008_plain.png"
    assert first["read"]() == (tiny_classes / "train" / first["file_name"]).read_bytes()


def test_a_tar_of_classes_and_a_folder_of_class_tars(tiny_classes, tmp_path):
    train = tiny_classes / "train"
    one = pack(tmp_path / "one.tar", train, sorted(train.glob("*/*.png")))
    for name in CLASSES:
        files = sorted((train / name).glob("*.png"))
        pack(tmp_path / f"many/{name}.tar", train, files, lambda path: path.name)
    for path in (one, tmp_path / "many"):
        images = ImageSet(path)
        assert contents(images) == by_folders(train)
        assert list(images.class_to_idx) == sorted(CLASSES)


@pytest.mark.parametrize("pattern", ["", "train-{000..002}.tar", "train-*.tar", "train-00?.tar"])
def test_webdataset_shards(tiny_classes, tmp_path, pattern):
    root = webdataset_shards(tmp_path / "shards", tiny_classes / "train")
    images = ImageSet(root / pattern)
    assert contents(images) == by_folders(tiny_classes / "train") and len(images) == 84


def test_one_shard_and_a_part_of_them(tiny_classes, tmp_path):
    root = webdataset_shards(tmp_path / "shards", tiny_classes / "train")
    assert len(ImageSet(root / "train-001.tar")) == 28
    assert len(ImageSet(root / "train-{001..002}.tar")) == 56


def test_shards_are_what_timm_reads(tiny_classes, tmp_path):
    """Against timm's own, streaming reader of the same files."""
    root = webdataset_shards(tmp_path / "shards", tiny_classes / "train")
    from timm.data import create_dataset

    timm_s = create_dataset("wds/shapes", root=str(root), split="train-{000..002}.tar|84")
    want = {np.asarray(image).tobytes(): label for image, label in timm_s}
    assert contents(ImageSet(root)) == want


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


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_no_tar_stays_open(tiny_classes, tmp_path):
    """Worker processes would share its position, and read what another one is looking for."""
    train = tiny_classes / "train"
    for name in CLASSES[:2]:
        pack(tmp_path / f"many/{name}.tar", train, sorted((train / name).glob("*.png")))
    one = pack(tmp_path / "one.tar", train, sorted(train.glob("*/*.png")))
    wds = webdataset_shards(tmp_path / "wds", train)
    sets = [ImageSet(path) for path in (tmp_path / "many", one, wds)]
    for images in sets:
        images.read(0)
    opened = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    assert not [path for path in opened if path.endswith(".tar")]


def test_the_embedded_shapes_are_made_on_first_use(cfg, tmp_path, monkeypatch):
    few = partial(shapes.make_classification, size=32, num_train=24, num_val=12)
    monkeypatch.setattr(shapes, "make_classification", few)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg.DATASETS.ROOT = ""
    images = load_images(cfg, training=True)
    assert images.train.path == tmp_path / "shapes_cls/train" and len(images.train) == 24
    cfg.DATASETS.ROOT = "shapes_cls"  # where Detectron2 looks for data
    assert load_images(cfg, training=True).train.path == images.train.path


# ---- batches


def samples(cfg, images, training=True, **kwargs):
    return Samples(images, build_transform(cfg, training), 3, **kwargs)


def batches(cfg, number, start=0, seed=3):
    images = load_images(cfg, training=True).train
    return list(islice(build_train_loader(cfg, samples(cfg, images), seed, start), number))


def assert_same(a, b):
    assert len(a) == len(b)
    for (x, y, _), (u, v, _) in zip(a, b, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)


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


# ---- data that cannot be used


@pytest.fixture
def copy(tiny_classes, tmp_path, cfg):
    """A copy of `tiny_classes` that a test may spoil; `cfg` names it."""
    root = tmp_path / "copy"
    shutil.copytree(tiny_classes, root)
    cfg.DATASETS.ROOT = str(root)
    return root


def test_missing_class_folders_are_named(cfg, copy):
    shutil.rmtree(copy / "val/heart")
    for file in (copy / "train/ell").iterdir():
        file.unlink()  # an empty folder is a missing one
    with pytest.raises(ConfigError) as error:
        load_images(cfg, training=True)
    message = str(error.value)
    assert f"{copy}/val has none of 1 of the 11 classes of {copy}/train: heart" in message
    assert f"{copy}/train has none of 1 of the 11 classes of {copy}/val: ell" in message
    load_images(cfg, training=False)  # what is not needed is not looked at


def test_validation_images_outside_of_class_folders(cfg, copy):
    for file in list((copy / "val").glob("*/*.png")):
        file.rename(copy / "val" / file.name)
    with pytest.raises(ConfigError, match=r"classes of .*/val: \(outside of class folders\)"):
        load_images(cfg, training=True)


def test_number_of_classes(cfg):
    cfg.MODEL.NUM_CLASSES = 12
    load_images(cfg, training=True)
    cfg.MODEL.NUM_CLASSES = 1000
    with pytest.raises(ConfigError, match="NUM_CLASSES = 1000, but .*/train has 12 classes"):
        load_images(cfg, training=True)


def test_nothing_there(cfg, tmp_path):
    cfg.DATASETS.ROOT = str(tmp_path / "imagenet")
    with pytest.raises(FileNotFoundError, match="imagenet/val does not exist; DATASETS.ROOT"):
        load_images(cfg, training=True)
    for pattern in ("val-{000..002}.tar", "val-*.tar", "val.tar"):
        with pytest.raises(FileNotFoundError, match="imagenet/val.* does not exist"):
            ImageSet(tmp_path / "imagenet" / pattern)


def test_no_images(tmp_path):
    (tmp_path / "train/cat").mkdir(parents=True)
    (tmp_path / "train/cat/notes.txt").write_text("none")
    with pytest.raises(ConfigError, match="train holds no images .* Found 0 images"):
        ImageSet(tmp_path / "train")
    tar = pack(tmp_path / "empty.tar", tmp_path, [tmp_path / "train/cat/notes.txt"])
    with pytest.raises(ConfigError, match="empty.tar holds no images"):
        ImageSet(tar)


def test_broken_tars_and_shards(tiny_classes, tmp_path):
    root = webdataset_shards(tmp_path / "shards", tiny_classes / "train")
    broken = root / "train-001.tar"
    whole = broken.read_bytes()
    with tarfile.open(broken) as tar:
        last = tar.getmembers()[-1]
    cut_offs = [last.offset_data - 700, last.offset_data - 100, last.offset_data + 1]
    for content in [whole[:length] for length in cut_offs] + [b"no tar at all" * 100]:
        broken.write_bytes(content)
        with pytest.raises(ConfigError, match="train-001.tar"):
            ImageSet(root)


@pytest.mark.parametrize("names", [("a.png", "a.cls", "b.cls"), ("a.cls", "a.png", "b.png")])
def test_shards_with_half_a_sample(tiny_classes, tmp_path, names):
    label = tmp_path / "cls"
    label.write_text("7")
    files = {"png": next((tiny_classes / "train/ell").iterdir()), "cls": label}
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        for name in names:
            tar.add(files[name[-3:]], name)
    with pytest.raises(ConfigError, match="sample 'b' of .*odd.tar lacks an image or its .cls"):
        ImageSet(tmp_path / "odd.tar")


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
    assert "Image 2 that cannot be read, and is skipped: b.png (empty)" in caplog.text
    with pytest.raises(ValueError, match="3 of 84 images .*MAX_UNREADABLE = 0.025 of .*a.png.*c.p"):
        unreadable.note([("c.png", "empty")])


@pytest.mark.parametrize("notation", ["rnd-m7", "rand-q7", "foo"])
def test_unknown_augmentation(cfg, notation):
    cfg.INPUT.AUTO_AUGMENT = notation
    with pytest.raises(ConfigError, match=f"INPUT.AUTO_AUGMENT = '{notation}'.*rand-m7"):
        build_transform(cfg, training=True)


def test_timm_reads_folders_as_before(tiny_classes):
    """The index of a folder is timm's own: another version must not number classes otherwise."""
    reader = ReaderImageFolder(str(tiny_classes / "val"))
    assert reader.class_to_idx == {name: i for i, name in enumerate(sorted(CLASSES))}
