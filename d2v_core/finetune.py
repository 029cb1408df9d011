"""Fine-tuning on a labelled task: one class, or one number, per sample. One recipe for every modality."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from d2v_core import checkpoint, run
from d2v_core.batching import LabelledSteps, labelled_batches
from d2v_core.config import FinetuneConfig, ModelConfig, RunConfig
from d2v_core.contract import Batch, LabelledPart, Modality, Tokens
from d2v_core.data2vec import Student, mean_of_valid
from d2v_core.errors import UserError
from d2v_core.labelled import Split, ids, open_task
from d2v_core.loop import Loop, OptimizerStep
from d2v_core.metrics import MetricsFile, write_json
from d2v_core.scores import score_all

TASK_FILE = "task.json"


class Head(nn.Module):
    """From the transformer's output to logits or values: pool, then norm, hidden map and last map as configured.

    The forms in use: mean, norm, linear (BEiT: beit/modeling_finetune.py); first token, hidden, linear (RoBERTa:
    fairseq/models/roberta/model.py, RobertaClassificationHead).
    """

    def __init__(self, model: ModelConfig, config: FinetuneConfig, num_outputs: int) -> None:
        super().__init__()
        self.pool, self.dropout = config.pool, config.head_dropout
        self.norm = nn.LayerNorm(model.embed_dim, eps=model.norm_eps) if config.head_norm else None
        self.hidden = nn.Linear(model.embed_dim, model.embed_dim) if config.head_hidden else None
        self.out = nn.Linear(model.embed_dim, num_outputs)
        if config.head_init_std is not None:
            nn.init.trunc_normal_(self.out.weight, std=config.head_init_std)
            nn.init.zeros_(self.out.bias)

    def forward(self, tokens: Tokens) -> Tensor:
        """tokens.x (B, E + T, D) -> (B, C)."""
        x = tokens.x[:, 0] if self.pool == "first" else mean_of_valid(tokens)
        if self.norm is not None:
            x = self.norm(x)
        if self.hidden is not None:
            x = torch.tanh(self.hidden(F.dropout(x, self.dropout, self.training)))
        return self.out(F.dropout(x, self.dropout, self.training))


class Classifier(nn.Module):
    """A student and a head."""

    def __init__(self, student: Student, head: Head) -> None:
        super().__init__()
        self.student = student
        self.head = head

    def forward(self, inputs: Mapping[str, Tensor], frozen: bool = False) -> Tensor:
        """Logits (B, C) float32, or values (B, 1). frozen: no gradient reaches the student."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            view, out = self.student(self.student.encoder.embed(inputs), None)
        return self.head(Tokens(out.x, view.padding_mask, view.grid, view.num_extra)).float()


def build_classifier(modality: Modality[Any], num_outputs: int) -> Classifier:
    """With its initial weights; the head's depend on the seed alone."""
    config = modality.config
    student = run.build_student(modality)
    if not config.finetune.final_norm:
        student.transformer.norm = None
    with run.initial_weights(config.seed, "head"):
        return Classifier(student, Head(config.model, config.finetune, num_outputs))


def load_pretrained(classifier: Classifier, modality: Modality[Any]) -> str:
    """Give the student the weights that `from` and `finetune.weights` name; says which. Raises UserError."""
    config = modality.config
    assert config.from_run is not None
    if config.finetune.weights == "untrained":
        return "Untrained weights, for comparison."
    source = run.load(config.from_run, teacher=config.finetune.weights == "teacher")
    if config.finetune.final_norm is False:
        source.student.transformer.norm = None
    run.load_state(classifier.student.state_dict(), modality.adapt(source.student.state_dict()), config.from_run)
    return f"Weights of the {config.finetune.weights} from {config.from_run}, step {source.step}."


def classification_loss(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """Summed over the batch: cross-entropy with (B, C) shares of the classes, or squared error with (B,) values."""
    if targets.dim() == 1:
        return F.mse_loss(logits[:, 0], targets, reduction="sum")
    return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)


@dataclass(frozen=True)
class Outputs:
    """Of a labelled part: ids; logits (N, C) or values (N, 1); labels (N,) classes or values."""

    ids: tuple[str, ...]
    logits: np.ndarray
    labels: np.ndarray

    @cached_property
    def predicted(self) -> np.ndarray:
        return self.logits[:, 0] if self.logits.shape[1] == 1 else self.logits.argmax(1)


class Finetuner(Loop[Classifier]):
    """A fine-tuning run. The weights that score best on the dev part are kept in `best/` and tested at the end."""

    def __init__(self, modality: Modality[Any], out: Path, console: Console) -> None:
        super().__init__(modality, out, console)
        self.split: Split = open_task(modality)
        self.tune = self.config.finetune

    def build(self, fresh: bool) -> None:
        config, tune = self.config, self.tune
        self.model = build_classifier(self.modality, self.split.num_outputs)
        if fresh:
            self.say(escape(load_pretrained(self.model, self.modality)))
        names = [name for name, _ in self.model.student.named_parameters()]
        for prefix in tune.frozen:
            if not any(name.startswith(prefix) for name in names):
                raise UserError(f"finetune.frozen={prefix} is the beginning of no parameter's name. There are: "
                                f"{', '.join(sorted({'.'.join(name.split('.')[:2]) for name in names}))}.")  # fmt: skip
        for name, parameter in self.model.student.named_parameters():
            parameter.requires_grad_(not name.startswith(tuple(tune.frozen)))
        self.model.to(self.device).train()
        self.averaged = None if tune.ema_decay is None else _averaged(self.model, tune.ema_decay)
        self.optimizer_step = OptimizerStep(self.model, config, self.device, self._scale_of)

    def _scale_of(self, name: str) -> float:
        """layer_decay ** (distance from the head), the head being one above the last block (BEiT: optim_factory.py)."""
        top = self.config.model.num_layers + 1
        part, _, inner = name.partition(".")
        depth = self.modality.layer_of(inner) if part == "student" else top
        return self.tune.layer_decay ** (top - depth)

    def open_data(self) -> None:
        task = self.split.task
        self.dataset_size, self.description = len(self.split.train.labels), self.split.description
        write_json(self.out / TASK_FILE, {
            "name": task.name, "classes": list(task.classes), "metrics": list(task.metrics),
            "train": list(ids(self.split.train)), "dev": list(ids(self.split.dev)),
        })  # fmt: skip

    def steps(self) -> LabelledSteps:
        return LabelledSteps(
            self.modality, self.split.train, len(self.split.task.classes), batch=self.tune.batch,
            micro_batch=self.tune.micro_batch or self.tune.batch, seed=self.config.seed,
            num_workers=self.config.train.num_workers, epoch=self.progress.epoch, step=self.progress.epoch_step,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip

    def usable(self, batch: Batch) -> bool:
        return batch.targets is not None

    def update(self, batches: Sequence[Batch]) -> Callable[[], dict[str, float]]:
        frozen = self.progress.step < self.tune.freeze_steps

        def forward(batch: Batch) -> Tensor:
            assert batch.targets is not None
            return classification_loss(self.model(batch.inputs, frozen), batch.targets, self.tune.label_smoothing)

        loss, grad_norm = self.optimizer_step.step(self.progress.step, batches, _num_targets, forward)
        if self.averaged is not None and self.optimizer_step.outcome.applied:
            self.averaged.update_parameters(self.model)
        return lambda: {"loss": float(loss), "grad_norm": float(grad_norm)}

    def after_step(self) -> None:
        progress, metrics = self.progress, self.split.task.metrics
        if progress.step % self.tune.eval_every and progress.step < self.config.train.max_steps:
            return
        outputs = self.outputs(self.split.dev)
        scores = score_all(metrics, outputs.predicted, outputs.labels)
        file = MetricsFile(self.out / "scores.jsonl", progress.step - 1)
        file.write({"step": progress.step, **scores})
        file.close()
        better = not progress.best_step or scores[metrics[0]] > progress.best_score
        if better:
            progress.best_score, progress.best_step = scores[metrics[0]], progress.step
            self._keep_best()
        text = ", ".join(f"{name} {value:.2f}" for name, value in scores.items())
        self.say(f"step {progress.step}: dev {text}{', the best so far' if better else ''}")

    def _keep_best(self) -> None:
        stored = checkpoint.Checkpoint(dict(self._scored().state_dict()), {}, {})
        try:
            checkpoint.save(self.out / "best", self.progress.step, stored, 1)
        except OSError as error:
            raise UserError(f"The best weights cannot be written to {self.out / 'best'}: {error}.") from error

    def _scored(self) -> Classifier:
        return self.model if self.averaged is None else cast("Classifier", self.averaged.module)

    def outputs(self, part: LabelledPart[Any]) -> Outputs:
        """What the scored weights make of a part, in evaluation mode. Unreadable samples are noted and left out."""
        model = self._scored().eval()
        batch = self.tune.micro_batch or self.tune.batch
        done: list[tuple[Batch, Tensor]] = []
        with torch.inference_mode(), self.optimizer_step.autocast():
            workers = self.config.train.num_workers
            for one in labelled_batches(self.modality, part, len(self.split.task.classes), batch, workers):
                self.note_skipped(one)
                if one.targets is not None:
                    done.append((one, model(one.to(self.device).inputs).cpu()))
        self.model.train()
        if not done:
            raise UserError(f"None of the {len(part.labels)} samples of a part of {self.split.task.name} can be read.")
        targets = torch.cat([cast("Tensor", one.targets) for one, _ in done]).numpy()
        return Outputs(
            tuple(name for one, _ in done for name in one.ids),
            torch.cat([logits for _, logits in done]).numpy(),
            targets.argmax(1) if targets.ndim == 2 else targets,
        )

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return dict(self.model.state_dict()), {} if self.averaged is None else dict(self.averaged.state_dict())

    def load_tensors(self, stored: checkpoint.Checkpoint, source: str) -> None:
        run.load_state(self.model.state_dict(), stored.model, source)
        if self.averaged is not None:
            run.load_state(self.averaged.state_dict(), stored.teacher, source)

    def finish(self) -> None:
        task, progress, summary = self.split.task, self.progress, self.summary()
        folder = run.best_checkpoint(self.out)
        run.load_state(self._scored().state_dict(), checkpoint.load(folder, state=False).model, str(folder))
        result: dict[str, Any] = {"task": task.name, "metrics": list(task.metrics), "best_step": progress.best_step}
        result["labels"] = len(self.split.train.labels)
        for name, part in (("dev", self.split.dev), ("test", task.test)):
            if part is not None:
                outputs = self.outputs(part)
                result[name] = score_all(task.metrics, outputs.predicted, outputs.labels)
                write_predictions(self.out / f"predictions-{name}.tsv", outputs, task.classes)
        summary["finetune"] = result
        summary["skipped"] = progress.skipped
        write_json(self.out / "summary.json", summary)
        place = escape(str(self.out))
        for name in ("dev", "test"):
            if name in result:
                self.say(f"{name}: " + ", ".join(f"{metric} {value:.2f}" for metric, value in result[name].items()))
        self.say(
            f"{progress.step} steps in {progress.seconds:.0f} s; the weights of step {progress.best_step} were best on "
            f"dev. The run lies in [bold]{place}[/bold].\nNext:\n"
            f"  python -c \"import d2v_core; print(d2v_core.load_classifier('{place}'))\""
        )


def _num_targets(batch: Batch) -> int:
    return 0 if batch.targets is None else len(batch.targets)


def _averaged(model: nn.Module, decay: float) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=cast("Any", get_ema_multi_avg_fn(decay)))


def write_predictions(path: Path, outputs: Outputs, classes: Sequence[str]) -> None:
    """One line per sample: id, label, prediction, and the probability of what was predicted where there are classes."""
    lines = ["id\tlabel\tpredicted" + ("\tprobability" if classes else "")]
    exponentials = np.exp(outputs.logits - outputs.logits.max(1, keepdims=True))
    shares = exponentials.max(1) / exponentials.sum(1)
    for i in sorted(range(len(outputs.ids)), key=lambda i: outputs.ids[i]):
        name, label, predicted = outputs.ids[i], outputs.labels[i], outputs.predicted[i]
        if classes:
            lines.append(f"{name}\t{classes[int(label)]}\t{classes[int(predicted)]}\t{shares[i]:.4f}")
        else:
            lines.append(f"{name}\t{label:g}\t{predicted:g}")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(path)


class LoadedClassifier(nn.Module):
    """A fine-tuned network, ready to predict. In eval mode, on the CPU unless moved. classes: empty = regression."""

    def __init__(self, config: RunConfig, modality: Modality[Any], classifier: Classifier, classes: Sequence[str],
                 step: int) -> None:  # fmt: skip
        super().__init__()
        self.config, self.modality, self.classes, self.step = config, modality, tuple(classes), step
        self.classifier = classifier
        self.eval()

    @torch.no_grad()
    def predict(self, samples: Sequence[Any]) -> Tensor:
        """(B, C) probabilities in the order of `classes`, or (B,) values. samples: as the modality's data set gives."""
        prepared = [self.modality.prepare_labelled(sample, None) for sample in samples]
        logits = self.classifier(self.modality.collate(prepared))
        return logits.softmax(1) if self.classes else logits[:, 0]


def load_classifier(path: str | Path) -> LoadedClassifier:
    """The best weights of a fine-tuning run. Raises UserError where there are none or they do not fit."""
    path = Path(path)
    config, kind = run.load_config_of(path)
    if config.stage != "finetune":
        raise UserError(f"{path} is a run of stage={config.stage}, not of stage=finetune.")
    folder = run.best_checkpoint(path)
    try:
        task = json.loads((path / TASK_FILE).read_text(encoding="utf-8"))
        classes = tuple(map(str, task["classes"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / TASK_FILE} cannot be read: {error}. The run folder is not whole.") from error
    modality = kind(config)
    classifier = build_classifier(modality, max(len(classes), 1))
    run.load_state(classifier.state_dict(), checkpoint.load(folder, state=False).model, str(folder))
    return LoadedClassifier(config, modality, classifier, classes, checkpoint.step_of(folder))
