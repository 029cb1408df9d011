"""Between fairseq's data2vec text 1.0 and d2v: names of weights, and configurations.

Names follow examples/data2vec/models/data2vec_text.py and fairseq/models/transformer/transformer_encoder.py of
facebookresearch/fairseq. Weights, the teacher's weights and gradients go through the same map. Where d2v stacks what is
three tensors there (queries, keys, values), the rows stand in this order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from d2v_core.errors import UserError
from d2v_core.files import first
from d2v_core.official import TEACHER, NameTable, Options, fairseq_blocks, flattened, gradients, moved

SENTENCE = "encoder.sentence_encoder."  # what the teacher is a copy of
VERSION = SENTENCE + "version"  # a buffer that says 3 in every file
FINGERPRINT = "student.encoder.embedding.fingerprint"  # ours alone; 0 = the vocabulary is not known

# ---------------------------------------------------------------------------------------------------------- names

_NAMES = NameTable(
    (
        (SENTENCE + "embed_tokens.", "student.encoder.embedding.table."),
        (SENTENCE + "embed_positions.", "student.encoder.positions."),
        (SENTENCE + "layernorm_embedding.", "student.encoder.norm."),
        *fairseq_blocks(SENTENCE),
        ("encoder.regression_head.#.", "predictor.layers.#."),
    )
)


def from_official(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """fairseq's `model` entry as the state that `d2v_core.run.load_model_state` takes.

    A nested teacher (`_ema`) is left to `teacher_from_official`. Raises UserError for a name that is not known, one
    that stands there twice, or an incomplete set of queries, keys and values.
    """
    # Files from before fairseq renamed two modules (data2vec_text.py, `upgrade_state_dict_named`).
    weights = {
        name.replace(".emb_layer_norm.", ".layernorm_embedding.").replace(".lm_head.", ".regression_head."): tensor
        for name, tensor in state.items()
    }
    if len(weights) < len(state):
        raise UserError("The official weights have a tensor under an old name and under a new one.")
    passed_over = [name for name in weights if name == VERSION or name.rpartition(".")[2] == TEACHER]
    out, unknown = _NAMES.to_d2v({name: tensor for name, tensor in weights.items() if name not in passed_over})
    if unknown:
        raise UserError(
            f"{len(unknown)} names are not known as data2vec text 1.0 weights: {first(unknown, ', ', more='...')}."
        )
    return {FINGERPRINT: torch.tensor(0), **out}


def teacher_from_official(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """fairseq's `_ema` entry, whose names are relative to the sentence encoder, as the state that
    `EMATeacher.load_own_state` takes. Raises UserError as `from_official` does."""
    return moved(from_official(moved(state, "", SENTENCE)), "student.", "")


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back: d2v names of student and predictor to official ones. Raises UserError for a name not known."""
    out, unknown = _NAMES.to_official({name: tensor for name, tensor in state.items() if name != FINGERPRINT})
    if unknown:
        raise UserError(f"{unknown[0]} has no counterpart in the official code.")
    return {**out, VERSION: torch.tensor([3.0])} if FINGERPRINT in state else out


def teacher_to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`EMATeacher.own_state()` under fairseq's names."""
    return moved(to_official(moved(state, "", "student.")), SENTENCE, "")


def gradients_to_official(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of a `Data2Vec` under official names, those that there are."""
    return to_official({name: grad for name, grad in gradients(model).items() if grad is not None})


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
    options = Options(flattened(cfg))
    options.fixed(_FIXED)
    take = options.take
    dim, hidden = take("transformer.encoder.embed_dim", int) or 1, take("transformer.encoder.ffn_embed_dim", int) or 1
    norms = [name for name in ("batch", "instance", "layer") if take(f"{name}_norm_target_layer", bool, False)]
    mean_norms = [name for name in ("layer", "instance") if take(f"{name}_norm_targets", bool, False)]
    scale = take("loss_scale", _NUMBER)
    values: dict[str, Any] = {
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
        "target.layer_norms": norms,
        "target.mean_norms": mean_norms,
        "target.padding_in_stats": exact,
        "loss.beta": take("loss_beta", _NUMBER, 0),
        "loss.scale": "inverse_sqrt" if scale is not None and scale <= 0 else scale,
        "teacher.ema_decay": take("ema_decay", _NUMBER),
        "teacher.ema_end_decay": take("ema_end_decay", _NUMBER),
        "teacher.ema_anneal_steps": take("ema_anneal_end_step", int),
    }
    if int(dim * (hidden / dim)) != hidden:
        options.problems.append(
            f"transformer.encoder.ffn_embed_dim={hidden} over embed_dim={dim} is no ratio d2v can state"
        )
    unknown = (key for key in options.left() if key not in _INERT and not key.startswith("transformer."))
    return options.words(values, "data2vec text 1.0", unknown)
