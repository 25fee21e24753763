"""The harness of tests/reliability: it finds what is broken, and a few rounds of it pass."""

import random
import re

import pytest
import torch

from refbn_d2.checkpoint.files import save_checkpoint
from tests.reliability import __main__ as harness
from tests.reliability.faults import Fault, Interrupt, Kill, Terminate
from tests.reliability.rounds import Failure, new_folder, play, unbroken
from tests.reliability.targets import Target

# A run of 20 steps that adds the number of each step, and keeps (step, sum) in a file.
PROGRAM = """
import sys, time, torch
from pathlib import Path
from refbn_d2.checkpoint.files import load_checkpoint, save_checkpoint
from refbn_d2.utils.file_io import write_text
out, fault = Path(sys.argv[1]), sys.argv[2]
step, total = 0, 0
if (out / "last_checkpoint").exists():
    step, total = load_checkpoint(out / "model.pth")["model"]["w"].tolist()
if step and fault == "forgets":
    total -= 1
try:
    for step in range(int(step), 20):
        total += step
        save_checkpoint({"model": {"w": torch.tensor([step + 1, total])}}, out / "model.pth")
        write_text(out / "last_checkpoint", "model.pth")
        if step == 10 and (out.parent / "pause").exists():
            (out.parent / "pause").rename(out.parent / "paused")
            for _ in range(600):  # one long sleep misses a signal that comes just before it
                time.sleep(0.1)
except KeyboardInterrupt:
    if fault == "is cut off":
        (out / "model.pth").write_bytes((out / "model.pth").read_bytes()[:100])
    if fault == "points nowhere":
        (out / "last_checkpoint").write_text("")
    sys.exit("Stopped." if fault == "is silent" else "KeyboardInterrupt: stopped")
"""


class Toy(Target):
    name = fault = "toy"

    @staticmethod
    def make_data(root):
        (root / "a.png").touch()

    def prepare(self):
        (self.folder / "program.py").write_text(PROGRAM)

    def command(self):
        return [str(self.folder / "program.py"), str(self.out), self.fault]

    def weights(self):
        return {"w": torch.load(self.out / "model.pth")["model"]["w"]}


@pytest.fixture
def broken_by(tmp_path):
    """Return a function that plays a round of a toy with a weakness, and returns how it ended."""
    (tmp_path / "data").mkdir()
    Toy.make_data(tmp_path / "data")

    def play_one(kind, weakness="none"):
        class InTheMiddle(kind):
            def prepare(self):
                (self.out.parent / "pause").touch()

            def strike(self, process):
                while not (self.out.parent / "paused").exists():
                    assert process.poll() is None
                super().strike(process)

        Toy.fault = weakness
        expected, _ = unbroken(new_folder(Toy, tmp_path / "data", tmp_path / "unbroken"))
        assert expected["w"].tolist() == [20, sum(range(20))]
        one = new_folder(Toy, tmp_path / "data", tmp_path / "round")
        rng = random.Random(0)
        return play(one, InTheMiddle(rng, one.data, one.out), rng, 0, expected)

    return play_one


@pytest.mark.parametrize(
    "fault, how", [(Kill, "resumed"), (Terminate, "resumed"), (Interrupt, "a sentence, then resum")]
)
def test_a_program_that_keeps_its_promises(broken_by, fault, how):
    assert broken_by(fault).startswith(how)


@pytest.mark.parametrize(
    "fault, weakness, message",
    [
        (Interrupt, "points nowhere", "the last checkpoint '' does not load"),
        (Kill, "forgets", "1 tensors are not those of the unbroken run: w"),
        (Interrupt, "is cut off", "the last checkpoint 'model.pth' does not load"),
        (Interrupt, "is silent", "exit code 1 and no sentence: 'Stopped.'"),
    ],
)
def test_a_sabotaged_program_is_found(broken_by, fault, weakness, message):
    with pytest.raises(Failure, match=re.escape(message)):
        broken_by(fault, weakness)


class Nonsense(Fault):
    """The checkpoint becomes a folder, on which the resumed program raises an error of its own."""

    def strike(self, process):
        process.kill()
        process.wait()
        (self.out / "model.pth").unlink()
        save_checkpoint({"model": {"other": torch.zeros(2)}}, self.out / "model.pth")

    def ends_by(self):
        return {-9}


def test_a_traceback_is_found(broken_by):
    with pytest.raises(Failure, match="a traceback .exit code 1.: KeyError: 'w'"):
        broken_by(Nonsense)


@pytest.mark.slow
def test_some_rounds_of_the_harness(capsys):
    assert harness.main(["--rounds", "6", "--seed", "7"]) == 0
    assert "Rounds that passed, of 6 from seed 7" in capsys.readouterr().out
