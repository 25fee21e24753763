"""Measure what a norm does for generalization: run a study, and write its tables and report.

After an interruption, the same command resumes. docs/measuring.md explains study files and metrics.
"""

import argparse
from pathlib import Path

from refbn_d2.engines.select import ENGINES
from refbn_d2.utils.arguments import run_or_exit
from refbn_d2.utils.config_files import find_config_file


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--study", required=True, metavar="FILE", type=find_config_file,
        help="path of a study file, or name of one of this package: studies/smoke.yaml",
    )  # fmt: skip
    p.add_argument("--output-dir", default="", help="default: output/studies/<name of the study>")
    p.add_argument("--jobs", type=int, default=0, help="runs at a time; 0: one per GPU, or one")
    p.add_argument("--only", default="", metavar="norm=X,seed=N,condition=Y", help="run only these")
    p.add_argument("--engine", choices=ENGINES, default="", help="default: the study's")
    p.add_argument(
        "--have", type=Path, metavar="CSV", help="results of an earlier session; not repeated"
    )
    p.add_argument(
        "--same-code", default="", metavar="HASH",
        help="the code that made the results of --have, if it computes the same numbers as this",
    )  # fmt: skip
    p.add_argument("--dry-run", action="store_true", help="only list the commands")
    return p


def run(args: argparse.Namespace) -> None:
    from refbn_d2.study.measure import measure  # imports all that a study needs

    measure(args)


def main() -> None:
    run_or_exit(run, parser().parse_args(), extra="study")


if __name__ == "__main__":
    main()
