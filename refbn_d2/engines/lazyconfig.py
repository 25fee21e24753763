"""Train or evaluate a detector from a LazyConfig (.py). Needs Detectron2."""

import argparse

from refbn_d2.engines.select import select_engine
from refbn_d2.utils.arguments import default_argument_parser, run_or_exit


def run(args: argparse.Namespace) -> None:
    select_engine("detectron2")  # raises, with a guide, if it is not installed
    from refbn_d2.engines.detectron2 import lazyconfig

    lazyconfig.run(args)


def main() -> None:
    p = default_argument_parser(__doc__)
    p.add_argument(
        "--allow-partial-weights", action="store_true",
        help="train even if train.init_checkpoint fills under 95 %% of the backbone",
    )  # fmt: skip
    run_or_exit(run, p.parse_args())


if __name__ == "__main__":
    main()
