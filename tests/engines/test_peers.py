"""BRN, CBN and MABN are built by name, scheduled, linked and trained on both engines."""

import numpy as np
import pytest
import torch

from refbn_d2.checkpoint import load_weights
from refbn_d2.checkpoint.convert import convert_state, identify
from refbn_d2.checkpoint.files import load_checkpoint
from refbn_d2.checkpoint.names import detectron2_to_torchvision
from refbn_d2.engines.torchvision.modeling import build_model
from refbn_d2.engines.torchvision.trainer import train
from refbn_d2.layers.peers import PEERS, LinkError
from tests.plugin.hook_helpers import trainer_of

WHERE = (
    "MODEL.RESNETS.NORM",
    "MODEL.FPN.NORM",
    "MODEL.ROI_BOX_HEAD.NORM",
    "MODEL.ROI_MASK_HEAD.NORM",
)


def with_norm(cfg, name):
    cfg.merge_from_list([value for key in WHERE for value in (key, name)])
    cfg.merge_from_list(["SOLVER.MAX_ITER", 40, "MODEL.WEIGHTS", ""])
    return cfg


def picture():
    x = torch.zeros(3, 64, 64, dtype=torch.uint8)
    x[:, 16:40, 16:40] = 200
    return x


@pytest.mark.parametrize("name", PEERS)
def test_the_torchvision_engine_builds_and_trains_it(tiny_cfg, name):
    torch.manual_seed(0)
    model = build_model(with_norm(tiny_cfg, name)).train()
    layers = [m for m in model.modules() if isinstance(m, PEERS[name])]
    expected = build_model(with_norm(tiny_cfg, "BN"))
    assert len(layers) == sum(isinstance(m, torch.nn.BatchNorm2d) for m in expected.modules())
    if name == "BRN":
        assert {m.ramp_steps for m in layers} == {10}  # a quarter of the run
    sample = {
        "image": picture(),
        "gt_boxes": torch.tensor([[16.0, 16.0, 40.0, 40.0]]),
        "gt_classes": torch.tensor([1]),
        "gt_masks": [np.ones((64, 64), bool)],
    }
    for _ in range(2):  # CBN and MABN raise in a training step if they are not linked
        losses = model([sample, sample])
        sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(layer.weight.grad is not None for layer in layers)


@pytest.mark.detectron2
@pytest.mark.parametrize("name", PEERS)
def test_detectron2_builds_and_trains_it(detectron2_cfg, name):
    structures = pytest.importorskip("detectron2.structures")
    from detectron2.modeling import build_model
    from detectron2.utils.events import EventStorage

    torch.manual_seed(0)
    model = build_model(with_norm(detectron2_cfg, name)).train()
    layers = [m for m in model.modules() if isinstance(m, PEERS[name])]
    if name == "BRN":
        assert {m.ramp_steps for m in layers} == {10}
    instances = structures.Instances((64, 64))
    instances.gt_boxes = structures.Boxes(torch.tensor([[16.0, 16.0, 40.0, 40.0]]))
    instances.gt_classes = torch.tensor([1])
    square = [[16.0, 16.0, 40.0, 16.0, 40.0, 40.0, 16.0, 40.0]]
    instances.gt_masks = structures.PolygonMasks([square])
    sample = {"image": picture(), "height": 64, "width": 64, "instances": instances}
    with EventStorage(1):
        for _ in range(2):
            losses = model([sample, sample])
            sum(losses.values()).backward()
    assert layers and all(torch.isfinite(loss) for loss in losses.values())


@pytest.mark.parametrize("name", PEERS)
def test_bn_starts_it_and_it_becomes_bn(tiny_cfg, name):
    """Through `load_weights` and the converter. MABN drops BN's means, so it is compared back."""

    def model(norm):
        return build_model(with_norm(tiny_cfg.clone(), norm)).eval().cpu()

    bn, peer, back, folded = model("BN"), model(name), model("BN"), model("FrozenBN")
    for layer in bn.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(layer.running_mean, 0, 0.1)
            torch.nn.init.uniform_(layer.running_var, 0.5, 2)
    load_weights(peer, bn.state_dict(), "bn.pth")
    load_weights(back, peer.state_dict(), "peer.pth")
    state, place = peer.state_dict(), "backbone.bottom_up."
    classifier = {
        detectron2_to_torchvision(key.removeprefix(place)): tensor
        for key, tensor in state.items()
        if key.startswith(place)
    }
    for given in (classifier, state):
        contents = identify({"model": given}, "peer.pth")
        converted = convert_state(contents, "detectron2", "folded")
        assert not [key for key in converted if key.endswith(("steps", "moments"))]
    load_weights(folded, converted, "folded.pth")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = (peer if name == "MABN" else bn).backbone.bottom_up(x)
        for other in (peer, back, folded):
            for key, value in other.backbone.bottom_up(x).items():
                torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-3)


STEPS = "backbone.bottom_up.stem.conv1.norm.steps"


@pytest.mark.parametrize("name", PEERS)
def test_a_run_from_the_weights_of_another_starts_its_schedule_and_a_resumed_one_continues_it(
    tiny_cfg, tmp_path, name
):
    def run(folder, steps, weights="", resume=False):
        cfg = with_norm(tiny_cfg.clone(), name)
        cfg.merge_from_list(["SOLVER.MAX_ITER", steps, "MODEL.WEIGHTS", str(weights)])
        (tmp_path / folder).mkdir(exist_ok=True)
        train(cfg, tmp_path / folder, resume=resume)
        final = tmp_path / folder / "model_final.pth"
        return final, int(load_checkpoint(final)["model"][STEPS])

    pretrained, steps = run("pretrained", 3)
    assert steps == 3
    assert run("fine-tuned", 2, pretrained)[1] == 2
    assert run("fine-tuned", 3, pretrained, resume=True)[1] == 3


@pytest.mark.detectron2
@pytest.mark.parametrize("name", PEERS)
def test_detectron2_starts_and_continues_schedules_too(detectron2_cfg, tmp_path, name):
    pytest.importorskip("detectron2.engine")

    def run(folder, steps, weights="", resume=False):
        cfg = with_norm(detectron2_cfg.clone(), name)
        cfg.merge_from_list(["SOLVER.MAX_ITER", steps, "MODEL.WEIGHTS", str(weights)])
        cfg.OUTPUT_DIR = str(tmp_path / folder)
        (tmp_path / folder).mkdir(exist_ok=True)
        trainer = trainer_of(cfg)
        trainer.resume_or_load(resume=resume)
        trainer.train()
        return tmp_path / folder / "model_final.pth", int(trainer.model.state_dict()[STEPS])

    pretrained, steps = run("pretrained", 3)
    assert steps == 3
    assert run("fine-tuned", 2, pretrained)[1] == 2
    assert run("fine-tuned", 3, pretrained, resume=True)[1] == 3


@pytest.mark.detectron2
def test_the_restart_comes_before_the_timer_and_the_reference_batch(detectron2_cfg):
    pytest.importorskip("detectron2.engine")
    from refbn_d2.plugin.hook import PeerRestartHook, ReferenceBatchHook

    with_norm(detectron2_cfg, "CBN").merge_from_list(
        ["MODEL.ROI_MASK_HEAD.NORM", "RefBN", "SOLVER.MAX_ITER", 4]
    )
    detectron2_cfg.MODEL.REFBN.REFRESH = "slice"
    trainer = trainer_of(detectron2_cfg)
    trainer.train()
    names = [type(hook).__name__ for hook in trainer._hooks]
    assert names[:3] == [PeerRestartHook.__name__, "IterationTimer", ReferenceBatchHook.__name__]
    assert names.count(PeerRestartHook.__name__) == 1
    resumed = trainer_of(detectron2_cfg.clone())
    resumed.resume_or_load(resume=True)
    resumed.max_iter = 6
    resumed.train()
    assert int(resumed.model.state_dict()[STEPS]) == 6


@pytest.mark.detectron2
def test_retinanets_shared_head_gives_brn_a_layer_for_each_level_and_refuses_cbn():
    config = pytest.importorskip("detectron2.config")
    from detectron2.modeling import build_model

    import refbn_d2  # noqa: F401  registers

    cfg = config.get_cfg()
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "RetinaNet", "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_retinanet_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    sizes = [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = sizes
    cfg.MODEL.RETINANET.NORM = "BRN"
    head = build_model(cfg).head
    assert sum(isinstance(m, PEERS["BRN"]) for m in head.modules()) == 2 * 4 * 5
    cfg.MODEL.RETINANET.NORM = "CBN"
    with pytest.raises(LinkError, match=r"head\.cls_subnet\.1"):
        build_model(cfg)
