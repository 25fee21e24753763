"""Every code block of the documents, and the loops of two docstrings, run.

python   is executed; a document's blocks share one namespace, which starts with what its reader has
bash     is run by bash with every program replaced by a recorder, and each recorded command line
         is checked by the parser and the config that it is for: nothing is installed or trained
yaml     is read
text     is not code

`<!--- skip: next "reason" -->` before a block skips it (Sybil's directive).
"""

import argparse
import ast
import importlib
import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser
from torch import nn

from refbn_d2.config import get_cfg
from refbn_d2.config.pretrain import get_pretrain_cfg
from tests.versions import tomllib

ROOT = Path(__file__).parents[1]
PATHS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "configs/README.md")]
PATHS += sorted((ROOT / "docs").rglob("*.md"))
CONFIGS = dict.fromkeys(
    ["train_net.py", "refbn-train", "adapt_reference.py", "refbn-adapt"], get_cfg
) | dict.fromkeys(["pretrain_imagenet.py", "refbn-pretrain"], get_pretrain_cfg)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


# ---- bash


def commands_of(script: str, folder: Path) -> list[tuple[dict[str, str], list[str]]]:
    """Return (environment, argv) of every program that `script` would start, expanded by bash."""
    recorder = textwrap.dedent("""
        command_not_found_handle() { env=${DETECTRON2_ENV_MODULE-}; printf '%s\\0' "$env" $# "$@"; }
        source() { :; }; cd() { :; }; PATH=/nowhere
    """)
    out = subprocess.run(
        [shutil.which("bash"), "-eu", "-o", "pipefail", "-c", recorder + script],
        cwd=folder, env={}, capture_output=True, text=True,
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    words, found = iter(out.stdout.split("\0")[:-1]), []
    for env_module in words:
        argv = [next(words) for _ in range(int(next(words)))]
        found.append(({"DETECTRON2_ENV_MODULE": env_module} if env_module else {}, argv))
    return found


class Parsed(BaseException):
    """Stops a program as soon as it has parsed its command line; no `except Exception` stops it."""


def parse(run, argv: list[str]) -> argparse.Namespace:
    """Return what the program started by `run` makes of `argv`, without letting it do more."""

    def parse_args(parser, args=None, namespace=None):
        raise Parsed(original(parser, args, namespace))

    original = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsed) as parsed:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", argv)
        patch.setattr(sys, "path", list(sys.path))
        run()
    return parsed.value.args[0]


def check_python(env: dict[str, str], argv: list[str]) -> None:
    if env:  # stock Detectron2's tools/train_net.py, whose flags ours has
        module = importlib.import_module(env["DETECTRON2_ENV_MODULE"])
        assert callable(module.setup_environment)
    if argv[1] == "-c":
        return check_imports(argv[2])
    if argv[1] == "-m":
        if not argv[2].startswith("refbn_d2"):
            assert importlib.util.find_spec(argv[2]), argv[2]
            return
        parse(lambda: runpy.run_module(argv[2], run_name="__main__"), argv[2:])
        return
    script = ROOT / argv[1]
    assert script.exists(), f"{argv[1]}: there is no such file"
    args = parse(lambda: runpy.run_path(str(script), run_name="__main__"), argv[1:])
    if script.name in CONFIGS:
        check_config(CONFIGS[script.name](), args.config_file, args.opts)


def check_config(cfg, config_file: str, opts: list[str]) -> None:
    """CONFIG.yaml is the reader's own; any other file is in the repository."""
    if config_file != "CONFIG.yaml":
        cfg.merge_from_file(str(ROOT / config_file))
    cfg.merge_from_list(opts)


def check_console(env: dict[str, str], argv: list[str]) -> None:
    """A console command of this package, which runs a main() of it."""
    module, _, name = PROJECT["scripts"][argv[0]].partition(":")
    args = parse(getattr(importlib.import_module(module), name), argv)
    if argv[0] in CONFIGS:
        check_config(CONFIGS[argv[0]](), args.config_file, args.opts)


def check_imports(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def check_pip(env: dict[str, str], argv: list[str]) -> None:
    """Extras of this package are declared."""
    assert argv[1] == "install"
    for names in re.findall(r"(?:\.|refbn_d2)\[(.*)\]", " ".join(argv)):
        assert set(names.split(",")) <= PROJECT["optional-dependencies"].keys(), names


def check_pytest(env: dict[str, str], argv: list[str]) -> None:
    """Markers are declared."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    markers = [marker.split(":")[0] for marker in options["markers"]]
    assert argv[1:] in [[], ["-n", "auto"], *(["-m", marker] for marker in markers)]


CHECKS = {"python": check_python, "python3": check_python, "pip": check_pip, "pytest": check_pytest}
CHECKS |= dict.fromkeys(PROJECT["scripts"], check_console)


def run_bash(example) -> None:
    commands = commands_of(example.parsed, example.namespace["tmp_path"])
    assert commands, "the block starts no program"
    for env, argv in commands:
        assert argv[0] in CHECKS, f"{argv[0]}: add a check of its command line to CHECKS"
        CHECKS[argv[0]](env, argv)


# ---- what the reader has


def plain_pytorch(request) -> dict:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(4, 2))
    return {
        "model": model,
        "images": torch.randn(16, 3, 8, 8),
        "loader": [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))] * 3,
        "criterion": nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }


def detectron2_loop(request) -> dict:
    pytest.importorskip("detectron2.engine", reason="Detectron2 is not installed")
    from detectron2.data import DatasetCatalog, DatasetMapper, build_detection_train_loader
    from detectron2.engine import SimpleTrainer
    from detectron2.modeling import build_model
    from detectron2.solver import build_lr_scheduler, build_optimizer

    from refbn_d2.config import refbn_options

    cfg = request.getfixturevalue("detectron2_cfg")
    model = build_model(cfg).train()
    data_loader, optimizer = build_detection_train_loader(cfg), build_optimizer(cfg, model)
    return {
        **{"cfg": cfg, "model": model, "data_loader": data_loader, "optimizer": optimizer},
        **{"scheduler": build_lr_scheduler(cfg, optimizer), "start_iter": 0, "max_iter": 2},
        **{"dicts": DatasetCatalog.get("tiny_train"), "mapper": DatasetMapper(cfg, True)},
        **{"options": refbn_options(cfg), "trainer": SimpleTrainer(model, data_loader, optimizer)},
    }


READERS = {
    "README.md": plain_pytorch,
    "new_camera.md": plain_pytorch,
    "detectron2.md": detectron2_loop,
}


# ---- the blocks

SYBIL = Sybil(
    [
        SkipParser(),
        PythonCodeBlockParser(),
        CodeBlockParser("bash", run_bash),
        CodeBlockParser("yaml", lambda example: yaml.safe_load(example.parsed) and None),
    ]
)


def blocks():
    for path in PATHS:
        document = SYBIL.parse(path)
        for example in document.examples():
            source = str(example.parsed)
            needs_detectron2 = "detectron2" in source and "import" in source or ".plugin" in source
            is_python = document.text[example.start : example.end].lstrip().startswith("```python")
            marks = [pytest.mark.detectron2] if is_python and needs_detectron2 else []
            name = f"{path.relative_to(ROOT)}:{example.line}"
            yield pytest.param(example, is_python, marks=marks, id=name)


@pytest.mark.parametrize("example, is_python", list(blocks()))
def test_block(example, is_python, request, tmp_path, monkeypatch):
    namespace = example.namespace
    namespace["tmp_path"] = tmp_path
    reader = READERS.get(Path(example.path).name)
    if is_python and reader and "model" not in namespace:
        namespace.update(reader(request))
    monkeypatch.chdir(tmp_path)
    example.evaluate()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_escapes(path):
    """Code stands in fences, each of which names a language that this test knows."""
    text = path.read_text()
    languages = re.findall(r"^ *```(.*)$", text, re.M)[::2]
    assert set(languages) <= {"python", "bash", "yaml", "text"}
    outside = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.M | re.S)
    assert not re.search(r"\n\n {4,}\S", outside), "an indented block: put it in a fence"


# ---- what docstrings and documents quote


def literal_block(docstring: str) -> str:
    """Return the first indented block, after a line that ends with a colon."""
    block = re.search(r":\n\n((?: {4}.*\n|\n)+)", docstring + "\n").group(1)
    return textwrap.dedent(block).strip()


def test_the_loop_of_referencebatchs_module(request):
    from refbn_d2 import convert_to_refbn
    from refbn_d2.reference import batch

    namespace = {**plain_pytorch(request), "convert_to_refbn": convert_to_refbn}
    namespace["ReferenceBatch"] = batch.ReferenceBatch
    exec(literal_block(batch.__doc__), namespace)
    assert namespace["reference"].iteration == 3


def python_blocks(path):
    return re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S)


def test_detectron2s_loop_is_the_examples():
    """The same lines in docs/detectron2.md, in the hook's docstring, and in the example."""
    example = textwrap.dedent((ROOT / "examples/plain_detectron2.py").read_text())
    example = re.sub(r"^ {4}", "", example, flags=re.M)
    [quoted] = [b for b in python_blocks(ROOT / "docs/detectron2.md") if "EventStorage" in b]
    imports, _, body = quoted.partition("\n\n")
    assert set(imports.split("\n")) <= set(example.split("\n"))
    first, loop = body.strip().split("\n", 1)
    assert first in example and loop in example
    source = ast.parse((ROOT / "refbn_d2/plugin/hook.py").read_text())
    assert literal_block(ast.get_docstring(source)) == body.strip()


# ---- the checks can fail


@pytest.mark.parametrize(
    "command, message",
    [
        ("python tools/train_net.py --config-file CONFIG.yaml --num-gpu-s 8", "SystemExit"),
        ("python tools/train_net.py --config-file CONFIG.yaml MODEL.REFBN.W 1", "MODEL.REFBN.W"),
        ("python tools/train_net.py --config-file configs/none.yaml", "none.yaml"),
        ("python tools/none.py", "no such file"),
        ("python -c 'from refbn_d2 import nothing'", "nothing"),
        ('pip install -e ".[nothing]"', "nothing"),
        ("refbn-train --config-file configs/none.yaml", "none.yaml"),
        ("refbn-pretrain --config-file CONFIG.yaml SOLVER.W 1", "SOLVER.W"),
        ("pytest -m nothing", "nothing"),
        ("for x in 1; do rm $x; done", "rm: add a check"),
        ("python 'unclosed", "unexpected EOF"),
    ],
)  # fmt: skip
def test_a_wrong_command_line_is_noticed(command, message, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"```bash\n{command}\n```\n")
    [example] = SYBIL.parse(path).examples()
    example.namespace["tmp_path"] = tmp_path
    with pytest.raises((Exception, SystemExit, pytest.fail.Exception)) as error:
        example.evaluate()
    assert message in repr(error)
