"""A config that names RefBN, and a model without it."""

import copy
import logging

import pytest
from torch import nn

from refbn_d2.config import ConfigError, get_cfg
from refbn_d2.config.pretrain import get_pretrain_cfg
from refbn_d2.config.refbn import check_model
from refbn_d2.layers import RefBatchNorm2d

REFBN = nn.Sequential(nn.Conv2d(3, 4, 1), RefBatchNorm2d(4))


def cfg_with(**norms):
    cfg = get_cfg()
    for section, norm in norms.items():
        cfg.MODEL[section].NORM = norm
    return cfg


def test_a_model_that_a_converter_took_refbn_from():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(REFBN))
    cfg = cfg_with(RESNETS="RefBN", FPN="RefBN")
    named = (
        r"MODEL\.\w+\.NORM and MODEL\.\w+\.NORM is RefBN or RefIN, but .* only SyncBatchNorm\..*"
    )
    with pytest.raises(ConfigError, match=named + "convert_sync_batchnorm"):
        check_model(model, cfg)
    cfg = get_pretrain_cfg()
    cfg.MODEL.NORM = "RefBN"
    with pytest.raises(ConfigError, match="MODEL.NORM is RefBN"):
        check_model(model, cfg)


def test_models_as_their_config_says(caplog):
    with caplog.at_level(logging.WARNING):
        check_model(REFBN, cfg_with(RESNETS="RefBN"))
        check_model(nn.BatchNorm2d(4), cfg_with(RESNETS="BN"))
        check_model(nn.Conv2d(3, 4, 1), cfg_with(RESNETS="FrozenBN"))
    assert not caplog.records


def test_a_frozen_model_gets_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        check_model(nn.Conv2d(3, 4, 1), cfg_with(RESNETS="RefBN"))
    [record] = caplog.records
    assert "MODEL.RESNETS.NORM is RefBN or RefIN, but the model has no such layer" in record.message
