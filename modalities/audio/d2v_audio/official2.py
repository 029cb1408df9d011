"""Between fairseq's data2vec 2.0 for audio and d2v: names of weights, and configurations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2v_audio.official import parse_conv_layers
from d2v_core.config import RunConfig
from d2v_core.official2 import Names, Settings
from d2v_core.positions import ConvPositionsConfig
from d2v_core.visible import AlibiConfig, PrenetConfig

_EMBEDDING = "student.encoder.embedding."
_ROWS = (
    ("local_encoder.conv_layers.#.0.", _EMBEDDING + "convs.#."),
    ("local_encoder.conv_layers.#.2.1.", _EMBEDDING + "norms.#."),
    ("project_features.1.", _EMBEDDING + "norm."),
    ("project_features.2.", _EMBEDDING + "project."),
)


def names(config: RunConfig) -> Names:
    """The map of names for encoder=waveform with a layer norm after every convolution."""
    depth = config.section("positions", ConvPositionsConfig).depth
    per_layer = config.section("alibi", AlibiConfig).per_layer
    return Names(
        config,
        "AUDIO",
        (
            *_ROWS,
            # The first module there is a transpose.
            *(
                (f"relative_positional_encoder.{i + 1}.0.", f"student.encoder.positions.convs.{i}.")
                for i in range(depth)
            ),
        ),
        alibi_layers=config.section("prenet", PrenetConfig).layers + config.model.num_layers if per_layer else 1,
    )


def config_from_official(cfg: Mapping[str, Any], *, exact: bool = True) -> list[str]:
    """A fairseq `data2vec_multi` model configuration for audio as `key=value` words for `d2v_core.config.load_config`.

    exact: also do as fairseq does where d2v does otherwise (official_quirks, padding in the statistics of targets).
    Raises UserError naming every key that is missing, unknown, or has a value that d2v cannot reproduce.
    """
    settings = Settings(cfg, "AUDIO")
    take = settings.take
    settings.fixed({
        "ema_encoder_only": False,
        "modality.ema_local_encoder": False,
        "modality.num_extra_tokens": 0,
        "modality.extractor_mode": "layer_norm",
        "modality.conv_pos_pre_ln": False,
    })  # fmt: skip
    spec = take("modality.feature_encoder_spec", str, "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] * 2")
    convs = parse_conv_layers(spec or "[(1, 1, 1)]")
    if len({channels for channels, _, _ in convs}) > 1:
        settings.problems.append("modality.feature_encoder_spec has layers of several widths: d2v has one")
    return settings.all_words({
        "modality": "audio",
        "preset": "base2",
        "encoder": "waveform",
        **settings.shared(exact),
        **settings.alibi(),
        "features.channels": convs[0][0],
        "features.kernels": [kernel for _, kernel, _ in convs],
        "features.strides": [stride for _, _, stride in convs],
        "features.norm": "layer",
        "features.bias": False,
        "features.grad_mult": take("modality.local_grad_mult", (int, float), 1.0),
        "positions.depth": take("modality.conv_pos_depth", int, 5),
        "positions.width": take("modality.conv_pos_width", int, 95),
        "positions.groups": take("modality.conv_pos_groups", int, 16),
    })  # fmt: skip
