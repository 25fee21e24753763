"""The device of the tests that train: `TEST_DEVICE=cuda pytest` runs them on a GPU."""

import os

import pytest
import torch

DEVICE = os.environ.get("TEST_DEVICE", "cpu")

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="of the CPU, or exact only there")
two_devices = pytest.mark.skipif(
    DEVICE != "cpu" and torch.cuda.device_count() < 2, reason="needs two GPUs"
)
