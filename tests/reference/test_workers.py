"""The reference batch in two processes: the same images and moments, few collectives."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from refbn_d2.reference.batch import ReferenceBatch
from refbn_d2.utils import torch_compat
from tests.reference.helpers import OPTIONS, Detector, images, make


def _worker(rank, port, refresh, path):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model, reference = make(refresh, num_images=6, slice_size=4)
    reference.capture()
    collectives, all_reduce = [], dist.all_reduce
    for name in ("all_reduce", "broadcast", "all_gather"):
        wrapped = getattr(dist, name)
        setattr(dist, name, lambda *a, f=wrapped, **k: (collectives.append(1), f(*a, **k))[1])
    counts, rows = [], []
    model.backbone[0].register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))
    for iteration in range(4):
        torch.manual_seed(iteration)
        del collectives[:]
        reference.before_step(iteration)
        model(images(10 * iteration + rank, 3)).backward()  # each worker has its own batch
        reference.after_step()
        counts.append(len(collectives))
    dist.all_reduce = all_reduce
    state = {k: v for k, v in model.state_dict().items() if "ref_" in k}
    torch.save({"counts": counts, "state": state, "rows": rows}, f"{path}/{rank}.pth")
    torch_compat.destroy_process_group()


@pytest.mark.parametrize(
    "refresh, counts, rows",
    [
        ("static", [0, 0, 0, 0], [3, 3, 3, 3]),
        ("full", [0, 0, 1, 0], [3, 3, 6, 3, 3]),
        ("slice", [1, 0, 1, 0], [2, 3, 3, 2, 3, 3]),
        (
            "concat",
            [1, 0, 1, 0],
            [2, 5, 3, 2, 5, 3],
        ),  # the head's slice, and the batch with the slice
    ],
)
def test_workers_agree_with_one_collective_per_refresh(tmp_path, free_port, refresh, counts, rows):
    mp.spawn(_worker, args=(free_port, refresh, str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    assert a["counts"] == b["counts"] == counts
    assert a["rows"] == b["rows"] == rows
    for name, value in a["state"].items():
        assert torch.equal(value, b["state"][name]), name


class HeadOfSome(Detector):
    """A head that gets only the samples that are not all zero."""

    def forward(self, images):
        features = self.backbone(torch.stack(images))["p2"]
        return self.head(features[torch.stack([i.abs().sum() > 0 for i in images])]).sum()


def _worker_with_an_empty_head(rank, port, path):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = HeadOfSome()
    nothing = [torch.zeros(3, 8, 8)] * 6
    identity = {"dataset": "d", "seed": 0, "images": []}
    reference = ReferenceBatch(model, nothing, OPTIONS, forward=model, identity=identity)
    reference.begin()
    inputs, references = [], []
    layer = model.head[1]
    layer.register_forward_pre_hook(lambda m, args: inputs.append(args[0]))
    # Workers with RoIs: none, only worker 1, both, both
    for iteration, batch in enumerate(
        [nothing, images(9, 3) if rank else nothing, *[images(5, 2)] * 2]
    ):
        reference.before_step(iteration)
        model(batch).backward()
        reference.after_step()
        references.append((layer.ref_mean.clone(), layer.ref_var.clone(), int(layer.ref_count)))
    torch.save({"inputs": inputs, "references": references}, f"{path}/{rank}.pth")
    torch_compat.destroy_process_group()


def test_an_unreached_layer_takes_the_first_batch_that_is_not_empty_on_all_workers(
    tmp_path, free_port
):
    mp.spawn(_worker_with_an_empty_head, args=(free_port, str(tmp_path)), nprocs=2)
    a, b = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    assert [count for *_, count in a["references"]] == [0, 192, 192, 192]  # 3 images of 8 x 8
    for ours, theirs in zip(a["references"], b["references"], strict=True):
        assert all(
            torch.equal(torch.as_tensor(x), torch.as_tensor(y))
            for x, y in zip(ours, theirs, strict=True)
        )
    torch.testing.assert_close(a["references"][3][0], b["inputs"][1].mean((0, 2, 3)))


def _worker_with_other_images(rank, port, what, path):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    identity = {
        "dataset": "mine",
        "seed": 0,
        "images": [{"file_name": "a.jpg", "fingerprint": "1"}],
    }
    if rank == 1 and what == "dataset":
        identity["dataset"] = "other"
    elif rank == 1:
        identity["images"] = [{"file_name": "a.jpg", "fingerprint": "2"}]
    model = Detector()
    try:
        ReferenceBatch(model, images(7, 6), OPTIONS, forward=model, identity=identity)
    except ValueError as error:
        open(f"{path}/{rank}", "w").write(str(error))
    torch_compat.destroy_process_group()


@pytest.mark.parametrize("what, named", [("dataset", "other against mine"), ("image", "'2'")])
def test_workers_with_different_references_stop(tmp_path, free_port, what, named):
    mp.spawn(_worker_with_other_images, args=(free_port, what, str(tmp_path)), nprocs=2)
    for rank in range(2):
        message = (tmp_path / str(rank)).read_text()
        assert "Worker 1 has another reference batch than worker 0" in message and named in message
