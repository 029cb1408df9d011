"""Runs d2v on a fixture of data2vec text 1.0 and holds everything recorded against it.

As `audio_checks`: the model is built from the fixture's own configuration, the way a run does, and ParityError is
raised where something deviates.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from d2v_core import schedules
from d2v_core.config import load_config
from d2v_core.contract import Batch, Masks
from d2v_core.data2vec import Data2Vec
from d2v_core.run import build_model, load_model_state, model_state
from d2v_core.transformer import TransformerOutput
from d2v_text import official
from d2v_text.masking import NOT_SELECTED
from d2v_text.modality import TextModality

from .compare import ACTIVATION, EMA, EXACT, GRADIENT, LOSS, ROUNDING, Comparison, Limit
from .finder import Fixture

PIPELINE = "pad elsewhere"  # in the recorder's words on what the teacher was given


def is_pipeline(fixture: Fixture) -> bool:
    """The teacher was given the label tensor."""
    return PIPELINE in fixture.meta["target_tokens"]


class Setup:
    """Modality and model of a configuration, with the recorded weights of student and teacher."""

    def __init__(self, c: Comparison) -> None:
        fixture = c.fixture
        words = official.config_from_official(fixture.config, vocab_size=fixture.meta["dictionary"]["size"])
        words.append(f"mask.teacher_input={'labels' if is_pipeline(fixture) else 'full'}")
        self.config, kind = load_config(words)
        modality = kind(self.config)
        assert isinstance(modality, TextModality)
        self.modality, self.model = modality, build_model(modality)
        layout = fixture.layout
        load_model_state(self.model, official.from_official(c.take_all(layout.student)), fixture.id)
        self.model.update_teacher(0.0)  # equal to the student, as a new teacher is
        try:
            self.model.teacher.load_own_state(official.teacher_from_official(c.take_all(layout.teacher)))
        except KeyError as error:
            c.fail("teacher", f"owns other tensors than the official one: {error}")
            c.finish()
        self.model.train()


class Seen:
    """What modules computed in one forward pass, caught on the way."""

    embed: Tensor
    teacher_padding: Tensor | None

    def __init__(self) -> None:
        self.student_blocks: dict[int, Tensor] = {}
        self.teacher_blocks: dict[int, Tensor] = {}
        self.teacher_ffn: dict[int, Tensor] = {}


@contextmanager
def watch(model: Data2Vec) -> Iterator[Seen]:
    seen = Seen()
    student: Any = model.student
    teacher: Any = model.teacher.module
    handles: list[Any] = []

    def block(i: int, blocks: dict[int, Tensor], ffn: dict[int, Tensor] | None) -> Any:
        def caught(module: nn.Module, args: tuple[Any, ...], out: tuple[Tensor, Tensor]) -> None:
            blocks[i] = out[0]
            if ffn is not None:
                ffn[i] = out[1]

        return caught

    def student_start(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.embed = args[0]

    def teacher_start(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.teacher_padding = args[1]

    handles.append(student.transformer.register_forward_pre_hook(student_start))
    handles.append(teacher.transformer.register_forward_pre_hook(teacher_start))
    for i in range(len(student.transformer.blocks)):
        handles.append(student.transformer.blocks[i].register_forward_hook(block(i, seen.student_blocks, None)))
        handles.append(
            teacher.transformer.blocks[i].register_forward_hook(block(i, seen.teacher_blocks, seen.teacher_ffn))
        )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def check_single_step(fixture: Fixture) -> Comparison:
    """Forward, loss, gradients, one EMA step, features in eval mode."""
    c, meta = Comparison(fixture), fixture.meta
    setup = Setup(c)
    model, modality, config = setup.model, setup.modality, setup.config
    recorded = fixture.tensors
    hidden = c.take("mask").bool()
    source, target_tokens = recorded["input.src_tokens"], recorded["input.target_tokens"]
    # The text itself: what the student sees where nothing is hidden, what the labels say where something is.
    text = torch.where(hidden, target_tokens, source)
    inputs = modality.collate([row[:length].numpy() for row, length in zip(text, meta["lengths"], strict=True)])
    fill = torch.where(hidden, torch.tensor(modality.vocabulary.mask), torch.tensor(NOT_SELECTED))
    masks = Masks.of(hidden, None, fill)
    c.tensor("input.src_tokens", inputs["ids"].where(~hidden, fill), EXACT)
    c.tensor("padding_mask", inputs["padding_mask"], EXACT)
    c.number("json mask", float(modality.vocabulary.mask), meta["dictionary"]["mask"], EXACT)
    teacher_inputs = modality.teacher_inputs(Batch(inputs, masks))
    c.tensor("input.target_tokens", (teacher_inputs or inputs)["ids"], EXACT)

    with watch(model) as seen:
        out = model(inputs, masks, teacher_inputs)
    c.tensor("student_embed", seen.embed, ACTIVATION)
    for name, ours in (
        ("student_layer.", seen.student_blocks),
        ("teacher_x.", seen.teacher_blocks),
        ("target_layer.", seen.teacher_ffn),
    ):
        c.tensors(name, {str(i): x for i, x in ours.items()}, ACTIVATION)
    blocks, ffn = ([of[i] for i in sorted(of)] for of in (seen.teacher_blocks, seen.teacher_ffn))
    full = model.targets(TransformerOutput(blocks[-1], ffn, blocks), seen.teacher_padding)
    c.tensor("target_full", full, ACTIVATION)
    c.tensor("target", out.target, ACTIVATION)
    c.tensor("pred", out.prediction, ACTIVATION)
    c.tensor("loss.main", out.loss_sum, LOSS)
    scalars = meta["scalars"]
    for name, number in (
        ("loss_main", out.loss_sum),
        ("sample_size", out.num_scored),
        ("loss_per_sample", out.loss_sum / out.num_scored),
    ):
        c.number(f"json {name}", number, scalars[name], LOSS)

    out.loss_sum.backward()
    gradients = official.gradients_to_official(model)
    for name in fixture.grad_norms.keys() | gradients.keys():
        limit = ROUNDING if name.endswith("k_proj.bias") else GRADIENT
        if f"grad.{name}" in recorded:
            c.tensor(f"grad.{name}", gradients.get(name), limit)
        ours = gradients.get(name)
        c.number(f"norm of grad.{name}", None if ours is None else ours.norm(), fixture.grad_norms.get(name), limit)

    model.student.eval()
    with torch.no_grad():
        tokens = model.student.encoder.embed({**inputs, "ids": source})
        c.tensor("eval.x", model.student(tokens, None)[1].x, ACTIVATION)

    steps, tight = config.train.max_steps, Limit(absolute=1e-12)
    for step, decay in meta["ema"]["decay_at_step"].items():
        c.number(f"json decay at {step}", schedules.decay_at(int(step), steps, config.teacher), decay, tight)
    decay = schedules.decay_at(meta["ema"]["num_updates"], steps, config.teacher)
    c.number("json decay", decay, meta["ema"]["decay"], tight)
    model.update_teacher(decay)
    after = fixture.layout.teacher_after
    ours_after = official.teacher_to_official(model.teacher.own_state())
    for name in ours_after.keys() - {name.removeprefix(after) for name in c.recorded(after)}:
        c.fail(after + name, "owned by our teacher only")
    c.tensors(after, ours_after, EMA)
    return c.finish()


def check_initialisation(fixture: Fixture) -> Comparison:
    """Mean and spread of every freshly made weight against the official ones."""
    c = Comparison(fixture)
    words = official.config_from_official(fixture.config, vocab_size=fixture.meta["dictionary"]["size"])
    config, kind = load_config(words)
    model = build_model(kind(config))

    ours = official.to_official(model_state(model))
    for name, recorded in fixture.meta["init_stats"].items():
        tensor = ours.get(name)
        if tensor is None or list(tensor.shape) != recorded["shape"]:
            c.fail(f"init {name}", f"shape {None if tensor is None else list(tensor.shape)}, not {recorded['shape']}")
            continue
        # Two independent samples of this many values: five standard errors of their difference.
        error = 5 * recorded["std"] * (2 / tensor.numel()) ** 0.5
        c.number(f"init mean {name}", tensor.mean(), recorded["mean"], Limit(absolute=error + 1e-7))
        c.number(f"init std {name}", tensor.std(), recorded["std"], Limit(absolute=error + 1e-7))
    return c
