"""configs/README.md names every folder of configs/ with the number of its files."""

import re
from pathlib import Path

CONFIGS = Path(__file__).parents[1] / "configs"


def test_the_readme_counts_what_the_folders_hold():
    found = {}
    for folder in (path for path in CONFIGS.iterdir() if path.is_dir()):
        files = [path.name for path in folder.iterdir() if path.suffix in {".yaml", ".py"}]
        bases = sum(name.startswith("Base-") for name in files)
        found[folder.name] = (len(files) - bases, bases)
    said = re.findall(
        r"^- \*\*`([\w-]+)/`\*\* \((\d+) configs?(?:, (\d+) bases)?\)",
        (CONFIGS / "README.md").read_text(),
        re.MULTILINE,
    )
    assert {name: (int(n), int(bases or 0)) for name, n, bases in said} == found
