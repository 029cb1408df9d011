"""Runs d2v on a fixture of data2vec 2.0, of whatever modality, and holds everything recorded against it.

The model is built from the fixture's own configuration, the way a run does. Masks, kept places and the decoder's noise
are fed as they were recorded: the official draws depend on another generator, and mask statistics are compared apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from d2v_audio import official2 as audio_names
from d2v_audio.data import AudioSample
from d2v_core import schedules
from d2v_core.config import RunConfig, load_config, parse_arguments
from d2v_core.contract import Layout, Masks, Modality, Tokens
from d2v_core.data2vec import Data2Vec, channel_std, mean_of_tokens
from d2v_core.decoder import ConvDecoder, DecoderConfig
from d2v_core.errors import UserError
from d2v_core.keyed import generator
from d2v_core.official2 import Names
from d2v_core.run import build_model, load_model_state, model_state
from d2v_core.visible import PrenetConfig
from d2v_text import official2 as text_names
from d2v_vision import official2 as image_names

from .compare import ACTIVATION, EMA, EXACT, GRADIENT, LOSS, Comparison, Limit
from .finder import Fixture
from .models import compare_initial


@dataclass(frozen=True)
class Form:
    """What is a modality's own in a fixture.

    inputs: from the recorded ones, by the modality's own collate. constants: recorded among the weights, but computed
    here. local_features: content as the official code has it, from what `embed` gives.
    """

    words: Callable[[Fixture], list[str]]
    names: Callable[[RunConfig], Names]
    inputs: Callable[[Comparison, Modality[Any]], Mapping[str, Tensor]]
    constants: Callable[[Data2Vec], Mapping[str, Tensor]] = lambda model: {}
    local_features: Callable[[Data2Vec, Tokens], Tensor] = lambda model, tokens: tokens.x


def audio_inputs(c: Comparison, modality: Modality[Any]) -> Mapping[str, Tensor]:
    source = c.take("input.source")
    lengths = [source.shape[1]] * len(source)
    if "input.padding_mask" in c.fixture.tensors:
        lengths = (c.take("input.padding_mask") == 0).sum(1).tolist()
    inputs = modality.collate([AudioSample(row[:n].numpy()) for row, n in zip(source, lengths, strict=True)])
    if not torch.equal(inputs["waveform"], source):
        c.fail("input.source", "collating the samples gives another waveform")
    return inputs


def image_inputs(c: Comparison, modality: Modality[Any]) -> Mapping[str, Tensor]:
    return {"image": c.take("input.source")}  # normalised as it was recorded


def image_constants(model: Data2Vec) -> Mapping[str, Tensor]:
    encoder: Any = model.student.encoder
    return {image_names.POSITIONS: encoder.positions.unsqueeze(0)}


def text_inputs(c: Comparison, modality: Modality[Any]) -> Mapping[str, Tensor]:
    ids, padding = c.take("input.source"), c.take("input.padding_mask").bool()
    inputs = modality.collate([row[~pad].numpy() for row, pad in zip(ids, padding, strict=True)])
    _compare_padding(c, "input.padding_mask", inputs.get("padding_mask"))
    c.tensor("input.source", inputs["ids"], EXACT)
    return inputs


def _vocab_size(fixture: Fixture) -> int:
    return len(fixture.tensors["student.modality_encoders.TEXT.local_encoder.embed_tokens.weight"])


FORMS: dict[str, Form] = {
    "AUDIO": Form(lambda fixture: audio_names.config_from_official(fixture.config), audio_names.names, audio_inputs),
    "TEXT": Form(
        lambda fixture: text_names.config_from_official(fixture.config, vocab_size=_vocab_size(fixture)),
        text_names.names,
        text_inputs,
    ),
    "IMAGE": Form(
        lambda fixture: image_names.config_from_official(fixture.config),
        image_names.names,
        image_inputs,
        image_constants,
    ),
}


def form_of(fixture: Fixture) -> Form:
    return FORMS[kind_of(fixture)]


def kind_of(fixture: Fixture) -> str:
    """AUDIO, IMAGE or TEXT."""
    return fixture.config["modality"]["type"].removeprefix("Modality.")


class Setup:
    """Modality and model of a configuration, with the recorded weights of student and teacher. changes: options that
    come after the fixture's own."""

    def __init__(self, c: Comparison, changes: Mapping[str, str] | None = None) -> None:
        self.form = form_of(c.fixture)
        options = {**parse_arguments(self.form.words(c.fixture)), **(changes or {})}
        self.config, kind = load_config([f"{key}={value}" for key, value in options.items()])
        self.modality = kind(self.config)
        self.model, self.names = build_model(self.modality), self.form.names(self.config)
        layout, self.constants = c.fixture.layout, self.form.constants(self.model)
        for name, ours in self.constants.items():  # loaded with the weights there, computed here
            c.tensor(layout.student + name, ours, ACTIVATION)
            c.tensor(layout.teacher + name, ours, ACTIVATION)
            c.tensor(layout.teacher_after + name, ours, ACTIVATION)
        student = self.names.from_official(c.take_all(layout.student), tuple(self.constants))
        load_model_state(self.model, student, c.fixture.id)
        self.model.update_teacher(0.0)  # equal to the student, as a new teacher is
        teacher = self.names.teacher_from_official(c.take_all(layout.teacher), tuple(self.constants))
        try:
            self.model.teacher.load_own_state(teacher)
        except KeyError as error:
            c.fail("teacher", f"owns other tensors than the official one: {error}")
            c.finish()
        self.model.train()

    def masks(self, c: Comparison) -> Masks:
        copies = self.config.train.num_masks
        hidden, kept = c.take("mask").bool(), c.take("ids_keep")
        masks = Masks.of(hidden.unflatten(0, (-1, copies)), visible=kept.unflatten(0, (-1, copies)))
        if "input.precomputed_mask" in c.fixture.tensors:
            c.tensor("input.precomputed_mask", masks.hidden.flatten(0, 1).float(), EXACT)
        return masks


def feed_noise(c: Comparison, model: Data2Vec) -> None:
    """The recorded noise, which stands in the order of `ids_restore`, at its places."""
    restore, drawn = c.take("ids_restore"), c.take("decoder_mask_tokens")
    rank = restore - c.fixture.tensors["ids_keep"].shape[1]
    places = torch.take_along_dim(drawn, rank.clamp(min=0).unsqueeze(-1), 1)
    noise = places * (rank >= 0).unsqueeze(-1)
    predictor: Any = model.predictor
    predictor.noise = lambda like, num_tokens: noise


@contextmanager
def watch(model: Data2Vec) -> Iterator[dict[str, Any]]:
    """What modules were given and gave, by name: (arguments, result)."""
    seen: dict[str, Any] = {}
    student: Any = model.student
    teacher: Any = model.teacher.module
    predictor: Any = model.predictor
    handles: list[Any] = []

    def keep(module: nn.Module, name: str) -> None:
        def caught(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            seen[name] = (args, out)

        handles.append(module.register_forward_hook(caught))

    for whose, network in (("student", student), ("teacher", teacher)):
        keep(network.transformer, whose)
        for i, block in enumerate(network.transformer.blocks):
            keep(block, f"{whose}.{i}")
    for i, block in enumerate(predictor.blocks):
        keep(block, f"decoder.{i}")
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def check_single_step(fixture: Fixture, changes: Mapping[str, str] | None = None) -> Comparison:
    """Forward, targets, losses, gradients, one EMA step, features in eval mode."""
    c, meta, names = Comparison(fixture), fixture.meta, fixture.tensors
    setup = Setup(c, changes)
    model, config, modality = setup.model, setup.config, setup.modality
    inputs, masks = setup.form.inputs(c, modality), setup.masks(c)
    for name in ("input.id",):  # seeds of the official draw, whose result is `mask`
        if name in names:
            c.take(name)
    feed_noise(c, model)
    with watch(model) as seen:
        out = model(inputs, masks)
    _compare_forward(c, setup, seen, masks)
    tokens = model.student.encoder.embed(inputs)
    everywhere = model.teach(tokens, inputs)
    c.tensor("local_features", setup.form.local_features(setup.model, tokens), ACTIVATION)
    c.tensor("target_full", everywhere, ACTIVATION)
    c.tensor("target", out.target, ACTIVATION)
    c.tensor("pred", out.prediction, ACTIVATION)
    scored_only = model.loss(out.prediction, out.target)
    losses = {"total": out.loss_sum, f"{kind_of(fixture)}_regression": scored_only}
    if config.loss.cls_weight:
        in_front = seen["student"][1].x[:, 0]
        mean = mean_of_tokens(everywhere, tokens.padding_mask).repeat_interleave(config.train.num_masks, 0)
        c.tensor("cls.pred", in_front, ACTIVATION)
        c.tensor("cls.target", mean, ACTIVATION)
        losses["cls"] = model.loss.of_rows(in_front, mean, out.num_scored)
    c.tensors("loss.", losses, LOSS)
    if kind_of(fixture) != "AUDIO" or "input.precomputed_mask" in names:  # else another kind of mask was recorded
        rngs = [generator(0, "mask", i) for i in range(len(everywhere))]
        drawn = modality.masking()([Layout(tokens.grid)] * len(rngs), masks.num_copies, rngs)
        for counts, whose in ((drawn.hidden.sum(-1), "drawn"), (masks.hidden.sum(-1), "recorded")):
            if len(counts.unique()) > 1:
                c.fail("mask", f"rows of the {whose} mask hide different numbers of tokens")
        c.number("hidden tokens in a row", drawn.hidden[0, 0].sum(), int(masks.hidden[0, 0].sum()), EXACT)
    scalars = meta["scalars"]
    for name, ours, limit in (
        ("loss_total_sum", out.loss_sum, LOSS),
        ("sample_size", out.num_scored, EXACT),
        ("loss_total_per_sample", out.loss_sum / out.num_scored, LOSS),
        ("masked_pct", masks.hidden.double().mean(), Limit(absolute=1e-7)),
        ("target_var", channel_std(out.target), ACTIVATION),
        ("pred_var", channel_std(out.prediction), ACTIVATION),
    ):
        c.number(f"json {name}", ours, scalars[name], limit)
    for name, recorded in scalars["loss_sum"].items():
        c.number(f"json loss_sum {name}", losses.get(name), recorded, LOSS)

    out.loss_sum.backward()
    gradients = setup.names.gradients_to_official(model)
    for name in gradients.keys() | fixture.grad_norms.keys():
        ours = gradients.get(name)
        c.number(f"norm of grad.{name}", None if ours is None else ours.norm(), fixture.grad_norms.get(name), GRADIENT)
    c.tensors("grad.", gradients, GRADIENT)

    _compare_eval(c, setup, inputs)
    _compare_teacher(c, setup)
    return c.finish()


def _compare_forward(c: Comparison, setup: Setup, seen: Mapping[str, Any], masks: Masks) -> None:
    config, decoder = setup.config, setup.model.predictor
    assert isinstance(decoder, ConvDecoder)
    (student_in, student_padding, student_bias, _), _ = seen["student"]
    (teacher_in, teacher_padding, teacher_bias, _), _ = seen["teacher"]
    num_extra = teacher_in.shape[1] - masks.hidden.shape[2]
    c.tensor("student_in", student_in, ACTIVATION)
    c.tensor("teacher_in", teacher_in, ACTIVATION)
    _compare_padding(c, "student_padding_mask", student_padding)
    _compare_padding(c, "teacher_padding_mask", teacher_padding)
    tap = 1 if config.target.tap == "ffn" else 0
    for i in range(config.model.num_layers):
        c.tensor(f"student_layer.{i}", seen[f"student.{i}"][1][0], ACTIVATION)
        c.tensor(f"teacher_x.{i}", seen[f"teacher.{i}"][1][0], ACTIVATION)
        c.tensor(f"target_layer.{i}", seen[f"teacher.{i}"][1][tap][:, num_extra:], ACTIVATION)
    if "alibi_unscaled" in c.fixture.tensors:
        _compare_alibi(c, setup, {"student": student_bias, "teacher": teacher_bias})
    c.tensor("decoder_in", seen["decoder.0"][0][0], ACTIVATION)
    for i in range(len(decoder.blocks)):
        (x, grid), raw = seen[f"decoder.{i}"]
        c.tensor(f"decoder_block_raw.{i}", raw.transpose(1, 2).unflatten(2, grid), ACTIVATION)
    last = x + raw if config.section("decoder", DecoderConfig).residual and x.shape == raw.shape else raw
    c.tensor("decoder_out", decoder.project(last), ACTIVATION)


def _compare_padding(c: Comparison, name: str, ours: Tensor | None) -> None:
    """None says that nothing is padded; recorded is then nothing, or False everywhere."""
    recorded = c.fixture.tensors.get(name)
    if recorded is not None:
        c.tensor(name, torch.zeros_like(recorded) if ours is None else ours, EXACT)
    elif ours is not None:
        c.fail(name, "nothing was recorded as padded")


def _compare_alibi(c: Comparison, setup: Setup, biases: Mapping[str, Any]) -> None:
    """Where each block has a scale of its own, biases were recorded before it."""
    networks: dict[str, Any] = {"student": setup.model.student, "teacher": setup.model.teacher.module}
    for whose, bias in biases.items():
        alibi, recorded = networks[whose].encoder.alibi, c.fixture.tensors[f"{whose}_alibi_bias"]
        if isinstance(bias, list):
            scale = alibi.scale.clamp(min=0).view(alibi.layers, -1, 1, 1)
            bias = bias[0] / scale[setup.config.section("prenet", PrenetConfig).layers]
        c.tensor(f"{whose}_alibi_bias", bias.expand(len(recorded), -1, -1, -1), ACTIVATION)
    num_tokens = c.fixture.tensors["alibi_unscaled"].shape[1]
    in_order = Tokens(torch.zeros(1, num_tokens, 1), None, (num_tokens,))
    c.tensor("alibi_unscaled", networks["student"].encoder.alibi.unscaled(in_order)[0], ACTIVATION)


def _compare_eval(c: Comparison, setup: Setup, inputs: Mapping[str, Tensor]) -> None:
    model, config = setup.model, setup.config
    model.eval()
    with torch.no_grad():
        view, encoded = model.student(model.student.encoder.embed(inputs), None, taps=True)
    model.train()
    c.tensor("eval.x", encoded.x, ACTIVATION)
    taps = encoded.ffn if config.target.tap == "ffn" else encoded.blocks
    c.tensors("eval.layer_results.", {str(i): tap for i, tap in enumerate(taps)}, ACTIVATION)
    _compare_padding(c, "eval.padding_mask", view.padding_mask)


def _compare_teacher(c: Comparison, setup: Setup) -> None:
    ema, config = c.fixture.meta["ema"], setup.config
    for step, decay in {**ema["decay_at_step"], ema["num_updates"]: ema["decay"]}.items():
        ours = schedules.decay_at(int(step), config.train.max_steps, config.teacher)
        c.number(f"json decay_at_step {step}", ours, decay, Limit(absolute=1e-12))
    setup.model.update_teacher(schedules.decay_at(ema["num_updates"], config.train.max_steps, config.teacher))
    after = c.fixture.layout.teacher_after
    try:
        ours = setup.names.teacher_to_official(setup.model.teacher.own_state())
    except UserError as error:
        c.fail(f"{after}*", str(error))
        return
    recorded = {name.removeprefix(after) for name in c.recorded(after)}
    for name in ours.keys() - recorded:
        c.fail(after + name, "owned by our teacher only")
    for name in recorded - setup.constants.keys():
        c.tensor(after + name, ours.get(name), EMA)


def check_initialisation(fixture: Fixture) -> Comparison:
    """Mean, spread and reach of every freshly made weight against the official ones."""
    c, form = Comparison(fixture), form_of(fixture)
    config, kind = load_config(form.words(fixture))
    model = build_model(kind(config))
    ours = {**form.names(config).to_official(model_state(model)), **form.constants(model)}
    for name in ours.keys() ^ fixture.meta["init_stats"].keys():
        c.fail(f"init {name}", "a weight of one side only")
    compare_initial(c, ours, fixture.meta["init_stats"], 1e-6)
    for name, recorded in fixture.meta["init_stats"].items():
        tensor = ours.get(name)
        # Uniform weights end at 1.7 standard deviations, normal ones go beyond 2.5.
        if tensor is not None and tensor.numel() >= 500 and recorded["std"] > 0:
            normal = recorded["max"] > 2.2 * recorded["std"]
            if bool(tensor.max() > 2.2 * tensor.std()) != normal:
                c.fail(f"init of {name}", f"should be {'normal' if normal else 'uniform'}")
    return c
