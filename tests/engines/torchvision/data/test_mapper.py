"""Dataset dicts become samples, as by Detectron2's mapper and by first principles."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as mask_util

from refbn_d2.config import get_cfg
from refbn_d2.data.masks import decode_mask
from refbn_d2.engines.torchvision.data import Mapper
from refbn_d2.engines.torchvision.data.transforms import Crop, Resize

H, W = 60, 84


def config(*overrides):
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            *("INPUT.MIN_SIZE_TRAIN", (90,), "INPUT.MIN_SIZE_TEST", 120),
            *("MODEL.MASK_ON", True, *overrides),
        ]
    )
    return cfg


def rle_of(mask):
    return mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))


@pytest.fixture
def dataset_dict(tmp_path):
    """Return a noise picture with polygons (one in two parts), a run-length mask and a crowd."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (H, W, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    blob = np.zeros((H, W), bool)
    blob[30:50, 40:75] = rng.random((20, 35)) < 0.7
    crowd = np.zeros((H, W), bool)
    crowd[:5] = True
    square = [10.5, 8.0, 30.25, 8.0, 30.25, 40.0, 10.5, 40.0]
    parts = [[60.0, 5, 70, 5, 65, 20], [72.5, 5, 80, 5, 80, 15.5, 72.5, 15]]
    anns = [
        {"bbox": [10.5, 8.0, 19.75, 32.0], "category_id": 2, "segmentation": [square]},
        {"bbox": [60.0, 5.0, 20.0, 15.0], "category_id": 0, "segmentation": parts},
        {"bbox": [40.1, 30.0, 35.3, 20.0], "category_id": 1, "segmentation": rle_of(blob)},
        {"bbox": [0, 0, W, 5], "category_id": 1, "segmentation": rle_of(crowd)},
    ]
    for i, ann in enumerate(anns):
        ann.update(id=i + 1, iscrowd=int(i == 3))
    return {
        **{"file_name": str(tmp_path / "a.png"), "image_id": 5, "height": H, "width": W},
        **{"annotations": anns, "domain": "night"},
    }


def rng(seed=0):
    return np.random.default_rng([seed, 0])


def test_test_sample(dataset_dict):
    sample = Mapper(config(), is_train=False)(dataset_dict)
    picture = Image.open(dataset_dict["file_name"]).resize((168, 120), Image.BILINEAR)
    want = np.asarray(picture)[:, :, ::-1].transpose(2, 0, 1)
    assert sample["image"].dtype == torch.uint8 and sample["image"].is_contiguous()
    np.testing.assert_array_equal(sample["image"].numpy(), want)
    del sample["image"]
    assert sample == {k: v for k, v in dataset_dict.items() if k != "annotations"}
    rgb = Mapper(config("INPUT.FORMAT", "RGB"), is_train=False)(dataset_dict)["image"]
    np.testing.assert_array_equal(rgb.numpy(), want[::-1])


def test_zero_leaves_the_test_picture_as_it_is(dataset_dict):
    sample = Mapper(config("INPUT.MIN_SIZE_TEST", 0), is_train=False)(dataset_dict)
    picture = np.asarray(Image.open(dataset_dict["file_name"]))
    np.testing.assert_array_equal(sample["image"].numpy(), picture[:, :, ::-1].transpose(2, 0, 1))


def test_training_sample_by_hand(dataset_dict):
    before = copy.deepcopy(dataset_dict)
    sample = Mapper(config("INPUT.RANDOM_FLIP", "none"), is_train=True)(dataset_dict, rng())
    assert dataset_dict == before
    assert sample["image"].shape == (3, 90, 126)
    assert (sample["height"], sample["width"]) == (H, W)
    want = [[15.75, 12, 45.375, 60], [90, 7.5, 120, 30], [60.15, 45, 113.1, 75]]
    np.testing.assert_allclose(sample["gt_boxes"].numpy(), want, rtol=1e-6)
    assert sample["gt_boxes"].dtype == torch.float32
    assert sample["gt_classes"].tolist() == [2, 0, 1] and sample["gt_classes"].dtype == torch.int64
    polygon, parts, mask = sample["gt_masks"]
    np.testing.assert_allclose(polygon, [[15.75, 12, 45.375, 12, 45.375, 60, 15.75, 60]])
    assert [len(p) for p in parts] == [6, 8] and parts[0].dtype == np.float64
    assert mask.dtype == bool and mask.shape == (90, 126)


def test_masks_are_left_out_when_not_learned(dataset_dict):
    for ann in dataset_dict["annotations"]:
        del ann["segmentation"]
    sample = Mapper(config("MODEL.MASK_ON", False), is_train=True)(dataset_dict, rng())
    assert "gt_masks" not in sample and len(sample["gt_boxes"]) == 3


@pytest.mark.parametrize("share", [0, 0.02, 0.5, 1])
def test_masks_are_decoded_as_they_were_encoded(share):
    for seed, (h, w) in enumerate([(1, 1), (7, 5), (640, 480), (1, 300), (300, 1)]):
        pixels = np.random.default_rng(seed).random((h, w)) < share
        counts = rle_of(pixels)["counts"]
        for form in (counts, counts.decode()):
            np.testing.assert_array_equal(decode_mask(form, h, w), pixels)


def test_the_same_draw_gives_the_same_sample(dataset_dict):
    mapper = Mapper(
        config("INPUT.CROP.ENABLED", True, "INPUT.MIN_SIZE_TRAIN", (60, 70, 80)), is_train=True
    )
    seen = set()
    for seed in range(12):
        torch.manual_seed(seed)
        np.random.seed(seed)
        first, second = (mapper(dataset_dict, rng(seed)) for _ in range(2))
        assert torch.equal(first["image"], second["image"])
        assert torch.equal(first["gt_boxes"], second["gt_boxes"])
        seen.add(first["image"].numpy().tobytes())
    assert len(seen) == 12


def test_objects_cut_away_are_dropped(dataset_dict):
    """Objects with pixels in the window stay, with tight boxes, for any window."""
    cfg = config(
        *("INPUT.CROP.ENABLED", True, "INPUT.CROP.TYPE", "absolute", "INPUT.CROP.SIZE", [20, 20]),
        *("INPUT.MIN_SIZE_TRAIN", (0,), "INPUT.RANDOM_FLIP", "none"),
        *("INPUT.MASK_FORMAT", "bitmask"),
    )
    mapper = Mapper(cfg, is_train=True)
    anns = dataset_dict["annotations"][:3]
    numbers = set()
    for seed in range(60):
        (window,) = mapper.draw(rng(seed), H, W)
        sample = mapper(dataset_dict, rng(seed))
        rows, columns = slice(window.y0, window.y0 + 20), slice(window.x0, window.x0 + 20)
        picture = np.asarray(Image.open(dataset_dict["file_name"]))[rows, columns, ::-1]
        np.testing.assert_array_equal(sample["image"].numpy(), picture.transpose(2, 0, 1))
        classes = []
        for ann in anns:
            segm = ann["segmentation"]
            if isinstance(segm, list):
                segm = mask_util.merge(mask_util.frPyObjects(segm, H, W))
            inside = mask_util.decode(segm)[rows, columns]
            if inside.sum() > 3:
                classes.append(ann["category_id"])
            elif inside.any():
                break  # a sliver may vanish if it is rasterized after the cut
        else:
            assert sample["gt_classes"].tolist() == classes
            numbers.add(len(classes))
        for box, mask in zip(sample["gt_boxes"].tolist(), sample["gt_masks"], strict=True):
            y, x = mask.nonzero()
            assert box == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert numbers >= {0, 1, 2}


def test_nothing_left_is_a_sample_without_objects(dataset_dict):
    dataset_dict["annotations"] = dataset_dict["annotations"][3:]
    for mask_format in ("polygon", "bitmask"):
        cfg = config("INPUT.MASK_FORMAT", mask_format, "INPUT.CROP.ENABLED", True)
        sample = Mapper(cfg, is_train=True)(dataset_dict, rng())
        assert sample["gt_boxes"].shape == (0, 4) and sample["gt_boxes"].dtype == torch.float32
        assert sample["gt_classes"].shape == (0,) and sample["gt_classes"].dtype == torch.int64
        assert sample["gt_masks"] == []


def test_another_size_than_the_json_says_is_an_error(dataset_dict):
    dataset_dict.update(height=61)
    with pytest.raises(ValueError, match=r"a\.png \(image id 5\) is 84 x 60 .* 84 x 61") as error:
        Mapper(config(), is_train=False)(dataset_dict)
    assert "EXIF" not in str(error.value)
    dataset_dict.update(height=W, width=H)
    with pytest.raises(ValueError, match="84 x 60 .* 60 x 84.*EXIF"):
        Mapper(config(), is_train=False)(dataset_dict)


def test_a_missing_picture_is_named(dataset_dict):
    dataset_dict["file_name"] += ".gone"
    with pytest.raises(FileNotFoundError, match=r"a\.png\.gone \(image id 5\)"):
        Mapper(config(), is_train=True)(dataset_dict, rng())


def test_a_missing_or_broken_mask_is_named(dataset_dict):
    whole = dataset_dict["annotations"][2]["segmentation"]["counts"]
    for counts in (b"", b"\x00\x01", b"nonsense", "o", whole[:-1], whole + b"1", b"o" * 40 + b"0"):
        broken = copy.deepcopy(dataset_dict)
        broken["annotations"][2]["segmentation"]["counts"] = counts
        with pytest.raises(ValueError, match=r"annotation 3 of image 5 .*a\.png.*5040 pixels"):
            Mapper(config(), is_train=True)(broken, rng())
    del dataset_dict["annotations"][0]["segmentation"]
    with pytest.raises(ValueError, match="MASK_ON.*annotation 1 of image 5"):
        Mapper(config(), is_train=True)(dataset_dict, rng())


@pytest.mark.parametrize(("key", "value"), [("FORMAT", "L"), ("MASK_FORMAT", "rle")])
def test_a_wrong_format_is_named(key, value):
    with pytest.raises(ValueError, match=f"INPUT.{key} = '{value}'; allowed: "):
        Mapper(config(f"INPUT.{key}", value), is_train=True)


def detectron2_sample(cfg, dataset_dict, transforms):
    """Map with Detectron2's mapper and our transforms, already drawn."""
    D2 = pytest.importorskip("detectron2.data")
    T = D2.transforms
    augmentations = []
    for t in transforms:
        if isinstance(t, Resize):
            augmentations.append(T.ResizeTransform(t.h, t.w, t.new_h, t.new_w))
        elif isinstance(t, Crop):
            augmentations.append(T.CropTransform(t.x0, t.y0, t.w, t.h))
        elif t.direction == "horizontal":
            augmentations.append(T.HFlipTransform(t.w))
        else:
            augmentations.append(T.VFlipTransform(t.h))
    mapper = D2.DatasetMapper(
        is_train=True,
        augmentations=augmentations,
        image_format=cfg.INPUT.FORMAT,
        use_instance_mask=cfg.MODEL.MASK_ON,
        instance_mask_format=cfg.INPUT.MASK_FORMAT,
        recompute_boxes=cfg.MODEL.MASK_ON and cfg.INPUT.CROP.ENABLED,
    )
    theirs = copy.deepcopy(dataset_dict)
    for ann in theirs["annotations"]:
        ann["bbox_mode"] = 1  # XYWH_ABS
    return mapper(theirs)


@pytest.mark.detectron2
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask", None])
@pytest.mark.parametrize("flip", ["horizontal", "vertical"])
@pytest.mark.parametrize("crop", [False, True])
def test_agrees_with_detectron2(dataset_dict, mask_format, flip, crop):
    pytest.importorskip("shapely")
    cfg = config(
        *("MODEL.MASK_ON", mask_format is not None, "INPUT.MASK_FORMAT", mask_format or "polygon"),
        *("INPUT.RANDOM_FLIP", flip, "INPUT.CROP.ENABLED", crop, "INPUT.CROP.SIZE", [0.4, 0.4]),
        *(
            "INPUT.MIN_SIZE_TRAIN",
            (37, 60, 111),
        ),
    )
    if mask_format == "polygon":  # Detectron2 cannot mix run lengths with polygons
        del dataset_dict["annotations"][2:]
    mapper = Mapper(cfg, is_train=True)
    for seed in range(8):
        ours = mapper(dataset_dict, rng(seed))
        theirs = detectron2_sample(cfg, dataset_dict, mapper.draw(rng(seed), H, W))
        instances = theirs["instances"]
        assert torch.equal(ours["image"], theirs["image"])
        assert ours["gt_classes"].tolist() == instances.gt_classes.tolist()
        exact = not (crop and mask_format)  # cut polygons begin at another corner than Detectron2's
        np.testing.assert_allclose(
            ours["gt_boxes"].numpy(),
            instances.gt_boxes.tensor.numpy(),
            **({"rtol": 0} if exact else {"rtol": 1e-6, "atol": 1e-5}),
        )
        if mask_format is None:
            assert "gt_masks" not in ours
            continue
        assert len(ours["gt_masks"]) == len(instances.gt_masks)
        for mine, other in zip(ours["gt_masks"], instances.gt_masks, strict=True):
            if mask_format == "bitmask":
                assert mine.dtype == bool
                differ = (mine != other.numpy()).sum()
                assert differ == 0 if not crop else differ <= 2 + 0.02 * mine.sum()
            elif not crop:
                for a, b in zip(mine, other, strict=True):
                    np.testing.assert_array_equal(a, b)
