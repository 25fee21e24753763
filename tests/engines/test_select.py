import sys

import pytest

pytest.importorskip("detectron2", reason="Detectron2 is not installed")
pytestmark = pytest.mark.detectron2


def test_auto_falls_back_where_refbn_cannot_be_registered(monkeypatch):
    from refbn_d2.engines.select import select_engine

    assert select_engine("auto").__name__ == "refbn_d2.engines.detectron2"
    monkeypatch.setitem(sys.modules, "refbn_d2.engines.detectron2", None)
    monkeypatch.delattr("refbn_d2.engines.detectron2")
    assert select_engine("auto").__name__ == "refbn_d2.engines.torchvision"
    with pytest.raises(ImportError, match="Detectron2 cannot be imported"):
        select_engine("detectron2")
