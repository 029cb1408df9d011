"""Where the recorded tensors are, and a table of the deviations seen (`pytest -v tests/parity`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from .compare import Comparison, table

COMPARISONS = pytest.StashKey[list[Comparison]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    comparisons = config.stash.get(COMPARISONS, [])
    if comparisons and config.option.verbose > 0:
        terminalreporter.section("largest deviations from the recorded tensors")
        for line in table(comparisons):
            terminalreporter.write_line(line)


@pytest.fixture
def keep(request: pytest.FixtureRequest) -> list[Comparison]:
    """Comparisons put here appear in the table at the end."""
    return request.config.stash.setdefault(COMPARISONS, [])


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """The models are tiny: threads would wait for one another longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
