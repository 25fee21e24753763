"""Cut mask targets out of the ground truth, and paste predicted masks into the image.

Shapes:
    F foreground RoIs, D detections of one image; m the mask head's resolution
    boxes       (F, 4) in pixels of the network's input, (D, 4) in pixels of the original image
    masks       (F, m, m) bool targets, (D, m, m) predicted probabilities
"""

from collections.abc import Sequence

import numpy as np
import pycocotools.mask as mask_util
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

Mask = list[np.ndarray] | np.ndarray  # polygons (x0, y0, x1, y1, ...), or a bool (H, W) bitmask
MAX_PASTED_BYTES = 1 << 30


def mask_targets(masks: Sequence[Mask], boxes: Tensor, size: int) -> Tensor:
    """Return the part of each mask inside its box, as (F, size, size) bool on the boxes' device.

    Polygons are scaled to the box and filled by COCO's rasterizer. Bitmasks are cut out by RoIAlign
    and thresholded at 1/2.
    """
    targets = torch.zeros(len(masks), size, size, dtype=torch.bool)
    cpu_boxes = boxes.detach().float().cpu()
    bitmaps = [i for i, mask in enumerate(masks) if isinstance(mask, np.ndarray)]
    polygons = [i for i, mask in enumerate(masks) if not isinstance(mask, np.ndarray) and mask]
    if polygons:
        filled = _fill_polygons([masks[i] for i in polygons], cpu_boxes[polygons].numpy(), size)
        targets[polygons] = torch.from_numpy(filled)
    for i in bitmaps:
        bitmap = torch.from_numpy(np.ascontiguousarray(masks[i], dtype=np.float32))
        roi = [cpu_boxes[i : i + 1]]
        targets[i] = roi_align(bitmap[None, None], roi, size, aligned=True)[0, 0] >= 0.5
    return targets.to(boxes.device)


def _fill_polygons(masks: Sequence[list[np.ndarray]], boxes: np.ndarray, size: int) -> np.ndarray:
    """Fill polygons to (F, size, size) bool, with one call of the rasterizer for all of them."""
    counts = np.array([len(polygons) for polygons in masks])
    flat = [polygon for polygons in masks for polygon in polygons]
    lengths = np.repeat(np.arange(len(masks)), counts), np.array([len(p) // 2 for p in flat])
    owner = np.repeat(*lengths)  # of every vertex
    scale = np.float32(size) / np.maximum(boxes[:, 2:] - boxes[:, :2], np.float32(0.1))
    vertices = (np.concatenate(flat).reshape(-1, 2) - boxes[owner, :2]) * scale[owner]
    ends = np.cumsum(lengths[1])[:-1] * 2
    rles = mask_util.frPyObjects(np.split(vertices.reshape(-1), ends), size, size)
    if counts.max() > 1:
        starts = np.cumsum(counts) - counts
        rles = [mask_util.merge(rles[a : a + n]) for a, n in zip(starts, counts, strict=True)]
    return mask_util.decode(rles).transpose(2, 0, 1).astype(bool)


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Sample `masks` bilinearly at the centers of an image's pixels, and threshold at 1/2.

    Args:
        masks: (D, m, m) probabilities, each spanning its box.
        boxes: (D, 4).

    Returns:
        (D, height, width) bool; False outside the box.
    """
    # Columns first, as COCO's run-length encoder wants them.
    pasted = torch.zeros(len(masks), width, height, dtype=torch.bool, device=masks.device).mT
    if not len(masks):
        return pasted
    # On the CPU masks are sampled one by one, each only in the pixels of its box.
    chunk = 1 if masks.device.type == "cpu" else max(1, MAX_PASTED_BYTES // (height * width * 4))
    for own, box, out in zip(
        masks.split(chunk), boxes.float().split(chunk), pasted.split(chunk), strict=True
    ):
        first = (box.amin(dim=0)[:2].floor() - 1).clamp(min=0).long().tolist()
        last = (box.amax(dim=0)[2:].ceil() + 1).long().tolist()
        x = torch.arange(first[0], min(last[0], width), device=box.device) + 0.5
        y = torch.arange(first[1], min(last[1], height), device=box.device) + 0.5
        x0, y0, x1, y1 = box.split(1, dim=1)
        x = (x - x0) / (x1 - x0) * 2 - 1  # (chunk, w), in [-1, 1] within the box
        y = (y - y0) / (y1 - y0) * 2 - 1
        grid = torch.stack(
            [x[:, None].expand(-1, y.shape[1], -1), y[..., None].expand(-1, -1, x.shape[1])], -1
        )
        samples = F.grid_sample(own[:, None].float(), grid, align_corners=False)[:, 0]
        y_end, x_end = first[1] + samples.shape[1], first[0] + samples.shape[2]
        out[:, first[1] : y_end, first[0] : x_end] = samples >= 0.5
    return pasted
