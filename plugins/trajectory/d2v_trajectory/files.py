"""Find trajectories and read them: .npz files with one episode each, and Minari's HDF5 files with many."""

import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from d2v_core.contract import BadSample
from d2v_core.errors import UserError
from d2v_core.files import existing, kind, none_found, walk
from d2v_trajectory.simulated import Episode


def find(given: str) -> dict[str, tuple[Path, str | None]]:
    """The episodes in a folder and below it: id, which is the path below, with "/"; file, and group of an HDF5 file.

    Raises UserError where there is none, or an HDF5 file has another layout than Minari's: a group episode_0,
    episode_1, ... for each episode, its arrays in it.
    """
    root = existing(given, "a folder of trajectories")
    paths = sorted(folder / name for folder, names in walk(root, given) for name in names)
    found: dict[str, tuple[Path, str | None]] = {}
    for path in paths:
        name = path.relative_to(root).as_posix()
        if kind(path) == ".npz":
            found[name] = (path, None)
        elif kind(path) in (".h5", ".hdf5"):
            found |= {f"{name}/{group}": (path, group) for group in _episodes(path)}
    if not found:
        kinds = Counter(kind(path) for path in paths)
        raise none_found(
            "trajectories", root, given, (".npz", ".h5", ".hdf5"), kinds, "Give one .npz file for each episode."
        )
    return found


def _hdf5(path: Path) -> Any:
    """Raises UserError."""
    if find_spec("h5py") is None:
        raise UserError(f"{path} is read with h5py, which is not installed: pip install 'd2v-trajectory[hdf5]'.")
    import h5py  # pyright: ignore[reportMissingImports]

    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise UserError(f"{path} is damaged or cut short: {error}. Fetch it again, or remove it.") from error


def _episodes(path: Path) -> list[str]:
    """Names of the groups, in order of their numbers. Raises UserError."""
    with _hdf5(path) as file:
        groups = [name for name in file if re.fullmatch(r"episode_\d+", name)]
        if not groups:
            raise UserError(f"{path}: no groups episode_0, ... as in Minari's files; there is {list(file)[:9]}.")
    return sorted(groups, key=lambda group: int(group.removeprefix("episode_")))


def read(path: Path, group: str | None, names: Sequence[str]) -> Episode:
    """The named arrays of an episode. Raises BadSample where one is missing, or the file is damaged."""
    try:
        with path.open("rb") as opened, np.load(opened) if group is None else _hdf5(path) as file:
            arrays = file if group is None else file[group]
            found = {name: arrays[name] for name in names if name in arrays}
            missing = [name for name in names if not hasattr(found.get(name), "dtype")]  # a group of arrays has none
            if missing:
                raise BadSample(f"no array {' or '.join(missing)}; there is {', '.join(sorted(arrays)) or 'nothing'}")
            return {name: np.asarray(array[()]) for name, array in found.items()}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise BadSample(f"damaged or cut short: {error}") from error
