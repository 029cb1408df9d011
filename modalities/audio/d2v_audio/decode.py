"""From a CTC head's output to words: greedy, or a beam search with a lexicon and an n-gram language model.

The beam search is flashlight's through torchaudio where the packages of `pip install 'd2v[decode]'` are there, else the
built-in one (`d2v_audio.beam`), which gives the same answer more slowly.
"""

from __future__ import annotations

import gzip
import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from d2v_audio.beam import Entry, Options, build_trie, search, trace
from d2v_audio.letters import BLANK, BOUNDARY, Letters, Lexicon, lexicon_of
from d2v_audio.ngram import KENLM_BINARY, NGramModel, arpa_order, arpa_words, read_arpa
from d2v_core.config import opt
from d2v_core.errors import UserError
from d2v_core.files import existing, first


@dataclass
class DecodeConfig:
    """The beam search. Defaults: fairseq, examples/speech_recognition/new/decoders/decoder_config.py."""

    engine: Literal["auto", "flashlight", "builtin"] = opt("auto", "auto takes flashlight where it is installed.")
    beam: int = opt(50, "Hypotheses kept at each frame; 1500 for published results.")
    beam_size_token: int | None = opt(None, "Best letters of a frame that are tried; null = all.")
    beam_threshold: float = opt(50.0, "Hypotheses that are worse than the best by more than this are dropped.")
    lm_weight: float = opt(2.0, "Factor of the language model's log10 probability.")
    word_score: float = opt(-1.0, "Added for each word.")
    sil_score: float = opt(0.0, "Added for each frame of the word boundary.")

    def check(self) -> None:
        """Raises UserError for numbers with which no search can be made."""
        for name in ("beam", "beam_size_token"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1.")
        if not self.beam_threshold >= 0:
            raise UserError(f"beam_threshold={self.beam_threshold} must not be negative.")
        for name in ("lm_weight", "word_score", "sil_score"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name}={getattr(self, name)} must be a finite number.")


class Hypothesis(NamedTuple):
    """score: of the search. path: the token of each frame."""

    words: list[str]
    score: float
    path: list[int]


class Decoder(Protocol):
    """Finds the words of `lexicon` in logits; `name` says which search does it."""

    name: str
    lexicon: Lexicon

    def __call__(self, logits: Tensor, lengths: Sequence[int] | None = None) -> list[list[Hypothesis]]:
        """logits: (B, T, symbols), not normalised. lengths: valid frames. The nbest hypotheses of each, best first."""
        ...

    def weighted(self, lm_weight: float, word_score: float, sil_score: float) -> Decoder:
        """The same decoder with other weights; what was read and built is shared."""
        ...


def greedy(logits: Tensor, letters: Letters, lengths: Sequence[int] | None = None) -> list[str]:
    """(B, T, symbols) -> texts: best symbol of each frame, repeats merged, blanks dropped."""
    _check(logits, letters)
    texts: list[str] = []
    for best, length in zip(logits.argmax(-1).cpu(), _lengths(logits, lengths), strict=True):
        texts.append(letters.decode(torch.unique_consecutive(best[:length]).tolist()))
    return texts


def make_decoder(
    letters: Letters,
    config: DecodeConfig,
    lm: str | Path | None = None,
    lexicon: Lexicon | None = None,
    nbest: int = 1,
    say: Callable[[str], None] = print,
) -> Decoder:
    """The beam search that `config.engine` names.

    lm: an ARPA file, packed or not; KenLM's binary format with flashlight only. lexicon: the words that can be found;
    None = those of the language model. say: is told of a fallback, of words left out and of words the model lacks.
    Raises UserError where the engine is not installed, files are broken, or lexicon and letters have nothing in common.
    """
    config.check()
    if nbest < 1:
        raise UserError(f"nbest={nbest} must be at least 1.")
    if lm is None and lexicon is None:
        raise UserError("a beam search needs a language model or a lexicon to know its words.")
    binary = lm is not None and is_binary(lm)
    missing = without_flashlight(config, lm, binary, lexicon is not None)
    builtin = config.engine == "builtin" or bool(missing)
    if config.engine == "auto" and missing:
        say(f"Decoding with the built-in search, which is slower than flashlight's: {missing}.")
    if lexicon is None:
        assert lm is not None
        words = arpa_words(lm)
        lexicon = lexicon_of(words, letters)
    else:
        words = None if lm is None or binary else arpa_words(lm)
    _spellable(lexicon, lm)
    if lexicon.summary():
        say(lexicon.summary())
    if words is not None:
        _compare(lexicon, set(words), lm, say)
    if builtin:
        return _BuiltinDecoder(letters, config, lexicon, read_arpa(lm) if lm is not None else None, nbest)
    return _FlashlightDecoder(
        letters, config, lexicon, None if lm is None else existing(lm, "an ARPA file", "LM"), nbest
    )


def flashlight_missing(with_lm: bool = True) -> str | None:
    """Why flashlight's search cannot be used; None where it can. with_lm: KenLM is needed too."""
    try:
        import flashlight.lib.text.decoder  # noqa: F401  # pyright: ignore
    except ImportError:
        return "ufal-flashlight-text is not installed"
    if with_lm:
        try:
            from flashlight.lib.text.decoder.kenlm import KenLM  # noqa: F401  # pyright: ignore
        except Exception:  # what it raises depends on the version
            return "ufal-kenlm is not installed"
    return None


def without_flashlight(config: DecodeConfig, lm: str | Path | None, binary: bool, has_lexicon: bool) -> str | None:
    """Why flashlight's search cannot be used; None where it can. binary: whether `lm` is KenLM's binary format.

    Raises UserError where no search can be made with these.
    """
    missing = flashlight_missing(lm is not None)
    if config.engine == "flashlight" and missing:
        raise UserError(f"engine=flashlight: {missing}. `pip install 'd2v[decode]'`, or take engine=builtin.")
    if config.engine != "builtin" and lm is not None and not binary and Path(lm).is_file() and arpa_order(lm) == 1:
        missing = f"lm={lm} has words alone, KenLM wants pairs too"
        if config.engine == "flashlight":
            raise UserError(f"engine=flashlight: {missing}. Take engine=builtin, or an LM of a higher order.")
    if binary and (config.engine == "builtin" or missing):
        raise UserError(
            f"LM={lm} is KenLM's binary format, which the built-in search cannot read"
            + (f" ({missing})" if missing else "")
            + ": `pip install 'd2v[decode]'` and take engine=flashlight, or give the ARPA file."
        )
    if binary and not has_lexicon:
        raise UserError(f"LM={lm} is KenLM's binary format, which does not tell its words: give a lexicon file too.")
    return missing


class _BuiltinDecoder:
    name = "builtin"

    def __init__(
        self, letters: Letters, config: DecodeConfig, lexicon: Lexicon, lm: NGramModel | None, nbest: int
    ) -> None:
        self._letters, self._config, self._lm, self._nbest = letters, config, lm, nbest
        self.lexicon, self._root = lexicon, build_trie(lexicon.words, lm)

    def weighted(self, lm_weight: float, word_score: float, sil_score: float) -> Decoder:
        other = object.__new__(_BuiltinDecoder)
        other.__dict__.update(self.__dict__)
        other._config = replace(self._config, lm_weight=lm_weight, word_score=word_score, sil_score=sil_score)
        return other

    def __call__(self, logits: Tensor, lengths: Sequence[int] | None = None) -> list[list[Hypothesis]]:
        _check(logits, self._letters)
        c = self._config
        size_token = c.beam_size_token or len(self._letters)
        options = Options(c.beam, size_token, c.beam_threshold, c.lm_weight, c.word_score, c.sil_score)
        found: list[list[Hypothesis]] = []
        for emissions, length in zip(logits.float().cpu(), _lengths(logits, lengths), strict=True):
            frames = emissions[:length].tolist()
            entries = search(frames, self._root, self._lm, options, BLANK, self._letters.boundary)
            found.append([_hypothesis(entry) for entry in entries[: self._nbest]])
        return found


def _hypothesis(entry: Entry) -> Hypothesis:
    words, path = trace(entry)
    return Hypothesis(words, entry.score, path)


class _FlashlightDecoder:
    name = "flashlight"

    def __init__(self, letters: Letters, config: DecodeConfig, lexicon: Lexicon, lm: Any, nbest: int) -> None:
        """lm: a path, or the model that another decoder has loaded."""
        from torchaudio.models.decoder import ctc_decoder

        self._letters, self._config, self.lexicon, self._nbest = letters, config, lexicon, nbest
        with tempfile.TemporaryDirectory() as folder:
            spellings = Path(folder, "lexicon.txt")
            with open(spellings, "w", encoding="utf-8", newline="\n") as file:
                for word, ways in lexicon.words.items():
                    file.writelines(f"{word} {' '.join(letters.symbols[i] for i in way)}\n" for way in ways)
            if isinstance(lm, Path):
                lm = str(_unpacked(lm, Path(folder)))
            try:
                self._decoder = ctc_decoder(
                    lexicon=str(spellings), tokens=list(letters.symbols), lm=lm, nbest=nbest, beam_size=config.beam,
                    beam_size_token=config.beam_size_token, beam_threshold=config.beam_threshold,
                    lm_weight=config.lm_weight, word_score=config.word_score, sil_score=config.sil_score,
                    blank_token=letters.symbols[BLANK], sil_token=BOUNDARY,
                )  # fmt: skip
            except RuntimeError as error:  # what KenLM throws
                reason = str(error).splitlines()[-1]
                raise UserError(f"lm={lm} cannot be read by KenLM: {reason}. Make or fetch it again.") from None

    def weighted(self, lm_weight: float, word_score: float, sil_score: float) -> Decoder:
        config = replace(self._config, lm_weight=lm_weight, word_score=word_score, sil_score=sil_score)
        return _FlashlightDecoder(self._letters, config, self.lexicon, self._decoder.lm, self._nbest)

    def __call__(self, logits: Tensor, lengths: Sequence[int] | None = None) -> list[list[Hypothesis]]:
        _check(logits, self._letters)
        words = self._decoder.word_dict
        found: list[list[Hypothesis]] = []
        for emissions, length in zip(logits.float().cpu().contiguous(), _lengths(logits, lengths), strict=True):
            # Not torchaudio's own call, which merges the frames that we want one by one. The first and last token are
            # silences that the search itself adds.
            results = self._decoder.decoder.decode(emissions.data_ptr(), length, logits.shape[2])
            found.append(
                [
                    Hypothesis([words.get_entry(w) for w in r.words if w >= 0], r.score, list(r.tokens[1:-1]))
                    for r in results[: self._nbest]
                ]
            )
        return found


def _check(logits: Tensor, letters: Letters) -> None:
    if logits.ndim != 3 or logits.shape[2] != len(letters):
        raise ValueError(f"logits must be (B, T, {len(letters)}), one for each symbol; given {tuple(logits.shape)}")
    if torch.isnan(logits).any():
        raise ValueError("logits contain NaN")


def _lengths(logits: Tensor, lengths: Sequence[int] | None) -> list[int]:
    if lengths is None:
        return [logits.shape[1]] * len(logits)
    given = [int(length) for length in lengths]
    if len(given) != len(logits) or not all(0 <= length <= logits.shape[1] for length in given):
        raise ValueError(f"lengths must be {len(logits)} numbers up to {logits.shape[1]}; given {given}")
    return given


def is_binary(lm: str | Path) -> bool:
    """Whether a file is of KenLM's binary format. Raises UserError where it is no file."""
    path = existing(lm, "an ARPA file", "LM")
    if path.is_dir():
        raise UserError(f"lm={lm} is a folder; give an ARPA file.")
    with open(path, "rb") as file:
        return file.read(len(KENLM_BINARY)) == KENLM_BINARY


def _unpacked(path: Path, folder: Path) -> Path:
    """Wheels of KenLM are not always built with zlib."""
    with open(path, "rb") as file:
        if file.read(2) != b"\x1f\x8b":
            return path
    unpacked = folder / "lm.arpa"
    try:
        with gzip.open(path, "rb") as source, open(unpacked, "wb") as target:
            shutil.copyfileobj(source, target)
    except (OSError, EOFError) as error:
        raise UserError(f"lm={path} cannot be unpacked ({error}); fetch or make it again.") from error
    return unpacked


def _spellable(lexicon: Lexicon, lm: str | Path | None) -> None:
    """Raises UserError where most words are lost: letters and words are then of two kinds."""
    lost, kept = len(lexicon.skipped), len(lexicon.words)
    if lost > kept:
        counts = Counter(letter for letters in lexicon.skipped.values() for letter in letters.split())
        missing = first([f"{letter} (in {count} words)" for letter, count in counts.most_common()], ", ")
        raise UserError(
            f"{lost} of {lost + kept} words ({100 * lost / (lost + kept):.0f} %) of "
            + ("the lexicon" if lm is None else f"the lexicon or lm={lm}")
            + f" have letters that the network's vocabulary lacks: {missing}. Are both in the same case and script? "
            "`d2v lm train ... case=upper` spells a text anew."
        )


def _compare(lexicon: Lexicon, words: set[str], lm: str | Path | None, say: Callable[[str], None]) -> None:
    lacking = [word for word in lexicon.words if word not in words]
    if len(lacking) == len(lexicon.words):
        raise UserError(
            f"lm={lm} knows none of the lexicon's {len(lacking)} words ({first(lacking, ', ')}). Are both in the same "
            "case?"
        )
    if lacking:
        say(f"{len(lacking)} of {len(lexicon.words)} words are unknown to the language model: {first(lacking, ', ')}")
