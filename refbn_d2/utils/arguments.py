"""Give the tools' command lines Detectron2's flags, and errors of one line."""

import argparse
import atexit
import logging
import os
import signal
import sys
from collections.abc import Callable

from refbn_d2.utils.config_files import find_config_file
from refbn_d2.utils.errors import RefBNError
from refbn_d2.utils.extras import needs


def default_argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of Detectron2's flags and KEY VALUE pairs; a tool can add its own flags."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument(
        "--config-file", required=True, metavar="FILE", type=find_config_file,
        help="path of a config file, or name of a config of this package",
    )  # fmt: skip
    p.add_argument(
        "--resume", action="store_true", help="resume from the last checkpoint in OUTPUT_DIR"
    )
    p.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS")
    p.add_argument("--num-gpus", type=int, default=1, help="GPUs per machine; on the CPU, workers")
    p.add_argument("--num-machines", type=int, default=1)
    p.add_argument("--machine-rank", type=int, default=0, help="rank of this machine, from 0")
    p.add_argument(
        "--dist-url", default="auto", help="tcp://host:port of machine 0; auto for a single machine"
    )
    p.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides, at the end"
    )
    return p


def run_or_exit(
    run: Callable[[argparse.Namespace], object], args: argparse.Namespace, extra: str = "train"
) -> None:
    """Call `run(args)`; an error that a user can fix ends the process with one line.

    Its traceback goes to log.txt, if there is one. Ctrl-C ends the process with a line, by SIGINT,
    so that a shell script that called it ends too. Any other error is a bug, and is raised as it
    is.

    Args:
        extra: the extra of this package that has all that `run` imports.

    Raises:
        SystemExit: RefBNError or OSError was raised (1, with the line on stderr).
    """
    try:
        with needs(extra):
            run(args)
    except KeyboardInterrupt:
        logging.getLogger("refbn_d2").debug("", exc_info=True)
        print("Interrupted.", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except (RefBNError, OSError) as error:
        logging.getLogger("refbn_d2").debug("", exc_info=True)
        sys.exit(f"{type(error).__name__}: {error}")
    finally:  # while Python exits, Ctrl-C ends it without a traceback
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)
