"""Images are found in all layouts; data that cannot be used is an error."""

import os
import shutil
import tarfile
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder

from refbn_d2.config import ConfigError
from refbn_d2.data import shapes
from refbn_d2.data.shapes.drawing import CLASSES
from refbn_d2.pretrain.data.datasets import ImageSet, load_images
from tests.pretrain.data.helpers import pack, webdataset_shards


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB"))


def contents(images):
    """Return {pixels: label} of a set, for any file names."""
    return {
        pixels(BytesIO(images.read(i))).tobytes(): images[i]["label"] for i in range(len(images))
    }


def by_folders(folder):
    """Return {pixels: label} of the files; classes are numbered by their sorted names."""
    numbers = {name: i for i, name in enumerate(sorted(CLASSES))}
    return {pixels(f).tobytes(): numbers[f.parent.name] for f in folder.glob("*/*.png")}


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
    """timm's streaming reader of the same files is the oracle."""
    root = webdataset_shards(tmp_path / "shards", tiny_classes / "train")
    from timm.data import create_dataset

    timm_s = create_dataset("wds/shapes", root=str(root), split="train-{000..002}.tar|84")
    want = {np.asarray(image).tobytes(): label for image, label in timm_s}
    assert contents(ImageSet(root)) == want


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux")
def test_no_tar_stays_open(tiny_classes, tmp_path):
    """Worker processes would share its position, and read each other's data."""
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


def test_timm_reads_folders_as_before(tiny_classes):
    """timm makes the index of a folder: another version must number classes in the same way."""
    reader = ReaderImageFolder(str(tiny_classes / "val"))
    assert reader.class_to_idx == {name: i for i, name in enumerate(sorted(CLASSES))}


# ---- data that cannot be used


def test_missing_class_folders_are_named(cfg, copy):
    shutil.rmtree(copy / "val/heart")
    for file in (copy / "train/ell").iterdir():
        file.unlink()  # an empty folder counts as missing
    with pytest.raises(ConfigError) as error:
        load_images(cfg, training=True)
    message = str(error.value)
    assert f"in {copy}/val, 1 of the 11 classes of {copy}/train are missing: heart" in message
    assert f"in {copy}/train, 1 of the 11 classes of {copy}/val are missing: ell" in message
    load_images(cfg, training=False)  # training images are not checked here


def test_validation_images_outside_of_class_folders(cfg, copy):
    for file in list((copy / "val").glob("*/*.png")):
        file.rename(copy / "val" / file.name)
    with pytest.raises(
        ConfigError, match=r"classes of .*/val are missing: \(outside of class folders\)"
    ):
        load_images(cfg, training=True)


def test_images_outside_of_class_folders_are_no_class(cfg, copy):
    for file in list(copy.glob("*/*/*.png")):
        file.rename(file.parents[1] / file.name)
    with pytest.raises(ConfigError, match="/val has only one class; a classifier needs two"):
        load_images(cfg, training=True)


def test_number_of_classes(cfg):
    cfg.MODEL.NUM_CLASSES = 12
    load_images(cfg, training=True)
    cfg.MODEL.NUM_CLASSES = 1000
    with pytest.raises(ConfigError, match="NUM_CLASSES = 1000, but .*/train has 12 classes"):
        load_images(cfg, training=True)


def test_nothing_there(cfg, tmp_path):
    cfg.DATASETS.ROOT = str(tmp_path / "imagenet")
    with pytest.raises(FileNotFoundError, match="imagenet/val does not exist; set DATASETS.ROOT"):
        load_images(cfg, training=True)
    for pattern in ("val-{000..002}.tar", "val-*.tar", "val.tar"):
        with pytest.raises(FileNotFoundError, match="imagenet/val.* does not exist"):
            ImageSet(tmp_path / "imagenet" / pattern)


def test_no_images(tmp_path):
    (tmp_path / "train/cat").mkdir(parents=True)
    (tmp_path / "train/cat/notes.txt").write_text("none")
    with pytest.raises(ConfigError, match="train holds no images .*Found 0 images"):
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
    with pytest.raises(ConfigError, match="sample 'b' of .*odd.tar has no image, or no .cls"):
        ImageSet(tmp_path / "odd.tar")
