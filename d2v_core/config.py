"""The configuration of a run: dataclasses are the schema, YAML files are recipes, `key=value` has the last word.

The only module that imports omegaconf. A modality adds sections of its own (`Modality.sections`); a name that nobody
declared is an error with the nearest name, whether it stands in a recipe or on the command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from d2v_core.errors import UserError
from d2v_core.files import first, near

if TYPE_CHECKING:
    from d2v_core.contract import Modality, Sequel

T = TypeVar("T")
Norm = Literal["instance", "layer", "batch", "group"]


def opt(default: T, doc: str) -> T:
    """A dataclass field with a sentence of documentation, which `d2v config` prints."""
    if isinstance(default, list):
        items = cast("list[Any]", default)
        return cast("T", field(default_factory=lambda: list(items), metadata={"doc": doc}))
    return cast("T", field(default=default, metadata={"doc": doc}))


@dataclass
class ModelConfig:
    """The transformer."""

    embed_dim: int = opt(768, "Width D.")
    num_layers: int = opt(12, "Blocks.")
    num_heads: int = opt(12, "Attention heads.")
    mlp_ratio: float = opt(4.0, "Hidden width of the feed-forward network over embed_dim.")
    norm: Literal["post", "pre"] = opt("post", "Layer norm after each residual sum, or before each branch.")
    norm_eps: float = opt(1e-5, "Added to the variance in layer norms.")
    attention_bias: Literal["qkv", "qv"] = opt("qkv", "Which projections have a bias.")
    layer_scale: float | None = opt(None, "Initial value of a learned scale of each residual branch; null = none.")
    dropout: float = opt(0.0, "After attention, after the feed-forward network and before the first block.")
    attention_dropout: float = opt(0.0, "Of the attention weights.")
    activation_dropout: float = opt(0.0, "Inside the feed-forward network.")
    layer_drop: float = opt(0.0, "Probability that a block of the student is left out of a forward pass.")
    drop_path: float = opt(0.0, "Stochastic depth of the last block, growing linearly from 0 at the first.")


@dataclass
class TargetConfig:
    """What the student regresses."""

    top_k_layers: int = opt(8, "Teacher layers averaged, counted from the output side.")
    tap: Literal["ffn", "block"] = opt("ffn", "Feed-forward output before the residual sum, or the block's output.")
    layer_norms: list[Norm] = opt([], "Norms of each layer before averaging, in order: instance, layer, batch, group.")
    mean_norms: list[Norm] = opt([], "Norms of the average, in order.")
    padding_in_stats: bool = opt(
        False, "Let padded tokens into the statistics of the norms, as fairseq does; only of use for comparison."
    )
    official_axes: bool = opt(
        False,
        "Reproduce fairseq's group and instance norms where, for lack of a transpose, they run over the samples of "
        "the batch.",
    )


@dataclass
class LossConfig:
    """The regression loss."""

    beta: float = opt(0.0, "Threshold of smooth L1; 0 = squared error.")
    scale: str = opt(
        "inverse_sqrt", "Factor of the sum over channels: inverse_sqrt = 1/sqrt(D), mean = 1/D, sum = 1, or a number."
    )
    cls_weight: float = opt(
        0.0,
        "Weight of a second regression, the mean over rows of what the token in front misses of its sample's mean "
        "target; 0 = none. With official_quirks a sum over the rows of a micro-batch, so that it grows with them.",
    )


@dataclass
class TeacherConfig:
    """The moving average."""

    ema_decay: float = opt(0.999, "Decay at the start.")
    ema_end_decay: float = opt(0.9999, "Decay from ema_anneal_steps on; 1 freezes the teacher.")
    ema_anneal_steps: int | None = opt(None, "Updates over which the decay grows linearly; null = train.max_steps.")


@dataclass
class OptimConfig:
    """AdamW and its learning rate."""

    lr: float = opt(5e-4, "Peak learning rate.")
    betas: list[float] = opt([0.9, 0.98], "Decay of the first and second moments.")
    eps: float = opt(1e-6, "Added to the root of the second moment.")
    official_eps: bool = opt(
        False,
        "Add eps before the bias correction of the second moment, as fairseq's Adam does (in its first steps a larger "
        "eps than torch's AdamW has).",
    )
    weight_decay: float = opt(0.01, "Decoupled weight decay.")
    decay_all: bool = opt(True, "Decay biases, norms and other vectors too; false = matrices only.")
    clip_grad_norm: float | None = opt(None, "Largest global gradient norm; null = no clipping.")
    schedule: Literal["tri_stage", "cosine", "linear", "constant"] = opt("cosine", "Shape of the learning rate.")
    warmup_ratio: float = opt(0.05, "Share of train.max_steps spent on warm-up.")
    hold_ratio: float = opt(0.9, "Share of train.max_steps at the peak (tri_stage).")
    initial_lr_ratio: float = opt(0.01, "First learning rate over the peak (tri_stage).")
    final_lr_ratio: float = opt(0.0, "Last learning rate over the peak; above 0 for tri_stage.")


@dataclass
class GuardConfig:
    """Stops a run whose representation collapses."""

    after_steps: int = opt(5000, "Steps before the guard watches.")
    min_target_std: float = opt(0.1, "Least target_std.")
    min_pred_std: float = opt(0.01, "Least pred_std.")


@dataclass
class TrainConfig:
    """The loop."""

    max_steps: int = opt(1000, "Optimizer updates.")
    num_masks: int = opt(1, "Masked copies of each sample in a step; the teacher runs once for all of them.")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N; auto takes CUDA where there is a device.")
    precision: Literal["fp32", "bf16", "fp16"] = opt("fp32", "Autocast type; weights, teacher and loss stay float32.")
    compile: bool = opt(False, "torch.compile the transformer blocks.")
    num_threads: int = opt(0, "CPU threads; 0 = torch's choice. Bits of a result depend on it.")
    num_workers: int = opt(1, "Processes that read and mask data; 0 = the training process itself.")
    worker_failures: int = opt(
        3, "How many of those may die or hang before the run stops; the sample that it was reading is left out."
    )
    worker_timeout: float = opt(600.0, "Seconds at one sample after which such a process counts as hanging.")
    check_memory: bool = opt(True, "Refuse before the first step what cannot fit into the device's memory.")
    log_every: int = opt(10, "Steps between lines of metrics.jsonl.")
    checkpoint_every: int = opt(500, "Steps between checkpoints; one more is written at the end.")
    keep_checkpoints: int = opt(2, "Newest checkpoints kept; older ones are deleted.")
    keep_every: int | None = opt(None, "Checkpoints of every so many steps are kept for good; null = none.")
    bad_steps_limit: int = opt(
        5,
        "Steps in a row that are not finite, and skipped, before the run goes back to its newest checkpoint, once, or "
        "stops.",
    )
    tensorboard: bool = opt(True, "Also write TensorBoard events.")
    probe: bool = opt(True, "End by scoring the network and its untrained twin on the modality's probe.")


@dataclass
class FinetuneConfig:
    """A labelled task on top of a pre-trained network."""

    weights: Literal["student", "teacher", "untrained"] = opt(
        "student", "What to start from: the pre-trained student, its teacher, or the same network untrained."
    )
    dev_ratio: float = opt(0.1, "Share of the training part held back for choosing, where the data has no dev part.")
    batch: int | None = opt(
        32, "Samples per optimizer step; null = by size, as the batches of pre-training are, with nothing cropped."
    )
    micro_batch: int | None = opt(None, "Samples that run at once; null = the whole batch.")
    pool: Literal["mean", "first"] = opt("mean", "What the head reads: the mean of the tokens, or the first one.")
    final_norm: bool = opt(True, "Keep the transformer's last norm (pre-norm only), or leave it out.")
    head_norm: bool = opt(False, "Layer norm of what the head reads.")
    head_hidden: bool = opt(False, "A linear map to the same width and a tanh before the last one (BERT's pooler).")
    head_dropout: float = opt(0.0, "Before each linear map of the head.")
    head_init_std: float | None = opt(None, "Initial weights of the last map: normal with this; null = torch's own.")
    label_smoothing: float = opt(0.0, "Share of each target spread over all classes.")
    layer_decay: float = opt(1.0, "Learning rate of a block over that of the block above it; 1 = the same for all.")
    frozen: list[str] = opt(
        [],
        "Parameters of the network that are never trained, by the beginning of their names, such as encoder.embedding.",
    )
    freeze_steps: int = opt(0, "First updates in which the head learns alone.")
    head_steps: int = opt(
        0,
        "Before all else, updates of the head's last map alone, on features of the network as it is, which are "
        "computed once and held in memory.",
    )
    head_lr: float = opt(2e-2, "Peak learning rate of these updates, on standardised features.")
    head_batch: int = opt(16, "Samples in each of these updates.")
    mask_prob: float = opt(
        0.0, "Expected share of tokens whose content is replaced while training if no two spans met; 0 = none."
    )
    mask_length: int = opt(10, "Length of a span of such tokens.")
    channel_mask_prob: float = opt(
        0.0, "Expected share of channels that are zero in a whole sample while training if no two spans met; 0 = none."
    )
    channel_mask_length: int = opt(64, "Length of a span of such channels.")
    lrs: list[float] = opt(
        [],
        "Peak learning rates to try, each in a whole run of its own in a folder beside the others; the one whose best "
        "dev score is best is kept, and only that is tested. Empty = optim.lr.",
    )
    ema_decay: float | None = opt(None, "Moving average of the weights, which is then what is scored; null = none.")
    eval_every: int = opt(100, "Steps between scores on the dev part; the best one's weights are kept.")


@dataclass
class LaunchConfig:
    """Several processes that train as one (docs/distributed.md)."""

    processes: int = opt(1, "Processes on this machine; leave it at 1 with torchrun, which starts them itself.")
    strategy: Literal["ddp", "fsdp2"] = opt(
        "ddp",
        "ddp = each process has the whole network; fsdp2 = each keeps its share of weights, gradients, moments and "
        "teacher.",
    )
    activation_checkpointing: bool = opt(
        False,
        "Keep only the inputs of the blocks for the backward pass and compute the rest again: less memory, more time.",
    )
    backend: Literal["auto", "gloo", "nccl"] = opt(
        "auto", "How gradients travel; auto = nccl where each process has a GPU of its own, else gloo."
    )
    timeout: float = opt(30.0, "Minutes for which a process waits for the others before it gives up.")
    max_restarts: int = opt(
        0, "How often the processes are started again from the newest checkpoint when one of them dies."
    )


CORE_SECTIONS: Mapping[str, type] = {
    "model": ModelConfig,
    "target": TargetConfig,
    "loss": LossConfig,
    "teacher": TeacherConfig,
    "optim": OptimConfig,
    "guard": GuardConfig,
    "train": TrainConfig,
    "finetune": FinetuneConfig,
    "launch": LaunchConfig,
}
STAGES: Mapping[str, tuple[str, ...]] = {
    "pretrain": ("model", "target", "loss", "teacher", "optim", "guard", "train", "launch"),
    "finetune": ("model", "optim", "train", "finetune", "launch"),
    "probe": ("model", "train", "finetune"),
}
"""Each stage, and the sections that mean something to it."""
ALL = "all"
"""Of `d2v run` alone: pre-training and its sequel."""
KEYS: Mapping[str, tuple[Any, str]] = {
    "modality": ("", "What kind of data: a name that `d2v modalities` lists."),
    "preset": ("tiny", "Recipe of the modality: sizes and hyper-parameters."),
    "stage": (
        "pretrain",
        "pretrain; finetune = train the network of `from` on a labelled task; probe = score its frozen features on it. "
        "all = pretrain, then what the modality has to follow; `d2v run` without data and stage does so by itself.",
    ),
    "encoder": ("", "Feature encoder, the modality's own or a plugin's (`d2v plugins`); empty = the recipe's."),
    "method": ("", "data2vec or data2vec2 where the modality has it; empty = the recipe's."),
    "official_quirks": (False, "Reproduce what data2vec 2.0's official code does by mistake; for comparison."),
    "from": (None, "Run folder whose weights this run starts from, on new data; null = from scratch."),
    "labels": (
        None,
        "How many labelled samples to train on: 500, or 10%, spread evenly over classes, or an amount that the task "
        "knows (10m, 1h); null = all.",
    ),
    "out": (None, "Run folder; null = a new one under runs/."),
    "seed": (0, "Of every random choice."),
    "resume": ("never", "never = start anew in an empty folder; auto = go on with the run in `out` if there is one."),
}
RESUME = ("never", "auto")
DATA_OF_RUN = ("path", "split", "also", "repeat")
"""Options of a modality's section `data` that name the data of one run and are not handed on to the next."""


@dataclass
class RunConfig:
    """A resolved configuration. Read it, do not write to it: what follows from it is a function of it."""

    modality: str
    preset: str
    stage: str
    encoder: str
    method: str
    official_quirks: bool
    from_run: str | None
    labels: str | None
    out: str | None
    seed: int
    resume: str
    model: ModelConfig
    target: TargetConfig
    loss: LossConfig
    teacher: TeacherConfig
    optim: OptimConfig
    guard: GuardConfig
    train: TrainConfig
    finetune: FinetuneConfig
    launch: LaunchConfig
    sections: dict[str, Any]
    """The modality's own sections, by name."""
    home: Path | None = None
    """The run folder that it was read from; None for a run that is about to begin."""

    def section(self, name: str, kind: type[T]) -> T:
        """A section of the modality, checked: `config.section("data", MyData)`."""
        value = self.sections.get(name)
        if not isinstance(value, kind):
            raise TypeError(f"section {name!r} is {type(value).__name__}, expected {kind.__name__}")
        return value

    def with_path(self, path: str | Path, split: str | None = None) -> RunConfig:
        """The same with other data: data.path=path, and data.split=split where there is such an option.

        Raises UserError where the modality has no option data.path.
        """
        data = self.sections.get("data")
        names = {f.name for f in dataclasses.fields(data)} if dataclasses.is_dataclass(data) else set[str]()
        if "path" not in names or (split is not None and "split" not in names):
            missing = "data.path" if "path" not in names else "data.split"
            raise UserError(f"The modality {self.modality} has no option {missing}: it cannot be given other data.")
        changed = {"path": str(path), **({"split": split} if "split" in names else {})}
        data = dataclasses.replace(cast("Any", data), **changed)
        return dataclasses.replace(self, sections={**self.sections, "data": data})

    def to_dict(self) -> dict[str, Any]:
        """Plain values in the order in which they are documented, with the keys that the user types."""
        out: dict[str, Any] = {key: getattr(self, "from_run" if key == "from" else key) for key in KEYS}
        for name in STAGES[self.stage]:
            out[name] = dataclasses.asdict(getattr(self, name))
        for name, section in self.sections.items():
            out[name] = dataclasses.asdict(section)
        return out

    def to_yaml(self, comments: bool = False) -> str:
        """With comments, each field's sentence stands above it."""
        return as_yaml(self.to_dict(), documentation(self) if comments else None)


def parse_arguments(argv: Sequence[str]) -> dict[str, str]:
    """`key=value` words to a mapping. Raises UserError for anything else."""
    values: dict[str, str] = {}
    for word in argv:
        key, equals, value = word.partition("=")
        key = key.strip()
        if not equals or not re.fullmatch(r"[A-Za-z_][\w.]*", key):
            raise UserError(
                f"{word!r} is not of the form key=value. Options are written like train.max_steps=100; "
                "`d2v config modality=NAME` lists them all."
            )
        if key in values:
            raise UserError(f"{key} is given twice: {values[key]!r} and {value!r}. Give it once.")
        values[key] = value
    return values


def options(kind: type[T], argv: Sequence[str], verb: str) -> T:
    """`key=value` words for a verb of its own, checked against a dataclass. Raises UserError as a run would."""
    try:
        return typed(kind, parse_arguments(argv))
    except UserError as error:
        raise UserError(f"{verb}: {error}\n`d2v {verb} --help` lists the options.") from None


def typed(kind: type[T], values: Mapping[str, str], base: Mapping[str, Any] | None = None) -> T:
    """A dataclass from options by key, and from nested values that count where no option is given. Raises UserError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), dict(base or {}), _given(kind, values))
        return cast("T", OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise UserError(_reason(error, kind, {**(base or {}), **values})) from None


def names_several(modality: str) -> bool:
    """Whether the value of the key `modality` is a list: a joint run (`jointconfig.py`)."""
    return modality.startswith("[") or "," in modality


def option_rows(kind: type, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(name, default, what it must be, meaning) of each option of a dataclass, as the user writes them.

    prefix: what stands before the names, such as `data.`; a section inside has its own name and a dot there.
    """
    kinds = get_type_hints(kind)
    for option in dataclasses.fields(kind):
        name = prefix + option.name
        if "doc" not in option.metadata:
            yield from option_rows(cast("type", option.default_factory), f"{name}.")
            continue
        value: Any = cast("Any", option.default_factory)() if option.default is MISSING else option.default
        text = f"[{','.join(map(str, cast('list[Any]', value)))}]" if isinstance(value, list) else str(value)
        text = "null" if value is None else text.lower() if isinstance(value, bool) else text
        yield name, text, _expected(_alternatives(kinds[option.name])), str(option.metadata["doc"])


def with_sequel(argv: Sequence[str]) -> tuple[list[str], Sequel | None]:
    """The words of the first stage of `d2v run`, and what follows it.

    There is a sequel where stage=all asks for one, or where no stage is named and the modality has one for such a
    command. Raises UserError.
    """
    from d2v_core import plugins

    values = parse_arguments(argv)
    stage, name = values.get("stage"), values.get("modality")
    if stage not in (None, ALL):
        return list(argv), None
    sequel = plugins.load(name).sequel(values) if name and not names_several(name) else None
    if sequel is None and stage == ALL:
        raise UserError(
            f"stage={ALL}: nothing follows pre-training in modality={name}. Take stage=pretrain, then stage=finetune."
            if name else f"stage={ALL} needs modality=NAME."
        )  # fmt: skip
    owns = {"stage"} | (sequel.owns if sequel else set[str]())
    return [word for word in argv if word.partition("=")[0].strip() not in owns], sequel


def load_config(argv: Sequence[str], modality_of: Any = None) -> tuple[RunConfig, type[Modality[Any]]]:
    """Defaults, then the preset, then the command line.

    modality_of: function from a name to its class; the installed plugins by default.
    Raises UserError naming the key, what was given and what is possible.
    """
    from d2v_core import plugins

    values = parse_arguments(argv)
    stage = values.get("stage", "pretrain")
    if stage not in STAGES:
        hint = _hint(stage, STAGES)
        raise UserError(f"This configuration cannot work:\n  stage={stage} must be one of: {', '.join(STAGES)}.{hint}")
    if names_several(values.get("modality", "")):
        raise UserError(
            f"modality={values['modality']}: several modalities are for `d2v run` and `d2v config`, and for "
            "pre-training. Give one here, for example modality=NAME preset=joint."
        )
    source: Path | None = None
    stored: dict[str, Any] = {}
    if values.get("from"):
        values["from"] = str(run_of(Path(values["from"]), values.get("modality")))
    if stage != "pretrain":
        if not values.get("from"):
            raise UserError(f"stage={stage} needs from=RUN, the folder of a pre-training run.")
        source = Path(values["from"])
        run_folder(source, "from=")
        stored = read_yaml(source / "config.yaml")
        if stored.get("stage", "pretrain") != "pretrain":
            raise UserError(
                f"from={source} is itself the folder of stage={stored['stage']}: give its pre-training run."
            )
        kind = str(stored.get("modality", ""))
        if values.setdefault("modality", kind) != kind:
            raise UserError(f"from={source} is a run of modality={kind}, not {values['modality']}.")
    name = values.get("modality", "")
    if not name:
        raise UserError(f"modality is missing: add modality=NAME. Installed: {', '.join(plugins.names()) or 'none'}.")
    modality = cast("type[Modality[Any]]", (modality_of or plugins.load)(name))
    preset = values.get("preset", cast("str", KEYS["preset"][0]))
    recipe = {} if stage == "probe" else _read_recipe(modality, preset, stage)
    if source is not None:
        recipe = _on_top_of(stored, recipe, ("model", "train") if stage == "probe" else ("model",))
    encoder = values.get("encoder", "") or str(recipe.get("encoder", "")) or modality.encoders[0]
    brought = plugins.names(plugins.ENCODERS)
    if encoder not in (*modality.encoders, *brought):
        raise UserError(
            f"encoder={encoder!r} is not one of {name}'s: {', '.join(modality.encoders)}"
            + (f"; plugins bring: {', '.join(brought)}" if brought else "")
            + f".{_hint(encoder, (*modality.encoders, *brought))}"
        )
    where = f"preset {preset}" if source is None else f"{source / 'config.yaml'} or preset {preset}"
    return _merge(modality, recipe, {**values, "encoder": encoder}, where, stage=stage), modality


def run_folder(given: Path, key: str = "") -> Path:
    """`given` as it is. Raises UserError where it is no run folder, with what is near; key: stands before it there."""
    if (given / "config.yaml").is_file():
        return given
    if not given.exists():
        what = "Neither is it there: " + near(given.expanduser().resolve())
    elif (given.resolve().parent / "config.yaml").is_file():
        what = f"The folder around it is one: {given.parent}."
    elif given.is_dir() and (inside := sorted(path.parent.name for path in given.glob("*/config.yaml"))):
        what = f"Run folders in it: {first(inside, ', ')}."
    else:
        what = "Give the folder that `d2v run` names when it ends."
    raise UserError(f"{key}{given} is not a run folder: it has no config.yaml. {what}")


def run_of(source: Path, modality: str | None) -> Path:
    """The run folder of one modality: `source` itself, or, where that is a joint run, the folder in it. Raises
    UserError where a joint run has no such modality, or it is not told which."""
    path = source / "config.yaml"
    members = read_yaml(path).get("modality") if path.is_file() else None
    if not isinstance(members, list):
        return source
    names = [str(name) for name in cast("list[Any]", members)]
    if modality not in names:
        raise UserError(
            f"{source} is a joint run of {', '.join(names)}"
            + (f", and which of them is meant is not said: give modality=NAME, or its folder ({source / names[0]})."
               if modality is None else f", not of modality={modality}.")
        )  # fmt: skip
    if not (source / modality / "config.yaml").is_file():
        raise UserError(
            f"{source} has no folder {modality} yet: it comes when the joint run ends. Let it: the same command with "
            f"out={source} resume=auto."
        )
    return source / modality


def _on_top_of(stored: Mapping[str, Any], recipe: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    """The network of a stored run, and what a recipe of another stage sets.

    kept: the core's sections that are carried over beside the modality's. What the run trained on and what it was
    called is not.
    """
    dropped = {*KEYS, *(name for name in CORE_SECTIONS if name not in kept)} - {"encoder", "method", "official_quirks"}
    result: dict[str, Any] = {key: value for key, value in stored.items() if key not in dropped}
    data = result.get("data")
    if isinstance(data, dict):
        result["data"] = {key: value for key, value in cast("dict[str, Any]", data).items() if key not in DATA_OF_RUN}
    return _overlaid(result, recipe)


def from_dict(
    stored: Mapping[str, Any], modality: type[Modality[Any]], source: str, given: Mapping[str, str] | None = None
) -> RunConfig:
    """A configuration that was written with `to_yaml`, checked like any other. `source` names it in errors.

    given: options by key that count in place of the stored ones, as on the command line.
    """
    values = dict(stored)
    if not values.get("encoder"):
        raise UserError(f"{source} has no key `encoder`; it is not the config.yaml of a run.")
    stage = str(values.get("stage", "pretrain"))
    if stage not in STAGES:
        raise UserError(f"{source}: stage={stage} is not one of: {', '.join(STAGES)}. A newer d2v may have written it.")
    return _merge(modality, values, given or {}, source, str(values["encoder"]), stage)


def read_yaml(path: Path) -> dict[str, Any]:
    """Raises UserError where the file is missing, is no YAML or holds no mapping."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (OmegaConfBaseException, OSError, UnicodeDecodeError, ValueError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from error
    except Exception as error:  # yaml's own errors derive from Exception alone
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path} holds no mapping of keys to values.")
    return {str(key): value for key, value in cast("dict[Any, Any]", loaded).items()}


def check(config: RunConfig) -> RunConfig:
    """What types cannot say. Raises UserError."""
    problems: list[str] = []

    def at_least(key: str, value: float, least: float) -> None:
        if not least <= value < math.inf:
            problems.append(f"{key}={value} must be {'' if math.isfinite(value) else 'finite and '}at least {least}")

    def within(key: str, value: float, low: float, high: float) -> None:
        if not low <= value <= high:
            problems.append(f"{key}={value} must lie between {low} and {high}")

    def above(key: str, value: float) -> None:
        if not value > 0:
            problems.append(f"{key}={value} must be above 0")

    model, target, train, optim = config.model, config.target, config.train, config.optim
    for key in ("embed_dim", "num_layers", "num_heads"):
        at_least(f"model.{key}", getattr(model, key), 1)
    if model.num_heads > 0 and model.embed_dim % model.num_heads:
        problems.append(f"model.embed_dim={model.embed_dim} must be a multiple of model.num_heads={model.num_heads}")
    for key in ("dropout", "attention_dropout", "activation_dropout", "layer_drop", "drop_path"):
        within(f"model.{key}", getattr(model, key), 0.0, 0.99)
    for key in ("mlp_ratio", "norm_eps"):
        above(f"model.{key}", getattr(model, key))
    if "target" in STAGES[config.stage]:
        within("target.top_k_layers", target.top_k_layers, 1, model.num_layers)
    at_least("loss.beta", config.loss.beta, 0.0)
    at_least("loss.cls_weight", config.loss.cls_weight, 0.0)
    if config.loss.scale not in ("inverse_sqrt", "mean", "sum"):
        try:
            known = math.isfinite(float(config.loss.scale))
        except ValueError:
            known = False
        if not known:
            problems.append(f"loss.scale={config.loss.scale} must be inverse_sqrt, mean, sum or a number")
    within("teacher.ema_decay", config.teacher.ema_decay, 0.0, 1.0)
    within("teacher.ema_end_decay", config.teacher.ema_end_decay, 0.0, 1.0)
    if config.teacher.ema_anneal_steps is not None:
        at_least("teacher.ema_anneal_steps", config.teacher.ema_anneal_steps, 0)
    if len(optim.betas) != 2 or not all(0 <= beta < 1 for beta in optim.betas):
        problems.append(f"optim.betas={optim.betas} must be two numbers from 0 to below 1")
    for key in ("lr", "eps", "weight_decay", "hold_ratio", "initial_lr_ratio", "final_lr_ratio"):
        at_least(f"optim.{key}", getattr(optim, key), 0)
    within("optim.warmup_ratio", optim.warmup_ratio, 0.0, 1.0)
    if optim.schedule == "tri_stage":
        within("optim.warmup_ratio + optim.hold_ratio", optim.warmup_ratio + optim.hold_ratio, 0.0, 1.0)
        if optim.final_lr_ratio <= 0:
            problems.append("optim.final_lr_ratio must be above 0 for tri_stage, whose last phase is exponential")
    if optim.clip_grad_norm is not None and optim.clip_grad_norm <= 0:
        problems.append(f"optim.clip_grad_norm={optim.clip_grad_norm} must be above 0; null = no clipping")
    for key in ("max_steps", "num_masks", "log_every", "checkpoint_every", "keep_checkpoints", "bad_steps_limit"):
        at_least(f"train.{key}", getattr(train, key), 1)
    for key in ("num_threads", "num_workers", "worker_failures"):
        at_least(f"train.{key}", getattr(train, key), 0)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", train.device):
        problems.append(f"train.device={train.device} must be auto, cpu, cuda or cuda:N")
    if train.worker_timeout <= 0:
        problems.append(f"train.worker_timeout={train.worker_timeout} must be above 0 seconds")
    if config.resume not in RESUME:
        problems.append(f"resume={config.resume} must be one of: {', '.join(RESUME)}.{_hint(config.resume, RESUME)}")
    launch = config.launch
    at_least("launch.processes", launch.processes, 1)
    at_least("launch.max_restarts", launch.max_restarts, 0)
    above("launch.timeout", launch.timeout)
    if launch.strategy == "fsdp2":
        for key, given in (("compile=true", train.compile), ("precision=fp16", train.precision == "fp16")):
            if given:
                problems.append(f"train.{key} does not work with launch.strategy=fsdp2: leave it out, or take ddp")
    tune = config.finetune
    for key in ("eval_every", "head_batch", "mask_length", "channel_mask_length"):
        at_least(f"finetune.{key}", getattr(tune, key), 1)
    if tune.batch is not None:
        at_least("finetune.batch", tune.batch, 1)
    if tune.batch is None and tune.micro_batch is not None:
        problems.append(f"finetune.micro_batch={tune.micro_batch} counts samples, but finetune.batch=null does not")
    elif tune.micro_batch is not None and not 1 <= tune.micro_batch <= (tune.batch or 0):
        problems.append(f"finetune.micro_batch={tune.micro_batch} must lie between 1 and finetune.batch={tune.batch}")
    for key in ("freeze_steps", "head_steps"):
        at_least(f"finetune.{key}", getattr(tune, key), 0)
    above("finetune.head_lr", tune.head_lr)
    if not all(0 < rate < math.inf for rate in tune.lrs) or len(set(tune.lrs)) < len(tune.lrs):
        problems.append(f"finetune.lrs={tune.lrs} must be learning rates above 0, each once")
    for key in ("dev_ratio", "head_dropout", "label_smoothing", "mask_prob", "channel_mask_prob"):
        within(f"finetune.{key}", getattr(tune, key), 0.0, 0.99)
    within("finetune.layer_decay", tune.layer_decay, 0.0, 1.0)
    if tune.ema_decay is not None:
        within("finetune.ema_decay", tune.ema_decay, 0.0, 1.0)
    if config.labels is not None:
        if config.stage == "pretrain":
            problems.append(
                f"labels={config.labels} has no meaning for stage=pretrain, which uses none: leave "
                "it out, or add stage=finetune from=RUN"
            )
        elif not num_labels(config.labels, 10**9) and not with_unit(config.labels):
            problems.append(
                f"labels={config.labels} must be a number of samples such as 500, a share such as 10%, or, where the "
                "task has sizes, an amount such as 10m"
            )
    if config.resume == "auto" and config.out is None:
        problems.append("resume=auto needs out=FOLDER, the run folder to go on with")
    if problems:
        raise UserError("This configuration cannot work:\n  " + "\n  ".join(problems))
    return config


def num_labels(labels: str | None, available: int) -> int:
    """From `labels` to a number of samples, 0 where it is no such thing; all that are available where it is None."""
    if labels is None:
        return available
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", labels)
    if match is None or (not match[2] and "." in match[1]):
        return 0
    share = float(match[1]) / 100.0
    return min(available, round(share * available) if match[2] else int(match[1]))


def with_unit(labels: str) -> bool:
    """Whether `labels` is a number with a unit, which only the task can read."""
    return re.fullmatch(r"\d+(?:\.\d+)?[a-z]+", labels) is not None


def _read_recipe(modality: type[Modality[Any]], preset: str, stage: str) -> dict[str, Any]:
    folder = modality.recipes() if stage == "pretrain" else modality.recipes() / stage
    path = folder / f"{preset}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in folder.glob("*.yaml"))
        of = f"{modality.name}'s" + ("" if stage == "pretrain" else f" for stage={stage}")
        raise UserError(f"preset={preset!r} is not one of {of}: {', '.join(names) or 'none'}.{_hint(preset, names)}")
    recipe = read_yaml(path)
    parent = recipe.pop("like", None)  # the preset that this one is a variant of
    return recipe if parent is None else _overlaid(_read_recipe(modality, str(parent), stage), recipe)


def _overlaid(base: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Two mappings of sections; where both have a section, its keys are joined and the upper one's count."""
    result = dict(base)
    for key, value in upper.items():
        before = result.get(key)
        result[key] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    return result


def _merge(
    modality: type[Modality[Any]],
    base: Mapping[str, Any],
    values: Mapping[str, str],
    source: str,
    encoder: str | None = None,
    stage: str = "pretrain",
) -> RunConfig:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    encoder = encoder or values["encoder"]
    method = values.get("method") or str(base.get("method") or modality.methods[0])
    if method not in modality.methods:
        raise UserError(
            f"method={method!r} is not one of {modality.name}'s: {', '.join(modality.methods)}."
            f"{_hint(method, modality.methods)}"
        )
    values = {**values, "method": method}
    own = _sections(modality, encoder, method)
    if encoder not in modality.encoders:
        base = _for_raw(base, modality, method, own)
    if stage != "pretrain":
        own.update(modality.task_sections())
    for key in values:
        section = key.split(".")[0]
        if section in CORE_SECTIONS and section not in STAGES[stage]:
            having = " or ".join(f"stage={name}" for name, sections in STAGES.items() if section in sections)
            raise UserError(
                f"{key}={values[key]}: stage={stage} has no section {section}, {having} has. Leave the option out, or "
                "give the stage that is meant."
            )
    clash = own.keys() & (CORE_SECTIONS.keys() | KEYS.keys())
    if clash:
        raise TypeError(f"modality {modality.name!r} declares sections that the core has: {sorted(clash)}")
    types = {"modality": str, "preset": str, "stage": str, "encoder": str, "method": str, "official_quirks": bool,
             "resume": str, "seed": int}  # fmt: skip
    # `from` is a Python keyword and cannot be a field, so it is from_run inside and `from` wherever a user sees it.
    fields: list[tuple[str, Any, Any]] = [
        ("from_run" if key == "from" else key, types.get(key, str | None), field(default=default))
        for key, (default, _) in KEYS.items()
    ]
    fields += [(n, kind, field(default_factory=kind)) for n, kind in {**CORE_SECTIONS, **own}.items()]
    schema = dataclasses.make_dataclass("Run", fields)
    where = source
    try:
        node = OmegaConf.structured(schema)
        node = OmegaConf.merge(node, _rename(base))
        where = "the command line"
        node = OmegaConf.merge(node, _given(schema, _rename(values)))
        flat = cast("Any", OmegaConf.to_object(node))
    except TypeError as error:  # of merge
        raise UserError(f"In {where}: a list stands where a mapping is meant, or the reverse: {error}.") from None
    except OmegaConfBaseException as error:
        raise UserError(
            f"In {where}: {_reason(error, schema, base if where == source else _rename(values))}"
            + _other_section(
                getattr(error, "full_key", None) or "", {**{n: CORE_SECTIONS[n] for n in STAGES[stage]}, **own}
            )
            + f"\n`d2v config modality={modality.name}` lists every option with its meaning."
        ) from None
    _check_lists(flat)
    return check(
        RunConfig(
            **{
                f.name: getattr(flat, f.name)
                for f in dataclasses.fields(RunConfig)
                if f.name not in ("sections", "home")
            },
            sections={name: getattr(flat, name) for name in own},
        )
    )


def _check_lists(flat: Any) -> None:
    """Raises UserError for a list or mapping inside a list of plain values: OmegaConf does not look at such items."""
    for section in dataclasses.fields(flat):
        options = getattr(flat, section.name)
        for option in dataclasses.fields(options) if dataclasses.is_dataclass(options) else ():
            value = getattr(options, option.name)
            if isinstance(value, list):
                for item in cast("list[Any]", value):
                    if isinstance(item, (list, dict)):
                        raise UserError(
                            f"{section.name}.{option.name}={value}: {item} is no plain value; give a list like [A,B]."
                        )


def _sections(modality: type[Modality[Any]], encoder: str, method: str) -> dict[str, type]:
    """What a modality adds to the configuration, and, where the encoder is a plugin's, that encoder."""
    from d2v_core import plugins

    if encoder in modality.encoders:
        first = method == modality.methods[0]
        return dict(modality.sections(encoder) if first else modality.method_sections(encoder, method))
    own = dict(modality.raw_sections(method))
    section = plugins.load_encoder(encoder).section
    if encoder in own or encoder in CORE_SECTIONS:
        raise UserError(f"encoder={encoder} cannot be used: {modality.name} has a section of that name.")
    return {**own, encoder: section}


def _for_raw(
    recipe: Mapping[str, Any], modality: type[Modality[Any]], method: str, own: Mapping[str, type]
) -> dict[str, Any]:
    """A recipe without the options that only the modality's own encoders have, for which it was written."""
    theirs: dict[str, set[str]] = {}
    for encoder in modality.encoders:
        for name, kind in _sections(modality, encoder, method).items():
            theirs.setdefault(name, set()).update(f.name for f in dataclasses.fields(kind))
    kept: dict[str, Any] = {}
    for key, value in recipe.items():
        if key not in theirs or not isinstance(value, dict):
            kept[key] = value
        elif key in own:
            known = {f.name for f in dataclasses.fields(own[key])}
            section = cast("dict[str, Any]", value)
            kept[key] = {name: v for name, v in section.items() if name in known or name not in theirs[key]}
    return kept


def _type_at(schema: Any, key: str) -> Any:
    """The declared type of `section.field` or `field`; None where there is no such field."""
    kind = schema
    for name in key.split("."):
        kind = get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    return kind


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """int | None -> (int, NoneType); any other type alone."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _given(schema: Any, values: Mapping[str, str]) -> Any:
    """The command line as a node to merge: YAML, but text as it stands, for a folder named 1e3 is no number."""
    from omegaconf import OmegaConf

    node = OmegaConf.create()
    for key, value in values.items():
        kinds = _alternatives(_type_at(schema, key))
        if all(kind in (str, NoneType) or get_origin(kind) is Literal for kind in kinds):
            OmegaConf.update(node, key, None if NoneType in kinds and value in ("", "null") else value)
            continue
        try:
            one = OmegaConf.from_dotlist([f"{key}={value}"])
        except Exception as error:  # yaml's own errors derive from Exception alone
            raise UserError(f"{key}={value} must be {_expected(kinds)}.") from error
        if dataclasses.is_dataclass(kinds[0]) and not OmegaConf.is_dict(one[key]):
            raise UserError(f"{key}={value}: {key} is a section, so write {key}.OPTION=value.")
        node = OmegaConf.merge(node, one)
    return node


def _expected(kinds: Sequence[Any]) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
    texts: list[str] = []
    for kind in kinds:
        if get_origin(kind) is Literal:
            texts.append("one of: " + ", ".join(map(str, get_args(kind))))
        elif get_origin(kind) is list:
            texts.append(f"a list like [A,B], each {_expected(_alternatives(get_args(kind)[0]))}")
        else:
            texts.append(words.get(kind, "a value that YAML can read"))
    return " or ".join(texts)


def _reason(error: Any, schema: Any, values: Mapping[str, Any]) -> str:
    """What is wrong with one key, in the user's words: given, expected, and the option's meaning."""
    key = re.sub(r"\[\d+\]$", "", str(getattr(error, "full_key", None) or ""))
    shown = key.replace("from_run", "from")
    home, _, leaf = key.rpartition(".")
    section = values.get(home) if home else values
    inner: Mapping[str, Any] = cast("Mapping[str, Any]", section) if isinstance(section, Mapping) else dict[str, Any]()
    given: Any = values.get(key, inner.get(leaf))
    kind = _type_at(schema, key)
    if kind is None or given is None or "nterpolation" in str(error):
        first = str(error).splitlines()[0].replace("from_run", "from")
        # Not as a template: a key may have a backslash in it.
        what = f"{shown or 'key'} is not an option".replace("\\", r"\\")
        first = re.sub(r"Key '([^']+)' not in '[^']+'", what, first).rstrip(".")
        return first + (f" (key {shown})" if shown and shown not in first else "") + ("" if "?" in first else ".")
    holder = _type_at(schema, home) if home else schema
    doc = next((str(f.metadata.get("doc", "")) for f in dataclasses.fields(holder) if f.name == leaf), "")
    kinds = _alternatives(kind)
    allowed = [str(option) for kind in kinds if get_origin(kind) is Literal for option in get_args(kind)]
    meaning = f" It means: {doc}" if doc else ""
    return f"{shown}={given} must be {_expected(kinds)}.{_hint(str(given), allowed)}{meaning}"


def _rename(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"from_run" if key == "from" else key: value for key, value in values.items()}


def _hint(given: str, allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(given, list(allowed), 1)
    return f" Did you mean {near[0]}?" if near else ""


def _other_section(key: str, sections: Mapping[str, type]) -> str:
    """Where a key was put into the wrong section, say which one has it."""
    leaf = key.rsplit(".", 1)[-1]
    homes = [
        f"{name}.{leaf}"
        for name, kind in sections.items()
        if leaf in {f.name for f in dataclasses.fields(kind)} and f"{name}.{leaf}" != key
    ]
    return f" There is {' and '.join(homes)}." if homes else ""


def documentation(config: RunConfig) -> dict[str, str]:
    """The sentence of every section and option, by its key."""
    docs = {key: doc for key, (_, doc) in KEYS.items()}
    for name, kind in {**CORE_SECTIONS, **{n: type(s) for n, s in config.sections.items()}}.items():
        docs |= docs_of(name, kind)
    return docs


def docs_of(section: str, kind: type) -> dict[str, str]:
    """The sentences of one section and its options, by their keys."""
    docs = {section: (kind.__doc__ or "").strip().splitlines()[0]}
    return docs | {f"{section}.{f.name}": str(f.metadata.get("doc", "")) for f in dataclasses.fields(kind)}


def as_yaml(values: Mapping[str, Any], docs: Mapping[str, str] | None = None) -> str:
    """Nested sections as YAML. docs: sentences by dotted key, each to stand above its key."""
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(OmegaConf.create(dict(values)))
    if docs is None:
        return text
    lines: list[str] = []
    path: list[str] = []
    for line in text.splitlines():
        match = re.match(r"( *)(\w+):", line)
        if match:
            indent, key = match.groups()
            path = [*path[: len(indent) // 2], key]
            doc = docs.get(".".join(path))
            if doc:
                lines += ([] if indent else [""]) + [f"{indent}# {doc}"]
        lines.append(line)
    return "\n".join(lines).lstrip("\n") + "\n"
