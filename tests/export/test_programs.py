"""Backbones as ONNX and TorchScript, run by their own runtimes."""

import copy
import io

import pytest
import torch

from refbn_d2.checkpoint.convert import convert_state, identify
from refbn_d2.config import get_cfg
from refbn_d2.engines.torchvision.modeling import build_model
from refbn_d2.export import programs as module
from refbn_d2.export.programs import export
from refbn_d2.export.verify import verify
from refbn_d2.layers import RefInstanceNorm2d, convert_to_refbn, refbn_layers
from refbn_d2.utils.errors import CheckpointError
from tests.export.conftest import randomise
from tests.versions import needs

ONNX = pytest.param("onnx", marks=needs("torch", 2, 6, "writing ONNX"))
PROGRAMS = [ONNX, "torchscript"]


def backbone(resnet18):
    """Return torchvision's ResNet-18 in Detectron2's layout, with RefBN."""
    before = identify({"model": resnet18.state_dict()}, "a.pth")
    return identify({"model": convert_state(before, "detectron2", "RefBN")}, "a.pth")


def run(data, to, images, names):
    """Return the program's maps, computed by its own runtime."""
    if to == "torchscript":
        return torch.jit.load(io.BytesIO(data))(images)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    maps = session.run(names, {"images": images.numpy()})
    return dict(zip(names, map(torch.from_numpy, maps), strict=True))


def by_torchvision(model, images):
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    maps = {}
    for stage in range(1, 5):
        x = maps[f"res{stage + 1}"] = model.get_submodule(f"layer{stage}")(x)
    return maps


@pytest.mark.parametrize("to", PROGRAMS)
@pytest.mark.parametrize("size", [(1, 64, 96), (3, 128, 32)])
def test_the_program_computes_what_torchvisions_model_does(resnet18, to, size):
    n, height, width = size
    images = torch.randn(n, 3, height, width)
    data, table = export(backbone(resnet18), to)
    assert f"the ResNet-18 against {to}" in table and "res5 " in table
    with torch.no_grad():
        expected = by_torchvision(resnet18, images)
    found = run(data, to, images, list(expected))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "to", [pytest.param("onnx", marks=needs("torch", 2, 8, "RefIN to ONNX")), "torchscript"]
)
def test_refin_stays_and_takes_images_of_any_size(resnet18, to):
    """The program's weight of the reference follows the image's size."""
    before = identify({"model": resnet18.state_dict()}, "a.pth")
    contents = identify({"model": convert_state(before, "detectron2", "RefIN")}, "a.pth")
    assert contents.norms["MODEL.RESNETS.NORM"] == "RefIN"
    data, _ = export(contents, to)
    model = convert_to_refbn(copy.deepcopy(resnet18), RefInstanceNorm2d).eval()
    for n, height, width in ((1, 64, 96), (3, 128, 32)):
        images = torch.randn(n, 3, height, width)
        with torch.no_grad():
            expected = by_torchvision(model, images)
        found = run(data, to, images, list(expected))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3)


def test_refins_prior_count_is_the_configs(resnet18):
    before = identify({"model": resnet18.state_dict()}, "a.pth")
    contents = identify({"model": convert_state(before, "detectron2", "RefIN")}, "a.pth")
    cfg, images = get_cfg(), torch.randn(1, 3, 64, 64)
    cfg.MODEL.REFBN.PRIOR_COUNT, cfg.MODEL.RESNETS.STRIDE_IN_1X1 = 0.0, False
    data, _ = export(contents, "torchscript", cfg)
    model = convert_to_refbn(copy.deepcopy(resnet18), RefInstanceNorm2d).eval()
    for _, layer in refbn_layers(model):
        layer.prior_count = 0.0
    with torch.no_grad():
        expected = by_torchvision(model, images)
    found = run(data, "torchscript", images, list(expected))
    torch.testing.assert_close(found["res4"], expected["res4"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("to", PROGRAMS)
def test_no_norm_is_left_in_the_program(resnet18, to):
    data, _ = export(backbone(resnet18), to)
    if to == "torchscript":
        program = torch.jit.load(io.BytesIO(data))
        kinds = {node.kind() for node in program.inlined_graph.nodes()}
        assert "aten::_convolution" in kinds and "aten::batch_norm" not in kinds
    else:
        onnx = pytest.importorskip("onnx")
        kinds = [node.op_type for node in onnx.load_from_string(data).graph.node]
        assert kinds.count("Conv") == 20 and "BatchNormalization" not in kinds


@pytest.mark.parametrize("to", PROGRAMS)
def test_a_detectors_backbone(mask_rcnn, mask_rcnn_cfg, to):
    contents = identify({"model": mask_rcnn.state_dict()}, "a.pth")
    data, table = export(contents, to, mask_rcnn_cfg)
    assert "p2 " in table and "p6 " in table
    images = torch.randn(2, 3, 64, 128)
    with torch.no_grad():
        expected = mask_rcnn.backbone(images)
    for name, value in run(data, to, images, list(expected)).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "resnet, fpn",
    [("RefIN", "BN"), ("BN", "RefIN"), ("RefBN", "RefIN"), ("GN", "RefIN"), ("RefIN", "FrozenBN")],
)
def test_each_layer_is_exported_with_its_own_norm(mask_rcnn_cfg, resnet, fpn):
    cfg = mask_rcnn_cfg.clone()
    cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN.NORM = resnet, fpn
    torch.manual_seed(0)
    model = randomise(build_model(cfg))
    contents = identify({"model": model.state_dict()}, "a.pth")
    data, _ = export(contents, "torchscript", cfg)
    assert verify(contents, contents, cfg)
    images = torch.randn(2, 3, 64, 128)
    with torch.no_grad():
        expected = model.backbone(images)
    for name, value in run(data, "torchscript", images, list(expected)).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-3)


def test_a_program_that_computes_something_else_is_an_error(resnet18, monkeypatch):
    def halved(model):
        return b"", lambda images: {name: 0.5 * y for name, y in model(images).items()}

    monkeypatch.setattr(module, "_torchscript", halved)
    with pytest.raises(CheckpointError, match="computes something else"):
        export(backbone(resnet18), "torchscript")
