"""Fine-tuning on a labelled task. What is asked of each sample is an objective's affair (`objectives.py`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from d2v_core import checkpoint, run
from d2v_core.batching import LabelledSteps, labelled_batches
from d2v_core.contract import Batch, Corruption, LabelledPart, Modality, Tokens
from d2v_core.ctc import Symbols
from d2v_core.data2vec import Student
from d2v_core.distributed import prepare
from d2v_core.errors import UserError
from d2v_core.keyed import generator
from d2v_core.labelled import Split, ids, open_task
from d2v_core.loop import Loop, OptimizerStep
from d2v_core.metrics import MetricsFile, write_json
from d2v_core.objectives import Classes, Head, Objective, Values, fit_linear, objective_of
from d2v_core.runfolder import drop_unused, open_run

TASK_FILE = "task.json"


class Network(nn.Module):
    """A student and a head."""

    def __init__(self, student: Student, head: Head) -> None:
        super().__init__()
        self.student = student
        self.head = head

    def forward(self, inputs: Mapping[str, Tensor], corruption: Corruption | None = None, frozen: bool = False) -> Any:
        """The head's output. corruption: what to withhold. frozen: no gradient reaches the student."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            tokens = self.tokens(inputs, corruption)
        return self.head(tokens)

    def tokens(self, inputs: Mapping[str, Tensor], corruption: Corruption | None = None) -> Tokens:
        """What the head is given: the transformer's output, (B, E + T, D)."""
        encoder = self.student.encoder
        tokens = encoder.embed(inputs)
        if corruption is not None:
            x = tokens.x if corruption.hidden is None else encoder.hide(tokens.x, corruption.hidden)
            if corruption.channels is not None:
                if corruption.channels.shape[1] != x.shape[2]:
                    raise UserError(
                        f"finetune.channel_mask_prob: this encoder's tokens have {x.shape[2]} channels and not "
                        f"model.embed_dim={corruption.channels.shape[1]}. Leave it at 0."
                    )
                x = x.masked_fill(corruption.channels.unsqueeze(1), 0.0)
            tokens = replace(tokens, x=x)
        view, out = self.student(tokens, None)
        return Tokens(out.x, view.padding_mask, view.grid, view.num_extra)


def build_network(modality: Modality[Any], objective: Objective) -> Network:
    """With its initial weights; the head's depend on the seed alone."""
    config = modality.config
    student = run.build_student(modality)
    if not config.finetune.final_norm:
        student.transformer.norm = None
    with run.initial_weights(config.seed, "head"):
        return Network(student, objective.head(config.model, config.finetune))


def load_pretrained(network: Network, modality: Modality[Any]) -> str:
    """Give the student the weights that `from` and `finetune.weights` name; says which. Raises UserError."""
    config = modality.config
    assert config.from_run is not None
    if config.finetune.weights == "untrained":
        return "Untrained weights, for comparison."
    source = run.load(config.from_run, teacher=config.finetune.weights == "teacher")
    if config.finetune.final_norm is False:
        source.student.transformer.norm = None
    run.load_state(network.student.state_dict(), modality.adapt(source.student.state_dict()), config.from_run)
    return f"Weights of the {config.finetune.weights} from {config.from_run}, step {source.step}."


@dataclass(frozen=True)
class Outputs:
    """Of a labelled part, sample by sample: ids, what the objective keeps, labels."""

    ids: tuple[str, ...]
    kept: tuple[np.ndarray, ...]
    labels: np.ndarray


class Finetuner(Loop[Network]):
    """A fine-tuning run. The weights that score best on the dev part are kept in `best/` and tested at the end.

    split: the task where it is open already. tested: whether to score the test part.
    """

    def __init__(
        self, modality: Modality[Any], out: Path, console: Console, split: Split | None = None, tested: bool = True
    ) -> None:
        super().__init__(modality, out, console)
        self.split: Split = open_task(modality) if split is None else split
        self.tune, self.tested = self.config.finetune, tested
        self.objective = objective_of(self.split.task, self.tune.label_smoothing)
        self.notes: dict[str, Any] = {}
        """What the summary is to say beside the scores."""

    def build(self, fresh: bool) -> None:
        config, tune = self.config, self.tune
        self.model = build_network(self.modality, self.objective)
        if fresh:
            self.say(escape(load_pretrained(self.model, self.modality)))
        names = [name for name, _ in self.model.student.named_parameters()]
        for prefix in tune.frozen:
            if not any(name.startswith(prefix) for name in names):
                raise UserError(f"finetune.frozen={prefix} is the beginning of no parameter's name. There are: "
                                f"{', '.join(sorted({'.'.join(name.split('.')[:2]) for name in names}))}.")  # fmt: skip
        for name, parameter in self.model.student.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(tune.frozen)))
        prepare(self.model, config, self.device)
        self.model.to(self.device).train()
        if fresh and tune.head_steps and self.processes.first:
            self._fit_head()
        self.optimizer_step = OptimizerStep(self.model, config, self.device, self._scale_of)  # now all have that head
        self.averaged = None if tune.ema_decay is None else _averaged(self.model, tune.ema_decay)

    def _fit_head(self) -> None:
        """The head's last map, on what the network makes of the training part before it is trained itself."""
        tune, objective, model = self.tune, self.objective, self.model.eval()
        features: list[Tensor] = []
        names: list[str] = []
        with torch.no_grad():
            for batch in self._batches(self.split.train):
                if batch.ids:
                    names += batch.ids
                    features += objective.split(model.head.features(model.tokens(batch.to(self.device).inputs)))
        labels = _labels_of(self.split.train, names)

        def loss(chosen: list[Tensor], numbers: Sequence[int]) -> Tensor:
            targets = objective.targets(labels[list(numbers)]).to(self.device)
            return objective.loss(model.head.read(objective.join(chosen)), targets) / len(numbers)

        if not features:
            raise UserError(f"None of the {len(self.split.train.labels)} samples of the training part can be read.")
        rng = generator(self.config.seed, "head first")
        fit_linear(
            model.head.out, features, loss, steps=tune.head_steps, batch=tune.head_batch, lr=tune.head_lr, rng=rng
        )
        model.train()
        self.say(f"The head was first trained alone, {tune.head_steps} steps on {len(features)} samples' features.")

    def _scale_of(self, name: str) -> float:
        """layer_decay ** (distance from the head), the head being one above the last block (BEiT: optim_factory.py)."""
        top = self.config.model.num_layers + 1
        part, _, inner = name.partition(".")
        depth = self.modality.layer_of(inner) if part == "student" else top
        return self.tune.layer_decay ** (top - depth)

    def open_data(self) -> None:
        task = self.split.task
        self.dataset_size, self.description = len(self.split.train.labels), self.split.description
        if self.processes.first:
            write_json(self.out / TASK_FILE, {
                "name": task.name, "classes": list(task.classes), "symbols": list(task.symbols),
                "metrics": list(task.metrics), "train": list(ids(self.split.train)), "dev": list(ids(self.split.dev)),
                "left_out": dict(task.left_out),
            })  # fmt: skip

    def steps(self) -> LabelledSteps:
        return LabelledSteps(
            self.modality, self.split.train, self.objective.targets, batch=self.tune.batch,
            micro_batch=self.tune.micro_batch, seed=self.config.seed,
            num_workers=self.config.train.num_workers, epoch=self.progress.epoch, step=self.progress.epoch_step,
            pin_memory=self.device.type == "cuda", worker_policy=self.worker_policy(),
        )  # fmt: skip

    def usable(self, batch: Batch) -> bool:
        return batch.targets is not None

    def update(self, batches: Sequence[Batch]) -> Callable[[], dict[str, float]]:
        frozen = self.progress.step < self.tune.freeze_steps

        def forward(batch: Batch) -> Tensor:
            assert batch.targets is not None
            return self.objective.loss(self.model(batch.inputs, batch.corruption, frozen), batch.targets)

        loss, grad_norm = self.optimizer_step.step(self.progress.step, batches, _num_targets, forward)
        if self.averaged is not None and self.optimizer_step.outcome.applied:
            self.averaged.update_parameters(self.model)
        return lambda: {"loss": float(loss), "grad_norm": float(grad_norm)}

    def after_step(self) -> None:
        progress = self.progress
        if progress.step % self.tune.eval_every == 0 or progress.step == self.config.train.max_steps:
            self.processes.by_first(self._score_dev)

    def _score_dev(self) -> None:
        progress = self.progress
        scores = self.score(self.outputs(self.split.dev))
        file = MetricsFile(self.out / "scores.jsonl", progress.step - 1)
        file.write({"step": progress.step, **scores})
        file.close()
        rank = self.objective.rank(scores)
        better = not progress.best_step or rank > progress.best_score
        if better:
            progress.best_score, progress.best_step = rank, progress.step
            self._keep_best()
        self.say(f"step {progress.step}: dev {_shown(scores)}{', the best so far' if better else ''}")

    def _keep_best(self) -> None:
        for old in checkpoint.list_checkpoints(self.out / "best"):
            if checkpoint.step_of(old) >= self.progress.step:  # of a time that the run has gone back from
                shutil.rmtree(old)
        stored = checkpoint.Checkpoint(dict(self._scored().state_dict()), {}, {})
        try:
            checkpoint.save(self.out / "best", self.progress.step, stored, 1)
        except OSError as error:
            raise UserError(f"The best weights cannot be written to {self.out / 'best'}: {error}.") from error

    def _scored(self) -> Network:
        return self.model if self.averaged is None else cast("Network", self.averaged.module)

    def _batches(self, part: LabelledPart[Any]) -> Iterator[Batch]:
        """All of a part, as it is, in batches of the size that runs at once. What cannot be read is noted."""
        batch, workers = self.tune.micro_batch or self.tune.batch, self.config.train.num_workers
        for one in labelled_batches(self.modality, part, self.objective.targets, batch, workers, self.worker_policy()):
            self.note_skipped(one.skipped)
            yield one

    def outputs(self, part: LabelledPart[Any]) -> Outputs:
        """What the scored weights make of a part, in evaluation mode. Unreadable samples are noted and left out."""
        model = self._scored().eval()
        names: list[str] = []
        kept: list[np.ndarray] = []
        with torch.inference_mode(), self.optimizer_step.autocast():
            for one in self._batches(part):
                if one.targets is not None:
                    names += one.ids
                    kept += self.objective.keep(model(one.to(self.device).inputs))
        self.model.train()
        if not kept:
            raise UserError(f"None of the {len(part.labels)} samples of a part of {self.split.task.name} can be read.")
        return Outputs(tuple(names), tuple(kept), _labels_of(part, names))

    def score(self, outputs: Outputs) -> dict[str, float]:
        """The objective's scores of these outputs, by name."""
        return self.objective.score(outputs.kept, outputs.labels)

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return dict(self.model.state_dict()), {} if self.averaged is None else dict(self.averaged.state_dict())

    def load_tensors(self, stored: checkpoint.Checkpoint, source: str) -> None:
        run.load_state(self.model.state_dict(), stored.model, source)
        if self.averaged is not None:
            run.load_state(self.averaged.state_dict(), stored.teacher, source)

    def finish(self) -> None:
        task, progress, summary = self.split.task, self.progress, self.summary()
        folder = run.best_checkpoint(self.out)
        best_step = checkpoint.step_of(folder)  # which may be of a time that the run has gone back from
        run.load_state(self._scored().state_dict(), checkpoint.load(folder, state=False).model, str(folder))
        result: dict[str, Any] = {"task": task.name, "metrics": list(task.metrics), "best_step": best_step}
        result |= {"labels": len(self.split.train.labels), **self.notes}
        for name, part in (("dev", self.split.dev), ("test", task.test if self.tested else None)):
            if part is not None:
                outputs = self.outputs(part)
                result[name] = self.score(outputs)
                write_predictions(self.out / f"predictions-{name}.tsv", outputs, self.objective)
        summary["finetune"] = result
        summary["skipped"] = progress.skipped
        write_json(self.out / "summary.json", summary)
        place = escape(str(self.out))
        for name in ("dev", "test"):
            if name in result:
                self.say(f"{name}: {_shown(result[name])}")
        self.say(
            f"{progress.step} steps in {progress.seconds:.0f} s; the weights of step {best_step} were best on "
            f"dev. The run lies in [bold]{place}[/bold].\nNext:\n"
            + "".join(f"  {verb.replace('RUN', place)}\n" for verb in task.verbs)
            + f"  python -c \"import d2v_core; print(d2v_core.load_finetuned('{place}'))\""
        )


def _labels_of(part: LabelledPart[Any], names: Sequence[str]) -> np.ndarray:
    place = {name: i for i, name in enumerate(ids(part))}
    return part.labels[[place[name] for name in names]]


def _num_targets(batch: Batch) -> int:
    return 0 if batch.targets is None else len(batch.targets)


def _averaged(model: nn.Module, decay: float) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=cast("Any", get_ema_multi_avg_fn(decay)))


def _shown(scores: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in scores.items())


def write_predictions(path: Path, outputs: Outputs, objective: Objective) -> None:
    """One line per sample, by id: the id, then what the objective says of it."""
    lines = ["\t".join(("id", *objective.columns))]
    for i in sorted(range(len(outputs.ids)), key=lambda i: outputs.ids[i]):
        lines.append("\t".join((outputs.ids[i], *objective.line(outputs.kept[i], outputs.labels[i]))))
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(path)


class LoadedFinetuned(nn.Module):
    """A fine-tuned network as its run left it. In eval mode, on the CPU unless moved.

    step: at which it was best on the dev part.
    """

    def __init__(self, modality: Modality[Any], network: Network, objective: Objective, step: int) -> None:
        super().__init__()
        self.config, self.modality, self.objective, self.step = modality.config, modality, objective, step
        self.network = network
        self.eval()

    @torch.no_grad()
    def outputs(self, samples: Sequence[Any]) -> Any:
        """The head's output for a batch of samples as the modality's data set gives them."""
        device = next(self.parameters()).device
        prepared = [self.modality.prepare_labelled(sample, None) for sample in samples]
        inputs = self.modality.collate(prepared)
        return self.network({name: value.to(device) for name, value in inputs.items()})


class LoadedClassifier(LoadedFinetuned):
    """A fine-tuned network, ready to predict. classes: empty = regression."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of `predict`'s columns; empty = regression."""
        return self.objective.classes if isinstance(self.objective, Classes) else ()

    def predict(self, samples: Sequence[Any]) -> Tensor:
        """(B, C) probabilities in the order of `classes`, or (B,) values. samples: as the modality's data set gives."""
        output = self.outputs(samples)
        return output.softmax(1) if self.classes else output[:, 0]


def load_finetuned(path: str | Path) -> LoadedFinetuned:
    """The best weights of the fine-tuning run in the folder `path`, whatever its task.

    Raises UserError where there are none that fit.
    """
    path = Path(path)
    config, kind = run.load_config_of(path)
    if config.stage != "finetune":
        train = f" First train it on labels: d2v run stage=finetune from={path} data.path=LABELLED"
        advice = train if config.stage == "pretrain" else ""
        raise UserError(f"{path} is a run of stage={config.stage}, not of stage=finetune.{advice}")
    folder = run.best_checkpoint(path)
    objective = _stored_objective(path)
    modality = kind(config)
    network = build_network(modality, objective)
    run.load_state(network.state_dict(), checkpoint.load(folder, state=False).model, str(folder))
    loaded = LoadedFinetuned if isinstance(objective, Symbols) else LoadedClassifier
    return loaded(modality, network, objective, checkpoint.step_of(folder))


def load_classifier(path: str | Path) -> LoadedClassifier:
    """The best weights of the run in the folder `path`, which tells classes or values.

    Raises UserError as `load_finetuned` does.
    """
    loaded = load_finetuned(path)
    if not isinstance(loaded, LoadedClassifier):
        asked = loaded.objective.asks_for
        raise UserError(f"{path} is a run that tells {asked}, not classes or values: use d2v_core.load_finetuned.")
    return loaded


def _stored_objective(path: Path) -> Objective:
    try:
        task = json.loads((path / TASK_FILE).read_text(encoding="utf-8"))
        classes, metrics = (tuple(map(str, task[key])) for key in ("classes", "metrics"))
        symbols = tuple(map(str, task.get("symbols", ())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / TASK_FILE} cannot be read: {error}. The run folder is not whole.") from error
    if symbols:
        return Symbols(symbols, metrics)
    return Classes(classes, metrics) if classes else Values(metrics)


class RateSearch:
    """Fine-tuning with each of `finetune.lrs`, of which the best on the dev part becomes the run.

    Each is a run of its own in `rates/`, which is not tested. `fit` returns the exit status.
    """

    def __init__(self, modality: Modality[Any], out: Path, console: Console) -> None:
        self.modality, self.out, self.console = modality, out, console
        self.split = open_task(modality)

    def fit(self) -> int:
        """Train with each rate, keep the best, test it. Returns the exit status; a run that was stopped goes on."""
        rates = self.modality.config.finetune.lrs
        objective = objective_of(self.split.task)
        dev: dict[float, dict[str, float]] = {}
        for rate in rates:
            modality = self._with(rate)
            folder = open_run(modality.config)
            if not folder.done:
                self.console.print(f"\nLearning rate {rate:g}, in {escape(str(folder.path))}", soft_wrap=True)
                try:
                    status = Finetuner(modality, folder.path, self.console, self.split, tested=False).fit()
                finally:
                    drop_unused(folder.path)
                if status:
                    self.console.print(
                        f"This was one of {len(rates)} learning rates. Go on with all of them by the first command and "
                        f"[bold]out={escape(str(self.out))} resume=auto[/bold].", soft_wrap=True, highlight=False,
                    )  # fmt: skip
                    return status
            summary = json.loads((folder.path / "summary.json").read_text(encoding="utf-8"))
            dev[rate] = summary["finetune"]["dev"]
        best = max(rates, key=lambda rate: objective.rank(dev[rate]))
        for rate, scores in dev.items():
            self.console.print(f"Learning rate {rate:g}: dev {_shown(scores)}" + (", kept" if rate == best else ""))
        self._keep(best, dev)
        return 0

    def _with(self, rate: float) -> Modality[Any]:
        config = self.modality.config
        own = replace(
            config,
            out=str(self.out / "rates" / f"{rate:g}"),
            resume="auto",
            optim=replace(config.optim, lr=rate),
            finetune=replace(config.finetune, lrs=[]),
        )
        return type(self.modality)(own)

    def _keep(self, rate: float, dev: Mapping[float, Mapping[str, float]]) -> None:
        """Make the best trial's results this run's, and test it."""
        modality = self._with(rate)
        trial = Path(str(modality.config.out))
        shutil.copytree(trial / "best", self.out / "best", dirs_exist_ok=True)
        for name in ("metrics.jsonl", "scores.jsonl"):
            shutil.copyfile(trial / name, self.out / name)
        winner = Finetuner(modality, self.out, self.console, self.split)
        winner.build(fresh=False)
        winner.restore([run.newest_checkpoint(trial)])
        winner.open_data()
        winner.notes = {"lr": rate, "rates": [{"lr": one, "dev": dict(scores)} for one, scores in dev.items()]}
        winner.finish()


def finetuning(modality: Modality[Any], out: Path, console: Console) -> Finetuner | RateSearch:
    """What does `stage=finetune`."""
    return (RateSearch if modality.config.finetune.lrs else Finetuner)(modality, out, console)
