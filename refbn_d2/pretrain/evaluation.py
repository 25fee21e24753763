"""Validate a classifier and its moving average."""

import logging
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from timm.utils import accuracy
from torch import Tensor, nn
from tqdm import tqdm

from refbn_d2.pretrain.data.datasets import ImageSet
from refbn_d2.pretrain.data.loaders import Unreadable, build_test_loader
from refbn_d2.utils import distributed, precision

logger = logging.getLogger(__name__)


def autocast(cfg) -> torch.autocast:
    """Return the autocast context of SOLVER.AMP."""
    amp = cfg.SOLVER.AMP
    return precision.autocast(cfg.MODEL.DEVICE, getattr(torch, amp.DTYPE), amp.ENABLED)


def build_normalize(cfg) -> Callable[[Tensor], Tensor]:
    """Return a function: uint8 x -> (x - PIXEL_MEAN) / PIXEL_STD, float32 on MODEL.DEVICE.

    x is (N, 3, H, W).
    """
    device = torch.device(cfg.MODEL.DEVICE)
    mean, std = (
        torch.tensor(values, device=device).view(1, 3, 1, 1)
        for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )

    def normalize(images: Tensor) -> Tensor:
        images = images.to(device, non_blocking=True, memory_format=memory_format(cfg))
        return images.float().sub_(mean).div_(std)

    return normalize


def memory_format(cfg) -> torch.memory_format:
    """Return torch's memory format for MODEL.CHANNELS_LAST."""
    return torch.channels_last if cfg.MODEL.CHANNELS_LAST else torch.contiguous_format


class Evaluator:
    """Measure classifiers on DATASETS.TEST."""

    def __init__(self, cfg, images: ImageSet) -> None:
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.loader = build_test_loader(cfg, images)
        self.unreadable = Unreadable(images, cfg.DATALOADER.MAX_UNREADABLE)
        self.autocast, self.normalize = autocast(cfg), build_normalize(cfg)

    def __call__(self, models: Mapping[str, nn.Module]) -> dict[str, float]:
        """Return "<name>/top1", "/top5" (%) and "/loss" (cross entropy) of every model.

        Only worker 0 gets them, the others get {}. The models stay in eval mode.
        """
        results = {}
        for name, model in models.items():
            measured = self._measure(model)
            results |= {f"{name}/{key}": value for key, value in measured.items()}
        if distributed.rank() != 0:
            return {}
        logger.info("  ".join(f"{name}: {value:.4g}" for name, value in results.items()))
        return results

    @torch.no_grad()
    def _measure(self, model: nn.Module) -> dict[str, float]:
        model.eval()
        distributed.share_buffers(model)
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)  # top-1, top-5, loss, images
        for images, labels, unreadable in tqdm(
            self.loader, "validation", disable=None, leave=False
        ):
            self.unreadable.note(unreadable)
            if not len(labels):
                continue
            labels = labels.to(self.device, non_blocking=True)
            with self.autocast:
                logits = model(self.normalize(images)).float()
            measured = [*accuracy(logits, labels, (1, 5)), F.cross_entropy(logits, labels)]
            sums += len(labels) * torch.stack([*measured, torch.ones_like(measured[0])])
        *sums, count = distributed.mean_over_workers(sums.tolist(), self.device)
        return {key: s / count for key, s in zip(("top1", "top5", "loss"), sums, strict=True)}
