"""README.md and docs/ tell the truth: commands parse, the tree and the links exist, nothing points into one machine."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from d2v_core import cli, plugins
from d2v_core.config import KEYS, load_config, with_sequel
from d2v_core.jointconfig import load_run

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PLUGINS = {path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml")}  # distributions of their own
PAGES = sorted([
    *ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), *ROOT.glob("plugins/*.md"), *ROOT.glob("plugins/*/*.md"),
])  # fmt: skip
YOURS = {"data.path", "data.split", "from", "out"}  # what a reader puts in; it need not exist here


class Block(NamedTuple):
    page: str
    language: str
    text: str


def blocks() -> list[Block]:
    fence = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [
        Block(page.relative_to(ROOT).as_posix(), match[1], match[2])
        for page in PAGES
        for match in fence.finditer(page.read_text(encoding="utf-8"))
    ]


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every `d2v ...` in a bash block; several may stand in a line."""
    found: list[tuple[str, list[str]]] = []
    for block in blocks():
        if block.language not in ("bash", "sh", "console"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line.removeprefix("$ "), comments=True), ";"]:
                if word in ("&&", "||", "|", ";", ">"):
                    if words[:1] == ["d2v"]:
                        found.append((block.page, words))
                    words = []
                else:
                    words.append(word)
    return found


def tree() -> list[str]:
    """Paths of README's annotated tree: a name at the left edge opens a folder, indented names lie in it."""
    (text,) = (block.text for block in blocks() if block.page == "README.md" and block.text.startswith("d2v_core/"))
    paths: list[str] = []
    folder = ""
    for line in text.splitlines():
        name = line.split()[0]
        if line[0] != " ":
            folder = name if name.endswith("/") else ""
            paths.append(name)
        else:
            paths.append(folder + name)
    return paths


def tracked() -> list[Path]:
    """What git has or would take."""
    done = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [path for name in done.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def test_there_are_commands() -> None:
    assert ("README.md", ["d2v", "run", "modality=audio"]) in commands()


@pytest.mark.parametrize(("page", "words"), commands(), ids=lambda value: " ".join(value).replace("/", "|"))
def test_a_command_parses(page: str, words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    verb, rest = words[1], words[2:]
    named = {word.split("=")[1] for word in rest if word.startswith(("modality=", "encoder="))} | {
        *Path(page).parts[1:2]
    }
    for name in sorted(named & PLUGINS - {*plugins.names(), *plugins.names(plugins.ENCODERS)}):
        pytest.skip(f"plugins/{name} is not installed: pip install ./plugins/{name}")
    if verb == "data":
        assert rest[0] in ("scan", "shard")
        verb, rest = "run", [word for word in rest[1:] if not word.startswith("shard_mb=")]
    if verb in ("run", "config", "plan", "profile"):
        rest = [word for word in rest if word != "--json" and not word.startswith("steps=")]
        theirs = YOURS - {"out"} if "resume=auto" in rest else YOURS
        given = [word for word in rest if word.split("=")[0] not in theirs]
        # What a reader writes has the same options of the core as any other.
        given = ["modality=audio" if word in ("modality=seismic", "modality=motion") else word for word in given]
        if any(word.startswith("stage=") for word in given):  # such a stage reads the run that it starts from
            names = [word for word in given if word.startswith("modality=")] or ["modality=audio"]
            (tmp_path / "config.yaml").write_text(load_config(names)[0].to_yaml())
            given.append(f"from={tmp_path}")
        config, _ = load_run(with_sequel(given)[0])
        assert config.modality
    elif verb in cli.OWN_MODULES.keys() - {"new", "check"}:
        given = {word.split("=")[0] for word in rest if "=" in word}
        assert {key for key in given if "." not in key} <= set(_options_in_help(verb, capsys))
    elif verb in {command.name for command in plugins.installed(plugins.COMMANDS)}:
        known = {name.strip("=") for name in _options_in_help(verb, capsys)}
        given = [word for word in rest if "=" in word and not word.startswith("--")]
        others = [word for word in given if word.split("=")[0] not in known]
        assert not others or verb == "ladder", f"{page}: {' '.join(words)}"
        if others:  # of fine-tuning, some for one kind of weights
            (tmp_path / "config.yaml").write_text(load_config(["modality=audio"])[0].to_yaml())
            options = {word.removeprefix("untrained.").removeprefix("student.") for word in others}
            load_config(["modality=audio", "stage=finetune", f"from={tmp_path}", *options])
    elif verb in ("new", "check"):  # a name of one's own; tests/core/test_new.py types these
        assert rest[0].isidentifier()
        assert {word.split("=")[0] for word in rest[1:]} <= set(_options_in_help(verb, capsys))
    else:
        assert verb in ("modalities", "plugins", "--version", "--help")
        assert cli.main([verb]) == 0


def _options_in_help(verb: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    assert cli.main([verb, "--help"]) == 0
    return re.findall(r"^  ([\w.]+)[=:]", capsys.readouterr().out, re.MULTILINE)


def test_python_in_pages_is_python() -> None:
    for block in blocks():
        if block.language in ("python", "py"):
            ast.parse(block.text)


def test_the_tree_is_true() -> None:
    paths = tree()
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path).exists()] == []
    files = tracked()  # git knows no empty folder: in a clone it would be missing
    kept = {ROOT, *files, *(folder for path in files for folder in path.parents)}
    assert [path for path in paths if ROOT / path not in kept] == []


def test_the_tree_is_whole() -> None:
    """Every module of the core and of the modalities stands in it, once."""
    paths = tree()
    assert len(set(paths)) == len(paths)
    modalities = ("audio", "text", "vision")
    folders = ("d2v_core", *(f"modalities/{name}/d2v_{name}" for name in modalities), "plugins/perceiver/d2v_perceiver")
    for folder in folders:
        there = {f"{folder}/{path.name}" for path in (ROOT / folder).glob("*.py") if not path.name.startswith("__")}
        assert there - set(paths) == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix().replace("/", "|"))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    local = [target for target in targets if target and not re.match(r"\w+:", target)]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_stable_names_are_options() -> None:
    text = README.read_text(encoding="utf-8")
    stable = re.search(r"Stable names.*?keys (.*?);", text, re.DOTALL)
    assert stable is not None
    config, _ = load_config(["modality=audio"])
    values = config.to_dict()
    for name in re.findall(r"`([\w.]+)`", stable[1]):
        section, _, leaf = name.partition(".")
        assert name in KEYS or leaf in values[section], name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix().replace("/", "|"))
def test_nothing_is_left_to_fill_in(page: Path) -> None:
    assert re.findall(r"@[A-Z]\w*@|\bTODO\b|\bFIXME\b|\bTBD\b", page.read_text(encoding="utf-8")) == []


def test_no_path_of_one_machine() -> None:
    """Brackets keep this file's own pattern from being found."""
    pattern = re.compile(r"(?<![\w.~])/(?:wor[k]|op[t]|roo[t]|hom[e]/\w+)/")
    wrong: list[str] = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        lines = text.splitlines()
        wrong += [f"{path.relative_to(ROOT)}:{i}" for i, line in enumerate(lines, 1) if pattern.search(line)]
    assert wrong == []


def test_the_core_names_no_modality() -> None:
    ordinary = {"text"}  # is also what a message is; tests/core/test_independence.py looks for what tells it apart
    names = {plugin.name for plugin in plugins.installed()} - ordinary
    assert names
    for path in (ROOT / "d2v_core").rglob("*.py"):
        words = set(re.findall(r"[a-z]+", path.read_text(encoding="utf-8").lower()))
        assert not names & words, path
