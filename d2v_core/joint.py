"""Joint pre-training: several modalities, one transformer.

Each modality is a `Data2Vec` of its own (feature encoder, masks, predictor, target, loss, teacher) on a transformer
that is the same object in all of them. An optimizer step is an update with one modality's batch: its turn. In its turn
a modality does what it does in a run of its own, with its own options and the number of its own update: learning rate,
clipping, decay of its teacher. What is joint is the transformer, with one set of Adam's moments, and how long each
modality's gradient is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from d2v_core import checkpoint, plan, run
from d2v_core.batching import StepLoader, Steps
from d2v_core.config import RunConfig
from d2v_core.contract import Batch, Dataset, Modality
from d2v_core.data2vec import Data2Vec, Student
from d2v_core.errors import UserError
from d2v_core.jointconfig import Joint, whose
from d2v_core.loop import Loop, Progress
from d2v_core.metrics import write_json
from d2v_core.schedules import decay_at, lr_at
from d2v_core.teacher import part_of
from d2v_core.trainer import StepResult, Updater, num_scored, probed, refuse_collapse

MEMORY = 50
"""Updates of a modality over which the length of its gradient is averaged."""
NUMBERS = tuple(f.name for f in dataclasses.fields(StepResult))


class JointModel(nn.Module):
    """Several `Data2Vec`s whose students have one and the same transformer.

    shared_teacher: their teachers get one average of it too; `update_teacher` of the one whose turn it is then moves
    it. latest: (members, numbers of StepResult) float32, of each one's last update. Raises ValueError where the
    transformers are several.
    """

    latest: Tensor

    def __init__(self, models: Mapping[str, Data2Vec], shared_teacher: bool = False) -> None:
        super().__init__()
        self.models = dict(models)
        first = next(iter(models.values()))
        self.transformer = first.student.transformer
        if any(model.student.transformer is not self.transformer for model in models.values()):
            raise ValueError("the models do not have one and the same transformer")
        self.shared_teacher = shared_teacher
        if shared_teacher:
            average = _student(first.teacher.module).transformer
            for model in models.values():
                _student(model.teacher.module).transformer = average
        self.members = nn.ModuleDict(models)
        self.balance = Balance(len(models))
        self.register_buffer("latest", torch.zeros(len(models), len(NUMBERS)))

    def state(self) -> dict[str, Tensor]:
        """All but the teachers, by name; what several members have stands once, under `transformer`."""
        seen: set[int] = set()
        kept: dict[str, Tensor] = {}
        for name, tensor in self.state_dict(keep_vars=True).items():
            if ".teacher." not in name and id(tensor) not in seen:
                seen.add(id(tensor))
                kept[name] = tensor.detach()
        return kept

    def teacher_state(self) -> dict[str, Tensor]:
        """What the teachers do not share with the students, nor, but for the first, with one another."""
        return {
            f"{name}.{key}": tensor
            for i, (name, model) in enumerate(self.models.items())
            for key, tensor in model.teacher.own_state().items()
            if i == 0 or not (self.shared_teacher and key.startswith("transformer."))
        }

    def load_teacher_state(self, state: Mapping[str, Tensor], source: str) -> None:
        """Raises UserError as `run.load_state` does."""
        run.load_state(self.teacher_state(), state, source)


def _student(module: nn.Module) -> Student:
    assert isinstance(module, Student)
    return module


class Balance(nn.Module):
    """How long the members' gradients are in the transformer, on average, and what makes them alike.

    lengths: (members,) float32 mean norms, over all updates at first and over about MEMORY of them later. counts:
    (members,) float32, updates that went in. On the device, which is not waited for.
    """

    lengths: Tensor
    counts: Tensor

    def __init__(self, members: int) -> None:
        super().__init__()
        self.register_buffer("lengths", torch.zeros(members))
        self.register_buffer("counts", torch.zeros(members))

    @torch.no_grad()
    def note(self, member: int, length: Tensor, applied: Tensor) -> None:
        """The length () of a member's gradient. applied: 0 where it is not finite and does not count."""
        way = applied / (self.counts[member] + 1.0).clamp(max=MEMORY)
        length = torch.where(applied > 0, length, self.lengths[member])
        self.lengths[member] += way * (length - self.lengths[member])
        self.counts[member] += applied

    def factor(self, member: int) -> Tensor:
        """() what a member's gradient is to be multiplied by: the mean length of all over its own; 1 before there is
        one."""
        seen = self.counts > 0
        mean = (self.lengths * seen).sum() / seen.sum().clamp(min=1)
        own = self.lengths[member]
        return torch.where(own > 0, mean / own.clamp(min=torch.finfo(own.dtype).tiny), torch.ones_like(own))


class MemberUpdater(Updater):
    """One member's updates. Its optimizer is made everybody's by `share_optimizer`.

    number: of the member. weight: what its gradient counts in the transformer. balanced: whether it is made as long as
    the others' first.
    """

    def __init__(
        self, joint: JointModel, number: int, config: RunConfig, device: torch.device, weight: float, balanced: bool
    ) -> None:
        super().__init__(list(joint.models.values())[number], config, device)
        self.balance, self.number, self.weight, self.balanced = joint.balance, number, weight, balanced
        self.trunk = [p for p in joint.transformer.parameters() if p.requires_grad]

    def weigh(self, applied: Tensor) -> None:
        """Only in the transformer: elsewhere nothing meets another's gradient, and Adam does not see its length."""
        gradients = [p.grad for p in self.trunk if p.grad is not None]
        if not gradients:  # layer drop left every block out
            return
        self.balance.note(self.number, torch.nn.utils.get_total_norm(gradients), applied)
        torch._foreach_mul_(gradients, self.factor())  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]

    def factor(self) -> Tensor:
        """() what this member's gradient is multiplied by in the transformer."""
        balance = self.balance.factor(self.number) if self.balanced else torch.ones_like(self.balance.lengths[0])
        return self.weight * balance

    def take(self) -> None:
        """What the transformer's parameters take from the options of the member whose turn it is; the learning rate and
        eps are set at every step."""
        optim = self.config.optim
        for group in self.optimizer.param_groups:
            if "matrices" in group:
                decayed = group["matrices"] or optim.decay_all
                group["weight_decay"] = optim.weight_decay if decayed else 0.0
                group["betas"] = (optim.betas[0], optim.betas[1])


def share_optimizer(turns: Sequence[MemberUpdater], lr_scale: float) -> None:
    """Give all of them one optimizer, and one loss scaler: of the members' own parameters the groups are those of a run
    of its own, the transformer's are two more. lr_scale: its learning rate over that of the member."""
    trunk = turns[0].trunk
    common = {id(p) for p in trunk}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trunk if (p.dim() > 1) is matrices], "scale": lr_scale, "matrices": matrices}
        for matrices in (True, False)
    ]
    for turn in turns:
        for group in turn.optimizer.param_groups:
            own = [p for p in group["params"] if id(p) not in common]
            groups.append({**group, "params": own})
    optimizer = torch.optim.AdamW(groups, fused=True)
    for turn in turns:
        turn.optimizer, turn.scaler = optimizer, turns[0].scaler


def order_of(updates: Sequence[int]) -> np.ndarray:
    """(sum(updates),) int64: whose turn each optimizer step is, each member's as evenly spread as can be."""
    members = np.repeat(np.arange(len(updates)), updates)
    times = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in updates])
    return members[np.argsort(times, kind="stable")]


class JointSteps(Steps):
    """Batches of the member whose turn it is. Ids begin with its name; one step counts as an amount of 1.

    `taken` writes into `progress` where the loader of the last step stands behind it. Until then the step counts as not
    read: a signal may come before it is used.
    """

    _last: tuple[str, list[int], float]

    def __init__(self, loaders: Mapping[str, StepLoader], turn_at: Callable[[int], str], progress: Progress) -> None:
        self.steps_per_epoch = max(loader.steps_per_epoch for loader in loaders.values())
        self.loaders, self.turn_at, self.progress = loaders, turn_at, progress

    def __iter__(self) -> Generator[tuple[int, int, list[Batch]], None, None]:
        progress = self.progress
        running: dict[str, Generator[tuple[int, int, list[Batch]], None, None]] = {}
        try:
            while True:
                name = self.turn_at(progress.step)
                if name not in running:
                    running[name] = iter(self.loaders[name])
                epoch, step, batches = next(running[name])
                self._last = name, [epoch, step + 1], sum(batch.amount for batch in batches)
                epochs = [epoch, *(place[0] for other, place in progress.places.items() if other != name)]
                yield min(epochs), progress.step, [_named(batch, name, len(batches)) for batch in batches]
        finally:
            for loader in running.values():
                loader.close()

    def taken(self) -> None:
        """The step that was handed out last is used."""
        name, place, amount = self._last
        self.progress.places[name] = place
        self.progress.amounts[name] = self.progress.amounts.get(name, 0.0) + amount


def _named(batch: Batch, name: str, parts: int) -> Batch:
    return replace(
        batch,
        ids=tuple(f"{name}:{one}" for one in batch.ids),
        skipped=tuple((f"{name}:{one}", reason) for one, reason in batch.skipped),
        amount=1.0 / parts,
    )


class JointTrainer(Loop[JointModel]):
    """A pre-training run of several modalities. At its end each has a run folder of its own inside the run's."""

    turns: dict[str, MemberUpdater]

    def __init__(self, joint: Joint, out: Path, console: Console) -> None:
        self.joint, self.members = joint, joint.members
        first: Modality[Any] = next(iter(joint.members.values()))
        super().__init__(first, out, console)
        self.config = replace(first.config, train=joint.config.train)
        self.unit = "updates"
        self.names = list(joint.members)
        self.order = order_of([joint.config.updates[name] for name in self.names])

    def turn_at(self, step: int) -> str:
        """Whose the update that follows `step` completed ones is."""
        return self.names[int(self.order[step])]

    def updates_of(self, name: str, step: int) -> int:
        """How many of `step` completed updates were a member's."""
        return int(np.count_nonzero(self.order[:step] == self.names.index(name)))

    def build(self, fresh: bool) -> None:
        del fresh  # a joint run starts from initial weights
        options = self.joint.config.joint
        models: dict[str, Data2Vec] = {}
        for name, modality in self.members.items():
            trunk = next(iter(models.values())).student.transformer if models else None
            with whose(name):
                plan.refuse_network(modality, self.device)
                models[name] = run.build_model(modality, trunk)
        if options.teacher == "shared":
            self._refuse_unlike_teachers(models)
        self.model = JointModel(models, options.teacher == "shared").to(self.device).train()
        weights = options.weights or [1.0] * len(models)
        self.turns = {
            name: MemberUpdater(
                self.model, i, modality.config, self.device, weights[i], options.balance == "gradient_norm"
            )
            for i, (name, modality) in enumerate(self.members.items())
        }
        share_optimizer(list(self.turns.values()), options.lr_scale)
        self.optimizer_step = self.turns[self.names[0]]

    def _refuse_unlike_teachers(self, models: Mapping[str, Data2Vec]) -> None:
        first = next(iter(models.values()))
        names = [f"transformer.{name}" for name, _ in first.student.transformer.named_parameters()]
        followed = {
            name: {one: part_of(one, modality.teacher_parts()) for one in names}
            for name, modality in self.members.items()
        }
        for one in names:
            if len({parts[one] for parts in followed.values()}) > 1:
                raise UserError(
                    "joint.teacher=shared: the teachers cannot have one transformer, because they follow "
                    f"{one} in different ways: {', '.join(f'{n} {parts[one]}' for n, parts in followed.items())}. "
                    "Use joint.teacher=own."
                )

    def open_data(self) -> None:
        self.datasets: dict[str, Dataset[Any]] = {}
        for name, modality in self.members.items():
            with whose(name):
                self.datasets[name] = modality.dataset("train")
                plan.refuse_micro_batch(modality, self.datasets[name], self.device)
        self.dataset_size = sum(map(len, self.datasets.values()))
        self.description = "\n".join(
            f"{name}, {self.joint.config.updates[name]} updates: {dataset.describe()}"
            for name, dataset in self.datasets.items()
        )

    def steps(self) -> JointSteps:
        train, places = self.config.train, self.progress.places
        loaders: dict[str, StepLoader] = {}
        for name, modality in self.members.items():
            epoch, step = places.get(name, [0, 0])
            with whose(name):
                loaders[name] = StepLoader(
                    modality, self.datasets[name], seed=self.config.seed, num_copies=modality.config.train.num_masks,
                    num_workers=train.num_workers, epoch=epoch, step=step, pin_memory=self.device.type == "cuda",
                    worker_policy=self.worker_policy(),
                )  # fmt: skip
        self.reading = JointSteps(loaders, self.turn_at, self.progress)
        return self.reading

    def note_place(self, epoch: int, epoch_step: int) -> None:
        super().note_place(epoch, epoch_step)
        self.reading.taken()

    def usable(self, batch: Batch) -> bool:
        return num_scored(batch) > 0

    def update(self, batches: Sequence[Batch]) -> Callable[[], dict[str, float]]:
        step = self.progress.step
        name = self.turn_at(step)
        turn = self.optimizer_step = self.turns[name]
        turn.take()
        result = turn.update(self.updates_of(name, step), batches, self.members[name].teacher_inputs)
        self.model.latest[turn.number] = torch.stack([getattr(result, key) for key in NUMBERS])
        return lambda: self._numbers(step + 1)

    def _numbers(self, step: int) -> dict[str, float]:
        """`loss`: the mean of the members' latest. Of each member what its last update said, what its gradient is
        multiplied by in the transformer, how long it is there, and how many updates it has had."""
        latest, lengths = self.model.latest.cpu(), self.model.balance.lengths.cpu()
        values: dict[str, float] = {}
        losses: list[float] = []
        for i, name in enumerate(self.names):
            done = self.updates_of(name, step)
            if not done:
                continue
            values |= {f"{name}/{key}": float(value) for key, value in zip(NUMBERS, latest[i], strict=True)}
            values |= {f"{name}/trunk_grad_norm": float(lengths[i]), f"{name}/factor": float(self.turns[name].factor())}
            values[f"{name}/updates"] = done
            losses.append(values[f"{name}/loss"])
        return {"loss": sum(losses) / len(losses), **values}

    def shown(self, values: Mapping[str, float]) -> list[str]:
        return [name for name in values if name.endswith("loss")]

    def schedules(self, step: int) -> dict[str, float]:
        """`lr`: of the update that was made last."""
        name = self.turn_at(step)
        values = {"lr": self._lr_of(name, self.updates_of(name, step))}
        for name in self.names:
            done = self.updates_of(name, step + 1)
            if done:
                config = self.members[name].config
                values[f"{name}/lr"] = self._lr_of(name, done - 1)
                values[f"{name}/ema_decay"] = decay_at(done - 1, config.train.max_steps, config.teacher)
        return values

    def _lr_of(self, name: str, done: int) -> float:
        config = self.members[name].config
        return lr_at(done, config.train.max_steps, config.optim)

    def guard(self, metrics: Mapping[str, float]) -> None:
        for name, modality in self.members.items():
            if f"{name}/updates" in metrics:
                refuse_collapse(modality.config.guard, int(metrics[f"{name}/updates"]), metrics, name)

    def keep(self) -> None:
        """Nothing: what loading needs is in the members' folders."""
        return

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.model.state(), self.model.teacher_state()

    def load_tensors(self, stored: checkpoint.Checkpoint, source: str) -> None:
        run.load_state(self.model.state(), stored.model, source)
        self.model.load_teacher_state(stored.teacher, source)

    def finish(self) -> None:
        progress = self.progress
        updates = {name: self.updates_of(name, progress.step) for name in self.names}
        amounts = {
            name: f"{progress.amounts.get(name, 0.0):.1f} {modality.unit}" for name, modality in self.members.items()
        }
        probes: dict[str, Any] = {}
        for name, modality in self.members.items():
            self.say(f"[bold]{escape(name)}[/bold]")
            own = probed(modality, self.model.models[name].student, self.console)
            self._write_member(name, modality, updates[name], {"amount": amounts[name], **own})
            probes |= {name: own["probe"]} if own else {}
        write_json(self.out / "summary.json", {
            **self.summary(), "modality": self.names, "preset": self.joint.config.preset,
            "updates": updates, "amounts": amounts, "probe": probes,
        })  # fmt: skip
        place = escape(str(self.out))
        self.say(
            f"{progress.step} updates in {progress.seconds:.0f} s: "
            + ", ".join(f"{name} {updates[name]} ({amounts[name]})" for name in self.names)
            + f". The run lies in [bold]{place}[/bold], and in it each modality as a run of its own.\nNext:\n"
            f"  d2v run stage=finetune modality={self.names[0]} from={place} data.path=LABELLED\n"
            f"  python -c \"import d2v_core; print(d2v_core.load('{place}', modality='{self.names[0]}'))\""
        )

    def _write_member(self, name: str, modality: Modality[Any], done: int, extra: Mapping[str, Any]) -> None:
        """A run folder with what a run of its own would have left there, but for what going on takes."""
        folder, model = self.out / name, self.model.models[name]
        try:
            folder.mkdir(exist_ok=True)
            own = replace(modality.config, out=str(folder), resume="never")
            (folder / "config.yaml").write_text(own.to_yaml(), encoding="utf-8")
            modality.keep(folder)
            stored = checkpoint.Checkpoint(run.model_state(model), model.teacher.own_state(), {})
            checkpoint.save(folder / "checkpoints", done, stored, keep=1)
            write_json(folder / "summary.json", {
                "modality": name, "preset": modality.config.preset, "stage": "pretrain", "steps": done,
                "joint_run": str(self.out), "data": self.datasets[name].describe(), **extra,
            })  # fmt: skip
        except OSError as error:
            raise UserError(
                f"The folder of {name} cannot be written to {folder}: {error}. Make room and go on with "
                f"out={self.out} resume=auto."
            ) from error
