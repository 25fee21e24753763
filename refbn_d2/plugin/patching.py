"""Replace a function of another package for whoever imported it, before or after."""

import types
from collections.abc import Callable

originals: dict[str, Callable] = {}  # the functions as they were, by name


def replace_code(function: types.FunctionType, replacement: types.FunctionType):
    originals[function.__name__] = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__
    )
    code, function.__code__ = function.__code__, replacement.__code__
    return lambda: setattr(function, "__code__", code)


def replace_attribute(owner: type, name: str, value) -> Callable[[], None]:
    old = vars(owner)[name]
    setattr(owner, name, value)
    return lambda: setattr(owner, name, old)
