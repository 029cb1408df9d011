"""Do the built-in beam search and flashlight's find the same words with a trained network, and at what cost?

    python benchmarks/decoders.py runs/fine --lm lm.arpa --lm-weights 1,2 --word-scores=-1,1 \\
        --out benchmarks/results/decoders.json

Both are given the same emissions and the same settings; hypotheses are compared utterance by utterance. Needs
`pip install 'd2v[decode]'`. Seconds are of CPU time.
"""

from __future__ import annotations

import argparse
import platform
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

from d2v_audio.decode import DecodeConfig, make_decoder
from d2v_audio.evaluate import listen, open_part
from d2v_audio.recognize import load_recognizer
from d2v_audio.wer import total, word_edits
from d2v_core.metrics import write_json


def main() -> None:
    numbers = lambda text: [float(one) for one in text.split(",")]  # noqa: E731
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="fine-tuned on transcripts")
    parser.add_argument("--lm", required=True, help="ARPA file")
    parser.add_argument("--part", default="test")
    parser.add_argument("--beams", type=numbers, default=[50.0])
    parser.add_argument("--lm-weights", type=numbers, default=[2.0])
    parser.add_argument("--word-scores", type=numbers, default=[-1.0])
    parser.add_argument("--sil-scores", type=numbers, default=[0.0])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    recognizer = load_recognizer(args.run)
    spoken = listen(recognizer, open_part(args.run, args.part), print)
    rows: list[dict[str, Any]] = []
    for beam, lm_weight, word_score, sil_score in product(
        args.beams, args.lm_weights, args.word_scores, args.sil_scores
    ):
        row: dict[str, Any] = {
            "beam": int(beam), "lm_weight": lm_weight, "word_score": word_score, "sil_score": sil_score
        }  # fmt: skip
        texts: dict[str, list[str]] = {}
        scores: dict[str, list[float]] = {}
        for engine in ("flashlight", "builtin"):
            config = DecodeConfig(
                engine=engine, beam=int(beam), lm_weight=lm_weight, word_score=word_score, sil_score=sil_score
            )
            decoder = make_decoder(recognizer.letters, config, args.lm, say=lambda line: None)
            began = time.process_time()
            best = [(decoder(one[None])[0] or [None])[0] for one in spoken.emissions]
            row[f"{engine}_seconds"] = round(time.process_time() - began, 2)
            texts[engine] = [" ".join(one.words) if one else "" for one in best]
            scores[engine] = [one.score if one else 0.0 for one in best]
            row[f"{engine}_wer"] = round(total(word_edits(spoken.references, texts[engine])).rate, 3)
        pairs = list(zip(texts["flashlight"], texts["builtin"], strict=True))
        row["utterances"], row["equal"] = len(pairs), sum(a == b for a, b in pairs)
        row["largest_score_difference"] = max(
            abs(a - b) for a, b in zip(scores["flashlight"], scores["builtin"], strict=True)
        )
        row["different"] = [
            {"id": name, "flashlight": a, "builtin": b}
            for name, (a, b) in zip(spoken.ids, pairs, strict=True)
            if a != b
        ]
        rows.append(row)
        print({key: value for key, value in row.items() if key != "different"})
    if args.out:
        machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        write_json(args.out, {"run": str(args.run), "lm": args.lm, "part": args.part, **machine, "rows": rows})


if __name__ == "__main__":
    main()
