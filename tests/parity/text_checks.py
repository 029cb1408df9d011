"""Runs d2v on a fixture of data2vec text 1.0 and holds everything recorded against it.

As `audio_checks`: the model is built from the fixture's own configuration, the way a run does, and ParityError is
raised where something deviates.
"""

from __future__ import annotations

import torch

from d2v_core import schedules
from d2v_core.config import load_config
from d2v_core.contract import Batch, Masks
from d2v_core.run import build_model, model_state
from d2v_text import official
from d2v_text.masking import NOT_SELECTED
from d2v_text.modality import TextModality

from .compare import ACTIVATION, EMA, EXACT, GRADIENT, LOSS, ROUNDING, Comparison, Limit
from .finder import Fixture
from .models import by_block, compare_initial, compare_teacher, load_recorded, watch

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
        load_recorded(
            c, self.model, official.from_official(c.take_all(layout.student)),
            official.teacher_from_official(c.take_all(layout.teacher)),
        )  # fmt: skip


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
    c.tensor("student_embed", seen["student"].args[0], ACTIVATION)
    student, _ = by_block(seen, "student")
    teacher, ffn = by_block(seen, "teacher")
    for name, ours in (("student_layer.", student), ("teacher_x.", teacher), ("target_layer.", ffn)):
        c.tensors(name, {str(i): x for i, x in ours.items()}, ACTIVATION)
    full = model.targets(seen["teacher"].out, seen["teacher"].args[1])
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
    compare_teacher(c, fixture.layout.teacher_after, model, official.teacher_to_official, EMA)
    return c.finish()


def check_initialisation(fixture: Fixture) -> Comparison:
    """Mean and spread of every freshly made weight against the official ones."""
    c = Comparison(fixture)
    words = official.config_from_official(fixture.config, vocab_size=fixture.meta["dictionary"]["size"])
    config, kind = load_config(words)
    model = build_model(kind(config))

    ours = official.to_official(model_state(model))
    compare_initial(c, ours, fixture.meta["init_stats"], 1e-7)
    return c
