"""Checkpoints are there as a whole or not at all, and say what is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from d2v_core import checkpoint
from d2v_core.checkpoint import Checkpoint
from d2v_core.errors import UserError


def content(value: float = 1.0) -> Checkpoint:
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.98)}]}
    state = {"optimizer": optimizer, "progress": {"step": 3, "skipped": {"a": "broken"}}}
    return Checkpoint({"w": torch.full((2, 3), value)}, {"w": torch.full((2,), value), "index": torch.arange(4)}, state)


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_round_trip(tmp_path: Path):
    stored = content(1 / 3)
    folder = checkpoint.save(tmp_path, 12, stored, keep=2)
    assert folder == tmp_path / "step-00000012" and checkpoint.step_of(folder) == 12
    assert names(folder) == ["meta.json", "model.safetensors", "state.pt", "teacher.safetensors"]
    loaded = checkpoint.load(folder)
    for part in ("model", "teacher"):
        before, after = getattr(stored, part), getattr(loaded, part)
        assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert loaded.teacher["index"].dtype == torch.int64
    assert loaded.state["progress"] == stored.state["progress"]
    assert loaded.state["optimizer"]["param_groups"] == stored.state["optimizer"]["param_groups"]


def test_the_files_can_be_read_without_d2v(tmp_path: Path):
    from safetensors.torch import load_file

    folder = checkpoint.save(tmp_path, 1, content(), keep=1)
    assert torch.load(folder / "state.pt", weights_only=True)["progress"]["step"] == 3
    assert load_file(folder / "model.safetensors")["w"].shape == (2, 3)
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["format"] == checkpoint.FORMAT and meta["step"] == 1 and {"d2v", "torch"} <= meta.keys()


def test_only_the_newest_are_kept(tmp_path: Path):
    for step in (5, 10, 15, 20):
        checkpoint.save(tmp_path, step, content(), keep=2)
    assert names(tmp_path) == ["step-00000015", "step-00000020"]
    assert [checkpoint.step_of(p) for p in checkpoint.list_checkpoints(tmp_path)] == [15, 20]


def test_steps_are_ordered_as_numbers(tmp_path: Path):
    for step in (99_999_999, 9, 10):
        checkpoint.save(tmp_path, step, content(), keep=9)
    assert [checkpoint.step_of(p) for p in checkpoint.list_checkpoints(tmp_path)] == [9, 10, 99_999_999]


def test_saving_a_step_again_changes_nothing(tmp_path: Path):
    folder = checkpoint.save(tmp_path, 5, content(1.0), keep=2)
    checkpoint.save(tmp_path, 5, content(2.0), keep=2)
    assert checkpoint.load(folder).model["w"][0, 0] == 1.0


@pytest.mark.parametrize("failing", ["model", "teacher", "state", "meta", "flush", "rename"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_older_ones_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
):
    older = [checkpoint.save(tmp_path, step, content(step), keep=3) for step in (1, 2)]

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        if failing in ("model", "teacher"):
            real = checkpoint.save_file
            patch.setattr(
                checkpoint, "save_file",
                lambda tensors, path: fail() if path.name.startswith(failing) else real(tensors, path),
            )  # fmt: skip
        elif failing == "state":
            patch.setattr(torch, "save", fail)
        elif failing == "flush":
            patch.setattr(checkpoint, "_flush", fail)
        else:
            patch.setattr(Path, {"meta": "write_text", "rename": "rename"}[failing], fail)
        with pytest.raises(type(error)):
            checkpoint.save(tmp_path, 3, content(), keep=1)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    for step, folder in zip((1, 2), older, strict=True):
        assert checkpoint.load(folder).model["w"][0, 0] == step
    checkpoint.save(tmp_path, 3, content(), keep=1)
    assert names(tmp_path) == ["step-00000003"]


def test_meta_is_written_last_and_the_folder_appears_under_its_name_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = []
    rename = Path.rename

    def watch(self: Path, target: Path):
        assert not target.exists()
        seen.append((names(self), self.name))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watch)
    checkpoint.save(tmp_path, 7, content(), keep=1)
    assert seen == [(["meta.json", "model.safetensors", "state.pt", "teacher.safetensors"], ".step-00000007.tmp")]


def test_what_a_killed_process_left_behind_is_ignored_and_replaced(tmp_path: Path):
    folder = checkpoint.save(tmp_path, 4, content(), keep=3)
    shutil.copytree(folder, tmp_path / ".step-00000005.tmp")  # killed before the rename
    shutil.copytree(folder, tmp_path / "step-00000006")
    (tmp_path / "step-00000006" / "meta.json").unlink()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-7").mkdir()
    assert checkpoint.list_checkpoints(tmp_path) == [folder]
    checkpoint.save(tmp_path, 5, content(5), keep=3)
    checkpoint.save(tmp_path, 6, content(6), keep=3)
    assert names(tmp_path) == ["notes.txt", "step-00000004", "step-00000005", "step-00000006", "step-7"]
    assert checkpoint.list_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("file", ["model.safetensors", "teacher.safetensors", "state.pt", "meta.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage"])
def test_a_damaged_file_is_an_error_that_says_what_to_do(tmp_path: Path, file: str, damage: str):
    path = checkpoint.save(tmp_path, 4, content(), keep=1) / file
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "garbage": b"garbage" * 100}[damage])
    with pytest.raises(
        UserError, match=r"The checkpoint .*step-00000004 cannot be read: .* Delete it to use"
    ) as caught:
        checkpoint.load(path.parent)
    assert file in str(caught.value) and "weights_only" not in str(caught.value)


def test_an_unknown_format_is_refused(tmp_path: Path):
    folder = checkpoint.save(tmp_path, 4, content(), keep=1)
    for meta, name in (('{"format": 99}', "99"), ("[]", "None"), ("{}", "None")):
        (folder / "meta.json").write_text(meta)
        with pytest.raises(UserError, match=rf"has checkpoint format {name}, this d2v \(.*\) reads format 1"):
            checkpoint.load(folder)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path):
    folder = checkpoint.save(tmp_path, 4, content(), keep=1)

    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "pwned").touch, ())

    torch.save({"optimizer": Evil()}, folder / "state.pt")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(folder)
    assert not (tmp_path / "pwned").exists()


def test_step_of_another_name():
    with pytest.raises(ValueError, match="is not the name of a checkpoint"):
        checkpoint.step_of(Path("checkpoints/latest"))


def test_tensors_that_share_memory_can_be_stored(tmp_path: Path):
    """Tied weights: one tensor under two names."""
    w = torch.randn(3, 3)
    folder = checkpoint.save(tmp_path, 1, Checkpoint({"a": w, "b": w, "c": w[:2]}, {"t": w.T}, {}), keep=1)
    loaded = checkpoint.load(folder)
    assert torch.equal(loaded.model["a"], w) and torch.equal(loaded.model["b"], w)
    assert torch.equal(loaded.model["c"], w[:2]) and torch.equal(loaded.teacher["t"], w.T)
