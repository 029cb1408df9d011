"""The built-in beam search against recordings of flashlight's, and against flashlight itself where it is installed."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from d2v_audio import decode
from d2v_audio.beam import build_trie
from d2v_audio.decode import DecodeConfig, flashlight_missing, greedy, make_decoder
from d2v_audio.letters import Letters, lexicon_of, read_lexicon
from d2v_audio.ngram import arpa_words, read_arpa
from d2v_core.errors import UserError

RECORDED = Path(__file__).parent / "recorded"
ARPA = RECORDED / "harbour.4gram.arpa"
LETTERS = Letters.of((RECORDED / "harbour.txt").read_text(encoding="utf-8").splitlines())
SETTINGS = {
    "default": {},
    "narrow": {"beam": 5, "word_score": 2.0, "sil_score": -1.0},
    "threshold": {"beam_threshold": 8.0},
    "few letters": {"beam_size_token": 5},
    "one": {"beam": 1},
    "strong lm": {"beam": 20, "lm_weight": 4.0, "sil_score": 0.5},
    "no lm": {"lm": None},
    "homographs": {"letters_of_a_word": 1},  # six words with one spelling, the most that the trie keeps
}


def emissions(seed: int, peaked: bool) -> torch.Tensor:
    """(1, T, letters) logits: noise, or noise around a line of the text with frames doubled and blanks between."""
    rng = np.random.Generator(np.random.PCG64(seed))
    path = [0] * 30
    if peaked:
        lines = (RECORDED / "harbour.txt").read_text(encoding="utf-8").splitlines()
        path = []
        for i in LETTERS.encode(" ".join(lines[seed % len(lines)].split()[:6])):
            path += [0] * int(rng.integers(1, 3)) + [i] * int(rng.integers(1, 3))
    logits = rng.normal(0, 2, (len(path), len(LETTERS)))
    if peaked:
        logits[np.arange(len(path)), path] += rng.choice([2.0, 4.0, 6.0], len(path))
    # Rounded, so that every machine has the same numbers to the last bit.
    return torch.tensor(np.round(logits, 3), dtype=torch.float32)[None]


def decoder(engine: str, setting: str):
    options = dict(SETTINGS[setting])
    lm = options.pop("lm", ARPA)
    lexicon = lexicon_of(arpa_words(ARPA), LETTERS)
    if spelled := options.pop("letters_of_a_word", None):
        lexicon.words.update({word: [tuple(LETTERS.encode(word[:spelled]))] for word in lexicon.words})
    return make_decoder(LETTERS, DecodeConfig(engine=engine, **options), lm, lexicon, nbest=3, say=pytest.fail)


CASES = list(itertools.product(SETTINGS, (False, True), (0, 1)))


def results(engine: str) -> dict[str, list[dict[str, object]]]:
    decoders = {setting: decoder(engine, setting) for setting in SETTINGS}
    return {
        f"{setting}, {'peaked' if peaked else 'random'}, {seed}": [
            {"words": " ".join(h.words), "score": round(h.score, 4), "path": h.path}
            for h in decoders[setting](emissions(seed, peaked))[0]
        ]
        for setting, peaked, seed in CASES
    }


def same(ours: dict[str, list[dict[str, object]]], theirs: dict[str, list[dict[str, object]]]) -> None:
    assert ours.keys() == theirs.keys()
    for case, hypotheses in theirs.items():
        # Homographs of one probability are a draw, which flashlight decides by addresses in memory.
        for key in () if case.startswith("homographs") else ("words", "path"):
            assert [h[key] for h in ours[case]] == [h[key] for h in hypotheses], case
        assert [h["score"] for h in ours[case]] == pytest.approx([h["score"] for h in hypotheses], abs=1e-3), case


def test_builtin_equals_recorded_flashlight():
    # Written by this file's `results("flashlight")`, with ufal-flashlight-text 0.0.7.1 and ufal-kenlm 26.4.1.
    same(results("builtin"), json.loads((RECORDED / "beam.json").read_text(encoding="utf-8")))


@pytest.mark.filterwarnings("ignore")
def test_builtin_equals_flashlight():
    if missing := flashlight_missing():
        pytest.skip(f"{missing} (pip install 'd2v[decode]')")
    same(results("builtin"), results("flashlight"))
    lexicon = lexicon_of(["the", "sea"], LETTERS)
    both = [
        make_decoder(LETTERS, DecodeConfig(engine=engine), ARPA, lexicon, say=pytest.fail).weighted(1.0, 3.0, -0.5)
        for engine in ("flashlight", "builtin")
    ]
    logits = emissions(5, True)
    (theirs,), (ours,) = (d(logits)[0] for d in both)
    assert (
        ours.words == theirs.words and ours.path == theirs.path and ours.score == pytest.approx(theirs.score, abs=1e-3)
    )


def test_score_is_the_formula():
    # Every path of 5 frames over 4 symbols: with nothing pruned the search finds the best.
    letters = Letters.of(["ab"])
    lm = read_arpa(ARPA)
    words = {"a": "ab", "the": "b", "sea": "ba"}
    spelled = {word: tuple(letters.encode(spelling)) for word, spelling in words.items()}
    lexicon = lexicon_of(["ab"], letters)
    lexicon.words.clear()
    lexicon.words.update({word: [spelling] for word, spelling in spelled.items()})
    config = DecodeConfig(
        engine="builtin", beam=10_000, beam_threshold=1e9, lm_weight=0.7, word_score=0.4, sil_score=-0.3
    )
    logits = emissions(3, False)[:, :6, : len(letters)].contiguous()
    (found,) = make_decoder(letters, config, ARPA, lexicon, say=lambda line: None)(logits)[0]
    boundary, best = letters.boundary, (-math.inf, [""])
    texts = {letters.decode(spelling): word for word, spelling in spelled.items()}
    for path in itertools.product([0, *range(boundary, len(letters))], repeat=6):
        collapsed = [key for key, _ in itertools.groupby(path) if key != 0]
        if collapsed and collapsed[-1] != boundary:
            continue
        said = letters.decode(collapsed).split()
        if not all(word in texts for word in said):
            continue
        said = [texts[word] for word in said]
        score = sum(float(logits[0, t, token]) for t, token in enumerate(path))
        score += 0.7 * lm.sentence(said) + 0.4 * len(said) - 0.3 * path.count(boundary)
        best = max(best, (score, said))
    assert found.words == best[1] and found.score == pytest.approx(best[0], abs=1e-4)
    assert found.words  # something was said


def test_lengths_and_no_frames():
    search = decoder("builtin", "default")
    logits = emissions(1, True)
    padded = torch.cat([logits, torch.full((1, 7, logits.shape[2]), 9.0)], 1)
    assert search(padded, [logits.shape[1]]) == search(logits)
    (nothing,) = search(logits, [0])[0]
    assert nothing.words == [] and nothing.path == []
    assert nothing.score == pytest.approx(2 * read_arpa(ARPA).sentence([]))
    with pytest.raises(ValueError, match="NaN"):
        search(logits * math.nan)
    with pytest.raises(ValueError, match="one for each symbol"):
        search(logits[:, :, 1:])


def test_greedy():
    ids = [0, 4, 4, 5, 0, 5, 5, 4, 1, 6, 6, 2]
    letters = Letters.official()
    logits = torch.nn.functional.one_hot(torch.tensor([ids]), 32).float()
    assert greedy(logits, letters) == ["EE T"]
    assert greedy(logits, letters, [4]) == ["E"]


def test_letters():
    official = Letters.official()
    assert (
        len(official) == 32 and official.boundary == 4 and official.symbols[31] == "Z" and official.symbols[27] == "'"
    )
    ids = official.encode("IT'S  SO")
    assert "".join(official.symbols[i] for i in ids) == "IT'S|SO|" and official.decode(ids) == "IT'S SO"
    assert official.unknown("é it") == ["é", "i", "t"] and official.unknown("A|B") == ["|"]
    with pytest.raises(ValueError, match="outside the vocabulary: é"):
        official.encode("é")
    greek = Letters.of(["καλή μέρα", "cafe\u0301"])
    assert (
        greek.symbols[:5] == ("<s>", "<pad>", "</s>", "<unk>", "|") and greek.symbols[5] == "\u03b1"
    )  # twice in the text
    assert greek.decode(greek.encode("caf\u00e9 καλή")) == "caf\u00e9 καλή"
    with pytest.raises(UserError, match="have no letters"):
        Letters.of(["", " "])


def test_lexicon(tmp_path: Path):
    letters = Letters.official()
    lexicon = lexicon_of(["SEA", "café", "X2"], letters)
    assert list(lexicon.words) == ["SEA"]
    assert lexicon.summary() == (
        "2 of 3 words have letters outside the vocabulary and cannot be found: café (c a f é), X2 (2)"
    )
    with pytest.raises(UserError, match=r"no word can be spelled.*same case"):
        lexicon_of(["sea", "boat"], letters)
    path = tmp_path / "lexicon.txt"
    path.write_text("SEA\tS E A |\nSEA\tC\n\nDOCTOR\tD R\nÉ\tÉ |\n", encoding="utf-8")
    read = read_lexicon(path, letters)
    assert read.words["SEA"] == [tuple(letters.encode("SEA")), tuple(letters.encode("C"))]
    assert read.words["DOCTOR"] == [tuple(letters.encode("DR"))] and list(read.skipped) == ["É"]
    path.write_text("SEA\n")
    with pytest.raises(UserError, match="line 1: expected 'word TAB letters', found 'SEA'"):
        read_lexicon(path, letters)


def test_a_model_of_words_alone_is_for_the_search_of_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """KenLM refuses it."""
    monkeypatch.setattr(decode, "flashlight_missing", lambda with_lm=True: None)
    path, said = tmp_path / "1gram.arpa", list[str]()
    words = "".join(f"-1\t{word}\n" for word in ("<s>", "</s>", "<unk>", "sea"))
    path.write_text(f"\\data\\\nngram 1=4\n\n\\1-grams:\n{words}\n\\end\\\n")
    assert make_decoder(LETTERS, DecodeConfig(), path, say=said.append).name == "builtin"
    assert "KenLM wants pairs too" in said[0]
    with pytest.raises(UserError, match=r"KenLM wants pairs too\. Take engine=builtin"):
        make_decoder(LETTERS, DecodeConfig(engine="flashlight"), path)


def test_the_choice_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    monkeypatch.setattr(decode, "flashlight_missing", lambda with_lm=True: "it is not installed")
    assert make_decoder(LETTERS, DecodeConfig(), ARPA, say=said.append).name == "builtin"
    assert said == ["Decoding with the built-in search, which is slower than flashlight's: it is not installed."]
    with pytest.raises(UserError, match=r"engine=flashlight: it is not installed\. `pip install"):
        make_decoder(LETTERS, DecodeConfig(engine="flashlight"), ARPA)
    (tmp_path / "lm.bin").write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0")
    with pytest.raises(UserError, match="binary format, which the built-in search cannot read"):
        make_decoder(LETTERS, DecodeConfig(), tmp_path / "lm.bin")


def test_mismatches_are_told(tmp_path: Path):
    config, said = DecodeConfig(engine="builtin"), []
    (tmp_path / "lm.arpa.gz").write_bytes(gzip.compress(ARPA.read_bytes()))
    make_decoder(LETTERS, config, tmp_path / "lm.arpa.gz", lexicon_of(["sea", "seas", "2"], LETTERS), say=said.append)
    assert said[0].startswith("1 of 3 words have letters outside")
    assert said[1] == "1 of 2 words are unknown to the language model: seas"
    with pytest.raises(UserError, match=r"knows none of the lexicon's 1 words \(seas\)"):
        make_decoder(LETTERS, config, ARPA, lexicon_of(["seas"], LETTERS))
    with pytest.raises(UserError, match="no word can be spelled"):
        make_decoder(Letters.official(), config, ARPA)
    with pytest.raises(UserError, match="needs a language model or a lexicon"):
        make_decoder(LETTERS, config)
    for wrong in ({"beam": 0}, {"beam_threshold": -1.0}, {"lm_weight": math.inf}, {"beam_size_token": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            make_decoder(LETTERS, DecodeConfig(**wrong), ARPA)


def test_a_word_without_an_end():
    """Scripts without blanks between words make one of a whole line."""
    word = "".join(itertools.islice(itertools.cycle("AB"), 3000))
    letters = Letters.official()
    root = build_trie(lexicon_of([word, "A"], letters).words, None)
    assert root.look_ahead == 0.0
