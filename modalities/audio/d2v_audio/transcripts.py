"""What is said in each clip, for CTC fine-tuning: the user's transcribed audio, or built-in utterances.

Transcripts stand in LibriSpeech's *.trans.txt, in a column of a .tsv table, or beside a fairseq manifest (NAME.ltr or
NAME.wrd). Files are found and refused by `files.scan`, as for pre-training. `read_transcribed` is of use by itself.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from d2v_audio.classification import (
    PARTS,
    LabelledConfig,
    LabelledFiles,
    hold_speakers_back,
    refuse_options_of_pretraining,
    speakers,
)
from d2v_audio.data import AudioConfig, AudioSample, normalise, scan_data
from d2v_audio.files import Clip, ScanReport, duration, table_columns
from d2v_audio.letters import UNK, Letters, normal
from d2v_audio.synthetic import SyntheticSpeech
from d2v_audio.wer import letter_edits, total, word_edits
from d2v_core.config import opt
from d2v_core.contract import Dataset, LabelledPart, Task
from d2v_core.ctc import sequences, tokens_needed
from d2v_core.errors import UserError
from d2v_core.files import existing, first
from d2v_core.keyed import generator
from d2v_core.labelled import ids
from d2v_core.shards import refuse_shards

if TYPE_CHECKING:
    from d2v_audio.modality import AudioModality

EXPECTED = "a folder, a .tsv table or a fairseq manifest"
TEXT_COLUMNS = ("transcript", "text", "sentence")
FIRST_UTTERANCE = 2_000_000  # of the built-in corpus: none that pre-training, probe or first words have used
UNITS_S: Mapping[str, float] = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
# Libri-Light's limited supervision (Kahn et al., 2020): folders of librispeech_finetuning/ by the amount asked for. The
# 10 minutes are the first of six such sets inside the hour; 10 hours are the hour and the other nine.
LIBRI_LIGHT: Mapping[str, tuple[str, ...]] = {"10m": ("1h/0/",), "1h": ("1h/",), "9h": ("9h/",), "10h": ("1h/", "9h/")}
MORE_THAN_THERE = 1.02  # train-clean-100 has 100.6 h, other sets a little less than their names say
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # in a reference, a letter that the vocabulary lacks


@dataclass
class TranscriptsConfig:
    """Where transcripts stand and what they are spelled with (labelled.task=transcripts)."""

    column: str = opt("", "Column of a .tsv table with the transcripts; empty = transcript, text or sentence.")
    case: Literal["keep", "upper", "lower"] = opt("keep", "Spell all transcripts in one case.")
    letters: Literal["auto", "english", "transcripts"] = opt(
        "auto",
        "Vocabulary: english = the official one, upper case and the apostrophe; transcripts = what the training part "
        "is spelled with, in any script; auto = english where that spells the whole training part.",
    )
    train: list[str] = opt(
        [], "Sub-folders or values of the column of splits to train on; empty = train, or those whose names begin so."
    )
    dev: list[str] = opt([], "The same for the part to choose on, such as dev-other.")
    test: list[str] = opt([], "The same for the part to test on.")
    dev_path: str | None = opt(None, "Folder, table or manifest of the part to choose on, where it lies elsewhere.")
    test_path: str | None = opt(None, "Folder, table or manifest of the part to test on, where it lies elsewhere.")


Transcribed = tuple[Clip, str]
"""A clip and what is said in it."""


@dataclass
class Found:
    """Transcribed clips by part. notes: what to tell the person who starts a run. left_out: clips by id, and why."""

    report: ScanReport
    parts: dict[str, list[Transcribed]] = field(
        default_factory=lambda: dict[str, list[Transcribed]](train=[], dev=[], test=[])
    )
    notes: list[str] = field(default_factory=list[str])
    left_out: dict[str, str] = field(default_factory=dict[str, str])

    def leave_out(self, what: Mapping[str, str], why: str) -> None:
        """what: clips by id, and the reason of each. why: the reason they share."""
        if what:
            self.left_out.update(what)
            self.notes.append(f"left out: {len(what)} {why}: {first(list(what), ', ')}")


class Utterances(Dataset[AudioSample]):
    """Built-in utterances; `transcripts` says what they say. The speakers of dev and test are in no other part."""

    def __init__(self, split: Literal["train", "dev", "test"], count: int, sample_rate: int) -> None:
        corpus = SyntheticSpeech(split, FIRST_UTTERANCE + count, 0, sample_rate)
        self.split, self.sample_rate = split, sample_rate
        spoken = [corpus[FIRST_UTTERANCE + i] for i in range(count)]
        self.transcripts = [utterance.transcript for utterance in spoken]
        self.speakers = [str(utterance.speaker) for utterance in spoken]
        self.waveforms = [normalise(utterance.waveform) for utterance in spoken]
        self.sizes = np.array([len(waveform) for waveform in self.waveforms], dtype=np.int64)

    def id(self, index: int) -> str:
        return f"{self.split}-{index}"

    def __getitem__(self, index: int) -> AudioSample:
        return AudioSample(self.waveforms[index])

    def describe(self) -> str:
        return (
            f"No data.path: built-in synthetic utterances, {self.sizes.sum() / self.sample_rate / 60:.1f} min to train "
            "on, dev and test by speakers of their own. Give data.path=/your/transcribed/audio for your own."
        )


def open_transcription(modality: AudioModality) -> Task[AudioSample]:
    """The task of `data.path`, or the built-in one. Raises UserError saying what was found and what was expected."""
    section = modality.config.section
    data, config, labelled = (
        modality.data,
        section("transcripts", TranscriptsConfig),
        section("labelled", LabelledConfig),
    )
    labelled.check(data.max_s)
    refuse_options_of_pretraining(data)
    if data.path is None:
        return _built_in(modality, labelled, config)
    refuse_shards(data.path)
    least = max(modality.two_tokens(), round(labelled.min_s * data.sample_rate))
    found = read_transcribed(data, config, labelled.split_column, least)
    for name, path in (("dev", config.dev_path), ("test", config.test_path)):
        if path is not None:
            _add_part(found, name, path, modality, config, labelled.split_column, least)
    if not found.parts["train"]:
        raise UserError(f"data.path={data.path} has no transcribed clip to train on; {_counts(found)}.")
    letters = letters_of(config, [text for _, text in found.parts["train"]])
    found.parts["train"] = _trainable(modality, found, letters)
    if not found.parts["dev"]:
        _hold_back(modality, found, labelled)
    heard = speakers(found.parts["train"])
    for name in ("dev", "test"):
        if both := speakers(found.parts[name]) & heard:
            found.notes.append(
                f"{len(both)} of {len(speakers(found.parts[name]))} speakers of {name} are also in train"
            )
        if odd := [clip.id for clip, text in found.parts[name] if letters.unknown(text)]:
            found.notes.append(
                f"{len(odd)} of {len(found.parts[name])} transcripts of {name} have letters outside the vocabulary, "
                f"which count as errors: {first(odd, ', ')}"
            )
    found.notes.append(_vocabulary(letters))
    whole = replace(found.report, clips=tuple(clip for part in found.parts.values() for clip, _ in part))
    text = "\n".join([whole.summary().replace("data.min_s", "labelled.min_s"), *found.notes])

    def part(name: str) -> LabelledPart[AudioSample] | None:
        clips = tuple(clip for clip, _ in found.parts[name])
        if not clips:
            return None
        labels = sequences([letters.encode(text, UNK) for _, text in found.parts[name]])
        return LabelledPart(LabelledFiles(replace(found.report, clips=clips), data.sample_rate, text), labels)

    train = part("train")
    assert train is not None
    speaker_of = {clip.id: clip.speaker for clip, _ in found.parts["train"]}
    return _task(
        f"transcripts of {Path(data.path).name}", letters, data.sample_rate, speaker_of, train, part("dev"),
        part("test"), found.left_out,
    )  # fmt: skip


def _task(
    name: str,
    letters: Letters,
    sample_rate: int,
    speaker_of: Mapping[str, str | None],
    train: LabelledPart[AudioSample],
    dev: LabelledPart[AudioSample] | None,
    test: LabelledPart[AudioSample] | None,
    left_out: Mapping[str, str],
) -> Task[AudioSample]:
    for part, there in (("dev", dev), ("test", test)):
        if there is not None and not any(len(label) for label in there.labels):
            raise UserError(f"{name}: nothing is said in any clip of {part}, so there is nothing to score.")

    def show(symbols: Sequence[int]) -> str:
        return letters.decode(symbols, UNKNOWN)

    def score(predicted: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]) -> dict[str, float]:
        said, heard = [show(label) for label in labels], [letters.decode(one) for one in predicted]
        edits = {"wer": word_edits(said, heard), "cer": letter_edits(said, heard)}
        return {key: round(total(one).rate, 2) for key, one in edits.items()}

    def choose(labels: str, part: LabelledPart[AudioSample], seed: int) -> np.ndarray:
        seconds = part.samples.sizes / sample_rate
        return choose_seconds(labels, ids(part), seconds, [speaker_of[i] for i in ids(part)], seed)

    return Task(
        name=name, classes=(), metrics=("wer", "cer"), train=train, dev=dev, test=test, symbols=letters.symbols,
        score=score, show=show, choose=choose, left_out=left_out,
        verbs=("d2v evaluate RUN", "d2v transcribe RUN FILES"),
    )  # fmt: skip


def _built_in(modality: AudioModality, labelled: LabelledConfig, config: TranscriptsConfig) -> Task[AudioSample]:
    rate, count = modality.data.sample_rate, labelled.synthetic_clips
    spoken = Utterances("train", count, rate)
    letters = letters_of(config, spoken.transcripts)

    def part(utterances: Utterances) -> LabelledPart[AudioSample]:
        return LabelledPart(utterances, sequences([letters.encode(text, UNK) for text in utterances.transcripts]))

    # Twice as much to test on as to train on: it is made on the spot, and what is compared should not be chance.
    dev, test = part(Utterances("dev", count // 4, rate)), part(Utterances("test", 2 * count, rate))
    speaker_of = {spoken.id(i): speaker for i, speaker in enumerate(spoken.speakers)}
    return _task("built-in utterances", letters, rate, speaker_of, part(spoken), dev, test, left_out={})


def letters_of(config: TranscriptsConfig, transcripts: Sequence[str]) -> Letters:
    """The vocabulary that the options ask for."""
    english = Letters.official()
    if config.letters == "english":
        return english
    own = Letters.of(transcripts)
    return english if config.letters == "auto" and set(own.symbols) <= set(english.symbols) else own


def _vocabulary(letters: Letters) -> str:
    if letters == Letters.official():
        return "vocabulary: the official one, 26 letters and the apostrophe"
    return f"vocabulary: {len(letters) - 5} letters of the training part: {first(letters.symbols[5:], ' ', 60)}"


# ------------------------------------------------------------------------------------------------- what is there


def read_transcribed(data: AudioConfig, config: TranscriptsConfig, split_column: str, least: int) -> Found:
    """The transcribed clips of `data.path`, by part; what no part is named for is for training where nothing is.

    split_column: of a table. least: samples of the shortest clip. Raises UserError as `files.scan` does, and where
    there is no transcript.
    """
    assert data.path is not None
    given, path = data.path, existing(data.path, EXPECTED)
    manifests = _manifests(path) if path.is_dir() else []
    if manifests:
        reports = {file.stem: scan_data(replace(data, path=str(file)), None, least) for file in manifests}
        report = _joined(list(reports.values()))
        named = [(clip, stem) for stem, one in reports.items() for clip in one.clips]
    elif path.is_dir():
        report = scan_data(data, None, least)
        named = [(clip, clip.id.split("/")[0] if "/" in clip.id else "") for clip in report.clips]
    elif path.suffix.lower() == ".tsv":
        columns = _columns(given, config, split_column)
        report = scan_data(data, None, least, columns)
        named = [(_with_text(clip, columns), clip.cells.get(split_column, "")) for clip in report.clips]
    else:
        raise UserError(f"data.path={given} is one file: expected {EXPECTED}.")
    found = Found(report)
    if not any(clip.transcript for clip, _ in named):
        tables = sorted(str(table) for table in path.glob("*.tsv"))
        raise UserError(
            f"data.path={given} has {len(named)} clips but no transcript among them. Expected *.trans.txt files as in "
            "LibriSpeech, a table with a column transcript or text, or a fairseq manifest NAME.tsv with NAME.ltr."
            + (f" Tables in it, to be given as data.path: {first(tables, ', ')}." if tables else "")
        )
    missing = {clip.id: "no transcript" for clip, _ in named if not _text(clip, config)}
    found.leave_out(missing, "without a transcript")
    _share_out(found, [(clip, name) for clip, name in named if clip.id not in missing], config, given)
    return found


def _manifests(folder: Path) -> list[Path]:
    """Of a folder as fairseq prepares it: NAME.tsv with NAME.ltr or NAME.wrd beside it."""
    tables = sorted(child for child in folder.iterdir() if child.suffix.lower() == ".tsv")
    return [table for table in tables if any(table.with_suffix(end).is_file() for end in (".ltr", ".wrd"))]


def _joined(reports: Sequence[ScanReport]) -> ScanReport:
    return replace(
        reports[0],
        clips=tuple(clip for report in reports for clip in report.clips),
        short=tuple(name for report in reports for name in report.short),
        bad=tuple(one for report in reports for one in report.bad),
        resampled=sum(report.resampled for report in reports),
    )


def _columns(given: str, config: TranscriptsConfig, split_column: str) -> tuple[str, ...]:
    """Of a table: that of the transcripts, then that of the splits where there is one. None of a manifest."""
    there = table_columns(given)
    if len(there) == 1:
        return ()
    shown = ", ".join(there)[:300]
    if config.column and config.column not in there:
        raise UserError(
            f"data.path={given} has no column transcripts.column={config.column}. Its columns are: {shown}."
        )
    text = config.column or next((name for name in TEXT_COLUMNS if name in there), "")
    if not text:
        raise UserError(
            f"data.path={given} has no column {' or '.join(TEXT_COLUMNS)}. Its columns are: {shown}. Name the one with "
            "the transcripts by transcripts.column=."
        )
    if split_column not in there and split_column != "split":
        raise UserError(f"data.path={given} has no column {split_column!r}. Its columns are: {shown}.")
    return (text, *((split_column,) if split_column in there else ()))


def _with_text(clip: Clip, columns: Sequence[str]) -> Clip:
    return replace(clip, transcript=clip.cells[columns[0]]) if columns else clip


def _text(clip: Clip, config: TranscriptsConfig) -> str:
    text = " ".join(normal(clip.transcript or "").split())
    return {"keep": text, "upper": text.upper(), "lower": text.lower()}[config.case]


def _share_out(found: Found, named: Sequence[tuple[Clip, str]], config: TranscriptsConfig, given: str) -> None:
    """Give each clip to the part that its name stands for. Where no name says anything, all are for training."""
    names = {name for _, name in named}
    asked = {part: getattr(config, part) for part in found.parts}
    for part, wanted in asked.items():
        if absent := [name for name in wanted if name not in names]:
            there = first(sorted(name for name in names if name), ", ", 20) or "none"
            raise UserError(
                f"transcripts.{part}={wanted}: data.path={given} has no transcribed clip in {', '.join(absent)}. There "
                f"are: {there}."
            )
    part_of = {name: _part_of(name, asked) for name in names}
    says_nothing = not any(asked.values()) and not any(part_of.values())
    nowhere: dict[str, str] = {}
    for clip, name in named:
        part = "train" if says_nothing else part_of[name]
        if part is None:
            nowhere[clip.id] = f"{name!r} is no part"
        else:
            speaker = clip.speaker or _speaker_in(clip.path.stem)
            found.parts[part].append((replace(clip, speaker=speaker), _text(clip, config)))
    if nowhere:
        others = sorted(name for name in names if part_of[name] is None)
        found.leave_out(nowhere, f"of {first([repr(name) for name in others], ', ')}, which names no part")


def _part_of(name: str, asked: Mapping[str, Sequence[str]]) -> str | None:
    """train-clean-100 is for training unless the training part is named otherwise."""
    for part, wanted in asked.items():
        if name in wanted:
            return part
    whole = name.strip().lower()
    part = PARTS.get(whole) or PARTS.get(re.split(r"[-_.]", whole)[0])
    return None if part is None or asked[part] else part


def _speaker_in(stem: str) -> str | None:
    """LibriSpeech's files are called SPEAKER-CHAPTER-NUMBER."""
    match = re.fullmatch(r"(\d+)-\d+-\d+", stem)
    return match[1] if match else None


def _add_part(
    found: Found,
    name: str,
    path: str,
    modality: AudioModality,
    config: TranscriptsConfig,
    split_column: str,
    least: int,
) -> None:
    """All that `path` has, as one part, in place of what data.path has of it."""
    try:
        other = read_transcribed(
            replace(modality.data, path=path), replace(config, train=[], dev=[], test=[]), split_column, least
        )
    except UserError as error:
        raise UserError(str(error).replace("data.path", f"transcripts.{name}_path")) from None
    found.parts[name] = [clip for part in other.parts.values() for clip in part]
    found.report = _joined([found.report, other.report])
    found.notes += [f"{name}: {note}" for note in other.notes]
    found.left_out.update(other.left_out)


def _counts(found: Found) -> str:
    return ", ".join(f"{name} has {len(part)}" for name, part in found.parts.items())


# -------------------------------------------------------------------------------------------------- what can be used


def _trainable(modality: AudioModality, found: Found, letters: Letters) -> list[Transcribed]:
    """The training clips that CTC can learn from; the others are left out, each with its reason."""
    data, clips = modality.data, found.parts["train"]
    odd: dict[str, str] = {}
    long: dict[str, str] = {}
    dense: dict[str, str] = {}
    for clip, text in clips:
        if unknown := letters.unknown(text):
            odd[clip.id] = f"letters outside the vocabulary: {' '.join(unknown)}"
        elif clip.num_samples > data.max_s * data.sample_rate:
            long[clip.id] = f"{clip.num_samples / data.sample_rate:.1f} s, longer than data.max_s={data.max_s:g}"
        elif (tokens := modality.geometry.num_tokens(clip.num_samples)) < (need := tokens_needed(letters.encode(text))):
            dense[clip.id] = f"{tokens} tokens, but its transcript needs {need}"
    if len(odd) > data.max_bad_ratio * len(clips):
        raise UserError(
            f"data.path={data.path}: {len(odd)} of {len(clips)} training transcripts have letters outside the "
            f"vocabulary, more than data.max_bad_ratio={data.max_bad_ratio:g} allows: "
            + first([f"{name}: {why}" for name, why in odd.items()], "; ", 3)
            + ". Use transcripts.letters=transcripts to spell with the transcripts' own, transcripts.case=upper where "
            "only the case differs, or mend them."
        )
    found.leave_out(odd, "with letters outside the vocabulary")
    found.leave_out(long, f"longer than data.max_s={data.max_s:g} s, which cannot be cropped")
    found.leave_out(dense, "with fewer tokens than their transcripts need")
    rest = [(clip, text) for clip, text in clips if clip.id not in found.left_out]
    if not rest:
        raise UserError(
            f"data.path={data.path}: no training clip is left. {'; '.join(found.notes)}. Where tokens are too few, "
            "pre-train a network with more of them per second (features.stride)."
        )
    return rest


def _hold_back(modality: AudioModality, found: Found, labelled: LabelledConfig) -> None:
    """Whole speakers to choose on, as of classes; the core holds single clips back where there are none."""
    bare = {"train": [(clip, "") for clip, _ in found.parts["train"]], "dev": list[Transcribed]()}
    hold_speakers_back(modality, bare, found.notes, labelled)
    held = {clip.id for clip, _ in bare["dev"]}
    train = found.parts["train"]
    found.parts["dev"] = [one for one in train if one[0].id in held]
    found.parts["train"] = [one for one in train if one[0].id not in held]


def choose_seconds(
    labels: str, names: Sequence[str], seconds: np.ndarray, speaker_of: Sequence[str | None], seed: int
) -> np.ndarray:
    """Which clips `labels`, such as 10m, 1h or 600s, stands for, ascending.

    Of Libri-Light's folders 1h and 9h those that were published for this amount; else clips drawn at random, each from
    the speaker who has said least so far, until one more would be further from what is asked for than one less.
    names, seconds, speaker_of: of each clip. Raises UserError where there is less.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([a-z]+)", labels)
    if match is None or match[2] not in UNITS_S:
        raise UserError(f"labels={labels}: expected seconds, minutes or hours, such as 600s, 10m or 1h.")
    if {name.split("/")[0] for name in names} <= {"1h", "9h"} and labels in LIBRI_LIGHT:
        wanted = LIBRI_LIGHT[labels]
        if absent := [folder for folder in wanted if not any(name.startswith(folder) for name in names)]:
            raise UserError(f"labels={labels} of Libri-Light needs its folder {absent[0]}, which is not in data.path.")
        return np.array([i for i, name in enumerate(names) if name.startswith(wanted)])
    limit, there = float(match[1]) * UNITS_S[match[2]], float(seconds.sum())
    if limit <= 0:
        raise UserError(f"labels={labels} is nothing: give more.")
    if limit > MORE_THAN_THERE * there:
        raise UserError(
            f"labels={labels}, but the training part has {duration(there)}. Give less, or leave labels out for all."
        )
    rng = generator(seed, "labels")
    queues: dict[str, list[int]] = {}
    for i in map(int, rng.permutation(len(names))):
        queues.setdefault(speaker_of[i] or "", []).append(i)
    heap = [(0.0, place, speaker) for place, speaker in enumerate(queues)]
    chosen: list[int] = []
    total_s = 0.0
    while heap:
        said, place, speaker = heapq.heappop(heap)
        i = queues[speaker].pop()
        if abs(total_s + seconds[i] - limit) > abs(total_s - limit):
            break
        chosen.append(i)
        total_s += float(seconds[i])
        if queues[speaker]:
            heapq.heappush(heap, (said + float(seconds[i]), place, speaker))
    if not chosen:
        raise UserError(f"labels={labels} is less than one clip of the training part.")
    return np.array(sorted(chosen))
