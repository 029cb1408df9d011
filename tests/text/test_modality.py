"""The text modality against its contract: sizes, presets, vocabularies, masks, teacher."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from d2v_core import checkpoint
from d2v_core.batching import StepLoader
from d2v_core.contract import Batch
from d2v_core.errors import UserError
from d2v_core.run import build_model, model_state
from d2v_core.trainer import Updater
from d2v_text import grammar
from d2v_text.masking import NOT_SELECTED
from d2v_text.modality import TextModality
from d2v_text.tokenizer import BOS, PAD, train_tokenizer

from ..runs import count, modality_of

SMALL = ("data.grammar_documents=20", "data.batch_tokens=512", "model.embed_dim=32", "model.num_layers=2",
         "target.top_k_layers=2")  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


def modality(*words: str) -> TextModality:
    return modality_of(TextModality, words)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    train_tokenizer(["some words of a text that is long enough for merges of letters"] * 3, 280).save(
        str(tmp_path / "t.json")
    )
    return tmp_path / "t.json"


def test_parameter_counts_of_the_official_base_model():
    with torch.device("meta"):
        model = build_model(modality("preset=base", "embedding.vocab_size=50265"))
    assert count(p for p in model.parameters() if p.requires_grad) == 126_415_872
    assert count(model.student.parameters()) == 124_054_272
    assert count(model.student.encoder.parameters()) == 38_999_808
    assert count(model.student.transformer.parameters()) == 85_054_464
    assert count(model.predictor.parameters()) == 2_361_600
    assert count(model.teacher.parameters()) == 124_054_272  # a copy of its own, embeddings too


@pytest.mark.parametrize("preset", sorted(p.stem for p in TextModality.recipes().glob("*.yaml")))
def test_every_preset_loads(preset: str):
    made = modality(f"preset={preset}")
    batching = made.batching()
    assert batching.batch >= batching.micro_batch >= batching.max_size > 2
    assert made.visible_only or made.mask.teacher_input == "full"
    with torch.device("meta"):
        build_model(made)


def test_the_recipes_say_what_the_sources_say():
    paper, shipped = modality("preset=base").config, modality("preset=base_shipped").config
    for config in (paper, shipped):
        assert (config.target.top_k_layers, config.target.layer_norms) == (10, ["layer"])
        assert (config.loss.beta, config.loss.scale, config.optim.lr) == (4.0, "sum", 2e-4)
        assert (config.model.dropout, config.model.attention_dropout, config.model.layer_drop) == (0.1, 0.1, 0.0)
        assert (config.optim.clip_grad_norm, config.optim.weight_decay, config.optim.eps) == (5.0, 0.01, 1e-6)
        assert config.train.max_steps == 1_000_000
    masks = [config.sections["mask"] for config in (paper, shipped)]
    assert [(m.mask_prob, m.mask_length, m.random_prob, m.unmasked_prob) for m in masks] == [
        (0.15, 1, 0.1, 0.1), (0.35, 4, 0.0, 0.0)
    ]  # fmt: skip
    assert [c.teacher.ema_anneal_steps for c in (paper, shipped)] == [100_000, 300_000]
    assert [(c.optim.schedule, c.optim.warmup_ratio) for c in (paper, shipped)] == [
        ("tri_stage", 0.05), ("cosine", 0.01)
    ]  # fmt: skip


def micro_batches(made: TextModality, steps: int = 3) -> list[Batch]:
    loader = iter(StepLoader(made, made.dataset("train"), seed=0))
    return [batch for _ in range(steps) for batch in next(loader)[2]]


def test_batches():
    made = modality(*SMALL)
    padded = 0
    for batch in micro_batches(made):
        ids = batch.inputs["ids"]
        assert ids.numel() <= 512 and (ids[:, 0] == BOS).all() and ids.shape[1] <= 64
        valid = ids != PAD
        assert batch.amount == valid.sum()
        if "padding_mask" in batch.inputs:
            padded += 1
            assert torch.equal(batch.inputs["padding_mask"], ~valid)
        else:
            assert valid.all()
        assert batch.masks is not None and batch.masks.hidden.shape == (len(ids), 1, ids.shape[1])
        assert not (batch.masks.scored[:, 0] & ~valid).any() and not (batch.masks.hidden[:, 0] & ~valid).any()
        assert batch.masks.scored.any(-1).all()
    assert padded


def test_the_teacher_reads_the_whole_text_or_the_labels():
    (batch, *_) = micro_batches(modality(*SMALL))
    assert modality(*SMALL).teacher_inputs(batch) is None
    labels = modality(*SMALL, "mask.teacher_input=labels", "mask.score=masked")
    (batch, *_) = micro_batches(labels)
    given = labels.teacher_inputs(batch)
    assert given is not None and batch.masks is not None and batch.masks.fill is not None
    selected = batch.masks.fill[:, 0] != NOT_SELECTED
    assert torch.equal(given["ids"] != PAD, selected) and torch.equal(given["padding_mask"], ~selected)
    assert torch.equal(given["ids"][selected], batch.inputs["ids"][selected])
    assert (batch.masks.scored[:, 0] & selected).sum() < selected.sum()  # unchanged tokens are labels, but not scored


@pytest.mark.parametrize("extra", [(), ("mask.teacher_input=labels", "mask.score=masked"), ("head.layers=1",)])
def test_updates_make_finite_steps(extra):
    made = modality(*SMALL, "model.dropout=0.1", *extra)
    model = build_model(made)
    updater = Updater(model.train(), made.config, torch.device("cpu"))
    for step, batch in enumerate(micro_batches(made, 4)):
        result = updater.update(step + 300, [batch], made.teacher_inputs)
        assert np.isfinite(result.loss.item()) and result.target_std > 0.1


@pytest.mark.parametrize("how", ["copy", "average"])
def test_tables_of_the_teacher_are_copied_or_averaged(how: str):
    made = modality(*SMALL, f"embedding.teacher={how}")
    model = build_model(made)
    assert not model.teacher.shares("encoder.embedding")
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(1.0)
    before = {name: p.clone() for name, p in model.teacher.module.named_parameters()}
    model.update_teacher(0.9)
    for name, p in model.teacher.module.named_parameters():
        moved = 1.0 if name.startswith("encoder.") and how == "copy" else 0.1
        torch.testing.assert_close(p, before[name] + moved, atol=1e-5, rtol=0)


def test_vocabularies(tokenizer: Path, tmp_path: Path):
    assert modality().vocabulary == grammar.vocabulary()
    assert modality(f"data.tokenizer={tokenizer}").vocabulary.size == 280
    assert modality("embedding.vocab_size=1000").vocabulary.size == 1000
    assert modality(f"data.tokenizer={tokenizer}").probe() is None
    with pytest.raises(UserError, match=r"has 280 symbols, embedding.vocab_size=300"):
        modality(f"data.tokenizer={tokenizer}", "embedding.vocab_size=300")
    with pytest.raises(UserError, match=r"needs a tokenizer. Train one with `d2v tokenizer train .*x.txt"):
        modality("data.path=x.txt")
    with pytest.raises(UserError, match=r"the built-in grammar has a vocabulary of its own"):
        modality(f"data.tokenizer={tokenizer}").dataset("train")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("data.block_tokens=100",), "data.block_tokens=100 is more than embedding.max_positions=64"),
        (("data.block_tokens=2",), "data.block_tokens=2 must be at least 3"),
        (("data.micro_batch_tokens=99999",), "data.micro_batch_tokens=99999 must lie between"),
        (("data.max_bad_ratio=2",), "data.max_bad_ratio=2.0 must lie"),
        (("head.layers=0",), "head.layers=0 must be at least 1"),
        (("model.norm=pre",), "model.norm=pre"),
        (("mask.mask_prob=1",), "mask.mask_prob=1.0 must lie between 0 and 1"),
        (("mask.score=all",), "one of: selected, masked"),
        (("embedding.vocab_size=4",), "embedding.vocab_size=4 must be above 5"),
        (("data.tokenizer=no.json",), "data.tokenizer=no.json is no file"),
        (("data.keys=x",), "data.key"),
    ],
)
def test_what_cannot_work_is_said_before_training(words, said):
    with pytest.raises(UserError) as caught:
        modality(*words)
    assert said in str(caught.value)


def test_it_can_go_to_a_worker(tokenizer: Path):
    made = modality(f"data.tokenizer={tokenizer}")
    assert made.tokenizer.vocabulary == pickle.loads(pickle.dumps(made)).vocabulary


def test_the_fingerprint_is_in_the_checkpoint(tmp_path: Path):
    model = build_model(modality(*SMALL))
    stored = checkpoint.Checkpoint(model_state(model), model.teacher.own_state(), {})
    checkpoint.save(tmp_path, 1, stored, 1)
    back = checkpoint.load(checkpoint.list_checkpoints(tmp_path)[-1]).model
    assert int(back["student.encoder.embedding.fingerprint"]) == grammar.vocabulary().fingerprint
