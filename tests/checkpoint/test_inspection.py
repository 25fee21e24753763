import pytest
import torch
import torchvision

from refbn_d2.checkpoint.convert import convert_state, identify, pack
from refbn_d2.checkpoint.files import save_checkpoint
from refbn_d2.checkpoint.inspection import describe
from refbn_d2.layers.peers import PEERS
from refbn_d2.utils.errors import CheckpointError


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=7).state_dict()


@pytest.fixture(scope="module")
def resnext():
    torch.manual_seed(0)
    return torchvision.models.resnext50_32x4d().state_dict()


def table(text):
    """Return the first lines as {title: text}, and the lines after them."""
    head, _, tail = text.partition("\n\n")
    return {line[:14].strip(): line[14:] for line in head.splitlines()}, tail.splitlines()


def test_a_classifier_of_torchvisions(resnext, tmp_path):
    path = tmp_path / "a.safetensors"
    save_checkpoint(resnext, path)
    rows, takes = table(describe(path))
    learned = sum(p.numel() for p in torchvision.models.resnext50_32x4d().parameters())
    assert rows == {
        "format": f"safetensors, {path.stat().st_size / 2**20:.1f} MiB",
        "parameters": f"{learned:,} in 161 of 320 tensors",
        "model": "classifier, ResNeXt-50 32x4d with BN, 1000 classes",
        "layout": "torchvision's (and timm's)",
    }
    assert "here" in takes[0] and f"{path} OUT.pkl --to detectron2" in takes[1]
    assert [line.strip() for line in takes[2:]] == [
        "MODEL.RESNETS.DEPTH 50",
        "MODEL.RESNETS.NUM_GROUPS 32",
        "MODEL.RESNETS.WIDTH_PER_GROUP 4",
        "MODEL.RESNETS.NORM BN",
        "MODEL.RESNETS.STRIDE_IN_1X1 False",
        "MODEL.PIXEL_MEAN '[123.675, 116.28, 103.53]'",
        "MODEL.PIXEL_STD '[58.395, 57.12, 57.375]'",
        "INPUT.FORMAT RGB",
    ]


@pytest.mark.parametrize(
    "norm, suffix, detectron2",
    [
        ("FrozenBN", ".pkl", True),
        ("BN", ".pth", True),
        ("RefBN", ".pkl", False),
        ("BN", ".safetensors", False),
        ("BN", "bare.pth", False),
    ],
)
def test_who_takes_a_backbone_of_detectron2s(resnet, norm, suffix, detectron2, tmp_path):
    path = tmp_path / f"a{suffix}"
    state = convert_state(identify({"model": resnet}, "a"), "detectron2", norm)
    save_checkpoint(state if "bare" in suffix else pack(state, "detectron2", path.suffix), path)
    rows, takes = table(describe(path))
    assert rows["model"] == f"classifier, ResNet-18 with {norm}, 7 classes"
    assert rows["layout"] == "Detectron2's"
    assert rows["parameters"].startswith("11,180,103 in 62 of ")
    text = "\n".join(takes)
    assert ("in Detectron2 and here" in text) == detectron2
    assert ("--to detectron2 --norm FrozenBN" in text) != detectron2
    assert f"{path} OUT.pth --to torchvision" in text and f"MODEL.RESNETS.NORM {norm}" in text


@pytest.mark.parametrize(
    "norm, name", [("BRN", "BRN or CBN"), ("CBN", "BRN or CBN"), ("MABN", "MABN")]
)
def test_a_peer_is_named_beside_bn(norm, name, tmp_path):
    path = tmp_path / "a.pth"
    model = torchvision.models.resnet18(num_classes=7, norm_layer=PEERS[norm])
    save_checkpoint(model.state_dict(), path)
    rows, _ = table(describe(path))
    assert rows["model"] == "classifier, ResNet-18 with BN, 7 classes"
    assert rows["trained with"] == name and "not part of it" not in rows


def test_a_detector_with_its_training_state(resnet, tmp_path):
    state = convert_state(identify({"model": resnet}, "a"), "detectron2", "RefBN")
    state = {f"backbone.bottom_up.{n}": t for n, t in state.items() if "linear" not in n}
    for name in ("backbone.fpn_lateral2", "roi_heads.box_head.fc1", "roi_heads.mask_head.deconv"):
        state[f"{name}.weight"] = torch.ones(1)
    save_checkpoint(
        {
            "model": state,
            "iteration": 1199,
            "optimizer": {"state": {}},
            "refbn": {"dataset": "shapes_train", "seed": 3, "images": [{}] * 32, "position": 8},
        },
        tmp_path / "model_final.pth",
    )
    rows, takes = table(describe(tmp_path / "model_final.pth"))
    assert rows["model"] == "detector, ResNet-18 with RefBN, FPN, box_head, mask_head"
    assert rows["training"] == "iteration 1199, optimizer"
    assert rows["reference"] == "32 images of shapes_train, seed 3"
    assert "  MODEL.FPN.NORM ''" in takes
    assert any(line.endswith("--to torchvision --norm BN --allow-partial") for line in takes)


def test_averages_beside_the_weights(resnet, tmp_path):
    data = {"epoch": 3, "arch": "resnet18", "state_dict": resnet, "state_dict_ema": resnet}
    save_checkpoint(data, tmp_path / "last.pth.tar")
    rows, _ = table(describe(tmp_path / "last.pth.tar"))
    assert rows["training"] == "epoch 3, arch resnet18"
    assert "--key state_dict_ema" in rows["averages"]
    rows, _ = table(describe(tmp_path / "last.pth.tar", "state_dict_ema"))
    assert rows["model"] == "classifier, ResNet-18 with BN, 7 classes"


def test_what_is_incomplete_is_described(resnet, tmp_path):
    state = {name: t for name, t in resnet.items() if name != "layer2.0.conv1.weight"}
    state |= {"head.weight": torch.ones(2), "bn1.bias": torch.ones(3)}
    save_checkpoint(state, tmp_path / "a.pth")
    rows, _ = table(describe(tmp_path / "a.pth"))
    assert rows["missing"] == "res3.0.conv1.weight"
    assert rows["not part of it"] == "head.weight"
    assert rows["wrong shape"] == "bn1.bias is (3,), not (64,)"


def test_what_is_not_a_resnet_is_described_as_far_as_possible(tmp_path):
    save_checkpoint({"encoder.layers.encoder_layer_0.ln": torch.ones(3, 4)}, tmp_path / "a.pth")
    rows, text = table(describe(tmp_path / "a.pth"))
    assert rows["parameters"] == "12 in 1 of 1 tensors" and "model" not in rows
    assert "a.pth is a ViT (torchvision), which cannot be converted" in text[0]


def test_what_cannot_be_read_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="a.pth"):
        describe(tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match="a.pth"):
        describe(tmp_path / "a.pth")
