"""Compare five norms in Mask R-CNN, trained on two similar pictures a step, and write a report.

Takes about ten minutes on two CPU cores. If it is interrupted, the same command resumes it.
"""

import argparse
import shlex
from pathlib import Path

from refbn_d2.utils.arguments import run_or_exit
from refbn_d2.utils.extras import require


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--output-dir", default="output/quickstart", help="default: output/quickstart")
    for what in ("pretrain", "finetune"):
        p.add_argument(
            f"--{what}", default="", metavar="'KEY VALUE ...'",
            help=f"overrides of every {what} config, for example 'SEED 2'",
        )  # fmt: skip
    return p


def run(args: argparse.Namespace) -> None:
    # What the last steps need is missed now, not after the first.
    require("quickstart", "torchvision", "pycocotools", "cv2", "timm", "tensorboard")
    from refbn_d2.quickstart.steps import run, steps, write_report

    changes = {what: shlex.split(getattr(args, what)) for what in ("pretrain", "finetune")}
    todo, folder = steps(args.output_dir, changes), Path(args.output_dir)
    print(f"\nThe report: {write_report(folder, todo, run(folder, todo))}")


def main() -> None:
    run_or_exit(run, parser().parse_args(), extra="quickstart")


if __name__ == "__main__":
    main()
