"""One class per clip, for fine-tuning and probing: the user's labelled clips, or words of the built-in speech.

Labelled clips are folders named after their classes (whole, in sub-folders train, dev and test, or with the lists of
Speech Commands) or a .tsv table. Files are found and refused by `files.scan`, as for pre-training.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from d2v_audio.data import AudioConfig, AudioFiles, AudioSample, normalise, scan_data, summary_bands
from d2v_audio.files import Clip, ScanReport, table_columns
from d2v_audio.synthetic import WORDS, SyntheticSpeech
from d2v_core.config import opt
from d2v_core.contract import Dataset, LabelledPart, Task
from d2v_core.errors import UserError
from d2v_core.keyed import generator
from d2v_core.labelled import DEV_SEED
from d2v_core.shards import refuse_shards

if TYPE_CHECKING:
    from d2v_audio.modality import AudioModality

PARTS: Mapping[str, str] = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev",
                            "test": "test"}  # fmt: skip
LISTS: Mapping[str, str] = {"testing_list.txt": "test", "validation_list.txt": "dev"}  # of Speech Commands
FOR_TRANSCRIPTS = "To learn to transcribe, take a recipe for that: preset=ctc_tiny, base_10m and others."
NOISE = "_background_noise_"  # of Speech Commands: recordings to be mixed in, no class
FIRST_UTTERANCE = 1_000_000  # of the built-in corpus; pre-training and the phone probe use those from 0 on


@dataclass
class LabelledConfig:
    """What is to be told of each clip (stage=finetune and stage=probe)."""

    task: Literal["classes", "transcripts"] = opt(
        "classes", "What is asked of each clip: its class, or what is said in it (see section transcripts)."
    )
    column: str = opt("label", "Column of a .tsv table with the class; an empty cell leaves the clip out.")
    split_column: str = opt(
        "split", "Column of a .tsv table that says train, dev or test; where there is none, every row is for training."
    )
    unseen_speakers: bool = opt(
        True,
        "Where the dev part must be held back from clips whose speakers are known (column speaker, file names of "
        "Speech Commands), hold whole speakers back.",
    )
    min_s: float = opt(
        0.0,
        "In place of data.min_s: shorter clips are dropped and counted, seconds; two tokens are the least in any case.",
    )
    synthetic_clips: int = opt(
        800,
        "Training clips of the built-in task. A quarter as many to choose on come on top, and to test on half as many "
        "(of transcripts, twice as many).",
    )

    def check(self, max_s: float) -> None:
        """Raises UserError."""
        if not 0 <= self.min_s < max_s:
            raise UserError(f"labelled.min_s={self.min_s} must lie between 0 and data.max_s={max_s}.")
        if self.synthetic_clips < len(WORDS):
            raise UserError(
                f"labelled.synthetic_clips={self.synthetic_clips} must be at least {len(WORDS)}, the number of classes."
            )


Labelled = tuple[Clip, str]
"""A clip and its class."""


@dataclass
class _Found:
    """Labelled clips by part, and what there is to say about those that are left out. name: of the task."""

    name: str
    parts: dict[str, list[Labelled]] = field(
        default_factory=lambda: dict[str, list[Labelled]](train=[], dev=[], test=[])
    )
    notes: list[str] = field(default_factory=list[str])


class LabelledFiles(AudioFiles):
    """Clips of one part. text: what was found in all parts, for the person who starts a run."""

    def __init__(self, report: ScanReport, sample_rate: int, text: str) -> None:
        super().__init__(report, sample_rate)
        self.text = text

    def describe(self) -> str:
        return self.text


class FirstWords(Dataset[AudioSample]):
    """Beginnings of built-in utterances, each up to the end of its first word; `words` has the words.

    train has the speakers of pre-training in other utterances; dev and test have speakers of their own.
    """

    def __init__(self, split: Literal["train", "dev", "test"], count: int, sample_rate: int) -> None:
        corpus = SyntheticSpeech(split, FIRST_UTTERANCE + count, 0, sample_rate)
        self.split = split
        self.words: list[str] = []
        self.waveforms: list[np.ndarray] = []
        for i in range(count):
            utterance = corpus[FIRST_UTTERANCE + i]
            word = utterance.transcript.split()[0]
            end_s = utterance.phones[len(WORDS[word])][2]  # phone 0 is the silence before the word
            self.words.append(word)
            self.waveforms.append(normalise(utterance.waveform[: round(end_s * sample_rate)]))
        self.sizes = np.array([len(waveform) for waveform in self.waveforms], dtype=np.int64)

    def id(self, index: int) -> str:
        return f"{self.split}-{index}"

    def __getitem__(self, index: int) -> AudioSample:
        return AudioSample(self.waveforms[index])

    def describe(self) -> str:
        return (
            "No data.path: which word a built-in synthetic utterance begins with, dev and test by speakers of their "
            "own. Give data.path=/your/labelled/audio for a task of yours."
        )


def open_classification(modality: AudioModality) -> Task[AudioSample]:
    """The task of `data.path`, or the built-in one. Raises UserError saying what was found and what was expected."""
    data, config = modality.data, modality.config.section("labelled", LabelledConfig)
    config.check(data.max_s)
    refuse_options_of_pretraining(data)
    if data.path is None:
        return _first_words(modality, config)
    refuse_shards(data.path)
    least = max(modality.two_tokens(), round(config.min_s * data.sample_rate))
    table = data.path.lower().endswith(".tsv") and Path(data.path).expanduser().is_file()
    columns = _columns(data.path, config) if table else ()
    try:
        report = scan_data(data, None, least, columns)
    except UserError as error:
        raise UserError(str(error).replace("data.min_s", "labelled.min_s")) from None
    if table:
        found = _in_table(data.path, report, config)
    elif Path(data.path).expanduser().is_dir():
        found = _in_folders(data.path, report)
    else:
        raise UserError(f"data.path={data.path} is one file: expected a folder of class folders or a .tsv table.")
    if len({label for part in found.parts.values() for _, label in part}) == 1 and report.clips[0].transcript:
        raise UserError(f"data.path={data.path} has transcripts and no classes. {FOR_TRANSCRIPTS}")
    return _task(modality, found, report, config)


def refuse_options_of_pretraining(data: AudioConfig) -> None:
    """data.split, data.also and data.repeat are options of pre-training."""
    if data.also or data.repeat:
        raise UserError(
            f"data.also={data.also} and data.repeat={data.repeat} are for pre-training. Labelled data is one folder or "
            "table: leave them out."
        )
    if data.split is not None:
        raise UserError(
            f"data.split={data.split} is for pre-training. Labelled data say themselves what is for train, dev and "
            "test: in the column that labelled.split_column names, or by sub-folders. Leave data.split out."
        )


def _first_words(modality: AudioModality, config: LabelledConfig) -> Task[AudioSample]:
    classes = tuple(sorted(WORDS))

    def part(split: Literal["train", "dev", "test"], count: int) -> LabelledPart[AudioSample]:
        data = FirstWords(split, count, modality.data.sample_rate)
        if data.sizes.min() < modality.two_tokens():
            raise UserError(
                f"The built-in words are as short as {data.sizes.min() / modality.data.sample_rate:.2f} s, less than "
                f"the {modality.two_tokens() / modality.data.sample_rate:.2f} s of two tokens. Give data.path=."
            )
        return LabelledPart(data, np.array([classes.index(word) for word in data.words]))

    count = config.synthetic_clips
    return Task(
        name="first word",
        classes=classes,
        metrics=("accuracy",),
        train=part("train", count),
        dev=part("dev", count // 4),
        test=part("test", count // 2),
        input_name="mean log-mel",
        input_features=lambda inputs: summary_bands(modality, inputs),
    )


def _task(modality: AudioModality, found: _Found, report: ScanReport, config: LabelledConfig) -> Task[AudioSample]:
    given, parts, notes = modality.data.path, found.parts, found.notes
    if not parts["train"]:
        raise UserError(f"data.path={given} has no labelled clip to train on; {_counts(parts)}.")
    classes = sorted({label for _, label in parts["train"]})
    for name in ("dev", "test"):
        unknown = Counter(label for _, label in parts[name] if label not in set(classes))
        if unknown:
            raise UserError(
                f"data.path={given}: {_named(unknown)} of {name} have a class of which train has no usable clip. Its "
                f"classes are: {', '.join(classes[:9])}{' ...' if len(classes) > 9 else ''}. Give train clips of the "
                "class, or take it out."
            )
    if not parts["dev"]:
        hold_speakers_back(modality, parts, notes, config)
    heard = speakers(parts["train"])
    for name in ("dev", "test"):
        if both := speakers(parts[name]) & heard:
            notes.append(f"{len(both)} of {len(speakers(parts[name]))} speakers of {name} are also in train")
    clips = [clip for name in parts for clip, _ in parts[name]]
    whole = replace(report, clips=tuple(clips))
    text = "\n".join([whole.summary().replace("data.min_s", "labelled.min_s"), *notes])

    def part(name: str) -> LabelledPart[AudioSample] | None:
        if not parts[name]:
            return None
        own = replace(report, clips=tuple(clip for clip, _ in parts[name]))
        labels = np.array([classes.index(label) for _, label in parts[name]])
        return LabelledPart(LabelledFiles(own, modality.data.sample_rate, text), labels)

    train = part("train")
    assert train is not None
    return Task(
        name=found.name,
        classes=tuple(classes),
        metrics=("accuracy", "matthews") if len(classes) == 2 else ("accuracy",),
        train=train,
        dev=part("dev"),
        test=part("test"),
        input_name="mean log-mel",
        input_features=lambda inputs: summary_bands(modality, inputs),
    )


# ---------------------------------------------------------------------------------------------------------- folders


def _in_folders(given: str, report: ScanReport) -> _Found:
    """Class folders, or class folders in train, dev and test."""
    root = Path(given).expanduser()
    found = _Found(f"classes of {root.resolve().name}")
    folders = sorted(child.name for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    clips = [clip for clip in report.clips if NOISE not in _folders(clip)]
    if len(clips) < len(report.clips):
        found.notes.append(f"left out: {NOISE}, {_clips(len(report.clips) - len(clips))} of no class")
    deep = {_folders(clip)[0] for clip in clips if len(_folders(clip)) > 1}
    tops = {_folders(clip)[0] for clip in clips if _folders(clip)}
    in_parts = "train" in deep or (bool(tops) and tops <= PARTS.keys())
    if in_parts:
        _check_parts(given, tops)
    elif not tops:
        raise UserError(
            f"data.path={given} has no class folders: its {len(clips)} audio files lie in the folder itself. Expected "
            "CLASS/CLIP.wav, train/CLASS/CLIP.wav and test/CLASS/CLIP.wav, or a .tsv table with columns file and label."
        )
    part_of = {} if in_parts else _listed(root, given, clips, found.notes)
    loose = 0
    for clip in clips:
        names = _folders(clip)
        part = PARTS[names.pop(0)] if in_parts and names else part_of.get(clip.id, "train")
        if names:
            found.parts[part].append((_with_speaker(clip), names[0]))
        else:
            loose += 1
    if loose:
        found.notes.append(f"left out: {_clips(loose)} that lie in no class folder")
    if in_parts and not any(found.parts.values()):
        raise UserError(
            f"data.path={given} has no class folders: the audio files of {', '.join(sorted(tops))} lie in these "
            "folders themselves. Expected train/CLASS/CLIP.wav, or a .tsv table with columns file and label."
        )
    empty = [name for name in folders if name not in tops | {NOISE}]
    if empty:
        found.notes.append(f"no usable clip in: {_shortened(empty)}")
    return found


def _check_parts(given: str, tops: Iterable[str]) -> None:
    """Beside train there are only other parts, and none has two names."""
    others = sorted(set(tops) - PARTS.keys())
    if others:
        raise UserError(
            f"data.path={given} has class folders in train, but audio in {_shortened(others)} beside it: expected dev "
            "and test only. Move it elsewhere, or give a .tsv table."
        )
    twice = [part for part, number in Counter(PARTS[name] for name in tops).items() if number > 1]
    if twice:
        names = sorted(name for name in tops if PARTS[name] == twice[0])
        raise UserError(f"data.path={given}: {' and '.join(names)} are both a {twice[0]} part. Keep one of them.")


def _listed(root: Path, given: str, clips: Sequence[Clip], notes: list[str]) -> dict[str, str]:
    """Part by clip id, from the lists of Speech Commands where they are present."""
    part_of: dict[str, str] = {}
    there = {clip.id for clip in clips}
    for file, part in LISTS.items():
        if not (root / file).is_file():
            continue
        try:
            names = {line.strip() for line in (root / file).read_text(encoding="utf-8").splitlines() if line.strip()}
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{root / file} cannot be read: {error}.") from error
        if not names & there:
            first = min(names, default="nothing")
            raise UserError(
                f"data.path={given}: none of the {len(names)} clips of {file} is there; the first is {first!r}, the "
                f"clips are called like {clips[0].id!r}. Mend or remove the list."
            )
        if twice := sorted(name for name in names if part_of.get(name)):
            raise UserError(f"data.path={given}: {twice[0]} stands in both {' and '.join(LISTS)}. Keep it in one.")
        if missing := names - there:
            notes.append(f"{len(missing)} of the {len(names)} clips of {file} are not there, too short or unreadable")
        part_of.update(dict.fromkeys(names, part))
    return part_of


def _folders(clip: Clip) -> list[str]:
    return clip.id.split("/")[:-1]


def _with_speaker(clip: Clip) -> Clip:
    """Speech Commands' files are called SPEAKER_nohash_NUMBER.wav."""
    speaker, mark, _ = clip.path.stem.partition("_nohash_")
    return replace(clip, speaker=speaker) if mark else clip


# ------------------------------------------------------------------------------------------------------------ tables


def _columns(given: str, config: LabelledConfig) -> tuple[str, ...]:
    """The columns to read beside that of the files. Raises UserError naming those that are there."""
    there = table_columns(given)
    shown = ", ".join(there)[:300]
    if "file" not in there and "path" not in there:
        raise UserError(f"data.path={given} has no column file (or path). Its columns are: {shown}.")
    if config.column not in there:
        raise UserError(
            f"data.path={given} has no column {config.column!r} to take the classes from. Its columns are: {shown}. "
            f"Name one with labelled.column=. {FOR_TRANSCRIPTS if {'transcript', 'text'} & set(there) else ''}".strip()
        )
    if config.split_column not in there and config.split_column != "split":
        raise UserError(f"data.path={given} has no column {config.split_column!r}. Its columns are: {shown}.")
    return (config.column, *((config.split_column,) if config.split_column in there else ()))


def _in_table(given: str, report: ScanReport, config: LabelledConfig) -> _Found:
    found = _Found(f"{config.column} in {Path(given).name}")
    unlabelled = 0
    strange: Counter[str] = Counter()
    for clip in report.clips:
        label = clip.cells[config.column].strip()
        part = clip.cells.get(config.split_column, "train").strip()
        if not label:
            unlabelled += 1
        elif part.lower() not in PARTS:
            strange[part] += 1
        else:
            found.parts[PARTS[part.lower()]].append((clip, label))
    if unlabelled == len(report.clips):
        raise UserError(f"data.path={given}: the column {config.column!r} is empty in every usable row.")
    if strange:
        raise UserError(
            f"data.path={given}: the column {config.split_column!r} must say train, dev or test, but there are "
            f"{_named(strange)}. Mend the table, or name another column with labelled.split_column=."
        )
    if unlabelled:
        found.notes.append(f"left out: {_clips(unlabelled)} whose {config.column} is empty")
    labelled = [label for part in found.parts.values() for _, label in part]
    if len(labelled) > 8 and 2 * len(set(labelled)) > len(labelled):
        raise UserError(
            f"data.path={given}: the column {config.column!r} has {len(set(labelled))} values in {len(labelled)} "
            "clips, too many to be classes. Name the column of the classes with labelled.column=."
        )
    return found


# ---------------------------------------------------------------------------------------------------------- speakers


def hold_speakers_back(
    modality: AudioModality, parts: dict[str, list[Labelled]], notes: list[str], config: LabelledConfig
) -> None:
    """Move whole speakers from train to dev, `finetune.dev_ratio` of the clips, where that is asked for and possible.

    No class loses its last speaker, and no speaker is taken with whom dev would be twice as large as asked for. Where
    nobody is left, dev stays empty and the core holds single clips back.
    """
    clips, there = parts["train"], speakers(parts["train"])
    wanted = round(modality.config.finetune.dev_ratio * len(clips))
    if not config.unseen_speakers or wanted < 1 or len(there) < 2 or any(not clip.speaker for clip, _ in clips):
        return
    left = Counter(label for _, label in clips)
    held: set[str] = set()
    size = 0
    order = sorted(there)
    # As in the core, the part held back is the same for every seed of a run.
    for i in generator(DEV_SEED, "dev speakers").permutation(len(order)):
        own = Counter(label for clip, label in clips if clip.speaker == order[i])
        if size < wanted and size + own.total() <= 2 * wanted and all(left[label] > n for label, n in own.items()):
            left -= own
            size += own.total()
            held.add(order[i])
    if held:
        parts["dev"] = [(clip, label) for clip, label in clips if clip.speaker in held]
        parts["train"] = [(clip, label) for clip, label in clips if clip.speaker not in held]
        notes.append(f"held back to choose on: {_clips(size)} of {len(held)} of {len(there)} speakers")


def speakers(part: Sequence[Labelled]) -> set[str]:
    """Those whose clips are in a part."""
    return {clip.speaker for clip, _ in part if clip.speaker}


def _counts(parts: Mapping[str, Sequence[Labelled]]) -> str:
    return ", ".join(f"{name} has {len(part)}" for name, part in parts.items())


def _clips(number: int) -> str:
    return f"{number} clip{'' if number == 1 else 's'}"


def _named(counter: Counter[str]) -> str:
    return ", ".join(f"{_clips(number)} of {name!r}" for name, number in counter.most_common(5))


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:9]) + (f" and {len(names) - 9} more" if len(names) > 9 else "")
