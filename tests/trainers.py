"""What the tests of both trainers share: runs that are killed, and runs as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from tests.device import DEVICE

ROOT = Path(__file__).parents[1]


class Killed(BaseException):
    pass


def kill_at(monkeypatch, trainer, iteration):
    """End the run of this class of trainer as SIGKILL does: nothing is written afterwards."""
    step = trainer.step

    def dying_step(self, i, batch):
        if i == iteration:
            raise Killed
        return step(self, i, batch)

    monkeypatch.setattr(trainer, "step", dying_step)


def assert_same(a, b):
    """Require equal tensors; on a GPU close ones, since it adds in no fixed order."""
    assert a.keys() == b.keys()
    if DEVICE != "cpu":
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.002)
        return
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def start_tool(script, cfg, tmp_path, *arguments, launcher=(), **options):
    """Start tools/`script` on `cfg`, under torchrun or another launcher if there is one."""
    config_file = tmp_path / "config.yaml"
    config_file.write_text(cfg.dump())
    command = [*(launcher or [sys.executable]), str(ROOT / "tools" / script)]
    command += ["--config-file", str(config_file), *arguments]
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, **options)
