"""Oracles: a straight run without refresh, moments of the layers' inputs taken by hooks."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from refbn_d2.layers import (
    Moments,
    Recording,
    RefBatchNorm2d,
    RefInstanceNorm2d,
    refbn_layers,
)
from refbn_d2.reference.batch import ReferenceBatch
from tests.reference.helpers import OPTIONS, Detector, images, make, stack, train


def test_capture_keeps_the_moments_of_the_layers_own_inputs():
    model, reference = make("static")
    inputs = {}
    for name, layer in refbn_layers(model):
        layer.register_forward_pre_hook(
            lambda m, args, n=name: inputs.setdefault(n, []).append(args[0])
        )
    reference.capture()
    for name, layer in refbn_layers(model):
        x = torch.cat([x.transpose(0, 1).flatten(1) for x in inputs[name]], 1)
        torch.testing.assert_close(layer.ref_mean, x.mean(1))
        torch.testing.assert_close(layer.ref_var, x.var(1, correction=0), rtol=1e-4, atol=1e-5)
        assert layer.ref_count == x.shape[1]
    assert [len(x) for x in inputs.values()] == [1, 2]


def test_static_never_changes_again():
    model, reference = make("static")
    reference.capture()
    seen = []
    train(model, reference, 5, seen=seen)
    assert all(torch.equal(seen[0][n], s[n]) for s in seen for n in s)


def test_full_is_the_capture_of_the_weights_of_that_step():
    model, reference = make("full")
    reference.capture()
    train(model, reference, 2)
    weights = copy.deepcopy(model)
    train(model, reference, 3, start=2)
    _, again = make("static", model=weights)
    again.capture()
    for (_, a), (_, b) in zip(refbn_layers(model), refbn_layers(weights), strict=True):
        assert torch.equal(a.ref_mean, b.ref_mean) and torch.equal(a.ref_var, b.ref_var)


@pytest.mark.parametrize("refresh", ["slice", "concat"])
def test_slices_walk_through_the_reference_every_period(refresh):
    model, reference = make(refresh)
    reference.capture()
    rows = []
    handle = model.backbone[0].register_forward_pre_hook(lambda m, args: rows.append(args[0]))
    train(model, reference, 8)
    handle.remove()
    reference_images = images(7, 6)
    # What runs besides the batch of three, in this order:
    slices = [x for x in rows if len(x) == 2] if refresh == "slice" else [
        x[3:] for x in rows if len(x) == 5
    ]  # fmt: skip
    expected = [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert len(slices) == len(expected)
    for rows, indices in zip(slices, expected, strict=True):
        assert torch.equal(rows, torch.stack([reference_images[i] for i in indices]))
    assert reference.state_dict()["position"] == 2


@pytest.mark.parametrize("refresh", ["slice", "concat"])
def test_slice_moments_enter_by_a_moving_average(refresh):
    model, reference = make(refresh)
    reference.capture()
    layer = model.backbone[1]
    mean, second = layer.ref_mean.clone(), layer.ref_var + layer.ref_mean**2
    conv_out = model.backbone[0](torch.stack(images(7, 2))).detach()
    train(model, reference, 1)
    first = 0.75 * mean + 0.25 * conv_out.mean((0, 2, 3))
    second = 0.75 * second + 0.25 * (conv_out**2).mean((0, 2, 3))
    torch.testing.assert_close(layer.ref_mean, first)
    torch.testing.assert_close(layer.ref_var, second - first**2, rtol=1e-4, atol=1e-5)


def test_layers_outside_of_the_module_take_slices():
    model, reference = make("concat")
    reference.capture()
    seen = []
    train(model, reference, 4, seen=seen)
    for name in ("backbone.1", "head.1"):
        changed = [not torch.equal(a[name], b[name]) for a, b in zip(seen, seen[1:], strict=False)]
        assert changed == [False, True, False]


@pytest.mark.parametrize("refresh", ["static", "full", "slice", "concat"])
def test_resumed_run_equals_the_straight_one(refresh):
    straight, reference = make(refresh)
    reference.capture()
    train(straight, reference, 7)
    first, reference = make(refresh)
    reference.capture()
    train(first, reference, 3)
    second, again = make(refresh)
    second.load_state_dict(first.state_dict())
    again.load_state_dict(reference.state_dict())
    train(second, again, 7, start=3)
    for (name, a), (_, b) in zip(
        straight.state_dict().items(), second.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_slice_is_appended_to_a_classifiers_own_input():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        RefBatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    samples = images(7, 6)
    reference = ReferenceBatch(
        model, samples, replace(OPTIONS, refresh="concat"),
        forward=lambda s: model(torch.stack(s)), concat_to=model, rows=stack,
    )  # fmt: skip
    reference.capture()
    before = model[1].ref_mean.clone()
    reference.before_step(0)
    assert model(torch.stack(images(1, 3))).shape == (3, 2)
    reference.after_step()
    assert not torch.equal(before, model[1].ref_mean)
    assert model.eval()(torch.stack(images(1, 3))).shape == (3, 2)


def test_virtual_batch_norm_is_whole_reference_with_weight_one():
    """With all of it appended and w = momentum = 1, it has the moments of this step's weights."""
    model, reference = make(
        "concat", reference_weight=1.0, gradient="reference", slice_size=6, slice_momentum=1.0
    )
    layer = model.backbone[1]
    layer.reference_weight, layer.gradient = 1.0, "reference"
    reference.capture()
    with torch.no_grad():
        model.backbone[0].weight.mul_(3)
    reference.before_step(0)
    batch = torch.stack(images(1, 3))
    model.backbone[3].p = 0.0
    y = model.backbone(batch)["p2"]
    reference.after_step()
    h, r = model.backbone[0](batch), model.backbone[0](torch.stack(images(7, 6)))
    mean, var = r.mean((0, 2, 3), keepdim=True), r.var((0, 2, 3), correction=0, keepdim=True)
    expected = ((h - mean) / (var + 1e-5).sqrt()).relu()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_no_layer_or_nothing_to_append_to():
    with pytest.raises(ValueError, match="no RefBN or RefIN layer"):
        ReferenceBatch(nn.Conv2d(3, 3, 1), images(7, 6), OPTIONS)
    with pytest.raises(ValueError, match='use "slice"'):
        ReferenceBatch(Detector(), images(7, 6), replace(OPTIONS, refresh="concat"), forward=print)


def test_auto_is_static_for_refin_alone_and_appends_where_it_can():
    _, reference = make("auto")
    assert reference.options.refresh == "concat"
    options = replace(OPTIONS, refresh="auto")
    reference = ReferenceBatch(Detector(), images(7, 6), options, forward=print)
    assert reference.options.refresh == "slice"
    model = Detector()
    model.head[1] = RefInstanceNorm2d(5)
    assert make("auto", model=model)[1].options.refresh == "concat"
    model.backbone[1] = RefInstanceNorm2d(4)
    assert make("auto", model=model)[1].options.refresh == "static"


def test_layer_that_the_reference_does_not_reach_is_named(caplog):
    model, _ = make("static")
    reference = ReferenceBatch(
        model, images(7, 6), OPTIONS, forward=lambda s: model.backbone(torch.stack(s))
    )
    reference.capture()
    assert "did not reach head.1" in caplog.text
    assert model.backbone[1].has_reference() and not model.head[1].has_reference()


def test_begin_captures_the_dataset(caplog):
    caplog.set_level("INFO")
    model, reference = make("static")
    reference.begin()
    _, again = make("static", model=copy.deepcopy(model))
    again.capture()
    for (_, layer), (_, other) in zip(refbn_layers(model), refbn_layers(again.model), strict=True):
        assert torch.equal(layer.ref_mean, other.ref_mean) and layer.ref_mean.any()
    assert "in 2 of 2 layers: 6 images of d, seed" in caplog.text


def test_begin_keeps_the_checkpoints_reference_and_captures_what_is_missing():
    model, reference = make("static", reference="checkpoint")
    kept, fresh = model.backbone[1], model.head[1]
    kept.commit(Moments(torch.full((4,), 0.3), torch.full((4,), 2.0), 77))
    inputs, passes = [], []
    fresh.register_forward_pre_hook(lambda m, args: inputs.append(args[0].transpose(0, 1)))
    kept.register_forward_hook(lambda m, args, y: passes.append((args[0], y)))
    reference.begin()
    assert kept.ref_mean.eq(0.3).all() and kept.ref_var.eq(2.0).all() and kept.ref_count == 77
    [(x, y)] = passes  # normalized by the reference that was kept
    torch.testing.assert_close(y, (x - 0.3) / (2.0 + 1e-5) ** 0.5)
    seen = torch.cat([x.flatten(1) for x in inputs], 1)
    torch.testing.assert_close(fresh.ref_mean, seen.mean(1))
    moments = fresh.ref_mean.clone()
    reference.begin()  # there is nothing more to capture
    assert torch.equal(fresh.ref_mean, moments) and len(passes) == 1


def test_begin_with_a_checkpoint_that_has_no_reference():
    _, reference = make("static", reference="checkpoint")
    with pytest.raises(ValueError, match='REFERENCE is "checkpoint", but no RefBN layer has'):
        reference.begin()


def test_nothing_is_appended_to_a_backbone_without_refbn():
    model, _ = make("concat")
    model.backbone[1] = nn.BatchNorm2d(4)
    _, reference = make("concat", model=model)
    reference.capture()
    rows = []
    model.backbone[0].register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    before = model.head[1].ref_mean.clone()
    train(model, reference, 1)
    assert rows == [2, 3] and not torch.equal(before, model.head[1].ref_mean)


def test_a_step_that_failed_leaves_nothing(tmp_path):
    model, reference = make("concat")
    reference.capture()
    reference.before_step(0)
    assert len(model.eval().backbone(torch.zeros(3, 3, 8, 8))["p2"]) == 3  # and none in eval mode
    reference.before_step(1)
    rows = []
    model.backbone[0].register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    model.train()(images(1, 3))
    assert rows == [3] and model.backbone[1].recording is Recording.OFF
