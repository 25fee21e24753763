"""Any model's norms: BatchNorm to RefBN and back, and folded into the convolutions.

At inference RefBN is an affine map a channel, as BatchNorm is: what `convert_from_refbn` and `fold`
return needs nothing of this package.
"""

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from refbn_d2.layers.ref_batch_norm import Moments, RefBatchNorm2d, refbn_layers

logger = logging.getLogger(__name__)

Conv = nn.Conv2d | nn.ConvTranspose2d
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


def convert_to_refbn(
    model: nn.Module, reference_weight: float | str = 0.9, gradient: str = "batch"
) -> nn.Module:
    """Replace every BatchNorm2d, SyncBatchNorm and FrozenBatchNorm2d in `model` by RefBatchNorm2d.

    In place but for the root: use the return value. Parameters stay the same objects, so that an
    optimizer's still hold (a frozen norm's buffers become parameters), and so do the running
    statistics. The reference starts from these, unless the norm has never seen a batch. Left alone,
    with a warning: norms without running statistics or bias, and subclasses with a forward of their
    own (timm's BatchNormAct2d).

    Args:
        reference_weight, gradient: as `RefBatchNorm2d`'s.

    Raises:
        ValueError: `reference_weight` or `gradient` is none of RefBatchNorm2d's.
    """

    def convert(norm: nn.Module) -> nn.Module | None:
        if isinstance(norm, RefBatchNorm2d) or not _is_norm(norm):
            return None
        mean, var = norm.running_mean, norm.running_var
        frozen = _is_frozen(norm)
        refbn = RefBatchNorm2d(
            len(mean),
            norm.eps,
            momentum=0.1 if frozen else norm.momentum,
            affine=norm.weight is not None,
            reference_weight=reference_weight,
            gradient=gradient,
            device=mean.device,
            dtype=mean.dtype,
        )
        refbn.weight = nn.Parameter(norm.weight) if frozen else norm.weight
        refbn.bias = nn.Parameter(norm.bias) if frozen else norm.bias
        _share_statistics(norm, refbn)
        if (mean != 0).any() or (var != 1).any():
            refbn.commit(Moments(mean, var, 1))
        return refbn.train(norm.training)

    left = [
        name
        for name, m in model.named_modules()
        if isinstance(m, _BATCH_NORMS) and not isinstance(m, RefBatchNorm2d) and not _is_norm(m)
    ]
    if left:
        logger.warning("Not converted to RefBatchNorm2d: %s", ", ".join(left))
    return replace_modules(model, convert)


def convert_from_refbn(
    model: nn.Module, norm: Callable[..., nn.Module] = nn.BatchNorm2d
) -> nn.Module:
    """Replace every RefBatchNorm2d in `model` by a `norm`; in eval mode the outputs are the same.

    In place but for the root: use the return value. For BatchNorm, parameters and running
    statistics stay the same objects; FrozenBatchNorm2d gets copies. Left alone, with a warning:
    subclasses with a forward of their own.

    Args:
        norm: nn.BatchNorm2d, nn.SyncBatchNorm, or torchvision's or Detectron2's FrozenBatchNorm2d.

    Raises:
        ValueError: `norm` is none of these.
    """

    def convert(refbn: nn.Module) -> nn.Module | None:
        if not isinstance(refbn, RefBatchNorm2d) or not _is_norm(refbn):
            return None
        new = norm(refbn.num_features, eps=refbn.eps)
        if _is_frozen(new):
            new.to(refbn.running_mean)
            for name in ("weight", "bias", "running_mean", "running_var"):
                if (value := getattr(refbn, name)) is not None:
                    getattr(new, name).copy_(value.detach())
        elif isinstance(new, _BATCH_NORMS):
            new.momentum, new.affine = refbn.momentum, refbn.affine
            new.weight, new.bias = refbn.weight, refbn.bias
            _share_statistics(refbn, new)
        else:
            raise ValueError(
                "norm must be BatchNorm2d, SyncBatchNorm or a FrozenBatchNorm2d, not "
                f"{type(new).__name__}."
            )
        return new.train(refbn.training)

    left = [name for name, m in refbn_layers(model) if not _is_norm(m)]
    if left:
        logger.warning("Not converted from RefBatchNorm2d: %s", ", ".join(left))
    return replace_modules(model, convert)


def _is_frozen(module: nn.Module) -> bool:
    """torchvision's, Detectron2's or another FrozenBatchNorm2d."""
    buffers = {"weight", "bias", "running_mean", "running_var"}
    return type(module).__name__ == "FrozenBatchNorm2d" and buffers <= dict(module._buffers).keys()


def _is_norm(module: nn.Module) -> bool:
    """A RefBN, BN, SyncBN or FrozenBN that is nothing else besides, with running statistics."""
    if _is_frozen(module):
        return True
    forward = type(module).forward
    return (
        isinstance(module, _BATCH_NORMS)
        and (
            forward in (nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward, RefBatchNorm2d.forward)
            or type(module).__name__ == "NaiveSyncBatchNorm"  # Detectron2's
        )
        and module.running_mean is not None
        and (module.weight is None) == (module.bias is None)
    )


def _share_statistics(source: nn.Module, target: nn.Module) -> None:
    target.running_mean, target.running_var = source.running_mean, source.running_var
    if getattr(source, "num_batches_tracked", None) is not None:
        target.num_batches_tracked = source.num_batches_tracked


def replace_modules(
    model: nn.Module, convert: Callable[[nn.Module], nn.Module | None]
) -> nn.Module:
    """Put `convert(m)` wherever a module m stands, one for one where m is shared; None keeps m.

    In place but for the root: use the return value.
    """
    new = {m: c for m in model.modules() if (c := convert(m)) is not None}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in new:
                setattr(parent, name, new[child])
    return new.get(model, model)


# ---- folding


def fold(model: nn.Module, example_inputs: Any = None) -> nn.Module:
    """A copy of `model` in eval mode, each norm folded into the convolution before it

        w <- w s,   b <- (b - mean) s + beta,   s = gamma / sqrt(var + eps)

    with the running statistics. nn.Identity takes the norm's place, and the outputs are the model's
    in eval mode. Which convolution precedes a norm is told by structure where the norm is the
    convolution's child `norm` (Detectron2's; tried on random input), else by tracing with torch.fx,
    else by running `example_inputs`. RefBN, BN, SyncBN and FrozenBN are folded; left, as BN, and
    listed in the log are those without a convolution before, and those whose convolution or whose
    self serves in other places too.

    Args:
        example_inputs: for models that torch.fx cannot trace (detectors): the model's argument, or
            a tuple of its arguments. It has to reach every norm that is to be folded.

    Raises:
        ValueError: norms are left to place, and torch.fx cannot trace the model, and there are no
            `example_inputs`.
    """
    model = copy.deepcopy(model).eval()
    names = {m: name for name, m in model.named_modules() if _is_norm(m)}
    children = [child for m in model.modules() for child in m._modules.values()]
    folded = set()
    for conv in model.modules():
        norm = conv._modules.get("norm")
        if (
            isinstance(conv, Conv)
            and norm in names
            and len(norm.running_mean) == conv.out_channels
            and children.count(norm) == 1
            and _is_foldable(conv, model)
            and _normalises_output(conv)
        ):
            _fuse(conv, norm)
            folded.add(norm)
    if remaining := names.keys() - folded:
        if example_inputs is None:
            calls = _trace(model, remaining)
        else:
            calls = _run(model, remaining, example_inputs)
        for norm in remaining:
            conv = calls.only_before(norm)
            if conv is not None and _is_foldable(conv, model):
                _fuse(conv, norm)
                folded.add(norm)
    model = replace_modules(model, lambda m: nn.Identity() if m in folded else None)
    left = [name for name, m in model.named_modules() if _is_norm(m) or isinstance(m, _BATCH_NORMS)]
    logger.info(
        "Folded %d norms into convolutions%s",
        len(folded),
        f"; left as they are: {', '.join(left)}" if left else "",
    )
    return convert_from_refbn(model)


def _is_foldable(conv: Conv, model: nn.Module) -> bool:
    """The weight is the convolution's own: not computed from others, and shared with none."""
    weight = conv._parameters.get("weight")
    owners = sum(p is weight for m in model.modules() for p in m._parameters.values())
    return weight is not None and owners == 1


def affine(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(scale, shift) (C,) in float64 on the CPU, for which a norm in eval mode is scale x + shift

        scale = weight / sqrt(var + eps),   shift = bias - mean scale

    None for `weight` and `bias` are ones and zeros.
    """

    def double(tensor: Tensor) -> Tensor:
        return tensor.to("cpu", torch.float64)

    scale = (double(var) + eps).rsqrt()
    if weight is not None:
        scale = scale * double(weight)
    shift = -double(mean) * scale
    if bias is not None:
        shift = shift + double(bias)
    return scale, shift


@torch.no_grad()
def _fuse(conv: Conv, norm: nn.Module) -> None:
    scale, shift = affine(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    bias = shift if conv.bias is None else shift + conv.bias.to(scale) * scale
    if isinstance(conv, nn.ConvTranspose2d):  # weight (in, out / groups, kH, kW)
        rows = conv.in_channels // conv.groups
        scale = scale.view(conv.groups, -1).repeat_interleave(rows, dim=0)[..., None, None]
    else:
        scale = scale.view(-1, 1, 1, 1)
    old = conv.weight
    conv.weight = nn.Parameter((old.to(scale) * scale).to(old), old.requires_grad)
    conv.bias = nn.Parameter(bias.to(old), old.requires_grad)


@torch.no_grad()
def _normalises_output(conv: Conv) -> bool:
    """Whether `conv.norm` comes right behind the convolution in `conv`, as random input tells."""
    probe = copy.deepcopy(conv).double()
    sides = [(k - 1) * d + 3 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, conv.in_channels, *sides, generator=generator).to(probe.weight)
    try:
        expected = probe(x)
    except Exception:  # a forward that is not Detectron2's, and wants something else
        return False
    _fuse(probe, probe.norm)
    probe.norm = nn.Identity()
    return bool((probe(x) - expected).abs().max() <= 1e-9 * expected.abs().max())


class _Calls:
    """Which convolutions' outputs go where, over all calls of a forward pass."""

    def __init__(self) -> None:
        self.users: dict[nn.Module, list] = defaultdict(list)  # of a conv: norms; None: others
        self.sources: dict[nn.Module, list] = defaultdict(list)  # of a norm: convs; None: others

    def only_before(self, norm: nn.Module) -> Conv | None:
        """The convolution whose outputs are this norm's inputs, one and all, and nothing else's."""
        sources = set(self.sources[norm])
        conv = sources.pop() if len(sources) == 1 else None
        return conv if conv is not None and set(self.users[conv]) == {norm} else None


def _trace(model: nn.Module, norms: set[nn.Module]) -> _Calls:
    def is_plain_conv(m: nn.Module) -> bool:
        return isinstance(m, Conv) and type(m).forward in (
            nn.Conv2d.forward,
            nn.ConvTranspose2d.forward,
        )

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return m in norms or is_plain_conv(m) or super().is_leaf_module(m, name)

    try:
        graph = Tracer().trace(model)
    except Exception as error:  # a forward pass raises what it likes when it meets proxies
        raise ValueError(
            f"torch.fx cannot trace {type(model).__name__} ({error}): pass example_inputs, for the "
            "convolution before each norm to be seen in a run."
        ) from error

    def module(node: Any) -> nn.Module | None:
        called = isinstance(node, fx.Node) and node.op == "call_module"
        return model.get_submodule(node.target) if called else None

    calls = _Calls()
    for node in graph.nodes:
        if (called := module(node)) in norms:
            source = module((*node.args, *node.kwargs.values())[0])
            calls.sources[called].append(source if is_plain_conv(source) else None)
        elif called is not None and is_plain_conv(called):
            users = (module(user) for user in node.users)
            calls.users[called] += [user if user in norms else None for user in users]
    return calls


def _run(model: nn.Module, norms: set[nn.Module], example_inputs: Any) -> _Calls:
    observer = _Observer(model)

    def enter(norm: nn.Module, args: tuple, kwargs: dict) -> None:
        conv = observer.source((*args, *kwargs.values())[0])
        observer.calls.sources[norm].append(conv)
        if conv is not None:
            observer.calls.users[conv].append(norm)
        observer.in_norm = True

    def leave(*_) -> None:
        observer.in_norm = False

    hooks = [norm.register_forward_pre_hook(enter, with_kwargs=True) for norm in norms]
    hooks += [norm.register_forward_hook(leave) for norm in norms]
    try:
        with torch.no_grad(), observer:
            args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
            observer.use(model(*args))
    finally:
        for hook in hooks:
            hook.remove()
    return observer.calls


class _Observer(TorchFunctionMode):
    """Follows the outputs of convolutions through a run, by the identity of tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.convs = {
            id(m._parameters["weight"]): m
            for m in model.modules()
            if isinstance(m, Conv) and "weight" in m._parameters  # not computed from others
        }
        self.outputs: dict[int, tuple[Tensor, Conv]] = {}  # kept, so that no id comes again
        self.calls = _Calls()
        self.in_norm = False

    def source(self, tensor: Any) -> Conv | None:
        return self.outputs[id(tensor)][1] if id(tensor) in self.outputs else None

    def use(self, values: Any) -> None:
        """Note that something else than a norm takes these."""
        for tensor in _tensors(values):
            for conv in (self.source(tensor), self.convs.get(id(tensor))):
                if conv is not None:
                    self.calls.users[conv].append(None)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = (*args, *kwargs.values())
        if func in (F.conv2d, F.conv_transpose2d) and id(inputs[1]) in self.convs:
            self.outputs[id(result)] = result, self.convs[id(inputs[1])]
            self.use([x for x in inputs if x is not inputs[1]])
        elif not self.in_norm and not _is_question(func, result):
            self.use(inputs)
        return result


_QUESTIONS = {
    *("__get__", "__len__", "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point")
}


def _is_question(func: Callable, result: Any) -> bool:
    """Asks a tensor for its shape and the like, and leaves its values alone."""
    return getattr(func, "__name__", "") in _QUESTIONS and not isinstance(result, Tensor)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
