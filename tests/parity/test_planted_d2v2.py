"""Faults of data2vec 2.0 that parity has to notice: each is planted into the implementation and the check has to raise.

That the checks pass without a fault is what test_d2v2.py is for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from d2v_audio.feature_encoder import VisibleAudioEncoder
from d2v_core import data2vec, masking, visible
from d2v_core.contract import Masks, Tokens
from d2v_core.data2vec import Student
from d2v_core.decoder import ConvDecoder, DecoderBlock
from d2v_core.loss import RegressionLoss
from d2v_core.targets import TopKTargets
from d2v_core.teacher import EMATeacher
from d2v_core.transformer import TransformerOutput
from d2v_core.visible import Alibi, Prenet
from d2v_text.feature_encoder import VisibleTextEncoder
from d2v_text.modality import TextModality
from d2v_vision.feature_encoder import VisiblePatchEncoder
from d2v_vision.modality import VisionModality

from .compare import Comparison, ParityError
from .d2v2_checks import check_single_step, kind_of
from .d2v2_mask_checks import check_mask_statistics
from .finder import Fixture, find, pick, root_of
from .test_d2v2 import is_d2v2

Plant = Callable[[pytest.MonkeyPatch], None]


@dataclasses.dataclass(frozen=True)
class Case:
    """On which fixture a fault has to show, and where (prefixes of recorded names)."""

    kind: str
    where: Callable[[Fixture], bool]
    check: Callable[[Fixture], Comparison]
    noticed_by: tuple[str, ...]
    plant: Plant


CASES: dict[str, Case] = {}


def step(modality: str, *noticed_by: str, like: str = "", **options: str) -> Callable[[Plant], Plant]:
    """like: a property of the fixture, "" = the plain one. options: other values than the fixture's, __ for the dot."""
    changes = {key.replace("__", "."): value for key, value in options.items()}

    def where(fixture: Fixture) -> bool:
        per_layer, padded = fixture.config["modality"]["learned_alibi_scale_per_layer"], fixture.name == "padded"
        properties = {"": not per_layer and not padded, "padded": padded, "per layer": per_layer}
        return kind_of(fixture) == modality and properties[like]

    def register(plant: Plant) -> Plant:
        CASES[plant.__name__] = Case(
            "single_step", where, lambda fixture: check_single_step(fixture, changes), noticed_by, plant
        )
        return plant

    return register


def masks(family: str, *noticed_by: str) -> Callable[[Plant], Plant]:
    def register(plant: Plant) -> Plant:
        CASES[plant.__name__] = Case(
            "mask_statistics",
            lambda fixture: fixture.family == family,
            lambda fixture: check_mask_statistics(fixture, draws=200),
            noticed_by,
            plant,
        )
        return plant

    return register


def wrap(patch: pytest.MonkeyPatch, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace owner.name by wrapper(original, *arguments)."""
    original = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    patch.setattr(owner, name, replaced)


# ------------------------------------------------------------------------------------------------ copies, gathering


@step("AUDIO", "target", "loss.total")
def targets_repeated_copy_by_copy(patch: pytest.MonkeyPatch) -> None:
    """b0m0 b1m0 b0m1 ... where masks and students stand sample by sample."""

    def at_scored(everywhere: Tensor, given: Masks) -> Tensor:
        samples, _, num_tokens = given.hidden.shape
        row = given.scored_rows // num_tokens
        return everywhere[row % samples, given.scored_rows % num_tokens]

    patch.setattr(data2vec, "at_scored", at_scored)


@step("IMAGE", "student_in", "pred")
def students_repeated_copy_by_copy(patch: pytest.MonkeyPatch) -> None:
    from d2v_vision import feature_encoder

    def take(original: Any, x: Tensor, given: Masks) -> Tensor:
        rows = x.repeat(given.num_copies, 1, 1)
        return torch.take_along_dim(rows, given.visible.flatten(0, 1).unsqueeze(-1), 1)

    wrap(patch, feature_encoder, "take_visible", take)


@step("AUDIO", "student_alibi_bias", "student_layer.0")
def alibi_between_places_after_gathering(patch: pytest.MonkeyPatch) -> None:
    """Distances of the rows of the gathered sequence, as if nothing had been taken out."""

    def unscaled(original: Any, self: Alibi, tokens: Tokens) -> Tensor:
        bias = original(self, dataclasses.replace(tokens, index=None))
        return bias.expand(len(tokens.x), -1, -1, -1)

    wrap(patch, Alibi, "unscaled", unscaled)


@step("AUDIO", "student_in", "pred")
def positions_on_the_sequence_with_nothing_zeroed(patch: pytest.MonkeyPatch) -> None:
    def view(original: Any, self: VisibleAudioEncoder, tokens: Tokens, given: Masks | None) -> Tokens:
        if given is not None:
            given = dataclasses.replace(given, hidden=torch.zeros_like(given.hidden))
        return original(self, tokens, given)

    wrap(patch, VisibleAudioEncoder, "view", view)


@step("AUDIO", "student_in", "grad.modality_encoders.AUDIO.project_features")
def positions_gathered_and_content_forgotten(patch: pytest.MonkeyPatch) -> None:
    from d2v_audio import feature_encoder

    calls: list[int] = []

    def take(original: Any, x: Tensor, given: Masks) -> Tensor:
        calls.append(0)
        taken = original(x, given)
        return taken * 0 if len(calls) % 2 else taken

    wrap(patch, feature_encoder, "take_visible", take)


@step("AUDIO", "teacher_in", "target_full")
def teacher_without_positions(patch: pytest.MonkeyPatch) -> None:
    def view(original: Any, self: VisibleAudioEncoder, tokens: Tokens, given: Masks | None) -> Tokens:
        if given is None:
            return dataclasses.replace(tokens, x=self.prenet(tokens.x, tokens.padding_mask, self._biases(tokens)))
        return original(self, tokens, given)

    wrap(patch, VisibleAudioEncoder, "view", view)


@step("AUDIO", "student_in", "student_layer.0", like="padded", official_quirks="false")
def padding_kept_out_of_the_convolutions(patch: pytest.MonkeyPatch) -> None:
    """What d2v does unless told otherwise, and the official code does not."""


@step("AUDIO", "student_padding_mask", like="padded")
def padding_mask_not_gathered(patch: pytest.MonkeyPatch) -> None:
    from d2v_audio import feature_encoder

    def take(padding_mask: Tensor, given: Masks) -> Tensor:
        assert given.visible is not None
        return padding_mask.repeat_interleave(given.num_copies, 0)[:, : given.visible.shape[2]]

    patch.setattr(feature_encoder, "take_visible_padding", take)


# ------------------------------------------------------------------------------------------------------------ ALiBi


@step("AUDIO", "alibi_unscaled", "student_layer.0")
def slopes_of_twice_as_many_heads(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, visible, "alibi_slopes", lambda original, heads: original(2 * heads)[:heads])


@step("AUDIO", "student_alibi_bias", "teacher_alibi_bias")
def attention_that_grows_with_distance(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, Alibi, "unscaled", lambda original, self, tokens: -original(self, tokens))


@step("AUDIO", "teacher_alibi_bias", "target_layer.0")
def teacher_with_the_scale_of_the_student(patch: pytest.MonkeyPatch) -> None:
    def load(original: Any, self: EMATeacher, state: dict[str, Tensor]) -> None:
        name = "encoder.alibi.scale"
        original(self, {**state, name: self.own_state()[name].clone()})

    wrap(patch, EMATeacher, "load_own_state", load)


@step("AUDIO", "student_alibi_bias", "grad.modality_encoders.AUDIO.alibi_scale")
def scale_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Alibi, "forward", lambda self, tokens: self.unscaled(tokens))


@step("AUDIO", "student_layer.0", "target_layer.0", like="per layer")
def scales_counted_from_the_first_shared_block(patch: pytest.MonkeyPatch) -> None:
    """The prenet's scales go to the first shared blocks, whose own begin behind them."""

    def rest(original: Any, self: Prenet, bias: Any) -> Any:
        return bias[: len(bias) - self.num_layers] if isinstance(bias, list) else bias

    wrap(patch, Prenet, "rest", rest)


# ----------------------------------------------------------------------------------------------------------- prenet


@step("AUDIO", "target_full", "target", like="per layer", target__top_k_layers="2")
def a_layer_of_the_average_forgotten(patch: pytest.MonkeyPatch) -> None: ...


@step("IMAGE", "target_full", "target")
def prenet_counted_in_the_top_k(patch: pytest.MonkeyPatch) -> None:
    """The average is over all blocks that ran, prenet blocks included."""
    ran: list[Tensor] = []
    forward = Prenet.forward

    def with_taps(self: Prenet, x: Tensor, padding_mask: Tensor | None, bias: Any = None) -> Tensor:
        ran[:] = self.transformer(self.norm(x), padding_mask, self.own(bias), True).ffn
        return forward(self, x, padding_mask, bias)

    def call(original: Any, self: TopKTargets, teacher: TransformerOutput, *rest: Any) -> Tensor:
        teacher = teacher._replace(ffn=[*teacher.ffn[len(ran) :], *ran])
        return original(self, teacher, *rest)

    patch.setattr(Prenet, "forward", with_taps)
    wrap(patch, TopKTargets, "__call__", call)


@step("IMAGE", "student_in", "teacher_in")
def norm_after_the_prenet_blocks(patch: pytest.MonkeyPatch) -> None:
    def forward(self: Prenet, x: Tensor, padding_mask: Tensor | None, bias: Any = None) -> Tensor:
        assert self.norm is not None
        return self.norm(self.transformer(x, padding_mask, self.own(bias)).x)

    patch.setattr(Prenet, "forward", forward)


@step("AUDIO", "student_in", like="per layer")
def prenet_blocks_without_alibi(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Prenet, "own", lambda self, bias: None)


# ---------------------------------------------------------------------------------------------------------- decoder


@step("AUDIO", "decoder_block_raw.2", "pred", decoder__residual="false")
def residual_left_out(patch: pytest.MonkeyPatch) -> None: ...


@step("TEXT", "decoder_block_raw.1", "pred", decoder__residual="true")
def residual_where_there_is_none(patch: pytest.MonkeyPatch) -> None: ...


@step("AUDIO", "decoder_in", "pred")
def noise_left_out(patch: pytest.MonkeyPatch) -> None:
    def on_the_grid(original: Any, self: ConvDecoder, tokens: Tokens, given: Masks) -> Any:
        x, keep = original(self, tokens, given)
        return x.masked_fill(given.hidden.flatten(0, 1).unsqueeze(-1), 0.0), keep

    wrap(patch, ConvDecoder, "on_the_grid", on_the_grid)


@step("AUDIO", "decoder_in", "decoder_out")
def encoded_tokens_put_back_in_a_row(patch: pytest.MonkeyPatch) -> None:
    def on_the_grid(original: Any, self: ConvDecoder, tokens: Tokens, given: Masks) -> Any:
        assert tokens.index is not None
        order = torch.arange(tokens.index.shape[1]).expand_as(tokens.index)
        return original(self, dataclasses.replace(tokens, index=order), given)

    wrap(patch, ConvDecoder, "on_the_grid", on_the_grid)


@step("IMAGE", "decoder_block_raw.0", "pred")
def columns_of_the_grid_first(patch: pytest.MonkeyPatch) -> None:
    """Not caught by shapes: the grid is square."""

    def forward(original: Any, self: DecoderBlock, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        def turned(one: Tensor) -> Tensor:
            return one.unflatten(1, grid).transpose(1, 2).flatten(1, 2)

        return turned(original(self, turned(x), grid))

    wrap(patch, DecoderBlock, "forward", forward)


@step("TEXT", "decoder_out", "pred")
def projections_without_gelu(patch: pytest.MonkeyPatch) -> None:
    def project(self: ConvDecoder, x: Tensor) -> Tensor:
        for linear in self.projections:
            x = linear(x)
        return x

    patch.setattr(ConvDecoder, "project", project)


@step("AUDIO", "pred", "loss.total")
def predictions_at_visible_places(patch: pytest.MonkeyPatch) -> None:
    def forward(original: Any, self: ConvDecoder, tokens: Tokens, given: Masks) -> Tensor:
        seen = (~given.hidden).flatten().nonzero().squeeze(1)[: len(given.scored_rows)]
        return original(self, tokens, dataclasses.replace(given, scored_rows=seen))

    wrap(patch, ConvDecoder, "forward", forward)


# ------------------------------------------------------------------------------------------- positions, CLS, teacher


@step("IMAGE", "student.modality_encoders.IMAGE.fixed_positional_encoder", "student_in", "teacher_in")
def rows_and_columns_of_positions_exchanged(patch: pytest.MonkeyPatch) -> None:
    from d2v_vision import feature_encoder

    def swapped(original: Any, rows: int, columns: int, dim: int) -> Tensor:
        return original(rows, columns, dim).roll(dim // 2, 1)

    wrap(patch, feature_encoder, "sine_positions", swapped)


@step("IMAGE", "student_in", "pred")
def positions_given_out_after_gathering(patch: pytest.MonkeyPatch) -> None:
    def view(original: Any, self: VisiblePatchEncoder, tokens: Tokens, given: Masks | None) -> Tokens:
        if given is None:
            return original(self, tokens, given)
        x = visible.take_visible(tokens.x, given)
        x = x + self.positions[: x.shape[1]]
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], 1)
        assert given.visible is not None
        return Tokens(self.prenet(x, None), None, tokens.grid, 1, given.visible.flatten(0, 1))

    wrap(patch, VisiblePatchEncoder, "view", view)


@step("IMAGE", "loss.cls", "loss.total", official_quirks="false")
def mean_over_rows(patch: pytest.MonkeyPatch) -> None:
    """What d2v does unless told otherwise; the official code sums over a worker's rows."""


@step("IMAGE", "cls.target", "loss.cls")
def cls_asked_for_the_mean_of_what_is_hidden(patch: pytest.MonkeyPatch) -> None:
    from . import d2v2_checks

    def mean(x: Tensor, padding_mask: Tensor | None) -> Tensor:
        return x[:, : x.shape[1] // 2].mean(1)

    patch.setattr(data2vec, "mean_of_tokens", mean)
    patch.setattr(d2v2_checks, "mean_of_tokens", mean)


@step("IMAGE", "loss.cls")
def cls_loss_not_counted_per_scored_token(patch: pytest.MonkeyPatch) -> None:
    wrap(patch, RegressionLoss, "of_rows", lambda original, self, p, t, n: original(self, p, t, 1))


@step("IMAGE", "loss.total", "grad.modality_encoders.IMAGE.extra_tokens", loss__cls_weight="0.0")
def cls_loss_left_out(patch: pytest.MonkeyPatch) -> None: ...


@step("IMAGE", "teacher")
def teacher_with_the_patches_of_the_student(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        VisionModality, "teacher_parts", lambda self: {"": "average", "encoder.embedding": "share"}
    )  # fmt: skip


@step("TEXT", "teacher")
def teacher_with_an_embedding_of_its_own(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TextModality, "teacher_parts", lambda self: {"": "average"})


@step("TEXT", "decoder_block_raw.0", "pred", like="padded", official_quirks="false")
def padding_kept_out_of_the_decoder(patch: pytest.MonkeyPatch) -> None:
    """What d2v does unless told otherwise; the official code scores padding too."""


@step("TEXT", "teacher_in", "student_in")
def positions_counted_from_one(patch: pytest.MonkeyPatch) -> None:
    from d2v_text import feature_encoder

    wrap(patch, feature_encoder, "position_ids", lambda original, *args: original(*args) - 1)


@step("TEXT", "student_in", "student_layer.0")
def norm_missing(patch: pytest.MonkeyPatch) -> None:
    def place(self: VisibleTextEncoder, tokens: Tokens) -> Tensor:
        return tokens.x + self.positions(torch.arange(2, 2 + tokens.x.shape[1]))

    patch.setattr(VisibleTextEncoder, "_place", place)


@step("AUDIO", "target_layer.0", "target")
def student_used_as_the_teacher(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(EMATeacher, "load_own_state", lambda self, state: None)


@step("AUDIO", "student_layer.0", "student_alibi_bias")
def bias_only_for_the_teacher(patch: pytest.MonkeyPatch) -> None:
    def forward(original: Any, self: Student, tokens: Tokens, given: Masks | None, taps: bool = False) -> Any:
        if given is None:
            return original(self, tokens, given, taps)
        view = self.encoder.view(tokens, given)
        return view, self.transformer(view.x, view.padding_mask, torch.zeros(len(view.x), 4, 1, 1), taps)

    wrap(patch, Student, "forward", forward)


# ------------------------------------------------------------------------------------------------------------ masks


@masks("d2v2_image", "visible_largest_block_mean", "masked_blocks_per_row_mean")
def blocks_are_what_is_hidden(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch, masking, "draw_blocks",
        lambda original, shape, config, rng: ~original(shape, config, rng) if config.inverse else original(
            shape, config, rng
        ),
    )  # fmt: skip


@masks("d2v2_audio", "masked_largest_block_mean", "rate")
def blocks_moved_inside_at_the_border(patch: pytest.MonkeyPatch) -> None:
    """Every block whole, rather than cut off: the ends are then hidden as often as the middle."""

    def inside(shape: tuple[int, ...], config: Any, rng: np.random.Generator) -> np.ndarray:
        blocks = np.zeros(shape, dtype=bool)
        for _ in range(int(shape[0] * (config.mask_prob + config.adjust) / config.mask_length)):
            first = int(rng.integers(shape[0] - config.mask_length + 1)) // config.mask_length * config.mask_length
            blocks[first : first + config.mask_length] = True
        return blocks

    patch.setattr(masking, "draw_blocks", inside)


@masks("d2v2_audio", "masked_block_size_mean of block1d")
def no_blocks_at_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(masking, "draw_blocks", lambda shape, config, rng: np.zeros(shape, dtype=bool))


@masks("d2v2_image", "visible_blocks_per_row_mean")
def adjustment_left_out(patch: pytest.MonkeyPatch) -> None:
    wrap(
        patch, masking, "draw_blocks",
        lambda original, shape, config, rng: original(shape, dataclasses.replace(config, adjust=0.0), rng),
    )  # fmt: skip


@masks("d2v2_audio", "masked_fraction_mean of block1d", "masked_fraction_std of block1d")
def share_not_made_exact(patch: pytest.MonkeyPatch) -> None:
    def only_blocks(original: Any, shape: Any, config: Any, rng: Any, allowed: Any = None) -> np.ndarray:
        return masking.draw_blocks(shape, config, rng).ravel()

    wrap(patch, masking, "block_mask", only_blocks)
    patch.setattr(masking.BlockMasking, "__call__", _hidden_only)


def _hidden_only(self: Any, layouts: Any, num_copies: int, rngs: Any) -> Masks:
    hidden = np.stack([masking.block_mask(one.shape, self.config, rng) for one, rng in zip(layouts, rngs, strict=True)])
    first = int((~hidden[0]).sum())
    return Masks.of(hidden, visible=np.zeros((len(hidden), first), dtype=np.int64))


# ------------------------------------------------------------------------------------------------------------ tests


@pytest.fixture(scope="module")
def fixtures(pytestconfig: pytest.Config) -> list[Fixture]:
    return [fixture for fixture in find(root_of(pytestconfig)) if is_d2v2(fixture)]


@pytest.mark.parametrize("fault", CASES)
def test_noticed(fault: str, fixtures: list[Fixture], monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[fault]
    fixture = pick(fixtures, case.kind, case.where)
    case.plant(monkeypatch)
    with pytest.raises(ParityError) as caught:
        case.check(fixture)
    for prefix in case.noticed_by:
        assert any(name.startswith(prefix) for name in caught.value.failed), (prefix, caught.value.failed)
