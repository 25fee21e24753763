"""Provide Detectron2's config keys with Detectron2's defaults, and this package's own."""

from refbn_d2.config.cfg_node import CfgNode
from refbn_d2.config.defaults import get_cfg
from refbn_d2.config.refbn import (
    RefBNOptions,
    add_refbn_config,
    apply_options,
    refbn_options,
)
from refbn_d2.utils.errors import ConfigError

__all__ = [
    "CfgNode",
    "ConfigError",
    "RefBNOptions",
    "add_refbn_config",
    "apply_options",
    "get_cfg",
    "refbn_options",
]
