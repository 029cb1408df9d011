"""What a pre-training step costs, told before it is paid.

One real step runs (teacher, student, backward pass, optimizer, moving average) on tensors that have shapes, types and
storages but no values (torch's FakeTensor): nothing is computed and next to nothing allocated. Every operation passes a
counter, which adds up the multiplications and follows each storage from the operation that makes it to the moment
when the last tensor on it goes. The micro-batch is a real one, the largest of the first epoch, read and masked as in
training; the kernels are those that this machine would take.

Not seen: what a kernel needs for itself, and what an allocator cannot use again. On a CPU the memory of the process
before the step, and that of the loader's workers, come on top.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from d2v_core import parts, run
from d2v_core.batching import MicroBatch, checked_masking, plan_epoch, read_micro_batch
from d2v_core.config import RunConfig
from d2v_core.contract import Batch, Dataset, Masks, Modality
from d2v_core.data2vec import Data2Vec
from d2v_core.errors import UserError
from d2v_core.loop import pick_device
from d2v_core.trainer import Updater
from d2v_core.transformer import Transformer

# For what is not seen: beyond this much more than there is, a step cannot fit; and this much is left free of what is
# suggested.
MARGIN = 1.1

# ----------------------------------------------------------------------------------------------------------- counting


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


class Counter(TorchDispatchMode):
    """Inside, adds up the FLOPs of every operation by part, and follows the bytes of storages that are alive.

    part: what FLOPs are put down to; set it as the step goes on. live: bytes now. peak: the most since `reset`.
    buffers: storages of which a value may be asked, and the answer is 0: networks compare a number that is kept beside
    their weights, such as a version, with their own. A question about anything else is an error of FakeTensor's.
    """

    def __init__(self, follow: bool = True) -> None:
        super().__init__()
        self.follow, self.part = follow, ""
        self.buffers: set[int] = set()
        self.live = self.peak = 0
        self.peak_part = ""
        self.flops: dict[str, int] = {}
        self._sizes: dict[int, int] = {}

    def reset(self) -> None:
        self.peak, self.peak_part, self.flops = self.live, self.part, {}

    def switch(self, part: str) -> None:
        self.part = part

    def add(self, tensor: Tensor) -> None:
        """Follow the storage of a tensor that was there before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += self._sizes[key]
            if self.live > self.peak:
                self.peak, self.peak_part = self.live, self.part
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].untyped_storage()._cdata in self.buffers:
            return False if args[0].dtype == torch.bool else 0
        out = func(*args, **(kwargs or {}))
        count = flops_of(func, args, kwargs or {}, out)
        if count:
            self.flops[self.part] = self.flops.get(self.part, 0) + count
        if self.follow:
            for leaf in tree_leaves(out):
                if isinstance(leaf, Tensor):
                    self.add(leaf)
        return out


class _NoAnswers(TorchDispatchMode):
    """While a network is built without values, a question about them (`if x.any()`) is answered with no."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
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
    except (RuntimeError, NotImplementedError):
        return run.build_model(modality)


class _Fakes:
    """Tensors without values on `device` in place of others."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.mode = FakeTensorMode()
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # by id of the old one, which lives on so that ids stay names

    def like(self, tensor: Tensor) -> Tensor:
        with self.mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)

    def model(self, model: nn.Module) -> None:
        """In place; what parts of the network share, they share afterwards."""
        for module in model.modules():
            for own in (module._parameters, module._buffers):
                for name, old in own.items():
                    if old is not None:
                        if id(old) not in self._made:
                            new = self.like(old)
                            parameter = isinstance(old, nn.Parameter)
                            self._made[id(old)] = old, nn.Parameter(new, old.requires_grad) if parameter else new
                        cast("dict[str, Tensor | None]", own)[name] = self._made[id(old)][1]

    def batch(self, batch: Batch) -> Batch:
        assert batch.masks is not None
        masks = {
            f.name: value for f in dataclasses.fields(Masks) if (value := getattr(batch.masks, f.name)) is not None
        }
        return dataclasses.replace(
            batch,
            inputs={name: self.like(value) for name, value in batch.inputs.items()},
            masks=Masks(**{name: self.like(value) for name, value in masks.items()}),
        )


# --------------------------------------------------------------------------------------------------- one configuration


@dataclass(frozen=True)
class Weights:
    """Numbers of one part of the network, and how many of them are trained."""

    total: int
    trainable: int


@dataclass(frozen=True)
class Peak:
    """The most bytes alive in a step, and the part of the step that reached them. slope: bytes by which the peak grows
    with the size of a micro-batch, in the unit of `Batching`."""

    total: int
    part: str
    slope: float


@dataclass(frozen=True)
class Tokens:
    """Of one micro-batch: samples B, copies M of each, tokens T of the grid, V that the student encodes, N scored."""

    samples: int
    copies: int
    tokens: int
    visible: int
    scored: int


@dataclass(frozen=True)
class Memory:
    """Of a device, bytes. free: what is there now."""

    total: int
    free: int


@dataclass(frozen=True)
class Suggestion:
    """A micro-batch that fits, as options for the command line where the modality has one, and how many make a step.
    size: in the unit of `Batching`."""

    size: int
    accumulation: int
    words: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What a step costs. flops: of one optimizer step, by part. Bytes: weights of student and predictor, their
    gradients, the optimizer's moments, what is the teacher's own; peaks of one micro-batch by precision, all of these
    and the activations together. accumulation: micro-batches of a step."""

    modality: str
    preset: str
    method: str
    device: str
    data: str
    weights: Mapping[str, Weights]
    micro_batch: Tokens
    micro_batch_size: int
    accumulation: int
    flops: Mapping[str, int]
    bytes: Mapping[str, int]
    peaks: Mapping[str, Peak]
    precision: str
    memory: Memory | None
    suggestion: Suggestion | None

    @property
    def fits(self) -> bool | None:
        """None where it cannot be told."""
        return None if self.memory is None else self.peaks[self.precision].total <= self.memory.total

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        out = dataclasses.asdict(self) | {"fits": self.fits}
        return out | {"flops": dict(self.flops) | {"total": sum(self.flops.values())}}


def weights_of(model: Data2Vec) -> dict[str, Weights]:
    """By part; "teacher's own" is what the teacher does not share with the student. Buffers count, but are not
    trained."""
    student = model.student
    shared = {id(t) for t in _tensors(student)}
    own = [t for t in _tensors(model.teacher.module) if id(t) not in shared]

    def count(tensors: Sequence[Tensor]) -> Weights:
        return Weights(sum(t.numel() for t in tensors), sum(t.numel() for t in tensors if t.requires_grad))

    return {
        "feature encoder": count(_tensors(student.encoder)),
        "transformer": count(_tensors(student.transformer)),
        "predictor": count(_tensors(model.predictor)),
        "teacher's own": count(own),
    }


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def bytes_of(model: Data2Vec) -> dict[str, int]:
    """What is there in every step, whatever the batch."""
    shared = {id(t) for t in _tensors(model.student)}
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "weights": _bytes([*_tensors(model.student), *_tensors(model.predictor)]),
        "gradients": _bytes(trained),
        "optimizer": 2 * _bytes(trained) + 4 * len(trained),  # AdamW: two moments, and the number of its updates
        "teacher": _bytes([t for t in _tensors(model.teacher.module) if id(t) not in shared]),
    }


@dataclass(frozen=True)
class Cost:
    """Of one update: FLOPs by part, and the peak."""

    flops: dict[str, int]
    peak: int
    peak_part: str


def costs(
    modality: Modality[Any], steps: Sequence[Sequence[Batch]], device: torch.device, precision: str
) -> list[Cost]:
    """Of one update with the micro-batches of each element of `steps`, when the optimizer's moments are there already.
    Layer drop is off: every block is computed.

    Raises UserError where a part of the network asks for a value.
    """
    precision = "bf16" if precision == "fp16" else precision  # of one width, and no loss scale that asks for values
    config = modality.config
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))
    model = hollow_model(modality)
    fakes, counter = _Fakes(device), Counter()
    fakes.model(model)
    for module in model.modules():
        if isinstance(module, Transformer):
            module.layer_drop = 0.0
    found: list[Cost] = []
    made = [[fakes.batch(batch) for batch in batches] for batches in steps]
    with _quiet(), _same_random_state(), fakes.mode, counter:
        for tensor in _tensors(model):
            counter.add(tensor)
        counter.buffers = {buffer.untyped_storage()._cdata for buffer in model.buffers()}
        updater = Updater(model.train(), config, device)
        for parameter in updater.parameters:  # the first step makes the moments
            parameter.grad = torch.empty_like(parameter)
        updater.optimizer.step()
        with parts.watched(model, updater, counter.switch):
            for number, batches in enumerate(made):
                inputs = [tensor for batch in batches for tensor in batch.inputs.values()]
                for tensor in inputs:
                    counter.add(tensor)
                counter.switch(parts.OPTIMIZER)
                counter.reset()
                try:
                    updater.update(number, batches, modality.teacher_inputs)
                except RuntimeError as error:
                    raise UserError(
                        f"This cannot be planned: a part of the network of {modality.name} asks for values, which a "
                        f"plan does not compute ({str(error).splitlines()[0]})."
                    ) from error
                found.append(Cost(dict(counter.flops), counter.peak, counter.peak_part))
    return found


@contextmanager
def _quiet() -> Generator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors without values, which is as it should be
        yield


@contextmanager
def _same_random_state() -> Generator[None]:
    """Afterwards torch draws as if nothing had happened."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        yield


# ----------------------------------------------------------------------------------------------------- a configuration


def make_plan(modality: Modality[Any]) -> Plan:
    """Raises UserError where the stage is not pre-training, the data cannot be read, or a part asks for values.

    The largest micro-batch of the first epoch gives the memory. FLOPs are those of the middle one by size, times the
    number of micro-batches of a step.
    """
    config = modality.config
    if config.stage != "pretrain":
        raise UserError(f"stage={config.stage}: a plan is made of pre-training only.")
    device, dataset = pick_device(config), modality.dataset("train")
    largest, middle, num_parts = _chosen(modality, dataset)
    batch, half = _read(modality, dataset, largest), _read(modality, dataset, _first_half(modality, dataset, largest))
    typical = batch if middle == largest else _read(modality, dataset, middle)
    model = hollow_model(modality)
    peaks: dict[str, Peak] = {}
    flops: dict[str, int] = {}
    for precision in dict.fromkeys(("fp32", "bf16", config.train.precision)):
        count = min(num_parts, 2)  # from the second on, the gradients of those before are there
        steps = [[batch] * count, [half] * count]
        if not flops and (middle != largest):
            steps.append([typical])
        whole, part, *usual = costs(modality, steps, device, precision)
        sizes = _size(largest), _size(_first_half(modality, dataset, largest))
        slope = (whole.peak - part.peak) / (sizes[0] - sizes[1]) if sizes[0] > sizes[1] else 0.0
        peaks[precision] = Peak(whole.peak, whole.peak_part, slope)
        if not flops:
            one, made = (usual[0], 1) if usual else (whole, count)
            flops = {name: value * num_parts // made for name, value in one.flops.items()}
    return Plan(
        modality.name, config.preset, config.method, _name(device), dataset.describe(), weights_of(model),
        _tokens(batch), _size(largest), num_parts, flops, bytes_of(model), peaks, config.train.precision,
        memory := memory_of(device),
        None if memory is None else suggest(modality, peaks[config.train.precision], largest, memory),
    )  # fmt: skip


def planned_micro_batch(modality: Modality[Any]) -> Batch:
    """The largest micro-batch of the first epoch, read and masked."""
    dataset = modality.dataset("train")
    return _read(modality, dataset, _chosen(modality, dataset)[0])


def _chosen(modality: Modality[Any], dataset: Dataset[Any]) -> tuple[MicroBatch, MicroBatch, int]:
    """The largest and the middle micro-batch of the first epoch, and how many make a step."""
    checked_masking(modality, dataset)
    steps = plan_epoch(dataset.sizes, modality.batching(), modality.config.seed, 0)
    ranked = sorted((micro for members in steps for micro in members), key=_size)
    return ranked[-1], ranked[len(ranked) // 2], max(len(members) for members in steps)


def _size(micro: MicroBatch) -> int:
    return len(micro.indices) * micro.size


def _first_half(modality: Modality[Any], dataset: Dataset[Any], micro: MicroBatch) -> MicroBatch:
    """A micro-batch of every other sample of another."""
    indices = micro.indices[::2]
    batching = modality.batching()
    pick = min if batching.crop else max
    size = int(pick(np.minimum(dataset.sizes[list(indices)], batching.max_size)))
    return dataclasses.replace(micro, indices=indices, size=size)


def _read(modality: Modality[Any], dataset: Dataset[Any], micro: MicroBatch) -> Batch:
    config = modality.config
    batch = read_micro_batch(modality, dataset, micro, config.train.num_masks, config.seed)
    if batch.masks is None or not len(batch.masks.scored_rows):
        raise UserError(f"No sample of a micro-batch can be read: {batch.skipped[:1]}")
    return batch


def _tokens(batch: Batch) -> Tokens:
    masks = batch.masks
    assert masks is not None
    samples, copies, tokens = masks.hidden.shape
    visible = tokens if masks.visible is None else masks.visible.shape[2]
    return Tokens(samples, copies, tokens, visible, len(masks.scored_rows))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# -------------------------------------------------------------------------------------------------------------- memory


def memory_of(device: torch.device) -> Memory | None:
    """None where the system does not say. On a CPU swap does not count, and a limit of the process's group does."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, free)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        values = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines}
        total, free = values["MemTotal"], values["MemAvailable"]
    except (OSError, KeyError, ValueError):
        return None
    try:
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        total = min(total, limit)
        free = min(free, max(limit - int((group / "memory.current").read_text(encoding="ascii")), 0))
    except (OSError, ValueError):  # no such group, or "max"
        pass
    return Memory(total, free)


def suggest(modality: Modality[Any], peak: Peak, largest: MicroBatch, memory: Memory) -> Suggestion | None:
    """The largest micro-batch that fits beside what the machine does now, at most the batch; None where not even one
    sample does."""
    batching = modality.batching()
    room = memory.free / MARGIN - peak.total
    if peak.slope > 0:
        most = math.floor(_size(largest) + room / peak.slope)
    else:
        most = batching.micro_batch if room >= 0 else 0
    if most < largest.size:
        return None
    accumulation = max(1, math.ceil(batching.batch / most))
    size = math.ceil(batching.batch / accumulation)
    return Suggestion(size, accumulation, _words(modality, size))


def _words(modality: Modality[Any], size: int) -> tuple[str, ...]:
    """The option of a micro-batch's size, `data.micro_batch=...` or whatever it is called, tried before it is named."""
    config = modality.config
    for name, section in config.sections.items():
        for option in dataclasses.fields(section):
            value = getattr(section, option.name)
            reference = value if value is not None else getattr(section, option.name.removeprefix("micro_"), None)
            if not option.name.startswith("micro_batch") or not isinstance(reference, int | float):
                continue
            unit = modality.batching().micro_batch / reference
            new = int(size / unit) if isinstance(reference, int) else round(size / unit, 2)
            sections = {**config.sections, name: dataclasses.replace(section, **{option.name: new})}
            tried = type(modality)(dataclasses.replace(config, sections=sections)).batching().micro_batch
            if abs(tried - size) <= max(1.0, 0.01 * size):
                return (f"{name}.{option.name}={new}",)
    return ()


# ----------------------------------------------------------------------------------------------- refusing before a run


def refuse_impossible_network(config: RunConfig, device: torch.device) -> None:
    """Raises UserError where the weights of the blocks alone, with their gradients, moments and averages, are more than
    the device has: before anything is allocated."""
    model, memory = config.model, memory_of(device)
    numbers = model.num_layers * (4 + 2 * model.mlp_ratio) * model.embed_dim**2
    least = round(5 * 4 * numbers)  # weight, gradient, two moments, average; float32
    if memory is not None and least > MARGIN * memory.total:
        raise UserError(
            f"This network cannot be trained on {_name(device)}: {model.num_layers} blocks of width {model.embed_dim} "
            f"and their gradients, moments and averages take {gib(least)}, and there are {gib(memory.total)} in all. "
            "Take a smaller preset, fewer model.num_layers or a smaller model.embed_dim."
        )


def refuse_impossible(modality: Modality[Any], dataset: Dataset[Any], device: torch.device) -> None:
    """Raises UserError where the largest micro-batch of the first epoch cannot fit. Reads one sample of it, and looks
    closer only where a rough guess from its tokens comes near the device's memory."""
    memory, config = memory_of(device), modality.config
    if memory is None:
        return
    largest, _, num_parts = _chosen(modality, dataset)
    if _rough_guess(modality, dataset, largest) < memory.total / 2:
        return
    try:
        batch = _read(modality, dataset, largest)
        half = _first_half(modality, dataset, largest)
        count = min(num_parts, 2)
        whole, part = costs(modality, [[batch] * count, [_read(modality, dataset, half)] * count], device,
                            config.train.precision)  # fmt: skip
    except UserError:  # what is wrong with the data is said where they are used, and a plan is no condition of a run
        return
    if whole.peak <= MARGIN * memory.total:
        return
    difference = _size(largest) - _size(half)
    peak = Peak(whole.peak, whole.peak_part, (whole.peak - part.peak) / difference if difference else 0.0)
    hint = suggest(modality, peak, largest, memory)
    raise UserError(
        f"A micro-batch of this run needs {gib(whole.peak)} on {_name(device)}, which has {gib(memory.total)} in all. "
        + (
            "Not even one sample fits: take a smaller preset or shorter samples."
            if hint is None
            else "What would fit beside what else runs now: "
            + (" ".join(hint.words) or f"micro-batches of {hint.size}")
            + f", {hint.accumulation} of them a step, which changes no result."
        )
    )


def _rough_guess(modality: Modality[Any], dataset: Dataset[Any], micro: MicroBatch) -> float:
    """Bytes, meant to err high: four times what the blocks keep of each token in float32, and the weights."""
    model, copies = modality.config.model, modality.config.train.num_masks
    one = dataclasses.replace(micro, indices=micro.indices[:1])
    batch = read_micro_batch(modality, dataset, one, copies, modality.config.seed)
    if batch.masks is None:  # it cannot be read, which training will say
        return 0.0
    tokens = batch.masks.hidden.shape[2]
    kept = (8 + 4 * model.mlp_ratio) * model.embed_dim + 3 * model.num_heads * tokens
    weights = model.num_layers * (4 + 2 * model.mlp_ratio) * model.embed_dim**2
    return 4.0 * (4 * len(micro.indices) * copies * tokens * model.num_layers * kept + 5 * weights)


# ---------------------------------------------------------------------------------------------------------------- text


def gib(count: float) -> str:
    """Bytes for a reader: "3.2 GiB", "87 MiB"."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def describe(plan: Plan) -> str:
    """What `d2v plan` prints."""
    tokens = plan.micro_batch
    lines = [
        f"{plan.modality}, preset {plan.preset}, {plan.method}, on {plan.device}",
        f"data: {plan.data}",
        f"largest micro-batch: {tokens.samples} samples x {tokens.copies} masked copies x {tokens.tokens} tokens"
        + (f", of which the student sees {tokens.visible}" if tokens.visible != tokens.tokens else "")
        + f"; {plan.accumulation} micro-batches a step",
        "",
        f"{'parameters':<28}{'all':>12}{'trained':>12}",
    ]
    for name, weights in plan.weights.items():
        lines.append(f"  {name:<26}{weights.total:>12,}{weights.trainable:>12,}")
    everything = plan.weights.values()
    lines.append(f"  {'all':<26}{sum(w.total for w in everything):>12,}{sum(w.trainable for w in everything):>12,}")
    total = sum(plan.flops.values())
    lines += ["", f"{'FLOPs of a step, 1e9':<28}{total / 1e9:>12,.1f}"]
    lines += [f"  {name:<26}{count / 1e9:>12,.1f}{count / total:>11.0%}" for name, count in plan.flops.items()]
    lines += ["", "memory, always there"]
    lines += [f"  {name:<26}{gib(count):>12}" for name, count in plan.bytes.items()]
    lines.append("peak of a micro-batch, these included")
    lines += [f"  {name:<26}{gib(peak.total):>12}   reached in: {peak.part}" for name, peak in plan.peaks.items()]
    if plan.memory is not None:
        lines.append(f"  {'device, all / free':<26}{gib(plan.memory.total):>12} / {gib(plan.memory.free)}")
        hint = plan.suggestion
        lines.append("" if plan.fits else f"DOES NOT FIT at train.precision={plan.precision}.")
        lines.append(
            "Not even a micro-batch of one sample fits beside what runs now."
            if hint is None
            else f"Largest micro-batch that fits beside what runs now, at {plan.precision}: "
            + (" ".join(hint.words) or f"size {hint.size}")
            + f" ({hint.accumulation} a step)"
        )
    return "\n".join(lines) + "\n"
