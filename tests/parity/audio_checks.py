"""Runs d2v on a fixture of data2vec audio 1.0 and holds everything recorded against it.

Each check builds the model from the fixture's own configuration, the way a run does, and raises ParityError where
something deviates. The parity tests expect them to pass, the tests with planted faults to raise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from d2v_audio import official
from d2v_audio.data import AudioSample
from d2v_audio.modality import AudioModality
from d2v_core import schedules
from d2v_core.config import RunConfig, load_config, parse_arguments
from d2v_core.contract import Batch, Masks, Tokens
from d2v_core.data2vec import Data2Vec
from d2v_core.errors import UserError
from d2v_core.run import build_model, load_model_state, model_state
from d2v_core.trainer import Updater
from d2v_core.transformer import TransformerOutput

from .compare import (
    ACTIVATION,
    AMPLIFIED,
    EMA,
    GRADIENT,
    LOSS,
    LOSS_OF_UPDATE,
    ROUNDING,
    UPDATED_WEIGHT,
    Comparison,
    Limit,
)
from .finder import Fixture

DEVICE = torch.device("cpu")


class Setup:
    """Modality and model of a configuration, with the recorded weights of the student and, where there are any, of
    the teacher. changes: options that come after the fixture's own."""

    def __init__(
        self, c: Comparison, changes: Mapping[str, str] | None = None, official_changes: Mapping[str, Any] | None = None
    ) -> None:
        words = official.config_from_official({**c.fixture.config, **(official_changes or {})})
        options = {**parse_arguments(words), **(changes or {})}
        self.config, kind = load_config([f"{key}={value}" for key, value in options.items()])
        modality = kind(self.config)
        assert isinstance(modality, AudioModality)
        self.modality, self.model = modality, build_model(modality)
        layout = c.fixture.layout
        load_model_state(self.model, official.from_official(c.take_all(layout.student), self.config), c.fixture.id)
        self.model.update_teacher(0.0)  # equal to the student, as a new teacher is
        teacher = c.take_all(layout.teacher)
        if teacher:
            try:
                self.model.teacher.load_own_state(official.teacher_from_official(teacher, self.config))
            except KeyError as error:
                c.fail("teacher", f"owns other tensors than the official one: {error}")
                c.finish()
        self.model.train()

    def inputs(self, source: Tensor, padding_mask: Tensor | None = None) -> Mapping[str, Tensor]:
        """Put together as the loader does it."""
        lengths = [source.shape[1]] * len(source) if padding_mask is None else (~padding_mask).sum(1).tolist()
        return self.modality.collate([AudioSample(row[:n].numpy()) for row, n in zip(source, lengths, strict=True)])


class Seen:
    """What modules computed in one forward pass, caught on the way."""

    conv_features: Tensor
    tokens: Tokens
    positions_input: Tensor
    positions: Tensor
    student_x: Tensor
    teacher_x: Tensor

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

    def after(module: nn.Module, then: Callable[[tuple[Any, ...], Any], None]) -> None:
        handles.append(module.register_forward_hook(lambda _module, args, out: then(args, out)))

    def embedding_norm(args: tuple[Any, ...], out: Any) -> None:
        seen.conv_features = args[0]

    def embedding(args: tuple[Any, ...], out: Tokens) -> None:
        seen.tokens = out

    def positions(args: tuple[Any, ...], out: Tensor) -> None:
        seen.positions_input, seen.positions = args[0], out

    def student_end(args: tuple[Any, ...], out: TransformerOutput) -> None:
        seen.student_x = out.x

    after(student.encoder.embedding.norm, embedding_norm)
    after(student.encoder.embedding, embedding)
    after(student.encoder.positions, positions)
    after(student.transformer, student_end)
    last = len(student.transformer.blocks) - 1

    def catch_block(i: int, whose: str) -> Callable[[tuple[Any, ...], Any], None]:
        def caught(args: tuple[Any, ...], out: tuple[Tensor, Tensor]) -> None:
            if whose == "student":
                seen.student_blocks[i] = out[0]
            else:
                seen.teacher_blocks[i], seen.teacher_ffn[i] = out
                if i == last:  # the official teacher never comes to the final norm of pre-norm models
                    seen.teacher_x = out[0]

        return caught

    for i in range(last + 1):
        after(student.transformer.blocks[i], catch_block(i, "student"))
        after(teacher.transformer.blocks[i], catch_block(i, "teacher"))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def compare_forward(c: Comparison, seen: Seen) -> None:
    """Those activations that this fixture recorded."""
    padding = seen.tokens.padding_mask
    encoder_input = seen.positions_input
    if padding is not None:  # recorded before padded frames are set to zero, caught after
        encoder_input = torch.where(padding.unsqueeze(-1), seen.tokens.x, encoder_input)
    ours = {
        "mid.conv_features": seen.conv_features.transpose(1, 2),
        "mid.features_proj": seen.tokens.x,
        "mid.encoder_input": encoder_input,
        "mid.student_pos_conv": seen.positions,
        "student.x": seen.student_x,
        "teacher.x": seen.teacher_x,
        **{f"student.layer{i}.block": x for i, x in seen.student_blocks.items()},
        **{f"teacher.layer{i}.block": x for i, x in seen.teacher_blocks.items()},
        **{f"teacher.layer{i}.ffn": x for i, x in seen.teacher_ffn.items()},
    }
    for prefix in ("mid.", "student.", "teacher."):
        for name in c.recorded(prefix):
            c.tensor(name, ours.get(name), ACTIVATION)


def gradient_limit(name: str) -> Limit:
    """A key's bias shifts all logits of a query alike, so that its gradient is zero but for rounding."""
    return ROUNDING if name.endswith("k_proj.bias") else GRADIENT


def compare_gradients(c: Comparison, model: Data2Vec, config: RunConfig, prefix: str) -> dict[str, Tensor | None]:
    gradients = official.gradients_to_official(model, config)
    for name in c.recorded(prefix):
        c.tensor(name, gradients.get(name.removeprefix(prefix)), gradient_limit(name))
    return gradients


def compare_teacher(c: Comparison, model: Data2Vec, config: RunConfig, prefix: str, limit: Limit) -> None:
    try:
        ours = official.teacher_to_official(model.teacher.own_state(), config)
    except UserError as error:
        c.fail(f"{prefix}*", str(error))
        return
    for name in ours.keys() - {name.removeprefix(prefix) for name in c.recorded(prefix)}:
        c.fail(prefix + name, "owned by our teacher only")
    c.tensors(prefix, ours, limit)


def check_single_step(fixture: Fixture, changes: Mapping[str, str] | None = None) -> Comparison:
    """Forward, loss, gradients, one EMA step."""
    c, meta, names = Comparison(fixture), fixture.meta, fixture.tensors
    setup = Setup(c, changes)
    model, config = setup.model, setup.config
    padding_mask = c.take("in.padding_mask") if "in.padding_mask" in names else None
    source = c.take("in.source")
    inputs = setup.inputs(source, padding_mask)
    if not torch.equal(inputs["waveform"], source):
        c.fail("in.source", "collating the samples gives another waveform")
    masks = Masks.of(c.take("in.mask_indices"))
    with watch(model) as seen:
        out = model(inputs, masks)
    compare_forward(c, seen)
    if "in.frame_padding_mask" in names:
        c.tensor("in.frame_padding_mask", seen.tokens.padding_mask, ACTIVATION)
    loss_mean = out.loss_sum / out.num_scored
    c.tensor("out.y", out.target, ACTIVATION)
    c.tensor("out.pred", out.prediction, ACTIVATION)
    c.tensor("out.loss_sum", out.loss_sum, LOSS)
    c.tensor("out.loss_mean", loss_mean, LOSS)
    c.tensor("out.target_var", out.target_std, ACTIVATION)
    c.tensor("out.pred_var", out.prediction_std, ACTIVATION)
    for name, ours in (
        ("loss_sum", out.loss_sum),
        ("loss_mean", loss_mean),
        ("sample_size", out.num_scored),
        ("target_var", out.target_std),
        ("pred_var", out.prediction_std),
        ("frames", seen.tokens.x.shape[1]),
    ):
        c.number(f"json {name}", ours, meta[name], LOSS)

    out.loss_sum.backward()
    gradients = compare_gradients(c, model, config, "grad.")
    for name in gradients.keys() | fixture.grad_norms.keys():
        ours = gradients.get(name)
        norm = None if ours is None else ours.norm()
        c.number(f"norm of grad.{name}", norm, fixture.grad_norms.get(name), gradient_limit(name))

    decay = schedules.decay_at(meta["ema_step_at_num_updates"], config.train.max_steps, config.teacher)
    c.number("json ema_decay_used", decay, meta["ema_decay_used"], Limit(absolute=1e-12))
    model.update_teacher(decay)
    compare_teacher(c, model, config, fixture.layout.teacher_after, EMA)
    return c.finish()


def check_loss_options(fixture: Fixture, changes: Mapping[str, str] | None = None) -> Comparison:
    """Each loss with its gradients, on the predictions and targets of one forward pass."""
    c = Comparison(fixture)
    source, masks = c.take("in.source"), Masks.of(c.take("in.mask_indices"))
    for option, wanted in fixture.meta["losses"].items():
        own = {key: wanted[key] for key in ("loss_beta", "loss_scale")}
        setup = Setup(c, changes, own)
        out = setup.model(setup.inputs(source), masks)
        c.tensor("out.y", out.target, ACTIVATION)
        c.tensor("out.pred", out.prediction, ACTIVATION)
        c.tensor(f"opt.{option}.loss_sum", out.loss_sum, LOSS)
        c.tensor(f"opt.{option}.loss_mean", out.loss_sum / out.num_scored, LOSS)
        c.number(f"json {option}", out.loss_sum, wanted["loss_sum"], LOSS)
        out.loss_sum.backward()
        compare_gradients(c, setup.model, setup.config, f"opt.{option}.grad.")
    c.number("json sample_size", len(masks.scored_rows), fixture.meta["sample_size"], LOSS)
    return c.finish()


def check_target_norms(fixture: Fixture, changes: Mapping[str, str] | None = None) -> Comparison:
    """Each way to normalise targets, on one teacher output.

    A norm over the three samples of the batch meets spreads near zero and makes rounding of the layers before it three
    hundred times as large. So targets are also built from the recorded layers, where nothing but the norms can deviate,
    and only the ones from our own layers are given more room.
    """
    c = Comparison(fixture)
    source, masks = c.take("in.source"), Masks.of(c.take("in.mask_indices"))
    off = {key: False for key in fixture.config if "_norm_target" in key}
    for option, own in fixture.meta["options"].items():
        setup = Setup(c, changes, {**off, **own})
        with watch(setup.model) as seen:
            out = setup.model(setup.inputs(source), masks)
        compare_forward(c, seen)
        c.tensor("out.pred", out.prediction, ACTIVATION)
        c.tensor(f"opt.{option}.y", out.target, AMPLIFIED)
        k = setup.config.target.top_k_layers
        layers = [fixture.tensors[f"teacher.layer{i}.ffn"] for i in sorted(seen.teacher_ffn)[-k:]]
        from_recorded = setup.model.targets.build(layers, None)[masks.hidden[:, 0]]
        c.tensor(f"opt.{option}.y", from_recorded, ACTIVATION, "y of recorded layers")
        c.tensor(f"opt.{option}.loss_sum", out.loss_sum, LOSS)
        c.number(f"json {option}", out.loss_sum, fixture.meta["losses"][option], LOSS)
    c.number("json sample_size", len(masks.scored_rows), fixture.meta["sample_size"], LOSS)
    return c.finish()


def check_training_steps(fixture: Fixture, changes: Mapping[str, str] | None = None) -> Comparison:
    """Whole updates by the product's own updater: Adam, schedules, and when the teacher makes its step."""
    c, optimizer = Comparison(fixture), fixture.meta["optimizer"]
    own = {
        "optim.lr": optimizer["lr"],
        "optim.betas": optimizer["betas"],
        "optim.eps": optimizer["eps"],
        "optim.official_eps": "true",
        "optim.weight_decay": optimizer["weight_decay"],
        "optim.decay_all": "true",
        "optim.schedule": "constant",
        "optim.warmup_ratio": 0.0,
        "optim.clip_grad_norm": "null",
        **(changes or {}),
    }
    setup = Setup(c, {key: str(value) for key, value in own.items()})
    model, config = setup.model, setup.config
    updater = Updater(model, config, DEVICE)
    decays: list[float] = [config.teacher.ema_decay]  # in force at the first update, which makes no step
    update_teacher = model.update_teacher
    model.update_teacher = lambda decay: (decays.append(decay), update_teacher(decay))[1]
    log = fixture.meta["log"]
    for entry in log:
        step = entry["update"]
        c.number(f"log {step} ema_decay_in_force", decays[-1], entry["ema_decay_in_force"], Limit(absolute=1e-12))
        if entry.get("eval_only"):
            continue
        masks = Masks.of(c.take(f"step{step}.mask_indices"))
        batch = Batch(setup.inputs(c.take(f"step{step}.source")), masks)
        result = updater.update(step, [batch], setup.modality.teacher_inputs)
        c.number(f"log {step} sample_size", len(masks.scored_rows), entry["sample_size"], LOSS)
        c.number(f"log {step} loss_mean", result.loss, entry["loss_mean"], LOSS_OF_UPDATE)
        c.number(f"log {step} loss_sum", result.loss * entry["sample_size"], entry["loss_sum"], LOSS_OF_UPDATE)
        c.number(f"log {step} grad_norm", result.grad_norm, entry["grad_norm_of_mean_loss"], LOSS)
        c.number(f"log {step} target_var", result.target_std, entry["target_var"], ACTIVATION)
        c.number(f"log {step} pred_var", result.pred_std, entry["pred_var"], ACTIVATION)
        c.number(f"log {step} lr", updater.optimizer.param_groups[0]["lr"], entry["lr"], Limit(absolute=1e-12))
        done = step + 1
        c.tensors(f"after{done}.student.", official.to_official(model_state(model), config), UPDATED_WEIGHT)
        if c.recorded(f"after{done}.teacher."):
            compare_teacher(c, model, config, f"after{done}.teacher.", UPDATED_WEIGHT)
    out = model(setup.inputs(c.take("final.source")), Masks.of(c.take("final.mask_indices")))
    c.tensor("final.loss_sum", out.loss_sum, LOSS_OF_UPDATE)
    c.number("log final loss_sum", out.loss_sum, log[-1]["loss_sum"], LOSS_OF_UPDATE)
    c.number("log final sample_size", out.num_scored, log[-1]["sample_size"], LOSS)
    return c.finish()
