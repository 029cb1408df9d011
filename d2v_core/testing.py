"""Holds a modality to its promises: `d2v check NAME`, and a class for a plugin's own tests.

    from d2v_core.testing import Conformance

    class TestSeismic(Conformance):
        modality = "seismic"

Every method and every encoder that the modality names is checked, or, with `encoder = "NAME"`, that one, which may be a
plugin's; the promises are in `d2v_core.promises`.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from d2v_core import plugins
from d2v_core.config import opt, options, read_yaml
from d2v_core.contract import Modality
from d2v_core.errors import UserError
from d2v_core.promises import OF_THE_PLUGIN, PROMISES, Broken, Case, NothingToCheck, explain

INDENT = " " * 9  # of what is wrong, under its promise


@dataclass(frozen=True)
class Result:
    """One promise, held against one case. text: a remark on what was measured, or the sentence on what is wrong."""

    case: str
    promise: str
    status: Literal["kept", "broken", "nothing to check"]
    text: str
    seconds: float


@dataclass(frozen=True)
class CheckConfig:
    """Which part of a modality to check."""

    method: str | None = opt(None, "Only this method; null = all that the modality names.")
    encoder: str | None = opt(
        None, "Only this feature encoder, the modality's or a plugin's; null = all that the modality names."
    )
    promises: list[str] = field(
        default_factory=list[str], metadata={"doc": "Only these, such as [padding,masks]; empty = all."}
    )


def cases(kind: type[Modality[Any]], encoder: str | None = None) -> list[Case]:
    """One for each method and encoder that a modality names, or for this one, each with its smallest preset. Raises
    Broken."""
    encoders = kind.encoders if encoder is None else [encoder]
    return [_case(kind, method, one) for method in kind.methods for one in encoders]


def _case(kind: type[Modality[Any]], method: str, encoder: str) -> Case:
    """The preset of this method that has the fewest weights, with this encoder in place of its own."""
    found: list[tuple[int, str, str]] = []
    for path in sorted(kind.recipes().glob("*.yaml")):
        try:
            recipe = read_yaml(path)
        except UserError as error:
            raise Broken(str(error)) from error
        if "like" in recipe:
            continue  # a variant of another, which stands for it
        if str(recipe.get("method") or kind.methods[0]) == method:
            model: Mapping[str, Any] = recipe.get("model") or {}
            size = int(model.get("embed_dim", 768)) ** 2 * int(model.get("num_layers", 12))
            found.append((size, path.stem, str(recipe.get("encoder") or kind.encoders[0])))
    if not found:
        raise Broken(f"No preset in {kind.recipes()} is for method={method}, which {kind.__name__}.methods names.")
    reasons: list[str] = []
    for _, preset, own in sorted(found):
        try:
            return Case(kind, preset, encoder, method, own == encoder or encoder not in kind.encoders)
        except UserError as error:
            reasons.append(f"preset={preset}: {error}")
    named = f", which {kind.__name__}.encoders names" if encoder in kind.encoders else ""
    raise Broken(f"No preset of method={method} works with encoder={encoder}{named}. {reasons[0]}")


def held(promise: str, case: Case) -> Result:
    """One promise of `PROMISES`, held against one case. Whatever goes wrong in it becomes a sentence."""
    started = time.perf_counter()
    try:
        status, text = "kept", PROMISES[promise](case)
    except Broken as error:
        status, text = "broken", str(error)
    except NothingToCheck as error:
        status, text = "nothing to check", str(error)
    except UserError as error:
        status, text = "broken", str(error)
    except Exception as error:
        status, text = "broken", f"Checking this ended with {explain(error)}"
    return Result(str(case), promise, status, text, time.perf_counter() - started)


def check(
    name: str, method: str | None = None, encoder: str | None = None, promises: Sequence[str] = ()
) -> Generator[Result]:
    """The results of the installed modality `name`, one after the other; promises: only these.

    Raises UserError where it cannot be loaded at all, or has no such method, encoder or promise.
    """
    kind = plugins.load(name)
    _known("method", [method] if method else [], kind.methods, f"{name}'s methods")
    brought = plugins.names(plugins.ENCODERS)
    _known("encoder", [encoder] if encoder else [], [*kind.encoders, *brought], f"{name}'s encoders and the plugins'")
    _known("promises", promises, PROMISES, "the promises")
    asked: set[str] = set()
    for one_method in [method] if method else kind.methods:
        for one_encoder in [encoder] if encoder else kind.encoders:
            try:
                case = _case(kind, one_method, one_encoder)
            except Broken as error:
                yield Result(f"{one_method}, {one_encoder}", "recipes", "broken", str(error), 0.0)
                continue
            for promise in promises or PROMISES:
                if promise not in asked:
                    yield held(promise, case)
                if promise in OF_THE_PLUGIN:
                    asked.add(promise)


def _known(key: str, given: Sequence[str], known: Sequence[str] | Mapping[str, Any], what: str) -> None:
    for one in given:
        if one not in known:
            raise UserError(f"{key}={one} is not one of {what}: {', '.join(known)}.")


def first_line(promise: str) -> str:
    """The promise in one sentence."""
    return (PROMISES[promise].__doc__ or "").strip().splitlines()[0]


def main(argv: Sequence[str]) -> int:
    """`d2v check NAME`: 0 where every promise is kept, 2 where one is broken."""
    words = list(argv)
    if {"-h", "--help"} & set(words):
        print(
            "d2v check NAME [key=value ...]\n\nHolds an installed modality to the contract. It checks, in this order:\n"
        )
        for promise in PROMISES:
            print(f"  {promise:<12} {first_line(promise)}")
        print("\nOptions:")
        for name, one in CheckConfig.__dataclass_fields__.items():
            print(f"  {name}={'[]' if name == 'promises' else 'null'}: {one.metadata['doc']}")
        return 0
    if not words or "=" in words[0]:
        raise UserError(
            "d2v check needs the name of a modality first: d2v check "
            f"{' '.join(['NAME', *words])}. Installed: {', '.join(plugins.names()) or 'none'}."
        )
    config = options(CheckConfig, words[1:], "check")
    broken, count, shown, started = 0, 0, "", time.perf_counter()
    for result in check(words[0], config.method, config.encoder, config.promises):
        if result.case != shown:
            print(f"{words[0]}: {result.case}", flush=True)
            shown = result.case
        count += 1
        line = "ok" if result.status == "kept" else "BROKEN" if result.status == "broken" else "--"
        if result.status == "broken":
            broken += 1
            print(
                f"  {line:<6} {result.promise:<12} {first_line(result.promise)}\n{_indented(result.text)}", flush=True
            )
        else:
            print(f"  {line:<6} {result.promise:<12} {result.text} ({result.seconds:.1f} s)", flush=True)
    seconds = time.perf_counter() - started
    if broken:
        print(f"{broken} of {count} promises broken, in {seconds:.0f} s. docs/contract.md has every promise.")
        return 2
    print(f"All {count} promises kept, in {seconds:.0f} s.")
    return 0


def _indented(text: str) -> str:
    return "\n".join(
        textwrap.fill(line, 110, initial_indent=INDENT, subsequent_indent=INDENT) for line in text.splitlines()
    )


class Conformance:
    """Tests for pytest: one for each promise, method and encoder. A sub-class names its modality and adds nothing.

    encoder: only this one, which may be a plugin's.
    """

    modality: ClassVar[str]
    encoder: ClassVar[str | None] = None

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Called by pytest with its metafunc: a plugin that cannot be loaded at all becomes one failing test."""
        if "outcome" not in metafunc.fixturenames:
            return
        try:
            kind = plugins.load(self.modality)
        except UserError as error:
            metafunc.parametrize("outcome", [_raiser(str(error))], ids=["load"])
            return
        found: list[Callable[[], Result]] = []
        names: list[str] = []
        encoders = kind.encoders if self.encoder is None else [self.encoder]
        for number, (method, encoder) in enumerate((m, e) for m in kind.methods for e in encoders):
            made: list[Case] = []
            for promise in PROMISES:
                if number and promise in OF_THE_PLUGIN:
                    continue
                found.append(_test(kind, method, encoder, promise, made))
                names.append(f"{method}-{encoder}-{promise}")
        metafunc.parametrize("outcome", found, ids=names)

    def test_promise(self, outcome: Callable[[], Result]) -> None:
        """Fails with the promise and what breaks it. outcome: from `pytest_generate_tests`."""
        result = outcome()
        if result.status == "nothing to check":
            import pytest

            pytest.skip(result.text)
        assert result.status == "kept", f"{first_line(result.promise)}\n{result.text}"


def _raiser(text: str) -> Callable[[], Result]:
    return lambda: Result("", "door", "broken", text, 0.0)


def _test(kind: type[Modality[Any]], method: str, encoder: str, promise: str, made: list[Case]) -> Callable[[], Result]:
    """made: the case, once one of its tests has made it; they share what is costly."""

    def outcome() -> Result:
        if not made:
            try:
                made.append(_case(kind, method, encoder))
            except Broken as error:
                return Result(f"{method}, {encoder}", "recipes", "broken", str(error), 0.0)
        return held(promise, made[0])

    return outcome
