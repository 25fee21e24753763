import pytest

from refbn_d2.data import shapes
from tests.data.shapes.helpers import SIZE, SMALL


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The folder of a detection set of 28 + 14 pictures. Tests leave it as it is."""
    return shapes.make_detection(tmp_path_factory.mktemp("small"), **SMALL)


@pytest.fixture(scope="session")
def scenes():
    """140 scenes, none of them written to a file."""
    return [shapes.draw_detection(7, "train", i, SIZE) for i in range(140)]
