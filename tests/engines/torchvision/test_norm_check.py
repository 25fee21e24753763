"""A model that lost its RefBN between build and training."""

import pytest
from torch import nn

from refbn_d2.engines.torchvision import trainer as trainer_module
from refbn_d2.engines.torchvision.trainer import Trainer
from refbn_d2.utils.errors import ConfigError


def test_a_model_that_a_converter_took_refbn_from_is_refused(tiny_cfg, tmp_path, monkeypatch):
    build = trainer_module.build_model
    monkeypatch.setattr(
        trainer_module,
        "build_model",
        lambda cfg: nn.SyncBatchNorm.convert_sync_batchnorm(build(cfg)),
    )
    with pytest.raises(ConfigError, match=r"MODEL.RESNETS.NORM .* only SyncBatchNorm"):
        Trainer(tiny_cfg, tmp_path)
