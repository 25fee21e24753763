"""The table of imports in CONTRIBUTING.md, held against every import statement of the package."""

import ast
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "refbn_d2"
ROWS = re.findall(r"^\| `(.+?)` \|.+?\|(.+)\|$", (PACKAGE / "../CONTRIBUTING.md").read_text(), re.M)
TABLE = {re.sub(r"/$|\.py$", "", row): set(re.findall("`(.+?)`", cells)) for row, cells in ROWS}


def row_of(module):
    """Return the innermost row of the table that holds `module`, a path within the package."""
    return max((r for r in TABLE if f"{module}/".startswith(f"{r}/")), key=len, default=module)


def violations(module, code):
    allowed = {row_of(module), "torch", "numpy"} | TABLE.get(row_of(module), set())
    for node in ast.walk(ast.parse(code)):
        start = f"{'.' * node.level}{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            top, _, rest = f"{start}{alias.name}".partition(".")
            name = row_of(rest.replace(".", "/")) if top == "refbn_d2" else top
            if name not in allowed | sys.stdlib_module_names:
                yield f"{module}.py:{node.lineno}: `{row_of(module)}` may not import `{name}`"


def test_every_folder_imports_what_its_row_names():
    files = {p.relative_to(PACKAGE).as_posix()[:-3]: p.read_text() for p in PACKAGE.rglob("*.py")}
    assert "\n".join(v for m, code in files.items() for v in violations(m, code)) == ""
    assert {row_of(module) for module in files} == TABLE.keys()


@pytest.mark.parametrize("module", ["layers/fold", "engines/torchvision/data/a", "new/a"])
@pytest.mark.parametrize("code", ["def f(): import timm", "from refbn_d2 import plugin"])
def test_a_planted_violation_is_found(module, code):
    assert len([*violations(module, code)]) == 1
