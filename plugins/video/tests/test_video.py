"""d2v's promises, held against this modality, and what is its own: masks, tubelets, readers, built-in clips, probe."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image

from d2v_core import BadSample, Layout, UserError
from d2v_core.config import load_config
from d2v_core.keyed import generator
from d2v_core.testing import Conformance
from d2v_video import synthetic
from d2v_video.data import Clips, DataConfig, cut
from d2v_video.feature_encoder import sine_positions
from d2v_video.files import ClipFile, read, scan
from d2v_video.masking import TubeMasking, TubeMaskingConfig
from d2v_video.modality import VideoModality


class TestVideo(Conformance):
    modality = "video"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def make(*words: str) -> VideoModality:
    config, kind = load_config(["modality=video", *words])
    modality = kind(config)
    assert isinstance(modality, VideoModality)
    return modality


# ------------------------------------------------------------------------------------------------------------- masks


def tubes(grid: tuple[int, ...], copies: int = 3, clips: int = 2, **options: object) -> torch.Tensor:
    """(clips, copies, *grid) bool."""
    policy = TubeMasking(TubeMaskingConfig(**options))  # pyright: ignore[reportArgumentType]
    masks = policy([Layout(grid)] * clips, copies, [generator(0, "mask", i) for i in range(clips)])
    return masks.hidden.unflatten(-1, grid)


def test_a_tube_hides_the_same_places_in_all_frames() -> None:
    hidden = tubes((6, 4, 4), mask_prob=0.75, mask_length=2, inverse=True)
    assert (hidden == hidden[:, :, :1]).all()
    assert (hidden.flatten(3).sum(-1) == 12).all()
    assert not (hidden[:, 0] == hidden[:, 1]).all() and not (hidden[0] == hidden[1]).all()


def test_tubes_of_a_length_change_places() -> None:
    hidden = tubes((7, 4, 4), mask_prob=0.5, mask_length=1, tube_length=3)
    for start, end in ((0, 3), (3, 6), (6, 7)):
        assert (hidden[:, :, start:end] == hidden[:, :, start : start + 1]).all()
    assert not (hidden[:, :, 0] == hidden[:, :, 3]).flatten(1).all(-1).any()
    assert (hidden.flatten(3).sum(-1) == 8).all()


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize(("grid", "prob", "count"), [((3, 4, 4), 0.75, 12), ((2, 3, 5), 0.5, 7), ((5, 1, 2), 0.9, 1)])
def test_the_stated_share_is_the_share(grid: tuple[int, ...], prob: float, count: int, inverse: bool) -> None:
    config = TubeMaskingConfig(mask_prob=prob, mask_length=1, inverse=inverse)
    places = grid[1] * grid[2]
    stated = TubeMasking(config).hidden_share(Layout(grid))
    hidden = tubes(grid, mask_prob=prob, mask_length=1, inverse=inverse).float().mean()
    assert stated == (pytest.approx(float(hidden)),) * 2
    assert stated[0] == pytest.approx(count / places, abs=1 / places)


def test_what_is_visible_is_the_rest() -> None:
    policy = TubeMasking(TubeMaskingConfig(mask_prob=0.75, mask_length=2))
    masks = policy([Layout((4, 4, 4))], 2, [generator(0, "mask")])
    assert masks.visible is not None and masks.visible.shape == (1, 2, 16)
    for hidden, visible in zip(masks.hidden[0], masks.visible[0], strict=True):
        assert (~hidden).nonzero().flatten().tolist() == visible.tolist()


def test_clips_of_different_grids_are_refused() -> None:
    policy = TubeMasking(TubeMaskingConfig())
    for layouts in ([Layout((4, 4, 4)), Layout((2, 4, 4))], [Layout((16,))]):
        with pytest.raises(ValueError, match="one grid of"):
            policy(layouts, 1, [generator(0, "mask", i) for i in range(len(layouts))])


# --------------------------------------------------------------------------------------------- tubelets and positions


def test_a_token_is_one_tubelet() -> None:
    modality = make("features.tubelet=4", "features.patch_size=16", "data.num_frames=16")
    encoder = modality.feature_encoder()
    clip = torch.randn(1, 3, 16, 32, 32)
    before = encoder.embed({"clip": clip}).x
    assert before.shape == (1, 4 * 2 * 2, 66)
    clip[:, :, 4:8, 16:32, 0:16] += 1.0  # frames 4 to 7, lower left
    changed = (encoder.embed({"clip": clip}).x - before).abs().amax(-1)[0] > 1e-6
    assert changed.nonzero().flatten().tolist() == [1 * 4 + 1 * 2 + 0]


def test_tokens_stand_frame_by_frame_then_row_by_row() -> None:
    encoder = make().feature_encoder()
    clip = torch.randn(2, 3, 8, 32, 32)
    tubelets = rearrange(clip, "b c (f t) (h p) (w q) -> b (f h w) (c t p q)", t=2, p=8, q=8)
    expected = tubelets @ encoder.embedding.weight.flatten(1).mT + encoder.embedding.bias
    torch.testing.assert_close(encoder.embed({"clip": clip}).x, expected, rtol=1e-4, atol=1e-5)


def test_positions_tell_every_place_apart() -> None:
    positions = sine_positions((4, 3, 5), 24)
    assert positions.shape == (60, 24)
    assert torch.cdist(positions, positions).add(torch.eye(60)).min() > 0.1
    frame, row = positions.view(4, 3, 5, 24)[2, 0, 0], positions.view(4, 3, 5, 24)[0, 2, 0]
    torch.testing.assert_close(frame[:8], row[8:16])  # the axes have channels of their own, of one form
    torch.testing.assert_close(frame[:4], torch.sin(2.0 * 10000.0 ** (-torch.arange(4) / 4)))
    with pytest.raises(UserError, match="embed_dim=64 must be a multiple of 6"):
        make("model.embed_dim=64", "model.num_heads=4")


def test_learned_positions_learn() -> None:
    learned, fixed = (make(f"features.positions={kind}").feature_encoder() for kind in ("learned", "fixed"))
    assert learned.positions.requires_grad and not fixed.positions.requires_grad
    assert learned.positions.shape == fixed.positions.shape == (64, 66)
    learned.view(learned.embed({"clip": torch.randn(1, 3, 8, 32, 32)}), None).x.square().sum().backward()
    assert learned.positions.grad is not None and learned.positions.grad.any()


def test_a_clip_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(1, 3, 4, 32, 32\); expected \(B, 3, 8, 32, 32\)"):
        make().feature_encoder().embed({"clip": torch.zeros(1, 3, 4, 32, 32)})


def test_the_decoder_looks_along_all_axes() -> None:
    """A change at one place reaches its neighbours in frame, row and column, and with one layer nobody further off."""
    modality = make("decoder.layers=1")
    decoder, grid = modality.predictor().eval(), (4, 4, 4)
    x = torch.randn(1, 64, 66)
    other = x.clone().view(1, *grid, 66)
    other[0, 2, 1, 1] += 1.0
    changed = (decoder.convolve(other.view(1, 64, 66), None, grid) - decoder.convolve(x, None, grid)).abs()  # pyright: ignore
    reached = (changed.amax(-1) > 1e-6).view(grid).nonzero()
    assert reached.amin(0).tolist() == [1, 0, 0] and reached.amax(0).tolist() == [3, 2, 2] and len(reached) == 27


# ----------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("data.num_frames=15", "data.num_frames=15 must be a multiple of features.tubelet=2"),
        ("data.image_size=30", "data.image_size=30 must be a multiple of features.patch_size=8"),
        ("features.tubelet=0", "features.tubelet=0, at least 1"),
        ("data.min_crop=0", "data.min_crop=0.0 and"),
        ("data.max_bad_ratio=2", "data.max_bad_ratio=2.0 are shares"),
        ("data.batch=0", "data.batch=0 must be at least 1"),
        ("mask.tube_length=0", "mask.tube_length=0 must be at least 1"),
        ("mask.mask_prob=1", "mask.mask_prob=1.0 must lie between 0 and 1"),
        ("mask.adjust=1", "mask.adjust=1.0 must be at least 0 and below 1"),
    ],
)
def test_options_that_cannot_work(word: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        make(word)


# ----------------------------------------------------------------------------------------------------------- readers


def pictures(count: int, size: tuple[int, int] = (40, 36)) -> list[np.ndarray]:
    """Frames of width and height `size` that brighten; a bright left half."""
    frames = [np.full((size[1], size[0], 3), 5 * i, dtype=np.uint8) for i in range(count)]
    for frame in frames:
        frame[:, : size[0] // 2] += 50
    return frames


def save_frames(folder: Path, frames: Sequence[np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame{i}.png")
    return folder


def save_video(path: Path, frames: Sequence[np.ndarray]) -> Path:
    av = pytest.importorskip("av", reason="PyAV, which writes and reads video files, is not installed")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_frame_folders(tmp_path: Path) -> None:
    frames = pictures(12)
    save_frames(tmp_path / "wave" / "a", frames)
    save_frames(tmp_path / "jump", frames[:2])
    (tmp_path / "jump" / "notes.txt").write_text("no frame")
    clips = scan(str(tmp_path), 0.0)
    assert [clip.id for clip in clips] == ["jump", "wave/a"]
    assert read(clips[1], 300, 36).tolist() == np.stack(frames).tolist()  # frame10 after frame9
    assert read(clips[1], 5, 18).shape == (5, 18, 20, 3)
    assert [clip.id for clip in scan(str(tmp_path / "wave" / "a"), 0.0)] == ["."]


def test_video_files(tmp_path: Path) -> None:
    frames = pictures(9)
    save_video(tmp_path / "b.mp4", frames)
    clips = scan(str(tmp_path), 0.0)
    assert [clip.id for clip in clips] == ["b.mp4"]
    found = read(clips[0], 300, 36)
    assert found.shape == (9, 36, 40, 3)
    assert np.abs(found.astype(int) - np.stack(frames)).mean() < 4  # of 255: the codec loses some


def test_broken_clips(tmp_path: Path) -> None:
    """A cut video, a cut frame, frames of two sizes, too few frames, and nothing that is a clip."""
    good = save_frames(tmp_path / "good", pictures(20))
    cut_frame = save_frames(tmp_path / "cut", pictures(20)) / "frame3.png"
    cut_frame.write_bytes(cut_frame.read_bytes()[:60])
    sizes = save_frames(tmp_path / "sizes", pictures(19))
    Image.fromarray(pictures(1, (30, 30))[0]).save(sizes / "frame19.png")
    save_frames(tmp_path / "short", pictures(4))
    config = make(f"data.path={tmp_path}").data
    dataset = Clips(config)
    names = {dataset.id(i): i for i in range(len(dataset))}
    assert dataset[names["good"]].shape == (20, 32, 36, 3) and "4 clips" in dataset.describe()
    for name, reason in (
        ("cut", r"cut: damaged or cut short after 3 frames"),
        ("sizes", r"sizes: expected frames of one size, found 30 x 30 and 40 x 36"),
        ("short", r"short: 4 frames; data.num_frames=8 with data.frame_step=1 need 8"),
    ):
        with pytest.raises(BadSample, match=reason):
            dataset[names[name]]
    (good / "frame0.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"1 of 4 clips \(25.0%\) are unreadable, more than data.max_bad_ratio=0.01"):
        Clips(config)
    assert len(scan(str(tmp_path), 0.5)) == 3
    with pytest.raises(UserError, match=r"does not exist.*Did you mean 'good'"):
        scan(str(tmp_path / "goood"), 0.0)
    (tmp_path / "empty").mkdir()
    shutil.copy(good / "frame1.png", tmp_path / "empty")
    with pytest.raises(UserError, match=r"no clips in .*found 1 x .png"):
        scan(str(tmp_path / "empty"), 0.0)


def test_broken_video_files(tmp_path: Path) -> None:
    whole = save_video(tmp_path / "whole.mp4", pictures(30, (64, 64)))
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[: os.path.getsize(whole) // 2])
    (tmp_path / "text.mp4").write_text("this is no video")
    for name in ("cut.mp4", "text.mp4"):
        with pytest.raises(BadSample, match=rf"{name}: damaged or cut short after 0 frames"):
            read(ClipFile(name, tmp_path / name), 300, 32)
    with pytest.raises(UserError, match=r"2 of 3 clips \(66.7%\) are unreadable"):
        scan(str(tmp_path), 0.01)


def test_without_the_library_for_video_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.mp4").write_bytes(b"")
    monkeypatch.setattr("d2v_video.files.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"read with PyAV.*pip install 'd2v-video\[files\]'"):
        scan(str(tmp_path), 0.0)
    save_frames(tmp_path / "frames" / "b", pictures(3))
    assert [clip.id for clip in scan(str(tmp_path / "frames"), 0.0)] == ["b"]


def test_cutting() -> None:
    frames = np.stack(pictures(40))
    config = DataConfig(num_frames=4, frame_step=3, image_size=36, min_crop=0.2)
    drawn = [cut(frames, config, generator(0, "prepare", i)) for i in range(40)]
    assert {one.shape for one in drawn} == {(4, 36, 36, 3)}
    assert all(np.array_equal(one, cut(frames, config, generator(0, "prepare", i))) for i, one in enumerate(drawn))
    steps = [np.diff(one[:, 18, 0, 0].astype(int)).tolist() for one in drawn]
    assert all(step == [15, 15, 15] for step in steps)  # every third frame, one square for all
    assert len({int(one[0].min()) for one in drawn}) > 5  # other stretches
    assert len({int((one[0, 0, :, 0] > one[0, 0, -1, 0]).sum()) for one in drawn}) > 5  # other squares


def test_training_on_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From folders of frames, one of them too short, to a checkpoint; the same seed gives the same weights."""
    from d2v_core import cli, load

    monkeypatch.chdir(tmp_path)
    for i in range(3):
        save_frames(tmp_path / "clips" / str(i), pictures(8, (40 + i, 36)))
    save_frames(tmp_path / "clips" / "short", pictures(3))
    words = ["modality=video", "data.path=clips", "data.num_frames=4", "data.image_size=16", "data.batch=3",
             "model.num_layers=1", "target.top_k_layers=1", "train.max_steps=2", "train.probe=false",
             "train.tensorboard=false", "train.num_workers=0", "data.min_crop=0.4"]  # fmt: skip
    for out in ("one", "two"):
        assert cli.main(["run", *words, f"out={out}"]) == 0
    one, two = (load(out).student.state_dict() for out in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


# --------------------------------------------------------------------------------------------- built-in clips, probe


def test_built_in_clips_stay() -> None:
    one, label = synthetic.clip("train", 5, 8, 32)
    again, _ = synthetic.clip("train", 5, 8, 32)
    other, _ = synthetic.clip("test", 5, 8, 32)
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert one.shape == (8, 32, 32, 3) and one.dtype == np.uint8
    assert [synthetic.clip("dev", i, 2, 16)[1] for i in range(9)] == [0, 1, 2, 3, 4, 5, 0, 1, 2] and label == 5


def test_shapes_move_as_their_action_says() -> None:
    for action, (dx, dy) in {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}.items():
        x, y, angle = synthetic._path(action, 16, 32, generator(0, "path", action))
        steps = np.stack([np.diff(x), np.diff(y)], 1)
        assert np.all(steps @ [dx, dy] > 0.8) and np.ptp(angle) == 0
    for side, sign in (("right", 1), ("left", -1)):  # clockwise on a screen, whose rows grow downwards
        x, y, angle = synthetic._path(f"spin {side}", 16, 32, generator(0, "path", side))
        assert np.ptp(x) == np.ptp(y) == 0 and np.all(np.sign(np.diff(angle)) == sign)


def test_one_frame_does_not_tell_the_action() -> None:
    """The mean picture of every action, over many clips, is the same in the first, middle and last frame."""
    count, actions = 360, len(synthetic.ACTIONS)
    grey = np.stack([synthetic.clip("train", i, 16, 16)[0][[0, 8, 15]].mean(-1) for i in range(count)])
    means = grey.reshape(-1, actions, 3, 256).mean((0, 3))  # (action, frame)
    error = grey.reshape(-1, actions, 3, 256).mean(3).std(0) / np.sqrt(count / actions)
    assert np.all(np.abs(means - means.mean(0)) < 4 * error)
    places = grey.reshape(-1, actions, 3, 256)
    z = (places.mean(0) - places.mean((0, 1))) / (places.std((0, 1)) / np.sqrt(count / actions))
    assert np.sqrt((z**2).mean((1, 2))).max() < 1.3  # 1 by chance


def test_the_probe() -> None:
    task = make().probe()
    assert task is not None and task.num_classes == 6
    inputs, label = task.train[3]
    assert inputs["clip"].shape == (1, 3, 8, 32, 32) and int(label) == 3
    assert task.input_features(inputs).shape == (1, 8 * 16 * 16)
    assert {len(task.train) % 6, len(task.dev) % 6, len(task.test) % 6} == {0}
    assert make("data.image_size=8", "features.patch_size=4").probe() is None
