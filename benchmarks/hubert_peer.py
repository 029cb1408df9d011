"""A second peer of `pretrain_step.py`: one pre-training step of torchaudio's HuBERT Base, which has no teacher to run.

The model is `torchaudio.models.hubert_pretrain_base`; loss, normalisation and optimizer are those of torchaudio's
example (pytorch/audio, examples/hubert): cross entropy of the masked frames and, with weight 0, of the others, ten
times the mean square of the features, divided by the number of masked frames; AdamW. It draws its own masks.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torchaudio
from torch import Tensor, nn
from torch.nn import functional as F

from d2v_core.config import RunConfig
from d2v_core.contract import Batch
from d2v_core.loop import AUTOCAST

NUM_CLASSES = 100  # of the first iteration
FEATURE_WEIGHT = 10.0


class Hubert:
    """HuBERT at the sizes and dropout of `preset=base`. The classes are random: their values change no cost."""

    name = "hubert"

    def __init__(self, config: RunConfig, batch: Batch, compile: bool) -> None:
        model = config.model
        if (model.embed_dim, model.num_layers, model.num_heads) != (768, 12, 12):
            raise SystemExit("torchaudio's HuBERT Base has 12 blocks of 768 channels and 12 heads; use --preset base")
        self.config, self.batch = config, batch
        waveform = batch.inputs["waveform"]
        self.device = waveform.device
        self.dtype = AUTOCAST[config.train.precision]
        self.model: nn.Module = torchaudio.models.hubert_pretrain_base(
            encoder_projection_dropout=model.dropout, encoder_attention_dropout=model.attention_dropout,
            encoder_ff_interm_dropout=model.activation_dropout, encoder_dropout=model.dropout,
            encoder_layer_drop=0.0, num_classes=NUM_CLASSES,
        ).to(self.device).train()  # fmt: skip
        assert batch.masks is not None
        shape = (waveform.shape[0], batch.masks.hidden.shape[2])
        labels = torch.randint(NUM_CLASSES, shape, generator=torch.Generator().manual_seed(0))
        self.labels = labels.to(self.device)
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps,
            weight_decay=optim.weight_decay,
        )  # fmt: skip
        if compile:
            for layer in cast("Any", self.model).wav2vec2.encoder.transformer.layers:
                layer.compile()

    def step(self, number: int) -> tuple[Tensor, Tensor]:
        del number
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            masked, others, penalty = self.model(self.batch.inputs["waveform"], self.labels)
            loss = FEATURE_WEIGHT * penalty + class_loss(masked) + 0.0 * class_loss(others)
        loss = loss / len(masked)
        loss.backward()
        limit = self.config.optim.clip_grad_norm
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), math.inf if limit is None else limit)
        self.optimizer.step()
        return loss.detach(), grad_norm


def class_loss(logits: Tensor) -> Tensor:
    """(N, 1 + classes) -> (): the right class comes first."""
    return F.cross_entropy(
        logits.float(), torch.zeros(len(logits), dtype=torch.long, device=logits.device), reduction="sum"
    )
