"""The peers of `pretrain_step.py` for vision and text: around transformers' `Data2VecVisionModel`, `Data2VecTextModel`.

Written as someone who knows torch would: SDPA attention, fused AdamW with the recipe's two groups, the teacher's update
in a few `foreach` operations, its targets and the prediction at the masked places only.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (  # pyright: ignore[reportMissingImports]
    Data2VecTextConfig,
    Data2VecTextModel,
    Data2VecVisionConfig,
    Data2VecVisionModel,
)

from d2v_core.config import RunConfig
from d2v_core.contract import Batch
from d2v_core.data2vec import Data2Vec
from d2v_core.loop import AUTOCAST
from d2v_core.schedules import decay_at, lr_at
from d2v_text.tokenizer import PAD

Pairs = Iterator[tuple[Tensor, Tensor]]


class _Peer(ABC):
    """What both have in common: everything but the model. `student`, `head` and `layers` are its parts."""

    name: ClassVar[str] = "hf"
    student: Any
    head: nn.Module

    def __init__(self, config: RunConfig, batch: Batch, compile: bool, like: Data2Vec | None = None) -> None:
        """like: a d2v model whose weights to take over."""
        self.config, self.batch = config, batch
        assert batch.masks is not None
        self.device = batch.masks.hidden.device
        self.dtype = AUTOCAST[config.train.precision]
        self.build()
        self.student.to(self.device).train()
        self.head.to(self.device)
        if like is not None:
            with torch.no_grad():
                for theirs, ours in self.pairs(like):
                    theirs.copy_(ours.view_as(theirs))
        self.teacher: Any = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.parameters = [p for part in (self.student, self.head) for p in part.parameters() if p.requires_grad]
        optim = config.optim
        decayed = [p for p in self.parameters if optim.decay_all or self.decays(p)]
        plain = [p for p in self.parameters if not (optim.decay_all or self.decays(p))]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, fused=True,
        )  # fmt: skip
        if compile:
            for layer in [*self.layers(self.student), *self.layers(self.teacher)]:
                layer.compile()

    @abstractmethod
    def build(self) -> None:
        """Make `student` and `head`."""

    @abstractmethod
    def pairs(self, model: Data2Vec) -> Pairs:
        """(peer's tensor, d2v's) of every trained parameter."""

    @abstractmethod
    def targets(self) -> list[Tensor]:
        """The teacher's top K layers at the scored places, (N, D) each."""

    @abstractmethod
    def output(self) -> Tensor:
        """The student's output at the scored places, (N, D)."""

    def layers(self, model: Any) -> list[Any]:
        return list(model.encoder.layer)

    def decays(self, parameter: Tensor) -> bool:
        return parameter.dim() > 1

    def update_teacher(self, decay: float) -> None:
        ours, theirs = list(self.teacher.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(ours, theirs, 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def step(self, number: int) -> tuple[Tensor, Tensor]:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(number, config.train.max_steps, config.optim)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            with torch.no_grad():
                target = torch.stack([F.layer_norm(x.float(), x.shape[-1:]) for x in self.targets()]).mean(0)
                if config.target.mean_norms:
                    target = F.layer_norm(target, target.shape[-1:])
            prediction = self.head(self.output())
        loss = F.smooth_l1_loss(prediction.float(), target, beta=config.loss.beta)
        if config.loss.scale == "sum":  # over channels, not their mean
            loss = loss * target.shape[-1]
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, config.optim.clip_grad_norm or math.inf)
        self.optimizer.step()
        with torch.no_grad():
            self.update_teacher(decay_at(number + 1, config.train.max_steps, config.teacher))
        return loss.detach(), grad_norm


class VisionPeer(_Peer):
    """`Data2VecVisionModel`. The targets are its hidden states, which are what the official recipe averages."""

    def build(self) -> None:
        config, model = self.config, self.config.model
        features, data = cast("Any", config.sections["features"]), cast("Any", config.sections["data"])
        peer = Data2VecVisionConfig(
            hidden_size=model.embed_dim, num_hidden_layers=model.num_layers, num_attention_heads=model.num_heads,
            intermediate_size=int(model.embed_dim * model.mlp_ratio), hidden_dropout_prob=model.dropout,
            attention_probs_dropout_prob=model.attention_dropout, layer_norm_eps=model.norm_eps,
            image_size=data.image_size, patch_size=features.patch_size, use_mask_token=True,
            use_shared_relative_position_bias=True, layer_scale_init_value=model.layer_scale or 0.0,
            drop_path_rate=model.drop_path, use_mean_pooling=False,
        )  # fmt: skip
        peer._attn_implementation = "sdpa"
        self.student = cast("Any", Data2VecVisionModel(peer))
        self.head = nn.Linear(model.embed_dim, model.embed_dim)

    def decays(self, parameter: Tensor) -> bool:
        return super().decays(parameter) and parameter is not self.student.embeddings.cls_token

    def hidden(self) -> Tensor:
        assert self.batch.masks is not None
        return self.batch.masks.hidden[:, 0]

    def targets(self) -> list[Tensor]:
        out = self.teacher(self.batch.inputs["image"], output_hidden_states=True)
        hidden = self.hidden()
        return [x[:, 1:][hidden] for x in out.hidden_states[-self.config.target.top_k_layers :]]

    def output(self) -> Tensor:
        hidden = self.hidden()
        return self.student(self.batch.inputs["image"], bool_masked_pos=hidden).last_hidden_state[:, 1:][hidden]

    def pairs(self, model: Data2Vec) -> Pairs:
        encoder, transformer = cast("Any", model.student.encoder), cast("Any", model.student.transformer)
        front = self.student.embeddings
        yield front.cls_token, encoder.cls_token
        yield front.mask_token, encoder.mask_token
        yield self.student.encoder.relative_position_bias.relative_position_bias_table, encoder.positions.table
        modules = [
            (front.patch_embeddings.projection, encoder.embedding.conv),
            (self.student.layernorm, transformer.norm), (self.head, cast("Any", model.predictor).linear),
        ]  # fmt: skip
        for theirs, ours in zip(self.student.encoder.layer, transformer.blocks, strict=True):
            attention = theirs.attention.attention
            for linear, weight in zip(
                (attention.query, attention.key, attention.value), ours.attention.qkv.weight.chunk(3), strict=True
            ):
                yield linear.weight, weight
            yield attention.query.bias, ours.attention.q_bias
            yield attention.value.bias, ours.attention.v_bias
            if ours.gamma1 is not None:
                yield theirs.lambda_1, ours.gamma1
                yield theirs.lambda_2, ours.gamma2
            modules += [
                (theirs.attention.output.dense, ours.attention.out), (theirs.layernorm_before, ours.norm1),
                (theirs.layernorm_after, ours.norm2), (theirs.intermediate.dense, ours.fc1),
                (theirs.output.dense, ours.fc2),
            ]  # fmt: skip
        for theirs, ours in modules:
            yield theirs.weight, ours.weight
            yield theirs.bias, ours.bias


class TextPeer(_Peer):
    """`Data2VecTextModel`, forward hooks for the feed-forward outputs, the tables of the teacher copied."""

    def build(self) -> None:
        config, model = self.config, self.config.model
        embedding = cast("Any", config.sections["embedding"])
        peer = Data2VecTextConfig(
            vocab_size=embedding.vocab_size, hidden_size=model.embed_dim, num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads, intermediate_size=int(model.embed_dim * model.mlp_ratio),
            hidden_dropout_prob=model.dropout, attention_probs_dropout_prob=model.attention_dropout,
            max_position_embeddings=embedding.max_positions + PAD + 1, type_vocab_size=1,
            layer_norm_eps=model.norm_eps, pad_token_id=PAD,
        )  # fmt: skip
        peer._attn_implementation = "sdpa"
        self.student = cast("Any", Data2VecTextModel(peer, add_pooling_layer=False))
        # The class wants a table of token types, which data2vec has not: a zero one that is not trained.
        self.student.embeddings.token_type_embeddings.weight.requires_grad_(False).zero_()
        dim = model.embed_dim
        self.head = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        inputs, masks = self.batch.inputs, self.batch.masks
        assert masks is not None and masks.fill is not None
        ids = inputs["ids"]
        self.masked_ids = torch.where(masks.hidden[:, 0], masks.fill[:, 0], ids)
        padding = inputs.get("padding_mask")
        self.attention_mask = None if padding is None else (~padding).long()
        self.taps: list[Tensor] = []

    def targets(self) -> list[Tensor]:
        assert self.batch.masks is not None
        scored = self.batch.masks.scored[:, 0]
        self.taps.clear()
        hooks = [
            layer.output.dense.register_forward_hook(lambda module, args, output: self.taps.append(output[scored]))
            for layer in self.layers(self.teacher)[-self.config.target.top_k_layers :]
        ]
        self.teacher(self.batch.inputs["ids"], attention_mask=self.attention_mask)
        for hook in hooks:
            hook.remove()
        return self.taps

    def output(self) -> Tensor:
        assert self.batch.masks is not None
        out = self.student(self.masked_ids, attention_mask=self.attention_mask).last_hidden_state
        return out[self.batch.masks.scored[:, 0]]

    def update_teacher(self, decay: float) -> None:
        ours, theirs = list(self.teacher.encoder.parameters()), list(self.student.encoder.parameters())
        torch._foreach_lerp_(ours, theirs, 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]
        ours, theirs = list(self.teacher.embeddings.parameters()), list(self.student.embeddings.parameters())
        torch._foreach_copy_(ours, theirs)  # pyright: ignore[reportPrivateImportUsage]

    def pairs(self, model: Data2Vec) -> Pairs:
        encoder, transformer = cast("Any", model.student.encoder), cast("Any", model.student.transformer)
        front = self.student.embeddings
        yield front.word_embeddings.weight, encoder.embedding.table.weight
        yield front.position_embeddings.weight, encoder.positions.weight
        layers = cast("Any", model.predictor).layers
        head = cast("Any", self.head)
        modules = [(front.LayerNorm, encoder.norm), (head[0], layers[0]), (head[2], layers[2])]
        for theirs, ours in zip(self.student.encoder.layer, transformer.blocks, strict=True):
            attention, qkv = theirs.attention.self, ours.attention.qkv
            split = zip(qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True)
            for linear, (weight, bias) in zip((attention.query, attention.key, attention.value), split, strict=True):
                yield linear.weight, weight
                yield linear.bias, bias
            modules += [
                (theirs.attention.output.dense, ours.attention.out), (theirs.attention.output.LayerNorm, ours.norm1),
                (theirs.intermediate.dense, ours.fc1), (theirs.output.dense, ours.fc2),
                (theirs.output.LayerNorm, ours.norm2),
            ]  # fmt: skip
        for theirs, ours in modules:
            yield theirs.weight, ours.weight
            yield theirs.bias, ours.bias


def has_vision_peer(config: RunConfig) -> bool:
    """The peer is the official architecture: pre-norm, averaged patch embedding, linear head, layer-normed blocks."""
    model, target, loss, features = config.model, config.target, config.loss, cast("Any", config.sections["features"])
    same = model.norm == "pre" and model.attention_bias == "qv" and not model.activation_dropout
    same = same and target.tap == "block" and target.layer_norms == ["layer"] and target.mean_norms in ([], ["layer"])
    same = same and loss.beta > 0 and loss.scale == "mean" and not config.optim.decay_all and not model.layer_drop
    return bool(same and features.teacher == "average" and features.head == "linear")


def has_text_peer(config: RunConfig) -> bool:
    """The peer is the paper's form: post-norm, copied tables, head of two layers, layer-normed feed-forward outputs."""
    model, target, loss, sections = config.model, config.target, config.loss, cast("dict[str, Any]", config.sections)
    same = model.norm == "post" and model.attention_bias == "qkv" and model.layer_scale is None and not model.drop_path
    same = same and not model.activation_dropout and not model.layer_drop and config.optim.decay_all
    same = same and target.tap == "ffn" and target.layer_norms == ["layer"] and not target.mean_norms
    same = same and loss.beta > 0 and loss.scale in ("sum", "mean") and sections["embedding"].teacher == "copy"
    return bool(same and sections["head"].layers == 2 and sections["mask"].teacher_input == "full")
