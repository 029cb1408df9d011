"""What reading files has in common, whatever is in them: a path that is mistyped, folders that loop, files that are
broken. The errors name what was given, what there is, and what to do next.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from d2v_core.errors import UserError

KEY = "data.path"  # the option that names the files


def existing(given: str | Path, expected: str, key: str = KEY) -> Path:
    """The absolute path of something that exists, where `~` is the user's home.

    expected: what the option takes, for whoever left it empty. key: the option.
    Raises UserError; where the path is mistyped, with what is there instead.
    """
    if not str(given).strip():
        raise UserError(f"{key} is empty: give {expected}.")
    path = Path(given).expanduser().resolve()
    if path.exists():
        return path
    raise UserError(f"{key}={given} does not exist: {near(path)}")


def near(path: Path) -> str:
    """Where an absolute path that does not exist leaves what exists, and what is there instead, in two sentences."""
    parent = next(parent for parent in path.parents if parent.is_dir())
    missing, names = path.relative_to(parent).parts[0], sorted(os.listdir(parent))
    alike = difflib.get_close_matches(missing, names, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, alike))}?" if alike else f"There is: {', '.join(names[:9]) or '-'}."
    return f"there is no {missing!r} in {parent}. {hint}"


def cache_folder(name: str) -> Path:
    """d2v's folder of this name among the user's caches. It need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "d2v" / name


def subfolder(root: Path, name: str, given: str | Path) -> Path:
    """A folder directly below `root`, which data.path=`given` stands for. Raises UserError naming those there are."""
    there = sorted(child.name for child in root.iterdir() if child.is_dir())
    if name not in there:
        raise UserError(f"{KEY}={given} has no sub-folder {name!r}. Sub-folders: {', '.join(there) or 'none'}.")
    return root / name


def walk(top: Path, given: str | Path) -> Iterator[tuple[Path, list[str]]]:
    """`top` and every folder below it, with the sorted names of what lies in it beside folders.

    Hidden folders are left out, hidden files are not. Links to folders are followed, but each folder is visited once,
    so that a link to a folder above it is no loop. Raises UserError where a folder cannot be listed.
    """

    def stop(error: OSError) -> NoReturn:
        raise UserError(f"{KEY}={given}: cannot list {error.filename} ({error.strerror}): mend its permissions.")

    seen: set[str] = set()
    for folder, subfolders, names in os.walk(top, onerror=stop, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        yield Path(folder), sorted(names)


def kind(path: Path) -> str:
    """What the end of a name says about a file, in lower case."""
    return path.suffix.lower() or "no extension"


def none_found(
    what: str, top: Path, given: str | Path, extensions: Sequence[str], kinds: Counter[str], advice: str
) -> UserError:
    """The error for a folder without any file of use. kinds: how many of each `kind` there are."""
    found = ", ".join(f"{number} x {name}" for name, number in kinds.most_common(5)) or "no files at all"
    return UserError(
        f"{KEY}={given}: no {what} in {top} or below. Looked for {' '.join(extensions)}; found {found}. {advice}"
    )


def first(items: Sequence[str], separator: str, count: int = 5, more: str = "and {} more") -> str:
    """The first few, and how many more there are. Bytes in a name that are no text are escaped, to be printable."""
    shown = [*items[:count], *([more.format(len(items) - count)] if len(items) > count else [])]
    return separator.join(shown).encode("utf-8", "backslashreplace").decode()


def check_bad_files(
    bad: Sequence[str], total: int, max_bad_ratio: float, what: str, given: str | Path, more: str = "and {} more"
) -> None:
    """`check_bad_ratio` of files. bad: names with reasons. total: how many `what` data.path=`given` has, above 0."""
    check_bad_ratio(
        len(bad),
        total,
        max_bad_ratio,
        found=f"{KEY}={given}: {len(bad)} of {total} {what} ({len(bad) / total:.1%}) are unreadable",
        named=first(bad, "\n  ", more=more),
        advice="Mend or remove them",
        option="data.max_bad_ratio",
    )


def check_bad_ratio(
    num_bad: int, total: int, max_bad_ratio: float, *, found: str, named: str, advice: str, option: str
) -> None:
    """Stops, by a UserError, where more of the data is broken than the user has allowed.

    max_bad_ratio: share in [0, 1], the value of `option`. found: where how much is broken. named: the first of it, with
    reasons. advice: what to do, other than to allow more.
    """
    if num_bad > max_bad_ratio * total:
        raise UserError(
            f"{found}, more than {option}={max_bad_ratio:g} allows:\n  {named}\n{advice}, or raise {option} to do "
            "without them."
        )
