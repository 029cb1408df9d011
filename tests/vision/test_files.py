"""Image files, good and bad, and files that hold arrays of images."""

from __future__ import annotations

import gzip
import lzma
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2v_core.errors import UserError
from d2v_vision import files
from d2v_vision.files import BadImage, ImageFile, read, read_records, record_files, scan

RNG = np.random.default_rng(0)


def picture(width: int = 20, height: int = 12) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def save(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or picture()).save(path, **options)
    return path


def read_one(path: Path) -> np.ndarray:
    return read(ImageFile(path, path.name))


# ---------------------------------------------------------------------------------------------------------- folders


def test_a_folder_is_searched_and_sorted(tmp_path: Path) -> None:
    for name in ("b.png", "a/c.JPEG", "a/deep/d.bmp", ".hidden/e.png", "a/.f.png"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    report = scan(tmp_path)
    assert [image.id for image in report.images] == ["a/c.JPEG", "a/deep/d.bmp", "b.png"]
    assert [image.label for image in report.images] == ["a", "a", None]
    assert report.summary() == f"3 images in {tmp_path}, 1 class folders"


def test_imagenet_s_layout_trains_on_train(tmp_path: Path) -> None:
    for name in ("train/n01440764/1.JPEG", "train/n01443537/images/2.JPEG", "val/n01440764/3.JPEG"):
        save(tmp_path / name)
    report = scan(tmp_path)
    assert [(image.id, image.label) for image in report.images] == [
        ("train/n01440764/1.JPEG", "n01440764"),
        ("train/n01443537/images/2.JPEG", "n01443537"),
    ]
    assert [image.id for image in scan(tmp_path, split="val").images] == ["val/n01440764/3.JPEG"]
    with pytest.raises(UserError, match=r"no sub-folder 'test'. Sub-folders: train, val"):
        scan(tmp_path, split="test")


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "1.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / "eel").mkdir()
    (tmp_path / "eel" / "list.txt").touch()
    report = scan(tmp_path)
    assert report.empty == ("dog", "eel")
    assert "2 folders without an image: dog, eel" in report.summary()


def test_links_that_go_round_end(tmp_path: Path) -> None:
    save(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert [image.id for image in scan(tmp_path).images] == ["a/1.png"]


def test_a_single_file(tmp_path: Path) -> None:
    path = save(tmp_path / "one.png")
    assert [image.id for image in scan(path).images] == ["one.png"]
    with pytest.raises(UserError, match="one file and has no split"):
        scan(path, split="train")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "data.path is empty"),
        ("pictrues", r"there is no 'pictrues' in .*Did you mean 'pictures'\?"),
        ("notes.txt", "expected a folder, an image"),
        ("pictures", r"no images in .*found 1 x \.zip"),
    ],
)
def test_a_path_that_holds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, words: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "all.zip").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=words):
        scan(given)


# ------------------------------------------------------------------------------------------------------ kinds of pixels


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "RGB"])
def test_every_mode_becomes_red_green_blue(tmp_path: Path, mode: str) -> None:
    suffix = ".jpg" if mode in ("CMYK", "YCbCr") else ".png"
    pixels = read_one(save(tmp_path / f"x{suffix}", picture().convert(mode)))
    assert pixels.shape == (12, 20, 3) and pixels.dtype == np.uint8


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    grey = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    pixels = read_one(save(tmp_path / "x.png", Image.fromarray(grey)))
    assert pixels.tolist() == [[[0] * 3, [1] * 3, [128] * 3, [255] * 3]]


def test_pixels_without_a_range_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.tif", Image.fromarray(np.zeros((4, 4), np.float32)))
    with pytest.raises(BadImage, match=r"x\.tif: pixels are fractions"):
        read_one(path)
    path = save(tmp_path / "y.tif", Image.fromarray(np.full((4, 4), 1 << 20, np.int32)))
    with pytest.raises(BadImage, match="more than 16 bits"):
        read_one(path)


def test_a_palette_with_transparency_gives_no_warning(tmp_path: Path) -> None:
    image = picture().convert("P")
    path = save(tmp_path / "x.png", image, transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_one(path).shape == (12, 20, 3)


# ---------------------------------------------------------------------------------------------------------- damage


def damaged(folder: Path) -> None:
    """Three files of a kind each."""
    data = save(folder / "cut.jpg", picture(200, 200)).read_bytes()
    (folder / "cut.jpg").write_bytes(data[: len(data) // 2])
    (folder / "empty.png").touch()
    (folder / "text.jpeg").write_text("not an image at all")


def test_damaged_files_are_named_and_left_out(tmp_path: Path) -> None:
    for i in range(9):
        save(tmp_path / f"good{i}.png")
    damaged(tmp_path)
    report = scan(tmp_path, max_bad_ratio=0.5)
    assert len(report.images) == 9
    assert [name for name, _ in report.bad] == ["cut.jpg", "empty.png", "text.jpeg"]
    assert "truncated" in report.bad[0][1] and "not an image" in report.bad[1][1]
    assert "3 unreadable: cut.jpg: damaged" in report.summary()
    with pytest.raises(UserError, match=r"3 of 12 images \(25\.0%\) are unreadable.*data\.max_bad_ratio=0\.01"):
        scan(tmp_path)


def test_headers_alone_let_a_truncated_file_pass_which_reading_then_names(tmp_path: Path) -> None:
    damaged(tmp_path)
    save(tmp_path / "good.png")
    report = scan(tmp_path, max_bad_ratio=1.0, decode=False)
    assert [image.id for image in report.images] == ["cut.jpg", "good.png"]
    with pytest.raises(BadImage, match=r"cut\.jpg: damaged: .*truncated"):
        read(report.images[0])


def test_a_decompression_bomb_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "bomb.png", Image.new("1", (9000, 9000)))
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was decoded"))
    with pytest.raises(UserError, match=r"bomb\.png: 9000 x 9000 pixels, more than data\.max_pixels=67108864"):
        scan(tmp_path)


def test_a_giant_that_pillow_itself_refuses(tmp_path: Path) -> None:
    path = save(tmp_path / "giant.png", Image.new("1", (20_000, 10_000)))
    with pytest.raises(BadImage, match=r"damaged: .*exceeds limit"):
        read_one(path)


def test_images_smaller_than_a_patch_are_counted(tmp_path: Path) -> None:
    save(tmp_path / "small.png", picture(40, 7))
    save(tmp_path / "large.png", picture(8, 8))
    report = scan(tmp_path, min_side=8)
    assert [image.id for image in report.images] == ["large.png"] and report.too_small == 1
    assert "1 dropped as narrower than 8 pixels, a patch" in report.summary()
    with pytest.raises(UserError, match=r"none of 2 images is usable; 2 are narrower than a patch of 16 pixels"):
        scan(tmp_path, min_side=16)


# ------------------------------------------------------------------------------------------- CIFAR and IDX files


def cifar(count: int, labels: int = 1) -> tuple[bytes, np.ndarray]:
    pixels = RNG.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    head = np.array([[i % (10 if labels == 1 else 20)] * labels for i in range(count)], dtype=np.uint8)
    return np.concatenate([head, pixels.transpose(0, 3, 1, 2).reshape(count, -1)], 1).tobytes(), pixels


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("packed", ["", ".xz", ".gz"])
def test_cifar_records(tmp_path: Path, labels: int, packed: str) -> None:
    data, pixels = cifar(5, labels)
    pack = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress}[packed]
    path = tmp_path / f"data_batch_1.bin{packed}"
    path.write_bytes(pack(data))
    arrays = read_records(path, None)
    assert np.array_equal(arrays.pixels, pixels)
    assert arrays.labels is not None and arrays.labels.tolist() == [0, 1, 2, 3, 4]


def test_cifar_s_folder_has_two_splits(tmp_path: Path) -> None:
    for name, count in (("data_batch_1.bin", 2), ("data_batch_2.bin", 3), ("test_batch.bin", 4)):
        (tmp_path / name).write_bytes(cifar(count)[0])
    (tmp_path / "batches.meta.txt").write_text("airplane")
    assert len(record_files(tmp_path)) == 3
    assert [len(read_records(tmp_path, split).pixels) for split in (None, "train", "test")] == [5, 5, 4]
    with pytest.raises(UserError, match=r"data\.split='dev': files of this kind have the splits train and test"):
        read_records(tmp_path, "dev")


def test_a_binary_file_of_another_kind_beside_imagenet(tmp_path: Path) -> None:
    (tmp_path / "meta.bin").write_bytes(b"torchvision's list of classes")
    save(tmp_path / "train" / "n01440764" / "1.JPEG")
    assert record_files(tmp_path) == []
    assert len(record_files(tmp_path / "meta.bin")) == 1


@pytest.mark.parametrize(
    "data", [b"", cifar(3)[0][:-1], b"\xff" * 3073], ids=["empty", "cut short", "labels beyond the classes"]
)
def test_what_is_no_cifar_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(UserError, match=f"{len(data)} bytes, which is no whole number of CIFAR-10 records"):
        read_records(tmp_path / "x.bin", None)


@pytest.mark.parametrize("packed", [".xz", ".gz"])
def test_a_packed_file_that_is_cut_short(tmp_path: Path, packed: str) -> None:
    pack = lzma.compress if packed == ".xz" else gzip.compress
    path = tmp_path / f"x.bin{packed}"
    path.write_bytes(pack(cifar(3)[0])[:-200])
    with pytest.raises(UserError, match="damaged or cut short"):
        read_records(path, None)


def test_a_packed_file_without_end_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_RECORD_BYTES", 1 << 20)
    (tmp_path / "x.bin.xz").write_bytes(lzma.compress(bytes(1 << 24)))
    with pytest.raises(UserError, match="unpacks to more than 1048576 bytes"):
        read_records(tmp_path / "x.bin.xz", None)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def test_fashion_mnist_s_files(tmp_path: Path) -> None:
    train, test = (RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8) for n in (6, 4))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(train)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(6, dtype=np.uint8))))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(test))
    arrays = read_records(tmp_path, None)
    assert np.array_equal(arrays.pixels, train) and arrays.labels is not None and arrays.labels.tolist() == [*range(6)]
    assert np.array_equal(read_records(tmp_path, "test").pixels, test)
    assert read_records(tmp_path, "test").labels is None


def test_idx_files_that_do_not_add_up(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    good = idx(np.zeros((3, 4, 4), np.uint8))
    for data, words in (
        (good[:-1], "promises 3x4x4 bytes and has 47: cut short"),
        (b"\x00\x00\x08\x01" + good[4:], "no IDX file of bytes with 3 axes"),
        (b"", "no IDX file"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=words):
            read_records(path, None)
    path.write_bytes(good)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(2, np.uint8)))
    with pytest.raises(UserError, match="has 3 images, but train-labels-idx1-ubyte beside it has 2 labels"):
        read_records(path, None)
