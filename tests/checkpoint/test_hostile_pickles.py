"""Pickles of numpy arrays: real ones are read to the last bit, hostile ones are refused.

The oracle for real pickles is numpy itself: numpy 1.26, numpy 2 and Python 2 wrote them. The
hostile pickles are programs that crash, allocate memory or run code in pickle.load.
"""

import base64
import collections
import pickle
import re
import struct
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
import torch

from refbn_d2.checkpoint.files import load_checkpoint
from refbn_d2.checkpoint.unpickling import read_pickle
from refbn_d2.utils.errors import CheckpointError

# Written by numpy 1.26.4, by protocol: ARRAYS and two more entries, compressed.
WRITTEN_BY_NUMPY_1 = {
    2: (
        "eNp1ktly0zAUhp2kaVJDoUBZy1bWlCWQUiBAaAyUrYYUxDK+89iKizzj2P0VeYZcMJObpO1b8Ahcct0+GEiOnQta"
        "NB5JlnTO9+vX6ed/QKtYRU3TOlHbC5CjNAoCjwo/Crv6Gm973Guv+FToyC8QFCpWTp6lmKBh3NnoVWnEvWonDoTv"
        "cO70dJt7VEYKHquQ4uiUHrZHu5g0tQFK1KYSRru6F6qJjnKS1cWUNSnHwBF+WIM+xAGCg5uYJjhUMXNm3iwMcThN"
        "2Ra9DRk5Y+VlxPoSjmxvbeIowbGKWUiyNTDbarVW/8iWdKYmcNzdZmVrTsvaTr8pe0N+hvpR3U8DJ5hEnyQ4JXDa"
        "tUoqf8QFd0KcYUWWXGGOSV1nCc6NdZ1nqZQ6LigpFwnmpRS2V8Qld0uKqGn/trIxGnd/NUeTmXRBS8dZA5eVtCsE"
        "VwWuuVZBmeZ/w/VMVkXJks90Q8kqDHCTjf25pUTdJqhm/izjzh5pdxN/plNsc6c/YqOmsIsE9wSW3KRaaBSHAvcz"
        "8AMFfkhQl+CFFOrX8UhBHxM82d+JRoIry7OlFImnirRM0BQwXGtCLjEnWMezDPRcgV4QrCTGD/Ayu+EiXinYa4I3"
        "+8PeJjCVUWvI4lhVIJPgncB7N7Z0uWzbTixYxG0brcSi71hLAkS0UcOH/1R8lzqBw3V8ZPMy/9T4OXd/N0EU5BPB"
        "5yG+EHyNq38Bq1ICSg=="
    ),
    4: (
        "eNqFkUFLwzAUx9O1tXMOEVT07EkvQ8WDh2EH9WRhgl+gZGlmCl0zshTcQehlc4Pc9rz7ET1607QpyNhgj+Q9Qt77"
        "/d9LCudz0kCVvcOlckc8pimoA8LTlBKZ8GyiT88ipoLGjwmRsIKrF51pEVCnWT4aTzuEC9oZ5alMsBB4CqodCUp0"
        "pRR5VaDcKhGUl8UmZQUhmkFgDeADNC20wkZoz4G1lBvL6ZiWRY3hHSwX5t5WVhf6/f7Tr7bKhUjCYBmcm94LX7ue"
        "XnoXen/1QF8rb8iFFDgDts/apSI7XNc71ir3/yrsbFNjEVyjNWv2TPz2TTyqz6iOJ0bbHiSvW3TtmVFdm+1h62zt"
        "kuYXBlwxXcLzTG5Sr0pksmOQZdD06k4rmMNwOtz2MnWHt7twDuqibonKVSuKcC4ZF1EEynoD5Ug+vgHmqb0JwSkW"
        "+kPZRdA08j8+zDU47/wBBmnimA=="
    ),
    5: (
        "eNqFkcFKw0AQhtOmsdUqqFQQfIH2UlQ8eCgmUPFgoIIvEDbJxg0k2bLdgB6EXKwKe3Ps2Uf06E2nmxQrVDrs7uyG"
        "yffPzxTWu183dDxCV1kpD2kCqh3wJKGBjHk2wdeNCKmg4WUcSHiD3i1W1gJQ+1mejh/6ARe0j1cqYvzY9iLBUz+P"
        "IiqwuDs7NJajsPFwcOEucH84oCzNwRzKhzHFn1Q9OoPXl2dAJddUtQGMRqPrbwx9uIYE36275hRUbQgSy1Qz4kIK"
        "kgHb7M6OjVXRcsr8aZd5t3obVe44wHZQ+vxXmu39L3xVCpt+fKdFt5ek7KKklsA/Xi5WeTGfgHU0zgp4nkkNbFWw"
        "ZpU1LF7TXa/iNBhJIo1pLJoaGIOyn9N1Bhfd5GrL80guGReeh5bvkSv5+ATUwdLo0zyRMRGC4Ag3JgFJyHzw7GhY"
        "GfiyYTqH9X8A5jHSeg=="
    ),
}
# The instructions of Python 2.7's cPickle, protocol 2, for {"w": float32 [[1, 2]]}.
WRITTEN_BY_PYTHON_2 = (
    b"\x80\x02}q\x00U\x01wq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03"
    b"K\x00\x85U\x01b\x87Rq\x04(K\x01K\x01K\x02\x86cnumpy\ndtype\nq\x05U\x02f4K\x00K\x01\x87Rq\x06"
    b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08"
    + struct.pack("<2f", 1, 2)
    + b"tbs."
)


class Call:
    """Pickles as a call, and as changes of its result."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def written(path, content, protocol=2):
    path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
    return path


def assert_same_arrays(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert type(found[name]) is type(array)
        assert np.array_equal(found[name], array) and found[name].shape == array.shape, name
        assert found[name].dtype == array.dtype, name


ARRAYS = {
    "c": np.arange(6, dtype="f4").reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "big": np.arange(3, dtype=">f4"),
    "count": np.array(7),
    "half": np.ones(2, "f2"),
}


@pytest.mark.parametrize("protocol", WRITTEN_BY_NUMPY_1)
def test_what_numpy_1_wrote(tmp_path, protocol):
    data = zlib.decompress(base64.b64decode(WRITTEN_BY_NUMPY_1[protocol]))
    assert b"numpy.core" in data
    found = read_pickle(written(tmp_path / "a.pkl", data))
    assert_same_arrays(found["model"], ARRAYS)
    assert found["top1"] == 1.5 and found["__author__"] == "x"
    loaded = load_checkpoint(tmp_path / "a.pkl")["model"]
    assert {name: t.tolist() for name, t in loaded.items()} == {
        name: array.tolist() for name, array in ARRAYS.items()
    }


def test_what_python_2_wrote(tmp_path):
    found = read_pickle(written(tmp_path / "a.pkl", WRITTEN_BY_PYTHON_2))
    assert_same_arrays(found, {"w": np.array([[1, 2]], "f4")})
    assert_same_arrays(pickle.loads(WRITTEN_BY_PYTHON_2, encoding="latin1"), found)


@pytest.mark.parametrize("protocol", range(6))
def test_what_numpy_writes(tmp_path, protocol):
    arrays = {
        **ARRAYS,
        "turned": np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
        "strided": np.arange(10)[::3],
        "empty": np.zeros((0, 3), "f4"),
        "flags": np.array([True, False]),
        "bytes": np.arange(200, 256, dtype="u1"),
        "scalar": np.float32(2.5),
        "big scalar": np.dtype(">i4").type(3),
        "large": np.arange(5000, dtype="i8"),
    }
    found = read_pickle(written(tmp_path / "a.pkl", arrays, protocol))
    assert_same_arrays(found, arrays)


def test_what_is_shared_stays_shared_and_cycles_end(tmp_path):
    array, items = np.ones(2), [1]
    items.append(items)
    found = read_pickle(written(tmp_path / "a.pkl", {"a": array, "b": (array, array), "c": items}))
    assert found["b"][0] is found["a"] and found["b"][1] is found["a"]
    assert found["c"][1] is found["c"]


def test_arrays_own_their_memory(tmp_path):
    """Two arrays are made of the same bytes, and one is written to."""
    dtype, shared = np.dtype("f4"), bytes(8000)
    rebuild = np.zeros(1).__reduce_ex__(5)[0]
    calls = [Call(rebuild, shared, dtype, (2000,), "C") for _ in range(2)]
    first, second = read_pickle(written(tmp_path / "a.pkl", [*calls, bytes(8000)], 5))[:2]
    first[:] = 1
    assert not second.any()


RECONSTRUCT = np.zeros(1).__reduce__()[0]
SCALAR = np.float64(0).__reduce__()[0]
FROM_BUFFER = np.zeros(1).__reduce_ex__(5)[0]
F4 = np.dtype("f4")
OBJECT = np.dtype("O")


def array_of(shape, dtype, data, order=False):
    return Call(RECONSTRUCT, np.ndarray, (0,), b"b", state=(1, shape, dtype, order, data))


CODE = {
    "any address an object": Call(set, Call(np.ndarray, (1,), "O", b"\x08" * 8)),
    "uninitialized memory": Call(np.ndarray, (64,), "f4"),
    "an object field in a dtype": array_of(
        (1,),
        Call(
            np.dtype, "V8", False, True, state=(3, "|", None, ("x",), {"x": (OBJECT, 0)}, 8, 1, 0)
        ),
        b"\x08" * 8,
    ),
    "a field in a dtype of numbers": array_of(
        (1,),
        Call(np.dtype, "f8", False, True, state=(3, "<", None, ("x",), {"x": (F4, 0)}, 8, 1, 0)),
        b"\x08" * 8,
    ),
    "objects from bytes": array_of((1,), OBJECT, b"\x08" * 8),
    "an array of objects": np.array([{}], dtype=object),
    "a scalar object": Call(SCALAR, OBJECT, b"\x08" * 8),
    "an object buffer": Call(FROM_BUFFER, b"\x08" * 8, OBJECT, (1,), "C"),
    "strings": np.array(["a"]),
    "records": np.zeros(2, [("x", "f4")]),
    "dates": np.zeros(2, "M8[s]"),
    "another class": Call(RECONSTRUCT, np.matrix, (0,), b"b"),
    "a builtin": Call(eval, "1"),
    "an array's method": Call(getattr, np.ndarray, "tofile"),
    "a class": {"model": np.ndarray},
    "a function": {"model": RECONSTRUCT},
    "bytes by number": Call(bytes, 6_000_000_000),
}


@pytest.mark.parametrize("case", CODE)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_code_and_objects_are_refused(tmp_path, case, protocol):
    path = written(tmp_path / "a.pkl", {"model": CODE[case]}, protocol)
    with pytest.raises(CheckpointError, match="a.pkl (holds code or objects|is cut off)"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "name", ["numpy\nndarray", "numpy\ndtype", "numpy.core.multiarray\n_reconstruct"]
)
@pytest.mark.parametrize(
    "change", [b"}U\x08__call__K\x01sb.", b"N}U\x0c__defaults__)s\x86b."], ids=["dict", "slots"]
)
def test_stand_ins_cannot_be_changed(tmp_path, name, change):
    path = written(tmp_path / "a.pkl", b"\x80\x02c" + name.encode() + b"\n" + change)
    with pytest.raises(CheckpointError, match="a.pkl holds code or objects"):
        read_pickle(path)
    assert_same_arrays(read_pickle(written(tmp_path / "b.pkl", ARRAYS)), ARRAYS)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x05\x96" + struct.pack("<Q", 6 * 2**30) + b"abc.",
        b"\x80\x04\x8e" + struct.pack("<Q", 6 * 2**30) + b"abc.",
        b"\x80\x02Nr\xff\xff\xff\x3f.",
        b"\x80\x02Np1073741823\n.",
        pickle.dumps({"model": {"w": array_of((1 << 30, 6), F4, b"\0" * 4)}}, 2),
        pickle.dumps({"model": {"w": Call(FROM_BUFFER, b"", F4, (1 << 30, 6), "C")}}, 5),
        pickle.dumps({"model": {"w": array_of((4,), F4, b"\0" * 4)}}, 2),
        pickle.dumps({"model": {"w": array_of((1,), F4, b"\0" * 8)}}, 2),
    ],
    ids=["bytearray", "bytes", "memo", "text memo", "array", "buffer", "short", "long"],
)
def test_a_pickle_cannot_take_more_memory_than_it_has(tmp_path, content):
    path = written(tmp_path / "a.pkl", content)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="a.pkl (declares more data|is cut off)"):
        load_checkpoint(path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize("how", ["arrays", "bytes", "sets", "dicts"])
def test_repeated_parts_cannot_fill_the_memory(tmp_path, how):
    text, dtype = b"\0" * 400_000, F4
    if how == "arrays":
        calls = [Call(FROM_BUFFER, text, dtype, (100_000,), "C") for _ in range(200)]
    elif how == "bytes":
        encode, latin1 = __import__("_codecs").encode, text.decode("latin1")
        calls = [Call(encode, latin1, "latin1") for _ in range(200)]
    else:
        items = [[i, 0] for i in range(10_000)]
        kind = collections.OrderedDict if how == "dicts" else set
        items = items if how == "dicts" else list(range(50_000))
        calls = [Call(kind, items) for _ in range(200)]
    path = written(tmp_path / "a.pkl", {"model": calls}, 4)
    with pytest.raises(CheckpointError, match="a.pkl declares more .*repeated so often"):
        load_checkpoint(path)


@pytest.mark.parametrize("suffix", ["pkl", "pth"])
@pytest.mark.parametrize(
    "key",
    [b")" + b"\x85" * 1_000_000, b")" + b"2\x86" * 60, b")" + b"q\0h\0h\0\x87" * 60],
    ids=["deep", "twice", "thrice"],
)
def test_a_key_cannot_crash_or_hang_the_process(tmp_path, suffix, key):
    """Its hash would: of a million nested tuples, or of 2 ** 60 tuples in a hundred bytes."""
    path = tmp_path / f"a.{suffix}"
    content = b"\x80\x02}" + key + b"Ns."
    if suffix == "pth":
        torch.save({"w": torch.ones(2)}, path)
        with zipfile.ZipFile(path) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in records.items():
                archive.writestr(name, content if name.endswith("data.pkl") else data)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"a.{suffix} declares more data .*a tuple of"):
        load_checkpoint(path)


def test_an_ordered_dict_cannot_hide_its_methods(tmp_path):
    model = torch.nn.Linear(2, 2).state_dict()
    data = collections.OrderedDict((name, t.numpy()) for name, t in model.items())
    data._metadata = model._metadata
    path = written(tmp_path / "a.pkl", {"model": data})
    assert list(load_checkpoint(path)["model"]) == ["weight", "bias"]
    data = Call(collections.OrderedDict, data, state={"items": ()})
    with pytest.raises(CheckpointError, match="a.pkl holds .*OrderedDict with attributes"):
        load_checkpoint(written(path, {"model": data}, 4))


@pytest.mark.parametrize(
    "array, reason",
    [
        (np.ones(2, "c8"), "w is complex"),
        (np.ones(2, bool), "w is boolean"),
        (np.array([1, np.nan], "f4"), "w has NaN"),
        (np.array([1, -np.inf], "f8"), "w has NaN or infinite"),
        (np.ones(2, np.longdouble), f"w is an array of {np.dtype(np.longdouble)}"),
    ],
)
def test_arrays_that_are_no_weights_are_named(tmp_path, array, reason):
    path = written(tmp_path / "a.pkl", {"model": {"fine": np.ones(2), "w": array}})
    with pytest.raises(CheckpointError, match=f"a.pkl: {re.escape(reason)}"):
        load_checkpoint(path)
