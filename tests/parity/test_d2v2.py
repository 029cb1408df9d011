"""data2vec 2.0 against everything recorded from the official implementation."""

from __future__ import annotations

import pytest

from . import d2v2_checks, d2v2_mask_checks
from .compare import Comparison, ParityError
from .finder import RECORDED, Fixture, find, parameters, root_of

CHECKS = {"single_step": d2v2_checks.check_single_step, "mask_statistics": d2v2_mask_checks.check_mask_statistics}


def is_d2v2(fixture: Fixture) -> bool:
    return fixture.family.startswith("d2v2_")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fixture" in metafunc.fixturenames:
        metafunc.parametrize("fixture", parameters(find(root_of(metafunc.config)), is_d2v2, {}))


def test_parity(fixture: Fixture, keep: list[Comparison]) -> None:
    assert fixture.kind in CHECKS, f"{fixture.path.name} is of kind {fixture.kind!r}, which nothing checks"
    keep.append(CHECKS[fixture.kind](fixture))


def test_initialisation(fixture: Fixture) -> None:
    if fixture.kind != "single_step":
        pytest.skip("masks have no weights")
    comparison = d2v2_checks.check_initialisation(fixture)
    if comparison.failures:
        raise ParityError(fixture, comparison.failures)


def test_enough_is_found(pytestconfig: pytest.Config) -> None:
    root = root_of(pytestconfig)
    if root.resolve() == RECORDED.resolve():
        pytest.skip("the copy in the repository holds audio alone; give --parity-root FOLDER")
    found = [fixture for fixture in find(root) if is_d2v2(fixture)]
    assert {d2v2_checks.kind_of(fixture) for fixture in found if fixture.kind == "single_step"} == {
        "AUDIO", "IMAGE", "TEXT",
    }  # fmt: skip
    assert sum(fixture.kind == "mask_statistics" for fixture in found) == 2
