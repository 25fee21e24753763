"""Load the files that people have: with prefixes, wrappers, or other architectures.

The oracle is the model that was saved, of torchvision or timm. A load that fails changes nothing.
"""

import argparse
import logging
import re

import pytest
import torch
import torchvision
from torch import nn

from refbn_d2.checkpoint.convert import convert_state, identify
from refbn_d2.checkpoint.files import load_checkpoint, save_checkpoint
from refbn_d2.checkpoint.inspection import describe
from refbn_d2.checkpoint.loading import load_weights
from refbn_d2.checkpoint.source import WeightsSource, load_source, parse_source
from refbn_d2.layers import convert_to_refbn
from refbn_d2.utils.errors import CheckpointError
from tests.versions import installed, needs


def resnet(seed=0, **changes):
    torch.manual_seed(seed)
    return torchvision.models.resnet18(num_classes=3, **changes)


def assert_same(state, expected):
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


@needs("torch", 2, 6, "reading them")
@pytest.mark.parametrize("legacy", [False, True])
def test_argparses_options_beside_the_weights_are_read(tmp_path, legacy):
    """timm's training checkpoints hold them."""
    options = argparse.Namespace(lr=0.1, model="resnet18", sizes=[1, 2])
    data = {"state_dict": resnet().state_dict(), "args": options, "arch": "resnet18"}
    torch.save(data, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    loaded = load_checkpoint(tmp_path / "a.pth")
    assert loaded["args"] == vars(options) and loaded["arch"] == "resnet18"
    assert_same(loaded["model"], resnet().state_dict())


def with_prefix(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


PREFIXES = ["model.", "encoder.", "net.backbone.", "backbone.", "a.b.c.d.", "backbone.body."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_one_prefix_before_a_resnet_is_inferred_and_logged(tmp_path, prefix, caplog):
    caplog.set_level(logging.INFO)
    source, model = resnet(), resnet(1)
    save_checkpoint({"state_dict": with_prefix(prefix, source.state_dict())}, tmp_path / "a.pth")
    loaded = load_checkpoint(tmp_path / "a.pth")
    load_weights(model, loaded["model"], tmp_path / "a.pth")
    assert_same(model.state_dict(), source.state_dict())
    assert f"a.pth: dropped the prefix '{prefix}' of its ResNet's names" in caplog.text
    contents = identify(loaded, "a.pth")
    assert_same(convert_state(contents, "torchvision"), source.state_dict())
    assert "model         classifier, ResNet-18 with BN, 3 classes" in describe(tmp_path / "a.pth")


def test_the_heads_beside_the_resnet_stay(caplog):
    source, model = resnet(), resnet(1)
    state = with_prefix("encoder.", source.state_dict()) | {"head.weight": torch.ones(3)}
    report = load_weights(model, state, "a.pth")
    assert_same(model.state_dict(), source.state_dict())
    assert report.unexpected == ["head.weight"]


def test_a_prefix_that_the_model_has_stays():
    class Wrapped(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.encoder = resnet(seed)

    source, model = Wrapped(0), Wrapped(1)
    load_weights(model, source.state_dict(), "a.pth")
    assert_same(model.state_dict(), source.state_dict())


def moco():
    query, momentum = resnet(0), resnet(1)
    state = with_prefix("module.encoder_q.", query.state_dict())
    state |= with_prefix("module.encoder_k.", momentum.state_dict())
    return state | {"module.queue": torch.ones(4)}, query, momentum


def test_of_two_resnets_the_error_names_both_and_a_key_chooses(tmp_path):
    state, query, momentum = moco()
    path = tmp_path / "moco.pth"
    save_checkpoint({"state_dict": state, "epoch": 3}, path)
    text = (
        "moco.pth holds several ResNets, under encoder_q, encoder_k: choose with --key encoder_q, "
        f"or with MODEL.WEIGHTS {path}?key=encoder_q"
    )
    with pytest.raises(CheckpointError, match=re.escape(text)):
        load_weights(resnet(2), load_source(str(path))["model"], path)
    with pytest.raises(CheckpointError, match=re.escape(text)):
        identify(load_checkpoint(path), str(path))
    for key, expected in (("encoder_q", query), ("encoder_k", momentum)):
        model = resnet(2)
        load_weights(model, load_source(f"{path}?key={key}")["model"], path)
        assert_same(model.state_dict(), expected.state_dict())
        assert_same(load_checkpoint(path, key=key)["model"], expected.state_dict())


def test_models_under_unknown_names_are_listed_with_what_chooses(tmp_path):
    path = tmp_path / "dino.pth"
    student, teacher = (with_prefix("module.backbone.", resnet(s).state_dict()) for s in (0, 1))
    save_checkpoint({"student": student, "teacher": teacher, "epoch": 3}, path)
    text = (
        "under student, teacher: choose with --key student, or with MODEL.WEIGHTS "
        f"{path}?key=student"
    )
    with pytest.raises(CheckpointError, match=re.escape(text)):
        load_checkpoint(path)
    model = resnet(2)
    load_weights(model, load_source(f"{path}?key=teacher")["model"], path)
    assert_same(model.state_dict(), resnet(1).state_dict())


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a.pth", WeightsSource("a.pth")),
        ("", WeightsSource("")),
        ("a/b.pkl?key=ema", WeightsSource("a/b.pkl", "ema")),
        ("b.pkl?matching_heuristics=True", WeightsSource("b.pkl", None, True)),
        ("b.pkl?matching_heuristics=True&key=net.q", WeightsSource("b.pkl", "net.q", True)),
        ("https://host/a.pth?key=ema", WeightsSource("https://host/a.pth", "ema")),
    ],
)
def test_weights_are_parsed(text, expected):
    assert parse_source(text) == expected


@pytest.mark.parametrize(
    "text",
    ["a.pth?kay=x", "a.pth?key", "a.pth?key=", "a.pth?key=a&key=b", "a?matching_heuristics=1"],
)
def test_what_else_stands_after_the_question_mark_is_an_error(text):
    with pytest.raises(CheckpointError, match=re.escape(f"MODEL.WEIGHTS {text}: ") + ".*key=KEY"):
        parse_source(text)


@pytest.mark.parametrize("url", ["detectron2://ImageNetPretrained/R-50.pkl", "https://host/a.pth"])
def test_urls_are_named_with_the_engine_that_takes_them(url):
    with pytest.raises(CheckpointError, match=f"{url} is a URL.*--engine detectron2"):
        load_source(url)


# ---- other architectures


def names_of(timm_name):
    timm = pytest.importorskip("timm")
    with torch.device("meta" if installed("torch") >= (2, 1) else "cpu"):
        names = timm.create_model(timm_name, num_classes=3).state_dict()
    return {n: torch.ones(t.shape, dtype=t.dtype) for n, t in names.items()}


OTHERS = {
    "seresnet18": "attention in its blocks",
    "resnet18d": "deep stem",
    "resnetv2_50": "ResNetV2",
    "vit_tiny_patch16_224": "ViT",
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("prefix", ["", "encoder."])
def test_another_architecture_is_refused_by_name(name, prefix, caplog):
    state = names_of(name)
    if prefix and OTHERS[name] in ("ResNetV2", "ViT"):
        pytest.skip("no ResNet by its names, so no prefix is inferred")
    model = resnet()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    text = f"a.pth is .*{OTHERS[name]}.*, but the model is a ResNet-18"
    with pytest.raises(CheckpointError, match=text):
        load_weights(model, with_prefix(prefix, state), "a.pth")
    assert_same(model.state_dict(), before)


def test_an_anti_aliased_resnet_is_recognized_by_its_checkpoint():
    with pytest.raises(CheckpointError, match="a.pth is an anti-aliased ResNet, but the model is"):
        load_weights(resnet(), resnet().state_dict(), "a.pth", arch="resnetaa50")


def test_a_model_of_that_architecture_takes_it():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    source, model = (timm.create_model("seresnet18", num_classes=3) for _ in range(2))
    load_weights(model, source.state_dict(), "a.pth")
    assert_same(model.state_dict(), source.state_dict())


def test_another_architecture_may_be_let_pass(caplog):
    state = names_of("seresnet18")
    load_weights(resnet(), state, "a.pth", allow_partial=True)
    assert "a.pth is a ResNet with attention" in caplog.text


# ---- a load that fails leaves no trace


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (lambda t: t.to("meta"), "no values"),
        (lambda t: t * float("nan"), "NaN"),
        (lambda t: t.to(torch.complex64), "complex"),
        (lambda t: t.to_sparse(), "sparse"),
    ],
    ids=["meta", "nan", "complex", "sparse"],
)
def test_a_tensor_that_is_no_weight_leaves_the_model_as_it_was(wrong, reason):
    model, state = resnet(), dict(resnet(1).state_dict())
    state["layer4.1.conv2.weight"] = wrong(state["layer4.1.conv2.weight"])
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"a.pth: layer4.1.conv2.weight .*{reason}"):
        load_weights(model, state, "a.pth")
    assert_same(model.state_dict(), before)


def test_a_layer_that_refuses_its_state_leaves_the_model_as_it_was():
    """The last layer raises, after all others are filled."""
    model = convert_to_refbn(resnet())
    before = {name: t.clone() for name, t in model.state_dict().items()}

    def refuse(*args):
        raise RuntimeError("not this one")

    model.fc._register_load_state_dict_pre_hook(refuse)  # public since torch 2.5
    with pytest.raises(CheckpointError, match="a.pth does not load .* is unchanged: not this"):
        load_weights(model, resnet(1).state_dict(), "a.pth")
    assert_same(model.state_dict(), before)
