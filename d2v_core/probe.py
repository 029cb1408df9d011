"""How much of a labelled task can be read off frozen features by a linear classifier."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from d2v_core.contract import ProbeTask, Tokens
from d2v_core.data2vec import Student, mean_of_valid

Features = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]
"""From the inputs of one sample to its features, one (T, F) tensor per layer."""
IGNORE = -100
L2_GRID = (3e-4, 3e-3)


@dataclass(frozen=True)
class ProbeRow:
    """Test accuracy in per cent of one system, per budget, and the layer that the dev part chose (with the penalty)."""

    system: str
    accuracy: Mapping[int, float]
    layer: Mapping[int, int]


@torch.no_grad()
def layers_of(student: Student, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """[transformer input, output of block 1, ...]: (T, D) each, for a batch of one sample, without dropout."""
    view, layers = all_layers(student, inputs)
    return [layer[0, view.num_extra :].float() for layer in layers]


@torch.no_grad()
def pooled_layers(student: Student, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The same of a whole batch: (B, D) float32 each, the mean over tokens that are neither extra nor padding."""
    view, layers = all_layers(student, inputs)
    return [mean_of_valid(replace(view, x=layer)).float() for layer in layers]


def layer_names(student: Student) -> tuple[str, ...]:
    """Of the tensors of `layers_of`, in their order: input, block-1, ..., and norm where one follows the blocks."""
    blocks = (f"block-{i + 1}" for i in range(len(student.transformer.blocks)))
    return ("input", *blocks, *(() if student.transformer.norm is None else ("norm",)))


@torch.no_grad()
def all_layers(student: Student, inputs: Mapping[str, Tensor]) -> tuple[Tokens, list[Tensor]]:
    """The view of a batch of whole samples, and every layer's output, (B, E + T, D) each, without dropout."""
    training = student.training
    student.eval()
    try:
        view, out = student(student.encoder.embed(inputs), None, taps=True)
    finally:
        student.train(training)
    return view, [view.x, *out.blocks, *([] if student.transformer.norm is None else [out.x])]


def run_probe(task: ProbeTask, systems: Mapping[str, Features]) -> list[ProbeRow]:
    """Score every system, and the raw input where the task has it.

    Layer and penalty are chosen on the dev part for each system and budget alike: the penalty moves raw input by nine
    points, and an untrained network may use its best layer too.
    """
    rows = [_score(task, name, features) for name, features in systems.items()]
    if task.input_features is not None:
        rows.append(_score(task, task.input_name, lambda inputs: [task.input_features(inputs)]))
    return rows


def _score(task: ProbeTask, system: str, features: Features) -> ProbeRow:
    def part(samples: Sequence[tuple[Mapping[str, Tensor], Tensor]]) -> list[tuple[list[Tensor], Tensor]]:
        return [_labelled(features(inputs), labels) for inputs, labels in samples]

    train, dev, test = part(task.train[: task.budgets[-1]]), part(task.dev), part(task.test)
    accuracy: dict[int, float] = {}
    chosen: dict[int, int] = {}
    for budget in task.budgets:
        best = -1.0
        for layer in range(len(train[0][0])):
            for l2 in L2_GRID:
                classify = fit_linear(*_stack(train[:budget], layer), task.num_classes, l2)
                score = _accuracy(classify, *_stack(dev, layer))
                if score > best:
                    best, chosen[budget] = score, layer
                    accuracy[budget] = _accuracy(classify, *_stack(test, layer))
    return ProbeRow(system, accuracy, chosen)


def _labelled(layers: Sequence[Tensor], labels: Tensor) -> tuple[list[Tensor], Tensor]:
    """Tokens with a label, or the mean over tokens where the sample has one label."""
    if labels.dim() == 0:
        return [layer.mean(0, keepdim=True).cpu() for layer in layers], labels.reshape(1)
    keep = labels != IGNORE
    return [layer.cpu()[keep] for layer in layers], labels[keep]


def _stack(samples: Sequence[tuple[list[Tensor], Tensor]], layer: int) -> tuple[Tensor, Tensor]:
    return torch.cat([layers[layer] for layers, _ in samples]), torch.cat([labels for _, labels in samples])


def fit_linear(x: Tensor, y: Tensor, num_classes: int, l2: float, iterations: int = 60) -> Callable[[Tensor], Tensor]:
    """Multinomial logistic regression on standardised features by L-BFGS. x (N, F), y (N,); returns x -> logits."""
    mean, std = x.mean(0), x.std(0) + 1e-5
    x = (x - mean) / std
    weight = torch.zeros(num_classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), y) + l2 * weight.square().sum()
        loss.backward()  # pyright: ignore[reportUnknownMemberType]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # pyright: ignore[reportUnknownMemberType]
    fitted_weight, fitted_bias = weight.detach(), bias.detach()

    def classify(features: Tensor) -> Tensor:
        return F.linear((features - mean) / std, fitted_weight, fitted_bias)

    return classify


def fit_knn(x: Tensor, y: Tensor, num_classes: int, k: int, temperature: float = 0.07) -> Callable[[Tensor], Tensor]:
    """Votes of the k nearest of x (N, F) by cosine, weighted by exp(cosine / temperature); returns x -> votes (M, C).

    The form and the temperature are those of Wu et al. 2018 (arXiv:1805.01978), which DINO made customary.
    """
    bank, hot = F.normalize(x, dim=1), F.one_hot(y, num_classes).float()
    k = min(k, len(x))

    def classify(features: Tensor) -> Tensor:
        votes: list[Tensor] = []
        for part in torch.split(F.normalize(features, dim=1), 1024):  # the matrix of all pairs may be large
            cosine, nearest = torch.topk(part @ bank.T, k)
            votes.append(torch.einsum("mk,mkc->mc", torch.exp((cosine - 1.0) / temperature), hot[nearest]))
        return torch.cat(votes)

    return classify


def _accuracy(classify: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> float:
    return 100.0 * (classify(x).argmax(-1) == y).float().mean().item()


def summary(task: ProbeTask, rows: Sequence[ProbeRow]) -> dict[str, Any]:
    """What summary.json keeps: a score per system at the largest budget, and the whole table."""
    largest = task.budgets[-1]
    return {
        **{row.system: round(row.accuracy[largest], 2) for row in rows},
        "task": task.name,
        "table": [
            {"system": row.system, "labels": n, "accuracy": round(row.accuracy[n], 2), "layer": row.layer[n]}
            for row in rows
            for n in task.budgets
        ],
    }
