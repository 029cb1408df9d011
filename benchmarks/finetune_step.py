"""Time of one CTC fine-tuning step of d2v, and of greedy decoding, beside transformers' `Data2VecAudioForCTC`.

    python benchmarks/finetune_step.py --out benchmarks/results/finetune-base-fp32-cpu.json
    python benchmarks/finetune_step.py --dtype bf16 --device cuda --batch 16

A step is forward, backward, gradient norm and optimizer on a padded batch of whole utterances, the convolutional front
end frozen, as fairseq's recipes have it. `d2v` is the product's own network and step (`d2v_core.finetune`). `hf` is
`Data2VecAudioForCTC` with SDPA attention and fused `torch.optim.AdamW`. Decoding is a forward pass in evaluation mode,
the best letter of each frame, and the text, by `Wav2Vec2CTCTokenizer` on the other side. Both have the same sizes,
weights, dropout and batch; layer drop and masking of tokens are off, since the class draws masks in its forward pass.
Before timing, on utterances of one length and without dropout, loss and gradient norm must agree, and so must all
texts. Of one length, because the class lets padding leak into its convolutional positions, and d2v does not.

Numbers are to be read as those of pretrain_step.py: process CPU time on a CPU, contenders in turns, the ratio hf / d2v
as the median over rounds.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import torch
from hf_peer import copy_weights, peer_config
from pretrain_step import MAX_DRIFT, NO_DROPOUT, TOLERANCE, calibrate, cpu_model, seconds_of
from torch import Tensor, nn
from transformers import (  # pyright: ignore[reportMissingImports]
    Data2VecAudioForCTC,
    Wav2Vec2CTCTokenizer,
)
from transformers import __version__ as transformers_version  # pyright: ignore[reportMissingImports]

from d2v_audio.data import AudioSample, normalise
from d2v_audio.letters import Letters
from d2v_core import __version__ as d2v_version
from d2v_core.config import RunConfig, load_config
from d2v_core.contract import Batch, Modality
from d2v_core.ctc import Symbols, padded, sequences
from d2v_core.finetune import Network, build_network
from d2v_core.loop import AUTOCAST, OptimizerStep

SAID = "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG AND RUNS AWAY"
LETTERS = Letters.official()


@dataclass
class Setup:
    """One configuration and one batch of utterances of different lengths, for both contenders."""

    config: RunConfig
    modality: Modality[Any]
    device: torch.device
    batch: Batch
    lengths: list[int]

    @classmethod
    def of(cls, args: argparse.Namespace, *overrides: str, even: bool = False) -> Setup:
        """even: short utterances of one length."""
        with tempfile.TemporaryDirectory() as folder:
            before, _ = load_config(["modality=audio", f"preset={args.preset}", *args.set])
            Path(folder, "config.yaml").write_text(before.to_yaml(), encoding="utf-8")
            words = {"preset": args.recipe, "model.layer_drop": "0", "train.precision": args.dtype}
            words |= {"stage": "finetune", "from": folder, "train.device": args.device}
            words |= dict(word.split("=", 1) for word in overrides)
            config, kind = load_config([f"{key}={value}" for key, value in words.items()])
        modality: Any = kind(config)
        longest = round((min(args.seconds, 3.0) if even else args.seconds) * modality.data.sample_rate)
        fall = 0.0 if even else 0.4
        lengths = [round(longest * (1 - fall * i / max(args.batch - 1, 1))) for i in range(args.batch)]
        generator = torch.Generator().manual_seed(0)
        samples = [AudioSample(normalise(torch.randn(n, generator=generator).numpy())) for n in lengths]
        labels = [LETTERS.encode(SAID[: max(4, len(SAID) * n // longest)]) for n in lengths]
        tokens = int(modality.geometry.num_tokens(lengths[-1]))
        batch = Batch(
            modality.collate(samples), None, targets=padded(sequences([one[: tokens // 2] for one in labels]))
        )
        device = torch.device(args.device)
        return cls(config, modality, device, batch.to(device), lengths)

    @property
    def amount(self) -> float:
        return self.modality.amount(self.batch.inputs)


class D2V:
    """The product's own network and step."""

    name = "d2v"

    def __init__(self, setup: Setup) -> None:
        self.setup, self.objective = setup, Symbols(LETTERS.symbols, ("wer",))
        self.network: Network = build_network(setup.modality, self.objective).to(setup.device).train()
        frozen = tuple(setup.config.finetune.frozen)
        for name, parameter in self.network.student.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        self.updates = OptimizerStep(self.network, setup.config, setup.device)

    def step(self, number: int) -> tuple[Tensor, Tensor]:
        def loss(batch: Batch) -> Tensor:
            assert batch.targets is not None
            return self.objective.loss(self.network(batch.inputs), batch.targets)

        return self.updates.step(number, [self.setup.batch], lambda batch: len(batch.inputs["waveform"]), loss)

    def read(self) -> list[str]:
        self.network.eval()
        with torch.inference_mode(), self.updates.autocast():
            kept = self.objective.keep(self.network(self.setup.batch.inputs))
        self.network.train()
        return [LETTERS.decode(one.tolist()) for one in kept]


class HuggingFace:
    """`Data2VecAudioForCTC` as a careful user trains it."""

    name = "hf"

    def __init__(self, setup: Setup, like: Network) -> None:
        """like: the network of d2v, whose weights to take over."""
        self.setup, config = setup, setup.config
        theirs = peer_config(config)
        theirs.vocab_size, theirs.pad_token_id = len(LETTERS), 0
        theirs.ctc_loss_reduction, theirs.ctc_zero_infinity = "sum", True
        theirs.apply_spec_augment, theirs.final_dropout = False, 0.0
        self.model = cast("Any", Data2VecAudioForCTC(theirs))
        copy_weights(
            cast("Any", SimpleNamespace(student=like.student, predictor=SimpleNamespace(linear=like.head.out))),
            self.model.data2vec_audio, self.model.lm_head,
        )  # fmt: skip
        self.model.to(setup.device).train()
        self.model.freeze_feature_encoder()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps,
            weight_decay=optim.weight_decay, fused=True,
        )  # fmt: skip
        inputs, targets = setup.batch.inputs, setup.batch.targets
        assert targets is not None
        self.waveform, self.labels = inputs["waveform"], targets.masked_fill(targets < 0, -100)
        places = torch.arange(self.waveform.shape[1], device=setup.device)
        lengths = torch.tensor(setup.lengths, device=setup.device)
        self.mask = (places < lengths[:, None]).long() if min(setup.lengths) < max(setup.lengths) else None
        dtype = AUTOCAST[config.train.precision]
        self.autocast = torch.autocast(setup.device.type, dtype or torch.bfloat16, enabled=dtype is not None)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "vocab.json")
            path.write_text(json.dumps({symbol: i for i, symbol in enumerate(LETTERS.symbols)}), encoding="utf-8")
            self.tokenizer = Wav2Vec2CTCTokenizer(str(path), pad_token="<s>", bos_token="<pad>")

    def step(self, number: int) -> tuple[Tensor, Tensor]:
        del number
        self.optimizer.zero_grad()
        with self.autocast:
            out = self.model(self.waveform, attention_mask=self.mask, labels=self.labels)
        loss = out.loss / len(self.waveform)
        loss.backward()
        limit = self.setup.config.optim.clip_grad_norm
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, limit or math.inf)
        self.optimizer.step()
        return loss.detach(), grad_norm

    def read(self) -> list[str]:
        self.model.eval()
        with torch.inference_mode(), self.autocast:
            best = self.model(self.waveform, attention_mask=self.mask).logits.argmax(-1).cpu()
        self.model.train()
        rows = [ids[: int(n)] for ids, n in zip(best, self.frames(), strict=True)]
        return [" ".join(text.split()) for text in self.tokenizer.batch_decode(rows)]

    def frames(self) -> Sequence[int]:
        geometry = cast("Any", self.setup.modality).geometry
        return [geometry.num_tokens(n) for n in self.setup.lengths]


def verify(args: argparse.Namespace) -> dict[str, float]:
    """Relative differences of loss and gradient norm without dropout in fp32. Raises SystemExit where they, or the
    texts, are not the same."""
    setup = Setup.of(args, *NO_DROPOUT, "train.precision=fp32", even=True)
    ours = D2V(setup)
    pairs = list(zip(ours.step(0), HuggingFace(setup, D2V(setup).network).step(0), strict=True))
    with torch.no_grad():
        ours.network.head.out.weight.mul_(20.0)  # so that letters stand out and texts are no blanks
        ours.network.head.out.bias[1:4] = -1e4  # symbols that no text has
    texts = ours.read(), HuggingFace(setup, ours.network).read()
    if texts[0] != texts[1] or not any(texts[0]):
        raise SystemExit(f"d2v and hf do not read the same text: {texts}")
    differences = [abs(a.item() - b.item()) / abs(a.item()) for a, b in pairs]
    print(f"same weights, relative difference: loss {differences[0]:.1e}, gradient norm {differences[1]:.1e}")
    if not max(differences) <= TOLERANCE:
        raise SystemExit(f"d2v and hf do not compute the same thing: {pairs}, allowed {TOLERANCE}")
    return {"loss": differences[0], "grad_norm": differences[1]}


def measure(setup: Setup, rounds: int) -> dict[str, Any]:
    ours = D2V(setup)
    contenders: list[D2V | HuggingFace] = [ours, HuggingFace(setup, ours.network)]
    work: dict[str, Callable[[D2V | HuggingFace, int], object]] = {
        "step": lambda one, number: one.step(number), "decoding": lambda one, number: one.read(),
    }  # fmt: skip
    for one in contenders:  # warm-up
        for run in work.values():
            run(one, 0)
    calibrations: list[dict[str, float]] = []
    times: dict[str, dict[str, list[float]]] = {name: {one.name: [] for one in contenders} for name in work}
    for number in range(rounds):
        calibrations.append(calibrate(setup.device, {setup.config.train.precision}))
        for name, run in work.items():
            for one in contenders if number % 2 == 0 else contenders[::-1]:
                times[name][one.name].append(seconds_of(setup.device, partial(run, one, 1 + number)))
        shown = [f"{name} {who} {t[-1]:.3f} s" for name, by in times.items() for who, t in by.items()]
        print(f"round {number + 1}/{rounds}  " + "  ".join(shown), flush=True)
    drift = max(max(c[key] for c in calibrations) / min(c[key] for c in calibrations) - 1.0 for key in calibrations[0])
    result: dict[str, Any] = {
        "calibration_gflops": calibrations, "calibration_drift": drift, "valid": drift <= MAX_DRIFT,
    }  # fmt: skip
    for name, by in times.items():
        result[name] = {
            "seconds": by, "median_s": {who: median(t) for who, t in by.items()},
            "audio_s_per_s": {who: setup.amount / median(t) for who, t in by.items()},
            "ratio_median": median(h / d for h, d in zip(by["hf"], by["d2v"], strict=True)),
            "ratio_min": min(by["hf"]) / min(by["d2v"]),
        }  # fmt: skip
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="base", help="of the network")
    parser.add_argument("--recipe", default="base_10m", help="of fine-tuning")
    parser.add_argument("--seconds", type=float, default=8.0, help="longest utterance; the shortest has 60 % of it")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further options of the network")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    verified = verify(args)
    setup = Setup.of(args)
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {"d2v": d2v_version, "torch": torch.__version__, "transformers": transformers_version},
        "cpu": cpu_model(), "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "arguments": {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()},
        "load_average": os.getloadavg(), "audio_s": setup.amount, "verified": verified,
    }  # fmt: skip
    result |= measure(setup, args.rounds)
    for name in ("step", "decoding"):
        one = result[name]
        print(f"{name}: hf / d2v {one['ratio_median']:.2f} (median of rounds), {one['ratio_min']:.2f} (minima)")
    if not result["valid"]:
        print(f"NOT VALID: the calibration moved by {result['calibration_drift']:.0%}; the machine was busy")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if all(result[name]["ratio_median"] >= 1.0 for name in ("step", "decoding")) else 1


if __name__ == "__main__":
    sys.exit(main())
