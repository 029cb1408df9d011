"""Options of the whole suite, which pytest reads before it knows the folders below, and what all folders share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-root",
        default=None,
        metavar="FOLDER",
        help="tensors recorded from official implementations (default: ../shared/parity beside the repository, else "
        "the copy in tests/parity/recorded)",
    )


@pytest.fixture(autouse=True)
def no_planned_step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests count, spoil and stop the steps of a run made in this process: the one that is made without values before,
    to see whether they fit, is none of theirs. Runs in processes of their own have it."""
    if request.path.stem != "test_plan":
        monkeypatch.setattr("d2v_core.plan.refuse_micro_batch", lambda modality, dataset, device: None)


@pytest.fixture
def one_thread() -> None:
    """Tiny networks: threads would wait for one another longer than they work. And a seed."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Path:
    """An empty working folder, for runs that say no other place."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def d2v(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command line in this process: exit status, and what it printed on both streams."""
    from d2v_core import cli

    del own_folder

    def call(*words: str) -> tuple[int, str]:
        status = cli.main(list(words))
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call
