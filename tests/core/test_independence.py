"""The core knows no modality."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import d2v_core

SOURCES = sorted(
    path
    for path in Path(d2v_core.__file__).parent.rglob("*.py")
    if "template" not in path.parts  # of `d2v new`
)
WORDS = (
    r"audio|vision|\b(speech|waveform|librispeech|phones?|mel|images?|pixels?)\b"
    r"|tokeni[sz]er|vocabular|\bbpe\b"
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_word_of_a_modality(path: Path):
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    found = [f"{path.name}:{number}: {line.strip()}" for number, line in lines if re.search(WORDS, line, re.I)]
    assert not found, "\n".join(found)


def test_no_import_of_a_modality():
    for path in SOURCES:
        imports = re.findall(r"^\s*(?:from|import)\s+([\w.]+)", path.read_text(encoding="utf-8"), re.M)
        assert not [
            name
            for name in imports
            if re.match(r"d2v_(?!core)|torchaudio|soundfile|torchvision|timm|PIL|tokenizers", name)
        ], path
