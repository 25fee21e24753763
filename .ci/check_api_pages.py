"""Fail if an API page of the built site leaves out a public name: check_api_pages.py SITE

mkdocstrings drops, without a warning, a function that has the name of its own module.
"""

import ast
import sys
from pathlib import Path


def public_names(package: Path) -> list[str]:
    """Return `__all__`, read without importing the package; [] if it has none."""
    for node in ast.parse((package / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


missing = []
for page in sorted(Path("docs/api").glob("*.md")):
    html = (Path(sys.argv[1]) / "api" / page.stem / "index.html").read_text()
    names = public_names(Path("refbn_d2") / page.stem)
    if not names:
        missing.append(f"refbn_d2/{page.stem}/__init__.py has no __all__")
    missing += [f"{page} does not show {name}" for name in names if f'.{name}" class' not in html]
sys.exit("\n".join(missing) or 0)
