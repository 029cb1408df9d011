"""`d2v data scan`: what lies at `data.path`, as a report: how much, of which kinds, how long, what is there twice, and
what is broken, with the reason.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d2v_core.contract import Inventory
from d2v_core.files import first
from d2v_core.shards import find_shards, index_path, read_header
from d2v_core.sources import Fact, Item

NUM_BINS = 10
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
MOST_KINDS = 12  # values of a fact that are listed; of more, the range
SHOWN = 20  # broken files and duplicates in the terminal; the JSON has all
BAR = 40  # characters


@dataclass(frozen=True)
class Survey:
    """unit: of lengths. percentiles: of lengths, by percent. edges, counts: (11,) and (10,), their histogram. kinds: of
    each fact how often each value is there, or its range. duplicates: ids of equal contents. bad: (id, reason)."""

    path: str
    modality: str
    samples: int
    total: str
    num_bytes: int
    unit: str
    percentiles: Mapping[str, float]
    edges: Sequence[float]
    counts: Sequence[int]
    kinds: Mapping[str, Mapping[str, float]]
    duplicates: Sequence[Sequence[str]]
    bad: Sequence[tuple[str, str]]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def make_survey(inventory: Inventory, path: str, modality: str) -> Survey:
    """Reads the bytes of those items that are of equal length, and of tars that have a digest. Raises OSError."""
    lengths = np.array(inventory.amounts, dtype=np.float64)
    counts, edges = np.histogram(lengths, NUM_BINS)
    found = np.percentile(lengths, PERCENTILES)
    return Survey(
        path=path,
        modality=modality,
        samples=len(inventory.items),
        total=inventory.total,
        num_bytes=sum(item.source.size for item in inventory.items),
        unit=inventory.unit,
        percentiles={str(share): round(float(value), 3) for share, value in zip(PERCENTILES, found, strict=True)},
        edges=[round(float(edge), 3) for edge in edges],
        counts=[int(count) for count in counts],
        kinds=_kinds(inventory.items),
        duplicates=_duplicates(inventory.items),
        bad=[*inventory.bad, *_changed(path)],
        notes=list(inventory.notes),
    )


def _kinds(items: Sequence[Item]) -> dict[str, dict[str, float]]:
    found: dict[str, Counter[Fact]] = {}
    for item in items:
        for name, value in item.facts.items():
            found.setdefault(name, Counter())[value] += 1
    kinds: dict[str, dict[str, float]] = {}
    for name, counter in found.items():
        numbers = [value for value in counter if isinstance(value, int)]
        if len(counter) <= MOST_KINDS:
            kinds[name] = {str(value): count for value, count in counter.most_common()}
        elif len(numbers) == len(counter):
            kinds[name] = {"least": min(numbers), "most": max(numbers), "different": len(numbers)}
        else:
            kinds[name] = {"different": len(counter)}
    return kinds


def _duplicates(items: Sequence[Item]) -> list[list[str]]:
    """Ids of items with the same bytes. Only those of a length that others have are read."""
    sizes = Counter(item.source.size for item in items)
    groups: dict[bytes, list[str]] = {}
    for item in items:
        if sizes[item.source.size] > 1:
            groups.setdefault(hashlib.sha256(item.source.read()).digest(), []).append(item.id)
    return [group for group in groups.values() if len(group) > 1]


def _changed(path: str) -> list[tuple[str, str]]:
    """Tars that are not what `d2v data shard` wrote."""
    changed: list[tuple[str, str]] = []
    for tar in find_shards(path) or ():
        index = index_path(tar)
        digest = read_header(index).get("tar_sha256") if index.is_file() else None
        if digest is not None and digest != _sha256(tar):
            changed.append((tar.name, "its bytes are not those that were written: fetch it again"))
    return changed


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def describe(survey: Survey) -> str:
    """The report for a terminal."""
    lines = [
        f"{survey.path}, modality={survey.modality}",
        f"{survey.samples} samples, {survey.total}, {survey.num_bytes / 1e6:.1f} MB",
    ]
    lines += [
        f"  {name}: " + ", ".join(f"{value} {count:g}" for value, count in values.items())
        for name, values in survey.kinds.items()
    ]
    lines.append(f"  length, {survey.unit}: " + ", ".join(f"{p} % {v:g}" for p, v in survey.percentiles.items()))
    most = max(survey.counts)
    for low, high, count in zip(survey.edges, survey.edges[1:], survey.counts, strict=False):
        lines.append(f"  {low:>12g} to {high:<12g}{count:>9}  {'#' * round(BAR * count / max(most, 1))}")
    if survey.duplicates:
        extra = sum(len(group) - 1 for group in survey.duplicates)
        lines.append(f"{extra} samples are there more than once:")
        lines += [f"  {first(group, ' = ')}" for group in survey.duplicates[:SHOWN]]
        lines += [f"  ... {len(survey.duplicates) - SHOWN} more groups"] if len(survey.duplicates) > SHOWN else []
    else:
        lines.append("no sample is there twice")
    lines.append(f"{len(survey.bad)} broken{':' if survey.bad else ''}")
    lines += [f"  {first([name], '')}: {reason}" for name, reason in survey.bad[:SHOWN]]
    lines += [f"  ... {len(survey.bad) - SHOWN} more"] if len(survey.bad) > SHOWN else []
    return "\n".join([*lines, *survey.notes])
