"""`d2v evaluate`, `d2v transcribe` and `d2v ladder` on runs of two steps: what they write, continue and refuse."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import torch

from d2v_audio import decode, evaluate, ladder, transcribe
from d2v_audio.align import Word
from d2v_audio.evaluate import EvaluateConfig, rates
from d2v_audio.recognize import load_recognizer
from d2v_audio.synthetic import SyntheticSpeech
from d2v_audio.transcribe import captions, emissions_of, written
from d2v_audio.words import SearchConfig
from d2v_core import cli
from d2v_core.config import read_yaml
from d2v_core.errors import UserError

SIZES = (("train", 8), ("dev", 3), ("test", 4))
TINY = ["train.num_workers=0", "train.tensorboard=false", "train.num_threads=1"]
TUNE = ["preset=ctc_tiny", "train.max_steps=2", "finetune.eval_every=2", "finetune.head_steps=20", "train.log_every=1",
        "data.batch_s=6", "model.dropout=0.0", *TINY]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A table of synthetic utterances, a pre-trained run and a fine-tuned one."""
    root = tmp_path_factory.mktemp("words")
    rows = ["file\ttranscript\tsplit\tspeaker"]
    for split, count in SIZES:
        (root / split).mkdir()
        for i in range(count):
            utterance = SyntheticSpeech(split, count)[i]
            sf.write(root / split / f"{i}.wav", utterance.waveform, 16000)
            rows.append(f"{split}/{i}.wav\t{utterance.transcript}\t{split}\t{utterance.speaker}")
    (root / "table.tsv").write_text("\n".join(rows) + "\n")
    words = ["model.embed_dim=32", "model.num_layers=2", "model.num_heads=2", "target.top_k_layers=2", *TINY]
    words += ["data.synthetic_clips=6", "data.batch_s=6", "train.max_steps=1", "train.probe=false", f"out={root}/pre"]
    assert cli.main(["run", "modality=audio", "stage=pretrain", "features.stride=2", *words]) == 0
    words = ["run", "stage=finetune", f"from={root}/pre", f"data.path={root}/table.tsv", f"out={root}/run", *TUNE]
    assert cli.main(words) == 0
    yield root


@pytest.fixture
def quiet() -> Any:
    return lambda line: None


def test_rates_by_hand() -> None:
    found = rates(["A B C", "D E"], ["A X C D", "D"], ["one", "two"])
    assert found["wer"] == {
        "rate": 60.0, "low": pytest.approx(50.0), "high": pytest.approx(66.667, abs=1e-3), "resampled": "speakers",
        "substitutions": 1, "deletions": 1, "insertions": 1, "words": 5,
    }  # fmt: skip
    assert (found["cer"]["letters"], found["cer"]["insertions"]) == (8, 2)


def test_what_an_evaluation_leaves(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main([str(place / "run")]) == 0
    out = place / "run" / "evaluate-test"
    assert "greedy decoding; intervals over" in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    summary = json.loads((place / "run" / "summary.json").read_text())
    assert round(result["wer"]["rate"], 2) == summary["finetune"]["test"]["wer"]
    assert round(result["cer"]["rate"], 2) == summary["finetune"]["test"]["cer"]
    assert result["decode"] == {"search": "greedy"}
    lines = (out / "hypotheses.tsv").read_text().splitlines()
    assert len(lines) == 1 + 4
    said = SyntheticSpeech("test", 4)[0].transcript
    assert lines[1].split("\t")[5] == said
    alignment = json.loads((out / "alignments.jsonl").read_text().splitlines()[0])
    spoken = alignment["reference"]
    assert " ".join(word["text"] for word in spoken) == said
    edges = [time for word in spoken for time in (word["start_s"], word["end_s"])]
    assert edges == sorted(edges) and 0 <= edges[0] < edges[-1] <= float(lines[1].split("\t")[2])
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"<script|https?://(?!www\.w3\.org)|<link", page)
    assert all(f"<h2>test/{i}.wav</h2>" in page for i in range(4))
    drawings = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page)]
    assert len(drawings) == 4
    for drawing in drawings:
        (image,) = drawing.findall("image")
        assert image.get("width") == drawing.get("width")
        places = [float(text.get("x", "nan")) for text in drawing.findall("text")]
        assert places and all(0 <= x <= float(drawing.get("width", "0")) for x in places)


def test_a_language_model_tuned_on_dev(place: Path, quiet: Any) -> None:
    search = SearchConfig(engine="builtin", beam=5, tune=True, trials=2)
    result = evaluate.evaluate(place / "run", EvaluateConfig(lm="2gram", decode=search), None, quiet)
    out = place / "run" / "evaluate-test-2gram"
    tuned = result["decode"]["tuned_on_dev"]
    assert tuned["utterances"] == 3 and len(tuned["trials"]) == 2  # dev, not test
    assert result["decode"]["lm_weight"] == tuned["lm_weight"]
    train = {word for i in range(8) for word in SyntheticSpeech("train", 8)[i].transcript.split()}
    assert result["decode"]["words"] == len(train)
    rows = [line.split("\t") for line in (out / "hypotheses.tsv").read_text().splitlines()[1:]]
    assert {word for row in rows for word in row[6].split()} <= train
    said = [word for row in rows for word in row[5].split()]
    assert result["decode"]["words_not_in_lexicon"] == sum(word not in train for word in said)


def test_a_run_that_was_trained_in_half_precision_is_scored_without_a_gpu(place: Path, quiet: Any) -> None:
    run = place / "half"
    shutil.copytree(place / "run", run, ignore=shutil.ignore_patterns("evaluate-*"))
    config = (run / "config.yaml").read_text()
    assert config.count("precision: fp32") == 1
    (run / "config.yaml").write_text(config.replace("precision: fp32", "precision: fp16"))
    result = evaluate.evaluate(run, EvaluateConfig(device="cpu"), None, quiet)
    assert result["utterances"] == 4


def test_against_another(place: Path, quiet: Any) -> None:
    first = place / "first"
    evaluate.evaluate(place / "run", EvaluateConfig(out=str(first)), None, quiet)
    search = SearchConfig(engine="builtin", beam=5)
    config = EvaluateConfig(lm="1gram", decode=search, out=str(place / "second"), against=str(first))
    found = evaluate.evaluate(place / "run", config, None, quiet)
    mine, other = found["wer"]["rate"], json.loads((first / "result.json").read_text())["wer"]["rate"]
    assert found["against"]["wer"] == other
    assert found["against"]["difference"] == pytest.approx(mine - other, abs=1e-3)
    assert found["against"]["low"] <= found["against"]["difference"] <= found["against"]["high"]
    config = EvaluateConfig(part="dev", out=str(place / "third"), against=str(first))
    with pytest.raises(UserError, match="scored on 4 utterances, this on 3"):
        evaluate.evaluate(place / "run", config, None, quiet)


def test_other_data(place: Path, quiet: Any) -> None:
    """A folder with transcripts and without parts is scored whole."""
    folder = place / "other" / "1" / "2"
    folder.mkdir(parents=True)
    waveform, _ = sf.read(place / "test" / "0.wav")
    sf.write(folder / "1-2-0.flac", waveform, 16000)
    (folder / "1-2.trans.txt").write_text("1-2-0 SHEEP SWIM\n")
    given = {"data.path": str(place / "other")}
    result = evaluate.evaluate(place / "run", EvaluateConfig(out=str(place / "foreign")), given, quiet)
    assert (result["utterances"], result["wer"]["words"]) == (1, 2)
    stored = json.loads((place / "foreign" / "result.json").read_text(), parse_constant=pytest.fail)
    assert stored["wer"]["low"] is None  # one utterance
    given = {"transcripts.test_path": str(place / "other")}
    result = evaluate.evaluate(place / "run", EvaluateConfig(out=str(place / "elsewhere")), given, quiet)
    assert (result["utterances"], result["wer"]["words"]) == (1, 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["part=tset"], "part=tset must be one of"),
        (["lm=no.arpa"], "does not exist"),
        (["decode.tune=true"], "no weights to tune"),
        (["decode.beam=0"], "beam=0 must be at least 1"),
        (["decode.baem=3"], "beam"),
        (["against=nowhere"], "is no folder"),
        (["data.path=/nowhere/x"], "does not exist"),
        (["transcripts.test_path=/nowhere/x"], "transcripts.test_path=/nowhere/x does not exist"),
        (["worst=-1"], "worst=-1 must not be below 0"),
        (["device=gpu"], "^device=gpu must be auto, cpu, cuda or cuda:N"),
        (["device=cuda:99"], "^device=cuda:99, but"),
        (["data.also=[/nowhere/x]"], "are for pre-training"),
        (["data.split=dev"], "is for pre-training"),
    ],
)
def test_evaluate_refuses(place: Path, words: list[str], said: str) -> None:
    before = sorted(place.glob("run/*"))
    with pytest.raises(UserError, match=said):
        evaluate.main([str(place / "run"), *words])
    assert sorted(place.glob("run/*")) == before


def test_evaluate_refuses_a_run_of_another_stage(place: Path) -> None:
    with pytest.raises(UserError, match="not of stage=finetune"):
        evaluate.main([str(place / "pre")])
    with pytest.raises(UserError, match="needs the run folder first"):
        evaluate.main(["lm=none"])


def test_transcribe(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert transcribe.main(["run", "test/0.wav", "dev", "format=json", "lm=1gram", "decode.beam=5"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == ["test/0.wav", "dev/0.wav", "dev/1.wav", "dev/2.wav"]
    for line in lines:
        assert line["text"] == " ".join(word["text"] for word in line["words"])
        assert all(0 <= word["start_s"] < word["end_s"] <= line["seconds"] for word in line["words"])
    assert transcribe.main(["run", "dev", "format=srt", "out=subtitles"]) == 0
    assert sorted(path.name for path in Path("subtitles").iterdir()) == ["0.srt", "1.srt", "2.srt"]
    with pytest.raises(UserError, match="nothing is overwritten"):
        transcribe.main(["run", "dev", "format=srt", "out=subtitles"])
    with pytest.raises(UserError, match="cannot share a file"):
        transcribe.main(["run", "dev", "format=srt"])
    sf.write("short.wav", np.zeros(9), 16000)
    with pytest.raises(UserError, match=r"short\.wav: .*9 samples"):
        transcribe.main(["run", "short.wav"])
    Path("broken.wav").write_bytes(b"RIFF")
    with pytest.raises(UserError, match=r"broken\.wav"):
        transcribe.main(["run", "broken.wav"])
    with pytest.raises(UserError, match="device=gpu must be auto"):
        transcribe.main(["run", "dev", "device=gpu"])
    with pytest.raises(UserError, match="chunk_s=3"):
        transcribe.main(["run", "dev", "chunk_s=3", "overlap_s=2"])
    with pytest.raises(UserError, match="at least one audio file"):
        transcribe.main(["run", "format=json"])


@pytest.mark.parametrize("seconds", [9.0, 10.0, 13.37, 40.01])
def test_chunks_fit_together(place: Path, seconds: float) -> None:
    """With a network that hears each frame by itself, chunks give what the whole gives."""
    recognizer = load_recognizer(place / "run")
    hop = round(recognizer.frame_s * recognizer.sample_rate)
    geometry = recognizer.modality.geometry

    class PerFrame:
        modality, frame_s, sample_rate = recognizer.modality, recognizer.frame_s, recognizer.sample_rate

        def emissions(self, waveforms: list[np.ndarray]) -> list[torch.Tensor]:
            lengths = [int(geometry.num_tokens(len(x))) for x in waveforms]
            return [
                torch.from_numpy(x[: n * hop : hop].copy())[:, None] for x, n in zip(waveforms, lengths, strict=True)
            ]

    waveform = np.arange(round(seconds * 16000), dtype=np.float64)
    whole = PerFrame().emissions([waveform])[0]
    chunks = emissions_of(PerFrame(), waveform, chunk_s=5.0, overlap_s=1.0)  # pyright: ignore[reportArgumentType]
    assert torch.equal(chunks, whole)


def test_captions_end_at_pauses_and_lengths() -> None:
    words = [Word("A", 0.0, 0.5, 1.0), Word("B", 0.7, 1.0, 1.0), Word("C", 2.0, 2.5, 1.0), Word("D", 2.6, 8.5, 1.0)]
    assert [[word.text for word in group] for group in captions(words)] == [["A", "B"], ["C"], ["D"]]
    long = [Word("X" * 50, float(i), i + 0.9, 1.0) for i in range(2)]
    assert len(captions(long)) == 2
    text = written(transcribe.Transcript(words, 3661.5), "srt", "a.wav")
    assert text.startswith("1\n00:00:00,000 --> 00:00:01,000\nA B\n\n2\n00:00:02,000 --> ")
    assert written(transcribe.Transcript([Word("A", 3661.0, 3661.25, 1.0)], 3662.0), "srt", "a.wav").startswith(
        "1\n01:01:01,000 --> 01:01:01,250\n"
    )


def test_a_ladder_and_its_continuation(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    words = [f"from={place}/pre", f"data.path={place}/table.tsv", "labels=[6]", "lm=[none,1gram]", "seeds=2"]
    words += ["decode.beam=5", "decode.engine=builtin", f"out={place}/ladder", *TUNE]
    words += ["optim.lr=2e-3", "untrained.optim.lr=4e-3", "untrained.finetune.head_lr=1e-2"]
    done: list[Path] = []
    real = ladder.evaluate

    def stopped(run: Path, config: EvaluateConfig, given: Any, say: Any) -> Any:
        if len(done) == 3:
            Path(str(config.out)).mkdir()  # as if it had been killed while it wrote
            raise KeyboardInterrupt
        done.append(run)
        return real(run, config, given, say)

    monkeypatch.setattr(ladder, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        ladder.main(words)
    done.clear()
    monkeypatch.setattr(ladder, "evaluate", lambda *args: (done.append(args[0]), real(*args))[1])
    assert ladder.main(words) == 0
    assert len(done) == 2 * 2 * 2 - 3
    out = capsys.readouterr().out
    assert "pre-trained" in out and "seeds" in out
    table = json.loads((place / "ladder" / "ladder.json").read_text())
    assert [(row["labels"], row["lm"]) for row in table["rows"]] == [("6", "none"), ("6", "1gram")]
    for row in table["rows"]:
        for name, one in row["weights"].items():
            cells = [place / "ladder" / f"{name}-{row['labels']}-seed{seed}" for seed in range(2)]
            results = [(cell / f"evaluate-test-{row['lm']}" / "result.json").read_text() for cell in cells]
            each = [json.loads(result)["wer"]["rate"] for result in results]
            assert one["wer_of_seeds"] == each
            assert one["wer"] == pytest.approx(sum(each) / 2, abs=1e-2)
            for cell in cells:
                tune = read_yaml(cell / "config.yaml")
                rates = (tune["optim"]["lr"], tune["finetune"]["head_lr"])
                assert rates == ((4e-3, 1e-2) if name == "untrained" else (2e-3, 2e-2))
        assert table["options"]["untrained"] == ["optim.lr=4e-3", "finetune.head_lr=1e-2"]
        pre, un = row["weights"]["student"]["wer"], row["weights"]["untrained"]["wer"]
        assert row["gain"]["difference"] == pytest.approx(pre - un, abs=1e-2)
    text = (place / "ladder" / "ladder.md").read_text()
    assert text.count("\n| ") == 3
    page = (place / "ladder" / "ladder.html").read_text()
    (svg,) = re.findall(r"<svg.*?</svg>", page)
    assert len(ElementTree.fromstring(svg).findall("polyline")) == 4
    done.clear()
    assert ladder.main(words) == 0 and not done  # nothing is done twice
    with pytest.raises(UserError, match="was scored with other options"):
        ladder.main([*(word for word in words if word != "decode.beam=5"), "decode.beam=6"])


def scored(out: Path, weights: str, seed: int, hypotheses: list[str]) -> None:
    """An evaluation without speakers, of utterances in which A B is said."""
    folder = out / f"{weights}-all-seed{seed}" / "evaluate-test-none"
    folder.mkdir(parents=True)
    rows = [f"{i}\t\t1.00\t2\t0\tA B\t{text}" for i, text in enumerate(hypotheses)]
    (folder / "hypotheses.tsv").write_text("\n".join(["header", *rows]) + "\n")


def test_more_seeds_on_the_same_utterances_are_no_more_utterances(tmp_path: Path) -> None:
    hypotheses = ["A B", "A", "C D", "A B", "B B", "A B", "A C", "A B"]
    for out, seeds in (("one", 1), ("four", 4)):
        for seed in range(seeds):
            scored(tmp_path / out, "student", seed, hypotheses)
            scored(tmp_path / out, "untrained", seed, hypotheses[1:] + hypotheses[:1])
    (one,) = ladder.collect(tmp_path / "one", ladder.LadderConfig())
    (four,) = ladder.collect(tmp_path / "four", ladder.LadderConfig(seeds=4))
    assert one.gain == four.gain and one.gain is not None and one.gain.resampled == "utterances"
    intervals = [[(s.low, s.high, s.total.rate) for s in row.scores.values()] for row in (one, four)]
    assert intervals[0] == intervals[1] and intervals[0][0][0] < intervals[0][0][1]


def test_cells_of_other_utterances_are_not_compared(tmp_path: Path) -> None:
    scored(tmp_path, "student", 0, ["A B", "A"])
    scored(tmp_path, "untrained", 0, ["A B"])
    with pytest.raises(UserError, match="untrained-all-seed0/evaluate-test-none was scored on other utterances"):
        ladder.collect(tmp_path, ladder.LadderConfig())


def test_a_ladder_looks_for_its_search_before_it_trains(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "flashlight_missing", lambda with_lm: "ufal-kenlm is not installed")
    with pytest.raises(UserError, match="engine=flashlight: ufal-kenlm is not installed"):
        ladder.main([f"from={place}/pre", "labels=[6]", "lm=[2gram]", "decode.engine=flashlight"])
    (place / "lm.bin").write_bytes(b"mmap lm http://kheafield.com/code format version 5\n")
    with pytest.raises(UserError, match="binary format, which the built-in search cannot read"):
        ladder.main([f"from={place}/pre", "labels=[6]", f"lm=[{place}/lm.bin]"])
    assert not (place / "pre" / "ladder").exists()


def test_a_ladder_takes_its_member_of_a_joint_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("modality: [audio, toy]\nstage: pretrain\n")
    with pytest.raises(UserError, match="has no folder audio yet"):
        ladder.main([f"from={tmp_path}"])
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "config.yaml").write_text("modality: audio\npreset: strange\n")
    with pytest.raises(UserError, match="made for preset=strange and labels all"):
        ladder.main([f"from={tmp_path}"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs from=RUN"),
        (["from=nowhere"], "no config.yaml"),
        (["from=pre", "seed=3"], "sets seed of each cell itself"),
        (["from=pre", "lm=[none,4grams]"], "neither none"),
        (["from=pre", "untrained.seed=3"], "sets seed of each cell itself"),
        (["from=pre", "untrained.labels=[6]"], r"untrained.labels=\[6\]: this is the same for all cells"),
        (["from=pre", "teacher.optim.lr=1"], r"teacher.optim.lr=1, but weights=\['student', 'untrained'\] has no"),
        (["from=pre", "lm=[9gram]"], "lm=9gram: from 1gram to 6gram"),
        (["from=pre", "lm=[2gram]", "lexicon=nowhere.txt"], "lexicon=nowhere.txt does not exist"),
        (["from=pre", "seeds=0"], "seeds=0 must be at least 1"),
        (["from=pre", "weights=[studnt]"], "weights=studnt must be one of"),
        (["from=pre", "labels=[1h,1h]"], "each once"),
        (["from=pre", "data.path=train"], "no transcript among them"),
        (["from=pre", "data.path=untested.tsv"], "has no test part to score: train has 8 clips, dev has 3 clips. Name"),
    ],
)
def test_a_ladder_refuses(place: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str) -> None:
    monkeypatch.chdir(place)
    lines = (place / "table.tsv").read_text().splitlines(keepends=True)
    (place / "untested.tsv").write_text("".join(line for line in lines if not line.startswith("test/")))
    with pytest.raises(UserError, match=said):
        ladder.main([*words, "labels=[6]"] if not any(word.startswith("labels") for word in words) else words)
    assert not (place / "pre" / "ladder").exists()
