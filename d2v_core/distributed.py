"""Several processes that train as one: who they are, what they tell one another, and how they share out a step.

A step's batch is defined without them (`batching.py`): it is a list of micro-batches, of which process r of N takes
r, r + N, r + 2N, ... Its objective is the sum over all scored tokens over their number, all processes together, and
whatever is random in a micro-batch is drawn from its own place in the run. So a run with any number of processes is the
run with one, up to the order in which numbers are added.

Two ways to share the network: *replicated* (`launch.strategy=ddp`), where each process has all of it and gradients are
added up, and *sharded* (`fsdp2`), where each keeps an N-th of every parameter, of its gradient, of the optimizer's
moments and of the teacher.

One process is the ordinary case: `current()` is then `ALONE`, which tells itself what it knows already.
"""

from __future__ import annotations

import functools
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import checkpoint

from d2v_core.config import RunConfig
from d2v_core.contract import Batch
from d2v_core.errors import UserError
from d2v_core.keyed import seed_of
from d2v_core.transformer import Block, Transformer

if TYPE_CHECKING:  # torch takes more than half a second to import these, which one process does not need
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    from d2v_core.jointconfig import JointConfig

T = TypeVar("T")
ConfigT = TypeVar("ConfigT", RunConfig, "JointConfig")
_torch: Any = dist
"""Of its functions, which are typed in part only."""
_checkpoint: Any = checkpoint
BUCKET = 25 << 20
"""Bytes of gradients that are sent at once; torch's DistributedDataParallel has the same."""
STUCK = 20.0
"""Seconds after SIGTERM in which a process has to get out of whatever torch is doing for it."""
ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR",
               "MASTER_PORT")  # fmt: skip
"""What torchrun tells each process it starts, and what is forgotten when the processes part."""


class LostProcess(UserError):
    """Another process of the run is gone."""


class ToldAlready(UserError):
    """An error of the first process, which says it."""


class Processes:
    """This process among those of the run."""

    def __init__(self, rank: int = 0, count: int = 1, local_rank: int = 0, store: Any = None) -> None:
        self.rank, self.count, self.local_rank, self._store = rank, count, local_rank, store
        self.waiting = False
        """For what others have to say. Where one of them is gone, that ends by itself."""

    @property
    def first(self) -> bool:
        """Whether it is the one that writes files and talks."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """What each of them gives, in order. All have to call it, here and below, at the same point of the run."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        self.waiting = True
        _torch.all_gather_object(values, value)
        self.waiting = False
        return values

    def total(self, number: int) -> int:
        """The sum over all of them."""
        return sum(self.gather(number))

    def by_first(self, call: Callable[[], T]) -> T:
        """What `call` returns in the first process, the only one that calls it. A UserError there is one everywhere."""
        if self.count == 1:
            return call()
        result: list[Any] = [None, None]
        if self.first:
            try:
                result[0] = call()
            except UserError as error:
                result[1] = str(error)
        self.waiting = True
        _torch.broadcast_object_list(result, 0)
        self.waiting = False
        if result[1] is not None:
            raise UserError(result[1]) if self.first else ToldAlready(result[1])
        return result[0]

    def first_then_others(self, call: Callable[[], T]) -> T:
        """The first process, then the others at once: what the first one writes to a cache, they find there."""
        if self.count == 1:
            return call()
        done: list[T] = []
        self.by_first(lambda: done.append(call()))
        return done[0] if done else call()

    def agree(self, what: str, value: Any) -> None:
        """Raises UserError where the processes have not all the same."""
        values = self.gather(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise UserError(
                    f"The processes differ in {what}: process 0 has {values[0]!r}, process {rank} has {other!r}. All "
                    "machines need the same files under the same paths."
                )

    def mean(self, numbers: Mapping[str, float], weight: int) -> dict[str, float]:
        """Of each number, the mean over the processes by weight; those of weight 0 have none."""
        if self.count == 1:
            return dict(numbers)
        shares = [share for share in self.gather((weight, dict(numbers))) if share[0]]
        total = sum(w for w, _ in shares)
        return {name: sum(w * each[name] for w, each in shares) / total for name in shares[0][1]}

    def share(self, value: T) -> T:
        """The first process's nested mappings, lists and tuples of tensors (on the host) and other things, given to
        all; what the others pass is of no account. Tensor by tensor, so that nothing is held twice."""
        if self.count == 1:
            return value
        tensors: list[Tensor] = []
        outline = self.by_first(lambda: _outline(value, tensors))

        def receive(kind: _Kind) -> Tensor:
            tensor = tensors.pop(0).contiguous() if tensors else torch.empty(kind.shape, dtype=kind.dtype)
            if tensor.numel():
                _torch.broadcast(tensor.reshape(-1).view(torch.uint8), 0)
            return tensor

        return _filled(outline, receive)

    def device(self, chosen: torch.device) -> torch.device:
        """With several processes and GPUs, each has its own."""
        return torch.device("cuda", self.local_rank) if self.count > 1 and str(chosen) == "cuda" else chosen

    def is_news(self, text: str) -> bool:
        """Whether no other process has said this yet."""
        if self._store is None:
            return True
        try:
            return self._store.add(f"said {seed_of(0, text)}", 1) == 1
        except RuntimeError:  # whoever keeps the store is gone
            return True


@dataclass(frozen=True)
class _Kind:
    """What stands for a tensor that is to come."""

    shape: torch.Size
    dtype: torch.dtype


def _outline(value: Any, tensors: list[Tensor]) -> Any:
    """Nested mappings, lists and tuples with a `_Kind` for each tensor, which goes to `tensors`."""

    def put(tensor: Tensor) -> _Kind:
        tensors.append(tensor)
        return _Kind(tensor.shape, tensor.dtype)

    return _mapped(value, Tensor, put)


def _filled(outline: Any, receive: Callable[[_Kind], Tensor]) -> Any:
    return _mapped(outline, _Kind, receive)


def _mapped(value: Any, kind: type[Any], call: Callable[[Any], Any]) -> Any:
    if isinstance(value, kind):
        return call(value)
    if isinstance(value, dict):
        return {key: _mapped(each, kind, call) for key, each in cast("dict[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        items = [_mapped(each, kind, call) for each in cast("Sequence[Any]", value)]
        return tuple(items) if isinstance(value, tuple) else items
    return value


ALONE = Processes()
_current = ALONE


def current() -> Processes:
    """The processes of the run that this one takes part in."""
    return _current


def is_worker() -> bool:
    """Whether torchrun, or `launch`, has started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def together(config: RunConfig) -> Generator[Processes]:
    """Inside, this process is one of those that its launcher has started; alone where there is no launcher.

    Raises UserError for what cannot work with several, LostProcess where another one is gone.
    """
    if not is_worker():
        yield ALONE
        return
    global _current
    _current = _join(config)
    try:
        yield _current
    except RuntimeError as error:
        if not _is_lost(error):
            raise
        # Whoever started the processes looks at all of them in turn: the one that died first is to be the one named.
        time.sleep(3.0)
        raise LostProcess(
            f"process {_current.rank} of {_current.count} can no longer reach another one, which has ended or was "
            f"killed ({str(error).splitlines()[0][:200]}). The run ends; what that process said, or the launcher says "
            "of it, is the reason. Go on from the newest checkpoint with resume=auto."
        ) from error
    leave()


def restarted(config: ConfigT) -> ConfigT:
    """The configuration of processes that are started, or may be started again, by torchrun's elastic launcher: once
    more they go on with what there is. Raises UserError where they could not find it."""
    if config.out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise UserError("torchrun --max-restarts needs out=FOLDER, where processes that are started again go on.")
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return replace(config, resume="auto") if again else config


def say_error(error: UserError) -> int:
    """Print it, unless another process of the run has; returns the exit status."""
    if isinstance(error, ToldAlready):
        return 2
    joined = _current.count > 1
    what = type(error).__name__ if isinstance(error, LostProcess) else str(error)
    if _current.is_news(what) if joined else os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"d2v: {error}", file=sys.stderr, flush=True)
    return LOST if isinstance(error, LostProcess) else 2


def leave() -> None:
    """The processes part in good order; from here on this one is alone."""
    global _current
    if _current.count > 1:
        _torch.barrier()
        _torch.destroy_process_group()
        _current = ALONE
        for name in ENVIRONMENT:
            os.environ.pop(name, None)


def _join(config: RunConfig) -> Processes:
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local, here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", str(count)))
    launch = config.launch
    if launch.processes not in (1, here):
        raise UserError(
            f"launch.processes={launch.processes}, but torchrun has started {here} processes here: leave it out, the "
            "number is torchrun's affair."
        )
    refuse(config, count)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() and config.train.device != "cpu" else 0
    backend = launch.backend if launch.backend != "auto" else ("nccl" if gpus >= here else "gloo")
    if backend == "nccl" and gpus < here:
        raise UserError(
            f"launch.backend=nccl needs a GPU for each of the {here} processes on this machine; there are {gpus}. "
            "Start fewer, or take launch.backend=gloo."
        )
    if gpus and config.train.device in ("auto", "cuda"):
        if gpus < here:
            raise UserError(
                f"{here} processes and {gpus} GPUs on this machine: start as many processes as there are GPUs, or take "
                "train.device=cpu."
            )
        torch.cuda.set_device(local)
    elif config.train.device.startswith("cuda:") and backend == "nccl":
        raise UserError(
            f"train.device={config.train.device} names one GPU, but {count} processes each need their own: take "
            "train.device=cuda."
        )
    timeout = timedelta(minutes=launch.timeout)
    store, _, _ = next(iter(_torch.rendezvous("env://", timeout=timeout)))
    # Processes that are started again find the store of those before them, with their addresses still in it.
    store = _torch.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # Numbers that the host needs travel by gloo, also beside NCCL: no GPU has to be waited for.
    _torch.init_process_group(
        "cpu:gloo,cuda:nccl" if backend == "nccl" else "gloo", store=store, rank=rank, world_size=count, timeout=timeout
    )
    return Processes(rank, count, local, _torch.PrefixStore("d2v", store))


def refuse(config: RunConfig, count: int) -> None:
    """Raises UserError for what does not work with `count` processes."""
    if count == 1:
        return
    reason = ""
    if config.stage == "probe":
        reason = "stage=probe trains nothing and runs in one process"
    elif config.stage == "finetune" and config.launch.strategy == "fsdp2":
        reason = "stage=finetune keeps a whole copy of its best weights: take launch.strategy=ddp"
    elif config.stage == "finetune" and config.finetune.lrs:
        reason = "finetune.lrs makes several runs one after the other: start each with its own optim.lr"
    if reason:
        raise UserError(f"With {count} processes this cannot work: {reason}.")


def _is_lost(error: RuntimeError) -> bool:
    """Whether a collective failed for another process's sake. torch has no type for all of these."""
    text = str(error)
    return isinstance(error, dist.DistError) or any(
        sign in text for sign in ("gloo/", "Gloo ", "NCCL", "Connection closed by peer", "Connection reset by peer",
                                  "Broken pipe")
    )  # fmt: skip


@contextmanager
def never_stuck(noticed: Callable[[], bool]) -> Generator[None]:
    """Inside, a SIGTERM ends this process also where torch waits, outside of Python, for one that is gone.

    noticed: whether Python's own handler has run. A handler runs between two steps of the interpreter, so never during
    such a wait; the launcher's next signal is SIGKILL, after half a minute, without a word of ours. Only NCCL waits so:
    gloo, by which the processes talk, notices at once that one is gone, and may wait long for one that works.
    """
    if current().count == 1:
        yield
        return
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        while number := ours.recv(1):
            if number[0] != signal.SIGTERM:
                continue
            deadline = time.monotonic() + STUCK
            while time.monotonic() < deadline and not (noticed() or current().waiting):
                time.sleep(0.1)
            if not (noticed() or current().waiting):
                text = f"d2v: process {current().rank} waits for another one that does not answer, and was told to end."
                print(text, file=sys.stderr, flush=True)
                os._exit(128 + signal.SIGTERM)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        theirs.close()
        thread.join()
        ours.close()


# ------------------------------------------------------------------------------------------------ sharing a network


def as_sharded(tensor: Tensor) -> DTensor | None:
    """The same tensor if it is dealt out to the processes."""
    module: Any = sys.modules.get("torch.distributed.tensor")
    return cast("DTensor", tensor) if module is not None and isinstance(tensor, module.DTensor) else None


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, on the same memory; any other tensor as it is."""
    sharded = as_sharded(tensor)
    return tensor if sharded is None else sharded.to_local()


def part_of_whole(whole: Tensor, like: Tensor) -> Tensor:
    """Of a whole tensor the rows that this process keeps of `like`."""
    sharded = as_sharded(like)
    if sharded is None:
        return whole
    mesh = sharded.device_mesh
    rows = math.ceil(whole.shape[0] / mesh.size())
    return whole[mesh.get_local_rank() * rows :][:rows]


def prepare(model: nn.Module, config: RunConfig, device: torch.device) -> None:
    """Before the network goes to its device: recompute activations and shard it, as the configuration says."""
    if config.launch.activation_checkpointing:
        for module in model.modules():
            if isinstance(module, Block):
                vars(module)["forward"] = functools.partial(_recomputed, module.forward)
    if is_sharded(config):
        from torch.distributed.device_mesh import init_device_mesh

        _shard(model, init_device_mesh(device.type, (current().count,)))


def is_sharded(config: RunConfig) -> bool:
    """Whether each process keeps a part of the network only."""
    return current().count > 1 and config.launch.strategy == "fsdp2"


def _recomputed(forward: Callable[..., Any], *args: Any) -> Any:
    """Keeps the input of a block alone, and computes the rest again when gradients need it."""
    return _checkpoint.checkpoint(forward, *args, use_reentrant=False) if torch.is_grad_enabled() else forward(*args)


def _shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Each block is gathered when it runs, student's and teacher's alike; the rest of the network for the whole step.

    The rest is one group because it is also used outside of any `forward`, and because the two encoders may share
    parameters.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    empty = {p for p in model.parameters() if not p.numel()}  # torch cannot deal them out
    for module in [m for m in model.modules() if isinstance(m, Block)]:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=empty)
    for module in model.modules():
        if isinstance(module, FSDPModule):  # sums, where the default is means
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


class Sharing(Protocol):
    """How the processes share one network: what an optimizer step asks of them."""

    parameters: list[nn.Parameter]
    """What the optimizer moves in this process."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`parameters`, and where frozen ones are at hand these too, by the network's names."""
        ...

    def rounds(self, step: int, batches: Sequence[Batch]) -> Iterator[tuple[Batch, bool]]:
        """The micro-batches to run through the network, and whether each counts."""
        ...

    def collect(self, loss_sum: Tensor) -> Tensor:
        """After the last backward pass: gradients of all processes. Returns the sum of their losses."""
        ...

    def clip(self, limit: float) -> Tensor:
        """Scale the gradients to a norm of at most `limit`; returns what it was, ()."""
        ...

    def diagnosis(self, find: Callable[[], str]) -> str:
        """What `find` says where it has something to say."""
        ...

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a network as one process has them; where they are sharded, in the first process alone."""
        ...

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """What one process would store of it; where it is sharded, in the first process alone."""
        ...

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """From `optimizer_state` of any number of processes."""
        ...


def sharing_of(model: nn.Module, config: RunConfig) -> Sharing:
    """As the configuration says, for as many processes as there are."""
    if is_sharded(config):
        return Sharded(model, config.seed)
    return Unshared(model) if current().count == 1 else Replicated(model)


class Unshared(Sharing):
    """One process."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def rounds(self, step: int, batches: Sequence[Batch]) -> Iterator[tuple[Batch, bool]]:
        del step
        for batch in batches:
            yield batch, True

    def collect(self, loss_sum: Tensor) -> Tensor:
        return loss_sum

    def clip(self, limit: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(self.parameters, limit)

    def diagnosis(self, find: Callable[[], str]) -> str:
        return find()

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        optimizer.load_state_dict(dict(state))


class Replicated(Unshared):
    """Each process has the whole network. Gradients are added up in buckets, beside the last backward pass.

    Why not torch's DistributedDataParallel: it wants the same number of backward passes in every process, at least one,
    with the same parameters used, and its own `forward` called; a step's micro-batches need not be divisible by the
    number of processes, blocks are left out at random, and samples that cannot be read leave holes. Here each of those
    is a gradient of zero, and a parameter that no process used has none, as with one process.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:  # alike to the bit, whatever machine made them
                _torch.broadcast(tensor.data, 0)
        self._buckets = _buckets(self.parameters[::-1])  # the last layers have their gradients first
        self._place = {id(p): i for i, bucket in enumerate(self._buckets) for p in bucket}
        self._missing: list[int] = []
        self._sent: list[tuple[Tensor, dist.Work]] = []
        self._last = False
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._has_gradient)  # pyright: ignore[reportUnknownMemberType]

    def rounds(self, step: int, batches: Sequence[Batch]) -> Iterator[tuple[Batch, bool]]:
        self._missing, self._sent = [len(bucket) for bucket in self._buckets], []
        for i, batch in enumerate(batches):
            self._last = i == len(batches) - 1
            yield batch, True
        self._last = False

    def _has_gradient(self, parameter: Tensor) -> None:
        if not self._last:
            return
        self._missing[self._place[id(parameter)]] -= 1
        while len(self._sent) < len(self._buckets) and self._missing[len(self._sent)] <= 0:
            self._send()  # in the same order everywhere, so not before those in front of it

    def _send(self) -> None:
        bucket = self._buckets[len(self._sent)]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket])
        self._sent.append((flat, _torch.all_reduce(flat, async_op=True)))

    def collect(self, loss_sum: Tensor) -> Tensor:
        self._last = False
        used = torch.tensor([float(p.grad is not None) for p in self.parameters])
        while len(self._sent) < len(self._buckets):
            self._send()
        _torch.all_reduce(used)
        _torch.all_reduce(loss_sum)
        somewhere = {id(p) for p, count in zip(self.parameters, used, strict=True) if count}
        for bucket, (flat, work) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            place = 0
            for p in bucket:
                p.grad = flat[place : place + p.numel()].view_as(p) if id(p) in somewhere else None
                place += p.numel()
        self._sent = []
        return loss_sum

    def diagnosis(self, find: Callable[[], str]) -> str:
        found = current().gather(find())
        return next((text for text in found if not text.startswith("The same step is finite")), found[0])

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raises UserError where the copies are no longer alike."""
        sums = current().gather([float(t.double().sum()) if t.is_floating_point() else 0.0 for t in tensors.values()])
        for rank, other in enumerate(sums):
            if other != sums[0]:
                name = next(n for n, a, b in zip(tensors, sums[0], other, strict=True) if a != b)
                raise UserError(
                    f"The weights of process {rank} are no longer those of process 0 ({name} among them): the machines "
                    "do not compute alike, or one has a fault. Go on from the newest checkpoint with resume=auto."
                )
        return dict(tensors)


def _buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = [[]]
    size = 0
    for p in parameters:
        if buckets[-1] and (size + p.numel() * p.element_size() > BUCKET or p.dtype != buckets[-1][0].dtype):
            buckets.append([])
            size = 0
        buckets[-1].append(p)
        size += p.numel() * p.element_size()
    return buckets


class Sharded(Sharing):
    """Each process keeps its rows of every parameter (torch's `fully_shard`). The optimizer moves these alone.

    Collectives run inside every forward and backward pass, so that all processes need the same number of them: one with
    fewer micro-batches than others repeats one of its own, which does not count.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self.model, self.seed = model, seed
        self._transformers = [m for m in model.modules() if isinstance(m, Transformer)]
        self._pairs: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        for name, p in model.named_parameters():
            if p.requires_grad:
                self._pairs[name] = p, nn.Parameter(local(p.detach()))
        self.parameters = [ours for _, ours in self._pairs.values()]
        self._of = {id(ours): p.data for p, ours in self._pairs.values()}
        self._spare: Batch | None = None

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, ours) for name, (_, ours) in self._pairs.items())

    def rounds(self, step: int, batches: Sequence[Batch]) -> Iterator[tuple[Batch, bool]]:
        processes = current()
        self._spare = batches[0] if batches else self._spare
        have = processes.gather((len(batches), self._spare is not None))
        if not all(spare for _, spare in have):  # the first steps of a small epoch
            lender = next(rank for rank, (count, _) in enumerate(have) if count)
            lent: list[Any] = [self._spare if processes.rank == lender else None]
            _torch.broadcast_object_list(lent, lender)
            self._spare = self._spare or lent[0]
        for p, _ in self._pairs.values():
            p.grad = None
        for i in range(max(count for count, _ in have)):
            for j, transformer in enumerate(self._transformers):  # the blocks that run have to be the same everywhere
                coins = torch.Generator().manual_seed(seed_of(self.seed, "blocks", step, i, j))
                transformer.coins = coins
            if i < len(batches):
                yield batches[i], True
            else:
                assert self._spare is not None
                yield self._spare, False

    def collect(self, loss_sum: Tensor) -> Tensor:
        for p, ours in self._pairs.values():
            ours.grad = None if p.grad is None else local(p.grad)
        _torch.all_reduce(loss_sum)
        return loss_sum

    def clip(self, limit: float) -> Tensor:
        grads = [p.grad for p in self.parameters if p.grad is not None]
        square = torch.nn.utils.get_total_norm(grads).square()
        _torch.all_reduce(square)
        norm = square.sqrt()
        torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        return norm

    def diagnosis(self, find: Callable[[], str]) -> str:
        del find  # it stops at the first fault, and would leave the others waiting
        return "Which module it comes from is not looked for in a sharded network: launch.strategy=ddp does."

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            sharded = as_sharded(tensor)
            full = tensor if sharded is None else sharded.full_tensor()
            if current().first:
                kept[name] = full.detach().cpu()
        return kept

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        from torch.distributed.tensor import DTensor

        state = optimizer.state_dict()
        moments: dict[int, dict[str, Tensor]] = {}
        for i, ours in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            if i in state["state"]:
                like = self._of[id(ours)]
                moments[i] = self.whole({
                    name: value if not value.dim() or not isinstance(like, DTensor) else DTensor.from_local(
                        value, like.device_mesh, like.placements, run_check=False, shape=like.shape,
                        stride=like.stride(),
                    )
                    for name, value in state["state"][i].items()
                })  # fmt: skip
        return {**state, "state": moments}

    def load_optimizer_state(self, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        likes: list[Tensor] = [self._of[id(p)] for group in optimizer.param_groups for p in group["params"]]
        moments = {
            i: {name: part_of_whole(value, likes[i]) if value.dim() else value for name, value in each.items()}
            for i, each in cast("Mapping[int, Mapping[str, Tensor]]", state["state"]).items()
        }
        optimizer.load_state_dict({**state, "state": moments})


# ---------------------------------------------------------------------------------------------------- starting them


def to_launch(config: RunConfig) -> bool:
    """Whether this process is to start those that train, and not to train itself. Raises UserError where they could
    not."""
    if is_worker() or config.launch.processes == 1:
        return False
    refuse(config, config.launch.processes)
    return True


def launch(config: RunConfig, words: Sequence[str], out: Path) -> int:
    """`d2v run` with these words and in this folder, in `launch.processes` processes on this machine; returns the exit
    status.

    Whatever ends one of them ends all, with a sentence on which and why.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    count = config.launch.processes
    own = {"out": str(out), "resume": "auto", "stage": config.stage}  # what follows this stage is for the caller
    words = [word for word in words if word.partition("=")[0].strip() not in own]
    if not config.train.num_threads:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # How long the processes have to finish the step and save when this one is told to end.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    start = elastic_launch(
        LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=f"d2v-{os.getpid()}", rdzv_backend="c10d",
            rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=config.launch.max_restarts,
        ),
        sys.executable,
    )  # fmt: skip
    try:
        start("-m", "d2v_core", "run", *words, *(f"{key}={value}" for key, value in own.items()))
    except ChildFailedError as error:
        failed = sorted(error.failures.items(), key=lambda item: (item[1].exitcode >= 0, item[1].exitcode == LOST))
        rank, failure = failed[0]
        if failure.exitcode in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            return failure.exitcode  # it has stopped as it was told to, and said so
        how = (
            f"was killed by {signal.Signals(-failure.exitcode).name}"
            if failure.exitcode < 0
            else f"ended with status {failure.exitcode}, for the reason given above"
        )
        print(
            f"d2v: process {rank} of {count} (number {failure.pid} of the system) {how}, so the run has ended. Go on "
            f"from its newest checkpoint with out={out} resume=auto; launch.max_restarts=3 does so by itself.",
            file=sys.stderr,
        )
        return 128 - failure.exitcode if failure.exitcode < 0 else failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


LOST = 75
"""Exit status of a process that could not reach another one: the other one is the reason."""
