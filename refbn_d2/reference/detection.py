"""Turn a detector's reference images into rows of a training batch.

sample      one image with its annotations, as the detector takes it
batch       (N, C, H, W), normalized and padded: the input of the backbone
rows        (k, C, H, W) of k samples, padded with zeros or cropped at the right and the bottom
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def image_rows(model: nn.Module) -> Callable[[list[dict], Tensor], Tensor]:
    """Return `rows` of a detector with Detectron2's `pixel_mean` and `pixel_std` (C, 1, 1)."""

    def rows(samples: list[dict], batch: Tensor) -> Tensor:
        images = (sample["image"].to(batch.device, non_blocking=True) for sample in samples)
        return _fit([(image - model.pixel_mean) / model.pixel_std for image in images], batch)

    return rows


def transformed_rows(model: Any) -> Callable[[list[tuple], Tensor], Tensor]:
    """Return `rows` of a detector with torchvision's `transform` (GeneralizedRCNNTransform)."""

    def rows(samples: list[tuple[Tensor, dict]], batch: Tensor) -> Tensor:
        images = []
        for image, _ in samples:
            image = model.transform.normalize(image.to(batch.device))
            images.append(model.transform.resize(image, None)[0])
        return _fit(images, batch)

    return rows


def _fit(images: list[Tensor], batch: Tensor) -> Tensor:
    height, width = batch.shape[-2:]
    return torch.stack(
        [F.pad(i, (0, width - i.shape[-1], 0, height - i.shape[-2])) for i in images]
    )
