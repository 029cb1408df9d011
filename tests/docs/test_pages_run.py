"""The code of pages that teach is executed, block after block, as a reader would type it."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2v_core import Layout, Masks
from d2v_core.contract import StatesShare
from d2v_core.keyed import generator

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return [text for name, text in fences(page) if name == language]


def fences(page: str) -> list[tuple[str, str]]:
    """(language, text) of every block of code, those inside lists too."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.M | re.S)
    return [(language, textwrap.dedent(block)) for language, block in found]


def execute(page: str) -> dict[str, Any]:
    """The names that a page's Python leaves behind."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page, "python"), 1):
        exec(compile(block, f"{page}, block {number}", "exec", dont_inherit=True), names)
    return names


def test_a_data2vec_for_ones_own_tensors(one_thread: None) -> None:
    model, loop, features = blocks("own-tensors.md", "python")
    assert sum(bool(line.strip()) for line in model.splitlines()) <= 30
    names: dict[str, Any] = {}
    exec(model, names)
    losses: list[float] = []
    names["losses"] = losses
    assert "range(200)" in loop
    exec(loop.replace("range(200)", "range(60)") + "    losses.append(out.loss_sum.item() / out.num_scored)\n", names)
    assert len(losses) == 60 and np.mean(losses[-10:]) < 0.8 * np.mean(losses[:3])
    assert names["out"].target_std > 0.3
    exec(features, names)
    assert names["features"].shape == (16, 64, 48) and names["features"].isfinite().all()


def test_two_modalities_on_one_transformer(d2v: Callable[..., tuple[int, str]]) -> None:
    reading, model, loop = blocks("joint.md", "python")
    names: dict[str, Any] = {}
    exec(model, names)
    losses: dict[str, list[float]] = {"waves": [], "symbols": []}
    names["losses"] = losses
    assert "range(300)" in loop
    exec(
        loop.replace("range(300)", "range(120)") + "    losses[name].append(out.loss_sum.item() / out.num_scored)\n",
        names,
    )
    for one in losses.values():
        assert len(one) == 60 and np.mean(one[-10:]) < 0.8 * np.mean(one[:3])
    waves, symbols = (names["models"][name] for name in losses)
    assert waves.student.transformer is symbols.student.transformer
    assert waves.teacher.module.transformer is not symbols.teacher.module.transformer
    lengths = names["joint"].balance.lengths
    factors = torch.stack([names["joint"].balance.factor(i) for i in range(2)])
    assert (lengths > 0).all() and torch.allclose(lengths * factors, lengths.mean().expand(2))

    small = ("model.num_layers=2", "target.top_k_layers=2", "train.max_steps=4", "train.probe=false",
             "train.num_workers=0", "train.tensorboard=false", "vision.data.batch=4")  # fmt: skip
    status, text = d2v("run", "modality=[vision,text]", "out=runs/my-joint", *small)
    assert status == 0, text
    exec(reading, names)
    assert [one.shape for one in names["layers"]] == [(64, 96)] * 3 and names["run"].config.modality == "vision"
    status, text = d2v("run", "modality=vision", "preset=joint", "from=runs/my-joint", "out=runs/after", *small[:-1],
                       "data.batch=4")  # fmt: skip
    assert status == 0 and "Weights from runs/my-joint/vision/checkpoints" in text


def test_a_masking_policy(capsys: pytest.CaptureFixture[str]) -> None:
    names = execute("masking.md")
    (shown,) = blocks("masking.md", "")
    assert capsys.readouterr().out == shown
    policy = names["StatedRhythm"](names["RhythmConfig"](period=4))
    assert isinstance(policy, StatesShare)
    for size in (1, 2, 5, 40):
        layout = Layout((size,))
        drawn = [policy([layout], 1, [generator(seed, "mask")]).hidden for seed in range(400)]
        assert all(isinstance(one, torch.Tensor) and one.any() and (size == 1 or not one.all()) for one in drawn)
        low, high = policy.hidden_share(layout)
        assert low == high == pytest.approx(torch.stack(drawn).float().mean().item(), abs=0.03)
    assert isinstance(names["masks"], Masks)
    with pytest.raises(ValueError, match=r"mask.period=1 must be at least 2"):
        names["RhythmMasking"](names["RhythmConfig"](period=1))
    assert names["MyModality"].sections("any") == {"mask": names["RhythmConfig"]}


class Tutorial:
    """A reader of docs/plugin.md: writes the files, puts methods in their place, types the commands in a folder."""

    def __init__(self, folder: Path, d2v: Callable[..., tuple[int, str]]) -> None:
        self.folder, self.d2v = folder, d2v
        self.output = ""

    def read(self, language: str, text: str) -> None:
        header = re.match(r"# ([\w/]+\.\w+)(?:, in (\w+))?\n", text)
        if language == "bash":
            self.type(text)
        elif language == "":
            self.compare(text)
        elif header is None:
            exec(compile(text, "plugin.md", "exec"), {})
        elif header[2] is None:
            path = self.folder / header[1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        else:
            self.put(self.folder / header[1], header[2], text)

    def install(self) -> None:
        """As pip would, from what pyproject.toml says."""
        text = (self.folder / "pyproject.toml").read_text()
        name, version = (re.search(rf'^{key} = "(.*)"', text, re.M)[1] for key in ("name", "version"))  # type: ignore
        points = re.search(r'entry-points\."(.*)"\]\n(\w+) = "(.*)"', text)
        assert points is not None
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[{points[1]}]\n{points[2]} = {points[3]}\n")

    def type(self, commands: str) -> None:
        for module in [name for name in sys.modules if name.split(".")[0] == "d2v_motion"]:
            del sys.modules[module]  # each command is a process of its own
        importlib.invalidate_caches()
        for line in commands.splitlines():
            words = shlex.split(line)
            assert words[0] == "d2v"
            short = ["train.max_steps=20", "train.num_workers=0"] if words[1] == "run" else []
            status, self.output = self.d2v(*words[1:], *short)
            assert status == (2 if "BROKEN" in self.output else 0), self.output

    def compare(self, shown: str) -> None:
        """Every line of the answer shown stands in the one that came."""
        came = " ".join(self.output.split())
        assert [line for line in shown.splitlines() if " ".join(line.split()) not in came] == [], self.output

    @staticmethod
    def put(path: Path, kind: str, text: str) -> None:
        """Methods of a block replace those of the class, or are added to it; imports go to the top."""
        given, old = ast.parse(text), path.read_text()
        tree = ast.parse(old)
        (owner,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind)
        new = {node.name: node for node in given.body if isinstance(node, ast.FunctionDef)}
        owner.body = [node for node in owner.body if not (isinstance(node, ast.FunctionDef) and node.name in new)]
        owner.body += new.values()
        tree.body[0:0] = [node for node in given.body if isinstance(node, ast.Import | ast.ImportFrom)]
        path.write_text(ast.unparse(ast.fix_missing_locations(tree)))


def test_a_plugin_from_nothing(
    d2v: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    reader = Tutorial(tmp_path, d2v)
    page = fences("plugin.md")
    for language, block in page:
        reader.read(language, block)
        if language == "toml":
            reader.install()
    rows = json.loads(Path("first/summary.json").read_text())["probe"]
    assert rows["task"] == "pace" and {"pretrained", "untrained", "readings"} <= rows.keys()
    assert (tmp_path / "tests/test_motion.py").is_file() and len(page) > 15
