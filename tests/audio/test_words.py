"""From emissions to words: greedy, by a lexicon, with weights tuned on some utterances; models named on the command
line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from d2v_audio.align import Clock
from d2v_audio.decode import make_decoder
from d2v_audio.letters import Letters, lexicon_of, read_lexicon
from d2v_audio.ngram import read_arpa
from d2v_audio.words import RANGES, WEIGHTS, SearchConfig, language_model, open_decoder, times, tune, understand
from d2v_core.errors import UserError

LETTERS = Letters.official()
TEXTS = ["THE SEA", "THE SHIP", "A SEA", "THE SEA THE SHIP"]


def spelled(text: str, noise: float = 0.0, seed: int = 0) -> torch.Tensor:
    """(T, 32) log-probabilities: two frames of each letter, a blank before each."""
    path = [symbol for letter in LETTERS.encode(text) for symbol in (0, letter, letter)]
    logits = noise * torch.randn(len(path), len(LETTERS), generator=torch.Generator().manual_seed(seed))
    logits[torch.arange(len(path)), torch.tensor(path)] += 6.0
    return logits.log_softmax(-1)


def test_greedy_words_and_their_times() -> None:
    emissions = spelled("THE SEA")
    (heard,) = understand([emissions], LETTERS)
    assert heard.text == "THE SEA"
    assert heard.spelled == [LETTERS.encode("THE")[:-1], LETTERS.encode("SEA")[:-1]]
    first, second = times(heard, emissions, LETTERS, Clock(0.01, 0.02, 10.0))
    assert (first.text, second.text) == ("THE", "SEA")
    assert (first.start_s, first.end_s) == (pytest.approx(0.02), pytest.approx(0.18))  # frames 1 to 8
    assert second.start_s == pytest.approx(0.26)  # frame 13; 10 to 12 are the boundary's
    assert first.confidence > 0.9
    (silence,) = understand([torch.zeros(0, 32)], LETTERS)
    assert silence.text == ""


def test_the_search_finds_words_of_the_lexicon_with_times() -> None:
    decoder = make_decoder(
        LETTERS, SearchConfig(engine="builtin", word_score=0.0), None, lexicon_of(["SEA", "THE", "SHIP"], LETTERS)
    )
    emissions = spelled("THE SEO")
    assert understand([emissions], LETTERS)[0].text == "THE SEO"
    (heard,) = understand([emissions], LETTERS, decoder)
    assert heard.words == ["THE", "SEA"]
    assert [word.text for word in times(heard, emissions, LETTERS, Clock(0.01, 0.02, 10.0))] == ["THE", "SEA"]
    (nothing,) = understand([torch.full((1, 32), -3.0)], LETTERS, decoder)
    assert nothing.words == [] and times(nothing, torch.full((1, 32), -3.0), LETTERS, Clock(0, 1, 1)) == []


def test_a_spelling_that_is_not_the_word(tmp_path: Path) -> None:
    (tmp_path / "lexicon.txt").write_text("2\tT W O |\n")
    decoder = open_decoder(LETTERS, SearchConfig(engine="builtin"), None, str(tmp_path / "lexicon.txt"), print)
    emissions = spelled("TWO TWO")
    (heard,) = understand([emissions], LETTERS, decoder)
    assert heard.words == ["2", "2"]
    assert [word.text for word in times(heard, emissions, LETTERS, Clock(0.01, 0.02, 10.0))] == ["2", "2"]


def test_models_named_on_the_command_line(tmp_path: Path) -> None:
    assert language_model("none", list, tmp_path) is None
    path = language_model("2gram", lambda: TEXTS, tmp_path / "new")
    assert path is not None
    model = read_arpa(path)
    assert model.order == 2 and "SHIP" in model
    longer = language_model("6gram", lambda: ["A SEA"], tmp_path)  # no text is that long
    assert longer is not None and read_arpa(longer).order == 4
    assert language_model(str(path), list, tmp_path) == path
    for wrong, said in (("9gram", "1gram to 6gram"), ("lm.arpa", "does not exist"), (" ", "empty")):
        with pytest.raises(UserError, match=said):
            language_model(wrong, lambda: TEXTS, tmp_path)


def test_tuning_takes_what_is_best_and_is_the_same_each_time(tmp_path: Path) -> None:
    lm = language_model("2gram", lambda: TEXTS, tmp_path)
    config = SearchConfig(engine="builtin", beam=10, tune=True, trials=8, lm_weight=0.0, word_score=-30.0)
    decoder = open_decoder(LETTERS, config, lm, None, print)
    assert decoder is not None
    emissions = [spelled(text, 4.0, seed) for seed, text in enumerate(TEXTS)]
    decoder, record = tune(decoder, config, LETTERS, emissions, TEXTS)
    trials = record["trials"]
    assert len(trials) == 8
    assert [trials[0][name] for name in WEIGHTS] == [0.0, -30.0, 0.0]  # the given ones
    assert record["dev_wer"] == min(trial["wer"] for trial in trials) < trials[0]["wer"]
    for name in WEIGHTS:
        assert all(RANGES[name][0] <= trial[name] <= RANGES[name][1] for trial in trials[1:])
    # The decoder that comes back has the weights of the record.
    heard = [one.text for one in understand(emissions, LETTERS, decoder)]
    again = make_decoder(LETTERS, SearchConfig(engine="builtin", beam=10, **{n: record[n] for n in WEIGHTS}), lm)
    assert heard == [one.text for one in understand(emissions, LETTERS, again)]
    assert tune(decoder, config, LETTERS, emissions, TEXTS).record == record


def test_a_lexicon_in_another_case_names_the_letters(tmp_path: Path) -> None:
    lm = language_model("2gram", lambda: ["the sea 'tis", "' the ship"], tmp_path)
    with pytest.raises(UserError, match=r"4 of 5 words \(80 %\).*vocabulary lacks: .*h \(in 2 words\).*same case"):
        open_decoder(LETTERS, SearchConfig(), lm, None, print)


def test_a_broken_model_names_its_line(tmp_path: Path) -> None:
    path = language_model("2gram", lambda: TEXTS, tmp_path)
    assert path is not None
    text = path.read_text().splitlines()
    text[8] = "nonsense"
    path.write_text("\n".join(text))
    with pytest.raises(UserError, match="line 9"):
        open_decoder(LETTERS, SearchConfig(), path, None, print)


ACCENT = "\N{COMBINING ACUTE ACCENT}"


def test_a_letter_and_an_accent_that_are_one_letter_when_composed() -> None:
    """The accent stands for itself over letters without a composed form; over others the network may spell it too."""
    letters = Letters.of([f"te q{ACCENT} a"])
    assert ACCENT in letters.symbols and "\N{LATIN SMALL LETTER E WITH ACUTE}" not in letters.symbols
    path = [0, *(letters.symbols.index(c) for c in f"te{ACCENT}"), letters.boundary, letters.symbols.index("a")]
    emissions = torch.full((len(path), len(letters)), -9.0)
    emissions[torch.arange(len(path)), torch.tensor(path)] = -0.01
    (heard,) = understand([emissions], letters)
    assert heard.words == ["t\N{LATIN SMALL LETTER E WITH ACUTE}", "a"]  # composed, as references are
    assert heard.spelled == [path[1:4], path[5:]]
    assert [word.text for word in times(heard, emissions, letters, Clock(0.01, 0.02, 1.0))] == heard.words


def test_words_of_a_model_with_accents_apart_are_those_of_the_references(tmp_path: Path) -> None:
    letters = Letters.of(["caf\N{LATIN SMALL LETTER E WITH ACUTE} bar"])
    lexicon = lexicon_of([f"cafe{ACCENT}", "bar"], letters)
    decoder = make_decoder(letters, SearchConfig(engine="builtin", word_score=0.0), None, lexicon)
    path = [symbol for letter in letters.encode(f"cafe{ACCENT} bar") for symbol in (0, letter)]
    emissions = torch.full((len(path), len(letters)), -9.0)
    emissions[torch.arange(len(path)), torch.tensor(path)] = -0.01
    (heard,) = understand([emissions], letters, decoder)
    assert heard.text == "caf\N{LATIN SMALL LETTER E WITH ACUTE} bar"
    (tmp_path / "lexicon.txt").write_text(f"cafe{ACCENT}\tc a f e{ACCENT}\nbar\tb a r\n", encoding="utf-8-sig")
    found = read_lexicon(tmp_path / "lexicon.txt", letters)
    assert found.skipped == {} and list(found.words) == [f"cafe{ACCENT}", "bar"]
