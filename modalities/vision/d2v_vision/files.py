"""Find images and read them: folders of files, CIFAR's binary records and MNIST's IDX arrays.

`scan` looks through a folder once, before training; `read` decodes one file and runs in the loader's workers. What is
damaged is named and left out, never passed on as half an image. Pillow does the decoding.
"""

from __future__ import annotations

import gzip
import lzma
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from d2v_core.errors import UserError
from d2v_core.files import check_bad_files, existing, first, kind, none_found, subfolder, walk
from d2v_core.shards import Kind, find_shards, read_shards
from d2v_core.sources import Fact, Source

IMAGE_EXTENSIONS = (
    ".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # in either case  # fmt: skip
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # what a file may turn out to be, whatever its name
MAX_RECORD_BYTES = 1 << 31  # unpacked; a packed file that goes on and on is not read to its end
NUM_THREADS = 4
EXPECTED = "a folder or a file"  # of data.path
MORE = "... and {} more"  # behind the first of a list
CIFAR_PIXELS = 3 * 32 * 32
_CIFAR_NAME = re.compile(r"(data_batch_\d+|test_batch|train|test|cifar.*)\.bin(\.xz|\.gz)?")


class BadImage(Exception):
    """An image file that cannot be used; the message is the reason."""


@dataclass(frozen=True, slots=True)  # there may be millions
class ImageFile:
    """One file that looked usable. id: its path below the data root, with "/". label: its class folder, if any.
    inside: where in the tar `path` it lies. facts: what its header says, where that has been read."""

    path: Path
    id: str
    label: str | None = None
    inside: Source | None = None
    facts: Mapping[str, Fact] | None = field(default=None, compare=False)

    @property
    def source(self) -> Source:
        """Where its bytes are."""
        return self.inside or Source(self.path)


@dataclass(frozen=True)
class ScanReport:
    """What `scan` found below `top`, the folder that was searched."""

    top: Path
    images: tuple[ImageFile, ...]  # sorted by id
    bad: tuple[tuple[str, str], ...]  # (id, reason), sorted by id
    small: tuple[str, ...]  # ids of those dropped as narrower than min_side
    min_side: int
    empty: tuple[str, ...]  # class folders without any image
    notes: tuple[str, ...] = ()  # what else there is to say

    @property
    def too_small(self) -> int:
        """How many were dropped as narrower than min_side."""
        return len(self.small)

    @property
    def left_out(self) -> dict[str, str]:
        """Id and reason of every file that was found and is not among the images."""
        return {**dict(self.bad), **dict.fromkeys(self.small, f"narrower than {self.min_side} pixels")}

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the class folders, sorted."""
        return tuple(sorted({image.label for image in self.images if image.label is not None}))

    def summary(self) -> str:
        """One line of counts, then what was left out."""
        text = f"{len(self.images)} images in {self.top}"
        if self.labels:
            text += f", {len(self.labels)} class folders"
        if self.too_small:
            text += f"; {self.too_small} dropped as narrower than {self.min_side} pixels, a patch"
        if self.bad:
            text += f"\n{len(self.bad)} unreadable: {first(_named(self.bad), '; ', more=MORE)}"
        if self.empty:
            text += f"\n{len(self.empty)} folders without an image: {first(self.empty, ', ', more=MORE)}"
        return "\n".join([text, *self.notes])


def scan(
    path: str | Path,
    *,
    split: str | None = None,
    min_side: int = 1,
    max_pixels: int = 1 << 26,
    max_bad_ratio: float = 0.01,
    decode: bool | None = None,
    decode_up_to: int = 5000,
) -> ScanReport:
    """List the usable images of a folder and its sub-folders, a single file, or tars (`d2v_core.shards.find_shards`).

    Args:
        split: sub-folder to search, or what ids in tars begin with; None = `train` where there is one (ImageNet's
            layout), else everything.
        min_side: images with a shorter side, in pixels, are dropped and counted.
        max_pixels: width times height above which a file is refused unread (decompression bombs).
        max_bad_ratio: share of unreadable files, in [0, 1], above which the scan stops.
        decode: read every file to its end, which finds truncated ones; False = headers only; None = where there are
            at most `decode_up_to` of them.
    Raises:
        UserError: something the user must mend; the message says what and how.
    """
    tars = find_shards(path)
    unread: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    if tars is None:
        top, found, empty = _find(path, split)
    else:
        top, found, empty, unread, notes = _in_tars(tars, path, split)
    decode = len(found) <= decode_up_to if decode is None else decode

    def look(image: ImageFile) -> str | tuple[int, int]:
        try:
            if image.facts is None or decode:
                return _load(image.source, max_pixels, decode).size
            size = int(image.facts["width"]), int(image.facts["height"])
            _check_size(*size, max_pixels)
            return size
        except BadImage as error:
            return str(error)

    with warnings.catch_warnings(), ThreadPoolExecutor(NUM_THREADS) as pool:
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata, from any thread
        sizes = list(pool.map(look, found))
    damaged = [(image.id, size) for image, size in zip(found, sizes, strict=True) if isinstance(size, str)]
    bad = tuple(sorted([*unread, *damaged]))
    images = tuple(
        image for image, size in zip(found, sizes, strict=True) if not isinstance(size, str) and min(size) >= min_side
    )
    usable = {image.id for image in images}
    small = tuple(
        image.id
        for image, size in zip(found, sizes, strict=True)
        if not isinstance(size, str) and image.id not in usable
    )
    report = ScanReport(top, images, bad, small, min_side, empty, notes)
    total = len(found) + len(unread)
    check_bad_files(_named(bad), total, max_bad_ratio, "images", path, MORE)
    if not images:
        raise UserError(
            f"data.path={path}: none of {total} images is usable; {report.too_small} are narrower than a patch of "
            f"{min_side} pixels and {len(bad)} unreadable. Give larger images or a smaller features.patch_size."
        )
    return report


def read(image: ImageFile, max_pixels: int = 1 << 26) -> np.ndarray:
    """(height, width, 3) uint8. Raises BadImage with file and reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return to_rgb(_load(image.source, max_pixels, True))
    except BadImage as error:
        raise BadImage(f"{image.source}: {error}") from None


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImage(f"{width} x {height} pixels, more than data.max_pixels={max_pixels}")


def _load(source: Source, max_pixels: int | None, decode: bool) -> Image.Image:
    """An image that is known to be whole where it was decoded."""
    try:
        with source.open(whole=decode) as file, Image.open(file, formats=FORMATS) as image:
            width, height = image.size
            if max_pixels is not None:
                _check_size(width, height, max_pixels)
            if image.mode == "F":
                raise BadImage("pixels are fractions, whose range is not known")
            if decode:
                image.load()
            return image
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image, or damaged at its beginning") from None
    except Exception as error:  # a damaged file makes Pillow raise OSError, SyntaxError, struct.error and others
        raise BadImage(f"damaged: {error or type(error).__name__}") from None


def to_rgb(image: Image.Image) -> np.ndarray:
    """(height, width, 3) uint8 from grey, palette, CMYK, transparent (the colour beneath is kept) and 16-bit images."""
    if image.mode.startswith("I"):  # 16 bits a pixel, for which Pillow's own conversion clips at 255
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise BadImage("pixels of more than 16 bits")
        return np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    return np.asarray(image.convert("RGB"))


# ------------------------------------------------------------------------------------------ which files there are


def _find(given: str | Path, split: str | None) -> tuple[Path, list[ImageFile], tuple[str, ...]]:
    """(folder searched, files by id, class folders without an image)."""
    root = existing(given, EXPECTED)
    if not root.is_dir():
        if root.suffix.lower() not in IMAGE_EXTENSIONS:
            raise UserError(
                f"data.path={given}: expected a folder, an image ({' '.join(IMAGE_EXTENSIONS)}), CIFAR's .bin or "
                ".bin.xz, or an IDX file (...-images-idx3-ubyte, .gz too)."
            )
        if split is not None:
            raise UserError(f"data.path={given} is one file and has no split {split!r}: leave data.split out.")
        return root.parent, [ImageFile(root, root.name)], ()
    if split is None and (root / "train").is_dir():
        split = "train"
    top = root if split is None else subfolder(root, split, given)
    images: list[ImageFile] = []
    kinds: Counter[str] = Counter()
    for folder, names in walk(top, given):
        for path in (folder / name for name in names):
            kinds[kind(path)] += 1
            if path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".") and path.is_file():
                below = path.relative_to(top).parts
                label = below[0] if len(below) > 1 else None
                images.append(ImageFile(path, path.relative_to(root).as_posix(), label))
    if not images:
        advice = "Unpack archives, or mend the path."
        raise none_found("images", top, given, IMAGE_EXTENSIONS, kinds, advice)
    labels = {image.label for image in images}
    folders = sorted(child.name for child in top.iterdir() if child.is_dir() and not child.name.startswith("."))
    empty = tuple(name for name in folders if name not in labels)
    return top, sorted(images, key=lambda image: image.id), empty


def facts(source: Source) -> dict[str, Fact] | str:
    """What a header says of a file: width and height in pixels, format; or why it is of no use."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = _load(source, None, False)
    except BadImage as error:
        return str(error)
    return {"width": image.width, "height": image.height, "format": image.format or "?"}


SHARDS = Kind("vision", IMAGE_EXTENSIONS, facts)


def _in_tars(
    tars: Sequence[Path], given: str | Path, split: str | None
) -> tuple[Path, list[ImageFile], tuple[str, ...], tuple[tuple[str, str], ...], tuple[str, ...]]:
    """As `_find`, and (id, reason) of what cannot be read, and notes."""
    found = read_shards(tars, given, SHARDS)
    if split is None and any(item.id.startswith("train/") for item in found.items):
        split = "train"
    images = [
        ImageFile(item.source.path, item.id, inside=item.source, facts=item.facts)
        for item in found.items
        if split is None or item.id.startswith(f"{split}/")
    ]
    if not images:
        raise UserError(f"data.path={given} has no image below {split!r}; the first is {found.items[0].id}.")
    return found.paths[0].parent, sorted(images, key=lambda image: image.id), (), found.bad, found.notes


def _named(bad: Iterable[tuple[str, str]]) -> list[str]:
    return [f"{name}: {reason}" for name, reason in bad]


# ------------------------------------------------------------------------------------ arrays of many images in a file


@dataclass(frozen=True)
class Arrays:
    """Images of one size held in memory. pixels: (N, height, width, 3) or (N, height, width) uint8; labels: (N,)."""

    source: str
    pixels: np.ndarray
    labels: np.ndarray | None


def record_files(given: str | Path) -> list[Path]:
    """CIFAR or IDX files that `data.path` is or directly holds; none where it is a matter of image files.

    In a folder only names that CIFAR uses count: torchvision leaves a meta.bin beside ImageNet's train/.
    """
    if find_shards(given) is not None:
        return []
    path = existing(given, EXPECTED)
    if path.is_file():
        return [path] if _is_idx(path) or path.name.endswith((".bin", ".bin.xz", ".bin.gz")) else []
    children = [child for child in sorted(path.iterdir()) if child.is_file()]
    if any(child.suffix.lower() in IMAGE_EXTENSIONS for child in children):
        return []
    return [child for child in children if _is_idx(child) or _CIFAR_NAME.fullmatch(child.name)]


def read_records(given: str | Path, split: str | None) -> Arrays:
    """All images of `record_files`. A name with "test" or "t10k" is the test split, any other the training split.

    Raises UserError where a file is damaged, or there is nothing of the split.
    """
    files = record_files(given)
    if split not in (None, "train", "test"):
        raise UserError(f"data.split={split!r}: files of this kind have the splits train and test.")
    wanted = [file for file in files if is_test(file) == (split == "test")]
    if split is None and not wanted:
        wanted = files
    if not wanted:
        names = ", ".join(file.name for file in files)
        raise UserError(f"data.path={given} has nothing for data.split={split}: there is {names}.")
    parts = [_read_idx(file) if _is_idx(file) else _read_cifar(file) for file in wanted]
    shapes = {pixels.shape[1:] for pixels, _ in parts}
    if len(shapes) > 1:
        raise UserError(f"data.path={given} holds images of several shapes, {shapes}: give one kind of file.")
    labels = [labels for _, labels in parts if labels is not None]
    return Arrays(
        ", ".join(file.name for file in wanted),
        np.concatenate([pixels for pixels, _ in parts]),
        np.concatenate(labels) if len(labels) == len(parts) else None,
    )


def _is_idx(path: Path) -> bool:
    return "-images-idx3-ubyte" in path.name or "-images.idx3-ubyte" in path.name


def is_test(path: Path) -> bool:
    """Whether the name of a CIFAR or IDX file says that it is of the test split."""
    return "test" in path.name or "t10k" in path.name


def _unpacked(path: Path) -> bytes:
    """The bytes of a file, unpacked where its name ends in .gz or .xz."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            data = file.read(MAX_RECORD_BYTES + 1)
    except (OSError, EOFError, lzma.LZMAError, ValueError, gzip.zlib.error) as error:  # pyright: ignore
        raise UserError(f"{path} is damaged or cut short: {error}. Fetch it again.") from None
    if len(data) > MAX_RECORD_BYTES:
        raise UserError(f"{path} unpacks to more than {MAX_RECORD_BYTES} bytes: split it.")
    return data


def _read_cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Records of a label (CIFAR-10) or two (CIFAR-100, coarse and fine) and 1024 red, green and blue bytes each."""
    data = np.frombuffer(_unpacked(path), np.uint8)
    for labels, classes in ((1, 10), (2, 100)):
        if len(data) and len(data) % (CIFAR_PIXELS + labels) == 0:
            records = data.reshape(-1, CIFAR_PIXELS + labels)
            if records[:, labels - 1].max() < classes:
                pixels = records[:, labels:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                return np.ascontiguousarray(pixels), records[:, labels - 1].astype(np.int64)
    raise UserError(
        f"{path} has {len(data)} bytes, which is no whole number of CIFAR-10 records (3073 bytes, labels 0 to 9) or "
        "CIFAR-100 records (3074 bytes, labels 0 to 99). It is damaged, or something else."
    )


def _read_idx(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """MNIST's format: a magic number and the axes, big-endian, then one byte per pixel; labels in a file beside it."""
    pixels = _idx_array(path, 3)
    names = [path.name.replace("images-idx3", "labels-idx1").replace("images.idx3", "labels.idx1")]
    names.append(names[0][:-3] if names[0].endswith(".gz") else names[0] + ".gz")
    for name in names:
        if (path.parent / name).is_file():
            labels = _idx_array(path.parent / name, 1)
            if len(labels) != len(pixels):
                raise UserError(f"{path} has {len(pixels)} images, but {name} beside it has {len(labels)} labels.")
            return pixels, labels.astype(np.int64)
    return pixels, None


def _idx_array(path: Path, num_axes: int) -> np.ndarray:
    data = _unpacked(path)
    header = 4 + 4 * num_axes
    if len(data) < header or data[:4] != bytes([0, 0, 8, num_axes]):
        raise UserError(f"{path} is no IDX file of bytes with {num_axes} axes: it begins with {data[:4].hex()}.")
    shape = np.frombuffer(data, ">u4", num_axes, 4).astype(np.int64)
    if np.prod(shape) != len(data) - header or not len(data) - header:
        raise UserError(f"{path} promises {'x'.join(map(str, shape))} bytes and has {len(data) - header}: cut short.")
    return np.frombuffer(data, np.uint8, -1, header).reshape(shape)
