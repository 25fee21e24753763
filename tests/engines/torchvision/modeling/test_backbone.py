import torch
from torch import nn

from refbn_d2.engines.torchvision.modeling import build_model
from refbn_d2.engines.torchvision.modeling.backbone import FrozenBatchNorm2d
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


def test_a_frozen_batch_norm_is_the_batch_norm_in_eval_mode():
    norm = nn.BatchNorm2d(6, eps=1e-3)
    for value in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        value.uniform_(0.5, 2)
    frozen = FrozenBatchNorm2d.of(norm)
    for requires_grad in (False, True):
        x = torch.randn(2, 6, 4, 5, requires_grad=requires_grad)
        torch.testing.assert_close(frozen(x), norm.eval()(x))
    assert not list(frozen.parameters())
    x = torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(FrozenBatchNorm2d(6)(x), x)  # the identity at first
