"""Which images are the reference, and whether they are found again."""

import os

import pytest

from refbn_d2.reference.selection import draw_images, find_images, identity_of


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
