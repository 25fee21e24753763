"""Find the convolution whose output a norm takes: by torch.fx tracing, or by watching a run."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

Conv = nn.Conv2d | nn.ConvTranspose2d


class Calls:
    """Record which modules take the outputs of convolutions, over all calls of a forward pass."""

    def __init__(self) -> None:
        self.users: dict[nn.Module, list] = defaultdict(list)  # of a conv: norms; None: others
        self.sources: dict[nn.Module, list] = defaultdict(list)  # of a norm: convs; None: others

    def only_before(self, norm: nn.Module) -> Conv | None:
        """Return the convolution that feeds this norm and only it, or None.

        All inputs of the norm are outputs of that convolution, and nothing else takes these.
        """
        sources = set(self.sources[norm])
        conv = sources.pop() if len(sources) == 1 else None
        return conv if conv is not None and set(self.users[conv]) == {norm} else None


def trace_calls(model: nn.Module, norms: set[nn.Module]) -> Calls:
    """Return the calls that torch.fx traces in `model`.

    Raises:
        ValueError: torch.fx cannot trace the model.
    """

    def is_plain_conv(m: nn.Module | None) -> bool:
        return isinstance(m, Conv) and type(m).forward in (
            nn.Conv2d.forward,
            nn.ConvTranspose2d.forward,
        )

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            return m in norms or is_plain_conv(m) or super().is_leaf_module(m, name)

    try:
        graph = Tracer().trace(model)
    except Exception as error:  # a forward pass may raise anything when it meets proxies
        raise ValueError(
            f"torch.fx cannot trace {type(model).__name__} ({error}). Pass example_inputs: the "
            "model is then run on them to find the convolution before each norm."
        ) from error

    def module(node: Any) -> nn.Module | None:
        called = isinstance(node, fx.Node) and node.op == "call_module"
        return model.get_submodule(node.target) if called else None

    calls = Calls()
    for node in graph.nodes:
        if (called := module(node)) in norms:
            source = module((*node.args, *node.kwargs.values())[0])
            calls.sources[called].append(source if is_plain_conv(source) else None)
        elif called is not None and is_plain_conv(called):
            users = (module(user) for user in node.users)
            calls.users[called] += [user if user in norms else None for user in users]
    return calls


def observe_calls(model: nn.Module, norms: set[nn.Module], example_inputs: Any) -> Calls:
    """Return the calls seen while `model` runs on `example_inputs` (an argument, or a tuple)."""
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
    """Follow the outputs of convolutions through a run, by the identity of tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.convs = {
            id(m._parameters["weight"]): m
            for m in model.modules()
            if isinstance(m, Conv) and "weight" in m._parameters  # not computed from others
        }
        self.outputs: dict[int, tuple[Tensor, Conv]] = {}  # kept alive: no id is reused
        self.calls = Calls()
        self.in_norm = False

    def source(self, tensor: Any) -> Conv | None:
        return self.outputs[id(tensor)][1] if id(tensor) in self.outputs else None

    def use(self, values: Any) -> None:
        """Note that something other than a norm takes these values."""
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
    """Return whether `func` only asks for a tensor's shape and the like, not for its values."""
    return getattr(func, "__name__", "") in _QUESTIONS and not isinstance(result, Tensor)


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
