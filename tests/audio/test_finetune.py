"""Utterance classification: which clips have which labels, what is refused, and what a fine-tuning run does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import torch
from torchaudio.functional import melscale_fbanks

import d2v_core
from d2v_audio.classification import FIRST_UTTERANCE, FirstWords
from d2v_audio.data import AudioSample, normalise, summary_bands
from d2v_audio.modality import AudioModality
from d2v_audio.synthetic import PHONES, SILENCE, WORDS, SyntheticSpeech
from d2v_core import checkpoint, cli
from d2v_core.batching import LabelledSteps, labelled_batches
from d2v_core.config import load_config
from d2v_core.contract import LabelledPart
from d2v_core.finetune import build_network
from d2v_core.keyed import generator
from d2v_core.labelled import ids, open_task
from d2v_core.objectives import Classes, class_targets
from d2v_core.run import build_student

SIZES = {"model.embed_dim": "32", "model.num_layers": "2", "model.num_heads": "2"}
PRETRAINING = {
    "modality": "audio", **SIZES, "target.top_k_layers": "2", "positions.groups": "4", "data.synthetic_clips": "8",
    "data.batch_s": "8", "train.max_steps": "2", "train.num_workers": "0", "train.tensorboard": "false",
    "train.probe": "false",
}  # fmt: skip
TUNING = {
    "modality": "audio", "stage": "finetune", "train.max_steps": "4", "train.num_workers": "0",
    "train.tensorboard": "false", "train.log_every": "1", "train.checkpoint_every": "2", "finetune.batch": "4",
    "finetune.eval_every": "2",
}  # fmt: skip
TONES = {"high": 3000.0, "low": 300.0, "mid": 1000.0}  # Hz of each class
RATE = 16000
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "pretrained"
    torch.set_num_threads(1)
    assert cli.main(["run", *(f"{key}={value}" for key, value in {**PRETRAINING, "out": run}.items())]) == 0
    return run


@pytest.fixture
def d2v(pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """`d2v run stage=finetune` in a folder of its own: (exit status, what it said, its error)."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        given = {**TUNING, "from": str(pretrained), **dict(word.split("=", 1) for word in words)}
        if given["stage"] == "probe":
            given = {k: v for k, v in given.items() if k not in ("train.max_steps", "finetune.eval_every")}
        status = cli.main(["run", *(f"{key}={value}" for key, value in given.items())])
        out, error = capsys.readouterr()
        assert "Traceback" not in out + error
        return status, " ".join(out.split()), " ".join(error.split())

    return call


@pytest.fixture
def make(pretrained: Path) -> Callable[..., AudioModality]:
    """The modality of a fine-tuning configuration."""

    def build(*words: str) -> AudioModality:
        config, kind = load_config(["stage=finetune", f"from={pretrained}", *words], lambda name: AudioModality)
        made = kind(config)
        assert isinstance(made, AudioModality)
        return made

    return build


def tone(path: Path, label: str, seconds: float = 0.4, seed: int = 0) -> Path:
    """A noisy tone of the class's frequency."""
    path.parent.mkdir(parents=True, exist_ok=True)
    t = np.arange(round(seconds * RATE)) / RATE
    x = 0.3 * np.sin(2 * np.pi * TONES[label] * t) + 0.02 * np.random.default_rng(seed).standard_normal(len(t))
    sf.write(path, x.astype(np.float32), RATE)
    return path


def loudest_hz(waveform: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(waveform)).argmax() * RATE / len(waveform))


def tones(root: Path, per_class: int = 6, classes: Sequence[str] = tuple(TONES)) -> Path:
    """Class folders; clips of 0.3 to 0.5 s."""
    for label in classes:
        for i in range(per_class):
            tone(root / label / f"{i}.wav", label, 0.3 + 0.04 * i, i)
    return root


def table(folder: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = ("file", "label")) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "table.tsv"
    path.write_text("\n".join("\t".join(row) for row in [header, *rows]) + "\n", encoding="utf-8")
    return path


def labels_of(part: LabelledPart[Any] | None, classes: Sequence[str]) -> dict[str, str]:
    assert part is not None
    return dict(zip(ids(part), (classes[int(i)] for i in part.labels), strict=True))


# ------------------------------------------------------------------------------------------------- the built-in task


def test_the_built_in_clips_end_with_their_first_word():
    data = FirstWords("test", 5, RATE)
    corpus = SyntheticSpeech("test", FIRST_UTTERANCE + 5, 0, RATE)
    for i, word in enumerate(data.words):
        utterance = corpus[FIRST_UTTERANCE + i]
        seconds = data.sizes[i] / RATE
        heard = [PHONES[phone] for phone, start, _ in utterance.phones if start < seconds - 1e-6]
        assert heard == [PHONES[SILENCE], *WORDS[word]]
        assert utterance.transcript.startswith(word + " ")
        np.testing.assert_array_equal(data[i].waveform, normalise(utterance.waveform[: data.sizes[i]]))


def test_the_built_in_task_has_speakers_of_its_own_and_utterances_that_pretraining_has_not_heard(make):
    task = make("labelled.synthetic_clips=40").task()
    assert task.classes == tuple(sorted(WORDS))
    assert [len(part.labels) for part in (task.train, task.dev, task.test)] == [40, 10, 20]
    assert [task.classes[i] for i in task.train.labels] == task.train.samples.words
    heard = {
        split: {SyntheticSpeech(split, FIRST_UTTERANCE + 10)[FIRST_UTTERANCE + i].speaker for i in range(10)}
        for split in ("train", "dev", "test")
    }
    assert not heard["train"] & heard["test"] and not heard["dev"] & heard["test"]
    assert make().data.synthetic_clips <= FIRST_UTTERANCE


# -------------------------------------------------------------------------------------------- folders and tables


def test_class_folders_give_every_clip_the_label_of_its_folder(make, tmp_path: Path):
    root = tones(tmp_path / "set")
    tone(root / "loose.wav", "low")
    (root / "empty").mkdir()
    task = make(f"data.path={root}").task()
    assert (task.classes, task.dev, task.test) == (("high", "low", "mid"), None, None)
    assert labels_of(task.train, task.classes) == {f"{c}/{i}.wav": c for c in TONES for i in range(6)}
    for i, label in enumerate(task.train.labels):
        assert loudest_hz(task.train.samples[i].waveform) == pytest.approx(TONES[task.classes[label]], rel=0.02)
    text = task.train.samples.describe()
    assert "18 clips" in text and "left out: 1 clip that lie in no class folder" in text
    assert "no usable clip in: empty" in text
    split = open_task(make(f"data.path={root}", "finetune.dev_ratio=0.34"))
    assert sorted(split.dev.labels) == [0, 0, 1, 1, 2, 2]


def test_speech_commands_lists_name_dev_and_test_and_its_noise_is_no_class(make, tmp_path: Path):
    root = tmp_path / "speech_commands"
    for label in TONES:
        for speaker in ("aa", "bb", "cc"):
            for i in range(2):
                tone(root / label / f"{speaker}_nohash_{i}.wav", label, seed=i)
    tone(root / "_background_noise_" / "mill.wav", "low", 3.0)
    for file, speaker in (("testing_list.txt", "bb"), ("validation_list.txt", "cc")):
        names = [f"{label}/{speaker}_nohash_{i}.wav" for label in TONES for i in range(2)]
        (root / file).write_text("\n".join([*names, "low/gone_nohash_0.wav"][: 7 if speaker == "bb" else 6]) + "\n")
    task = make(f"data.path={root}").task()
    assert task.classes == ("high", "low", "mid")
    for part, speaker in ((task.train, "aa"), (task.dev, "cc"), (task.test, "bb")):
        expected = {f"{label}/{speaker}_nohash_{i}.wav": label for label in TONES for i in range(2)}
        assert labels_of(part, task.classes) == expected
    text = task.train.samples.describe()
    assert "left out: _background_noise_, 1 clip of no class" in text
    assert "1 of the 7 clips of testing_list.txt are not there" in text
    # Without the list of dev, whole speakers are held back; the file names tell them apart.
    (root / "validation_list.txt").unlink()
    task = make(f"data.path={root}", "finetune.dev_ratio=0.5").task()
    held, left = ({name.split("/")[1][:2] for name in ids(part)} for part in (task.dev, task.train))
    assert held | left == {"aa", "cc"} and len(held) == len(left) == 1


@pytest.mark.parametrize("dev", ["dev", "val", "validation"])
def test_folders_of_parts(make, tmp_path: Path, dev: str):
    for part in ("train", dev, "test"):
        tones(tmp_path / part, 2, ("low", "high"))
    task = make(f"data.path={tmp_path}").task()
    assert (task.classes, task.metrics) == (("high", "low"), ("accuracy", "matthews"))
    for part, name in ((task.train, "train"), (task.dev, dev), (task.test, "test")):
        assert labels_of(part, task.classes) == {f"{name}/{c}/{i}.wav": c for c in ("low", "high") for i in (0, 1)}


def test_a_class_may_be_called_train(make, tmp_path: Path):
    for label, folder in (("low", "train"), ("high", "dog")):
        for i in range(2):
            tone(tmp_path / folder / f"{i}.wav", label)
    assert make(f"data.path={tmp_path}").task().classes == ("dog", "train")


def test_a_table_gives_labels_splits_and_speakers(make, tmp_path: Path):
    rows = []
    for s, speaker in enumerate(("ann", "bob", "cat", "dan")):
        for i, label in enumerate(("low", "high", "")):
            tone(tmp_path / f"{speaker}{i}.wav", label or "mid", seed=s)
            rows.append((f"{speaker}{i}.wav", label, speaker, "TEST" if speaker == "dan" else "train"))
    path = table(tmp_path, rows, ("path", "pitch", "speaker", "split"))
    task = make(f"data.path={path}", "labelled.column=pitch", "finetune.dev_ratio=0.3").task()
    assert (task.name, task.classes) == ("pitch in table.tsv", ("high", "low"))
    assert labels_of(task.test, task.classes) == {"dan0.wav": "low", "dan1.wav": "high"}
    assert "left out: 4 clips whose pitch is empty" in task.train.samples.describe()
    held = {name[:3] for name in ids(task.dev)}
    assert len(held) == 1 and len(ids(task.dev)) == 2
    assert {name[:3] for name in ids(task.train)} == {"ann", "bob", "cat"} - held
    assert "held back to choose on: 2 clips of 1 of 3 speakers" in task.train.samples.describe()
    assert make(f"data.path={path}", "labelled.column=pitch", "labelled.unseen_speakers=false").task().dev is None
    # Where the class is the speaker, holding a speaker back would leave a class without training clips.
    table(tmp_path, [row[:3] for row in rows], ("file", "pitch", "speaker"))
    task = make(f"data.path={path}", "labelled.column=speaker").task()
    assert task.dev is None and len(task.classes) == 4
    halves = [(*row[:3], ("train", "test")[i % 2]) for i, row in enumerate(rows)]
    table(tmp_path, halves, ("file", "pitch", "speaker", "fold"))
    task = make(f"data.path={path}", "labelled.column=pitch", "labelled.split_column=fold").task()
    assert ids(task.test) == [f"{row[0]}" for row in halves if row[3] == "test" and row[1]]
    assert "4 of 4 speakers of test are also in train" in task.train.samples.describe()


# --------------------------------------------------------------------------------------------------- batches


def test_long_clips_are_cropped_at_random_in_training_and_to_the_middle_in_evaluation(make):
    made = make("data.max_s=2")
    sample = AudioSample(np.arange(40001, dtype=np.float32))
    middle = made.prepare_labelled(sample, None).waveform
    np.testing.assert_array_equal(middle, np.arange(4000, 36000))  # 8001 samples too many, 4000 of them before
    starts = {float(made.prepare_labelled(sample, generator(0, "x", i)).waveform[0]) for i in range(20)}
    assert len(starts) > 10 and min(starts) < 2000 and max(starts) > 6000
    again = made.prepare_labelled(sample, generator(0, "x", 3)).waveform
    np.testing.assert_array_equal(again, made.prepare_labelled(sample, generator(0, "x", 3)).waveform)
    assert len(again) == 32000
    short = AudioSample(np.ones(9, np.float32))
    assert made.prepare_labelled(short, None) is short


@pytest.mark.parametrize(
    "words",
    [
        ("modality=audio", "model.embed_dim=32", "model.num_layers=2", "model.num_heads=2", "target.top_k_layers=2"),
        ("modality=audio", "preset=base", "model.embed_dim=32", "model.num_layers=2", "model.num_heads=2",
         "features.channels=32", "target.top_k_layers=2"),
    ],
    ids=["logmel", "waveform"],
)  # fmt: skip
def test_padding_changes_no_logit(words: tuple[str, ...]):
    config, kind = load_config(list(words), lambda name: AudioModality)
    made = kind(config)
    model = build_network(made, Classes([str(i) for i in range(5)], ["accuracy"])).eval()
    rng = np.random.default_rng(0)
    samples = [AudioSample(normalise(rng.standard_normal(size))) for size in (16000, 7013, 30011, 720)]
    inputs = made.collate(samples)
    assert inputs["waveform"].shape == (4, 30011)  # padded to the longest, not cropped to the shortest
    with torch.inference_mode():
        together = model(inputs)
        alone = torch.cat([model(made.collate([sample])) for sample in samples])
    assert alone.std(0).min() > 1e-3  # the clips differ, so equality says something
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_the_row_to_beat_is_mean_and_deviation_of_the_log_mel_bands(make):
    made = make()
    rng = np.random.default_rng(1)
    clips = [rng.standard_normal(size).astype(np.float32) for size in (8000, 4000)]
    got = summary_bands(made, made.collate([AudioSample(clip) for clip in clips]))
    mel = melscale_fbanks(257, 0.0, 8000.0, 80, 16000, norm="slaney").numpy()
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    for row, clip in zip(got, clips, strict=True):
        frames = np.stack([clip[i : i + 400] * window for i in range(0, len(clip) - 399, 160)])
        bands = np.log(np.abs(np.fft.rfft(frames, 512)) ** 2 @ mel + 1e-6)
        np.testing.assert_allclose(row[:80], bands.mean(0), atol=1e-3)
        np.testing.assert_allclose(row[80:], bands.std(0), atol=1e-3)


# ------------------------------------------------------------------------------------------------------- whole runs


def losses(run: str | Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]


def final(run: str | Path) -> dict[str, torch.Tensor]:
    return checkpoint.load(checkpoint.list_checkpoints(Path(run) / "checkpoints")[-1]).model


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_learns_tones_and_its_predictions_name_the_clips(d2v: Call, tmp_path: Path):
    for part, count in (("train", 12), ("dev", 4), ("test", 5)):
        tones(tmp_path / "set" / part, count)
    status, out, error = d2v("data.path=set", "out=run", "train.max_steps=40", "finetune.eval_every=20",
                             "finetune.batch=12", "optim.lr=3e-3")  # fmt: skip
    assert (status, error) == (0, "")
    assert "36 of 36 labelled samples to train on, 12 to choose on, 15 to test on; 3 classes" in out
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["finetune"]["test"]["accuracy"] > 90
    assert losses("run")[-1] < 0.3 * losses("run")[0]
    header, *lines = [line.split("\t") for line in Path("run/predictions-test.tsv").read_text().splitlines()]
    assert header == ["id", "label", "predicted", "probability"] and len(lines) == 15
    assert all(name.split("/")[1] == label for name, label, *_ in lines)
    hits = sum(label == predicted for _, label, predicted, _ in lines)
    assert summary["finetune"]["test"]["accuracy"] == pytest.approx(100 * hits / 15, abs=0.01)
    # What a user gets with load_classifier says the same of the same clip.
    tuned = d2v_core.load_classifier("run")
    waveform = sf.read("set/test/mid/3.wav", dtype="float32")[0]
    probabilities = tuned.predict([AudioSample(normalise(waveform))])[0]
    row = next(line for line in lines if line[0] == "test/mid/3.wav")
    assert tuned.classes[int(probabilities.argmax())] == row[2]
    assert float(probabilities.max()) == pytest.approx(float(row[3]), abs=2e-4)


def test_workers_and_an_interruption_change_nothing(d2v: Call, tmp_path: Path):
    tones(tmp_path / "set", 6)
    words = (
        "data.path=set",
        "data.min_s=0.1",
        "data.max_s=0.35",
        "finetune.dev_ratio=0.2",
    )  # so that cropping has a say
    for out, workers in (("one", "0"), ("two", "2")):
        assert d2v(*words, f"out={out}", f"train.num_workers={workers}")[0] == 0
    assert losses("one") == losses("two")
    assert equal(final("one"), final("two"))
    shutil.copytree("one", "half")
    shutil.rmtree("half/checkpoints/step-00000004")
    Path("half/summary.json").unlink()
    status, out, _ = d2v(*words, "out=half", "resume=auto")
    assert status == 0 and "step-00000002" in out
    assert equal(final("one"), final("half"))


def test_the_built_in_task_runs_without_a_path_and_can_be_probed(d2v: Call, pretrained: Path):
    assert d2v("labelled.synthetic_clips=32", "out=run", "labels=20")[0] == 0
    result = json.loads(Path("run/summary.json").read_text())["finetune"]
    assert (result["task"], result["labels"]) == ("first word", 20)
    assert len(Path("run/predictions-test.tsv").read_text().splitlines()) == 17
    status, out, _ = d2v("stage=probe", "labelled.synthetic_clips=32", "out=probe")
    assert status == 0 and "mean log-mel" in out
    rows = json.loads(Path("probe/summary.json").read_text())["table"]
    assert {row["system"] for row in rows} == {"pretrained", "untrained", "mean log-mel"}


def test_evaluation_is_the_same_each_time_and_training_crops_anew(make, tmp_path: Path):
    root = tones(tmp_path / "set", 3)
    made = make(f"data.path={root}", "data.min_s=0.1", "data.max_s=0.32")
    task = made.task()
    first, second = (
        torch.cat([b.inputs["waveform"] for b in labelled_batches(made, task.train, class_targets(3), 9)])
        for _ in range(2)
    )
    assert torch.equal(first, second) and first.shape == (9, 5120)
    trained = LabelledSteps(made, task.train, class_targets(3), batch=9, micro_batch=9, seed=0)
    epochs = [batches[0] for (_, _, batches), _ in zip(trained, range(2), strict=False)]
    assert all(sorted(batch.ids) == sorted(ids(task.train)) for batch in epochs)
    one, other = (dict(zip(batch.ids, batch.inputs["waveform"], strict=True)) for batch in epochs)
    longest = "low/2.wav"  # 0.38 s; the others of 0.3 s are padded, never cropped
    assert not torch.equal(one[longest], other[longest])
    assert torch.equal(one["low/0.wav"], other["low/0.wav"])


@pytest.mark.parametrize("preset", sorted(p.stem for p in AudioModality.recipes().glob("*.yaml")))
def test_every_preset_has_a_recipe_and_only_waveform_convolutions_are_frozen(preset: str, tmp_path: Path):
    config, _ = load_config(["modality=audio", f"preset={preset}"])
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config.to_yaml())
    of_another = {"joint": "tiny", "small2_long": "small"}
    recipe = of_another.get(preset, preset.removesuffix("2"))  # one for a size, whatever the method
    tuned, kind = load_config([f"from={run}", "stage=finetune", f"preset={recipe}"])
    with torch.device("meta"):
        if config.encoder != "waveform":
            assert tuned.finetune.frozen == []
            return
        student = build_student(kind(tuned))
    frozen = {n: p for n, p in student.named_parameters() if n.startswith(tuple(tuned.finetune.frozen))}
    # As with feature_grad_mult 0: the seven convolutions and their norms, not the projection behind them.
    assert sum(p.numel() for p in frozen.values()) == 4_206_592
    assert tuned.model.attention_dropout == 0.2 and config.model.attention_dropout == 0.1


def test_the_recipe_of_base_trains_all_but_the_convolutions(d2v: Call, tmp_path: Path):
    tones(tmp_path / "set", 4)
    words = {
        **PRETRAINING, "preset": "base", "features.channels": "16", "data.max_s": "4", "data.batch_s": "8",
        "data.micro_batch_s": "null", "data.min_s": "0.5", "train.max_steps": "1", "out": "base",
    }  # fmt: skip
    assert cli.main(["run", *(f"{key}={value}" for key, value in words.items())]) == 0
    status, _, error = d2v("from=base", "preset=base", "data.path=set", "finetune.dev_ratio=0.25", "out=run",
                           "finetune.micro_batch=2", "model.layer_drop=0")  # fmt: skip
    assert (status, error) == (0, "")
    before, after = final("base"), final("run")
    moved = {name for name in after if name in before or name.startswith("student.")}
    moved = {name for name in moved if not torch.equal(before[name], after[name])}
    still = {name for name in after if name.startswith("student.") and name not in moved}
    frozen = tuple(f"student.encoder.embedding.{part}" for part in ("convs", "norms"))
    # The vector of hidden tokens has no part in it: nothing is hidden from a classifier.
    assert still - {"student.encoder.mask_embedding"} == {name for name in after if name.startswith(frozen)}
    assert "student.encoder.embedding.project.weight" in moved


# ------------------------------------------------------------------------------------------------------ bad input


def refused(answer: tuple[int, str, str], *fragments: str) -> None:
    status, _, error = answer
    assert status == 2, answer
    for fragment in fragments:
        assert fragment in error, error


def test_folders_that_are_no_task(d2v: Call, tmp_path: Path):
    for i in range(3):
        tone(tmp_path / "flat" / f"{i}.wav", "low")
    refused(d2v("data.path=flat"), "has no class folders", "CLASS/CLIP.wav", "columns file and label")
    refused(d2v("data.path=flat/0.wav"), "is one file: expected a folder of class folders")
    refused(d2v("data.path=flat", "data.split=x"), "data.split=x is for pre-training")
    refused(d2v("data.path=flat", "data.also=[x]"), "data.also=['x'] and data.repeat=[] are for pre-training")
    tones(tmp_path / "one", 3, ("low",))
    refused(d2v("data.path=one"), "one class only, 'low'")
    for part in ("train", "test"):
        tone(tmp_path / "parts" / part / "0.wav", "low")
    refused(d2v("data.path=parts"), "has no class folders", "test, train lie in these folders themselves")
    tones(tmp_path / "untrained" / "test", 3)
    refused(d2v("data.path=untrained"), "no labelled clip to train on", "test has 9")
    tones(tmp_path / "mixed" / "train", 2)
    tones(tmp_path / "mixed" / "more", 2)
    refused(d2v("data.path=mixed"), "audio in more beside it")
    for part in ("train", "dev", "val"):
        tones(tmp_path / "twice" / part, 2)
    refused(d2v("data.path=twice"), "dev and val are both a dev part")
    refused(d2v("data.path=one", "labelled.min_s=50"), "labelled.min_s=50.0 must lie between 0 and data.max_s")
    refused(d2v("data.path=one", "labelled.min_s=5"), "Lower labelled.min_s")
    refused(d2v("labelled.synthetic_clips=3"), "must be at least 32")
    refused(d2v("data.path=one", "labelled.colum=x"), "Did you mean: 'column'?")
    refused(d2v("data.path=nowhere"), "does not exist")


def test_classes_that_train_does_not_have(d2v: Call, tmp_path: Path):
    tones(tmp_path / "set" / "train", 3, ("low", "high"))
    tones(tmp_path / "set" / "test", 2)
    refused(
        d2v("data.path=set"), "2 clips of 'mid' of test have a class of which train has no usable clip", "high, low"
    )


def test_lists_that_do_not_fit(d2v: Call, tmp_path: Path):
    tones(tmp_path / "set", 3)
    (tmp_path / "set" / "testing_list.txt").write_text("other/0.wav\n")
    refused(d2v("data.path=set"), "none of the 1 clips of testing_list.txt is there", "'other/0.wav'", "'high/0.wav'")
    for file in ("testing_list.txt", "validation_list.txt"):
        (tmp_path / "set" / file).write_text("low/0.wav\n")
    refused(d2v("data.path=set"), "low/0.wav stands in both")


def test_tables_that_do_not_fit(d2v: Call, tmp_path: Path):
    names = [tone(tmp_path / f"{i}.wav", "low").name for i in range(10)]
    path = table(tmp_path, [(name, "low") for name in names])
    refused(d2v(f"data.path={path}", "labelled.column=gender"), "no column 'gender'", "columns are: file, label",
            "labelled.column=")  # fmt: skip
    refused(d2v(f"data.path={path}", "labelled.split_column=fold"), "no column 'fold'", "file, label")
    table(tmp_path, [(name, "x") for name in names], ("name", "label"))
    refused(d2v(f"data.path={path}"), "no column file (or path)", "name, label")
    table(tmp_path, [(name, "") for name in names])
    refused(d2v(f"data.path={path}"), "'label' is empty in every usable row")
    table(tmp_path, [(name, name) for name in names])
    refused(d2v(f"data.path={path}"), "10 values in 10 clips, too many to be classes")
    table(tmp_path, [(name, "a", "trian") for name in names], ("file", "label", "split"))
    refused(d2v(f"data.path={path}"), "must say train, dev or test", "10 clips of 'trian'", "labelled.split_column=")
    table(tmp_path, [(name, "a", "test") for name in names], ("file", "label", "split"))
    refused(d2v(f"data.path={path}"), "no labelled clip to train on", "test has 10")


def test_unreadable_clips_are_named_and_left_out(d2v: Call, tmp_path: Path):
    root = tones(tmp_path / "set", 6)
    tone(root / "low" / "9.flac", "low", 1.0)
    data = (root / "low" / "9.flac").read_bytes()
    (root / "low" / "9.flac").write_bytes(data[: len(data) // 2])  # its header is whole: only decoding tells
    refused(d2v("data.path=set"), "1 of 19 audio files (5.3%) are unreadable", "low/9.flac", "data.max_bad_ratio")
    status, out, _ = d2v("data.path=set", "data.max_bad_ratio=0.1", "out=known", "finetune.dev_ratio=0.2")
    assert status == 0 and "1 unreadable: low/9.flac" in out
    assert "low/9.flac" not in json.loads(Path("known/task.json").read_text())["train"]
    words = ("data.path=set", "data.verify=headers", "finetune.dev_ratio=0.2", "finetune.batch=15")
    status, out, _ = d2v(*words, "out=late")
    assert status == 0 and "skipped low/9.flac" in out
    assert list(json.loads(Path("late/summary.json").read_text())["skipped"]) == ["low/9.flac"]
