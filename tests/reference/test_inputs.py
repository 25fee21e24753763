"""ReferenceBatch infers its inputs from the model and the images. Oracles: forward hooks."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn

from refbn_d2 import ReferenceBatch, convert_to_refbn
from refbn_d2.layers import refbn_layers
from refbn_d2.reference.inputs import _warn_of_memory, with_rows, without_last_rows


def classifier():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return convert_to_refbn(nn.Sequential(*layers, nn.Linear(4, 2)))


def images(n, seed=0):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def rows_seen(module):
    seen = []
    module.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    return seen


def test_two_lines_and_a_context_manager_around_the_step():
    """It is captured before the first step, and 8 of 16 images join every fourth batch."""
    model = classifier()
    reference = ReferenceBatch(model, images(16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen, means = rows_seen(model[0]), []
    for iteration in range(5):
        with reference.step():
            loss = model(images(3, iteration + 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        means.append(model[1].ref_mean.clone())
    assert seen == [16, 11, 3, 3, 3, 11]
    assert torch.equal(means[0], means[3]) and not torch.equal(means[3], means[4])
    h = classifier()[0](images(16))
    inside = ReferenceBatch(classifier(), images(16))
    inside.begin()
    torch.testing.assert_close(inside.model[1].ref_mean, h.mean((0, 2, 3)))


def test_fewer_images_than_a_slice():
    model = classifier()
    reference = ReferenceBatch(model, list(images(3)))
    seen = rows_seen(model[0])
    with reference.step():
        model(images(2, 1)).sum().backward()
    assert seen == [3, 5]


def test_the_pairs_of_a_classification_data_set():
    """(image, label), as torch's datasets give them: the same as the images."""
    model, expected = classifier(), classifier()
    reference = ReferenceBatch(model, [(image, 1) for image in images(16)])
    reference.begin()
    ReferenceBatch(expected, images(16)).begin()
    assert torch.equal(model[1].ref_mean, expected[1].ref_mean)
    seen = rows_seen(model[0])
    with reference.step():
        model(images(3, 1)).sum().backward()
    assert seen == [11]


def test_the_iteration_may_be_given_and_is_saved():
    model = classifier()
    reference = ReferenceBatch(model, images(16))
    seen = rows_seen(model[0])
    with reference.step(3):
        model(images(2, 1)).sum().backward()
    state = reference.state_dict()
    again = ReferenceBatch(model, images(16))
    again.load_state_dict(state)
    with again.step():  # the fifth: a slice
        model(images(2, 1)).sum().backward()
    assert seen == [16, 2, 10]


def test_other_images_than_the_checkpoints_are_refused():
    state = ReferenceBatch(classifier(), images(16)).state_dict()
    with pytest.raises(ValueError, match="has other images"):
        ReferenceBatch(classifier(), images(16, seed=1)).load_state_dict(state)


def test_no_images():
    with pytest.raises(ValueError, match="there are none"):
        ReferenceBatch(classifier(), images(0))


def test_a_step_that_fails_leaves_no_hooks():
    model = classifier()
    reference = ReferenceBatch(model, images(16))
    with pytest.raises(KeyError), reference.step():
        raise KeyError
    seen = rows_seen(model[0])
    model(images(2))
    assert seen == [2] and not model._forward_hooks and not model[1].recorded_moments


def test_a_new_reference_takes_the_place_of_one_whose_step_failed():
    model = classifier()
    ReferenceBatch(model, images(16)).before_step()  # never finished
    again = ReferenceBatch(model, images(16))
    seen = rows_seen(model[0])
    with again.step():
        model(images(2)).sum().backward()
    assert seen == [16, 10]


def test_a_module_that_is_not_called_is_noticed():
    model = classifier()
    reference = ReferenceBatch(model, images(16))
    with pytest.raises(RuntimeError, match="Sequential was not called, only its forward"):  # noqa: SIM117
        with reference.step():
            model.forward(images(2)).sum().backward()


class PixelDetector(nn.Module):
    """Like Detectron2's: takes dicts with "image"; has `pixel_mean`, `pixel_std`, `backbone`."""

    def __init__(self):
        super().__init__()
        self.backbone = convert_to_refbn(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
        self.register_buffer("pixel_mean", torch.full((3, 1, 1), 0.5))
        self.register_buffer("pixel_std", torch.full((3, 1, 1), 2.0))

    def forward(self, samples):
        batch = torch.stack([(s["image"] - self.pixel_mean) / self.pixel_std for s in samples])
        return self.backbone(batch).square().mean()


def test_dicts_with_images_go_to_a_detectors_backbone():
    model = PixelDetector()
    reference = ReferenceBatch(model, [{"image": image} for image in images(16)])
    batches = []
    model.backbone.register_forward_pre_hook(lambda m, args: batches.append(args[0]))
    with reference.step():
        model([{"image": image} for image in images(2, 1)]).backward()
    assert [len(batch) for batch in batches] == [16, 10]
    torch.testing.assert_close(batches[1][2:], (images(16)[:8] - 0.5) / 2.0)
    assert model.backbone[1].ref_count == 16 * 36


def test_torchvisions_detector_takes_pairs():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    model = torchvision.models.detection.maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64,
        trainable_backbone_layers=5, norm_layer=nn.BatchNorm2d,
    )  # fmt: skip
    model = convert_to_refbn(model).train()
    target = {
        "boxes": torch.tensor([[4.0, 4.0, 30.0, 30.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 48, 64, dtype=torch.uint8),
        "image_id": 7,  # no tensor, as torchvision's wrapped COCO has it
    }
    samples = [(torch.rand(3, 48, 64), target) for _ in range(4)]
    reference = ReferenceBatch(model, samples)
    seen = rows_seen(model.backbone.body.conv1)
    with reference.step():
        sum(model([samples[0][0]], [target]).values()).backward()
    assert seen == [4, 5]
    assert all(layer.has_reference() for _, layer in refbn_layers(model))


class Pair(NamedTuple):
    a: torch.Tensor
    b: None


@dataclass
class Output:
    logits: torch.Tensor


def test_rows_are_dropped_from_any_container():
    x = torch.arange(4)
    assert without_last_rows(x, 1).tolist() == [0, 1, 2]
    assert without_last_rows(Pair(x, None), 2).a.tolist() == [0, 1]
    assert without_last_rows(Output(x), 3).logits.tolist() == [0]
    ordered = without_last_rows(OrderedDict(p2=x, p3=[x]), 1)
    assert type(ordered) is OrderedDict and ordered["p3"][0].tolist() == [0, 1, 2]
    with pytest.raises(TypeError, match="returns a str"):
        without_last_rows("features", 1)


def test_appended_rows_look_like_the_batch_and_a_longer_slice_is_told_once(caplog):
    _warn_of_memory.cache_clear()
    batch = torch.randn(2, 3, 4, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    rows = torch.randn(3, 3, 4, 5)
    for part in (rows[:2], rows, rows):
        longer = with_rows(batch, part)
        assert longer.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(longer, torch.cat([batch, part.bfloat16()]))
    assert [r.getMessage().partition(".")[0] for r in caplog.records] == [
        "A step with a slice of the reference holds 3 images of it beside the batch's 2"
    ]
