"""Find text files, read them line by line, and keep what they become as one flat array of ids on disk.

Memory is bounded whatever the size of the text: lines pass through, ids lie in a file that is mapped, and only the
start of every block is held. What cannot be read is counted and named.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import shutil
import sys
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from d2v_core.contract import Inventory
from d2v_core.errors import UserError
from d2v_core.files import cache_folder, check_bad_files, check_bad_ratio, existing, first
from d2v_core.shards import Kind, find_shards, read_shards
from d2v_core.sources import Item, Source
from d2v_text.tokenizer import BOS, BPE, EOS

TEXT_EXTENSIONS = (".raw", ".text", ".tokens", ".txt")
RECORD_EXTENSIONS = (".jsonl", ".ndjson")
LONGEST_PIECE = 1 << 20  # bytes of a line taken at once; a longer line of plain text goes on as another
LONGEST_RECORD = 1 << 27  # bytes of a .jsonl line; a longer one is left out
BATCH = 1 << 20  # characters tokenised at once
SILENT_UP_TO = 20_000_000  # bytes; tokenising more is announced
FORMAT = 1  # of the cache; raise it when its content changes


def find_files(given: str | Path, key: str = "data.path") -> list[Path]:
    """A file, or those below a folder in a stable order; hidden names are left out. Raises UserError."""
    path = existing(given, "a text file, a .jsonl file or a folder", key)
    if path.is_file():
        return [path]
    kinds = TEXT_EXTENSIONS + RECORD_EXTENSIONS
    found = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in kinds
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not found:
        raise UserError(f"{key}={given}: no text in this folder or below. Looked for {' '.join(kinds)}.")
    return found


SHARDS = Kind("text", TEXT_EXTENSIONS + RECORD_EXTENSIONS, lambda source: {})


@dataclass(frozen=True)
class Texts:
    """What data.path stands for. sources: in the order in which they are read. files: what lies on the disk."""

    sources: list[Source]
    files: list[Path]
    bad: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def find_texts(given: str, max_bad_ratio: float) -> Texts:
    """Files, or what lies in tars. Raises UserError."""
    tars = find_shards(given)
    if tars is None:
        files = find_files(given)
        return Texts([Source(file) for file in files], files)
    found = read_shards(tars, given, SHARDS)
    named = [f"{name} ({reason})" for name, reason in found.bad]
    check_bad_files(named, len(found.items) + len(named), max_bad_ratio, "texts", given)
    left_out = [f"{len(named)} texts left out: {first(named, '; ')}"] if named else []
    return Texts([item.source for item in found.items], tars, list(found.bad), [*found.notes, *left_out])


PART_BYTES = 1 << 20  # of the parts in which `d2v data shard` writes a text, the document that is begun included


def inventory(given: str, key: str, measure: bool, tokenizer: BPE | None) -> Inventory:
    """Parts of whole documents, about a megabyte each; where they are measured, documents. Raises UserError."""
    texts = find_texts(given, 1.0)
    root = existing(given, "text") if find_shards(given) is None else None
    if root is None and not measure:
        items = [Item(source.name, source, {}) for source in texts.sources]
    else:
        items = [item for source in texts.sources for item in _parts(source, root, 0 if measure else PART_BYTES)]
    if not items:
        raise UserError(f"data.path={given}: no text in {len(texts.files)} files.")
    if not measure:
        size = sum(item.source.size for item in items)
        return Inventory(items, texts.bad, (), "bytes", f"{size / 1e6:.1f} MB of text", texts.notes)
    unit, amounts, bad = "words" if tokenizer is None else "tokens", list[float](), list(texts.bad)
    kept: list[Item] = []
    for item in items:
        reader = Reader(key)
        lines = [line for line in reader.lines(item.source) if line]
        if reader.num_bad:
            bad.append((item.id, reader.bad[0].partition(": ")[2]))
        if lines:
            kept.append(item)
            encoded = [line.split() for line in lines] if tokenizer is None else tokenizer.encode(lines)
            amounts.append(sum(map(len, encoded)))
    return Inventory(kept, bad, amounts, unit, f"{len(kept)} documents, {sum(amounts):.0f} {unit}", texts.notes)


def _parts(source: Source, root: Path | None, least: int) -> Iterator[Item]:
    """A file cut where documents end, in parts of `least` bytes or a little more. Read one after the other they are the
    file: behind an empty line, and in records behind any line. Their ids are below the file's name."""
    name, suffix = source.name or source.path.name, Path(source.name or source.path).suffix.lower()
    if root is not None and root.is_dir():
        name = source.path.relative_to(root).as_posix()
    start, number = source.offset, 0
    end = source.offset + source.size
    with source.open() as file:
        while start < end:
            file.seek(min(start - source.offset + max(least - 1, 0), end - source.offset))
            if least:
                _any_in_line(file)  # the rest of the line that this place lies in
            found = least > 0
            while (something := _any_in_line(file)) is not None:
                found = found or something
                if found and (suffix in RECORD_EXTENSIONS or (not something and not _marked(file))):
                    break
            stop = source.offset + file.tell()
            label = f"{name}/{number:05d}{suffix}"
            if found:
                yield Item(label, Source(source.path, start, stop - start, label), {})
            start, number = stop, number + 1


def _any_in_line(file: BinaryIO) -> bool | None:
    """Whether the next line holds anything, None where there is none. Memory is bounded whatever its length."""
    found = None
    while piece := file.readline(LONGEST_PIECE):
        found = bool(found) or bool(piece.strip())
        if piece.endswith(b"\n"):
            break
    return found


def _marked(file: BinaryIO) -> bool:
    """Whether a mark of byte order comes next, which would be read another way at the beginning of a part."""
    place = file.tell()
    marked = file.read(3) == b"\xef\xbb\xbf"
    file.seek(place)
    return marked


@dataclass
class Reader:
    """Lines of text from files; an empty one ends a document. Counts what it leaves out and names the first few.

    section: what stands before the names of options in messages. every: all that is left out, by file and line, where
    it is asked for; there may be a lot of it.
    """

    key: str
    section: str = "data."
    num_lines: int = 0
    num_bad: int = 0
    bad: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    every: dict[tuple[Path, int], str] | None = None

    def lines(self, file: Path | Source) -> Iterator[str]:
        """Plain text by line, or a record's text by line; each file and each record is at least one document."""
        for _, texts in self.numbered(file):
            yield from texts
        yield ""

    def numbered(self, file: Path | Source) -> Iterator[tuple[int, list[str]]]:
        """(number of a line in the file, its text or its record's text by line); nothing for what is left out."""
        source = Source(file) if isinstance(file, Path) else file
        path = Path(source.name or source.path)
        records = path.suffix.lower() in RECORD_EXTENSIONS
        any_text = False
        try:
            with source.open() as stream:
                for number, piece in _pieces(stream, LONGEST_RECORD if records else LONGEST_PIECE, records):
                    texts = self._record(path, number, piece) if records else self._line(path, number, piece)
                    any_text = any_text or any(texts)
                    yield number, texts
        except OSError as error:
            raise UserError(f"{source} cannot be read: {error.strerror or error}.") from error
        if not any_text:
            self.empty.append(path.name)

    def _line(self, path: Path, number: int, piece: bytes) -> list[str]:
        self.num_lines += 1
        try:
            return [piece.decode("utf-8-sig" if number == 1 else "utf-8").strip()]
        except UnicodeDecodeError as error:
            self._leave_out(path, number, f"no UTF-8 ({error.reason} at byte {error.start})")
            return []

    def _record(self, path: Path, number: int, piece: bytes) -> list[str]:
        if not piece.strip():
            return []
        self.num_lines += 1
        try:
            record = json.loads(piece.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            self._leave_out(path, number, f"no UTF-8 ({error.reason} at byte {error.start})")
        except (ValueError, RecursionError) as error:
            self._leave_out(path, number, f"no JSON ({error})")
        else:
            if not isinstance(record, dict):
                self._leave_out(path, number, "no object")
            elif self.key not in record:
                near = difflib.get_close_matches(self.key, list(record), 1)
                there = ", ".join(map(repr, list(record)[:6])) or "none"
                hint = f", did you mean {self.section}key={near[0]}?" if near else ""
                self._leave_out(path, number, f"no key {self.key!r} (keys: {there}{hint})")
            elif not isinstance(record[self.key], str):
                self._leave_out(path, number, f"{self.key!r} is {type(record[self.key]).__name__}, not text")
            else:
                return [*(line.strip() for line in record[self.key].splitlines()), ""]
        return []

    def _leave_out(self, path: Path, number: int, reason: str) -> None:
        self.num_bad += 1
        if self.every is not None:
            self.every[path, number] = reason
        if len(self.bad) < 5:
            self.bad.append(f"{path.name} line {number}: {reason}")

    def check(self, max_bad_ratio: float, given: str) -> None:
        """Raises UserError where too much was left out."""
        check_bad_ratio(
            self.num_bad, self.num_lines, max_bad_ratio, named="\n  ".join(self.bad),
            found=f"{given}: {self.num_bad} of {self.num_lines} lines cannot be read",
            advice="Mend them (other encodings: iconv -f LATIN1 -t UTF-8)", option=f"{self.section}max_bad_ratio",
        )  # fmt: skip

    def summary(self) -> str:
        """What was left out, or nothing."""
        parts: list[str] = []
        if self.num_bad:
            parts.append(f"{self.num_bad} of {self.num_lines} lines left out: {'; '.join(self.bad)}")
        if self.empty:
            more = f" and {len(self.empty) - 5} more" if len(self.empty) > 5 else ""
            parts.append(f"no text in {', '.join(self.empty[:5])}{more}")
        return "\n".join(parts)


def _pieces(file: BinaryIO, limit: int, records: bool) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes). A line of plain text beyond the limit comes in pieces, cut at a space where it has one and
    never inside a character; a record beyond it comes cut, which no reader takes for JSON."""
    number, rest = 0, b""
    while True:
        chunk = rest + file.readline(limit - len(rest))
        if not chunk:
            return
        if not rest:
            number += 1
        rest = b""
        if len(chunk) >= limit and not chunk.endswith(b"\n"):
            if records:
                while (more := file.readline(limit)) and not more.endswith(b"\n"):
                    pass
            else:
                at = chunk.rfind(b" ") + 1
                if at <= 0:
                    at = len(chunk)
                    while at > 1 and chunk[at - 1] & 0xC0 == 0x80:
                        at -= 1
                    at = max(at - 1, 1)
                chunk, rest = chunk[:at], chunk[at:]
        yield number, chunk


@dataclass(frozen=True)
class TokenisedText:
    """The cache of a text: a folder with ids.bin (every sentence with its </s>, one after the other), sizes.npy
    ((sentences,) int32, a document's end is a 0) and info.json."""

    folder: Path
    dtype: str
    num_tokens: int
    notes: str
    num_files: int

    def ids(self) -> np.ndarray:
        """(num_tokens,) mapped from the disk."""
        return np.memmap(self.folder / "ids.bin", dtype=self.dtype, mode="r", shape=(self.num_tokens,))

    def sizes(self) -> np.ndarray:
        """(sentences,) int32 mapped from the disk."""
        return np.load(self.folder / "sizes.npy", mmap_mode="r")


def tokenise(path: str, key: str, tokenizer: BPE, cache: str | None, max_bad_ratio: float) -> TokenisedText:
    """Tokenise once: a second run on the same files (by name, size and time) with the same tokenizer reads the result.

    Raises UserError where there is nothing to read, or too much of it is broken.
    """
    texts = find_texts(path, max_bad_ratio)
    facts = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in texts.files]
    name = hashlib.blake2b(
        json.dumps([FORMAT, key, tokenizer.identity, max_bad_ratio, facts]).encode(), digest_size=10
    ).hexdigest()
    root = Path(cache).expanduser() if cache else cache_folder("text")
    folder = root / name
    if not (folder / "info.json").is_file():
        total = sum(size for _, size, _ in facts)
        if total > SILENT_UP_TO:
            print(f"Tokenising {len(texts.files)} files, {total / 1e6:.0f} MB, once ...", file=sys.stderr, flush=True)
        try:
            root.mkdir(parents=True, exist_ok=True)
            _write(folder, texts, path, key, tokenizer, max_bad_ratio)
        except OSError as error:
            raise UserError(
                f"The tokenised text cannot be written to {root}: {error.strerror or error}. Choose a folder with "
                "room by data.cache=FOLDER."
            ) from error
    info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    return TokenisedText(folder, **info)


def _write(folder: Path, texts: Texts, given: str, key: str, tokenizer: BPE, max_bad_ratio: float) -> None:
    """Into a temporary folder that takes its name when it is whole."""
    reader = Reader(key)
    dtype = "uint16" if tokenizer.vocabulary.size <= 1 << 16 else "uint32"
    total = 0
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with (temporary / "ids.bin").open("wb") as ids, (temporary / "sizes.bin").open("wb") as sizes:
            for lines in _batches(line for source in texts.sources for line in reader.lines(source)):
                encoded = iter(tokenizer.encode([line for line in lines if line]))
                rows = [[*next(encoded), EOS] if line else [] for line in lines]
                np.array([i for row in rows for i in row], dtype=dtype).tofile(ids)
                np.array([len(row) for row in rows], dtype=np.int32).tofile(sizes)
                total += sum(map(len, rows))
        reader.check(max_bad_ratio, f"data.path={given}")
        if total == 0:
            raise UserError(
                f"data.path={given}: no text in {len(texts.files)} files. {reader.summary()}".rstrip(". ") + "."
            )
        np.save(temporary / "sizes.npy", np.memmap(temporary / "sizes.bin", dtype=np.int32, mode="r"))
        (temporary / "sizes.bin").unlink()
        notes = "\n".join(note for note in (*texts.notes, reader.summary()) if note)
        info = {"dtype": dtype, "num_tokens": total, "notes": notes, "num_files": len(texts.files)}
        (temporary / "info.json").write_text(json.dumps(info), encoding="utf-8")
        try:
            temporary.replace(folder)
        except OSError:
            if not (folder / "info.json").is_file():  # else another process was quicker
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _batches(lines: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for line in lines:
        batch.append(line)
        size += len(line) + 1
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def blocks(sizes: np.ndarray, block_tokens: int, documents: bool) -> tuple[np.ndarray, np.ndarray]:
    """(N,) starts and (N,) lengths of blocks in the flat ids, room for `<s>` kept.

    documents: whole sentences of one document; a sentence longer than a block is cut (the official code keeps it and
    later leaves it out). Otherwise equal pieces of the whole text, across sentences and documents.
    """
    room = block_tokens - 1
    if not documents:
        total = int(sizes.sum(dtype=np.int64))
        starts = np.arange(0, total, room, dtype=np.int64)
        return starts, np.minimum(room, total - starts)
    starts_, lengths_ = array("q"), array("q")  # of millions of blocks, so no lists of numbers
    start = length = 0
    for size in map(int, sizes):
        if length and (size == 0 or length + size > room):
            starts_.append(start)
            lengths_.append(length)
            start, length = start + length, 0
        while size > room:
            starts_.append(start)
            lengths_.append(room)
            start, size = start + room, size - room
        length += size
    if length:
        starts_.append(start)
        lengths_.append(length)
    return np.array(starts_), np.array(lengths_)


def block_ids(flat: np.ndarray, start: int, length: int) -> np.ndarray:
    """(1 + length,) int64, `<s>` in front."""
    return np.concatenate([[BOS], flat[start : start + length]]).astype(np.int64)
