"""What operations cost, counted while they run, on tensors that have no values (torch's FakeTensor).

Such tensors have shapes, types and storages: a network of them is built, trained and thrown away without computing
anything and with next to no memory. What is counted is therefore the network as it stands, by the kernels that it
would take on this machine, and not a formula for it.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from d2v_core import run
from d2v_core.contract import Batch, Masks, Modality
from d2v_core.data2vec import Data2Vec
from d2v_core.errors import UserError
from d2v_core.memory import Heap

aten, mkldnn = torch.ops.aten, torch.ops.mkldnn


def flops_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Floating-point operations of one call of an operator; a multiply-add is 2. Matrix products, convolutions and
    attention only. Attention's backward counts four products: what a fused kernel computes twice is not useful work."""
    packet = func._overloadpacket
    kind = str(packet)
    if kind == "aten.convolution_backward":  # torch's table counts grouped ones as if they were not
        return 2 * args[0].numel() * args[2][0].numel() * sum(args[10][:2])
    if kind.startswith("aten._scaled_dot_product") and "attention" in kind:
        backward = "backward" in kind
        q, k, v = args[1:4] if backward else args[:3]
        return (2 if backward else 1) * 2 * math.prod(q.shape[:3]) * k.shape[2] * (q.shape[3] + v.shape[3])
    if packet in flop_registry:
        return flop_registry[packet](*args, **kwargs, out_val=out)
    if kind in ("aten.addmm_", "aten.baddbmm_"):
        return 2 * out.numel() * args[1].shape[-1]
    if kind == "mkldnn._linear_pointwise":  # oneDNN's products, which torch's table does not know
        return 2 * out.numel() * args[0].shape[-1]
    if kind == "aten.mkldnn_convolution":
        return 2 * out.numel() * args[1][0].numel()
    return 0


def _moved(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> int:
    """Bytes that an operator reads and writes, each tensor once."""
    if func.is_view or "empty" in func.__name__:
        return 0
    return sum(
        min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
        for t in tree_leaves((args, kwargs, out))
        if isinstance(t, Tensor)
    )


def _as_convolution(args: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    x, weight, bias, padding, stride, dilation, groups = args
    return aten.convolution.default, (x, weight, bias, stride, padding, dilation, False, [0] * len(padding), groups)


def _as_product(args: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    x, _, weight, bias, _ = args
    return mkldnn._linear_pointwise.default, (x, weight, bias, "none", [], "")


STAND_INS: Mapping[Any, Callable[[Sequence[Any]], tuple[Any, Sequence[Any]]]] = {
    aten.mkldnn_convolution.default: _as_convolution,
    mkldnn._linear_pointwise.binary: _as_product,
}
"""Operators whose shapes torch cannot tell without values, and others that make the same tensor."""


def _key(storage: torch.UntypedStorage) -> int:
    """Which storage this is, while it lives."""
    return storage._cdata  # pyright: ignore[reportPrivateUsage]


class Counter(TorchDispatchMode):
    """Inside, adds up FLOPs and bytes moved by part, and follows the storages that are alive.

    part: what is counted is put down to it; set it as the step goes on. live: bytes now. peak: the most since `reset`.
    heap: where a process on a CPU would have them.
    """

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.part = ""
        self._known: set[int] = set()
        self.live = self.peak = 0
        self.heap = Heap()
        self.peak_part = ""
        self.flops: dict[str, int] = {}
        self.moved: dict[str, int] = {}
        self._sizes: dict[int, int] = {}

    def reset(self) -> None:
        """Count anew, from what lives now."""
        self.peak, self.peak_part, self.flops, self.moved = self.live, self.part, {}, {}
        self.heap.reset()

    def switch(self, part: str) -> None:
        """What follows is counted for `part`."""
        self.part = part

    def answer_for(self, tensors: Iterable[Tensor]) -> None:
        """A value of these may be asked, and the answer is 0: networks compare a number that is kept beside their
        weights, such as a version, with their own. A question about anything else is an error of FakeTensor's."""
        self._known = {_key(tensor.untyped_storage()) for tensor in tensors}

    def add(self, tensor: Tensor) -> None:
        """Follow the storage of a tensor that was there before."""
        storage = tensor.untyped_storage()
        key = _key(storage)
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += self._sizes[key]
            self.heap.take(key, self._sizes[key])
            if self.live > self.peak:
                self.peak, self.peak_part = self.live, self.part
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)
        self.heap.free(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # asked of every tensor many times over
            return func(*args)
        if func is aten._local_scalar_dense.default and _key(args[0].untyped_storage()) in self._known:
            return False if args[0].dtype == torch.bool else 0
        if func in STAND_INS and isinstance(args[0], FakeTensor):
            func, args = STAND_INS[func](args)
        out = func(*args, **kwargs)
        for counts, count in (
            (self.flops, flops_of(func, args, kwargs, out)),
            (self.moved, _moved(func, args, kwargs, out)),
        ):
            if count:
                counts[self.part] = counts.get(self.part, 0) + count
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return out


class _NoAnswers(TorchDispatchMode):
    """While a network is built without values, a question about them (`if x.any()`) is answered with no."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return False
        return func(*args, **(kwargs or {}))


def hollow_model(modality: Modality[Any]) -> Data2Vec:
    """`run.build_model` without values or memory for them: on the meta device, or, where a part of the network cannot
    be made there, for real."""
    try:
        with torch.device("meta"), _NoAnswers():
            return run.build_model(modality)
    except UserError:
        raise
    except RuntimeError:
        return run.build_model(modality)


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a module itself, also where two names stand for one."""
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    yield from module.named_buffers(recurse=False, remove_duplicate=False)


class Fakes:
    """Tensors without values on `device` in place of others; to be used inside `mode`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mode = FakeTensorMode()
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the old one, which lives on so that ids stay names

    def like(self, tensor: Tensor) -> Tensor:
        """One of the same shape, layout and type."""
        with self.mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)

    def model(self, model: nn.Module) -> None:
        """In place; what parts of the network share, they share afterwards."""
        for module in model.modules():
            for name, old in list(_own(module)):
                if id(old) not in self._made:
                    new = self.like(old)
                    parameter = isinstance(old, nn.Parameter)
                    self._made[id(old)] = old, nn.Parameter(new, old.requires_grad) if parameter else new
                setattr(module, name, self._made[id(old)][1])

    def batch(self, batch: Batch) -> Batch:
        """The same with its inputs and masks replaced."""
        assert batch.masks is not None
        masks = {
            f.name: value for f in dataclasses.fields(Masks) if (value := getattr(batch.masks, f.name)) is not None
        }
        return dataclasses.replace(
            batch,
            inputs={name: self.like(value) for name, value in batch.inputs.items()},
            masks=Masks(**{name: self.like(value) for name, value in masks.items()}),
        )


@contextmanager
def traceless() -> Generator[None]:
    """Inside, no warnings of tensors without values; afterwards torch draws as if nothing had happened."""
    devices = range(torch.cuda.device_count())
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=devices),  # pyright: ignore[reportUnknownMemberType]
    ):
        warnings.simplefilter("ignore")
        yield
