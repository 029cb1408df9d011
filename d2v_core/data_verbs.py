"""`d2v data scan` and `d2v data shard`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2v_core.config import RunConfig, load_config, opt, options, parse_arguments
from d2v_core.contract import Inventory, Modality
from d2v_core.errors import UserError
from d2v_core.files import check_bad_files
from d2v_core.sharding import shared_keys, write_shards
from d2v_core.survey import describe, make_survey
from d2v_core.verbs import print_help

HELP = """d2v data scan modality=NAME data.path=FILES [--json] [key=value ...]

Says what lies at data.path: how much, of which kinds, how long, what is there twice, and what is broken. The exit
status is 0 where nothing is broken, 1 where something is. data.verify=decode reads every file to its end, where the
modality has that option. --json has every broken file and every duplicate.

d2v data shard modality=NAME data.path=FILES out=FOLDER [shard_mb=1000] [key=value ...]

Writes the files that are of use into tars (WebDataset's form) with an index, for data.path=FOLDER. Given once more, it
goes on where it was interrupted. data.max_bad_ratio is as in a run.

Options of `d2v data shard` beside those that `d2v config modality=NAME` lists:
"""


@dataclass
class ShardConfig:
    """What `d2v data shard` is told."""

    shard_mb: int = opt(1000, "Largest tar, million bytes; a sample that is larger has one of its own.")


def main(argv: Sequence[str]) -> int:
    """The verb. Returns the exit status."""
    words = list(argv)
    if not words or {"-h", "--help"} & set(words):
        print_help(HELP, ShardConfig)
        print("  out: the folder to write")
        return 0
    verb, rest = words[0], words[1:]
    if verb not in ("scan", "shard"):
        raise UserError(f"d2v data has the verbs scan and shard, not {verb!r}: `d2v data --help` says more.")
    return _scan(rest) if verb == "scan" else _shard(rest)


def _look(words: Sequence[str]) -> tuple[RunConfig, type[Modality[Any]], str]:
    config, kind = load_config(words)
    path = parse_arguments(words).get("data.path")
    if path is None:
        raise UserError("data.path is missing: give the folder, file or tars to look at.")
    return config, kind, path


def _scan(words: Sequence[str]) -> int:
    config, kind, path = _look([word for word in words if word != "--json"])
    try:
        survey = make_survey(kind.inventory(config, True), path, kind.name)
    except OSError as error:
        raise UserError(f"data.path={path} cannot be read: {error}.") from error
    print(json.dumps(survey.to_dict(), indent=1) if "--json" in words else describe(survey))
    return 1 if survey.bad else 0


def _shard(words: Sequence[str]) -> int:
    own = [word for word in words if word.startswith("shard_mb=")]
    size = options(ShardConfig, own, "data").shard_mb
    config, kind, path = _look([word for word in words if word not in own])
    if size < 1:
        raise UserError(f"shard_mb={size} must be at least 1.")
    if not config.out:
        raise UserError("data shard needs out=FOLDER, a new folder for the tars.")
    inventory = kind.inventory(config, False)
    _refuse_bad(inventory, config, path)
    out = Path(config.out).expanduser()
    write_shards(inventory, out, kind.name, size * 10**6)
    if inventory.bad:
        print(f"{len(inventory.bad)} broken files were left out; {out}/shards.json names them.")
    if shared := shared_keys(inventory.items):
        print(
            f"{shared} names are the same up to their first dot: other WebDataset readers take those for one sample; "
            "d2v does not."
        )
    print(f"Next: d2v run modality={kind.name} data.path={out}")
    return 0


def _refuse_bad(inventory: Inventory, config: RunConfig, path: str) -> None:
    """As a run does, which is stricter than a scan."""
    allowed = getattr(config.section("data", object), "max_bad_ratio", 0.0)
    named = [f"{name} ({reason})" for name, reason in inventory.bad]
    total = len(inventory.items) + len(inventory.bad)
    check_bad_files(named, total, allowed, "files", path)
