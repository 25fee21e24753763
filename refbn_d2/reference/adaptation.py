"""Adapt a trained model to the pictures of another camera: mix their moments into its norms.

In a script:

    adapt_reference(model, pictures, weight=32 / (32 + 16))
    torch.save(model.state_dict(), "adapted.pth")
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from refbn_d2.layers import Moments, RefBatchNorm2d, ReferenceNorm, refbn_layers
from refbn_d2.layers.functional import mix_moments
from refbn_d2.reference.inputs import Sample, infer_inputs


@torch.no_grad()
def adapt_reference(
    model: nn.Module,
    samples: Tensor | Sequence[Sample],
    weight: float,
    forward: Callable[[list[Sample]], Any] | None = None,
) -> dict[str, Moments | None]:
    """mu = (1-a) mu_old + a mu_new;  var = (1-a) var_old + a var_new + a (1-a) (mu_old - mu_new)^2

    (mu_old, var_old) are the moments by which a RefBN or RefIN layer normalizes in eval mode,
    (mu_new, var_new) those of its input when the model runs on `samples`, and a is `weight`. The
    model runs once, in eval mode, and each layer normalizes by its own mixture. So a deeper layer
    measures the input that it will have afterwards.

    With a = n / (n + N), for n new images and N images that the old moments count as, this is the
    rule of Schneider et al., "Improving robustness against common corruptions by covariate shift
    adaptation", NeurIPS 2020, section 3. There the variances are averaged; here the distance of
    the means counts too, so that they are the moments of all n + N images together.

    RefBN: running statistics and reference both become the mixture. RefIN: the reference does.
    `ref_count` becomes the elements of n + N images: those recorded, divided by a. Nothing else in
    the model changes. If an error is raised, nothing does.

    A layer that is called several times in the pass pools its calls by count: each call normalizes
    by the mixture with all calls so far. Empty inputs (no RoIs) are left out.

    Args:
        model: has RefBN or RefIN layers; not wrapped by DistributedDataParallel.
        samples: n images: (N, C, H, W), normalized, or a list of samples as the model takes them in
            eval mode. All of them are one batch.
        weight: a in (0, 1]; 1 forgets the old moments.
        forward: runs the model on the list of samples; by default inferred from the model and the
            samples, as `ReferenceBatch` does.

    Returns:
        {layer: moments of its input}, None for a layer that had none and is unchanged.

    Raises:
        ValueError: `weight` is not in (0, 1], there are no samples, or no RefBN or RefIN layers.
    """
    if not 0 < weight <= 1:
        raise ValueError(f"weight must be in (0, 1], not {weight!r}")
    layers = dict(refbn_layers(model))
    if not layers or len(samples) == 0:
        missing = "samples are none" if layers else "model has no RefBN or RefIN layer"
        raise ValueError(f"There is nothing to adapt: the {missing}.")
    samples = list(samples)
    forward = forward or infer_inputs(model, samples).forward

    before = {m: {k: t.clone() for k, t in m.state_dict().items()} for m in layers.values()}

    def mix_in(layer: ReferenceNorm, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        (x,) = (*args, *kwargs.values())
        if x.numel() == 0:
            return
        layer.accumulate(x)
        new, old = layer.recorded_moments, before[layer]
        assert new is not None
        kind = "running" if isinstance(layer, RefBatchNorm2d) else "ref"
        mean, var = mix_moments(old[f"{kind}_mean"], old[f"{kind}_var"], new.mean, new.var, weight)
        layer.commit(Moments(mean, var, round(new.count / weight)))
        if isinstance(layer, RefBatchNorm2d):
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(var)

    training = {module: module.training for module in model.modules()}
    hooks = [layer.register_forward_pre_hook(mix_in, with_kwargs=True) for layer in layers.values()]
    for layer in layers.values():
        layer.stop_recording()
    try:
        model.eval()
        forward(samples)
    except BaseException:
        for layer, state in before.items():
            layer.load_state_dict(state)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
        recorded = {name: layer.stop_recording() for name, layer in layers.items()}
    return recorded
