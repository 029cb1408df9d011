"""What fairseq's data2vec 2.0 calls the parts that are the same for every modality: weights and settings.

A modality adds the rows and settings of its own front end. Names follow examples/data2vec/models/data2vec2.py and
modalities/base.py of facebookresearch/fairseq.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from d2v_core.errors import UserError

TEACHER = "_ema"  # key under which fairseq nests the teacher's weights in the student's state
SCALE = "student.encoder.alibi.scale"


class Row(NamedTuple):
    """Two prefixes of names, without .weight or .bias where they end in a dot. # is a number: n here stands for
    factor * n + first there. shape: of the official tensor, where ours is the same as a vector."""

    official: str
    d2v: str
    factor: int = 1
    first: int = 0
    shape: tuple[int, ...] | None = None


_BLOCK = (
    ("norm1.", "norm1."),
    ("attn.qkv.", "attention.qkv."),
    ("attn.proj.", "attention.out."),
    ("norm2.", "norm2."),
    ("mlp.fc1.", "fc1."),
    ("mlp.fc2.", "fc2."),
)


class Names:
    """The map between both names. kind: the modality's name in the official module dictionary.

    own: rows of the front end, relative to the modality's module. alibi_layers, num_projections: of the configuration.
    teacher: where the official teacher begins, "" = the whole model, "blocks." = the shared blocks alone. ours_alone:
    tensors that the official files do not have, by our name, and what stands for them where such a file is read.
    """

    def __init__(
        self,
        kind: str,
        own: Iterable[Row],
        *,
        alibi_layers: int = 1,
        num_projections: int = 1,
        teacher: str = "",
        ours_alone: Mapping[str, Tensor] | None = None,
    ) -> None:
        home = f"modality_encoders.{kind}."
        rows = [Row(f"blocks.#.{theirs}", f"student.transformer.blocks.#.{ours}") for theirs, ours in _BLOCK]
        rows += [
            Row(f"{home}context_encoder.blocks.#.{theirs}", f"student.encoder.prenet.transformer.blocks.#.{ours}")
            for theirs, ours in _BLOCK
        ]
        rows += [
            Row(f"{home}context_encoder.norm.", "student.encoder.prenet.norm."),
            Row(f"{home}alibi_scale", SCALE, shape=(alibi_layers, 1, -1, 1, 1)),
            Row(f"{home}decoder.blocks.#.0.", "predictor.blocks.#.conv."),
            Row(f"{home}decoder.proj.", "predictor.projections.0.")
            if num_projections == 1
            else Row(f"{home}decoder.proj.#.", "predictor.projections.#.", factor=2),
        ]
        self.rows = [*rows, *(row._replace(official=home + row.official) for row in own)]
        self.kind, self.teacher, self.ours_alone = kind, teacher, ours_alone or {}

    def _translate(self, name: str, to_d2v: bool) -> tuple[str, Row] | None:
        for row in self.rows:
            source, destination = (row.official, row.d2v) if to_d2v else (row.d2v, row.official)
            pattern = re.escape(source).replace(r"\#", r"(?P<n>\d+)") + (
                "(?P<leaf>weight|bias)" if source.endswith(".") else "(?P<leaf>)"
            )
            match = re.fullmatch(pattern, name)
            if match is None:
                continue
            if "#" in source:
                n = int(match["n"])
                n, rest = divmod(n - row.first, row.factor) if to_d2v else (n * row.factor + row.first, 0)
                if rest:
                    continue
                destination = destination.replace("#", str(n))
            return destination + match["leaf"], row
        return None

    def from_official(self, state: Mapping[str, Any], leave_out: Sequence[str] = ()) -> dict[str, Tensor]:
        """fairseq's `model` entry as the state that `d2v_core.run.load_model_state` takes; the nested teacher and the
        names in `leave_out` are passed over. Raises UserError naming what is not known. Shapes are checked where the
        state is loaded."""
        out = dict(self.ours_alone)
        unknown: list[str] = []
        for name, tensor in state.items():
            if name == TEACHER or name in leave_out:
                continue
            found = self._translate(name, True)
            if found is None:
                unknown.append(name)
            else:
                out[found[0]] = tensor if found[1].shape is None else tensor.reshape(-1)
        if unknown:
            raise UserError(
                f"{len(unknown)} names are not known as data2vec 2.0 weights of {self.kind} for this configuration: "
                f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}."
            )
        return out

    def to_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The way back: names of student and predictor. Raises UserError for a name not known."""
        out: dict[str, Tensor] = {}
        for name, tensor in state.items():
            found = self._translate(name, False)
            if name in self.ours_alone:
                continue
            if found is None:
                raise UserError(f"{name} has no counterpart in the official code.")
            out[found[0]] = tensor if found[1].shape is None else tensor.reshape(found[1].shape)
        return out

    def teacher_from_official(self, state: Mapping[str, Any], leave_out: Sequence[str] = ()) -> dict[str, Tensor]:
        """fairseq's `_ema` entry as the state that `EMATeacher.load_own_state` takes."""
        renamed = self.from_official({self.teacher + name: tensor for name, tensor in state.items()}, leave_out)
        return {name.removeprefix("student."): tensor for name, tensor in renamed.items()}

    def teacher_to_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`EMATeacher.own_state()` under fairseq's names."""
        renamed = self.to_official({f"student.{name}": tensor for name, tensor in state.items()})
        return {name.removeprefix(self.teacher): tensor for name, tensor in renamed.items()}

    def gradients_to_official(self, model: nn.Module) -> dict[str, Tensor]:
        """Gradients of a `Data2Vec`, those that there are."""
        own = {name: p.grad for name, p in model.named_parameters() if not name.startswith("teacher.")}
        return self.to_official({name: grad for name, grad in own.items() if grad is not None})


# ------------------------------------------------------------------------------------------------------- settings

# Settings that change no number, or none that d2v could read from them.
_INERT = frozenset((
    "_name", "seed", "skip_ema", "log_norms", "ema_same_dtype", "supported_modality", "modality.type",
    "modality.mask_channel_length", "modality.num_alibi_heads", "modality.model_depth", "modality.alibi_max_pos",
    "modality.init_extra_token_zero",
))  # fmt: skip
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


class Settings:
    """An official model configuration that is read key by key. `words` raises with all that did not fit.

    cfg: `cfg["model"]` of a checkpoint; the settings of one modality lie under "modality", or under "modalities" by
    its name.
    """

    def __init__(self, cfg: Mapping[str, Any], kind: str) -> None:
        every: Mapping[str, Any] = cfg.get("modalities") or {}
        modality: Mapping[str, Any] = cfg.get("modality") or every.get(kind.lower()) or {}
        rest = {key: value for key, value in cfg.items() if key not in ("modality", "modalities")}
        self._values = _flatten({**rest, "modality": modality})
        self._taken: set[str] = set()
        self._problems: list[str] = []
        for key, possible in _FIXED.items():
            self.fixed(key, possible)

    def take(self, key: str, *default: Any) -> Any:
        self._taken.add(key)
        if key not in self._values and not default:
            self._problems.append(f"{key} is missing")
            return 0
        return self._values.get(key, *default)

    def fixed(self, key: str, possible: Any) -> None:
        """A key of which d2v knows one value only."""
        value = self.take(key, possible)
        if value != possible:
            self._problems.append(f"{key}={value!r}: d2v has only {possible!r}")

    def fail(self, why: str) -> None:
        self._problems.append(why)

    def shared(self, exact: bool) -> dict[str, Any]:
        """Options that every modality has. exact: also do as fairseq does where d2v does otherwise."""
        take = self.take
        self.fixed("post_mlp_drop", take("encoder_dropout", 0.1))
        layer_norms = [name for name in ("batch", "instance", "layer") if take(f"{name}_norm_target_layer", False)]
        mean_norms = [name for name in ("layer", "instance") if take(f"{name}_norm_targets", False)]
        scale = take("loss_scale", None)
        return {
            "method": "data2vec2",
            "official_quirks": exact,
            "model.embed_dim": take("embed_dim", 768),
            "model.num_layers": take("depth", 8),
            "model.num_heads": take("num_heads", 12),
            "model.mlp_ratio": take("mlp_ratio", 4),
            "model.norm": "post",
            "model.norm_eps": take("norm_eps", 1e-6),
            "model.attention_bias": "qkv",
            "model.layer_scale": None,
            "model.dropout": take("encoder_dropout", 0.1),
            "model.attention_dropout": take("attention_dropout", 0.1),
            "model.activation_dropout": 0.0,
            "model.layer_drop": take("layerdrop", 0),
            "model.drop_path": take("end_drop_path_rate", 0),
            "target.top_k_layers": take("average_top_k_layers"),
            "target.tap": "block" if take("end_of_block_targets", False) else "ffn",
            "target.layer_norms": layer_norms,
            "target.mean_norms": mean_norms,
            "target.padding_in_stats": exact,
            "loss.beta": take("loss_beta", 0),
            "loss.scale": "inverse_sqrt" if scale is None else scale,
            "loss.cls_weight": take("cls_loss", 0),
            "teacher.ema_decay": take("ema_decay"),
            "teacher.ema_end_decay": take("ema_end_decay"),
            "teacher.ema_anneal_steps": take("ema_anneal_end_step"),
            "guard.min_target_std": take("min_target_var", 0.1),
            "guard.min_pred_std": take("min_pred_var", 0.01),
            "train.max_steps": take("max_update"),
            "train.num_masks": take("clone_batch", 1),
            "mask.mask_prob": take("modality.mask_prob"),
            "mask.mask_length": take("modality.mask_length", 5),
            "mask.adjust": take("modality.mask_prob_adjust", 0),
            "mask.inverse": take("modality.inverse_mask", False),
            "prenet.layers": take("modality.prenet_depth", 4),
            "prenet.layer_drop": take("modality.prenet_layerdrop", 0),
            "prenet.dropout": take("modality.prenet_dropout", 0),
            "decoder.dim": take("modality.decoder.decoder_dim", 384),
            "decoder.layers": take("modality.decoder.decoder_layers", 5),
            "decoder.kernel": take("modality.decoder.decoder_kernel", 5),
            "decoder.groups": take("modality.decoder.decoder_groups", 16),
            "decoder.residual": take("modality.decoder.decoder_residual", True),
            "decoder.projection_layers": take("modality.decoder.projection_layers", 1),
            "decoder.projection_ratio": take("modality.decoder.projection_ratio", 2.0),
            "decoder.input_dropout": take("modality.decoder.input_dropout", 0.1),
            "decoder.noise_std": take("modality.mask_noise_std", 0.01),
        }

    def alibi(self) -> dict[str, Any]:
        take = self.take
        return {
            "alibi.use": take("modality.use_alibi_encoder", False),
            "alibi.scale": take("modality.alibi_scale", 1.0),
            "alibi.learned": take("modality.learned_alibi_scale", False),
            "alibi.per_head": take("modality.learned_alibi_scale_per_head", False),
            "alibi.per_layer": take("modality.learned_alibi_scale_per_layer", False),
        }

    def without_alibi(self) -> None:
        """For modalities that do not use it: how it would be is of no matter."""
        self.fixed("modality.use_alibi_encoder", False)
        self._taken.update(key for key in self._values if "alibi" in key)

    def words(self, values: Mapping[str, Any]) -> list[str]:
        """`key=value` for `d2v_core.config.load_config`. Raises UserError naming every key that is missing, unknown,
        or has a value that d2v cannot reproduce."""
        unknown = sorted(self._values.keys() - self._taken - _INERT)
        problems = self._problems + ([f"unknown: {', '.join(unknown)}"] if unknown else [])
        if problems:
            raise UserError(
                "The official configuration does not fit data2vec 2.0 as d2v has it:\n  " + "\n  ".join(problems)
            )
        return [f"{key}={_word(value)}" for key, value in values.items()]


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(cast("Mapping[str, Any]", value), f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _word(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, cast('list[Any]', value)))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
