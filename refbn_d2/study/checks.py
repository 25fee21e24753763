"""Check that the parts of a study fit each other, before anything runs."""

from refbn_d2.study.spec import Evaluate
from refbn_d2.utils.errors import ConfigError


def check_backbone(made: str, used: str, where: str) -> None:
    """Check that a backbone of the norm `made` may start a model of the norm `used`.

    Raises:
        ConfigError: it may not.
    """

    def kind(norm: str) -> str:
        return norm if norm in ("RefIN", "GN", "LN", "") else "a batch norm"

    if kind(made) != kind(used) or (made == "folded" and used != "FrozenBN"):
        allowed = "FrozenBN" if made == "folded" else kind(made)
        raise ConfigError(
            f"{where}: the backbone has {made}, but MODEL.RESNETS.NORM is {used!r}; allowed: "
            f"{allowed}. Change it, or the norm's `pretrain: {{MODEL.NORM: ...}}` or `convert`"
        )


def check_masks(evaluate: Evaluate, mask_on: bool, where: str) -> None:
    """Check that a model without masks is not evaluated on masks.

    Raises:
        ConfigError: it is.
    """
    of_masks = [
        name
        for name in (*evaluate.metrics, *evaluate.steps_to)
        if name.startswith("segm/") or name == "loss_mask"
    ]
    if of_masks and not mask_on:
        raise ConfigError(
            f"{where}: the study measures {', '.join(of_masks)}, but MODEL.MASK_ON is False. Set "
            "`evaluate: {metrics: [bbox/AP]}`, and no steps_to of masks, or MODEL.MASK_ON"
        )
