"""Damaged files by the thousand, read in a process of their own.

`python -m tests.fuzzing FOLDER SEED READER:FIRST:LAST ...` reads mutants of each reader's samples by number, and writes
a line of JSON before and after each. `fuzz` starts it, watches it, and starts it anew behind an input that killed it or
took too long. A mutant is a function of (reader, seed, number): every finding can be made again.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tarfile
import textwrap
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

LIMIT_S = 20.0  # of one input
START_S = 120.0  # until a process has read what is not damaged
LIMIT_MB = 256  # by which the process may grow over one input
ADDRESS_SPACE_MB = 3000  # on top of what the process has when it begins


class Wrong(Exception):
    """What a reader did with a damaged file is not what it should."""


@dataclass(frozen=True)
class Fuzzed:
    """samples: whole files by name. read: of a file, anything but an exception of `refusals` or a result is a finding.
    whole: what a file gives, where a truncated one has to give the same or be refused."""

    samples: Callable[[], Mapping[str, bytes]]
    read: Callable[[Path], Any]
    refusals: Callable[[], tuple[type[BaseException], ...]]
    whole: Callable[[Any, Any], bool] | None = None
    extra: Callable[[], Mapping[str, bytes]] = dict


# ---------------------------------------------------------------------------------------------------------- mutants

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)


def mutated(data: bytes, rng: np.random.Generator) -> tuple[bytes, bool]:
    """(bytes, whether they are merely the beginning of what was given)."""
    kind = int(rng.integers(8))
    if kind == 0:
        return data[: int(rng.integers(len(data)))], True
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 5))):
        size = max(1, len(changed))
        # Half of the changes hit the header, of which files have little and readers do most with.
        at = int(rng.integers(min(size, 128) if rng.random() < 0.5 else size))
        if kind == 1:
            changed[at : at + 1] = bytes([(changed[at] if changed else 0) ^ (1 << int(rng.integers(8)))])
        elif kind == 2:
            changed[at : at + 1] = rng.bytes(1)
        elif kind == 3:
            changed[at:at] = rng.bytes(int(rng.integers(1, 40)))
        elif kind == 4:
            del changed[at : at + int(rng.integers(1, 40))]
        elif kind == 5:
            width = int(rng.choice([1, 2, 4, 8]))
            value = EXTREMES[int(rng.integers(len(EXTREMES)))] & (256**width - 1)
            changed[at : at + width] = value.to_bytes(width, ("big", "little")[int(rng.integers(2))])
        elif kind == 6:
            other = int(rng.integers(size))
            changed[at:at] = changed[other : other + int(rng.integers(1, 200))]
        else:
            changed[at : at + int(rng.integers(1, 60))] = bytes(int(rng.integers(1, 60)))
    return bytes(changed), False


class _Evil:
    """What its pickle does where it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ran",)


PICKLE = pickle.dumps(_Evil())  # takes the place of each sample once


# ---------------------------------------------------------------------------------------------------------- readers


def _sounds() -> dict[str, bytes]:
    import soundfile

    made: dict[str, bytes] = {}
    rng = np.random.default_rng(0)
    forms = (
        ("wav", "WAV", "PCM_16", 1, 16000), ("float.wav", "WAV", "FLOAT", 1, 16000),
        ("24.wav", "WAVEX", "PCM_24", 2, 8000), ("ulaw.wav", "WAV", "ULAW", 1, 8000),
        ("rf64.wav", "RF64", "PCM_16", 1, 16000), ("aiff", "AIFF", "PCM_16", 2, 22050),
        ("flac", "FLAC", "PCM_16", 1, 16000), ("stereo.flac", "FLAC", "PCM_24", 2, 44100),
        ("ogg", "OGG", "VORBIS", 1, 16000), ("opus", "OGG", "OPUS", 1, 16000),
        ("mp3", "MP3", "MPEG_LAYER_III", 1, 16000),
    )  # fmt: skip
    for name, form, subtype, channels, rate in forms:
        stream = io.BytesIO()
        x = 0.2 * rng.standard_normal((1600, channels))
        soundfile.write(stream, x, rate, format=form, subtype=subtype)
        made[f"a.{name}"] = stream.getvalue()
    return made


def _read_sound(path: Path) -> Any:
    from d2v_audio import files

    clip = files._probe(files._Entry(path.name, path), 16000)
    if isinstance(clip, files.BadClip):
        raise clip
    x = files.read(clip, 16000)
    if x.shape != (clip.num_samples,) or x.dtype != np.float32 or not np.isfinite(x).all():
        raise Wrong(f"{clip.num_samples} samples promised, {x.shape} {x.dtype} read")
    return x


def _sound_bombs() -> dict[str, bytes]:
    """Headers that promise two thousand million samples."""
    wav = _sounds()["a.wav"]
    big = (2**31 - 2).to_bytes(4, "little")
    at = wav.index(b"data") + 4
    flac = bytearray(_sounds()["a.flac"])
    flac[21:26] = bytes([flac[21] | 0x0F]) + b"\xff" * 4  # the number of samples in STREAMINFO has 36 bits
    rates = {f"rate{rate}.wav": wav[:24] + rate.to_bytes(4, "little") + wav[28:] for rate in (1, 999, 10**6, 2**32 - 1)}
    return {"big.wav": wav[:4] + big + wav[8:at] + big + wav[at + 4 :], "big.flac": bytes(flac), **rates}


def _pictures() -> dict[str, bytes]:
    from PIL import Image

    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (12, 9), dtype=np.uint16))
    forms: tuple[tuple[str, Image.Image, dict[str, Any]], ...] = (
        ("a.png", rgb, {}), ("p.png", rgb.convert("P"), {}), ("la.png", rgb.convert("LA"), {}), ("16.png", deep, {}),
        ("a.jpg", rgb, {}), ("prog.jpg", rgb, {"progressive": True}), ("cmyk.jpg", rgb.convert("CMYK"), {}),
        ("a.gif", rgb.convert("P"), {}), ("a.bmp", rgb, {}), ("1.bmp", rgb.convert("1"), {}), ("a.webp", rgb, {}),
        ("ll.webp", rgb, {"lossless": True}), ("a.tif", rgb, {}), ("lzw.tif", rgb, {"compression": "tiff_lzw"}),
        ("def.tif", rgb, {"compression": "tiff_adobe_deflate"}), ("jpeg.tif", rgb, {"compression": "jpeg"}),
        ("a.ppm", rgb, {}), ("a.pgm", rgb.convert("L"), {}),
    )  # fmt: skip
    made: dict[str, bytes] = {}
    for name, image, options in forms:
        stream = io.BytesIO()
        kind = {"jpg": "JPEG", "tif": "TIFF", "pgm": "PPM"}.get(name.split(".")[-1], name.split(".")[-1].upper())
        image.save(stream, kind, **options)
        made[name] = stream.getvalue()
    return made


def _read_picture(path: Path) -> Any:
    from d2v_core.sources import Source
    from d2v_vision import files

    files.facts(Source(path))
    pixels = files.read(files.ImageFile(path, path.name), 1 << 20)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or pixels.size > 3 << 20:
        raise Wrong(f"{pixels.shape} {pixels.dtype}")
    return pixels


def _picture_bombs() -> dict[str, bytes]:
    """100,000 x 100,000 pixels, and text chunks that unpack to more than there is."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    def png(width: int, *chunks: bytes) -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, width, 8, 2, 0, 0, 0))
        body = chunk(b"IDAT", zlib.compress(bytes(1000)))
        return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + body + chunk(b"IEND", b"")

    bmp = _pictures()["a.bmp"]
    side = (100_000).to_bytes(4, "little")
    zeros = zlib.compress(bytes(1 << 28))
    return {
        "big.png": png(100_000),
        "ztxt.png": png(10, *[chunk(b"zTXt", b"a\0\0" + zeros)] * 4),
        "iccp.png": png(10, chunk(b"iCCP", b"a\0\0" + zeros)),
        "big.bmp": bmp[:18] + side + side + bmp[26:],
        "big.gif": b"GIF89a\xff\xff\xff\xff" + _pictures()["a.gif"][10:],
        "big.ppm": b"P6 100000 100000 255\n" + bytes(100),
        "many.ppm": b"P3 2 2 255\n" + b"1" * (1 << 20),
    }


def _arrays() -> dict[str, bytes]:
    import lzma

    rng = np.random.default_rng(0)
    idx = bytes([0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 5, 0, 0, 0, 4]) + rng.bytes(60)
    cifar = b"".join(bytes([i]) + rng.bytes(3072) for i in range(2))
    return {
        "a-images-idx3-ubyte": idx, "b-images-idx3-ubyte.gz": gzip.compress(idx, mtime=0), "data_batch_1.bin": cifar,
        "c.bin.xz": lzma.compress(cifar),
    }  # fmt: skip


def _read_array(path: Path) -> Any:
    from d2v_vision.files import read_records

    arrays = read_records(path, None)
    if arrays.pixels.dtype != np.uint8 or len(arrays.pixels) < 1:
        raise Wrong(f"{arrays.pixels.shape}")
    return arrays.pixels


def _texts() -> dict[str, bytes]:
    lines = "Ein Satz.\nNoch einer, länger als der erste.\n\n  \n中文 text\nend"
    records = "\n".join(json.dumps({"text": line, "n": [1, {"a": None}]}) for line in lines.split("\n"))
    return {"a.txt": lines.encode(), "b.jsonl": records.encode(), "c.txt": b"\xef\xbb\xbf" + lines.encode()}


def _read_text(path: Path) -> Any:
    from d2v_core.sources import Source
    from d2v_text.files import RECORD_EXTENSIONS, Reader, _parts

    reader = Reader("text")
    lines = list(reader.lines(path))
    if any("\n" in line for line in lines) or reader.num_bad > reader.num_lines:
        raise Wrong(f"{reader}")
    for least in (0, 7):  # in parts, it is read as it is read as a whole
        parts = [list(reader.lines(part.source)) for part in _parts(Source(path), path.parent, least)]
        if [line for part in parts for line in part if line] != [line for line in lines if line]:
            raise Wrong(f"in parts of {least} bytes it is another text: {parts}")
        records = path.suffix in RECORD_EXTENSIONS
        if not records and _documents([line for part in parts for line in part]) != _documents(lines):
            raise Wrong(f"in parts of {least} bytes it has other documents")
    return lines


def _documents(lines: list[str]) -> list[str]:
    return [text.strip("\n") for text in "\n".join(lines).split("\n\n") if text.strip()]


def _text_bombs() -> dict[str, bytes]:
    return {
        "deep.jsonl": b'{"text": ' + b"[" * 10**6 + b"]" * 10**6 + b"}",
        "number.jsonl": b'{"text": ' + b"9" * 10**6 + b"}",
        "line.txt": b"x" * (5 << 20),
        "empty.txt": b"\n" * (1 << 13),
    }


def _tables() -> dict[str, bytes]:
    return {
        "a.tsv": b"file\tsplit\ttranscript\na/1.wav\ttrain\tHELLO\na/2.wav\tdev\tWORLD\n\n",
        "m.tsv": b".\na/1.wav\t1600\na/2.wav\t1600\n",
        "d.tsv": b"a\n1.wav\t1600\n2.wav\t1600\n",
    }


def _read_table(path: Path) -> Any:
    from d2v_audio.files import _entries, scan

    for name in ("1.wav", "2.wav"):
        (path.parent / "a").mkdir(exist_ok=True)
        if not (path.parent / "a" / name).is_file():
            (path.parent / "a" / name).write_bytes(_sounds()["a.wav"])
    root = path.read_bytes().split(b"\n")[0].removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    for entry in _entries(path, None):
        inside = path.parent if "\t" in root or root == "file" else path.parent / root
        if not Path(os.path.normpath(entry.path)).is_relative_to(os.path.normpath(inside)):
            raise Wrong(f"{entry.path} lies outside of {inside}")
    return len(scan(path, max_bad_ratio=1.0).clips)


def _table_bombs() -> dict[str, bytes]:
    return {
        "up.tsv": b"file\n../../etc/passwd\n", "root.tsv": b"file\n/etc/passwd\n", "null.tsv": b"file\na\0b.wav\n",
        "long.tsv": b"file\n" + b"a" * 10**6 + b"\n", "up2.tsv": b".\na/../../x.wav\t1600\n", "dev.tsv": b"file\na\n",
    }  # fmt: skip


def _configs() -> dict[str, bytes]:
    short = """
        modality: text
        preset: tiny
        encoder: ''  # a remark
        seed: 3
        data: {path: null, batch_tokens: 4096, block_tokens: 64, cache: ~, break_mode: "document"}
        model:
          embed_dim: 64
          num_layers: 2
          num_heads: 4
          dropout: 0.1
        target: {top_k_layers: 2}
        optim: {lr: 1.0e-3, betas: [0.9, 0.98]}
    """
    return {"config.yaml": textwrap.dedent(short).replace("''", "embedding").encode()}


def _read_config(path: Path) -> Any:
    from d2v_core import plugins
    from d2v_core.config import from_dict, read_yaml

    kind = plugins.load("text")
    return kind(from_dict(read_yaml(path), kind, str(path))).config


def _config_bombs() -> dict[str, bytes]:
    laughs = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(12)
    )
    whole = _configs()["config.yaml"]
    return {
        "laughs.yaml": laughs.encode(), "deep.yaml": b"a: " + b"[" * 20000, "merge.yaml": b"a: &a\n  <<: *a\n",
        "run.yaml": b"seed: !!python/object/apply:os.system ['touch " + b"ran']\n",
        "new.yaml": b"!!python/object/new:os.system ['touch ran']\n",
        "env.yaml": whole.replace(b"preset: tiny", b"preset: ${oc.env:HOME}"),
        "self.yaml": whole.replace(b"seed: 3", b"seed: ${seed}"), "tab.yaml": b"\t", "nul.yaml": b"a: \0",
        "list.yaml": b"- 1\n", "int.yaml": b"7", "dup.yaml": b"a: 1\na: 2\n", "keys.yaml": b"{[1]: 2, {a: b}: 3}\n",
    }  # fmt: skip


def _checkpoints() -> dict[str, bytes]:
    """All files of a checkpoint in one, which `_read_checkpoint` takes apart again."""
    import torch

    from d2v_core import checkpoint

    torch.manual_seed(0)
    tensors = {"a.weight": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(2).bfloat16()}
    state = {"optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.98)}]}}
    root = Path(os.environ["FUZZ_FOLDER"]) / "seed"
    folder = checkpoint.save(root, 3, checkpoint.Checkpoint(tensors, {"a": torch.randn(2)}, state), 1)
    return {f"{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}


def _read_checkpoint(path: Path) -> Any:
    from d2v_core import checkpoint

    root = Path(os.environ["FUZZ_FOLDER"])
    folder = root / "step-00000003"
    if not folder.is_dir():
        shutil.copytree(root / "seed" / "step-00000003", folder)
    name = path.name.split("-", 1)[1]
    good = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(path.read_bytes())
        checkpoint.load(folder)
        if path.read_bytes() != good:
            raise Wrong("it is another and was loaded")
    finally:
        (folder / name).write_bytes(good)
    return 0


def _tokenizers() -> dict[str, bytes]:
    from d2v_text.tokenizer import train_tokenizer

    return {"tokenizer.json": train_tokenizer(["hello world", "hello there"], 270).to_str().encode()}


def _read_tokenizer(path: Path) -> Any:
    from d2v_text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    return tokenizer.encode(["hello", "wörld <mask>"])


def _tars() -> dict[str, bytes]:
    made: dict[str, bytes] = {}
    sound = _sounds()["a.flac"]
    for name, form in (
        ("ustar.tar", tarfile.USTAR_FORMAT),
        ("gnu.tar", tarfile.GNU_FORMAT),
        ("pax.tar", tarfile.PAX_FORMAT),
    ):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
            for member in ("a/1.flac", "2.flac", *(["long" * 40 + "/3.flac"] if form != tarfile.USTAR_FORMAT else [])):
                header = tarfile.TarInfo(member)
                header.size = len(sound)
                tar.addfile(header, io.BytesIO(sound))
        made[name] = stream.getvalue()
    return made


def _read_tar(path: Path) -> Any:
    from d2v_audio.files import read, scan

    report = scan(path, max_bad_ratio=1.0, decode_hours=1.0)
    for clip in report.clips:
        if clip.id.startswith("/") or ".." in clip.id.split("/"):
            raise Wrong(clip.id)
        read(clip, 16000)
    return [clip.id.partition("/")[2] for clip in report.clips]


def _indices() -> dict[str, bytes]:
    from d2v_audio.data import AudioConfig, inventory
    from d2v_core.sharding import write_shards

    folder = Path(os.environ["FUZZ_FOLDER"])
    (folder / "files").mkdir(exist_ok=True)
    for name in ("1.flac", "2.flac"):
        (folder / "files" / name).write_bytes(_sounds()["a.flac"])
    if not (folder / "tars").is_dir():
        write_shards(
            inventory(AudioConfig(path=str(folder / "files"))), folder / "tars", "audio", 10**6, lambda line: None
        )
    return {path.name: path.read_bytes() for path in (folder / "tars").glob("*.json*")}


def _read_index(path: Path) -> Any:
    from d2v_audio.files import scan

    folder = Path(os.environ["FUZZ_FOLDER"]) / "tars"
    name = path.name.split("-", 1)[1]
    good = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(path.read_bytes())
        return len(scan(folder).clips)
    finally:
        (folder / name).write_bytes(good)


def _bad_clip() -> tuple[type[BaseException], ...]:
    from d2v_audio.files import BadClip

    return (BadClip,)


def _bad_image() -> tuple[type[BaseException], ...]:
    from d2v_vision.files import BadImage

    return (BadImage,)


def _user_error() -> tuple[type[BaseException], ...]:
    from d2v_core.errors import UserError

    return (UserError,)


READERS: dict[str, Fuzzed] = {
    "sound": Fuzzed(_sounds, _read_sound, _bad_clip, np.array_equal, _sound_bombs),
    "image": Fuzzed(_pictures, _read_picture, _bad_image, np.array_equal, _picture_bombs),
    "array": Fuzzed(_arrays, _read_array, _user_error, np.array_equal),
    "text": Fuzzed(_texts, _read_text, _user_error, None, _text_bombs),
    "table": Fuzzed(_tables, _read_table, _user_error, None, _table_bombs),
    "config": Fuzzed(_configs, _read_config, _user_error, None, _config_bombs),
    "checkpoint": Fuzzed(_checkpoints, _read_checkpoint, _user_error),
    "tokenizer": Fuzzed(_tokenizers, _read_tokenizer, _user_error),
    "tar": Fuzzed(_tars, _read_tar, _user_error, lambda a, b: a == b),
    "index": Fuzzed(_indices, _read_index, _user_error),
}


# ------------------------------------------------------------------------------------------------ in the child process


def _child(root: Path, seed: int, jobs: list[str]) -> None:
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    for job in jobs:
        reader, first, last = job.split(":")
        (root / reader).mkdir()
        _read_all(reader, root / reader, seed, int(first), int(last))


def _read_all(reader: str, folder: Path, seed: int, first: int, last: int) -> None:
    os.environ["FUZZ_FOLDER"] = str(folder)
    fuzzed = READERS[reader]
    samples = sorted(fuzzed.samples().items())
    extra = sorted({**fuzzed.extra(), **{name: PICKLE for name, _ in samples}}.items())
    refusals = fuzzed.refusals()
    wholes: dict[str, Any] = {}
    for name, data in samples:  # which are read as they are, and warm everything up
        path = folder / f"whole-{name}"
        path.write_bytes(data)
        wholes[name] = fuzzed.read(path)
        path.unlink()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + (ADDRESS_SPACE_MB << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    print(json.dumps({"reader": reader}), flush=True)
    for number in range(first, last):
        rng = np.random.default_rng([seed, number])
        if number < len(extra):
            name, data, cut = *extra[number], False
        else:
            name, data = samples[int(rng.integers(len(samples)))]
            data, cut = mutated(data, rng)
        print(json.dumps({"begun": number, "name": name}), flush=True)
        path = folder / f"{number}-{name}"
        path.write_bytes(data)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        finding = ""
        try:
            result = fuzzed.read(path)
            outcome = "read"
            if cut and fuzzed.whole is not None and not fuzzed.whole(result, wholes[name]):
                finding = "cut short, and read as something else than the whole"
        except refusals:
            outcome = "refused"
        except BaseException as error:
            outcome = "escaped"
            finding = f"{type(error).__name__}: {error!s:.200}\n{traceback.format_exc()[-1500:]}"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        if grown > LIMIT_MB:
            finding = finding or f"memory grew by {grown} MB"
        print(json.dumps({"done": number, "outcome": outcome, "finding": finding, "name": name}), flush=True)
        path.unlink()


# ------------------------------------------------------------------------------------------------ in the parent process


@dataclass
class Result:
    """outcomes: how many inputs were read and refused. findings: (number, name, what was wrong)."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[tuple[int, str, str]] = field(default_factory=list)


def fuzz(counts: Mapping[str, int], folder: Path, seed: int = 0) -> dict[str, Result]:
    """Read so many damaged files of each reader, the first of which are the reader's own worst cases."""
    results = {reader: Result() for reader in counts}
    jobs = [(reader, 0, count) for reader, count in counts.items()]
    while jobs:
        folder.mkdir(parents=True)
        jobs = _watch(folder, seed, jobs, results)
        shutil.rmtree(folder)
    return results


Job = tuple[str, int, int]


def _watch(folder: Path, seed: int, jobs: list[Job], results: Mapping[str, Result]) -> list[Job]:
    """What is left to do: nothing where the process came to its end."""
    words = [str(folder), str(seed), *(":".join(map(str, job)) for job in jobs)]
    root = Path(__file__).parents[1]
    paths = [str(root), *(str(root / "modalities" / name) for name in ("audio", "vision", "text"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with (folder / "stderr").open("wb") as errors:
        child = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.fuzzing", *words], stdout=subprocess.PIPE, stderr=errors,
            env=environment, cwd=folder.parent,
        )  # fmt: skip
    assert child.stdout is not None
    timer = threading.Timer(START_S, child.kill)
    timer.start()
    reader, at, name = "", 0, ""
    for raw in child.stdout:
        line = json.loads(raw)
        timer.cancel()
        timer = threading.Timer(LIMIT_S if "begun" in line else START_S, child.kill)
        timer.start()
        if "reader" in line:
            reader, at = line["reader"], next(first for each, first, _ in jobs if each == line["reader"])
        at, name = line.get("begun", at), line.get("name", name)
        if "done" in line:
            results[reader].outcomes[line["outcome"]] += 1
            if line["finding"]:
                results[reader].findings.append((line["done"], line["name"], line["finding"]))
            at = line["done"] + 1
    timer.cancel()
    status = child.wait()
    child.stdout.close()
    if status == 0:
        return []
    if not reader:
        raise RuntimeError(f"fuzzing did not begin: {(folder / 'stderr').read_text()[-2000:]}")
    place = [each for each, _, _ in jobs].index(reader)
    last = jobs[place][2]
    if at == last:
        raise RuntimeError(f"fuzzing stopped behind {reader}: {(folder / 'stderr').read_text()[-2000:]}")
    why = f"the process ended with status {status}: killed, crashed or out of time"
    results[reader].findings.append((at, name, why))
    results[reader].outcomes["died"] += 1
    return [(reader, at + 1, last), *jobs[place + 1 :]]


if __name__ == "__main__":
    _child(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
