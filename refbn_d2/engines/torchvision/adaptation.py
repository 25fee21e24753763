"""Adapt a trained detector to the pictures of a new camera, and show what that changes."""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from refbn_d2.checkpoint.files import save_checkpoint
from refbn_d2.checkpoint.loading import load_weights
from refbn_d2.checkpoint.source import load_source
from refbn_d2.config import ConfigError, get_cfg
from refbn_d2.data.images import find_pictures, read_image
from refbn_d2.engines.torchvision.data import Mapper, train_class_names
from refbn_d2.engines.torchvision.evaluation import Evaluator
from refbn_d2.engines.torchvision.modeling import build_model
from refbn_d2.engines.torchvision.modeling.norms import FrozenBatchNorm2d
from refbn_d2.engines.torchvision.supported import check_supported
from refbn_d2.layers import has_refbn
from refbn_d2.reference.adaptation import adapt_reference
from refbn_d2.utils.device import resolve_device
from refbn_d2.utils.errors import CheckpointError, DataError, listing
from refbn_d2.visualization.samples import MIN_SCORE, SAMPLES_SHOWN, draw_samples

_WAY_OUT = "call refbn_d2.reference.adapt_reference on Detectron2's own model"


def run(args: argparse.Namespace) -> str:
    """Write the adapted checkpoint and a picture, and return a text about them.

    If an error is raised, nothing is written.

    Args:
        args: of `refbn_d2.engines.adapt`.

    Raises:
        RefBNError, OSError: something that the user can fix.
    """
    output, drawing = _new_files(args.output, args.images)
    files = _drawn(args.images, args.num_images, args.seed)
    if args.prior_images < 0:
        raise ConfigError(f"--prior-images is {args.prior_images}; allowed: 0 or more.")
    cfg = get_cfg()
    cfg.merge_from_file(args.config_file)
    trained_on = cfg.DATASETS.REGISTER
    cfg.merge_from_list(args.opts)
    new = {name for name, *_ in cfg.DATASETS.REGISTER}
    old = [entry for entry in trained_on if entry[0] not in new]
    cfg.DATASETS.REGISTER = (*old, *cfg.DATASETS.REGISTER)  # the classes' names are the old ones'
    check_supported(cfg, _WAY_OUT)
    cfg.MODEL.DEVICE = resolve_device(cfg.MODEL.DEVICE)
    cfg.freeze()
    model = _load(cfg, args.config_file, args.weights)
    mapper = Mapper(cfg, is_train=False)
    samples = [mapper({"file_name": str(file), "image_id": None}) for file in files]
    shown = samples[:SAMPLES_SHOWN]
    with tempfile.TemporaryDirectory() as folder:
        evaluator = _evaluator(cfg, Path(folder)) if args.evaluate else None
        ap_before = evaluator(model) if evaluator else {}
        before = _predict(model, shown)
        weight = len(samples) / (len(samples) + args.prior_images)
        unseen = _adapt(model, samples, weight, args.num_images)
        about = {
            "weights": args.weights,
            "images": str(args.images),
            "file_names": [file.relative_to(args.images).as_posix() for file in files],
            "prior_images": args.prior_images,
            "weight": weight,
            "seed": args.seed,
        }
        ap_after = evaluator(model) if evaluator else {}
        state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        _new_files(args.output, args.images)  # nobody has written them since
        try:
            _draw(cfg, shown, before, _predict(model, shown), drawing)
            save_checkpoint({"model": state, "adapted": about}, output)
        except BaseException:
            drawing.unlink(missing_ok=True)
            raise
    lines = [
        f"{output}: {args.weights}, adapted to {len(files)} pictures of {args.images}. They weigh "
        f"{weight:.3g} = {len(files)} / ({len(files)} + {args.prior_images}).",
        *_kept(cfg, model, unseen),
        f"{drawing}: predictions before and after.",
    ]
    return "\n".join(lines + ([_table(ap_before, ap_after)] if evaluator else []))


def _new_files(output: str | os.PathLike, images: str | os.PathLike) -> tuple[Path, Path]:
    """Return the checkpoint and the picture to write, neither of which exists."""
    checkpoint = Path(output)
    if checkpoint.suffix not in (".pth", ".pkl"):
        raise ConfigError(f"--output {output}: the name of a checkpoint ends in .pth or .pkl.")
    drawing = checkpoint.with_suffix(".png")
    for file in (checkpoint, drawing):
        if file.exists():
            raise FileExistsError(f"{file} exists and is not replaced: give --output a new name.")
    if drawing.resolve().is_relative_to(Path(images).resolve()):
        raise ConfigError(
            f"--output {output} is in the folder of --images, where {drawing.name} would count as "
            "one of its pictures: write elsewhere."
        )
    return checkpoint, drawing


def _drawn(folder: str | os.PathLike, num_images: int, seed: int) -> list[Path]:
    """Draw `num_images` of the pictures in `folder`, without repetition."""
    if num_images < 1:
        raise ConfigError(f"--num-images is {num_images}; allowed: 1 or more.")
    if seed < 0:
        raise ConfigError(f"--seed is {seed}; allowed: 0 or more.")
    files = find_pictures(folder)
    if num_images > len(files):
        raise DataError(
            f"{folder} has {len(files)} pictures, fewer than --num-images {num_images}: add "
            f"pictures, or set --num-images {len(files)}."
        )
    order = np.random.default_rng(seed).permutation(len(files))
    return [files[i] for i in order[:num_images]]


def _load(cfg, config_file: str, weights: str) -> nn.Module:
    """Return the trained detector, in eval mode."""
    model = build_model(cfg)
    if not has_refbn(model):
        norm, frozen = cfg.MODEL.RESNETS.NORM, cfg.MODEL.BACKBONE.FREEZE_AT
        raise ConfigError(
            f"{config_file}: the model has no RefBN or RefIN layer to adapt (MODEL.RESNETS.NORM "
            f"{norm!r}, MODEL.BACKBONE.FREEZE_AT {frozen}). Give the config of a detector that was "
            "trained with one."
        )
    state = load_source(weights)["model"]
    if not any(name.endswith("ref_mean") for name in state):
        raise CheckpointError(
            f"{weights} has no RefBN or RefIN layer to adapt. One with BN becomes RefBN by "
            f"refbn-convert {weights} NEW.pth --to detectron2 --norm RefBN"
        )
    report = load_weights(model, state, weights)
    misfits = [
        *(f"{name} (not in the file)" for name in report.missing),
        *(f"{name} (not in the model)" for name in report.unexpected),
        *(f"{name} {theirs} (in the model {ours})" for name, theirs, ours in report.shape_mismatch),
    ]
    if misfits:
        raise CheckpointError(
            f"{weights} is not a checkpoint of the detector in {config_file}: {len(misfits)} "
            f"tensors do not fit: {listing(misfits, 3)}. Give the config.yaml of its training."
        )
    return model.eval()


def _evaluator(cfg, folder: Path) -> Evaluator:
    evaluator = Evaluator(cfg, folder)
    if not any(d["annotations"] for data in evaluator.datasets.values() for d in data.dicts):
        raise ConfigError(
            f"--evaluate needs annotations, but DATASETS.TEST {tuple(cfg.DATASETS.TEST)} has none: "
            "name a data set that has, or leave out --evaluate."
        )
    return evaluator


@torch.no_grad()
def _predict(model: nn.Module, samples: Sequence[dict]) -> list[dict]:
    """Return the detections of each picture, alone in its batch, that `draw_samples` draws."""
    shown = []
    for sample in samples:
        (found,) = model([sample])
        drawn = found["scores"] >= MIN_SCORE  # the masks of all may be gigabytes
        shown.append({name.removeprefix("pred_"): t[drawn].cpu() for name, t in found.items()})
    return shown


def _adapt(model: nn.Module, samples: list[dict], weight: float, num_images: int) -> list[str]:
    """Adapt the model, and return the names of norms that saw nothing."""
    # No mask is pasted into a picture of full size: for all pictures at once that may be gigabytes.
    samples = [{**sample, "height": 1, "width": 1} for sample in samples]
    try:
        recorded = adapt_reference(model, samples, weight, model)
    except torch.cuda.OutOfMemoryError as error:
        raise ConfigError(
            f"--num-images {num_images} pictures, which are one batch, do not fit into the GPU's "
            "memory: set it lower, or add MODEL.DEVICE cpu."
        ) from error
    for name, moments in recorded.items():
        if moments and not (moments.mean.isfinite() & moments.var.isfinite()).all():
            raise CheckpointError(
                f"The moments of {name} on these pictures are infinite or NaN: the weights do not "
                "belong to this config, or their training has diverged. Nothing was written."
            )
    return [name for name, moments in recorded.items() if moments is None]


def _draw(cfg, samples: list[dict], before: list[dict], after: list[dict], path: Path) -> None:
    names = train_class_names(cfg)
    if names is None or len(names) != cfg.MODEL.ROI_HEADS.NUM_CLASSES:
        names = [f"class {i}" for i in range(cfg.MODEL.ROI_HEADS.NUM_CLASSES)]
    pictures = (read_image(sample["file_name"], "RGB") for sample in samples)
    items = list(zip(pictures, before, after, strict=True))
    draw_samples(items, names, path, titles=("before", "after"))


def _kept(cfg, model: nn.Module, unseen: list[str]) -> list[str]:
    """Return lines about the norms that keep their moments."""
    lines = []
    if unseen:
        lines.append(f"They keep their moments, because nothing was found: {listing(unseen, 3)}.")
    frozen = sum(isinstance(module, FrozenBatchNorm2d) for module in model.modules())
    if frozen and cfg.MODEL.BACKBONE.FREEZE_AT:
        lines.append(
            f"{frozen} FrozenBN layers keep theirs (MODEL.BACKBONE.FREEZE_AT "
            f"{cfg.MODEL.BACKBONE.FREEZE_AT}). To adapt them too, add MODEL.BACKBONE.FREEZE_AT 0."
        )
    return lines


def _table(before: dict[str, dict], after: dict[str, dict]) -> str:
    """Return AP before and after as a table of text."""
    rows = ["AP (%)                          before   after"]
    for dataset, tasks in before.items():
        for task, metrics in tasks.items():
            for metric in ("AP", "AP50", "AP75"):
                values = metrics[metric], after[dataset][task][metric]
                name = f"{dataset} {task}/{metric}"
                rows.append(f"{name:30}" + "".join(f"{value:8.2f}" for value in values))
    return "\n".join(rows)
