"""Holds computed tensors against recorded ones, and sees to it that none is left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .finder import Fixture


@dataclass(frozen=True)
class Limit:
    """Allowed |ours - recorded|: of_largest * max|recorded| + absolute."""

    of_largest: float = 0.0
    absolute: float = 0.0


# The recorders' suggestions (README.md beside the fixtures).
ACTIVATION = Limit(of_largest=1e-5)
LOSS = Limit(of_largest=1e-5)
LOSS_OF_UPDATE = Limit(of_largest=1e-6)
AMPLIFIED = Limit(absolute=5e-5)  # five times what the official code deviates by itself
GRADIENT = Limit(of_largest=1e-4)
ROUNDING = Limit(absolute=1e-4)  # of gradients that are zero but for rounding
EMA = Limit(absolute=1e-6)
UPDATED_WEIGHT = Limit(absolute=2e-5)
EXACT = Limit()


class ParityError(AssertionError):
    """failed: what did not match, by recorded name."""

    def __init__(self, fixture: Fixture, failures: Mapping[str, str]) -> None:
        lines = [f"{name}: {why}" for name, why in failures.items()]
        more = [f"... and {len(lines) - 20} more"] if len(lines) > 20 else []
        super().__init__(f"{fixture.id} is not matched:\n  " + "\n  ".join([*lines[:20], *more]))
        self.failed = tuple(failures)


class Comparison:
    """One fixture being checked. Mismatches are collected; `finish` raises with all of them.

    Every recorded tensor has to be either taken as an input or compared.
    """

    def __init__(self, fixture: Fixture) -> None:
        self.fixture = fixture
        self.failures: dict[str, str] = {}
        self.deviations: dict[str, tuple[float, float, float]] = {}
        """(absolute, over the largest recorded element, over what is allowed) by name."""
        self._inputs: set[str] = set()
        self._compared: set[str] = set()

    def take(self, name: str) -> Tensor:
        """A recorded tensor that our code is fed with."""
        self._inputs.add(name)
        return self.fixture.tensors[name]

    def take_all(self, prefix: str) -> dict[str, Tensor]:
        """Those under a prefix, by the rest of their names."""
        return {name.removeprefix(prefix): self.take(name) for name in self.recorded(prefix)}

    def recorded(self, prefix: str) -> list[str]:
        return [name for name in self.fixture.tensors if name.startswith(prefix)]

    def tensor(self, name: str, ours: Tensor | None, limit: Limit, how: str = "") -> None:
        """how: tells a second comparison with the same tensor from the first."""
        self._compared.add(name)
        self._compare(f"{name} {how}".strip(), ours, self.fixture.tensors[name], limit)

    def tensor_like(self, name: str, ours: Tensor, recorded: Tensor, limit: Limit) -> None:
        """As `tensor`, with what the caller has made of the recorded one to be comparable."""
        self._compared.add(name)
        self._compare(name, ours, recorded, limit)

    def tensors(self, prefix: str, ours: Mapping[str, Tensor], limit: Limit) -> None:
        """Every recorded tensor under a prefix."""
        for name in self.recorded(prefix):
            self.tensor(name, ours.get(name.removeprefix(prefix)), limit)

    def number(self, name: str, ours: Tensor | float | None, recorded: float | None, limit: Limit) -> None:
        """A number of the fixture's JSON file; None = there is none."""
        if recorded is None or ours is None:
            if recorded is not ours:
                self.fail(name, f"computed {ours}, recorded {recorded}")
            return
        self._compare(
            name, torch.as_tensor(ours, dtype=torch.float64), torch.tensor(recorded, dtype=torch.float64), limit
        )

    def fail(self, name: str, why: str) -> None:
        self.failures.setdefault(name, why)

    def _compare(self, name: str, ours: Tensor | None, recorded: Tensor, limit: Limit) -> None:
        if ours is None:
            return self.fail(name, "not computed")
        if ours.shape != recorded.shape:
            return self.fail(name, f"computed {tuple(ours.shape)}, recorded {tuple(recorded.shape)}")
        if not recorded.is_floating_point():
            if not torch.equal(ours.to(recorded.dtype), recorded):
                self.fail(name, f"{(ours != recorded).sum().item()} of {recorded.numel()} elements differ")
            return None
        recorded = recorded.detach().double()
        largest = recorded.abs().max().item()
        deviation = (ours.detach().double() - recorded).abs().max().item()
        allowed = limit.of_largest * largest + limit.absolute
        relative = deviation / largest if largest else float(deviation > 0)
        share = deviation / allowed if allowed else float(deviation > 0)
        _largest(self.deviations, name, (deviation, relative, share))
        if not deviation <= allowed:  # so that nan fails
            self.fail(name, f"deviates by {deviation:.3g} ({relative:.2g} of the largest), allowed {allowed:.3g}")
        return None

    def finish(self) -> Comparison:
        """Raises ParityError naming every mismatch and every recorded tensor that was not looked at."""
        for name in self.fixture.tensors.keys() - self._inputs - self._compared:
            self.fail(name, "recorded, but not compared")
        if self.failures:
            raise ParityError(self.fixture, self.failures)
        return self

    @property
    def num_compared(self) -> int:
        return len(self._compared)

    def groups(self) -> dict[str, tuple[float, float, float]]:
        """Largest deviations by kind of tensor."""
        out: dict[str, tuple[float, float, float]] = {}
        for name, deviation in self.deviations.items():
            _largest(out, _group(name), deviation)
        return out


def checked(fixture: Fixture, checks: Mapping[str, Callable[[Fixture], Comparison]]) -> Comparison:
    """By the check of its kind, which there has to be."""
    assert fixture.kind in checks, f"{fixture.path.name} is of kind {fixture.kind!r}, which nothing checks"
    return checks[fixture.kind](fixture)


def _largest(of: dict[str, tuple[float, float, float]], name: str, deviation: tuple[float, float, float]) -> None:
    a, b, c = of.get(name, deviation)
    of[name] = max(a, deviation[0]), max(b, deviation[1]), max(c, deviation[2])


def _group(name: str) -> str:
    if "grad." in name and "k_proj.bias" in name:
        return "grad.*.k_proj.bias (zero but for rounding)"
    for whole in ("grad", "norm of grad", "after_ema", "teacher_after"):
        if name.startswith(f"{whole}."):
            return f"{whole}.*"
    if name.startswith("opt."):
        return f"opt.*.{'grad.*' if '.grad.' in name else name.rsplit('.', 1)[-1]}"
    updated = re.match(r"after\d+\.\w+", name)
    if updated:
        return f"{updated[0]}.*"
    return re.sub(r"\d+", "#", re.sub(r"(\[\S+\])? of setting \d+$", "", name))


def table(comparisons: Sequence[Comparison]) -> Iterator[str]:
    for comparison in comparisons:
        yield f"{comparison.fixture.id}: {comparison.num_compared} tensors, {len(comparison.deviations)} comparisons"
        for group, (absolute, relative, share) in comparison.groups().items():
            yield f"  {group:<46}{absolute:8.1e} absolute {relative:8.1e} relative {share:6.0%} of the limit"
