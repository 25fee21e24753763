"""Pretrain a classifier, and write its Detectron2 backbone: `python -m refbn_d2.pretrain`."""

from refbn_d2.pretrain import run
from refbn_d2.utils.arguments import default_argument_parser, run_or_exit

if __name__ == "__main__":
    run_or_exit(run, default_argument_parser(__doc__).parse_args())
