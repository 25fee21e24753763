import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from refbn_d2.layers import (
    Moments,
    Recording,
    RefInstanceNorm2d,
    convert_from_refbn,
    convert_to_refbn,
    fold,
    ref_instance_norm,
)
from refbn_d2.utils.errors import RefBNError
from tests.versions import FLOAT16, needs


def layer_with_reference(channels=3, **options) -> RefInstanceNorm2d:
    torch.manual_seed(1)
    layer = RefInstanceNorm2d(channels, **options).double()
    nn.init.normal_(layer.weight), nn.init.normal_(layer.bias)
    layer.commit(Moments(torch.randn(channels), torch.rand(channels) + 0.5, 100))
    return layer


def batch(*size) -> torch.Tensor:
    torch.manual_seed(2)
    return (torch.randn(size, dtype=torch.double) * 2 + 1).requires_grad_()


def by_definition(layer: RefInstanceNorm2d, x: torch.Tensor) -> torch.Tensor:
    """The moments of w copies of the reference and 1 - w of the image, with raw second moments."""
    w = layer.prior_count / (layer.prior_count + x[0, 0].numel())
    images = []
    for image in x:
        rows = image.flatten(1)
        mean = w * layer.ref_mean + (1 - w) * rows.mean(1)
        second = w * (layer.ref_var + layer.ref_mean**2) + (1 - w) * (rows**2).mean(1)
        deviation = (second - mean**2 + layer.eps).sqrt()
        y = (rows - mean[:, None]) / deviation[:, None] * layer.weight[:, None]
        images.append((y + layer.bias[:, None]).view(image.shape))
    return torch.stack(images)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(2, 3, 4, 5), (1, 3, 1, 1), (4, 3, 1, 7)])
def test_output_and_gradients_are_those_of_the_definition(size, training):
    layer, x = layer_with_reference(prior_count=10).train(training), batch(*size)
    y, expected = layer(x), by_definition(layer, x)
    torch.testing.assert_close(y, expected)
    inputs, dy = (x, layer.weight, layer.bias), torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)
    )


@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", [(3, 3, 128, 96), (1, 3, 128, 96)])
def test_large_images_in_both_memory_formats(size, format):
    layer, x = layer_with_reference(), batch(*size)
    inputs = (x, layer.weight, layer.bias)
    y, expected = layer(x.contiguous(memory_format=format)), by_definition(layer, x)
    assert y.is_contiguous(memory_format=format)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy)
    )


def test_without_a_prior_it_is_instance_norm():
    layer, x = layer_with_reference(prior_count=0), batch(2, 3, 4, 5)
    expected = F.instance_norm(x, weight=layer.weight, bias=layer.bias)
    torch.testing.assert_close(layer(x), expected)


def test_with_a_large_prior_it_normalizes_by_the_reference():
    layer, x = layer_with_reference(prior_count=1e12), batch(2, 3, 4, 5)
    expected = F.batch_norm(x, layer.ref_mean, layer.ref_var, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)


def test_an_image_does_not_depend_on_the_others_nor_on_training():
    layer, x = layer_with_reference(), batch(3, 3, 4, 5)
    together = layer(x)
    torch.testing.assert_close(layer(x[1:2]), together[1:2])
    torch.testing.assert_close(layer.eval()(x.detach()), together)


@pytest.mark.parametrize("dtype", [FLOAT16, torch.bfloat16])
@pytest.mark.parametrize("needs_grad", [True, False])
def test_half_precision_is_normalized_by_float32_moments(dtype, needs_grad):
    layer = layer_with_reference().to(dtype)
    x = batch(2, 3, 8, 8).detach().to(dtype).requires_grad_(needs_grad)
    y = layer(x)
    assert y.dtype == dtype and layer.ref_mean.dtype == torch.float32
    expected = by_definition(copy.deepcopy(layer).double(), x.double())
    torch.testing.assert_close(y.double(), expected, atol=0.02, rtol=0.02)


def test_channels_last_batches():
    layer, x = layer_with_reference(), batch(2, 3, 4, 5)
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.testing.assert_close(layer(last), layer(x))


def test_an_empty_batch_gives_zero_gradients():
    layer = layer_with_reference()
    x = torch.zeros(0, 3, 4, 5, dtype=torch.double, requires_grad=True)
    y = layer(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert layer.weight.grad.eq(0).all() and layer.bias.grad.eq(0).all()


def test_one_element_without_a_prior_is_refused():
    with pytest.raises(RefBNError, match="more than 1 value per channel.*PRIOR_COUNT"):
        layer_with_reference(prior_count=0)(batch(2, 3, 1, 1))


def test_in_evaluation_one_element_without_a_prior_is_beta():
    layer, x = layer_with_reference(prior_count=0).eval(), batch(2, 3, 1, 1)
    torch.testing.assert_close(layer(x), layer.bias.view(1, 3, 1, 1).expand(2, 3, 1, 1))


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("size", [(2, 3, 0, 4), (0, 3, 4, 5)])
def test_empty_maps_give_zero_gradients(size, needs_grad):
    layer = layer_with_reference(prior_count=0)
    layer(torch.zeros(size, dtype=torch.double, requires_grad=needs_grad)).sum().backward()
    assert layer.weight.grad.eq(0).all() and layer.bias.grad.eq(0).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(2, 1, 4, 4), (2, 4, 4, 4), (3, 4, 4), (2, 3, 4, 4, 4)])
def test_inputs_of_another_shape_are_refused(size, training):
    layer = RefInstanceNorm2d(3).train(training)
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\), got \(\d"):
        layer(torch.ones(size))
    assert not layer.has_reference()


@pytest.mark.parametrize("count", [-1, float("nan"), float("inf"), "64", None])
def test_other_prior_counts_are_refused(count):
    with pytest.raises(ValueError, match="prior_count"):
        RefInstanceNorm2d(3, prior_count=count)


def moments_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = x.detach().transpose(0, 1).flatten(1)
    return rows.mean(1), rows.var(1, correction=0)


def test_capture_normalizes_with_the_captured_moments_as_the_reference():
    layer, x = layer_with_reference(), batch(3, 3, 4, 5)
    layer.start_recording(Recording.CAPTURE)
    y = layer(x)
    recorded = layer.stop_recording()
    torch.testing.assert_close((recorded.mean, recorded.var), moments_of(x))
    assert recorded.count == 3 * 4 * 5
    layer.commit(recorded)
    torch.testing.assert_close(y, by_definition(layer, x))  # the reference's pass is a step's too


def test_slice_is_recorded_and_normalized_like_any_batch():
    layer, x = layer_with_reference(), batch(3, 3, 4, 5)
    expected = by_definition(layer, x)
    layer.start_recording(Recording.SLICE)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.stop_recording()[:2], moments_of(x))


def test_appended_rows_are_averaged_into_the_reference_of_the_pass():
    layer, x = layer_with_reference(), batch(5, 3, 4, 5)
    layer.start_recording(Recording.CONCAT, concat_rows=2, slice_momentum=0.25)
    y = layer(x)
    recorded = layer.stop_recording()
    torch.testing.assert_close(recorded[:2], moments_of(x[3:]))
    layer.commit(recorded, 0.25)
    torch.testing.assert_close(y, by_definition(layer, x))


def test_without_a_reference_the_first_batch_is_taken(caplog):
    layer, x = RefInstanceNorm2d(3).double(), batch(2, 3, 4, 5)
    layer.eval()(x)
    assert not layer.has_reference()
    layer.train()(x)
    torch.testing.assert_close((layer.ref_mean, layer.ref_var), moments_of(x))


def test_batch_norm_loads_and_its_statistics_are_the_reference():
    bn = nn.BatchNorm2d(3).double()
    bn(batch(2, 3, 4, 5))
    layer = RefInstanceNorm2d(3).double()
    layer.load_state_dict(bn.state_dict())
    torch.testing.assert_close(layer.ref_mean, bn.running_mean)
    assert layer.has_reference()
    again = RefInstanceNorm2d(3).double()
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again.ref_var, bn.running_var)
    assert set(layer.state_dict()) == {"weight", "bias", "ref_mean", "ref_var", "ref_count"}


def test_models_convert_and_keep_their_parameters():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    weight = model[1].weight
    model = convert_to_refbn(model, RefInstanceNorm2d, prior_count=5)
    assert type(model[1]) is RefInstanceNorm2d and model[1].prior_count == 5
    assert model[1].weight is weight


def test_what_is_no_affine_map_is_not_converted_or_folded(caplog):
    caplog.set_level("INFO")
    model = convert_to_refbn(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), RefInstanceNorm2d
    )
    x = torch.randn(2, 3, 6, 6)
    expected = model.eval()(x)
    for other in (fold(model), convert_from_refbn(copy.deepcopy(model))):
        torch.testing.assert_close(other(x), expected)
    assert "left as they are: 1" in caplog.text
    assert "Not converted from RefBN or RefIN: 1" in caplog.text


def test_batch_norm_tools_leave_it_alone():
    """It is an InstanceNorm for weight decay, FREEZE_AT and converters to SyncBN."""
    layer = nn.Sequential(layer_with_reference())
    assert isinstance(layer[0], nn.InstanceNorm2d) and not isinstance(layer[0], nn.BatchNorm2d)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(layer)[0] is layer[0]


@needs("torch", 2, 1, "torch.export")
def test_exported_program_computes_the_same():
    layer, x = nn.Sequential(layer_with_reference()).float().eval(), torch.randn(2, 3, 6, 5)
    program = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(program(x), layer(x))
    traced = torch.fx.symbolic_trace(layer)
    torch.testing.assert_close(traced(x), layer(x))


def test_function_needs_no_affine_part():
    x, ones = batch(2, 3, 4, 5), torch.ones(3, dtype=torch.double)
    for given in (x, x.detach()):
        y = ref_instance_norm(given, ones, ones, prior_count=1e20, eps=0.0)
        torch.testing.assert_close(y, x - 1)
