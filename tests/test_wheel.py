"""The sdist and the wheel: what they hold, and that they work outside a checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import refbn_d2
from refbn_d2.study.fingerprint import code_hash
from tests.versions import tomllib

pytest.importorskip("setuptools", reason="setuptools builds the wheel")

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SCRIPTS = PROJECT["scripts"]
CONFIGS = {
    path.relative_to(ROOT / "configs").as_posix()
    for suffix in ("yaml", "py")
    for path in (ROOT / "configs").rglob(f"*.{suffix}")
}
TINY = [
    "--pretrain", "SOLVER.EPOCHS 1 INPUT.SIZE 32 INPUT.SIZE_TEST 32 SOLVER.IMS_PER_BATCH 512",
    "--finetune",
    "SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 DATASETS.TEST \"('shapes_val_noise',)\"",
]  # fmt: skip


def python(*arguments, cwd, **environment):
    """Run Python without a checkout on its path; return what it prints."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | environment
    done = subprocess.run(arguments, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return (sdist, wheel), the wheel built from the unpacked sdist."""
    folder = tmp_path_factory.mktemp("build")
    checkout = folder / "checkout"
    ignore = shutil.ignore_patterns(
        ".*", "__pycache__", "*.egg-info", "build", "dist", "output", "datasets", "docs", "tests"
    )
    shutil.copytree(ROOT, checkout, ignore=ignore)
    build = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])('..')"
    python(sys.executable, "-c", build, "build_sdist", cwd=checkout)
    [sdist] = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        file.extractall(folder / "unpacked", filter="data")
    [unpacked] = (folder / "unpacked").iterdir()
    python(sys.executable, "-c", build, "build_wheel", cwd=unpacked)
    [wheel] = unpacked.parent.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Return a folder with the content of the wheel, as pip would install it."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(built[1]) as file:
        file.extractall(folder)
    return folder


def test_the_wheel_holds_the_package_and_each_config(installed):
    info = f"refbn_d2-{refbn_d2.__version__}.dist-info"
    assert {path.name for path in installed.iterdir()} == {"refbn_d2", info}
    package = installed / "refbn_d2"
    files = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    source = {
        p.relative_to(ROOT / "refbn_d2").as_posix() for p in (ROOT / "refbn_d2").rglob("*.py")
    }
    templates = {"quickstart/report.html.jinja", "study/report.html.jinja"}
    assert len(CONFIGS) > 70
    assert files == source | templates | {"py.typed"} | {f"configs/{name}" for name in CONFIGS}


def test_each_config_is_read_with_its_bases(installed, tmp_path):
    code = """
from refbn_d2 import configs
from refbn_d2.config import get_cfg
from refbn_d2.config.pretrain import get_pretrain_cfg
for name in configs.config_names():
    print(name)
    if name.endswith("yaml") and not name.startswith("studies/"):
        path = configs.get_config_file(name)
        cfg = get_pretrain_cfg() if name.startswith("pretrain/") else get_cfg()
        cfg.merge_from_file(path)
print(path)
"""
    *names, path = python(
        sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)
    ).splitlines()
    assert set(names) == CONFIGS and path.startswith(str(installed))


def test_each_console_command_resolves(installed, tmp_path):
    code = """
from importlib.metadata import distribution
import refbn_d2
from refbn_d2.study.fingerprint import code_hash
print(refbn_d2.__file__)
print(code_hash())
for entry in distribution("refbn_d2").entry_points:
    print(entry.name, callable(entry.load()))
"""
    place, fingerprint, *entries = python(
        sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)
    ).splitlines()
    assert place.startswith(str(installed))
    assert fingerprint == code_hash()  # results of a wheel and of a checkout go together
    assert sorted(entries) == sorted(f"{name} True" for name in SCRIPTS)


def test_each_script_has_its_console_command():
    """The same main() is behind both."""
    scripts = [*(ROOT / "tools").glob("*.py"), ROOT / "tools/quickstart/__main__.py"]
    called = [re.findall(r"from (\S+) import main\n", path.read_text()) for path in scripts]
    assert sorted(called) == sorted([target.removesuffix(":main")] for target in SCRIPTS.values())


def test_the_sdist_holds_what_a_build_needs(built):
    with tarfile.open(built[0]) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE"} <= names
    assert {f"configs/{name}" for name in CONFIGS} <= names


@pytest.mark.slow
@pytest.mark.parametrize("is_there", [True, False])
def test_an_environment_with_the_oldest_packages_keeps_them(built, tmp_path, is_there):
    """It has pip, and in name the oldest packages that pyproject.toml allows."""
    python(sys.executable, "-m", "venv", str(tmp_path / "venv"), cwd=tmp_path)
    [site] = (tmp_path / "venv/lib").glob("*/site-packages")
    for requirement in PROJECT["dependencies"][0 if is_there else 1 :]:
        name, version = re.match(r"([\w-]+)>=([\w.]+)", requirement).groups()
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    command = ["-m", "pip", "install", "-q", "--no-index", "--dry-run", "--report", "-"]
    done = subprocess.run(
        [tmp_path / "venv/bin/python", *command, built[1]], cwd=tmp_path, text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, capture_output=True,
    )  # fmt: skip
    if is_there:
        installed = [item["metadata"]["name"] for item in json.loads(done.stdout)["install"]]
        assert installed == ["refbn_d2"], done.stderr
    else:
        assert done.returncode and "torch" in done.stderr


@pytest.mark.slow
def test_the_quickstart_from_a_wheel(built, tmp_path):
    """In an environment of its own, which sees this one's packages but no checkout."""
    python(sys.executable, "-m", "venv", str(tmp_path / "venv"), cwd=tmp_path)
    bin = tmp_path / "venv/bin"
    [site] = (tmp_path / "venv/lib").glob("*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ["install", "-q", "--no-index", "--no-deps", "--ignore-installed", str(built[1])]
    python(bin / "python", "-m", "pip", *install, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    place = python(bin / "python", "-c", "print(__import__('refbn_d2').__file__)", cwd=elsewhere)
    assert place.startswith(str(site))
    out = python(bin / "refbn-quickstart", *TINY, cwd=elsewhere, DETECTRON2_DATASETS="")
    assert out.endswith("The report: output/quickstart/report.html\n")
    assert {path.name for path in elsewhere.iterdir()} == {"datasets", "output"}
    assert "bbox/AP" in (elsewhere / "output/quickstart/refbn/metrics.json").read_text()
