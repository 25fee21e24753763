#!/usr/bin/env python
"""Train or evaluate a detector out of a Detectron2 config."""

import argparse
import logging
import sys

from refbn_d2.engines.select import ENGINES, select


def parser() -> argparse.ArgumentParser:
    """Detectron2's own flags, and `--engine`."""
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--config-file", required=True, metavar="FILE", help="path to a config file")
    p.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR"
    )
    p.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    p.add_argument("--num-gpus", type=int, default=1, help="per machine; workers, on the CPU")
    p.add_argument("--num-machines", type=int, default=1)
    p.add_argument("--machine-rank", type=int, default=0, help="of this machine, from 0")
    p.add_argument(
        "--dist-url", default="auto", help="tcp://host:port of machine 0; auto on a single machine"
    )
    p.add_argument(
        "--engine", choices=ENGINES, default="auto", help="auto: Detectron2 where it imports"
    )
    p.add_argument(
        "--allow-partial-weights", action="store_true",
        help="train although MODEL.WEIGHTS fills under 95 %% of the backbone",
    )  # fmt: skip
    p.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config, last"
    )
    return p


def main() -> None:
    args = parser().parse_args()
    try:
        select(args.engine).run(args)
    except (ValueError, OSError, ArithmeticError, NotImplementedError, ImportError) as error:
        logging.getLogger("refbn_d2").debug("", exc_info=True)  # the traceback goes to log.txt
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
