"""Find audio files and read them: what is damaged is named, never passed on as shorter audio.

`scan` looks at headers only and runs once, before training; `read` decodes one clip and runs in the loader workers.
Both open files through `_opened`, which compares header and bytes, because libsndfile hands back a truncated WAV, AIFF
or Ogg file as a shorter one without a word. A format for which there is no such comparison is refused.
"""

from __future__ import annotations

import math
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal

import numpy as np
import soundfile

from d2v_core.errors import UserError
from d2v_core.files import check_bad_files, existing, first, kind, none_found, subfolder, walk
from d2v_core.shards import Kind, find_shards, read_shards
from d2v_core.sources import Fact, Source

AUDIO_EXTENSIONS = (".aif", ".aifc", ".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav")  # in either case
MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz; outside, a header is damaged or a config is in kHz
MAX_RATIO = 1024  # terms of a reduced rate ratio; torchaudio's kernel is about its square (16001 to 16000 Hz: 2 GB)
MAX_EXPANSION = 4000  # samples per byte of file; digital silence measures 340 (FLAC), 990 (8 channels), 125 (Opus)
MP3_SLACK = 3 * 1152  # samples at the file's rate: encoder and decoder delay, which not every tag counts alike
UNKNOWN_SIZES = {0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, *range(0xFFFFFF00, 2**32)}  # WAV written to a pipe


class BadClip(Exception):
    """An audio file that cannot be trusted; when `read` raises it, the message names the file and the reason."""


@dataclass(frozen=True, slots=True)  # there may be millions
class Clip:
    """One usable audio file."""

    path: Path  # absolute; of a clip in a tar, the tar's
    id: str  # path below the data root, "/" between its parts; unique in a scan
    num_samples: int  # per channel at the target rate: ceil(frames * target / source)
    source_rate: int  # Hz in the file
    channels: int
    transcript: str | None = None
    speaker: str | None = None
    cells: Mapping[str, str] = field(default_factory=dict[str, str], compare=False)  # of the columns asked for
    inside: Source | None = None  # where in the tar it lies
    facts: Mapping[str, Fact] = field(default_factory=dict[str, Fact], compare=False)  # what its header says

    @property
    def source(self) -> Source:
        """Where its bytes are."""
        return self.inside or Source(self.path)


def duration(seconds: float) -> str:
    """In the unit that a person would take: 12.3 s, 4.5 min, 6.78 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.2f} h"


@dataclass(frozen=True)
class ScanReport:
    """What `scan` found; `sample_rate` (Hz) and `min_s` (seconds) are what it was asked for."""

    clips: tuple[Clip, ...]  # usable, sorted by id
    short: tuple[str, ...]  # ids of files dropped for being shorter than min_s
    bad: tuple[tuple[str, str], ...]  # (id, reason) of each unreadable file, sorted by id
    resampled: int  # clips whose rate differs from the target
    sample_rate: int = 16000
    min_s: float = 0.0
    notes: tuple[str, ...] = ()  # what else there is to say of the files

    @property
    def too_short(self) -> int:
        """How many were dropped for being shorter than min_s."""
        return len(self.short)

    @property
    def left_out(self) -> dict[str, str]:
        """Id and reason of every file that was found and is not among the clips."""
        return {**dict(self.bad), **dict.fromkeys(self.short, f"shorter than {self.min_s:g} s")}

    def seconds(self) -> float:
        """Length of all clips."""
        return sum(clip.num_samples for clip in self.clips) / self.sample_rate

    def summary(self) -> str:
        """One line of counts, then one with the first unreadable files if there are any."""
        text = f"{len(self.clips)} clips, {duration(self.seconds())} at {self.sample_rate} Hz"
        if self.too_short:
            text += f"; {self.too_short} dropped as shorter than data.min_s={self.min_s:g} s"
        if self.resampled:
            rates = Counter(clip.source_rate for clip in self.clips if clip.source_rate != self.sample_rate)
            text += f"; {self.resampled} resampled ({', '.join(f'{n} from {r} Hz' for r, n in sorted(rates.items()))})"
        text += f"\n{len(self.bad)} unreadable: {first(_named(self.bad), '; ')}" if self.bad else ""
        return "\n".join([text, *self.notes])


def scan(
    path: str | Path,
    *,
    sample_rate: int = 16000,
    min_s: float = 0.0,
    rate_policy: Literal["resample", "refuse"] = "resample",
    max_bad_ratio: float = 0.01,
    split: str | None = None,
    decode_hours: float = 0.0,
    num_threads: int = 4,
    columns: Sequence[str] = (),
) -> ScanReport:
    """List the usable clips of a folder, a table, a single audio file or tars.

    Args:
        path: a folder, searched with its sub-folders; a .tsv file, either a fairseq manifest or with a header line
            that has a column `file`; one audio file; or tars, as `d2v_core.shards.find_shards` takes them.
        sample_rate: Hz that clips will be read at.
        min_s: seconds; shorter clips are dropped and counted.
        rate_policy: "refuse" stops at a file of another rate.
        max_bad_ratio: share of unreadable files, in [0, 1], above which the scan stops.
        split: value to keep in a table's column `split`; for a folder, the sub-folder to search; for tars, what ids
            begin with.
        decode_hours: where all clips together are no longer than this, each is decoded as well, which finds what
            headers cannot tell: a truncated FLAC, samples that are no numbers.
        columns: of a table, which must have them; their cells are kept in `Clip.cells`. The column of the files may
            then be called `path` as well.
    Raises:
        UserError: something the user must mend; the message says what and how.
    """
    if not MIN_RATE <= sample_rate <= MAX_RATE:
        raise UserError(f"data.sample_rate={sample_rate}: expected {MIN_RATE} to {MAX_RATE} Hz, such as 16000.")
    tars = find_shards(path)
    if tars is None:
        entries, unread, notes = _entries(path, split, columns), [], ()
    else:
        entries, unread, notes = _in_tars(tars, path, split)
    entries = sorted(entries, key=lambda entry: entry.id)
    with ThreadPoolExecutor(num_threads) as pool:
        probed = list(pool.map(lambda entry: _probe(entry, sample_rate), entries))

    clips: list[Clip] = []
    bad: list[tuple[str, str]] = list(unread)
    for entry, result in zip(entries, probed, strict=True):
        if isinstance(result, BadClip):  # ask again, alone: libsndfile keeps the error of a failed open in a global
            result = _probe(entry, sample_rate)
        if isinstance(result, BadClip):
            bad.append((entry.id, str(result)))
        else:
            clips.append(result)
    shortest = math.ceil(min_s * sample_rate - 1e-6)  # n / rate * rate may come out a little above n
    long = tuple(clip for clip in clips if clip.num_samples >= shortest)
    if sum(clip.num_samples for clip in long) <= decode_hours * 3600 * sample_rate:
        with ThreadPoolExecutor(num_threads) as pool:
            problems = list(pool.map(lambda clip: _problem(clip, sample_rate), long))
        suspects = [clip for clip, problem in zip(long, problems, strict=True) if problem]
        damaged = {clip.id: problem for clip in suspects if (problem := _problem(clip, sample_rate))}
        bad = sorted([*bad, *damaged.items()])
        clips = [clip for clip in clips if clip.id not in damaged]
        long = tuple(clip for clip in long if clip.id not in damaged)
    other = [clip for clip in long if clip.source_rate != sample_rate]
    total = len(entries) + len(unread)
    short = tuple(clip.id for clip in clips if clip.num_samples < shortest)
    report = ScanReport(long, short, tuple(sorted(bad)), len(other), sample_rate, min_s, notes)

    check_bad_files(_named(report.bad), total, max_bad_ratio, "audio files", path)
    if not long:
        raise UserError(
            f"data.path={path}: none of {total} audio files is usable, {report.too_short} are shorter than "
            f"data.min_s={min_s:g} s and {len(bad)} unreadable. Lower data.min_s or give longer files."
        )
    if other and rate_policy == "refuse":
        name, rate = other[0].id, other[0].source_rate
        raise UserError(
            f"data.path={path}: {len(other)} of {len(long)} files are not at data.sample_rate={sample_rate} Hz, first "
            f"{name} at {rate} Hz. Set data.rate_policy=resample, or data.sample_rate={rate} if all are at that rate."
        )
    return report


def read(clip: Clip, sample_rate: int) -> np.ndarray:
    """Decode a clip, average its channels and resample it (windowed sinc, torchaudio's defaults).

    Args:
        sample_rate: Hz, the one that the clip was scanned for.
    Returns:
        (clip.num_samples,) float32, nominally in [-1, 1].
    Raises:
        BadClip: damaged, changed since the scan, or not finite.
    """
    try:
        with _opened(clip.source, whole=True) as file:
            length = _length(file.frames, file.samplerate, sample_rate)
            if (file.samplerate, length) != (clip.source_rate, clip.num_samples):
                raise BadClip(f"changed since the scan, or scanned for another rate than {sample_rate} Hz")
            x = _decode(file)
            if abs(len(x) - file.frames) > (MP3_SLACK if file.format == "MP3" else 0):
                raise BadClip(f"damaged: {file.frames} samples promised, {len(x)} decoded")
            x = _finite(_fit(x, file.frames))
        if clip.source_rate != sample_rate:
            x = _finite(_fit(_resample(x, clip.source_rate, sample_rate), length))
        return x
    except BadClip as error:
        raise BadClip(f"{clip.source}: {error}") from None


def _problem(clip: Clip, sample_rate: int) -> str:
    """Why a clip cannot be read, or nothing."""
    try:
        read(clip, sample_rate)
    except BadClip as error:
        return str(error).removeprefix(f"{clip.source}: ")
    return ""


# ------------------------------------------------------------------------------------------ which files there are


@dataclass(frozen=True, slots=True)
class _Entry:
    """A file to look at, and what the folder or the table says about it."""

    id: str
    path: Path
    transcript: str | None = None
    speaker: str | None = None
    frames: int | None = None  # length in samples of the file, as a manifest lists it
    cells: Mapping[str, str] = field(default_factory=dict[str, str])
    inside: Source | None = None  # of a file in a tar
    facts: Mapping[str, Fact] | None = None  # what its header says, where it has been looked at

    @property
    def source(self) -> Source:
        return self.inside or Source(self.path)


def _in_tars(
    tars: Sequence[Path], given: str | Path, split: str | None
) -> tuple[list[_Entry], list[tuple[str, str]], tuple[str, ...]]:
    """(entries, (id, reason) of what cannot be read, notes)."""
    found = read_shards(tars, given, SHARDS)
    wanted = [item for item in found.items if split is None or item.id.startswith(f"{split}/")]
    if not wanted:
        raise UserError(f"data.path={given} has no sample below {split!r}; the first is {found.items[0].id}.")
    entries = [_Entry(i.id, i.source.path, inside=i.source, facts=i.facts) for i in wanted]
    return entries, list(found.bad), found.notes


def facts(source: Source) -> dict[str, Fact] | str:
    """What a header says: frames (samples per channel), rate (Hz), channels, format; or why the file is of no use."""
    try:
        with _opened(source) as file:
            return {
                "frames": file.frames, "rate": file.samplerate, "channels": file.channels, "format": file.format
            }  # fmt: skip
    except BadClip as error:
        return str(error)


SHARDS = Kind("audio", AUDIO_EXTENSIONS, facts)


def _entries(given: str | Path, split: str | None, columns: Sequence[str] = ()) -> list[_Entry]:
    path = existing(given, "a folder, a .tsv table or an audio file")
    if path.is_dir():
        return _folder(path, given, split)
    if path.suffix.lower() == ".tsv":
        return _table(path, given, split, columns)
    if path.suffix.lower() not in AUDIO_EXTENSIONS:
        kinds = " ".join(AUDIO_EXTENSIONS)
        raise UserError(f"data.path={given}: expected a folder, a .tsv table or an audio file ({kinds}).")
    if split is not None:
        raise UserError(f"data.path={given} is one file and has no split {split!r}: leave the split out.")
    return [_Entry(path.name, path)]


def _folder(root: Path, given: str | Path, split: str | None) -> list[_Entry]:
    """Audio files below a folder. Hidden names are left out; links to folders are followed, each folder once."""
    top = root if split is None else subfolder(root, split, given)
    entries: list[_Entry] = []
    kinds: Counter[str] = Counter()
    for folder, names in walk(top, given):
        paths = [folder / name for name in names if not name.startswith(".")]
        texts = _librispeech_texts(paths)
        kinds.update(map(kind, paths))
        for path in paths:
            if path.suffix.lower() in AUDIO_EXTENSIONS and path.is_file():
                speaker = path.parent.parent.name if path.stem in texts else None
                entries.append(_Entry(path.relative_to(root).as_posix(), path, texts.get(path.stem), speaker))
    if not entries:
        advice = "Unpack archives, convert other formats (ffmpeg -i in.m4a out.flac) or mend the path."
        raise none_found("audio files", top, given, AUDIO_EXTENSIONS, kinds, advice)
    return entries


def _librispeech_texts(paths: Iterable[Path]) -> dict[str, str]:
    """Transcripts by utterance from the *.trans.txt of speaker/chapter/, whose lines are `utterance WORDS`."""
    lines = (line for path in paths if path.name.endswith(".trans.txt") for line in _lines(path))
    split = (line.strip().partition(" ") for line in lines)
    return {utterance: words.strip() for utterance, _, words in split if words}


def table_columns(given: str | Path) -> list[str]:
    """Names in the header line of a .tsv file. Raises UserError where it cannot be read."""
    return _lines(Path(given).expanduser())[0].split("\t")


def _table(table: Path, given: str | Path, split: str | None, wanted: Sequence[str] = ()) -> list[_Entry]:
    """Entries of a .tsv file of either kind; a file may stand in it once."""
    lines = _lines(table)
    columns, root = lines[0].split("\t"), table.parent
    texts_beside: list[str] | None = None
    if wanted and "file" not in columns:
        columns = ["file" if column == "path" else column for column in columns]
    if "file" not in columns:  # a fairseq manifest
        if len(columns) != 1 or not columns[0] or not (root / columns[0]).is_dir():
            raise UserError(
                f"data.path={given} line 1 is {lines[0][:120]!r}: expected tab separated columns with 'file' among "
                "them, or, in a fairseq manifest, only the root folder, which must exist."
            )
        columns, root = ["file", "number of samples"], root / columns[0]
        texts_beside = _manifest_texts(table, given, sum(bool(line.strip()) for line in lines[1:]))
    if split is not None and "split" not in columns:
        raise UserError(f"data.path={given} has no column 'split' to find {split!r} in: leave the split out.")

    entries: list[_Entry] = []
    line_of: dict[str, int] = {}
    splits: set[str] = set()
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        cells = line.split("\t")
        row = dict(zip(columns, cells, strict=False))
        file, frames = PurePosixPath(row.get("file", "")), row.get("number of samples")
        problem = None
        if len(cells) != len(columns) or file.name.strip() == "":
            problem = f"does not have the {len(columns)} fields"
        elif file.is_absolute() or ".." in file.parts:
            problem = f"names a file outside of {root}"
        elif frames is not None and not (frames.isascii() and frames.isdigit()):
            problem = f"has {frames!r} for a number of samples"
        elif str(file) in line_of:
            problem = f"repeats the file of line {line_of[str(file)]}; remove one of the two"
        if problem:
            form = "<TAB>".join(columns)
            raise UserError(f"data.path={given} line {number} {problem}: {line[:120]!r}. Expected {form}.")
        line_of[str(file)] = number
        splits.add(row.get("split", ""))
        if split is None or row["split"] == split:
            transcript = row.get("transcript") if texts_beside is None else texts_beside[len(entries)]
            texts = transcript or None, row.get("speaker") or None
            cells = {column: row[column] for column in wanted}
            entries.append(_Entry(str(file), root / file, *texts, int(frames) if frames else None, cells))
    if not entries:
        there = f" of split {split!r}; its splits are {', '.join(sorted(splits))}." if splits else " after line 1."
        raise UserError(f"data.path={given} lists no files{there}")
    return entries


def _manifest_texts(table: Path, given: str | Path, count: int) -> list[str] | None:
    """Transcripts of a fairseq manifest, in its order: NAME.ltr (letters, `|` after words) or NAME.wrd beside it."""
    for suffix in (".ltr", ".wrd"):
        path = table.with_suffix(suffix)
        if path.is_file():
            lines = _lines(path)
            lines = lines[:-1] if lines[-1] == "" else lines
            if len(lines) != count:
                raise UserError(
                    f"data.path={given} lists {count} files, but {path.name} beside it has {len(lines)} lines: it must "
                    "have one transcript for each file, in the same order. Make both anew, or move it away."
                )
            letters = suffix == ".ltr"
            return ["".join(line.split()).replace("|", " ").strip() if letters else line.strip() for line in lines]
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): mend its permissions.") from None


# ---------------------------------------------------------------------------------------------- headers and bytes


def _probe(entry: _Entry, sample_rate: int) -> Clip | BadClip:
    """The clip that a header describes, or why there is none."""
    found = facts(entry.source) if entry.facts is None else entry.facts
    if isinstance(found, str):
        return BadClip(found)
    frames, rate, channels = int(found["frames"]), int(found["rate"]), int(found["channels"])
    ratio = max(rate, sample_rate) // math.gcd(rate, sample_rate)
    if not MIN_RATE <= rate <= MAX_RATE or ratio > MAX_RATIO:
        return BadClip(f"its rate of {rate} Hz cannot be resampled to {sample_rate} Hz: convert it to a usual rate")
    if entry.frames is not None and entry.frames != frames:
        return BadClip(f"the manifest lists {entry.frames} samples, the file has {frames}")
    length = _length(frames, rate, sample_rate)
    return Clip(
        entry.path, entry.id, length, rate, channels, entry.transcript, entry.speaker, entry.cells, entry.inside, found
    )


@contextmanager
def _opened(source: Source, whole: bool = False) -> Iterator[soundfile.SoundFile]:
    """An open file that has all the bytes its header promises. What goes wrong, also while in use, becomes BadClip.

    With `whole`, checksums that libsndfile does not insist on are compared throughout; else only where it is cheap.
    """
    try:
        if not source.path.is_file():  # neither may it be a pipe, which would block
            raise BadClip("no such file")
        inside = source.length is not None
        with source.open(whole) as raw:
            size = raw.seek(0, os.SEEK_END)
            raw.seek(0)
            if size == 0:
                raise BadClip("the file is empty (0 bytes)")
            try:
                # By its path, where it has one, libsndfile reads it without Python in between.
                file = soundfile.SoundFile(
                    _Stream(source.open(whole)) if inside else os.fsencode(source.path)  # pyright: ignore[reportArgumentType]
                )
            except soundfile.LibsndfileError as error:
                why = error.error_string or "format not recognised"
                start = raw.read(24)
                raise BadClip(f"not an audio file that libsndfile can read: {why}, it starts with {start!r}") from None
            with file:
                if file.format in ("WAV", "WAVEX", "RF64", "AIFF"):
                    _check_chunks(raw, size, file.frames)
                elif file.format == "OGG":
                    _check_ogg(raw, size, whole)
                elif file.format == "MP3":
                    _check_mp3(raw, size)
                elif file.format != "FLAC":  # whose blocks have checksums, so that a damaged one fails in `read`
                    raise BadClip(f"format {file.format} is not supported: convert it to FLAC")
                if file.frames <= 0:
                    raise BadClip("it holds no samples")
                if file.frames * file.channels > MAX_EXPANSION * size:
                    raise BadClip(f"its header gives no believable length: {file.frames} samples in {size} bytes")
                yield file
    except soundfile.LibsndfileError as error:
        raise BadClip(f"damaged: {error.error_string}") from None
    except OSError as error:
        raise BadClip(f"cannot be read: {error.strerror or error}") from None


class _Stream:
    """A stream for libsndfile, which calls it where an error would be printed and go no further: a place or a read that
    cannot be is one that gives nothing."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self.tell = raw.tell

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> None:
        try:
            self.raw.seek(offset, whence)
        except (OSError, ValueError):
            self.raw.seek(0, os.SEEK_END)

    def readinto(self, buffer: memoryview) -> int:
        try:
            return self.raw.readinto(buffer)  # pyright: ignore
        except OSError:
            return 0

    def write(self, data: bytes) -> int:
        return 0  # libsndfile asks for it, and calls it for files that it writes only


def _check_chunks(raw: BinaryIO, size: int, frames: int) -> None:
    """WAV, RF64 and AIFF: the chunk with the samples lies within the file."""
    raw.seek(0)
    magic, whole = raw.read(4), raw.read(4)
    order: Literal["little", "big"] = "big" if magic in (b"FORM", b"RIFX") else "little"
    position, long_length = 12, 0
    for _ in range(1000):  # chunks; garbage could have millions
        raw.seek(position)
        tag, length = raw.read(4), int.from_bytes(raw.read(4), order)
        position += 8
        if tag == b"ds64":  # RF64 keeps its 64-bit lengths here: of the whole, of the samples
            long_length = int.from_bytes(raw.read(16)[8:], "little")
        elif tag in (b"data", b"SSND"):
            if length == frames == 0 and position < size:
                raise BadClip("its header says 0 bytes of audio (a recording that was not closed): repair the header")
            length = long_length if length == 0xFFFFFFFF and long_length else length
            if length not in UNKNOWN_SIZES and position + length > size:
                raise BadClip(f"truncated: {length} bytes of audio promised, {size - position} present")
            return
        position += length
        if length % 2:
            raw.seek(position)
            position += raw.read(1) == b"\0"  # a pad byte, which some writers forget
    if int.from_bytes(whole, order) + 8 > size:
        raise BadClip(f"truncated: {int.from_bytes(whole, order) + 8} bytes promised, {size} present")


_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def _check_ogg(raw: BinaryIO, size: int, whole: bool) -> None:
    """Ogg (RFC 3533, section 6): each page fits its checksum and the last one is marked as the end of the stream.

    libsndfile skips a page that does not fit; the audio is then shorter, or has a gap.
    """
    raw.seek(0 if whole else max(0, size - 65307))  # bytes of the largest page
    data = raw.read()
    position, flags = max(0, data.find(b"OggS") if whole else data.rfind(b"OggS")), 0
    while data[position : position + 4] == b"OggS" and position + 27 <= len(data):
        segments = position + 27
        end = segments + data[segments - 1] + sum(data[segments : segments + data[segments - 1]])
        page = data[position:end]
        # zlib has the same polynomial, for bits in the opposite order and another start value
        register = zlib.crc32((page[:22] + bytes(4) + page[26:]).translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
        if int(f"{register:032b}"[::-1], 2) != int.from_bytes(page[22:26], "little"):
            raise BadClip("truncated or damaged: an Ogg page does not fit its checksum")
        position, flags = end, page[5]
    if not flags & 4:
        raise BadClip(
            "truncated: its last Ogg page is not the end of the stream (if it plays: ffmpeg -i in -c copy out)"
        )


def _check_mp3(raw: BinaryIO, size: int) -> None:
    """MP3: the first frame holds a tag with the length (Xing, Info or VBRI) and the file has as many bytes.

    Without a tag libsndfile guesses the length from the first frame's bit rate and reads no further than that, which
    cuts files of variable bit rate silently.
    """
    raw.seek(0)
    head = raw.read(10)
    if head[:3] == b"ID3":  # 10 bytes, then a length in 4 x 7 bits
        raw.seek(10 + (head[6] << 21 | head[7] << 14 | head[8] << 7 | head[9]))
    else:
        raw.seek(0)
    start, frame = raw.tell(), raw.read(256)
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    if at < 0 and b"VBRI" not in frame:
        raise BadClip("an MP3 without length tag, ffmpeg -i in.mp3 -c copy out.mp3 adds one")
    flags = frame[at + 7] if at >= 0 else 0  # bit 0: a 4-byte count of frames follows; bit 1: a count of bytes
    field = at + 8 + 4 * (flags & 1)
    promised = int.from_bytes(frame[field : field + 4], "big") if flags & 2 else 0
    if size - start < promised:  # mpg123 lets a hundredth be missing, and what is lost there would become silence
        raise BadClip(f"truncated: {promised} bytes promised, {size - start} present")


# -------------------------------------------------------------------------------------------------------- samples


def _decode(file: soundfile.SoundFile) -> np.ndarray:
    """(frames,) float32, the mean of the channels. In blocks, so that memory follows the data and not the header."""
    blocks = [np.zeros(0, np.float32)]
    while len(block := file.read(max(1, 2**20 // file.channels), dtype="float32", always_2d=True)):
        blocks.append(block.mean(axis=1))
    return np.concatenate(blocks)


def _length(frames: int, source: int, target: int) -> int:
    return -(-frames * target // source)


def _resample(x: np.ndarray, source: int, target: int) -> np.ndarray:
    import torch  # here, since scanning does without
    from torchaudio.functional import resample

    return resample(torch.from_numpy(x), source, target).numpy()


def _fit(x: np.ndarray, length: int) -> np.ndarray:
    """Trim or pad the end: the slack of MP3, and of torchaudio, which computes its length in float32."""
    return np.pad(x[:length], (0, max(0, length - len(x))))


def _finite(x: np.ndarray) -> np.ndarray:
    wrong = np.flatnonzero(~np.isfinite(x))
    if len(wrong):
        raise BadClip(f"{len(wrong)} samples are NaN or infinite, the first is number {wrong[0]}")
    return x


def _named(bad: Iterable[tuple[str, str]]) -> list[str]:
    return [f"{name} ({reason})" for name, reason in bad]
