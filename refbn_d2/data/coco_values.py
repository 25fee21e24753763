"""Read single values of a COCO json, also where people wrote them in another form."""

import re
from collections.abc import Collection, Hashable, Sequence

_NUMBER = re.compile(r"\s*[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?\s*")
_FLAGS = {"0": 0, "false": 0, "0.0": 0, "1": 1, "true": 1, "1.0": 1}


def number(value) -> float:
    """Return a finite number, also of a text that is one.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str) and _NUMBER.fullmatch(value) and len(value) < 400:
        value = float(value)
        value = int(value) if value.is_integer() and abs(value) < 2**53 else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        raise ValueError(value)
    return value


def flag(value) -> int:
    """Return 0 or 1 of a number, a bool or a text.

    Raises:
        ValueError: it is none of these.
    """
    try:
        return _FLAGS[str(value).strip().lower()]
    except KeyError:
        raise ValueError(value) from None


def known_id(value, known: Collection[Hashable]) -> Hashable | None:
    """Return the one of `known` that `value` means: 7 also means "7", and "7" also 7."""
    try:
        if value in known and not isinstance(value, bool):
            return value
        other = int(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else str(value)
        return other if other in known else None
    except (TypeError, ValueError):
        return None


def clip_box(box: Sequence[float], width: int, height: int) -> list[float]:
    """Return [x, y, w, h] clipped to its picture; a box inside stays as it is."""
    x, y, w, h = box
    right, bottom = x + w, y + h
    if x >= 0 and y >= 0 and right <= width and bottom <= height:
        return [x, y, w, h]
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(right, width), min(bottom, height)
    return [x0, y0, x1 - x0, y1 - y0]
