"""The teacher: an exponential moving average of the student."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from d2v_core.contract import Part
from d2v_core.distributed import local, part_of_whole


def part_of(name: str, parts: Mapping[str, Part]) -> Part:
    """The entry with the longest prefix of `name` by whole dotted words; "" stands for everything else."""
    words = name.split(".")
    for n in range(len(words), -1, -1):
        prefix = ".".join(words[:n])
        if prefix in parts:
            return parts[prefix]
    raise KeyError(
        f"no entry for the parameter {name!r} among the teacher's parts {sorted(parts)}; "
        'give its prefix, or "" for everything else, as "average", "copy" or "share"'
    )


class EMATeacher(nn.Module):
    """A copy of the student of which some parts are averaged, some copied and some shared.

    "average": theta_t = decay * theta_t + (1 - decay) * theta_s in float32. "copy": the student's value after each
    update. "share": one tensor for both, nothing stored twice. Buffers and frozen parameters are always copied, since
    averaging an integer index table ruins it. Always in eval mode, whatever `train()` is told.

    Source: fairseq/modules/ema_module.py.
    """

    def __init__(self, student: nn.Module, parts: Mapping[str, Part]) -> None:
        super().__init__()
        shared: dict[int, object] = {}
        self._averaged: list[str] = []
        self._copied: list[str] = []
        for name, parameter in student.named_parameters():
            part = part_of(name, parts)
            if part == "share":
                # A deep copy that finds these in its memo keeps them, so both modules hold the same tensor.
                shared[id(parameter)] = parameter
            elif part == "average" and parameter.requires_grad:
                if parameter.dtype != torch.float32:
                    raise ValueError(
                        f"{name} is {parameter.dtype}: the average needs float32 weights, because a decay of 0.9999 "
                        "loses almost every update in half precision; use autocast instead"
                    )
                self._averaged.append(name)
            else:
                self._copied.append(name)
        self._shared = frozenset(n for n, p in student.named_parameters() if id(p) in shared)
        self.module = copy.deepcopy(student, shared)
        for name, parameter in self.module.named_parameters():
            if name not in self._shared:
                parameter.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> EMATeacher:
        """Stays in eval mode, whatever `mode` is."""
        del mode
        return super().train(False)

    def shares(self, prefix: str) -> bool:
        """Whether every parameter under `prefix` is the student's own."""
        return all(n in self._shared for n, _ in self.module.named_parameters() if n.startswith(prefix + "."))

    @torch.no_grad()
    def update(self, student: nn.Module, decay: float, applied: Tensor | None = None) -> None:
        """One step towards the student; call it once after each optimizer step. decay >= 1 leaves the average alone.

        applied: () float32 on the student's device, 0 where the optimizer left its weights alone: then the average
        stays as it is too. A GPU is not waited for to find out.
        """
        ours, theirs = dict(self.module.named_parameters()), dict(student.named_parameters())
        if applied is not None and applied.device.type == "cpu":
            decay, applied = (decay if applied else 1.0), None
        if self._averaged and decay < 1.0:
            average, towards = ([local(of[n].data) for n in self._averaged] for of in (ours, theirs))
            if applied is None:
                torch._foreach_lerp_(average, towards, 1.0 - decay)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
            else:
                _lerp(average, towards, (1.0 - decay) * applied)
        for name in self._copied:
            local(ours[name].data).copy_(local(theirs[name].data))
        for ours_buffer, theirs_buffer in zip(self.module.buffers(), student.buffers(), strict=True):
            ours_buffer.copy_(theirs_buffer)

    def own_state(self) -> dict[str, Tensor]:
        """What a checkpoint has to store: every tensor that is not the student's own."""
        return {n: t for n, t in self.module.state_dict().items() if n not in self._shared}

    def load_own_state(self, state: Mapping[str, Tensor]) -> None:
        """Take the values of `state`, made by `own_state`.

        Raises KeyError naming what is missing or unknown, ValueError where shapes differ.
        """
        own = self.own_state()
        if own.keys() != state.keys():
            raise KeyError(
                f"teacher state: missing {sorted(own.keys() - state.keys())[:5]}, "
                f"unknown {sorted(state.keys() - own.keys())[:5]}"
            )
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(f"teacher {name}: stored {tuple(state[name].shape)}, model {tuple(tensor.shape)}")
            local(tensor).copy_(part_of_whole(state[name], tensor))


def _lerp(average: list[Tensor], towards: list[Tensor], weight: Tensor) -> None:
    """`torch._foreach_lerp_` with a weight that only the device knows."""
    way = torch._foreach_sub(towards, average)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    torch._foreach_mul_(way, weight)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    torch._foreach_add_(average, way)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
