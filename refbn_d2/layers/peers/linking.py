"""Find the convolution before a norm, from the structure of a built model."""

from collections import Counter
from typing import Any, TypeVar

from torch import nn

from refbn_d2.utils.errors import RefBNError

Norm = TypeVar("Norm", bound=nn.BatchNorm2d)


class LinkError(RefBNError):
    """Error: a norm needs the convolution before it, and the model has none that can be linked."""


def preceding_convolutions(
    model: nn.Module, norm_type: type[Norm]
) -> dict[str, tuple[Norm, nn.Conv2d]]:
    """Return {name: (norm, the convolution before it)} of every `norm_type` in `model`.

    The convolution is one of these, in this order:

    - the parent of the norm, if the norm is its child `norm` (Detectron2);
    - the sibling `convN` of `bnN`, registered before it (torchvision, timm);
    - the sibling registered just before the norm (`downsample.0` and `.1`, any nn.Sequential).

    If the sibling is an nn.Sequential, its last child is taken.

    Raises:
        LinkError: a norm has no such convolution; or the convolution or its weight is shared; or
            its channels are not the norm's; or it does not pad with a number of zeros. All such
            norms are named.
    """
    uses = Counter(m for _, m in model.named_modules(remove_duplicate=False))
    owners: Counter[Any] = Counter(
        p for m in model.modules() for p in m._parameters.values() if p is not None
    )
    found: dict[str, tuple[Norm, nn.Conv2d]] = {}
    refused = []
    for name, norm in model.named_modules():
        if not isinstance(norm, norm_type):
            continue
        conv = _before(model, name)
        if uses[norm] > 1:
            reason = "the norm is used in several places"
        elif conv is None:
            reason = "no Conv2d comes right before it"
        elif uses[conv] > 1 or owners[conv._parameters.get("weight")] != 1:
            reason = "the convolution before it is shared, or computes its weight from others"
        elif any(conv is other for _, other in found.values()):
            reason = "the convolution before it has another norm too"
        elif conv.out_channels != norm.num_features:
            reason = (
                f"the convolution before it has {conv.out_channels} channels, "
                f"the norm {norm.num_features}"
            )
        elif conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            reason = "the convolution before it does not pad with a fixed number of zeros"
        else:
            found[name] = norm, conv
            continue
        refused.append(f"{name or type(norm).__name__} ({reason})")
    if refused:
        raise LinkError(
            f"{norm_type.__name__} needs the weight of the convolution before it, and cannot get "
            f"it at {', '.join(refused)}. Use another norm there (BN, GN, RefBN), or a model with "
            "one convolution before each norm."
        )
    return found


def _before(model: nn.Module, name: str) -> nn.Conv2d | None:
    path, _, own = name.rpartition(".")
    parent = model.get_submodule(path)
    if isinstance(parent, nn.Conv2d):
        return parent if own == "norm" else None
    siblings = list(parent._modules)
    if own not in siblings:  # the norm is the model
        return None
    earlier = siblings[: siblings.index(own)]
    if own.replace("bn", "conv") != own and own.replace("bn", "conv") in earlier:
        return _last_conv(parent._modules[own.replace("bn", "conv")])
    return _last_conv(parent._modules[earlier[-1]]) if earlier else None


def _last_conv(module: nn.Module | None) -> nn.Conv2d | None:
    """Return the convolution that gives the output of `module`: itself, or a Sequential's last."""
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    if isinstance(module, nn.Conv2d) and module._modules.get("norm") is None:
        return module
    return None
