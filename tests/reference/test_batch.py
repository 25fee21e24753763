"""Oracles: a straight run without refresh, moments of the layers' inputs taken by hooks."""

import copy
import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from refbn_d2.config import RefBNOptions
from refbn_d2.layers import Moments, Recording, RefBatchNorm2d, refbn_layers
from refbn_d2.reference.batch import ReferenceBatch
from refbn_d2.reference.selection import draw_images, find_images, identity_of

OPTIONS = RefBNOptions(
    refresh="static", refresh_period=2, slice_size=2, slice_momentum=0.25, num_images=6
)


class Detector(nn.Module):
    """A backbone that returns a dict, and a head with its own norm, called twice."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), RefBatchNorm2d(4), nn.ReLU(), nn.Dropout(0.1), ToDict()
        )
        self.head = nn.Sequential(nn.Conv2d(4, 5, 1), RefBatchNorm2d(5))
        self.other = nn.BatchNorm2d(4)

    def forward(self, images):
        features = self.backbone(torch.stack(images))["p2"]
        assert len(features) == len(images)
        features = self.other(features)
        picked = features[torch.randperm(len(features))]
        return (self.head(picked[:, :, ::2]) ** 2).mean() + self.head(features).abs().mean()


class ToDict(nn.Module):
    def forward(self, x):
        return {"p2": x}


def images(seed, n):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 8, 8, generator=generator) * (1 + i) + i for i in range(n)]


def stack(samples, batch):
    return torch.stack(samples)


def make(refresh, options=OPTIONS, model=None, **changes):
    torch.manual_seed(0)
    model = model or Detector()
    options = replace(options, refresh=refresh, **changes)
    samples = images(7, options.num_images)
    identity = {"dataset": "d", "seed": 0, "images": []}
    reference = ReferenceBatch(
        model, samples, options, forward=model, identity=identity, concat_to=model.backbone,
        rows=stack,
    )  # fmt: skip
    return model, reference


def train(model, reference, steps, start=0, seen=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for iteration in range(start, steps):
        torch.manual_seed(iteration)
        reference.before_step(iteration)
        loss = model(images(100 + iteration, 3))
        optimizer.zero_grad()
        loss.backward()
        reference.after_step()
        optimizer.step()
        if seen is not None:
            seen.append({n: m.ref_mean.clone() for n, m in refbn_layers(model)})
    return model


def test_capture_keeps_the_moments_of_the_layers_own_inputs():
    model, reference = make("static")
    inputs = {}
    for name, layer in refbn_layers(model):
        layer.register_forward_pre_hook(
            lambda m, args, n=name: inputs.setdefault(n, []).append(args[0])
        )
    reference.capture()
    for name, layer in refbn_layers(model):
        x = torch.cat([x.transpose(0, 1).flatten(1) for x in inputs[name]], 1)
        torch.testing.assert_close(layer.ref_mean, x.mean(1))
        torch.testing.assert_close(layer.ref_var, x.var(1, correction=0), rtol=1e-4, atol=1e-5)
        assert layer.ref_count == x.shape[1]
    assert [len(x) for x in inputs.values()] == [1, 2]


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


def test_static_never_changes_again():
    model, reference = make("static")
    reference.capture()
    seen = []
    train(model, reference, 5, seen=seen)
    assert all(torch.equal(seen[0][n], s[n]) for s in seen for n in s)


def test_full_is_the_capture_of_the_weights_of_that_step():
    model, reference = make("full")
    reference.capture()
    train(model, reference, 2)
    weights = copy.deepcopy(model)
    train(model, reference, 3, start=2)
    _, again = make("static", model=weights)
    again.capture()
    for (_, a), (_, b) in zip(refbn_layers(model), refbn_layers(weights), strict=True):
        assert torch.equal(a.ref_mean, b.ref_mean) and torch.equal(a.ref_var, b.ref_var)


@pytest.mark.parametrize("refresh", ["slice", "concat"])
def test_slices_walk_through_the_reference_every_period(refresh):
    model, reference = make(refresh)
    reference.capture()
    rows = []
    handle = model.backbone[0].register_forward_pre_hook(lambda m, args: rows.append(args[0]))
    train(model, reference, 8)
    handle.remove()
    reference_images = images(7, 6)
    # What runs besides the batch of three, in this order:
    slices = [x for x in rows if len(x) == 2] if refresh == "slice" else [
        x[3:] for x in rows if len(x) == 5
    ]  # fmt: skip
    expected = [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert len(slices) == len(expected)
    for rows, indices in zip(slices, expected, strict=True):
        assert torch.equal(rows, torch.stack([reference_images[i] for i in indices]))
    assert reference.state_dict()["position"] == 2


@pytest.mark.parametrize("refresh", ["slice", "concat"])
def test_slice_moments_enter_by_a_moving_average(refresh):
    model, reference = make(refresh)
    reference.capture()
    layer = model.backbone[1]
    mean, second = layer.ref_mean.clone(), layer.ref_var + layer.ref_mean**2
    conv_out = model.backbone[0](torch.stack(images(7, 2))).detach()
    train(model, reference, 1)
    first = 0.75 * mean + 0.25 * conv_out.mean((0, 2, 3))
    second = 0.75 * second + 0.25 * (conv_out**2).mean((0, 2, 3))
    torch.testing.assert_close(layer.ref_mean, first)
    torch.testing.assert_close(layer.ref_var, second - first**2, rtol=1e-4, atol=1e-5)


def test_layers_outside_of_the_module_take_slices():
    model, reference = make("concat")
    reference.capture()
    seen = []
    train(model, reference, 4, seen=seen)
    for name in ("backbone.1", "head.1"):
        changed = [not torch.equal(a[name], b[name]) for a, b in zip(seen, seen[1:], strict=False)]
        assert changed == [False, True, False]


@pytest.mark.parametrize("refresh", ["static", "full", "slice", "concat"])
def test_resumed_run_equals_the_straight_one(refresh):
    straight, reference = make(refresh)
    reference.capture()
    train(straight, reference, 7)
    first, reference = make(refresh)
    reference.capture()
    train(first, reference, 3)
    second, again = make(refresh)
    second.load_state_dict(first.state_dict())
    again.load_state_dict(reference.state_dict())
    train(second, again, 7, start=3)
    for (name, a), (_, b) in zip(
        straight.state_dict().items(), second.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


def test_a_slice_is_appended_to_a_classifiers_own_input():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        RefBatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    samples = images(7, 6)
    reference = ReferenceBatch(
        model, samples, replace(OPTIONS, refresh="concat"),
        forward=lambda s: model(torch.stack(s)), concat_to=model, rows=stack,
    )  # fmt: skip
    reference.capture()
    before = model[1].ref_mean.clone()
    reference.before_step(0)
    assert model(torch.stack(images(1, 3))).shape == (3, 2)
    reference.after_step()
    assert not torch.equal(before, model[1].ref_mean)
    assert model.eval()(torch.stack(images(1, 3))).shape == (3, 2)


def test_virtual_batch_norm_is_whole_reference_with_weight_one():
    """With all of it appended and w = momentum = 1, it has the moments of this step's weights."""
    model, reference = make(
        "concat", reference_weight=1.0, gradient="reference", slice_size=6, slice_momentum=1.0
    )
    layer = model.backbone[1]
    layer.reference_weight, layer.gradient = 1.0, "reference"
    reference.capture()
    with torch.no_grad():
        model.backbone[0].weight.mul_(3)
    reference.before_step(0)
    batch = torch.stack(images(1, 3))
    model.backbone[3].p = 0.0
    y = model.backbone(batch)["p2"]
    reference.after_step()
    h, r = model.backbone[0](batch), model.backbone[0](torch.stack(images(7, 6)))
    mean, var = r.mean((0, 2, 3), keepdim=True), r.var((0, 2, 3), correction=0, keepdim=True)
    expected = ((h - mean) / (var + 1e-5).sqrt()).relu()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_no_layer_or_nothing_to_append_to():
    with pytest.raises(ValueError, match="no RefBatchNorm2d"):
        ReferenceBatch(nn.Conv2d(3, 3, 1), images(7, 6), OPTIONS)
    with pytest.raises(ValueError, match='use "slice"'):
        ReferenceBatch(Detector(), images(7, 6), replace(OPTIONS, refresh="concat"), forward=print)


def test_layer_that_the_reference_does_not_reach_is_named(caplog):
    model, _ = make("static")
    reference = ReferenceBatch(
        model, images(7, 6), OPTIONS, forward=lambda s: model.backbone(torch.stack(s))
    )
    reference.capture()
    assert "did not reach head.1" in caplog.text
    assert model.backbone[1].has_reference() and not model.head[1].has_reference()


def test_begin_captures_the_dataset(caplog):
    caplog.set_level("INFO")
    model, reference = make("static")
    reference.begin()
    _, again = make("static", model=copy.deepcopy(model))
    again.capture()
    for (_, layer), (_, other) in zip(refbn_layers(model), refbn_layers(again.model), strict=True):
        assert torch.equal(layer.ref_mean, other.ref_mean) and layer.ref_mean.any()
    assert "in 2 of 2 layers: 6 images of d, seed" in caplog.text


def test_begin_keeps_the_checkpoints_reference_and_captures_what_is_missing():
    model, reference = make("static", reference="checkpoint")
    kept, fresh = model.backbone[1], model.head[1]
    kept.commit(Moments(torch.full((4,), 0.3), torch.full((4,), 2.0), 77))
    inputs, passes = [], []
    fresh.register_forward_pre_hook(lambda m, args: inputs.append(args[0].transpose(0, 1)))
    kept.register_forward_hook(lambda m, args, y: passes.append((args[0], y)))
    reference.begin()
    assert kept.ref_mean.eq(0.3).all() and kept.ref_var.eq(2.0).all() and kept.ref_count == 77
    [(x, y)] = passes  # normalized by the reference that was kept
    torch.testing.assert_close(y, (x - 0.3) / (2.0 + 1e-5) ** 0.5)
    seen = torch.cat([x.flatten(1) for x in inputs], 1)
    torch.testing.assert_close(fresh.ref_mean, seen.mean(1))
    moments = fresh.ref_mean.clone()
    reference.begin()  # there is nothing more to capture
    assert torch.equal(fresh.ref_mean, moments) and len(passes) == 1


def test_begin_with_a_checkpoint_that_has_no_reference():
    _, reference = make("static", reference="checkpoint")
    with pytest.raises(ValueError, match='REFERENCE is "checkpoint", but no RefBN layer has'):
        reference.begin()


# -- distributed -----------------------------------------------------------------------------------


def _worker(rank, port, refresh, path):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, reference = make(refresh, num_images=6, slice_size=4)
    reference.capture()
    collectives, all_reduce = [], dist.all_reduce
    for name in ("all_reduce", "broadcast", "all_gather"):
        wrapped = getattr(dist, name)
        setattr(dist, name, lambda *a, f=wrapped, **k: (collectives.append(1), f(*a, **k))[1])
    counts, rows = [], []
    model.backbone[0].register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    for iteration in range(4):
        torch.manual_seed(iteration)
        del collectives[:]
        reference.before_step(iteration)
        model(images(10 * iteration + rank, 3)).backward()  # each worker has its own batch
        reference.after_step()
        counts.append(len(collectives))
    dist.all_reduce = all_reduce
    state = {k: v for k, v in model.state_dict().items() if "ref_" in k}
    torch.save({"counts": counts, "state": state, "rows": rows}, f"{path}/{rank}.pth")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "refresh, counts, rows",
    [
        ("static", [0, 0, 0, 0], [3, 3, 3, 3]),
        ("full", [0, 0, 1, 0], [3, 3, 6, 3, 3]),
        ("slice", [1, 0, 1, 0], [2, 3, 3, 2, 3, 3]),
        (
            "concat",
            [1, 0, 1, 0],
            [2, 5, 3, 2, 5, 3],
        ),  # the head's slice, and the batch with the slice
    ],
)
def test_workers_agree_with_one_collective_per_refresh(tmp_path, free_port, refresh, counts, rows):
    mp.spawn(_worker, args=(free_port, refresh, str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    assert a["counts"] == b["counts"] == counts
    assert a["rows"] == b["rows"] == rows
    for name, value in a["state"].items():
        assert torch.equal(value, b["state"][name]), name


class HeadOfSome(Detector):
    """A head that gets only the samples that are not all zero."""

    def forward(self, images):
        features = self.backbone(torch.stack(images))["p2"]
        return self.head(features[torch.stack([i.abs().sum() > 0 for i in images])]).sum()


def _worker_with_an_empty_head(rank, port, path):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = HeadOfSome()
    nothing = [torch.zeros(3, 8, 8)] * 6
    identity = {"dataset": "d", "seed": 0, "images": []}
    reference = ReferenceBatch(model, nothing, OPTIONS, forward=model, identity=identity)
    reference.begin()
    inputs, references = [], []
    layer = model.head[1]
    layer.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    # Workers with RoIs: none, only worker 1, both, both
    for iteration, batch in enumerate(
        [nothing, images(9, 3) if rank else nothing, *[images(5, 2)] * 2]
    ):
        reference.before_step(iteration)
        model(batch).backward()
        reference.after_step()
        references.append((layer.ref_mean.clone(), layer.ref_var.clone(), int(layer.ref_count)))
    torch.save({"inputs": inputs, "references": references}, f"{path}/{rank}.pth")
    dist.destroy_process_group()


def test_an_unreached_layer_takes_the_first_batch_that_is_not_empty_on_all_workers(
    tmp_path, free_port
):
    mp.spawn(_worker_with_an_empty_head, args=(free_port, str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    assert [count for *_, count in a["references"]] == [0, 192, 192, 192]  # 3 images of 8 x 8
    for ours, theirs in zip(a["references"], b["references"], strict=True):
        assert all(
            torch.equal(torch.as_tensor(x), torch.as_tensor(y))
            for x, y in zip(ours, theirs, strict=True)
        )
    torch.testing.assert_close(a["references"][3][0], b["inputs"][1].mean((0, 2, 3)))


def _worker_with_other_images(rank, port, what, path):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    identity = {
        "dataset": "mine",
        "seed": 0,
        "images": [{"file_name": "a.jpg", "fingerprint": "1"}],
    }
    if rank == 1 and what == "dataset":
        identity["dataset"] = "other"
    elif rank == 1:
        identity["images"] = [{"file_name": "a.jpg", "fingerprint": "2"}]
    model = Detector()
    try:
        ReferenceBatch(model, images(7, 6), OPTIONS, forward=model, identity=identity)
    except ValueError as error:
        open(f"{path}/{rank}", "w").write(str(error))
    dist.destroy_process_group()


@pytest.mark.parametrize("what, named", [("dataset", "other against mine"), ("image", "'2'")])
def test_workers_with_different_references_stop(tmp_path, free_port, what, named):
    mp.spawn(_worker_with_other_images, args=(free_port, what, str(tmp_path)), nprocs=2)
    for rank in range(2):
        message = (tmp_path / str(rank)).read_text()
        assert "Worker 1 has another reference batch than worker 0" in message and named in message


# -- choice and identity ---------------------------------------------------------------------------


@pytest.fixture
def dataset_dicts(tmp_path):
    dicts = []
    for i in range(10):
        file = tmp_path / f"{i}.png"
        file.write_bytes(bytes([i]) * 10)
        dicts.append(
            {"image_id": i, "file_name": str(file), "annotations": [{"bbox": [0, 0, i, 1]}]}
        )
    return dicts


def test_choice_is_seeded_and_without_repetition(dataset_dicts):
    chosen = draw_images(dataset_dicts, 6, seed=1)
    assert chosen == draw_images(dataset_dicts, 6, seed=1) != draw_images(dataset_dicts, 6, seed=2)
    assert len(set(chosen)) == 6
    assert sorted(draw_images(dataset_dicts, 10, seed=1)) == list(range(10))


def test_choice_keeps_to_the_largest_group(dataset_dicts):
    group = lambda d: d["image_id"] >= 4  # noqa: E731
    assert min(draw_images(dataset_dicts, 6, 0, group)) == 4
    assert len([i for i in draw_images(dataset_dicts, 8, 0, group) if i >= 4]) == 6


def test_reference_larger_than_the_dataset(dataset_dicts):
    with pytest.raises(ValueError, match="MODEL.REFBN.NUM_IMAGES is 11, .* has 10 usable images"):
        draw_images(dataset_dicts, 11, seed=0)


def test_the_same_images_are_found_again_in_another_order(dataset_dicts):
    chosen = draw_images(dataset_dicts, 6, seed=1)
    identity = identity_of("shapes_train", [dataset_dicts[i] for i in chosen], seed=1)
    shuffled = dataset_dicts[::-1]
    found = find_images(identity, shuffled)
    assert [shuffled[i] for i in found] == [dataset_dicts[i] for i in chosen]


def test_joined_datasets_may_share_ids_and_names(dataset_dicts, tmp_path):
    (tmp_path / "other").mkdir()
    twin = {**dataset_dicts[3], "file_name": str(tmp_path / "other/3.png")}
    (tmp_path / "other/3.png").write_bytes(b"another picture")
    identity = identity_of("a + b", [dataset_dicts[3], twin], seed=0)
    both = [*dataset_dicts, twin]
    assert find_images(identity, both) == [3, 10]


def test_images_that_are_no_files_of_their_own(dataset_dicts):
    """Images in a tar file, for example, have a "read" function in their dicts."""
    contents = {i: b"%d" % i for i in range(4)}
    packed = [
        {"image_id": i, "file_name": f"a/{i}.png", "label": 7, "read": lambda i=i: contents[i]}
        for i in range(4)
    ]
    identity = identity_of("tar", [packed[3], packed[1]], seed=0)
    assert find_images(identity, packed) == [3, 1]
    contents[1] = b"other"
    with pytest.raises(ValueError, match=r"image 1 \(1.png\) of tar has changed"):
        find_images(identity, packed)


def test_nothing_is_appended_to_a_backbone_without_refbn():
    model, _ = make("concat")
    model.backbone[1] = nn.BatchNorm2d(4)
    _, reference = make("concat", model=model)
    reference.capture()
    rows = []
    model.backbone[0].register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    before = model.head[1].ref_mean.clone()
    train(model, reference, 1)
    assert rows == [2, 3] and not torch.equal(before, model.head[1].ref_mean)


def test_a_step_that_failed_leaves_nothing(tmp_path):
    model, reference = make("concat")
    reference.capture()
    reference.before_step(0)
    assert len(model.eval().backbone(torch.zeros(3, 3, 8, 8))["p2"]) == 3  # and none in eval mode
    reference.before_step(1)
    rows = []
    model.backbone[0].register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    model.train()(images(1, 3))
    assert rows == [3] and model.backbone[1].recording is Recording.OFF


@pytest.mark.parametrize("harm", ["file gone", "dict gone", "pixels", "annotation"])
def test_a_gone_or_changed_image_is_named(dataset_dicts, harm):
    identity = identity_of("shapes_train", dataset_dicts[:6], seed=0)
    victim = dataset_dicts[3]
    if harm == "file gone":
        os.remove(victim["file_name"])
    elif harm == "dict gone":
        dataset_dicts.remove(victim)
    elif harm == "pixels":
        open(victim["file_name"], "ab").write(b"x")
    else:
        victim["annotations"][0]["bbox"][2] += 1
    problem = "is gone" if "gone" in harm else "has changed"
    with pytest.raises(ValueError, match=rf"image 3 \(3.png\) of shapes_train {problem}"):
        find_images(identity, dataset_dicts)
