"""Labelled sentences and pairs of them: from files to token ids and labels, or from the built-in grammar."""

from __future__ import annotations

import csv
import difflib
import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from d2v_core.config import opt
from d2v_core.contract import Dataset, LabelledPart, Task
from d2v_core.errors import UserError
from d2v_core.shards import refuse_shards
from d2v_text import glue, grammar
from d2v_text.files import Reader, find_files
from d2v_text.tokenizer import BOS, BPE, EOS, NUM_SPECIAL

EXTENSIONS = (".tsv", ".csv", ".jsonl")
ROWS_AT_ONCE = 4096  # tokenised together
USUAL_COLUMNS = (("sentence",), ("text",), ("sentence1", "sentence2"))
GRAMMAR_SENTENCES: Mapping[grammar.Split, int] = {"train": 2000, "dev": 500, "test": 1000}
FIRST_GRAMMAR_DOCUMENT = 1000  # the role probe has those before
LARGEST_BAG, HASHED_BAG = 10_000, 8192  # features of the raw-input row of a probe


@dataclass
class GlueConfig:
    """Labelled text: a task of GLUE, or files with named columns."""

    task: str | None = opt(
        None,
        "CoLA, SST-2, MRPC, QQP, STS-B, MNLI, QNLI, RTE or WNLI; null = told by the folder's name or the header of "
        "train.tsv, and otherwise files of one's own with the columns below.",
    )
    dev_part: Literal["dev", "test"] = opt(
        "dev",
        "What dev.tsv is used for: dev = to choose the best weights; test = to test them once, a part of train.tsv "
        "being held back to choose on (the labels of GLUE's own test.tsv are secret).",
    )
    matched: bool = opt(True, "MNLI: dev_matched.tsv and test_matched.tsv; false = the mismatched ones.")
    columns: list[str] = opt(
        [],
        "Own files: the column with the text, or the two of a pair; [] = sentence, text, or sentence1 and sentence2.",
    )
    label: str = opt("label", "Own files: the column with the label.")
    regression: bool = opt(False, "Own files: labels are numbers to be predicted, not names of classes.")
    max_tokens: int = opt(
        512, "Longer samples are cut to this, and to embedding.max_positions; of a pair the longer side first."
    )

    def check(self) -> None:
        """Raises ValueError."""
        if self.max_tokens < 8:
            raise ValueError(f"glue.max_tokens={self.max_tokens} must be at least 8")
        if len(self.columns) > 2:
            raise ValueError(f"glue.columns={self.columns} must be one column, or two for pairs")


# ---------------------------------------------------------------------------------------------------------- encoding


def encode(tokenizer: BPE, texts: Sequence[Sequence[str]], max_tokens: int) -> tuple[list[np.ndarray], int]:
    """(ids of each sample, int64; number of those that were cut). texts: one text or two per sample.

    `<s> A </s>`, and `<s> A </s> </s> B </s>` for pairs (fairseq: examples/roberta/README.glue.md). Of a pair that is
    too long the longer side is cut until both are equally long, then both are.
    """
    sides = [tokenizer.encode(list(column)) for column in zip(*texts, strict=True)]
    out: list[np.ndarray] = []
    cut = 0
    for ids in zip(*sides, strict=True):
        room = max_tokens - 2 * len(ids)
        if len(ids) == 1:
            (a,) = ids
            cut += len(a) > room
            out.append(np.array([BOS, *a[:room], EOS], dtype=np.int64))
        else:
            a, b = ids
            cut += len(a) + len(b) > room
            of_a = min(len(a), max(room - len(b), (room + 1) // 2))
            out.append(np.array([BOS, *a[:of_a], EOS, EOS, *b[: room - of_a], EOS], dtype=np.int64))
    return out, cut


class Encoded(Dataset[np.ndarray]):
    """Samples of token ids, one after the other in one array. numbers: of the lines that they stand in."""

    def __init__(
        self, part: str, flat: np.ndarray, sizes: np.ndarray, numbers: np.ndarray, description: str = ""
    ) -> None:
        self.part, self.flat, self.numbers, self.description = part, flat, numbers, description
        self.sizes = sizes
        self.ends = np.cumsum(sizes)

    def id(self, index: int) -> str:
        return f"{self.part}-{self.numbers[index]}"

    def __getitem__(self, index: int) -> np.ndarray:
        end = int(self.ends[index])
        return self.flat[end - int(self.sizes[index]) : end].astype(np.int64)

    def describe(self) -> str:
        return self.description or f"{len(self)} sentences"


# ------------------------------------------------------------------------------------------------------------- files


@dataclass
class _Row:
    """number: of its line, from 1. texts: one or two. label: as it stands in the file."""

    number: int
    texts: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class _Form:
    """What to read from the rows of a file."""

    columns: tuple[str, ...]
    label: str
    header: tuple[str, ...] | None = None
    """Given where the file has none."""


def _rows(path: Path, reader: Reader) -> Iterator[tuple[int, Any]]:
    """(line number, fields of .tsv and .csv, or the mapping of .jsonl); empty lines are passed over.

    .tsv as GLUE has it: no quotes, a line is a row. Lines that are no UTF-8 or no JSON are left out and counted.
    """
    number = 0

    def lines() -> Iterator[str]:
        nonlocal number
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                if not raw.strip():
                    continue
                reader.num_lines += 1
                try:
                    yield raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    _leave_out(reader, path, number, f"no UTF-8 ({error.reason} at byte {error.start})")

    try:
        if path.suffix.lower() == ".csv":
            table = csv.reader(line + "\n" for line in lines())
            while True:
                try:
                    yield number, next(table)
                except StopIteration:
                    return
                except csv.Error as error:
                    _leave_out(reader, path, number, f"no row ({error})")
        for line in lines():
            if path.suffix.lower() == ".tsv":
                yield number, line.split("\t")
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                _leave_out(reader, path, number, f"no JSON ({error})")
                continue
            if isinstance(record, dict):
                yield number, record
            else:
                _leave_out(reader, path, number, "no object")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def _leave_out(reader: Reader, path: Path, number: int, reason: str) -> None:
    reader.num_bad += 1
    if len(reader.bad) < 5:
        reader.bad.append(f"{path.name} line {number}: {reason}")


def _first_rows(path: Path, count: int = 5) -> list[list[str]]:
    """Of a .tsv or .csv file, for finding out what it is."""
    if path.suffix.lower() not in (".tsv", ".csv"):
        return []
    return [row for _, row in islice(_rows(path, Reader("")), count)]


def _labelled_rows(path: Path, form: _Form, reader: Reader) -> Iterator[_Row]:
    """Rows whose text and label are there; the others are left out and counted. Raises UserError for a column that
    the file does not have."""
    rows = _rows(path, reader)
    needed = (*form.columns, form.label)
    if path.suffix.lower() == ".jsonl":
        yield from _records(path, rows, form, reader)
        return
    header = form.header
    if header is None:
        number, header = next(rows, (0, None))
        if header is None:
            raise UserError(f"{path} has no line, not even the names of its columns.")
        reader.num_lines -= 1
        header = tuple(name.strip() for name in header)
    missing = [name for name in needed if name not in header]
    if missing:
        near = difflib.get_close_matches(missing[0], list(header), 1)
        raise UserError(
            f"{path} has no column {missing[0]!r}. Its columns: {', '.join(map(repr, header))}."
            + (f" Did you mean {near[0]!r}?" if near else "")
            + " The columns of files of one's own are named by glue.columns and glue.label."
        )
    at = [header.index(name) for name in needed]
    for number, row in rows:
        if len(row) != len(header):
            _leave_out(reader, path, number, f"{len(row)} fields, not {len(header)}")
            continue
        *texts, label = (row[i].strip() for i in at)
        if any(texts):
            yield _Row(number, tuple(texts), label)
        else:
            _leave_out(reader, path, number, "no text")


def _records(path: Path, rows: Iterator[tuple[int, Any]], form: _Form, reader: Reader) -> Iterator[_Row]:
    for number, record in rows:
        missing = [name for name in (*form.columns, form.label) if record.get(name) is None]
        if missing:
            there = ", ".join(map(repr, list(record)[:9])) or "none"
            _leave_out(reader, path, number, f"no key {missing[0]!r} (keys: {there})")
            continue
        texts = [record[name] for name in form.columns]
        if not all(isinstance(text, str) for text in texts):
            _leave_out(reader, path, number, f"{' or '.join(map(repr, form.columns))} is not text")
        elif not any(text.strip() for text in texts):
            _leave_out(reader, path, number, "no text")
        else:
            yield _Row(number, tuple(text.strip() for text in texts), str(record[form.label]))


def _has_labels(path: Path, form: _Form) -> bool:
    """Whether a test file can be scored; GLUE's own have no labels."""
    if path.suffix.lower() == ".jsonl":
        return any(form.label in record for _, record in islice(_rows(path, Reader("")), 1))
    first = _first_rows(path, 1)
    if form.header is not None:
        return bool(first) and len(first[0]) == len(form.header)
    return bool(first) and form.label in [name.strip() for name in first[0]]


# ------------------------------------------------------------------------------------------------------------- tasks


@dataclass
class _Files:
    """train, dev and test files of a folder, or a single file to train on."""

    train: Path
    dev: Path | None = None
    test: Path | None = None
    notes: list[str] = field(default_factory=list)


def _find(given: str, config: GlueConfig) -> tuple[_Files, glue.GlueTask | None]:
    if not str(given).strip() or not Path(given).expanduser().exists():
        find_files(given)  # says what there is instead
    refuse_shards(given)
    path = Path(given).expanduser().resolve()
    asked = None if config.task is None else glue.asked_for(config.task)
    if path.is_file():
        if path.suffix.lower() not in EXTENSIONS:
            raise UserError(
                f"data.path={given}: labelled text is read from {', '.join(EXTENSIONS)} files, or a folder."
            )
        own = asked is None and config.columns
        return _Files(path), None if own else asked or glue.recognised("", _first_rows(path))
    train = _part(path, "train")
    if train is None and asked is not None:
        inner = [child for child in sorted(path.iterdir()) if child.is_dir() and glue.named(child.name) is asked]
        if inner:
            path, train = inner[0], _part(inner[0], "train")
    if train is None:
        folders = [child.name for child in sorted(path.iterdir()) if child.is_dir() and _part(child, "train")]
        there = sorted(child.name for child in path.iterdir())
        hint = (
            f"There is one in {', '.join(folders)}: give data.path={Path(given) / folders[0]}."
            if folders
            else f"There is: {', '.join(there[:9]) or 'nothing'}."
        )
        raise UserError(f"data.path={given} has no train.tsv (nor train.csv or train.jsonl). {hint}")
    task = None if asked is None and config.columns else asked or glue.recognised(path.name, _first_rows(train))
    suffix = "" if task is None or task.name != "MNLI" else "_matched" if config.matched else "_mismatched"
    return _Files(train, _part(path, f"dev{suffix}"), _part(path, f"test{suffix}")), task


def _part(folder: Path, name: str) -> Path | None:
    return next((file for kind in EXTENSIONS if (file := folder / f"{name}{kind}").is_file()), None)


def _own_columns(train: Path, config: GlueConfig) -> tuple[str, ...]:
    """Those given, or the usual names that the file has."""
    if config.columns:
        return tuple(config.columns)
    if train.suffix.lower() == ".jsonl":
        there = next((list(record) for _, record in _rows(train, Reader(""))), [])
    else:
        there = next((list(map(str.strip, row)) for row in _first_rows(train, 1)), [])
    for columns in USUAL_COLUMNS:
        if all(name in there for name in columns):
            return columns
    raise UserError(
        f"{train}: which column is the text? It has: {', '.join(map(repr, there)) or 'none'}. Give "
        f"glue.columns=[NAME], or two for pairs, and glue.label=NAME; if it is a task of GLUE, "
        f"glue.task={'|'.join(glue.TASKS)}."
    )


def from_files(given: str, config: GlueConfig, tokenizer: BPE, max_tokens: int, max_bad_ratio: float) -> Task[Any]:
    """The task in the files at `given`. Raises UserError naming file, line and what was expected."""
    files, known = _find(given, config)
    columns, label = (
        (_own_columns(files.train, config), config.label) if known is None else (known.columns, known.label)
    )
    form = _Form(columns, label, None if known is None or known.has_header else known.header)
    regression = config.regression if known is None else not known.classes
    classes = () if known is None else known.classes
    paths = {"train": files.train}
    if files.dev is not None:
        paths[config.dev_part] = files.dev
    elif config.dev_part == "test":
        raise UserError(f"data.path={given}: glue.dev_part=test, but there is no dev.tsv beside {files.train.name}.")
    notes = files.notes
    if files.test is not None and "test" not in paths:
        if _has_labels(files.test, form):
            paths["test"] = files.test
        else:
            notes.append(f"{files.test.name} has no labels and is not used.")
    reader = Reader("")
    parts: dict[str, LabelledPart[np.ndarray]] = {}
    for name, path in paths.items():
        before = reader.num_lines
        rows = _labelled_rows(path, form, reader)
        samples, labels, cut = _encode_rows(name, rows, tokenizer, max_tokens)
        reader.check(max_bad_ratio, f"data.path={given}")
        if not len(labels):
            why = f": {'; '.join(reader.bad)}" if reader.bad else ""
            raise UserError(f"{path} has no row with text and a label{why}.")
        if not regression and not classes:
            classes = _classes_of(labels, path)
        numbers = _values(labels, samples, path, known) if regression else _numbers(labels, samples, path, classes)
        parts[name] = LabelledPart(samples, numbers)
        notes.append(
            f"{name}: {len(labels)} of {reader.num_lines - before} rows of {path.name}, "
            f"{int(samples.sizes.sum())} tokens" + (f", {cut} cut to {max_tokens} tokens" if cut else "")
        )
    name = known.name if known else files.train.stem if files.train.stem != "train" else files.train.parent.name
    if known is not None and known.scale != 1:
        notes.append(f"The values of {known.label!r} are divided by {known.scale:g}.")
    train = parts["train"].samples
    assert isinstance(train, Encoded)
    train.description = "\n".join([*notes, *([reader.summary()] if reader.summary() else [])])
    return Task(
        name=name,
        classes=tuple(classes),
        metrics=known.metrics
        if known
        else ("pearson_spearman", "pearson", "spearman")
        if regression
        else ("accuracy",),
        train=parts["train"],
        dev=parts.get("dev"),
        test=parts.get("test"),
        input_name="bag of tokens",
        input_features=BagOfTokens(tokenizer.vocabulary.size),
    )


def _encode_rows(part: str, rows: Iterator[_Row], tokenizer: BPE, max_tokens: int) -> tuple[Encoded, list[str], int]:
    """(samples, their labels as text, how many were cut)."""
    dtype = np.uint16 if tokenizer.vocabulary.size <= 1 << 16 else np.uint32
    flat: list[np.ndarray] = []
    sizes, numbers = array("q"), array("q")
    labels: list[str] = []
    cut = 0
    while batch := list(islice(rows, ROWS_AT_ONCE)):
        ids, more = encode(tokenizer, [row.texts for row in batch], max_tokens)
        cut += more
        flat.append(np.concatenate(ids).astype(dtype))
        sizes.extend(map(len, ids))
        numbers.extend(row.number for row in batch)
        labels += [row.label for row in batch]
    whole = np.concatenate(flat) if flat else np.zeros(0, dtype)
    return Encoded(part, whole, np.array(sizes, np.int64), np.array(numbers, np.int64)), labels, cut


def _classes_of(labels: Sequence[str], path: Path) -> tuple[str, ...]:
    """Those of the training part, by number where they all are numbers, else by the alphabet."""
    found = sorted(set(labels))
    if len(found) > 20 and 2 * len(found) > len(labels):
        raise UserError(
            f"{path}: the label column has {len(found)} different values in {len(labels)} rows, such as "
            f"{', '.join(found[:3])}. If they are numbers to be predicted, set glue.regression=true; else give the "
            "right column as glue.label."
        )
    try:
        return tuple(sorted(found, key=float))
    except ValueError:
        return tuple(found)


def _numbers(labels: Sequence[str], samples: Encoded, path: Path, classes: Sequence[str]) -> np.ndarray:
    number = {name: i for i, name in enumerate(classes)}
    for i, label in enumerate(labels):
        if label not in number:
            shown = ", ".join(classes[:9]) + (", ..." if len(classes) > 9 else "")
            raise UserError(
                f"{path.name} line {samples.numbers[i]}: the label {label!r} is not one of the classes "
                f"{shown}"
                + (", which are those of the training part" if samples.part != "train" else "")
                + f". Mend it, or see whether {path} is the right file."
            )
    return np.array([number[label] for label in labels], dtype=np.int64)


def _values(labels: Sequence[str], samples: Encoded, path: Path, known: glue.GlueTask | None) -> np.ndarray:
    values: list[float] = []
    for i, label in enumerate(labels):
        try:
            value = float(label)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{path.name} line {samples.numbers[i]}: the label {label!r} is not a number.")
        values.append(value)
    return (np.array(values) / (known.scale if known else 1.0)).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------- grammar


def from_grammar(max_tokens: int) -> Task[Any]:
    """Which sentences follow the built-in grammar, and which had two words exchanged (as CoLA asks of English).

    The sentences are those of documents that neither pre-training nor the role probe has seen.
    """
    parts: dict[str, LabelledPart[np.ndarray]] = {}
    for split, count in GRAMMAR_SENTENCES.items():
        numbers = FIRST_GRAMMAR_DOCUMENT + np.arange(count)
        judged = [grammar.judged(split, i) for i in map(int, numbers)]
        samples = [np.array([BOS, *ids[: max_tokens - 2], EOS], dtype=np.int64) for ids, _ in judged]
        sizes = np.array([len(sample) for sample in samples], dtype=np.int64)
        labels = np.array([follows for _, follows in judged], dtype=np.int64)
        parts[split] = LabelledPart(Encoded(split, np.concatenate(samples), sizes, numbers), labels)
    train = parts["train"].samples
    assert isinstance(train, Encoded)
    train.description = (
        "No data.path: does a sentence follow the built-in grammar, or were two words exchanged? Give data.path=FOLDER "
        "for your own."
    )
    return Task(
        name="acceptability in the built-in grammar",
        classes=("exchanged", "acceptable"),
        metrics=("accuracy", "matthews"),
        train=parts["train"],
        dev=parts["dev"],
        test=parts["test"],
        input_name="bag of tokens",
        input_features=BagOfTokens(grammar.vocabulary().size),
    )


# ---------------------------------------------------------------------------------------------------------- features


class BagOfTokens:
    """ids of a batch -> (B, F): how often each token occurs, their order forgotten.

    F is the size of the vocabulary, or, of one above 10,000, 8192 buckets of tokens by a fixed hash. The rows of a part
    are held in memory, 4 F bytes each: `labels` keeps a large training part small.
    """

    def __init__(self, vocabulary_size: int) -> None:
        ids = torch.arange(vocabulary_size)
        hashed = vocabulary_size > LARGEST_BAG
        # Knuth's multiplicative hash, its upper 13 bits
        self.bucket = (ids * 2654435761 % (1 << 32)) >> 19 if hashed else ids
        self.size = HASHED_BAG if hashed else vocabulary_size

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        ids = inputs["ids"]
        ordinary = (ids >= NUM_SPECIAL).float()
        counts = torch.zeros(len(ids), self.size, device=ids.device)
        return counts.scatter_add_(1, self.bucket.to(ids.device)[ids], ordinary)
