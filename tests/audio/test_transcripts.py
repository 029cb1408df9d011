"""Transcribed data: where transcripts are found, what trains, vocabularies, subsets by the minute; the recipes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from d2v_audio.augment import AugmentConfig
from d2v_audio.feature_encoder import LogMelConfig, LogMelEmbedding, WaveformConfig
from d2v_audio.letters import Letters
from d2v_audio.modality import AudioModality
from d2v_audio.transcripts import UNKNOWN, choose_seconds
from d2v_core import cli
from d2v_core.batching import LabelledSteps, labelled_batches
from d2v_core.config import load_config
from d2v_core.ctc import padded, tokens_needed
from d2v_core.data2vec import Student
from d2v_core.errors import UserError
from d2v_core.keyed import generator
from d2v_core.labelled import ids, open_task
from d2v_core.run import build_student

RATE = 16000
PRETRAINING = {
    "modality": "audio", "model.embed_dim": "32", "model.num_layers": "2", "model.num_heads": "2",
    "target.top_k_layers": "2", "positions.groups": "4", "data.synthetic_clips": "8", "data.batch_s": "8",
    "train.max_steps": "2", "train.num_workers": "0", "train.tensorboard": "false", "train.probe": "false",
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "pretrained"
    torch.set_num_threads(1)
    assert cli.main(["run", *(f"{key}={value}" for key, value in {**PRETRAINING, "out": run}.items())]) == 0
    return run


@pytest.fixture
def make(pretrained: Path) -> Callable[..., AudioModality]:
    """The modality of a run on transcripts: make("data.path=...")."""

    def build(*words: str) -> AudioModality:
        preset = [] if any(word.startswith("preset=") for word in words) else ["preset=ctc_tiny"]
        given = ["stage=finetune", *preset, f"from={pretrained}", *words]
        config, _ = load_config(given, lambda name: AudioModality)
        return AudioModality(config)

    return build


def noise(path: Path, seconds: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    x = 0.1 * np.random.default_rng(abs(hash(path.name)) % 1000).standard_normal(round(seconds * RATE))
    sf.write(path, x.astype(np.float32), RATE)
    return path


def librispeech(root: Path, parts: Sequence[str], speakers: Sequence[str] = ("19", "26"), per_speaker: int = 3) -> Path:
    """part/speaker/chapter/speaker-chapter-000N.flac with their .trans.txt."""
    for part in parts:
        for speaker in speakers:
            folder = root / part / speaker / "7"
            lines = []
            for i in range(per_speaker):
                name = f"{speaker}-7-{i:04d}"
                noise(folder / f"{name}.flac", 1.0 + 0.2 * i)
                lines.append(f"{name} HELLO {speaker_word(speaker)}")
            (folder / f"{speaker}-7.trans.txt").write_text("\n".join(lines) + "\n")
    return root


def speaker_word(speaker: str) -> str:
    return "ABCDEFGHIJ"[int(speaker) % 10] * 2


def table(folder: Path, rows: Sequence[Sequence[str]], header: str = "file transcript split speaker") -> Path:
    """Rows of `header`'s columns; the files are made."""
    for row in rows:
        noise(folder / row[0], 1.0)
    path = folder / "table.tsv"
    path.write_text("\n".join("\t".join(row) for row in [header.split(), *rows]) + "\n", encoding="utf-8")
    return path


def texts(task, name: str = "train") -> dict[str, str]:
    part = getattr(task, name)
    return (
        {} if part is None else {i: task.show(label.tolist()) for i, label in zip(ids(part), part.labels, strict=True)}
    )


# ---------------------------------------------------------------------------------------------- where transcripts are


def test_librispeech_as_it_is_handed_out(make, tmp_path: Path) -> None:
    root = librispeech(tmp_path, ["train-clean-100", "dev-clean", "dev-other", "test-other"])
    task = make(f"data.path={root}").task()
    assert len(texts(task)) == 6 and len(texts(task, "dev")) == 12 and len(texts(task, "test")) == 6
    assert texts(task)["train-clean-100/19/7/19-7-0001.flac"] == "HELLO JJ"
    assert task.symbols == Letters.official().symbols and task.metrics == ("wer", "cer")
    task = make(f"data.path={root}", "transcripts.dev=[dev-other]").task()
    assert {name.split("/")[0] for name in texts(task, "dev")} == {"dev-other"}
    assert set(task.left_out.values()) == {"'dev-clean' is no part"}
    with pytest.raises(UserError, match=r"transcripts.dev=\['dev-othr'\]: .* There are: dev-clean, dev-other, test"):
        make(f"data.path={root}", "transcripts.dev=[dev-othr]").task()


def test_one_folder_is_for_training_and_dev_lies_elsewhere(make, tmp_path: Path) -> None:
    train = librispeech(tmp_path / "LibriSpeech", ["train-clean-100"]) / "train-clean-100"
    other = librispeech(tmp_path / "other", ["x"], ["84"]) / "x"
    task = make(f"data.path={train}", f"transcripts.dev_path={other}", f"transcripts.test_path={other}").task()
    assert len(texts(task)) == 6 and list(texts(task, "dev")) == [f"84/7/84-7-000{i}.flac" for i in range(3)]
    assert texts(task, "test") == texts(task, "dev")
    with pytest.raises(UserError, match=r"transcripts.dev_path=.* does not exist"):
        make(f"data.path={train}", "transcripts.dev_path=nowhere").task()


def test_speakers_are_held_back_to_choose_on(make, tmp_path: Path) -> None:
    root = librispeech(tmp_path, ["train-clean-100"], [str(n) for n in range(10, 20)])
    split = open_task(make(f"data.path={root}"))
    train, dev = ({name.split("/")[1] for name in ids(part)} for part in (split.train, split.dev))
    assert len(train) == 9 and len(dev) == 1 and not train & dev
    assert split.dev.samples.describe() and "held back to choose on: 3 clips of 1 of 10 speakers" in split.description


def test_manifests_with_letters_as_fairseq_prepares_them(make, tmp_path: Path) -> None:
    for name, lines in (("train", ["H I | Y O U |", "D O N ' T |"]), ("dev_other", ["A |"]), ("test", ["B A D |"])):
        for i in range(len(lines)):
            noise(tmp_path / "audio" / f"{name}{i}.wav")
        listed = [f"{name}{i}.wav\t16000" for i in range(len(lines))]
        (tmp_path / f"{name}.tsv").write_text("\n".join([str(tmp_path / "audio"), *listed]) + "\n")
        (tmp_path / f"{name}.ltr").write_text("\n".join(lines) + "\n")
    task = make(f"data.path={tmp_path}").task()
    assert texts(task) == {"train0.wav": "HI YOU", "train1.wav": "DON'T"}
    assert texts(task, "dev") == {"dev_other0.wav": "A"} and texts(task, "test") == {"test0.wav": "BAD"}
    alone = make(f"data.path={tmp_path}/train.tsv", f"transcripts.dev_path={tmp_path}/dev_other.tsv").task()
    assert texts(alone) == texts(task) and texts(alone, "dev") == texts(task, "dev") and alone.test is None
    (tmp_path / "train.ltr").rename(tmp_path / "train.wrd")
    (tmp_path / "train.wrd").write_text("HI YOU\nDON'T\n")
    assert texts(make(f"data.path={tmp_path}").task()) == texts(task)
    (tmp_path / "train.wrd").write_text("HI YOU\n")
    with pytest.raises(UserError, match=r"train.tsv lists 2 files, but train.wrd beside it has 1 lines"):
        make(f"data.path={tmp_path}").task()


@pytest.mark.parametrize("column", ["transcript", "text", "words"])
def test_tables(make, tmp_path: Path, column: str) -> None:
    rows = [("a.wav", "yes", "train", "s"), ("b.wav", " no  no ", "train", "t"), ("c.wav", "yes", "dev", "u")]
    path = table(tmp_path, rows, f"file {column} split speaker")
    words = [f"data.path={path}", *(["transcripts.column=words"] if column == "words" else [])]
    task = make(*words).task()
    assert texts(task) == {"a.wav": "yes", "b.wav": "no no"} and texts(task, "dev") == {"c.wav": "yes"}
    assert task.symbols[4:] == ("|", "n", "o", "e", "s", "y")
    upper = make(*words, "transcripts.case=upper").task()
    assert upper.symbols == Letters.official().symbols and texts(upper)["b.wav"] == "NO NO"


def test_any_script_is_spelled_with_its_own_letters(make, tmp_path: Path) -> None:
    rows = [
        ("a.wav", "привет мир", "train", "s"),
        ("b.wav", "cafe\u0301", "train", "t"),
        ("c.wav", "мир 世", "dev", "u"),
    ]
    task = make(f"data.path={table(tmp_path, rows)}").task()
    assert texts(task) == {"a.wav": "привет мир", "b.wav": "café"} and "é" in task.symbols
    assert texts(task, "dev") == {"c.wav": f"мир {UNKNOWN}"}  # training has no such letter
    ids_of = {symbol: i for i, symbol in enumerate(task.symbols)}
    said = [ids_of[letter] for letter in "мир|"]
    assert task.score([said], task.dev.labels.tolist()) == {"wer": 50.0, "cer": 40.0}
    assert task.score([said], [np.array(said)]) == {"wer": 0.0, "cer": 0.0}


# ------------------------------------------------------------------------------------------------ what is left out


def test_what_ctc_cannot_learn_from_is_named_and_left_out_of_training_alone(make, tmp_path: Path) -> None:
    """A second has 25 tokens of 40 ms; LL takes one more than two letters."""
    fits, dense = "ABCDEFGHIJKLMNOPQRSTUVWX", "ABCDEFGHIJKLMNOPQRSTUVLL"
    rows = [("a.wav", fits, "train", "s"), ("b.wav", dense, "train", "s"), ("c.wav", "", "train", "s"),
            ("d.wav", "OK", "train", "s"), ("e.wav", dense, "dev", "t"), ("f.wav", "", "dev", "t")]  # fmt: skip
    path = table(tmp_path, rows)
    noise(tmp_path / "d.wav", 3.0)
    made = make(f"data.path={path}", "data.max_s=2")
    assert made.geometry.num_tokens(RATE) == 25
    assert tokens_needed(Letters.official().encode(fits)) == 25
    task = made.task()
    assert list(texts(task)) == ["a.wav"] and list(texts(task, "dev")) == ["e.wav"]
    assert task.left_out == {
        "b.wav": "25 tokens, but its transcript needs 26", "c.wav": "no transcript", "f.wav": "no transcript",
        "d.wav": "3.0 s, longer than data.max_s=2",
    }  # fmt: skip
    told = task.train.samples.describe()
    for words in ("left out: 2 without a transcript: c.wav, f.wav", "fewer tokens than their transcripts need: b.wav",
                  "longer than data.max_s=2 s, which cannot be cropped: d.wav"):  # fmt: skip
        assert words in told


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([("a.wav", "HÉ", "train", "s")], ["transcripts.letters=english"],
         r"1 of 1 training transcripts have letters outside the vocabulary, .* a.wav: .*É.*letters=transcripts"),
        ([("a.wav", "", "train", "s")], [], r"1 clips but no transcript among them"),
        ([("a.wav", "A" * 200, "train", "s")], [], r"no training clip is left.*features.stride"),
        ([("a.wav", "A", "dev", "s")], [], r"no transcribed clip to train on; train has 0, dev has 1"),
        ([("a.wav", "A", "train", "s")], ["transcripts.column=said"], r"no column transcripts.column=said. Its col"),
        ([("a.wav", "A", "train", "s")], ["data.split=train"], r"data.split=train is for pre-training"),
        ([("a.wav", "A", "train", "s")], ["labels=1h"], r"labels=1h, but the training part has 1\.0 s. Give less"),
        ([("a.wav", "A", "train", "s")], ["labels=3parsecs"], r"labels=3parsecs: expected seconds, minutes or hours"),
    ],
)  # fmt: skip
def test_what_is_refused(make, tmp_path: Path, rows, words, message) -> None:
    rows = [*rows, *([("z.wav", "A", "dev", "z")] if any(word.startswith("labels") for word in words) else [])]
    with pytest.raises(UserError, match=message):
        open_task(make(f"data.path={table(tmp_path, rows)}", *words))


def test_tables_without_transcripts_say_what_was_expected(make, tmp_path: Path) -> None:
    path = table(tmp_path, [("a.wav", "x", "train", "s")], "file label split speaker")
    with pytest.raises(UserError, match=r"no column transcript or text or sentence.*transcripts.column="):
        make(f"data.path={path}").task()
    with pytest.raises(UserError, match=r"preset=ctc_tiny"):
        make(f"data.path={librispeech(tmp_path / 'l', ['train-clean-100'])}", "labelled.task=classes").task()


def test_one_odd_transcript_among_many_is_left_out(make, tmp_path: Path) -> None:
    rows = [(f"{i:03d}.wav", "A" if i else "É", "train", "s") for i in range(101)] + [("z.wav", "A", "dev", "t")]
    task = make(f"data.path={table(tmp_path, rows)}", "transcripts.letters=english").task()
    assert len(task.train.labels) == 100 and task.left_out == {"000.wav": "letters outside the vocabulary: É"}


# --------------------------------------------------------------------------------------------------- labels=10m


def drawn(labels: str, seconds: Sequence[float], speakers: Sequence[str | None], seed: int = 0) -> list[int]:
    names = [f"{i}" for i in range(len(seconds))]
    return choose_seconds(labels, names, np.array(seconds), speakers, seed).tolist()


def test_a_subset_has_the_seconds_asked_for_and_every_speaker_alike() -> None:
    rng = np.random.default_rng(0)
    seconds = rng.uniform(1, 8, 400)
    speakers = ["talker" if i < 300 else f"s{i % 10}" for i in range(400)]
    chosen = drawn("3m", seconds, speakers)
    assert chosen == sorted(set(chosen)) == drawn("180s", seconds, speakers) == drawn("3min", seconds, speakers)
    assert abs(seconds[chosen].sum() - 180) < 4
    by_speaker = {name: sum(seconds[i] for i in chosen if speakers[i] == name) for name in set(speakers)}
    assert len(by_speaker) == 11 and max(by_speaker.values()) - min(by_speaker.values()) < 16
    assert chosen != drawn("3m", seconds, speakers, seed=1)
    unknown = drawn("3m", seconds, [None] * 400)
    assert abs(seconds[unknown].sum() - 180) < 4


def test_all_of_it_may_be_a_little_less_than_its_name_says() -> None:
    assert drawn("1m", [30.0, 29.5], ["a", "b"]) == [0, 1]
    with pytest.raises(UserError, match=r"has 30\.0 s"):
        drawn("1m", [30.0], ["a"])
    with pytest.raises(UserError, match="less than one clip"):
        drawn("1s", [30.0], ["a"])


def test_the_folders_of_libri_light() -> None:
    names = [f"1h/{i}/clean/1/2/1-2-{i}.flac" for i in range(6)] + ["9h/other/3/4/3-4-0.flac"]
    seconds, speakers = np.full(7, 600.0), ["1"] * 7
    wanted = {"10m": [0], "1h": [0, 1, 2, 3, 4, 5], "9h": [6], "10h": list(range(7))}
    for labels, indices in wanted.items():
        assert choose_seconds(labels, names, seconds, speakers, 0).tolist() == indices
    with pytest.raises(UserError, match="labels=10h of Libri-Light needs its folder 9h/"):
        choose_seconds("10h", names[:6], seconds[:6], speakers[:6], 0)
    assert len(choose_seconds("30m", names, seconds, speakers, 0)) == 3


# -------------------------------------------------------------------------------------------- what is withheld


def test_rectangles_are_inside_and_as_wide_as_allowed() -> None:
    augment, features = AugmentConfig(2, 15, 1.5, 0.2), LogMelConfig()
    rng = np.random.default_rng(0)
    found = [augment.rectangles(features, 4.0, rng) for _ in range(200)]
    bands = np.concatenate([one[:2] for one in found])
    times = np.concatenate([one[2:] for one in found])
    assert (bands[:, 2] == 0).all() and (bands[:, 3] == 400).all() and {len(one) for one in found} <= {8, 9}
    widths = bands[:, 1] - bands[:, 0]
    assert bands.min() >= 0 and bands[:, 1].max() <= 80 and set(widths) == set(range(16))
    lengths = times[:, 3] - times[:, 2]
    assert set(lengths) == set(range(21)) and times[:, 3].max() <= 400 and (times[:, :2] == [0, 80]).all()
    assert AugmentConfig().rectangles(features, 4.0, rng) is None


def test_what_is_withheld_is_zero_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    embedding = LogMelEmbedding(LogMelConfig(), 8, RATE)
    seen = []
    embedding.conv.register_forward_pre_hook(lambda _, given: seen.append(given[0].transpose(1, 2)))
    waveform = torch.randn(2, RATE)
    embedding(waveform, None)
    embedding(waveform, None, torch.tensor([[[3, 7, 0, 98], [0, 80, 10, 20]], [[0, 0, 0, 0], [0, 0, 0, 0]]]))
    plain, withheld = seen
    expected = plain.clone()
    expected[0, :, 3:7] = 0
    expected[0, 10:20] = 0
    assert torch.equal(withheld, expected) and not torch.equal(plain[0], expected[0])


def test_training_withholds_and_scoring_never_does(make) -> None:
    made = make("labelled.synthetic_clips=32", "data.batch_s=8")
    task = made.task()
    steps = iter(LabelledSteps(made, task.train, padded, batch=None, seed=0))
    for _ in range(3):
        for batch in next(steps)[2]:
            assert batch.inputs["withheld"].shape[0] == len(batch.ids)
    seen = list(labelled_batches(made, task.dev, padded, None))
    assert sum(len(batch.ids) for batch in seen) == 8
    assert all("withheld" not in batch.inputs and batch.corruption is None for batch in seen)
    with pytest.raises(UserError, match="blank log-mel bands, which only encoder=logmel has"):
        AugmentConfig(band_masks=1).check(WaveformConfig())


def test_transcribed_clips_are_never_cropped(make, tmp_path: Path) -> None:
    rows = [("a.wav", "A", "train", "s"), ("b.wav", "B", "dev", "t")]
    path = table(tmp_path, rows)
    noise(tmp_path / "b.wav", 4.0)
    made = make(f"data.path={path}", "data.max_s=2", "data.batch_s=2")
    (batch,) = labelled_batches(made, made.task().dev, padded, None)
    assert batch.inputs["waveform"].shape == (1, 4 * RATE)
    rng = generator(0, "x")
    assert len(made.prepare_labelled(made.task().dev.samples[0], rng).waveform) == 4 * RATE


def test_mask_vectors_stand_where_tokens_are_withheld(make) -> None:
    """Of 1.0, as in pre-training; 2.0 has none and puts noise there."""
    student = build_student(make())
    assert isinstance(student, Student)
    x, hidden = torch.randn(2, 5, 32), torch.tensor([[True, False, False, True, False], [False] * 5])
    out = student.encoder.hide(x, hidden)
    assert torch.equal(out[0, 0], student.encoder.mask_embedding) and torch.equal(out[1], x[1])
    assert torch.equal(out[0, 1:3], x[0, 1:3])


# --------------------------------------------------------------------------------------------------- the recipes

OFFICIAL = {  # tokens (millions of samples), updates, lr, time, channel, layerdrop, freeze
    "base_10m": (25.6, 13000, 5e-5, 0.65, 0.25, 0.1, 10000),
    "base_1h": (25.6, 13000, 5e-5, 0.65, 0.25, 0.1, 10000),
    "base_10h": (25.6, 20000, 5e-5, 0.65, 0.5, 0.05, 10000),
    "base_100h": (25.6, 80000, 3e-5, 0.65, 0.5, 0.1, 0),
    "base_960h": (25.6, 320000, 1e-4, 0.5, 0.1, 0.1, 0),
    "large_10m": (25.6, 13000, 1e-4, 0.65, 0.25, 0.1, 10000),
    "large_1h": (25.6, 13000, 3e-4, 0.75, 0.25, 0.1, 10000),
    "large_10h": (25.6, 20000, 1e-4, 0.75, 0.25, 0.1, 10000),
    "large_100h": (25.6, 80000, 3e-5, 0.5, 0.5, 0.1, 10000),
    "large_960h": (30.72, 320000, 3e-5, 0.5, 0.25, 0.1, 10000),
}


@pytest.mark.parametrize("preset", sorted(OFFICIAL))
def test_the_official_recipes(preset: str, tmp_path: Path) -> None:
    """Values of the specification's table, on a run of the size that the preset is for."""
    size = preset.split("_")[0]
    config, _ = load_config(["modality=audio", f"preset={size}"], lambda name: AudioModality)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    config, _ = load_config(["stage=finetune", f"preset={preset}", f"from={tmp_path}"], lambda name: AudioModality)
    made = AudioModality(config)
    batching, tune, optim, model = made.batching(), config.finetune, config.optim, config.model
    found = (batching.batch / 1e6, config.train.max_steps, optim.lr, tune.mask_prob, tune.channel_mask_prob,
             model.layer_drop, tune.freeze_steps)  # fmt: skip
    assert found == OFFICIAL[preset]
    assert batching.micro_batch == (3_200_000 if size == "base" else 1_280_000)
    assert (tune.mask_length, tune.channel_mask_length, tune.batch) == (10, 64, None)
    assert (model.dropout, model.attention_dropout, model.activation_dropout) == (0, 0, 0.1)
    assert (optim.schedule, optim.warmup_ratio, optim.hold_ratio) == ("tri_stage", 0.1, 0.4)
    assert (optim.initial_lr_ratio, optim.final_lr_ratio) == (0.01, 0.05)
    assert (optim.betas, optim.eps, optim.weight_decay, optim.clip_grad_norm) == ([0.9, 0.98], 1e-8, 0.0, None)
    names = [name for name, _ in build_student(made).named_parameters()] if preset == "base_10m" else []
    frozen = {name for name in names if name.startswith(tuple(tune.frozen))}
    assert not names or {name.split(".")[2] for name in frozen} == {"convs", "norms"}
    assert json.dumps(config.to_dict()["transcripts"]["letters"]) == '"english"'


@pytest.mark.parametrize("preset", ["ctc_tiny", "ctc_small"])
def test_our_recipes_start_with_the_head(make, preset: str) -> None:
    made = make(f"preset={preset}")
    tune = made.config.finetune
    assert tune.head_steps and tune.batch is None and made.config.optim.clip_grad_norm == 5.0
    rectangles = made.config.section("augment", AugmentConfig).rectangles(LogMelConfig(), 2.0, generator(0, "x"))
    assert rectangles is not None and len(rectangles) >= 4
