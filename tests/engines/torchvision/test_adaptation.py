"""`refbn-adapt`: a trained detector meets a new camera. Small models with random weights."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from refbn_d2.checkpoint import describe, load_checkpoint, save_checkpoint
from refbn_d2.engines import adapt
from refbn_d2.engines.torchvision import adaptation
from refbn_d2.engines.torchvision.modeling import build_model
from refbn_d2.utils.errors import RefBNError
from tests.engines.torchvision.helpers import run


@pytest.fixture
def tiny_cfg(tiny_cfg):
    """One RoI convolution, and detections in spite of random weights."""
    tiny_cfg.merge_from_list(
        ["MODEL.ROI_BOX_HEAD.NUM_CONV", 1, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
        + ["MODEL.RPN.POST_NMS_TOPK_TEST", 20, "TEST.DETECTIONS_PER_IMAGE", 5]
    )
    return tiny_cfg


@pytest.fixture
def case(tiny_cfg, tiny_shapes, tmp_path):
    """A function that writes the config and a checkpoint, and returns a command line."""

    def make(*overrides, images=tiny_shapes / "shapes/val", num=4):
        tiny_cfg.merge_from_list([*overrides])
        (tmp_path / "config.yaml").write_text(tiny_cfg.dump())
        torch.manual_seed(0)
        save_checkpoint({"model": build_model(tiny_cfg).state_dict()}, tmp_path / "old.pth")
        files = {"config-file": "config.yaml", "weights": "old.pth", "output": "new/new.pth"}
        words = [f"--{flag}={tmp_path / name}" for flag, name in files.items()]
        return [*words, f"--images={images}", f"--num-images={num}"]

    return make


def main(monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["refbn-adapt", *words])
    adapt.main()


def norms(name):
    parts = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")
    return [word for part in parts for word in (f"MODEL.{part}.NORM", name)]


def batch(files):
    """The pictures, normalized: 64 x 64, as they are stored, so that nothing is resized."""
    images = [(np.asarray(Image.open(f).convert("RGB")) - 100.0) / 60.0 for f in files]
    return torch.tensor(np.stack(images)).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("norm", ["RefBN", "RefIN"])
def test_a_new_checkpoint(case, norm, tiny_cfg, tiny_shapes, tmp_path, monkeypatch, capsys):
    words = case(*norms(norm))
    before = (tmp_path / "old.pth").read_bytes()
    main(monkeypatch, [*words, "--prior-images=1", "--evaluate"])
    said = capsys.readouterr().out
    assert (tmp_path / "old.pth").read_bytes() == before
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"new.pth", "new.png"}

    new = load_checkpoint(tmp_path / "new/new.pth")
    old = load_checkpoint(tmp_path / "old.pth")["model"]
    about = new["adapted"]
    assert about["weights"] == str(tmp_path / "old.pth") and about["weight"] == 4 / 5
    assert len(set(about["file_names"])) == 4
    moments = ("running_mean", "running_var", "ref_mean", "ref_var", "ref_count")
    changed = {n for n, t in new["model"].items() if not torch.equal(t, old[n])}
    assert changed == {n for n in old if n.endswith(moments)}

    x = batch([tiny_shapes / "shapes/val" / name for name in about["file_names"]])
    stem = "backbone.bottom_up.stem.conv1"
    x = F.conv2d(x, old[f"{stem}.weight"], stride=2, padding=3).double()
    mean = 0.8 * x.mean((0, 2, 3))  # the old moments are 0 and 1
    var = 0.2 + 0.8 * x.square().mean((0, 2, 3)) - mean.square()
    for kind in ("running", "ref") if norm == "RefBN" else ("ref",):
        found = new["model"][f"{stem}.norm.{kind}_mean"].double()
        torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-5)
        found = new["model"][f"{stem}.norm.{kind}_var"].double()
        torch.testing.assert_close(found, var, rtol=1e-4, atol=1e-5)
    assert new["model"][f"{stem}.norm.ref_count"] == 4 * 32 * 32 * 5 / 4

    values = []
    for name in ("old.pth", "new/new.pth"):
        weights = ["MODEL.WEIGHTS", str(tmp_path / name), "OUTPUT_DIR", str(tmp_path / "out")]
        values.append(run(tiny_cfg, *weights, eval_only=True)["tiny_val"]["segm"]["AP50"])
    assert f"tiny_val segm/AP50{'':12}{values[0]:8.2f}{values[1]:8.2f}" in said.splitlines()
    assert "adapted       weights" in describe(tmp_path / "new/new.pth")


def test_the_picture_shows_what_both_checkpoints_find(case, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(adaptation, "draw_samples", lambda items, *_, titles: drawn.extend(items))
    monkeypatch.setattr(adaptation, "MIN_SCORE", 0.0)
    words = case()
    main(monkeypatch, words)
    assert len(drawn) == 4
    for picture, before, after in drawn:
        assert picture.shape == (64, 64, 3)
        assert not torch.equal(before["scores"], after["scores"])
    # What is not drawn is not kept either.
    everything = [found for item in drawn for found in item[1:]]
    least = torch.cat([found["scores"] for found in everything]).median().item()
    drawn.clear()
    monkeypatch.setattr(adaptation, "MIN_SCORE", least)
    main(monkeypatch, [*words, f"--output={tmp_path / 'again.pth'}"])
    for found, all_ in zip((f for item in drawn for f in item[1:]), everything, strict=True):
        for name, values in found.items():
            assert torch.equal(values, all_[name][all_["scores"] >= least])


def test_a_new_test_set_has_the_classes_of_the_training(case, tiny_shapes, tmp_path, monkeypatch):
    """DATASETS.REGISTER on the command line adds to that of the config."""
    annotations, images = tiny_shapes / "shapes/annotations", tiny_shapes / "shapes/val"
    content = json.loads((annotations / "instances_val.json").read_text())
    names = [c["name"] for c in content["categories"]]
    content["categories"].reverse()
    for category in content["categories"]:
        category["id"] = 100 - category["id"]
    for annotation in content["annotations"]:
        annotation["category_id"] = 100 - annotation["category_id"]
    (tmp_path / "new.json").write_text(json.dumps(content))
    mine = ("mine", str(annotations / "instances_val.json"), str(images))
    words = case("DATASETS.REGISTER", (mine,), "DATASETS.TRAIN", ("mine",))
    used = []
    original = adaptation._evaluator
    monkeypatch.setattr(adaptation, "_evaluator", lambda *a: used.append(original(*a)) or used[0])
    new = f'[("new", "{tmp_path}/new.json", "{images}")]'
    main(monkeypatch, [*words, "--evaluate", "DATASETS.REGISTER", new, "DATASETS.TEST", "['new']"])
    assert list(used[0].datasets["new"].class_names) == names


def test_a_training_set_that_has_moved(case, tiny_shapes, monkeypatch, tmp_path):
    there = tiny_shapes / "shapes"
    moved = ("mine", str(there / "annotations/instances_val.json"), str(there / "val"))
    words = case("DATASETS.REGISTER", (("mine", "old.json", "old"),), "DATASETS.TRAIN", ("mine",))
    main(monkeypatch, [*words, "DATASETS.REGISTER", repr([moved])])
    assert (tmp_path / "new/new.pth").exists()


def test_if_the_picture_cannot_be_drawn_nothing_is_written(case, tmp_path, monkeypatch):
    def full(*arguments):
        arguments[-1].parent.mkdir()
        arguments[-1].write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(adaptation, "_draw", full)
    with pytest.raises(SystemExit, match="No space left"):
        main(monkeypatch, case())
    assert not any((tmp_path / "new").glob("*"))


def test_the_seed_draws_the_pictures(case, tmp_path, monkeypatch):
    words = case()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        main(monkeypatch, [*words, f"--output={tmp_path / name}.pth", f"--seed={seed}"])
    a, b, c = (load_checkpoint(tmp_path / f"{name}.pth") for name in "abc")
    assert a["adapted"]["file_names"] == b["adapted"]["file_names"] != c["adapted"]["file_names"]
    assert all(torch.equal(t, b["model"][n]) for n, t in a["model"].items())


def test_frozen_stages_keep_their_moments(case, tmp_path, monkeypatch, capsys):
    words = case("MODEL.BACKBONE.FREEZE_AT", 2)
    main(monkeypatch, words)
    assert "5 FrozenBN layers keep theirs (MODEL.BACKBONE.FREEZE_AT 2)" in capsys.readouterr().out
    # the way out that it names
    words += [f"--output={tmp_path / 'all.pth'}", "MODEL.BACKBONE.FREEZE_AT", "0"]
    main(monkeypatch, words)
    old, new = (load_checkpoint(tmp_path / f"{name}.pth")["model"] for name in ("old", "all"))
    name = "backbone.bottom_up.stem.conv1.norm.running_mean"
    assert not torch.equal(old[name], new[name])


def test_a_head_that_nothing_reached_is_named(case, tmp_path, monkeypatch, capsys):
    words = case(*norms("RefBN"), "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 1.0)
    main(monkeypatch, words)
    assert "nothing was found: roi_heads.mask_head." in capsys.readouterr().out


def test_pictures_of_several_sizes_are_padded(case, tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    for size in ((64, 64), (96, 40), (30, 50)):
        picture = Image.fromarray(np.full((*size, 3), 200, np.uint8))
        picture.save(tmp_path / f"pictures/{size[0]}.png")
    main(monkeypatch, case(images=tmp_path / "pictures", num=3))
    new = load_checkpoint(tmp_path / "new/new.pth")["model"]
    name = "backbone.bottom_up.stem.conv1.norm.ref_count"
    # resized to 64 x 64, 128 x 53 (MAX_SIZE_TEST) and 64 x 107, padded to 128 x 128; stride 2
    assert new[name] == 3 * 64 * 64 * 19 / 3


def without_references(tmp_path):
    state = load_checkpoint(tmp_path / "old.pth")["model"]
    state = {name: t for name, t in state.items() if "ref_" not in name}
    save_checkpoint({"model": state}, tmp_path / "old.pth")


def without_heads(tmp_path):
    state = load_checkpoint(tmp_path / "old.pth")["model"]
    state = {name: t for name, t in state.items() if name.startswith("backbone.")}
    save_checkpoint({"model": state}, tmp_path / "old.pth")


def with_a_broken_picture(tmp_path):
    (tmp_path / "pictures/sub/b.PNG").write_bytes(b"no picture")


def with_a_note_only(tmp_path):
    shutil.rmtree(tmp_path / "pictures")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/notes.txt").write_text("none")


def with_the_picture_of_another_run(tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new/new.png").write_text("mine")


ERRORS = [  # what is done before, arguments, what the line says
    (without_references, [], "old.pth has no RefBN or RefIN layer to adapt"),
    (without_heads, [], "old.pth is not a checkpoint of the detector in"),
    (None, ["MODEL.MASK_ON", "False"], "(not in the model)"),
    (None, ["MODEL.ROI_HEADS.NUM_CLASSES", "3"], "(in the model (4, 256))"),
    (None, ["MODEL.RESNETS.DEPTH", "34"], "of the model do not fit"),
    (None, ["MODEL.RESNETS.NORM", "RefIN"], "is RefBN in the file and RefIN in the model"),
    (
        None,
        norms("FrozenBN"),
        "the model has no RefBN or RefIN layer to adapt (MODEL.RESNETS.NORM 'FrozenBN'",
    ),
    (None, ["MODEL.META_ARCHITECTURE", "RetinaNet"], "or call refbn_d2.reference.adapt_reference"),
    (None, ["--images=nowhere"], "FileNotFoundError: nowhere: there is no such folder"),
    (None, [f"--images={__file__}"], "is a file: give the folder of the pictures"),
    (with_a_note_only, [], "pictures has no pictures. Known are .bmp"),
    (None, ["--num-images=3"], "has 2 pictures, fewer than --num-images 3: add"),
    (with_a_broken_picture, [], "sub/b.PNG cannot be read"),
    (None, ["--num-images=0"], "--num-images is 0; allowed: 1 or more"),
    (None, ["--prior-images=-1"], "--prior-images is -1; allowed: 0 or more"),
    (None, ["--seed=-1"], "--seed is -1; allowed: 0 or more"),
    (None, ["--weights=nowhere.pth"], "FileNotFoundError: nowhere.pth"),
    (None, ["--output={}/old.pth"], "FileExistsError: {}/old.pth exists and is not replaced"),
    (with_the_picture_of_another_run, [], "new.png exists and is not replaced"),
    (None, ["--output={}/new.safetensors"], "ends in .pth or .pkl"),
    (None, ["--output={}/pictures/new.pth"], "pictures/new.pth is in the folder of --images"),
    (None, ["--images="], "The folder of the pictures has an empty name"),
    (None, ["--evaluate", "DATASETS.TEST", "()"], "DATASETS.TEST () has none"),
]  # fmt: skip


@pytest.mark.parametrize("break_it, more, message", ERRORS)
def test_bad_input_is_one_line(break_it, more, message, case, tiny_shapes, tmp_path, monkeypatch):
    (tmp_path / "pictures/sub").mkdir(parents=True)
    first, second = sorted((tiny_shapes / "shapes/val").glob("*.png"))[:2]
    shutil.copy(first, tmp_path / "pictures/a.png")
    shutil.copy(second, tmp_path / "pictures/sub/b.PNG")
    shutil.copy(second, tmp_path / "pictures/sub/._b.png")  # hidden: not counted
    shutil.copytree(tmp_path / "pictures/sub", tmp_path / "pictures/.thumbnails")
    words = case(images=tmp_path / "pictures", num=2)
    if break_it:
        break_it(tmp_path)
    there = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as error:
        main(monkeypatch, [*words, *(word.format(tmp_path) for word in more)])
    assert message.format(tmp_path) in error.value.code
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == there


@pytest.mark.parametrize(
    "raised, message",
    [(torch.cuda.OutOfMemoryError("full"), "--num-images 4 pictures, which are one batch, do not")],
)
def test_too_many_pictures_for_the_gpu(case, raised, message, monkeypatch):
    def adapt_reference(*_):
        raise raised

    monkeypatch.setattr(adaptation, "adapt_reference", adapt_reference)
    with pytest.raises(RefBNError, match=message):
        adaptation.run(adapt.parser().parse_args(case()))


def test_infinite_moments_are_not_written(case, tmp_path):
    words = case()
    state = load_checkpoint(tmp_path / "old.pth")["model"]
    state["backbone.bottom_up.stem.conv1.weight"].fill_(1e38)
    save_checkpoint({"model": state}, tmp_path / "old.pth")
    with pytest.raises(RefBNError, match="norm on these pictures are infinite or NaN"):
        adaptation.run(adapt.parser().parse_args(words))
    assert not (tmp_path / "new").exists()
