"""Every command of README and docs/ is typed, with five steps of a small network in place of those it names.

The paths that a reader would have of their own are made here, tiny: /my/speech is a folder of three clips, and so on.
docs/plugin.md is typed by test_pages_run.py, what `d2v new` writes by tests/core/test_new.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from PIL import Image

import d2v_core
from d2v_audio import ladder
from d2v_audio.synthetic import SyntheticSpeech
from d2v_core import cli, plugins

from .test_pages_run import blocks
from .test_readme import PLUGINS, commands

TRAIN = {"train.max_steps": "5", "train.log_every": "1", "train.num_workers": "0", "train.tensorboard": "false",
         "train.num_threads": "1", "train.precision": "fp32"}  # fmt: skip
NETWORK = {"model.embed_dim": "32", "model.num_layers": "2", "model.num_heads": "2", "target.top_k_layers": "2"}
DATA = {
    "audio": {"data.batch_s": "4", "data.micro_batch_s": "null", "data.min_s": "0.3", "data.synthetic_clips": "6"},
    "vision": {"data.batch": "8", "data.micro_batch": "null", "data.synthetic_images": "12"},
    "text": {"data.batch_tokens": "512", "data.micro_batch_tokens": "null", "data.grammar_documents": "30",
             "data.cache": "cache"},
}  # fmt: skip
TUNE = {"finetune.eval_every": "5", "finetune.head_steps": "5", "finetune.batch": "8"}
SEARCH = {"decode.engine": "builtin", "decode.beam": "5"}
OTHERWISE = {"labels=[10m,1h]": "labels=[4,6]", "labels=[10m]": "labels=[4]", "labels=[3m]": "labels=[4]",
             "labels=10m": "labels=6",
             "seeds=3": "seeds=1", "labels=10h": "labels=6", "decode.beam=500": "decode.beam=5",
             "vocab_size=16000": "vocab_size=280", "steps=5": "steps=1", "layers=[2,4]": "layers=[1,2]"}  # fmt: skip
TYPED_ELSEWHERE = {"docs/plugin.md"}  # by test_pages_run.py
VERBS = ("new",)


def elsewhere(page: str) -> bool:
    """Pages of plugins are for the plugins' own tests."""
    return page in TYPED_ELSEWHERE or page.startswith("plugins/")


def typed() -> list[tuple[str, ...]]:
    """Every command once, without the first word."""
    found = dict.fromkeys(tuple(words[1:]) for page, words in commands() if not elsewhere(page))
    return [words for words in found if words[0] not in VERBS and "seismic" not in " ".join(words)]


def write_speech(folder: Path, ending: str = "wav") -> None:
    """Clips in parts, and a table of what is said in them."""
    rows = ["file\ttranscript\tsplit\tspeaker"]
    for split, count in (("train", 8), ("dev", 3), ("test", 3)):
        (folder / split).mkdir(parents=True)
        for i in range(count):
            utterance = SyntheticSpeech(split, count)[i]
            sf.write(folder / split / f"{i}.{ending}", utterance.waveform, 16000)
            rows.append(f"{split}/{i}.{ending}\t{utterance.transcript}\t{split}\t{utterance.speaker}")
    (folder / "table.tsv").write_text("\n".join(rows) + "\n")


def write_librispeech(folder: Path) -> None:
    for part, count in (("train-clean-100", 8), ("dev-other", 3), ("test-clean", 3)):
        chapter = folder / part / "19" / "198"
        chapter.mkdir(parents=True)
        corpus = SyntheticSpeech("train", count)
        for i in range(count):
            sf.write(chapter / f"19-198-{i:04}.flac", corpus[i].waveform, 16000)
        lines = [f"19-198-{i:04} {corpus[i].transcript}" for i in range(count)]
        (chapter / "19-198.trans.txt").write_text("\n".join(lines) + "\n")


def write_images(place: Path) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (place / "ImageNet" / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / "ImageNet" / part / name / f"{i}.jpeg")
    shutil.copytree(place / "ImageNet" / "train", place / "photographs")
    (place / "cifar-10").mkdir()
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (place / "cifar-10" / name).write_bytes(rng.integers(0, 10, (16, 3073), dtype=np.uint8).tobytes())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with all that the commands name."""
    place = tmp_path_factory.mktemp("reader")
    before = Path.cwd()
    os.chdir(place)
    try:
        write_speech(place / "my" / "speech")
        for name in ("my/data", "an4", "librispeech_mini", "recordings"):
            shutil.copytree(place / "my" / "speech", place / name)
        (place / "an4" / "table.tsv").rename(place / "an4" / "an4.tsv")
        shutil.copytree(place / "my" / "speech", place / "my", dirs_exist_ok=True)
        for name in ("LibriSpeech", "transcribed", "other/speech"):
            write_librispeech(place / name)
        write_images(place)
        rng = np.random.default_rng(0)
        for name in ("high", "low"):
            (place / "my" / "labelled" / name).mkdir(parents=True)
            for i in range(12):
                sf.write(place / "my" / "labelled" / name / f"{i}.wav", 0.1 * rng.normal(size=16000), 16000)
        (place / "my" / "text").mkdir()
        lines = [
            f"the {word} sees a {other}." for word in ("sea", "ship", "bird") for other in ("cloud", "stone", "tree")
        ]
        (place / "my" / "text" / "a.txt").write_text("\n".join(lines * 8) + "\n")
        clip = SyntheticSpeech("test", 1)[0].waveform
        sf.write("speech.flac", clip, 16000)
        sf.write("speech.wav", clip, 16000)
        sf.write("talk.mp3", clip, 16000)
        for name in ("transcripts.txt", "train.txt"):
            Path(name).write_text("\n".join(SyntheticSpeech("train", 8)[i].transcript for i in range(8)) + "\n")
        type_it("lm", "train", "transcripts.txt", "order=2", "out=lm.arpa")
        type_it("tokenizer", "train", "my/text", "vocab_size=280", "out=made.json")
        pre = ("run", "modality=audio", "stage=pretrain", "train.probe=false", "features.stride=2")
        type_it(*shortened((*pre, "out=runs/pre", "data.path=/my/speech"), place))
        for name in ("my-run", "tiny", "small", "an4-pre"):
            shutil.copytree("runs/pre", f"runs/{name}")
        type_it(*shortened(("run", "modality=audio", "preset=base", "train.probe=false", "out=runs/my-base"), place))
        fine = ("run", "stage=finetune", "preset=ctc_tiny", "from=runs/pre", "data.path=/my/table.tsv", "out=runs/fine")
        type_it(*shortened(fine, place))
        shutil.copytree("runs/fine", "runs/other")
        for run in ("fine", "other"):
            type_it("evaluate", f"runs/{run}", "decode.engine=builtin")
        shutil.rmtree("runs/fine/evaluate-test")
        type_it(*shortened(("run", "modality=[audio,vision,text]", "out=runs/my-joint"), place))
        yield place
    finally:
        os.chdir(before)


def type_it(*words: str) -> None:
    assert cli.main(list(words)) == 0, " ".join(words)


def stage_of(words: Sequence[str]) -> str:
    return next((word.partition("=")[2] for word in words if word.startswith("stage=")), "pretrain")


def shortened(words: Sequence[str], place: Path) -> list[str]:
    """The command with the reader's paths where they lie here, of five steps, small."""
    words = [OTHERWISE.get(word, word) for word in words]
    words = [re.sub(r"(^|=|\[)/", rf"\1{place}/", word) for word in words]
    given = {word.partition("=")[0] for word in words}
    verb, stage, text = words[0], stage_of(words), " ".join(words)
    modality = next((name for name in DATA if f"modality={name}" in words), "audio")
    more: dict[str, str] = {}
    if verb == "run" and "modality=[" in text:
        members = re.search(r"modality=\[([a-z,]+)\]", text)[1].split(",")
        own = {f"{name}.{key}": value for name in members for key, value in DATA[name].items()}
        more |= {**TRAIN, **NETWORK, **own, "train.max_steps": "6", "train.probe": "false"}
    elif verb == "run" and {word.removeprefix("modality=") for word in words} & PLUGINS:
        more |= {**TRAIN, "train.probe": "false"}
    elif verb == "run" and stage in ("pretrain", "all"):
        more |= {**TRAIN, **NETWORK, **DATA[modality], "train.probe": "false"}
        if modality == "audio" and re.search(r"preset=(base|large)", text):
            more["features.channels"] = "32"
    elif verb == "run":
        more |= {**TRAIN, **(TUNE if stage == "finetune" else {"finetune.batch": "8"})}
        if "preset=ctc" in text or "preset=base_10h" in text:
            more |= {"data.batch_s": "6", "data.micro_batch_s": "null", "finetune.batch": "null"}
    elif verb in ("plan", "profile"):
        more |= {**NETWORK, **TRAIN, **{k: v for k, v in DATA[modality].items() if k != "data.micro_batch"}}
        if modality == "audio":
            more["features.channels"] = "32"
    elif verb == "ladder":
        more |= {**TRAIN, **TUNE, **SEARCH, "finetune.batch": "null", "data.batch_s": "6"}
        if "preset=ctc_built_in" in words:
            more["labelled.synthetic_clips"] = "32"
    elif (verb == "evaluate" and "lm=" in text) or (verb == "transcribe" and "lm=" in text):
        more |= SEARCH
    elif verb == "ctc-probe":
        more |= {"steps": "5"}
    return [*words, *(f"{key}={value}" for key, value in more.items() if key not in given)]


def tidied(words: Sequence[str]) -> None:
    """Remove what a command before this one has written where this one writes."""
    for word in words:
        key, _, value = word.partition("=")
        if key == "out" and Path(value).exists():
            assert ".." not in value and not Path(value).is_absolute()
            shutil.rmtree(value) if Path(value).is_dir() else Path(value).unlink()
    run = Path(words[1]) if len(words) > 1 else Path("none")
    if words[0] in ("evaluate", "ladder") or "ladder" in words[0]:
        for folder in (*run.glob("evaluate-*"), *Path("runs").glob("*/ladder")):
            if "other" not in folder.parts:
                shutil.rmtree(folder)


@pytest.mark.parametrize("words", typed(), ids=lambda words: " ".join(words).replace("/", "|"))
def test_a_command_runs(
    place: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {word.partition("=")[2] for word in words if word.startswith(("modality=", "encoder="))} | {*words[1:2]}
    for name in sorted(named & PLUGINS - {*plugins.names(), *plugins.names(plugins.ENCODERS)}):
        pytest.skip(f"plugins/{name} is not installed: pip install ./plugins/{name}")
    monkeypatch.chdir(place)
    real = ladder.ladder

    def short(config: ladder.LadderConfig, rest: Sequence[str]) -> int:
        keys = {word.partition("=")[0] for word in rest}
        more = {**TRAIN, **TUNE, "finetune.batch": "null", "data.batch_s": "6"}
        config.decode.beam, config.decode.engine = 5, "builtin"
        return real(config, [*rest, *(f"{key}={value}" for key, value in more.items() if key not in keys)])

    if stage_of(words) == "all":  # its second half has options of its own
        monkeypatch.setattr(ladder, "ladder", short)
    if "data.tokenizer=tokenizer.json" in words and not Path("tokenizer.json").exists():
        shutil.copyfile("made.json", "tokenizer.json")
    for out in {"out=runs/small", "out=runs/an4-pre"} & set(words):  # runs of these names are there for others
        words = tuple(f"{out}-again" if word == out else word for word in words)
    full = shortened(words, place)
    tidied(full)
    status = cli.main(full)
    printed = capsys.readouterr()
    assert status == 0, " ".join(full) + "\n" + printed.out + printed.err


def test_the_page_on_features(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first command, then its Python, block after block."""
    monkeypatch.chdir(place)
    shutil.rmtree("runs/my-run/features", ignore_errors=True)
    type_it("encode", "runs/my-run", f"{place}/my/data")
    names: dict = {}
    for block in blocks("features.md", "python"):
        exec(compile(block.replace('"/my/', f'"{place}/my/'), "features.md", "exec"), names)
    assert len(names["arrays"]) == 14 and all(array.shape[0] == 3 for array in names["arrays"].values())
    assert len(names["layers"]) == 3 and names["done"].num_new == 14 and not names["done"].left_out
    rows = [json.loads(line) for line in Path("pooled/index.jsonl").read_text().splitlines()]
    loaded = d2v_core.load("runs/my-run")
    alone = loaded.encode(place / "my" / "data" / rows[0]["id"])[-1].mean(0)
    np.testing.assert_allclose(np.load(Path("pooled") / rows[0]["file"])[0], alone, atol=1e-4)


def test_no_command_is_passed_over() -> None:
    left = {tuple(words[1:]) for page, words in commands() if not elsewhere(page)} - set(typed())
    assert left == {("new", "seismic"), ("check", "seismic"), ("run", "modality=seismic")}
    assert len(typed()) > 40
