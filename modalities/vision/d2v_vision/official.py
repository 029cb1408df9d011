"""Between the official implementations of data2vec vision 1.0 and d2v: names of weights, and configurations.

There are two, which differ in method (teacher, head, loss; see the options of `features`) and in names:
  official  facebookresearch/data2vec_vision, beit/modeling_cyclical.py, which made the released checkpoints
  fairseq   facebookresearch/fairseq, examples/data2vec/models/data2vec_vision.py
Whatever is keyed by parameter name goes through the same map: weights, the teacher's weights, gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from d2v_core.config import RunConfig
from d2v_core.errors import UserError
from d2v_core.official import NameTable, Options, gradients, moved
from d2v_vision.feature_encoder import CHANNELS, PatchConfig

Names = Literal["fairseq", "official"]

# ---------------------------------------------------------------------------------------------------------- names

_BLOCK = "student.transformer.blocks.#."
# d2v, fairseq, official; # is a number, and a final dot stands for .weight and .bias.
_TABLE: tuple[tuple[str, str, str], ...] = (
    ("student.encoder.cls_token", "cls_emb", "cls_token"),
    ("student.encoder.mask_token", "mask_emb", "mask_token"),
    ("student.encoder.embedding.conv.", "patch_embed.conv.", "patch_embed.proj."),
    (
        "student.encoder.positions.table",
        "encoder.rel_pos_bias.relative_position_bias_table",
        "rel_pos_bias.relative_position_bias_table",
    ),
    (
        "student.encoder.positions.index",
        "encoder.rel_pos_bias.relative_position_index",
        "rel_pos_bias.relative_position_index",
    ),
    ("student.transformer.norm.", "encoder.norm.", "norm."),
    ("predictor.linear.", "final_proj.", "lm_head."),
    (_BLOCK + "norm1.", "encoder.blocks.#.norm1.", "blocks.#.norm1."),
    (_BLOCK + "gamma1", "encoder.blocks.#.gamma_1", "blocks.#.gamma_1"),
    (_BLOCK + "attention.q_bias", "encoder.blocks.#.attn.q_bias", "blocks.#.attn.q_bias"),
    (_BLOCK + "attention.v_bias", "encoder.blocks.#.attn.v_bias", "blocks.#.attn.v_bias"),
    (_BLOCK + "attention.qkv.", "encoder.blocks.#.attn.qkv.", "blocks.#.attn.qkv."),
    (_BLOCK + "attention.out.", "encoder.blocks.#.attn.proj.", "blocks.#.attn.proj."),
    (_BLOCK + "norm2.", "encoder.blocks.#.norm2.", "blocks.#.norm2."),
    (_BLOCK + "gamma2", "encoder.blocks.#.gamma_2", "blocks.#.gamma_2"),
    (_BLOCK + "fc1.", "encoder.blocks.#.mlp.0.", "blocks.#.mlp.fc1."),
    (_BLOCK + "fc2.", "encoder.blocks.#.mlp.2.", "blocks.#.mlp.fc2."),
)
_TOKENS = {"student.encoder.cls_token": 1, "student.encoder.mask_token": 2}  # axes here; (1, 1, D) officially


_NAMES: Mapping[Names, NameTable] = {
    "fairseq": NameTable((fairseq, d2v) for d2v, fairseq, _ in _TABLE),
    "official": NameTable((released, d2v) for d2v, _, released in _TABLE),
}


def from_official(state: Mapping[str, Tensor], config: RunConfig, names: Names = "fairseq") -> dict[str, Tensor]:
    """Official weights as the state that `d2v_core.run.load_model_state` takes.

    A head that the configuration does not use (features.head=identity) is left out, as it is officially in forward.
    Raises UserError naming what is not known. Shapes are checked where the state is loaded.
    """
    out, unknown = _NAMES[names].to_d2v(state)
    if unknown:
        raise UserError(f"These are no {names} weights of data2vec vision 1.0: {', '.join(unknown[:5])}.")
    for name in _TOKENS.keys() & out.keys():
        out[name] = out[name].reshape([1] * (_TOKENS[name] - 1) + [-1])
    identity = config.section("features", PatchConfig).head == "identity"
    return {name: tensor for name, tensor in out.items() if not (identity and name.startswith("predictor."))}


def to_official(state: Mapping[str, Tensor], config: RunConfig, names: Names = "fairseq") -> dict[str, Tensor]:
    """The reverse, of `d2v_core.run.model_state` or of anything with the same names."""
    del config
    out, unknown = _NAMES[names].to_official(
        {name: tensor.reshape(1, 1, -1) if name in _TOKENS else tensor for name, tensor in state.items()}
    )
    if unknown:
        raise UserError(f"{unknown[0]} has no name in the official code.")
    return out


_TEACHER = "encoder."  # fairseq's teacher is this part of its student and named from there


def teacher_from_official(state: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """fairseq's teacher as `EMATeacher.load_own_state` takes it, for features.teacher=share."""
    return moved(from_official(moved(state, "", _TEACHER), config), "student.", "")


def teacher_to_official(state: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """The reverse, of `EMATeacher.own_state`. Raises UserError where ours owns what fairseq's does not."""
    theirs = to_official(moved(state, "", "student."), config)
    extra = [name for name in theirs if not name.startswith(_TEACHER)]
    if extra:
        raise UserError(f"fairseq's teacher has no {', '.join(extra)}: it shares them. Use features.teacher=share.")
    return moved(theirs, _TEACHER, "")


def gradients_to_official(model: nn.Module, config: RunConfig) -> dict[str, Tensor]:
    """Gradients of the student and the head by fairseq's names, where there are any."""
    return to_official({name: grad for name, grad in gradients(model).items() if grad is not None}, config)


# -------------------------------------------------------------------------------------------------- configuration


def config_from_official(cfg: Mapping[str, Any]) -> list[str]:
    """A fairseq `data2vec_vision` model configuration as `key=value` words for `d2v_core.config.load_config`.

    Data, optimizer and schedule are other sections of fairseq's files: those stay as preset=base has them.
    Raises UserError naming every key that is missing, unknown, or has a value that d2v cannot reproduce.
    """
    options = Options(cfg)
    options.fixed({"in_channels": CHANNELS, "shared_rel_pos_bias": True, "ema_transformer_only": True})
    take = options.take
    norms = [name for name in ("batch", "instance", "layer") if take(f"{name}_norm_target_layer", object, False)]
    mean_norms = [name for name in ("instance", "layer") if take(f"{name}_norm_targets", object, False)]
    scale = take("loss_scale", object, None)
    values: dict[str, Any] = {
        "modality": "vision",
        "preset": "base",
        "features.patch_size": take("patch_size"),
        "features.teacher": "share",
        "features.head": "identity",
        "data.image_size": take("image_size"),
        "model.embed_dim": take("embed_dim"),
        "model.num_layers": take("depth"),
        "model.num_heads": take("num_heads"),
        "model.mlp_ratio": take("mlp_ratio"),
        "model.norm": "pre",
        "model.norm_eps": 1e-5,
        "model.attention_bias": "qv",
        "model.layer_scale": take("layer_scale_init_value"),
        "model.attention_dropout": take("attention_dropout"),
        "model.drop_path": take("drop_path"),
        "target.top_k_layers": take("average_top_k_layers"),
        "target.tap": "block" if take("end_of_block_targets") else "ffn",
        "target.layer_norms": norms,
        "target.mean_norms": mean_norms,
        "loss.beta": take("loss_beta"),
        "loss.scale": "inverse_sqrt" if scale is None else scale,
        "teacher.ema_decay": take("ema_decay"),
        "teacher.ema_end_decay": take("ema_end_decay"),
        "teacher.ema_anneal_steps": take("ema_anneal_end_step"),
        "mask.num_patches": take("num_mask_patches"),
        "mask.min_block": take("min_mask_patches_per_block"),
        "mask.max_block": take("max_mask_patches_per_block"),
    }
    return options.words(values, "data2vec vision 1.0", (key for key in options.left() if key != "_name"))
