"""Write files that appear whole or not at all, and read the JSON among them."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from refbn_d2.utils.errors import DataError


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Write `data` to `path`, whole or not at all; create the folders."""
    with written_whole(Path(path)) as file:
        file.write(data)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` to `path` in UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode())


def read_record(path: Path, kind: type, remedy: str) -> Any:
    """Return what a run's JSON file holds.

    Args:
        kind: dict or list, what it must hold.
        remedy: what to do if it does not, for the error: "delete it".

    Raises:
        DataError: it is not JSON, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is broken ({error}); {remedy}") from error
    if not isinstance(content, kind):
        raise DataError(f"{path} is broken (it holds no {kind.__name__}); {remedy}")
    return content


def read_metrics(metrics_json: Path) -> Iterator[dict[str, Any]]:
    """Yield {name: value} for each line of a metrics.json; an unfinished last line is left out.

    Raises:
        DataError: a line is not JSON, or holds something else.
    """
    lines = metrics_json.read_bytes().splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(f"{metrics_json}, line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise DataError(f"{metrics_json}, line {number} is {record!r}, not a dict of metrics.")
        yield record


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Remove the unfinished files in `folder` of runs that were killed while they wrote."""
    for temporary in Path(folder).glob(".*.tmp"):
        temporary.unlink(missing_ok=True)


@contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """Add `path` to an OSError without a file name, as writing to a full disk raises it.

    Raises:
        OSError: with `path`; also instead of the RuntimeError that torch.save raises for it.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError) and cause.errno and cause.filename is None:
            raise OSError(cause.errno, os.strerror(cause.errno), str(path)) from error
        raise


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file next to `path`, which replaces `path` at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # see remove_unfinished
    try:
        with naming(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
