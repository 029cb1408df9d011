"""One, two and four processes have the same loss curve: fp32, no dropout, on the built-in data of each modality."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .together import losses, run_together, worst

STEPS = 50
NETWORK = ["model.embed_dim=32", "model.num_layers=2", "model.num_heads=2", "target.top_k_layers=2"]
TRAINING = [f"train.max_steps={STEPS}", "train.log_every=1", "train.num_workers=0", "train.tensorboard=false",
            "train.probe=false", "train.device=cpu"]  # fmt: skip
# Steps of five micro-batches or so: neither two nor four processes have the same number of them each.
DATA = {
    "audio": ["data.batch_s=10", "data.micro_batch_s=2", "data.max_s=2", "data.synthetic_clips=60"],
    "text": ["data.batch_tokens=640", "data.micro_batch_tokens=128"],
    "vision": ["decoder.dim=32", "data.batch=20", "data.micro_batch=4", "data.synthetic_images=200"],
}


@pytest.mark.slow
@pytest.mark.parametrize("modality", DATA)
def test_any_number_of_processes_is_the_same_run(modality: str, d2v: Callable[..., tuple[int, str]], tmp_path: Path):
    words = ["run", f"modality={modality}", "stage=pretrain", *NETWORK, *TRAINING, *DATA[modality]]
    assert d2v(*words, f"out={tmp_path}/alone")[0] == 0
    alone = losses(tmp_path / "alone")
    assert len(alone) == STEPS and len(set(alone)) == STEPS
    for count in (2, 4):
        for strategy in ("ddp", "fsdp2"):
            out = tmp_path / f"{strategy}-{count}"
            done = run_together(
                count, [*words, f"out={out}", f"launch.strategy={strategy}"], tmp_path / f"logs-{out.name}"
            )
            assert [each.status for each in done] == [0] * count, done[0].text
            difference = worst(alone, losses(out))
            print(f"{modality}, {count} processes, {strategy}: {difference:.1e}")
            assert difference < 1e-5
