"""RefBN in anyone's Detectron2, which this package imports."""

from refbn_d2.plugin.registration import (  # first: checks Detectron2
    PluginError,
    register,
    unregister,
)

from refbn_d2.plugin.hook import ReferenceBatchHook, reference_batch  # isort: skip

__all__ = ["PluginError", "ReferenceBatchHook", "reference_batch", "register", "unregister"]
