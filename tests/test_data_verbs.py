"""`d2v data shard` and `d2v data scan` with each modality, and training on tars: the batches are those of the files."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from d2v_core import cli
from d2v_core.batching import StepLoader
from d2v_core.config import load_config
from d2v_core.contract import Batch, Modality
from d2v_core.errors import UserError
from d2v_text.files import Reader
from d2v_text.tokenizer import train_tokenizer

from .runs import SHORT, SMALL, metrics, same, weights

Make = Callable[[Path], list[str]]


@pytest.fixture(autouse=True)
def own_cache(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(own_folder / "cache"))


def sounds(folder: Path) -> list[str]:
    """Of several formats, rates and numbers of channels, one too short and one broken. Options of a run on them."""
    rng = np.random.default_rng(0)
    names = ["a/1.wav", "a/1.flac", "b/c/2.ogg", "b/3.mp3", "4.with.dots.wav", "5.aiff", "short.wav", "6.flac", "7.wav"]
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rate, channels = (16000, 1) if number % 3 else (22050, 2)
        length = 800 if name == "short.wav" else 12000 + 1000 * number
        soundfile.write(folder / name, 0.1 * rng.standard_normal((length, channels)), rate)
    broken = (folder / "7.wav").read_bytes()
    (folder / "8.wav").write_bytes(broken[:-5000])
    return [
        "modality=audio",
        "preset=tiny",
        "data.min_s=0.5",
        "data.batch_s=4",
        "data.micro_batch_s=2",
        "data.max_bad_ratio=0.2",
    ]


def pictures(folder: Path) -> list[str]:
    rng = np.random.default_rng(0)
    for number in range(17):
        path = folder / "train" / f"class{number % 3}" / f"{number}.{('png', 'jpg', 'bmp', 'gif')[number % 4]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:200])
    return ["modality=vision", "preset=tiny1", "data.batch=6", "data.micro_batch=3", "data.max_bad_ratio=0.2"]


def texts(folder: Path) -> list[str]:
    """Documents behind empty lines and in records, a line that is no UTF-8, marks of byte order, no newline at last."""
    rng = np.random.default_rng(0)
    words = ["".join(map(chr, rng.integers(97, 123, n))) for n in rng.integers(2, 9, 60)]

    def sentence() -> str:
        return " ".join(rng.choice(words, rng.integers(3, 12)))

    folder.mkdir(parents=True, exist_ok=True)
    documents = ["\n".join(sentence() for _ in range(rng.integers(1, 5))) for _ in range(60)]
    documents[7] = "\ufeff" + documents[7]
    plain = "\ufeff" + "\n \n".join(documents[:30]) + "\n\n\n" + "\n\n".join(documents[30:])
    (folder / "b.txt").write_bytes(plain.encode() + b"\nbroken \xff\xfe line\n\nlast")
    (folder / "sub").mkdir()
    records = [json.dumps({"text": document}) for document in documents[:20]]
    (folder / "sub" / "c.jsonl").write_text("\n".join(records) + "\n\nno json\n")
    (folder / "a.txt").write_text(documents[0])
    tokenizer = folder.parent / "tokenizer.json"
    if not tokenizer.is_file():
        train_tokenizer(documents, 300).save(str(tokenizer))
    return [
        "modality=text", "preset=tiny", f"data.tokenizer={tokenizer}", "data.batch_tokens=600",
        "data.micro_batch_tokens=200", "data.block_tokens=64", "data.max_bad_ratio=0.5",
    ]  # fmt: skip


MAKE: dict[str, Make] = {"audio": sounds, "vision": pictures, "text": texts}
SIZE = {sounds: 60_000, pictures: 25_000, texts: 8000}  # bytes of a tar
by_modality = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE.keys())


def first_steps(words: list[str], path: str | Path, workers: int = 0, epoch: int = 0, step: int = 0) -> list[Batch]:
    """The micro-batches of two epochs from a place on."""
    config, kind = load_config([*words, f"data.path={path}"])
    modality: Modality[Any] = kind(config)
    loader = StepLoader(
        modality, modality.dataset("train"), seed=3, num_copies=2, num_workers=workers, epoch=epoch, step=step
    )
    found: list[Batch] = []
    steps = iter(loader)
    try:
        for _ in range(max(2 * loader.steps_per_epoch, 3)):
            found += next(steps)[2]
    finally:
        steps.close()
    return found


def equal_batches(a: list[Batch], b: list[Batch]) -> bool:
    def whole(batch: Batch) -> Any:
        return batch.ids, [name for name, _ in batch.skipped]

    return (
        len(a) == len(b)
        and [whole(one) for one in a] == [whole(one) for one in b]
        and all(same(one.inputs, other.inputs) for one, other in zip(a, b, strict=True))
        and all(torch.equal(x.masks.hidden, y.masks.hidden) for x, y in zip(a, b, strict=True) if x.masks and y.masks)
    )


def sharded(make: Make, folder: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], Path]:
    """Files and tars of about `size` bytes. The verb counts in megabytes, which is more than a test wants to write."""
    words = make(folder / "files")
    monkeypatch.setattr("d2v_core.data_verbs.write_shards", _smaller(size))
    monkeypatch.setattr("d2v_text.files.PART_BYTES", size // 8)
    assert cli.main(["data", "shard", *words, f"data.path={folder / 'files'}", f"out={folder / 'tars'}"]) == 0
    assert len(list((folder / "tars").glob("*.tar"))) > 2
    return words, folder / "tars"


def _smaller(size: int) -> Any:
    from d2v_core.sharding import write_shards

    return lambda inventory, out, modality, _: write_shards(inventory, out, modality, size)


@by_modality
def test_batches_of_tars_are_those_of_files(make: Make, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, tars = sharded(make, own_folder, SIZE[make], monkeypatch)
    from_files = first_steps(words, own_folder / "files")
    assert len({batch.ids for batch in from_files}) > 3
    assert equal_batches(first_steps(words, tars), from_files)
    assert not equal_batches(from_files[1:], from_files[:-1])
    shutil.rmtree(own_folder / "files")
    assert equal_batches(first_steps(words, tars, workers=int(make is not sounds)), from_files)
    for index in tars.glob("*.jsonl"):  # as other programs leave tars, but for the list of them
        index.unlink()
    assert equal_batches(first_steps(words, tars), from_files)


@by_modality
def test_a_run_on_tars_is_the_run_on_files_also_when_it_is_resumed(
    make: Make, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, tars = sharded(make, own_folder, SIZE[make], monkeypatch)
    size = {} if make is pictures else SMALL
    options = {**SHORT, **size, "train.max_steps": "6", "train.checkpoint_every": "2"}
    given = ["run", "stage=pretrain", *words, *(f"{key}={value}" for key, value in options.items())]
    for out, path in (("a", own_folder / "files"), ("b", tars)):
        assert cli.main([*given, f"out={out}", f"data.path={path}"]) == 0
    assert metrics("a") == metrics("b") and same(weights("a"), weights("b"))
    shutil.copytree("b", "c")
    shutil.rmtree("c/checkpoints/step-00000006")  # in the middle of an epoch, and so of the tars
    (Path("c") / "summary.json").unlink()
    assert cli.main([*given, "out=c", f"data.path={tars}", "resume=auto"]) == 0
    assert same(weights("a"), weights("c"))


@pytest.mark.parametrize("make", [sounds, pictures])
def test_shard_by_shard(make: Make, own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, tars = sharded(make, own_folder, 20_000, monkeypatch)
    words += ["data.order=shards", "data.open_shards=1"]
    batches = first_steps(words, tars)
    assert equal_batches(first_steps(words, tars, workers=int(make is not sounds)), batches)
    later = first_steps(words, tars, step=1)  # in the middle of a tar
    assert equal_batches(later[:2], batches[2:4]) and batches[2].ids != batches[0].ids
    with pytest.raises(UserError, match=r"data\.order=shards is for tars"):
        first_steps(words, own_folder / "files")


def test_tars_of_other_programs_train(own_folder: Path) -> None:
    words = sounds(own_folder / "files")
    for number, names in enumerate((["a", "b"], ["4.with.dots.wav", "5.aiff", "6.flac", "short.wav"])):
        with tarfile.open(own_folder / f"{number}.tar", "w") as tar:
            for name in names:
                tar.add(own_folder / "files" / name, name)
    given = f"{own_folder}/{{0..1}}.tar"
    config, kind = load_config([*words, f"data.path={given}"])
    dataset: Any = kind(config).dataset("train")
    assert "1 dropped as shorter than" in dataset.describe() and "headers of 2 tars" in dataset.describe()
    assert {batch.ids[0] for batch in first_steps(words, given)} <= {clip.id for clip in dataset.clips}
    assert {clip.id for clip in dataset.clips} == {
        "0.tar/a/1.wav", "0.tar/a/1.flac", "0.tar/b/c/2.ogg", "0.tar/b/3.mp3", "1.tar/4.with.dots.wav", "1.tar/5.aiff",
        "1.tar/6.flac",
    }  # fmt: skip


def test_a_truncated_tar_stops_a_run(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, tars = sharded(pictures, own_folder, SIZE[pictures], monkeypatch)
    (tar, *_) = sorted(tars.glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-12_000])  # a tar ends with up to 10 kB of nothing
    with pytest.raises(UserError, match="it is truncated or another"):
        first_steps(words, tars)
    for index in tars.glob("*.jsonl"):
        index.unlink()
    with pytest.raises(UserError, match=r"vision-000000\.tar cannot be used: truncated: "):
        first_steps(words, tars)


@by_modality
def test_labelled_stages_say_that_they_read_files(
    make: Make, own_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, tars = sharded(make, own_folder, SIZE[make], monkeypatch)
    assert cli.main(["run", "stage=pretrain", *words, *(f"{k}={v}" for k, v in SHORT.items()), "out=run",
                     f"data.path={tars}"]) == 0  # fmt: skip
    config, kind = load_config(["stage=probe", "from=run", f"data.path={tars}"])
    with pytest.raises(UserError, match="tars are read by stage=pretrain alone"):
        kind(config).task()


# -------------------------------------------------------------------------------------------------------------- scan


def scan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    capsys.readouterr()
    status = cli.main(["data", "scan", *words, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_scan_of_sound(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = sounds(own_folder / "files")
    shutil.copy(own_folder / "files/6.flac", own_folder / "files/again.flac")
    status, found = scan(capsys, *words, f"data.path={own_folder / 'files'}")
    assert status == 1 and found["samples"] == 10
    assert found["duplicates"] == [["6.flac", "again.flac"]]
    assert [name for name, _ in found["bad"]] == ["8.wav"] and "truncated" in found["bad"][0][1]
    assert found["kinds"]["rate"] == {"16000": 7, "22050": 3} and found["kinds"]["channels"] == {"1": 7, "2": 3}
    assert sum(found["counts"]) == 10 and len(found["edges"]) == 11 and found["percentiles"]["0"] == 0.036
    assert cli.main(["data", "scan", *words, f"data.path={own_folder / 'files'}"]) == 1
    text = capsys.readouterr().out
    assert "1 broken:\n  8.wav: truncated" in text and "rate: 16000 7, 22050 3" in text and "again.flac" in text
    (own_folder / "files/8.wav").unlink()
    assert scan(capsys, *words, f"data.path={own_folder / 'files'}")[0] == 0


def test_scan_of_images(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = pictures(own_folder / "files")
    status, found = scan(capsys, *words, f"data.path={own_folder / 'files'}")
    assert status == 1 and (found["samples"], found["total"]) == (16, "16 images")
    assert found["kinds"]["width"] == {"50": 16} and found["kinds"]["height"]["least"] == 40
    assert found["kinds"]["format"] == {"JPEG": 4, "PNG": 4, "BMP": 4, "GIF": 4}
    assert found["num_bytes"] == sum(
        path.stat().st_size for path in (own_folder / "files").rglob("*.*") if path.name != "16.png"
    )


def test_scan_of_text(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = texts(own_folder / "files")
    plain = [word for word in words if "tokenizer" not in word]
    status, found = scan(capsys, *plain, f"data.path={own_folder / 'files'}")
    # 60 documents and "last" in b.txt, of which the one with a mark is never parted from that before; 20 records; a.txt
    assert status == 1 and found["samples"] == 81 and found["unit"] == "words"
    assert sorted(reason.split(" (")[0] for _, reason in found["bad"]) == ["no JSON", "no UTF-8"]
    status, in_tokens = scan(capsys, *words, f"data.path={own_folder / 'files'}")
    config, kind = load_config([*words, f"data.path={own_folder / 'files'}", "data.break_mode=none"])
    ends = sum(1 for path in ("a.txt", "b.txt", "sub/c.jsonl") for line in Reader("text").lines(
        own_folder / "files" / path) if line)  # fmt: skip
    dataset: Any = kind(config).dataset("train")
    assert f"81 documents, {int(dataset.lengths.sum()) - ends} tokens" == in_tokens["total"]


def test_scan_of_tars_finds_a_flipped_bit(
    own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, tars = sharded(texts, own_folder, SIZE[texts], monkeypatch)
    clean = scan(capsys, *words, f"data.path={tars}")[1]["bad"]
    (tar, *_) = sorted(tars.glob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    status, found = scan(capsys, *words, f"data.path={tars}")
    assert status == 1 and [name for name, _ in found["bad"] if [name, _] not in clean] == [tar.name]


def test_what_the_verbs_refuse(own_folder: Path, d2v: Callable[..., tuple[int, str]]) -> None:
    words = sounds(own_folder / "files")
    path = f"data.path={own_folder / 'files'}"
    assert d2v("data", "--help")[0] == 0
    for given, answer in (
        (("data", "show"), "has the verbs scan and shard"),
        (("data", "scan", "modality=audio"), "data.path is missing"),
        (("data", "shard", *words, path), "needs out=FOLDER"),
        (("data", "shard", *words, path, "out=x", "shard_mb=0"), "must be at least 1"),
        (("data", "shard", *words[:3], path, "out=x"), "1 of 10 files (10.0%) are unreadable"),
        (("data", "shard", *words, path, f"out={own_folder / 'files'}"), "nothing there is overwritten"),
        (("data", "scan", "modality=vision", path), "no images in"),
        (("data", "scan", *words, path, "data.also=[more]"), "is data.path alone. Leave them out"),
        (("data", "shard", *words, path, "data.repeat=[2]", "out=x"), "is data.path alone. Leave them out"),
    ):
        status, said = d2v(*given)
        assert status == 2 and answer in said, said
    assert not (own_folder / "x").exists()
