"""Labelled images: where labels come from, what augmentation and mixing do, the bias of each block, whole runs."""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import d2v_core
from d2v_core import checkpoint, cli, plugins
from d2v_core.config import load_config
from d2v_core.contract import LabelledPart, Task
from d2v_core.errors import UserError
from d2v_core.finetune import build_network, load_pretrained
from d2v_core.keyed import generator, seeded
from d2v_core.objectives import Classes
from d2v_core.run import build_student
from d2v_vision import labelled
from d2v_vision.data import ImageSample, VisionConfig, to_tensor
from d2v_vision.labelled import AugmentConfig, middle, mix, open_task, vary
from d2v_vision.modality import VisionModality

from ..runs import IMAGES

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 60, 3), dtype=np.uint8)
PLAIN = {"rand_augment": None, "flip_prob": 0.0, "erase_prob": 0.0, "mixup": 0.0, "cutmix": 0.0}


pytestmark = pytest.mark.usefixtures("one_thread")


def save(path: Path, value: int = 0) -> None:
    """A picture that can be told by its grey, without loss where the name ends in .png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 20, 3), value, np.uint8)).save(path)


def opened(path: Path, **options: object) -> Task[ImageSample]:
    return open_task(VisionConfig(path=str(path), image_size=16, **options), 4)  # pyright: ignore


def told(part: LabelledPart[ImageSample] | None, task: Task[ImageSample]) -> dict[str, tuple[str, int]]:
    """What a part says of each picture: id -> (class, grey)."""
    assert part is not None
    samples = part.samples
    return {
        samples.id(i): (task.classes[int(part.labels[i])], int(samples[i].pixels[0, 0, 0])) for i in range(len(samples))
    }


# ------------------------------------------------------------------------------------------------------------- tasks


def test_val_is_for_choosing_where_there_is_a_test_part_too(tmp_path: Path) -> None:
    for value, name in enumerate(("train/dog/a.png", "train/cat/b.png", "train/dog/c.png", "val/dog/d.png",
                                  "test/cat/e.png", "test/dog/f.png")):  # fmt: skip
        save(tmp_path / name, 10 * value)
    task = opened(tmp_path)
    assert task.classes == ("cat", "dog") and task.metrics == ("accuracy",)
    assert told(task.train, task) == {
        "train/cat/b.png": ("cat", 10), "train/dog/a.png": ("dog", 0), "train/dog/c.png": ("dog", 20),
    }  # fmt: skip
    assert told(task.dev, task) == {"val/dog/d.png": ("dog", 30)}
    assert told(task.test, task) == {"test/cat/e.png": ("cat", 40), "test/dog/f.png": ("dog", 50)}


@pytest.mark.parametrize("name", ["val", "test"])
def test_one_held_out_folder_is_the_test_part(tmp_path: Path, name: str) -> None:
    for value, place in enumerate(("train/dog/a.png", "train/cat/b.png", f"{name}/cat/c.png")):
        save(tmp_path / place, value)
    task = opened(tmp_path)
    assert task.dev is None and told(task.test, task) == {f"{name}/cat/c.png": ("cat", 2)}


def test_imagenet_s_unlabelled_test_images_are_no_part(tmp_path: Path) -> None:
    for place in ("train/dog/a.png", "train/cat/b.png", "val/cat/c.png", "test/0001.png", "test/0002.png"):
        save(tmp_path / place)
    task = opened(tmp_path)
    assert task.dev is None and told(task.test, task).keys() == {"val/cat/c.png"}
    assert "2 without a class folder are left out: test/0001.png, test/0002.png" in task.train.samples.describe()


def test_class_folders_alone_are_a_training_part(tmp_path: Path) -> None:
    for place in ("dog/a.png", "dog/more/b.png", "cat/c.png", "loose.png"):
        save(tmp_path / place)
    (tmp_path / "empty").mkdir()
    task = opened(tmp_path)
    assert task.dev is None and task.test is None and task.classes == ("cat", "dog")
    assert task.train.labels.tolist() == [0, 1, 1]
    said = task.train.samples.describe()
    assert "1 without a class folder are left out: loose.png" in said and "nothing is tested on" in said
    assert "1 folders without an image: empty" in said


@pytest.mark.parametrize(
    ("places", "options", "message"),
    [
        (["train/cat/a.png", "train/dog/b.png", "test/cow/c.png"], {}, "test/ has classes of which there is no image"),
        (["train/cat/a.png", "val/cat/b.png", "dev/cat/c.png"], {}, "has val/ and dev/: leave one of them"),
        (["cat/a.png", "test/b.png"], {}, "has test/ but no train/: nothing to train on"),
        (["a.png", "b.png"], {}, "none of 2 images in .* lies in a class folder"),
        (["train/a.png", "train/b.png"], {}, "none of 2 images in .*train lies in a class folder"),
        (["cat/a.png", "dog/b.png"], {"split": "train"}, "data.split=train: labelled data is divided by"),
        (["train/cat/a.png", "train/dog/b.png", "val/notes/x.bmp/y"], {}, "no images in .*val or below"),
    ],
)
def test_folders_that_cannot_be_a_task(tmp_path: Path, places: list[str], options: dict, message: str) -> None:
    for place in places:
        if place.endswith(".png"):
            save(tmp_path / place)
        else:
            (tmp_path / place).mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        opened(tmp_path, **options)


def test_one_image_is_no_task(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    with pytest.raises(UserError, match="is one image"):
        opened(tmp_path / "a.png")


def cifar(path: Path, labels: list[int], seed: int) -> np.ndarray:
    """Writes CIFAR-10 records and returns their pixels (N, 32, 32, 3)."""
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    records = np.concatenate(
        [np.array(labels, np.uint8)[:, None], pixels.transpose(0, 3, 1, 2).reshape(len(labels), -1)], 1
    )
    data = records.tobytes()
    path.write_bytes(lzma.compress(data) if path.suffix == ".xz" else data)
    return pixels


def test_cifar_files_and_their_class_names(tmp_path: Path) -> None:
    first = cifar(tmp_path / "data_batch_1.bin", [2, 0], 1)
    second = cifar(tmp_path / "data_batch_2.bin", [1], 2)
    test = cifar(tmp_path / "test_batch.bin.xz", [1, 1, 0], 3)
    task = opened(tmp_path)
    assert task.classes == ("0", "1", "2") and task.train.labels.tolist() == [2, 0, 1]
    assert task.dev is None and task.test is not None and task.test.labels.tolist() == [1, 1, 0]
    for i, wanted in enumerate([*first, *second]):
        assert np.array_equal(task.train.samples[i].pixels, wanted)
    assert np.array_equal(task.test.samples[2].pixels, test[2])
    assert task.train.samples.id(2) == "train-2" and task.test.samples.id(2) == "test-2"
    (tmp_path / "batches.meta.txt").write_text("plane\ncar\nbird\ncat\n\n")
    assert opened(tmp_path).classes == ("plane", "car", "bird", "cat")
    (tmp_path / "batches.meta.txt").write_text("plane\ncar\n")
    with pytest.raises(UserError, match="names 2 different classes, one a line, but the labels go up to 2"):
        opened(tmp_path)


def test_cifar_files_that_cannot_be_a_task(tmp_path: Path) -> None:
    cifar(tmp_path / "test_batch.bin", [3], 1)
    with pytest.raises(UserError, match=r"test files only \(test_batch\.bin\): nothing to train on"):
        opened(tmp_path)
    cifar(tmp_path / "data_batch_1.bin", [0, 1], 2)
    with pytest.raises(UserError, match="the test part has a label 3, but there are 2 classes, 0 to 1"):
        opened(tmp_path)
    alone = opened(tmp_path / "data_batch_1.bin")
    assert alone.test is None and "No test files" in alone.train.samples.describe()


def idx(path: Path, array: np.ndarray) -> None:
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes())


def test_idx_files_need_their_labels(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 256, (3, 28, 28), dtype=np.uint8)
    idx(tmp_path / "train-images-idx3-ubyte", pixels)
    with pytest.raises(UserError, match="train-images-idx3-ubyte has no labels"):
        opened(tmp_path)
    idx(tmp_path / "train-labels-idx1-ubyte", np.array([1, 0, 1], np.uint8))
    task = opened(tmp_path)
    assert task.classes == ("0", "1") and task.train.labels.tolist() == [1, 0, 1] and task.test is None
    assert np.array_equal(task.train.samples[1].pixels[..., 1], pixels[1])
    idx(tmp_path / "t10k-images-idx3-ubyte", pixels)
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte has no labels"):
        opened(tmp_path)


def test_built_in_shapes_are_others_than_those_of_pre_training_and_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "BUILT_IN_COUNTS", {"train": 12, "dev": 5, "test": 7})
    task = open_task(VisionConfig(image_size=16), 4)
    assert task.dev is not None and task.test is not None and len(task.classes) == 10
    assert task.train.labels.tolist() == [*range(10), 0, 1]
    seen = {
        part.samples[i].pixels.tobytes() for part in (task.train, task.dev, task.test) for i in range(len(part.labels))
    }
    assert len(seen) == 24
    for seed in (0, labelled.BUILT_IN_SEED - 1):
        for split in ("train", "dev", "test"):
            shapes = labelled.SyntheticShapes(split, 12, 16, seed)
            assert not seen & {shapes[i].pixels.tobytes() for i in range(12)}


# ------------------------------------------------------------------------------------------ augmentation and mixing


@pytest.mark.parametrize(("width", "height"), [(60, 40), (41, 67), (300, 257), (16, 500), (20, 21)])
@pytest.mark.parametrize(("side", "share"), [(96, None), (32, 0.7), (32, 1.0)])
def test_scores_are_made_on_the_middle_as_torchvision_cuts_it(
    width: int, height: int, side: int, share: float | None
) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    short = int(side / (0.875 if share is None else share))
    theirs = transforms.Compose(
        [transforms.Resize(short, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(side)]
    )
    assert np.array_equal(middle(pixels, side, share), np.asarray(theirs(Image.fromarray(pixels))))


def test_a_small_image_of_the_right_size_stays_as_it_is() -> None:
    pixels = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(middle(pixels, 32, None), pixels)
    assert middle(np.zeros((1, 100_000, 3), np.uint8), 32, None).shape == (32, 32, 3)


def test_training_images_are_timm_s() -> None:
    from timm.data.transforms_factory import create_transform

    data, config = VisionConfig(image_size=48), AugmentConfig()
    whole: Any = create_transform(
        48, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic", color_jitter=0.4,
        mean=tuple(data.mean), std=tuple(data.std),
    )  # fmt: skip
    for i in range(20):
        ours = to_tensor([vary(PIXELS, data, config, generator(0, "prepare", i))], data)[0]
        with seeded(generator(0, "prepare", i)):
            theirs = whole(Image.fromarray(PIXELS))
        torch.testing.assert_close(ours, theirs)


def test_the_strongest_posterizing_is_black_and_no_crash() -> None:
    from timm.data.auto_augment import AugmentOp

    data, config = VisionConfig(image_size=32), AugmentConfig(rand_augment="rand-m10-n1-p1-inc1", flip_prob=0.0)
    compose = labelled.training_transform(data, config)
    operations = {one.name: one for one in compose.transforms[-1].ops}
    image = Image.fromarray(PIXELS)
    assert not np.asarray(operations["PosterizeIncreasing"](image)).any()
    operations["PosterizeIncreasing"].magnitude = 5  # two bits
    assert np.array_equal(np.asarray(operations["PosterizeIncreasing"](image)), PIXELS & 0b11000000)
    theirs = AugmentOp("PosterizeIncreasing", prob=1.0, magnitude=5)
    assert np.array_equal(np.asarray(theirs(image)), PIXELS & 0b11000000)
    made = [vary(PIXELS, data, AugmentConfig(rand_augment="rand-m10-n9-p1"), generator(0, "p", i)) for i in range(100)]
    assert len({one.tobytes() for one in made}) > 90


def test_chance_of_augmentation_comes_from_the_generator_alone() -> None:
    data, config = VisionConfig(image_size=32), AugmentConfig()
    before = random.getstate(), torch.get_rng_state()
    made = [vary(PIXELS, data, config, generator(0, "prepare", i)) for i in (1, 1, 2, 3)]
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert np.array_equal(made[0], made[1]) and made[0].shape == (32, 32, 3) and made[0].dtype == np.uint8
    assert not np.array_equal(made[0], made[2]) and not np.array_equal(made[2], made[3])


def test_pad_crop_moves_the_image_by_up_to_its_margin() -> None:
    pixels = RNG.integers(1, 256, (32, 32, 3), dtype=np.uint8)
    padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
    windows = {padded[y : y + 32, x : x + 32].tobytes(): (y, x) for y in range(9) for x in range(9)}
    config = AugmentConfig(**{**PLAIN, "pad_crop": 4})
    made = [vary(pixels, VisionConfig(image_size=32), config, generator(0, "p", i)) for i in range(60)]
    places = {windows[one.tobytes()] for one in made}  # KeyError where it is no window
    assert len(places) > 25 and {y for y, _ in places} == set(range(9)) == {x for _, x in places}
    mirrored = AugmentConfig(**{**PLAIN, "pad_crop": 0, "flip_prob": 1.0})
    assert np.array_equal(vary(pixels, VisionConfig(image_size=32), mirrored, generator(0, "p")), pixels[:, ::-1])


def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(count, 3, 16, 16), torch.eye(count)


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_mixup_blends_pairs_and_their_targets(count: int) -> None:
    images, targets = batch(count)
    config = AugmentConfig(erase_prob=0.0, cutmix=0.0)
    for i in range(5):
        mixed, shares = mix(images, targets, config, generator(0, "mix", i))
        share = float(shares[0, 0])
        assert 0 < share < 1 or count == 1
        torch.testing.assert_close(shares, share * targets + (1 - share) * targets.flip(0))
        torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0), atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    assert torch.equal(images, torch.randn(count, 3, 16, 16)), "the batch itself is left alone"


@pytest.mark.parametrize("count", [2, 5])
def test_cutmix_s_targets_are_shares_of_area(count: int) -> None:
    images, targets = batch(count)
    config = AugmentConfig(erase_prob=0.0, mixup=0.0)
    found = set()
    for i in range(10):
        mixed, shares = mix(images, targets, config, generator(0, "mix", i))
        pasted = (mixed[0] != images[0]).all(0)
        assert torch.equal(mixed[0][:, pasted], images[-1][:, pasted])
        torch.testing.assert_close(shares[0, -1], pasted.float().mean())
        torch.testing.assert_close(shares.sum(1), torch.ones(count))
        found.add(round(float(shares[0, 0]), 4))
        if count % 2:
            assert torch.equal(mixed[2], images[2]) and torch.equal(shares[2], targets[2])
    assert len(found) > 5


def test_soft_targets_are_mixed_too() -> None:
    images, _ = batch(2)
    targets = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    _, shares = mix(images, targets, AugmentConfig(erase_prob=0.0, cutmix=0.0), generator(0, "m"))
    share = 2 * float(shares[0, 0])
    torch.testing.assert_close(shares[0], torch.tensor([share / 2, share / 2, 1 - share]))


def test_erasing_puts_noise_into_one_rectangle() -> None:
    images, targets = batch(300)
    erased, shares = mix(images, targets, AugmentConfig(**{**PLAIN, "erase_prob": 0.25}), generator(0, "mix"))
    assert torch.equal(shares, targets)
    changed = (erased != images).all(1)
    hit = changed.flatten(1).any(1)
    assert 0.17 < hit.float().mean() < 0.33  # 0.25 +- 3 standard deviations
    for one in changed[hit]:
        rows, columns = one.any(1), one.any(0)
        assert torch.equal(one, rows[:, None] & columns[None, :]) and 0.01 < one.float().mean() < 0.4
    noise = erased.permute(0, 2, 3, 1)[changed]
    assert abs(float(noise.mean())) < 0.05 and float(noise.std()) == pytest.approx(1.0, abs=0.05)
    again, _ = mix(images, targets, AugmentConfig(**{**PLAIN, "erase_prob": 0.25}), generator(0, "mix"))
    assert torch.equal(erased, again)


def test_nothing_to_mix_changes_nothing() -> None:
    images, targets = batch(3)
    mixed, shares = mix(images, targets, AugmentConfig(**PLAIN), generator(0, "mix"))
    assert mixed is images and shares is targets


# ------------------------------------------------------------------------------------------------- runs and presets

TINY = {**IMAGES, "data.synthetic_images": "16", "train.max_steps": "2"}
TUNE = {
    "modality": "vision",
    "stage": "finetune",
    "from": "pre",
    "finetune.batch": "5",
    "finetune.eval_every": "2",
    "train.max_steps": "4",
    "train.log_every": "1",
    "train.num_workers": "0",
    "train.tensorboard": "false",
}
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def d2v(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`d2v run` of stage=finetune on a network pre-trained for two steps: exit status and all that was printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plugins, "load", lambda name: VisionModality)
    monkeypatch.setattr(labelled, "BUILT_IN_COUNTS", {"train": 20, "dev": 10, "test": 10})
    assert cli.main(["run", "out=pre", *(f"{key}={value}" for key, value in TINY.items())]) == 0

    def call(**options: str) -> tuple[int, str]:
        given = {**TUNE, **{key.replace("__", "."): value for key, value in options.items()}}
        capsys.readouterr()
        status = cli.main(["run", *(f"{key}={value}" for key, value in given.items() if value)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


def best(run: str) -> dict[str, torch.Tensor]:
    return load_file(sorted(Path(run, "best").iterdir())[-1] / "model.safetensors")


MIXED = {"augment__mixup": "0.8", "augment__cutmix": "1", "augment__erase_prob": "0.5",
         "augment__rand_augment": "rand-m9-mstd0.5-inc1"}  # fmt: skip


def test_workers_and_an_interruption_change_nothing(d2v: Run) -> None:
    last = "checkpoints/step-00000004/model.safetensors"
    assert d2v(out="whole", **MIXED)[0] == 0
    assert d2v(out="workers", train__num_workers="2", **MIXED)[0] == 0
    assert d2v(out="parts", train__checkpoint_every="2", **MIXED)[0] == 0
    for path in (Path("parts") / last).parent.iterdir():
        path.unlink()
    (Path("parts") / last).parent.rmdir()
    Path("parts/summary.json").unlink()
    assert d2v(out="parts", train__checkpoint_every="2", resume="auto", **MIXED)[0] == 0
    assert d2v(out="plain")[0] == 0
    whole, workers, parts, plain = (load_file(Path(run) / last) for run in ("whole", "workers", "parts", "plain"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, workers[name]) and torch.equal(tensor, parts[name])
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in whole.items())


def test_a_run_on_the_built_in_shapes_can_be_loaded(d2v: Run) -> None:
    status, printed = d2v(out="r", features__bias="per_block")
    assert status == 0 and "shapes: 20 of 20 labelled samples" in printed
    summary = json.loads(Path("r/summary.json").read_text())["finetune"]
    assert set(summary) >= {"dev", "test"} and summary["labels"] == 20
    assert {"student.encoder.positions.0.table", "student.encoder.positions.1.table"} <= best("r").keys()
    loaded = d2v_core.load_classifier("r")
    rows = [line.split("\t") for line in Path("r/predictions-test.tsv").read_text().splitlines()[1:]]
    test = loaded.modality.task().test
    assert test is not None and loaded.classes == labelled.SHAPES
    probabilities = loaded.predict([test.samples[i] for i in range(len(test.samples))])
    torch.testing.assert_close(probabilities.sum(1), torch.ones(10))
    for name, label, predicted, probability in rows:
        i = int(name.removeprefix("test-"))
        assert (
            label == loaded.classes[int(test.labels[i])] and predicted == loaded.classes[int(probabilities[i].argmax())]
        )
        assert float(probability) == pytest.approx(float(probabilities[i].max()), abs=1e-3)


def test_a_picture_s_score_does_not_depend_on_augmentation(d2v: Run) -> None:
    assert d2v(out="r")[0] == 0
    for options in ({}, {"augment.flip_prob": "1", "augment.rand_augment": "rand-m10", "augment.pad_crop": "9"}):
        words = [f"{key}={value}" for key, value in {**TUNE, **options}.items()]
        made = VisionModality(load_config(words, lambda name: VisionModality)[0])
        sample = ImageSample(RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        assert np.array_equal(made.prepare_labelled(sample, None).pixels, sample.pixels)
        assert not np.array_equal(made.prepare_labelled(sample, generator(0, "p", 1)).pixels, sample.pixels)


def test_files_that_break_while_fine_tuning_are_named_and_left_out(d2v: Run) -> None:
    for i in range(12):
        name = Path("pictures", "train" if i < 8 else "test", f"class{i % 2}", f"{i}.jpg")
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)).save(name)
    for name in ("train/class1/5.jpg", "test/class0/10.jpg"):
        path = Path("pictures", name)
        path.write_bytes(path.read_bytes()[:700])
    status, printed = d2v(out="checked", data__path="pictures")
    assert status == 2 and "are unreadable" in printed and "5.jpg: damaged" in printed
    options = {"data__path": "pictures", "finetune__dev_ratio": "0.25", "data__verify": "headers"}
    status, printed = d2v(out="headers", finetune__batch="6", **options)
    assert status == 0 and "skipped train/class1/5.jpg" in printed and "skipped test/class0/10.jpg" in printed
    assert len(Path("headers/predictions-test.tsv").read_text().splitlines()) == 1 + 3
    status, printed = d2v(out="allowed", data__path="pictures", finetune__dev_ratio="0.25", data__max_bad_ratio="0.5")
    assert status == 0 and "1 unreadable: train/class1/5.jpg: damaged" in printed


def test_probing_frozen_features(d2v: Run) -> None:
    probe = {key: "" for key in TUNE if key.startswith("finetune.")} | {"train.max_steps": "", "train.log_every": ""}
    status, _ = d2v(out="r", **{**probe, "stage": "probe"})
    assert status == 0
    rows = json.loads(Path("r/summary.json").read_text())["table"]
    assert {row["system"] for row in rows} == {"pretrained", "untrained", "raw pixels"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rand_augment", "rand-m9-x3", "rand-m9-x3 must be null or like"),
        ("rand_augment", "augmix", "augmix must be null or like"),
        ("crop_scale", "[0.5]", "two numbers above 0 and at most 1"),
        ("crop_aspect", "[2,1]", "the larger one last"),
        ("erase_prob", "1.5", "must lie between 0 and 1"),
        ("switch_prob", "-1", "must lie between 0 and 1"),
        ("mixup", "-0.1", "must be at least 0"),
        ("pad_crop", "-1", "must be at least 0"),
        ("eval_crop", "0", "must be above 0 and at most 1"),
    ],
)
def test_options_that_cannot_work(d2v: Run, key: str, value: str, message: str) -> None:
    status, printed = d2v(out="r", **{f"augment__{key}": value})
    assert status == 2 and f"augment.{key}" in printed and message in printed and not Path("r").exists()


def test_the_shared_bias_becomes_one_for_each_block(d2v: Run) -> None:
    def made(*words: str) -> VisionModality:
        given = [f"{key}={value}" for key, value in TUNE.items()]
        return VisionModality(load_config([*given, *words], lambda name: VisionModality)[0])

    table = torch.randn_like(build_student(made()).encoder.get_parameter("positions.table"))
    folder = next(Path("pre/checkpoints").iterdir())
    stored = checkpoint.load(folder)
    stored.model["student.encoder.positions.table"] = table
    checkpoint.save(folder.parent, checkpoint.step_of(folder) + 1, stored, 1)
    shared, own = made(), made("features.bias=per_block")
    models = [build_network(one, Classes([str(i) for i in range(3)], ["accuracy"])).eval() for one in (shared, own)]
    for model, one in zip(models, (shared, own), strict=True):
        load_pretrained(model, one)
    assert torch.equal(models[1].student.encoder.get_parameter("positions.1.table"), table)
    inputs = {"image": torch.randn(2, 3, 32, 32)}
    with torch.no_grad():
        torch.testing.assert_close(models[0](inputs), models[1](inputs))
        models[1].student.encoder.get_parameter("positions.1.table").zero_()
        assert not torch.allclose(models[0](inputs), models[1](inputs))
    depth = {name: own.layer_of(name) for name, _ in models[1].student.named_parameters()}
    assert depth["encoder.positions.0.table"] == 1 == depth["transformer.blocks.0.fc1.weight"]
    assert depth["encoder.positions.1.table"] == 2 == depth["transformer.blocks.1.fc1.weight"]
    assert depth["encoder.cls_token"] == 0 == depth["encoder.embedding.conv.weight"]
    assert shared.layer_of("encoder.positions.table") == 3
    with pytest.raises(UserError, match=r"use features\.bias=per_block"):
        shared.adapt(own.adapt(models[0].student.state_dict()))


FINETUNE = sorted(path.stem for path in (VisionModality.recipes() / "finetune").glob("*.yaml"))


@pytest.mark.parametrize("preset", FINETUNE)
def test_every_preset_takes_steps(d2v: Run, preset: str) -> None:
    sizes = {"finetune__micro_batch": "5", "data__image_size": "32", "train__max_steps": "2"}
    status, printed = d2v(out="r", preset=preset, **sizes)
    assert status == 0, printed
    rates = [json.loads(line)["lr"] for line in Path("r/metrics.jsonl").read_text().splitlines()]
    assert len(rates) == 2


@pytest.mark.parametrize(("preset", "rate", "steps"), [("base", 4e-3, 125_100), ("large", 5e-3, 62_550)])
def test_the_official_recipes(tmp_path: Path, preset: str, rate: float, steps: int) -> None:
    stored = load_config(["modality=vision", f"preset={preset}"], lambda name: VisionModality)[0]
    (tmp_path / "config.yaml").write_text(stored.to_yaml())
    words = ["modality=vision", "stage=finetune", f"preset={preset}", f"from={tmp_path}"]
    config = load_config(words, lambda name: VisionModality)[0]
    made = VisionModality(config)
    assert (
        config.optim.lr == rate and config.train.max_steps == steps and made.augment == AugmentConfig(eval_crop=0.875)
    )
    assert config.optim.lr * config.optim.final_lr_ratio == pytest.approx(1e-6)
    assert config.model.layer_scale == stored.model.layer_scale and config.model.attention_dropout == 0
    with torch.device("meta"):
        model = build_network(made, Classes([str(i) for i in range(1000)], ["accuracy"]))
    # The pre-trained network with 12 or 24 tables in place of one, without final norm and head, and with BEiT's head.
    dim, layers, heads = config.model.embed_dim, config.model.num_layers, config.model.num_heads
    pretrained = {"base": 86_256_720, "large": 304_186_816}[preset]
    wanted = pretrained + (layers - 1) * 732 * heads - (dim * dim + dim) - 2 * dim + 2 * dim + (dim * 1000 + 1000)
    assert sum(p.numel() for p in model.parameters()) == wanted
