"""Pages in HTML that need nothing but themselves: the worst utterances of an evaluation, with what the network heard
drawn over the sound, and the parts that other pages (`d2v ladder`) are made of.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from d2v_audio.align import Clock, align, joined
from d2v_audio.data import log_mel
from d2v_audio.evaluate import Part, Spoken, reference_words
from d2v_audio.wer import word_edits
from d2v_audio.words import Heard, times
from d2v_core.contract import BadSample

if TYPE_CHECKING:
    from d2v_audio.recognize import Recognizer

PIXELS_PER_S, SOUND, ROW = 170, 120, 18  # of the drawings: width of a second, heights of the sound and of a line
# Dark to bright, a colour for every grey of the spectrogram: black, violet, red, yellow, white at equal distances.
STOPS = np.array([(4, 3, 20), (84, 20, 110), (200, 62, 76), (248, 166, 36), (252, 252, 190)], np.float64)
STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
h1 { font-size: 1.4em } h2 { font-size: 1em; margin: 2.2em 0 .3em }
table { border-collapse: collapse } th, td { padding: .15em .7em; text-align: right }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 1px solid }
.words td { text-align: center; padding: .1em .35em } .words th { font-weight: normal; opacity: .7 }
.wrong { color: #c22; font-weight: 600 } .drawing { overflow-x: auto } .note { opacity: .75 }
svg text { font: 12px system-ui, sans-serif; fill: currentColor }
"""


def write(
    path: Path,
    result: Mapping[str, Any],
    part: Part,
    spoken: Spoken,
    heard: Sequence[Heard],
    recognizer: Recognizer,
    count: int,
) -> None:
    """The page of an evaluation: its rates, and `count` utterances with the largest share of wrong words."""
    edits = word_edits(spoken.references, [one.text for one in heard])
    share = [one.errors / max(one.length, 1) for one in edits]
    worst = sorted(range(len(edits)), key=lambda i: (-share[i], -edits[i].errors, spoken.ids[i]))[:count]
    how = result["decode"]
    body = [
        f"<h1>{escape(result['run'])}, {escape(result['part'])} part</h1>",
        f"<p>{result['utterances']} utterances, {result['minutes']} minutes; {escape(_decoding(how))}.</p>",
        _rates(result),
        f"<p class=note>The {len(worst)} utterances with the largest share of wrong words. Above the sound, the words "
        "that were said; below it, each letter that was heard at the moment the network named it, and the words. Both "
        "lie where forced alignment puts them.</p>",
    ]
    for i in worst:
        body += [
            f"<h2>{escape(spoken.ids[i])}</h2>",
            f"<p class=note>{_speaker(spoken.speakers[i])}{spoken.seconds[i]:.2f} s, {edits[i].errors} errors in "
            f"{edits[i].length} words</p>",
            _side_by_side(spoken.references[i], heard[i].text),
            f"<div class=drawing>{_drawing(part, spoken, heard[i], i, recognizer)}</div>",
        ]
    write_page(path, f"d2v evaluate {result['run']}", body)


def write_page(path: Path, title: str, body: Sequence[str]) -> None:
    """An HTML file, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{escape(title)}</title>"
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n",
        encoding="utf-8",
    )
    temporary.replace(path)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are text, not HTML."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"


def _speaker(name: str | None) -> str:
    return "" if name is None else f"speaker {escape(name)}, "


def _decoding(how: Mapping[str, Any]) -> str:
    if how["search"] == "greedy":
        return "greedy decoding"
    weights = ", ".join(f"{name} {how[name]:g}" for name in ("lm_weight", "word_score", "sil_score"))
    tuned = " (tuned on dev)" if how["tuned_on_dev"] else ""
    return f"beam search ({how['search']}), language model {how['lm']}, {how['words']} words, {weights}{tuned}"


def _rates(result: Mapping[str, Any]) -> str:
    rows = [
        [unit, f"{one['rate']:.2f}", f"{one['low']:.2f} to {one['high']:.2f}", str(one["substitutions"]),
         str(one["deletions"]), str(one["insertions"]), str(one[unit])]
        for unit, one in (("words", result["wer"]), ("letters", result["cer"]))
    ]  # fmt: skip
    interval = f"95 % interval over {result['wer']['resampled']}"
    return table(["", "error rate, %", interval, "substituted", "deleted", "inserted", "of"], rows)


def _side_by_side(reference: str, hypothesis: str) -> str:
    """Said and heard, word under word; what differs is marked."""
    said, heard = reference.split(), hypothesis.split()
    pairs: list[tuple[str, str]] = []
    if said and heard:
        import jiwer

        for chunk in jiwer.process_words(" ".join(said), " ".join(heard)).alignments[0]:
            left = said[chunk.ref_start_idx : chunk.ref_end_idx]
            right = heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
            rows = max(len(left), len(right))
            pairs += zip(left + [""] * (rows - len(left)), right + [""] * (rows - len(right)), strict=True)
    else:
        pairs = [(word, "") for word in said] + [("", word) for word in heard]

    def cell(word: str, wrong: bool) -> str:
        return f"<td{' class=wrong' if wrong else ''}>{escape(word) or '&middot;'}</td>"

    lines = [
        f"<tr><th>{name}</th>" + "".join(cell(pair[row], pair[0] != pair[1]) for pair in pairs) + "</tr>"
        for row, name in enumerate(("said", "heard"))
    ]
    return f"<table class=words>{''.join(lines)}</table>"


def _drawing(part: Part, spoken: Spoken, heard: Heard, i: int, recognizer: Recognizer) -> str:
    """The spectrogram with both alignments, as SVG."""
    try:
        waveform = part.samples[spoken.index[i]].waveform
    except BadSample as error:  # it was there a moment ago
        return f"<p>{escape(str(error))}</p>"
    letters, emissions, seconds = recognizer.letters, spoken.emissions[i], spoken.seconds[i]
    clock = Clock(recognizer.offset_s, recognizer.frame_s, seconds)
    width = max(1, round(seconds * PIXELS_PER_S))
    top, bottom = ROW + 4, ROW + 4 + SOUND
    shapes = [
        f'<image x="0" y="{top}" width="{width}" height="{SOUND}" preserveAspectRatio="none" '
        f'href="{picture(waveform, recognizer.sample_rate)}"/>'
    ]
    said = reference_words(spoken.references[i], letters, emissions, clock)
    if said is None:
        shapes.append(f'<text x="2" y="{ROW - 3}">too few frames for what was said</text>')
    for word in said or []:
        shapes.append(_word(word.text, word.start_s, word.end_s, ROW - 3, top - 2))
    spans = align(emissions, joined(heard.spelled, letters.boundary)) or []
    for span in spans:
        middle = sum(clock.edges(span.first, span.last)) / 2 * PIXELS_PER_S
        name = letters.symbols[span.symbol]
        shapes.append(
            f'<line x1="{middle:.1f}" y1="{bottom}" x2="{middle:.1f}" y2="{bottom + 4}" stroke="currentColor"/>'
        )
        shapes.append(f'<text x="{middle:.1f}" y="{bottom + ROW}" text-anchor="middle">{escape(name)}</text>')
    for word in times(heard, emissions, letters, clock):
        shapes.append(_word(word.text, word.start_s, word.end_s, bottom + 2 * ROW, bottom + ROW + 6))
    for second in range(math.ceil(seconds - 0.15)):  # none at the very end, where it would be cut off
        x = second * PIXELS_PER_S
        shapes.append(f'<text x="{x + 2}" y="{bottom + 3 * ROW}" opacity="0.6">{second} s</text>')
    height = bottom + 3 * ROW + 6
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">{"".join(shapes)}</svg>'


def _word(text: str, start_s: float, end_s: float, baseline: int, bar: int) -> str:
    x, end = start_s * PIXELS_PER_S, end_s * PIXELS_PER_S
    return (
        f'<line x1="{x:.1f}" y1="{bar}" x2="{end:.1f}" y2="{bar}" stroke="currentColor" stroke-width="2"/>'
        f'<text x="{x:.1f}" y="{baseline}">{escape(text)}</text>'
    )


def picture(waveform: np.ndarray, sample_rate: int) -> str:
    """The log-mel spectrogram of (S,) samples as the address of a PNG, low frequencies at the bottom."""
    bands = log_mel(torch.from_numpy(np.ascontiguousarray(waveform))[None], sample_rate)[0].numpy()
    low, high = np.percentile(bands, [2, 99.5])
    grey = np.clip((bands - low) / max(high - low, 1e-6), 0, 1) * (len(STOPS) - 1)
    under = np.minimum(grey.astype(int), len(STOPS) - 2)
    part = (grey - under)[..., None]
    colours = STOPS[under] * (1 - part) + STOPS[under + 1] * part  # (windows, bands, 3)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(colours.transpose(1, 0, 2)[::-1]).astype(np.uint8)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
