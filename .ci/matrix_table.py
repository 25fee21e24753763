"""Write one row of the table in docs/versions.md, for .ci/matrix.

python .ci/matrix_table.py --versions               prints the installed versions, as cells
python .ci/matrix_table.py CELL VERSIONS COMMAND COUNTS
"""

import datetime
import importlib.metadata
import platform
import re
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs/versions.md"
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "opencv-python-headless", "timm")


def versions() -> str:
    found = [platform.python_version(), *map(importlib.metadata.version, PACKAGES)]
    return " | ".join(version.partition("+")[0] for version in found)


def write_row(cell: str, found: str, command: str, counts: str) -> None:
    """Replace the row of this cell and command, or append it to the table."""
    start = f"| {cell} | "
    if found.count("|") < len(PACKAGES):  # not installed
        found += " | " * len(PACKAGES)
    counts = re.sub(r"\x1b\[\d+m|=| in .*", "", counts).strip()
    row = f"{start}{found} | `{command}` | {datetime.date.today()} | {counts} |"
    lines = PAGE.read_text().split("\n")
    first = lines.index(next(line for line in lines if line.startswith("| cell |")))
    table = range(first, lines.index("", first))
    same = [i for i in table if lines[i].startswith(start) and f"| `{command}` |" in lines[i]]
    if same:
        lines[same[0]] = row
    else:
        lines.insert(table[-1] + 1, row)
    PAGE.write_text("\n".join(lines))


if __name__ == "__main__":
    if sys.argv[1:] == ["--versions"]:
        print(versions())
    else:
        write_row(*sys.argv[1:])
