"""What the checks of every modality do with a model: load recorded weights, watch it compute, compare its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from d2v_core.data2vec import Data2Vec
from d2v_core.errors import UserError
from d2v_core.run import load_model_state

from .compare import Comparison, Limit


def load_recorded(c: Comparison, model: Data2Vec, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
    """Recorded weights under d2v's names. teacher: may be empty, it is then equal to the student."""
    load_model_state(model, student, c.fixture.id)
    model.update_teacher(0.0)  # equal to the student, as a new teacher is
    if teacher:
        try:
            model.teacher.load_own_state(teacher)
        except KeyError as error:
            c.fail("teacher", f"owns other tensors than the official one: {error}")
            c.finish()
    model.train()


class Call(NamedTuple):
    """What a module was given by place, and what it gave."""

    args: tuple[Any, ...]
    out: Any


@contextmanager
def watch(model: Data2Vec, **others: nn.Module) -> Iterator[dict[str, Call]]:
    """The last call of each module, caught on the way. `student` and `teacher` are their transformers, `student.0` is a
    block; the names of other modules are the caller's."""
    seen: dict[str, Call] = {}
    student: Any = model.student
    teacher: Any = model.teacher.module
    modules = {"student": student.transformer, "teacher": teacher.transformer, **others}
    for whose in ("student", "teacher"):
        modules |= {f"{whose}.{i}": block for i, block in enumerate(modules[whose].blocks)}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, args, out: seen.update({name: Call(args, out)})

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def by_block(seen: Mapping[str, Call], whose: str) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Outputs of the blocks of "student" or "teacher", and of their feed-forward networks."""
    calls = {int(name.split(".")[1]): call for name, call in seen.items() if name.startswith(f"{whose}.")}
    return {i: call.out[0] for i, call in calls.items()}, {i: call.out[1] for i, call in calls.items()}


def compare_teacher(
    c: Comparison, prefix: str, model: Data2Vec, to_official: Callable[[Mapping[str, Tensor]], Any], limit: Limit
) -> None:
    """The teacher's weights against those under a prefix; it may own no others."""
    try:
        state = to_official(model.teacher.own_state())
    except UserError as error:
        c.fail(f"{prefix}*", str(error))
        return
    for name in state.keys() - {name.removeprefix(prefix) for name in c.recorded(prefix)}:
        c.fail(prefix + name, "owned by our teacher only")
    c.tensors(prefix, state, limit)


def compare_initial(c: Comparison, ours: Mapping[str, Tensor], recorded: Mapping[str, Any], slack: float) -> None:
    """Mean and deviation of initial weights with recorded ones, within five standard errors of the difference of two
    independent samples of as many values, and `slack` for rounding."""
    for name, statistics in recorded.items():
        tensor = ours.get(name)
        if tensor is None or list(tensor.shape) != statistics["shape"]:
            c.fail(f"init {name}", f"shape {None if tensor is None else list(tensor.shape)}, not {statistics['shape']}")
            continue
        error = 5 * statistics["std"] * (2 / tensor.numel()) ** 0.5 + slack
        c.number(f"init mean {name}", tensor.mean(), statistics["mean"], Limit(absolute=error))
        if tensor.numel() > 1:
            c.number(f"init std {name}", tensor.std(), statistics["std"], Limit(absolute=error))
