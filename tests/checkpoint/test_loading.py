import copy
import logging
import re

import pytest
import torch
import torchvision
from torch import nn

from refbn_d2.checkpoint.files import load_checkpoint, save_checkpoint
from refbn_d2.checkpoint.loading import load_weights
from refbn_d2.layers import RefBatchNorm2d, RefInstanceNorm2d
from refbn_d2.utils.errors import CheckpointError
from tests.checkpoint.helpers import assert_same

NORMS = {
    "BN": nn.BatchNorm2d,
    "RefBN": RefBatchNorm2d,
    "RefIN": RefInstanceNorm2d,
    "FrozenBN": torchvision.ops.FrozenBatchNorm2d,
    "": lambda channels: nn.Identity(),
    "GN": lambda channels: nn.GroupNorm(2, channels),
}


class Conv(nn.Conv2d):
    def __init__(self, inputs, outputs, norm):
        super().__init__(inputs, outputs, 3, bias=False)
        self.norm = norm(outputs)


class Detector(nn.Module):
    """A model with the names of a Detectron2 detector, with FPN or without (`fpn=False`)."""

    def __init__(self, norm="BN", blocks=6, classes=3, fpn=True, width=4):
        super().__init__()
        norm = NORMS[norm]
        resnet = nn.Module()
        resnet.stem = nn.Module()
        resnet.stem.conv1 = Conv(3, width, norm)
        resnet.res2 = nn.Sequential()
        for i in range(blocks):
            resnet.res2.append(nn.Module())
            resnet.res2[i].conv1 = Conv(width, width, norm)
        self.backbone = resnet
        if fpn:
            self.backbone = nn.Module()
            self.backbone.fpn_lateral2 = nn.Conv2d(width, 8, 1)
            self.backbone.bottom_up = resnet
        self.roi_heads = nn.Module()
        self.roi_heads.box_predictor = nn.Linear(8, classes)


def randomised(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 9 + 1)
    return model


def shared(model, other):
    names = [n for n in model.state_dict() if n in other.state_dict()]
    assert names
    return names


@pytest.mark.parametrize("there", ["BN", "RefBN", "FrozenBN"])
@pytest.mark.parametrize("here", ["BN", "RefBN", "FrozenBN"])
def test_batch_norms_load_into_each_other(here, there, caplog):
    caplog.set_level(logging.INFO)
    source, model = randomised(Detector(there)), randomised(Detector(here), seed=2)
    report = load_weights(model, source.state_dict(), "a.pth")
    names = shared(model, source)
    assert_same(
        {n: model.state_dict()[n] for n in names}, {n: source.state_dict()[n] for n in names}
    )
    assert report.loaded == names
    assert report.missing == report.unexpected == report.shape_mismatch == []
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "a.pth: loaded 39 of the model's 39 tensors. 0 are not in the file" in caplog.text
    if here == "RefBN" and there != "RefBN":
        norm = model.backbone.bottom_up.stem.conv1.norm
        assert torch.equal(norm.ref_mean, norm.running_mean)
        assert torch.equal(norm.ref_var, norm.running_var)


@pytest.mark.parametrize("other", ["BN", "RefBN", "FrozenBN"])
def test_refin_and_batch_norms_do_not_load_into_each_other(other, caplog):
    batch_norm, refin = randomised(Detector(other)), randomised(Detector("RefIN"), seed=2)
    before = copy.deepcopy(refin.state_dict())
    stem = "backbone.bottom_up.stem.conv1.norm"
    expected = (
        f"{stem} is {other} in the file and RefIN in the model, .* Set the config's NORM to "
        f"{other}, or convert the file with .* --norm RefIN"
    )
    with pytest.raises(CheckpointError, match=expected):
        load_weights(refin, batch_norm.state_dict(), "a.pth")
    assert_same(refin.state_dict(), before)
    expected = rf"{stem} is RefIN in the file and {other} in the model, .* NORM to RefIN\."
    with pytest.raises(CheckpointError, match=expected):
        load_weights(batch_norm, refin.state_dict(), "a.pth")
    load_weights(refin, batch_norm.state_dict(), "a.pth", allow_partial=True)
    assert "which computes something else (7 such norms)" in caplog.text
    load_weights(refin, before, "a.pth")
    assert_same(refin.state_dict(), before)


def test_refin_and_gn_do_not_load_into_each_other():
    """They have weight and bias alike, and only RefIN has a reference."""
    gn, refin = randomised(Detector("GN")), randomised(Detector("RefIN"), seed=2)
    expected = r"is GN in the file and RefIN in the model, .* Set the config's NORM to GN\."
    with pytest.raises(CheckpointError, match=expected):
        load_weights(refin, gn.state_dict(), "a.pth")
    with pytest.raises(CheckpointError, match=r"is RefIN in the file and GN in the model"):
        load_weights(gn, refin.state_dict(), "a.pth")
    partly = {n: t for n, t in refin.state_dict().items() if "ref_" not in n or "res2" not in n}
    with pytest.raises(CheckpointError, match="and RefIN in the model"):
        load_weights(refin, partly, "a.pth")


def test_the_norms_of_classifiers_are_named_too():
    """Pretraining's models have timm's names, without "norm"."""
    bn, refin = nn.Module(), nn.Module()
    bn.bn1, refin.bn1 = nn.BatchNorm2d(3), RefInstanceNorm2d(3)
    expected = "bn1 is BN in the file and RefIN in the model, .* NORM to BN, or convert"
    with pytest.raises(CheckpointError, match=expected):
        load_weights(refin, bn.state_dict(), "a.pth")
    with pytest.raises(CheckpointError, match="bn1 is RefIN in the file and BN in the model"):
        load_weights(bn, refin.state_dict(), "a.pth")


def imagenet_names(model):
    """Return the backbone's state under torchvision's names, with a classifier."""
    renamed = {"fc.weight": torch.ones(10, 4)}
    for name, tensor in model.backbone.bottom_up.state_dict().items():
        name = name.replace("stem.conv1.norm", "bn1").replace("stem.", "").replace("res2", "layer1")
        renamed[name.replace("conv1.norm", "bn1")] = tensor
    return renamed


@pytest.mark.parametrize("fpn", [True, False])
def test_an_imagenet_backbone_fills_a_detectors(fpn, caplog):
    source, model = randomised(Detector()), randomised(Detector("RefBN", fpn=fpn), seed=2)
    heads = {
        n: t.clone() for n, t in model.state_dict().items() if "res" not in n and "stem" not in n
    }
    report = load_weights(model, imagenet_names(source), "resnet50.pth")
    resnet = model.backbone.bottom_up if fpn else model.backbone
    expected = source.backbone.bottom_up.state_dict()
    assert_same({n: resnet.state_dict()[n] for n in expected}, expected)
    assert_same({n: model.state_dict()[n] for n in heads}, heads)
    assert sorted(report.missing) == sorted(heads)
    assert report.unexpected == [f"backbone.{'bottom_up.' if fpn else ''}linear.weight"]
    assert "left as initialized: backbone.fpn_lateral2.weight" in caplog.text or not fpn


def test_a_predictor_of_other_classes_is_skipped(caplog):
    source, model = randomised(Detector(classes=80)), randomised(Detector(classes=3), seed=2)
    before = model.roi_heads.box_predictor.weight.clone()
    report = load_weights(model, source.state_dict(), "coco.pth")
    assert torch.equal(model.roi_heads.box_predictor.weight, before)
    assert torch.equal(model.backbone.fpn_lateral2.weight, source.backbone.fpn_lateral2.weight)
    name = "roi_heads.box_predictor.weight"
    assert report.shape_mismatch[0] == (name, (80, 8), (3, 8)) and name not in report.loaded
    assert f"Skip loading '{name}'" in caplog.text and "(80, 8)" in caplog.text


def test_nothing_fits_is_an_error_with_both_sides_names():
    model = Detector()
    with pytest.raises(CheckpointError) as error:
        load_weights(model, {"blocks.0.attn.qkv.weight": torch.ones(3)}, "vit.pth")
    for text in ("vit.pth", "blocks.0.attn.qkv.weight", "backbone.fpn_lateral2.weight"):
        assert text in str(error.value)


@pytest.mark.parametrize(
    "source, model, text",
    [
        (Detector(blocks=4), Detector(), "10 of the 35 backbone tensors of the model do not fit"),
        (Detector(blocks=9), Detector(), "15 of the 50 backbone tensors of the file do not fit"),
        (Detector(""), Detector(), "28 of the 35 backbone tensors of the model do not fit"),
        (Detector(), Detector(""), "28 of the 35 backbone tensors of the file do not fit"),
        (Detector("GN"), Detector(), "14 of the 35 backbone tensors of the model do not fit"),
        (Detector(), Detector("GN"), "14 of the 35 backbone tensors of the file do not fit"),
        (
            Detector(width=8),
            Detector(),
            "35 of the 35 .*stem.conv1.weight (8, 3, 3, 3) in the file, (4, 3, 3, 3) in the model",
        ),
    ],
    ids=["depth", "deeper", "no norm", "no norm here", "GN", "GN here", "width"],
)
def test_a_backbone_that_does_not_fit_is_an_error(source, model, text, caplog):
    before = {name: t.clone() for name, t in randomised(model).state_dict().items()}
    pattern = "other.pth: " + re.escape(text).replace(r"\.\*", "(.|\n)*")
    with pytest.raises(CheckpointError, match=pattern) as error:
        load_weights(model, source.state_dict(), "other.pth")
    assert "depth, width or norm" in str(error.value)
    assert_same(model.state_dict(), before)

    load_weights(model, source.state_dict(), "other.pth", allow_partial=True)
    assert re.search(pattern, caplog.text)
    for name in shared(model, source):
        theirs = source.state_dict()[name]
        expected = theirs if theirs.shape == before[name].shape else before[name]
        assert torch.equal(model.state_dict()[name], expected), name


def test_long_lists_are_cut_with_their_number():
    with pytest.raises(CheckpointError, match="(?s)28 of.*and 8 more") as error:
        load_weights(Detector(), Detector("").state_dict(), "a.pth")
    assert str(error.value).count("not in the file") == 20


def test_another_depth_is_an_error_with_both():
    with torch.device("meta"):
        source, model = torchvision.models.resnet50(), torchvision.models.resnet101()
    text = "a.pth: .* The file holds a ResNet-50, the model a ResNet-101"
    with pytest.raises(CheckpointError, match=text):
        load_weights(model, source.state_dict(), "a.pth")


def test_a_tensor_or_two_may_lack():
    source = {
        n: t
        for n, t in Detector().state_dict().items()
        if n != "backbone.bottom_up.stem.conv1.weight"
    }
    report = load_weights(Detector(), source, "a.pth")
    assert report.missing == ["backbone.bottom_up.stem.conv1.weight"]


def test_old_detectron2_leftovers_are_no_news():
    source = Detector().state_dict()
    source["pixel_mean"] = torch.ones(3, 1, 1)
    source["proposal_generator.anchor_generator.cell_anchors.0"] = torch.ones(3, 4)
    assert load_weights(Detector(), source, "a.pth").unexpected == []


def test_a_file_loads_into_a_torchvision_resnet(tmp_path):
    torch.manual_seed(0)
    source, model = torchvision.models.resnet18(), torchvision.models.resnet18(num_classes=7)
    save_checkpoint({"state_dict": source.state_dict()}, tmp_path / "a.pth")
    report = load_weights(model, load_checkpoint(tmp_path / "a.pth")["model"], "a.pth")
    assert [name for name, _, _ in report.shape_mismatch] == ["fc.weight", "fc.bias"]
    assert torch.equal(model.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


# ---- Detectron2


@pytest.mark.detectron2
@pytest.mark.parametrize("name", ["a.pth", "a.pkl"])
def test_detectron2_reads_what_is_saved(tmp_path, name):
    pytest.importorskip("detectron2")
    from detectron2.checkpoint import DetectionCheckpointer

    source, model = randomised(Detector("RefBN")), randomised(Detector("BN"), seed=2)
    save_checkpoint({"model": source.state_dict()}, tmp_path / name)
    DetectionCheckpointer(model).load(str(tmp_path / name))
    names = shared(model, source)
    assert_same(
        {n: model.state_dict()[n] for n in names}, {n: source.state_dict()[n] for n in names}
    )


@pytest.mark.detectron2
def test_detectron2s_frozen_norm_is_filled():
    frozen = pytest.importorskip("detectron2.layers").FrozenBatchNorm2d
    NORMS["detectron2"] = frozen
    source, model = randomised(Detector("RefBN")), Detector("detectron2")
    report = load_weights(model, source.state_dict(), "a.pth")
    names = shared(model, source)
    assert_same(
        {n: model.state_dict()[n] for n in names}, {n: source.state_dict()[n] for n in names}
    )
    assert report.missing == report.unexpected == []
