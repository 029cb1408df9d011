"""What a modality tells the core, and all that the core knows about it.

A modality turns raw samples into tokens, says which of them to hide, and names the parts of the network that the
teacher averages. It never sees the loss or the loop; the core never asks which modality it has.

Axis letters used everywhere: B samples, M masked copies of each sample, R = B * M rows (sample-major: the copies of a
sample stand together), T tokens of the full grid, V visible tokens, E extra tokens in front, D embed_dim, H heads,
N scored tokens of a whole micro-batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from d2v_core.errors import UserError
from d2v_core.hookspecs import CONTRACT_VERSION as CONTRACT_VERSION
from d2v_core.sources import Item

if TYPE_CHECKING:
    from d2v_core.config import RunConfig
    from d2v_core.transformer import Transformer

Part = Literal["average", "copy", "share"]
AttentionBias = Tensor | Sequence[Tensor] | None
SampleT = TypeVar("SampleT")
MovableT = TypeVar("MovableT", bound="_Movable")
Targets = Callable[[np.ndarray], Tensor]
"""From the labels of a batch's samples to a tensor whose first axis is the batch."""


class BadSample(Exception):
    """A sample that cannot be read. The loader names it, counts it and goes on without it."""


@dataclass(frozen=True)
class Layout:
    """The token grid of one sample, known before any network runs, so that a loader's worker can draw its mask.

    shape: (T,) for a sequence, (rows, columns) for a plane, (frames, rows, columns) for a moving one; flattened
        row-major.
    maskable: (T,) bool, True where a token may be hidden; None = everywhere.
    num_uncropped: how many tokens the sample had before it was cropped, where the modality says; only what reproduces
        the official code asks.
    """

    shape: tuple[int, ...]
    maskable: np.ndarray | None = None
    num_uncropped: int | None = None

    @property
    def num_tokens(self) -> int:
        """The product of `shape`."""
        return int(np.prod(self.shape))


class _Movable:
    """A frozen dataclass of tensors and other things that can go to a device as a whole."""

    def to(self: MovableT, device: torch.device, non_blocking: bool = True) -> MovableT:
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)  # pyright: ignore[reportArgumentType]
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved)  # pyright: ignore

    def pin_memory(self: MovableT) -> MovableT:
        pinned = {
            f.name: value.pin_memory()
            for f in fields(self)  # pyright: ignore[reportArgumentType]
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **pinned)  # pyright: ignore


@dataclass(frozen=True)
class Masks(_Movable):
    """What the student may not see and what it is asked for. Made by `Masks.of` on the host, then moved.

    hidden: (B, M, T) bool, True = the token's content is withheld from the student.
    scored: (B, M, T) bool, True = the loss counts this token. Equal to `hidden` unless a policy says otherwise
        (80/10/10 masking scores tokens that it leaves alone).
    scored_rows: (N,) int64, the True places of `scored` flattened row-major. A list made on the host: finding them on
        the device would make it wait.
    fill: (B, M, T) int64 in a code of the modality's own, what stands at a hidden place; None = its mask token. What it
        holds elsewhere is the modality's own affair.
    visible: (B, M, V) int64, the places of the tokens that the student encodes; None = all T with the hidden ones
        replaced. Every row keeps the same number V; one with fewer visible tokens is filled up with padding.
    """

    hidden: Tensor
    scored: Tensor
    scored_rows: Tensor
    fill: Tensor | None = None
    visible: Tensor | None = None

    @classmethod
    def of(
        cls,
        hidden: np.ndarray | Tensor,
        scored: np.ndarray | Tensor | None = None,
        fill: np.ndarray | Tensor | None = None,
        visible: np.ndarray | Tensor | None = None,
    ) -> Masks:
        """From (B, M, T) arrays, or (B, T) ones for a single copy."""

        def tensor(array: np.ndarray | Tensor, dtype: torch.dtype) -> Tensor:
            result = torch.as_tensor(array).to(dtype)
            return result.unsqueeze(1) if result.dim() == 2 else result

        hidden = tensor(hidden, torch.bool)
        scored = hidden if scored is None else tensor(scored, torch.bool)
        if scored.shape != hidden.shape:
            raise ValueError(
                f"scored has shape {tuple(scored.shape)}, hidden has {tuple(hidden.shape)}; they must agree"
            )
        return cls(
            hidden,
            scored,
            scored.flatten().nonzero().squeeze(1),
            None if fill is None else tensor(fill, torch.int64),
            None if visible is None else tensor(visible, torch.int64),
        )

    @property
    def num_copies(self) -> int:
        """M."""
        return self.hidden.shape[1]


@dataclass(frozen=True)
class Tokens(_Movable):
    """A sequence of vectors and where they stand.

    x: (B, T, D) from `embed`, or the encoder's own `content_dim` in place of D; (R, E + T, D) or (R, E + V, D) from
        `view`.
    padding_mask: (rows, tokens) bool, True = padding; None = nothing is padded.
    grid: shape of the padded grid; its product is T.
    num_extra: E, tokens in front that stand for no place (CLS).
    index: (R, V) int64, original places of the tokens after the extra ones; None = all T in order.
    """

    x: Tensor
    padding_mask: Tensor | None
    grid: tuple[int, ...]
    num_extra: int = 0
    index: Tensor | None = None


@dataclass(frozen=True)
class Corruption(_Movable):
    """What fine-tuning withholds of the tokens of a batch, for regularisation. All of them stay in the sequence.

    hidden: (B, T) bool, tokens whose content is replaced (`FeatureEncoder.hide`). channels: (B, D) bool, channels that
    are zero in all tokens of a sample.
    """

    hidden: Tensor | None = None
    channels: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """One micro-batch as a worker makes it.

    inputs: what the feature encoder reads, by name. masks: None where no sample could be read, and for labelled data.
    ids: sample ids in row order. amount: how much data this is, in the modality's unit. skipped: (id, reason) pairs.
    targets: of labelled data: (B, C) float32 shares of the classes, summing to 1; (B,) float32 values of a regression;
    or (B, S) int64 symbols, -1 behind the end of shorter sequences. corruption: of labelled data while training.
    part: its number among the micro-batches of its step, all processes together.
    """

    inputs: Mapping[str, Tensor]
    masks: Masks | None
    ids: tuple[str, ...] = ()
    amount: float = 0.0
    skipped: tuple[tuple[str, str], ...] = ()
    targets: Tensor | None = None
    corruption: Corruption | None = None
    part: int = 0

    def to(self, device: torch.device) -> Batch:
        """The same with every tensor on `device`."""
        inputs = {name: value.to(device, non_blocking=True) for name, value in self.inputs.items()}
        return replace(
            self,
            inputs=inputs,
            masks=None if self.masks is None else self.masks.to(device),
            targets=None if self.targets is None else self.targets.to(device, non_blocking=True),
            corruption=None if self.corruption is None else self.corruption.to(device),
        )

    def pin_memory(self) -> Batch:
        """Called by torch's loader, so that copies to a device can run beside its work."""
        inputs = {name: value.pin_memory() for name, value in self.inputs.items()}
        return replace(
            self,
            inputs=inputs,
            masks=None if self.masks is None else self.masks.pin_memory(),
            targets=None if self.targets is None else self.targets.pin_memory(),
            corruption=None if self.corruption is None else self.corruption.pin_memory(),
        )


@dataclass(frozen=True)
class Batching:
    """How samples are put together; sizes are in the modality's own whole unit (signal samples, patches, tokens).

    batch: size of one optimizer step over all processes and accumulation. micro_batch: size of what runs at once.
    max_size: longer samples are cropped to this. crop: True = every sample of a micro-batch is cut to its shortest,
    False = they are padded to the longest. open_shards: None = any order; else `Dataset.shards` are gone through one
    after the other, so many at a time.
    """

    batch: int
    micro_batch: int
    max_size: int
    crop: bool = False
    open_shards: int | None = None


class Dataset(ABC, Generic[SampleT]):
    """Samples by number. `sizes` is (len,) int64 in the unit of `Batching`; ids are unique, stable names.

    shards: (len,) int64, the number of the tar that each lies in, where they lie in tars. left_out: ids of samples that
    were found and are not in it, and why; nothing unless a sub-class says so.
    """

    sizes: np.ndarray
    shards: np.ndarray | None = None
    left_out: Mapping[str, str] = MappingProxyType({})

    def __len__(self) -> int:
        return len(self.sizes)

    def describe(self) -> str:
        """A line or two on what was found, for the person who starts a run."""
        return f"{len(self)} samples"

    @abstractmethod
    def id(self, index: int) -> str:
        """The name of sample `index`: all chance of a run hangs on it, so it must be the same tomorrow."""

    @abstractmethod
    def __getitem__(self, index: int) -> SampleT:
        """Read one sample. Raises BadSample with the reason where it cannot be read."""


@dataclass(frozen=True)
class Inventory:
    """What lies at data.path, for `d2v data scan` and `d2v data shard`.

    items: what is of use, in the order in which it is read. bad: (id, reason) of what is not. amounts: how much each
    item holds, in `unit`, such as "s"; total: how much all of them do, in words. notes: what else there is to say.
    Without `measure`, amounts may be empty.
    """

    items: Sequence[Item]
    bad: Sequence[tuple[str, str]]
    amounts: Sequence[float]
    unit: str
    total: str
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class LabelledPart(Generic[SampleT]):
    """Samples and what is to be told of each.

    labels: (len(samples),) int64 classes, or float32 values, or an array of (S,) int64 arrays, sequences of symbols
    (`d2v_core.ctc.sequences` makes it).
    """

    samples: Dataset[SampleT]
    labels: np.ndarray

    def __post_init__(self) -> None:
        if len(self.samples) != len(self.labels):
            raise ValueError(f"{len(self.labels)} labels for {len(self.samples)} samples")


@dataclass(frozen=True)
class Task(Generic[SampleT]):
    """A labelled task for fine-tuning and probing: one class, one number, or a sequence of symbols, per sample.

    classes: their names, in the order of the labels' numbers. symbols: names of the symbols of sequences, which CTC
    reads off the tokens; the first is its blank and stands in no label. Neither = regression.
    metrics: names of `d2v_core.scores`, the first chooses the best checkpoint; of sequences, the names that `score`
    gives. dev: None = the core holds a part of `train` back. test: scored once, at the end; None where there is none.
    input_features: from the inputs of a batch to (B, F), the raw input that any network has to beat; input_name: what
    it is called.
    score: of sequences, from those predicted and the labels to metrics of which less is better; None = "symbol_errors",
    edits per symbol of the labels. show: how a sequence is written in files; None = symbols with blanks between.
    choose: which samples of `train` a value of `labels` means that is neither a number nor a share ("10m"), ascending;
    given that value, the part and the run's seed. Raises UserError. left_out: ids of samples that are in no part though
    they were found, and why. verbs: commands for a run of it, which fine-tuning names when it ends, RUN in place of the
    folder.
    """

    name: str
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    train: LabelledPart[SampleT]
    dev: LabelledPart[SampleT] | None = None
    test: LabelledPart[SampleT] | None = None
    input_name: str = ""
    input_features: Any = None
    symbols: tuple[str, ...] = ()
    score: Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], Mapping[str, float]] | None = None
    show: Callable[[Sequence[int]], str] | None = None
    choose: Callable[[str, LabelledPart[SampleT], int], np.ndarray] | None = None
    left_out: Mapping[str, str] = field(default_factory=dict[str, str])
    verbs: tuple[str, ...] = ()


class FeatureEncoder(nn.Module, ABC):
    """Raw input to tokens, and tokens to what the student or the teacher sees.

    Parameters that `embed` uses live under `self.embedding`, the others anywhere else. That is what lets the core see
    whether the teacher can be given the student's own tokens: it can where `embedding` is shared as a whole.

    content_dim: numbers in each token of `embed` where they are not D; `view` then makes D of them.
    """

    embedding: nn.Module
    content_dim: int | None = None

    @abstractmethod
    def embed(self, inputs: Mapping[str, Tensor]) -> Tokens:
        """Content only, once per sample: (B, T, D) without positions, masks or dropout."""

    @abstractmethod
    def view(self, tokens: Tokens, masks: Masks | None) -> Tokens:
        """What the transformer is given: hide, place, normalise, drop out, gather, add extra tokens.

        With masks, (R, ...) rows for the student; with None, the full sequence that the teacher sees.
        """

    def hide(self, x: Tensor, hidden: Tensor) -> Tensor:
        """Replace the content of tokens (B, T, D) where hidden (B, T) says so, while fine-tuning, which keeps them all.

        By default noise of deviation 0.01, as data2vec 2.0 does, which has no mask token (fairseq:
        examples/data2vec/models/modalities/base.py). An encoder with a mask token puts that there.
        """
        return torch.where(hidden.unsqueeze(-1), 0.01 * torch.randn_like(x), x)

    def attention_bias(self, tokens: Tokens) -> AttentionBias:
        """Added to the attention logits: broadcastable to (R, H, E + T, E + T), one for all blocks or one per block."""
        del tokens
        return None


@dataclass(frozen=True)
class RawValues:
    """The raw values behind the tokens of a batch.

    values: (B, T, P, C) float32, or (B, T, P) int64 symbols: P places in each patch, row-major. padding_mask: (B, T)
    bool, True = padding; None = nothing is padded. grid: shape of the padded grid; its product is T.
    """

    values: Tensor
    padding_mask: Tensor | None
    grid: tuple[int, ...]


@dataclass(frozen=True)
class Raw:
    """What a modality tells an encoder that knows no modality: which raw values stand behind each token of its grid.

    patch: places in a patch along each axis of the grid; P is their product. channels: C, numbers at each place.
    symbols: values are whole numbers below this, one at each place; 0 = they are numbers. absent: the symbol that
        stands where a patch has no more of them; None = there is none.
    read: from the inputs of `Modality.collate` to the values of a batch, on the inputs' device.
    fill: from codes (B, M, T) of `Masks.fill` to (B, M, T, P) or (B, M, T, P, C) values that stand at hidden places,
        and (B, M, T) bool, False where there are none; None = hidden tokens are never filled.

    `read` is copied with the network, so it is a function of a module or a small object; with tensors of its own, a
    module (`nn.Module`) that holds them as buffers which are not stored, and `fill` a method of it.
    """

    patch: tuple[int, ...]
    channels: int
    read: Callable[[Mapping[str, Tensor]], RawValues]
    symbols: int = 0
    absent: int | None = None
    fill: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None


class RawEncoder(FeatureEncoder):
    """A feature encoder of a plugin's, for every modality that has `Modality.raw`.

    name: as the user types it, and of its section of the configuration. section: dataclass of its options. Masks,
    targets, predictor and the teacher's parts are the modality's: it gives parameters of `embed` the prefix
    `encoder.embedding`, all others begin with `encoder.` alone. It takes masks with `visible` and without.
    """

    name: ClassVar[str]
    section: ClassVar[type]

    def __init__(self, raw: Raw, config: RunConfig) -> None:
        del config
        super().__init__()
        self.read, self.fill = raw.read, raw.fill


class Predictor(nn.Module, ABC):
    """From the student's output to predictions at the scored places."""

    @abstractmethod
    def forward(self, tokens: Tokens, masks: Masks) -> Tensor:
        """tokens.x is the transformer's output for the student's view; returns (N, D) in the order of scored_rows."""


class MaskingPolicy(Protocol):
    """Draws masks without a network. `rngs` has one generator per sample, made for this sample and epoch."""

    def __call__(self, layouts: Sequence[Layout], num_copies: int, rngs: Sequence[np.random.Generator]) -> Masks:
        """`num_copies` masks of each of the samples with these layouts, whose shapes are padded to the largest."""
        ...


@runtime_checkable
class StatesShare(Protocol):
    """A masking policy that says how much it hides; `d2v check` holds it to that. Optional."""

    def hidden_share(self, layout: Layout) -> tuple[float, float]:
        """Bounds, from 0 to 1, of the mean share of tokens hidden in a sample that is masked by itself; often equal."""
        ...


@dataclass(frozen=True)
class Sequel:
    """What follows pre-training in the same command.

    owns: the options, by key, that are its own and not pre-training's. run: from the folder of the finished run to the
    exit status; what it makes belongs below that folder, and, called again, it goes on.
    """

    owns: frozenset[str]
    run: Callable[[Path], int]


@dataclass(frozen=True)
class ProbeTask:
    """A small labelled task on which frozen features are scored by linear classification.

    train, dev, test: (inputs of one sample as `FeatureEncoder.embed` reads them with B = 1, labels) pairs. Labels are
        (T,) int64 for one class per token, -100 = not scored, or () int64 for one class per sample.
    budgets: numbers of labelled training samples to report, ascending; the largest gives the run's score.
    input_features: (T, F) view of a sample's raw input, the row that any network has to beat.
    """

    name: str
    description: str
    num_classes: int
    budgets: tuple[int, ...]
    train: Sequence[tuple[Mapping[str, Tensor], Tensor]]
    dev: Sequence[tuple[Mapping[str, Tensor], Tensor]]
    test: Sequence[tuple[Mapping[str, Tensor], Tensor]]
    input_name: str = ""
    input_features: Any = field(default=None)


class Modality(ABC, Generic[SampleT]):
    """One kind of data. Made from a run's configuration; its class methods answer before there is one.

    name: as the user types it. unit: what `Batch.amount` counts, for display ("s of sound", "lines").
    encoders: names accepted as `encoder=...` beside those of plugins (`RawEncoder`), the first is the default.
    methods: names accepted as `method=...`.
    """

    name: ClassVar[str]
    unit: ClassVar[str]
    encoders: ClassVar[tuple[str, ...]]
    methods: ClassVar[tuple[str, ...]] = ("data2vec",)

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @classmethod
    @abstractmethod
    def sections(cls, encoder: str) -> Mapping[str, type]:
        """Configuration sections that this modality adds, by name: dataclasses with a default for every field."""

    @classmethod
    def task_sections(cls) -> Mapping[str, type]:
        """Further sections for the stages that read labelled data."""
        return {}

    @classmethod
    def method_sections(cls, encoder: str, method: str) -> Mapping[str, type]:
        """As `sections`, where `method` is not the first of `methods`."""
        del method
        return cls.sections(encoder)

    @classmethod
    def raw_sections(cls, method: str) -> Mapping[str, type]:
        """As `sections`, where the encoder is a plugin's (`RawEncoder`), without what only encoders of its own have.

        Raises UserError with the reason where such an encoder cannot read this modality.
        """
        del method
        raise UserError(
            f"The modality {cls.name} can be read by its own encoders only ({', '.join(cls.encoders)}): it does not "
            "say which raw values stand behind a token (Modality.raw)."
        )

    @property
    def reads_raw(self) -> bool:
        """Whether the encoder is a plugin's."""
        return self.config.encoder not in self.encoders

    def raw(self) -> Raw:
        """What an encoder of a plugin's reads; asked only where `raw_sections` gives sections."""
        raise NotImplementedError(f"{type(self).__name__} has raw_sections() and no raw()")

    @classmethod
    @abstractmethod
    def recipes(cls) -> Path:
        """Folder of the presets, NAME.yaml each; those of fine-tuning in its sub-folder `finetune`."""

    @classmethod
    def sequel(cls, given: Mapping[str, str]) -> Sequel | None:
        """What `stage=all`, or a command that names no stage, does after pre-training; None = nothing.

        given: the options of the command. Raises UserError for those that cannot work.
        """
        del given
        return None

    @classmethod
    def inventory(cls, config: RunConfig, measure: bool) -> Inventory:
        """What lies at data.path, however much of it is broken. Raises UserError where nothing is of use.

        measure: say how long each sample is also where that takes reading it, and make an item of each; without, items
        may be files of many samples.
        """
        del measure
        raise UserError(f"The modality {config.modality} reads no files that `d2v data` knows.")

    @abstractmethod
    def dataset(self, split: str) -> Dataset[SampleT]:
        """The samples of `data.path`, or built-in ones. split: "train"; pre-training knows no other.

        Raises UserError where there are none, or too many that cannot be read.
        """

    def all_samples(self) -> Dataset[SampleT]:
        """Every sample of `data.path` that can be read, one by one: what `d2v encode` goes through.

        By default `dataset("train")`. A modality whose training drops or joins what it finds gives it as it lies there,
        and says in `Dataset.left_out` what cannot be read.
        """
        return self.dataset("train")

    def sample(self, given: Any) -> SampleT:
        """One sample from what a user has at hand, for `LoadedRun.encode`.

        By default a path (text or `Path`) is read as `data.path` is, and anything else is taken for a sample as
        `dataset` gives it. Raises UserError where there is not exactly one sample, BadSample where it cannot be read.
        """
        if not isinstance(given, (str, Path)):
            return given
        found = type(self)(self.config.with_path(given)).all_samples()
        if len(found) != 1:
            raise UserError(f"{given} has {len(found)} samples, expected one. `d2v encode` takes many.")
        return found[0]

    @abstractmethod
    def batching(self) -> Batching:
        """How much one optimizer step and one micro-batch hold, and how long a sample may be."""

    def micro_batch_option(self, size: int) -> str:
        """What the user types to have micro-batches of `size`, in the unit of `batching`; empty = no option."""
        del size
        return ""

    def prepare(self, sample: SampleT, size: int, rng: np.random.Generator) -> SampleT:
        """Crop and augment one sample, to at most `size` where the micro-batch is cropped."""
        del size, rng
        return sample

    @abstractmethod
    def layout(self, sample: SampleT) -> Layout:
        """The token grid that `FeatureEncoder.embed` will make of a prepared sample, told without a network."""

    @abstractmethod
    def collate(self, samples: Sequence[SampleT]) -> Mapping[str, Tensor]:
        """Stack samples into what `FeatureEncoder.embed` reads."""

    @abstractmethod
    def amount(self, inputs: Mapping[str, Tensor]) -> float:
        """How much data a collated batch holds, in `unit`."""

    @abstractmethod
    def masking(self) -> MaskingPolicy:
        """What hides tokens, made from the configuration. Raises ValueError for options that cannot work."""

    @abstractmethod
    def feature_encoder(self) -> FeatureEncoder:
        """A new encoder with its initial weights, drawn from torch's generator, which the core has seeded."""

    def init_transformer(self, transformer: Transformer) -> None:
        """Give the blocks their initial weights, in place. By default BERT's: N(0, 0.02^2), zero biases."""
        from d2v_core.transformer import init_bert

        init_bert(transformer)

    def predictor(self) -> Predictor:
        """The head. By default one linear map at the scored tokens."""
        from d2v_core.data2vec import LinearPredictor

        return LinearPredictor(self.config.model.embed_dim)

    @abstractmethod
    def teacher_parts(self) -> Mapping[str, Part]:
        """How the teacher follows the student, by prefix of the parameter's name; the longest prefix decides.

        Names begin with `encoder.` (the feature encoder) or `transformer.`. "average" = EMA, "copy" = the student's
        value after every step, "share" = one tensor for both.
        """

    def teacher_inputs(self, batch: Batch) -> Mapping[str, Tensor] | None:
        """The teacher's own input, where it is another than the student's; None = the same."""
        del batch
        return None

    def keep(self, run: Path) -> None:
        """Put into the run folder what loading the run needs beside its configuration; called with every checkpoint.

        A modality made from a stored configuration finds the folder as `config.home`. By default nothing is needed.
        """
        del run

    def probe(self) -> ProbeTask | None:
        """A small labelled task that scores the result of a run, or None."""
        return None

    def task(self) -> Task[SampleT]:
        """The labelled data of `data.path`, or built-in ones. Raises UserError where there is none."""
        raise UserError(f"The modality {self.name} has no labelled data: it can be pre-trained, not fine-tuned.")

    def prepare_labelled(self, sample: SampleT, rng: np.random.Generator | None) -> SampleT:
        """A whole sample as `collate` takes it: augmented with `rng`, or, where that is None, always the same view.

        Without `rng` it is also what `d2v encode` shows the network, with no task in sight.
        """
        del rng
        return sample

    def mix(
        self, inputs: Mapping[str, Tensor], targets: Tensor, rng: np.random.Generator
    ) -> tuple[Mapping[str, Tensor], Tensor]:
        """Blend the samples of a labelled micro-batch and their targets (mixup and the like), while training."""
        del rng
        return inputs, targets

    def adapt(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights of a pre-trained student (`encoder.`, `transformer.`) as the fine-tuned one names and shapes them."""
        return state

    def layer_of(self, name: str) -> int:
        """Depth of a parameter of the student, for learning rates that fall towards the input.

        0 = what makes the tokens, i = block number i from 1, num_layers + 1 = what comes after the blocks; 0 and below,
        blocks that come before those.
        """
        if name.startswith("transformer.blocks."):
            return int(name.split(".")[2]) + 1
        return 0 if name.startswith("encoder.") else self.config.model.num_layers + 1
