"""Models with norms as after training, and their outputs in eval mode."""

import torch
import torchvision
from torch import nn

from refbn_d2.layers import RefBatchNorm2d


def randomized(model, seed=0):
    """Give the norms random parameters and statistics, as after training."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        if tensor is not None:
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    for m in model.modules():
        if hasattr(m, "running_var") and m.running_var is not None:
            uniform(m.weight, 0.5, 1.5)
            uniform(m.bias, -0.5, 0.5)
            uniform(m.running_mean, -0.5, 0.5)
            uniform(m.running_var, 0.5, 2)
    return model


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs(model, x):
    training = [m.training for m in model.modules()]
    with torch.no_grad():
        y = model.eval()(x)
    for m, flag in zip(model.modules(), training, strict=True):
        m.training = flag
    return y


def assert_equal_in_eval(model, expected, x):
    assert_close(outputs(model, x), expected)


def assert_close(y, expected):
    tolerance = 1e-6 if y.dtype == torch.float32 else 1e-13  # rounding adds up in deep models
    torch.testing.assert_close(y, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def norms(model, kind=RefBatchNorm2d):
    return [m for m in model.modules() if type(m) is kind]


def resnet(name="resnet18", norm=None, seed=0):
    torch.manual_seed(seed)
    return randomized(torchvision.models.get_model(name, norm_layer=norm, num_classes=10))


class Conv(nn.Conv2d):
    """A convolution with its norm and activation, as in Detectron2."""

    def __init__(self, *args, norm=None, activation=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = norm
        self.activation = activation

    def forward(self, x):
        if x.numel() == 0:  # as in Detectron2; torch.fx cannot trace it
            raise AssertionError
        x = super().forward(x)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


def conv_norm_model(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return randomized(
        nn.Sequential(
            Conv(3, 8, 3, stride=2, bias=False, norm=norm(8), activation=torch.relu),
            Conv(8, 8, 3, padding=2, dilation=2, groups=4, norm=norm(8)),
            Conv(8, 4, 1),
        )
    )


class Shared(nn.Module):
    """Two convolutions that share one norm, under two names; each calls it once."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.norm_a = self.norm_b = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm_a(self.a(x)) + self.norm_b(self.b(x))


class NormAndActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()
