import pytest

from refbn_d2.data import shapes
from tests.data.shapes.helpers import SIZE, SMALL


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return shapes.make_detection(tmp_path_factory.mktemp("small"), **SMALL)


@pytest.fixture(scope="module")
def scenes():
    return [shapes.draw_detection(7, "train", i, SIZE) for i in range(140)]
