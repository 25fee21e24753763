from pathlib import Path
from shutil import copyfile

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildPy(build_py):
    """Copy configs/ into the package, where refbn_d2.configs looks for it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout is used, and with it its configs/
            return
        for suffix in ("yaml", "py"):
            for path in Path("configs").rglob(f"*.{suffix}"):
                target = Path(self.build_lib, "refbn_d2", path)
                self.mkpath(str(target.parent))
                copyfile(path, target)


setup(cmdclass={"build_py": BuildPy})
