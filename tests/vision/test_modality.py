"""The vision modality against its contract: sizes, presets, options that cannot work, names of official weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d2v_core.batching import StepLoader
from d2v_core.config import RunConfig, load_config
from d2v_core.errors import UserError
from d2v_core.run import build_model, load_model_state, model_state
from d2v_core.trainer import Updater
from d2v_vision import data, official
from d2v_vision.feature_encoder import IdentityPredictor
from d2v_vision.modality import VisionModality

from ..runs import modality_of

PRESETS = sorted(
    path.stem for path in VisionModality.recipes().glob("*.yaml") if "method: data2vec2" not in path.read_text()
)
SMALL = ("data.synthetic_images=16", "data.batch=8", "data.micro_batch=4", "model.embed_dim=16", "model.num_layers=2",
         "model.num_heads=2", "target.top_k_layers=2", "data.image_size=32", "features.patch_size=8",
         "mask.num_patches=9", "mask.min_block=2")  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


def configured(*words: str) -> RunConfig:
    return load_config(["modality=vision", *words], lambda name: VisionModality)[0]


def modality(*words: str) -> VisionModality:
    return modality_of(VisionModality, words)


@pytest.mark.parametrize(("preset", "number"), [("base", 86_256_720), ("large", 304_186_816)])
def test_parameter_counts_of_the_official_models(preset: str, number: int) -> None:
    made = modality(f"preset={preset}")
    with torch.device("meta"):
        model = build_model(made)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == number


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_takes_steps(preset: str) -> None:
    made = modality(f"preset={preset}", *SMALL)
    model = build_model(made).train()
    updater = Updater(model, made.config, torch.device("cpu"))
    dataset = made.dataset("train")
    steps = iter(StepLoader(made, dataset, seed=0))
    for step in range(3):
        _, _, batches = next(steps)
        assert [len(batch.ids) for batch in batches] == [4, 4]
        result = updater.update(step, batches, made.teacher_inputs).numbers()
        assert 0 < result["loss"] < 3 and 0.3 < result["target_std"] <= 1.01
    names = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert names == set()


def test_a_batch_does_not_depend_on_the_loader() -> None:
    made = modality("preset=tiny1", *SMALL)
    dataset = made.dataset("train")
    plain, workers = (next(iter(StepLoader(made, dataset, seed=3, num_workers=number)))[2] for number in (0, 1))
    for a, b in zip(plain, workers, strict=True):
        assert a.ids == b.ids and a.masks is not None and b.masks is not None
        assert torch.equal(a.inputs["image"], b.inputs["image"]) and torch.equal(a.masks.hidden, b.masks.hidden)
        assert a.inputs["image"].shape == (4, 3, 32, 32) and a.amount == 4.0


def test_tokens_agree_with_the_layout() -> None:
    made = modality("preset=tiny1", *SMALL)
    sample = made.prepare(made.dataset("train")[0], 1, np.random.default_rng(0))
    tokens = made.feature_encoder().embed(made.collate([sample]))
    assert tokens.x.shape == (1, made.layout(sample).num_tokens, 16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.image_size=30"], "data.image_size=30 must be a multiple of features.patch_size=8"),
        (["features.patch_size=0"], "features.patch_size=0"),
        (["features.init_std=0"], "features.init_std=0.0 must be above 0"),
        (["mask.num_patches=16"], "mask.num_patches=16 must lie between 1 and 15"),
        (["data.crop_scale=[0.5]"], "data.crop_scale=[0.5] must be two numbers"),
        (["data.crop_aspect=[2,1]"], "data.crop_aspect=[2.0, 1.0] must be two numbers"),
        (["data.micro_batch=128"], "data.micro_batch=128 must lie between 1 and data.batch=64"),
        (["data.std=[0,1,1]"], "data.std above 0"),
        (["data.flip_prob=2"], "data.flip_prob=2.0 must lie between 0 and 1"),
        (["data.image_size=8", "features.patch_size=4", "mask.num_patches=2"], "size=8 must be at least 16"),
        (["features.teacher=both"], "features.teacher=both must be one of: average, share"),
        (["data.imagesize=32"], "Did you mean: 'image_size'?"),
        (["encoder=waveform"], "is not one of vision's: patches"),
    ],
)
def test_what_cannot_work_is_named(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        modality("preset=tiny1", *words)
    assert message in str(caught.value)


def test_fairseq_s_port_is_a_matter_of_options() -> None:
    made = modality("preset=tiny1", *SMALL, "features.teacher=share", "features.head=identity")
    model = build_model(made)
    assert isinstance(model.predictor, IdentityPredictor) and not list(model.predictor.parameters())
    assert model.teacher.shares("encoder.embedding")
    own = model.teacher.own_state()
    assert {name.split(".")[0] for name in own} == {"encoder", "transformer"}
    assert {name for name in own if name.startswith("encoder")} == {
        "encoder.positions.table",
        "encoder.positions.index",
    }


def test_the_door_imports_without_torch() -> None:
    code = "import sys, d2v_vision.plugin; assert not {'torch', 'PIL', 'numpy', 'timm'} & set(sys.modules)"
    paths = [str(Path(module.__file__ or "").parents[1]) for module in (data, sys.modules["d2v_core.config"])]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_probe_is_of_pictures_that_no_run_has_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "PROBE_COUNTS", {"train": 20, "dev": 10, "test": 10})
    made = modality("preset=tiny1", *SMALL)
    task = made.probe()
    assert task is not None and task.num_classes == 10 and task.input_features is not None
    inputs, label = task.train[13]
    assert label.shape == () and label.item() == 3 and inputs["image"].shape == (1, 3, 32, 32)
    seen = made.collate([made.dataset("train")[13]])
    assert not torch.equal(inputs["image"], seen["image"])


# ---------------------------------------------------------------------------------------------------- official names


@pytest.mark.parametrize("names", ["fairseq", "official"])
def test_names_go_there_and_back(names: official.Names) -> None:
    made = modality("preset=base", *SMALL)
    model = build_model(made)
    ours = {name: torch.randn(tensor.shape).to(tensor.dtype) for name, tensor in model_state(model).items()}
    theirs = official.to_official(ours, made.config, names)
    assert theirs["cls_emb" if names == "fairseq" else "cls_token"].shape == (1, 1, 16)
    back = official.from_official(theirs, made.config, names)
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)
    load_model_state(model, back, "the test")


def test_unknown_names_are_refused() -> None:
    config = configured("preset=base")
    with pytest.raises(UserError, match=r"no fairseq weights of data2vec vision 1.0: pos_embed"):
        official.from_official({"pos_embed": torch.zeros(1)}, config)
    with pytest.raises(UserError, match="has no name in the official code"):
        official.to_official({"student.encoder.other": torch.zeros(1)}, config)
    own: dict[str, Any] = {"encoder.cls_token": torch.zeros(1)}
    with pytest.raises(UserError, match=r"fairseq's teacher has no cls_emb.*features\.teacher=share"):
        official.teacher_to_official(own, config)


def test_the_official_network_of_timm_computes_the_same() -> None:
    """timm's BEiT is an independent port of the same blocks and keeps the official names."""
    beit = pytest.importorskip("timm.models.beit")
    made = modality("preset=base", *SMALL)
    model = build_model(made).eval()
    state = {name: tensor + 0.2 * torch.randn(tensor.shape) if tensor.is_floating_point() else tensor
             for name, tensor in model_state(model).items()}  # fmt: skip
    load_model_state(model, state, "the test")
    theirs = beit.Beit(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=0, init_values=0.1,
        use_abs_pos_emb=False, use_shared_rel_pos_bias=True, global_pool="",
    ).eval()  # fmt: skip
    weights = official.to_official(state, made.config, "official")
    wanted = theirs.state_dict().keys()
    loaded = theirs.load_state_dict({name: tensor for name, tensor in weights.items() if name in wanted}, strict=False)
    assert not [name for name in loaded.missing_keys if "k_bias" not in name and "relative_position_index" not in name]
    assert weights.keys() - wanted <= {"mask_token", "lm_head.weight", "lm_head.bias",
                                       "rel_pos_bias.relative_position_index"}  # fmt: skip
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        _, encoded = model.student(model.student.encoder.embed({"image": image}), None)
        torch.testing.assert_close(encoded.x, theirs.forward_features(image), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"in_channels": 1}, "in_channels=1: d2v has only 3"),
        ({"shared_rel_pos_bias": False}, "shared_rel_pos_bias=False"),
        ({"ema_transformer_only": False}, "ema_transformer_only=False"),
        ({"depths": 3}, "unknown: depths"),
    ],
)
def test_an_official_configuration_that_does_not_fit(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        official.config_from_official(changes)
    assert "patch_size is missing" in str(caught.value)


def test_a_run_s_network_has_the_official_initial_weights() -> None:
    model = build_model(modality("preset=base", *SMALL))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and not name.startswith("teacher."):
            assert parameter.abs().max() <= 0.02, name
    first, second = (block.get_parameter("fc2.weight").abs().max().item() for block in model.student.transformer.blocks)
    assert first == pytest.approx(0.02 / 2**0.5, rel=0.05) and second == pytest.approx(0.02 / 2, rel=0.05)
    assert not model.student.encoder.get_parameter("positions.table").any()
