"""Our config against Detectron2's own."""

from pathlib import Path

import pytest
import yaml

from refbn_d2.config import add_refbn_config, get_cfg, refbn_options

pytestmark = pytest.mark.detectron2

OWN = (
    "DATASETS.REGISTER", "DATALOADER.BATCH_COMPOSITION", "DATALOADER.DOMAIN_FIELD",
    "TEST.MAX_DETS_PER_IMAGE",
)  # fmt: skip


@pytest.fixture
def bare_cfg():
    """Detectron2's config without this package's keys."""
    config = pytest.importorskip("detectron2.config")
    from refbn_d2 import plugin

    plugin.unregister()
    try:
        return config.get_cfg()
    finally:
        plugin.register()


def flat(tree, prefix=""):
    for key, value in tree.items():
        if hasattr(value, "items"):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def yamls(*folders):
    package = Path(pytest.importorskip("detectron2").__file__).parent
    for configs in (package.parent / "configs", package / "model_zoo" / "configs"):
        if configs.is_dir():
            return [
                path for folder in folders for path in sorted((configs / folder).glob("*.yaml"))
            ]
    pytest.skip("Detectron2 is installed without its configs")


def test_same_keys_values_and_types(bare_cfg):
    ours, theirs = dict(flat(get_cfg())), dict(flat(bare_cfg))
    own = {k for k in ours if k.startswith("MODEL.REFBN.") or k in OWN}
    assert ours.keys() - theirs.keys() == own
    assert theirs.keys() <= ours.keys()
    assert {k: repr(ours[k]) for k in theirs} == {k: repr(v) for k, v in theirs.items()}


def test_own_keys_on_detectron2s_config(bare_cfg):
    registered = dict(flat(pytest.importorskip("detectron2.config").get_cfg()))
    assert registered == dict(flat(get_cfg()))
    add_refbn_config(bare_cfg)
    assert type(bare_cfg.MODEL.REFBN) is type(bare_cfg)
    assert refbn_options(bare_cfg) == refbn_options(get_cfg())
    own = {k: v for k, v in flat(get_cfg()) if "REFBN" in k or k in OWN}
    assert own.items() <= dict(flat(bare_cfg)).items()


def test_each_engine_loads_what_the_other_dumps(bare_cfg, tmp_path):
    path = tmp_path / "config.yaml"
    add_refbn_config(bare_cfg)
    for writer, reader in ((bare_cfg, get_cfg()), (get_cfg(), bare_cfg)):
        path.write_text(writer.dump())
        reader.merge_from_file(str(path))
        assert yaml.safe_load(reader.dump()) == yaml.safe_load(writer.dump())


def test_detectron2s_yamls_read_the_same(bare_cfg):
    paths = yamls("", "COCO-Detection", "COCO-InstanceSegmentation", "COCO-Keypoints", "Misc")
    paths = [path for path in paths if "retinanet" not in path.name.lower()]
    assert len(paths) > 30
    for path in paths:
        ours, theirs = get_cfg(), bare_cfg.clone()
        ours.merge_from_file(str(path))
        theirs.merge_from_file(str(path))
        assert dict(flat(theirs)).items() <= dict(flat(ours)).items(), path
