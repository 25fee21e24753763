"""The reference batch: chosen once, named, captured, and kept true to the moving weights.

A training loop of any engine, around its own steps::

    chosen, identity = select_reference(dataset_dicts, options, "coco_2017_train")
    samples = [mapper(dataset_dicts[i]) for i in chosen]
    reference = ReferenceBatch(model, samples, forward, options, identity)
    reference.begin()
    for iteration in range(max_iter):
        reference.before_step(iteration)
        losses = model(batch); losses.backward()
        reference.after_step()
        optimizer.step()
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from refbn_d2.config import RefBNOptions
from refbn_d2.layers import Moments, RefBatchNorm2d, refbn_layers
from refbn_d2.utils.random_state import seeded

logger = logging.getLogger(__name__)

Sample = Any  # what the training pipeline gives for one image


class ReferenceBatch:
    """Runs the reference batch through a model, and keeps its RefBN layers' reference moments.

    `options.refresh` says when, `options.refresh_period` how often (design equations in
    `docs/algorithm.md`):

        "static"  captured once, before training.
        "full"    the whole batch captured again every period.
        "slice"   every period the next `slice_size` images run through the model without gradient,
                  and their moments are averaged into the reference with `slice_momentum`.
        "ride"    every period the next slice is appended to the input of `ride_on`, and dropped
                  from its output; layers outside of `ride_on` take "slice".

    Several workers (torch.distributed) share a slice: each runs ceil(slice_size / workers) images
    of its own; a whole reference is run by every worker. Either way one all-reduce of all layers'
    moments makes the references equal; no other step communicates, but those in which a layer that
    the reference batch did not reach (a head without RoIs) takes its first batch as reference.

    Args:
        model: holds the RefBatchNorm2d layers; not wrapped by DistributedDataParallel.
        samples: the reference images, as the training pipeline gave them.
        forward: runs the model on a list of samples (under autocast where training does). Called in
            training mode and without gradient; what it returns is dropped.
        options: see `refbn_d2.config.refbn_options`.
        identity: what `select_reference` returned.
        ride_on: the module that a slice rides in ("ride" alone): a detector's backbone, or a
            classifier itself. Its first argument is the batch (N, C, H, W), and every tensor that
            it returns has N rows.
        rows: (samples, batch) -> their rows (k, C, H, W), normalised, as large as the batch's
            ("ride" alone).

    Raises:
        ValueError: the model has no RefBatchNorm2d, "ride" has nothing to ride on, or workers hold
            different reference batches.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Sequence[Sample],
        forward: Callable[[list[Sample]], Any],
        options: RefBNOptions,
        identity: dict,
        ride_on: nn.Module | None = None,
        rows: Callable[[list[Sample], Tensor], Tensor] | None = None,
    ) -> None:
        self.model, self.samples, self.forward = model, list(samples), forward
        self.options = options
        self.identity = {key: value for key, value in identity.items() if key != "position"}
        self.position = 0  # of the next slice
        self._layers = dict(refbn_layers(model))
        self._riders: dict[str, RefBatchNorm2d] = {}
        self._riding: list[Sample] = []
        self._beside: dict[str, Moments | None] = {}  # recorded in other layers than the riders
        self._missed: list[RefBatchNorm2d] = []  # without a reference so far
        _check_same_on_all_workers(identity)
        if not self._layers:
            raise ValueError("The model has no RefBatchNorm2d layer that could take a reference.")
        if options.refresh == "ride":
            if ride_on is None or rows is None:
                raise ValueError(
                    'MODEL.REFBN.REFRESH "ride" needs a module to ride on; use "slice".'
                )
            riders = {id(layer) for _, layer in refbn_layers(ride_on)}
            self._riders = {n: m for n, m in self._layers.items() if id(m) in riders}
            self._rows = rows
            ride_on.register_forward_pre_hook(self._append_rows)
            ride_on.register_forward_hook(self._drop_rows)

    def begin(self) -> None:
        """Before the first step of a run: every layer gets its reference, by options.reference.

        "dataset": `capture`. "checkpoint": the layers keep the reference that a checkpoint brought
        (a BN checkpoint's is its running statistics); those without one take the batch's.

        Raises:
            ValueError: "checkpoint", and no layer has a reference.
        """
        without = list(self._layers)
        if self.options.reference == "dataset":
            self.capture()
        else:
            without = [name for name, m in self._layers.items() if not m.has_reference()]
            if len(without) == len(self._layers):
                raise ValueError(
                    'MODEL.REFBN.REFERENCE is "checkpoint", but no RefBN layer has got a reference:'
                    ' name a checkpoint that has one in MODEL.WEIGHTS, or set it to "dataset".'
                )
            if without:
                recorded = self._run(self.samples, "slice")  # others normalise by what they have
                self._commit({name: recorded[name] for name in without}, captured=True)
        logger.info(
            "Captured the reference batch in %d of %d layers: %d images of %s, seed %d.",
            len(without), len(self._layers), len(self.samples), self.identity["dataset"],
            self.options.seed,
        )  # fmt: skip

    def capture(self) -> None:
        """Every layer normalises the reference by the reference's own moments, and keeps them.

        No parameter, gradient, running statistic, training flag or random state changes.
        """
        self._commit(self._run(self.samples, "capture"), captured=True)

    def before_step(self, iteration: int) -> None:
        """To be called before the training step's forward pass."""
        if self._riding:  # left by a step that failed
            self._riding = []
            _take_recorded(self._riders)
        refresh = self.options.refresh
        if refresh == "static" or iteration % self.options.refresh_period:
            return
        if refresh == "full":
            if iteration > 0:  # training starts with a capture
                self.capture()
            return
        samples = self._next_slice()
        recorded: dict[str, Moments | None] = {}
        if len(self._riders) < len(self._layers):
            recorded = self._run(samples, "slice")
        if not self._riders:
            self._commit(recorded)
            return
        self._riding = samples
        self._beside = {n: m for n, m in recorded.items() if n not in self._riders}
        for layer in self._riders.values():
            layer.record_pass("ride", len(samples), self.options.slice_momentum)

    def after_step(self) -> None:
        """To be called after the training step's backward pass."""
        if self._riding:
            self._riding = []
            self._commit(self._beside | _take_recorded(self._riders))
        if self._missed:
            self._share_first_batches()

    def state_dict(self) -> dict:
        """Identity and position, in plain containers; the moments are in the model's state dict."""
        return {**self.identity, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        """Take the position; the batch must be the one that `state` names (`select_reference`)."""
        self.position = state["position"]
        self._missed = [layer for layer in self._layers.values() if not layer.has_reference()]

    def _next_slice(self) -> list[Sample]:
        rank, workers = _rank_and_workers()
        share = -(-self.options.slice_size // workers)
        start = self.position + rank * share
        self.position = (self.position + workers * share) % len(self.samples)
        return [self.samples[(start + i) % len(self.samples)] for i in range(share)]

    def _run(self, samples: list[Sample], record: str) -> dict[str, Moments | None]:
        """What the layers recorded in one pass of the model over `samples`."""
        for layer in self._layers.values():
            layer.record_pass(record)
        try:
            with _untouched(self.model, self.options.seed):
                self.forward(samples)
        finally:
            recorded = _take_recorded(self._layers)
        return recorded

    def _commit(self, recorded: dict[str, Moments | None], captured: bool = False) -> None:
        """What was recorded enters the references, the same on every worker."""
        layers = [self._layers[name] for name in recorded]
        # A whole reference is run by every worker: its count is theirs on average.
        pooled = _over_all_workers(list(recorded.values()), layers, average_count=captured)
        for layer, moments in zip(layers, pooled, strict=True):
            if moments is not None:
                layer.commit(moments, 1.0 if captured else self.options.slice_momentum)
        missed = [name for name, moments in zip(recorded, pooled, strict=True) if moments is None]
        if captured and missed:
            self._missed = [m for n in missed if not (m := self._layers[n]).has_reference()]
            logger.warning(
                "The reference batch did not reach %s (no RoIs, or not in training mode). Without "
                "a reference a layer takes its first training batch that is not empty.",
                ", ".join(missed),
            )

    def _share_first_batches(self) -> None:
        """Layers that took their first batch as the reference take it over all workers."""
        firsts = [
            Moments(layer.ref_mean, layer.ref_var, int(layer.ref_count))
            if layer.has_reference()
            else None
            for layer in self._missed
        ]
        pooled = _over_all_workers(firsts, self._missed, average_count=False)
        for layer, moments in zip(self._missed, pooled, strict=True):
            if moments is not None:
                layer.commit(moments)
        self._missed = [m for m, p in zip(self._missed, pooled, strict=True) if p is None]

    def _append_rows(self, module: nn.Module, args: tuple) -> tuple | None:
        if not (self._riding and module.training):
            return None
        batch, *rest = args
        rows = self._rows(self._riding, batch).to(batch)
        if batch.is_contiguous(memory_format=torch.channels_last):
            rows = rows.contiguous(memory_format=torch.channels_last)
        return torch.cat([batch, rows]), *rest

    def _drop_rows(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if not (self._riding and module.training):
            return None
        return _without_last(output, len(self._riding))


def _without_last(output: Any, k: int) -> Any:
    if isinstance(output, Tensor):
        return output[:-k]
    if isinstance(output, dict):
        return {key: _without_last(value, k) for key, value in output.items()}
    return type(output)(_without_last(value, k) for value in output)


def _rank_and_workers() -> tuple[int, int]:
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def _check_same_on_all_workers(identity: dict) -> None:
    workers = _rank_and_workers()[1]
    if workers == 1:
        return
    identities: list = [None] * workers
    dist.all_gather_object(identities, identity)
    first = identities[0]
    for rank, other in enumerate(identities):
        if other == first:
            continue
        images = zip(other["images"], first["images"], strict=False)
        differences = [(other[key], first[key]) for key in ("dataset", "seed")]
        differences += [*images, (len(other["images"]), len(first["images"]))]
        theirs, ours = next((a, b) for a, b in differences if a != b)
        raise ValueError(
            f"Worker {rank} has another reference batch than worker 0: {theirs} against {ours}. "
            "All workers need the same config, datasets and files."
        )


def _take_recorded(layers: dict[str, RefBatchNorm2d]) -> dict[str, Moments | None]:
    recorded = {name: layer.recorded for name, layer in layers.items()}
    for layer in layers.values():
        layer.stop_recording()
    return recorded


def _over_all_workers(
    recorded: list[Moments | None], layers: list[RefBatchNorm2d], average_count: bool
) -> list[Moments | None]:
    """Each layer's moments pooled over the workers by count, in one all-reduce."""
    workers = _rank_and_workers()[1]
    if workers == 1:
        return recorded
    sums = []  # count, count mean, count E[x^2] of every layer
    for moments, layer in zip(recorded, layers, strict=True):
        if moments is None:
            sums.append(layer.ref_mean.new_zeros(1 + 2 * layer.num_features, dtype=torch.float64))
        else:
            mean, var = moments.mean.double(), moments.var.double()
            one = mean.new_ones(1)
            sums.append(moments.count * torch.cat([one, mean, var + mean.square()]))
    flat = torch.cat(sums)
    dist.all_reduce(flat)
    pooled: list[Moments | None] = []
    for part in flat.split([len(s) for s in sums]):
        if part[0] == 0:
            pooled.append(None)
            continue
        mean, square = (part[1:] / part[0]).chunk(2)
        count = int(part[0]) // (workers if average_count else 1)
        pooled.append(Moments(mean, (square - mean.square()).clamp(min=0), count))
    return pooled


@contextmanager
def _untouched(model: nn.Module, seed: int) -> Iterator[None]:
    """The model in training mode without gradient; all else of it stays as it was.

    Buffers, and what modules keep as plain numbers: training flags, RetinaNet's loss normaliser.
    Seeded, so that every worker samples the same.
    """

    def numbers(module: nn.Module) -> dict[str, float]:
        return {key: value for key, value in vars(module).items() if isinstance(value, int | float)}

    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    before = [(module, numbers(module)) for module in model.modules()]
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with seeded(seed, devices), torch.no_grad():
        try:
            if not model.training:
                model.train()
            yield
        finally:
            for module, values in before:
                for name in numbers(module).keys() - values.keys():
                    delattr(module, name)
                vars(module).update(values)
            for buffer, value in buffers:
                buffer.copy_(value)
