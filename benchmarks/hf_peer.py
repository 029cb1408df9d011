"""The peer of `pretrain_step.py`: data2vec pre-training as one writes it around `transformers.Data2VecAudioModel`."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Data2VecAudioConfig, Data2VecAudioModel  # pyright: ignore[reportMissingImports]

from d2v_core.config import RunConfig
from d2v_core.contract import Batch
from d2v_core.data2vec import Data2Vec
from d2v_core.loop import AUTOCAST


class HuggingFace:
    """data2vec around `Data2VecAudioModel`, as a careful user writes it."""

    name = "hf"

    def __init__(self, config: RunConfig, batch: Batch, compile: bool, like: Data2Vec | None = None) -> None:
        """like: a d2v model whose weights to take over."""
        self.config, self.batch = config, batch
        self.device = batch.inputs["waveform"].device
        self.dtype = AUTOCAST[config.train.precision]
        self.student = cast("Any", Data2VecAudioModel(peer_config(config)).to(cast("Any", self.device)).train())
        self.head = nn.Linear(config.model.embed_dim, config.model.embed_dim).to(self.device)
        if like is not None:
            copy_weights(like, self.student, self.head)
        self.teacher = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.outputs: list[Tensor] = []
        for layer in self.teacher.encoder.layers[-config.target.top_k_layers :]:
            layer.feed_forward.register_forward_hook(lambda module, args, output: self.outputs.append(output))
        self.parameters = [*self.student.parameters(), *self.head.parameters()]
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps,
            weight_decay=optim.weight_decay,
        )  # fmt: skip
        if compile:
            for layer in [*self.student.encoder.layers, *self.teacher.encoder.layers]:
                layer.compile()

    def step(self, number: int) -> tuple[Tensor, Tensor]:
        del number
        config, masks = self.config, self.batch.masks
        waveform = self.batch.inputs["waveform"]
        assert masks is not None
        hidden = masks.hidden[:, 0]
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            self.outputs.clear()
            with torch.no_grad():
                self.teacher(waveform)
                layers = [nn.functional.instance_norm(x.float().transpose(1, 2)) for x in self.outputs]
                target = torch.stack(layers).mean(0).transpose(1, 2)[hidden]
            output = self.student(waveform, mask_time_indices=hidden).last_hidden_state
            prediction = self.head(output[hidden])
        difference = (prediction.float() - target).square().sum(-1)
        loss = difference.mean() / math.sqrt(config.model.embed_dim)
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, config.optim.clip_grad_norm or math.inf)
        self.optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                ours.lerp_(theirs, 1.0 - config.teacher.ema_decay)
        return loss.detach(), grad_norm


def has_peer(config: RunConfig) -> bool:
    """The peer is the official architecture and nothing else: raw waveform, post-norm, MSE on instance-normed FFNs."""
    model, target, loss = config.model, config.target, config.loss
    features: Any = config.sections["features"]
    same = model.norm == "post" and model.attention_bias == "qkv" and model.layer_scale is None and not model.drop_path
    same = same and target.tap == "ffn" and target.layer_norms == ["instance"] and not target.mean_norms
    same = same and loss.beta == 0 and loss.scale == "inverse_sqrt"
    return bool(same and config.encoder == "waveform" and features.norm == "layer" and features.grad_mult == 1)


def peer_config(config: RunConfig) -> Data2VecAudioConfig:
    model, sections = config.model, cast("dict[str, Any]", config.sections)
    features, positions = sections["features"], sections["positions"]
    result = Data2VecAudioConfig(
        hidden_size=model.embed_dim, num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads,
        intermediate_size=int(model.embed_dim * model.mlp_ratio), hidden_dropout=model.dropout,
        attention_dropout=model.attention_dropout, activation_dropout=model.activation_dropout,
        feat_proj_dropout=0.0, layerdrop=0.0, layer_norm_eps=model.norm_eps, conv_bias=features.bias,
        conv_dim=(features.channels,) * len(features.kernels), conv_kernel=tuple(features.kernels),
        conv_stride=tuple(features.strides), num_conv_pos_embeddings=positions.depth,
        conv_pos_kernel_size=max(3, positions.width // positions.depth),
        num_conv_pos_embedding_groups=positions.groups, mask_time_prob=0.65, mask_feature_prob=0.0,
    )  # fmt: skip
    result._attn_implementation = "sdpa"
    return result


@torch.no_grad()
def copy_weights(model: Data2Vec, peer: Any, head: nn.Linear) -> None:
    """d2v's student into the peer, tensor by tensor."""
    encoder, blocks = cast("Any", model.student.encoder), cast("Any", model.student.transformer.blocks)
    front = encoder.embedding
    pairs: list[tuple[nn.Module, nn.Module]] = [
        (peer.feature_projection.layer_norm, front.norm), (peer.feature_projection.projection, front.project),
        (peer.encoder.layer_norm, encoder.norm), (head, cast("Any", model.predictor).linear),
    ]  # fmt: skip
    for theirs, conv, norm in zip(peer.feature_extractor.conv_layers, front.convs, front.norms, strict=True):
        pairs += [(theirs.conv, conv), (theirs.layer_norm, norm)]
    pairs += [(t.conv, o) for t, o in zip(peer.encoder.pos_conv_embed.layers, encoder.positions.convs, strict=True)]
    peer.masked_spec_embed.copy_(encoder.mask_embedding)
    for theirs, ours in zip(peer.encoder.layers, blocks, strict=True):
        pairs += [
            (theirs.attention.out_proj, ours.attention.out), (theirs.layer_norm, ours.norm1),
            (theirs.feed_forward.intermediate_dense, ours.fc1), (theirs.feed_forward.output_dense, ours.fc2),
            (theirs.final_layer_norm, ours.norm2),
        ]  # fmt: skip
        qkv, attention = ours.attention.qkv, theirs.attention
        split = zip(qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True)
        for linear, (weight, bias) in zip((attention.q_proj, attention.k_proj, attention.v_proj), split, strict=True):
            linear.weight.copy_(weight)
            linear.bias.copy_(bias)
    for theirs, ours in pairs:
        theirs.load_state_dict(ours.state_dict())
