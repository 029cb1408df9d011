"""Between fairseq's data2vec text 1.0 and d2v: names of weights, and configurations.

Names follow examples/data2vec/models/data2vec_text.py and fairseq/models/transformer/transformer_encoder.py of
facebookresearch/fairseq. Weights, the teacher's weights and gradients go through the same map. Where d2v stacks what is
three tensors there (queries, keys, values), the rows stand in this order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from d2v_core.errors import UserError

TEACHER = "_ema"  # key under which fairseq nests the teacher's weights in the student's state
SENTENCE = "encoder.sentence_encoder."  # what the teacher is a copy of
VERSION = SENTENCE + "version"  # a buffer that says 3 in every file
FINGERPRINT = "student.encoder.embedding.fingerprint"  # ours alone; 0 = the vocabulary is not known

# ---------------------------------------------------------------------------------------------------------- names

_PARTS = "qkv"
# (official, d2v) prefixes of `.weight` and `.bias`; # is a number.
_TABLE = (
    (SENTENCE + "embed_tokens", "student.encoder.embedding.table"),
    (SENTENCE + "embed_positions", "student.encoder.positions"),
    (SENTENCE + "layernorm_embedding", "student.encoder.norm"),
    (SENTENCE + "layers.#.self_attn.out_proj", "student.transformer.blocks.#.attention.out"),
    (SENTENCE + "layers.#.self_attn_layer_norm", "student.transformer.blocks.#.norm1"),
    (SENTENCE + "layers.#.fc1", "student.transformer.blocks.#.fc1"),
    (SENTENCE + "layers.#.fc2", "student.transformer.blocks.#.fc2"),
    (SENTENCE + "layers.#.final_layer_norm", "student.transformer.blocks.#.norm2"),
    ("encoder.regression_head.#", "predictor.layers.#"),
)
_OFFICIAL_QKV = re.compile(re.escape(SENTENCE) + r"layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
_D2V_QKV = re.compile(r"student\.transformer\.blocks\.(\d+)\.attention\.qkv\.(weight|bias)")


@lru_cache(maxsize=4096)
def _translate(name: str, to_d2v: bool) -> str | None:
    for official, d2v in _TABLE:
        source, destination = (official, d2v) if to_d2v else (d2v, official)
        pattern = re.escape(source).replace(r"\#", r"(\d+)") + r"\.(weight|bias)"
        match = re.fullmatch(pattern, name)
        if match:
            *number, kind = match.groups()
            return (destination.replace("#", number[0]) if number else destination) + "." + kind
    return None


def from_official(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """fairseq's `model` entry as the state that `d2v_core.run.load_model_state` takes.

    A nested teacher (`_ema`) is left to `teacher_from_official`. Raises UserError for a name that is not known, one
    that stands there twice, or an incomplete set of queries, keys and values.
    """
    # Files from before fairseq renamed two modules (data2vec_text.py, `upgrade_state_dict_named`).
    renamed = {
        name.replace(".emb_layer_norm.", ".layernorm_embedding.").replace(".lm_head.", ".regression_head."): tensor
        for name, tensor in state.items()
    }
    if len(renamed) < len(state):
        raise UserError("The official weights have a tensor under an old name and under a new one.")
    out: dict[str, Tensor] = {FINGERPRINT: torch.tensor(0)}
    stacks: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for name, tensor in renamed.items():
        match = _OFFICIAL_QKV.fullmatch(name)
        if match:
            layer, part, kind = match.groups()
            stacks.setdefault(f"student.transformer.blocks.{layer}.attention.qkv.{kind}", {})[part] = tensor
        elif (ours := _translate(name, True)) is not None:
            out[ours] = tensor
        elif name != VERSION and name.rpartition(".")[2] != TEACHER:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"{len(unknown)} names are not known as data2vec text 1.0 weights: {', '.join(unknown[:5])}"
            f"{', ...' if len(unknown) > 5 else ''}."
        )
    for ours, parts in stacks.items():
        missing = [part for part in _PARTS if part not in parts]
        if missing:
            raise UserError(f"For {ours} the official weights lack {', '.join(f'{part}_proj' for part in missing)}.")
        out[ours] = torch.cat([parts[part] for part in _PARTS])
    return out


def teacher_from_official(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """fairseq's `_ema` entry, whose names are relative to the sentence encoder, as the state that
    `EMATeacher.load_own_state` takes. Raises UserError as `from_official` does."""
    renamed = from_official({SENTENCE + name: tensor for name, tensor in state.items()})
    return {name.removeprefix("student."): tensor for name, tensor in renamed.items()}


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: d2v names of student and predictor to official ones. Raises UserError for a name not known."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _D2V_QKV.fullmatch(name)
        if match:
            layer, kind = match.groups()
            for part, rows in zip(_PARTS, tensor.chunk(3), strict=True):
                out[f"{SENTENCE}layers.{layer}.self_attn.{part}_proj.{kind}"] = rows
        elif name == FINGERPRINT:
            out[VERSION] = torch.tensor([3.0])
        elif (official := _translate(name, False)) is not None:
            out[official] = tensor
        else:
            raise UserError(f"{name} has no counterpart in the official code.")
    return out


def teacher_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`EMATeacher.own_state()` under fairseq's names."""
    renamed = to_official({f"student.{name}": tensor for name, tensor in state.items()})
    return {name.removeprefix(SENTENCE): tensor for name, tensor in renamed.items()}


def gradients_to_official(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of a `Data2Vec` under official names, those that there are."""
    own = {name: p.grad for name, p in model.named_parameters() if not name.startswith("teacher.")}
    return to_official({name: grad for name, grad in own.items() if grad is not None})


# -------------------------------------------------------------------------------------------------- configuration

# What d2v has no option for: the only value that it can do, assumed where a file does not say (fairseq's defaults).
_FIXED: Mapping[str, Any] = {
    "transformer.activation_fn": "gelu",
    "transformer.adaptive_input": False,
    "transformer.encoder.normalize_before": False,
    "transformer.encoder.learned_pos": True,
    "transformer.encoder.layers_to_keep": None,
    "transformer.no_token_positional_embeddings": False,
    "transformer.layernorm_embedding": True,
    "transformer.no_scale_embedding": True,
    "transformer.quant_noise.pq": 0.0,
    "transformer.quant_noise.scalar": 0.0,
    "transformer.relu_dropout": 0.0,
}
_NUMBER = (int, float)
# Options of fairseq's class that are about neither the network nor its training.
_INERT = frozenset(("_name", "max_positions", "load_checkpoint_heads"))


def config_from_official(cfg: Mapping[str, Any], *, vocab_size: int, exact: bool = True) -> list[str]:
    """A fairseq `data2vec_text` model configuration as `key=value` words for `d2v_core.config.load_config`.

    Args:
        cfg: `cfg["model"]` of a checkpoint. Task, optimizer and schedule are other sections of that file: those stay as
            preset=base_shipped has them, and may be given after these words.
        vocab_size: rows of the token table, which the model configuration does not say.
        exact: let padding into the statistics of target norms, as fairseq does.
    Raises:
        UserError: a key is missing or unknown, or has a value that d2v cannot reproduce. The message has them all. Of
            the section `transformer`, which also serves a decoder that this model does not have, what is not known is
            passed over.
    """
    problems: list[str] = []
    flat = _flatten(cfg)
    taken: set[str] = set()
    for key, possible in _FIXED.items():
        if flat.get(key, possible) != possible:
            problems.append(f"{key}={flat[key]!r}: d2v has only {possible!r}")

    def take(key: str, kind: type | tuple[type, ...], *default: Any) -> Any:
        taken.add(key)
        if key not in flat and not default:
            problems.append(f"{key} is missing")
            return None
        value = flat.get(key, *default)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            problems.append(f"{key}={value!r} is {type(value).__name__}")
            return None
        return value

    dim, hidden = take("transformer.encoder.embed_dim", int) or 1, take("transformer.encoder.ffn_embed_dim", int) or 1
    norms = [name for name in ("batch", "instance", "layer") if take(f"{name}_norm_target_layer", bool, False)]
    mean_norms = [name for name in ("layer", "instance") if take(f"{name}_norm_targets", bool, False)]
    scale = take("loss_scale", _NUMBER)
    words: dict[str, Any] = {
        "modality": "text",
        "preset": "base_shipped",
        "embedding.vocab_size": vocab_size,
        "embedding.max_positions": (positions := take("transformer.max_source_positions", int)),
        "embedding.teacher": "copy" if take("ema_transformer_layers_only", bool, True) else "average",
        "head.layers": take("head_layers", int, 1),
        "data.block_tokens": min(512, positions or 512),
        "model.embed_dim": dim,
        "model.num_layers": take("transformer.encoder.layers", int),
        "model.num_heads": take("transformer.encoder.attention_heads", int),
        "model.mlp_ratio": hidden / dim,
        "model.dropout": take("transformer.dropout", _NUMBER),
        "model.attention_dropout": take("transformer.attention_dropout", _NUMBER),
        "model.activation_dropout": take("transformer.activation_dropout", _NUMBER, 0.0),
        "model.layer_drop": take("transformer.encoder.layerdrop", _NUMBER, 0),
        "target.top_k_layers": take("average_top_k_layers", int),
        "target.tap": "ffn",
        "target.layer_norms": f"[{','.join(norms)}]",
        "target.mean_norms": f"[{','.join(mean_norms)}]",
        "target.padding_in_stats": str(exact).lower(),
        "loss.beta": take("loss_beta", _NUMBER, 0),
        "loss.scale": "inverse_sqrt" if scale is not None and scale <= 0 else scale,
        "teacher.ema_decay": take("ema_decay", _NUMBER),
        "teacher.ema_end_decay": take("ema_end_decay", _NUMBER),
        "teacher.ema_anneal_steps": take("ema_anneal_end_step", int),
    }
    unknown = sorted(key for key in flat.keys() - taken - _INERT if not key.startswith("transformer."))
    if unknown:
        problems.append(f"unknown: {', '.join(unknown)}")
    if int(dim * (hidden / dim)) != hidden:
        problems.append(f"transformer.encoder.ffn_embed_dim={hidden} over embed_dim={dim} is no ratio d2v can state")
    if problems:
        raise UserError(
            "The official configuration does not fit data2vec text 1.0 as d2v has it:\n  " + "\n  ".join(problems)
        )
    return [f"{key}={value}" for key, value in words.items()]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
