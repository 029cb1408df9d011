"""Runs d2v on a fixture of data2vec audio 1.0 and holds everything recorded against it.

Each check builds the model from the fixture's own configuration, the way a run does, and raises ParityError where
something deviates. The parity tests expect them to pass, the tests with planted faults to raise.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from d2v_audio import official
from d2v_audio.data import AudioSample
from d2v_audio.modality import AudioModality
from d2v_core import ctc, schedules
from d2v_core.config import RunConfig, load_config, parse_arguments
from d2v_core.contract import Batch, Masks, Tokens
from d2v_core.data2vec import Data2Vec, Data2VecOutput
from d2v_core.finetune import Network, build_network
from d2v_core.run import build_model, load_state, model_state
from d2v_core.trainer import Updater

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
from .models import Call, by_block, compare_teacher, load_recorded, watch

DEVICE = torch.device("cpu")


class Setup:
    """Modality and model of a configuration, with the recorded weights of the student and, where there are any, of
    the teacher. changes: options that come after the fixture's own."""

    def __init__(
        self, c: Comparison, changes: Mapping[str, str] | None = None, official_changes: Mapping[str, Any] | None = None
    ) -> None:
        self.config, self.modality = configured(c, changes, official_changes)
        self.model = build_model(self.modality)
        layout = c.fixture.layout
        load_recorded(
            c, self.model, official.from_official(c.take_all(layout.student), self.config),
            official.teacher_from_official(c.take_all(layout.teacher), self.config),
        )  # fmt: skip

    def inputs(self, source: Tensor, padding_mask: Tensor | None = None) -> Mapping[str, Tensor]:
        return collated(self.modality, source, padding_mask)


def configured(
    c: Comparison, changes: Mapping[str, str] | None = None, official_changes: Mapping[str, Any] | None = None
) -> tuple[RunConfig, AudioModality]:
    """The configuration of a fixture, `changes` after it, and its modality."""
    words = official.config_from_official({**c.fixture.config, **(official_changes or {})})
    options = {**parse_arguments(words), **(changes or {})}
    config, kind = load_config([f"{key}={value}" for key, value in options.items()])
    modality = kind(config)
    assert isinstance(modality, AudioModality)
    return config, modality


def collated(modality: AudioModality, source: Tensor, padding_mask: Tensor | None = None) -> Mapping[str, Tensor]:
    """Put together as the loader does it."""
    lengths = [source.shape[1]] * len(source) if padding_mask is None else (~padding_mask).sum(1).tolist()
    return modality.collate([AudioSample(row[:n].numpy()) for row, n in zip(source, lengths, strict=True)])


def forward(model: Data2Vec, inputs: Mapping[str, Tensor], masks: Masks) -> tuple[Data2VecOutput, dict[str, Call]]:
    """One forward pass, and what the modules computed in it."""
    encoder: Any = model.student.encoder
    with watch(model, embedding=encoder.embedding, norm=encoder.embedding.norm, positions=encoder.positions) as seen:
        return model(inputs, masks), seen


def compare_forward(c: Comparison, seen: Mapping[str, Call]) -> None:
    """Those activations that this fixture recorded."""
    tokens: Tokens = seen["embedding"].out
    encoder_input = seen["positions"].args[0]
    if tokens.padding_mask is not None:  # recorded before padded frames are set to zero, caught after
        encoder_input = torch.where(tokens.padding_mask.unsqueeze(-1), tokens.x, encoder_input)
    student_blocks, _ = by_block(seen, "student")
    teacher_blocks, teacher_ffn = by_block(seen, "teacher")
    ours = {
        "mid.conv_features": seen["norm"].args[0].transpose(1, 2),
        "mid.features_proj": tokens.x,
        "mid.encoder_input": encoder_input,
        "mid.student_pos_conv": seen["positions"].out,
        "student.x": seen["student"].out.x,
        "teacher.x": teacher_blocks[max(teacher_blocks)],  # the official one never comes to a final norm
        **{f"student.layer{i}.block": x for i, x in student_blocks.items()},
        **{f"teacher.layer{i}.block": x for i, x in teacher_blocks.items()},
        **{f"teacher.layer{i}.ffn": x for i, x in teacher_ffn.items()},
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
    out, seen = forward(model, inputs, masks)
    compare_forward(c, seen)
    tokens: Tokens = seen["embedding"].out
    if "in.frame_padding_mask" in names:
        c.tensor("in.frame_padding_mask", tokens.padding_mask, ACTIVATION)
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
        ("frames", tokens.x.shape[1]),
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
    to_official = partial(official.teacher_to_official, config=config)
    compare_teacher(c, fixture.layout.teacher_after, model, to_official, EMA)
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
        out, seen = forward(setup.model, setup.inputs(source), masks)
        compare_forward(c, seen)
        c.tensor("out.pred", out.prediction, ACTIVATION)
        c.tensor(f"opt.{option}.y", out.target, AMPLIFIED)
        k = setup.config.target.top_k_layers
        layers = [fixture.tensors[f"teacher.layer{i}.ffn"] for i in sorted(by_block(seen, "teacher")[1])[-k:]]
        from_recorded = setup.model.targets.build(layers, None)[masks.hidden[:, 0]]
        c.tensor(f"opt.{option}.y", from_recorded, ACTIVATION, "y of recorded layers")
        c.tensor(f"opt.{option}.loss_sum", out.loss_sum, LOSS)
        c.number(f"json {option}", out.loss_sum, fixture.meta["losses"][option], LOSS)
    c.number("json sample_size", len(masks.scored_rows), fixture.meta["sample_size"], LOSS)
    return c.finish()


def check_ctc(fixture: Fixture, changes: Mapping[str, str] | None = None) -> Comparison:
    """Emissions, loss, gradients and greedy decoding of the network that fine-tuning on transcripts trains."""
    c, meta, told = Comparison(fixture), fixture.meta, fixture.meta["ctc"]
    config, modality = configured(c, changes)
    objective = ctc.Symbols(told["symbols"], ["wer"])
    network = build_network(modality, objective).train()
    prefix, head = "w.w2v_encoder.w2v_model.", "w.w2v_encoder.proj."
    student = official.from_official(c.take_all(prefix), config)
    state = {**student, **{f"head.out.{name}": tensor for name, tensor in c.take_all(head).items()}}
    load_state(network.state_dict(), state, fixture.id)
    padding_mask = c.take("in.padding_mask")
    inputs = collated(modality, c.take("in.source"), padding_mask)
    lengths = c.take("in.target_lengths").tolist()
    labels = ctc.sequences([row[:n].tolist() for row, n in zip(c.take("in.target"), lengths, strict=True)])
    emissions: ctc.Emissions = network(inputs)
    c.tensor("out.encoder_out_TBC", emissions.logits.transpose(0, 1), ACTIVATION)
    c.tensor("out.input_lengths", emissions.lengths, ACTIVATION)
    ours, recorded = ctc.log_probabilities(emissions).transpose(0, 1), fixture.tensors["out.log_probs_TBC"]
    if not torch.equal(ours.isfinite(), recorded.isfinite()):
        c.fail("out.log_probs_TBC", "not the same symbols of the same frames are impossible")
    finite = recorded.isfinite()
    c.tensor_like("out.log_probs_TBC", torch.where(finite, ours, 0.0), torch.where(finite, recorded, 0.0), ACTIVATION)
    if "out.frame_padding_mask" in fixture.tensors:
        places = torch.arange(emissions.logits.shape[1])
        c.tensor("out.frame_padding_mask", places >= emissions.lengths[:, None], ACTIVATION)
    loss = objective.loss(emissions, objective.targets(labels))
    c.tensor("out.loss_sum", loss, LOSS)
    c.tensor("out.loss_per_sample", loss / len(labels), LOSS)
    c.number("json loss_sum", loss, meta["loss_sum"], LOSS)
    c.number("json loss_mean", loss / len(labels), meta["loss_mean"], LOSS)
    c.number("json sample_size", len(labels), meta["sample_size"], LOSS)
    for i, (ours, recorded) in enumerate(zip(objective.keep(emissions), meta["greedy_hypotheses"], strict=True)):
        if ours.tolist() != recorded:
            c.fail(f"json greedy_hypotheses[{i}]", f"decoded {ours.tolist()}, recorded {recorded}")
    loss.backward()
    own = {f"w2v_encoder.proj.{name}": p.grad for name, p in network.head.out.named_parameters()}
    of_student = official.gradients_to_official(student_alone(network), config)
    own |= {f"w2v_encoder.w2v_model.{name}": gradient for name, gradient in of_student.items()}
    c.tensors("grad.", {name: g for name, g in own.items() if g is not None}, GRADIENT)
    for name in own.keys() | fixture.grad_norms.keys():
        ours = own.get(name)
        norm = None if ours is None else ours.norm()
        c.number(f"norm of grad.{name}", norm, fixture.grad_norms.get(name), gradient_limit(name))
    return c.finish()


def student_alone(network: Network) -> nn.Module:
    """Under the names that it has in a Data2Vec."""
    return nn.ModuleDict({"student": network.student})


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
    model.update_teacher = lambda decay, applied=None: (decays.append(decay), update_teacher(decay, applied))[1]
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
            to_official = partial(official.teacher_to_official, config=config)
            compare_teacher(c, f"after{done}.teacher.", model, to_official, UPDATED_WEIGHT)
    out = model(setup.inputs(c.take("final.source")), Masks.of(c.take("final.mask_indices")))
    c.tensor("final.loss_sum", out.loss_sum, LOSS_OF_UPDATE)
    c.number("log final loss_sum", out.loss_sum, log[-1]["loss_sum"], LOSS_OF_UPDATE)
    c.number("log final sample_size", out.num_scored, log[-1]["sample_size"], LOSS)
    return c.finish()
