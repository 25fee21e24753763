"""The evaluation of a classifier on the sets of a study."""

import pytest

from refbn_d2.study.classification import main


@pytest.mark.parametrize(
    "sets, why", [("{", "is not JSON"), ('["a"]', "must be"), ("3", "must be")]
)
def test_sets_that_cannot_be(sets, why, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["classification", "--config-file", "x", "--sets", sets])
    with pytest.raises(SystemExit):
        main()
    assert f"argument --sets: {sets!r} {why}" in capsys.readouterr().err
