"""Mutated files are read or refused, and nothing else happens; `fuzz.py` runs for longer."""

import time

import pytest

from tests.checkpoint.fuzz import SEEDS, check, fuzz


@pytest.mark.parametrize("seed", range(len(SEEDS)))
def test_the_sound_files_are_read_as_far_as_they_go(tmp_path, seed):
    """A ResNet's are read to the end. The others hold two tensors, which are not a ResNet."""
    data = SEEDS[seed]
    suffix = ".safetensors" if data[8:9] == b"{" else ".pkl"
    assert check(tmp_path, suffix, data) == (len(data) > 10_000)


def test_mutated_files_are_read_or_refused():
    counts = fuzz(150)
    assert counts["files"] >= 150


@pytest.mark.slow
def test_mutated_files_are_read_or_refused_for_minutes():
    end, seed = time.monotonic() + 180, 1
    while time.monotonic() < end:
        assert fuzz(500, seed)["files"]
        seed += 1
