"""Names and configurations of the official text implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from d2v_core.config import load_config
from d2v_core.errors import UserError
from d2v_core.run import build_model, load_model_state, model_state
from d2v_text import official

# The configuration of a tiny model, as the official code stores it.
CONFIG = Path(__file__).with_name("official_config.json")


@pytest.fixture
def cfg() -> dict[str, Any]:
    return json.loads(CONFIG.read_text())


def build(cfg: dict[str, Any], **options: Any):
    config, kind = load_config(official.config_from_official(cfg, vocab_size=75, **options))
    return config, build_model(kind(config))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_names_go_there_and_back(cfg: dict[str, Any], layers: int):
    _, model = build({**cfg, "head_layers": layers})
    ours = {n: torch.randn(t.shape) if t.is_floating_point() else t * 0 for n, t in model_state(model).items()}
    theirs = official.to_official(ours)
    assert {"encoder.sentence_encoder.layers.3.self_attn.k_proj.bias", "encoder.sentence_encoder.version",
            f"encoder.regression_head.{2 * layers - 2}.weight"} <= theirs.keys()  # fmt: skip
    back = official.from_official(theirs)
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)
    load_model_state(model, back, "the test")
    teacher = official.teacher_to_official(model.teacher.own_state())
    assert {name.split(".")[0] for name in teacher} == {
        "embed_tokens", "embed_positions", "layernorm_embedding", "layers", "version"
    }  # fmt: skip
    assert official.teacher_from_official(teacher).keys() == model.teacher.own_state().keys()


def test_old_names_and_a_nested_teacher():
    one = torch.ones(2)
    state = {"encoder.lm_head.0.weight": one, "encoder.sentence_encoder.emb_layer_norm.bias": one, "encoder._ema": {}}
    assert official.from_official(state).keys() == {
        "predictor.layers.0.weight", "student.encoder.norm.bias", official.FINGERPRINT
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("encoder.sentence_encoder.layer_norm.weight", "not known as data2vec text 1.0"),
        ("encoder.sentence_encoder.layers.0.self_attn.q_proj.weight", "lack k_proj, v_proj"),
    ],
)
def test_what_does_not_fit_is_named(name: str, words: str):
    with pytest.raises(UserError, match=words):
        official.from_official({name: torch.zeros(1)})


def test_every_option_arrives(cfg: dict[str, Any]):
    transformer = {**cfg["transformer"], "dropout": 0.1, "attention_dropout": 0.2, "activation_dropout": 0.05}
    transformer["encoder"] = {**transformer["encoder"], "layerdrop": 0.3}
    config, _ = build(
        {**cfg, "transformer": transformer, "head_layers": 3, "loss_beta": 0.5, "loss_scale": -1,
         "average_top_k_layers": 2, "batch_norm_target_layer": True, "layer_norm_targets": True,
         "instance_norm_targets": True, "ema_transformer_layers_only": False, "ema_decay": 0.99,
         "ema_end_decay": 0.999, "ema_anneal_end_step": 7}, exact=False,
    )  # fmt: skip
    model, target = config.model, config.target
    assert (model.embed_dim, model.num_layers, model.num_heads, model.mlp_ratio) == (48, 4, 4, 4.0)
    assert (model.dropout, model.attention_dropout, model.activation_dropout, model.layer_drop) == (0.1, 0.2, 0.05, 0.3)
    assert (target.top_k_layers, target.layer_norms, target.mean_norms) == (
        2,
        ["batch", "layer"],
        ["layer", "instance"],
    )
    assert not target.padding_in_stats
    assert (config.loss.beta, config.loss.scale) == (0.5, "inverse_sqrt")
    assert (config.teacher.ema_decay, config.teacher.ema_end_decay, config.teacher.ema_anneal_steps) == (0.99, 0.999, 7)
    assert config.sections["head"].layers == 3 and config.sections["embedding"].teacher == "average"
    assert config.sections["embedding"].max_positions == 40


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("transformer.encoder.normalize_before", True, "normalize_before=True: d2v has only False"),
        ("transformer.encoder.learned_pos", False, "learned_pos=False"),
        ("transformer.activation_fn", "relu", "activation_fn='relu'"),
        ("transformer.layernorm_embedding", False, "layernorm_embedding=False"),
        ("loss_scale", None, "loss_scale=None is NoneType"),
        ("head_layers", "2", "head_layers='2' is str"),
        ("deepnorm", True, "unknown: deepnorm"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_by_key(cfg: dict[str, Any], key: str, value: Any, words: str):
    changed = json.loads(json.dumps(cfg))
    *path, leaf = key.split(".")
    inner = changed
    for name in path:
        inner = inner[name]
    inner[leaf] = value
    with pytest.raises(UserError, match=words):
        official.config_from_official(changed, vocab_size=75)
