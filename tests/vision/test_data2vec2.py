"""data2vec 2.0 on images: sizes of the official models, positions, updates, what the teacher averages."""

from __future__ import annotations

import pytest
import torch

from d2v_core.contract import Layout
from d2v_core.errors import UserError
from d2v_core.keyed import generator
from d2v_core.run import build_model
from d2v_vision.feature_encoder import sine_positions
from d2v_vision.modality import VisionModality

from ..runs import count, followed, modality_of, updated

SMALL = ("preset=base2", "data.synthetic_images=16", "data.batch=8", "data.micro_batch=4", "model.embed_dim=16",
         "model.num_layers=2", "model.num_heads=2", "target.top_k_layers=2", "data.image_size=32",
         "features.patch_size=4", "decoder.dim=16", "decoder.groups=4", "decoder.layers=2",
         "train.num_masks=3")  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def modality(*words: str) -> VisionModality:
    return modality_of(VisionModality, words)


@pytest.mark.parametrize(
    ("preset", "official", "without_decoder", "fixed", "hidden"),
    [
        ("base2", 88_383_744, 85_797_888, 150_528, 157),
        ("large2", 309_268_480, 303_300_608, 200_704, 147),
        ("huge2", 637_556_992, 630_917_120, 250_880, 147),
        ("huge2_14", 637_403_392, 630_763_520, 327_680, 192),
    ],
)
def test_sizes_of_the_official_models(preset, official, without_decoder, fixed, hidden) -> None:
    """The official counts have the fixed positions among the parameters."""
    made = modality(f"preset={preset}")
    with torch.device("meta"):
        model = build_model(made)
    assert count(p for p in model.parameters() if p.requires_grad) == official - fixed
    assert count(model.student.parameters()) == count(model.teacher.parameters()) == without_decoder - fixed
    masks = made.masking()([Layout(made.grid)], made.config.train.num_masks, [generator(0, "m")])
    assert masks.num_copies == 16 and (masks.hidden.sum(-1) == hidden).all()


def test_the_second_loss_weighs_as_much_as_officially() -> None:
    """0.01 of a sum over the rows of a worker."""
    for preset in ("base2", "large2", "huge2", "huge2_14"):
        config = modality(f"preset={preset}").config
        rows = config.section("data", VisionModality.sections("patches")["data"]).micro_batch * config.train.num_masks
        assert config.loss.cls_weight == pytest.approx(0.01 * rows)


def test_positions() -> None:
    positions = sine_positions(2, 3, 8)
    assert positions.shape == (6, 8)
    angles = torch.tensor([1.0, 10000**-0.5])
    column, row = torch.tensor([0, 1, 2, 0, 1, 2.0]), torch.tensor([0, 0, 0, 1, 1, 1.0])
    for first, place in ((0, column), (4, row)):
        torch.testing.assert_close(positions[:, first : first + 2], (place[:, None] * angles).sin())
        torch.testing.assert_close(positions[:, first + 2 : first + 4], (place[:, None] * angles).cos())
    with pytest.raises(UserError, match=r"model\.embed_dim=18 must be a multiple of 4"):
        build_model(modality(*SMALL, "model.embed_dim=18", "decoder.groups=2"))


@pytest.mark.parametrize(
    "words",
    [(), ("official_quirks=true",), ("prenet.layers=0", "loss.cls_weight=0"), ("train.precision=bf16",),
     ("target.tap=block", "loss.beta=2", "train.num_masks=1")],
    ids=["plain", "quirks", "no prenet", "bf16", "blocks"],
)  # fmt: skip
def test_updates(words: tuple[str, ...]) -> None:
    model, done = updated(modality(*SMALL, *words), 3)
    for batches, numbers in done:
        assert [len(batch.ids) for batch in batches] == [4, 4] and 0.2 < numbers["target_std"] <= 1.01
    assert not {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}


def test_the_teacher_averages_everything_but_the_decoder() -> None:
    model = build_model(modality(*SMALL))
    assert not model.teacher.shares("encoder.embedding")
    assert all(moved == pytest.approx(0.1, abs=1e-5) for moved in followed(model).values())
    assert not any("positions" in name for name in model.teacher.own_state())


def test_visible_patches_stand_behind_cls_with_their_own_positions() -> None:
    made = modality(*SMALL, "prenet.layers=0")
    encoder = made.feature_encoder().eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = encoder.embed({"image": images})
    masks = made.masking()([Layout(made.grid)] * 2, 3, [generator(0, "m", i) for i in range(2)])
    assert masks.visible is not None
    whole, some = encoder.view(tokens, None), encoder.view(tokens, masks)
    assert whole.x.shape == (2, 65, 16) and whole.num_extra == some.num_extra == 1
    index = masks.visible.flatten(0, 1)
    for row in range(6):
        torch.testing.assert_close(some.x[row, 1:], whole.x[row // 3, 1:][index[row]])
        torch.testing.assert_close(some.x[row, 0], whole.x[0, 0])


def test_depths_for_learning_rates_of_fine_tuning() -> None:
    """Prenet and shared blocks are counted through; everything else learns as fast as the head (fairseq: 3 + 2 blocks,
    factor decay^(6 - i) for block i from 1)."""
    made = modality(*SMALL, "prenet.layers=3")
    depth = {name: made.layer_of(name) for name, _ in build_model(made).student.named_parameters()}
    top = 3
    steps = [top - depth[f"encoder.prenet.transformer.blocks.{i}.fc1.weight"] for i in range(3)]
    steps += [top - depth[f"transformer.blocks.{i}.fc1.weight"] for i in range(2)]
    assert steps == [5, 4, 3, 2, 1]
    assert {d for name, d in depth.items() if "blocks." not in name} == {top}
