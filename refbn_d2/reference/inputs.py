"""Infer how reference images are passed to a model."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from refbn_d2.reference.detection import image_rows, transformed_rows

logger = logging.getLogger(__name__)

Sample = Any  # one image, as the model takes it in training


class Inputs(NamedTuple):
    """`forward`, `concat_to` and `rows` of `ReferenceBatch`."""

    forward: Callable[[list[Sample]], Any]
    concat_to: nn.Module | None
    rows: Callable[[list[Sample], Tensor], Tensor] | None

    @property
    def can_concat(self) -> bool:
        return self.concat_to is not None and self.rows is not None


def infer_inputs(
    model: nn.Module,
    samples: Sequence[Sample],
    concat_to: nn.Module | None = None,
    rows: Callable[[list[Sample], Tensor], Tensor] | None = None,
) -> Inputs:
    """Return how `model` runs `samples`; a given `concat_to` or `rows` is kept.

    These samples are recognized:

    - images (C, H, W) of one size, or (image, label), for a classifier or any model that takes a
      batch: the images are stacked;
    - dicts with "image", for a detector with Detectron2's `pixel_mean` and `backbone`;
    - (image, target), for torchvision's detectors.

    Anything else is passed to the model as a list, and cannot be appended to a batch ("concat").
    """
    first = samples[0]
    is_pair = isinstance(first, Sequence) and isinstance(first[0], Tensor)
    if isinstance(first, Tensor) or (is_pair and not hasattr(model, "transform")):

        def stack(samples: list[Sample], batch: Tensor | None = None) -> Tensor:
            device = next(model.parameters()).device
            return torch.stack([s[0] for s in samples] if is_pair else samples).to(device)

        inferred = Inputs(lambda samples: model(stack(samples)), model, stack)
    elif isinstance(first, Mapping) and hasattr(model, "pixel_mean"):
        inferred = Inputs(model, getattr(model, "backbone", None), image_rows(model))
    elif is_pair:

        def forward(samples: list[tuple[Tensor, dict]]) -> Any:
            device = next(model.parameters()).device
            images, targets = zip(*samples, strict=True)
            return model(
                [image.to(device) for image in images],
                [
                    {key: v.to(device) if isinstance(v, Tensor) else v for key, v in t.items()}
                    for t in targets
                ],
            )

        inferred = Inputs(forward, getattr(model, "backbone", None), transformed_rows(model))
    else:
        inferred = Inputs(model, None, None)
    return Inputs(
        inferred.forward,
        inferred.concat_to if concat_to is None else concat_to,
        inferred.rows if rows is None else rows,
    )


def first_tensor(args: Sequence, kwargs: Mapping[str, Any]) -> tuple[int | str, Tensor]:
    """Return a call's batch and its place: the first argument, else the first tensor by keyword.

    Raises:
        TypeError: there is none.
    """
    if args and isinstance(args[0], Tensor):
        return 0, args[0]
    if not args:
        for name, value in kwargs.items():
            if isinstance(value, Tensor):
                return name, value
    given = [type(value).__name__ for value in (*args[:1], *kwargs.values())]
    raise TypeError(
        "The module that a slice is appended to must take its batch as first argument, or by "
        f"keyword, as one tensor (N, C, H, W); it was called with {', '.join(given) or 'nothing'}. "
        'Set MODEL.REFBN.REFRESH to "slice".'
    )


def with_rows(batch: Tensor, rows: Tensor) -> Tensor:
    """Append `rows` (k, C, H, W) to `batch` (N, C, H, W), in its dtype and memory format."""
    if len(rows) > len(batch):
        _warn_of_memory(len(batch), len(rows))
    rows = rows.to(batch)
    if batch.is_contiguous(memory_format=torch.channels_last):
        rows = rows.contiguous(memory_format=torch.channels_last)
    return torch.cat([batch, rows])


@functools.cache
def _warn_of_memory(batch: int, rows: int) -> None:
    logger.warning(
        "A step with a slice of the reference holds %d images of it beside the batch's %d. If "
        "memory is short, lower MODEL.REFBN.SLICE_SIZE to about SOLVER.IMS_PER_BATCH.",
        rows,
        batch,
    )


def without_last_rows(output: Any, k: int, rows: int | None = None) -> Any:
    """Drop the last k rows of every tensor in a module's output.

    Args:
        rows: how many rows every tensor must have before; None: any number.

    Raises:
        ValueError: a tensor has another number of rows.
        TypeError: the output contains something other than tensors, None, mappings, lists, tuples,
            named tuples and dataclasses; the message names its type.
    """
    if output is None:
        return None
    if isinstance(output, Tensor):
        if rows is not None and output.shape[:1] != (rows,):
            raise ValueError(
                f"The module that the slice was appended to returns a tensor {(*output.shape,)} "
                f"for a batch of {rows} rows, so the slice's rows cannot be dropped. Set "
                'MODEL.REFBN.REFRESH to "slice".'
            )
        return output[:-k]
    if isinstance(output, Mapping):
        parts = {key: without_last_rows(value, k, rows) for key, value in output.items()}
        container: Any = type(output)  # an OrderedDict, or any other mapping
        return container(parts)
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(without_last_rows(value, k, rows) for value in output))
    if isinstance(output, tuple | list):
        return type(output)(without_last_rows(value, k, rows) for value in output)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        names = [field.name for field in dataclasses.fields(output)]
        parts = {name: without_last_rows(getattr(output, name), k, rows) for name in names}
        return dataclasses.replace(output, **parts)
    raise TypeError(
        f"The module that the slice was appended to returns a {type(output).__name__}, whose last "
        'rows cannot be dropped. Set MODEL.REFBN.REFRESH to "slice".'
    )
