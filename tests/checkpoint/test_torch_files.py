"""Files of torch.save that declare what they do not hold, or hold what cannot be a weight."""

import pickle
import re
import zipfile
from collections import Counter, OrderedDict

import pytest
import torch
from torch import nn

from refbn_d2.checkpoint.files import load_checkpoint
from refbn_d2.utils.errors import CheckpointError
from tests.versions import needs


class Call:
    """Pickles as a call, and as changes of its result."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def saved(path, data):
    torch.save(data, path, _use_new_zipfile_serialization="legacy" not in path.name)
    return path


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """Rewrite the file at `path` with `change` applied to the bytes of its pickle."""
    if not zipfile.is_zipfile(path):
        path.write_bytes(change(path.read_bytes()))
        return path
    with zipfile.ZipFile(path) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(name, change(data) if name.endswith("data.pkl") else data)
    return path


NAMES = ["a.pth", "legacy.pth"]


@needs("torch", 2, 6, "reading all of it")
@pytest.mark.parametrize("name", NAMES)
def test_everything_that_training_scripts_save_is_read(tmp_path, name):
    """The oracle is torch.load."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    tied = torch.ones(5, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    state = model.state_dict()
    state |= {
        "tied": tied,
        "again": tied.t(),
        "part": tied[1:3],
        "expanded": torch.ones(1).expand(9),
    }
    state |= {"b": torch.ones(2).bfloat16(), "h": torch.ones(2).half()}
    if name == "a.pth":
        state["f8"] = torch.ones(2).to(torch.float8_e4m3fn)
    state |= {"u": torch.ones(2, dtype=torch.uint8), "empty": torch.ones(0, 3)}
    state |= {"p": nn.Parameter(torch.ones(3)), "i": torch.arange(3, dtype=torch.int16)}
    data = {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "rest": [Counter("aab"), {1, 2}, torch.Size([1]), torch.float16, torch.device("cpu"), 1j],
        "rng": torch.get_rng_state(),
        "bytes": b"\0\xff",
        "buffer": bytearray(b"ab"),
    }
    path = saved(tmp_path / name, data)
    expected, found = torch.load(path, weights_only=True), load_checkpoint(path)
    for key in ("rest", "bytes", "buffer"):
        assert found[key] == expected[key] == data[key]
    assert torch.equal(found["rng"], data["rng"])
    steps = found["optimizer"]["state"][0]
    assert torch.equal(steps["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert list(found["model"]) == list(state)
    for key, tensor in found["model"].items():
        assert tensor.dtype == state[key].dtype and tensor.shape == state[key].shape
        assert torch.equal(tensor.float(), state[key].float()), key


def test_a_zip_bomb_is_refused(tmp_path):
    path = saved(tmp_path / "a.pth", {"w": torch.zeros(2**22)})
    rewritten(path, lambda data: data, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 2**17
    with pytest.raises(CheckpointError, match="a.pth declares more .*unpacks to 1677"):
        load_checkpoint(path)


def test_a_file_is_checked_as_what_torch_takes_it_for(tmp_path):
    """An old torch file has a sound archive at its end, which zipfile finds."""
    sound = saved(tmp_path / "a.pth", {"w": torch.ones(2)}).read_bytes()
    path = saved(tmp_path / "legacy.pth", {"w": torch.ones(1).expand(2**31)})
    path.write_bytes(path.read_bytes() + sound)
    assert zipfile.is_zipfile(path)
    with pytest.raises(CheckpointError, match="legacy.pth declares more data"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["a/DATA.PKL", "a/Data.pkl"])
def test_a_pickle_is_checked_under_every_name_by_which_torch_finds_it(tmp_path, name):
    path = saved(tmp_path / "a.pth", {"w": torch.ones(1).expand(2**31)})
    content = path.read_bytes().replace(b"a/data.pkl", name.encode())
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="a.pth declares more data"):
        load_checkpoint(path)


def test_records_in_one_place_are_refused(tmp_path):
    """The central directory names one piece of the file many times."""
    path = saved(tmp_path / "a.pth", {"w": torch.zeros(2**16)})
    whole = path.read_bytes()
    with zipfile.ZipFile(path, "a") as archive:
        big = next(record for record in archive.infolist() if record.file_size > 2**16)
        archive.filelist += [big] * 50
        archive._didModify = True
    assert path.stat().st_size < len(whole) + 2**14
    with pytest.raises(CheckpointError, match="a.pth declares more .*unpacks to"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("call", ["bytearray", "FloatTensor", "ByteStorage", "UntypedStorage"])
def test_memory_by_number_is_refused(tmp_path, name, call):
    function = bytearray if call == "bytearray" else getattr(torch, call)
    path = saved(tmp_path / name, {"w": torch.ones(2), "x": Call(function, 60_000_000_000)})
    with pytest.raises(CheckpointError, match=f"{name} (declares more data|holds code)"):
        load_checkpoint(path)


def test_memory_by_number_behind_another_function_is_refused(tmp_path):
    from torch._tensor import _rebuild_from_type_v2 as rebuild

    call = Call(rebuild, bytearray, torch.Tensor, (60_000_000_000,), {})
    with pytest.raises(CheckpointError, match="a.pth declares more data"):
        load_checkpoint(saved(tmp_path / "a.pth", {"w": torch.ones(2), "x": call}))


@pytest.mark.parametrize("name", NAMES)
def test_uninitialized_weights_are_refused(tmp_path, name):
    path = saved(tmp_path / name, {"w": Call(torch.FloatTensor, 64)})
    with pytest.raises(CheckpointError, match=f"{name} holds code"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("part", ["shape", "storage", "both"])
def test_a_tensor_larger_than_its_storage_is_refused(tmp_path, name, part):
    path = saved(tmp_path / name, {"w": torch.arange(201.0)})
    old, new = b"K\xc9", b"J\0\0\0\x60"

    def change(data):
        assert data.count(old) == 2  # the storage's number of elements, the tensor's shape
        first, middle, last = data.split(old)
        new_first, new_last = new if part != "shape" else old, new if part != "storage" else old
        return first + new_first + middle + new_last + last

    with pytest.raises(CheckpointError, match=f"{name} declares more data"):
        load_checkpoint(rewritten(path, change))


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_of_one_number_that_says_it_is_many_is_refused(tmp_path, name):
    path = saved(tmp_path / name, {"w": torch.ones(1).expand(2**31)})
    with pytest.raises(CheckpointError, match=f"{name} declares more data"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", NAMES)
def test_many_tensors_of_one_storage_are_refused(tmp_path, name):
    one = torch.ones(2**16)
    path = saved(tmp_path / name, {f"w{i}": one.view(-1) for i in range(64)})
    with pytest.raises(CheckpointError, match=f"{name} declares more data .*weights of 16777216"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", NAMES)
def test_an_ordered_dict_cannot_hide_its_methods(tmp_path, name):
    state = OrderedDict(w=torch.ones(2))
    state.items = lambda: OrderedDict.items(state)
    hidden = Call(OrderedDict, (("w", torch.ones(2)),), state={"items": ()})
    with pytest.raises(CheckpointError, match=f"{name} holds .*OrderedDict with attributes"):
        load_checkpoint(saved(tmp_path / name, {"model": hidden}))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "tensor, reason",
    [
        (torch.ones(2, device="meta"), "w has no values .it is on the meta device"),
        (torch.ones(2, 2).to_sparse(), "w is sparse"),
        (torch.ones(2, 2).to_sparse_csr(), "w is sparse"),
        pytest.param(
            torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            "w is quantized",
            marks=needs("torch", 2, 6, "reading it"),
        ),
        (torch.ones(2, dtype=torch.complex64), "w is complex"),
        (torch.ones(2, dtype=torch.bool), "w is boolean"),
        (torch.tensor([1, float("nan")]), "w has NaN or infinite values"),
        (torch.tensor([1, float("inf")]).bfloat16(), "w has NaN or infinite values"),
    ],
)
def test_tensors_that_are_no_weights_are_named(tmp_path, name, tensor, reason):
    path = saved(tmp_path / name, {"model": {"fine": torch.ones(99), "w": tensor}})
    with pytest.raises(CheckpointError, match=f"{re.escape(str(path))}: {reason}"):
        load_checkpoint(path)


@pytest.mark.parametrize("change", [b"Nr\xff\xff\xff\x3f0", b"Np1073741823\n0"])
def test_a_place_far_off_in_the_memo_is_refused(tmp_path, change):
    path = saved(tmp_path / "a.pth", {"w": torch.ones(2)})
    rewritten(path, lambda data: data[:2] + change + data[2:])
    with pytest.raises(CheckpointError, match="a.pth declares more data"):
        load_checkpoint(path)


def test_a_safetensors_header_is_checked(tmp_path):
    import json
    import struct

    def file(header):
        text = json.dumps(header).encode()
        path = tmp_path / "a.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
        return path

    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    assert load_checkpoint(file({"w": entry}))["model"]["w"].tolist() == [0, 0]
    for wrong in (
        {"shape": [2**40]},
        {"shape": [0, 2**62], "data_offsets": [0, 0]},
        {"data_offsets": [0, 2**40]},
        {"dtype": "X99"},
        {"shape": [-2]},
    ):
        with pytest.raises(CheckpointError, match="a.safetensors is cut off or not a checkpoint"):
            load_checkpoint(file({"w": entry | wrong}))
    with pytest.raises(CheckpointError, match="a.safetensors: w is boolean"):
        load_checkpoint(file({"w": entry | {"dtype": "BOOL", "shape": [8]}}))


def test_the_traps_work():
    """In pickle.load, what is refused above does take the memory or run the code."""
    assert len(pickle.loads(pickle.dumps(Call(bytearray, 1000)))) == 1000
