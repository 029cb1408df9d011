"""data2vec audio 1.0 against everything recorded from the official implementation."""

from __future__ import annotations

import pytest

from . import audio_checks, mask_checks
from .compare import Comparison, checked
from .finder import RECORDED, Fixture, find, parametrize, root_of

CHECKS = {
    "single_step": audio_checks.check_single_step,
    "loss_options": audio_checks.check_loss_options,
    "target_normalisation_options": audio_checks.check_target_norms,
    "training_steps": audio_checks.check_training_steps,
    "ctc_finetuning": audio_checks.check_ctc,
    "mask_statistics": mask_checks.check_mask_statistics,
}


def is_audio(fixture: Fixture) -> bool:
    return fixture.model in ("data2vec_audio", "compute_mask_indices")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    parametrize(metafunc, is_audio, {})


def test_parity(fixture: Fixture, keep: list[Comparison]) -> None:
    keep.append(checked(fixture, CHECKS))


def test_enough_is_found(pytestconfig: pytest.Config) -> None:
    kinds = {fixture.kind for fixture in find(root_of(pytestconfig)) if is_audio(fixture)}
    assert {"single_step", "training_steps", "mask_statistics"} <= kinds


def test_the_copy_in_the_repository_is_the_recording(pytestconfig: pytest.Config) -> None:
    root = root_of(pytestconfig)
    copies = [path for path in RECORDED.rglob("*.*") if path.suffix in (".json", ".safetensors")]
    assert copies
    assert sum(path.stat().st_size for path in RECORDED.rglob("*")) < 5e6
    for copy in copies:
        original = root / copy.relative_to(RECORDED)
        if original.is_file():
            assert copy.read_bytes() == original.read_bytes(), original
