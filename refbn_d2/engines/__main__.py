"""Train or evaluate a detector from a Detectron2 config."""

import argparse

from refbn_d2.engines.select import ENGINES, select_engine
from refbn_d2.utils.arguments import default_argument_parser, run_or_exit


def parser() -> argparse.ArgumentParser:
    """Return a parser of Detectron2's flags and `--engine`."""
    p = default_argument_parser(__doc__)
    p.add_argument(
        "--engine", choices=ENGINES, default="auto", help="auto: Detectron2 if it imports"
    )
    p.add_argument(
        "--allow-partial-weights", action="store_true",
        help="train even if MODEL.WEIGHTS fills under 95 %% of the backbone",
    )  # fmt: skip
    return p


def main() -> None:
    run_or_exit(lambda args: select_engine(args.engine).run(args), parser().parse_args())


if __name__ == "__main__":
    main()
