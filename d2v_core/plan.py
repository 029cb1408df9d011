"""What a pre-training step costs, told before it is paid.

One real step runs (teacher, student, backward pass, optimizer, moving average) on tensors without values
(`counting.py`), from a real micro-batch: the largest of the first epoch, read and masked as in training. Every
operation is counted, and every storage followed from the operation that makes it to the moment when it goes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2v_core import parts
from d2v_core.batching import MicroBatch, checked_masking, plan_of, read_micro_batch
from d2v_core.contract import Batch, Dataset, Modality
from d2v_core.counting import Counter, Fakes, hollow_model, traceless
from d2v_core.data2vec import Data2Vec
from d2v_core.errors import UserError
from d2v_core.loop import pick_device
from d2v_core.transformer import Transformer

# Of what is free now, this much more than predicted has to be there for a micro-batch to be suggested.
SPARE = 1.1


@dataclass(frozen=True)
class Weights:
    """Numbers of one part of the network, and how many of them are trained."""

    total: int
    trainable: int


@dataclass(frozen=True)
class Peak:
    """The most that a step needs, in bytes, and the part of the step that reaches it. tensors: alive at once; with less
    than this the step is impossible. predicted: what the device has to give for it."""

    tensors: int
    predicted: int
    part: str


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
    """A micro-batch that fits, and how many make a step. size: in the unit of `Batching`. option: as the user types it,
    empty where the modality has none."""

    size: int
    accumulation: int
    option: str

    def __str__(self) -> str:
        return f"{self.option or f'micro-batches of {self.size}'}, {self.accumulation} of them a step"


@dataclass(frozen=True)
class Plan:
    """What a step costs. flops, moved: floating-point operations of one optimizer step and the bytes that its operators
    read and write, by part. bytes: weights of student and predictor, their gradients, the optimizer's moments, what is
    the teacher's own; peaks of one micro-batch by precision, all of these and the activations together. accumulation:
    micro-batches of a step."""

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
    moved: Mapping[str, int]
    bytes: Mapping[str, int]
    peaks: Mapping[str, Peak]
    precision: str
    memory: Memory | None
    suggestion: Suggestion | None

    @property
    def fits(self) -> bool | None:
        """None where it cannot be told."""
        return None if self.memory is None else self.peaks[self.precision].predicted <= self.memory.total

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        totals = {name: {**counts, "total": sum(counts.values())}
                  for name, counts in (("flops", self.flops), ("moved", self.moved))}  # fmt: skip
        return dataclasses.asdict(self) | totals | {"fits": self.fits}


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
    """Of one update: FLOPs and bytes moved by part, the most bytes alive, and what a process on a CPU takes for it."""

    flops: dict[str, int]
    moved: dict[str, int]
    peak: int
    peak_part: str
    resident: int


def costs(
    modality: Modality[Any],
    steps: Sequence[Sequence[Batch]],
    device: torch.device,
    precision: str,
    settled: bool = False,
) -> list[Cost]:
    """Of one update with the micro-batches of each element of `steps`, when the optimizer's moments are there already.
    Layer drop is off: every block is computed.

    settled: make the first one twice and count the second time. The moments then lie where the first update of a run
    puts them, in between its gradients and activations, which `resident` depends on and nothing else does.

    Raises UserError where a part of the network asks for a value.
    """
    from d2v_core.trainer import Updater  # here, for a trainer asks this module whether its step fits

    precision = "bf16" if precision == "fp16" else precision  # of one width, and no loss scale that asks for values
    config = modality.config
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))
    model = hollow_model(modality)
    fakes, counter = Fakes(device), Counter()
    fakes.model(model)
    for module in model.modules():
        if isinstance(module, Transformer):
            module.layer_drop = 0.0
    made = [[fakes.batch(batch) for batch in batches] for batches in steps]
    found: list[Cost] = []
    with traceless(), fakes.mode, counter:
        for tensor in _tensors(model):
            counter.add(tensor)
        counter.answer_for(model.buffers())
        updater = Updater(model.train(), config, device)
        if not settled:
            for parameter in updater.parameters:  # the first step makes the moments
                parameter.grad = torch.empty_like(parameter)
            updater.optimizer.step()  # pyright: ignore[reportUnknownMemberType]
        update_teacher = model.update_teacher
        # Whether a step is applied is a question about its values: here every one is.
        model.update_teacher = lambda decay, applied=None: update_teacher(decay)
        with parts.watched(model, updater, counter.switch):
            for number, batches in enumerate([*made[:1], *made] if settled else made):
                for tensor in (tensor for batch in batches for tensor in batch.inputs.values()):
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
                found.append(Cost(counter.flops, counter.moved, counter.peak, counter.peak_part, counter.heap.resident))
    return found[1:] if settled else found


# ----------------------------------------------------------------------------------------------------- a configuration


def make_plan(modality: Modality[Any]) -> Plan:
    """Raises UserError where the stage is not pre-training, the data cannot be read, or a part asks for values.

    The largest micro-batch of the first epoch gives the memory. FLOPs are those of the middle one by size, times the
    number of micro-batches of a step.
    """
    config = modality.config
    if config.stage != "pretrain":
        raise UserError(
            f"stage={config.stage}: a plan is made of pre-training steps only. Leave stage and from away to plan the "
            f"pre-training of the same network; of {config.stage} nothing is predicted."
        )
    device, dataset = pick_device(config), modality.dataset("train")
    largest, middle, num_parts = _chosen(modality, dataset)
    count = min(num_parts, 2)  # from the second micro-batch on, the gradients of those before are there
    smaller = [_first(modality, dataset, largest, number) for number in _fewer(len(largest.indices))]
    *steps, most = [[_read(modality, dataset, micro)] * count for micro in (*smaller, middle, largest)]
    *less, usual = costs(modality, steps, device, config.train.precision)
    peaks = {
        precision: peak_of(costs(modality, [most], device, precision, settled=True)[0], device)
        for precision in dict.fromkeys((config.train.precision, "fp32", "bf16"))
    }
    curve = [(_size(micro), peak_of(cost, device)) for micro, cost in zip(smaller, less, strict=True)]
    curve.append((_size(largest), peaks[config.train.precision]))
    memory, model = memory_of(device), hollow_model(modality)
    return Plan(
        modality.name, config.preset, config.method, _name(device), dataset.describe(), weights_of(model),
        _tokens(most[0]), _size(largest), num_parts,
        {name: value * num_parts // count for name, value in usual.flops.items()},
        {name: value * num_parts // count for name, value in usual.moved.items()},
        bytes_of(model), peaks, config.train.precision, memory,
        None if memory is None else suggest(modality, curve, largest.size, memory),
    )  # fmt: skip


def peak_of(cost: Cost, device: torch.device) -> Peak:
    """The most memory that a step needs: counted, and predicted. A GPU's allocator is asked for what is counted; the C
    library's has holes."""
    return Peak(cost.peak, cost.resident if device.type == "cpu" else cost.peak, cost.peak_part)


def planned_micro_batch(modality: Modality[Any], count: int | None = None) -> Batch:
    """The largest micro-batch of the first epoch, read and masked; count: only its first samples."""
    dataset = modality.dataset("train")
    largest = _chosen(modality, dataset)[0]
    return _read(modality, dataset, largest if count is None else _first(modality, dataset, largest, count))


def _chosen(modality: Modality[Any], dataset: Dataset[Any]) -> tuple[MicroBatch, MicroBatch, int]:
    """The largest and the middle micro-batch of the first epoch, and how many make a step."""
    checked_masking(modality, dataset)
    steps = plan_of(dataset, modality.batching(), modality.config.seed)(0)
    ranked = sorted((micro for members in steps for micro in members), key=_size)
    return ranked[-1], ranked[len(ranked) // 2], max(len(members) for members in steps)


def _size(micro: MicroBatch) -> int:
    return len(micro.indices) * micro.size


def _fewer(count: int) -> list[int]:
    """Numbers of samples at which memory is looked at besides `count`: between them it grows at most linearly."""
    return [number for number in sorted({1, (count + 1) // 2}) if number < count]


def _first(modality: Modality[Any], dataset: Dataset[Any], micro: MicroBatch, count: int) -> MicroBatch:
    """A micro-batch of the first samples of another."""
    indices, batching = micro.indices[:count], modality.batching()
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


def suggest(
    modality: Modality[Any], curve: Sequence[tuple[int, Peak]], longest: int, memory: Memory
) -> Suggestion | None:
    """The largest micro-batch that fits beside what the machine does now, at most the batch; None where not even one
    sample does. curve: sizes of micro-batches, growing, and their peaks. longest: the size of one sample."""
    batching = modality.batching()
    sizes, room = [size for size, _ in curve], memory.free / SPARE
    needs = [int(need) for need in np.maximum.accumulate([peak.predicted for _, peak in curve])]  # holes come and go
    if room < needs[0]:
        return None
    most = float(np.interp(room, needs, sizes))
    if room > needs[-1]:
        slope = (needs[-1] - needs[-2]) / (sizes[-1] - sizes[-2]) if len(curve) > 1 else needs[-1] / sizes[-1]
        most = sizes[-1] + (room - needs[-1]) / slope if slope > 0 else batching.batch
    most = max(math.floor(most), longest)
    accumulation = max(1, math.ceil(batching.batch / most))
    size = max(math.ceil(batching.batch / accumulation), longest)
    return Suggestion(size, accumulation, modality.micro_batch_option(size))


# ----------------------------------------------------------------------------------------------- refusing before a run


def refuse_network(modality: Modality[Any], device: torch.device) -> None:
    """Raises UserError where weights, gradients, moments and averages alone are more than the device has, before any of
    them is made."""
    memory = memory_of(device)
    if memory is None or not modality.config.train.check_memory:
        return
    least = sum(bytes_of(hollow_model(modality)).values())
    if least > memory.total:
        raise UserError(
            f"This network cannot be trained on {_name(device)}: its weights with their gradients, moments and averages"
            f" take {gib(least)}, and there are {gib(memory.total)} in all. Take a smaller preset, fewer"
            f" model.num_layers or a smaller model.embed_dim. {_OVERRIDE}"
        )


def refuse_micro_batch(modality: Modality[Any], dataset: Dataset[Any], device: torch.device) -> None:
    """Raises UserError where the tensors of a step of the first epoch are more than the device has. One sample is read,
    the longest, which stands for all of its micro-batch."""
    memory, config = memory_of(device), modality.config
    if memory is None or not config.train.check_memory:
        return
    largest, _, num_parts = _chosen(modality, dataset)
    longest = max(largest.indices, key=lambda index: dataset.sizes[index])
    sample = _One(dataset, longest)

    def steps_of(counts: Sequence[int]) -> list[list[Batch]]:
        micros = [dataclasses.replace(largest, indices=(longest,) * count) for count in counts]
        return [[_read(modality, sample, micro)] * min(num_parts, 2) for micro in micros]

    try:
        whole = costs(modality, steps_of([len(largest.indices)]), device, config.train.precision)[0]
        if whole.peak <= memory.total:
            return
        counts = _fewer(len(largest.indices))
        fewer = costs(modality, steps_of(counts), device, config.train.precision)
    except UserError:  # what is wrong with the data is said where they are used, and a plan is no condition of a run
        return
    curve = [(count * largest.size, peak_of(cost, device)) for count, cost in zip(counts, fewer, strict=True)]
    hint = suggest(modality, [*curve, (_size(largest), peak_of(whole, device))], largest.size, memory)
    raise UserError(
        f"A step of this run cannot fit on {_name(device)}: the tensors of its largest micro-batch take "
        f"{gib(whole.peak)}, and there are {gib(memory.total)} in all. "
        + (
            "Not even one sample fits beside what runs now: take a smaller preset or shorter samples."
            if hint is None
            else f"What fits beside what runs now: {hint}."
        )
        + f" {_OVERRIDE}"
    )


_OVERRIDE = "To try it all the same: train.check_memory=false."


class _One(Dataset[Any]):
    """A dataset of which one sample is read, once."""

    def __init__(self, dataset: Dataset[Any], index: int) -> None:
        self.sizes, self._name, self._read = dataset.sizes, dataset.id(index), lambda: dataset[index]
        self._sample: Any = None

    def id(self, index: int) -> str:
        del index
        return self._name

    def __getitem__(self, index: int) -> Any:
        del index
        if self._sample is None:
            self._sample = self._read()
        return self._sample


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
    flops, moved = sum(plan.flops.values()), sum(plan.moved.values())
    lines += ["", f"{'a step':<28}{'1e9 FLOPs':>12}{'share':>8}{'GB moved':>12}{'share':>8}"]
    for name in plan.moved:
        one, other = plan.flops.get(name, 0), plan.moved[name]
        lines.append(f"  {name:<26}{one / 1e9:>12,.1f}{one / flops:>8.0%}{other / 1e9:>12,.2f}{other / moved:>8.0%}")
    lines.append(f"  {'all':<26}{flops / 1e9:>12,.1f}{1:>8.0%}{moved / 1e9:>12,.2f}{1:>8.0%}")
    lines += ["", "memory, always there"]
    lines += [f"  {name:<26}{gib(count):>12}" for name, count in plan.bytes.items()]
    lines.append(f"{'most of it in a micro-batch':<28}{'tensors':>12}{'predicted':>12}")
    for name, peak in plan.peaks.items():
        lines.append(f"  {name:<26}{gib(peak.tensors):>12}{gib(peak.predicted):>12}   reached in: {peak.part}")
    if plan.memory is not None:
        lines.append(f"  {'device, all / free':<26}{gib(plan.memory.total):>12} / {gib(plan.memory.free)}")
        lines.append("" if plan.fits else f"DOES NOT FIT at train.precision={plan.precision}.")
        lines.append(
            "Not even a micro-batch of one sample fits beside what runs now."
            if plan.suggestion is None
            else f"Largest micro-batch that fits beside what runs now, at {plan.precision}: {plan.suggestion}"
        )
    return "\n".join(lines) + "\n"
