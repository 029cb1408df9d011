"""The finder and the comparer themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from .compare import ACTIVATION, EXACT, Comparison, ParityError
from .finder import Fixture, find, root_of


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """One fixture in each layout."""
    weight = torch.arange(4.0)
    for folder, name, meta, tensors in (
        ("audio", "one", {"kind": "single_step", "model": "a"}, {"w.student.p": weight, "student.x": weight}),
        ("text", "two.meta", {"ema": {}, "grad_of": "", "model": "b"}, {"student.p": weight, "target": weight}),
        ("text", "odd", {"tensors": {}}, {"x": weight}),
        ("vision", "mask_stats_block", {"settings": {}, "generator": "c"}, {}),
    ):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f"{name}.json").write_text(json.dumps(meta))
        if tensors:
            save_file(
                {key: value.clone() for key, value in tensors.items()},
                tmp_path / folder / f"{name.removesuffix('.meta')}.safetensors",
            )
    (tmp_path / "hf" / "audio").mkdir(parents=True)
    (tmp_path / "hf" / "audio" / "config.json").write_text('{"model_type": "data2vec-audio"}')
    (tmp_path / "hf" / "audio" / "meta.json").write_text('{"model_class": "d"}')
    return tmp_path


def test_both_layouts_are_found(written: Path) -> None:
    found = {fixture.id: fixture for fixture in find(written)}
    assert {name: (fixture.kind, fixture.model) for name, fixture in found.items()} == {
        "audio/one": ("single_step", "a"),
        "hf/audio": ("hidden_states", "d"),
        "text/odd": ("unknown", ""),
        "text/two": ("single_step", "b"),
        "vision/mask_stats_block": ("mask_statistics", "c"),
    }
    for name in ("audio/one", "text/two"):
        comparison = Comparison(found[name])
        assert comparison.take_all(found[name].layout.student).keys() == {"p"}


def test_every_recorded_set_is_understood(pytestconfig: pytest.Config) -> None:
    found = find(root_of(pytestconfig))
    assert found
    assert not [fixture.id for fixture in found if fixture.kind == "unknown"]
    for fixture in found:
        if fixture.kind == "single_step":
            assert any(name.startswith(fixture.layout.student) for name in fixture.tensors), fixture.id
            assert any(name.startswith(fixture.layout.teacher_after) for name in fixture.tensors), fixture.id


@pytest.fixture
def fixture(written: Path) -> Fixture:
    return next(fixture for fixture in find(written) if fixture.id == "audio/one")


def test_a_tensor_left_out_is_an_error(fixture: Fixture) -> None:
    comparison = Comparison(fixture)
    comparison.take("w.student.p")
    with pytest.raises(ParityError, match=r"student\.x: recorded, but not compared") as caught:
        comparison.finish()
    assert caught.value.failed == ("student.x",)
    comparison = Comparison(fixture)
    comparison.take("w.student.p")
    comparison.tensor("student.x", torch.arange(4.0), EXACT)
    assert comparison.finish().num_compared == 1


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (None, "not computed"),
        (torch.zeros(3), r"computed \(3,\), recorded \(4,\)"),
        (torch.arange(4.0) + 4e-5, r"deviates by 4\.\d+e-05"),
        (torch.tensor([0.0, 1.0, 2.0, float("nan")]), "deviates by nan"),
    ],
)
def test_what_does_not_match_is_described(fixture: Fixture, ours: torch.Tensor | None, words: str) -> None:
    comparison = Comparison(fixture)
    comparison.take("w.student.p")
    comparison.tensor("student.x", ours, ACTIVATION)
    with pytest.raises(ParityError, match=words):
        comparison.finish()


def test_close_enough_is_enough(fixture: Fixture) -> None:
    comparison = Comparison(fixture)
    comparison.take("w.student.p")
    comparison.tensor("student.x", torch.arange(4.0) + 2e-5, ACTIVATION)
    comparison.number("a number", 1.0 + 1e-6, 1.0, ACTIVATION)
    assert comparison.finish().groups()["student.x"][2] == pytest.approx(2 / 3, rel=0.05)
