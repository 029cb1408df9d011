"""data2vec vision 1.0 against everything recorded from fairseq's port of it."""

from __future__ import annotations

import pytest

from . import vision_checks
from .compare import Comparison, checked
from .finder import Fixture, parametrize, whole_recording

CHECKS = {"single_step": vision_checks.check_single_step, "mask_statistics": vision_checks.check_mask_statistics}


def is_vision(fixture: Fixture) -> bool:
    return fixture.model in ("data2vec_vision (1.0)", "BEiT-style block mask (vision 1.0)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, is_vision, {})


def test_parity(fixture: Fixture, keep: list[Comparison]) -> None:
    keep.append(checked(fixture, CHECKS))


def test_enough_is_found(pytestconfig: pytest.Config) -> None:
    kinds = {fixture.kind for fixture in whole_recording(pytestconfig) if is_vision(fixture)}
    assert kinds == {"single_step", "mask_statistics"}
