"""The parts of a pre-training step, seen from outside: which of them is at work, told while it runs.

What a step costs (`plan.py`) and where its time goes (`profile.py`) are both asked part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from d2v_core.contract import Tokens
from d2v_core.data2vec import Data2Vec
from d2v_core.transformer import TransformerOutput

FEATURES, TEACHER, STUDENT, PREDICTOR, LOSS = "feature encoder", "teacher", "student", "predictor", "loss"
OPTIMIZER, TEACHER_UPDATE = "optimizer", "teacher update"
BACKWARD = {part: f"{part}, backward" for part in (FEATURES, STUDENT, PREDICTOR)}


@contextmanager
def watched(model: Data2Vec, optimizer_step: Any, switch: Callable[[str], None]) -> Generator[None]:
    """Inside, `switch(part)` is called whenever a step passes from one part to another.

    A teacher's own feature encoder counts as teacher; positions and masking count as student or teacher, as `view`
    does. The parts of the backward pass are told by the gradients of what passes from one to the next: when that of the
    transformer's output is there, the predictor is done. optimizer_step: the `OptimizerStep`.
    """
    stack: list[str] = []

    def during(part: str, call: Callable[..., Any], after: Callable[[Any], None] | None = None) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if TEACHER in stack:
                return call(*args, **kwargs)
            stack.append(part)
            switch(part)
            try:
                result = call(*args, **kwargs)
            finally:
                stack.pop()
                if stack:
                    switch(stack[-1])
            if after is not None:
                after(result)
            return result

        return run

    def tell(part: str) -> Callable[[Tensor], None]:
        return lambda grad: switch(part)

    def on_gradient(x: Tensor, part: str) -> None:
        if x.requires_grad:
            x.register_hook(tell(BACKWARD[part]))  # pyright: ignore[reportUnknownMemberType]

    def after_embed(tokens: Tokens) -> None:
        on_gradient(tokens.x, FEATURES)

    def after_student(result: tuple[Tokens, TransformerOutput]) -> None:
        on_gradient(result[1].x, STUDENT)

    student = model.student
    replaced: list[tuple[Any, str, Any]] = [
        (model, "forward", during(LOSS, model.forward, lambda result: switch(BACKWARD[PREDICTOR]))),
        (model, "teach", during(TEACHER, model.teach)),
        (student.encoder, "embed", during(FEATURES, student.encoder.embed, after_embed)),
        (student, "forward", during(STUDENT, student.forward, after_student)),
        (model.predictor, "forward", during(PREDICTOR, model.predictor.forward)),
        (model, "update_teacher", during(TEACHER_UPDATE, model.update_teacher)),
        # The first thing that happens after the last backward pass, whether or not there is anything to scale.
        (optimizer_step.scaler, "unscale_", during(OPTIMIZER, optimizer_step.scaler.unscale_)),
    ]  # fmt: skip
    for owner, name, call in replaced:
        setattr(owner, name, call)
    try:
        yield
    finally:
        for owner, name, _ in replaced:
            delattr(owner, name)
