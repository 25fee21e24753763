"""Each command says which extra to install; the package itself needs none of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from refbn_d2.utils.errors import MissingDependencyError
from refbn_d2.utils.extras import OPTIONAL, needs
from tests.versions import installed, tomllib

ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
MODULES = {"opencv-python-headless": "cv2", "pillow": "PIL"}  # others have the package's name
SLOW = pytest.mark.slow
TRAIN = ["torchvision", "pycocotools", "cv2", "PIL", "matplotlib", "tqdm"]
PRETRAIN = ["torchvision", "PIL", "matplotlib", "tqdm", "timm"]
COMMANDS = [  # module that has main(), its arguments, its extra, what it imports of that
    ("engines.__main__", "--engine torchvision --config-file x", "train", TRAIN),
    ("pretrain.__main__", "--config-file x", "pretrain", PRETRAIN),
    ("export.__main__", "a.pth b.pkl --to detectron2", "train", ["torchvision", "cv2"]),
    ("engines.adapt", "--config-file x --weights x --images x --output x.pth", "train", TRAIN),
    ("study.__main__", "--study x", "study", ["cv2", "PIL", "matplotlib", "scipy", "jinja2"]),
    ("study.benchmark", "", "train", ["tqdm"]),
    (  # the quote ends it early if nothing is missed
        "quickstart.__main__",
        "--pretrain '",
        "quickstart",
        [*TRAIN[:-1], "tensorboard", "timm", "jinja2"],
    ),
]
FUNCTIONS = [  # code, its extra, what it imports of that
    ("from refbn_d2.data import nuclei", "train", ["cv2", "pycocotools", "tqdm"]),
    ("from refbn_d2.data import catalog; catalog.get('shapes_val')", "train", ["cv2"]),
    (
        "from refbn_d2.training.events import EventWriter as W; W(Path(), 0, 1)", "train",
        ["tensorboard"],
    ),
    (
        "from refbn_d2.checkpoint import *; save_checkpoint({'a': torch.ones(2)}, 'a.safetensors')",
        "train", ["safetensors"],
    ),
    (
        "Path('b.safetensors').write_text('x'); from refbn_d2.checkpoint import *; "
        "load_checkpoint('b.safetensors')", "train", ["safetensors"],
    ),
    (
        "from refbn_d2.export import programs; programs._onnx(None)", "onnx",
        ["onnx", "onnxscript"] if installed("torch") >= (2, 6) else [],
    ),
]  # fmt: skip
CASES = [
    (f"sys.argv[1:] = {arguments.split()}; from refbn_d2.{name} import main; main()", *rest)
    for name, arguments, *rest in COMMANDS
] + FUNCTIONS

# What is hidden is found by nobody, as if it were not installed.
HIDE = """
import sys
class Filter:
    def __init__(self, finder, names):
        self.finder, self.names = finder, names
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in self.names:
            return self.finder.find_spec(name, path, target)
def hide(*names):
    for name in [name for name in sys.modules if name.partition(".")[0] in names]:
        del sys.modules[name]
    sys.meta_path[:] = [Filter(finder, names) for finder in sys.meta_path]
"""
# Runs each case in a fork, so that torch is imported once: a module is hidden, then code is run.
HIDING = """
import json, os, sys
from pathlib import Path
import torch, refbn_d2
from hiding import hide
for code, module in json.loads(sys.argv[1]):
    if os.fork():
        os.wait()
        continue
    hide(module)
    try:
        exec(code)
        said = "no error"
    except SystemExit as error:
        said = error.code
    except BaseException as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([code, module, said]), flush=True)
    os._exit(0)
"""


def run(code, *arguments, cwd, **environment):
    (cwd / "hiding.py").write_text(HIDE)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments], cwd=cwd, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("which", [slice(-1, None), pytest.param(slice(None), marks=SLOW)])
def test_a_missing_extra_is_a_line_with_the_pip_command(which, tmp_path):
    """The last module of each case; all of them if it may take minutes."""
    cases = [(code, module) for code, _, modules in CASES for module in modules[which]]
    said = run(HIDING, json.dumps(cases), cwd=tmp_path).splitlines()
    said = [json.loads(line) for line in said if line.startswith("[")]  # others print, too
    line = 'MissingDependencyError: {} is not installed: pip install "refbn_d2[{}]"'
    assert said == [
        [code, module, line.format(module, extra)]
        for code, extra, modules in CASES
        for module in modules[which]
    ]
    assert {path.name for path in tmp_path.glob("*.*")} == {"b.safetensors", "hiding.py"}


def modules_of(extra):
    """Return the modules that an extra of pyproject.toml brings, those of its extras included."""
    for requirement in EXTRAS[extra]:
        if inner := re.match(r"refbn_d2\[(.+)\]", requirement):
            for name in inner[1].split(","):
                yield from modules_of(name)
        else:
            name = re.match(r"[\w-]+", requirement)[0]
            yield MODULES.get(name, name)


def test_each_extra_brings_what_its_commands_import():
    for _, extra, modules in CASES:
        assert set(modules) <= set(modules_of(extra)), extra
    assert set(OPTIONAL) == {*modules_of("study"), *modules_of("onnx")}
    assert set(OPTIONAL) <= set(modules_of("test"))


def test_opencv_can_be_left_out():
    assert set(modules_of("train")) - set(modules_of("train-no-opencv")) == {"cv2"}
    assert "cv2" not in modules_of("pretrain")
    requirements = [r for extra, r in EXTRAS.items() if extra != "train"]
    assert "opencv" not in re.sub(r"-no-opencv", "", str(requirements))


@pytest.mark.parametrize(
    "error, message",
    [
        (ImportError("libGL.so.1: cannot open", name="cv2"), "cv2.*libGL.*opencv-python-headless"),
        (ImportError("no _x", name="timm.layers"), r"timm is installed, but .*\(no _x\)"),
        (RuntimeError("operator torchvision::nms does not exist"), "does not match torch"),
    ],
)
def test_a_broken_package_is_named(error, message):
    with pytest.raises(MissingDependencyError, match=message), needs("train"):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'refbn_d2.x'", name="refbn_d2.x"),
        ImportError("cannot import name 'x' from 'refbn_d2'", name="refbn_d2"),
        ImportError("no name"), RuntimeError("CUDA out of memory"), MissingDependencyError("a"),
    ],
)  # fmt: skip
def test_any_other_error_passes(error):
    with pytest.raises(type(error)) as raised, needs("train"):
        raise error
    assert raised.value is error


# ---- the package itself

BASE = """
import sys
from hiding import hide
hide(*sys.argv[1].split(","))
import torch
from refbn_d2 import RefBatchNorm2d, ReferenceBatch, configs
from refbn_d2.checkpoint import load_checkpoint, save_checkpoint
from refbn_d2.config import get_cfg
cfg = get_cfg()
cfg.merge_from_file(configs.get_config_file("quickstart/mask_rcnn_R_18_FPN_refbn.yaml"))
layer = RefBatchNorm2d(3)
reference = ReferenceBatch(layer, torch.randn(4, 3, 2, 2))
with reference.step():
    layer(torch.randn(2, 3, 2, 2)).sum().backward()
save_checkpoint({"model": layer.state_dict()}, "a.pth")
layer.load_state_dict(load_checkpoint("a.pth")["model"])
"""


def test_without_any_extra(tmp_path):
    """Layers, the reference batch, configs and checkpoints work; fvcore itself needs tqdm, PIL."""
    hidden = set(OPTIONAL) - {"tqdm", "PIL"}
    run(BASE, ",".join(hidden), cwd=tmp_path)


@pytest.mark.detectron2
def test_the_plugin_needs_no_more_than_detectron2(tmp_path):
    """Detectron2 itself needs torchvision, pycocotools, matplotlib, ...; its OpenCV is optional."""
    pytest.importorskip("detectron2", reason="Detectron2 is not installed")
    code = (
        BASE.split("import torch")[0]
        + """
import refbn_d2, detectron2
for name in ("detectron2.data", "detectron2.modeling", "detectron2.engine"):
    __import__(name)
from detectron2.layers import get_norm
assert type(get_norm("RefBN", 4)).__name__ == "RefBatchNorm2d"
"""
    )
    path = os.pathsep.join([str(ROOT), str(Path(sys.modules["detectron2"].__file__).parents[1])])
    run(code, "safetensors,timm,scipy,jinja2,onnx,onnxscript", cwd=tmp_path, PYTHONPATH=path)


IMPORT = """
import sys, time, torch
before, start = set(sys.modules), time.process_time()
import refbn_d2
seconds = time.process_time() - start
print(seconds)
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""


def test_the_import_is_light(tmp_path):
    """It adds under 0.3 s to `import torch`: the best of three, so that a busy machine may pass."""
    imported, seconds = set(), []
    for _ in range(3):
        time, names = run(IMPORT, cwd=tmp_path).splitlines()
        seconds.append(float(time))
        imported |= set(names.split())
        if seconds[-1] < 0.3:
            break
    assert not imported & {*OPTIONAL, "detectron2"}, imported
    assert min(seconds) < 0.3, seconds
