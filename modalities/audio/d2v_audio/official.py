"""Between fairseq's data2vec audio 1.0 and d2v: names of weights, and configurations.

Names follow examples/data2vec/models/data2vec_audio.py and fairseq/models/wav2vec/wav2vec2.py of facebookresearch/
fairseq. Whatever is keyed by parameter name goes through the same map: weights, the teacher's weights, gradients.
Where d2v stacks what is three tensors there (queries, keys, values), the rows stand in this order.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from d2v_audio.feature_encoder import WaveformConfig
from d2v_core.config import RunConfig
from d2v_core.errors import UserError
from d2v_core.files import first
from d2v_core.official import TEACHER, NameTable, Options, fairseq_blocks, gradients, moved

# ---------------------------------------------------------------------------------------------------------- names


@lru_cache
def _names(pre_norm: bool, group_norm: bool) -> NameTable:
    final_norm = "student.transformer.norm." if pre_norm else "student.encoder.norm."
    conv_norm = (
        ("feature_extractor.conv_layers.0.2.", "student.encoder.embedding.norms.0.")
        if group_norm
        else ("feature_extractor.conv_layers.#.2.1.", "student.encoder.embedding.norms.#.")
    )
    return NameTable(
        (
            ("mask_emb", "student.encoder.mask_embedding"),
            ("feature_extractor.conv_layers.#.0.", "student.encoder.embedding.convs.#."),
            conv_norm,
            ("layer_norm.", "student.encoder.embedding.norm."),
            ("post_extract_proj.", "student.encoder.embedding.project."),
            ("encoder.pos_conv.#.0.", "student.encoder.positions.convs.#."),
            ("encoder.layer_norm.", final_norm),
            *fairseq_blocks("encoder."),
            ("final_proj.", "predictor.linear."),
            ("final_proj.0.", "predictor.linear."),  # of files from before the head became a single layer
        )
    )


def _names_of(config: RunConfig) -> NameTable:
    """They depend on where the norms stand."""
    features = config.sections.get("features")
    if not isinstance(features, WaveformConfig):
        raise UserError(
            f"encoder={config.encoder} has no counterpart in the official code: its weights fit encoder=waveform only."
        )
    return _names(config.model.norm == "pre", features.norm == "group")


def from_official(state: Mapping[str, Any], config: RunConfig) -> dict[str, Tensor]:
    """fairseq's `model` entry as the state that `d2v_core.run.load_model_state` takes.

    Args:
        state: tensors by official name; a nested teacher (`_ema`) is left to `teacher_from_official`.
        config: what the weights are meant for. It decides which norm `encoder.layer_norm` is.
    Raises:
        UserError: a name that is not known, one that stands there twice, or an incomplete set of queries, keys and
            values. Shapes are checked where the state is loaded.
    """
    out, unknown = _names_of(config).to_d2v({name: tensor for name, tensor in state.items() if name != TEACHER})
    if unknown:
        raise UserError(
            f"{len(unknown)} names are not known as data2vec audio 1.0 weights for this configuration: "
            f"{first(unknown, ', ', more='...')}."
        )
    return out


def teacher_from_official(state: Mapping[str, Any], config: RunConfig) -> dict[str, Tensor]:
    """fairseq's `_ema` entry, whose names are relative to `encoder.`, as the state that `EMATeacher.load_own_state`
    takes. Raises UserError as `from_official` does."""
    return moved(from_official(moved(state, "", "encoder."), config), "student.", "")


def to_official(state: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """The way back: d2v names of student and predictor to official ones. Raises UserError for a name not known."""
    out, unknown = _names_of(config).to_official(state)
    if unknown:
        raise UserError(f"{unknown[0]} has no counterpart in the official code.")
    return out


def teacher_to_official(state: Mapping[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """`EMATeacher.own_state()` under fairseq's names. Raises UserError where the teacher owns what its does not."""
    out = to_official(moved(state, "", "student."), config)
    for name in out:
        if not name.startswith("encoder."):
            raise UserError(f"The official teacher has no {name} of its own; here it is not shared with the student.")
    return moved(out, "encoder.", "")


def gradients_to_official(model: nn.Module, config: RunConfig) -> dict[str, Tensor | None]:
    """Gradients of a `Data2Vec` under official names; None where there is none."""
    own = gradients(model)
    given = to_official({name: grad for name, grad in own.items() if grad is not None}, config)
    without = to_official({name: model.get_parameter(name) for name, grad in own.items() if grad is None}, config)
    return {**given, **dict.fromkeys(without)}


# -------------------------------------------------------------------------------------------------- configuration

# Options of the official model that cannot change a number of data2vec's pre-training: read by other models that share
# its configuration class, computed away, or only about speed.
# fmt: off
_INERT = frozenset((
    "_name", "dropout_features", "final_dim", "logit_temp", "quantize_targets", "quantize_input", "same_quantizer",
    "target_glu", "quantizer_depth", "quantizer_factor", "latent_vars", "latent_groups", "latent_dim", "latent_temp",
    "num_negatives", "negatives_from_everywhere", "cross_sample_negatives", "codebook_negatives", "max_positions",
    "checkpoint_activations", "required_seq_len_multiple", "depthwise_conv_kernel_size", "pos_enc_type", "fp16",
    "mask_other", "mask_min_space", "mask_channel_length", "mask_channel_before", "mask_channel_selection",
    "mask_channel_other", "no_mask_channel_overlap", "mask_channel_min_space", "adp_num", "adp_dim", "adp_act_fn",
    "adp_trf_idx",
))
# fmt: on

# What d2v has no option for: the key and the only value that it can do, assumed where older files do not say.
_FIXED: Mapping[str, Any] = {
    "activation_fn": "gelu",
    "layer_type": "transformer",
    "attn_type": "",
    "dropout_input": 0.0,
    "mask_selection": "static",
    "no_mask_overlap": False,
    "mask_channel_prob": 0.0,
    "crop_seq_to_multiple": 1,
    "ema_transformer_only": True,
}


def config_from_official(cfg: Mapping[str, Any], *, exact: bool = True, strict: bool = True) -> list[str]:
    """A fairseq `data2vec_audio` model configuration as `key=value` words for `d2v_core.config.load_config`.

    Args:
        cfg: `cfg["model"]` of a checkpoint. Data, optimizer and schedule are other sections of that file: those stay
            as preset=base has them, and may be given after these words.
        exact: also do as fairseq does where d2v does otherwise: padding counts in the statistics of target norms and
            leaks through the positions, and two target norms run over the samples of a batch.
        strict: refuse keys that fairseq's class does not have. Released checkpoints have some left from debugging.
    Raises:
        UserError: a key is missing or unknown, or has a value that d2v cannot reproduce. The message has them all.
    """
    options = Options(cfg)
    options.fixed(_FIXED)
    take, problems = options.take, options.problems
    number = (int, float)
    extractor = take("extractor_mode", str)
    if extractor not in ("layer_norm", "default", None):
        problems.append(f"extractor_mode={extractor!r} is neither layer_norm nor default")
    try:
        convs = parse_conv_layers(take("conv_feature_layers", str) or "[(1, 1, 1)]")
    except UserError as error:
        problems.append(str(error))
        convs = [(1, 1, 1)]
    if len({channels for channels, _, _ in convs}) > 1:
        problems.append(f"conv_feature_layers has layers of {sorted({c for c, _, _ in convs})} channels: d2v has one")
    dim, hidden = take("encoder_embed_dim", int) or 1, take("encoder_ffn_embed_dim", int) or 1
    ratio = hidden / dim
    if int(dim * ratio) != hidden:
        problems.append(f"encoder_ffn_embed_dim={hidden} over encoder_embed_dim={dim} is no ratio d2v can state")
    depth = take("pos_conv_depth", int)
    if depth == 1:
        problems.append("pos_conv_depth=1 is one convolution with weight norm: d2v has only stacked ones without")
    norms = {
        name: take(f"{name}_norm_target_layer", bool, False) for name in ("batch", "instance", "group", "layer")
    }  # in the order in which fairseq applies them
    mean_norms = {name: take(f"{name}_norm_targets", bool, False) for name in ("layer", "instance")}
    over_samples = (norms["group"] or mean_norms["instance"]) and not (norms["batch"] or norms["instance"])
    scale = take("loss_scale", (int, float, type(None)), None)
    values: dict[str, Any] = {
        "modality": "audio",
        "preset": "base",
        "encoder": "waveform",
        "features.channels": convs[0][0],
        "features.kernels": [kernel for _, kernel, _ in convs],
        "features.strides": [stride for _, _, stride in convs],
        "features.norm": "layer" if extractor == "layer_norm" else "group",
        "features.bias": take("conv_bias", bool),
        "features.grad_mult": take("feature_grad_mult", number),
        "model.embed_dim": dim,
        "model.num_layers": take("encoder_layers", int),
        "model.num_heads": take("encoder_attention_heads", int),
        "model.mlp_ratio": ratio,
        "model.norm": "pre" if take("layer_norm_first", bool) else "post",
        "model.norm_eps": 1e-5,
        "model.attention_bias": "qkv",
        "model.layer_scale": None,
        "model.dropout": take("dropout", number),
        "model.attention_dropout": take("attention_dropout", number),
        "model.activation_dropout": take("activation_dropout", number),
        "model.layer_drop": take("encoder_layerdrop", number),
        "model.drop_path": 0.0,
        "target.top_k_layers": take("average_top_k_layers", int),
        "target.tap": "ffn",
        "target.layer_norms": [name for name, on in norms.items() if on],
        "target.mean_norms": [name for name, on in mean_norms.items() if on],
        "target.padding_in_stats": exact,
        "target.official_axes": exact and over_samples,
        "loss.beta": take("loss_beta", number),
        "loss.scale": "inverse_sqrt" if scale is None else scale,
        "teacher.ema_decay": take("ema_decay", number),
        "teacher.ema_end_decay": take("ema_end_decay", number),
        "teacher.ema_anneal_steps": take("ema_anneal_end_step", int),
        "positions.depth": depth,
        "positions.width": take("conv_pos", int),
        "positions.groups": take("conv_pos_groups", int),
        "positions.teacher": "copy" if take("ema_layers_only", bool, True) else "average",
        "positions.rezero_padding": not exact,
        "mask.mask_prob": take("mask_prob", number),
        "mask.mask_length": take("mask_length", int),
        "mask.min_spans": 1,
        "mask.same_count": take("require_same_masks", bool, True),
        "mask.mask_dropout": take("mask_dropout", number, 0.0),
        "train.max_steps": take("max_update", int),
        "guard.min_target_std": take("min_target_var", number, 0.1),
        "guard.min_pred_std": take("min_pred_var", number, 0.01),
    }
    unknown = (key for key in options.left() if strict and key not in _INERT)
    return options.words(values, "data2vec audio 1.0", unknown)


def parse_conv_layers(text: str) -> list[tuple[int, int, int]]:
    """fairseq's `conv_feature_layers`, such as "[(512, 10, 5)] + [(512, 3, 2)] * 4", as (channels, kernel, stride).

    The official code hands this string, which comes out of a file, to `eval`. Here nothing runs: lists of whole
    numbers, + and * are all that is understood. Raises UserError for anything else.
    """

    def no(why: str) -> UserError:
        shown = text if len(text) <= 80 else text[:77] + "..."
        return UserError(f"conv_feature_layers={shown!r} {why}; expected like '[(512, 10, 5)] + [(512, 3, 2)] * 4'")

    def whole(node: ast.expr) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int and 0 < node.value <= 1 << 16:
            return node.value
        raise no("has something else than positive whole numbers")

    def layers(node: ast.expr) -> Iterator[tuple[int, int, int]]:
        if isinstance(node, ast.List):
            for item in node.elts:
                if not isinstance(item, ast.Tuple | ast.List) or len(item.elts) != 3:
                    raise no("has a layer that is not (channels, kernel, stride)")
                channels, kernel, stride = map(whole, item.elts)
                yield channels, kernel, stride
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            yield from layers(node.left)
            yield from layers(node.right)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            one, times = (node.left, node.right) if isinstance(node.right, ast.Constant) else (node.right, node.left)
            for _ in range(whole(times)):
                yield from layers(one)
        else:
            raise no("is more than lists, + and *")

    if len(text) > 1000:
        raise no("is too long")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise no("cannot be read") from None
    found: list[tuple[int, int, int]] = []
    for layer in layers(tree.body):
        found.append(layer)
        if len(found) > 64:
            raise no("has more than 64 layers")
    if not found:
        raise no("has no layer")
    return found
