"""What a reference batch has to know of a detector."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def image_rows(model: nn.Module) -> Callable[[list[dict], Tensor], Tensor]:
    """The `rows` of a detector that holds Detectron2's `pixel_mean`, `pixel_std` (C, 1, 1).

    Images are normalised as the batch was, then padded with zeros or cropped at the right and the
    bottom to its size.
    """

    def rows(samples: list[dict], batch: Tensor) -> Tensor:
        height, width = batch.shape[-2:]
        images = []
        for sample in samples:
            image = sample["image"].to(batch.device, non_blocking=True)
            image = (image - model.pixel_mean) / model.pixel_std
            h, w = image.shape[-2:]
            images.append(F.pad(image, (0, width - w, 0, height - h)))
        return torch.stack(images)

    return rows
