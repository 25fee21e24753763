import os
import subprocess
import sys

import pytest
import torch

from refbn_d2.utils.errors import DataError
from refbn_d2.utils.file_io import naming, read_metrics, read_record, remove_unfinished, write_text


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


@pytest.mark.parametrize("content", [b"", b'{"half": ', b"\xff\xfe", b"[1, 2]", b"null"])
def test_a_broken_record_is_named(content, tmp_path):
    file = tmp_path / "status.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"status\.json is broken \(.*\); delete it"):
        read_record(file, dict, "delete it")


def test_metrics_up_to_where_a_run_was_killed(tmp_path):
    file = tmp_path / "metrics.json"
    file.write_bytes(b'{"iteration": 0, "loss": 2.5}\n\n{"iteration": 1, "lo')
    assert list(read_metrics(file)) == [{"iteration": 0, "loss": 2.5}]
    file.write_bytes(b'{"iter\n{"iteration": 1, "loss": 2.0}\n')
    with pytest.raises(DataError, match=r"metrics\.json, line 1 is not JSON"):
        list(read_metrics(file))
    file.write_bytes(b"[1]\n")
    with pytest.raises(DataError, match=r"line 1 is \[1\], not a dict"):
        list(read_metrics(file))
