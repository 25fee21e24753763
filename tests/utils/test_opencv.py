"""Two OpenCV packages at once, as their metadata on a path of its own."""

import logging

import pytest

from refbn_d2.utils.opencv import warn_of_two_packages


@pytest.fixture
def installed(tmp_path, monkeypatch):
    def write(**versions):
        for name, version in versions.items():
            folder = tmp_path / f"{name}-{version}.dist-info"
            folder.mkdir()
            metadata = (
                f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
            )
            (folder / "METADATA").write_text(metadata)

    monkeypatch.setattr("sys.path", [str(tmp_path)])
    warn_of_two_packages.cache_clear()
    yield write
    warn_of_two_packages.cache_clear()


def test_two_packages_are_named_with_the_command(installed, caplog):
    installed(opencv_python="4.6.0.66", opencv_python_headless="4.10.0", numpy="1.23.5")
    warn_of_two_packages()
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert "opencv-python 4.6.0.66 and opencv-python-headless 4.10.0 are installed" in message
    assert "`pip uninstall opencv-python opencv-python-headless`" in message


@pytest.mark.parametrize("versions", [{}, {"opencv_contrib_python": "4.6.0"}])
def test_one_or_a_system_build_is_fine(installed, caplog, versions):
    installed(**versions)
    warn_of_two_packages()
    assert caplog.records == []
