"""Pretrain a classifier on ImageNet or other labeled images, and write its Detectron2 backbone."""

import argparse

from refbn_d2.utils.arguments import default_argument_parser, run_or_exit


def run(args: argparse.Namespace) -> None:
    from refbn_d2.pretrain import main  # imports timm

    main.run(args)


def main() -> None:
    run_or_exit(run, default_argument_parser(__doc__).parse_args(), extra="pretrain")


if __name__ == "__main__":
    main()
