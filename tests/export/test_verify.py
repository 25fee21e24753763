import re

import pytest
import torch

from refbn_d2.checkpoint.convert import TARGET_NORMS, convert_state, identify
from refbn_d2.config import ConfigError
from refbn_d2.export.verify import verify
from refbn_d2.utils.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("small_picture")

STAGES = ["stem", "res2", "res3", "res4", "res5"]
MAPS = ["p2", "p3", "p4", "p5", "p6"]
DETECTIONS = ["boxes", "scores", "classes", "masks"]


def contents(state):
    return identify({"model": state}, "a.pth")


def converted(before, to, norm=None):
    return contents(convert_state(before, to, norm))


def rows(table):
    """Return {stage: difference}."""
    found = re.findall(r"^  (\w+) +(\d\S+|inf|nan)$", table, re.MULTILINE)
    return {stage: float(value) for stage, value in found}


@pytest.fixture(
    params=["this package's", pytest.param("Detectron2's", marks=pytest.mark.detectron2)]
)
def whose(request):
    """Choose which package runs Detectron2's layout."""
    if request.param == "Detectron2's":
        pytest.importorskip("detectron2")
    else:
        request.getfixturevalue("no_detectron2")
    return request.param


SAME = [norm for norm in TARGET_NORMS if norm != "RefIN"]  # of what computes the same as BN


def test_refin_computes_something_else_but_the_same_in_either_layout(resnet18):
    before = contents(resnet18.state_dict())
    there = converted(before, "detectron2", "RefIN")
    with pytest.raises(CheckpointError, match="computes something else"):
        verify(before, there)
    table = verify(there, converted(there, "torchvision"))
    assert list(rows(table)) == STAGES and max(rows(table).values()) < 1e-5


@pytest.mark.parametrize("norm", [None, *SAME])
def test_a_resnet_computes_the_same_in_either_layout(resnet18, norm, whose):
    before = contents(resnet18.state_dict())
    there = converted(before, "detectron2", norm)
    table = verify(before, there)
    name = {None: "BN", "folded": "FrozenBN"}.get(norm, norm)
    assert table.startswith(
        f"torchvision's ResNet-18 with BN against {whose} ResNet-18 with {name}\n"
    )
    assert list(rows(table)) == STAGES and max(rows(table).values()) < 1e-5
    table = verify(there, converted(there, "torchvision"))
    assert table.startswith(f"{whose} ResNet-18 with {name} against torchvision's ResNet-18")
    assert list(rows(table)) == STAGES and max(rows(table).values()) < 1e-5


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_bottlenecks_and_groups(name, whose):
    import torchvision

    torch.manual_seed(0)
    before = contents(torchvision.models.get_model(name).state_dict())
    assert max(rows(verify(before, converted(before, "detectron2"))).values()) < 1e-5


@pytest.mark.parametrize("layout", ["torchvision", "detectron2"])
@pytest.mark.parametrize(
    "name, first",
    [("layer3.1.conv2.weight", "res4"), ("bn1.running_var", "stem"), ("layer4.1.bn2.bias", "res5")],
)
def test_a_changed_tensor_is_found_in_its_stage(resnet18, layout, name, first):
    before = contents(resnet18.state_dict())
    state = {n: t.clone() for n, t in resnet18.state_dict().items()}
    state[name].flatten()[0] += 1
    after = converted(contents(state), layout)
    with pytest.raises(CheckpointError, match="a.pth: the result computes something else") as e:
        verify(before, after)
    differences = rows(str(e.value))
    assert [stage for stage in STAGES if differences[stage] > 1e-4] == STAGES[STAGES.index(first) :]
    assert all(differences[stage] < 1e-6 for stage in STAGES[: STAGES.index(first)])


def test_what_is_not_a_number_is_found(resnet18):
    before = contents(resnet18.state_dict())
    state = {n: t.clone() for n, t in resnet18.state_dict().items()}
    state["layer4.0.bn1.bias"][3] = float("nan")
    with pytest.raises(CheckpointError, match="res5 +nan"):
        verify(before, contents(state))


def test_the_stride_is_the_configs(whose):
    """A bottleneck with its stride in the 1x1 convolution is not torchvision's."""
    import torchvision

    from refbn_d2.config import get_cfg

    before = contents(torchvision.models.resnet50().state_dict())
    cfg = get_cfg()
    assert cfg.MODEL.RESNETS.STRIDE_IN_1X1
    with pytest.raises(CheckpointError) as e:
        verify(before, converted(before, "detectron2"), cfg)
    assert rows(str(e.value))["res2"] < 1e-6 and rows(str(e.value))["res3"] > 1e-2


def test_what_is_not_whole_cannot_run(resnet18):
    state = {n: t for n, t in resnet18.state_dict().items() if n != "layer2.0.conv1.weight"}
    before = contents(state)
    after = contents(convert_state(before, "detectron2", allow_partial=True))
    with pytest.raises(
        CheckpointError, match=r"a.pth does not fit its model: (.|\n)*layer2.0.conv1.weight"
    ):
        verify(before, after)


@pytest.mark.parametrize("norm", [None, *SAME])
def test_a_detector_detects_the_same(mask_rcnn, mask_rcnn_cfg, norm, whose):
    before = contents(mask_rcnn.state_dict())
    table = verify(before, converted(before, "detectron2", norm), mask_rcnn_cfg)
    assert table.startswith(f"{whose} GeneralizedRCNN against {whose} GeneralizedRCNN\n")
    assert list(rows(table)) == [*MAPS, *DETECTIONS] and max(rows(table).values()) < 1e-4
    assert int(re.search(r"(\d+) detections$", table)[1]) > 10


@pytest.mark.parametrize(
    "name, good",
    [
        ("backbone.fpn_output3.norm.bias", ["p2", "p4", "p5", "p6"]),
        ("roi_heads.box_predictor.cls_score.weight", MAPS),
        ("roi_heads.mask_head.predictor.weight", [*MAPS, "boxes", "scores", "classes"]),
    ],
)
def test_a_changed_detector_is_found(mask_rcnn, mask_rcnn_cfg, name, good, whose):
    before = contents(mask_rcnn.state_dict())
    state = dict(mask_rcnn.state_dict())
    state[name] = -3 * state[name] + 1
    with pytest.raises(CheckpointError) as e:
        verify(before, contents(state), mask_rcnn_cfg)
    differences = rows(str(e.value))
    assert [stage for stage in differences if differences[stage] < 1e-6] == good


def test_a_detectors_resnet_computes_the_same_in_torchvision(mask_rcnn, mask_rcnn_cfg, whose):
    before = contents(mask_rcnn.state_dict())
    after = contents(convert_state(before, "torchvision", "BN", allow_partial=True))
    table = verify(before, after, mask_rcnn_cfg)
    assert table.startswith(f"{whose} ResNet-18 with RefBN against torchvision's ResNet-18 with BN")
    assert list(rows(table)) == STAGES and max(rows(table).values()) < 1e-5


def test_a_fpn_without_p5_runs_in_this_package(mask_rcnn, mask_rcnn_cfg):
    """Detectron2 cannot run it: its last map is made from p5."""
    cfg = mask_rcnn_cfg.clone()
    cfg.merge_from_list(
        [
            "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4"],
            "MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4"],
            "MODEL.RPN.IN_FEATURES", MAPS[:4], "MODEL.ROI_HEADS.IN_FEATURES", MAPS[:3],
            "MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128]],
        ]
    )  # fmt: skip
    state = {n: t for n, t in mask_rcnn.state_dict().items() if not re.search(r"res5|fpn_\w+5", n)}
    before = contents(state)
    table = verify(before, converted(before, "detectron2", "FrozenBN"), cfg)
    assert table.startswith("this package's") and list(rows(table)) == [*MAPS[:4], *DETECTIONS]


def test_what_this_package_cannot_build_is_an_error(mask_rcnn, mask_rcnn_cfg, no_detectron2):
    before, cfg = contents(mask_rcnn.state_dict()), mask_rcnn_cfg.clone()
    cfg.MODEL.META_ARCHITECTURE = "PanopticFPN"
    with pytest.raises(ConfigError, match="PanopticFPN"):
        verify(before, before, cfg)
