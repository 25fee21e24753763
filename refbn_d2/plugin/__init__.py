"""Add RefBN to Detectron2. Importing this module imports Detectron2."""

import detectron2  # noqa: F401  first, because after it refbn_d2.env registers RefBN

from refbn_d2.plugin.registration import (  # second, because it checks Detectron2
    PluginError,
    register,
    unregister,
)

from refbn_d2.plugin.hook import ReferenceBatchHook, reference_batch  # isort: skip

__all__ = ["PluginError", "ReferenceBatchHook", "reference_batch", "register", "unregister"]
