"""`d2v ctc-probe`: decoding and counting by hand, the verb on toy data, and the mistakes one can make with it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import soundfile as sf
import torch
from torch import nn

from d2v_audio.ctc_probe import CTCProbeConfig, Utterance, _error_rate, _subset, _train, _utterance
from d2v_audio.synthetic import SyntheticSpeech
from d2v_core import cli

SIZES = (("train", 8), ("dev", 3), ("test", 4))
Verb = Callable[..., tuple[int, str, str]]


def logits(*classes: int, num_classes: int = 5) -> torch.Tensor:
    """(T, classes) with the given class ahead in each frame."""
    return nn.functional.one_hot(torch.tensor(classes), num_classes).float()


def test_error_rate_by_hand() -> None:
    head = nn.Linear(5, 5, bias=False)
    nn.init.eye_(head.weight)
    utterances = [
        Utterance([logits(1, 0, 2, 2, 3)], torch.tensor([1, 2, 3])),  # right
        Utterance([logits(1, 0, 4, 0, 0)], torch.tensor([1, 2, 3])),  # one letter wrong, one missing
        Utterance([logits(1, 2, 3, 4, 0)], torch.tensor([1, 2])),  # two too many
    ]
    assert _error_rate(head, utterances, 0) == pytest.approx(100 * (0 + 2 + 2) / 8, abs=0.01)
    assert _error_rate(head, [], 0) == 0.0


def test_a_letter_that_training_has_not_is_an_error() -> None:
    utterance = _utterance(lambda inputs: [logits(1, 0, 2)], {}, "AZB", ["A", "B"])
    assert utterance.letters.tolist() == [1, -1, 2]
    head = nn.Linear(5, 5, bias=False)
    nn.init.eye_(head.weight)
    assert _error_rate(head, [utterance], 0) == pytest.approx(100 / 3, abs=0.01)  # Z is missing from what is heard


def test_training_reads_letters_off_features_that_have_them() -> None:
    """Frames that are noisy one-hot letters: the linear layer must find the code; frames of noise tell it nothing."""
    generator = torch.Generator().manual_seed(0)

    def utterance() -> Utterance:
        letters = torch.randint(1, 5, (6,), generator=generator)
        frames = torch.stack([letters, torch.zeros_like(letters)], 1).flatten()  # a blank behind each
        clear = logits(*frames.tolist()) * 3 + 7 + 0.1 * torch.randn(12, 5, generator=generator)
        return Utterance([torch.randn(12, 5, generator=generator), clear], letters)

    train, test = ([utterance() for _ in range(n)] for n in (40, 20))
    heads = _train(train, 5, CTCProbeConfig(steps=150, batch=8, lr=0.05))
    assert _error_rate(heads[1], test, 1) < 5
    assert _error_rate(heads[0], test, 0) > 50


def test_a_subset_has_about_the_minutes_asked_for() -> None:
    part = [({"waveform": torch.zeros(1, 16000)}, str(i)) for i in range(30)]
    chosen = _subset(part, 0.1, 16000, seed=0)
    assert len(chosen) == 6
    assert {text for _, text in chosen} < {str(i) for i in range(30)}
    assert [text for _, text in chosen] == [text for _, text in _subset(part, 0.1, 16000, seed=0)]
    assert [text for _, text in chosen] != [text for _, text in _subset(part, 0.1, 16000, seed=1)]
    assert len(_subset(part, 99, 16000, seed=0)) == 30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a tiny run, a table of synthetic utterances and their files."""
    root = tmp_path_factory.mktemp("probe")
    rows = ["file\ttranscript\tsplit\tspeaker"]
    for split, count in SIZES:
        (root / split).mkdir()
        for i in range(count):
            utterance = SyntheticSpeech(split, count)[i]
            sf.write(root / split / f"{i}.wav", utterance.waveform, 16000)
            rows.append(f"{split}/{i}.wav\t{utterance.transcript}\t{split}\t{utterance.speaker}")
    (root / "table.tsv").write_text("\n".join(rows) + "\n")
    words = "model.embed_dim=32 model.num_layers=2 model.num_heads=2 target.top_k_layers=2 data.synthetic_clips=6"
    words += " data.batch_s=6 data.min_s=0.5 train.max_steps=2 train.num_workers=0 train.tensorboard=false"
    words += f" train.probe=false out={root}/run"
    torch.set_num_threads(1)
    assert cli.main(["run", "modality=audio", "features.stride=2", *words.split()]) == 0
    yield root


@pytest.fixture
def probe(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verb:
    monkeypatch.chdir(place)

    def call(*words: str) -> tuple[int, str, str]:
        status = cli.main(["ctc-probe", *words])
        out, error = capsys.readouterr()
        assert "Traceback" not in out + error
        return status, out, error

    return call


def test_the_verb(probe: Verb, place: Path) -> None:
    words = ("run", "path=table.tsv", "steps=12", "batch=4")
    status, out, error = probe(*words)
    assert (status, error) == (0, "")
    result = json.loads((place / "run" / "ctc_probe.json").read_text())
    assert result["run_step"] == 2
    assert result["utterances"] == dict(SIZES)
    assert result["options"]["steps"] == 12
    assert set(result["letters"]) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    assert all(0 < minutes < 1 for minutes in result["minutes"].values())
    assert [row["system"] for row in result["rows"]] == ["pretrained", "untrained", "log-mel input"]
    for row, layers in zip(result["rows"], (3, 3, 1), strict=True):
        assert len(row["dev_per_layer"]) == layers
        assert row["dev"] == min(row["dev_per_layer"]) == row["dev_per_layer"][row["layer"]]
        assert 0 < row["test"] <= 250
        assert f"{row['test']:.1f}" in out
    assert str(place) not in json.dumps(result)  # a result can be passed on

    assert probe(*words, "out=again.json", "minutes=0.1")[0] == 0
    again = json.loads((place / "again.json").read_text())
    assert again["utterances"]["train"] < 8
    assert probe(*words, "out=third.json")[0] == 0
    assert json.loads((place / "third.json").read_text())["rows"] == result["rows"]
    assert probe(*words, "out=alone.json", "baselines=false")[0] == 0
    assert json.loads((place / "alone.json").read_text())["rows"] == result["rows"][:1]


def test_help(probe: Verb) -> None:
    for words in ((), ("--help",)):
        status, out, _ = probe(*words)
        assert status == 0
        assert "d2v ctc-probe RUN path=TABLE.tsv" in out
        assert "steps=600: Updates of the linear layer." in out


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("run", ["ctc-probe needs path=TABLE.tsv"]),
        ("path=table.tsv", ["ctc-probe needs the run folder first: d2v ctc-probe RUN path=table.tsv"]),
        ("nowhere path=table.tsv", ["nowhere is not a run folder"]),
        ("run path=tabel.tsv", ["path=tabel.tsv does not exist", "Did you mean 'table.tsv'"]),
        ("run path=table.tsv step=5", ["step is not an option", "Did you mean: 'steps'?", "d2v ctc-probe --help"]),
        ("run path=table.tsv steps=many", ["steps=many must be a whole number."]),
        ("run path=table.tsv steps=0", ["steps=0 and batch=16 must be at least 1"]),
        ("run path=table.tsv minutes=0", ["minutes=0.0 above 0"]),
        ("run path=table.tsv out=no/such/file.json", ["out=no/such/file.json cannot be written", "Make it first."]),
        ("run path=table.tsv test=tests", ["split 'tests'", "dev, test, train"]),
        ("run path=silent.tsv", ["split 'train' has 1 clips but no transcript", "column 'transcript'"]),
        ("run path=long.tsv", ["more letters than tokens"]),
        ("run path=half.tsv", ["half.flac", "damaged", "Mend the file"]),
        ("run path=train/0.wav", ["train/0.wav is one file and has no split 'train'"]),
    ],
)
def test_mistakes(probe: Verb, place: Path, words: str, fragments: list[str]) -> None:
    head = "file\ttranscript\tsplit\n"
    rows = [(f"{split}/0.wav", split) for split, _ in SIZES]
    (place / "silent.tsv").write_text(head + "".join(f"{file}\t\t{split}\n" for file, split in rows))
    (place / "long.tsv").write_text(head + "".join(f"{file}\t{'AB' * 999}\t{split}\n" for file, split in rows))
    sf.write(place / "half.flac", SyntheticSpeech("train", 1)[0].waveform, 16000)
    (place / "half.flac").write_bytes((place / "half.flac").read_bytes()[:9000])
    (place / "half.tsv").write_text(head + "".join(f"half.flac\tA\t{split}\n" for _, split in rows[:1]))
    status, _, error = probe(*words.split())
    assert status == 2
    assert error.startswith("d2v: ")
    for fragment in fragments:
        assert fragment in error, error
