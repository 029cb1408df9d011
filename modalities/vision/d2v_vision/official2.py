"""Between fairseq's data2vec 2.0 for images and d2v: names of weights, and configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2v_core.config import RunConfig
from d2v_core.official2 import Names, Settings
from d2v_vision.feature_encoder import CHANNELS

POSITIONS = "modality_encoders.IMAGE.fixed_positional_encoder.positions"  # (1, T, D), stored there and computed here
_ROWS = (
    ("extra_tokens", "student.encoder.cls_token"),
    ("local_encoder.proj.", "student.encoder.embedding.conv."),
)


def names(config: RunConfig) -> Names:
    """The official names of the weights of a run with this configuration."""
    return Names(config, "IMAGE", _ROWS, shapes={"student.encoder.cls_token": (1, 1, -1)})


def config_from_official(cfg: Mapping[str, Any], *, exact: bool = True) -> list[str]:
    """A fairseq `data2vec_multi` model configuration for images as `key=value` words for `d2v_core.config.load_config`.

    exact: also do as fairseq does where d2v does otherwise (official_quirks). Its CLS loss grows with the rows of a
        worker; without it, give loss.cls_weight as theirs times images per worker times masks.
    Raises UserError naming every key that is missing, unknown, or has a value that d2v cannot reproduce.
    """
    settings = Settings(cfg, "IMAGE")
    take = settings.take
    settings.fixed({
        "ema_encoder_only": False,
        "modality.ema_local_encoder": True,
        "modality.num_extra_tokens": 1,
        "modality.init_extra_token_zero": False,
        "modality.local_grad_mult": 1.0,
        "modality.in_chans": CHANNELS,
        "modality.embed_dim": take("embed_dim", int, 768),
        "modality.fixed_positions": True,
        "modality.transformer_decoder": False,
        "modality.enc_dec_transformer": False,
        "modality.decoder.projection_layers": 1,  # the official decoder does not read it
    })  # fmt: skip
    settings.without_alibi()
    return settings.all_words({
        "modality": "vision",
        "preset": "base2",
        "encoder": "patches",
        **settings.shared(exact),
        "features.patch_size": take("modality.patch_size", int, 16),
        "data.image_size": take("modality.input_size", int, 224),
    })  # fmt: skip
