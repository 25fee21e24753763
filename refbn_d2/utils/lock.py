"""Lock a folder for one program, so that two do not write into the same files."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from refbn_d2.utils.errors import ConfigError
from refbn_d2.utils.file_io import naming

NAME = "run.lock"


@contextmanager
def locked(folder: str | os.PathLike, key: str = "OUTPUT_DIR") -> Iterator[None]:
    """Hold `folder`/run.lock, which names this host and process, and remove it at the end.

    SIGTERM, where nobody else handles it, removes the lock and ends the process. SIGINT raises
    KeyboardInterrupt, also where the parent process ignores it. The lock of a process of this host
    that has ended is replaced. A file that is created exclusively is a lock on network file systems
    too.

    Args:
        key: the config key or flag that chooses the folder, for the message.

    Raises:
        ConfigError: another process holds the lock; names its host and number.
        OSError: the folder cannot be written.
    """
    path = Path(folder) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    owner = _create(path, key)
    try:
        with _ending_at_signals(path, owner):
            yield
    finally:
        _remove(path, owner)


def check_free(folder: str | os.PathLike, key: str = "OUTPUT_DIR") -> None:
    """Check that no process holds the lock of `folder`; remove that of one that has ended.

    Raises:
        ConfigError: as `locked`.
    """
    _remove_if_stale(Path(folder) / NAME, key)


def _remove(path: Path, owner: str) -> None:
    with suppress(OSError):  # in a folder that cannot be written any more, it stays
        if _read(path) == owner:
            path.unlink()


@contextmanager
def _ending_at_signals(path: Path, owner: str) -> Iterator[None]:
    pid = os.getpid()

    def end(number: int, frame: object) -> None:
        # No exception: it would break into whatever runs, and libraries catch it.
        if os.getpid() == pid:  # not a fork's
            _remove(path, owner)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if before[signal.SIGTERM] == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, end)
    if before[signal.SIGINT] == signal.SIG_IGN:  # as a shell does for "command &" in a script
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _create(path: Path, key: str) -> str:
    """Create the lock of this process, and return its content."""
    owner = f"{socket.gethostname()} {os.getpid()} {_start_of(os.getpid())}\n"
    for _ in range(3):  # more only if other processes take the lock over at the same time
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            _remove_if_stale(path, key)
            continue
        try:
            with naming(path):
                os.write(file, owner.encode())
        except OSError:  # the disk is full
            path.unlink()
            raise
        finally:
            os.close(file)
        return owner
    raise ConfigError(f"{path} is contested by several processes: start one at a time.")


def _remove_if_stale(path: Path, key: str) -> None:
    """Remove the lock of a process that has ended.

    Raises:
        ConfigError: the process has not ended, or is of another host.
    """
    owner = _read(path)
    if owner == "":  # it may be about to be written
        time.sleep(1)
        owner = _read(path)
    if owner is None:  # removed meanwhile
        return
    host, pid, start = (*owner.split(), "", "", "")[:3]
    here = host == socket.gethostname()
    if owner and (not here or (pid.isdigit() and start and _start_of(int(pid)) == start)):
        what = "Wait until it ends, or stop it" if here else f"If it has ended, remove {path}"
        raise ConfigError(
            f"{path.parent} is in use by process {pid} on host {host}, as {path} says. {what}; or "
            f"choose another {key}."
        )
    aside = path.with_name(f".{NAME}.{os.getpid()}.tmp")  # a name that `remove_unfinished` knows
    try:
        os.rename(path, aside)
    except FileNotFoundError:  # another process was faster
        return
    if _read(aside) != owner:  # it was, and this is its new lock
        os.rename(aside, path)
    aside.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _start_of(pid: int) -> str:
    """Return when a process started, to recognize a number that is used again; "" if it ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    state, *rest = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]
