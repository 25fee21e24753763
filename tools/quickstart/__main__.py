#!/usr/bin/env python
"""Pretrain a backbone with RefBN and with BN, convert it, fine-tune Mask R-CNN, write a report.

Takes about ten minutes on two CPU cores. If it is interrupted, the same command resumes it.
"""

import argparse
import shlex

from refbn_d2.utils.arguments import run_or_exit


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--output-dir", default="output/quickstart", help="relative to the checkout")
    for what in ("pretrain", "finetune"):
        p.add_argument(
            f"--{what}", default="", metavar="'KEY VALUE ...'",
            help=f"overrides of every {what} config, for example 'SEED 2'",
        )  # fmt: skip
    return p


def run(args: argparse.Namespace) -> None:
    from steps import ROOT, run, steps, write_report

    changes = {what: shlex.split(getattr(args, what)) for what in ("pretrain", "finetune")}
    todo, folder = steps(args.output_dir, changes), ROOT / args.output_dir
    print(f"\nThe report: {write_report(folder, todo, run(folder, todo))}")


if __name__ == "__main__":
    run_or_exit(run, parser().parse_args())
