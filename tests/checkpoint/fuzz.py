"""Mutate checkpoint files: each must be read, or refused with a CheckpointError.

    python -m tests.checkpoint.fuzz --minutes 60

Hypothesis draws the mutations. They change the raw bytes, or the pickle or header inside a file
whose other parts stay sound, so that the reader gets past its first check. A failure is an
exception that is not ours, a changed model, a file that takes over 20 s, or a process that grows by
over 1 GiB. The file stays in the folder for temporary files, as refbn_fuzz_failure.*.
"""

import argparse
import io
import json
import logging
import pickle
import pickletools
import resource
import signal
import struct
import tempfile
import time
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
import safetensors.torch
import torch
from hypothesis import strategies as st
from torch import nn

from refbn_d2.checkpoint.convert import TARGET_NORMS, convert_state, identify
from refbn_d2.checkpoint.files import load_checkpoint
from refbn_d2.checkpoint.inspection import describe
from refbn_d2.checkpoint.loading import load_weights
from refbn_d2.checkpoint.names import detectron2_to_torchvision
from refbn_d2.checkpoint.resnets import ResNetSpec
from refbn_d2.utils.errors import CheckpointError

SECONDS, GROWTH = 20, 2**30
FAILURE = Path(tempfile.gettempdir(), "refbn_fuzz_failure")  # where the last bad file stays
BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class Hanging(BaseException):
    """A file takes too long."""


def tiny_resnet() -> dict[str, torch.Tensor]:
    """Return the weights of a ResNet-18 of 2 to 16 channels, under torchvision's names."""
    shapes = ResNetSpec(18, stem=2, res2=2).shapes(BN)
    return {detectron2_to_torchvision(name): torch.ones(shape) for name, shape in shapes.items()}


def in_pickle(data: dict, protocol: int) -> bytes:
    arrays = {n: t.numpy() for n, t in data["model"].items()}
    return pickle.dumps({**data, "model": arrays, "top1": np.float64(1)}, protocol)


def in_torch(data: dict, legacy: bool) -> bytes:
    file = io.BytesIO()
    torch.save(data, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def seeds() -> list[bytes]:
    """Return sound files, one for each reader."""
    two = OrderedDict(w=torch.arange(4.0).view(2, 2).t(), n=torch.tensor(7))
    rest = {"iteration": 3, "args": argparse.Namespace(lr=0.1), "b": b"\xff", "s": {1, 2}}
    small, whole = {"model": two, **rest}, {"model": tiny_resnet(), "arch": "resnet18"}
    del rest["args"]
    for_numpy = {"model": two, **rest}
    files = [in_pickle(for_numpy, protocol) for protocol in (0, 2, 4, 5)]
    files += [in_pickle(for_numpy, 2).replace(b"numpy._core", b"numpy.core")]
    files += [in_torch(data, legacy) for data in (small, whole) for legacy in (False, True)]
    files += [in_pickle(whole, 2), safetensors.torch.save(whole["model"])]
    return [*files, safetensors.torch.save({name: t.contiguous() for name, t in two.items()})]


SEEDS = seeds()
NAMES = [
    *("numpy\nndarray", "numpy\ndtype", "builtins\nset", "builtins\neval", "builtins\nbytearray"),
    *("numpy.core.multiarray\nscalar", "numpy.core.multiarray\n_reconstruct"),
    *("collections\nOrderedDict", "argparse\nNamespace", "_codecs\nencode", "torch\nSize"),
    *("torch\nFloatTensor", "torch._utils\n_rebuild_tensor_v2", "torch._utils\n_rebuild_parameter"),
]
OPCODES = [code.code.encode("latin1") for code in pickletools.opcodes]
PIECES = st.one_of(
    st.sampled_from(OPCODES),
    st.sampled_from([b"c" + name.encode() + b"\n" for name in NAMES]),
    st.integers(-(2**31), 2**31 - 1).map(lambda n: b"J" + struct.pack("<i", n)),
    st.sampled_from([b"N", b")R", b"}b", b"]", b"}", b"\x85R", b"(tR", b"0", b"2", b"K\x00\x85"]),
    st.binary(min_size=1, max_size=4),
)


def edited(draw: st.DrawFn, data: bytes, ends: list[int]) -> bytes:
    """Insert, overwrite, cut out or repeat 1 to 4 pieces of `data`, mostly at `ends`."""
    for _ in range(draw(st.integers(1, 4))):
        places = st.integers(0, len(data))
        start = draw(st.one_of(st.sampled_from(ends), places) if ends else places)
        how = draw(st.sampled_from(["in", "over", "out", "again", "flip"]))
        if how in ("in", "over"):
            piece = draw(PIECES)
            data = data[:start] + piece + data[start + len(piece) * (how == "over") :]
        elif how == "flip" and start < len(data):
            data = data[:start] + bytes([draw(st.integers(0, 255))]) + data[start + 1 :]
        else:
            end = start + draw(st.integers(1, 40))
            data = data[:end] + data[start:] if how == "again" else data[:start] + data[end:]
    return data


def instruction_starts(data: bytes) -> list[int]:
    try:
        return [place for _, _, place in pickletools.genops(data)]
    except ValueError:
        return []


def in_zip(draw: st.DrawFn, data: bytes) -> bytes:
    """Edit the pickle of a torch file, or another record, inside a sound archive."""
    file = io.BytesIO()
    kind = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(file, "w", kind) as out:
        records = archive.infolist()
        pickles = [record for record in records if record.filename.endswith("data.pkl")]
        chosen = draw(st.sampled_from([*records, *pickles * len(records)]))
        for record in records:
            content = archive.read(record)
            if record is chosen:
                content = edited(draw, content, instruction_starts(content))
            out.writestr(record.filename, content)
    return file.getvalue()


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**65), 2**65), st.text(max_size=3), st.just([]),
    st.lists(st.integers(-1, 2**40), max_size=3), st.just({}),
    st.sampled_from(["F64", "BOOL", "F8_E4M3", "C64", "BF16", "U64", "I4", "F4"]),
)  # fmt: skip


def in_safetensors(draw: st.DrawFn, data: bytes) -> bytes:
    """Change values in the header of a safetensors file."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    for _ in range(draw(st.integers(1, 3))):
        entry = header[draw(st.sampled_from(sorted(header)))]
        if isinstance(entry, dict):
            entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))] = draw(VALUES)
    text = json.dumps(header).encode()
    length = len(text) if draw(st.integers(0, 5)) else draw(st.integers(0, 2**64 - 1))
    return struct.pack("<Q", length) + text + data[8 + struct.unpack("<Q", data[:8])[0] :]


@dataclass(repr=False)
class File:
    """A mutated file, printed without its bytes, which would fill the screen."""

    suffix: str
    content: bytes

    def __repr__(self) -> str:
        return f"<{len(self.content)} bytes, {self.suffix}>"


@st.composite
def files(draw: st.DrawFn) -> File:
    """Draw a mutated file, with the suffix that its reader expects."""
    data = draw(st.sampled_from(SEEDS))
    is_header = data[8:9] == b"{"
    if data[:2] == b"PK" and draw(st.integers(0, 3)):
        content = in_zip(draw, data)
    elif is_header and draw(st.integers(0, 3)):
        content = in_safetensors(draw, data)
    else:
        content = edited(draw, data, instruction_starts(data))
    return File(".safetensors" if is_header else ".pkl", content)


def check(folder: Path, suffix: str, content: bytes) -> bool:
    """Use a file as people do; return whether it could be read.

    Raises:
        AssertionError: a load that failed changed the model.
        Hanging: it takes too long.
        Exception: anything that is not a CheckpointError.
    """
    path = folder / f"mutated{suffix}"
    path.write_bytes(content)
    signal.signal(signal.SIGALRM, _hanging)
    signal.alarm(SECONDS)
    try:
        describe(path)
        checkpoint = load_checkpoint(path)
        _load(checkpoint, path)
        contents = identify(checkpoint, str(path))
        for norm in TARGET_NORMS:
            convert_state(contents, "detectron2", norm, allow_partial=True)
    except CheckpointError:
        return False
    finally:
        signal.alarm(0)
    return True


def _load(checkpoint: dict, path: Path) -> None:
    model = nn.Module()
    for place, tensor in enumerate(tiny_resnet().values()):
        model.register_buffer(f"b{place}", tensor)
    model.w, model.n = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        load_weights(model, checkpoint["model"], path)
    except CheckpointError:
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name


def _hanging(*_: object) -> None:
    raise Hanging(f"over {SECONDS} s")


def fuzz(examples: int, seed: int = 0) -> dict[str, int]:
    """Check about `examples` files; return their number, and how many of them could be read.

    Raises:
        AssertionError: the process grew by more than GROWTH bytes.
        Exception: see `check`; raised for the smallest file that causes it.
    """
    counts = {"files": 0, "read": 0}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(files())
        def run(file: File) -> None:
            counts["files"] += 1
            try:
                counts["read"] += check(Path(folder), file.suffix, file.content)
            except BaseException:
                FAILURE.with_suffix(file.suffix).write_bytes(file.content)
                raise

        try:
            run()
        finally:
            logging.disable(logging.NOTSET)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert growth < GROWTH, f"the process grew by {growth} bytes"
    return counts


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    p.add_argument("--minutes", type=float, default=60)
    p.add_argument("--seed", type=int, default=int(time.time()), help="of the first round")
    args = p.parse_args()
    end, total, seed = time.monotonic() + 60 * args.minutes, {"files": 0, "read": 0}, args.seed
    print(f"seed {args.seed}", flush=True)
    while time.monotonic() < end:
        for name, count in fuzz(500, seed).items():
            total[name] += count
        seed += 1
    print(
        f"{total['files']} mutated files in {args.minutes:g} minutes: {total['read']} were read, "
        "the others refused with a CheckpointError; nothing else happened."
    )


if __name__ == "__main__":
    main()
