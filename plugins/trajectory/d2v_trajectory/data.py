"""Where trajectories come from, what the network is given of their channels, and the return probe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from d2v_core.config import opt
from d2v_core.contract import BadSample, Dataset, ProbeTask
from d2v_core.errors import UserError
from d2v_core.files import check_bad_files
from d2v_trajectory import simulated
from d2v_trajectory.files import find, read
from d2v_trajectory.simulated import Episode

MAX_CLASSES = 256  # of a discrete channel
BUILT_IN = "No data.path: training on built-in trajectories. Give data.path=/your/data for your own."


@dataclass
class DataConfig:
    """Section `data`: which trajectories, and how much of them a step holds."""

    path: str | None = opt(None, "Folder searched for .npz and Minari's .hdf5 files; null = built-in.")
    groups: list[str] = opt(list(simulated.NAMES), "Arrays; each is a token in every step.")
    window: int = opt(48, "Longer trajectories are cropped to this many steps.")
    min_steps: int = opt(8, "Shorter ones are left out.")
    batch: int = opt(1536, "Steps of trajectories in an optimizer step, over all processes and accumulation.")
    max_bad_ratio: float = opt(0.01, "Larger share of unreadable trajectories stops the run before training.")

    def check(self) -> None:
        """Raises ValueError."""
        if not self.groups or (self.path is None and not set(self.groups) <= set(simulated.NAMES)):
            raise ValueError(f"data.groups={self.groups} must be names of arrays; the built-in ones: {simulated.NAMES}")
        if not 2 <= self.min_steps <= self.window <= self.batch:
            raise ValueError("data.min_steps, data.window and data.batch must be 2 or more, each at least the last one")


@dataclass(frozen=True)
class Group:
    """Channels that are one token in every step. A run keeps its groups: without them its weights mean nothing.

    classes: of its discrete channels, as many for each; 0 = they are continuous, with a mean and a deviation each.
    """

    name: str
    channels: int
    classes: int
    mean: Sequence[float] = ()
    std: Sequence[float] = ()

    @classmethod
    def of(cls, name: str, arrays: Sequence[np.ndarray]) -> "Group":
        """From this array of all trajectories, (steps, channels) each. Those unlike the first are left to `encode`."""
        forms = [(one.shape[1], one.dtype) for one in arrays]
        values = np.concatenate([one for one, form in zip(arrays, forms, strict=True) if form == forms[0]])
        if values.dtype.kind == "i":
            return cls(name, values.shape[1], int(values.max()) + 1)
        mean, std = values.mean(0, np.float64), values.std(0, np.float64) + 1e-8  # a constant channel becomes 0
        return cls(name, values.shape[1], 0, mean.tolist(), std.tolist())

    def encode(self, array: np.ndarray) -> np.ndarray:
        """(steps, channels) -> (steps, width) float32: standardised, or a number for each class, 0 or 1.

        Raises BadSample where the channels are others.
        """
        whole = array.dtype.kind == "i"
        if array.shape[1] != self.channels or whole != bool(self.classes) or (whole and array.max() >= self.classes):
            found = f"{array.shape[1]} channels of {int(array.max()) + 1 if whole else 0} classes"
            raise BadSample(f"{self.name} has {found}; expected {self.channels} of {self.classes} (0 = continuous)")
        if self.classes:
            return np.eye(self.classes, dtype=np.float32)[array].reshape(len(array), -1)
        return ((array - np.array(self.mean)) / np.array(self.std)).astype(np.float32)


def encode(episode: Episode, groups: Sequence[Group]) -> np.ndarray:
    """(steps, sum of widths) float32. Raises BadSample where the channels are others."""
    return np.concatenate([group.encode(episode[group.name]) for group in groups], 1)


def checked(arrays: Mapping[str, np.ndarray], names: Sequence[str], min_steps: int) -> Episode:
    """The named arrays as (steps, channels), int64 or float32, all of one length. Raises BadSample.

    Where some are longer by one, as observations are that include what the last action led to, the end is left out.
    """
    steps = min(len(arrays[name]) if arrays[name].ndim else 0 for name in names)
    episode: dict[str, np.ndarray] = {}
    for name in names:
        array, whole = arrays[name], arrays[name].dtype.kind in "biu"
        if array.dtype.kind not in "biuf" or array.ndim not in (1, 2) or len(array) > steps + 1:
            raise BadSample(f"{name} is {array.dtype} of shape {array.shape}; expected numbers, ({steps}, channels)")
        if not np.isfinite(array).all():
            raise BadSample(f"{name} has values that are not finite, in step {np.argwhere(~np.isfinite(array))[0, 0]}")
        if whole and array.size and not 0 <= array.min() <= array.max() < MAX_CLASSES:
            found = f"whole numbers from {array.min()} to {array.max()}; classes lie in 0 to {MAX_CLASSES - 1}"
            raise BadSample(f"{name} has {found}. Save continuous channels as floating-point numbers")
        episode[name] = array[:steps].reshape(steps, -1).astype(np.int64 if whole else np.float32)
    if steps < min_steps:
        raise BadSample(f"{steps} steps; data.min_steps={min_steps}")
    return episode


class Trajectories(Dataset[np.ndarray]):
    """(steps, sum of widths) float32 each, read once and held in memory. groups: those given, or what fits all.

    Raises UserError where there are none, too many cannot be used, or they differ in their channels.
    """

    def __init__(self, config: DataConfig, groups: Sequence[Group] | None) -> None:
        names, found, bad = [group.name for group in groups or ()] or config.groups, {}, []
        if config.path is None:
            found = {str(i): one for i, one in enumerate(simulated.episodes("pretrain", range(2000), 96))}
        for one, (path, group) in ({} if config.path is None else find(config.path)).items():
            try:
                found[one] = checked(read(path, group, names), names, config.min_steps)
            except BadSample as error:
                bad.append(f"{one}: {error}")
        check_bad_files(bad, len(found) + len(bad), config.max_bad_ratio, "trajectories", config.path or "")
        self.about = "\n".join([f"{len(found)} trajectories", *bad]) if config.path else BUILT_IN
        try:
            self.groups = groups or [Group.of(name, [one[name] for one in found.values()]) for name in names]
            self.values = [encode(one, self.groups) for one in found.values()]
        except BadSample as error:
            raise UserError(f"data.path={config.path} has trajectories with different channels: {error}.") from error
        self.names = list(found)
        self.sizes = np.array([len(one) for one in self.values], dtype=np.int64)

    def id(self, index: int) -> str:
        return self.names[index]

    def __getitem__(self, index: int) -> np.ndarray:
        return self.values[index]

    def describe(self) -> str:
        return self.about


def return_probe(groups: Sequence[Group], given: int) -> ProbeTask:
    """How much reward follows a built-in trajectory of which `given` steps are seen: the sum over as many further ones,
    in four parts of equal size, told at one token: that of the last action."""
    place = (given - 1) * len(groups) + max(i for i, group in enumerate(groups) if group.name == "actions" or i == 0)

    def to_go(drawn: Sequence[Episode]) -> list[float]:
        return [float(one["rewards"][given:].sum()) for one in drawn]

    borders = np.quantile(to_go(simulated.episodes("train", range(480), 2 * given)), [0.25, 0.5, 0.75])

    def part(split: str, count: int) -> list[tuple[Mapping[str, Tensor], Tensor]]:
        drawn = simulated.episodes(split, range(count), 2 * given)
        seen = [{"values": torch.as_tensor(encode(one, groups)[None, :given])} for one in drawn]
        labels = torch.full((count, given * len(groups)), -100)  # not scored
        labels[:, place] = torch.as_tensor(np.digitize(to_go(drawn), borders))
        return list(zip(seen, labels, strict=True))

    return ProbeTask(
        name="return accuracy",
        description="Share of trajectories of which the quarter of the reward to come is told at the last action.",
        num_classes=4,
        budgets=(60, 480),
        train=part("train", 480),
        dev=part("dev", 240),
        test=part("test", 480),
        input_name="raw values",
        input_features=lambda inputs: inputs["values"].flatten(1).expand(given * len(groups), -1),
    )
