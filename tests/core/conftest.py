"""The toy modality stands in for a real one: these tests need no modality to be installed.

It lies in toy/ with its metadata beside it, as an installed distribution would, and is found through sys.path.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_core import cli
from d2v_core.config import load_config

TOY = Path(__file__).parent / "toy"
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, a seed, and the toy on the path."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    monkeypatch.syspath_prepend(str(TOY))


@pytest.fixture
def environment() -> dict[str, str]:
    """What a child process needs to find the toy."""
    path = os.pathsep.join([str(TOY), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore:This DataLoader will create",
    }  # one core, two workers


@pytest.fixture
def python(environment: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python -c code` in a fresh process; with check, its failure is this test's."""

    def call(code: str, *, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env={**environment, **variables}, cwd=tmp_path, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr
        return done

    return call


@pytest.fixture
def make() -> Callable[..., Any]:
    """The toy modality of a configuration: make("train.max_steps=3")."""

    def build(*words: str) -> Any:
        config, kind = load_config(["modality=toy", *words])
        return kind(config)

    return build


@pytest.fixture
def d2v(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command line in this process: exit status, and what it printed on both streams."""

    def call(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        status = cli.main(list(words))
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


@pytest.fixture
def read_run() -> Callable[[Path], tuple[list[dict[str, Any]], dict[str, torch.Tensor]]]:
    """Metrics without what depends on the clock, and every tensor of the newest checkpoint."""
    from safetensors.torch import load_file

    def read(run: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            for key in ("seconds", "throughput", "data_wait"):
                assert line.pop(key) >= 0
        newest = max(p for p in (run / "checkpoints").iterdir() if re.fullmatch(r"step-\d{8}", p.name))
        tensors = {f"{part}.{name}": tensor for part in ("model", "teacher", "state")
                   for name, tensor in load_file(newest / f"{part}.safetensors").items()}  # fmt: skip
        return lines, tensors

    return read
