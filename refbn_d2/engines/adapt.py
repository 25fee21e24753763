"""Adapt a trained RefBN or RefIN detector to a new camera, by its unlabeled pictures.

The norms' moments are mixed with those of the pictures, and a new checkpoint is written.
"""

import argparse

from refbn_d2.utils.arguments import run_or_exit
from refbn_d2.utils.config_files import find_config_file


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument(
        "--config-file", required=True, metavar="CONFIG", type=find_config_file,
        help="the detector's config: config.yaml in its OUTPUT_DIR",
    )  # fmt: skip
    p.add_argument("--weights", required=True, metavar="W", help="its checkpoint")
    p.add_argument(
        "--images",
        required=True,
        metavar="DIR",
        help="pictures of the new camera, in any subfolder",
    )
    p.add_argument(
        "--output", required=True, metavar="OUT.pth",
        help="the new checkpoint; OUT.png shows predictions before and after",
    )  # fmt: skip
    p.add_argument("--num-images", type=int, default=32, help="pictures to use; default: 32")
    p.add_argument(
        "--prior-images", type=int, default=16,
        help="pictures that the old moments count as; 0 forgets them; default: 16",
    )  # fmt: skip
    p.add_argument("--seed", type=int, default=0, help="draws the pictures; default: 0")
    p.add_argument(
        "--evaluate", action="store_true", help="print AP on DATASETS.TEST before and after"
    )
    p.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides, at the end"
    )
    return p


def run(args: argparse.Namespace) -> None:
    from refbn_d2.engines.torchvision import adaptation  # imports torchvision

    print(adaptation.run(args))


def main() -> None:
    run_or_exit(run, parser().parse_args())


if __name__ == "__main__":
    main()
