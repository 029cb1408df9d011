"""data2vec text 1.0 against everything recorded from the official implementation."""

from __future__ import annotations

import pytest

from . import text_checks
from .compare import Comparison, ParityError, checked
from .finder import Fixture, parametrize, whole_recording

CHECKS = {"single_step": text_checks.check_single_step}


def is_text(fixture: Fixture) -> bool:
    return fixture.model == "data2vec_text (1.0)"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, is_text, {})


def test_parity(fixture: Fixture, keep: list[Comparison]) -> None:
    keep.append(checked(fixture, CHECKS))


def test_initialisation(fixture: Fixture) -> None:
    comparison = text_checks.check_initialisation(fixture)
    if comparison.failures:
        raise ParityError(fixture, comparison.failures)


def test_enough_is_found(pytestconfig: pytest.Config) -> None:
    assert any(is_text(fixture) and fixture.kind == "single_step" for fixture in whole_recording(pytestconfig))
