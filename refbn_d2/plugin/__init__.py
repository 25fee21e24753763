"""Add RefBN to Detectron2. Importing this module imports Detectron2."""

from refbn_d2.plugin.registration import (  # first, because it checks Detectron2
    PluginError,
    register,
    unregister,
)

from refbn_d2.plugin.hook import ReferenceBatchHook, reference_batch  # isort: skip

__all__ = ["PluginError", "ReferenceBatchHook", "reference_batch", "register", "unregister"]
