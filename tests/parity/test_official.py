"""Names and configurations of the official implementation, without any recorded tensor but the configurations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from d2v_audio import official
from d2v_audio.feature_encoder import WaveformConfig
from d2v_core.config import RunConfig, load_config
from d2v_core.data2vec import Data2Vec
from d2v_core.errors import UserError
from d2v_core.run import build_model, load_model_state, model_state

from .finder import RECORDED, find, pick


@pytest.fixture
def cfg() -> dict[str, Any]:
    return dict(pick(find(RECORDED), "single_step").config)


def build(cfg: dict[str, Any], **options: bool) -> tuple[RunConfig, Data2Vec]:
    config, kind = load_config(official.config_from_official(cfg, **options))
    return config, build_model(kind(config))


VARIANTS = [
    {},
    {"layer_norm_first": True, "conv_bias": True},
    {"extractor_mode": "default"},
    {"conv_feature_layers": "[(16, 4, 2)] + 3 * [(16, 2, 2)]", "encoder_ffn_embed_dim": 100},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=["base", "pre-norm", "group norm", "other sizes"])
def test_names_go_there_and_back(cfg: dict[str, Any], changes: dict[str, Any]) -> None:
    config, model = build({**cfg, **changes})
    ours = {name: torch.randn(tensor.shape) for name, tensor in model_state(model).items()}
    theirs = official.to_official(ours, config)
    assert theirs.keys() >= {"mask_emb", "encoder.layers.3.self_attn.k_proj.bias", "encoder.pos_conv.4.0.weight"}
    back = official.from_official(theirs, config)
    assert back.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(back[name], tensor), name
    load_model_state(model, back, "the test")

    teacher = model.teacher.own_state()
    as_official = official.teacher_to_official(teacher, config)
    assert {name.split(".")[0] for name in as_official} == {"pos_conv", "layers", "layer_norm"}
    again = official.teacher_from_official(as_official, config)
    assert again.keys() == teacher.keys()
    assert all(torch.equal(again[name], teacher[name]) for name in again)


def test_queries_keys_and_values_are_stacked_in_this_order(cfg: dict[str, Any]) -> None:
    config, _ = build(cfg)
    name = "encoder.layers.0.self_attn.{}_proj.bias"
    state = {name.format(part): torch.full((2,), float(i)) for i, part in enumerate("qkv")}
    stacked = official.from_official(state, config)
    assert stacked["student.transformer.blocks.0.attention.qkv.bias"].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_head_of_the_old_kind_and_a_nested_teacher(cfg: dict[str, Any]) -> None:
    config, _ = build(cfg)
    weight = torch.ones(2, 2)
    state = {"final_proj.0.weight": weight, "_ema": {"layers.0.fc1.weight": weight}}
    assert official.from_official(state, config).keys() == {"predictor.linear.weight"}
    teacher = official.teacher_from_official(state["_ema"], config)
    assert teacher.keys() == {"transformer.blocks.0.fc1.weight"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("encoder.layers.0.self_attn.w_proj.weight", "encoder.layers.0.self_attn.w_proj.weight"),
        ("quantizer.vars", "quantizer.vars"),
        ("encoder.layers.0.self_attn.q_proj.weight", "lack k_proj, v_proj"),
    ],
)
def test_what_does_not_fit_is_named(cfg: dict[str, Any], name: str, words: str) -> None:
    config, _ = build(cfg)
    with pytest.raises(UserError, match=words):
        official.from_official({name: torch.zeros(1)}, config)


def test_two_heads_are_refused(cfg: dict[str, Any]) -> None:
    config, _ = build(cfg)
    heads: dict[str, Tensor] = {"final_proj.weight": torch.zeros(1), "final_proj.0.weight": torch.zeros(1)}
    with pytest.raises(UserError, match="twice"):
        official.from_official(heads, config)


def test_the_teacher_shares_what_the_official_one_has_not(cfg: dict[str, Any]) -> None:
    config, _ = build(cfg)
    with pytest.raises(UserError, match="post_extract_proj"):
        official.teacher_to_official({"encoder.embedding.project.weight": torch.zeros(1)}, config)


def test_a_log_mel_front_end_has_no_official_names(cfg: dict[str, Any]) -> None:
    config, _ = load_config(["modality=audio", "preset=tiny"])
    with pytest.raises(UserError, match="logmel"):
        official.to_official({}, config)


def test_gradients_take_the_names_of_the_weights(cfg: dict[str, Any]) -> None:
    config, model = build({**cfg, "feature_grad_mult": 0.0})
    blocks = [p for name, p in model.named_parameters() if name.startswith("student.transformer")]
    torch.stack([p.sum() for p in blocks]).sum().backward()
    gradients = official.gradients_to_official(model, config)
    assert gradients.keys() == official.to_official(model_state(model), config).keys()
    given = gradients["encoder.layers.2.self_attn.v_proj.weight"]
    assert given is not None and given.shape == (48, 48)
    assert gradients["final_proj.weight"] is None


# ------------------------------------------------------------------------------------------------ configuration


def test_every_option_arrives(cfg: dict[str, Any]) -> None:
    cfg |= {
        "layer_norm_first": True, "dropout": 0.1, "attention_dropout": 0.2, "activation_dropout": 0.05,
        "encoder_layerdrop": 0.3, "feature_grad_mult": 0.5, "mask_prob": 0.5, "mask_length": 7, "mask_dropout": 0.1,
        "require_same_masks": False, "conv_pos": 64, "conv_pos_groups": 8, "pos_conv_depth": 4, "loss_beta": 0.25,
        "loss_scale": 0.1, "average_top_k_layers": 2, "group_norm_target_layer": True,
        "instance_norm_target_layer": False, "layer_norm_targets": True, "instance_norm_targets": True,
        "ema_decay": 0.99, "ema_end_decay": 0.999, "ema_anneal_end_step": 7, "ema_layers_only": False,
        "max_update": 9, "min_target_var": 0.2, "min_pred_var": 0.02, "conv_bias": True, "extractor_mode": "default",
    }  # fmt: skip
    config, _ = build(cfg)
    model, target = config.model, config.target
    assert (model.embed_dim, model.num_layers, model.num_heads, model.mlp_ratio, model.norm) == (48, 4, 4, 2.0, "pre")
    assert (model.dropout, model.attention_dropout, model.activation_dropout, model.layer_drop) == (0.1, 0.2, 0.05, 0.3)
    assert (target.top_k_layers, target.layer_norms, target.mean_norms) == (2, ["group"], ["layer", "instance"])
    assert target.official_axes and target.padding_in_stats
    assert (config.loss.beta, config.loss.scale) == (0.25, "0.1")
    assert (config.teacher.ema_decay, config.teacher.ema_end_decay, config.teacher.ema_anneal_steps) == (0.99, 0.999, 7)
    assert (config.train.max_steps, config.guard.min_target_std, config.guard.min_pred_std) == (9, 0.2, 0.02)
    features = config.section("features", WaveformConfig)
    assert (features.channels, features.kernels, features.strides) == (
        32, [10, 3, 3, 3, 3, 2, 2], [5, 2, 2, 2, 2, 2, 2]
    )  # fmt: skip
    assert (features.norm, features.bias, features.grad_mult) == ("group", True, 0.5)
    positions, mask = config.sections["positions"], config.sections["mask"]
    assert (positions.depth, positions.width, positions.groups, positions.teacher) == (4, 64, 8, "average")
    assert not positions.rezero_padding
    assert (mask.mask_prob, mask.mask_length, mask.same_count, mask.mask_dropout) == (0.5, 7, False, 0.1)


def test_without_exact_padding_is_treated_as_elsewhere_in_d2v(cfg: dict[str, Any]) -> None:
    config, _ = build(cfg, exact=False)
    assert not config.target.padding_in_stats and config.sections["positions"].rezero_padding


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation_fn": "relu"}, "activation_fn='relu'"),
        ({"layer_type": "conformer"}, "layer_type='conformer'"),
        ({"dropout_input": 0.1}, "dropout_input=0.1"),
        ({"mask_channel_prob": 0.1}, "mask_channel_prob"),
        ({"mask_selection": "poisson"}, "mask_selection"),
        ({"no_mask_overlap": True}, "no_mask_overlap"),
        ({"crop_seq_to_multiple": 2}, "crop_seq_to_multiple"),
        ({"ema_transformer_only": False}, "ema_transformer_only"),
        ({"extractor_mode": "batch"}, "extractor_mode='batch'"),
        ({"pos_conv_depth": 1}, "pos_conv_depth=1"),
        ({"conv_feature_layers": "[(8, 3, 2), (16, 3, 2)]"}, r"\[8, 16\] channels"),
        ({"encoder_layers": "12"}, "encoder_layers='12' is str"),
        ({"conv_bias": 1}, "conv_bias=1 is int"),
        ({"deepnorm": True}, "unknown: deepnorm"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_by_key(
    cfg: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        official.config_from_official({**cfg, **changes})


def test_all_problems_are_named_at_once(cfg: dict[str, Any]) -> None:
    del cfg["encoder_layers"]
    with pytest.raises(UserError, match=r"(?s)activation_fn.*encoder_layers is missing"):
        official.config_from_official({**cfg, "activation_fn": "relu"})


def test_leftovers_in_released_files_are_let_pass_on_request(cfg: dict[str, Any]) -> None:
    words = official.config_from_official(cfg)
    assert official.config_from_official({**cfg, "debug_leftover": 1, "_name": "data2vec_audio"}, strict=False) == words


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("[(512, 10, 5)] + [(512, 3, 2)] * 2", [(512, 10, 5), (512, 3, 2), (512, 3, 2)]),
        (" [(8,2,1),(8,3,2)]*2+2*[(8, 1, 1)]", [(8, 2, 1), (8, 3, 2), (8, 2, 1), (8, 3, 2), (8, 1, 1), (8, 1, 1)]),
        ("([(4, 2, 2)] + [(4, 1, 1)]) * 1", [(4, 2, 2), (4, 1, 1)]),
        ("[[4, 2, 2]]", [(4, 2, 2)]),
    ],
)
def test_convolutions_are_read(text: str, layers: list[tuple[int, int, int]]) -> None:
    assert official.parse_conv_layers(text) == layers


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch /tmp/owned')",
        "[(512, 10, 5)] + __import__('os').listdir('.')",
        "[(512, 10, print(1))]",
        "[(x := 512, 10, 5)]",
        "[(512, 10, 5) for _ in range(9)]",
        "(lambda: [(512, 10, 5)])()",
        "[(512, 10, 5)] * 10 ** 9",
        "[(512, 10, 5)] * 1000000000",
        "[(512, 10, 5)] * 60000 * 60000",
        "[(512, 10, -5)]",
        "[(512, 10, 5.0)]",
        "[(True, 10, 5)]",
        "[(512, 10)]",
        "[(512, 10, 5)] - [(512, 10, 5)]",
        "[*[(512, 10, 5)]]",
        "[] * 65536",
        "(" * 400 + ")" * 400,
        "[(1, 1, 1)]" + " + [(1, 1, 1)]" * 100,
        "[(512, 10, 5)",
        "[(512, 10, 5)]\0",
        "[]",
        "",
    ],
)
def test_what_is_no_list_of_convolutions_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="conv_feature_layers"):
        official.parse_conv_layers(text)
