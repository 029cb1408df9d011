"""`d2v transcribe RUN FILES...`: what is said in audio files, and when.

    from d2v_audio.recognize import load_recognizer
    recognizer = load_recognizer("runs/my-run")
    print(transcribe(recognizer, recognizer.read("speech.flac")).words)

Recordings longer than a chunk run in chunks that overlap; of the overlap each keeps its own half, so that every frame
has been heard with its surroundings. Their frames are put together before decoding, which goes over the whole
recording.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from d2v_audio.decode import DecodeConfig
from d2v_core.config import opt, options
from d2v_core.errors import UserError
from d2v_core.verbs import print_help

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from d2v_audio.align import Word
    from d2v_audio.decode import Decoder
    from d2v_audio.recognize import Recognizer

HELP = """d2v transcribe RUN FILES... [key=value ...]

Prints what is said in audio files. RUN is the folder of a run that was fine-tuned on transcripts; FILES are audio files
or folders of them. json has a line for each file, with the time of each word; srt is for subtitles.

Options, with their defaults:
"""
SUFFIX = {"text": ".txt", "json": ".json", "srt": ".srt"}
CAPTION_S, CAPTION_LETTERS, PAUSE_S = 6.0, 80, 0.8  # a subtitle ends where it would be longer, or after such a pause


@dataclass
class TranscribeConfig:
    """What `d2v transcribe` is told."""

    format: Literal["text", "json", "srt"] = opt("text", "text; json, with the time of each word; srt.")
    out: str | None = opt(None, "Folder for a file of each recording, NAME.txt, .json or .srt; null = print.")
    lm: str = opt(
        "none", "Language model: none, an ARPA file, or 4gram and the like, made of the run's training transcripts."
    )
    lexicon: str | None = opt(
        None, "The words that can be found, `word TAB letters` in each line; null = the language model's."
    )
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    chunk_s: float = opt(30.0, "Longer recordings run in chunks of this length, seconds.")
    overlap_s: float = opt(4.0, "What two chunks have in common, seconds.")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N.")

    def check(self) -> None:
        """Raises UserError."""
        self.decode.check()
        if not 0 <= 2 * self.overlap_s <= self.chunk_s < float("inf"):
            raise UserError(
                f"chunk_s={self.chunk_s:g}, overlap_s={self.overlap_s:g}: a chunk must be at least twice as long as "
                "the overlap, which must not be negative."
            )


@dataclass(frozen=True)
class Transcript:
    """What is said in a recording of `seconds`, word by word with times."""

    words: list[Word]
    seconds: float

    @property
    def text(self) -> str:
        """The words with blanks between."""
        return " ".join(word.text for word in self.words)


def transcribe(
    recognizer: Recognizer,
    waveform: np.ndarray,
    decoder: Decoder | None = None,
    chunk_s: float = 30.0,
    overlap_s: float = 4.0,
) -> Transcript:
    """waveform: (S,) at the recognizer's rate, of any length. decoder: of `make_decoder`; None = greedy.

    Raises UserError as `Recognizer.emissions` does.
    """
    from d2v_audio.align import Clock
    from d2v_audio.words import times, understand

    seconds = len(waveform) / recognizer.sample_rate
    emissions = emissions_of(recognizer, waveform, chunk_s, overlap_s)
    (heard,) = understand([emissions], recognizer.letters, decoder)
    clock = Clock(recognizer.offset_s, recognizer.frame_s, seconds)
    return Transcript(times(heard, emissions, recognizer.letters, clock), round(seconds, 3))


def emissions_of(recognizer: Recognizer, waveform: np.ndarray, chunk_s: float, overlap_s: float) -> Tensor:
    """(T, letters) of a recording of any length; T is what it would have in one piece."""
    import torch

    geometry = recognizer.modality.geometry
    hop = round(recognizer.frame_s * recognizer.sample_rate)
    size, overlap = max(2, round(chunk_s / recognizer.frame_s)), round(overlap_s / recognizer.frame_s)
    if len(waveform) < geometry.min_samples or (total := int(geometry.num_tokens(len(waveform)))) <= size:
        return recognizer.emissions([waveform])[0]
    pieces: list[Tensor] = []
    start, done, last = 0, 0, False
    while not last:
        if last := start + size >= total:
            start = total - size
        end = len(waveform) if last else (start + size - 1) * hop + geometry.min_samples
        stop = total if last else start + size - overlap // 2
        (frames,) = recognizer.emissions([waveform[start * hop : end]])
        pieces.append(frames[done - start : stop - start])
        start, done = start + size - overlap, stop
    return torch.cat(pieces)


def captions(words: Sequence[Word]) -> list[list[Word]]:
    """The words by subtitle."""
    found: list[list[Word]] = []
    for word in words:
        now = found[-1] if found else []
        letters = sum(len(one.text) + 1 for one in now) + len(word.text)
        if (
            not now
            or word.start_s - now[-1].end_s > PAUSE_S
            or word.end_s - now[0].start_s > CAPTION_S
            or letters > CAPTION_LETTERS
        ):
            found.append([])
        found[-1].append(word)
    return found


def written(transcript: Transcript, form: str, file: str) -> str:
    """A transcript in one of the formats, its lines ended."""
    if form == "text":
        return transcript.text + "\n"
    if form == "json":
        words = [word._asdict() for word in transcript.words]
        line = {"file": file, "seconds": transcript.seconds, "text": transcript.text, "words": words}
        return json.dumps(line, ensure_ascii=False) + "\n"
    blocks = [
        f"{number}\n{_stamp(group[0].start_s)} --> {_stamp(group[-1].end_s)}\n{' '.join(w.text for w in group)}\n"
        for number, group in enumerate(captions(transcript.words), 1)
    ]
    return "\n".join(blocks)


def _stamp(seconds: float) -> str:
    """hours:minutes:seconds,milliseconds."""
    ms = round(seconds * 1000)
    return f"{ms // 3_600_000:02}:{ms // 60_000 % 60:02}:{ms // 1000 % 60:02},{ms % 1000:03}"


def main(argv: Sequence[str]) -> int:
    """The verb. Returns the exit status."""
    words = list(argv)
    if not words or {"-h", "--help"} & set(words):
        print_help(HELP, TranscribeConfig)
        return 0
    run = Path(words[0])
    given = [word for word in words[1:] if "=" not in word or Path(word).exists()]
    config = options(TranscribeConfig, [word for word in words[1:] if word not in given], "transcribe")
    config.check()
    if not given:
        raise UserError("transcribe needs at least one audio file: d2v transcribe RUN FILES...")
    from d2v_audio.recognize import load_recognizer

    recognizer = load_recognizer(run)
    clips = _clips(given, recognizer)
    targets = _targets(config, list(clips))
    from d2v_audio.evaluate import on_device, training_texts
    from d2v_audio.words import language_model, open_decoder

    on_device(recognizer, config.device)
    with tempfile.TemporaryDirectory() as folder:
        lm = language_model(config.lm, lambda: training_texts(run), Path(folder))
        decoder = open_decoder(recognizer.letters, config.decode, lm, config.lexicon, _aside)
    for name, path in clips.items():
        waveform = recognizer.read(path)
        try:
            found = transcribe(recognizer, waveform, decoder, config.chunk_s, config.overlap_s)
        except UserError as error:  # it knows a waveform, not a file
            raise UserError(f"{name}: {error}") from None
        text = written(found, config.format, name)
        if targets:
            targets[name].write_text(text, encoding="utf-8")
        else:
            print(f"{name}\t{text}" if config.format == "text" and len(clips) > 1 else text, end="", flush=True)
    return 0


def _aside(line: str) -> None:
    import sys

    print(line, file=sys.stderr)


def _clips(given: Sequence[str], recognizer: Recognizer) -> dict[str, Path]:
    """Paths by name: a file as it was given, a file of a folder below that. Raises UserError for what is no sound."""
    from d2v_audio import files

    found: dict[str, Path] = {}
    for name in given:
        try:
            report = files.scan(name, sample_rate=recognizer.sample_rate, max_bad_ratio=0.0, decode_hours=0.0)
        except UserError as error:
            raise UserError(str(error).replace("data.path=", "FILES: ")) from None
        folder = Path(name).is_dir()
        found |= {str(Path(name, clip.id)) if folder else name: clip.path for clip in report.clips}
    return found


def _targets(config: TranscribeConfig, names: Sequence[str]) -> dict[str, Path]:
    """The file to write for each name; empty where it is printed. Raises UserError before anything is overwritten."""
    if config.out is None:
        if config.format == "srt" and len(names) > 1:
            raise UserError(f"format=srt: {len(names)} recordings cannot share a file of subtitles. Give out=FOLDER.")
        return {}
    out = Path(config.out).expanduser()
    if out.exists() and not out.is_dir():
        raise UserError(f"out={config.out} is a file; give a folder.")
    targets = {name: out / (Path(name).stem + SUFFIX[config.format]) for name in names}
    if len(set(targets.values())) < len(names):
        twice = next(path for path in targets.values() if list(targets.values()).count(path) > 1)
        raise UserError(
            f"out={config.out}: two of the recordings would be written to {twice.name}. Rename one of them."
        )
    if there := [str(path) for path in targets.values() if path.exists()]:
        raise UserError(
            f"{', '.join(there[:3])} is there already, and nothing is overwritten. Give another out=FOLDER."
        )
    out.mkdir(parents=True, exist_ok=True)
    return targets
