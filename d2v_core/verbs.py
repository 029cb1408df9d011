"""`d2v VERB train FILES... key=value`: what the verbs that make a file from the user's files have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from d2v_core.config import option_rows, options
from d2v_core.errors import UserError

T = TypeVar("T")


def print_help(text: str, kind: type) -> None:
    """A verb's text, then a line for each field of the dataclass of its options, those of sections with a dot."""
    print(text, end="")
    for name, default, _, doc in option_rows(kind):
        print(f"  {name}={default}: {doc}")


def train_words(
    argv: Sequence[str], verb: str, kind: type[T], help_text: str, inputs: str, form: str
) -> tuple[list[str], T, Path] | None:
    """(files, options, the file to write) of `argv`; None where help was asked for, which is printed.

    kind: dataclass of the options, `out` among them. inputs: what the files may be. form: the command as it should be.
    Raises UserError where there is no file, or `out` is there already or cannot be.
    """
    words = list(argv)
    if not words or {"-h", "--help"} & set(words):
        print_help(help_text, kind)
        return None
    if words[0] != "train":
        raise UserError(f"d2v {verb} has the verb train, not {words[0]!r}: {form}")
    files = [word for word in words[1:] if "=" not in word or Path(word).exists()]
    config = options(kind, [word for word in words[1:] if word not in files], verb)
    if not files:
        raise UserError(f"{verb} train needs at least one {inputs}.")
    out = Path(cast("Any", config).out).expanduser()
    if out.exists():
        raise UserError(f"{verb} train: out={out} exists, and nothing is overwritten. Give another name.")
    if not out.parent.is_dir():
        raise UserError(f"{verb} train: out={out} cannot be written, {out.parent} is no folder. Make it first.")
    return files, config, out
