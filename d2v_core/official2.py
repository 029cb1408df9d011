"""What fairseq's data2vec 2.0 calls the parts that are the same for every modality: weights and settings.

A modality adds the rows and settings of its own front end. Names follow examples/data2vec/models/data2vec2.py and
modalities/base.py of facebookresearch/fairseq.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from d2v_core.config import RunConfig
from d2v_core.decoder import DecoderConfig
from d2v_core.errors import UserError
from d2v_core.files import first
from d2v_core.official import TEACHER, NameTable, Options, flattened, gradients, moved

_BLOCK = (
    ("norm1.", "norm1."),
    ("attn.qkv.", "attention.qkv."),
    ("attn.proj.", "attention.out."),
    ("norm2.", "norm2."),
    ("mlp.fc1.", "fc1."),
    ("mlp.fc2.", "fc2."),
)


class Names:
    """The map between both names, for the sizes of a configuration. kind: the modality's name in the official module
    dictionary.

    own: rows of the front end as `NameTable` has them, official names relative to the modality's module. alibi_layers:
    how many the scale of ALiBi is for. shapes: of official tensors that are vectors here, by our name. teacher: where
    the official teacher begins, "" = the whole model, "blocks." = the shared blocks alone. ours_alone: tensors that the
    official files do not have, by our name, and what stands for them where such a file is read.
    """

    def __init__(
        self,
        config: RunConfig,
        kind: str,
        own: Iterable[tuple[str, str]],
        *,
        alibi_layers: int = 1,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        teacher: str = "",
        ours_alone: Mapping[str, Tensor] | None = None,
    ) -> None:
        scale = "student.encoder.alibi.scale"
        in_home = [
            *(
                (f"context_encoder.blocks.#.{theirs}", f"student.encoder.prenet.transformer.blocks.#.{ours}")
                for theirs, ours in _BLOCK
            ),
            ("context_encoder.norm.", "student.encoder.prenet.norm."),
            ("alibi_scale", scale),
            ("decoder.blocks.#.0.", "predictor.blocks.#.conv."),
            *_projections(config.section("decoder", DecoderConfig).projection_layers),
            *own,
        ]
        self._table = NameTable(
            [
                *((f"blocks.#.{theirs}", f"student.transformer.blocks.#.{ours}") for theirs, ours in _BLOCK),
                *((f"modality_encoders.{kind}.{theirs}", ours) for theirs, ours in in_home),
            ]
        )
        self._shapes = {scale: (alibi_layers, 1, -1, 1, 1), **(shapes or {})}
        self._kind, self._teacher, self._ours_alone = kind, teacher, ours_alone or {}

    def from_official(self, state: Mapping[str, Any], leave_out: Sequence[str] = ()) -> dict[str, Tensor]:
        """fairseq's `model` entry as the state that `d2v_core.run.load_model_state` takes; the nested teacher and the
        names in `leave_out` are passed over. Raises UserError naming what is not known. Shapes are checked where the
        state is loaded."""
        out, unknown = self._table.to_d2v(
            {name: tensor for name, tensor in state.items() if name != TEACHER and name not in leave_out}
        )
        if unknown:
            raise UserError(
                f"{len(unknown)} names are not known as data2vec 2.0 weights of {self._kind} for this configuration: "
                f"{first(unknown, ', ', more='...')}."
            )
        for name in self._shapes.keys() & out.keys():
            out[name] = out[name].reshape(-1)
        return {**self._ours_alone, **out}

    def to_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back: names of student and predictor. Raises UserError for a name not known."""
        out, unknown = self._table.to_official(
            {
                name: tensor.reshape(self._shapes[name]) if name in self._shapes else tensor
                for name, tensor in state.items()
                if name not in self._ours_alone
            }
        )
        if unknown:
            raise UserError(f"{unknown[0]} has no counterpart in the official code.")
        return out

    def teacher_from_official(self, state: Mapping[str, Any], leave_out: Sequence[str] = ()) -> dict[str, Tensor]:
        """fairseq's `_ema` entry as the state that `EMATeacher.load_own_state` takes."""
        return moved(self.from_official(moved(state, "", self._teacher), leave_out), "student.", "")

    def teacher_to_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`EMATeacher.own_state()` under fairseq's names."""
        return moved(self.to_official(moved(state, "", "student.")), self._teacher, "")

    def gradients_to_official(self, model: nn.Module) -> dict[str, Tensor]:
        """Gradients of a `Data2Vec`, those that there are."""
        return self.to_official({name: grad for name, grad in gradients(model).items() if grad is not None})


def _projections(count: int) -> list[tuple[str, str]]:
    """Rows of the decoder's last maps. A single one has no number there; of several every second, between GELUs."""
    if count == 1:
        return [("decoder.proj.", "predictor.projections.0.")]
    return [(f"decoder.proj.{2 * i}.", f"predictor.projections.{i}.") for i in range(count)]


# ------------------------------------------------------------------------------------------------------- settings

# Settings that change no number, or none that d2v could read from them.
_INERT = frozenset((
    "_name", "seed", "skip_ema", "log_norms", "ema_same_dtype", "supported_modality", "modality.type",
    "modality.mask_channel_length", "modality.num_alibi_heads", "modality.model_depth", "modality.alibi_max_pos",
    "modality.init_extra_token_zero",
))  # fmt: skip
_NUMBER = (int, float)
# What d2v has no option for: the only value that it can do, assumed where a file does not say.
_FIXED: Mapping[str, Any] = {
    "norm_affine": True,
    "layer_norm_first": False,  # the official code of the other form is defective
    "dropout_input": 0,
    "activation_dropout": 0,  # officially at two places
    "start_drop_path_rate": 0,
    "shared_decoder": None,
    "mae_init": False,
    "recon_loss": 0,
    "d2v_loss": 1,
    "decoder_group": False,
    "modality.start_drop_path_rate": 0,
    "modality.end_drop_path_rate": 0,
    "modality.mask_prob_min": None,
    "modality.keep_masked_pct": 0,
    "modality.add_masks": False,
    "modality.remove_masks": False,
    "modality.mask_dropout": 0,
    "modality.encoder_zero_mask": True,
    "modality.mask_channel_prob": 0,
    "modality.learned_alibi": False,
    "modality.decoder.add_positions_masked": False,
    "modality.decoder.add_positions_all": False,
}


class Settings(Options):
    """An official model configuration that is read key by key. `all_words` raises with all that did not fit.

    cfg: `cfg["model"]` of a checkpoint; the settings of one modality lie under "modality", or under "modalities" by
    its name.
    """

    def __init__(self, cfg: Mapping[str, Any], kind: str) -> None:
        every: Mapping[str, Any] = cfg.get("modalities") or {}
        modality: Mapping[str, Any] = cfg.get("modality") or every.get(kind.lower()) or {}
        rest = {key: value for key, value in cfg.items() if key not in ("modality", "modalities")}
        super().__init__(flattened({**rest, "modality": modality}))
        self.fixed(_FIXED)

    def shared(self, exact: bool) -> dict[str, Any]:
        """Options that every modality has. exact: also do as fairseq does where d2v does otherwise."""
        take = self.take
        dropout = take("encoder_dropout", _NUMBER, 0.1)
        self.fixed({"post_mlp_drop": dropout})
        layer_norms = [
            name for name in ("batch", "instance", "layer") if take(f"{name}_norm_target_layer", bool, False)
        ]
        mean_norms = [name for name in ("layer", "instance") if take(f"{name}_norm_targets", bool, False)]
        scale = take("loss_scale", (*_NUMBER, type(None)), None)
        return {
            "method": "data2vec2",
            "official_quirks": exact,
            "model.embed_dim": take("embed_dim", int, 768),
            "model.num_layers": take("depth", int, 8),
            "model.num_heads": take("num_heads", int, 12),
            "model.mlp_ratio": take("mlp_ratio", _NUMBER, 4),
            "model.norm": "post",
            "model.norm_eps": take("norm_eps", _NUMBER, 1e-6),
            "model.attention_bias": "qkv",
            "model.layer_scale": None,
            "model.dropout": dropout,
            "model.attention_dropout": take("attention_dropout", _NUMBER, 0.1),
            "model.activation_dropout": 0.0,
            "model.layer_drop": take("layerdrop", _NUMBER, 0),
            "model.drop_path": take("end_drop_path_rate", _NUMBER, 0),
            "target.top_k_layers": take("average_top_k_layers", int),
            "target.tap": "block" if take("end_of_block_targets", bool, False) else "ffn",
            "target.layer_norms": layer_norms,
            "target.mean_norms": mean_norms,
            "target.padding_in_stats": exact,
            "loss.beta": take("loss_beta", _NUMBER, 0),
            "loss.scale": "inverse_sqrt" if scale is None else scale,
            "loss.cls_weight": take("cls_loss", _NUMBER, 0),
            "teacher.ema_decay": take("ema_decay", _NUMBER),
            "teacher.ema_end_decay": take("ema_end_decay", _NUMBER),
            "teacher.ema_anneal_steps": take("ema_anneal_end_step", int),
            "guard.min_target_std": take("min_target_var", _NUMBER, 0.1),
            "guard.min_pred_std": take("min_pred_var", _NUMBER, 0.01),
            "train.max_steps": take("max_update", int),
            "train.num_masks": take("clone_batch", int, 1),
            "mask.mask_prob": take("modality.mask_prob", _NUMBER),
            "mask.mask_length": take("modality.mask_length", int, 5),
            "mask.adjust": take("modality.mask_prob_adjust", _NUMBER, 0),
            "mask.inverse": take("modality.inverse_mask", bool, False),
            "prenet.layers": take("modality.prenet_depth", int, 4),
            "prenet.layer_drop": take("modality.prenet_layerdrop", _NUMBER, 0),
            "prenet.dropout": take("modality.prenet_dropout", _NUMBER, 0),
            "decoder.dim": take("modality.decoder.decoder_dim", int, 384),
            "decoder.layers": take("modality.decoder.decoder_layers", int, 5),
            "decoder.kernel": take("modality.decoder.decoder_kernel", int, 5),
            "decoder.groups": take("modality.decoder.decoder_groups", int, 16),
            "decoder.residual": take("modality.decoder.decoder_residual", bool, True),
            "decoder.projection_layers": take("modality.decoder.projection_layers", int, 1),
            "decoder.projection_ratio": take("modality.decoder.projection_ratio", _NUMBER, 2.0),
            "decoder.input_dropout": take("modality.decoder.input_dropout", _NUMBER, 0.1),
            "decoder.noise_std": take("modality.mask_noise_std", _NUMBER, 0.01),
        }

    def alibi(self) -> dict[str, Any]:
        """The options of section `alibi`."""
        take = self.take
        return {
            "alibi.use": take("modality.use_alibi_encoder", bool, False),
            "alibi.scale": take("modality.alibi_scale", _NUMBER, 1.0),
            "alibi.learned": take("modality.learned_alibi_scale", bool, False),
            "alibi.per_head": take("modality.learned_alibi_scale_per_head", bool, False),
            "alibi.per_layer": take("modality.learned_alibi_scale_per_layer", bool, False),
        }

    def without_alibi(self) -> None:
        """For modalities that do not use it: how it would be is of no matter."""
        self.fixed({"modality.use_alibi_encoder": False})
        for key in self.left():
            if "alibi" in key:
                self.take(key)

    def all_words(self, values: Mapping[str, Any]) -> list[str]:
        """`words`, where every key has to mean something. Raises UserError naming every key that is missing, unknown,
        or has a value that d2v cannot reproduce."""
        return self.words(values, "data2vec 2.0", (key for key in self.left() if key not in _INERT))
