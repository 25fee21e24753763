import os
import subprocess
import sys

import pytest
import torch

from refbn_d2.utils.file_io import naming, remove_unfinished, write_text


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    """A real process is killed in the middle of a file."""
    code = """
import os, sys
from refbn_d2.utils.file_io import written_whole
from pathlib import Path
with written_whole(Path(sys.argv[1])) as file:
    file.write(b"half")
    os.kill(os.getpid(), 9)
"""
    write_text(tmp_path / "model.pth", "whole")
    command = [sys.executable, "-c", code, str(tmp_path / "model.pth")]
    assert subprocess.run(command).returncode == -9
    assert len(os.listdir(tmp_path)) == 2
    remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == ["model.pth"]
    assert (tmp_path / "model.pth").read_text() == "whole"


def test_a_text_is_written_whole(tmp_path):
    write_text(tmp_path / "folder" / "last_checkpoint", "modèle.pth")
    write_text(tmp_path / "folder" / "last_checkpoint", "model.pth")
    assert (tmp_path / "folder" / "last_checkpoint").read_text() == "model.pth"
    with pytest.raises(AttributeError):
        write_text(tmp_path / "folder" / "last_checkpoint", None)
    assert (tmp_path / "folder" / "last_checkpoint").read_text() == "model.pth"
    assert os.listdir(tmp_path / "folder") == ["last_checkpoint"]


@pytest.mark.parametrize("kind", ["pth", "pkl"])
def test_a_full_disk_is_named_with_the_file(tmp_path, kind):
    """/dev/full takes nothing. torch.save raises a RuntimeError for it."""
    data = {"model": {"w": torch.zeros(100_000)}}
    with pytest.raises(OSError, match=f"No space left on device: 'x.{kind}'"):
        with naming(f"x.{kind}"), open("/dev/full", "wb") as file:
            torch.save(data, file) if kind == "pth" else file.write(bytes(100_000))


@pytest.mark.parametrize("error", [FileNotFoundError(2, "no", "a.png"), RuntimeError("a bug")])
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as raised, naming("x"):
        raise error
    assert raised.value is error
