"""The reference under half precision, checkpointing, unusual calls, averaging, and FSDP.

Oracles: the same step without the special case, and moments of the layers' own inputs.
"""

import copy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from refbn_d2.config import RefBNOptions
from refbn_d2.layers import RefBatchNorm2d, refbn_layers
from refbn_d2.reference.batch import ReferenceBatch
from refbn_d2.reference.inputs import without_last_rows
from refbn_d2.utils import torch_compat
from tests.versions import FLOAT16, needs

KEPT = RefBNOptions(
    reference_weight=None, weighting=None, gradient=None, refresh="concat", refresh_period=1,
    slice_size=2, slice_momentum=1.0, num_images=6,
)  # fmt: skip


def images(seed, n, dtype=torch.float32):
    x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (x * 2 + 1).to(dtype)


class Net(nn.Module):
    """A backbone, and a head that calls it in one of several ways."""

    def __init__(self, call=lambda backbone, x: backbone(x), weighting="count"):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 3), RefBatchNorm2d(4, weighting=weighting), nn.ReLU()
        )
        self.head = nn.Conv2d(4, 2, 1)
        self.call = call

    def forward(self, x):
        return self.head(self.call(self.backbone, x))


def step(model, reference, steps=2, dtype=torch.float32):
    """Two steps of SGD; return everything that they changed."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for seed in range(steps):
        with reference.step():
            optimizer.zero_grad()
            model(images(seed, 3, dtype)).float().square().mean().backward()
        optimizer.step()
    return copy.deepcopy(model.state_dict())


def reference_of(model, options=KEPT, dtype=torch.float32, **arguments):
    return ReferenceBatch(model, images(9, 6, dtype), options, **arguments)


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT16])
@pytest.mark.parametrize("refresh", ["static", "full", "slice", "concat"])
def test_half_precision_modules_train(refresh, dtype):
    """Oracle: the float32 model."""
    states = []
    for kind in (torch.float32, dtype):
        model = Net(weighting="fixed").to(kind)
        options = replace(KEPT, refresh=refresh, slice_momentum=0.25)
        states.append(step(model, reference_of(model, options, kind), dtype=kind))
    exact, half = states
    assert half["backbone.1.ref_mean"].dtype == torch.float32
    assert half["backbone.1.running_mean"].dtype == dtype
    for name, value in exact.items():
        torch.testing.assert_close(half[name].to(value.dtype), value, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("outside", [True, False], ids=["the backbone", "a part of it"])
def test_a_slice_counts_once_under_activation_checkpointing(outside, reentrant):
    def repeated(backbone, x):
        x.requires_grad_()  # reentrant checkpointing needs it
        return checkpoint(backbone, x, use_reentrant=reentrant)

    class Part(nn.Sequential):
        def forward(self, x):
            return repeated(super().forward, x)

    plain, model = Net(), Net(repeated) if outside else Net()
    if not outside:
        model.backbone = Part(*model.backbone)
    expected, got = (step(m, reference_of(m, concat_to=m.backbone)) for m in (plain, model))
    assert_equal(got, expected)
    assert got["backbone.1.ref_count"] == 2 * 6 * 6  # a slice of 2 images


class ByName(nn.Sequential):
    def forward(self, pixel_values, mask=None):
        return super().forward(pixel_values)


@pytest.mark.parametrize(
    "call",
    [
        lambda backbone, x: backbone(pixel_values=x),
        lambda backbone, x: backbone(mask=None, pixel_values=x),
        lambda backbone, x: backbone(x, mask=None),
    ],
)
def test_the_batch_may_come_by_keyword(call):
    plain, model = Net(), Net(call)
    model.backbone = ByName(*model.backbone)
    got = step(model, reference_of(model, concat_to=model.backbone))
    assert_equal(got, step(plain, reference_of(plain, concat_to=plain.backbone)))


@pytest.mark.parametrize("call", [lambda b, x: b([x]), lambda b, x: b(pixel_values=[x])])
def test_a_batch_that_is_no_tensor_is_named(call):
    class OfList(ByName):
        def forward(self, pixel_values):
            return super().forward(pixel_values[0])

    model = Net(call)
    model.backbone = OfList(*model.backbone)
    with pytest.raises(TypeError, match='one tensor .* called with list. .*REFRESH to "slice"'):
        step(model, reference_of(model, concat_to=model.backbone))


def test_an_output_without_the_batchs_rows_is_named():
    assert len(without_last_rows(torch.zeros(5, 2), 2, 5)) == 3
    for wrong in (torch.zeros(1, 7), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="returns a tensor .* for a batch of 5 rows"):
            without_last_rows([torch.zeros(5), wrong], 2, 5)


def test_buffers_made_by_expand_are_left_as_they_were():
    model = Net()
    model.register_buffer("grid", torch.tensor([[1.0], [2.0]]).expand(2, 5))
    model.register_buffer("none", torch.zeros(0, 1).expand(0, 3))
    reference_of(model).capture()
    assert model.grid.tolist() == [[1.0] * 5, [2.0] * 5]
    assert model.grid.untyped_storage().nbytes() == 8


def test_the_hook_of_a_failed_step_is_removed_by_the_next_reference():
    model = Net()
    first = reference_of(model, concat_to=model.backbone)
    first.before_step()  # and the step fails, without `step`
    assert model.backbone._forward_pre_hooks
    second = reference_of(model, concat_to=model.backbone)
    for hooks in ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs"):
        assert not getattr(model.backbone, hooks), hooks
    plain = Net()
    assert_equal(step(model, second), step(plain, reference_of(plain, concat_to=plain.backbone)))


@pytest.mark.parametrize("wrapper", ["AveragedModel", "timm", "plain"])
def test_capture_in_an_averaged_model(wrapper):
    """Oracle: a model that was built with the averaged weights."""
    model = Net()
    reference = reference_of(model)
    if wrapper == "timm":
        ema = pytest.importorskip("timm.utils").ModelEmaV3(model, decay=0.5)
    elif wrapper == "AveragedModel":
        ema = torch.optim.swa_utils.AveragedModel(model)
    else:
        ema = copy.deepcopy(model)
    averaged = ema if wrapper == "plain" else ema.module
    step(model, reference)
    with torch.no_grad():
        for a, p in zip(averaged.parameters(), model.parameters(), strict=True):
            a.copy_(p + 0.5)
    own = copy.deepcopy(model.state_dict())
    alone = copy.deepcopy(averaged)
    for _, layer in refbn_layers(alone):
        layer.reset_reference()
    reference_of(alone).capture()
    pointers = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    averaged.eval()

    reference.capture(ema)

    assert_equal(averaged.state_dict(), alone.state_dict())
    assert_equal(model.state_dict(), own)
    assert [t.data_ptr() for t in (*model.parameters(), *model.buffers())] == pointers
    assert averaged.backbone[1].has_reference() and not averaged.training and model.training


def test_capture_in_another_model_is_refused():
    other = Net()
    other.head = nn.Conv2d(4, 3, 1)
    with pytest.raises(ValueError, match="not a copy .*: head.bias is missing .* shape"):
        reference_of(Net()).capture(other)


@needs("torch", 2, 7, "FSDP2 on the CPU")
@pytest.mark.parametrize("precision", ["policy", "module"])
@pytest.mark.parametrize("refresh", ["slice", "concat"])
def test_fsdp2_with_parameters_in_bfloat16(refresh, precision, free_port):
    """Oracle: the float32 model without FSDP."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options = replace(KEPT, refresh=refresh, slice_momentum=0.25)
    exact = Net(weighting="fixed")
    step(exact, reference_of(exact, options, concat_to=exact.backbone))
    url = f"tcp://127.0.0.1:{free_port}"
    dist.init_process_group("gloo", init_method=url, rank=0, world_size=1)
    try:
        model, dtype, policy = Net(weighting="fixed"), torch.float32, MixedPrecisionPolicy()
        if precision == "module":
            model, dtype = model.bfloat16(), torch.bfloat16
        else:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(model.backbone, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        reference = reference_of(model, options, dtype, concat_to=model.backbone)
        step(model, reference, dtype=dtype)
        layer = model.backbone[1]
        assert layer.ref_mean.dtype == torch.float32
        for name in ("ref_mean", "ref_var", "running_mean", "running_var"):
            value, expected = getattr(layer, name), getattr(exact.backbone[1], name)
            torch.testing.assert_close(value.float(), expected, rtol=0.05, atol=0.02)
    finally:
        torch_compat.destroy_process_group()
