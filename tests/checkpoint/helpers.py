"""Weights and files that the tests of checkpoints share."""

import pickle

import torch


def assert_same(tensors, expected):
    assert list(tensors) == list(expected)
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, torch.as_tensor(expected[name]), rtol=0, atol=0)


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "stem.conv1.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "stem.conv1.norm.num_batches_tracked": torch.tensor(7),
        "linear.bias": torch.randn(5, generator=generator).half(),
    }


def write(path, data):
    if path.suffix == ".pkl":
        with open(path, "wb") as file:
            pickle.dump(data, file)
    else:
        torch.save(data, path)
