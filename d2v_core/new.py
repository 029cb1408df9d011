"""`d2v new NAME`: a distribution of its own with a modality that works, to be changed part by part.

The files are those under `template/`, in which the name is `mysignal`.
"""

from __future__ import annotations

import importlib.util
import keyword
import re
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

from d2v_core import plugins
from d2v_core.errors import UserError

TEMPLATE = Path(__file__).parent / "template"
NAME = "mysignal"
CLASS = "MySignal"
HELP = """d2v new NAME [out=FOLDER]

Writes a folder d2v-NAME with a modality that works on signals it makes itself: an installable distribution with tests
and a README that says how to go on. NAME is what will be typed in `d2v run modality=NAME`.

  out=d2v-NAME: The folder, which must not exist yet.
"""


def main(argv: Sequence[str]) -> int:
    """`d2v new NAME`: the exit status."""
    words = list(argv)
    if {"-h", "--help"} & set(words):
        print(HELP, end="")
        return 0
    if not words:
        raise UserError("d2v new needs a name for the modality: d2v new NAME.")
    name, options = words[0], words[1:]
    out = Path(f"d2v-{name}")
    for option in options:
        key, equals, value = option.partition("=")
        if key != "out" or not equals or not value:
            raise UserError(f"d2v new: {option!r} is no option of it. There is out=FOLDER.")
        out = Path(value).expanduser()
    write(name, out)
    print(
        f"Written to {out}. Next:\n  cd {out}\n  pip install -e .\n  d2v check {name}\n  d2v run modality={name}\n"
        f"README.md there says what to change, and in which order."
    )
    return 0


def write(name: str, out: Path) -> None:
    """The template with this name, in a folder that is made for it. Raises UserError where the name cannot be used or
    the folder exists."""
    check_name(name)
    if out.exists():
        raise UserError(f"{out} exists, and nothing is overwritten. Give another folder with out=FOLDER.")
    if not out.parent.is_dir():
        raise UserError(f"{out} cannot be made: {out.parent} is no folder. Make it first.")
    try:
        for source in sorted(TEMPLATE.rglob("*")):
            if not source.is_file() or "__pycache__" in source.parts:
                continue
            target = out / renamed(source.relative_to(TEMPLATE).as_posix(), name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(renamed(source.read_text(encoding="utf-8"), name), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror or error}. Choose another with out=FOLDER."
        ) from error


def renamed(text: str, name: str) -> str:
    """A text or path of the template, of a modality called `name`."""
    return text.replace(CLASS, class_name(name)).replace(NAME, name)


def class_name(name: str) -> str:
    """heart_rate -> HeartRate."""
    return "".join(word.capitalize() for word in name.split("_") if word)


def check_name(name: str) -> None:
    """Raises UserError where no modality can be called this, or something installed is."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        near = re.sub(r"[^a-z0-9_]+", "_", name.lower()).strip("_0123456789")
        fits = near and near != name and not keyword.iskeyword(near)
        raise UserError(
            f"{name!r} cannot name a modality: it becomes part of a Python module's name, so it may have lower-case "
            "letters, digits and underscores, begins with a letter and is no word of Python's."
            + (f" How about {near}?" if fits else "")
        )
    if name in plugins.names():
        claims = " and ".join(f"{p.distribution} {p.version}" for p in plugins.installed() if p.name == name)
        raise UserError(f"There is a modality {name!r} already, from {claims}. Choose another name.")
    if importlib.util.find_spec(f"d2v_{name}") is not None:
        raise UserError(f"There is a Python module d2v_{name} already. Choose another name.")
    wanted = f"d2v_{name}"
    for distribution in distributions():
        title = distribution.metadata["Name"] or ""
        if re.sub(r"[-_.]+", "_", title.lower()) == wanted:
            raise UserError(f"A distribution {title} is installed already. Choose another name.")
