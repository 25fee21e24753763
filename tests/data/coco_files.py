"""A small COCO json for tests."""

import json


def annotation(id, image_id=7, category_id=18):
    return {
        "id": id, "image_id": image_id, "category_id": category_id, "bbox": [10, 10, 20, 20],
        "area": 200, "iscrowd": 0, "segmentation": [[10, 10, 30, 10, 30, 30]],
    }  # fmt: skip


def coco():
    """Two images and two classes, ids neither sorted nor contiguous."""
    return {
        "images": [
            {"id": 9, "file_name": "b.jpg", "height": 60, "width": 40, "domain": "fog"},
            {"id": 7, "file_name": "a.jpg", "height": 40, "width": 60},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
        "annotations": [annotation(1), annotation(2, 9, 3), annotation(3)],
    }


def write(tmp_path, content, name="instances.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path
