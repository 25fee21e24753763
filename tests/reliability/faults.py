"""What happens to a run at a random moment, and how it is undone."""

import ctypes
import os
import random
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path


class Fault:
    """Nothing; the base class of what can happen.

    Args:
        rng: draws what the fault leaves open.
        data: the folder with the pictures.
        out: the folder that the run writes to.
    """

    name = "nothing"

    def __init__(self, rng: random.Random, data: Path, out: Path) -> None:
        self.rng, self.data, self.out = rng, data, out

    def prepare(self) -> Callable[[], None] | None:
        """Prepare the folders; return what each program calls when it starts."""

    def strike(self, process: subprocess.Popen) -> None:
        """Do it, to the leader of a process group."""

    def undo(self) -> None:
        """Repair it."""

    def ends_by(self) -> set[int]:
        """Return the exit codes that need no sentence."""
        return {0}


class _Signal(Fault):
    number = 0

    def strike(self, process: subprocess.Popen) -> None:
        to_all = self.rng.random() < 0.5
        self.name = f"{type(self).name} to {'the group' if to_all else 'the process'}"
        (os.killpg if to_all else os.kill)(process.pid, self.number)

    def ends_by(self) -> set[int]:
        return {0, -self.number, 128 + self.number}


class Kill(_Signal):
    name, number = "SIGKILL", signal.SIGKILL


class Terminate(_Signal):
    name, number = "SIGTERM", signal.SIGTERM


class Interrupt(_Signal):
    name, number = "SIGINT", signal.SIGINT


class FullDisk(Fault):
    """A small disk in memory that another program fills."""

    name = "full disk"
    SIZE = 64  # MiB

    def prepare(self) -> None:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={self.SIZE}m,mode=777", "tmpfs", self.out]
        subprocess.run(mount, check=True, capture_output=True)

    def strike(self, process: subprocess.Popen) -> None:
        with open(self.out / "of_another_program", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                pass

    def undo(self) -> None:
        (self.out / "of_another_program").unlink(missing_ok=True)

    @staticmethod
    def is_possible(folder: Path) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
        try:
            possible = subprocess.run(command, capture_output=True).returncode == 0
        except FileNotFoundError:
            return False
        if possible:
            subprocess.run(["umount", folder], check=True)
        return possible


class FileSizeLimit(Fault):
    """No file may grow beyond a random size: where nothing can be mounted, as on a full disk."""

    name = "file size limit"

    def strike(self, process: subprocess.Popen) -> None:
        limit = self.rng.randrange(0, 1 << 18)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))


class ReadOnly(Fault):
    """The folders that the run writes to lose their permission to write."""

    name = "read-only folder"

    def prepare(self) -> Callable[[], None] | None:
        return _obey_permissions if os.getuid() == 0 else None

    def strike(self, process: subprocess.Popen) -> None:
        self._permit(0o555)

    def undo(self) -> None:
        self._permit(0o755)

    def _permit(self, mode: int) -> None:
        for folder in [self.out, *(path for path in self.out.rglob("*") if path.is_dir())]:
            folder.chmod(mode)


def _obey_permissions() -> None:
    """Give up root's CAP_DAC_OVERRIDE, which ignores permission bits."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    libc = ctypes.CDLL(None, use_errno=True)
    libc.capget(header, sets)
    for i in range(3):
        sets[i] &= ~(1 << 1)
    if libc.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


class VanishedImage(Fault):
    name = "vanished image"

    def strike(self, process: subprocess.Popen) -> None:
        self.image = self.rng.choice(sorted(self.data.rglob("*.png")))
        self.image.rename(self.image.with_suffix(".away"))

    def undo(self) -> None:
        self.image.with_suffix(".away").rename(self.image)


def faults(folder: Path) -> tuple[type[Fault], ...]:
    """Return the faults that are possible here; `folder` is empty."""
    disk = FullDisk if FullDisk.is_possible(folder) else FileSizeLimit
    return Kill, Terminate, Interrupt, disk, ReadOnly, VanishedImage
