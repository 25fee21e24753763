import pytest
import torch
from torchvision.ops import roi_align as torchvision_roi_align

from refbn_d2.engines.torchvision.modeling.roi_align import roi_align


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
def test_roi_aligns_gradient_is_torchvisions(ratio, aligned):
    """RoIs have all sizes, some outside of the map; one image has many, another has none."""
    torch.manual_seed(0)
    low = torch.rand(150, 2) * torch.tensor([90.0, 60]) - 15
    boxes = torch.cat([low, low + torch.rand(150, 2) * 80], dim=1)
    boxes[0, 2:] = boxes[0, :2]  # without area
    boxes[1] = torch.tensor([400.0, 400, 420, 420])
    boxes[2] = torch.tensor([8.0, 8, 64, 64])  # of exactly 2 x 2 cells a bin
    image = torch.cat([torch.zeros(80), torch.full((70,), 2.0)])
    rois = torch.cat([image[:, None], boxes], dim=1)
    weight = torch.randn(150, 5, 7, 7)
    grads = []
    for pool in (
        lambda x: roi_align(x, rois, 7, 4, ratio, aligned),
        lambda x: torchvision_roi_align(x, rois, 7, 0.25, ratio, aligned),
    ):
        x = torch.randn(3, 5, 16, 24, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        pooled = pool(x)
        (pooled * weight).sum().backward()
        grads.append((pooled.detach(), x.grad))
    assert grads[0][0].equal(grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1], atol=1e-4, rtol=1e-4)
