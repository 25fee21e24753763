"""Draw the images of the reference batch by a seed, and find them again on resumption."""

import hashlib
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refbn_d2.config import RefBNOptions
from refbn_d2.utils.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


def draw_images(
    dataset_dicts: Sequence[dict],
    num_images: int,
    seed: int,
    group_of: Callable[[dict], Hashable] = lambda dataset_dict: None,
) -> list[int]:
    """Draw `num_images` training images as the reference by `seed`; return their indices.

    Images of the largest group of `group_of` come first, others only once it is used up. If
    training batches are grouped (by aspect ratio), a mixed reference would contain more padding
    than any batch.

    Raises:
        ConfigError: there are fewer images than `num_images`.
    """
    if num_images > len(dataset_dicts):
        raise ConfigError(
            f"MODEL.REFBN.NUM_IMAGES is {num_images}, but the training set has "
            f"{len(dataset_dicts)} usable images. Set it to {len(dataset_dicts)} or less."
        )
    groups = [group_of(d) for d in dataset_dicts]
    largest = Counter(groups).most_common(1)[0][0]
    order = np.random.default_rng(seed).permutation(len(dataset_dicts)).tolist()
    order.sort(key=lambda index: groups[index] != largest)  # stable
    return order[:num_images]


def is_landscape(dataset_dict: dict) -> bool | None:
    """Return the group of an image under DATALOADER.ASPECT_RATIO_GROUPING, for `draw_images`.

    None if its dict does not have the size: Detectron2's mapper reads it with the image.
    """
    if "width" not in dataset_dict or "height" not in dataset_dict:
        return None
    return dataset_dict["width"] > dataset_dict["height"]


def identity_of(dataset: str, dataset_dicts: Sequence[dict], seed: int) -> dict:
    """Return the identity of a reference: dataset, seed, and each image's id, file and fingerprint.

    The identity consists of plain containers, so that a checkpoint can hold it. A fingerprint
    covers the image file, the annotations or the label, and the files of a semantic or panoptic
    segmentation. Every file is read once: the image by the function "read" in its dict if there is
    one (for an image in a tar file), and files by the function "read_file" (path -> bytes) if there
    is one.
    """
    images = [{**_name(d), "fingerprint": _fingerprint(d)} for d in dataset_dicts]
    return {"dataset": dataset, "seed": seed, "images": images}


def identity_of_samples(samples: Sequence) -> dict:
    """Return the identity of a reference without files: a fingerprint of each sample.

    The fingerprint covers tensors, arrays, pictures and plain values, in dicts, tuples, lists and
    objects of any depth.
    """
    images = [
        {"image_id": index, "fingerprint": _digest(_bytes_of(sample))}
        for index, sample in enumerate(samples)
    ]
    return {"dataset": "the images given", "seed": 0, "images": images}


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, Tensor):
        content = value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype}{tuple(value.shape)}".encode() + content
    is_array = hasattr(value, "__array_interface__") or hasattr(value, "__array__")
    if is_array and not isinstance(value, np.generic):  # PIL's pictures have one or the other
        array = np.asarray(value)
        if not array.dtype.hasobject:
            return f"{array.dtype}{array.shape}".encode() + array.tobytes()
        value = array.tolist()
    if isinstance(value, Mapping):
        return b"".join(f"{key}=".encode() + _bytes_of(inner) for key, inner in value.items())
    if isinstance(value, tuple | list):
        return b"".join(map(_bytes_of, value))
    if hasattr(value, "__dict__") and not callable(value) and not isinstance(value, Enum):
        return type(value).__name__.encode() + _bytes_of(vars(value))  # its repr may leave out much
    return repr(value).encode()


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def _name(dataset_dict: dict) -> dict:
    if "file_name" not in dataset_dict:
        raise DataError(
            "A dataset dict of the training set has no file_name, which identifies an image of the "
            f"reference batch. Its keys are {', '.join(map(str, dataset_dict))}: add file_name."
        )
    return {
        "image_id": dataset_dict.get("image_id"),
        "file_name": os.path.basename(dataset_dict["file_name"]),
    }


def find_images(identity: dict, dataset_dicts: Sequence[dict]) -> list[int]:
    """Return the indices of the images that `identity` names, in its order.

    Raises:
        DataError: an image is gone, or its file or its annotations have changed. The message
            names the image.
    """
    places = defaultdict(list)  # joined datasets may share ids and names
    for i, d in enumerate(dataset_dicts):
        places[tuple(_name(d).values())].append(i)
    found = []
    for image in identity["images"]:
        name = f"image {image['image_id']} ({image['file_name']}) of {identity['dataset']}"
        there = {}
        for index in places[image["image_id"], image["file_name"]]:
            with suppress(FileNotFoundError):
                there[index] = _fingerprint(dataset_dicts[index])
        same = [i for i, fingerprint in there.items() if fingerprint == image["fingerprint"]]
        if same:
            found.append(same[0])
            continue
        gone, changed = "is gone from the training set", "has changed (its file or its annotations)"
        problem = changed if there else gone
        raise DataError(
            f"The checkpoint's reference batch cannot be restored: {name} {problem}. Put it back, "
            "or start a new run without --resume in another OUTPUT_DIR."
        )
    return found


def select_reference(
    dataset_dicts: Sequence[dict],
    options: RefBNOptions,
    dataset: str,
    group_of: Callable[[dict], Hashable] = lambda dataset_dict: None,
    identity: dict | None = None,
) -> tuple[list[int], dict]:
    """Return indices and identity of the reference's images: newly drawn, or those of `identity`.

    Args:
        dataset: the name of the training set, for the identity.
        group_of: see `draw_images`.
        identity: that of a resumed run; its `ReferenceBatch.state_dict` contains it.

    Raises:
        ConfigError: there are too few images.
        DataError: an image of `identity` is gone or has changed.
    """
    if identity:
        before = len(identity["images"]), identity["seed"]
        if before != (options.num_images, options.seed):
            logger.warning(
                "Continuing with the run's own reference batch of %d images, seed %d; "
                "MODEL.REFBN.NUM_IMAGES = %d and SEED = %d have no effect on it.",
                *before, options.num_images, options.seed,
            )  # fmt: skip
        return find_images(identity, dataset_dicts), identity
    chosen = draw_images(dataset_dicts, options.num_images, options.seed, group_of)
    return chosen, identity_of(dataset, [dataset_dicts[i] for i in chosen], options.seed)


def _fingerprint(dataset_dict: dict) -> str:
    read_file = dataset_dict.get("read_file", _read_file)
    read = dataset_dict.get("read")
    parts = [read() if read else read_file(dataset_dict["file_name"])]
    annotations = dataset_dict.get("annotations", dataset_dict.get("label"))
    parts.append(json.dumps(annotations, sort_keys=True, default=_plain).encode())
    for key in ("sem_seg_file_name", "pan_seg_file_name"):
        if dataset_dict.get(key) is not None:
            parts += [key.encode(), read_file(dataset_dict[key])]
    if "segments_info" in dataset_dict:  # of a panoptic segmentation
        parts.append(json.dumps(dataset_dict["segments_info"], default=_plain).encode())
    return _digest(*parts)


def _read_file(path: str) -> bytes:
    return Path(path).read_bytes()


def _plain(value: Any) -> str:
    """Return text for what json cannot hold; a long array's own text leaves out its middle."""
    if isinstance(value, np.ndarray | Tensor):
        return _digest(_bytes_of(value))
    return str(value)
