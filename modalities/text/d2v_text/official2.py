"""Between fairseq's data2vec 2.0 for text and d2v: names of weights, and configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from d2v_core.config import RunConfig
from d2v_core.official2 import Names, Settings
from d2v_text.official import FINGERPRINT

_ROWS = (
    ("local_encoder.embed_tokens.", "student.encoder.embedding.table."),
    ("local_encoder.embed_positions.", "student.encoder.positions."),
    ("local_encoder.layernorm_embedding.", "student.encoder.norm."),
)


def names(config: RunConfig) -> Names:
    """The official names of the weights of a run with this configuration."""
    return Names(
        config,
        "TEXT",
        _ROWS,
        teacher="blocks.",
        ours_alone={FINGERPRINT: torch.tensor(0)},  # the vocabulary is not known
    )


def config_from_official(cfg: Mapping[str, Any], *, vocab_size: int, exact: bool = True) -> list[str]:
    """A fairseq `data2vec_multi` model configuration for text as `key=value` words for `d2v_core.config.load_config`.

    vocab_size: rows of the token table, which the model configuration does not say. exact: also do as fairseq does
    where d2v does otherwise (official_quirks, padding in the statistics of targets).
    Raises UserError naming every key that is missing, unknown, or has a value that d2v cannot reproduce.
    """
    settings = Settings(cfg, "TEXT")
    take = settings.take
    settings.fixed({
        "ema_encoder_only": True,
        "modality.ema_local_encoder": False,
        "modality.num_extra_tokens": 0,
        "modality.prenet_depth": 0,
        "modality.local_grad_mult": 1.0,
        "modality.mask_length": 1,  # masks of spans are drawn in another way there
        "modality.learned_pos": True,
        "modality.no_scale_embedding": True,
        "modality.layernorm_embedding": True,
        "modality.no_token_positional_embeddings": False,
    })  # fmt: skip
    settings.without_alibi()
    shared = settings.shared(exact)
    positions = take("modality.max_source_positions", int, 512)
    return settings.all_words({
        "modality": "text",
        "preset": "base2",
        "encoder": "embedding",
        **{key: value for key, value in shared.items() if not key.startswith("prenet.")},
        "mask.adjust": 0.0,  # single tokens do not overlap
        "mask.inverse": True,  # it is the visible share that is rounded down
        "embedding.vocab_size": vocab_size,
        "embedding.max_positions": positions,
        "embedding.dropout": take("modality.dropout", (int, float), 0.1),
        "data.block_tokens": min(512, positions or 512),
    })  # fmt: skip
