"""`d2v new`: what it writes works before a line is changed, and it takes no name or folder that is taken."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from d2v_core import cli, new
from d2v_core.hookspecs import CONTRACT_VERSION


@pytest.fixture
def seismic(tmp_path: Path) -> Generator[Path]:
    """What `d2v new seismic` writes; what a test imported of it is forgotten."""
    new.write("seismic", tmp_path / "d2v-seismic")
    yield tmp_path / "d2v-seismic"
    for name in [name for name in sys.modules if name.split(".")[0] == "d2v_seismic"]:
        del sys.modules[name]


def test_the_name_stands_everywhere(seismic: Path) -> None:
    files = sorted(p.relative_to(seismic).as_posix() for p in seismic.rglob("*") if p.is_file())
    assert files == [
        "README.md", "d2v_seismic/__init__.py", "d2v_seismic/data.py", "d2v_seismic/feature_encoder.py",
        "d2v_seismic/modality.py", "d2v_seismic/plugin.py", "d2v_seismic/py.typed", "d2v_seismic/recipes/tiny.yaml",
        "pyproject.toml", "tests/test_seismic.py",
    ]  # fmt: skip
    for name in files:
        text = (seismic / name).read_text()
        assert "mysignal" not in text.lower(), name
        if name.endswith(".py"):
            ast.parse(text)
    assert "class SeismicModality" in (seismic / "d2v_seismic/modality.py").read_text()
    assert 'seismic = "d2v_seismic.plugin"' in (seismic / "pyproject.toml").read_text()
    assert f"D2V_CONTRACT = {CONTRACT_VERSION}" in (seismic / "d2v_seismic/plugin.py").read_text()


def test_its_readme_names_what_is_there(seismic: Path) -> None:
    text = (seismic / "README.md").read_text()
    named = re.findall(r"`([\w/]+\.\w+|[\w/]+/)`", text)
    assert len(named) > 8
    homes = {name: Path(__file__).parents[2] if name.startswith("docs/") else seismic for name in named}  # d2v's docs
    assert [name for name, home in homes.items() if not (home / name).exists()] == []
    commands = re.findall(r"^d2v (\w+)", text, re.M)
    assert {"check", "run", "config"} <= set(commands)


def test_it_builds(seismic: Path, tmp_path: Path) -> None:
    """By pip, with the commands of its README but into a folder of its own: package, presets and entry point arrive."""
    pytest.importorskip("hatchling.builders.wheel", reason="hatchling, which builds distributions, is not here")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
               "--target", str(site), str(seismic)]  # fmt: skip
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    packed = {p.relative_to(site).as_posix() for p in (site / "d2v_seismic").rglob("*") if p.suffix != ".pyc"}
    there = {p.relative_to(seismic).as_posix() for p in (seismic / "d2v_seismic").rglob("*")}
    assert there <= packed
    points = site / "d2v_seismic-0.1.0.dist-info" / "entry_points.txt"
    assert points.read_text().split() == ["[d2v.modalities]", "seismic", "=", "d2v_seismic.plugin"]


def test_it_works_before_a_line_is_changed(
    seismic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, d2v: Callable[..., tuple[int, str]]
) -> None:
    """Found by the entry point of its pyproject, checked and run like any other."""
    info = seismic / "d2v_seismic-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: d2v-seismic\nVersion: 0.1.0\n")
    point = re.search(r'entry-points."d2v.modalities"\]\n(\w+) = "([\w.]+)"', (seismic / "pyproject.toml").read_text())
    assert point is not None
    (info / "entry_points.txt").write_text(f"[d2v.modalities]\n{point[1]} = {point[2]}\n")
    monkeypatch.syspath_prepend(str(seismic))
    monkeypatch.chdir(tmp_path)
    status, text = d2v("modalities")
    assert status == 0 and re.search(r"seismic +d2v-seismic 0.1.0  d2v_seismic.plugin  contract 1, fits", text)
    status, text = d2v("check", "seismic")
    assert status == 0 and re.search(r"All \d\d promises kept", text), text
    status, text = d2v("run", "modality=seismic", "train.max_steps=3", "out=run", "data.num_signals=30")
    assert status == 0 and (tmp_path / "run" / "summary.json").is_file(), text


def test_its_own_files(seismic: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of .npy files, one of them broken, one too short."""
    import numpy as np

    monkeypatch.syspath_prepend(str(seismic))
    from d2v_seismic.data import Files  # pyright: ignore

    from d2v_core import BadSample, UserError

    folder = tmp_path / "signals"
    folder.mkdir()
    with pytest.raises(UserError, match=r"holds no .npy file"):
        Files(folder, 40)
    with pytest.raises(UserError, match=r"data.path=.*gone does not exist"):
        Files(folder / "gone", 40)
    np.save(folder / "a.npy", np.arange(100.0))
    np.save(folder / "b.npy", np.zeros(5))
    np.save(folder / "c.npy", np.full(50, np.nan))
    (folder / "d.npy").write_bytes(b"no array")
    one = Files(folder / "a.npy", 40)
    assert len(one) == 1 and one.id(0) == "a.npy" and one[0].tolist() == list(range(100))
    files = Files(folder, 40)
    assert [files.id(i) for i in range(4)] == ["a.npy", "b.npy", "c.npy", "d.npy"]
    assert files.sizes.tolist() == [100, 5, 50, 1] and files[0].tolist() == list(range(100))
    for index, reason in ((1, "at least 40"), (2, "not finite"), (3, "cannot be read")):
        with pytest.raises(BadSample, match=reason):
            files[index]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("toy", "There is a modality 'toy' already, from d2v-toy 1.0"),
        ("core", "There is a Python module d2v_core already"),
        ("Seismic", "cannot name a modality.*How about seismic"),
        ("heart-rate", "cannot name a modality.*How about heart_rate"),
        ("2d", "cannot name a modality.*How about d"),
        ("class", "cannot name a modality.*no word of Python"),
        ("", "cannot name a modality"),
        ("../up", "cannot name a modality"),
    ],
)
def test_names_that_cannot_be(d2v, name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, text = d2v("new", name)
    assert status == 2 and re.search(reason, text), text
    assert list(tmp_path.iterdir()) == []


def test_a_distribution_of_that_name(d2v, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed for something else, such as a verb."""
    folder = tmp_path / "D2V_Taken-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: D2V.Taken\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    status, text = d2v("new", "taken", f"out={tmp_path / 'x'}")
    assert status == 2 and "A distribution D2V.Taken is installed already" in text


def test_nothing_is_overwritten(d2v, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d2v-radar").mkdir()
    status, text = d2v("new", "radar")
    assert status == 2 and "d2v-radar exists, and nothing is overwritten" in text
    assert list((tmp_path / "d2v-radar").iterdir()) == []
    status, text = d2v("new", "radar", "out=elsewhere")
    assert status == 0 and (tmp_path / "elsewhere" / "pyproject.toml").is_file() and "d2v check radar" in text
    for words, expected in (
        (["out=no/such/folder"], "no/such is no folder"),
        (["into=x"], "'into=x' is no option of it"),
        (["x"], "'x' is no option of it"),
    ):
        status, text = d2v("new", "radar", *words)
        assert status == 2 and expected in text, text
    assert d2v("new", "--help")[0] == 0 and cli.main(["new"]) == 2


@pytest.mark.parametrize(("name", "expected"), [("seismic", "Seismic"), ("heart_rate", "HeartRate"), ("x2_", "X2")])
def test_names_of_classes(name: str, expected: str) -> None:
    assert new.class_name(name) == expected
