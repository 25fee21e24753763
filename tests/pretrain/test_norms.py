"""timm's own tools on RefBN, and the reference of the moving average."""

import copy

import pytest
import torch
from timm.layers import (
    BatchNormAct2d,
    SyncBatchNormAct,
    convert_sync_batchnorm,
    freeze_batch_norm_2d,
)
from torch import nn

from refbn_d2.config import ConfigError
from refbn_d2.layers import RefBatchNorm2d, convert_to_refbn, refbn_layers
from refbn_d2.pretrain import trainer as trainer_module
from refbn_d2.pretrain.models import RefBatchNormAct2d, convert_timm_to_refbn
from tests.pretrain.helpers import final, run, trainer


def net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act_layer=nn.SiLU), nn.Conv2d(4, 4, 1),
        nn.BatchNorm2d(4),
    )  # fmt: skip
    model(images(1))
    return model


def images(seed):
    return torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def test_convert_timm_keeps_activation_weights_statistics_and_outputs():
    bn = net()
    expected = copy.deepcopy(bn).eval()(images(2))
    statistics = bn[1].running_mean.clone()
    model = convert_timm_to_refbn(bn, reference_weight=0.5, gradient="pooled")
    assert [type(model[i]) for i in (1, 3)] == [RefBatchNormAct2d, RefBatchNorm2d]
    assert {layer.gradient for _, layer in refbn_layers(model)} == {"pooled"}
    assert torch.equal(model[1].ref_mean, statistics) and model[1].ref_count == 1
    assert convert_timm_to_refbn(model)[1] is model[1]  # once is enough
    assert torch.equal(model.eval()(images(2)), expected)


def test_timms_freezing_keeps_the_activation():
    model = convert_timm_to_refbn(net())
    expected = copy.deepcopy(model).eval()(images(2))
    frozen = freeze_batch_norm_2d(model).train()
    torch.testing.assert_close(frozen(images(2)), expected)


def test_timms_syncbn_keeps_the_activation():
    model = convert_timm_to_refbn(net())
    new = convert_sync_batchnorm(model)[1]
    assert isinstance(new, SyncBatchNormAct) and isinstance(new.act, nn.SiLU)


def test_a_model_without_the_configs_norm_stops_the_training(cfg, monkeypatch):
    build = trainer_module.build_model

    def converted(cfg, num_classes):
        return convert_sync_batchnorm(build(cfg, num_classes))

    monkeypatch.setattr(trainer_module, "build_model", converted)
    with pytest.raises(ConfigError, match="MODEL.NORM is RefBN or RefIN, .* only SyncBatchNorm"):
        trainer(cfg)


def test_the_moving_averages_reference_is_its_own(cfg):
    """Oracle: a model that gets the averaged weights, and is captured."""
    run(cfg, "MODEL.EMA.ENABLED", True, "MODEL.EMA.DECAY", 0.8)
    saved = final(cfg.OUTPUT_DIR, "model_ema")
    again = trainer(cfg)
    again.model.load_state_dict(saved)
    for _, layer in refbn_layers(again.model):
        layer.reset_reference()
    again.reference.capture()
    for name, value in again.model.state_dict().items():
        torch.testing.assert_close(saved[name], value.cpu(), rtol=1e-5, atol=1e-5, msg=name)
    assert not torch.equal(saved["bn1.ref_mean"], final(cfg.OUTPUT_DIR)["bn1.ref_mean"])


def test_plain_conversion_leaves_timms_norms():
    assert type(convert_to_refbn(net())[1]) is BatchNormAct2d
