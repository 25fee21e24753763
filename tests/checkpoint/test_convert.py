import logging
import re

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from refbn_d2.checkpoint.convert import TARGET_NORMS, convert_state, identify, pack
from refbn_d2.checkpoint.files import load_checkpoint, save_checkpoint
from refbn_d2.checkpoint.names import torchvision_to_detectron2
from refbn_d2.utils.errors import CheckpointError
from tests.checkpoint.resnet_states import (
    FROZEN,
    NAMES,
    TENSORS,
    assert_same,
    converted,
    detector,
    detectron2_names,
    keys,
    numbered,
    small,
)

# ---- there and back


@pytest.mark.parametrize("norm", ["RefBN", "RefIN", "BN", "FrozenBN", "GN"])
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_the_identity(name, norm):
    state = numbered(name, norm)
    there = converted(state, "detectron2")
    assert_same(there, detectron2_names(state))
    assert_same(converted(there, "torchvision"), state)
    assert_same(converted(converted(there, "torchvision"), "detectron2"), there)
    assert_same(converted(state, "torchvision"), state)
    assert_same(converted(there, "detectron2"), there)


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".safetensors"])
@pytest.mark.parametrize("norm", ["RefBN", "RefIN", "BN", "FrozenBN"])
def test_there_and_back_through_files_is_the_identity(norm, suffix, tmp_path):
    state, there, back = small(norm), tmp_path / f"there{suffix}", tmp_path / "back.pth"
    save_checkpoint(pack(converted(state, "detectron2"), "detectron2", suffix), there)
    contents = identify(load_checkpoint(there), str(there))
    assert contents.classes == 7 and contents.layout == "detectron2"
    save_checkpoint(pack(convert_state(contents, "torchvision"), "torchvision", ".pth"), back)
    returned = torch.load(back, weights_only=True)
    assert_same({name: returned[name] for name in state}, state)
    assert len(returned) == len(state)


@pytest.mark.parametrize("norm", TENSORS)
@pytest.mark.parametrize(
    "state", [detector(), detector("BN", fpn=False), detector("FrozenBN", (2, 3))]
)
def test_a_detector_keeps_its_names(state, norm):
    assert_same(converted(state, "detectron2"), state)
    result = converted(state, "detectron2", norm)
    assert [n for n in result if "norm" not in n] == [n for n in state if "norm" not in n]


# ---- norms


BATCH_NORMS = [norm for norm in TENSORS if norm != "RefIN"]


@pytest.mark.parametrize("there", ["BN", "FrozenBN", "folded"])
def test_refin_is_no_batch_norm(there):
    with pytest.raises(CheckpointError, match=r"its norm: RefIN\).* cannot be .* to " + there):
        converted(small("RefIN"), "detectron2", there)


@pytest.mark.parametrize("to", ["detectron2", "torchvision"])
@pytest.mark.parametrize("there", TENSORS)
@pytest.mark.parametrize("here", BATCH_NORMS)
def test_norms_have_their_own_tensors(here, there, to):
    state, expected = small(here), small(there)
    result = converted(state, to, there)
    if to == "detectron2":
        state, expected = detectron2_names(state), detectron2_names(expected)
    assert sorted(result) == sorted(expected)
    for name, tensor in result.items():
        layer, _, own = name.rpartition(".")
        if name in state:
            assert torch.equal(tensor, state[name]), name
        elif own in ("num_batches_tracked", "ref_count"):
            assert tensor.dtype == torch.int64 and tensor == (own == "ref_count")
        else:
            assert torch.equal(tensor, state[f"{layer}.{own.replace('ref', 'running')}"]), name


def test_a_part_that_is_frozen_gets_the_norm_too():
    state = {n: t for n, t in small("RefBN").items() if not n.startswith("bn1.ref")}
    assert identify({"model": state}, "a").norms == {"MODEL.RESNETS.NORM": "RefBN"}
    result = converted(state, "torchvision", "RefBN")
    assert torch.equal(result["bn1.ref_mean"], state["bn1.running_mean"])
    assert torch.equal(result["layer1.0.bn1.ref_mean"], state["layer1.0.bn1.ref_mean"])
    assert list(converted(state, "torchvision", "FrozenBN")) == list(keys("resnet18", "FrozenBN"))


def folded_by_torch(state, conv):
    norm = [state[f"{conv}.norm.{tensor}"] for tensor in FROZEN]
    weight, bias = fuse_conv_bn_weights(
        state[f"{conv}.weight"].double(), None, norm[2].double(), norm[3].double(), 1e-5,
        norm[0].double(), norm[1].double(),
    )  # fmt: skip
    return weight.float(), bias.float()


@pytest.mark.parametrize("norm", BATCH_NORMS)
def test_folded_weights_are_torchs(norm):
    state = detector(norm)
    before = {name: tensor.clone() for name, tensor in state.items()}
    result = converted(state, "detectron2", "folded")
    for conv in ("backbone.bottom_up.stem.conv1", "backbone.bottom_up.res3.0.shortcut"):
        weight, bias = folded_by_torch(state, conv)
        torch.testing.assert_close(result[f"{conv}.weight"], weight)
        own = {n.rpartition(".")[2]: t for n, t in result.items() if n.startswith(f"{conv}.norm.")}
        assert list(own) == FROZEN and f"{conv}.bias" not in result
        torch.testing.assert_close(own["bias"], bias)
        frozen = torchvision.ops.FrozenBatchNorm2d(len(bias))
        assert torch.equal(own["running_mean"], frozen.running_mean)
        assert torch.equal(own["running_var"], frozen.running_var - 1e-5)
        assert torch.equal(own["weight"], frozen.weight)
    for conv in ("backbone.fpn_lateral2", "roi_heads.box_head.conv1"):
        weight, bias = folded_by_torch(state, conv)
        torch.testing.assert_close(result[f"{conv}.weight"], weight)
        torch.testing.assert_close(result[f"{conv}.bias"], bias)
        assert not [name for name in result if name.startswith(f"{conv}.norm")]
    untouched = [name for name in state if "rpn_head" in name or "mask_head" in name]
    assert untouched and all(torch.equal(result[name], state[name]) for name in untouched)
    assert_same(state, before)


def test_a_bias_beside_a_norm_folds_too():
    state = {**detector("BN"), "backbone.fpn_lateral2.bias": torch.arange(8.0)}
    result = converted(state, "detectron2", "folded")
    weight, _ = folded_by_torch(state, "backbone.fpn_lateral2")
    x = torch.rand(1, 64, 3, 3)
    norm = [state[f"backbone.fpn_lateral2.norm.{t}"] for t in FROZEN]
    y = nn.functional.conv2d(
        x, state["backbone.fpn_lateral2.weight"], state["backbone.fpn_lateral2.bias"]
    )
    expected = nn.functional.batch_norm(y, norm[2], norm[3], norm[0], norm[1])
    found = nn.functional.conv2d(x, weight, result["backbone.fpn_lateral2.bias"])
    torch.testing.assert_close(found, expected)


def test_folded_loads_into_torchvisions_resnets_and_computes_the_same():
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18(num_classes=7).eval(), torch.randn(2, 3, 64, 64)
    for name, tensor in model.state_dict().items():
        if "running" in name:
            tensor.uniform_(0.5, 1.5)
    state = converted(model.state_dict(), "torchvision", "folded")
    expected = model(x)
    for norm in (nn.BatchNorm2d, torchvision.ops.FrozenBatchNorm2d):
        other = torchvision.models.resnet18(num_classes=7, norm_layer=norm).eval()
        other.load_state_dict(state)
        torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)
    twice = converted(state, "torchvision", "folded")
    other.load_state_dict(twice)
    torch.testing.assert_close(other(x), expected, rtol=1e-4, atol=1e-5)


def test_norms_that_cannot_be_had_are_errors():
    with pytest.raises(CheckpointError, match=r"a.pth has no batch norms \(its norm: GN\).* BN\."):
        converted(small("GN"), "detectron2", "BN")
    bare = {name: t for name, t in small().items() if "bn" not in name and "sample.1" not in name}
    assert_same(converted(bare, "detectron2"), detectron2_names(bare))
    with pytest.raises(CheckpointError, match=r"has no batch norms \(its norm: none\).* folded"):
        converted(bare, "detectron2", "folded")
    head = {f"head.cls_subnet.1.{tensor}": torch.ones(8) for tensor in FROZEN}
    state = {
        **detector("BN", heads=False),
        **head,
        "head.cls_subnet.0.weight": torch.ones(8, 8, 3, 3),
    }
    with pytest.raises(CheckpointError, match=r"head\.cls_subnet\.1\. .*FrozenBN"):
        converted(state, "detectron2", "folded")
    assert "head.cls_subnet.1.num_batches_tracked" in converted(state, "detectron2", "BN")


# ---- what a file is


@pytest.mark.parametrize(
    "state, norms",
    [
        (small("BN"), {"RESNETS": "BN"}),
        (small("GN"), {"RESNETS": "GN"}),
        (
            detector("RefBN"),
            {"RESNETS": "RefBN", "FPN": "RefBN", "ROI_BOX_HEAD": "RefBN", "ROI_MASK_HEAD": "GN"},
        ),
        (
            converted(detector("RefBN"), "detectron2", "folded"),
            {"RESNETS": "FrozenBN", "FPN": "", "ROI_BOX_HEAD": "", "ROI_MASK_HEAD": "GN"},
        ),
        (detector("FrozenBN", fpn=False, heads=False), {"RESNETS": "FrozenBN"}),
    ],
)
def test_norms_are_inferred_by_section(state, norms):
    expected = {f"MODEL.{section}.NORM": norm for section, norm in norms.items()}
    assert identify({"model": state}, "a").norms == expected


def test_the_config_says_what_is_unusual():
    assert identify({"model": numbered("resnet50")}, "a").config() == {
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.NORM": "BN",
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.PIXEL_MEAN": [123.675, 116.28, 103.53],
        "MODEL.PIXEL_STD": [58.395, 57.12, 57.375],
        "INPUT.FORMAT": "RGB",
    }
    state = converted(numbered("resnext101_32x8d"), "detectron2", "RefBN")
    assert identify({"model": state}, "a").config() == {
        "MODEL.RESNETS.DEPTH": 101,
        "MODEL.RESNETS.NUM_GROUPS": 32,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
        "MODEL.RESNETS.NORM": "RefBN",
    }
    assert identify({"model": detector()}, "a").config()["MODEL.RESNETS.RES2_OUT_CHANNELS"] == 64


def test_a_detectors_resnet_goes_to_torchvision(caplog):
    expected = {name: tensor for name, tensor in small("RefBN").items() if "fc" not in name}
    for fpn in (True, False):
        state = detector(fpn=fpn)
        with pytest.raises(
            CheckpointError, match="a.pth has .*rpn_head.conv.weight.*--allow-partial"
        ):
            converted(state, "torchvision")
        caplog.clear()
        assert_same(converted(state, "torchvision", allow_partial=True), expected)
        assert "without a counterpart in torchvision's ResNet-18: " in caplog.text
        assert "proposal_generator.rpn_head.conv.weight" in caplog.text


def test_what_lies_beside_the_weights():
    state = converted(small(), "detectron2")
    packed = pack(state, "detectron2", ".pkl")
    assert packed["matching_heuristics"] is True and packed["__author__"]
    assert list(packed["classifier"]) == ["linear.weight", "linear.bias"]
    assert_same({**packed["model"], **packed["classifier"]}, state)
    assert_same(pack(state, "detectron2", ".safetensors"), state)
    assert_same(pack(small(), "torchvision", ".pth"), small())
    assert pack(detector(), "detectron2", ".pth").keys() == {"model", "__author__"}


# ---- refusing


def wrong(name, shape):
    return {**small(), name: torch.ones(shape)}


def without(*beginnings):
    return {name: t for name, t in small().items() if not name.startswith(beginnings)}


@pytest.mark.parametrize("allow_partial", [False, True])
@pytest.mark.parametrize("to", ["detectron2", "torchvision"])
@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("layer2.1.conv2.weight", (128, 64, 3, 3), "(128, 128, 3, 3)"),
        ("layer2.1.conv2.weight", (128,), "(128, 128, 3, 3)"),
        ("layer4.0.bn1.running_var", (256,), "(512,)"),
        ("conv1.weight", (64, 3, 3, 3), "(64, 3, 7, 7)"),
        ("bn1.num_batches_tracked", (1,), "()"),
        ("fc.weight", (7, 2048), "(7, 512)"),
        ("fc.bias", (8,), "(7,)"),
    ],
)
def test_a_wrong_shape_is_an_error_with_both(name, shape, expected, to, allow_partial):
    text = f"a.pth: most tensors are those of a ResNet-18, .*: {name} is {shape}, not {expected}"
    with pytest.raises(CheckpointError, match=text.replace("(", r"\(").replace(")", r"\)")):
        converted(wrong(name, shape), to, allow_partial=allow_partial)


@pytest.mark.parametrize(
    "state, text",
    [
        (without("conv1."), "a.pth lacks 1 tensors of a ResNet-18: stem.conv1.weight"),
        (without("bn1.running_var"), "lacks 1 .*: stem.conv1.norm.running_var"),
        (without("layer4"), "lacks 25 tensors of a ResNet-18: res5.0.shortcut.weight"),
        ({**small(), "head.0.weight": torch.ones(2)}, "has 1 tensors without .*: head.0.weight"),
        ({**small(), "conv1.bias": torch.ones(64)}, "has 1 tensors without .*: conv1.bias"),
        ({**small(), "layer1.0.downsample.0.weight": torch.ones(2)}, "layer1.0.downsample.0"),
        ({**without("conv1"), "x": torch.ones(2)}, "lacks 1 tensors .*; it has 1 tensors without"),
    ],
)
def test_missing_tensors_and_tensors_without_counterpart_are_errors(state, text, caplog):
    for to in ("detectron2", "torchvision"):
        with pytest.raises(CheckpointError, match=f"{text}(.|\n)*--allow-partial"):
            converted(state, to)
        caplog.clear()
        result = converted(state, to, allow_partial=True)
        assert re.search(text, caplog.text) and [r.levelname for r in caplog.records] == ["WARNING"]
        expected = small() if to == "torchvision" else detectron2_names(small())
        kept = [name for name in state if name in small()]
        names = kept if to == "torchvision" else [torchvision_to_detectron2(n) for n in kept]
        assert_same(result, {name: expected[name] for name in names})


def test_nothing_is_said_of_what_is_whole(caplog):
    caplog.set_level(logging.DEBUG)
    for norm in (None, *TARGET_NORMS):
        converted(small(), "detectron2", norm)
    assert not caplog.records


@pytest.mark.parametrize(
    "state, text",
    [
        ({"blocks.0.attn.qkv.weight": torch.ones(3)}, r"a.pth is a ViT \(timm\)"),
        ({"encoder.0.weight": torch.ones(3)}, "a.pth holds no ResNet .* encoder.0.weight"),
        ({**small(), "stem.conv1.weight": torch.ones(3)}, "conv1.weight, stem.conv1.weight"),
    ],
)
def test_what_is_not_a_resnet_is_an_error_that_says_what_it_is(state, text):
    with pytest.raises(CheckpointError, match=text):
        identify({"model": state}, "a.pth")


def test_an_anti_aliased_resnet_is_recognized_by_timms_name_of_it():
    assert identify({"model": small(), "arch": "resnet18"}, "a").resnet.depth == 18
    for arch in ("resnetaa50", "resnetblur18"):
        with pytest.raises(CheckpointError, match="a.pth is an anti-aliased ResNet"):
            identify({"model": small(), "arch": arch}, "a.pth")


def test_timms_resnet26_and_slim_ones_are_errors():
    layers = {}
    for name, tensor in detectron2_names(small()).items():
        if not name.startswith("linear"):
            slim = tuple(n // 4 if n in (64, 128, 256, 512) else n for n in tensor.shape)
            layers[name] = torch.ones(slim)
    assert_same(converted(layers, "detectron2"), layers)
    with pytest.raises(CheckpointError, match=r"ResNet-18 \(stem 16, res2 16 .*torchvision cannot"):
        converted(layers, "torchvision")
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        state = timm.create_model("resnet26").state_dict()
    with pytest.raises(CheckpointError, match="2 2 2 2 blocks of 3 convolutions"):
        identify({"model": state}, "a.pth")
