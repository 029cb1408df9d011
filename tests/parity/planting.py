"""Faults that parity has to notice: how they are planted, and how a check is seen to raise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch

from d2v_core.contract import Masks, Tokens
from d2v_core.data2vec import Data2Vec

from .compare import Comparison, ParityError
from .finder import Fixture, pick

Plant = Callable[[pytest.MonkeyPatch], None]
Check = Callable[..., Comparison]


@dataclasses.dataclass(frozen=True)
class Case:
    """On which fixture, by which check, a fault has to show, and where (prefixes of recorded names).

    changes: options other than the fixture's own, which may be the fault.
    """

    kind: str
    check: Check
    where: Callable[[Fixture], bool]
    noticed_by: tuple[str, ...]
    plant: Plant
    changes: Mapping[str, str]


class Faults(dict[str, Case]):
    """The cases of one modality by name."""

    def __init__(self) -> None:
        super().__init__()
        self._passed: set[str] = set()

    def case(
        self,
        kind: str,
        check: Check,
        noticed_by: tuple[str, ...],
        where: Callable[[Fixture], bool] = lambda _: True,
        changes: Mapping[str, str] | None = None,
    ) -> Callable[[Plant], Plant]:
        """Decorator of a function that plants a fault."""

        def register(plant: Plant) -> Plant:
            self[plant.__name__] = Case(kind, check, where, noticed_by, plant, changes or {})
            return plant

        return register

    def notice(self, name: str, fixtures: Iterable[Fixture], patch: pytest.MonkeyPatch) -> None:
        """A check that raises with a fault planted says something only if it passes without."""
        case = self[name]
        fixture = pick(list(fixtures), case.kind, case.where)
        if fixture.id not in self._passed:
            case.check(fixture)
            self._passed.add(fixture.id)
        case.plant(patch)
        with pytest.raises(ParityError) as caught:
            case.check(fixture, case.changes) if case.changes else case.check(fixture)
        for prefix in case.noticed_by:
            assert any(failed.startswith(prefix) for failed in caught.value.failed), (prefix, caught.value.failed)


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace owner.name by wrapper(original, *arguments)."""
    original = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    patch.setattr(owner, name, replaced)


def override(patch: pytest.MonkeyPatch, official: Any, word: str) -> None:
    """Another value for an option than the official configuration asks for. official: the modality's module."""
    key = word.partition("=")[0] + "="
    wrap(
        patch, official, "config_from_official",
        lambda original, *args, **kwargs: [
            word if given.startswith(key) else given for given in original(*args, **kwargs)
        ],
    )  # fmt: skip


def teacher_is_given(patch: pytest.MonkeyPatch, change: Callable[[Data2Vec, Tokens, Any, Masks], Any]) -> None:
    """change: from model, tokens, inputs and masks to the tokens and inputs that the teacher then gets."""

    def forward(original: Any, self: Data2Vec, inputs: Any, masks: Masks, *rest: Any) -> Any:
        patch.setattr(
            self, "teach",
            lambda tokens, given, same=True: Data2Vec.teach(self, *change(self, tokens, given, masks), same),
            raising=False,
        )  # fmt: skip
        return original(self, inputs, masks, *rest)

    wrap(patch, Data2Vec, "forward", forward)


def teacher_sees_what_is_hidden_as_hidden(patch: pytest.MonkeyPatch, vector: str) -> None:
    """Its tokens, too, are replaced by a vector of the feature encoder. vector: the name of that parameter."""

    def change(self: Data2Vec, tokens: Tokens, inputs: Any, masks: Masks) -> Any:
        x = torch.where(masks.hidden[:, 0, :, None], getattr(self.student.encoder, vector), tokens.x)
        return dataclasses.replace(tokens, x=x), inputs

    teacher_is_given(patch, change)
