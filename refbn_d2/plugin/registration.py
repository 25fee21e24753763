"""Register RefBN with Detectron2: scripts that import refbn_d2 can set `MODEL.RESNETS.NORM: RefBN`.

`register` makes all of these changes, and `unregister` undoes them:

    get_norm                    knows "RefBN", "RefIN" and peers, also where imported before
    RetinaNetHead               gives them one layer per pyramid level, as it does for BN
    training loaders            read DATALOADER.BATCH_COMPOSITION, and register DATASETS.REGISTER
    build_model                 registers it too, sets the layers by MODEL.REFBN, and links CBN and
                                MABN to their convolutions
    config defaults             have MODEL.REFBN, DATASETS.REGISTER and the other new keys
    TrainerBase.register_hooks  adds a `ReferenceBatchHook` if the model has RefBN, and a
                                `PeerRestartHook` if it has peers
    DatasetCatalog              knows `shapes_train` and the other shapes

MODEL.BACKBONE.FREEZE_AT needs nothing: Detectron2 makes every BatchNorm2d, RefBN included, a
FrozenBatchNorm2d. RefIN stays, as GN does.
"""

import functools
import inspect
import logging
import re
import types
import weakref
from collections.abc import Callable
from pathlib import Path

import detectron2
from torch import nn

from refbn_d2.config import add_refbn_config, apply_options, refbn_options
from refbn_d2.config.refbn import check_model
from refbn_d2.data import catalog
from refbn_d2.layers import RefBatchNorm2d, RefInstanceNorm2d, has_refbn
from refbn_d2.layers.peers import PEERS, has_peers, prepare_peers
from refbn_d2.plugin.patching import originals, replace_attribute, replace_code
from refbn_d2.utils.errors import ConfigError

# Read from the file: while an environment module runs, the package has no __version__ yet.
_VERSION = re.search(r"__version__ = [\"'](.+)[\"']", Path(detectron2.__file__).read_text())
_VERSION = f"Detectron2 {_VERSION[1] if _VERSION else 'of unknown version'}"
_WAY_OUT = (
    "Use Detectron2 0.6 or its main branch, or this package's own engine (--engine torchvision)."
)
try:
    from detectron2.config import configurable, defaults
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data import build as data_build
    from detectron2.data.datasets import load_coco_json
    from detectron2.engine.train_loop import TrainerBase
    from detectron2.layers import CycleBatchNormList, batch_norm
    from detectron2.modeling.meta_arch import build
    from detectron2.modeling.meta_arch.retinanet import RetinaNetHead

    from refbn_d2.plugin.hook import PeerRestartHook, ReferenceBatchHook
except ImportError as error:
    if "'_C'" in str(error):
        raise ImportError(
            f"{_VERSION} ({detectron2.__file__}) is not compiled: install it by its guide, "
            "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"
        ) from error
    raise ImportError(f"{_VERSION} lacks what RefBN needs: {error}. {_WAY_OUT}") from error

OUR_NORMS: dict[str, type[nn.Module]] = {  # by their names
    "RefBN": RefBatchNorm2d,
    "RefIN": RefInstanceNorm2d,
    **PEERS,
}

logger = logging.getLogger(__name__)

_undo: list[Callable[[], None]] = []  # undoes each step of the registration, in the order made
_added: weakref.WeakSet = weakref.WeakSet()  # hooks that were added here, not by the user


class PluginError(ImportError):
    """Error: RefBN cannot be registered with this version of Detectron2."""


def register() -> None:
    """Register RefBN with Detectron2. A second call changes nothing.

    Raises:
        PluginError: a part of Detectron2 is not as expected; then nothing is registered.
    """
    if _undo:
        return
    _check()
    head = RetinaNetHead.__init__.__wrapped__  # without @configurable
    try:
        _undo.append(replace_code(batch_norm.get_norm, _get_norm))
        _undo.append(replace_code(build.build_model, _build_model))
        _undo.append(replace_code(data_build._train_loader_from_config, _loader_arguments))
        _undo.append(replace_attribute(RetinaNetHead, "__init__", _one_layer_a_level(head)))
        hooks = _with_hooks(TrainerBase.register_hooks)
        _undo.append(replace_attribute(TrainerBase, "register_hooks", hooks))
        _undo.append(_add_keys(defaults._C))
        for name in catalog.SHAPES:
            if name not in DatasetCatalog.list():  # the name may be taken
                _undo.append(_add_dataset(name))
    except BaseException:
        unregister()
        raise


def unregister() -> None:
    """Restore Detectron2 as it was before `register`."""
    while _undo:
        _undo.pop()()
    originals.clear()


def _check() -> None:
    def expect(fits: bool, what: str) -> None:
        if not fits:
            raise PluginError(
                f"RefBN cannot be registered with {_VERSION} ({detectron2.__file__}): expected "
                f"{what}. {_WAY_OUT}"
            )

    def arguments(function: Callable | None) -> list[str] | None:
        is_plain = isinstance(function, types.FunctionType) and function.__closure__ is None
        return list(inspect.signature(function).parameters) if is_plain else None

    def made(norm: str) -> nn.Module | None:
        try:
            return batch_norm.get_norm(norm, 4)
        except Exception:  # a KeyError for unknown norms
            return None

    expect(
        arguments(getattr(batch_norm, "get_norm", None)) == ["norm", "out_channels"],
        "detectron2.layers.get_norm to be a function get_norm(norm, out_channels)",
    )
    for norm in OUR_NORMS:
        expect(made(norm) is None, f"detectron2.layers.get_norm to have no {norm!r} of its own")
    expect(
        isinstance(made("BN"), nn.BatchNorm2d),
        'detectron2.layers.get_norm("BN", channels) to be a BatchNorm2d',
    )
    expect(
        arguments(getattr(build, "build_model", None)) == ["cfg"],
        "detectron2.modeling.build_model to be a function build_model(cfg)",
    )
    expect(
        arguments(getattr(data_build, "_train_loader_from_config", None))
        == ["cfg", "mapper", "dataset", "sampler"],
        "detectron2.data.build to have a function _train_loader_from_config(cfg, mapper, *, "
        "dataset, sampler)",
    )
    head = getattr(RetinaNetHead.__init__, "__wrapped__", lambda: None)
    expect(
        {"input_shape", "norm"} <= set(inspect.signature(head).parameters),
        "RetinaNetHead to be @configurable, and to take input_shape and norm",
    )
    expect(
        arguments(getattr(TrainerBase, "register_hooks", None)) == ["self", "hooks"],
        "TrainerBase to have a method register_hooks(hooks)",
    )


# ---- the parts. Other modules have imported these functions by name, so the code is replaced and
# the function object stays. Its globals stay Detectron2's, so the new code imports what it calls.


def _get_norm(norm, out_channels):
    from refbn_d2.plugin import registration

    return registration.norm_layer(norm, out_channels)


def norm_layer(norm, out_channels: int) -> nn.Module | None:
    """Return the layer of a norm: `detectron2.layers.get_norm` while RefBN is registered."""
    if isinstance(norm, str) and norm in OUR_NORMS:
        return OUR_NORMS[norm](out_channels)
    return originals["get_norm"](norm, out_channels)


def _build_model(cfg):
    from refbn_d2.plugin import registration

    return registration.model_of(cfg)


def model_of(cfg) -> nn.Module:
    """Build the model: `detectron2.modeling.build_model` while RefBN is registered.

    Raises:
        ConfigError: a key of MODEL.REFBN or DATASETS.REGISTER has a value that is not allowed.
    """
    options = refbn_options(cfg)
    register_datasets(cfg)
    model = originals["build_model"](cfg)
    apply_options(model, options)
    prepare_peers(model, cfg.SOLVER.MAX_ITER)
    return model


def _loader_arguments(cfg, mapper=None, *, dataset=None, sampler=None):
    from refbn_d2.plugin import registration

    return registration.loader_arguments(cfg, mapper, dataset=dataset, sampler=sampler)


def loader_arguments(cfg, mapper=None, *, dataset=None, sampler=None) -> dict:
    """Return what `build_detection_train_loader` takes from a config while RefBN is registered.

    Raises:
        ConfigError, DataError: as `plugin.domains.with_domains`, and those of `register_datasets`.
    """
    from refbn_d2.plugin.domains import with_domains

    register_datasets(cfg)
    original = originals["_train_loader_from_config"]
    arguments = original(cfg, mapper, dataset=dataset, sampler=sampler)
    return arguments if sampler is not None else with_domains(cfg, arguments)


def _one_layer_a_level(init: Callable) -> Callable:
    """Wrap RetinaNetHead's constructor: our norms, as BN, have separate moments on each level."""

    @configurable
    @functools.wraps(init)
    def __init__(self, *, input_shape, norm="", **kwargs):
        if isinstance(norm, str) and norm in OUR_NORMS:
            layer = OUR_NORMS[norm]
            levels = len(input_shape)

            def norm(channels: int) -> nn.Module:
                return CycleBatchNormList(levels, layer, num_features=channels)

        init(self, input_shape=input_shape, norm=norm, **kwargs)

    return __init__


def _with_hooks(register_hooks: Callable) -> Callable:
    """Wrap TrainerBase.register_hooks: trainers of models with our norms get the hook they need.

    It raises if the trainer's config names RefBN and its model has none (`config.check_model`).
    """

    @functools.wraps(register_hooks)
    def wrapped(self, hooks):
        if hasattr(self, "cfg") and getattr(self, "model", None) is not None:
            check_model(self.model, self.cfg)
        given = [hook for hook in hooks if isinstance(hook, ReferenceBatchHook)]
        if given:  # it replaces a hook that was added here, and takes over the checkpoint's state
            for hook in _added.intersection(self._hooks):
                self._hooks.remove(hook)
                given[0].load_state_dict(hook.state_dict())
        elif _needs_reference_hook(self):
            hook = ReferenceBatchHook()
            _added.add(hook)
            hooks = [hook, *hooks]
        if _needs_peer_hook(self):
            hooks = [PeerRestartHook(), *hooks]
        register_hooks(self, hooks)

    return wrapped


def _needs_reference_hook(trainer: TrainerBase) -> bool:
    model = getattr(trainer, "model", None)
    return (
        model is not None
        and hasattr(trainer, "data_loader")
        and has_refbn(model)
        and not any(isinstance(hook, ReferenceBatchHook) for hook in trainer._hooks)
    )


def _needs_peer_hook(trainer: TrainerBase) -> bool:
    model = getattr(trainer, "model", None)
    return (
        model is not None
        and has_peers(model)
        and not any(isinstance(hook, PeerRestartHook) for hook in trainer._hooks)
    )


def _add_keys(cfg) -> Callable[[], None]:
    add_refbn_config(cfg)

    def undo() -> None:
        del cfg.MODEL["REFBN"], cfg.DATASETS["REGISTER"]
        del cfg.DATALOADER["BATCH_COMPOSITION"], cfg.DATALOADER["DOMAIN_FIELD"]
        del cfg.TEST["MAX_DETS_PER_IMAGE"]

    return undo


def _add_dataset(name: str) -> Callable[[], None]:
    """Add one of our datasets to Detectron2's catalogs; a `shapes_*` set is made when read."""
    dataset = catalog.find(name)
    files = {"json_file": str(dataset.json_file), "image_root": str(dataset.image_root)}

    def load() -> list[dict]:
        catalog.get(name)
        return load_coco_json(*files.values(), name)

    def undo() -> None:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)

    DatasetCatalog.register(name, load)
    MetadataCatalog.get(name).set(**files, evaluator_type="coco")
    return undo


def register_datasets(cfg) -> None:
    """Add DATASETS.REGISTER to Detectron2's catalogs: ((name, json file, image folder), ...).

    Raises:
        ConfigError: an entry does not have this form, or its name is used by other data.
    """
    register()
    catalog.register_from_config(cfg)
    for name, *files in cfg.DATASETS.get("REGISTER", ()):
        if name not in DatasetCatalog.list():
            _undo.append(_add_dataset(name))
            continue
        metadata = MetadataCatalog.get(name)
        json_file = metadata.get("source_json_file", metadata.get("json_file"))  # if repaired
        known = [json_file, metadata.get("image_root")]
        if [Path(file or "") for file in known] != [Path(file) for file in files]:
            raise ConfigError(
                f"DATASETS.REGISTER: {name!r} is a dataset of Detectron2's already ({known[0]}, "
                f"images in {known[1]}); give {files[0]} another name."
            )
