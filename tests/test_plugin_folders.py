"""Every folder of plugins/ is a distribution of its own, and where it is installed d2v finds what it brings."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))


def test_there_are_folders() -> None:
    assert {"video", "trajectory"} <= {folder.name for folder in FOLDERS}
    assert {folder for folder in ROOT.glob("plugins/*") if folder.is_dir()} == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_is_whole(folder: Path) -> None:
    """README, tests, a typed package."""
    assert (folder / "README.md").is_file() and list(folder.glob("tests/test_*.py"))
    (package,) = folder.glob("d2v_*")
    assert (package / "py.typed").is_file()


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_an_installed_one_is_found(folder: Path) -> None:
    text = (folder / "pyproject.toml").read_text(encoding="utf-8")
    name = re.search(r'^name = "([\w-]+)"', text, re.MULTILINE)
    group = re.search(r'^\[project\.entry-points\."([\w.]+)"\]', text, re.MULTILINE)
    points = re.findall(r'^(\w+) = "(d2v_[\w.:]+)"', text, re.MULTILINE)
    assert name is not None and group is not None and points
    try:
        version(name[1])
    except PackageNotFoundError:
        pytest.skip(f"{name[1]} is not installed: pip install ./plugins/{folder.name}")
    assert set(points) <= {(entry.name, entry.value) for entry in entry_points(group=group[1])}
