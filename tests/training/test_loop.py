"""The training loop on a model with one weight: the order of its work, and its end."""

import json
import math
import os
import re
import signal
import time

import pytest
import torch
from torch import nn

from refbn_d2.checkpoint.files import load_checkpoint
from refbn_d2.config.cfg_node import CfgNode
from refbn_d2.training import interruption
from refbn_d2.training.loading_errors import loading_explained
from refbn_d2.training.loop import TrainingLoop
from refbn_d2.training.main import run_training
from refbn_d2.utils import distributed
from refbn_d2.utils.errors import DataError, DivergedError, WorkerKilledError
from refbn_d2.utils.torch_compat import grad_scaler
from tests.versions import needs


class Toy(TrainingLoop):
    """y = x w with w = 1 at first; every step subtracts the gradient, the mean of x."""

    def __init__(self, output_dir, *, scaler=False, **schedule):
        self.happened = []
        output_dir.mkdir(exist_ok=True)
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        settings = {"start_iteration": 0, "max_iter": 6, "checkpoint_period": 100, "eval_period": 0}
        super().__init__(
            cfg=CfgNode(),
            output_dir=output_dir,
            model=model,
            loader=iter(lambda: torch.full((1, 1), 0.01), None),
            optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
            scaler=grad_scaler("cpu", scaler, init_scale=4.0),
            reference=None,
            seed=0,
            **settings | schedule,
        )

    def step(self, iteration, batch):
        self.happened.append(f"step {iteration}")
        self.optimizer.zero_grad()
        loss = self.loss(iteration, self.wrapped(batch).mean())
        self.scaler.scale(loss).backward()
        measured = self.read_losses(iteration, {"total_loss": loss})
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return 1.0, measured

    def loss(self, iteration, loss):
        return loss

    def evaluate(self):
        self.happened.append("evaluate")
        self.model.eval()
        return {"score": 7.0}

    def save(self, iteration):
        self.happened.append(f"save {iteration}")
        super().save(iteration)


def test_order_of_a_run(tmp_path):
    toy = Toy(tmp_path / "out", checkpoint_period=2, eval_period=3)
    assert toy.train() == {"score": 7.0}
    assert toy.happened == [
        "step 0", "step 1", "save 1", "step 2", "save 2", "evaluate", "step 3", "save 3",
        "step 4", "step 5", "save 5", "evaluate",
    ]  # fmt: skip
    assert toy.model.weight.item() == pytest.approx(1 - 6 * 0.01)
    names = {path.name for path in (tmp_path / "out").glob("*.pth")}
    assert names == {f"model_000000{i}.pth" for i in (1, 2, 3)} | {"model_final.pth"}
    lines = (tmp_path / "out" / "metrics.json").read_text().splitlines()
    assert [json.loads(line).get("score") for line in lines] == [7.0, None, 7.0]


def test_a_finished_run_is_only_evaluated(tmp_path):
    toy = Toy(tmp_path / "out", start_iteration=6)
    assert toy.train() == {"score": 7.0} and toy.happened == ["evaluate"]


@pytest.mark.parametrize("eval_period, saved", [(3, "model_0000002.pth"), (0, "model_final.pth")])
def test_an_evaluation_that_fails_loses_nothing(tmp_path, monkeypatch, eval_period, saved):
    """At EVAL_PERIOD and at the end, the checkpoint has the weights of that step."""
    monkeypatch.setattr(Toy, "evaluate", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Toy(tmp_path / "out", eval_period=eval_period).train()
    assert (tmp_path / "out" / "last_checkpoint").read_text() == saved
    checkpoint = load_checkpoint(tmp_path / "out" / saved)
    steps = checkpoint["iteration"] + 1
    assert steps == (3 if eval_period else 6)
    assert checkpoint["model"]["weight"].item() == pytest.approx(1 - steps * 0.01)


def infinite_gradient(self, iteration, loss):
    """Return a finite loss whose derivative at iteration 3 is that of a square root at 0."""
    return loss + (loss - loss.detach()).sqrt() if iteration == 3 else loss


def test_an_infinite_gradient_of_a_finite_loss_stops_before_the_weights_change(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(Toy, "loss", infinite_gradient)
    toy = Toy(tmp_path / "out", checkpoint_period=2)
    with pytest.raises(DivergedError, match="at iteration 3: a gradient.*model_0000001.pth"):
        toy.train()
    assert toy.model.weight.item() == pytest.approx(1 - 3 * 0.01)
    assert toy.happened[-1] == "step 3"


@needs("torch", 2, 3, "a gradient scaler on the CPU")
def test_a_gradient_scaler_leaves_out_a_step_that_overflows(tmp_path, monkeypatch):
    """float16 overflows in its first steps, until the scale fits; the run must not stop."""
    monkeypatch.setattr(Toy, "loss", infinite_gradient)
    toy = Toy(tmp_path / "out", scaler=True)
    toy.train()
    assert toy.model.weight.item() == pytest.approx(1 - 5 * 0.01)


def nan_on_worker_1(output_dir):
    """Run in two workers; step 3 ends with a checkpoint."""

    def loss(self, iteration, loss):
        return loss * math.nan if iteration == 3 and distributed.rank() == 1 else loss

    Toy.loss = loss
    try:
        Toy(output_dir, checkpoint_period=2).train()
    except DivergedError:
        if distributed.rank() == 1:
            time.sleep(2)  # give worker 0 the time to write a checkpoint
        raise


def test_nan_on_worker_1_stops_worker_0_before_it_writes_weights(tmp_path):
    """Both raise, and the last good checkpoint stays the last one."""
    with pytest.raises(DivergedError, match="at iteration 3: .*model_0000001.pth"):
        distributed.launch(nan_on_worker_1, 2, 1, 0, "auto", "cpu", (tmp_path / "out",))
    out = tmp_path / "out"
    assert (out / "last_checkpoint").read_text() == "model_0000001.pth"
    assert [path.name for path in out.glob("*.pth")] == ["model_0000001.pth"]
    assert math.isfinite(load_checkpoint(out / "model_0000001.pth")["model"]["weight"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(tmp_path, monkeypatch, value):
    monkeypatch.setattr(Toy, "loss", lambda self, i, loss: loss + value if i == 2 else loss)
    with pytest.raises(DivergedError, match=f"at iteration 2: .*'total_loss': {value}.*none yet"):
        Toy(tmp_path / "out").train()
    assert not list((tmp_path / "out").glob("*.pth"))


class Broken(torch.utils.data.Dataset):
    """Images of which none can be loaded."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if self.error is None:
            os.kill(os.getpid(), signal.SIGKILL)
        raise self.error


@pytest.mark.parametrize(
    "error, kind, message",
    [
        (None, WorkerKilledError, "DataLoader worker .pid.*NUM_WORKERS. Resume with --resume."),
        (DataError("a.png: DataError: no image"), DataError, "a.png: DataError: no image"),
        (FileNotFoundError(2, "gone", "a.png"), FileNotFoundError, r"\[Errno 2\] gone: 'a.png'"),
    ],
)
def test_what_ends_a_process_that_loads_data_is_one_sentence(tmp_path, error, kind, message):
    def job(cfg, output_dir, resume):
        return next(iter(torch.utils.data.DataLoader(Broken(error), num_workers=1)))

    cfg = CfgNode({"OUTPUT_DIR": str(tmp_path / "out"), "CUDNN_BENCHMARK": False})
    with pytest.raises(kind) as raised:
        run_training(cfg, job, job, (), resume=False, eval_only=False)
    assert re.fullmatch(message, str(raised.value))


def test_a_bug_in_a_process_that_loads_data_stays_one(tmp_path):
    with pytest.raises(KeyError, match="Original Traceback"), loading_explained():
        next(iter(torch.utils.data.DataLoader(Broken(KeyError("x")), num_workers=1)))


def test_signals_that_arrive_together_are_one_request(tmp_path, monkeypatch):
    """A batch system signals the launcher, which passes it on, and the worker."""
    monkeypatch.setattr(interruption, "AT_ONCE", 0.2)
    before = signal.getsignal(signal.SIGTERM)
    ended = []
    monkeypatch.setattr(os, "kill", lambda pid, number: ended.append((pid, number)))
    with interruption.stop_signal() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM and not ended
        time.sleep(0.3)
        signal.raise_signal(signal.SIGTERM)
        assert ended == [(os.getpid(), signal.SIGTERM)]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before
