"""Replace a function of another package for all its importers, earlier and later ones."""

import types
from collections.abc import Callable

originals: dict[str, Callable] = {}  # the original functions, by name


def replace_code(function: types.FunctionType, replacement: types.FunctionType):
    """Replace the code of `function`, and keep the original in `originals`; return the undo."""
    originals[function.__name__] = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    code, function.__code__ = function.__code__, replacement.__code__
    return lambda: setattr(function, "__code__", code)


def replace_attribute(owner: type, name: str, value) -> Callable[[], None]:
    """Set the attribute `name` of the class `owner`; return the undo."""
    old = vars(owner)[name]
    setattr(owner, name, value)
    return lambda: setattr(owner, name, old)
