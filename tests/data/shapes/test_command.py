"""`python -m refbn_d2.data.shapes`."""

import os

import cv2
import pytest

from refbn_d2.data.shapes.__main__ import main
from tests.data.shapes.helpers import SIZE


@pytest.mark.parametrize("more", [[], ["--classification", "--size", "64x48"]])
def test_command_writes_a_contact_sheet(tmp_path, more, capsys, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    sheet = tmp_path / "pictures" / "sheet.png"
    main(["--train", "1", "--val", "84", "--contact-sheet", str(sheet), *more])
    height, width = (64, 48) if more else SIZE
    assert cv2.imread(str(sheet)).shape == (7 * (2 * height + 2), 90 + 8 * (2 * width + 2), 3)
    assert os.listdir(sheet.parent) == ["sheet.png"]
    assert str(sheet) in capsys.readouterr().out
    assert os.listdir(tmp_path / "data") == ["shapes_cls" if more else "shapes"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--size", "8"], "64 pixels or more"),
        (["--size", "axb"], "--size"),
        (["--seed", "4"], "seed 3"),
    ],
)
def test_command_errors(small, capsys, argv, message):
    with pytest.raises(SystemExit) as error:
        main(["--root", str(small.parent), "--train", "28", "--val", "14", *argv])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
