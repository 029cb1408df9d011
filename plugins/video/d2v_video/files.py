"""Find clips and read them: video files, and folders whose images are the frames of one clip."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from d2v_core.contract import BadSample
from d2v_core.errors import UserError
from d2v_core.files import check_bad_files, existing, kind, none_found, walk

VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
FRAMES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


@dataclass(frozen=True)
class ClipFile:
    """id: path below `data.path`, with "/". path: a video file or a folder of frames. frames: their files, in order."""

    id: str
    path: Path
    frames: tuple[Path, ...] = ()


def scan(given: str, max_bad_ratio: float) -> list[ClipFile]:
    """The clips in a folder and below it, sorted by id; of each the beginning is read.

    A folder with two images or more is one clip, frames in the order of the numbers in their names. Raises UserError
    where there is none, or more than this share of them cannot be read.
    """
    root = existing(given, "a folder of clips")
    clips: list[ClipFile] = []
    kinds: Counter[str] = Counter()
    for folder, names in walk(root, given):
        paths = [folder / name for name in names if not name.startswith(".")]
        kinds.update(kind(path) for path in paths)
        clips += [ClipFile(path.relative_to(root).as_posix(), path) for path in paths if kind(path) in VIDEOS]
        frames = sorted((path for path in paths if kind(path) in FRAMES), key=_number)
        if len(frames) > 1:
            clips.append(ClipFile(folder.relative_to(root).as_posix(), folder, tuple(frames)))
    if not clips:
        advice = "Give a folder of video files, or of folders with the frames of one clip each."
        raise none_found("clips", root, given, (*VIDEOS, *FRAMES), kinds, advice)
    if any(not clip.frames for clip in clips) and find_spec("av") is None:
        raise UserError(
            f"data.path={given} has video files, which are read with PyAV, and that is not installed: "
            "pip install 'd2v-video[files]'. Folders of frames (png, jpg) need nothing more."
        )
    bad: dict[str, str] = {}
    for clip in clips:
        try:
            read(clip, 1, 1)
        except BadSample as error:
            bad[clip.id] = f"{clip.id}: {error}"
    check_bad_files(list(bad.values()), len(clips), max_bad_ratio, "clips", given)
    return sorted((clip for clip in clips if clip.id not in bad), key=lambda clip: clip.id)


def _number(path: Path) -> list[tuple[int, str]]:
    """frame2 before frame10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def read(clip: ClipFile, max_frames: int, side: int) -> np.ndarray:
    """(frames, height, width, 3) uint8: the first `max_frames`, shrunk so that the shorter side is `side` pixels where
    it is longer. Raises BadSample where the clip cannot be read, or its frames differ in size."""
    frames: list[np.ndarray] = []
    sizes: set[tuple[int, int]] = set()
    try:
        for image in islice(_images(clip), max_frames):
            sizes.add(image.size)
            shrunk = min(side / min(image.size), 1.0)
            width, height = (max(round(length * shrunk), 1) for length in image.size)
            frames.append(np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)))
    except Exception as error:  # a damaged file makes Pillow and PyAV raise errors of many kinds
        raise BadSample(f"{clip.path}: damaged or cut short after {len(frames)} frames: {error}") from error
    if len(sizes) != 1:
        found = " and ".join(f"{width} x {height}" for width, height in sorted(sizes)) or "none"
        raise BadSample(f"{clip.path}: expected frames of one size, found {found}")
    return np.stack(frames)


def _images(clip: ClipFile) -> Iterator[Image.Image]:
    for path in clip.frames:
        with Image.open(path) as image:
            yield image.convert("RGB")
    if clip.frames:
        return
    import av  # pyright: ignore[reportMissingImports]

    with av.open(str(clip.path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_image()
