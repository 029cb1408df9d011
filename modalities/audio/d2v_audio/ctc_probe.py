"""`d2v ctc-probe RUN path=...`: how much spelling a linear map can read off a run's frozen features.

One linear layer per layer of the network is trained with CTC on letters; the layer is chosen on the dev part; the
letter error rate on the test part is reported for the run's network, for the same network untrained and for the
log-mel input. No language model, greedy decoding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d2v_core.config import opt, options
from d2v_core.ctc import NOTHING, Emissions, ctc_loss, greedy, padded, sequences, symbol_errors
from d2v_core.errors import UserError
from d2v_core.keyed import generator, seed_of
from d2v_core.objectives import fit_linear

HELP = """d2v ctc-probe RUN path=TABLE.tsv [key=value ...]

Trains a linear CTC layer on the frozen features of a run and prints letter error rates.
RUN is a run folder; TABLE.tsv has columns file, transcript, split and, if you like, speaker; or path is a folder in
the LibriSpeech layout, with train, dev and test naming its sub-folders. Writes RUN/ctc_probe.json.

Options, with their defaults:
"""


@dataclass
class CTCProbeConfig:
    """What the probe is trained and tested on."""

    path: str = opt("", "Table or folder with transcripts.")
    train: str = opt("train", "Split (or sub-folder) to train the linear layer on.")
    dev: str = opt("dev", "Split that chooses the layer of the network.")
    test: str = opt("test", "Split that is scored.")
    minutes: float | None = opt(None, "Use only this much of the training part, drawn at random; null = all.")
    steps: int = opt(600, "Updates of the linear layer.")
    batch: int = opt(16, "Utterances per update.")
    lr: float = opt(1e-2, "Peak learning rate of Adam; falls linearly to 0.")
    seed: int = opt(0, "Of the subset and of the order.")
    baselines: bool = opt(True, "Score the untrained network and the log-mel input too.")
    out: str | None = opt(None, "Result file; null = ctc_probe.json in the run folder.")


@dataclass(frozen=True)
class Utterance:
    """Frozen features, one (T, F) float32 tensor per layer, and the letters to be read from them."""

    layers: Sequence[Tensor]
    letters: Tensor


Encode = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]
Part = Sequence[tuple[Mapping[str, Tensor], str]]


def main(argv: Sequence[str]) -> int:
    """The verb. Returns the exit status."""
    words = list(argv)
    if not words or {"-h", "--help"} & set(words):
        defaults = CTCProbeConfig.__dataclass_fields__.values()
        for f in defaults:
            value = "" if f.default in (None, "") else f"={f.default}"
            print(f"{HELP if f.name == 'path' else ''}  {f.name}{value}: {f.metadata['doc']}")
        return 0
    if "=" in words[0] and not Path(words[0]).is_dir():
        raise UserError(f"ctc-probe needs the run folder first: d2v ctc-probe RUN {' '.join(words)}")
    run, config = Path(words[0]), options(CTCProbeConfig, words[1:], "ctc-probe")
    if not config.path:
        raise UserError("ctc-probe needs path=TABLE.tsv (or a folder) with transcripts.")
    if config.steps < 1 or config.batch < 1 or not config.lr > 0 or not (config.minutes is None or config.minutes > 0):
        raise UserError(
            f"ctc-probe: steps={config.steps} and batch={config.batch} must be at least 1, lr={config.lr} and "
            f"minutes={config.minutes} above 0."
        )
    out = Path(config.out) if config.out else run / "ctc_probe.json"
    if run.is_dir() and not out.parent.is_dir():  # asked for now, not after the work
        raise UserError(f"ctc-probe: out={out} cannot be written, {out.parent} is no folder. Make it first.")
    results = ctc_probe(run, config)
    from rich.console import Console
    from rich.table import Table

    from d2v_core.metrics import write_json

    try:
        write_json(out, results)
    except OSError as error:
        raise UserError(f"ctc-probe: out={out} cannot be written: {error.strerror}.") from error
    table = Table(title="Letter error rate of a linear CTC layer on frozen features, %", title_justify="left")
    for heading in ("features", "dev", "test", "layer"):
        table.add_column(heading, justify="left" if heading == "features" else "right")
    for row in results["rows"]:
        table.add_row(row["system"], f"{row['dev']:.1f}", f"{row['test']:.1f}", str(row["layer"]))
    Console().print(table)
    return 0


def ctc_probe(run: Path, config: CTCProbeConfig) -> dict[str, Any]:
    """Train and score; returns what goes into the result file. Raises UserError for data that cannot serve."""
    import d2v_core
    from d2v_audio.data import input_bands
    from d2v_audio.modality import AudioModality
    from d2v_core.run import LoadedRun

    pretrained = d2v_core.load(run)
    modality = pretrained.modality
    if not isinstance(modality, AudioModality):
        raise UserError(f"{run} is a run of modality {modality.name!r}; ctc-probe needs audio.")
    parts = {name: _read(modality, config, getattr(config, name)) for name in ("train", "dev", "test")}
    if config.minutes is not None:
        parts["train"] = _subset(parts["train"], config.minutes, modality.data.sample_rate, config.seed)
    alphabet = sorted({letter for _, text in parts["train"] for letter in text})
    systems: dict[str, Encode] = {"pretrained": pretrained.encode}
    if config.baselines:
        systems["untrained"] = d2v_core.load(run, untrained=True).encode
        systems["log-mel input"] = lambda inputs: [input_bands(modality, inputs)]
    rows: list[dict[str, Any]] = []
    began = time.perf_counter()
    for system, encode in systems.items():
        data = {
            name: [_utterance(encode, inputs, text, alphabet) for inputs, text in part] for name, part in parts.items()
        }
        heads = _train(data["train"], len(alphabet) + 1, config)
        dev = [_error_rate(head, data["dev"], layer) for layer, head in enumerate(heads)]
        best = int(np.argmin(dev))
        rows.append(
            {
                "system": system,
                "layer": best,
                "dev": round(dev[best], 2),
                "test": round(_error_rate(heads[best], data["test"], best), 2),
                "dev_per_layer": [round(rate, 2) for rate in dev],
            }
        )
    minutes = {
        name: round(sum(inputs["waveform"].shape[1] for inputs, _ in part) / modality.data.sample_rate / 60, 2)
        for name, part in parts.items()
    }
    assert isinstance(pretrained, LoadedRun)
    return {
        "run_step": pretrained.step,
        "options": {f: getattr(config, f) for f in CTCProbeConfig.__dataclass_fields__ if f not in ("path", "out")},
        "minutes": minutes,
        "utterances": {name: len(part) for name, part in parts.items()},
        "letters": "".join(alphabet),
        "rows": rows,
        "wall_seconds": round(time.perf_counter() - began, 1),
        "threads": torch.get_num_threads(),
    }


def _read(modality: Any, config: CTCProbeConfig, split: str) -> Part:
    from d2v_audio.data import AudioSample, normalise
    from d2v_audio.files import BadClip, read, scan

    rate = modality.data.sample_rate
    try:
        report = scan(config.path, sample_rate=rate, min_s=modality.min_samples / rate, split=split, decode_hours=0.0)
    except UserError as error:
        raise UserError(str(error).replace("data.path=", "path=")) from None
    usable = [clip for clip in report.clips if clip.transcript]
    if not usable:
        raise UserError(
            f"path={config.path}: split {split!r} has {len(report.clips)} clips but no transcript among them. Give a "
            "table with a column 'transcript', or *.trans.txt files as in LibriSpeech."
        )
    try:
        return [(modality.collate([AudioSample(normalise(read(clip, rate)))]), str(clip.transcript)) for clip in usable]
    except BadClip as error:
        raise UserError(f"path={config.path}: {error}. Mend the file or leave it out.") from error


def _subset(part: Part, minutes: float, sample_rate: int, seed: int) -> Part:
    chosen: list[tuple[Mapping[str, Tensor], str]] = []
    left = minutes * 60 * sample_rate
    for i in generator(seed, "labels").permutation(len(part)):
        if left <= 0:
            break
        chosen.append(part[i])
        left -= part[i][0]["waveform"].shape[1]
    return chosen


def _utterance(encode: Encode, inputs: Mapping[str, Tensor], text: str, alphabet: Sequence[str]) -> Utterance:
    # Blank is 0. A letter that training has not seen cannot be right; it keeps its place in the reference as -1.
    index = {letter: i + 1 for i, letter in enumerate(alphabet)}
    return Utterance(encode(inputs), torch.tensor([index.get(letter, -1) for letter in text]))


def _train(utterances: Sequence[Utterance], num_classes: int, config: CTCProbeConfig) -> list[nn.Linear]:
    """One linear CTC layer per layer of the network; each folds the standardisation of its input."""
    fits = [u for u in utterances if len(u.letters) <= len(u.layers[0])]
    if not fits:
        raise UserError(
            f"ctc-probe: each of the {len(utterances)} training utterances has more letters than tokens. Use a run "
            "with more tokens per second (features.stride), or check the transcripts."
        )
    torch.manual_seed(seed_of(config.seed, "ctc-probe"))
    targets = sequences([u.letters.tolist() for u in fits])
    heads = [nn.Linear(layer.shape[1], num_classes) for layer in fits[0].layers]
    for layer, head in enumerate(heads):

        def loss(chosen: list[Tensor], numbers: Sequence[int], head: nn.Linear = head) -> Tensor:
            letters = padded(targets[list(numbers)])
            x = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
            emissions = Emissions(head(x), torch.tensor([len(one) for one in chosen]))
            return (ctc_loss(emissions, letters) / (letters != NOTHING).sum(1).clamp(min=1)).mean()

        fit_linear(
            head, [u.layers[layer] for u in fits], loss, steps=config.steps, batch=config.batch, lr=config.lr,
            rng=generator(config.seed, "ctc-probe-order"),
        )  # fmt: skip
    return heads


@torch.no_grad()
def _error_rate(head: nn.Linear, utterances: Sequence[Utterance], layer: int) -> float:
    """Edits over reference letters, both summed over all utterances, in per cent."""
    said = [u.letters.tolist() for u in utterances]
    return symbol_errors([greedy(head(u.layers[layer])) for u in utterances], said)["symbol_errors"]
