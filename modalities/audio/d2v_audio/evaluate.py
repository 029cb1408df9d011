"""`d2v evaluate RUN`: word and letter error rates of a run that was fine-tuned on transcripts, and where it errs."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from d2v_audio.words import SearchConfig
from d2v_core.config import opt, options
from d2v_core.errors import UserError
from d2v_core.verbs import print_help

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from d2v_audio.letters import Letters
    from d2v_audio.recognize import Recognizer
    from d2v_audio.wer import Edits
    from d2v_audio.words import Heard
    from d2v_core.contract import Dataset

HELP = """d2v evaluate RUN [key=value ...]

Transcribes a part of the data and scores it: word and letter error rates with what they consist of and their 95 %
intervals. RUN is the folder of a run that was fine-tuned on transcripts. Writes result.json, hypotheses.tsv,
alignments.jsonl (when each word was said) and report.html (the worst utterances, seen).

  d2v evaluate RUN                                   greedy, the test part of what the run was fine-tuned on
  d2v evaluate RUN lm=4gram decode.tune=true         with an n-gram of its training transcripts, weights tuned on dev
  d2v evaluate RUN lm=FILE.arpa data.path=OTHER      with a language model of yours, on other data
  d2v evaluate RUN against=OTHER_RUN                 and whether the two differ by more than chance

Options of the sections data, transcripts and labelled are those of `d2v run stage=finetune`; they count in place of
the run's own, and all of the data that they name is then scored as `part`. Options, with their defaults:
"""
DATA_SECTIONS = ("data", "transcripts", "labelled")
UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # in a reference, a letter that the vocabulary lacks
RESULT = "result.json"


@dataclass
class EvaluateConfig:
    """What `d2v evaluate` is told."""

    part: Literal["train", "dev", "test"] = opt("test", "Which part of the data to score.")
    lm: str = opt(
        "none", "Language model: none, an ARPA file, or 4gram and the like, made of the run's training transcripts."
    )
    lexicon: str | None = opt(
        None, "The words that can be found, `word TAB letters` in each line; null = the language model's."
    )
    decode: SearchConfig = field(default_factory=SearchConfig)
    against: str | None = opt(
        None, "Another run, decoded alike, or the folder of another evaluation: compared on the same utterances."
    )
    out: str | None = opt(None, "New folder for the results; null = one in the run's folder.")
    worst: int = opt(20, "Utterances that report.html shows.")
    device: str = opt("auto", "auto, cpu, cuda or cuda:N.")


@dataclass(frozen=True)
class Part:
    """Utterances with what was said, and by whom where that is known."""

    name: str
    samples: Dataset[Any]
    references: list[str]
    speakers: list[str | None]


@dataclass
class Spoken:
    """A part as the network hears it. Those that could not be read are left out, with the reason, in `skipped`."""

    ids: list[str]
    seconds: list[float]
    references: list[str]
    speakers: list[str | None]
    emissions: list[Tensor]
    index: list[int]
    skipped: dict[str, str]


def main(argv: Sequence[str]) -> int:
    """The verb. Returns the exit status."""
    words = list(argv)
    if not words or {"-h", "--help"} & set(words):
        print_help(HELP, EvaluateConfig)
        print("  data.path=null: other data to score; null = what the run was fine-tuned on.")
        return 0
    run, config, given = run_words(words, "evaluate", EvaluateConfig)
    from rich.console import Console

    console = Console()

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    out = _folder(run, config)
    console.print(_table(evaluate(run, replace(config, out=str(out)), given, say)))
    say(f"Results in {out}: {RESULT}, hypotheses.tsv, alignments.jsonl, report.html")
    return 0


def run_words(words: Sequence[str], verb: str, kind: type) -> tuple[Path, Any, dict[str, str]]:
    """(run folder, options of the verb, options of the run's data) of `RUN key=value ...`."""
    if "=" in words[0] and not Path(words[0]).is_dir():
        raise UserError(f"{verb} needs the run folder first: d2v {verb} RUN {' '.join(words)}")
    data = [word for word in words[1:] if word.split(".")[0] in DATA_SECTIONS and "=" in word]
    config = options(kind, [word for word in words[1:] if word not in data], verb)
    given = {key: value for key, _, value in (word.partition("=") for word in data)}
    return Path(words[0]), config, given


def evaluate(
    run: Path, config: EvaluateConfig, given: Mapping[str, str] | None = None, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Score a run and write the folder of results; returns what result.json holds.

    given: options of the data sections. say: is told what a person wants to know meanwhile.
    Raises UserError for what cannot be scored, before anything is decoded where possible.
    """
    from d2v_audio import report, words
    from d2v_audio.recognize import load_recognizer
    from d2v_core.metrics import finite, write_json

    config.decode.check()
    if config.worst < 0:
        raise UserError(f"worst={config.worst} must not be below 0.")
    if config.decode.tune and config.lm == words.NONE and config.lexicon is None:
        raise UserError("decode.tune=true: greedy decoding has no weights to tune. Give lm=FILE.arpa or lm=4gram.")
    out = _folder(run, config)
    recognizer = on_device(load_recognizer(run), config.device)
    part = open_part(run, config.part, given)
    other = None if config.against is None else _Other(config.against, run)
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    try:
        lm = words.language_model(config.lm, lambda: training_texts(run), out)
        decoder = words.open_decoder(recognizer.letters, config.decode, lm, config.lexicon, say)
        say(f"{run}: {config.part} part, {len(part.references)} utterances.")
        record: dict[str, Any] | None = None
        if decoder is not None and config.decode.tune:
            dev = listen(recognizer, open_part(run, "dev", None), say)
            say(f"Tuning on {len(dev.ids)} utterances of dev, {config.decode.trials} settings.")
            tuned = words.tune(decoder, config.decode, recognizer.letters, dev.emissions, dev.references)
            decoder, record = tuned
            say(", ".join(f"{name} {record[name]:g}" for name in words.WEIGHTS) + f": dev wer {record['dev_wer']:.2f}")
        spoken = listen(recognizer, part, say)
        heard = words.understand(spoken.emissions, recognizer.letters, decoder)
        hypotheses = [one.text for one in heard]
        result: dict[str, Any] = {
            "run": str(run), "step": recognizer.step, "part": config.part,
            "data": recognizer.modality.data.path if not given else dict(given),
            "utterances": len(spoken.ids), "minutes": round(sum(spoken.seconds) / 60, 2), "skipped": spoken.skipped,
            "options": chosen(config), **rates(spoken.references, hypotheses, spoken.speakers),
            "decode": _decoding(config, decoder, record),
        }  # fmt: skip
        if decoder is not None:
            result["decode"] |= _not_in(decoder.lexicon.words, spoken.references, say)
        if other is not None:
            theirs = other.hypotheses(spoken.ids, spoken.references, config, given, say)
            result["against"] = {"other": config.against, **paired(spoken, hypotheses, theirs)}
        result["wall_seconds"] = round(time.perf_counter() - began, 1)
        _write_lines(out, spoken, heard, recognizer)
        report.write(out / "report.html", result, part, spoken, heard, recognizer, config.worst)
        write_json(out / RESULT, finite(result))
    except BaseException:
        _drop(out)
        raise
    return result


# ------------------------------------------------------------------------------------------------------ what is scored


def on_device(recognizer: Recognizer, device: str) -> Recognizer:
    """Raises UserError where there is no such device."""
    import torch

    from d2v_core.loop import pick_device

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UserError(f"device={device} must be auto, cpu, cuda or cuda:N.")
    config = recognizer.config
    if config.train.num_threads:
        torch.set_num_threads(config.train.num_threads)
    train = replace(config.train, device=device, precision="fp32")  # it was another in training at most
    try:
        found = pick_device(replace(config, train=train))
    except UserError as error:
        raise UserError(str(error).replace("train.device", "device")) from None
    return recognizer.to(found)


def open_part(run: Path, name: str, given: Mapping[str, str] | None = None) -> Part:
    """A part of the data that a run was fine-tuned on, or of the data that `given` names.

    Of other data, the part of that name, or all there is where it has no parts. Raises UserError where there is none.
    """
    from d2v_audio.letters import Letters
    from d2v_audio.modality import AudioModality
    from d2v_core.labelled import open_task
    from d2v_core.run import load_config_of

    config, kind = load_config_of(run, given)
    modality = kind(config)
    assert isinstance(modality, AudioModality)
    if given and modality.data.path is not None:
        return _foreign(modality, name, given)
    task = open_task(modality).task
    part = {"train": task.train, "dev": task.dev, "test": task.test}[name]
    if part is None:
        raise UserError(f"The data of {run} has no {name} part. Score another one with part=dev, or other data.")
    letters = Letters(task.symbols)
    references = [letters.decode(label.tolist(), UNKNOWN) for label in part.labels]
    return Part(name, part.samples, references, _speakers(part.samples))


def _foreign(modality: Any, name: str, given: Mapping[str, str]) -> Part:
    """`transcripts.NAME_path` says where a part lies, unless `given` names other data and not that."""
    from d2v_audio.classification import LabelledConfig, LabelledFiles, refuse_options_of_pretraining
    from d2v_audio.transcripts import TranscriptsConfig, read_transcribed

    refuse_options_of_pretraining(modality.data)
    labelled = modality.config.section("labelled", LabelledConfig)
    least = max(modality.two_tokens(), round(labelled.min_s * modality.data.sample_rate))
    transcripts, data, key = modality.config.section("transcripts", TranscriptsConfig), modality.data, "data.path"
    elsewhere = getattr(transcripts, f"{name}_path", None)
    if elsewhere is not None and (f"transcripts.{name}_path" in given or key not in given):
        data, key = replace(data, path=elsewhere), f"transcripts.{name}_path"
        transcripts = replace(transcripts, train=[], dev=[], test=[])
    try:
        found = read_transcribed(data, transcripts, labelled.split_column, least)
    except UserError as error:
        raise UserError(str(error).replace("data.path=", f"{key}=")) from None
    there = {part: clips for part, clips in found.parts.items() if clips}
    if key != "data.path":  # all that lies there is the part
        there = {name: [clip for clips in there.values() for clip in clips]}
    clips = there.get(name) or (next(iter(there.values())) if len(there) == 1 else [])
    if not clips:
        shown = ", ".join(f"{part} ({len(some)})" for part, some in there.items())
        raise UserError(f"{key}={data.path} has no {name} part; it has {shown}. Choose one with part=.")
    report = replace(found.report, clips=tuple(clip for clip, _ in clips))
    samples = LabelledFiles(report, data.sample_rate, report.summary())
    return Part(name, samples, [text for _, text in clips], [clip.speaker for clip, _ in clips])


def _speakers(samples: Any) -> list[str | None]:
    from d2v_audio.data import AudioFiles
    from d2v_audio.transcripts import Utterances
    from d2v_core.labelled import Subset

    if isinstance(samples, Subset):
        speakers = _speakers(samples.dataset)
        return [speakers[int(i)] for i in samples.indices]
    if isinstance(samples, AudioFiles):
        return [clip.speaker for clip in samples.clips]
    assert isinstance(samples, Utterances)
    return list(samples.speakers)


def training_texts(run: Path) -> list[str]:
    """What is said in the utterances that a run was fine-tuned on."""
    return open_part(run, "train").references


def listen(recognizer: Recognizer, part: Part, say: Callable[[str], None]) -> Spoken:
    """The network's emissions of a part. Raises UserError where none of it can be read."""
    from d2v_core.contract import BadSample

    spoken = Spoken([], [], [], [], [], [], {})
    for i, (reference, speaker) in enumerate(zip(part.references, part.speakers, strict=True)):
        name = part.samples.id(i)
        try:
            waveform: np.ndarray = part.samples[i].waveform
        except BadSample as error:
            spoken.skipped[name] = str(error)
            say(f"skipped {name}: {error}")
            continue
        spoken.ids.append(name)
        spoken.index.append(i)
        spoken.seconds.append(len(waveform) / recognizer.sample_rate)
        spoken.references.append(reference)
        spoken.speakers.append(speaker)
        spoken.emissions += recognizer.emissions([waveform])
    if not spoken.ids:
        raise UserError(f"None of the {len(part.references)} utterances of {part.name} can be read.")
    return spoken


def rates(references: Sequence[str], hypotheses: Sequence[str], speakers: Sequence[str | None]) -> dict[str, Any]:
    """{"wer": ..., "cer": ...}, each with rate, 95 % interval and what it consists of."""
    from d2v_audio.wer import letter_edits, score, word_edits

    def one(edits: Sequence[Edits], unit: str) -> dict[str, Any]:
        found = score(edits, speakers)
        sums = found.total
        return {
            "rate": round(sums.rate, 3), "low": round(found.low, 3), "high": round(found.high, 3),
            "resampled": found.resampled, "substitutions": sums.substitutions, "deletions": sums.deletions,
            "insertions": sums.insertions, unit: sums.length,
        }  # fmt: skip

    return {
        "wer": one(word_edits(references, hypotheses), "words"),
        "cer": one(letter_edits(references, hypotheses), "letters"),
    }


def paired(spoken: Spoken, ours: Sequence[str], theirs: Sequence[str]) -> dict[str, Any]:
    """The other's word error rate, and by how much ours is less or more, with interval and significance."""
    from d2v_audio.wer import compare, total, word_edits

    mine, other = word_edits(spoken.references, ours), word_edits(spoken.references, theirs)
    found = compare(mine, other, spoken.speakers)
    return {"wer": round(total(other).rate, 3), **{k: round(v, 5) if isinstance(v, float) else v
                                                  for k, v in asdict(found).items()}}  # fmt: skip


class _Other:
    """What `against` names: another run, or the folder of an evaluation."""

    def __init__(self, given: str, run: Path) -> None:
        from d2v_audio.recognize import load_recognizer

        self.given, self.path = given, Path(given)
        if not self.path.is_dir():
            raise UserError(f"against={given} is no folder: give a run, or the folder of an evaluation.")
        self.done = (self.path / RESULT).is_file()
        if not self.done:
            self.recognizer = load_recognizer(self.path)
            if self.path.resolve() == run.resolve():
                raise UserError(f"against={given} is the run itself. To compare two decodings of it, give the folder "
                                "of one of its evaluations.")  # fmt: skip

    def hypotheses(
        self,
        ids: Sequence[str],
        references: Sequence[str],
        config: EvaluateConfig,
        given: Mapping[str, str] | None,
        say: Callable[[str], None],
    ) -> list[str]:
        """In the order of ids. Raises UserError where the other knows other utterances."""
        if self.done:
            found = read_hypotheses(self.path)
        else:
            own = replace(config, against=None, out=None)
            folder = _folder(self.path, own)
            evaluate(self.path, replace(own, out=str(folder)), given, say)
            found = read_hypotheses(folder)
        missing = [name for name in ids if name not in found]
        differ = [
            name for name, text in zip(ids, references, strict=True) if name in found and found[name].reference != text
        ]
        if missing or differ or len(found) != len(ids):
            raise UserError(
                f"against={self.given} was scored on {len(found)} utterances, this on {len(ids)}: {len(missing)} are "
                f"missing there and {len(differ)} have another reference. Score both on the same data and part."
            )
        return [found[name].hypothesis for name in ids]


# --------------------------------------------------------------------------------------------------- what is written


def _folder(run: Path, config: EvaluateConfig) -> Path:
    if config.out is not None:
        out = Path(config.out).expanduser()
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"out={config.out} is there already, and nothing is overwritten. Give another name.")
        return out
    lm = "" if config.lm == "none" else f"-{Path(config.lm).name.split('.')[0]}"
    path = run / f"evaluate-{config.part}{lm}"
    number = 2
    while path.exists():
        path, number = run / f"evaluate-{config.part}{lm}-{number}", number + 1
    return path


def _drop(out: Path) -> None:
    """A folder in which nothing came about but a language model does not stand in the way of the next try."""
    if out.is_dir() and all(child.suffix in (".arpa", ".tmp") for child in out.iterdir()):
        for child in out.iterdir():
            child.unlink()
        out.rmdir()


def chosen(config: EvaluateConfig) -> dict[str, Any]:
    """The options that the numbers of an evaluation depend on."""
    return {"part": config.part, "lm": config.lm, "lexicon": config.lexicon, "decode": asdict(config.decode)}


def _decoding(config: EvaluateConfig, decoder: Any, record: Mapping[str, Any] | None) -> dict[str, Any]:
    if decoder is None:
        return {"search": "greedy"}
    weights = {name: (record or asdict(config.decode))[name] for name in ("lm_weight", "word_score", "sil_score")}
    search = {k: v for k, v in asdict(config.decode).items() if k not in ("engine", "tune", "trials")}
    return {
        "search": decoder.name, "lm": config.lm, "lexicon": config.lexicon or "the language model's words",
        "words": len(decoder.lexicon.words), **search, **weights,
        "tuned_on_dev": dict(record) if record else None,
    }  # fmt: skip


def _not_in(words: Mapping[str, Any], references: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    from d2v_audio.letters import normal
    from d2v_core.files import first

    said = [word for text in references for word in text.split()]
    known = {normal(word) for word in words}
    lacking = [word for word in said if word not in known]
    if lacking:
        say(
            f"{len(lacking)} of {len(said)} words that are said ({100 * len(lacking) / len(said):.1f} %) are not in "
            f"the lexicon and cannot be found: {first(list(dict.fromkeys(lacking)), ', ')}"
        )
    return {"words_not_in_lexicon": len(lacking)}


def _write_lines(out: Path, spoken: Spoken, heard: Sequence[Heard], recognizer: Recognizer) -> None:
    from d2v_audio.wer import word_edits

    edits = word_edits(spoken.references, [one.text for one in heard])
    rows = ["id\tspeaker\tseconds\twords\terrors\treference\thypothesis"]
    with open(out / "alignments.jsonl", "w", encoding="utf-8", newline="\n") as file:
        for i, name in enumerate(spoken.ids):
            rows.append(
                f"{name}\t{spoken.speakers[i] or ''}\t{spoken.seconds[i]:.2f}\t{edits[i].length}\t{edits[i].errors}\t"
                f"{spoken.references[i]}\t{heard[i].text}"
            )
            line = {"id": name, **aligned(spoken, heard, i, recognizer)}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    (out / "hypotheses.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


def aligned(spoken: Spoken, heard: Sequence[Heard], i: int, recognizer: Recognizer) -> dict[str, Any]:
    """{"hypothesis": words with times, "reference": the same, null where there are fewer frames than it needs}."""
    from d2v_audio.align import Clock
    from d2v_audio.words import times

    clock = Clock(recognizer.offset_s, recognizer.frame_s, spoken.seconds[i])
    letters, emissions = recognizer.letters, spoken.emissions[i]
    said = reference_words(spoken.references[i], letters, emissions, clock)
    return {
        "hypothesis": [word._asdict() for word in times(heard[i], emissions, letters, clock)],
        "reference": None if said is None else [word._asdict() for word in said],
    }


def reference_words(text: str, letters: Letters, emissions: Tensor, clock: Any) -> list[Any] | None:
    """When the words of a known text were said, by forced alignment; None where there are fewer frames than it needs.

    Letters outside the vocabulary are passed over, and words of nothing else left out.
    """
    from d2v_audio.align import align, joined, timed_words
    from d2v_audio.letters import UNK

    spelled = [(word, [i for i in letters.encode(word, UNK)[:-1] if i != UNK]) for word in text.split()]
    known = [(word, spelling) for word, spelling in spelled if spelling]
    spans = align(emissions, joined([spelling for _, spelling in known], letters.boundary))
    return None if spans is None else timed_words(spans, [word for word, _ in known], letters, clock)


class Scored(NamedTuple):
    """An utterance of an evaluation; speaker: empty where it is not known."""

    speaker: str
    reference: str
    hypothesis: str


def read_hypotheses(folder: Path) -> dict[str, Scored]:
    """The utterances of an evaluation by id. Raises UserError where the file is not whole."""
    path = folder / "hypotheses.tsv"
    try:
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")[1:-1]]
        return {row[0]: Scored(row[1], row[5], row[6]) for row in rows}
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise UserError(f"{path} cannot be read: {error}. The folder of an evaluation holds it.") from error


def _table(result: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"{result['run']}, {result['part']}: error rates, %", title_justify="left")
    for name in ("", "rate", "95 % interval", "substituted", "deleted", "inserted", "of"):
        table.add_column(name, justify="right" if name else "left")
    for name, unit in (("wer", "words"), ("cer", "letters")):
        one = result[name]
        table.add_row(
            unit, f"{one['rate']:.2f}", f"{one['low']:.2f} to {one['high']:.2f}", str(one["substitutions"]),
            str(one["deletions"]), str(one["insertions"]), str(one[unit]),
        )  # fmt: skip
    how = result["decode"]
    table.caption = "greedy decoding" if how["search"] == "greedy" else (
        f"{how['search']} search, lm={how['lm']}, lm_weight {how['lm_weight']:g}, word_score {how['word_score']:g}, "
        f"sil_score {how['sil_score']:g}"
    )  # fmt: skip
    table.caption += f"; intervals over {result['wer']['resampled']}"
    if other := result.get("against"):
        table.caption += (
            f"\nAgainst {other['other']} (wer {other['wer']:.2f}): {other['difference']:+.2f} "
            f"({other['low']:+.2f} to {other['high']:+.2f}), p = {other['p']:.4f}, paired over {other['resampled']}"
        )
    table.caption_justify = "left"
    return table
