"""A pretrained backbone in a detector is loaded, and its reference kept or captured again."""

import subprocess
import sys

import pytest
import torch
from torchvision.models import resnet18

from refbn_d2.checkpoint import load_checkpoint
from refbn_d2.checkpoint.files import save_checkpoint
from refbn_d2.export.convert_file import convert_file
from refbn_d2.layers import convert_to_refbn, refbn_layers


@pytest.fixture(params=[".pkl", ".pth"])
def backbone(request, tmp_path):
    """Return a file for MODEL.WEIGHTS with a reference, and torchvision's model in it."""
    torch.manual_seed(0)
    model = convert_to_refbn(resnet18(num_classes=12))
    for _, layer in refbn_layers(model):
        layer.ref_mean.normal_()
        layer.ref_var.uniform_(0.5, 2.0)
        layer.ref_count.fill_(7)
    save_checkpoint({"model": model.state_dict()}, tmp_path / "classifier.pth")
    target = tmp_path / f"backbone{request.param}"
    convert_file(tmp_path / "classifier.pth", target, "detectron2")
    return target, model


@pytest.mark.parametrize("reference", ["dataset", "checkpoint"])
@pytest.mark.parametrize(
    "engine", ["torchvision", pytest.param("detectron2", marks=pytest.mark.detectron2)]
)
def test_finetuning_from_our_files(tiny_cfg, backbone, engine, reference, request):
    if engine == "detectron2":
        pytest.importorskip("detectron2.config")
    weights, model = backbone
    tiny_cfg.merge_from_list(
        ["MODEL.WEIGHTS", str(weights), "SOLVER.MAX_ITER", 1, "SOLVER.BASE_LR", 1e-12,
         "SOLVER.WEIGHT_DECAY", 0.0, "MODEL.REFBN.REFRESH", "static",
         "MODEL.REFBN.REFERENCE", reference]
    )  # fmt: skip
    folder = weights.parent
    (folder / "config.yaml").write_text(tiny_cfg.dump())
    command = [sys.executable, "tools/train_net.py", "--engine", engine, "--config-file",
               str(folder / "config.yaml")]  # fmt: skip
    done = subprocess.run(command, cwd=request.config.rootpath, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    trained = load_checkpoint(folder / "output" / "model_final.pth")["model"]
    trained = {name: torch.as_tensor(value) for name, value in trained.items()}
    for ours, theirs, same in [
        ("stem.conv1.weight", model.conv1.weight, True),
        ("res4.1.conv2.weight", model.layer3[1].conv2.weight, True),
        ("res4.1.conv2.norm.weight", model.layer3[1].bn2.weight, True),
        ("res4.1.conv2.norm.ref_mean", model.layer3[1].bn2.ref_mean, reference == "checkpoint"),
        ("stem.conv1.norm.ref_var", model.bn1.ref_var, reference == "checkpoint"),
    ]:
        close = torch.allclose(trained[f"backbone.bottom_up.{ours}"], theirs, rtol=0, atol=1e-6)
        assert close == same, ours
    fpn = trained["backbone.fpn_output2.norm.ref_mean"]  # not in the file
    assert fpn.abs().max() > 0 and trained["backbone.fpn_output2.norm.ref_count"] > 0
