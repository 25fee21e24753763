"""The reference batch in Detectron2's own training loop, in two processes."""

from itertools import pairwise

import pytest
import torch
import torch.multiprocessing as mp

from refbn_d2.utils import torch_compat
from tests.plugin.hook_helpers import CHANGES, equal, trainer_of

pytest.importorskip("detectron2.engine", reason="Detectron2 is not installed")
pytestmark = pytest.mark.detectron2


def _worker(rank, port, text, path):
    import functools

    import torch.distributed as dist
    from detectron2.config import CfgNode, get_cfg
    from detectron2.engine import defaults
    from detectron2.utils import comm

    import refbn_d2  # noqa: F401

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    defaults.create_ddp_model = functools.partial(defaults.create_ddp_model, device_ids=None)
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode.load_cfg(text))
    trainer = trainer_of(cfg)
    images = []
    forward = trainer.model.module.forward
    trainer.model.module.forward = lambda x: (
        images.append([d["image_id"] for d in x]),
        forward(x),
    )[1]
    trainer.train()
    parameters = {name: p.detach() for name, p in trainer.model.named_parameters()}
    torch.save(
        {"seen": trainer.keep.seen, "images": images, "parameters": parameters}, f"{path}/{rank}"
    )
    torch_compat.destroy_process_group()


@pytest.mark.parametrize("refresh", CHANGES)
def test_references_are_the_same_on_every_worker(detectron2_cfg, refresh, free_port, tmp_path):
    detectron2_cfg.merge_from_list(["MODEL.REFBN.REFRESH", refresh, "SOLVER.MAX_ITER", 4])
    mp.spawn(_worker, (free_port, detectron2_cfg.dump(), str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / str(rank)) for rank in range(2))
    for ours, theirs in zip(a["seen"], b["seen"], strict=True):
        assert equal(ours, theirs)
    assert equal(a["parameters"], b["parameters"])
    changed = [not equal(x, y) for x, y in pairwise(a["seen"])]
    assert changed == CHANGES[refresh][1:]
    trained = [[i for i in run["images"] if len(i) == 1] for run in (a, b)]
    assert trained[0] != trained[1]  # they did not see the same batches
