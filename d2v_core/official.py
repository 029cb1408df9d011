"""Between an official implementation of data2vec and d2v: tensors by another name, options by another name.

Each modality that follows an official one has a table of names and knows what the options mean; the walk through both,
and what can go wrong on it, is here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from d2v_core.errors import UserError

T = TypeVar("T")
TEACHER = "_ema"  # key under which fairseq nests the teacher's weights in the student's state
THREE = "[qkv]"  # in an official name: there are three of it, of queries, keys and values
STACKED = "qkv"  # d2v has one tensor instead, whose rows stand in this order


@dataclass(frozen=True)
class _Row:
    """A row of a table, ready to be used: what a name looks like on each side, and how it is written there.

    part: which third of d2v's tensor the official one is, a letter of `STACKED`; "" = it is the same tensor.
    """

    official: re.Pattern[str]
    write_official: str
    d2v: re.Pattern[str]
    write_d2v: str
    part: str

    @classmethod
    def of(cls, official: str, d2v: str, part: str) -> _Row:
        official = official.replace(THREE, part)
        return cls(_pattern(official), _template(official), _pattern(d2v), _template(d2v), part)


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\#", r"(\d+)") + ("(weight|bias)" if name.endswith(".") else ""))


def _template(name: str) -> str:
    return name.replace("#", "{}") + ("{}" if name.endswith(".") else "")


class NameTable:
    """A table of (official, d2v) names, read in both directions.

    In a name, # is a number; a name that ends in a dot stands for its `.weight` and its `.bias`. [qkv] in an official
    name stands for three tensors, which d2v stacks in this order. Where two rows have the same d2v name, the first is
    written and both are read.
    """

    def __init__(self, table: Iterable[tuple[str, str]]) -> None:
        self._rows = [
            _Row.of(official, d2v, part) for official, d2v in table for part in ("qkv" if THREE in official else ("",))
        ]

    def to_d2v(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """(tensors by d2v's names, names that are not in the table).

        Raises UserError for a tensor that is there twice, or an incomplete set of queries, keys and values.
        """
        out: dict[str, Tensor] = {}
        stacks: dict[str, dict[str, Tensor]] = {}
        unknown: list[str] = []
        for name, tensor in state.items():
            for row in self._rows:
                if match := row.official.fullmatch(name):
                    break
            else:
                unknown.append(name)
                continue
            ours = row.write_d2v.format(*match.groups())
            if row.part:
                stacks.setdefault(ours, {})[row.part] = tensor
            elif ours in out:
                raise UserError(f"The official weights give {ours} twice, the second time as {name}.")
            else:
                out[ours] = tensor
        for ours, parts in stacks.items():
            missing = [f"{part}_proj" for part in STACKED if part not in parts]
            if missing:
                raise UserError(f"For {ours} the official weights lack {', '.join(missing)}.")
            out[ours] = torch.cat([parts[part] for part in STACKED])
        return out, unknown

    def to_official(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """The way back: (tensors by official names, names that are not in the table)."""
        out: dict[str, Tensor] = {}
        unknown: list[str] = []
        for name, tensor in state.items():
            rows = [(row, match) for row in self._rows if (match := row.d2v.fullmatch(name))]
            if not rows:
                unknown.append(name)
            elif rows[0][0].part:
                rows_of = dict(zip(STACKED, tensor.chunk(3), strict=True))
                out |= {row.write_official.format(*match.groups()): rows_of[row.part] for row, match in rows}
            else:
                row, match = rows[0]
                out[row.write_official.format(*match.groups())] = tensor
        return out, unknown


def fairseq_blocks(prefix: str) -> tuple[tuple[str, str], ...]:
    """Rows for the blocks of fairseq's transformer encoder (fairseq/modules/transformer_layer.py) below `prefix`."""
    layer, block = prefix + "layers.#.", "student.transformer.blocks.#."
    return (
        (layer + "self_attn.[qkv]_proj.", block + "attention.qkv."),
        (layer + "self_attn.out_proj.", block + "attention.out."),
        (layer + "self_attn_layer_norm.", block + "norm1."),
        (layer + "fc1.", block + "fc1."),
        (layer + "fc2.", block + "fc2."),
        (layer + "final_layer_norm.", block + "norm2."),
    )


def moved(state: Mapping[str, T], here: str, there: str) -> dict[str, T]:
    """Names that begin with `here` begin with `there` instead; the others stay as they are."""
    return {there + name.removeprefix(here) if name.startswith(here) else name: value for name, value in state.items()}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Of a `Data2Vec` without its teacher, by d2v's names; None where there is none."""
    return {name: p.grad for name, p in model.named_parameters() if not name.startswith("teacher.")}


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


class Options:
    """A stored official configuration, read option by option. What does not fit is collected, to be named at once."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.problems: list[str] = []
        self._values = values
        self._taken: set[str] = set()

    def take(self, key: str, kind: type | tuple[type, ...] = object, *default: Any) -> Any:
        """A value of the type given; true and false are no numbers. None where there is none: that is a problem too."""
        self._taken.add(key)
        if key not in self._values and not default:
            self.problems.append(f"{key} is missing")
            return None
        value = self._values.get(key, *default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object)):
            self.problems.append(f"{key}={value!r} is {type(value).__name__}")
            return None
        return value

    def fixed(self, values: Mapping[str, Any]) -> None:
        """Options that d2v does not have: the only value that it can do, assumed where none is stored."""
        for key, possible in values.items():
            self._taken.add(key)
            given = self._values.get(key, possible)
            if given != possible:
                self.problems.append(f"{key}={given!r}: d2v has only {possible!r}")

    def left(self) -> list[str]:
        """Keys that nobody has asked for, in alphabetical order."""
        return sorted(self._values.keys() - self._taken)

    def words(self, values: Mapping[str, Any], method: str, unknown: Iterable[str]) -> list[str]:
        """d2v's options as `key=value` words for `d2v_core.config.load_config`.

        unknown: keys that would have to mean something, and that d2v knows nothing of.
        Raises UserError with all the problems, where there are any.
        """
        unknown = ", ".join(unknown)
        problems = [*dict.fromkeys(self.problems), *([f"unknown: {unknown}"] if unknown else [])]
        if problems:
            raise UserError(
                f"The official configuration does not fit {method} as d2v has it:\n  " + "\n  ".join(problems)
            )
        return [f"{key}={_word(value)}" for key, value in values.items()]


def _word(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(str, value))}]"  # pyright: ignore[reportUnknownArgumentType]
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
