"""`d2v ladder from=RUN`: how many errors remain with how many labels, pre-trained and untrained, with and without a
language model.

Every cell is a run folder of `d2v run stage=finetune` with its evaluations in it. What is there already is not done
again, and a run that was stopped goes on: the same command continues.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from d2v_audio.decode import is_binary, without_flashlight
from d2v_audio.evaluate import RESULT, EvaluateConfig, chosen, evaluate, read_hypotheses
from d2v_audio.lm import MAX_ORDER
from d2v_audio.ngram import arpa_words
from d2v_audio.words import SearchConfig
from d2v_core.config import opt, options, read_yaml, run_folder, run_of
from d2v_core.contract import Sequel
from d2v_core.errors import UserError
from d2v_core.files import existing
from d2v_core.verbs import print_help

if TYPE_CHECKING:
    from d2v_audio.wer import Comparison, Score

HELP = """d2v ladder from=RUN data.path=TRANSCRIBED labels=[10m,1h] lm=[none,4gram] seeds=3 [key=value ...]

Fine-tunes a pre-trained run on transcripts with every amount of labels and every seed, and the same network untrained;
scores each with every language model; prints and writes the table (ladder.md, ladder.html, ladder.json). Stopped, it
goes on by the same command. All options of `d2v run stage=finetune` can be given too; they hold for every cell, or,
with student., teacher. or untrained. before them, for the cells of these weights: untrained.optim.lr=3e-3.

Options, with their defaults:
"""
OWN = ("labels", "lm", "seeds", "weights", "part", "lexicon", "decode", "out")
NAMES = {"student": "pre-trained", "teacher": "teacher", "untrained": "untrained"}
COLOURS = {"student": "#2a7ab9", "teacher": "#4a9a4a", "untrained": "#c4572b"}
DASHES = ("", "6 4", "2 3", "9 3 2 3")  # of the language models, in their order


@dataclass
class LadderConfig:
    """What `d2v ladder` is told."""

    labels: list[str] = opt([], "Amounts of labels, as for d2v run: [10m,1h], [50,500], [10%]; empty = all there are.")
    lm: list[str] = opt(
        ["none"], "Language models: none, 4gram and the like (of each cell's own training transcripts), ARPA files."
    )
    seeds: int = opt(1, "Runs of each cell, with the seeds from 0 on.")
    weights: list[str] = opt(["student", "untrained"], "What to start from: student, teacher, untrained.")
    part: Literal["dev", "test"] = opt("test", "Which part to score.")
    lexicon: str | None = opt(None, "As for d2v evaluate.")
    decode: SearchConfig = field(default_factory=SearchConfig)
    out: str | None = opt(None, "Folder for the cells and the table; null = ladder in the run's folder.")


@dataclass(frozen=True)
class Row:
    """Of one amount of labels with one language model: what each kind of weights gives, over all seeds.

    rates: word error rate of each seed, by weights. scores: of all seeds together, the interval over speakers.
    letters: the letter error rate. gain: the first kind of weights against the last; None where there is one.
    """

    labels: str
    lm: str
    rates: dict[str, list[float]]
    scores: dict[str, Score]
    letters: dict[str, float]
    gain: Comparison | None


def main(argv: Sequence[str]) -> int:
    """The verb. Returns the exit status."""
    words = list(argv)
    if not words or {"-h", "--help"} & set(words):
        print_help(HELP, LadderConfig)
        print("  from=RUN: the folder of a pre-training run.")
        print("  data.path=null: transcribed data; null = built-in utterances.")
        print("  preset=null: of d2v run stage=finetune; null = the one for the network of the run.")
        return 0
    own = [word for word in words if re.split(r"[.=]", word)[0] in OWN]
    config = options(LadderConfig, own, "ladder")
    return ladder(config, [word for word in words if word not in own])


def ladder(config: LadderConfig, rest: Sequence[str]) -> int:
    """Returns the exit status, that of a cell where it is not 0. rest: words of `d2v run stage=finetune`, `from` among
    them. Raises UserError for what cannot work."""
    from rich.console import Console

    console = Console()

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False, markup=False)

    of_weights = {name: [word.split(".", 1)[1] for word in rest if word.startswith(f"{name}.")] for name in NAMES}
    source, rest = _source([word for word in rest if word.split(".")[0] not in NAMES])
    _check(config, of_weights)
    out = Path(config.out).expanduser() if config.out else source / "ladder"
    amounts = config.labels or ["all"]
    preset = next((word.partition("=")[2] for word in rest if word.startswith("preset=")), None)
    of_run = str(read_yaml(source / "config.yaml").get("preset", ""))
    presets = {labels: preset or _preset(of_run, labels) for labels in amounts}
    _check_data(rest, config.part)
    rest = [word for word in rest if not word.startswith("preset=")]
    cells = list(product(amounts, range(config.seeds), config.weights))
    for number, (labels, seed, weights) in enumerate(cells, 1):
        say(f"\nCell {number} of {len(cells)}: {NAMES[weights]}, labels {labels}, seed {seed}")
        words = [*_replaced(rest, of_weights[weights]), f"preset={presets[labels]}"]
        status = _cell(out, source, config, words, labels, seed, weights, say)
        if status:
            say(f"The ladder goes on from here by the same command; its cells lie in {out}.")
            return status
    rows = collect(out, config)
    write_tables(out, rows, config, source, {"all": rest, **{name: of_weights[name] for name in config.weights}})
    console.print(_table(rows, config, _title(rows, config, source)))
    say(f"Written to {out}: ladder.md, ladder.html, ladder.json")
    return 0


def _replaced(words: Sequence[str], by: Sequence[str]) -> list[str]:
    """`key=value` words, and those of `by` in place of theirs of the same key."""
    keys = {word.partition("=")[0] for word in by}
    return [*(word for word in words if word.partition("=")[0] not in keys), *by]


BUILT_IN = "ctc_built_in"
LATER = ("finetune", "labelled", "transcripts", "augment")  # sections that pre-training has not
SHARED = ("data.path", "data.max_bad_ratio", "data.verify", "train.num_threads", "train.num_workers", "train.device")


def sequel(given: Mapping[str, str]) -> Sequel | None:
    """After pre-training: what `d2v ladder` does with the same data and the options that are its own.

    Without stage=all only on built-in data, for the preset and the encoder that it is made for (fine-tuning blanks
    log-mel bands), and unless train.probe=false, which asks for no scores. Raises UserError for options that cannot
    work.
    """
    built_in = not given.get("data.path") and given.get("preset", "tiny") == "tiny"
    plain = built_in and not given.get("from") and given.get("train.probe", "true").lower() == "true"
    if given.get("stage") is None and not (plain and given.get("encoder", "") in ("", "logmel")):
        return None
    words = {key: value for key, value in given.items() if re.split(r"[.]", key)[0] in OWN and key != "out"}
    later = {key: value for key, value in given.items() if key.split(".")[0] in LATER}
    config = options(LadderConfig, [f"{key}={value}" for key, value in words.items()], "run stage=all")
    if "lm" not in words:
        config.lm = ["none", "2gram" if built_in else "4gram"]
    _check(config)
    preset = BUILT_IN if built_in else None
    for labels in [] if built_in else config.labels or ["all"]:
        _preset(given.get("preset", "tiny"), labels)  # refuses what no preset is made for
    rest = [f"{key}={value}" for key, value in later.items()]
    rest += [f"{key}={given[key]}" for key in SHARED if key in given] + ([f"preset={preset}"] if preset else [])
    _check_data(rest, config.part)

    def run(folder: Path) -> int:
        return ladder(replace(config, out=str(folder / "words")), [f"from={folder}", *rest])

    return Sequel(frozenset({*words, *later}), run)


def _source(words: Sequence[str]) -> tuple[Path, list[str]]:
    """The pre-trained run, of a joint one its member, and the other words."""
    given = [word for word in words if word.startswith("from=")]
    if len(given) != 1 or given[0] == "from=":
        raise UserError("ladder needs from=RUN, the folder of a pre-training run, once.")
    source = run_folder(run_of(Path(given[0].partition("=")[2]), "audio"), "from=")
    rest = [word for word in words if word not in given]
    _refuse_own(rest)
    return source, rest


def _refuse_own(words: Sequence[str]) -> None:
    for key in ("stage", "seed", "resume", "finetune.weights"):
        if clash := [word for word in words if word.startswith(f"{key}=")]:
            raise UserError(f"{clash[0]}: ladder sets {key} of each cell itself.")


def _preset(of_run: str, labels: str) -> str:
    """Of fine-tuning a run on an amount of transcripts. Raises UserError where none is made for that."""
    from d2v_audio.modality import AudioModality

    there = sorted(path.stem for path in (AudioModality.recipes() / "finetune").glob("*_*.yaml"))
    stems = dict.fromkeys((of_run, of_run.rstrip("2"), of_run.partition("_")[0].rstrip("2")))
    for name in (name for stem in stems for name in (f"{stem}_{labels}", f"ctc_{stem}")):
        if name in there:
            return name
    raise UserError(
        f"No preset of fine-tuning is made for preset={of_run} and labels {labels}. Give one of: preset="
        f"{', '.join(there)}."
    )


def _check(config: LadderConfig, of_weights: Mapping[str, Sequence[str]] | None = None) -> None:
    config.decode.check()
    for name, words in (of_weights or {}).items():
        _refuse_own(words)
        if clash := [word for word in words if re.split(r"[.=]", word)[0] in (*OWN, "from", "preset", "data")]:
            raise UserError(f"{name}.{clash[0]}: this is the same for all cells. Give it without {name}.")
        if words and name not in config.weights:
            raise UserError(f"{name}.{words[0]}, but weights={config.weights} has no {name}.")
    if config.seeds < 1:
        raise UserError(f"seeds={config.seeds} must be at least 1.")
    for key in ("labels", "lm", "weights"):
        values = getattr(config, key)
        if len(set(values)) < len(values) or (key != "labels" and not values):
            raise UserError(f"{key}={values} must name at least one thing, each once.")
    if unknown := [name for name in config.weights if name not in NAMES]:
        raise UserError(f"weights={unknown[0]} must be one of: {', '.join(NAMES)}.")
    if len({_short(lm) for lm in config.lm}) < len(config.lm):
        raise UserError(f"lm={config.lm}: two of the files have the same name. Rename one.")
    if config.lexicon is not None:
        existing(config.lexicon, "a lexicon", "lexicon")
    for lm in config.lm:  # what cannot be scored is refused before the first run
        if lm == "none":
            continue
        order, file = re.fullmatch(r"(\d+)gram", lm), Path(lm).expanduser()
        if order is None and not file.is_file():
            raise UserError(f"lm={lm} is neither none, nor 4gram or the like, nor a file.")
        if order is not None and not 1 <= int(order[1]) <= MAX_ORDER:
            raise UserError(f"lm={lm}: from 1gram to {MAX_ORDER}gram, or an ARPA file.")
        binary = order is None and is_binary(lm)
        without_flashlight(config.decode, lm, binary, config.lexicon is not None)
        if order is None and not binary:
            arpa_words(file)


def _check_data(words: Sequence[str], part: str) -> None:
    """Raises UserError where the data.path of these words has no transcripts, or not the part that is to be scored."""
    from d2v_audio.classification import LabelledConfig
    from d2v_audio.data import AudioConfig
    from d2v_audio.transcripts import TranscriptsConfig, read_transcribed

    def section(name: str, kind: type) -> Any:
        return options(kind, [word.partition(".")[2] for word in words if word.startswith(f"{name}.")], "ladder")

    data, transcripts = section("data", AudioConfig), section("transcripts", TranscriptsConfig)
    if data.path is None or not Path(data.path).expanduser().exists():
        return  # built-in, or refused where it is opened
    data = replace(data, verify="headers", rate_policy="resample")
    parts = read_transcribed(data, transcripts, section("labelled", LabelledConfig).split_column, 1).parts
    if part == "test" and not parts["test"] and transcripts.test_path is None:
        there = ", ".join(f"{name} has {len(clips)} clips" for name, clips in parts.items() if clips)
        raise UserError(
            f"data.path={data.path} has no test part to score: {there}. Name it by transcripts.test= or "
            "transcripts.test_path=, or score the dev part by part=dev."
        )


def _short(lm: str) -> str:
    return Path(lm).name.split(".")[0]


def cell_folder(out: Path, labels: str, seed: int, weights: str) -> Path:
    """Where the run of a cell lies below `out`."""
    return out / f"{weights}-{labels.replace('%', 'pc')}-seed{seed}"


def _evaluation(folder: Path, config: LadderConfig, lm: str) -> Path:
    return folder / f"evaluate-{config.part}-{_short(lm)}"


def _cell(
    out: Path,
    source: Path,
    config: LadderConfig,
    rest: Sequence[str],
    labels: str,
    seed: int,
    weights: str,
    say: Callable[[str], None],
) -> int:
    """Fine-tune, then evaluate with each language model, as far as that is not done yet."""
    from d2v_core import cli

    folder = cell_folder(out, labels, seed, weights)
    amount = [] if labels == "all" else [f"labels={labels}"]
    status = cli.main(["run", "stage=finetune", f"from={source}", f"seed={seed}", f"finetune.weights={weights}",
                       f"out={folder}", "resume=auto", *amount, *rest])  # fmt: skip
    if status:
        return status
    for lm in config.lm:
        done = _evaluation(folder, config, lm)
        part = done.with_name(f"{done.name}.part")
        own = EvaluateConfig(part=config.part, lm=lm, out=str(part))
        if lm != "none":  # else greedy
            own.lexicon, own.decode = config.lexicon, config.decode
        if (done / RESULT).is_file():
            _compare(done, chosen(own))
            continue
        shutil.rmtree(part, ignore_errors=True)  # of a ladder that was stopped while it wrote this
        evaluate(folder, own, None, say)
        part.rename(done)
    return 0


def _compare(done: Path, now: Mapping[str, Any]) -> None:
    """Raises UserError where an evaluation was made with other options."""
    try:
        before = json.loads((done / RESULT).read_text(encoding="utf-8"))["options"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{done / RESULT} cannot be read ({error}). Remove the folder {done}, and it is made anew."
        ) from None
    now = json.loads(json.dumps(now))
    if before != now:
        raise UserError(
            f"{done} was scored with other options (stored {before}, now {now}). Give the stored ones, or another out="
        )


def collect(out: Path, config: LadderConfig) -> list[Row]:
    """From the evaluations of all cells to the rows of the table. Raises UserError where they are not of the same
    utterances."""
    from d2v_audio.wer import Edits, compare, letter_edits, score, total, word_edits

    rows: list[Row] = []
    said: dict[str, int] = {}  # words of each utterance
    for labels, lm in product(config.labels or ["all"], config.lm):
        rates: dict[str, list[float]] = {}
        scores: dict[str, Score] = {}
        letters: dict[str, float] = {}
        pooled: dict[str, list[Edits]] = {}
        speakers: list[str | None] = []
        for weights in config.weights:
            folders = [_evaluation(cell_folder(out, labels, seed, weights), config, lm) for seed in range(config.seeds)]
            read = [read_hypotheses(folder) for folder in folders]
            for folder, one in zip(folders, read, strict=True):
                lengths = {name: len(scored.reference.split()) for name, scored in one.items()}
                said = said or lengths
                if lengths != said:
                    raise UserError(
                        f"{folder} was scored on other utterances than the cells before it, so that they "
                        "cannot be compared: the data changed in between, or some could not be read. Mend the data, "
                        f"remove the evaluate-* folders of the cells in {out}, and give the same command."
                    )
            found = [[one[name] for name in said] for one in read]
            words = [word_edits([o.reference for o in one], [o.hypothesis for o in one]) for one in found]
            flat = [one for run in found for one in run]
            speakers = [one.speaker or None for one in found[0]]
            # What all seeds made of an utterance is drawn at once: they heard the same sound.
            pooled[weights] = [total(edits) for edits in zip(*words, strict=True)]
            rates[weights] = [round(total(run).rate, 3) for run in words]
            scores[weights] = score(pooled[weights], speakers)
            spelled = letter_edits([one.reference for one in flat], [one.hypothesis for one in flat])
            letters[weights] = round(total(spelled).rate, 3)
        first, last = config.weights[0], config.weights[-1]
        gain = compare(pooled[first], pooled[last], speakers) if first != last else None
        rows.append(Row(labels, lm, rates, scores, letters, gain))
    return rows


# -------------------------------------------------------------------------------------------------------- the tables


def _head(config: LadderConfig) -> list[str]:
    columns = [NAMES[weights] for weights in config.weights]
    return ["labels", "LM", *columns, *(["difference", "relative", "p"] if len(config.weights) > 1 else [])]


def _cells(row: Row, config: LadderConfig) -> list[str]:
    """The cells of a row: a rate with its interval and, where there are several seeds, their range in a second line."""
    cells = [row.labels, _short(row.lm)]
    for weights in config.weights:
        score, rates = row.scores[weights], row.rates[weights]
        seeds = f"\nseeds {min(rates):.1f} to {max(rates):.1f}" if len(rates) > 1 else ""
        cells.append(f"{score.total.rate:.1f} ({score.low:.1f} to {score.high:.1f}){seeds}")
    if row.gain is not None:
        gain = row.gain
        cells.append(f"{gain.difference:+.1f} ({gain.low:+.1f} to {gain.high:+.1f})")
        cells.append(f"{gain.relative:+.0f} % ({gain.relative_low:+.0f} to {gain.relative_high:+.0f})")
        cells.append(f"{gain.p:.4f}")
    return cells


def _title(rows: Sequence[Row], config: LadderConfig, source: Path) -> str:
    seeds = "1 seed" if config.seeds == 1 else f"mean of {config.seeds} seeds"
    resampled = next(iter(rows[0].scores.values())).resampled
    return f"{source}: word error rate on the {config.part} part, %; {seeds}, 95 % intervals over {resampled}"


def _table(rows: Sequence[Row], config: LadderConfig, title: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in _head(config):
        table.add_column(name)
    for row in rows:
        table.add_row(*_cells(row, config))
    return table


def write_tables(
    out: Path, rows: Sequence[Row], config: LadderConfig, source: Path, given: Mapping[str, Sequence[str]]
) -> None:
    """ladder.json, ladder.md and ladder.html; each is written anew. given: options of fine-tuning, of all cells and of
    each kind of weights."""
    from d2v_audio import report
    from d2v_core.metrics import finite, write_json

    head, title = _head(config), _title(rows, config, source)
    cells = [[cell.replace("\n", "; ") for cell in _cells(row, config)] for row in rows]
    lines = [title + ".", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in cells]
    (out / "ladder.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    body = [f"<h1>{escape(title)}</h1>", plot(rows, config), report.table(head, cells)]
    report.write_page(out / "ladder.html", f"d2v ladder {source}", body)
    write_json(out / "ladder.json", {
        "from": str(source), "part": config.part, "seeds": config.seeds, "options": given,
        "rows": finite([_row(row) for row in rows]),
    })  # fmt: skip


def _row(row: Row) -> Mapping[str, Any]:
    weights = {
        name: {
            "wer": round(score.total.rate, 3), "low": round(score.low, 3), "high": round(score.high, 3),
            "wer_of_seeds": row.rates[name], "cer": row.letters[name],
        }
        for name, score in row.scores.items()
    }  # fmt: skip
    gain = None if row.gain is None else row.gain.__dict__
    return {"labels": row.labels, "lm": row.lm, "weights": weights, "gain": gain}


def plot(rows: Sequence[Row], config: LadderConfig) -> str:
    """Word error rates over amounts of labels as SVG, a line for each kind of weights and language model."""
    width, height, left, bottom, right = 460, 300, 44, 30, 210
    labels = list(dict.fromkeys(row.labels for row in rows))
    top = max([100.0, *(score.high for row in rows for score in row.scores.values())])
    step = (width - left) / len(labels)

    def y(rate: float) -> float:
        return (height - bottom) * (1 - rate / top) + 8

    shapes = [
        f'<line x1="{left}" y1="{y(tick):.1f}" x2="{width}" y2="{y(tick):.1f}" stroke="currentColor" opacity="0.2"/>'
        f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>'
        for tick in range(0, int(top) + 1, 20)
    ]
    for i, name in enumerate(labels):
        x = left + (i + 0.5) * step
        shapes.append(f'<text x="{x:.1f}" y="{height}" text-anchor="middle">{escape(name)}</text>')
    curves = list(product(config.weights, config.lm))
    for number, (weights, lm) in enumerate(curves):
        shift = (number - (len(curves) - 1) / 2) * 5  # so that intervals do not cover each other
        stroke = f'stroke="{COLOURS[weights]}" stroke-dasharray="{DASHES[config.lm.index(lm) % len(DASHES)]}"'
        points: list[str] = []
        for row in (row for row in rows if row.lm == lm):
            score, x = row.scores[weights], left + (labels.index(row.labels) + 0.5) * step + shift
            points.append(f"{x:.1f},{y(score.total.rate):.1f}")
            if score.low <= score.high:  # no interval of one utterance
                line = f"M{x:.1f} {y(score.low):.1f}V{y(score.high):.1f}"
                shapes.append(f'<path d="{line}" {stroke.split(" stroke-d")[0]}/>')
            centre = f'cx="{x:.1f}" cy="{y(score.total.rate):.1f}"'
            shapes.append(f'<circle {centre} r="3.5" fill="{COLOURS[weights]}"/>')
        shapes.append(f'<polyline points="{" ".join(points)}" fill="none" stroke-width="2" {stroke}/>')
        place = 16 + number * 20
        shapes.append(f'<path d="M{width + 14} {place}h28" stroke-width="2" {stroke}/>')
        shapes.append(f'<text x="{width + 48}" y="{place + 4}">{NAMES[weights]}, LM {escape(_short(lm))}</text>')
    size = f'width="{width + right}" height="{height + 8}" viewBox="0 0 {width + right} {height + 8}"'
    return f"<svg {size}>{''.join(shapes)}</svg>"
