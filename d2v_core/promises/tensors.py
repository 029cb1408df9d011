"""Promises on tensors: their shapes and types, and that padding and neighbours change nothing."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# torch leaves much of what is used here untyped.
from __future__ import annotations

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor

from d2v_core.contract import (
    Masks,
    Tokens,
)
from d2v_core.data2vec import Data2Vec
from d2v_core.promises.case import (
    TOLERANCE,
    Broken,
    Case,
    Mini,
    apart,
    form,
    predict,
    shape,
    valid,
)


def shapes(case: Case) -> str:
    """Tensors have the shapes and types that the contract gives them, from the layout to the predictions.

    The token grid is known before any network runs; masks are drawn from it. Where the two disagree, other tokens are
    hidden than those meant.
    """
    mini, model = case.mini, case.model
    rows = len(mini.samples)
    amount = case.modality.amount(mini.inputs)
    if not 0 < amount < math.inf:
        raise Broken(f"amount() of {rows} samples is {amount}; expected how many {case.modality.unit} they hold.")
    with torch.no_grad():
        tokens = model.student.encoder.embed(mini.inputs)
        _check_tokens(case, tokens)
        with torch.random.fork_rng(devices=[]):
            training = copy.deepcopy(model.student.encoder).train().embed(mini.inputs)
        if apart(training.x, tokens.x) > TOLERANCE:
            raise Broken(
                "embed() gives other values in training than in eval mode: it holds dropout, noise or a batch norm. "
                "The teacher may be given the same tokens, so dropout and noise belong into view()."
            )
        _check_view(case, tokens, None)
        masks = case.masks(mini.layouts, 2)
        view = _check_view(case, tokens, masks)
        _, encoded = model.student(tokens, masks)
        prediction = model.predictor(replace(view, x=encoded.x), masks)
    width = case.modality.config.model.embed_dim
    if prediction.shape != (len(masks.scored_rows), width):
        raise Broken(
            f"The predictor gives {shape(prediction)} for {len(masks.scored_rows)} scored tokens; expected "
            f"({len(masks.scored_rows)}, {width}), one row each, in the order of Masks.scored_rows."
        )
    if not prediction.isfinite().all():
        raise Broken("The predictor's output is not finite with the initial weights.")
    return " x ".join(map(str, tokens.x.shape))


def _check_tokens(case: Case, tokens: Tokens) -> None:
    mini, width = case.mini, case.encoder_module.content_dim or case.modality.config.model.embed_dim
    expected = (len(mini.samples), mini.num_tokens, width)
    if tokens.x.shape != expected:
        raise Broken(
            f"embed() gives x of shape {shape(tokens.x)}; layout() and model.embed_dim (or content_dim) say "
            f"{expected}: samples, tokens of the longest, width."
        )
    if tokens.x.dtype != torch.float32:
        raise Broken(f"embed() gives x as {tokens.x.dtype}; expected torch.float32 outside of autocast.")
    if math.prod(tokens.grid) != mini.num_tokens:
        raise Broken(f"embed() gives grid={tokens.grid}, whose product is not the {mini.num_tokens} tokens of x.")
    if tokens.num_extra or tokens.index is not None:
        raise Broken("embed() adds extra tokens or an index; both belong into view().")
    padded = torch.arange(mini.num_tokens) >= torch.tensor([layout.num_tokens for layout in mini.layouts])[:, None]
    if tokens.padding_mask is None:
        if padded.any():
            raise Broken(
                f"Samples of {[layout.num_tokens for layout in mini.layouts]} tokens stand in one batch, but embed() "
                "gives no padding_mask. Say which tokens are padding: (B, T) bool, True = padding."
            )
    elif tokens.padding_mask.dtype != torch.bool or tokens.padding_mask.shape != padded.shape:
        raise Broken(
            f"embed() gives padding_mask as {form(tokens.padding_mask)}; expected {tuple(padded.shape)} bool, "
            "True = padding."
        )
    elif len(mini.layouts[0].shape) == 1 and not torch.equal(tokens.padding_mask, padded):
        row = int((tokens.padding_mask != padded).any(1).nonzero()[0])
        raise Broken(
            f"embed() marks {int(tokens.padding_mask[row].sum())} tokens of sample {row} as padding, but by layout() "
            f"it has {mini.layouts[row].num_tokens} of {mini.num_tokens}. True = padding, behind the sample's own "
            "tokens; and collate() keeps the order of its samples."
        )


def _check_view(case: Case, tokens: Tokens, masks: Masks | None) -> Tokens:
    call = "view(tokens, None)" if masks is None else "view(tokens, masks)"
    encoder, heads = case.encoder_module, case.modality.config.model.num_heads
    view = encoder.view(tokens, masks)
    rows = len(tokens.x) * (1 if masks is None else masks.num_copies)
    count = tokens.x.shape[1] if masks is None or masks.visible is None else masks.visible.shape[2]
    expected = (rows, view.num_extra + count, case.modality.config.model.embed_dim)
    if view.x.shape != expected:
        raise Broken(
            f"{call} gives x of shape {shape(view.x)}; expected {expected}: "
            + ("samples" if masks is None else f"samples x {masks.num_copies} masked copies")
            + f", {view.num_extra} extra tokens + {count}, width."
        )
    if view.grid != tokens.grid:
        raise Broken(f"{call} gives grid={view.grid}; embed() gave {tokens.grid}, and that is what it stays.")
    if (tokens.padding_mask is not None) != (view.padding_mask is not None):
        raise Broken(f"{call} drops or invents the padding_mask that embed() gave.")
    if view.padding_mask is not None and view.padding_mask.shape != expected[:2]:
        raise Broken(f"{call} gives padding_mask of shape {shape(view.padding_mask)}; expected {expected[:2]}.")
    if masks is not None and masks.visible is not None:
        if view.index is None or not torch.equal(view.index, masks.visible.flatten(0, 1)):
            raise Broken(
                f"{call} must give index = masks.visible, (rows, V), so that others know where the tokens stand."
            )
    elif view.index is not None:
        raise Broken(f"{call} gives an index, but all tokens stand there in order.")
    bias = encoder.attention_bias(view)
    layers = case.modality.config.model.num_layers
    if bias is not None and not isinstance(bias, Tensor) and len(bias) != layers:
        raise Broken(
            f"attention_bias() gives {len(bias)} biases for {layers} blocks; expected one for all or one each."
        )
    for one in [] if bias is None else [bias] if isinstance(bias, Tensor) else bias:
        full = (rows, heads, expected[1], expected[1])
        if one.dim() != 4 or any(a not in (1, b) for a, b in zip(one.shape, full, strict=True)):
            raise Broken(f"attention_bias() gives {shape(one)}; expected what can be broadcast to {full}.")
    return view


def padding(case: Case) -> str:
    """More padding behind a sample, or other samples beside it, leave its outputs equal.

    Otherwise what a network says of a sample depends on its neighbours in the batch, and a trained network answers
    differently to a sample that comes alone.
    """
    mini, model = case.mini, case.stirred
    short, both = case.of(mini.samples[:1]), case.of(mini.samples[:2])
    length, width = short.num_tokens, both.num_tokens
    masks = case.masks(both.layouts, 1)
    alone = _cut_masks(masks, length)
    with torch.no_grad():
        for view, own, joint in (("the teacher's view", None, None), ("the student's view", alone, masks)):
            results: list[tuple[Tokens, Tensor]] = []
            for batch, given in ((short, own), (both, joint)):
                tokens = model.student.encoder.embed(batch.inputs)
                seen, encoded = model.student(tokens, given)
                results.append((seen, encoded.x))
            stages = [("embed() and view()", [seen.x[0] for seen, _ in results])]
            stages.append(("the transformer", [x[0] for _, x in results]))
            for stage, (a, b) in stages:
                a = a[valid(results[0][0], 0)]
                b = b[valid(results[1][0], 0)]
                if a.shape != b.shape:
                    raise Broken(
                        f"In {view}, a sample of {length} tokens has {len(a)} valid ones alone and {len(b)} beside one "
                        f"of {width}."
                    )
                distance = apart(a, b)
                if distance > TOLERANCE:
                    raise Broken(
                        f"In {view}, a sample of {length} tokens gives other values after {stage} when it stands "
                        f"beside one of {width} tokens: {distance:.1e} of their size apart, {TOLERANCE:.0e} is rounding"
                        ". Keep padding out of means, norms and convolutions (set it to zero before each), mark it in "
                        "padding_mask, let no sample look at another, and keep the order of samples in collate()."
                    )
        _padding_in_predictions(model, both, masks)
    if width == length:
        return "all samples have the same size: compared alone and in company"
    return f"{length} tokens alone and padded to {width}"


def _padding_in_predictions(model: Data2Vec, both: Mini, masks: Masks) -> None:
    """What stands at padded places of the student's output changes no prediction."""
    view, encoded = model.student(model.student.encoder.embed(both.inputs), masks)
    if view.padding_mask is None:
        return
    noise = torch.randn(encoded.x.shape, generator=torch.Generator().manual_seed(1))
    changed = torch.where(view.padding_mask.unsqueeze(-1), encoded.x + noise, encoded.x)
    one, two = (predict(model, view, x, masks) for x in (encoded.x, changed))
    if apart(one, two) > TOLERANCE:
        raise Broken(
            f"Predictions depend on what stands at padded places: {apart(one, two):.1e} of their size. The predictor "
            "must keep padding out, for example by setting it to zero before every convolution."
        )


def _cut_masks(masks: Masks, length: int) -> Masks:
    """Of the first sample alone, without its padding."""
    visible = masks.visible
    if visible is not None:
        visible = visible[:1][visible[:1] < length].reshape(1, masks.num_copies, -1)
    fill = None if masks.fill is None else masks.fill[:1, :, :length]
    return Masks.of(masks.hidden[:1, :, :length], masks.scored[:1, :, :length], fill, visible)
