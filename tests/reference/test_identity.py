"""What a fingerprint covers, and dataset dicts without a size. Oracle: sha256 by hand."""

import copy
import hashlib
import json

import numpy as np
import pytest
import torch

from refbn_d2.reference.selection import (
    draw_images,
    find_images,
    identity_of,
    identity_of_samples,
    is_landscape,
)

LONG = np.arange(5000.0)  # its text leaves out the middle


def changed(array):
    array = copy.deepcopy(array)
    array[2500] += 1
    return array


@pytest.fixture
def image(tmp_path):
    for name in ("a.png", "sem.png", "pan.png"):
        (tmp_path / name).write_bytes(name.encode() * 9)
    annotations = [
        {"bbox": [0, 1, 2, 3.5], "category_id": 1, "segmentation": [[0, 0, 1, 1, 2, 0]]},
        {"segmentation": {"size": [4, 5], "counts": b"ab\x00"}, "iscrowd": np.int64(1)},
    ]
    return {"file_name": str(tmp_path / "a.png"), "image_id": 3, "annotations": annotations}


def fingerprint(dataset_dict):
    return identity_of("d", [dataset_dict], 0)["images"][0]["fingerprint"]


def test_the_fingerprint_of_plain_detection_sets_is_that_of_old_checkpoints(image):
    text = json.dumps(image["annotations"], sort_keys=True, default=str)
    digest = hashlib.sha256(b"a.png" * 9 + text.encode()).hexdigest()
    assert fingerprint(image) == digest[:16]


@pytest.mark.parametrize("key, file", [("sem_seg_file_name", "sem"), ("pan_seg_file_name", "pan")])
def test_segmentation_files_are_covered(image, tmp_path, key, file):
    image[key] = str(tmp_path / f"{file}.png")
    identity = identity_of("d", [image], 0)
    assert find_images(identity, [image]) == [0]
    (tmp_path / f"{file}.png").write_bytes(b"other")
    with pytest.raises(ValueError, match="image 3 .* has changed"):
        find_images(identity, [image])
    (tmp_path / f"{file}.png").unlink()
    with pytest.raises(ValueError, match="image 3 .* is gone"):
        find_images(identity, [image])


def test_the_segments_of_a_panoptic_segmentation_are_covered(image, tmp_path):
    image |= {"pan_seg_file_name": str(tmp_path / "pan.png"), "segments_info": [{"id": 1}]}
    assert fingerprint(image) != fingerprint(image | {"segments_info": [{"id": 2}]})


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
def test_every_byte_of_an_array_is_covered(image, kind):
    def with_mask(array):
        return image | {"annotations": [{"mask": kind(array)}]}

    assert fingerprint(with_mask(LONG)) == fingerprint(with_mask(LONG.copy()))
    assert fingerprint(with_mask(LONG)) != fingerprint(with_mask(changed(LONG)))
    assert fingerprint(with_mask(LONG)) != fingerprint(with_mask(LONG.reshape(50, 100)))


def test_files_are_read_by_the_function_that_the_dict_has(image):
    remote = {"s3://a.png": b"picture", "s3://sem.png": b"labels"}
    image |= {"file_name": "s3://a.png", "sem_seg_file_name": "s3://sem.png"}
    image["read_file"] = remote.__getitem__
    before = fingerprint(image)
    remote["s3://sem.png"] = b"others"
    assert fingerprint(image) != before


class Target:
    def __init__(self, masks):
        self.masks = masks


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: {"a": [x]}, Target, lambda x: np.array([x, None], dtype=object)]
)
def test_samples_with_arrays_and_objects(wrap):
    def prints(array):
        sample = (torch.zeros(3, 2, 2), wrap(array))
        return identity_of_samples([sample])["images"]

    assert prints(LONG) == prints(LONG.copy())
    assert prints(LONG) != prints(changed(LONG))


def test_samples_with_pictures():
    image_module = pytest.importorskip("PIL.Image")
    pictures = [image_module.new("RGB", (40, 30), (value, 0, 0)) for value in (1, 1, 2)]
    a, b, c = (identity_of_samples([(p, 0)])["images"] for p in pictures)
    assert a == b != c


def test_images_of_unknown_size_are_one_group():
    sizes = [{"width": 4, "height": 3}, {"width": 3, "height": 4}, {}, {"width": 4}]
    assert [is_landscape(d) for d in sizes] == [True, False, None, None]
    assert sorted(draw_images([{}] * 5, 5, 0, is_landscape)) == [0, 1, 2, 3, 4]
