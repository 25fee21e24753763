"""Where code stands: the rules that CONTRIBUTING.md gives below its table of imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, TESTS = ROOT / "refbn_d2", ROOT / "tests"


def test_no_file_is_over_400_lines():
    files = [path for top in (PACKAGE, TESTS, ROOT / "tools") for path in top.rglob("*.py")]
    long = [path for path in files if len(path.read_text().splitlines()) > 400]
    assert [path.relative_to(ROOT).as_posix() for path in long] == []


def test_only_init_and_the_env_modules_stand_beside_the_folders():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "env.py", "env_info.py"}


def has_code(init):
    """Return whether an `__init__.py` with this text holds more than imports and dunder names."""
    for node in ast.parse(init).body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_dunder = isinstance(node, ast.Assign) and ast.unparse(node).startswith("__")
        is_registration = ast.unparse(node) == "register_with_detectron2()"  # of refbn_d2
        is_import = isinstance(node, ast.Import | ast.ImportFrom)
        if not (is_import or is_docstring or is_dunder or is_registration):
            return True
    return False


def test_an_init_holds_re_exports_only():
    inits = [path for path in PACKAGE.rglob("__init__.py") if has_code(path.read_text())]
    assert inits == []


@pytest.mark.parametrize("code", ["def run(): ...", "x = 1", "print()", "if x:\n    import os"])
def test_code_planted_in_an_init_is_found(code):
    init = '"""A docstring."""\n\nfrom a import b\n\n__all__ = ["b"]\n'
    assert has_code(init + code) and not has_code(init)


def test_the_tests_mirror_the_package():
    folders = {path.parent.relative_to(TESTS) for path in TESTS.rglob("test_*.py")}
    assert not [f for f in folders if not (PACKAGE / f).is_dir() and not (ROOT / f).is_dir()]
