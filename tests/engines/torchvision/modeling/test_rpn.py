import math

import torch

from refbn_d2.engines.torchvision.modeling.rpn import AnchorGenerator
from tests.engines.torchvision.modeling.helpers import config


def test_anchors_are_centered_on_the_grid():
    cfg = config()
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32, 64]]
    cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 2.0]]
    cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.25
    generator = AnchorGenerator(cfg, [8, 16])
    for grid in ((3, 5), (2, 2)):  # the second is not a cached first one
        anchors = generator([torch.empty(1, 1, *grid), torch.empty(1, 1, 1, 1)])
        for (rows, columns), stride, found in zip((grid, (1, 1)), (8, 16), anchors, strict=True):
            wanted = []
            for row in range(rows):
                for column in range(columns):
                    x, y = (column + 0.25) * stride, (row + 0.25) * stride
                    for size in (32, 64):
                        for ratio in (0.5, 2.0):
                            w, h = size / math.sqrt(ratio), size * math.sqrt(ratio)
                            wanted.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
            torch.testing.assert_close(found, torch.tensor(wanted))
