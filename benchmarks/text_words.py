"""What the token table of a text run knows about words: grammar, or whether they are kind.

    python benchmarks/text_words.py runs/text/pretrain-0 glue/

Five nearest neighbours by cosine, each word left out once, balanced over classes; for the trained and the untrained
table. Endings: whether a word ends in -ed, -ing, -ly or -tion, which stands for its grammatical class (the network
never sees letters). Polarity: whether one-word phrases of SST-2's training part are negative or positive.
"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from d2v_core import load

ENDINGS = ("ed", "ing", "ly", "tion")
LEAST_LETTERS = 5


def endings(tokenizer: Tokenizer) -> dict[int, int]:
    """Whole words among the tokens, by their ending."""
    found: dict[int, int] = {}
    for token in range(tokenizer.get_vocab_size()):
        word = tokenizer.decode([token])
        if word.startswith(" ") and word[1:].isalpha() and word[1:].islower() and len(word) > LEAST_LETTERS:
            number = next((number for number, ending in enumerate(ENDINGS) if word.endswith(ending)), None)
            if number is not None:
                found[token] = number
    return found


def polarity(tokenizer: Any, glue: Path) -> dict[int, int]:
    """Words that are one token and have one label as phrases of their own."""
    labels: dict[str, set[int]] = defaultdict(set)
    with (glue / "SST-2" / "train.tsv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            word, label = row["sentence"].strip(), row["label"]
            if word.isalpha() and len(word) > 2:
                labels[word].add(int(label))
    found: dict[int, int] = {}
    for word, there in labels.items():
        (ids,) = tokenizer.encode([f"a {word}"])
        if len(there) == 1 and len(ids) == 2:
            found[int(ids[1])] = there.pop()
    return found


def by_neighbours(table: Tensor, known: Mapping[int, int], k: int = 5) -> float:
    """Balanced accuracy in per cent; the rarer class wins no tie."""
    tokens = torch.tensor(sorted(known))
    classes = torch.tensor([known[int(token)] for token in tokens])
    x = F.normalize(table[tokens], dim=1)
    cosine = (x @ x.T).fill_diagonal_(-2.0)
    shares = torch.bincount(classes) / len(classes)
    votes = F.one_hot(classes[cosine.topk(k).indices], len(shares)).sum(1) + 1e-3 * shares
    right = votes.argmax(1) == classes
    return 100.0 * sum(right[classes == c].float().mean().item() for c in range(len(shares))) / len(shares)


def main() -> None:
    run, glue = Path(sys.argv[1]), Path(sys.argv[2])
    by_ending = endings(Tokenizer.from_file(str(run / "tokenizer.json")))
    modality: Any = load(run).modality
    by_polarity = polarity(modality.tokenizer, glue)
    print(f"{len(by_ending)} words by ending (chance 25 %), {len(by_polarity)} by polarity (chance 50 %)")
    for name, loaded in (("trained", load(run)), ("untrained", load(run, untrained=True))):
        embedding: Any = loaded.student.encoder.embedding
        table = embedding.table.weight.detach()
        print(f"{name:9}  endings {by_neighbours(table, by_ending):.1f} %  "
              f"polarity {by_neighbours(table, by_polarity):.1f} %")  # fmt: skip


if __name__ == "__main__":
    main()
