"""Compare the speed of RefBN, RefIN and GroupNorm with nn.BatchNorm2d, forward and backward.

It prints a table of ratios to the time of BatchNorm. In each round all layers take turns, so that a
change of the machine's speed affects all of them. A ratio compares the medians over the rounds.
"""

import argparse
from statistics import median

import torch
from torch import nn
from torch.utils.benchmark import Timer

from refbn_d2.layers import RefBatchNorm2d, RefInstanceNorm2d
from refbn_d2.layers.functional import GRADIENTS
from refbn_d2.utils.arguments import run_or_exit

# (N, C, H, W): stages of a ResNet-50 for 2 images of 800 x 1066, and a ResNet-18 for 16 of 128^2
SHAPES = [
    (2, 64, 400, 533), (2, 256, 200, 267), (2, 512, 100, 134), (2, 1024, 50, 67), (2, 2048, 25, 34),
    (16, 64, 64, 64), (16, 64, 32, 32), (16, 128, 16, 16), (16, 256, 8, 8), (16, 512, 4, 4),
]  # fmt: skip


def layers(channels: int) -> dict[str, nn.Module]:
    """Return {name: layer}: BatchNorm2d, GroupNorm, RefBN with each gradient, and RefIN."""
    norms = {"BN": nn.BatchNorm2d(channels), "GN": nn.GroupNorm(32, channels)}
    for gradient in GRADIENTS:
        layer = norms[f"RefBN {gradient}"] = RefBatchNorm2d(channels, gradient=gradient)
        layer.load_state_dict(norms["BN"].state_dict())  # the running statistics become reference
    norms["RefIN"] = RefInstanceNorm2d(channels)
    norms["RefIN"].load_state_dict(norms["BN"].state_dict())
    return norms


def timers(shape: tuple[int, ...], args: argparse.Namespace) -> dict[str, Timer]:
    """Return {name: timer} of one forward and backward pass, all on the same input."""
    x = torch.randn(shape, device=args.device, dtype=getattr(torch, args.dtype))
    if args.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    gradient = torch.randn_like(x)
    x.requires_grad_()
    return {
        name: Timer(
            "torch.autograd.backward(layer(x), gradient); x.grad = None",
            globals={"torch": torch, "layer": layer.to(args.device), "x": x, "gradient": gradient},
            num_threads=args.threads,
        )
        for name, layer in layers(shape[1]).items()
    }


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    p.add_argument(
        "--dtype", default="float32", choices=["float32", "bfloat16", "float16"],
        help="of the input; default: float32",
    )  # fmt: skip
    p.add_argument("--channels-last", action="store_true", help="memory format of the input")
    threads = torch.get_num_threads()
    p.add_argument("--threads", type=int, default=threads, help=f"default: {threads}")
    p.add_argument("--rounds", type=int, default=7, help="measurements of each layer; default: 7")
    return p


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    names = list(layers(32))
    print(f"# {args}")
    print("| shape | " + " | ".join(f"{name} / BN" for name in names[1:]) + " |")
    print("|---" * len(names) + "|")
    for shape in tqdm(SHAPES, disable=None, leave=False):
        times: dict[str, list[float]] = {name: [] for name in names}
        turns = timers(shape, args)
        for _ in range(args.rounds):
            for name, timer in turns.items():
                times[name].append(timer.blocked_autorange(min_run_time=0.05).median)
        ratios = [median(times[name]) / median(times["BN"]) for name in names[1:]]
        print(f"| {shape} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |", flush=True)


def main() -> None:
    run_or_exit(run, parser().parse_args())


if __name__ == "__main__":
    main()
