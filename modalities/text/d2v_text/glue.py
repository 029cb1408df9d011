"""The tasks of GLUE: what their files look like, what is told of a row, and how it is scored.

Files as https://gluebenchmark.com hands them out: a folder per task with train.tsv, dev.tsv (MNLI: dev_matched.tsv and
dev_mismatched.tsv) and test.tsv, whose labels are secret. Metrics: arXiv:1804.07461, section 3.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from d2v_core.errors import UserError

_TWO = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")


@dataclass(frozen=True)
class GlueTask:
    """columns: the one or two with text. classes: the labels as they stand in the files; empty = a number.

    header: the columns of train.tsv; where `has_header` is false, names for what the file itself does not name.
    scale: numbers are divided by it.
    """

    name: str
    header: tuple[str, ...]
    columns: tuple[str, ...]
    label: str
    classes: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    scale: float = 1.0
    has_header: bool = True


TASKS: Mapping[str, GlueTask] = {
    task.name: task
    for task in (
        GlueTask("CoLA", ("source", "label", "mark", "sentence"), ("sentence",), "label", _TWO,
                 ("matthews", "accuracy"), has_header=False),
        GlueTask("SST-2", ("sentence", "label"), ("sentence",), "label", _TWO),
        GlueTask("MRPC", ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"), ("#1 String", "#2 String"),
                 "Quality", _TWO, ("accuracy_f1", "accuracy", "f1")),
        GlueTask("QQP", ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"), ("question1", "question2"),
                 "is_duplicate", _TWO, ("accuracy_f1", "accuracy", "f1")),
        GlueTask("STS-B", ("index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1",
                           "sentence2", "score"), ("sentence1", "sentence2"), "score", (),
                 ("pearson_spearman", "pearson", "spearman"), scale=5.0),
        GlueTask("MNLI", ("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse",
                          "sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1", "gold_label"),
                 ("sentence1", "sentence2"), "gold_label", ("contradiction", "entailment", "neutral")),
        GlueTask("QNLI", ("index", "question", "sentence", "label"), ("question", "sentence"), "label", _ENTAILMENT),
        GlueTask("RTE", ("index", "sentence1", "sentence2", "label"), ("sentence1", "sentence2"), "label",
                 _ENTAILMENT),
        GlueTask("WNLI", ("index", "sentence1", "sentence2", "label"), ("sentence1", "sentence2"), "label", _TWO),
    )
}  # fmt: skip
_BY_SHORT_NAME = {re.sub(r"\W", "", name).lower(): name for name in TASKS}


def named(name: str) -> GlueTask | None:
    """sst2, SST-2 and the like."""
    found = _BY_SHORT_NAME.get(re.sub(r"[\W_]", "", name).lower())
    return None if found is None else TASKS[found]


def asked_for(name: str) -> GlueTask:
    """Raises UserError."""
    task = named(name)
    if task is None:
        near = difflib.get_close_matches(re.sub(r"[\W_]", "", name).lower(), list(_BY_SHORT_NAME), 1)
        hint = f" Did you mean {_BY_SHORT_NAME[near[0]]}?" if near else ""
        raise UserError(f"glue.task={name} is none of: {', '.join(TASKS)}.{hint}")
    return task


def recognised(folder: str, first_rows: Sequence[Sequence[str]]) -> GlueTask | None:
    """By the folder's name, else by the first rows of its train.tsv; None where it is none of GLUE's.

    RTE and WNLI have one header; their labels differ. Two columns `sentence` and `label` are anybody's, and are read
    as SST-2 is anyway.
    """
    if (task := named(folder)) is not None:
        return task
    if not first_rows:
        return None
    header, rows = tuple(first_rows[0]), first_rows[1:]
    if len(header) == 4 and all(len(row) == 4 and row[1] in _TWO and row[2] in ("", "*") for row in first_rows):
        return TASKS["CoLA"]
    found = [task for task in TASKS.values() if task.has_header and task.header == header and task.name != "SST-2"]
    if len(found) > 1 and rows:
        found = [task for task in found if rows[0][-1] in task.classes]
    return found[0] if found else None
