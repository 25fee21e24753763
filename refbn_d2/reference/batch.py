"""Capture the reference batch in a model, and refresh its moments as the weights change.

In a training loop:

    model = convert_to_refbn(model)
    reference = ReferenceBatch(model, images)  # (N, C, H, W), or a list of the model's samples
    for batch, labels in loader:
        with reference.step():
            loss = criterion(model(batch), labels)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from refbn_d2.config import RefBNOptions
from refbn_d2.config.refbn import LAYER_OPTIONS
from refbn_d2.layers import Moments, Recording, RefBatchNorm2d, ReferenceNorm, refbn_layers
from refbn_d2.reference.inputs import (
    Inputs,
    Sample,
    first_tensor,
    infer_inputs,
    with_rows,
    without_last_rows,
)
from refbn_d2.reference.isolation import untouched, with_weights_of
from refbn_d2.reference.selection import identity_of_samples
from refbn_d2.reference.workers import check_same_on_all_workers, pool_over_workers
from refbn_d2.utils import distributed
from refbn_d2.utils.errors import ConfigError

logger = logging.getLogger(__name__)


class ReferenceBatch:
    """Run the reference batch through a model, and keep the reference moments of its RefBN layers.

    `options.refresh` says how the moments are refreshed, `options.refresh_period` every how many
    steps (equations: `docs/algorithm.md`):

        "auto"    "concat"; "slice" where nothing can be appended; "static" if all layers are RefIN.
        "static"  never: they are captured once, before training.
        "full"    the whole batch is captured again.
        "slice"   the next `slice_size` images run through the model without gradient. Their
                  moments are averaged into the reference with weight `slice_momentum`.
        "concat"  the next slice is appended to the input of `concat_to`, and dropped from its
                  output. Layers outside of `concat_to` take "slice".

    Several workers (torch.distributed) share a slice: each runs its own ceil(slice_size / workers)
    images of it. The whole reference is run by every worker. In both cases one all-reduce of all
    layers' moments makes the references equal. Other steps do not communicate. The exception is a
    step in which a layer that the reference batch did not reach (a head without RoIs) may take its
    first training batch as the reference.

    Args:
        model: has RefBN or RefIN layers; not wrapped by DistributedDataParallel.
        images: the reference images: a tensor (N, C, H, W), normalized as in training, or a list of
            samples as the model takes them in training (dicts with "image" for Detectron2,
            (image, target) for torchvision's detectors), or (image, label) of a classification set.
        options: by default those of `RefBNOptions`, with `num_images` the number of `images`, and
            each layer's own weight and gradient.
        forward: runs the model on a list of samples, under autocast if training does. It is called
            in training mode and without gradient. What it returns is not used.
        identity: what `select_reference` returned; by default a fingerprint of the images.
        concat_to: the module whose input a slice is appended to ("concat" only): a detector's
            backbone, or a classifier itself. Its first argument, also by keyword, is the batch
            (N, C, H, W), and every tensor that it returns has N rows.
        rows: (samples, batch) -> the samples as rows (k, C, H, W), normalized, with the batch's
            height and width ("concat" only).

    `forward`, `concat_to` and `rows` are inferred from the model and the images by default.

    Raises:
        ConfigError: workers have different reference batches, or "concat" has nothing to append to.
        ValueError: the model has no RefBN or RefIN layer, or there are no images.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor | Sequence[Sample],
        options: RefBNOptions | None = None,
        *,
        forward: Callable[[list[Sample]], Any] | None = None,
        identity: dict | None = None,
        concat_to: nn.Module | None = None,
        rows: Callable[[list[Sample], Tensor], Tensor] | None = None,
    ) -> None:
        self._layers = dict(refbn_layers(model))
        if not self._layers:
            raise ValueError(
                "The model has no RefBN or RefIN layer, so it cannot take a reference. Convert it "
                "with convert_to_refbn, or set its norms to RefBN or RefIN."
            )
        if len(images) == 0:
            raise ValueError("A reference batch needs images, but there are none: give 1 or more.")
        _remove_hooks_of_others(model)
        self.model, self.samples = model, list(images)
        if forward:
            self._inputs = Inputs(forward, concat_to, rows)
        else:
            self._inputs = infer_inputs(model, self.samples, concat_to, rows)
        self.options = options or _default_options(len(self.samples))
        if self.options.refresh == "auto":
            self.options = replace(self.options, refresh=self._best_refresh())
        if identity is None:
            identity = identity_of_samples(self.samples)
        check_same_on_all_workers(identity)
        self.identity = {key: identity[key] for key in ("dataset", "seed", "images")}
        self.position = 0  # of the next slice
        self.iteration = 0  # of the next step
        self._begun = False
        self._hooks: list = []  # while a slice is in flight
        self._appended: list[Sample] = []  # the slice in flight
        self._was_appended = False  # in this step
        self._rows_in_flight = 0  # batch and slice, in the module's last call
        self._beside: dict[str, Moments | None] = {}  # recorded outside of `concat_to` in this step
        self._missed: list[ReferenceNorm] = []  # without a reference yet
        self._concat_layers: dict[str, ReferenceNorm] = {}
        for layer in self._layers.values():
            layer.stop_recording()
        if self.options.refresh == "concat":
            if self._inputs.concat_to is None or self._inputs.rows is None:
                raise ConfigError(
                    'MODEL.REFBN.REFRESH "concat" needs a module whose input a slice can be '
                    'appended to (concat_to and rows); use "slice".'
                )
            inside = {layer for _, layer in refbn_layers(self._inputs.concat_to)}
            self._concat_layers = {n: m for n, m in self._layers.items() if m in inside}

    def _best_refresh(self) -> str:
        if not any(isinstance(layer, RefBatchNorm2d) for layer in self._layers.values()):
            return "static"
        return "concat" if self._inputs.can_concat else "slice"

    def begin(self) -> None:
        """Give every layer its reference before the first step of a run, by `options.reference`.

        With "dataset" the reference is captured. With "checkpoint" the layers keep the reference
        of the checkpoint (for a BN checkpoint, its running statistics). Layers without one take
        the moments of the reference batch. The first `before_step` calls `begin` if nobody has.

        Raises:
            ConfigError: `options.reference` is "checkpoint", but no layer has a reference.
        """
        without = list(self._layers)
        if self.options.reference == "dataset":
            self.capture()
        else:
            without = [name for name, m in self._layers.items() if not m.has_reference()]
            if len(without) == len(self._layers):
                raise ConfigError(
                    'MODEL.REFBN.REFERENCE is "checkpoint", but no RefBN layer has a reference. '
                    "Set MODEL.WEIGHTS to a checkpoint that has one, or MODEL.REFBN.REFERENCE to "
                    '"dataset".'
                )
            if without:  # the other layers normalize by the reference they have
                recorded = self._run(self.samples, Recording.SLICE)
                self._commit({name: recorded[name] for name in without}, captured=True)
        self._begun = True
        logger.info(
            "Captured the reference batch in %d of %d layers: %d images of %s, seed %d.",
            len(without), len(self._layers), len(self.samples), self.identity["dataset"],
            self.identity["seed"],
        )  # fmt: skip

    def capture(self, averaged: nn.Module | None = None) -> None:
        """Capture the reference: run it, normalized by its own moments, and keep these.

        Nothing else changes: no parameter, gradient, running statistic, training flag or random
        state.

        Args:
            averaged: capture it in this model instead, a copy of the reference's model with
                averaged weights (EMA, SWA). The average of reference moments is not the reference
                of averaged weights.

        Raises:
            ValueError: `averaged` has other parameters or buffers than the reference's model.
        """
        if averaged is None:
            self._commit(self._run(self.samples, Recording.CAPTURE), captured=True)
            self._begun = True
            return
        if not hasattr(self.model, "module"):  # torch's AveragedModel, timm's ModelEmaV3
            averaged = getattr(averaged, "module", averaged)
        with with_weights_of(averaged, self.model):
            recorded = self._run(self.samples, Recording.CAPTURE)
        layers = dict(refbn_layers(averaged))
        for name, moments in self._pooled(recorded, captured=True).items():
            if moments is not None:
                layers[name].commit(moments)

    @contextmanager
    def step(self, iteration: int | None = None) -> Iterator[None]:
        """Wrap the forward and the backward pass of a training step.

        Args:
            iteration: the step's number in the run, from 0; by default ReferenceBatch counts.
        """
        self.before_step(iteration)
        try:
            yield
        except BaseException:
            self._abandon_slice()
            raise
        self.after_step()

    def before_step(self, iteration: int | None = None) -> None:
        """Prepare a training step; call this before the forward pass.

        Args:
            iteration: the step's number in the run, from 0; by default ReferenceBatch counts.
        """
        if iteration is None:
            iteration = self.iteration
        self.iteration = iteration + 1
        self._abandon_slice()  # left by a step that failed
        if not self._begun:
            self.begin()
        refresh = self.options.refresh
        if refresh == "static" or iteration % self.options.refresh_period:
            return
        if refresh == "full":
            if iteration > 0:  # training starts with a capture
                self.capture()
            return
        samples = self._next_slice()
        recorded: dict[str, Moments | None] = {}
        if len(self._concat_layers) < len(self._layers):
            recorded = self._run(samples, Recording.SLICE)
        if not self._concat_layers:
            self._commit(recorded)
            return
        self._appended, self._was_appended = samples, False
        self._beside = {n: m for n, m in recorded.items() if n not in self._concat_layers}
        for layer in self._concat_layers.values():
            layer.start_recording(Recording.CONCAT, len(samples), self.options.slice_momentum)
        module: Any = self._inputs.concat_to  # not None: the constructor checked it
        self._hooks = [
            module.register_forward_pre_hook(self._append_rows, prepend=True, with_kwargs=True),
            module.register_forward_hook(self._drop_rows, prepend=True),
        ]

    def after_step(self) -> None:
        """Finish a training step; call this after the backward pass.

        Raises:
            RuntimeError: the slice was not appended, because only the `forward` or a part of
                `concat_to` was called, not the module.
        """
        if self._appended:
            was_appended = self._was_appended
            recorded = self._abandon_slice()
            if not was_appended and any(recorded.values()):
                module = type(self._inputs.concat_to).__name__
                raise RuntimeError(
                    f"The slice of the reference could not be appended: {module} was not called, "
                    "only its forward or a part of it. Call the module itself (backbone(x), not "
                    'backbone.forward(x)), or set MODEL.REFBN.REFRESH to "slice".'
                )
            self._commit(self._beside | recorded)
        if self._missed:
            self._share_first_batches()

    def state_dict(self) -> dict:
        """Return identity and position in plain containers; the model's state has the moments."""
        return {**self.identity, "position": self.position, "iteration": self.iteration}

    def load_state_dict(self, state: dict) -> None:
        """Continue with the slice and the step of `state`.

        Raises:
            ConfigError: `state` is of another reference batch.
        """
        if state["images"] != self.identity["images"]:
            raise ConfigError(
                f"The checkpoint's reference batch has other images ({len(state['images'])} of "
                f"{state['dataset']}) than this one ({len(self.identity['images'])} of "
                f"{self.identity['dataset']}): give ReferenceBatch the same images again."
            )
        self.position, self.iteration = state["position"], state.get("iteration", 0)
        self._missed = [layer for layer in self._layers.values() if not layer.has_reference()]
        self._begun = True

    def _next_slice(self) -> list[Sample]:
        share = -(-self.options.slice_size // distributed.world_size())
        start = self.position + distributed.rank() * share
        self.position = (self.position + distributed.world_size() * share) % len(self.samples)
        return [self.samples[(start + i) % len(self.samples)] for i in range(share)]

    def _run(self, samples: list[Sample], recording: Recording) -> dict[str, Moments | None]:
        """Run the model once on `samples`; return the moments that each layer recorded."""
        for layer in self._layers.values():
            layer.start_recording(recording)
        try:
            with untouched(self.model, self.options.seed):
                self._inputs.forward(samples)
        finally:
            recorded = _take_recorded(self._layers)
        return recorded

    def _commit(self, recorded: dict[str, Moments | None], captured: bool = False) -> None:
        """Put the recorded moments into the references, the same on every worker."""
        pooled = self._pooled(recorded, captured)
        for name, moments in pooled.items():
            if moments is not None:
                momentum = 1.0 if captured else self.options.slice_momentum
                self._layers[name].commit(moments, momentum)
        missed = [name for name, moments in pooled.items() if moments is None]
        if captured and missed:
            self._missed = [m for n in missed if not (m := self._layers[n]).has_reference()]
            logger.warning(
                "The reference batch did not reach %s (no RoIs, or not in training mode). Such a "
                "layer takes its first training batch that is not empty as the reference.",
                ", ".join(missed),
            )

    def _pooled(
        self, recorded: dict[str, Moments | None], captured: bool
    ) -> dict[str, Moments | None]:
        """Pool the recorded moments over the workers."""
        layers = [self._layers[name] for name in recorded]
        # Every worker runs the whole reference: its count is the mean of theirs, not the sum.
        pooled = pool_over_workers(list(recorded.values()), layers, average_count=captured)
        return dict(zip(recorded, pooled, strict=True))

    def _share_first_batches(self) -> None:
        """Pool over the workers the references that layers took from their first batch."""
        firsts = [
            Moments(layer.ref_mean, layer.ref_var, int(layer.ref_count))
            if layer.has_reference()
            else None
            for layer in self._missed
        ]
        pooled = pool_over_workers(firsts, self._missed, average_count=False)
        for layer, moments in zip(self._missed, pooled, strict=True):
            if moments is not None:
                layer.commit(moments)
        self._missed = [m for m, p in zip(self._missed, pooled, strict=True) if p is None]

    def _append_rows(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if not module.training:
            return None
        place, batch = first_tensor(args, kwargs)
        assert self._inputs.rows is not None  # the constructor checked it
        longer = with_rows(batch, self._inputs.rows(self._appended, batch))
        self._was_appended = True
        self._rows_in_flight = len(longer)
        return ((longer, *args[1:]), kwargs) if args else (args, {**kwargs, place: longer})

    def _drop_rows(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if not module.training:
            return None
        return without_last_rows(output, len(self._appended), self._rows_in_flight)

    def _abandon_slice(self) -> dict[str, Moments | None]:
        """Remove the hooks of the slice in flight; return what the layers recorded of it."""
        while self._hooks:
            self._hooks.pop().remove()
        recorded = _take_recorded(self._concat_layers) if self._appended else {}
        self._appended = []
        return recorded


def _default_options(num_images: int) -> RefBNOptions:
    layers_own: dict[str, Any] = dict.fromkeys(LAYER_OPTIONS)
    slice_size = min(RefBNOptions.slice_size, num_images)
    return RefBNOptions(**layers_own, slice_size=slice_size, num_images=num_images)


def _take_recorded(layers: dict[str, ReferenceNorm]) -> dict[str, Moments | None]:
    return {name: layer.stop_recording() for name, layer in layers.items()}


def _remove_hooks_of_others(model: nn.Module) -> None:
    """Remove the hooks that another ReferenceBatch left after a step that failed."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), ReferenceBatch):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
