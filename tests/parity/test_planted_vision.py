"""Faults of vision that parity has to notice: each is planted into the implementation and the check has to raise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from d2v_core import targets
from d2v_core.contract import Masks, Tokens
from d2v_core.teacher import EMATeacher
from d2v_core.transformer import Attention, Block
from d2v_vision import feature_encoder, masking
from d2v_vision.feature_encoder import PatchEmbedding, PatchEncoder

from .finder import Fixture, find, root_of
from .planting import Faults, Plant, teacher_sees_what_is_hidden_as_hidden, wrap
from .test_vision import is_vision
from .vision_checks import check_mask_statistics, check_single_step

FAULTS = Faults()


def has_block_targets(fixture: Fixture) -> bool:
    return fixture.config["end_of_block_targets"]


def step(*noticed_by: str, **options: str) -> Callable[[Plant], Plant]:
    """options: other values of options than the fixture's, with __ for the dot."""
    changes = {key.replace("__", "."): value for key, value in options.items()}
    return FAULTS.case("single_step", check_single_step, noticed_by, has_block_targets, changes)


def masks(*noticed_by: str) -> Callable[[Plant], Plant]:
    return FAULTS.case("mask_statistics", check_mask_statistics, noticed_by)


# --------------------------------------------------------------------------------------------------- positions


def _index(patch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Of the network alone: the recorded index, which would be loaded over it, is set aside."""

    def forward(self: Any) -> torch.Tensor:
        return self.table[change(self.index)].permute(2, 0, 1)[None].contiguous()

    patch.setattr(feature_encoder.RelativeBias, "forward", forward)


@step("student_layer.0", "pred", "target")
def bias_of_key_minus_query(patch: pytest.MonkeyPatch) -> None:
    _index(patch, lambda index: index.T)


@step("student_layer.0", "target_layer.0", "grad.encoder.rel_pos_bias")
def bias_off_by_one(patch: pytest.MonkeyPatch) -> None:
    def change(index: torch.Tensor) -> torch.Tensor:
        index = index.clone()
        index[1:, 1:] = (index[1:, 1:] + 1).clamp(max=48)
        return index

    _index(patch, change)


@step("student.encoder.rel_pos_bias.relative_position_index")
def rows_of_the_index_too_short(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, feature_encoder, "relative_index", lambda original, h, w: (original(h, w) - 1).clamp(min=0))


@step("student_layer.0")
def pairs_with_cls_swapped(patch: pytest.MonkeyPatch) -> None:
    def change(index: torch.Tensor) -> torch.Tensor:
        index = index.clone()
        index[0, 1:], index[1:, 0] = index[1, 0].item(), index[0, 1].item()
        return index

    _index(patch, change)


@step("student_layer.0", "target_layer.0")
def bias_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PatchEncoder, "attention_bias", lambda self, tokens: None)


@step("encoder_input_unmasked")
def patches_column_by_column(patch: pytest.MonkeyPatch) -> None:
    def forward(original: Any, self: Any, image: torch.Tensor) -> torch.Tensor:
        side = image.shape[-1] // self.patch_size
        return original(self, image).unflatten(1, (side, side)).transpose(1, 2).flatten(1, 2)

    wrap(patch, PatchEmbedding, "forward", forward)


# ------------------------------------------------------------------------------------------------- CLS, masking


@step("student_layer.0", "pred")
def cls_masked(patch: pytest.MonkeyPatch) -> None:
    def view(original: Any, self: PatchEncoder, tokens: Tokens, given: Masks | None) -> Tokens:
        seen = original(self, tokens, given)
        if given is not None:
            seen = dataclasses.replace(
                seen, x=torch.cat([self.mask_token.expand(len(seen.x), 1, -1), seen.x[:, 1:]], 1)
            )
        return seen

    wrap(patch, PatchEncoder, "view", view)


@step("student_layer.0", "pred")
def mask_counted_from_cls(patch: pytest.MonkeyPatch) -> None:
    def view(original: Any, self: PatchEncoder, tokens: Tokens, given: Masks | None) -> Tokens:
        if given is not None:
            given = dataclasses.replace(given, hidden=given.hidden.roll(-1, 2))
        return original(self, tokens, given)

    wrap(patch, PatchEncoder, "view", view)


@step("target_full", "target")
def targets_counted_from_cls(patch: pytest.MonkeyPatch) -> None:
    def call(original: Any, self: Any, teacher: Any, padding: Any, num_extra: int) -> torch.Tensor:
        taps = {kind: [x.roll(1, 1) for x in getattr(teacher, kind)] for kind in ("ffn", "blocks")}
        return original(self, teacher._replace(**taps), padding, num_extra)

    wrap(patch, targets.TopKTargets, "__call__", call)


@step("target_layer.0", "encoder_input_unmasked")
def teacher_sees_the_masked_image(patch: pytest.MonkeyPatch) -> None:
    teacher_sees_what_is_hidden_as_hidden(patch, "mask_token")


# ------------------------------------------------------------------------------------------------------- blocks


@step("student_layer.0")
def queries_without_a_bias(patch: pytest.MonkeyPatch) -> None:
    """A bias of the keys, on the other hand, changes nothing: it shifts all logits of a query alike."""

    def cat(original: Any, parts: Any, *rest: Any) -> torch.Tensor:
        return original([torch.zeros_like(parts[0]), *parts[1:]], *rest)

    def forward(original: Any, self: Attention, *args: Any) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as inner:
            wrap(inner, torch, "cat", cat)
            return original(self, *args)

    wrap(patch, Attention, "forward", forward)


@step("student_layer.0", "target_layer.0")
def layer_scale_left_out(patch: pytest.MonkeyPatch) -> None:
    def forward(original: Any, self: Block, *args: Any) -> Any:
        with torch.no_grad():
            saved, self.gamma1 = self.gamma1, None
        try:
            return original(self, *args)
        finally:
            self.gamma1 = saved

    wrap(patch, Block, "forward", forward)


@step("student_layer.0", model__norm_eps="1.0e-3")
def another_epsilon(patch: pytest.MonkeyPatch) -> None: ...


# -------------------------------------------------------------------------------------- target, loss, teacher


@step("target_layer.0", "target", target__tap="ffn")
def tap_before_the_residual(patch: pytest.MonkeyPatch) -> None: ...


@step("target_full", "target", target__mean_norms="[]")
def norm_of_the_mean_left_out(patch: pytest.MonkeyPatch) -> None: ...


@step("target", target__layer_norms="[layer]")
def layers_normalised_too(patch: pytest.MonkeyPatch) -> None: ...


@step("target", target__top_k_layers="2")
def one_layer_too_few(patch: pytest.MonkeyPatch) -> None: ...


@step("loss.regression", "grad.", loss__scale="mean")
def mean_over_channels(patch: pytest.MonkeyPatch) -> None: ...


@step("loss.regression", loss__beta="1.0")
def another_threshold_of_the_loss(patch: pytest.MonkeyPatch) -> None: ...


@step("teacher", features__teacher="average")
def teacher_with_patches_of_its_own(patch: pytest.MonkeyPatch) -> None: ...


@step("teacher_after.blocks", "json decay_at_step", teacher__ema_anneal_steps="500")
def another_ramp_of_the_decay(patch: pytest.MonkeyPatch) -> None: ...


@step("target_layer.0", "target")
def student_used_as_the_teacher(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EMATeacher, "load_own_state", lambda self, state: None)


# -------------------------------------------------------------------------------------------------------- masks


def _config(patch: pytest.MonkeyPatch, **options: Any) -> None:
    wrap(
        patch, masking, "block_mask",
        lambda original, h, w, config, rng: original(h, w, dataclasses.replace(config, **options), rng),
    )  # fmt: skip


@masks("masked_largest_block_mean", "visible_blocks_per_image_mean")
def blocks_bounded_too_tightly(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch, masking, "block_mask",
        lambda original, h, w, config, rng: original(
            h, w, dataclasses.replace(config, max_block=min(config.max_block, 75) // 3), rng
        ),
    )  # fmt: skip


@masks("edge_imbalance_mean")
def square_blocks_only(patch: pytest.MonkeyPatch) -> None:
    _config(patch, min_aspect=1.0)


@masks("masked_blocks_per_image_mean")
def blocks_too_small(patch: pytest.MonkeyPatch) -> None:
    _config(patch, min_block=1)


@masks("masked_fraction_mean", "masked_fraction_std")
def filled_up_to_the_exact_count(patch: pytest.MonkeyPatch) -> None:
    def fill(original: Any, h: int, w: int, config: Any, rng: np.random.Generator) -> np.ndarray:
        mask = original(h, w, config, rng)
        seen = np.flatnonzero(~mask)
        mask.flat[rng.choice(seen, config.num_patches - int(mask.sum()), replace=False)] = True
        return mask

    wrap(patch, masking, "block_mask", fill)


@masks("per_position_masked_rate_grid")
def last_place_never_drawn(patch: pytest.MonkeyPatch) -> None:
    def lopsided(original: Any, h: int, w: int, config: Any, rng: np.random.Generator) -> np.ndarray:
        mask = original(h - 1, w - 1, dataclasses.replace(config, num_patches=config.num_patches), rng)
        return np.pad(mask, ((0, 1), (0, 1)))

    wrap(patch, masking, "block_mask", lopsided)


# -------------------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def fixtures(pytestconfig: pytest.Config) -> list[Fixture]:
    return [fixture for fixture in find(root_of(pytestconfig)) if is_vision(fixture)]


@pytest.mark.parametrize("fault", FAULTS)
def test_noticed(fault: str, fixtures: list[Fixture], monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS.notice(fault, fixtures, monkeypatch)
