"""Writes docs/options.md: every option of every stage, modality and verb, read from the code that takes it.

`python docs/write_options.py`; a test compares the page with what this makes.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from d2v_core import cli, plugins
from d2v_core.config import CORE_SECTIONS, KEYS, STAGES, option_rows

PAGE = Path(__file__).parent / "options.md"
MODALITIES = ("audio", "text", "vision")
HEAD = """# Options

For: whoever looks up what an option means. Written by `python docs/write_options.py` from the code that reads them.

Options are given as `key=value`, those of a section with a dot: `d2v run modality=audio optim.lr=1e-3`. What stands
here is the default of an option that no preset sets; `d2v config modality=NAME preset=NAME` prints what counts with a
preset, each with its sentence. A plugin's own options are shown by the same command.
"""


def table(rows: Iterator[tuple[str, str, str, str]]) -> str:
    lines = ["| option | default | it is | meaning |", "|---|---|---|---|"]
    for name, default, kind, doc in rows:
        lines.append(f"| `{name}` | {f'`{default}`' if default else 'empty'} | {kind} | {doc} |")
    return "\n".join(lines)


def keys() -> Iterator[tuple[str, str, str, str]]:
    """The options that belong to no section."""
    for key, (value, doc) in KEYS.items():
        shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
        yield key, shown, {bool: "true or false", int: "a whole number"}.get(type(value), "text"), doc


def first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def sections_of(kind: Any) -> Iterator[tuple[str, str, type]]:
    """(name, where it counts, dataclass) of each section of a modality, each dataclass once."""
    found: dict[tuple[str, type], list[str]] = {}
    all_: list[str] = []
    for method in kind.methods:
        for encoder in kind.encoders:
            first = method == kind.methods[0]
            sections: Mapping[str, type] = kind.sections(encoder) if first else kind.method_sections(encoder, method)
            where = f"method={method}" + (f", encoder={encoder}" if len(kind.encoders) > 1 else "")
            all_.append(where)
            for name, section in sections.items():
                found.setdefault((name, section), []).append(where)
    for (name, section), where in found.items():
        yield name, "" if where == all_ else "; ".join(where), section
    for name, section in kind.task_sections().items():
        yield name, "stage=finetune and stage=probe", section


def help_of(verb: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as text:
        cli.main([verb, "--help"])
    return text.getvalue().rstrip()


def page() -> str:
    """The whole page."""
    parts = [HEAD, "## A run\n", table(keys())]
    for name, kind in CORE_SECTIONS.items():
        stages = ", ".join(stage for stage, sections in STAGES.items() if name in sections)
        parts.append(f"\n### {name}\n\n{first_line(kind)} Stages: {stages}.\n\n{table(option_rows(kind, f'{name}.'))}")
    for modality in MODALITIES:
        kind = plugins.load(modality)
        parts.append(f"\n## modality={modality}\n\n{first_line(kind)}")
        for name, where, section in sections_of(kind):
            count = f" Only with {where}." if where else ""
            parts.append(
                f"\n### {name} ({modality}: {section.__name__})\n\n{first_line(section)}{count}\n\n"
                f"{table(option_rows(section, f'{name}.'))}"
            )
    parts.append("\n## Verbs\n\nWhat `d2v VERB --help` prints.")
    verbs = (*cli.OWN_MODULES, *sorted(p.name for p in plugins.installed(plugins.COMMANDS) if p.distribution == "d2v"))
    parts += [f"\n### d2v {verb}\n\n```\n{help_of(verb)}\n```" for verb in verbs]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
