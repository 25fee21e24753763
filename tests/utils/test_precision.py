"""Mixed precision where the device has fast bfloat16, and float32 where it has not."""

from types import SimpleNamespace

import pytest
import torch

from refbn_d2.utils import precision


@pytest.fixture(params=[True, False])
def has_bfloat16(request, monkeypatch):
    mkldnn = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: request.param)
    monkeypatch.setattr(torch.ops, "mkldnn", mkldnn)
    precision.lacks_bfloat16.cache_clear()
    precision._warn_once.cache_clear()
    yield request.param
    precision.lacks_bfloat16.cache_clear()
    precision._warn_once.cache_clear()


def product_in(autocast):
    with autocast:
        return (torch.ones(2, 2) @ torch.ones(2, 2)).dtype


def test_bfloat16_only_where_it_is_fast(has_bfloat16, caplog):
    dtypes = {product_in(precision.autocast("cpu", torch.bfloat16, True)) for _ in range(2)}
    assert dtypes == {torch.bfloat16 if has_bfloat16 else torch.float32}
    assert len(caplog.records) == (0 if has_bfloat16 else 1)
    assert all("in float32" in record.message for record in caplog.records)


def test_off_says_nothing(has_bfloat16, caplog):
    assert product_in(precision.autocast("cpu", torch.bfloat16, False)) == torch.float32
    assert not caplog.records


def test_gpus_have_it(has_bfloat16):
    assert not precision.lacks_bfloat16("cuda")


@pytest.mark.parametrize("capability, lacks", [("AVX2", True), ("AVX512", False)])
def test_a_torch_that_does_not_tell_is_asked_for_avx512(monkeypatch, capability, lacks):
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    text = f"PyTorch built with:\n  - CPU capability usage: {capability}\n"
    monkeypatch.setattr(torch.__config__, "show", lambda: text)
    assert precision.lacks_bfloat16.__wrapped__("cpu") == lacks
