"""n-gram models: ours against recordings of KenLM's lmplz, scores against the definition, broken files, the verb."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import pytest

from d2v_audio.lm import Text, estimate, write_arpa
from d2v_audio.ngram import NGramModel, arpa_words, read_arpa
from d2v_core.errors import UserError

RECORDED = Path(__file__).parent / "recorded"
TEXT = RECORDED / "harbour.txt"  # written for this test
ARPA = RECORDED / "harbour.4gram.arpa"  # lmplz -o 4 < harbour.txt, KenLM 0.3.0
SMALL = RECORDED / "harbour.first3.3gram.arpa"  # head -3 harbour.txt | lmplz -o 3 --discount_fallback


def ngrams(path: Path) -> dict[tuple[str, ...], tuple[float, float]]:
    """Read without the code under test."""
    found, order = {}, 0
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.endswith("-grams:"):
            order = int(line[1:].split("-")[0])
        elif order and line and not line.startswith("\\"):
            prob, words, *backoff = line.split("\t")
            assert len(words.split(" ")) == order
            found[tuple(words.split(" "))] = float(prob), float(backoff[0]) if backoff else 0.0
    return found


@pytest.mark.parametrize(("recorded", "lines", "order"), [(ARPA, None, 4), (SMALL, 3, 3)])
def test_every_ngram_equals_lmplz(tmp_path: Path, recorded: Path, lines: int | None, order: int):
    model = estimate([words for words in Text([str(TEXT)])][:lines], order)
    assert bool(model.fallback) == (lines is not None)
    write_arpa(tmp_path / "ours.arpa", model)
    ours, theirs = ngrams(tmp_path / "ours.arpa"), ngrams(recorded)
    assert ours.keys() == theirs.keys()
    for words, values in theirs.items():
        assert ours[words] == pytest.approx(values, abs=1e-4), words


def test_probabilities_sum_to_one():
    model = read_arpa(ARPA)
    predicted = [word for word in model.words if word != "<s>"]
    state = model.begin
    for word in ("the", "old", "man", "unheard", "and"):
        assert sum(10 ** model.score(state, w)[1] for w in predicted) == pytest.approx(1, abs=1e-5)
        state = model.score(state, word)[0]


def test_scores_follow_the_definition():
    model, table = read_arpa(ARPA), ngrams(ARPA)

    def p(words: tuple[str, ...]) -> float:
        if words in table:
            return table[words][0]
        return table.get(words[:-1], (0, 0))[1] + p(words[1:])

    sentence = ["<s>", "the", "café", "was", "not", "<unk>", "said", "yes", "the", "</s>"]
    by_hand = sum(p(tuple(sentence[max(0, i - 3) : i + 1])) for i in range(1, len(sentence)))
    words = [*sentence[1:5], "whatever", *sentence[6:-1]]
    assert model.sentence(words) == pytest.approx(by_hand, abs=1e-9)
    assert model.perplexity([words]) == pytest.approx(10 ** (-by_hand / 9))
    assert model.sentence(["the"], begin=False, end=False) == table[("the",)][0]


def test_scores_equal_kenlm():
    kenlm = pytest.importorskip("kenlm", reason="KenLM is not installed (pip install 'd2v[decode]')")
    theirs, ours = kenlm.Model(str(ARPA)), read_arpa(ARPA)
    lines = [*TEXT.read_text(encoding="utf-8").splitlines(), "no boat said xyz the the", "zz", "", "girl old the sea"]
    for line in lines:
        for border in (True, False):
            assert ours.sentence(line.split(), border, border) == pytest.approx(
                theirs.score(line, bos=border, eos=border), abs=1e-4
            ), line


def test_packed_and_without_unk(tmp_path: Path):
    packed = tmp_path / "lm.arpa.gz"
    packed.write_bytes(gzip.compress(ARPA.read_bytes()))
    assert read_arpa(packed).sentence(["the", "sea"]) == read_arpa(ARPA).sentence(["the", "sea"])
    assert arpa_words(packed)[:2] == ["the", "boat"] and "<unk>" not in arpa_words(packed)
    text = "\\data\\\nngram 1=3\n\n\\1-grams:\n-1 <s>\n-0.5 </s>\n-0.7 a\n\n\\end\\\n"
    (tmp_path / "a.arpa").write_text(text)
    assert read_arpa(tmp_path / "a.arpa").score((), "b")[1] == -100  # KenLM's value
    (tmp_path / "b.arpa").write_text(text.replace("1=3", "1=4").replace("-0.7 a", "-2.5 <UNK>\n-0.7 a"))
    model = read_arpa(tmp_path / "b.arpa")
    assert model.score((), "b")[1] == -2.5 and model.sentence(["a"]) == pytest.approx(-1.2)


def test_a_missing_middle_order_backs_off(tmp_path: Path):
    # Pruned models may have a 3-gram whose last two words are no 2-gram.
    (tmp_path / "p.arpa").write_text(
        "\\data\\\nngram 1=4\nngram 2=1\nngram 3=1\n\n\\1-grams:\n-2 <unk>\n-99 <s> -0.25\n-1 </s>\n-0.5 a -0.125\n\n"
        "\\2-grams:\n-0.2 <s> a -0.0625\n\n\\3-grams:\n-0.1 <s> a a\n\n\\end\\\n"
    )
    model = read_arpa(tmp_path / "p.arpa")
    assert model.sentence(["a", "a"]) == pytest.approx(-0.2 - 0.1 + (-0.125 - 1))
    assert model.sentence(["a"]) == pytest.approx(-0.2 + (-0.0625 - 0.125 - 1))


GOOD = """\\data\\
ngram 1=4
ngram 2=1

\\1-grams:
-2\t<unk>
-99\t<s>\t-0.2
-1\t</s>
-0.5\ta

\\2-grams:
-0.1\t<s> a

\\end\\
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("\\data\\", "nothing", r"line 1: expected \\data\\, found 'nothing'"),
        ("ngram 2=1", "ngram 3=1", "line 3: expected 'ngram 2=COUNT'"),
        ("ngram 1=4", "ngram 1=5", r"4 1-grams, though \\data\\ announces 5"),
        ("ngram 1=4", "ngram 1=3", r"4 1-grams, though \\data\\ announces 3"),
        ("-0.5\ta", "minus\ta", "line 9: not a number in"),
        ("-0.5\ta", "nan\ta", "line 9: nan is no log10 of a probability"),
        ("-0.5\ta", "0.5\ta", "line 9: 0.5 is no log10 of a probability"),
        ("<s> a", "<s> b", "line 12: 'b' is not among the 1-grams"),
        ("-0.1\t<s> a", "-0.1\ta", "line 12: expected a number, 2 words"),
        ("\n\\end\\\n", "", "the file ends after 1 of 1 2-grams"),
        ("\n\n\\2-grams:\n-0.1\t<s> a\n\n\\end\\\n", "", "the file ends after 4 of 4 1-grams"),
        ("\\end\\", "\\3-grams:", r"expected \\end\\, found"),
        ("-0.5\ta\n", "-0.5\t<s>\n", "line 9: the n-gram '<s>' stands here a second time"),
        ("</s>", "b", "has no </s> among its 1-grams"),
    ],
)
def test_broken_files(tmp_path: Path, old: str, new: str, said: str):
    path = tmp_path / "x.arpa"
    path.write_text(GOOD)
    assert isinstance(read_arpa(path), NGramModel)
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(UserError, match=said):
        read_arpa(path)


def test_files_that_are_something_else(tmp_path: Path):
    packed = gzip.compress(ARPA.read_bytes())
    (tmp_path / "cut.arpa.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(UserError, match="cannot be read on"):
        read_arpa(tmp_path / "cut.arpa.gz")
    (tmp_path / "lm.bin").write_bytes(b"mmap lm http://kheafield.com/code format version 5\n\0")
    with pytest.raises(UserError, match="KenLM's binary format"):
        read_arpa(tmp_path / "lm.bin")
    (tmp_path / "empty.arpa").write_text("")
    with pytest.raises(UserError, match="found the end of the file"):
        read_arpa(tmp_path / "empty.arpa")
    with pytest.raises(UserError, match="does not exist"):
        read_arpa(tmp_path / "no.arpa")


def test_the_verb(d2v, tmp_path: Path):
    (tmp_path / "a.txt").write_text(TEXT.read_text(encoding="utf-8") + "\n<s> the boat </s>\n", encoding="utf-8")
    status, said = d2v("lm", "train", "a.txt", "out=a.arpa.gz", "order=3", "case=upper")
    assert status == 0, said
    assert "1 lines without a word, 2 times <s>, </s> or <unk>" in said and "53 1-grams" in said
    model = read_arpa("a.arpa.gz")
    assert model.order == 3 and "CAFÉ" in model and "the" not in model
    status, said = d2v("lm", "train", "a.txt", "out=a.arpa.gz")
    assert status == 2 and "nothing is overwritten" in said
    (tmp_path / "b.txt").write_text("yes\n")
    status, said = d2v("lm", "train", "b.txt", "out=b.arpa", "order=3")
    assert status == 0 and "too small or too even" in said
    assert math.isfinite(read_arpa("b.arpa").sentence(["yes", "no"]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("lm", "train"), "needs at least one text file"),
        (("lm", "tain", "a.txt"), "has the verb train, not 'tain'"),
        (("lm", "train", "nothing.txt"), "does not exist"),
        (("lm", "train", "empty.txt"), "the text is empty"),
        (("lm", "train", "a.txt", "order=0"), "order=0 must be from 1 to 6"),
        (("lm", "train", "a.txt", "order=7"), "order=7 must be from 1 to 6"),
        (("lm", "train", "a.txt", "order=4"), "the longest sentence has 1 words"),
        (("lm", "train", "a.txt", "oder=4"), "order"),
        (("lm", "train", "a.txt", "out=no/lm.arpa"), "is no folder"),
        (("lm", "train", "latin.txt"), "line 2 is no UTF-8"),
    ],
)
def test_mistakes_with_the_verb(d2v, tmp_path: Path, words: tuple[str, ...], said: str):
    (tmp_path / "a.txt").write_text("one\n")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"one\ncaf\xe9 one two\n")
    status, printed = d2v(*words)
    assert status == 2 and said in printed, printed
    assert not list(tmp_path.glob("*.arpa"))


def test_a_mark_of_the_byte_order_is_no_part_of_a_word(tmp_path: Path):
    (tmp_path / "a.txt").write_text("THE SEA\nTHE SHIP\n", encoding="utf-8-sig")
    assert list(Text([str(tmp_path / "a.txt")])) == [["THE", "SEA"], ["THE", "SHIP"]]
