"""The order, groups, resumption and shares of batches."""

import copy
import pickle
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from refbn_d2.config import get_cfg
from refbn_d2.engines.torchvision.data import (
    Mapper,
    build_test_loader,
    build_train_loader,
)
from refbn_d2.utils.errors import DataError

NUMBER = 11


def config(*overrides):
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            *("INPUT.MIN_SIZE_TRAIN", (16, 20, 24), "INPUT.MIN_SIZE_TEST", 16),
            *("INPUT.CROP.ENABLED", True, "SOLVER.IMS_PER_BATCH", 4),
            *("DATALOADER.NUM_WORKERS", 0, *overrides),
        ]
    )
    return cfg


@pytest.fixture(scope="module")
def dicts(tmp_path_factory):
    """Return pictures of noise, portrait and landscape; 3 has only a crowd, 8 has no objects."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    made = []
    for i in range(NUMBER):
        h, w = ((30, 20), (20, 30))[i % 3 > 0]
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        ann = {"id": i, "bbox": [2, 3, 10, 12], "category_id": 0, "iscrowd": int(i == 3)}
        made.append(
            {
                **{"file_name": str(folder / f"{i}.png"), "image_id": 100 + i},
                **{"height": h, "width": w, "annotations": [] if i == 8 else [ann]},
            }
        )
    return made


def take(loader, number):
    return list(islice(iter(loader), number))


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert [s["image_id"] for s in a] == [s["image_id"] for s in b]
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x["image"], y["image"])
            assert torch.equal(x["gt_boxes"], y["gt_boxes"])
            assert torch.equal(x["gt_classes"], y["gt_classes"])


# ---------------------------------------------------------------- the training loader


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 5])
def test_resumed_is_uninterrupted_whatever_the_workers(dicts, workers, start):
    straight = take(build_train_loader(config(), dicts, seed=9), 9)
    cfg = config("DATALOADER.NUM_WORKERS", workers)
    resumed = take(build_train_loader(cfg, dicts, start, seed=9), 9 - start)
    assert_same(straight[start:], resumed)
    assert len({s["image"].numpy().tobytes() for batch in straight for s in batch}) == 36


def test_ranks_get_the_samples_of_one(dicts):
    whole = take(build_train_loader(config(), dicts, seed=9), 6)
    ranks = [take(build_train_loader(config(), dicts, 0, rank, 2, 9), 6) for rank in range(2)]
    assert_same([batch[0::2] for batch in whole], ranks[0])
    assert_same([batch[1::2] for batch in whole], ranks[1])


def test_random_state_of_others_is_left_alone(dicts):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.random.get_rng_state(), pickle.dumps(np.random.get_state())
    take(build_train_loader(config(), dicts, seed=9), 3)
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert pickle.dumps(np.random.get_state()) == before[1]


def test_dataset_dicts_stay_as_they_are(dicts):
    before = copy.deepcopy(dicts)
    take(build_train_loader(config(), dicts), 6)
    assert dicts == before


def test_a_batch_is_of_one_orientation_and_one_group(dicts):
    group_of = ["xy"[i % 2] for i in range(NUMBER)]
    group = {d["image_id"]: g for d, g in zip(dicts, group_of, strict=True)}
    for grouping in (True, False):
        cfg = config("DATALOADER.ASPECT_RATIO_GROUPING", grouping)
        got = take(build_train_loader(cfg, dicts, seed=1, group_of=group_of), 40)
        shapes = [{s["width"] > s["height"] for s in batch} for batch in got]
        assert all(len(shape) == 1 for shape in shapes) == grouping
        assert all(len({group[s["image_id"]] for s in batch}) == 1 for batch in got)
        assert {group[batch[0]["image_id"]] for batch in got} == {"x", "y"}
    with pytest.raises(ValueError, match="2 entries for 11 images"):
        build_train_loader(config(), dicts, group_of=["x", "y"])


def test_images_without_objects_are_left_out_if_asked(dicts):
    seen = {}
    for filter_empty in (True, False):
        cfg = config("DATALOADER.FILTER_EMPTY_ANNOTATIONS", filter_empty)
        cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
        got = take(build_train_loader(cfg, dicts), 12)
        seen[filter_empty] = {s["image_id"] for batch in got for s in batch}
    assert seen[False] == {d["image_id"] for d in dicts}
    assert seen[False] - seen[True] == {103, 108}


def test_no_image_left_is_an_error(dicts):
    with pytest.raises(
        ValueError, match="none of the 2 training images has an annotation.*FILTER_EMPTY"
    ):
        build_train_loader(config(), [dicts[3], dicts[8]])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_worker_names_the_file(dicts, workers):
    gone = copy.deepcopy(dicts)
    for d in gone:
        d["file_name"] += ".gone"
    iterator = iter(build_train_loader(config("DATALOADER.NUM_WORKERS", workers), gone))
    with pytest.raises(FileNotFoundError, match=r"\d+\.png\.gone \(image id 1\d\d\)"):
        next(iterator)
    if workers:  # otherwise torch waits 10 seconds for them when it is collected with the traceback
        iterator._shutdown_workers()


def test_settings_are_checked_before_the_first_batch(dicts):
    with pytest.raises(ValueError, match=r"DATALOADER\.NUM_WORKERS = -1"):
        build_train_loader(config("DATALOADER.NUM_WORKERS", -1), dicts)
    with pytest.raises(ValueError, match=r"INPUT\.RANDOM_FLIP"):
        build_train_loader(config("INPUT.RANDOM_FLIP", "both"), dicts)
    with pytest.raises(ValueError, match=r"IMS_PER_BATCH = 4 .* 3 worker"):
        build_train_loader(config(), dicts, world_size=3)


def test_all_that_a_spawned_worker_needs_can_be_pickled(dicts):
    """Processes are not forked on macOS and Windows."""
    loader = build_train_loader(config(), dicts, seed=9)
    needed = (loader.dataset, loader.collate_fn, loader.worker_init_fn)
    dataset, collate, _ = pickle.loads(pickle.dumps(needed))
    item = next(iter(loader.batch_sampler))[0]
    assert_same([collate([dataset[item]])], [take(loader, 1)[0][:1]])


# ---------------------------------------------------------------- the test loader


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("world_size", [1, 4])
def test_every_image_once_over_all_ranks(dicts, batch_size, world_size):
    got = []
    for rank in range(world_size):
        loader = build_test_loader(config(), dicts, rank, world_size, batch_size)
        own = list(loader)
        assert len(own) == len(loader)
        assert all(0 < len(batch) <= batch_size for batch in own)
        got += [sample for batch in own for sample in batch]
    assert sorted(s["image_id"] for s in got) == [d["image_id"] for d in dicts]
    mapper = Mapper(config(), is_train=False)
    for sample in got:
        want = mapper(dicts[sample["image_id"] - 100])
        assert torch.equal(sample["image"], want["image"])
        assert sample.keys() == want.keys() and "annotations" not in sample


def test_more_ranks_than_images(dicts):
    loaders = [build_test_loader(config(), dicts[:2], rank, 3) for rank in range(3)]
    assert [len(list(loader)) for loader in loaders] == [1, 1, 0]


def test_test_loader_with_workers(dicts):
    loader = build_test_loader(config("DATALOADER.NUM_WORKERS", 2), dicts, batch_size=4)
    batches = [[s["image_id"] for s in batch] for batch in loader]
    assert sorted(i for batch in batches for i in batch) == [d["image_id"] for d in dicts]
    size = {d["image_id"]: (d["height"], d["width"]) for d in dicts}
    assert all(len({size[i] for i in batch}) == 1 for batch in batches)  # nothing is padded


def test_batch_size_of_evaluation_is_checked(dicts):
    with pytest.raises(ValueError, match="batch size of evaluation is 0"):
        build_test_loader(config(), dicts, batch_size=0)


# ---------------------------------------------------------------- batches of one domain


def with_domains(dicts):
    """Return domains of 4, 4 and 3 images, portrait and landscape."""
    return [d | {"domain": "abc"[i % 3]} for i, d in enumerate(dicts)]


def test_batches_of_one_domain(dicts):
    dicts = with_domains(dicts)
    domain = {d["image_id"]: d["domain"] for d in dicts}
    cfg = config("DATALOADER.BATCH_COMPOSITION", "domain", "SOLVER.IMS_PER_BATCH", 2)
    batches = [[s["image_id"] for s in b] for b in take(build_train_loader(cfg, dicts), 30)]
    assert all(len({domain[i] for i in batch}) == 1 for batch in batches)
    assert {domain[i] for batch in batches for i in batch} == set("abc")


def test_iid_does_not_look_at_domains(dicts):
    plain = take(build_train_loader(config(), dicts), 6)
    assert_same(plain, take(build_train_loader(config(), with_domains(dicts)), 6))


def test_an_image_without_a_domain_is_named(dicts):
    dicts = with_domains(dicts)
    del dicts[5]["domain"]
    cfg = config("DATALOADER.BATCH_COMPOSITION", "domain", "DATALOADER.DOMAIN_FIELD", "camera")
    with pytest.raises(DataError, match=r"image 105 \(.*5.png\) has 'camera' = None.*DOMAIN_FIELD"):
        build_train_loader(cfg, dicts)
