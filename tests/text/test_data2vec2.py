"""data2vec 2.0 on text: sizes of the official models, masks, updates, what the teacher sees."""

from __future__ import annotations

import pytest
import torch

from d2v_core.batching import StepLoader
from d2v_core.contract import Layout
from d2v_core.keyed import generator
from d2v_core.run import build_model
from d2v_text.modality import TextModality

from ..runs import count, modality_of, updated

SMALL = ("preset=base2", "model.embed_dim=32", "model.num_layers=2", "model.num_heads=4", "target.top_k_layers=2",
         "embedding.max_positions=48", "data.block_tokens=48", "data.batch_tokens=192", "data.micro_batch_tokens=96",
         "data.grammar_documents=20", "decoder.dim=16", "decoder.layers=2", "train.num_masks=3")  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def modality(*words: str) -> TextModality:
    return modality_of(TextModality, words)


@pytest.mark.parametrize(
    ("preset", "pretraining", "without_decoder", "averaged", "hidden"),
    [("base2", 152_961_792, 124_054_272, 85_054_464, 246), ("large2", 385_379_584, 354_309_120, 302_309_376, 256),
     ("large2_1m", 385_379_584, 354_309_120, 302_309_376, 256)],
)  # fmt: skip
def test_sizes_of_the_official_models(preset, pretraining, without_decoder, averaged, hidden):
    made = modality(f"preset={preset}", "embedding.vocab_size=50265")
    with torch.device("meta"):
        model = build_model(made)
    assert count(p for p in model.parameters() if p.requires_grad) == pretraining
    assert count(model.student.parameters()) == without_decoder
    own = {id(p) for p in model.student.parameters()}
    assert count(p for p in model.teacher.parameters() if id(p) not in own) == averaged
    masks = made.masking()([Layout((512,))], made.config.train.num_masks, [generator(0, "m")])
    assert masks.num_copies == 8 and (masks.hidden.sum(-1) == hidden).all()


@pytest.mark.parametrize(
    "words",
    [(), ("official_quirks=true",), ("data.break_mode=document",), ("data.break_mode=document", "official_quirks=true"),
     ("train.precision=bf16",)],
    ids=["plain", "quirks", "padded", "quirks padded", "bf16"],
)  # fmt: skip
def test_updates(words: tuple[str, ...]):
    model, done = updated(modality(*SMALL, *words), 3)
    assert all(0.1 < numbers["target_std"] <= 1.01 for _, numbers in done)
    assert not {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}


@pytest.mark.parametrize("quirks", [False, True])
def test_dropout_reaches_the_teacher_only_where_the_official_code_is_reproduced(quirks: bool):
    made = modality(*SMALL, "embedding.dropout=0.5", f"official_quirks={str(quirks).lower()}")
    model = build_model(made).train()
    _, _, (batch, *_) = next(iter(StepLoader(made, made.dataset("train"), seed=0, num_copies=3)))
    assert batch.masks is not None
    first, second = (model(batch.inputs, batch.masks).target for _ in range(2))
    assert torch.equal(first, second) != quirks
    view = model.student.encoder.view(model.student.encoder.embed(batch.inputs), batch.masks)
    dropped = (view.x == 0).float().mean(2)
    assert 0.3 < dropped.mean() < 0.7
    model.eval()
    view = model.student.encoder.view(model.student.encoder.embed(batch.inputs), batch.masks)
    assert (view.x == 0).float().mean() < 0.01


def test_the_teacher_shares_the_whole_encoder():
    model = build_model(modality(*SMALL))
    assert model.teacher.shares("encoder") and not model.teacher.shares("transformer")
