"""Convert the checkpoint of a ResNet or a detector, or describe a file.

refbn-convert SRC DST --to detectron2 --norm FrozenBN --verify
refbn-convert --inspect FILE
"""

import argparse
import logging

from refbn_d2.checkpoint.convert import TARGET_NORMS
from refbn_d2.checkpoint.inspection import describe
from refbn_d2.export.targets import TARGETS
from refbn_d2.utils.arguments import run_or_exit


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("src", nargs="?", metavar="SRC", help=".pth, .pt, .pkl or .safetensors")
    p.add_argument("dst", nargs="?", metavar="DST", help="a new file; its suffix gives the format")
    p.add_argument("--inspect", metavar="FILE", help="describe FILE and what loads it")
    p.add_argument(
        "--to", choices=TARGETS, help="layout of DST; onnx and torchscript hold the backbone only"
    )
    p.add_argument("--norm", choices=TARGET_NORMS, help="norm of DST; default: that of SRC")
    p.add_argument("--verify", action="store_true", help="compare SRC and DST on the same picture")
    p.add_argument(
        "--allow-partial", action="store_true", help="leave out tensors without a counterpart"
    )
    p.add_argument(
        "--config-file", metavar="FILE", help="of a detector; default: config.yaml next to SRC"
    )
    p.add_argument("--key", help="where in SRC the weights are: state_dict_ema, encoder_q, ...")
    return p


def run(args: argparse.Namespace) -> None:
    if args.inspect:
        print(describe(args.inspect, args.key))
        return
    from refbn_d2.export.convert_file import convert_file  # imports torchvision

    print(
        convert_file(
            args.src, args.dst, args.to, args.norm, args.verify, args.allow_partial,
            args.config_file, args.key,
        )
    )  # fmt: skip


def main() -> None:
    p = parser()
    args = p.parse_args()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if not args.inspect and not (args.src and args.dst and args.to):
        p.error("give SRC, DST and --to, or --inspect FILE")
    if args.inspect and (args.src or args.to):
        p.error("--inspect FILE can only be combined with --key")
    run_or_exit(run, args)


if __name__ == "__main__":
    main()
