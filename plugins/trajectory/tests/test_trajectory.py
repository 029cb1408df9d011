"""d2v's promises, held against this modality, and what is its own: masks, tokens, schema, readers, pendulum, probe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from d2v_core import BadSample, Layout, Masks, UserError, cli, load
from d2v_core.config import load_config
from d2v_core.keyed import generator
from d2v_core.testing import Conformance
from d2v_trajectory import simulated
from d2v_trajectory.data import DataConfig, Group, Trajectories, checked, encode
from d2v_trajectory.files import Episode, find, read
from d2v_trajectory.masking import TrajectoryMasking, TrajectoryMaskingConfig
from d2v_trajectory.modality import TrajectoryModality

NAMES = ["observations", "actions", "rewards"]


class TestTrajectory(Conformance):
    modality = "trajectory"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make(*words: str) -> TrajectoryModality:
    config, kind = load_config(["modality=trajectory", *words])
    modality = kind(config)
    assert isinstance(modality, TrajectoryModality)
    return modality


def fit(episodes: Sequence[Episode], names: Sequence[str] = NAMES) -> list[Group]:
    return [Group.of(name, [one[name] for one in episodes]) for name in names]


def opened(path: Path, **options: float) -> Trajectories:
    return Trajectories(DataConfig(path=str(path), **options), None)  # pyright: ignore[reportArgumentType]


def episode(steps: int, channels: int = 2, seed: int = 0, more: int = 0) -> dict[str, np.ndarray]:
    """more: observations than actions."""
    rng = generator(seed, "test", steps)
    return {
        "observations": rng.normal(5, 2, (steps + more, channels)),
        "actions": rng.integers(0, 3, steps),
        "rewards": rng.normal(size=steps).astype(np.float32),
    }


# ------------------------------------------------------------------------------------------------------------- masks


def masks(*shapes: tuple[int, int], copies: int = 2, seed: int = 0, **options: float) -> Masks:
    policy = TrajectoryMasking(TrajectoryMaskingConfig(**options))  # pyright: ignore[reportArgumentType]
    return policy([Layout(s) for s in shapes], copies, [generator(seed, "mask", i) for i in range(len(shapes))])


def test_masks_by_time_hide_whole_steps() -> None:
    hidden = masks((40, 4), copies=20, mask_prob=0.5, channel_prob=0.0).hidden[0].view(20, 40, 4)
    assert (hidden == hidden[:, :, :1]).all() and (hidden[:, :, 0].sum(1) == 20).all()
    assert not (hidden[0] == hidden[1]).all()
    changes = (hidden[:, 1:, 0] != hidden[:, :-1, 0]).sum(1).float().mean()
    assert changes < 12  # stretches; of single steps there would be 20


def test_masks_by_channel_leave_other_groups_of_the_step() -> None:
    hidden = masks((40, 4), copies=20, mask_prob=0.5, channel_prob=1.0, channel_length=20).hidden[0].view(20, 40, 4)
    assert (hidden.sum(1) == 20).all()
    alone = hidden.any(-1) & ~hidden.all(-1)  # steps of which some groups are hidden and others seen
    assert float(alone.float().mean()) > 0.6
    assert all(not (hidden[:, :, a] == hidden[:, :, b]).all() for a in range(4) for b in range(a))


def test_both_kinds_come_in_their_proportion() -> None:
    hidden = masks((60, 3), copies=400, mask_prob=0.4, channel_prob=0.3).hidden[0].view(400, 60, 3)
    by_time = (hidden == hidden[:, :, :1]).flatten(1).all(-1).float().mean()
    assert float(by_time) == pytest.approx(0.7, abs=0.08)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("prob", [0.01, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("shape", [(2, 1), (2, 3), (5, 3), (40, 1)])
def test_the_stated_share_is_the_share(shape: tuple[int, int], prob: float, inverse: bool) -> None:
    policy = TrajectoryMasking(TrajectoryMaskingConfig(mask_prob=prob, inverse=inverse))
    hidden = masks(shape, copies=8, mask_prob=prob, inverse=inverse).hidden[0]
    low, high = policy.hidden_share(Layout(shape))
    assert low == high and (hidden.float().mean(-1) - low).abs().max() < 1e-6
    assert hidden.any(-1).all() and not hidden.all(-1).any()


def test_shorter_trajectories_have_no_mask_on_padding() -> None:
    found = masks((10, 3), (4, 3), mask_prob=0.6)
    assert not found.hidden[1, :, 12:].any() and found.visible is not None
    for hidden, visible in zip(found.hidden[1], found.visible[1], strict=True):
        own = [place for place in visible.tolist() if place < 12]
        assert own == (~hidden[:12]).nonzero().flatten().tolist()  # the others are padding


# ------------------------------------------------------------------------------------------------------------- tokens


def test_a_token_is_one_group_of_one_step() -> None:
    modality = make()
    encoder = modality.feature_encoder()
    assert [(group.channels, group.classes) for group in modality.groups] == [(3, 0), (1, 3), (1, 0)]
    values = torch.randn(1, 6, 7)
    before = encoder.embed({"values": values})
    assert before.grid == (6, 3) and before.x.shape[:2] == (1, 18) and before.padding_mask is None
    values[0, 4, 3:6] += 1.0  # the action of step 4
    changed = (encoder.embed({"values": values}).x - before.x).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == [4 * 3 + 1]
    with pytest.raises(ValueError, match=r"\(1, 6, 8\); expected \(B, steps, 7\)"):
        encoder.embed({"values": torch.zeros(1, 6, 8)})


def test_padding_is_marked_step_by_step() -> None:
    modality = make()
    inputs = modality.collate([np.ones((5, 7), np.float32), np.ones((3, 7), np.float32)])
    assert inputs["steps"].tolist() == [5, 3] and modality.amount(inputs) == 8
    tokens = modality.feature_encoder().embed(inputs)
    assert tokens.padding_mask is not None and tokens.padding_mask.sum(-1).tolist() == [0, 6]
    assert tokens.padding_mask[1, 9:].all()


def test_a_longer_window_needs_no_other_network() -> None:
    encoder = make().feature_encoder()
    short, long = (encoder.view(encoder.embed({"values": torch.ones(1, n, 7)}), None).x for n in (10, 300))
    torch.testing.assert_close(short[0], long[0, :30])


# ------------------------------------------------------------------------------------------------------------- groups


def test_channels_are_standardised_or_one_number_a_class() -> None:
    episodes = [checked(episode(50, seed=i), NAMES, 2) for i in range(20)]
    groups = fit(episodes)
    assert [(g.name, g.channels, g.classes) for g in groups] == [
        ("observations", 2, 0), ("actions", 1, 3), ("rewards", 1, 0),
    ]  # fmt: skip
    values = np.concatenate([encode(one, groups) for one in episodes])
    assert values.shape == (1000, 6) and values.dtype == np.float32
    np.testing.assert_allclose(values[:, [0, 1, 5]].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(values[:, [0, 1, 5]].std(0), 1, atol=1e-5)
    actions = np.concatenate([one["actions"][:, 0] for one in episodes])
    assert values[:, 2:5].argmax(1).tolist() == actions.tolist() and (values[:, 2:5].sum(1) == 1).all()


def test_several_discrete_channels_and_a_constant_one() -> None:
    found = checked({"a": np.array([[0, 2], [1, 1], [3, 0]]), "b": np.full((3, 1), 7.0)}, ["a", "b"], 2)
    groups = fit([found], ["a", "b"])
    assert (groups[0].channels, groups[0].classes) == (2, 4)
    assert encode(found, groups)[0].tolist() == [1, 0, 0, 0, 0, 0, 1, 0, 0]


def test_the_network_refuses_other_channels() -> None:
    groups = make().groups  # 3 observations, 3 actions
    for change, reason in (
        ({"observations": np.zeros((9, 2))}, "observations has 2 channels of 0 classes; expected 3 of 0"),
        (
            {"actions": np.full(9, 4)},
            "actions has 1 channels of 5 classes; expected 1 of 3",
        ),
        ({"actions": np.zeros(9)}, "actions has 1 channels of 0 classes; expected 1 of 3"),
    ):
        with pytest.raises(BadSample, match=reason):
            encode(checked({**episode(9, 3), **change}, NAMES, 2), groups)


# ------------------------------------------------------------------------------------------------------------ readers


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"observations": np.zeros((20, 2, 2))},
            r"observations is float64 of shape \(20, 2, 2\); .* \(20, channels",
        ),
        ({"actions": np.zeros(15)}, r"observations is float64 of shape \(20, 2\); .* \(15, channels"),
        ({"rewards": np.float32(1)}, r"observations is float64 of shape \(20, 2\); .* \(0, channels"),
        ({"rewards": np.where(np.arange(20) == 7, np.nan, 1.0)}, "rewards has values that are not finite, in step 7"),
        ({"observations": np.full((20, 2), "x")}, "observations is <U1 of shape .*; expected numbers"),
        ({"actions": np.full(20, -1)}, "actions has whole numbers from -1 to -1"),
        ({"actions": np.full(20, 1000)}, "from 1000 to 1000; .* Save continuous channels as floating-point"),
        ({name: episode(5)[name] for name in NAMES}, "5 steps; data.min_steps=8"),
    ],
)
def test_arrays_that_are_no_trajectory(change: Episode, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        checked({**episode(20), **change}, NAMES, 8)


def test_the_last_observation_may_stand_alone() -> None:
    found = checked(episode(20, more=1), NAMES, 8)
    assert {name: array.shape for name, array in found.items()} == {
        "observations": (20, 2), "actions": (20, 1), "rewards": (20, 1),
    }  # fmt: skip


def test_npz_files(tmp_path: Path) -> None:
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", **episode(10 + i, seed=i), extra=np.zeros(3))
    files = find(str(tmp_path))
    assert list(files) == ["0.npz", "1.npz", "2.npz"]
    assert sorted(read(*files["1.npz"], NAMES)) == sorted(NAMES)
    dataset = opened(tmp_path)
    assert dataset.sizes.tolist() == [10, 11, 12] and dataset[2].shape == (12, 6)
    with pytest.raises(BadSample, match="no array goals; there is actions, extra, observations, rewards"):
        read(*files["0.npz"], [*NAMES, "goals"])
    assert dataset.groups == fit([checked(episode(10 + i, seed=i), NAMES, 2) for i in range(3)])


def test_broken_npz_files(tmp_path: Path) -> None:
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", **episode(30, seed=i))
    whole = (tmp_path / "1.npz").read_bytes()
    (tmp_path / "1.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadSample, match="damaged or cut short"):
        read(*find(str(tmp_path))["1.npz"], NAMES)
    with pytest.raises(UserError, match=r"1 of 3 trajectories \(33.3%\) are unreadable.*\n.*1.npz: damaged"):
        opened(tmp_path)
    dataset = opened(tmp_path, max_bad_ratio=0.5)
    assert [dataset.id(i) for i in range(2)] == ["0.npz", "2.npz"] and "1.npz: damaged" in dataset.describe()
    np.savez(tmp_path / "1.npz", **episode(30, channels=5))
    with pytest.raises(UserError, match=r"different channels: observations has 5 channels of 0 .* 2 of 0"):
        opened(tmp_path)
    np.savez(tmp_path / "1.npz", **{**episode(30), "actions": np.zeros(30)})
    with pytest.raises(UserError, match="actions has 1 channels of 0 classes; expected 1 of 3"):
        opened(tmp_path)
    with pytest.raises(UserError, match=r"does not exist.*Did you mean '1.npz'"):
        find(str(tmp_path / "11.npz"))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"no trajectories in .*no files at all"):
        find(str(tmp_path / "none"))


def test_minari_files(tmp_path: Path) -> None:
    """The layout of Minari's main_data.hdf5: a group for each episode, one observation more than actions."""
    h5py = pytest.importorskip("h5py", reason="h5py, which writes and reads HDF5 files, is not installed")
    path = tmp_path / "pendulum-v0" / "data" / "main_data.hdf5"
    path.parent.mkdir(parents=True)
    with h5py.File(path, "w") as file:
        for i in (0, 2, 10):
            group = file.create_group(f"episode_{i}")
            for name, array in episode(10 + i, seed=i, more=1).items():
                group[name] = array
            group["infos/speed"] = np.zeros(3)
    files = find(str(tmp_path))
    assert [group for _, group in files.values()] == ["episode_0", "episode_2", "episode_10"]
    first = files["pendulum-v0/data/main_data.hdf5/episode_0"]
    dataset = opened(tmp_path)
    assert dataset.sizes.tolist() == [10, 12, 20]
    with pytest.raises(BadSample, match="no array infos; there is actions, infos, observations, rewards"):
        read(*first, ["infos"])
    assert read(*first, ["infos/speed"])["infos/speed"].shape == (3,)
    with h5py.File(tmp_path / "flat.hdf5", "w") as file:
        file["observations"] = np.zeros((5, 2))
    with pytest.raises(UserError, match=r"no groups episode_0.*there is .*observations"):
        find(str(tmp_path))
    (tmp_path / "flat.hdf5").write_bytes(b"no hdf5")
    with pytest.raises(UserError, match=r"flat.hdf5 is damaged or cut short"):
        find(str(tmp_path))


def test_without_the_library_for_hdf5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.hdf5").write_bytes(b"")
    monkeypatch.setattr("d2v_trajectory.files.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"read with h5py, .*pip install 'd2v-trajectory\[hdf5\]'"):
        find(str(tmp_path))


def test_training_on_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed gives the same weights; a run is loaded, and gone on from, by its own groups, without its data."""
    monkeypatch.chdir(tmp_path)
    for i in range(6):
        (tmp_path / "data").mkdir(exist_ok=True)
        np.savez(tmp_path / "data" / f"{i}.npz", **episode(10 + 5 * i, seed=i))
    words = ["modality=trajectory", "data.window=20", "data.batch=60", "model.num_layers=1", "target.top_k_layers=1",
             "train.max_steps=2", "train.tensorboard=false", "train.num_workers=0"]  # fmt: skip
    for out in ("one", "two"):
        assert cli.main(["run", *words, "data.path=data", f"out={out}"]) == 0
    one, two = (load(out).student.state_dict() for out in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    run = load("one")
    assert isinstance(run.modality, TrajectoryModality)
    sample = encode(checked(episode(12), NAMES, 2), run.modality.groups)
    assert run.encode(run.modality.collate([sample]))[-1].shape == (36, 64)
    assert json.loads((tmp_path / "one" / "groups.json").read_text())[1]["classes"] == 3
    np.savez(tmp_path / "elsewhere" / "0.npz", **episode(30, channels=4))
    for name in ("1", "2", "3", "4", "5"):
        (tmp_path / "elsewhere" / f"{name}.npz").unlink()
    assert cli.main(["run", *words, "data.path=elsewhere", "from=one", "out=three"]) == 2


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("data.groups=[goals]", "goals.* must be names of arrays; the built-in ones: .*actions"),
        ("data.groups=[]", "must be names of arrays"),
        ("data.min_steps=1", "data.min_steps, data.window and data.batch must be"),
        ("data.batch=10", "data.window and data.batch must be 2 or more"),
        ("mask.mask_prob=0", "mask.mask_prob=0.0 must lie between 0 and 1"),
        ("mask.channel_prob=2", "mask.channel_prob=2.0 and .* must be a share"),
        ("mask.channel_length=0", "mask.channel_length=0 must be a share and at least 1"),
    ],
)
def test_options_that_cannot_work(word: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        make(word)


# --------------------------------------------------------------------------------------------- built-in data and probe


def test_built_in_trajectories_stay() -> None:
    """Each by itself and beside others alike, and others for another split."""
    together, alone = simulated.episodes("train", range(5), 30), simulated.episodes("train", [3], 30)
    other = simulated.episodes("test", [3], 30)
    for name in NAMES:
        assert np.array_equal(together[3][name], alone[0][name]) and not np.array_equal(alone[0][name], other[0][name])
    assert together[0]["observations"].shape == (30, 3) and set(np.unique(together[0]["actions"])) <= {0, 1, 2}


def test_the_pendulum_is_one() -> None:
    """Without a push energy falls, by friction alone; cosine and sine are of one angle."""
    for one in simulated.episodes("dev", range(40), 60):
        cosine, sine, speed = one["observations"].T
        np.testing.assert_allclose(cosine**2 + sine**2, 1, atol=1e-5)
        assert np.all(one["rewards"][:, 0] <= cosine + 1e-6) and np.all(np.abs(one["rewards"]) <= 1)
        assert np.abs(np.diff(speed)).max() < 2.5  # no jumps: the largest push and pull, times a step


def test_policies_differ_in_quality() -> None:
    drawn = simulated.episodes("train", range(400), 200)
    policy = np.array([int(generator(0, "episode", "train", i).uniform(0, 5)) for i in range(400)])
    got = np.array([one["rewards"][100:].mean() for one in drawn])
    mean = {name: got[policy == i].mean() for i, name in enumerate(simulated.POLICIES)}
    assert mean["swing up"] > 0.3 + max(value for name, value in mean.items() if name != "swing up"), mean
    assert mean["brake"] < -0.8, mean


def test_the_probe() -> None:
    modality = make("data.window=16")
    task = modality.probe()
    assert task is not None and task.num_classes == 4
    inputs, labels = task.train[0]
    assert inputs["values"].shape == (1, 16, 7) and task.input_features(inputs).shape == (48, 112)
    assert (labels >= 0).nonzero().flatten().tolist() == [15 * 3 + 1]  # the action of the last step
    classes = np.array([int(one.max()) for _, one in task.train])
    assert np.bincount(classes).tolist() == [len(classes) // 4] * 4
    whole = simulated.episodes("train", range(480), 32)  # the label is of what the inputs do not have
    again = modality.collate([encode(whole[0], modality.groups)[:16]])
    assert torch.equal(inputs["values"], again["values"])
    to_come = np.array([one["rewards"][16:].sum() for one in whole])
    assert to_come[classes == 0].max() < to_come[classes == 1].min() and to_come[classes == 3].min() > to_come.mean()
