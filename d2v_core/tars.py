"""The headers of a tar, read without its contents.

Only plain files are of interest, in the forms that tar programs write: old (v7), ustar, GNU's long names, POSIX's
extended headers. Nothing is ever unpacked, so a name is only a name; those that would lead out of a folder are refused
all the same, since they are no ids. Python's own reader takes a damaged header in the middle for the end of the tar,
and so hands a shorter one back without a word; this one does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

BLOCK = 512
LONGEST_HEADER = 1 << 20  # bytes of a long name or an extended header; a damaged one could claim any number
FOLDER, LINKS, PLAIN = b"5", (b"1", b"2"), (b"0", b"\0", b"7")


class BadTar(Exception):
    """A file that is no whole tar; the message is the reason."""


@dataclass(frozen=True)
class Member:
    """A file in a tar. offset, length: of its bytes. problem: why it is of no use, else empty."""

    name: str
    offset: int
    length: int
    problem: str = ""


def members(path: Path) -> Iterator[Member]:
    """Every plain file, in order; links and the like with a problem, folders not at all.

    Raises BadTar where it is damaged, truncated or no tar, OSError where it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(6)
        for magic, what in ((b"\x1f\x8b", "gzip"), (b"\xfd7zXZ", "xz"), (b"BZh", "bzip2"), (b"(\xb5/\xfd", "zstd")):
            if start.startswith(magic):
                raise BadTar(f"it is packed by {what}, which has no places to go to: unpack it to a plain .tar")
        yield from _members(file, size)


def _members(file: BinaryIO, size: int) -> Iterator[Member]:
    position, long_name, extended = 0, b"", dict[str, bytes]()
    while True:
        file.seek(position)
        header = file.read(BLOCK)
        if not any(header) and len(header) == BLOCK:
            return _check_end(file, position)
        if len(header) < BLOCK:
            raise BadTar(f"it ends at byte {size} without the mark of its end: truncated, or no tar")
        _check_sum(header, position)
        length = _number(header[124:136], position)
        kind = header[156:157]
        position += BLOCK
        if kind in (b"L", b"K", b"x", b"g"):
            body = _body(file, length, size, position)
            if kind == b"L":
                long_name = body.rstrip(b"\0")
            elif kind == b"x":
                extended = _extended(body, position)
        else:
            if "size" in extended:
                length = _decimal(extended["size"], position)
            name = extended.get("path") or long_name or _name(header)
            is_file = kind in PLAIN and not name.endswith(b"/")
            if is_file and position + length > size:
                raise BadTar(f"truncated: {_text(name)} ends at byte {position + length}, the file has {size}")
            if is_file or kind not in (FOLDER, *PLAIN):
                yield _member(
                    name, position, length, kind, sparse=any(key.startswith("GNU.sparse") for key in extended)
                )
            if kind in LINKS or kind == FOLDER:
                length = 0  # whatever their header says
            long_name, extended = b"", {}
        position += -(-length // BLOCK) * BLOCK


def _check_end(file: BinaryIO, position: int) -> None:
    """Two empty blocks are the end, or one that is the last of the file. Raises BadTar where a header was wiped out, or
    where another tar follows, which tar programs pass over."""
    if any(file.read(BLOCK)):
        raise BadTar(f"damaged: no header at byte {position}, and yet something follows")
    while block := file.read(BLOCK):
        if any(block):
            start = file.tell() - len(block)
            try:
                _check_sum(block, start)
            except BadTar:
                return  # what some programs leave there
            raise BadTar(f"a second tar begins at byte {start}, behind the end of the first: take them apart")


def _check_sum(header: bytes, position: int) -> None:
    found = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if found != _number(header[148:156], position):
        raise BadTar("it is no tar" if position == 0 else f"damaged: no header at byte {position}")


def _number(field: bytes, position: int) -> int:
    """Octal digits, or, where the first bit is set, a big-endian number (GNU)."""
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    try:
        if not all(digit in b"01234567" for digit in digits):
            raise ValueError
        return int(digits or b"0", 8)
    except ValueError:
        raise BadTar(f"damaged: the header at byte {position} has {field!r} for a number") from None


def _decimal(field: bytes, position: int) -> int:
    if not field.isdigit() or len(field) > 18:
        raise BadTar(f"damaged: the extended header before byte {position} has {field[:20]!r} for a size")
    return int(field)


def _body(file: BinaryIO, length: int, size: int, position: int) -> bytes:
    if length > LONGEST_HEADER or position + length > size:
        raise BadTar(f"damaged or truncated: the header before byte {position} is said to go on for {length} bytes")
    return file.read(length)


def _extended(body: bytes, position: int) -> dict[str, bytes]:
    """POSIX's records `LENGTH KEY=VALUE\\n`, the length being of all of it."""
    found: dict[str, bytes] = {}
    while body.rstrip(b"\0"):
        digits, _, _ = body[:20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = body[len(digits) + 1 : max(length, 1) - 1].partition(b"=")
        if length < 5 or length > len(body) or not equals or body[length - 1 : length] != b"\n":
            raise BadTar(f"damaged: the extended header before byte {position} is none")
        found[key.decode("utf-8", "replace")] = value
        body = body[length:]
    return found


def _name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0", 1)[0], header[345:500].split(b"\0", 1)[0]
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _member(name: bytes, offset: int, length: int, kind: bytes, sparse: bool) -> Member:
    text = _text(name).removeprefix("./")
    problem = ""
    if kind in LINKS:
        problem = "it is a link"
    elif kind not in PLAIN or sparse:
        problem = f"it is no plain file (type {'sparse' if sparse else repr(kind.decode('latin-1'))})"
    elif not text or "\0" in text or text.startswith("/") or ".." in text.split("/"):
        problem = "its name leads out of the folder or is none"
    return Member(text, offset, length, problem)


def _text(name: bytes) -> str:
    """As Python names files whose names are no UTF-8."""
    return name.decode("utf-8", "surrogateescape")
