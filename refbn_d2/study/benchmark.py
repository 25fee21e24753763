"""Compare the speed of RefBN, RefIN and GroupNorm with nn.BatchNorm2d, forward and backward.

It prints a table of ratios to the time of BatchNorm. In each round all layers take turns, so that a
change of the machine's speed affects all of them. A ratio compares the medians over the rounds.

With --config-file, it compares whole training steps of detectors instead: time, its ratio to the
first config's, and on a GPU peak memory. The pictures are synthetic: no data set is needed.
"""

import argparse
import sys
from contextlib import nullcontext
from statistics import median

import torch
from torch import nn
from torch.utils.benchmark import Timer

from refbn_d2.layers import RefBatchNorm2d, RefInstanceNorm2d
from refbn_d2.layers.functional import GRADIENTS
from refbn_d2.utils.arguments import run_or_exit
from refbn_d2.utils.config_files import find_config_file
from refbn_d2.utils.errors import ConfigError

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
    x.requires_grad_()
    autocast = torch.autocast(x.device.type, x.dtype) if args.dtype != "float32" else nullcontext()
    found = {}
    for name, layer in layers(shape[1]).items():
        layer.to(args.device)
        with autocast:  # on a GPU, GroupNorm returns float32
            gradient = torch.randn_like(layer(x))
        names = {"torch": torch, "layer": layer, "x": x, "gradient": gradient, "cast": autocast}
        found[name] = Timer(
            "with cast: y = layer(x)\ntorch.autograd.backward(y, gradient); x.grad = None",
            globals=names, num_threads=args.threads,
        )  # fmt: skip
    return found


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__)
    detectors = p.add_argument_group("detectors")
    detectors.add_argument(
        "--config-file", nargs="+", default=[], metavar="FILE", type=find_config_file,
        help="detectors; the device and the precision are the config's",
    )  # fmt: skip
    detectors.add_argument(
        "--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"),
        help="of the pictures; default: 800 1333",
    )  # fmt: skip
    detectors.add_argument("--images", type=int, default=2, help="in a step; default: 2")
    detectors.add_argument(
        "--steps",
        type=int,
        default=16,
        help="in a round, a multiple of MODEL.REFBN.REFRESH_PERIOD; default: 16",
    )
    detectors.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE",
        help="config keys and values for all detectors; the last option",
    )  # fmt: skip
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
    for name in ("rounds", "steps", "images"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name} {getattr(args, name)}; allowed: 1 or more")
    on = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{args.threads} threads"
    print(f"# {' '.join(sys.argv[1:])}\n# torch {torch.__version__}, {on}")
    if args.config_file:
        if args.device != "cpu" or args.dtype != "float32" or args.channels_last:
            raise ConfigError(
                "--device, --dtype and --channels-last are for the layers; with --config-file, set "
                "MODEL.DEVICE and SOLVER.AMP.ENABLED after --opts"
            )
        from refbn_d2.study.step_benchmark import compare_steps

        print(
            compare_steps(
                args.config_file, args.opts, tuple(args.size), args.images, args.rounds, args.steps
            )
        )
    else:
        compare_layers(args)


def compare_layers(args: argparse.Namespace) -> None:
    """Print the table of the layers."""
    from tqdm import tqdm

    names = list(layers(32))
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
