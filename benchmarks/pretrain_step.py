"""Time of one whole pre-training step of d2v beside the same step made of public parts.

    python benchmarks/pretrain_step.py --suite --data /LibriSpeech         # the whole table for audio, JSON with --out
    python benchmarks/pretrain_step.py --suite --device cuda --data /LibriSpeech
    python benchmarks/pretrain_step.py --preset base                       # CPU, one thread, fp32, 8 s of audio
    python benchmarks/pretrain_step.py --preset base --device cuda --dtype bf16 --batch 64 --compile
    python benchmarks/pretrain_step.py --preset tiny                       # log-mel: d2v alone, no peer has it
    python benchmarks/pretrain_step.py --modality vision                   # 8 images of 224 x 224
    python benchmarks/pretrain_step.py --modality text                     # 4 blocks of 512 tokens
    python benchmarks/pretrain_step.py --modality text --shortest 0.25     # of 128 to 512 tokens, padded

A step is student and teacher forward, backward, gradient norm, optimizer and teacher update. `d2v` is the product's own
step (`d2v_core.trainer.Updater`). `hf` is what a user writes with the classes of transformers (SDPA attention).
  audio   `Data2VecAudioModel`: a deep copy as teacher that runs on the whole waveform, forward hooks for the
          feed-forward outputs, `torch.optim.AdamW` as it comes, a Python loop for the moving average (hf_peer.py).
  vision  `Data2VecVisionModel`: a deep copy as teacher, whose hidden states are the targets (hf_vision_text.py).
  text    `Data2VecTextModel`: the same with forward hooks for the feed-forward outputs. In vision and text the peer has
          fused AdamW, `foreach` moving averages, and computes targets and predictions at scored places only.
`hubert` is one step of torchaudio's HuBERT Base, of the same sizes, which has no teacher to run (hubert_peer.py).
Both have the same sizes, dropout, inputs and masks; layer drop is off, so that both always do all layers. Before
timing, d2v's weights are put into the peer, and loss and gradient norm must agree; in vision and text over some steps
of training, in which the loss must fall.

--suite is everything that docs/performance.md says about audio, in one run: all contenders of a setting take turns in
one process, in fp32 and bf16 (on a GPU: bf16, with and without torch.compile); data2vec 2.0 with 8 masks; the memory of
each; the padding of an epoch (data_path.py); and, with --data, how long the trainer waits for its loader on real files.
It ends with the goals and whether they were met. Parts are measured one after the other, and --out is written after
each: what fails is told in it under `failed`, and the others are measured all the same. Give it a quiet machine, with
5 GiB of memory free for each process of the memory's.

How to read the numbers
  seconds      process CPU time on a CPU (does not grow when others use the machine, but caches are shared), wall time
               between synchronisations on a GPU. Contenders take turns within each round.
  ratio        hf / d2v: median over rounds of the ratio within a round, and ratio of the minima. Trust ratios; seconds
               differ from machine to machine.
  of peak      analytic FLOPs of d2v's step (the same for both: what the peer does beyond them, as its teacher's second
               pass through the front end, is not useful work) / min seconds / fastest matrix product measured in the
               same run. On a GPU with bf16 this is the model FLOP utilisation against a measured, not a printed, peak.
  steady       wall seconds of the first steps that are slower than 1.1 times the median of the later ones: allocation,
               choice of kernels, compilation.
  calibration  GFLOP/s of 1024^3 (GPU: 8192^3) matrix products before each round. `mm` is what torch.mm takes; `onednn`
               (fp32 on a CPU) is the kernel that torch.mm leaves unused there. If it moves by more than 15 % between
               rounds, the machine was too busy: "valid" is false, and --strict exits with 3.
  memory       peak of a fresh process that makes two steps, less that of one that imports the same and builds nothing;
               on a GPU the peak of torch's allocator. One process at a time, each started when 5 GiB are free.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
import torchaudio
from data_path import loader_wait, padding_waste
from hf_peer import HuggingFace, has_peer
from hf_vision_text import TextPeer, VisionPeer, has_text_peer, has_vision_peer
from hubert_peer import Hubert
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import __version__ as transformers_version  # pyright: ignore[reportMissingImports]

from d2v_core import __version__ as d2v_version
from d2v_core.config import RunConfig, load_config
from d2v_core.contract import Batch, Layout, Modality
from d2v_core.counting import flops_of
from d2v_core.data2vec import Data2Vec
from d2v_core.loop import AUTOCAST
from d2v_core.plan import memory_of as memory_of_device
from d2v_core.run import build_model
from d2v_core.trainer import Updater

NO_DROPOUT = ("model.dropout=0", "model.attention_dropout=0", "model.activation_dropout=0", "model.drop_path=0")
CONSTANT_LR = ("optim.schedule=constant", "optim.warmup_ratio=0", "optim.lr=1e-4")
VERIFY_STEPS = 5
TOLERANCE = 1e-4
MAX_DRIFT = 0.15
NEEDED_MEMORY, PATIENCE_S = 5 << 30, 600  # bytes; seconds
STEADY = 1.1
PASSED = ("modality", "preset", "encoder", "seconds", "batch", "shortest", "threads", "device", "dtype")
NUM_MASKS = 8
BATCH = {"audio": 1, "vision": 8, "text": 4}
AMOUNT = {"audio": "audio_s", "vision": "images", "text": "tokens"}
UNIT = {"audio": "audio-s", "vision": "images", "text": "tokens"}
VOCABULARY = 50265  # of the official text models
# A small network behind the raw waveform's full front end, which is most of its step.
SMALL_RAW = ("model.embed_dim=384", "model.num_layers=6", "model.num_heads=6", "target.top_k_layers=4")


@dataclass
class Setup:
    """One configuration and one batch, for all contenders."""

    config: RunConfig
    modality: Modality[Any]
    device: torch.device
    batch: Batch
    compile: bool

    @classmethod
    def of(cls, args: argparse.Namespace, *overrides: str, small: bool = False) -> Setup:
        """small: at most 2 s of audio, or two samples, for what need not be timed."""
        values = {"modality": args.modality, "preset": args.preset, "model.layer_drop": "0"}
        values |= {"train.device": args.device, "train.precision": args.dtype}
        if args.preset == "base2":
            values |= {"train.num_masks": str(NUM_MASKS), "prenet.layer_drop": "0"}
        if args.modality == "audio":
            values["encoder"] = args.encoder
        if args.modality == "text":
            values["embedding.vocab_size"] = str(VOCABULARY)
        values |= dict(word.split("=", 1) for word in [*args.set, *overrides])
        config, kind = load_config([f"{key}={value}" for key, value in values.items()])
        modality: Any = kind(config)
        rows = args.batch or BATCH[args.modality]
        if args.modality == "audio":
            inputs, layouts = audio_inputs(modality, rows, min(args.seconds, 2.0) if small else args.seconds)
        elif args.modality == "vision":
            inputs, layouts = vision_inputs(modality, min(rows, 2) if small else rows)
        else:
            inputs, layouts = text_inputs(modality, min(rows, 2) if small else rows, args.shortest)
        rngs = [np.random.default_rng(i) for i in range(len(layouts))]
        masks = modality.masking()(layouts, config.train.num_masks, rngs)
        device = torch.device(args.device)
        return cls(config, modality, device, Batch(inputs, masks).to(device), args.compile)

    @property
    def amount(self) -> float:
        """In AMOUNT's unit; of several masked copies each counts."""
        return self.modality.amount(self.batch.inputs) * self.config.train.num_masks


def audio_inputs(modality: Any, rows: int, seconds: float) -> tuple[Mapping[str, Tensor], list[Layout]]:
    num_samples = round(seconds * modality.data.sample_rate)
    waveform = torch.randn(rows, num_samples, generator=torch.Generator().manual_seed(0))
    return {"waveform": waveform}, [Layout((modality.geometry.num_tokens(num_samples),))] * rows


def vision_inputs(modality: Any, rows: int) -> tuple[Mapping[str, Tensor], list[Layout]]:
    size = modality.data.image_size
    image = torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(0))
    return {"image": image}, [Layout(modality.grid)] * rows


def text_inputs(modality: Any, rows: int, shortest: float) -> tuple[Mapping[str, Tensor], list[Layout]]:
    """Random symbols; lengths evenly spread from `shortest` times the longest to the longest."""
    longest = modality.data.block_tokens
    lengths = np.linspace(round(shortest * longest), longest, rows).round().astype(int) if rows > 1 else [longest]
    rng = np.random.default_rng(0)
    samples = [rng.integers(4, modality.vocabulary.size - 1, length) for length in lengths]
    return modality.collate(samples), [modality.layout(sample) for sample in samples]


class D2V:
    """The product's own step."""

    name = "d2v"

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.model = build_model(setup.modality).to(setup.device).train()
        self.updater = Updater(self.model, setup.config, setup.device)
        self.dtype = self.updater.dtype
        if setup.compile:  # as d2v_core.loop.Loop.fit does
            for part in (self.model.student.transformer, cast("Any", self.model.teacher.module).transformer):
                for block in part.blocks:
                    block.compile()

    def step(self, number: int) -> tuple[Tensor, Tensor]:
        self.updater.dtype = self.dtype
        result = self.updater.update(number, [self.setup.batch], self.setup.modality.teacher_inputs)
        return result.loss, result.grad_norm


Contender = D2V | HuggingFace | Hubert | VisionPeer | TextPeer
PEERS = {"audio": HuggingFace, "vision": VisionPeer, "text": TextPeer}
HAS_PEER = {"audio": has_peer, "vision": has_vision_peer, "text": has_text_peer}


@dataclass
class Case:
    """One line of a table. kind: d2v, hf or hubert. args: as `parse` gives them."""

    name: str
    kind: str
    args: argparse.Namespace

    @classmethod
    def of(cls, name: str, kind: str, args: argparse.Namespace, **changes: Any) -> Case:
        return cls(name, kind, argparse.Namespace(**{**vars(args), **changes}))

    @property
    def network(self) -> str:
        """Equal for cases that differ in nothing but the precision, and so can share weights and optimizer."""
        return repr((self.kind, sorted((k, str(v)) for k, v in vars(self.args).items() if k != "dtype")))

    def contender(self) -> tuple[Setup, Contender]:
        setup = Setup.of(self.args)
        if self.kind == "d2v":
            return setup, D2V(setup)
        peer = Hubert if self.kind == "hubert" else PEERS[setup.modality.name]
        return setup, peer(setup.config, setup.batch, setup.compile)


def verify(args: argparse.Namespace) -> dict[str, Any]:
    """With equal weights and no dropout, in fp32: the largest relative differences of loss and gradient norm, and the
    losses. Stops where the two do not compute the same thing, or do not learn.
    """
    steps = 1 if args.modality == "audio" else VERIFY_STEPS  # the peer for audio has no schedule
    setup = Setup.of(args, *NO_DROPOUT, *(CONSTANT_LR if steps > 1 else ()), "train.precision=fp32", small=True)
    setup.compile = False
    d2v = D2V(setup)
    if steps > 1:
        perturb(d2v.model)
    peer = PEERS[args.modality](setup.config, setup.batch, False, d2v.model)
    counts = [sum(p.numel() for p in parameters) for parameters in (d2v.updater.parameters, peer.parameters)]
    if steps > 1 and counts[0] != counts[1]:
        raise SystemExit(f"d2v trains {counts[0]} numbers and hf {counts[1]}")
    values = [[[x.item() for x in one.step(number)] for one in (d2v, peer)] for number in range(steps)]
    differences = [max(abs(ours[i] - theirs[i]) / abs(ours[i]) for ours, theirs in values) for i in range(2)]
    result: dict[str, Any] = {"loss": differences[0], "grad_norm": differences[1]}
    if steps > 1:
        result |= {
            "parameters": counts[0],
            "losses": {n: [v[i][0] for v in values] for i, n in enumerate(("d2v", "hf"))},
        }
    print(f"same weights, relative difference: loss {differences[0]:.1e}, gradient norm {differences[1]:.1e}")
    if not max(differences) <= TOLERANCE:
        raise SystemExit(f"d2v and hf do not compute the same thing: {result}, allowed {TOLERANCE}")
    if steps > 1 and not all(losses[-1] < losses[0] for losses in result["losses"].values()):
        raise SystemExit(f"the loss does not fall on a fixed batch: {result['losses']}")
    return result


@torch.no_grad()
def perturb(model: Data2Vec) -> None:
    """Add noise to all weights: at first some tables are zero and some scales almost zero, and would hide faults."""
    generator = torch.Generator().manual_seed(0)
    for part in (model.student, model.predictor):
        for parameter in part.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device)
    model.update_teacher(0.0)


def step_flops(setup: Setup) -> dict[str, float]:
    """FLOPs of d2v's step by part; a multiply-add is 2. Matrix products and convolutions only, padding included.

    Backward costs twice the forward, but for the first layer, whose input needs no gradient.
    """
    model, masks = setup.config.model, setup.batch.masks
    assert masks is not None
    dim, scored = model.embed_dim, len(masks.scored_rows)
    place, head = 0.0, 2.0 * dim * dim * scored
    rows, length = masks.hidden.shape[0], masks.hidden.shape[2]
    if setup.modality.name == "audio":
        front_end, place = audio_flops(setup)
    elif setup.modality.name == "vision":  # the teacher has an embedding of its own
        front_end = (2 + 1) * 2.0 * 3 * cast("Any", setup.modality).features.patch_size ** 2 * dim * rows * length
        length += 1
    else:
        front_end = 0.0
        layers = cast("Any", setup.modality).head.layers
        if layers > 1:  # D -> 2D -> ... -> 2D -> D
            head = 2.0 * (2 * dim * 2 * dim + (layers - 2) * (2 * dim) ** 2) * scored

    def blocks(rows: int, length: int) -> float:
        linears = 2.0 * (4 * dim**2 + 2 * dim * int(dim * model.mlp_ratio)) * rows * length
        return model.num_layers * (linears + 4.0 * rows * length * length * dim)

    teacher = place + blocks(rows, length)
    copies, seen = masks.num_copies, length if masks.visible is None else masks.visible.shape[2]
    if masks.visible is not None:
        head = decoder_flops(setup)
    student = 3 * (copies * place + blocks(rows * copies, seen) + head)
    return {"front_end": front_end, "student": student, "teacher": teacher, "total": front_end + student + teacher}


def decoder_flops(setup: Setup) -> float:
    """2.0's head for audio, forwards: grouped convolutions at all places of every copy, one map at the scored ones."""
    config, masks = cast("Any", setup.config.sections["decoder"]), setup.batch.masks
    assert masks is not None and config.projection_layers == 1
    widths = [setup.config.model.embed_dim, *[config.dim] * config.layers]
    taps = sum(config.kernel * a // config.groups * b for a, b in pairwise(widths))
    return 2.0 * taps * masks.hidden.numel() + 2.0 * config.dim * widths[0] * len(masks.scored_rows)


def audio_flops(setup: Setup) -> tuple[float, float]:
    """(front end forwards and backwards, positions forwards)."""
    sections = cast("dict[str, Any]", setup.config.sections)
    features, positions, dim = sections["features"], sections["positions"], setup.config.model.embed_dim
    waveform, masks = setup.batch.inputs["waveform"], setup.batch.masks
    assert masks is not None
    rows, length = waveform.shape
    front: list[float] = []
    mel = 0.0
    if setup.config.encoder == "waveform":
        channels = 1
        for kernel, stride in zip(features.kernels, features.strides, strict=True):
            length = (length - kernel) // stride + 1
            front.append(2.0 * kernel * channels * features.channels * length * rows)
            channels = features.channels
        tokens = rows * length
    else:
        geometry = cast("Any", setup.modality).geometry
        bins = 2 ** math.ceil(math.log2(geometry.window)) // 2 + 1
        mel = 2.0 * bins * features.num_mels * geometry.num_windows(length) * rows  # no gradient goes there
        length = masks.hidden.shape[2]
        tokens, channels = rows * length, dim
        front.append(2.0 * max(3, features.stride) * features.num_mels * dim * tokens)
    project = 2.0 * channels * dim * tokens
    kernel = max(3, positions.width // positions.depth)
    place = positions.depth * 2.0 * dim * (dim // positions.groups) * kernel * tokens
    return 3 * (sum(front) + project) - front[0] + mel, place


class CountFlops(TorchDispatchMode):
    """torch's own counter follows modules too and trips over the teacher's; this one only adds up."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += flops_of(func, args, kwargs or {}, out)
        return out


def check_flops(args: argparse.Namespace) -> float:
    """Counted / analytic FLOPs, with attention as plain products so that the counter sees them."""
    setup = Setup.of(args, *NO_DROPOUT, small=True)
    d2v = D2V(setup)
    with CountFlops() as counter, sdpa_kernel(SDPBackend.MATH):
        d2v.step(0)
    return counter.total / step_flops(setup)["total"]


def seconds_of(device: torch.device, run: Callable[[], object]) -> float:
    """Process CPU time of `run`, or on a GPU wall time until it is done."""
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def calibrate(device: torch.device, precisions: set[str]) -> dict[str, float]:
    """GFLOP/s of square matrix products by kernel, the best of a few."""
    size = 1024 if device.type == "cpu" else 8192
    rates: dict[str, float] = {}
    kinds = {f"mm_{name}": AUTOCAST[name] or torch.float32 for name in sorted({"fp32", *precisions})}
    runs: dict[str, Callable[[], object]] = {}
    for name, dtype in kinds.items():
        matrix = torch.randn(size, size, device=device, dtype=dtype)
        runs[name] = lambda matrix=matrix: matrix @ matrix
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        linear = torch.ops.mkldnn._linear_pointwise
        matrix = torch.randn(size, size)
        runs["onednn_fp32"] = lambda matrix=matrix: linear(matrix, matrix, None, "none", [], "")
    for name, run in runs.items():
        run()
        times = [seconds_of(device, lambda run=run: [run() for _ in range(4)]) / 4 for _ in range(5)]
        rates[name] = 2.0 * size**3 / min(times) / 1e9
    return rates


def measure(cases: list[Case], rounds: int) -> dict[str, Any]:
    """Calibrate, then let every contender make a step; so many times.

    fp32 and bf16 of one contender are one network with and without autocast, to save memory.
    """
    device = torch.device(cases[0].args.device)
    networks: dict[str, tuple[Setup, Contender]] = {}
    ready: dict[str, tuple[Setup, Contender, torch.dtype | None]] = {}
    for case in cases:
        if case.network not in networks:
            networks[case.network] = case.contender()
        ready[case.name] = (*networks[case.network], AUTOCAST[case.args.dtype])

    def step(name: str, number: int) -> None:
        _, one, one.dtype = ready[name]
        one.step(number)

    first: dict[str, list[float]] = {name: [] for name in ready}
    warm_up = 2 if device.type == "cpu" else 10  # optimizer state, kernel caches, compilation
    for number in range(warm_up):
        for name in ready:
            start = time.perf_counter()
            step(name, number)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            first[name].append(time.perf_counter() - start)
    calibrations: list[dict[str, float]] = []
    times: dict[str, list[float]] = {name: [] for name in ready}
    for number in range(rounds):
        calibrations.append(calibrate(device, {case.args.dtype for case in cases}))
        for name in list(ready) if number % 2 == 0 else list(ready)[::-1]:
            times[name].append(seconds_of(device, partial(step, name, warm_up + number)))
        print(f"round {number + 1}/{rounds}  " + "  ".join(f"{n} {t[-1]:.3f} s" for n, t in times.items()), flush=True)
    drift = max(max(c[key] for c in calibrations) / min(c[key] for c in calibrations) - 1.0 for key in calibrations[0])
    result: dict[str, Any] = {
        "calibration_gflops": calibrations, "calibration_drift": drift, "valid": drift <= MAX_DRIFT, "contenders": {},
    }  # fmt: skip
    for case in cases:
        values, setup, middle = times[case.name], ready[case.name][0], median(times[case.name])
        row: dict[str, Any] = {
            "kind": case.kind, "dtype": case.args.dtype, "compile": case.args.compile, "preset": case.args.preset,
            "amount": setup.amount, "seconds": values, "min_s": min(values), "median_s": middle,
            f"{AMOUNT[setup.modality.name]}_per_s": setup.amount / middle,
        }  # fmt: skip
        if device.type == "cuda":
            row["steady_after_s"] = sum(s for s in first[case.name] if s > STEADY * middle)
        if case.kind != "hubert":
            flops = step_flops(setup)
            peak = max(value for c in calibrations for key, value in c.items() if key.endswith(case.args.dtype))
            row |= {"step_gflop": {part: value / 1e9 for part, value in flops.items()}, "peak_gflops": peak}
            row["of_peak"] = flops["total"] / 1e9 / middle / peak
        result["contenders"][case.name] = row
    return result


def ratio(result: dict[str, Any], slow: str, fast: str) -> float:
    """Median over rounds of the ratio within a round."""
    rows = result["contenders"]
    return median(a / b for a, b in zip(rows[slow]["seconds"], rows[fast]["seconds"], strict=True))


def peak_memory(case: Case | None, device: torch.device) -> int:
    """Bytes that this process has taken at most after two steps of one contender; None builds nothing."""
    if case is not None:
        one = case.contender()[1]
        for number in range(2):
            one.step(number)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # not ru_maxrss, which on Linux begins with what the parent process had
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_of(cases: list[Case], done: Callable[[dict[str, float]], None] = lambda found: None) -> dict[str, float]:
    """MiB by contender, each in a process of its own, less what a process takes that builds nothing. done: told what
    there is after each."""

    def measured(kind: str, args: argparse.Namespace) -> int:
        await_memory()
        words = [f"--{key}={getattr(args, key)}" for key in PASSED if getattr(args, key) not in (None, "")]
        words += ["--compile"] if args.compile else []
        command = [sys.executable, __file__, *words, "--memory", "--only", kind, "--set", *args.set]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        if run.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {run.returncode}: {run.stderr[-2000:]}")
        return int(run.stdout.split()[-1])

    nothing = measured("none", cases[0].args)
    found: dict[str, float] = {}
    for case in cases:
        found[case.name] = (measured(case.kind, case.args) - nothing) / 2**20
        print(f"peak memory, {case.name}: {found[case.name]:.0f} MiB", flush=True)
        done(found)
    return found


def await_memory() -> None:
    """Wait until NEEDED_MEMORY is free, for a process that swaps or is killed tells nothing."""
    for _ in range(PATIENCE_S // 10):
        memory = memory_of_device(torch.device("cpu"))
        if memory is None or memory.free >= NEEDED_MEMORY:
            return
        time.sleep(10)
    raise RuntimeError(f"{NEEDED_MEMORY / 2**30:.0f} GiB of memory have not been free for {PATIENCE_S} s")


def suite(args: argparse.Namespace) -> dict[str, list[Case]]:
    """The settings for audio and who takes part. On a GPU in bf16 only, with and without compilation, in larger
    batches."""
    on_cpu = args.device == "cpu"

    def both(name: str, kind: str, dtypes: tuple[str, ...] = ("fp32", "bf16"), **changes: Any) -> list[Case]:
        if on_cpu:
            return [Case.of(f"{name} {dtype}", kind, args, dtype=dtype, **changes) for dtype in dtypes]
        return [
            Case.of(f"{name} bf16{' compiled' * compile}", kind, args, dtype="bf16", compile=compile, **changes)
            for compile in (False, True)
        ]

    base = {"preset": "base", "batch": args.batch or (1 if on_cpu else 32)}
    small = {
        "preset": "base",
        "set": [*args.set, *SMALL_RAW],
        "batch": args.batch or (2 if on_cpu else 64),
        "seconds": 5.0,
    }
    masked = {**base, "preset": "base2", "batch": base["batch"] if on_cpu else max(1, base["batch"] // 4)}
    return {
        "base": [
            *both("d2v", "d2v", **base), *both("hf", "hf", **base), *both("hubert", "hubert", **base),
            *both(f"d2v 2.0, {NUM_MASKS} masks", "d2v", ("bf16",), **masked),
        ],
        "small": [*both("d2v", "d2v", **small), *both("hf", "hf", ("fp32",), **small)],
    }  # fmt: skip


def goals_of(result: dict[str, Any]) -> dict[str, tuple[float, str, float]]:
    """On a CPU: what was found, `>=` or `<=`, and the goal, of all that has been measured."""
    goals: dict[str, tuple[float, str, float]] = {}
    masked = f"d2v 2.0, {NUM_MASKS} masks bf16"
    base, small = result.get("base", {}), result.get("small", {})
    if rows := base.get("contenders"):
        goals |= {
            "Base fp32, times hf fp32": (ratio(base, "hf fp32", "d2v fp32"), ">=", 1.4),
            "Base bf16, times hf fp32": (ratio(base, "hf fp32", "d2v bf16"), ">=", 2.8),
            "Base fp32, times HuBERT fp32": (ratio(base, "hubert fp32", "d2v fp32"), ">=", 2.0),
            "Base bf16, times HuBERT fp32": (ratio(base, "hubert fp32", "d2v bf16"), ">=", 2.0),
            f"2.0, {NUM_MASKS} masks, bf16: masked-view s per CPU s, times hf fp32": (
                ratio(base, "hf fp32", masked) * rows[masked]["amount"] / rows["hf fp32"]["amount"], ">=", 6.0
            ),
        }  # fmt: skip
    if "contenders" in small:
        goals |= {
            "small fp32, times hf fp32": (ratio(small, "hf fp32", "d2v fp32"), ">=", 1.5),
            "small bf16, times hf fp32": (ratio(small, "hf fp32", "d2v bf16"), ">=", 3.0),
        }
    for form, share in result.get("padding_waste", {}).items():
        goals[f"padding waste, {form}"] = (share, "<=", 0.02)
    for name, row in result.get("loader_wait", {}).items():
        goals[f"loader wait, {name}"] = (row["share"], "<=", 0.02)
    memory = base.get("peak_memory_mib", {})
    for ours, theirs in (("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")):
        if {f"d2v {ours}", f"hf {theirs}"} <= memory.keys():
            share = memory[f"d2v {ours}"] / memory[f"hf {theirs}"]
            goals[f"peak memory {ours}, of hf {theirs}"] = (share, "<=", 0.8)
    return goals


def run_suite(args: argparse.Namespace, result: dict[str, Any], save: Callable[[], None]) -> None:
    """Into `result`, part by part; `save` is called after each."""
    result |= {"failed": {}, "wall_s": {}}

    def part(name: str, measured: Callable[[], object]) -> None:
        print(f"\n{name}:", flush=True)
        start = time.perf_counter()
        try:
            measured()
        except (Exception, SystemExit) as error:  # the other parts are worth having
            traceback.print_exc()
            result["failed"][name] = f"{type(error).__name__}: {error}"
        result["wall_s"][name] = time.perf_counter() - start
        save()

    def waste() -> None:
        result["padding_waste"] = padding_waste()
        print(", ".join(f"{form} {share:.2%}" for form, share in result["padding_waste"].items()))

    def wait() -> None:
        if not args.data:
            raise SystemExit("the loader's wait is measured on real files; give --data")
        result["loader_wait"] = loader_wait(args.data, args.device, print)

    part("padding waste", waste)
    for name, cases in suite(args).items():
        row = result[name] = {"valid": False}

        def memory(row: dict[str, Any] = row, cases: list[Case] = cases) -> None:
            def done(found: dict[str, float]) -> None:
                row["peak_memory_mib"] = found
                save()

            memory_of(cases, done)

        def timing(row: dict[str, Any] = row, cases: list[Case] = cases) -> None:
            row.update(measure(cases, args.rounds))
            report(row, args)

        def same_loss(row: dict[str, Any] = row, cases: list[Case] = cases) -> None:
            row["verified"] = verify(cases[0].args)

        if not args.no_verify:
            part(f"{name}, same loss", same_loss)
        if not args.no_memory:
            part(f"{name}, memory", memory)
        part(f"{name}, time", timing)
    part("loader wait", wait)
    result["valid"] = not result["failed"] and all(result[name]["valid"] for name in suite(args))
    if args.device == "cpu":
        result["goals"] = goals_of(result)
        print()
        for name, (found, sign, goal) in result["goals"].items():
            met = found >= goal if sign == ">=" else found <= goal
            print(f"{'met' if met else 'MISSED':7} {name}: {found:.3g}, goal {sign} {goal:g}")
    for name, reason in result["failed"].items():
        print(f"FAILED  {name}: {reason}")
    if not result["valid"]:
        print("This run does not count: a part failed, or the machine was too busy.")
    save()


def report(result: dict[str, Any], args: argparse.Namespace) -> None:
    """One line per contender."""
    for name, row in result["contenders"].items():
        memory = result.get("peak_memory_mib", {}).get(name)
        print(
            f"{name:22} min {1000 * row['min_s']:.0f} ms  median {1000 * row['median_s']:.0f} ms  "
            f"{row[AMOUNT[args.modality] + '_per_s']:.2f} {UNIT[args.modality]}/s"
            + (f"  {row['of_peak']:.0%} of {row['peak_gflops']:.0f} GFLOP/s" if "of_peak" in row else "")
            + (f"  {memory:.0f} MiB" if memory else "")
            + (f"  steady after {row['steady_after_s']:.1f} s" if "steady_after_s" in row else "")
        )
    if not result["valid"]:
        print(f"NOT VALID: the calibration moved by {result['calibration_drift']:.0%}; the machine was busy")


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modality", default="audio", choices=("audio", "vision", "text"))
    parser.add_argument("--suite", action="store_true", help="every setting of audio in one run")
    parser.add_argument("--data", type=Path, help="of the suite: folder of audio files, to see the loader's wait")
    parser.add_argument("--preset", default="base", choices=("tiny", "base", "base2", "large"))
    parser.add_argument("--encoder", default="", help="of audio; empty = the preset's; waveform or logmel")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each clip of audio")
    parser.add_argument("--batch", type=int, help=f"clips, images or blocks of text; {BATCH}")
    parser.add_argument(
        "--shortest", type=float, default=1.0, help="of text: shortest block over the longest; below 1 there is padding"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks of both sides")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further options of d2v")
    parser.add_argument("--only", choices=("d2v", "hf", "hubert", "none"), help="one contender")
    parser.add_argument("--memory", action="store_true", help="print peak bytes of --only and stop")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory processes out")
    parser.add_argument("--no-verify", action="store_true", help="leave the comparison of losses out")
    parser.add_argument("--check-flops", action="store_true", help="compare the FLOP formula with a counter and stop")
    parser.add_argument("--strict", action="store_true", help="exit with 3 if the machine was too busy")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    if args.memory:
        case = None if args.only == "none" else Case(args.only, args.only, args)
        print(peak_memory(case, torch.device(args.device)))
        return 0
    if args.check_flops:
        found = check_flops(args)
        print(f"counted / analytic FLOPs: {found:.4f}")
        return 0 if abs(found - 1) < 0.01 else 1
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {
            "d2v": d2v_version, "torch": torch.__version__, "torchaudio": torchaudio.__version__,
            "transformers": transformers_version, "python": platform.python_version(),
        },
        "cpu": cpu_model(), "gpu": torch.cuda.get_device_name() if args.device == "cuda" else None,
        "arguments": {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()},
        "load_average": os.getloadavg(),
    }  # fmt: skip

    def save() -> None:
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    if args.suite:
        run_suite(args, result, save)
        if result["failed"]:
            return 1
    else:
        setup = Setup.of(args)
        names = [args.only] if args.only else ["d2v", "hf"] if HAS_PEER[args.modality](setup.config) else ["d2v"]
        cases = [Case(name, name, args) for name in names]
        result[AMOUNT[args.modality]] = setup.amount
        if "hf" in names and not args.no_verify:
            result["verified"] = verify(args)
        if not args.no_memory:
            result["peak_memory_mib"] = memory_of(cases)
        result |= measure(cases, args.rounds)
        report(result, args)
        if len(names) == 2:
            result["ratio_median"] = ratio(result, "hf", "d2v")
            print(f"hf / d2v: {result['ratio_median']:.2f} (median of rounds)")
        save()
    return 3 if args.strict and not result["valid"] else 0


if __name__ == "__main__":
    sys.exit(main())
