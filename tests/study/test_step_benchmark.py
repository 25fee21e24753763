"""Training steps of two configs, side by side; the command line."""

import pytest

from refbn_d2.data.shapes.dataset import make_detection
from refbn_d2.study.benchmark import main
from refbn_d2.study.step_benchmark import _Run
from tests.device import DEVICE

CONFIGS = [f"configs/quickstart/mask_rcnn_R_18_FPN_{norm}.yaml" for norm in ("bn", "refbn")]


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments])
    main()
    return capsys.readouterr()


def test_the_table_has_each_config_and_the_first_is_its_measure(monkeypatch, capsys):
    out, _ = run(
        monkeypatch, capsys, "--config-file", *CONFIGS, "--size", "64", "96", "--images", "1",
        "--rounds", "2", "--steps", "1", "--opts", "MODEL.REFBN.NUM_IMAGES", "2",
        "MODEL.REFBN.SLICE_SIZE", "1", "MODEL.DEVICE", DEVICE,
    )  # fmt: skip
    rows = [line.split("|")[1:-1] for line in out.splitlines() if line.startswith("| mask")]
    assert [row[0].strip() for row in rows] == ["mask_rcnn_R_18_FPN_bn", "mask_rcnn_R_18_FPN_refbn"]
    seconds = [float(row[1]) for row in rows]
    ratios = [float(row[2]) for row in rows]
    assert ratios[0] == 1 and min(seconds) > 0
    assert 0.3 < ratios[1] / (seconds[1] / seconds[0]) < 3  # medians of ratios, ratio of medians
    assert all((row[3].strip() == "-") == (DEVICE == "cpu") for row in rows)


def test_pictures_are_of_the_size_that_was_asked_for(tmp_path):
    shapes = make_detection(tmp_path, size=(96, 64), num_train=8, num_val=1)
    small = ["MODEL.DEVICE", DEVICE, "MODEL.REFBN.NUM_IMAGES", 1, "MODEL.REFBN.SLICE_SIZE", 1]
    run = _Run(CONFIGS[0], small, shapes, (96, 64), 1, tmp_path / "run")
    assert {tuple(d["image"].shape) for batch in run.batches for d in batch} == {(3, 96, 64)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rounds", "0"], "--rounds 0; allowed: 1 or more"),
        (["--config-file", CONFIGS[0], "--images", "0"], "--images 0; allowed: 1 or more"),
        (["--config-file", CONFIGS[0], "--size", "9", "9"], "size is (9, 9)"),
        (["--config-file", CONFIGS[0], "--size", "64", "96", "--opts", "A.B", "1"], "A.B"),
        (["--config-file", CONFIGS[0], "--dtype", "bfloat16"], "are for the layers; with --conf"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, arguments, message):
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, capsys, *arguments)
    assert message in str(error.value)
