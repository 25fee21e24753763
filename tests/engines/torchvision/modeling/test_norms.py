import torch
from torch import nn

from refbn_d2.engines.torchvision.modeling.norms import FrozenBatchNorm2d


def test_a_frozen_batch_norm_is_the_batch_norm_in_eval_mode():
    norm = nn.BatchNorm2d(6, eps=1e-3)
    for value in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        value.uniform_(0.5, 2)
    frozen = FrozenBatchNorm2d.of(norm)
    for requires_grad in (False, True):
        x = torch.randn(2, 6, 4, 5, requires_grad=requires_grad)
        torch.testing.assert_close(frozen(x), norm.eval()(x))
    assert not list(frozen.parameters())
    x = torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(FrozenBatchNorm2d(6)(x), x)  # the identity at first
