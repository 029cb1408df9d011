"""The vision modality: its configuration, and how its parts meet the contract."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from d2v_core.config import RunConfig
from d2v_core.contract import (
    Batching,
    Dataset,
    Inventory,
    Layout,
    MaskingPolicy,
    Modality,
    Part,
    Predictor,
    ProbeTask,
    Raw,
    Task,
)
from d2v_core.data2vec import LinearPredictor
from d2v_core.decoder import ConvDecoder, DecoderConfig
from d2v_core.errors import UserError
from d2v_core.masking import BlockMasking as GridBlockMasking
from d2v_core.masking import BlockMaskingConfig as GridBlockMaskingConfig
from d2v_core.transformer import Transformer
from d2v_core.visible import PrenetConfig
from d2v_vision.data import ImageSample, VisionConfig, augment, inventory, open_dataset, shape_probe, to_tensor
from d2v_vision.feature_encoder import (
    CHANNELS,
    IdentityPredictor,
    PatchConfig,
    PatchEncoder,
    RawPatchConfig,
    ReadPatches,
    VisiblePatchConfig,
    VisiblePatchEncoder,
    init_official,
    init_transformer,
)
from d2v_vision.files import to_rgb
from d2v_vision.labelled import AugmentConfig, middle, mix, open_task, training_transform, vary
from d2v_vision.masking import BlockMasking, BlockMaskingConfig
from d2v_vision.synthetic import SyntheticShapes

PRENET = "encoder.prenet.transformer.blocks."
POSITIONS = "encoder.positions."


class VisionModality(Modality[ImageSample]):
    """Square images of `data.image_size` pixels in square patches. Sizes and amounts are counted in images."""

    name = "vision"
    unit = "images"
    encoders = ("patches",)
    methods = ("data2vec", "data2vec2")

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.data = config.section("data", VisionConfig)
        self.visible_only = config.method == "data2vec2"
        patch = config.section("features", VisiblePatchConfig if self.visible_only else RawPatchConfig).patch_size
        labelled = "augment" in config.sections
        self.augment = config.section("augment", AugmentConfig) if labelled else AugmentConfig()
        size = self.data.image_size
        try:
            self.data.check()
            self.augment.check()
            if patch < 1 or size % patch:
                raise ValueError(f"data.image_size={size} must be a multiple of features.patch_size={patch}")
            if self.data.path is None:
                SyntheticShapes("train", self.data.synthetic_images, size)
            self.patch_size, self.grid = patch, (size // patch, size // patch)
            if not self.visible_only:
                if not self.features.init_std > 0:
                    raise ValueError(f"features.init_std={self.features.init_std} must be above 0")
                config.section("mask", BlockMaskingConfig).check(self.grid[0] * self.grid[1])
            self.masking()
        except ValueError as error:
            raise UserError(f"This configuration cannot work: {error}") from error

    @property
    def features(self) -> RawPatchConfig:
        """Of data2vec 1.0."""
        return self.config.section("features", RawPatchConfig)

    @property
    def own_features(self) -> PatchConfig:
        """Of data2vec 1.0 with the modality's own encoder."""
        return self.config.section("features", PatchConfig)

    @classmethod
    def sections(cls, encoder: str) -> Mapping[str, type]:
        return {"data": VisionConfig, "features": PatchConfig, "mask": BlockMaskingConfig}

    @classmethod
    def task_sections(cls) -> Mapping[str, type]:
        return {"augment": AugmentConfig}

    @classmethod
    def method_sections(cls, encoder: str, method: str) -> Mapping[str, type]:
        return {
            "data": VisionConfig,
            "features": VisiblePatchConfig,
            "mask": GridBlockMaskingConfig,
            "prenet": PrenetConfig,
            "decoder": DecoderConfig,
        }

    @classmethod
    def raw_sections(cls, method: str) -> Mapping[str, type]:
        if method == "data2vec2":
            sections = cls.method_sections("", method)
            return {name: sections[name] for name in ("data", "features", "mask", "decoder")}
        return {**cls.sections(""), "features": RawPatchConfig}

    def raw(self) -> Raw:
        """Pixels, normalised."""
        return Raw((self.patch_size, self.patch_size), channels=CHANNELS, read=ReadPatches(self.patch_size))

    @classmethod
    def recipes(cls) -> Path:
        return Path(__file__).parent / "recipes"

    @classmethod
    def inventory(cls, config: RunConfig, measure: bool) -> Inventory:
        """Headers say how long a sample is."""
        return inventory(config.section("data", VisionConfig))

    def dataset(self, split: str) -> Dataset[ImageSample]:
        return open_dataset(self.data, self.patch_size)

    def all_samples(self) -> Dataset[ImageSample]:
        """Every image that can be read and is no narrower than a patch, however many others there are."""
        return open_dataset(replace(self.data, max_bad_ratio=1.0, verify="headers"), self.patch_size)

    def sample(self, given: Any) -> ImageSample:
        """An image file's path, a PIL image, or (height, width, 3) uint8."""
        if isinstance(given, (str, Path, ImageSample)):
            return super().sample(given)
        if isinstance(given, Image.Image):
            return ImageSample(to_rgb(given))
        pixels = np.asarray(given)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise UserError(
                f"Pixels of shape {pixels.shape} and type {pixels.dtype} were given; expected (height, width, 3) "
                "uint8, a PIL image, or the path of an image file."
            )
        return ImageSample(pixels)

    def batching(self) -> Batching:
        data = self.data
        return Batching(data.batch, data.micro_batch or data.batch, max_size=1, open_shards=data.shards_at_once)

    def micro_batch_option(self, size: int) -> str:
        return f"data.micro_batch={size}"

    def prepare(self, sample: ImageSample, size: int, rng: np.random.Generator) -> ImageSample:
        return ImageSample(augment(sample.pixels, self.data, rng))

    def layout(self, sample: ImageSample) -> Layout:
        return Layout(self.grid)

    def collate(self, samples: Sequence[ImageSample]) -> Mapping[str, Tensor]:
        """image (B, 3, S, S) float32, normalised by data.mean and data.std."""
        return {"image": to_tensor([sample.pixels for sample in samples], self.data)}

    def amount(self, inputs: Mapping[str, Tensor]) -> float:
        return float(len(inputs["image"]))

    def masking(self) -> MaskingPolicy:
        if self.visible_only:
            return GridBlockMasking(self.config.section("mask", GridBlockMaskingConfig), self.config.official_quirks)
        return BlockMasking(self.config.section("mask", BlockMaskingConfig))

    def feature_encoder(self) -> PatchEncoder | VisiblePatchEncoder:
        if not self.visible_only:
            return PatchEncoder(self.own_features, self.config.model, self.data.image_size)
        features, prenet = (
            self.config.section("features", VisiblePatchConfig),
            self.config.section("prenet", PrenetConfig),
        )
        return VisiblePatchEncoder(features, self.config.model, prenet, self.data.image_size)

    def init_transformer(self, transformer: Transformer) -> None:
        if self.visible_only:
            super().init_transformer(transformer)
        else:
            init_transformer(transformer, self.features.init_std)

    def predictor(self) -> Predictor:
        if self.visible_only:
            decoder = self.config.section("decoder", DecoderConfig)
            return ConvDecoder(decoder, self.config.model.embed_dim, num_axes=2)
        if self.features.head == "identity":
            return IdentityPredictor()
        head = LinearPredictor(self.config.model.embed_dim)
        init_official(head, self.features.init_std)
        return head

    def teacher_parts(self) -> Mapping[str, Part]:
        if self.visible_only or self.reads_raw or self.own_features.teacher == "average":
            return {"": "average"}
        share: dict[str, Part] = dict.fromkeys(
            ("encoder.embedding", "encoder.cls_token", "encoder.mask_token"), "share"
        )
        return {"": "average", **share}

    def probe(self) -> ProbeTask | None:
        return shape_probe(self) if self.data.image_size >= 16 else None

    def task(self) -> Task[ImageSample]:
        task = open_task(self.data, self.patch_size)
        if self.config.stage == "finetune":
            training_transform(self.data, self.augment)  # timm's import takes seconds: workers inherit it
        return task

    def prepare_labelled(self, sample: ImageSample, rng: np.random.Generator | None) -> ImageSample:
        if rng is None:
            return ImageSample(middle(sample.pixels, self.data.image_size, self.augment.eval_crop))
        return ImageSample(vary(sample.pixels, self.data, self.augment, rng))

    def mix(
        self, inputs: Mapping[str, Tensor], targets: Tensor, rng: np.random.Generator
    ) -> tuple[Mapping[str, Tensor], Tensor]:
        image, targets = mix(inputs["image"], targets, self.augment, rng)
        return {**inputs, "image": image}, targets

    def adapt(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Where each block is to have a bias of its own, a shared one is copied into all of them."""
        if self.visible_only or self.reads_raw:
            return state
        if self.own_features.bias == "shared":
            if f"{POSITIONS}0.table" in state:
                raise UserError(
                    "These weights have a relative position bias for each block, of which features.bias=shared cannot "
                    "make one: use features.bias=per_block."
                )
            return state
        adapted: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if name in (f"{POSITIONS}table", f"{POSITIONS}index"):
                leaf = name.removeprefix(POSITIONS)
                adapted |= {f"{POSITIONS}{i}.{leaf}": tensor for i in range(self.config.model.num_layers)}
            else:
                adapted[name] = tensor
        return adapted

    def layer_of(self, name: str) -> int:
        """1.0: a block's own bias counts as the block, a shared one as what comes after all (BEiT: optim_factory.py).

        2.0: prenet blocks lie below the others, at 0 and less, and what is no block learns as fast as the head
        (fairseq: examples/data2vec/models/mae_image_classification.py).
        """
        if self.visible_only:
            if name.startswith(PRENET):
                prenet = self.config.section("prenet", PrenetConfig)
                return int(name.removeprefix(PRENET).split(".")[0]) + 1 - prenet.layers
            block = name.startswith("transformer.blocks.")
            return super().layer_of(name) if block else self.config.model.num_layers + 1
        if name.startswith(POSITIONS):
            number = name.removeprefix(POSITIONS).split(".")[0]
            return int(number) + 1 if number.isdecimal() else self.config.model.num_layers + 1
        return super().layer_of(name)
