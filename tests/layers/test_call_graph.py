"""Which norms find the convolution before them, seen by what `fold` folds and leaves."""

import logging
import re

import pytest
import torch
import torchvision
from torch import nn

from refbn_d2.layers import RefBatchNorm2d
from refbn_d2.layers.convert import convert_to_refbn
from refbn_d2.layers.fold import fold
from tests.layers.helpers import (
    NormAndActivation,
    Shared,
    assert_close,
    assert_equal_in_eval,
    image,
    norms,
    outputs,
    randomized,
)


def left(caplog):
    """Return the names of the norms that the log lists as left."""
    names = re.search(r"left as they are: (.*)", caplog.messages[-1])
    return names[1].split(", ") if names else []


class NormsItsInput(nn.Conv2d):
    """Looks like Detectron2's convolution, but its norm comes first."""

    def __init__(self):
        super().__init__(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return super().forward(self.norm(x))


@pytest.mark.parametrize("run", [False, True])
def test_a_child_that_does_not_follow_its_convolution_is_left(run, caplog):
    caplog.set_level(logging.INFO)
    model, x = randomized(nn.Sequential(nn.ReLU(), NormsItsInput())), image(2, 4, 8, 8)
    folded = fold(model, x if run else None)
    assert left(caplog) == ["1.norm"]
    assert torch.equal(outputs(folded, x), outputs(model, x))


class WantsMore(nn.Module):
    class Conv(nn.Conv2d):
        def forward(self, x, offset):
            return self.norm(super().forward(x)) + offset

    def __init__(self):
        super().__init__()
        self.conv = self.Conv(4, 4, 3)
        self.conv.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.conv(x, x.mean())


@pytest.mark.parametrize("run", [False, True])
def test_a_child_that_cannot_be_tried_by_itself_is_found_in_a_run(run, caplog):
    caplog.set_level(logging.INFO)
    model, x = randomized(WantsMore()), image(2, 4, 8, 8)
    folded = fold(model, x if run else None)
    assert left(caplog) == ([] if run else ["conv.norm"])
    assert_equal_in_eval(folded, outputs(model, x), x)


# Models with norms that must stay. Each: (module, names of the norms that are left).
class ConvUsedTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class ConvReturned(ConvUsedTwice):
    def forward(self, x):
        y = self.conv(x)
        return torch.cat([self.norm(y), y.relu()])


class ConvChangedInPlace(ConvUsedTwice):
    def forward(self, x):
        y = self.conv(x)
        y.add_(1)
        return self.norm(y)


class BetweenThem(ConvUsedTwice):
    def forward(self, x):
        return self.norm(self.conv(x).tanh())


class ConvCalledAgain(ConvUsedTwice):
    def forward(self, x):
        return torch.cat([self.norm(self.conv(x)), self.conv(-x)])


class NormCalledAgain(ConvUsedTwice):
    def forward(self, x):
        return self.norm(self.norm(self.conv(x)))


class TiedWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.norm(self.a(x)) + self.b(x)


class StandardizedConv(nn.Conv2d):
    def forward(self, x):
        weight = self.weight / self.weight.std(dim=(1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias)


class Both(nn.Module):
    """A model in which one norm folds, and one stays."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (
            ConvUsedTwice(),
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)),
        )

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize("run", [False, True], ids=["traced", "run"])
@pytest.mark.parametrize(
    "model, stay",
    [
        (ConvUsedTwice, ["norm"]),
        (ConvReturned, ["norm"]),
        (ConvChangedInPlace, ["norm"]),
        (BetweenThem, ["norm"]),
        (ConvCalledAgain, ["norm"]),
        (NormCalledAgain, ["norm"]),
        (TiedWeights, ["norm"]),
        (Shared, ["norm_a"]),
        (Both, ["first.norm"]),
        (lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)), ["0"]),
        (lambda: nn.Sequential(StandardizedConv(3, 4, 3), nn.BatchNorm2d(4)), ["1"]),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), NormAndActivation(4)), ["1"]),
        (
            lambda: nn.Sequential(
                nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)
            ),
            ["1"],
        ),
    ],
)
def test_a_norm_that_cannot_fold_is_left(model, stay, run, caplog):
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    model, x = convert_to_refbn(randomized(model())), image(2, 3, 8, 8)
    caplog.clear()
    folded = fold(model, x if run else None)
    assert left(caplog) == stay
    assert not norms(folded)
    assert_equal_in_eval(folded, outputs(model, x), x)


class SharedHead(nn.Module):
    """One convolution and its norm, called on every level of a pyramid."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), RefBatchNorm2d(4)

    def forward(self, x):
        levels = [self.norm(self.conv(level)) for level in (x, x[..., ::2, ::2])]
        return torch.cat([level.flatten(1) for level in levels], 1)


@pytest.mark.parametrize("run", [False, True])
def test_a_head_called_on_several_levels_folds(run, caplog):
    caplog.set_level(logging.INFO)
    model, x = randomized(SharedHead()), image(2, 3, 16, 16)
    folded = fold(model, x if run else None)
    assert left(caplog) == [] and not norms(folded)
    assert_equal_in_eval(folded, outputs(model, x), x)


@pytest.mark.parametrize("run", [False, True])
def test_a_densenet_keeps_the_norms_before_its_convolutions(run, caplog):
    caplog.set_level(logging.INFO)
    torch.manual_seed(0)
    model = randomized(torchvision.models.DenseNet(8, (2, 2), 16, num_classes=5))
    x = image(1, 3, 32, 32)
    folded = fold(convert_to_refbn(model), x if run else None)
    denselayers = [f"features.denseblock{b}.denselayer{n}.norm1" for b in (1, 2) for n in (1, 2)]
    assert sorted(left(caplog)) == sorted(
        [*denselayers, "features.transition1.norm", "features.norm5"]
    )
    assert_equal_in_eval(folded, outputs(model, x), x)


class Detector(nn.Module):
    """torch.fx cannot trace this: its forward depends on data, and takes and returns dicts."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), RefBatchNorm2d(4), nn.ReLU())
        self.unused = nn.Sequential(nn.Conv2d(3, 4, 3), RefBatchNorm2d(4))

    def forward(self, samples, offset=0.0):
        y = self.body(torch.stack([s["image"] for s in samples]))
        if y.sum() < -1:
            raise AssertionError
        return [{"features": y + offset}]


def test_a_model_that_cannot_be_traced_needs_example_inputs(caplog):
    caplog.set_level(logging.INFO)
    model, samples = randomized(Detector()), [{"image": image(3, 8, 8)}]
    with pytest.raises(ValueError, match="(?s)cannot trace Detector .*Pass example_inputs"):
        fold(model)
    expected = outputs(model, samples)[0]["features"]
    for example_inputs in (samples, (samples, 1.0)):
        folded = fold(model, example_inputs)
        assert left(caplog) == ["unused.1"] and type(folded.unused[1]) is nn.BatchNorm2d
        assert_close(outputs(folded, samples)[0]["features"], expected)
