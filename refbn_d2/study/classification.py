"""Evaluate a classifier on the derived sets of a study: `python -m refbn_d2.study.classification`.

One process for all of them: starting takes longer than a small set. Writes `others/results.json`
in the run's folder: {label: {"top1" (%), "images"}}.
"""

import argparse
import json
from pathlib import Path

from refbn_d2.config.pretrain import get_pretrain_cfg
from refbn_d2.pretrain.data.datasets import ImageSet
from refbn_d2.pretrain.trainer import Trainer
from refbn_d2.utils.arguments import default_argument_parser, run_or_exit
from refbn_d2.utils.device import resolve_device
from refbn_d2.utils.file_io import write_text


def evaluate(args: argparse.Namespace) -> None:
    cfg = get_pretrain_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.MODEL.DEVICE = resolve_device(cfg.MODEL.DEVICE)
    output_dir, found = Path(cfg.OUTPUT_DIR), {}
    output_dir.mkdir(parents=True, exist_ok=True)
    for label, folder in json.loads(args.sets).items():
        cfg.DATASETS.TEST = folder
        trainer = Trainer(cfg, output_dir, resume=False, training=False)
        found[label] = {
            "top1": trainer.evaluate()["val/top1"],
            "images": len(ImageSet(Path(folder))),
        }
    write_text(output_dir / "results.json", json.dumps(found, indent=1))


def main() -> None:
    p = default_argument_parser(__doc__)
    p.add_argument("--sets", required=True, metavar="JSON", help="{label: folder of class folders}")
    run_or_exit(evaluate, p.parse_args())


if __name__ == "__main__":
    main()
