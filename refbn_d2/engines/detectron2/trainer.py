"""Run a detector's config by Detectron2's DefaultTrainer, with this package's outputs.

This adds to Detectron2's `tools/train_net.py`: RefBN and its reference batch, DATASETS.REGISTER,
`curves.png` and `samples.png`. A run stops if weights do not fit, and uses the CPU if there is no
GPU.
"""

import argparse
import functools
import logging
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import yaml
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.engine import DefaultTrainer, default_setup, hooks
from detectron2.evaluation import (
    CityscapesInstanceEvaluator,
    CityscapesSemSegEvaluator,
    COCOEvaluator,
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    LVISEvaluator,
    PascalVOCDetectionEvaluator,
    SemSegEvaluator,
    inference_context,
    verify_results,
)
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.structures import BoxMode
from detectron2.utils import comm
from torch import nn

from refbn_d2 import plugin
from refbn_d2.checkpoint.files import load_checkpoint, save_checkpoint
from refbn_d2.checkpoint.loading import load_weights
from refbn_d2.checkpoint.source import parse_source
from refbn_d2.config.checks import check_batch, check_solver, warn_frozen_from_scratch
from refbn_d2.config.resume import FREE_IN_DETECTION
from refbn_d2.engines.detectron2.datasets import check_datasets, repaired_datasets
from refbn_d2.engines.detectron2.processes import errors_explained, join_workers, setup_log
from refbn_d2.plugin.hook import unwrapped
from refbn_d2.plugin.registration import register_datasets
from refbn_d2.training.main import run_lock
from refbn_d2.training.output_dir import check_output_dir, check_resumable, last_checkpoint_name
from refbn_d2.utils.device import resolve_device
from refbn_d2.utils.distributed import launch, planned_world_size
from refbn_d2.utils.errors import ConfigError, DataError
from refbn_d2.utils.file_io import remove_unfinished, write_text
from refbn_d2.utils.torch_compat import get_total_norm
from refbn_d2.visualization.curves import plot_curves
from refbn_d2.visualization.samples import SAMPLES_SHOWN, draw_samples, sample_item

logger = logging.getLogger(__name__)

plugin.register()  # in spawned workers too


def run(args: argparse.Namespace) -> None:
    """Do what `tools/train_net.py` does on this engine; see its `--help` for `args`.

    Raises:
        ConfigError: a key that Detectron2 does not know, or a value of the wrong type.
    """
    cfg = _config(args)
    register_datasets(cfg)
    workers = planned_world_size(args.num_gpus, args.num_machines)
    if not args.eval_only:
        check_solver(cfg)
        check_batch(cfg, workers)
    if workers > 1:  # a single worker reads the data itself, before it builds anything
        check_datasets(*_datasets(cfg, args), masks=cfg.MODEL.MASK_ON)
    with run_lock(cfg.OUTPUT_DIR, args):
        launch(
            _main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url,
            torch.device(cfg.MODEL.DEVICE).type, (cfg, args),
        )  # fmt: skip


def _config(args: argparse.Namespace) -> CfgNode:
    cfg = get_cfg()
    try:
        cfg.merge_from_file(args.config_file)
        cfg.merge_from_list(args.opts)
    except (KeyError, ValueError, AssertionError, yaml.YAMLError) as error:
        raise ConfigError(f"{args.config_file}, overridden by {args.opts}: {error}") from error
    cfg.MODEL.DEVICE = resolve_device(cfg.MODEL.DEVICE)
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == "cpu":
        logger.warning("SOLVER.AMP needs CUDA in Detectron2: training in float32 on the CPU.")
        cfg.SOLVER.AMP.ENABLED = False
    cfg.freeze()
    return cfg


def _datasets(cfg: CfgNode, args: argparse.Namespace) -> tuple[Sequence[str], Sequence[str]]:
    return () if args.eval_only else cfg.DATASETS.TRAIN, cfg.DATASETS.TEST


def _main(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Run in every worker."""
    join_workers(cfg.MODEL.DEVICE, args)
    if not args.eval_only:
        check_output_dir(cfg, args.resume, FREE_IN_DETECTION)
    comm.synchronize()  # so that all workers have read the old config.yaml
    with errors_explained(cfg.OUTPUT_DIR):
        default_setup(cfg, args)
        setup_log(cfg.OUTPUT_DIR)
        register_datasets(cfg)
        train, test = _datasets(cfg, args)
        trained, masks = cfg.DATASETS.TRAIN, cfg.MODEL.MASK_ON
        with repaired_datasets(train, test, cfg.OUTPUT_DIR, trained, masks):
            _run(cfg, args)


def _run(cfg: CfgNode, args: argparse.Namespace) -> None:
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, args.allow_partial_weights)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results.update(Trainer.test_with_TTA(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return
    if comm.is_main_process():
        remove_unfinished(cfg.OUTPUT_DIR)
    if not (args.resume and last_checkpoint_name(Path(cfg.OUTPUT_DIR))):
        warn_frozen_from_scratch(cfg)
    trainer = Trainer(cfg, args.allow_partial_weights)
    trainer.resume_or_load(resume=args.resume)
    trainer.checkpointer.save_missing_final(trainer.start_iter, trainer.max_iter)
    trainer.train()


class Trainer(DefaultTrainer):
    """DefaultTrainer with evaluators, pictures, and loading that fails loudly."""

    def __init__(self, cfg: CfgNode, allow_partial_weights: bool = False) -> None:
        self.allow_partial_weights = allow_partial_weights
        super().__init__(cfg)

    def build_hooks(self) -> list[hooks.HookBase]:
        """Return DefaultTrainer's hooks, with this package's checkpointer and curves."""
        self.checkpointer = Checkpointer(
            self.model, self.cfg.OUTPUT_DIR, self.allow_partial_weights, trainer=weakref.proxy(self)
        )
        built = super().build_hooks()
        if self.cfg.TEST.AUG.ENABLED:
            # On every worker, right after the evaluation. Only worker 0 has the hooks that write;
            # they come later.
            evaluation = [type(hook) for hook in built].index(hooks.EvalHook)
            augmented = hooks.EvalHook(0, lambda: self.test_with_TTA(self.cfg, self.model))
            built.insert(evaluation + 1, augmented)
        if comm.is_main_process():
            built.append(Curves(self.cfg.OUTPUT_DIR, self.cfg.TEST.EVAL_PERIOD))
        return built

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None):
        folder = output_folder or f"{cfg.OUTPUT_DIR}/inference"
        if len(cfg.DATASETS.TEST) > 1:  # a folder each, as on the torchvision engine
            folder = f"{folder}/{dataset_name}"
        return build_evaluator(dataset_name, folder, cfg.TEST.MAX_DETS_PER_IMAGE)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Sequence[DatasetEvaluator] | None = None
    ) -> dict:
        """Evaluate as DefaultTrainer does, and draw pictures of the first data set."""
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process() and evaluators is None and cfg.DATASETS.TEST:
            mapper = DatasetMapper(cfg, is_train=False)
            draw_predictions(unwrapped(model), cfg.DATASETS.TEST[0], mapper, cfg.OUTPUT_DIR)
        return results

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """Return results with test-time augmentation, with "_TTA" after each task's name."""
        folder = f"{cfg.OUTPUT_DIR}/inference_TTA"
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = cls.test(cfg, GeneralizedRCNNWithTTA(cfg, unwrapped(model)), evaluators)
        return {f"{task}_TTA": metrics for task, metrics in results.items()}


def build_evaluator(dataset_name: str, output_folder: str, max_dets: int = 100) -> DatasetEvaluator:
    """Return the evaluator for a data set's type, as Detectron2's script does.

    Args:
        max_dets: detections of an image and class that count in COCO's AP.

    Raises:
        ConfigError: there is no evaluator for this type; names it.
    """
    kind = MetadataCatalog.get(dataset_name).get("evaluator_type")
    semantic = functools.partial(SemSegEvaluator, output_dir=output_folder)
    # None is Detectron2's way to say 100, at which it prints COCO's own table.
    limit = None if max_dets == 100 else max_dets
    coco = functools.partial(COCOEvaluator, output_dir=output_folder, max_dets_per_image=limit)
    panoptic = functools.partial(COCOPanopticEvaluator, output_dir=output_folder)
    by_kind = {
        "coco": [coco],
        "sem_seg": [semantic],
        "coco_panoptic_seg": [semantic, coco, panoptic],
        "lvis": [functools.partial(LVISEvaluator, output_dir=output_folder)],
        "pascal_voc": [PascalVOCDetectionEvaluator],
        "cityscapes_instance": [CityscapesInstanceEvaluator],
        "cityscapes_sem_seg": [CityscapesSemSegEvaluator],
    }
    if kind not in by_kind:
        raise ConfigError(
            f"There is no evaluator for data set {dataset_name} of evaluator_type {kind!r}; "
            f"allowed: {', '.join(by_kind)}. Set the type with MetadataCatalog, or remove the data "
            "set from DATASETS.TEST."
        )
    evaluators = [build(dataset_name) for build in by_kind[kind]]
    return evaluators[0] if len(evaluators) == 1 else DatasetEvaluators(evaluators)


class Checkpointer(DetectionCheckpointer):
    """A DetectionCheckpointer that also takes torchvision's and timm's ResNets, and fails loudly.

    `checkpoint.loading.load_weights` reports what fits, and raises if under 95 % of it does.
    """

    def __init__(
        self, model: nn.Module, save_dir: str, allow_partial: bool, **checkpointables
    ) -> None:
        super().__init__(model, save_dir, **checkpointables)
        self.allow_partial = allow_partial

    def save(self, name: str, **kwargs) -> None:
        """Write `name`.pth whole or not at all, on worker 0, but no weights that are not finite.

        Detectron2 writes into the file in place. It checks only losses: a gradient that is not
        finite breaks the weights one step before a loss shows it, and the last checkpoint would no
        longer be good.

        Raises:
            FloatingPointError: a weight is infinite or NaN.
        """
        if not (self.save_dir and self.save_to_disk):
            return
        state = self.model.state_dict()
        weights = [t for t in state.values() if t.is_floating_point()]
        if not bool(get_total_norm(weights).isfinite()):
            raise FloatingPointError(f"A weight is infinite or NaN, so {name}.pth is not written.")
        others = {key: value.state_dict() for key, value in self.checkpointables.items()}
        path = Path(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        save_checkpoint({"model": state, **others, **kwargs}, path)
        self.tag_last_checkpoint(path.name)

    def save_missing_final(self, start_iter: int, max_iter: int) -> None:
        """Write the model_final.pth of a run that ended as it was about to write it."""
        final = Path(self.save_dir, "model_final.pth")
        if start_iter >= max_iter and not final.exists():
            self.save(final.stem, iteration=max_iter - 1)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write last_checkpoint, whole or not at all."""
        write_text(Path(self.save_dir, "last_checkpoint"), last_filename_basename)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict:
        """Load as DetectionCheckpointer does; `path` may end in "?key=KEY" (`checkpoint.source`).

        Raises:
            FileNotFoundError: there is no such file on worker 0.
            CheckpointError: the file cannot be read, does not fit the model, or cannot be resumed
                because another program wrote it.
        """
        self._asked = parse_source(path or "")
        file = self._asked.file
        if file and not self._asked.is_url and comm.is_main_process() and not os.path.isfile(file):
            raise FileNotFoundError(
                f"{file}: there is no such checkpoint file. Check the path in MODEL.WEIGHTS."
            )
        self._needed = self.checkpointables if checkpointables is None else checkpointables
        try:
            return super().load(file, checkpointables)
        finally:  # Detectron2 resets it only if nothing is raised
            self._parsed_url_during_load = None

    def _load_file(self, filename: str) -> dict:
        """Read a file without Detectron2's reader, which runs the code in a .pkl."""
        self._source = filename
        of_pycls = filename.endswith(".pyth")
        key = self._asked.key or ("model_state" if of_pycls else None)
        checkpoint = load_checkpoint(filename, key=key, caffe2=True)
        if of_pycls:
            checkpoint["__author__"] = "pycls"
        if of_pycls or self._asked.matching_heuristics:
            checkpoint["matching_heuristics"] = True
        check_resumable(filename, checkpoint, self._needed)
        return checkpoint

    def _load_model(self, checkpoint: dict) -> None:
        state, arch = checkpoint.pop("model"), str(checkpoint.get("arch"))
        if checkpoint.get("matching_heuristics"):
            of_caffe2 = checkpoint.get("__author__") == "Caffe2"
            state = align_and_update_state_dicts(self.model.state_dict(), state, of_caffe2)
            if of_caffe2:
                state = _with_statistics(state)
        load_weights(self.model, state, self._source, self.allow_partial, arch)


def _with_statistics(state: dict) -> dict:
    """Add running statistics of 0 and 1 to Caffe2's norms, whose statistics are folded in."""
    for name in [name for name in state if name.endswith("norm.weight")]:
        layer = name.removesuffix("weight")
        state.setdefault(f"{layer}running_mean", torch.zeros_like(state[name]))
        state.setdefault(f"{layer}running_var", torch.ones_like(state[name]))
    return state


class Curves(hooks.HookBase):
    """Draw curves.png from metrics.json after each evaluation."""

    def __init__(self, output_dir: str, period: int) -> None:
        self.folder, self.period = Path(output_dir), period

    def after_step(self) -> None:
        if self.period > 0 and (self.trainer.iter + 1) % self.period == 0:
            self.after_train()

    def after_train(self) -> None:
        try:
            plot_curves(self.folder / "metrics.json", self.folder / "curves.png")
        except (DataError, FileNotFoundError) as error:  # nothing to draw yet
            logger.warning("No curves.png: %s", error)


def draw_predictions(
    model: nn.Module, dataset_name: str, mapper: Callable[[dict], dict], output_dir: str
) -> None:
    """Draw samples.png: the first test images, with predictions next to the ground truth.

    Draw nothing if the data has no annotations, or the model predicts no instances.
    """
    shown = DatasetCatalog.get(dataset_name)[:SAMPLES_SHOWN]
    dicts = [_boxes_as_coco_has_them(d) for d in shown if "annotations" in d]
    with inference_context(model), torch.no_grad():
        outputs = [model([mapper(d)])[0].get("instances") for d in dicts]
    items = [
        sample_item(dataset_dict, _fields(instances))
        for dataset_dict, instances in zip(dicts, outputs, strict=True)
        if instances is not None
    ]
    if items:
        names = MetadataCatalog.get(dataset_name).thing_classes
        draw_samples(items, names, Path(output_dir) / "samples.png")


def _boxes_as_coco_has_them(dataset_dict: dict) -> dict:
    def converted(annotation: dict) -> dict:
        mode = annotation["bbox_mode"]
        return annotation | {"bbox": BoxMode.convert(annotation["bbox"], mode, BoxMode.XYWH_ABS)}

    return dataset_dict | {"annotations": list(map(converted, dataset_dict["annotations"]))}


def _fields(instances) -> dict:
    fields = instances.get_fields()
    return fields | {"pred_boxes": fields["pred_boxes"].tensor}
