"""Options of the whole suite. They stand here because pytest reads them before it knows the folders below."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--parity-root",
        default=None,
        metavar="FOLDER",
        help="tensors recorded from official implementations (default: ../shared/parity beside the repository, else "
        "the copy in tests/parity/recorded)",
    )
