"""Tars and WebDataset shards of a folder of classes."""

import tarfile

import pytest

from refbn_d2.data.shapes.drawing import CLASSES


def pack(file, folder, members, name=lambda path: f"{path.parent.name}/{path.name}"):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as tar:
        for path in members:
            tar.add(path, name(path))
    return file


def webdataset_shards(root, folder, split="train", number=3):
    """Write shards by the webdataset library; classes are numbered by their sorted names."""
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
