"""data2vec vision 1.0 against everything recorded from fairseq's port of it."""

from __future__ import annotations

import pytest

from . import vision_checks
from .compare import Comparison
from .finder import RECORDED, Fixture, find, parameters, root_of

CHECKS = {"single_step": vision_checks.check_single_step, "mask_statistics": vision_checks.check_mask_statistics}


def is_vision(fixture: Fixture) -> bool:
    return fixture.model in ("data2vec_vision (1.0)", "BEiT-style block mask (vision 1.0)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fixture" in metafunc.fixturenames:
        metafunc.parametrize("fixture", parameters(find(root_of(metafunc.config)), is_vision, {}))


def test_parity(fixture: Fixture, keep: list[Comparison]) -> None:
    assert fixture.kind in CHECKS, f"{fixture.path.name} is of kind {fixture.kind!r}, which nothing checks"
    keep.append(CHECKS[fixture.kind](fixture))


def test_enough_is_found(pytestconfig: pytest.Config) -> None:
    root = root_of(pytestconfig)
    if root.resolve() == RECORDED.resolve():
        pytest.skip("the copy in the repository holds audio alone; give --parity-root FOLDER")
    kinds = {fixture.kind for fixture in find(root) if is_vision(fixture)}
    assert kinds == {"single_step", "mask_statistics"}
