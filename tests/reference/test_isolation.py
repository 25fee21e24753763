"""What a capture leaves as it was: the model, its gradients, and the random generators."""

import copy
import random
from collections import deque

import numpy as np
import pytest
import torch

from refbn_d2.reference.isolation import untouched
from tests.reference.helpers import images, make


@pytest.mark.parametrize("training", [True, False])
def test_capture_touches_nothing_but_the_reference(training):
    model, reference = make("static")
    model.train(training)
    model.backbone[1].eval()  # frozen by its owner
    model(images(1, 3)).backward()
    state = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    flags = [m.training for m in model.modules()]
    random_states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    reference.capture()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, state[k])}
    frozen = {"backbone.1.ref_mean", "backbone.1.ref_var", "backbone.1.ref_count"}
    captured = {"head.1.ref_mean", "head.1.ref_var", "head.1.ref_count"}
    assert changed == (captured if training else captured | frozen)
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))
    assert [m.training for m in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    assert np.random.get_state()[1].tolist() == random_states[2]


def test_a_number_that_a_forward_pass_sets_is_unset_again():
    """CBN reads its steps from a checkpoint at the first call; until then they are None."""

    class Counts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.steps, self.cached = None, torch.ones(1)

        def forward(self):
            self.steps, self.more, self.cached = 3, 4, None

    model = Counts()
    with untouched(model, 0):
        model()
    assert model.steps is None and not hasattr(model, "more") and hasattr(model, "cached")


def test_a_window_of_past_batches_stays_as_it_was():
    class Window(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.past = deque([1, 2], maxlen=2)

        def forward(self):
            self.past.append(3)

    model = Window()
    with untouched(model, 0):
        model()
        assert list(model.past) == [2, 3]
    assert list(model.past) == [1, 2] and model.past.maxlen == 2
