"""Detectron2's trainer on models and data sets that are not as the config or COCO says."""

import logging

import pytest
import torch
from torch import nn

from refbn_d2.utils.errors import ConfigError

pytest.importorskip("detectron2.engine", reason="Detectron2 is not installed")
pytestmark = pytest.mark.detectron2


def trainer_class(convert=lambda model: model, change=lambda dataset_dict: dataset_dict):
    """A DefaultTrainer without evaluation, of a converted model and changed dataset dicts."""
    from detectron2.data import DatasetCatalog, build_detection_train_loader
    from detectron2.engine import DefaultTrainer

    class Trainer(DefaultTrainer):
        @classmethod
        def build_model(cls, cfg):
            return convert(super().build_model(cfg))

        @classmethod
        def build_train_loader(cls, cfg):
            dicts = [change(dict(d)) for d in DatasetCatalog.get(cfg.DATASETS.TRAIN[0])]
            return build_detection_train_loader(cfg, dataset=dicts)

        def build_hooks(self):
            return [hook for hook in super().build_hooks() if "Eval" not in type(hook).__name__]

    return Trainer


def without_size(dataset_dict):
    del dataset_dict["width"], dataset_dict["height"]
    return dataset_dict


def test_a_model_that_a_converter_took_refbn_from_is_refused(detectron2_cfg):
    trainer = trainer_class(nn.SyncBatchNorm.convert_sync_batchnorm)
    with pytest.raises(ConfigError, match=r"MODEL.RESNETS.NORM .* only SyncBatchNorm"):
        trainer(detectron2_cfg)


def test_a_model_that_is_frozen_gets_a_warning(detectron2_cfg, caplog):
    from detectron2.layers import FrozenBatchNorm2d

    with caplog.at_level(logging.WARNING):
        trainer_class(FrozenBatchNorm2d.convert_frozen_batchnorm)(detectron2_cfg)
    assert "is RefBN or RefIN, but the model has no such layer" in caplog.text


@pytest.mark.parametrize("norm", ["BN", "RefBN"])
def test_dataset_dicts_without_a_size_train(detectron2_cfg, norm):
    """Oracle: BN, which trains on them."""
    assert detectron2_cfg.DATALOADER.ASPECT_RATIO_GROUPING
    norms = [f"MODEL.{n}.NORM" for n in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")]
    detectron2_cfg.merge_from_list(
        [x for key in norms for x in (key, norm)] + ["SOLVER.MAX_ITER", 2]
    )
    trainer = trainer_class(change=without_size)(detectron2_cfg)
    trainer.train()
    assert trainer.iter == 2


def test_segmentation_files_are_read_by_the_path_manager(detectron2_cfg, tmp_path):
    """A file that only Detectron2's PathManager finds is part of the fingerprint."""
    from detectron2.utils.file_io import PathManager
    from iopath.common.file_io import PathHandler

    from refbn_d2.plugin.hook import _WithFiles
    from refbn_d2.reference.selection import identity_of

    class Handler(PathHandler):
        def _get_supported_prefixes(self):
            return ["layerfix://"]

        def _open(self, path, mode="r", buffering=-1, **kwargs):
            return open(tmp_path / path.removeprefix("layerfix://"), mode)

    handler = Handler()
    PathManager.register_handler(handler, allow_override=True)
    for name in ("image", "labels"):
        (tmp_path / name).write_bytes(name.encode())
    dicts = [{"file_name": "layerfix://image", "sem_seg_file_name": "layerfix://labels"}]
    identity = identity_of("d", _WithFiles(dicts), 0)
    assert identity == identity_of("d", _WithFiles(dicts), 0)
    (tmp_path / "labels").write_bytes(b"others")
    assert identity != identity_of("d", _WithFiles(dicts), 0)


def test_instances_in_samples_are_covered():
    """Detectron2's own text for Instances leaves out the middle of long tensors."""
    from detectron2.structures import Boxes, Instances

    from refbn_d2.reference.selection import identity_of_samples

    def prints(value):
        boxes = torch.zeros(2000, 4)
        boxes[1000] = value
        instances = Instances((9, 9), gt_boxes=Boxes(boxes))
        return identity_of_samples([{"image": torch.zeros(3, 9, 9), "instances": instances}])

    assert prints(1) == prints(1) != prints(2)


def test_a_loader_without_a_model_registers_the_data_of_the_config(detectron2_cfg):
    from detectron2.data import DatasetCatalog, build_detection_train_loader

    [(_, *files), _] = detectron2_cfg.DATASETS.REGISTER
    detectron2_cfg.DATASETS.REGISTER = (("of_a_loader_alone", *files),)
    detectron2_cfg.DATASETS.TRAIN = ("of_a_loader_alone",)
    assert "of_a_loader_alone" not in DatasetCatalog.list()
    assert len(next(iter(build_detection_train_loader(detectron2_cfg)))) == 2
