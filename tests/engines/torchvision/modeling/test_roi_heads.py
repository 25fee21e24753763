import math

import torch
from torchvision.ops import roi_align as torchvision_roi_align

from refbn_d2.engines.torchvision.modeling.roi_heads import ROIPooler
from tests.engines.torchvision.modeling.helpers import config, random_boxes


def test_roi_levels_follow_the_formula():
    head = config().MODEL.ROI_BOX_HEAD
    boxes = random_boxes(500) * 20
    rois = torch.cat([torch.zeros(500, 1), boxes], dim=1)
    pooler = ROIPooler(head, [4, 8, 16, 32])
    found = pooler.levels(rois).tolist()
    for (x0, y0, x1, y1), level in zip(boxes.double().tolist(), found, strict=True):
        exact = 4 + math.log2(math.sqrt((x1 - x0) * (y1 - y0)) / 224)
        if abs(exact - round(exact)) > 1e-5:
            assert level + 2 == min(max(math.floor(exact), 2), 5)
    assert set(found) == {0, 1, 2, 3}
    features = [torch.rand(1, 2, 64 >> i, 64 >> i) for i in range(4)]
    pooled = pooler(features, rois)
    for i in range(0, 500, 10):
        level = found[i]
        alone = torchvision_roi_align(
            features[level], rois[i : i + 1], 7, 0.25 / 2**level, 0, aligned=True
        )
        assert pooled[i : i + 1].equal(alone)
