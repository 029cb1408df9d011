"""data2vec text 1.0 against everything recorded from the official implementation."""

from __future__ import annotations

import pytest

from . import text_checks
from .compare import Comparison, ParityError
from .finder import RECORDED, Fixture, find, parameters, root_of

CHECKS = {"single_step": text_checks.check_single_step}


def is_text(fixture: Fixture) -> bool:
    return fixture.model == "data2vec_text (1.0)"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fixture" in metafunc.fixturenames:
        metafunc.parametrize("fixture", parameters(find(root_of(metafunc.config)), is_text, {}))


def test_parity(fixture: Fixture, keep: list[Comparison]) -> None:
    assert fixture.kind in CHECKS, f"{fixture.path.name} is of kind {fixture.kind!r}, which nothing checks"
    keep.append(CHECKS[fixture.kind](fixture))


def test_initialisation(fixture: Fixture) -> None:
    comparison = text_checks.check_initialisation(fixture)
    if comparison.failures:
        raise ParityError(fixture, comparison.failures)


def test_enough_is_found(pytestconfig: pytest.Config) -> None:
    root = root_of(pytestconfig)
    if root.resolve() == RECORDED.resolve():
        pytest.skip("the copy in the repository holds audio alone; give --parity-root FOLDER")
    assert any(is_text(fixture) and fixture.kind == "single_step" for fixture in find(root))
