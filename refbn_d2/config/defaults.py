"""A detector's config with every key at its default."""

from refbn_d2.config.cfg_node import CfgNode
from refbn_d2.config.detectron2_defaults import add_detectron2_defaults
from refbn_d2.config.refbn import add_refbn_config


def get_cfg() -> CfgNode:
    """Return a new config: Detectron2's defaults, MODEL.REFBN and DATASETS.REGISTER."""
    cfg = CfgNode()
    add_detectron2_defaults(cfg)
    add_refbn_config(cfg)
    return cfg
