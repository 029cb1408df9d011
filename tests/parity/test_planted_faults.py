"""Faults that parity has to notice: each is planted into the implementation and the parity check has to raise.

The mistakes are those that ports of data2vec have made, or that are easily made. A check that passes with a fault
planted says nothing; so each has also passed without.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import d2v_core.official
from d2v_audio import official
from d2v_audio.feature_encoder import AudioEncoder
from d2v_audio.modality import AudioModality
from d2v_core import ctc, loop, masking, schedules, targets, trainer
from d2v_core.contract import Masks, Tokens
from d2v_core.loss import RegressionLoss
from d2v_core.teacher import EMATeacher
from d2v_core.transformer import Attention, Block, Transformer

from .audio_checks import check_ctc, check_single_step, check_training_steps
from .compare import Comparison
from .finder import Fixture, find, root_of
from .mask_checks import check_mask_statistics
from .planting import Faults, Plant, override, teacher_sees_what_is_hidden_as_hidden, wrap
from .test_audio import is_audio

FAULTS = Faults()


def is_base(fixture: Fixture) -> bool:
    """The released recipe: fewer target layers than blocks, positions of the teacher copied."""
    config = fixture.config
    plain = config["extractor_mode"] == "layer_norm" and not (config["conv_bias"] or is_padded(fixture))
    return plain and config["ema_layers_only"] and config["average_top_k_layers"] < config["encoder_layers"]


def is_padded(fixture: Fixture) -> bool:
    return "in.frame_padding_mask" in fixture.meta["tensors"]


def step(*noticed_by: str, where: Callable[[Fixture], bool] = is_base) -> Callable[[Plant], Plant]:
    return FAULTS.case("single_step", check_single_step, noticed_by, where)


def updates(*noticed_by: str) -> Callable[[Plant], Plant]:
    return FAULTS.case("training_steps", check_training_steps, noticed_by)


def masks(*noticed_by: str) -> Callable[[Plant], Plant]:
    return FAULTS.case("mask_statistics", _few_masks, noticed_by)


def _few_masks(fixture: Fixture) -> Comparison:
    return check_mask_statistics(fixture, calls=150)


# ----------------------------------------------------------------------------------------------------- targets


@step("teacher.layer3.ffn", "out.y")
def tap_taken_after_the_residual(patch: pytest.MonkeyPatch) -> None:
    def forward(original: Any, self: Block, *args: Any) -> Any:
        sums: list[torch.Tensor] = []
        handle = self.norm2.register_forward_pre_hook(lambda _, given: sums.append(given[0]))
        x, _ = original(self, *args)
        handle.remove()
        return x, sums[-1]

    wrap(patch, Block, "forward", forward)


@step("out.y", "out.loss_sum")
def norm_over_channels_instead_of_time(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, targets, "_normalise", lambda original, x, norm, *rest: original(x, "layer", *rest))


@step("out.y")
def norm_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(targets, "_normalise", lambda x, *_: x)


@step("out.y")
def mean_of_the_layers_before_the_norm(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch, targets.TopKTargets, "build",
        lambda original, self, layers, padding: original(self, [torch.stack(list(layers)).mean(0)], padding),
    )  # fmt: skip


@step("out.y")
def one_layer_too_many(patch: pytest.MonkeyPatch) -> None:
    _k(patch, +1)


@step("out.y")
def one_layer_too_few(patch: pytest.MonkeyPatch) -> None:
    _k(patch, -1)


def _k(patch: pytest.MonkeyPatch, more: int) -> None:
    def make(original: Any, self: Any, config: Any) -> None:
        original(self, dataclasses.replace(config, top_k_layers=config.top_k_layers + more))

    wrap(patch, targets.TopKTargets, "__init__", make)


@step("out.y")
def first_layers_instead_of_the_last(patch: pytest.MonkeyPatch) -> None:
    def call(original: Any, self: Any, teacher: Any, *args: Any) -> Any:
        k = self.config.top_k_layers
        return original(self, teacher._replace(ffn=teacher.ffn[:k]), *args)

    wrap(patch, targets.TopKTargets, "__call__", call)


@step("out.y")
def epsilon_of_the_target_norm(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(targets, "EPS", 1e-3)


@step("teacher.", "out.y")
def teacher_sees_the_masked_input(patch: pytest.MonkeyPatch) -> None:
    teacher_sees_what_is_hidden_as_hidden(patch, "mask_embedding")


@step("teacher.", "out.y")
def student_used_as_the_teacher(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EMATeacher, "load_own_state", lambda self, state: None)


# ------------------------------------------------------------------------------------------------ student, loss


@step("mid.encoder_input", "out.pred")
def positions_added_before_masking(patch: pytest.MonkeyPatch) -> None:
    def view(self: AudioEncoder, tokens: Tokens, masks: Masks | None) -> Tokens:
        x = tokens.x + self.positions(tokens.x, tokens.padding_mask)
        if masks is not None:
            x = torch.where(masks.hidden[:, 0, :, None], self.mask_embedding, x)
        assert self.norm is not None
        return Tokens(self.norm(x), tokens.padding_mask, tokens.grid)

    patch.setattr(AudioEncoder, "view", view)


@step("out.loss_sum", "json sample_size")
def visible_places_in_the_loss(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Masks, "of", lambda original, hidden: original(hidden, torch.ones_like(hidden)))


@step("out.loss_sum", "grad.", "norm of grad.")
def scale_of_the_loss_dropped(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch, RegressionLoss, "__call__",
        lambda original, self, prediction, target: original(self, prediction, target) * math.sqrt(target.shape[-1]),
    )  # fmt: skip


@step("student.layer0.block")
def approximate_gelu(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, nn.functional, "gelu", lambda original, x: original(x, approximate="tanh"))


@step("student.layer0.block", "out.pred")
def queries_and_keys_swapped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(d2v_core.official, "STACKED", "kqv")


@step("student.layer0.block")
def attention_without_its_scale(patch: pytest.MonkeyPatch) -> None:
    def forward(original: Any, self: Attention, x: torch.Tensor, *args: Any) -> Any:
        with pytest.MonkeyPatch.context() as inner:
            wrap(inner, nn.functional, "scaled_dot_product_attention", lambda o, *a, **k: o(*a, scale=1.0, **k))
            return original(self, x, *args)

    wrap(patch, Attention, "forward", forward)


@step("student.x", where=lambda fixture: fixture.config["layer_norm_first"])
def final_norm_of_the_student_left_out(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch, Transformer, "forward",
        lambda original, self, x, padding_mask, bias, taps: (
            out := original(self, x, padding_mask, bias, True)
        )._replace(x=out.blocks[-1]),
    )  # fmt: skip


@step("grad.feature_extractor", where=lambda fixture: fixture.config["feature_grad_mult"] not in (0, 1))
def gradient_factor_of_the_front_end_ignored(patch: pytest.MonkeyPatch) -> None:
    _override(patch, "features.grad_mult=1.0")


def _override(patch: pytest.MonkeyPatch, word: str) -> None:
    override(patch, official, word)


# ------------------------------------------------------------------------------------------------------ padding


@step("out.y", where=is_padded)
def padding_left_out_of_the_statistics(patch: pytest.MonkeyPatch) -> None:
    _override(patch, "target.padding_in_stats=false")


@step("mid.student_pos_conv", where=is_padded)
def padding_zeroed_before_every_convolution(patch: pytest.MonkeyPatch) -> None:
    _override(patch, "positions.rezero_padding=true")


@step("student.layer0.block", where=is_padded)
def padding_attended_to(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch, Transformer, "forward",
        lambda original, self, x, padding_mask, *args: original(self, x, None, *args),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- teacher, updates


@step("teacher")
def teacher_with_a_front_end_of_its_own(patch: pytest.MonkeyPatch) -> None:
    _average_everything(patch)


@updates("after3.teacher.", "log 1 loss_mean", "final.loss_sum")
def front_end_averaged_instead_of_shared(patch: pytest.MonkeyPatch) -> None:
    _average_everything(patch)


def _average_everything(patch: pytest.MonkeyPatch) -> None:
    own = {"encoder.embedding": "average", "encoder.mask_embedding": "average"}
    wrap(patch, AudioModality, "teacher_parts", lambda original, self: {**original(self), **own})


@updates("after3.teacher.pos_conv")
def positions_averaged_instead_of_copied(patch: pytest.MonkeyPatch) -> None:
    _override(patch, "positions.teacher=average")


@step("json ema_decay_used")
def decay_schedule_off_by_one(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, schedules, "decay_at", lambda original, step, *rest: original(step - 1, *rest))


@updates("log 1 ema_decay_in_force", "after3.teacher.layers", "final.loss_sum")
def decay_of_the_update_before(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, trainer, "decay_at", lambda original, step, *rest: original(step - 1, *rest))


@updates("log 1 ema_decay_in_force", "final.loss_sum")
def decay_ramp_of_the_wrong_length(patch: pytest.MonkeyPatch) -> None:
    _override(patch, "teacher.ema_anneal_steps=11")


@step("after_ema.layers")
def decay_taken_for_its_complement(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, EMATeacher, "update", lambda original, self, student, decay, *rest: original(self, student, 1 - decay))


@updates("after3.teacher.layers", "log 1 loss_mean")
def teacher_moves_before_the_optimizer_does(patch: pytest.MonkeyPatch) -> None:
    before: list[nn.Module] = []

    def update(original: Any, self: EMATeacher, student: nn.Module, decay: float, *rest: object) -> None:
        original(self, before[-1] if before else student, decay)
        before.append(copy.deepcopy(student))

    wrap(patch, EMATeacher, "update", update)


@updates("log 0 grad_norm")
def gradients_not_divided_by_the_masked_places(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer, "num_scored", lambda batch: 1)


@updates("after1.student.", "after3.student.")
def learning_rate_warmed_up(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, loop, "lr_at", lambda original, *args: 0.9 * original(*args))


@updates("after3.student.")
def weight_decay_dropped(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch, loop, "make_optimizer",
        lambda original, model, config, scale_of: original(model, dataclasses.replace(config, weight_decay=0.0)),
    )  # fmt: skip


@updates("log 2 loss_mean", "final.loss_sum")
def moments_of_torch_defaults(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch, loop, "make_optimizer",
        lambda original, model, config, scale_of: original(model, dataclasses.replace(config, betas=[0.9, 0.999])),
    )  # fmt: skip


@updates("after1.student.")
def epsilon_added_after_the_bias_correction(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch, loop, "set_step",
        lambda original, optimizer, lr, step, config: original(
            optimizer, lr, step, dataclasses.replace(config, official_eps=False)
        ),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- CTC


def spelling(*noticed_by: str) -> Callable[[Plant], Plant]:
    """On utterances of several lengths."""
    return FAULTS.case("ctc_finetuning", check_ctc, noticed_by, lambda f: "out.frame_padding_mask" in f.meta["tensors"])


@spelling("out.loss_sum", "json greedy_hypotheses", "out.log_probs_TBC")
def blank_taken_for_another_symbol(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ctc, "BLANK", 1)


@spelling("out.input_lengths", "out.loss_sum", "out.log_probs_TBC", "norm of grad.")
def padding_spelled_with(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch, ctc.TokenHead, "features",
        lambda original, self, tokens: original(self, dataclasses.replace(tokens, padding_mask=None)),
    )  # fmt: skip


@spelling("out.log_probs_TBC")
def padding_not_certainly_blank(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ctc, "log_probabilities", lambda emissions: emissions.logits.log_softmax(-1))


@spelling("out.loss_sum", "out.loss_per_sample", "grad.")
def loss_averaged_over_symbols(patch: pytest.MonkeyPatch) -> None:
    def averaged(
        original: Any, log_probs: Any, targets: Any, frames: Any, lengths: Any, blank: int, _: str, **rest: Any
    ):
        return original(log_probs, targets, frames, lengths, blank, "mean", **rest)

    wrap(patch, nn.functional, "ctc_loss", averaged)


@spelling("json greedy_hypotheses")
def repeats_not_merged(patch: pytest.MonkeyPatch) -> None:
    def every_frame(logits: torch.Tensor, length: int | None = None) -> list[int]:
        return [int(symbol) for symbol in logits[:length].argmax(-1) if symbol != ctc.BLANK]

    patch.setattr(ctc, "greedy", every_frame)


@spelling("out.encoder_out_TBC", "out.loss_sum")
def padding_heard_by_the_positions(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch, AudioEncoder, "view",
        lambda original, self, tokens, masks: dataclasses.replace(
            original(self, dataclasses.replace(tokens, padding_mask=None), masks), padding_mask=tokens.padding_mask
        ),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- masks


@masks("position_mask_rate_last10[9]")
def last_start_drawn_too(patch: pytest.MonkeyPatch) -> None:
    def span_mask(original: Any, num_tokens: int, *args: Any) -> np.ndarray:
        return original(num_tokens + 1, *args)[:num_tokens]

    wrap(patch, masking, "span_mask", span_mask)


@masks("masked_count_mean", "run_length_mean")
def counts_not_made_equal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(masking, "trim_mask", lambda mask, count, rng: mask)


@masks("runs_shorter_than_mask_length_fraction")
def counts_made_equal_from_the_end(patch: pytest.MonkeyPatch) -> None:
    def trim(mask: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
        trimmed = np.zeros_like(mask)
        trimmed[np.flatnonzero(mask)[:count]] = True
        return trimmed

    patch.setattr(masking, "trim_mask", trim)


class _Generator:
    """A generator of which one method was tampered with."""

    def __init__(self, rng: np.random.Generator, **methods: Any) -> None:
        self._rng, self._methods = rng, methods

    def __getattr__(self, name: str) -> Any:
        return self._methods.get(name) or getattr(self._rng, name)


@masks("masked_count_mean")
def number_of_spans_always_rounded_down(patch: pytest.MonkeyPatch) -> None:
    def span_mask(original: Any, num_tokens: int, prob: float, length: int, rng: Any, *args: Any) -> np.ndarray:
        return original(num_tokens, prob, length, _Generator(rng, random=lambda: 0.0), *args)

    wrap(patch, masking, "span_mask", span_mask)


@masks("fraction_masked_mean", "masked_count_mean")
def starts_drawn_with_replacement(patch: pytest.MonkeyPatch) -> None:
    def span_mask(original: Any, num_tokens: int, prob: float, length: int, rng: Any, *args: Any) -> np.ndarray:
        tampered = _Generator(rng, choice=lambda n, size, replace: rng.integers(n, size=size))
        return original(num_tokens, prob, length, tampered, *args)

    wrap(patch, masking, "span_mask", span_mask)


# -------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("fault", FAULTS)
def test_noticed(fault: str, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS.notice(fault, filter(is_audio, find(root_of(pytestconfig))), monkeypatch)
