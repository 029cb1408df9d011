"""Promises on what student and teacher see, and on what the loss reaches."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch leaves much of what is used here untyped.
from __future__ import annotations

import copy
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor

from d2v_core import run
from d2v_core.contract import (
    FeatureEncoder,
    Masks,
    Tokens,
)
from d2v_core.promises.case import (
    SAME,
    Broken,
    Case,
    NothingToCheck,
    apart,
    predict,
    valid,
)
from d2v_core.teacher import part_of

MOST_ALIKE = 0.1  # of the pairs of tokens: a convolution over places may be narrower than a long row of hidden ones


def hiding(case: Case) -> str:
    """What is hidden does not reach the student, what is visible does, and the teacher sees everything.

    A student that can see what it is asked for learns to copy: its loss is splendid and its features are worth nothing.
    """
    mini, model = case.mini, case.stirred
    encoder = model.student.encoder
    masks = case.masks(mini.layouts, 2)
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        tokens = encoder.embed(mini.inputs)
        seen, whole = encoder.view(tokens, masks), encoder.view(tokens, None)
        encoder.embed(case.of([mini.samples[1]] * 2).inputs)
        if apart(encoder.view(tokens, masks).x, seen.x) > SAME:
            raise Broken(
                "view(tokens, masks) gives something else after embed() was called with other samples: the encoder "
                "keeps something of its last input. What a view shows must follow from tokens and masks alone."
            )
        for copy_ in range(masks.num_copies):
            rows = slice(copy_, None, masks.num_copies)
            hidden = masks.hidden[:, copy_]
            changed = _changed(tokens, hidden, noise)
            other, everything = encoder.view(changed, masks), encoder.view(changed, None)
            if apart(other.x[rows], seen.x[rows]) > SAME or _bias_apart(encoder, other, seen, rows) > SAME:
                raise Broken(
                    "Changing the content of hidden tokens changes what the student is given"
                    + (f" (copy {copy_}; the copies of a sample stand together)" if copy_ else "")
                    + ". Replace or zero hidden tokens before anything mixes tokens (positions by convolution, norms "
                    "over time, attention bias), and for visible-only students gather afterwards."
                )
            if hidden.any() and apart(everything.x, whole.x) <= SAME:
                raise Broken(
                    "Changing hidden tokens changes nothing in view(tokens, None): the teacher must see all tokens, "
                    "and with None nothing is hidden."
                )
            valid = torch.ones_like(hidden) if tokens.padding_mask is None else ~tokens.padding_mask
            shown = encoder.view(_changed(tokens, ~hidden & valid, noise), masks)
            if apart(shown.x[rows], seen.x[rows]) <= SAME:
                raise Broken(
                    "Changing the visible tokens changes nothing of what the student is given: it sees no content at "
                    "all."
                )
    return f"{int(masks.hidden.sum())} hidden tokens"


def _changed(tokens: Tokens, where: Tensor, noise: torch.Generator) -> Tokens:
    """Other content at (B, T) places."""
    other = tokens.x.std() * 3 * torch.randn(tokens.x.shape, generator=noise)
    return replace(tokens, x=torch.where(where.unsqueeze(-1), other, tokens.x))


def _bias_apart(encoder: FeatureEncoder, one: Tokens, two: Tokens, rows: slice) -> float:
    biases = [encoder.attention_bias(view) for view in (one, two)]
    lists = [[] if b is None else [b] if isinstance(b, Tensor) else list(b) for b in biases]
    pairs = [[a[rows] if len(a) > 1 else a for a in biases] for biases in lists]
    return max((apart(a, b) for a, b in zip(*pairs, strict=True)), default=0.0)


def place(case: Case) -> str:
    """A token that shows no content of its own still knows its place.

    Two hidden tokens without a place are the same question with two answers; of visible tokens, the order would be
    lost. Where the student sees visible tokens only, they are compared with one content in all of them.
    """
    mini, model = case.mini, case.stirred
    masks = case.masks(mini.layouts, 1)
    with torch.no_grad():
        tokens = model.student.encoder.embed(mini.inputs)
        if case.visible_only:
            tokens = replace(tokens, x=tokens.x[:, :1].expand_as(tokens.x))
        view, encoded = model.student(tokens, masks)
    x = encoded.x[:, view.num_extra :]
    pairs = [
        (row, a, b)
        for row in range(len(x))
        for places in _without_content(case, masks, view, row)
        for a, b in combinations(places[:40], 2)
    ]
    if not pairs:
        raise NothingToCheck("no two hidden tokens in one sample")
    alike = [(row, a, b) for row, a, b in pairs if apart(x[row, a], x[row, b]) < SAME]
    what = "visible tokens of one content" if case.visible_only else "hidden tokens"
    if len(alike) > MOST_ALIKE * len(pairs):
        row, a, b = alike[0]
        raise Broken(
            f"Of {len(pairs)} pairs of {what}, {len(alike)} come out of the transformer alike, such as numbers {a} and "
            f"{b} of sample {row}. Nothing tells the student where they stand. Add positions after hiding (view), over "
            "a field wider than what is hidden in one piece, or give an attention_bias."
        )
    return f"{len(pairs)} pairs of {what}" + (f", {len(alike)} of them alike" if alike else "")


def _without_content(case: Case, masks: Masks, view: Tokens, row: int) -> list[list[int]]:
    """Groups of places in the view of which each has tokens that only their place can tell apart."""
    if case.visible_only:
        return [valid(view, row)[view.num_extra :].nonzero().flatten().tolist()]
    places: list[int] = masks.hidden[row, 0].nonzero().flatten().tolist()
    if masks.fill is None:
        return [places]
    groups: dict[int, list[int]] = {}
    for one in places:
        groups.setdefault(int(masks.fill[row, 0, one]), []).append(one)
    return list(groups.values())


def teacher(case: Case) -> str:
    """Every parameter has a part in the teacher, and `embed` uses those under `self.embedding` and no others.

    The teacher is given the student's tokens where the embedding is shared; a parameter of `embed` that lies elsewhere
    would then be followed wrongly, and a misspelled prefix would never be noticed.
    """
    parts = case.modality.teacher_parts()
    names = [name for name, _ in run.build_student(case.modality).named_parameters()]
    for prefix, part in parts.items():
        if part not in ("average", "copy", "share"):
            raise Broken(f"teacher_parts() says {part!r} for {prefix!r}; expected average, copy or share.")
        if prefix and not any(name == prefix or name.startswith(prefix + ".") for name in names):
            raise Broken(
                f"teacher_parts() names {prefix!r}, but no parameter of the student begins like that. They begin with "
                f"encoder. or transformer., for example {names[0]!r}."
            )
    for name in names:
        try:
            part_of(name, parts)
        except KeyError as error:
            raise Broken(f"teacher_parts(): {error.args[0]}") from error
    model = copy.deepcopy(case.stirred)
    encoder = model.student.encoder
    _weighted_sum(encoder.embed(case.mini.inputs).x).backward()
    outside = [name for name, p in encoder.named_parameters() if p.grad is not None and p.grad.any()
               and not name.startswith("embedding.")]  # fmt: skip
    if outside:
        raise Broken(
            f"embed() uses the parameter {outside[0]!r}, which lies outside of self.embedding. Put what embed() needs "
            "into the module self.embedding, or use it in view()."
        )
    return ", ".join(f"{prefix or 'the rest'} {part}" for prefix, part in parts.items())


def _weighted_sum(x: Tensor) -> Tensor:
    """A scalar of which no gradient is zero by symmetry, as that of a plain sum after a norm is."""
    return (x * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))).sum()


def gradients(case: Case) -> str:
    """The loss reaches every parameter of the feature encoder and the predictor.

    A parameter without a gradient keeps its initial value for ever: it was forgotten in `embed` or `view`, or something
    before it detaches.
    """
    model = copy.deepcopy(case.stirred).train()
    for seed in range(3):
        torch.manual_seed(seed)
        model(*case.batch(seed)).loss_sum.backward()
    parts = {"encoder": model.student.encoder, "predictor": model.predictor}
    parameters = {f"{part}.{name}": p for part, module in parts.items()
                  for name, p in module.named_parameters() if p.requires_grad and p.numel()}  # fmt: skip
    without = [name for name, p in parameters.items() if p.grad is None or not p.grad.any()]
    if without:
        raise Broken(
            f"No gradient reaches {', '.join(without[:3])}"
            + (f" and {len(without) - 3} more" if len(without) > 3 else "")
            + ". Use it on the way from embed() to the predictions, look for detach() or no_grad(), or set its "
            "requires_grad to False if it is meant to stay."
        )
    infinite = [name for name, p in parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
    if infinite:
        raise Broken(
            f"The gradient of {infinite[0]} is not finite. Look for what is divided by zero, or the root of zero."
        )
    return f"{len(parameters)} tensors"


def predictions(case: Case) -> str:
    """Each prediction stands in the row of its token and depends on its own masked copy alone.

    Predictions and targets are matched by order; a row too early or too late, and the student learns its neighbour's
    target.
    """
    mini, model = case.mini, case.stirred
    masks = case.masks(mini.layouts, 2)
    noise = torch.Generator().manual_seed(4)
    with torch.no_grad():
        view, encoded = model.student(model.student.encoder.embed(mini.inputs), masks)
        before = predict(model, view, encoded.x, masks)
        owner = masks.scored_rows // masks.hidden.shape[2]
        for row in range(len(encoded.x)):
            x = encoded.x.clone()
            x[row] += torch.randn(x[row].shape, generator=noise)
            moved = (predict(model, view, x, masks) - before).abs().amax(1) > SAME * before.abs().max()
            own = moved[owner == row]
            if moved[owner != row].any() or (len(own) and not own.any()):
                raise Broken(
                    f"Changing the student's output in row {row} (sample {row // masks.num_copies}, copy "
                    f"{row % masks.num_copies}) changes predictions of other rows, or none of its own. Predictions "
                    "must come in the order of Masks.scored_rows, which counts (sample, copy, token) row by row."
                )
    return f"{len(before)} predictions"
