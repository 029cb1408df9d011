"""Faults that parity of text has to notice; as `test_planted_faults`, for what is special to text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import d2v_core.official
from d2v_core import targets
from d2v_core.contract import Masks, Tokens
from d2v_core.data2vec import Data2Vec
from d2v_core.loss import RegressionLoss
from d2v_core.teacher import EMATeacher
from d2v_core.transformer import Transformer
from d2v_text import feature_encoder, official
from d2v_text.feature_encoder import RegressionHead, TextEncoder, TokenEmbedding
from d2v_text.modality import TextModality

from .finder import Fixture, find, root_of
from .planting import Faults, Plant, override, teacher_is_given, wrap
from .test_text import is_text
from .text_checks import check_single_step, is_pipeline

FAULTS = Faults()


def is_full(fixture: Fixture) -> bool:
    return not is_pipeline(fixture) and not has_instance_norm(fixture)


def is_base(fixture: Fixture) -> bool:
    return not has_instance_norm(fixture)


def has_instance_norm(fixture: Fixture) -> bool:
    return fixture.config["instance_norm_target_layer"]


def fault(*noticed_by: str, where: Callable[[Fixture], bool] = is_base) -> Callable[[Plant], Plant]:
    return FAULTS.case("single_step", check_single_step, noticed_by, where)


def _option(patch: pytest.MonkeyPatch, word: str) -> None:
    override(patch, official, word)


# ---------------------------------------------------------------------------------------------- tokens, positions


@fault("student_embed", "teacher_x.0")
def positions_start_at_zero(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, feature_encoder, "position_ids", lambda original, *args: (original(*args) - 2).clamp(min=0))


@fault("student_embed", "teacher_x.0")
def positions_start_at_one(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, feature_encoder, "position_ids", lambda original, *args: original(*args) - 1)


@fault("teacher_x.0", "target", where=is_pipeline)
def positions_keep_the_gaps_of_padding(patch: pytest.MonkeyPatch) -> None:
    def position_ids(num_tokens: int, padding_mask: Any, device: Any) -> torch.Tensor:
        places = torch.arange(2, 2 + num_tokens).unsqueeze(0)
        return places if padding_mask is None else torch.where(padding_mask, 1, places)

    patch.setattr(feature_encoder, "position_ids", position_ids)


@fault("student_embed")
def tokens_scaled_by_the_root_of_the_width(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, TokenEmbedding, "forward", lambda original, self, ids: original(self, ids) * 48**0.5)


@fault("student_embed")
def norm_of_the_embedding_left_out(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch, nn.LayerNorm, "forward",
        lambda original, self, x: x if getattr(self, "is_embedding_norm", False) else original(self, x),
    )  # fmt: skip

    def init(original: Any, self: TextEncoder, *args: Any) -> None:
        original(self, *args)
        self.norm.is_embedding_norm = True  # pyright: ignore

    wrap(patch, TextEncoder, "__init__", init)


@fault("student_embed")
def padded_rows_not_zeroed(patch: pytest.MonkeyPatch) -> None:
    def view(original: Any, self: TextEncoder, tokens: Tokens, masks: Masks | None) -> Tokens:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(torch.Tensor, "masked_fill", lambda x, mask, value: x)
            return original(self, tokens, masks)

    wrap(patch, TextEncoder, "view", view)


@fault("student_embed", "pred")
def hidden_tokens_left_in_sight(patch: pytest.MonkeyPatch) -> None:
    def view(original: Any, self: TextEncoder, tokens: Tokens, masks: Masks | None) -> Tokens:
        seen = None if masks is None else dataclasses.replace(masks, hidden=torch.zeros_like(masks.hidden))
        return original(self, tokens, seen)

    wrap(patch, TextEncoder, "view", view)


@fault("grad.encoder.sentence_encoder.embed_tokens.weight")
def no_gradient_into_the_mask_symbol(patch: pytest.MonkeyPatch) -> None:
    def view(original: Any, self: TextEncoder, tokens: Tokens, masks: Masks | None) -> Tokens:
        self.embedding.table.weight.requires_grad_(masks is None)
        out = original(self, tokens, masks)
        self.embedding.table.weight.requires_grad_(self.training)
        return out

    wrap(patch, TextEncoder, "view", view)


@fault("student_layer.0", "eval.x")
def padding_attended_to(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Transformer, "forward", lambda original, self, x, padding, *args: original(self, x, None, *args))


# ------------------------------------------------------------------------------------------------ teacher, target


@fault("input.target_tokens", "target", where=is_pipeline)
def teacher_given_the_whole_text_instead_of_the_labels(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TextModality, "teacher_inputs", lambda self, batch: None)


@fault("input.target_tokens", "target", where=is_full)
def teacher_given_the_labels_instead_of_the_whole_text(patch: pytest.MonkeyPatch) -> None:
    def teacher_inputs(original: Any, self: TextModality, batch: Any) -> Any:
        self.mask.teacher_input = "labels"
        return original(self, batch)

    wrap(patch, TextModality, "teacher_inputs", teacher_inputs)


@fault("teacher_x.1", "target", where=is_pipeline)
def padding_in_the_labels_attended_to(patch: pytest.MonkeyPatch) -> None:
    def teacher_inputs(original: Any, self: TextModality, batch: Any) -> Any:
        return {"ids": original(self, batch)["ids"]}

    wrap(patch, TextModality, "teacher_inputs", teacher_inputs)


@fault("teacher_x.", "target")
def student_used_as_the_teacher(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EMATeacher, "load_own_state", lambda self, state: None)


@fault("teacher_x.0", "target", where=is_full)
def teacher_given_the_tokens_of_the_student(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EMATeacher, "shares", lambda self, prefix: True)


@fault("teacher_after.embed_tokens.weight", "teacher_after.layernorm_embedding.bias")
def embeddings_averaged_instead_of_copied(patch: pytest.MonkeyPatch) -> None:
    _option(patch, "embedding.teacher=average")


@fault("teacher_after.layers")
def blocks_copied_instead_of_averaged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TextModality, "teacher_parts", lambda self: {"": "copy"})


@fault("json decay", "json decay at 137")
def decay_ramp_of_the_wrong_length(patch: pytest.MonkeyPatch) -> None:
    _option(patch, "teacher.ema_anneal_steps=300000")


@fault("target_full", "target", where=has_instance_norm)
def padding_left_out_of_the_statistics(patch: pytest.MonkeyPatch) -> None:
    _option(patch, "target.padding_in_stats=false")


@fault("target_full", "target")
def norm_over_time_instead_of_channels(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, targets, "_normalise", lambda original, x, norm, *rest: original(x, "instance", *rest))


@fault("target_full", "target")
def one_layer_too_few(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any, self: Any, config: Any) -> None:
        original(self, dataclasses.replace(config, top_k_layers=config.top_k_layers - 1))

    wrap(patch, targets.TopKTargets, "__init__", make)


# ---------------------------------------------------------------------------------------------------- head, loss


@fault("pred")
def head_with_another_activation(patch: pytest.MonkeyPatch) -> None:
    def init(original: Any, self: RegressionHead, *args: Any) -> None:
        original(self, *args)
        self.layers[1] = nn.Tanh()

    wrap(patch, RegressionHead, "__init__", init)


@fault("loss.main", "json loss_main")
def loss_averaged_over_channels(patch: pytest.MonkeyPatch) -> None:
    _option(patch, "loss.scale=mean")


@fault("loss.main", where=has_instance_norm)
def scale_of_nought_taken_for_one(patch: pytest.MonkeyPatch) -> None:
    _option(patch, "loss.scale=sum")


@fault("loss.main")
def loss_without_its_threshold(patch: pytest.MonkeyPatch) -> None:
    _option(patch, "loss.beta=0")


@fault("loss.main")
def huber_in_place_of_smooth_l1(patch: pytest.MonkeyPatch) -> None:
    def call(original: Any, self: RegressionLoss, prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.huber_loss(prediction, target, delta=self.beta, reduction="sum")

    wrap(patch, RegressionLoss, "__call__", call)


@fault("json sample_size", "loss.main")
def visible_places_in_the_loss(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch, Masks, "of",
        lambda original, hidden, scored, fill: original(hidden, torch.ones_like(hidden), fill),
    )  # fmt: skip


@fault("student_layer.0", "pred")
def queries_and_keys_swapped(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(d2v_core.official, "STACKED", "kqv")


@fault("target")
def teacher_reads_the_masked_text(patch: pytest.MonkeyPatch) -> None:
    def change(self: Data2Vec, tokens: Tokens, inputs: Any, masks: Masks) -> Any:
        assert masks.fill is not None
        return tokens, {**inputs, "ids": torch.where(masks.hidden[:, 0], masks.fill[:, 0], inputs["ids"])}

    teacher_is_given(patch, change)


# -------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", FAULTS)
def test_noticed(name: str, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS.notice(name, filter(is_text, find(root_of(pytestconfig))), monkeypatch)
