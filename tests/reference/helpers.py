"""A detector with two RefBN layers, its reference batch, and a training run."""

from dataclasses import replace

import torch
from torch import nn

from refbn_d2.config import RefBNOptions
from refbn_d2.layers import RefBatchNorm2d, refbn_layers
from refbn_d2.reference.batch import ReferenceBatch

OPTIONS = RefBNOptions(
    refresh="static", refresh_period=2, slice_size=2, slice_momentum=0.25, num_images=6
)


class Detector(nn.Module):
    """A backbone that returns a dict, and a head with its own norm, called twice."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), RefBatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), ToDict()
        )
        self.head = nn.Sequential(nn.Conv2d(4, 5, 1), RefBatchNorm2d(5))
        self.other = nn.BatchNorm2d(4)

    def forward(self, images):
        features = self.backbone(torch.stack(images))["p2"]
        assert len(features) == len(images)
        features = self.other(features)
        picked = features[torch.randperm(len(features))]
        return (self.head(picked[:, :, ::2]) ** 2).mean() + self.head(features).abs().mean()


class ToDict(nn.Module):
    def forward(self, x):
        return {"p2": x}


def images(seed, n):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 8, 8, generator=generator) * (1 + i) + i for i in range(n)]


def stack(samples, batch):
    return torch.stack(samples)


def make(refresh, options=OPTIONS, model=None, **changes):
    torch.manual_seed(0)
    model = model or Detector()
    options = replace(options, refresh=refresh, **changes)
    samples = images(7, options.num_images)
    identity = {"dataset": "d", "seed": 0, "images": []}
    reference = ReferenceBatch(
        model, samples, options, forward=model, identity=identity, concat_to=model.backbone,
        rows=stack,
    )  # fmt: skip
    return model, reference


def train(model, reference, steps, start=0, seen=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for iteration in range(start, steps):
        torch.manual_seed(iteration)
        reference.before_step(iteration)
        loss = model(images(100 + iteration, 3))
        optimizer.zero_grad()
        loss.backward()
        reference.after_step()
        optimizer.step()
        if seen is not None:
            seen.append({n: m.ref_mean.clone() for n, m in refbn_layers(model)})
    return model
