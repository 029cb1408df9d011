"""What a labelled task asks of a network: one class, one number, or a sequence of symbols, for each sample.

An objective brings the head, makes targets of labels, has the loss, keeps of each output what is worth keeping, and
scores that. Fine-tuning knows nothing else about its task. Classes and values are here, sequences in `ctc.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from d2v_core.config import FinetuneConfig, ModelConfig
from d2v_core.contract import Targets, Task, Tokens
from d2v_core.data2vec import mean_of_valid
from d2v_core.scores import score_all


class Head(nn.Module, ABC):
    """From the transformer's output to what an objective reads; `out` is its last map."""

    out: nn.Linear

    @abstractmethod
    def features(self, tokens: Tokens) -> Any:
        """What the last map is given. tokens.x: (B, E + T, D), the transformer's output."""

    @abstractmethod
    def read(self, features: Any) -> Any:
        """The last map and what belongs to it."""

    def forward(self, tokens: Tokens) -> Any:
        """`read` of `features`."""
        return self.read(self.features(tokens))


class PooledHead(Head):
    """One vector for each sample: pool, then norm, hidden map and last map as configured.

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

    def features(self, tokens: Tokens) -> Tensor:
        """(B, E + T, D) -> (B, D)."""
        x = tokens.x[:, 0] if self.pool == "first" else mean_of_valid(tokens)
        if self.norm is not None:
            x = self.norm(x)
        if self.hidden is not None:
            x = torch.tanh(self.hidden(F.dropout(x, self.dropout, self.training)))
        return x

    def read(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, C) float32."""
        return self.out(F.dropout(features, self.dropout, self.training)).float()


class Objective(ABC):
    """One kind of label. metrics: names of the scores, the most important first."""

    asks_for: ClassVar[str]
    """A word for error messages."""
    metrics: tuple[str, ...]
    targets: Targets
    """From the labels of a batch's samples to a tensor whose first axis is the batch. Runs in the workers."""

    @abstractmethod
    def head(self, model: ModelConfig, config: FinetuneConfig) -> Head:
        """A new head for a network of this width."""

    @abstractmethod
    def loss(self, output: Any, targets: Tensor) -> Tensor:
        """() float32, summed over the samples of a batch. output: of the head."""

    @abstractmethod
    def split(self, features: Any) -> list[Tensor]:
        """`Head.features` of a batch, sample by sample: (..., F) each."""

    @abstractmethod
    def join(self, features: Sequence[Tensor]) -> Any:
        """The inverse of `split`."""

    @abstractmethod
    def keep(self, output: Any) -> list[np.ndarray]:
        """Of each sample of a batch, what `score` and `line` need."""

    @abstractmethod
    def score(self, kept: Sequence[np.ndarray], labels: np.ndarray) -> dict[str, float]:
        """The metrics, by name."""

    def rank(self, scores: Mapping[str, float]) -> float:
        """More is better: the best checkpoint has most of it."""
        return scores[self.metrics[0]]

    columns: ClassVar[tuple[str, ...]] = ("label", "predicted")
    """Of the file of predictions, behind the sample's id."""

    @abstractmethod
    def line(self, kept: np.ndarray, label: Any) -> tuple[str, ...]:
        """One sample's cells, as many as `columns`."""


def class_targets(num_classes: int) -> Targets:
    """From numbers of classes (B,) to shares of the classes (B, C) float32."""
    return partial(_shares, num_classes)


def _shares(num_classes: int, labels: np.ndarray) -> Tensor:
    return F.one_hot(torch.as_tensor(labels), num_classes).float()


def _values(labels: np.ndarray) -> Tensor:
    return torch.as_tensor(labels).float()


class _OneVector(Objective):
    """One vector of outputs for each sample."""

    def split(self, features: Tensor) -> list[Tensor]:
        return list(features)

    def join(self, features: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(features))

    def keep(self, output: Tensor) -> list[np.ndarray]:
        return list(output.cpu().numpy())


class Classes(_OneVector):
    """One class of several. classes: their names."""

    asks_for = "classes"
    columns = ("label", "predicted", "probability")

    def __init__(self, classes: Sequence[str], metrics: Sequence[str], label_smoothing: float = 0.0) -> None:
        self.classes, self.metrics, self.label_smoothing = tuple(classes), tuple(metrics), label_smoothing
        self.targets = class_targets(len(self.classes))

    def head(self, model: ModelConfig, config: FinetuneConfig) -> Head:
        return PooledHead(model, config, len(self.classes))

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of (B, C) logits with (B, C) shares of the classes."""
        return F.cross_entropy(output, targets, reduction="sum", label_smoothing=self.label_smoothing)

    def score(self, kept: Sequence[np.ndarray], labels: np.ndarray) -> dict[str, float]:
        return score_all(self.metrics, np.stack(kept).argmax(1), labels)

    def line(self, kept: np.ndarray, label: Any) -> tuple[str, ...]:
        share = 1.0 / np.exp(kept - kept.max()).sum()
        return self.classes[int(label)], self.classes[int(kept.argmax())], f"{share:.4f}"


class Values(_OneVector):
    """One number: squared error."""

    asks_for = "values"

    def __init__(self, metrics: Sequence[str]) -> None:
        self.metrics, self.targets = tuple(metrics), _values

    def head(self, model: ModelConfig, config: FinetuneConfig) -> Head:
        return PooledHead(model, config, 1)

    def loss(self, output: Tensor, targets: Tensor) -> Tensor:
        """output (B, 1), targets (B,)."""
        return F.mse_loss(output[:, 0], targets, reduction="sum")

    def score(self, kept: Sequence[np.ndarray], labels: np.ndarray) -> dict[str, float]:
        return score_all(self.metrics, np.stack(kept)[:, 0], labels)

    def line(self, kept: np.ndarray, label: Any) -> tuple[str, ...]:
        return f"{label:g}", f"{kept[0]:g}"


def objective_of(task: Task[Any], label_smoothing: float = 0.0) -> Objective:
    """The objective of a task. Raises ValueError where it has both classes and symbols."""
    from d2v_core.ctc import Symbols

    if task.classes and task.symbols:
        raise ValueError(f"{task.name} has both classes and symbols")
    if task.symbols:
        return Symbols(task.symbols, task.metrics, task.score, task.show)
    if task.classes:
        return Classes(task.classes, task.metrics, label_smoothing)
    return Values(task.metrics)


def fit_linear(
    out: nn.Linear,
    features: Sequence[Tensor],
    loss: Callable[[list[Tensor], Sequence[int]], Tensor],
    *,
    steps: int,
    batch: int,
    lr: float,
    rng: np.random.Generator,
) -> None:
    """Train a linear map, in place, on features that stay as they are, (..., F) for each sample.

    It learns on features of mean 0 and variance 1, which need no warming up to; the standardisation is then folded into
    its weights. loss: from standardised features of some samples, and their numbers, to a () tensor. Adam; the
    learning rate rises to `lr` over a tenth of the steps and falls linearly to 0.
    """
    width = out.weight.shape[1]
    rows = torch.cat([one.reshape(-1, width) for one in features])
    mean, std = rows.mean(0), rows.std(0) + 1e-5
    optimizer = torch.optim.Adam(out.parameters(), lr=lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / (0.1 * steps), 1.0, 1.0 - step / steps)
        chosen = [int(i) for i in rng.choice(len(features), min(batch, len(features)), replace=False)]
        value = loss([(features[i] - mean) / std for i in chosen], chosen)
        optimizer.zero_grad()
        value.backward()  # pyright: ignore[reportUnknownMemberType]
        optimizer.step()  # pyright: ignore[reportUnknownMemberType]
    with torch.no_grad():
        out.weight.div_(std)
        out.bias.sub_(out.weight @ mean)
