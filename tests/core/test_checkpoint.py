"""Checkpoints are there as a whole or not at all, and say what is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from d2v_core import checkpoint
from d2v_core.checkpoint import Checkpoint, DamagedCheckpoint
from d2v_core.errors import UserError

FILES = ["manifest.json", "model.safetensors", "state.json", "state.safetensors", "teacher.safetensors"]
FORMAT1 = Path(__file__).parent / "recorded" / "format1" / "checkpoints" / "step-00000004"


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
    assert names(folder) == FILES
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
    assert load_file(folder / "state.safetensors")["optimizer.state.0.step"] == 3
    assert load_file(folder / "model.safetensors")["w"].shape == (2, 3)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (
        manifest["format"] == checkpoint.FORMAT == 3 and manifest["step"] == 1 and {"d2v", "torch"} <= manifest.keys()
    )
    row = manifest["files"]["model.safetensors"]["tensors"]["w"]
    assert row["shape"] == [2, 3] and row["dtype"] == "float32"
    assert row["xxh3_128"] == xxhash.xxh3_128_hexdigest(torch.ones(2, 3).numpy().tobytes())


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


@pytest.mark.parametrize("failing", ["model", "teacher", "state", "numbers", "manifest", "flush", "rename"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_leaves_older_ones_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
):
    older = [checkpoint.save(tmp_path, step, content(step), keep=3) for step in (1, 2)]

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        if failing in ("model", "teacher", "state"):
            real = checkpoint.save_file
            patch.setattr(
                checkpoint, "save_file",
                lambda tensors, path: fail() if path.name.startswith(failing) else real(tensors, path),
            )  # fmt: skip
        elif failing == "flush":
            patch.setattr(checkpoint, "_flush", fail)
        else:
            patch.setattr(Path, {"numbers": "write_bytes", "manifest": "write_text", "rename": "rename"}[failing], fail)
        with pytest.raises(type(error)):
            checkpoint.save(tmp_path, 3, content(), keep=1)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    for step, folder in zip((1, 2), older, strict=True):
        assert checkpoint.load(folder).model["w"][0, 0] == step
    checkpoint.save(tmp_path, 3, content(), keep=1)
    assert names(tmp_path) == ["step-00000003"]


def test_the_folder_appears_under_its_name_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    rename = Path.rename

    def watch(self: Path, target: Path):
        assert not target.exists()
        seen.append((names(self), self.name))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watch)
    checkpoint.save(tmp_path, 7, content(), keep=1)
    assert seen == [(FILES, ".step-00000007.tmp")]


def test_what_a_killed_process_left_behind_is_ignored_and_replaced(tmp_path: Path):
    folder = checkpoint.save(tmp_path, 4, content(), keep=3)
    shutil.copytree(folder, tmp_path / ".step-00000005.tmp")  # killed before the rename
    shutil.copytree(folder, tmp_path / "step-00000006")
    (tmp_path / "step-00000006" / "manifest.json").unlink()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-7").mkdir()
    assert checkpoint.list_checkpoints(tmp_path) == [folder]
    checkpoint.save(tmp_path, 5, content(5), keep=3)
    checkpoint.save(tmp_path, 6, content(6), keep=3)
    assert names(tmp_path) == ["notes.txt", "step-00000004", "step-00000005", "step-00000006", "step-7"]
    assert checkpoint.list_checkpoints(tmp_path / "nowhere") == []


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "garbage"])
def test_a_damaged_file_is_an_error_that_says_what_to_do(tmp_path: Path, file: str, damage: str):
    path = checkpoint.save(tmp_path, 4, content(), keep=1) / file
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "garbage": b"garbage" * 100}[damage])
    with pytest.raises(
        DamagedCheckpoint, match=r"The checkpoint .*step-00000004 cannot be read: .* Delete it to use"
    ) as caught:
        checkpoint.load(path.parent)
    if (file, damage) != ("manifest.json", "missing"):  # then it looks like one of format 1
        assert file in str(caught.value)


def test_an_unknown_format_is_refused(tmp_path: Path):
    folder = checkpoint.save(tmp_path, 4, content(), keep=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["xxh3_128"]
    (folder / "manifest.json").write_text(checkpoint._signed({**manifest, "format": 99}, "xxh3_128"))
    with pytest.raises(UserError, match=r"has checkpoint format 99, this d2v \(.*\) reads formats 1 to 3") as caught:
        checkpoint.load(folder)
    assert not isinstance(caught.value, DamagedCheckpoint)  # nothing is wrong with it
    for text in ('{"format": 99}', "[]", "{}"):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(DamagedCheckpoint, match=r"manifest\.json"):
            checkpoint.load(folder)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path):
    """Only format 1 has one."""
    folder = shutil.copytree(FORMAT1, tmp_path / "step-00000004")

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


def test_a_state_comes_back_as_it_was(tmp_path: Path):
    state = {
        "optimizer": {"state": {0: {"step": torch.tensor(2.0), "m": torch.randn(2)}, 7: {}}, "groups": [{"b": (1, 2)}]},
        "none": None, "flag": True, "text": "a.b", "empty": [], "third": 1 / 3, "far": float("inf"),
    }  # fmt: skip
    folder = checkpoint.save(tmp_path, 1, Checkpoint({}, {}, state), keep=1)
    loaded = checkpoint.load(folder).state
    assert torch.equal(loaded["optimizer"]["state"][0].pop("m"), state["optimizer"]["state"][0].pop("m"))
    assert loaded == state and type(loaded["optimizer"]["groups"][0]["b"]) is tuple and loaded["flag"] is True
    assert checkpoint.load(folder, state=False).state == {}
    with pytest.raises(TypeError, match=r"a is \w*Path, which a checkpoint cannot hold"):
        checkpoint.save(tmp_path, 2, Checkpoint({}, {}, {"a": tmp_path}), keep=1)


def test_every_flipped_bit_is_noticed(tmp_path: Path):
    """600 bits of one checkpoint, drawn over its files in proportion to their sizes, and each bit of the manifest's
    numbers; safetensors alone notices next to none of those in the tensors."""
    weights = {"w": torch.randn(64, 64), "h": torch.randn(16).bfloat16(), "n": torch.arange(5), "e": torch.zeros(0, 3)}
    state = {"optimizer": {"state": {0: {"m": torch.randn(64, 64)}}}, "progress": {"step": 3, "seconds": 0.25}}
    folder = checkpoint.save(tmp_path, 1, Checkpoint(weights, {"w": torch.randn(64)}, state), keep=1)
    whole = {name: (folder / name).read_bytes() for name in FILES}
    places = [(name, bit) for name in FILES for bit in range(8 * len(whole[name]))]
    drawn = np.random.default_rng(0).choice(len(places), 600, replace=False)
    missed = []
    for name, bit in (places[i] for i in drawn):
        data = bytearray(whole[name])
        data[bit // 8] ^= 1 << bit % 8
        (folder / name).write_bytes(data)
        try:
            checkpoint.load(folder)
            missed.append((name, bit))
        except DamagedCheckpoint as error:
            assert name in str(error)
        (folder / name).write_bytes(whole[name])
    assert missed == []
    checkpoint.load(folder)  # unharmed


def test_a_tensor_that_was_exchanged_is_named(tmp_path: Path):
    from safetensors.torch import save_file

    folder = checkpoint.save(tmp_path, 1, Checkpoint({"a": torch.zeros(2), "b": torch.ones(2)}, {}, {}), keep=1)
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(DamagedCheckpoint, match=r"1 of 2 tensors are not what was written, among them b"):
        checkpoint.load(folder)


def test_some_are_kept_for_good(tmp_path: Path):
    for step in range(1, 10):
        checkpoint.save(tmp_path, step, content(), keep=2, keep_every=4)
    assert [checkpoint.step_of(p) for p in checkpoint.list_checkpoints(tmp_path)] == [4, 8, 9]


def test_one_of_format_1_is_read():
    """Written by d2v 0.1 before there was a manifest."""
    from safetensors.torch import load_file

    stored = checkpoint.load(FORMAT1)
    weights = load_file(FORMAT1 / "model.safetensors")
    assert stored.model.keys() == weights.keys() and all(torch.equal(stored.model[n], weights[n]) for n in weights)
    assert stored.state["progress"]["step"] == 4 and stored.state["optimizer"]["state"][0]["exp_avg"].shape
    assert checkpoint.list_checkpoints(FORMAT1.parent) == [FORMAT1]


def test_one_of_format_2_is_read_and_checked(tmp_path: Path):
    """Written by d2v 0.1 with SHA-256."""
    folder = shutil.copytree(FORMAT1.parents[2] / "format2" / "checkpoints" / FORMAT1.name, tmp_path / FORMAT1.name)
    stored = checkpoint.load(folder)
    assert stored.state["progress"]["step"] == 4 and stored.state["optimizer"]["state"][0]["exp_avg"].shape
    for file in ("model.safetensors", "state.safetensors", "state.json", "manifest.json"):
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[:-3] + bytes([data[-3] ^ 16]) + data[-2:])
        with pytest.raises(DamagedCheckpoint, match=file):
            checkpoint.load(folder)
        (folder / file).write_bytes(data)
    assert checkpoint.load(folder).model.keys() == stored.model.keys()


def test_setting_aside_keeps_every_one(tmp_path: Path):
    for number in ("", "-2", "-3"):
        folder = checkpoint.save(tmp_path, 4, content(), keep=3)
        assert checkpoint.set_aside(folder).name == f"damaged-step-00000004{number}"
    assert checkpoint.list_checkpoints(tmp_path) == []
