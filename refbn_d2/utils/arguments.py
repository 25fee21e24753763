"""What the tools' command lines have in common: Detectron2's flags, and errors of one line."""

import argparse
import logging
import sys
from collections.abc import Callable

from refbn_d2.utils.errors import RefBNError


def default_argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Detectron2's flags, and KEY VALUE pairs behind them; a tool may add its own."""
    p = argparse.ArgumentParser(description=description)
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
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of the config, last"
    )
    return p


def run_or_exit(run: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Call `run(args)`; what a user can fix ends the process with one line.

    Its traceback goes to log.txt, where there is one. Any other error is a bug, and passes with its
    traceback.

    Raises:
        SystemExit: RefBNError or OSError was raised (1, with the line on stderr).
    """
    try:
        run(args)
    except (RefBNError, OSError) as error:
        logging.getLogger("refbn_d2").debug("", exc_info=True)
        sys.exit(f"{type(error).__name__}: {error}")
