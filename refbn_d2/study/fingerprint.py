"""Hash the code and the weights that a result depends on."""

import ast
import hashlib
from functools import cache
from pathlib import Path

from refbn_d2.checkpoint.source import parse_source
from refbn_d2.utils.errors import ConfigError

# These parts do not change the numbers of a run, except for some of their files.
# (configs/ is in a wheel only, and the recipe of a run holds their values.)
_NO_NUMBERS = ("visualization", "export", "quickstart", "study", "env_info.py", "configs")
_BUT = (
    "export/convert_file.py", "study/class_folders.py", "study/classification.py", "study/data.py",
    "study/evaluation.py", "study/sampling.py",
)  # fmt: skip


@cache
def code_hash(*more: str) -> str:
    """Return a hash of the package's code without its comments, docstrings and formatting.

    Args:
        more: files that do not change the numbers of a run, but those of another result.
    """
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if place.parts[0] not in _NO_NUMBERS or place.as_posix() in _BUT + more:
            digest.update(f"{place.as_posix()}\n{normalized(path.read_text())}\n".encode())
    return digest.hexdigest()[:16]


def normalized(source: str) -> str:
    """Return the syntax tree of `source` without docstrings, comments and formatting."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                if isinstance(first.value.value, str):
                    del node.body[0]
    return ast.dump(tree)


def weights_hash(text: str) -> str:
    """Return the hash of the file that MODEL.WEIGHTS names, with its options; a URL as it is.

    Raises:
        ConfigError: there is no such file.
    """
    source = parse_source(text)
    if source.is_url:
        return text
    file = Path(source.file)
    if not file.is_file():
        raise ConfigError(f"MODEL.WEIGHTS {text}: there is no such file")
    content = _file_hash(file, file.stat().st_mtime_ns, file.stat().st_size)
    return f"{content} {text.partition('?')[2]}".strip()


@cache
def _file_hash(file: Path, mtime_ns: int, size: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
