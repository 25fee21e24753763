"""Evaluate a classifier on the derived sets of a study: `python -m refbn_d2.study.classification`.

One process evaluates all sets, because its start takes longer than a small set. It writes
`results.json` in OUTPUT_DIR: {label: {"top1" (%), "images"}}. The set "domains" becomes one label
"@domain" for each domain.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from refbn_d2.checkpoint import load_checkpoint, load_weights
from refbn_d2.config.pretrain import get_pretrain_cfg
from refbn_d2.data import shapes
from refbn_d2.pretrain.data.datasets import ImageSet
from refbn_d2.pretrain.evaluation import Evaluator
from refbn_d2.pretrain.models import build_model, check_num_classes
from refbn_d2.utils.arguments import default_argument_parser, run_or_exit
from refbn_d2.utils.device import resolve_device
from refbn_d2.utils.errors import DataError
from refbn_d2.utils.file_io import write_text


def evaluate(args: argparse.Namespace) -> None:
    """Write the accuracies on the sets in `args.sets`."""
    cfg = get_pretrain_cfg()
    cfg.merge_from_file(args.config_file)
    cfg.merge_from_list(args.opts)
    cfg.MODEL.DEVICE = resolve_device(cfg.MODEL.DEVICE)
    output_dir = Path(cfg.OUTPUT_DIR)
    found: dict[str, dict] = {}
    output_dir.mkdir(parents=True, exist_ok=True)
    for label, folder in args.sets.items():
        images = ImageSet(Path(folder))
        model = build_model(cfg, images.num_classes).to(cfg.MODEL.DEVICE)
        state = load_checkpoint(cfg.MODEL.WEIGHTS)["model"]
        check_num_classes(model, state, cfg.MODEL.WEIGHTS)
        load_weights(model, state, cfg.MODEL.WEIGHTS)
        evaluator = Evaluator(cfg, images)
        if label == "domains":
            found |= by_domain(model, evaluator, images)
        else:
            top1 = evaluator({"val": model})["val/top1"]
            found[label] = {"top1": top1, "images": len(images)}
    write_text(output_dir / "results.json", json.dumps(found, indent=1))


@torch.no_grad()
def by_domain(model: nn.Module, evaluator: Evaluator, images: ImageSet) -> dict[str, dict]:
    """Return {"@domain": {"top1" (%), "images"}} by the domains in the pictures' names.

    Raises:
        DataError: a picture cannot be read.
    """
    model.eval()
    right: list[bool] = []
    for pictures, labels, unreadable in evaluator.loader:  # in the order of `images`
        if unreadable:
            raise DataError(f"{images.path}: {unreadable[0][0]} cannot be read: {unreadable[0][1]}")
        with evaluator.autocast:
            logits = model(evaluator.normalize(pictures))
        right += (logits.argmax(1).cpu() == labels).tolist()
    domains = [shapes.domain_of(name) for name in images.reader.filenames()]
    of = {d: [r for r, other in zip(right, domains, strict=True) if other == d] for d in domains}
    return {
        f"@{domain}": {"top1": 100 * sum(own) / len(own), "images": len(own)}
        for domain, own in of.items()
    }


def _sets(text: str) -> dict[str, str]:
    try:
        sets = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(sets, dict) or not all(isinstance(folder, str) for folder in sets.values()):
        raise argparse.ArgumentTypeError(f'{text!r} must be {{"label": "folder"}}')
    return sets


def main() -> None:
    p = default_argument_parser(__doc__)
    p.add_argument(
        "--sets", required=True, type=_sets, metavar="JSON",
        help="{label: folder of class folders}, as JSON",
    )  # fmt: skip
    run_or_exit(evaluate, p.parse_args())


if __name__ == "__main__":
    main()
