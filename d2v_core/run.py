"""From a configuration to a model, and from a run folder back to one."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from d2v_core import checkpoint, plugins
from d2v_core.config import RunConfig, from_dict, read_yaml, run_folder, run_of
from d2v_core.contract import FeatureEncoder, Modality
from d2v_core.data2vec import Data2Vec, Student
from d2v_core.distributed import local, part_of_whole
from d2v_core.errors import UserError
from d2v_core.keyed import seed_of
from d2v_core.loss import RegressionLoss
from d2v_core.probe import layer_names, layers_of
from d2v_core.targets import TopKTargets
from d2v_core.transformer import Transformer


def build_model(modality: Modality[Any], transformer: Transformer | None = None) -> Data2Vec:
    """The network of a configuration with its initial weights, which depend on the seed alone.

    transformer: one that serves other modalities too, in place of its own; the weights of the rest are the same.
    """
    config = modality.config
    with initial_weights(config.seed, "init"):
        own = _transformer(modality)
        return Data2Vec(
            feature_encoder(modality),
            own if transformer is None else transformer,
            modality.predictor(),
            TopKTargets(config.target),
            RegressionLoss(config.loss, config.official_quirks),
            modality.teacher_parts(),
        )


def build_student(modality: Modality[Any]) -> Student:
    """The part of `build_model` that outlives pre-training, with the same initial weights."""
    with initial_weights(modality.config.seed, "init"):
        transformer = _transformer(modality)
        return Student(feature_encoder(modality), transformer)


def feature_encoder(modality: Modality[Any]) -> FeatureEncoder:
    """The modality's own, or that of a plugin, which reads the modality's raw values."""
    if modality.reads_raw:
        return plugins.load_encoder(modality.config.encoder)(modality.raw(), modality.config)
    return modality.feature_encoder()


@contextmanager
def initial_weights(seed: int, purpose: str) -> Generator[None]:
    """Inside, torch draws from a generator of this seed and purpose; afterwards it goes on as before.

    What the parts find wrong with their configuration becomes a UserError.
    """
    with torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType]
        torch.default_generator.manual_seed(seed_of(seed, purpose))
        try:
            yield
        except ValueError as error:
            raise UserError(f"This configuration cannot work: {error}") from error


def _transformer(modality: Modality[Any]) -> Transformer:
    transformer = Transformer(modality.config.model)
    modality.init_transformer(transformer)
    return transformer


def model_state(model: Data2Vec) -> dict[str, Tensor]:
    """Student and predictor, without the teacher."""
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("teacher.")}


def load_model_state(model: Data2Vec, state: Mapping[str, Tensor], source: str) -> None:
    """Raises UserError naming tensors that are missing, unknown or of another shape."""
    load_state(model_state(model), state, source)


def load_state(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into the tensors of `own`. Raises UserError as `load_model_state` does."""
    wrong = [f"{n}: stored {tuple(state[n].shape)}, expected {tuple(own[n].shape)}" for n in own.keys() & state.keys()
             if own[n].shape != state[n].shape]  # fmt: skip
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if wrong or missing or unknown:
        raise UserError(
            f"The weights in {source} do not fit this configuration. Missing: {missing[:3]}; unknown: {unknown[:3]}; "
            f"other shape: {sorted(wrong)[:3]}. Use the preset, encoder and sizes of the run that made them."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            local(tensor).copy_(part_of_whole(state[name], tensor))


def newest_checkpoint(run: Path) -> Path:
    """Raises UserError where `run` is no run folder or has no checkpoint yet."""
    run_folder(run)
    found = checkpoint.list_checkpoints(run / "checkpoints")
    if not found:
        raise UserError(
            f"{run} has no complete checkpoint in {run / 'checkpoints'}: it was stopped before the first. Go on with "
            f"it: the same command with out={run} resume=auto."
        )
    return found[-1]


def load_config_of(run: Path, given: Mapping[str, str] | None = None) -> tuple[RunConfig, type[Modality[Any]]]:
    """The configuration that a run folder stores, and its modality. given: options that count in place of its own."""
    run = run_of(run, None)
    path = run_folder(run) / "config.yaml"
    stored = read_yaml(path)
    kind = plugins.load(str(stored.get("modality", "")))
    return replace(from_dict(stored, kind, str(path), given), home=run), kind


class LoadedRun(nn.Module):
    """A trained encoder, ready to give features. In eval mode, on the CPU unless moved.

    step: of the weights; checkpoint: the folder that they are from, None for untrained ones.
    """

    def __init__(
        self, config: RunConfig, modality: Modality[Any], student: Student, step: int, checkpoint: Path | None
    ) -> None:
        super().__init__()
        self.config, self.modality, self.step, self.checkpoint = config, modality, step, checkpoint
        self.student = student
        self.eval()

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Of what `encode` gives, in its order: input, block-1, ..., and norm where one follows the blocks."""
        return layer_names(self.student)

    def encode(self, x: Any) -> list[Tensor]:
        """Features of one sample: [transformer input, block 1, ..., block L], (T, D) float32 each.

        x: a file's path, or an array, a text, whatever `Modality.sample` of this run's modality takes; a sample of its
        data set; or a mapping of tensors, what its `collate` makes of one sample.
        Raises UserError for what it does not take, BadSample for a file that cannot be read.
        """
        if isinstance(x, Mapping):
            inputs = cast("Mapping[str, Tensor]", x)
        else:
            inputs = self.modality.collate([self.modality.prepare_labelled(self.modality.sample(x), None)])
        device = next(self.parameters()).device
        return layers_of(self.student, {name: value.to(device) for name, value in inputs.items()})


def load(
    run: str | Path,
    *,
    untrained: bool = False,
    teacher: bool = False,
    modality: str | None = None,
    given: Mapping[str, str] | None = None,
) -> LoadedRun:
    """The encoder of a run folder at its newest checkpoint, or, of a fine-tuning run, at its best one.

    untrained: the same network with its initial weights instead, for comparison. teacher: the averaged weights.
    modality: which one, of a joint run. given: options by key, as on the command line, that count in place of the run's
    own, such as those of its data. Raises UserError where there is no run, no checkpoint, or its files do not fit.
    """
    run = run_of(Path(run), modality)
    config, kind = load_config_of(run, given)
    if modality not in (None, config.modality):
        raise UserError(f"{run} is a run of modality={config.modality}, not {modality}.")
    made = kind(config)
    if config.stage == "probe":
        raise UserError(f"{run} is the folder of stage=probe, which trains nothing: give the run that it scored.")
    if config.stage == "finetune":
        if teacher:
            raise UserError(f"{run} is a fine-tuning run: it has no teacher.")
        return _load_finetuned(run, made, untrained)
    model = build_model(made)
    step, folder = 0, None
    if not untrained:
        folder = newest_checkpoint(run)
        stored = checkpoint.load(folder, state=False)
        load_model_state(model, stored.model, str(folder))
        model.teacher.load_own_state(stored.teacher)
        step = checkpoint.step_of(folder)
    student = model.teacher.module if teacher else model.student
    assert isinstance(student, Student)
    return LoadedRun(config, made, student, step, folder)


def _load_finetuned(run: Path, modality: Modality[Any], untrained: bool) -> LoadedRun:
    student = build_student(modality)
    step, folder = 0, None
    if not modality.config.finetune.final_norm:
        student.transformer.norm = None
    if not untrained:
        folder = best_checkpoint(run)
        stored = {
            n[len("student.") :]: t
            for n, t in checkpoint.load(folder, state=False).model.items()
            if n.startswith("student.")
        }
        load_state(student.state_dict(), stored, str(folder))
        step = checkpoint.step_of(folder)
    return LoadedRun(modality.config, modality, student, step, folder)


def best_checkpoint(run: Path) -> Path:
    """Of a fine-tuning run. Raises UserError where it has not been scored yet."""
    found = checkpoint.list_checkpoints(run / "best")
    if not found:
        raise UserError(f"{run} has no weights in {run / 'best'} yet: they are written at the first score.")
    return found[-1]
