"""The built-in modalities keep every promise of the contract, with each method and encoder."""

from __future__ import annotations

import pytest

from d2v_core.promises import PROMISES
from d2v_core.testing import check

COSTLY = ("determinism", "resume", "compiled", "bf16", "learning")


@pytest.mark.parametrize("modality", ["audio", "vision", "text"])
def test_promises_without_training(modality: str, one_thread: None) -> None:
    results = list(check(modality, encoder={"audio": "logmel"}.get(modality), promises=[*PROMISES][: -len(COSTLY)]))
    assert [result for result in results if result.status != "kept"] == []
    assert {result.case.split(",")[0] for result in results} == {"data2vec", "data2vec2"}


@pytest.mark.slow
@pytest.mark.parametrize("modality", ["audio", "vision", "text"])
def test_every_promise(modality: str, one_thread: None) -> None:
    results = list(check(modality))
    assert [result for result in results if result.status != "kept"] == []
    assert {result.promise for result in results} == set(PROMISES)


def test_the_costly_ones_come_last() -> None:
    assert tuple(PROMISES)[-len(COSTLY) :] == COSTLY
