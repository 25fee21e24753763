from torch import nn

from refbn_d2.engines.torchvision.modeling import build_model
from refbn_d2.engines.torchvision.modeling.norms import FrozenBatchNorm2d
from refbn_d2.layers import RefBatchNorm2d
from tests.engines.torchvision.modeling.helpers import FPN, config, make_samples, trained_step


def test_frozen_stages_are_constant_and_the_others_refbn():
    cfg = config([*FPN, "MODEL.BACKBONE.FREEZE_AT", 3], norm="RefBN")
    cfg.merge_from_list(["MODEL.REFBN.REFERENCE_WEIGHT", 0.5, "MODEL.REFBN.GRADIENT", "pooled"])
    model = build_model(cfg)
    stages = {name: getattr(model.backbone.bottom_up, name) for name in ("stem", "res3", "res4")}
    for name, stage in stages.items():
        norms = [m for m in stage.modules() if isinstance(m, (nn.BatchNorm2d, FrozenBatchNorm2d))]
        frozen = name != "res4"
        kind = FrozenBatchNorm2d if frozen else RefBatchNorm2d
        assert norms and all(type(norm) is kind for norm in norms)
        assert all(p.requires_grad != frozen for p in stage.parameters())
    norm = stages["res4"][0].conv1.norm
    assert (norm.reference_weight, norm.gradient) == (0.5, "pooled")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained_step(model, make_samples())
    changed = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
    assert changed and not any(key.startswith("backbone.bottom_up.res3") for key in changed)
    assert "backbone.bottom_up.res4.0.conv1.norm.running_mean" in changed
