"""Sequences of symbols by CTC: every number by hand or by counting all alignments; fine-tuning of the toy."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from d2v_core import ctc, load, load_classifier, load_finetuned
from d2v_core.config import FinetuneConfig, ModelConfig
from d2v_core.contract import Corruption, LabelledPart, Layout, Task, Tokens
from d2v_core.ctc import Emissions, PerToken, Symbols, ctc_loss, edit_distance, greedy, sequences, tokens_needed
from d2v_core.errors import UserError
from d2v_core.finetune import Network, build_network
from d2v_core.keyed import generator
from d2v_core.masking import FinetuneMasking
from d2v_core.objectives import Classes, Values, fit_linear, objective_of


def ahead(*best: int, num_symbols: int = 4) -> torch.Tensor:
    """(T, symbols) logits in which the given symbol leads at each token."""
    return 5.0 * torch.nn.functional.one_hot(torch.tensor(best), num_symbols).float()


# ----------------------------------------------------------------------------------------------------- the parts


@pytest.mark.parametrize(
    ("best", "spelled"),
    [
        ([1, 1, 0, 1, 2, 2], [1, 1, 2]),
        ([0, 0, 3, 0], [3]),
        ([0, 0], []),
        ([3], [3]),
        ([1, 2, 1, 0, 0, 1], [1, 2, 1, 1]),
    ],
)
def test_greedy(best, spelled):
    assert greedy(ahead(*best)) == spelled
    assert greedy(ahead(*best, 2, 3), len(best)) == spelled  # what stands behind the length is not read
    assert greedy(ahead(*best)[:0]) == []


def collapse(path: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(key for key, _ in itertools.groupby(path) if key != 0)


def test_the_loss_is_the_probability_of_all_alignments():
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 3)
    shares = logits.softmax(-1)
    wanted, lengths = [(1, 1), (2,)], [4, 3]
    probabilities = [
        sum(
            math.prod(float(shares[b, t, s]) for t, s in enumerate(path))
            for path in itertools.product(range(3), repeat=lengths[b])
            if collapse(path) == wanted[b]
        )
        for b in range(2)
    ]
    loss = ctc_loss(Emissions(logits, torch.tensor(lengths)), ctc.padded(sequences(wanted)))
    assert loss.tolist() == pytest.approx([-math.log(p) for p in probabilities], rel=1e-5)


def test_padding_and_what_cannot_be_spelled_add_nothing_to_loss_and_gradient():
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 4, requires_grad=True)
    targets = ctc.padded(sequences([[1, 2], [3, 3, 3], []]))
    assert targets.tolist() == [[1, 2, -1], [3, 3, 3], [-1, -1, -1]]
    loss = ctc_loss(Emissions(logits, torch.tensor([3, 4, 2])), targets)  # 3 3 3 takes five tokens
    loss.sum().backward()
    assert loss[1] == 0 and loss.isfinite().all() and logits.grad is not None
    assert not logits.grad[0, 3:].any() and not logits.grad[1].any() and not logits.grad[2, 2:].any()
    assert logits.grad[0, :3].any() and logits.grad[2, :2].any()
    alone = ctc_loss(Emissions(logits[:1, :3], torch.tensor([3])), targets[:1, :2])
    silent = -logits[2, :2].log_softmax(-1)[:, 0].sum()
    assert loss[[0, 2]].tolist() == pytest.approx([alone.item(), silent.item()], rel=1e-6)


@pytest.mark.parametrize(("symbols", "least"), [([], 0), ([1], 1), ([1, 2, 1], 3), ([1, 1, 2, 2, 2], 8)])
def test_the_least_number_of_tokens(symbols, least):
    assert tokens_needed(symbols) == least
    for tokens in range(max(least - 1, 1), least + 2):
        loss = ctc_loss(Emissions(torch.zeros(1, tokens, 3), torch.tensor([tokens])), ctc.padded(sequences([symbols])))
        assert (loss > 0) == (tokens >= least), tokens


def slow_distance(a: tuple, b: tuple) -> int:
    if not a or not b:
        return len(a) + len(b)
    return min(
        slow_distance(a[1:], b) + 1, slow_distance(a, b[1:]) + 1, slow_distance(a[1:], b[1:]) + (a[0] != b[0])
    )  # fmt: skip


def test_edit_distance():
    rng = np.random.default_rng(0)
    for _ in range(60):
        a, b = (tuple(map(int, rng.integers(1, 4, rng.integers(0, 6)))) for _ in range(2))
        assert edit_distance(a, b) == slow_distance(a, b), (a, b)
    assert ctc.symbol_errors([[1, 2], [3]], [[1, 3, 3], []]) == {"symbol_errors": 100.0}


def test_a_head_at_every_token():
    objective = Symbols(["blank", "a", "b"], ["symbol_errors"])
    head = objective.head(ModelConfig(embed_dim=2), FinetuneConfig())
    assert not head.out.bias.any() and head.out.weight.abs().max() <= math.sqrt(6 / (2 + 3))
    x = torch.arange(12.0).view(1, 6, 2)
    padding = torch.tensor([[False, False, False, False, True, True]])
    emissions = head(Tokens(x, padding, (5,), num_extra=1))
    assert emissions.lengths.tolist() == [3] and torch.allclose(emissions.logits, head.out(x[:, 1:]))
    assert head(Tokens(x, None, (6,))).lengths.tolist() == [6]
    features = PerToken(torch.randn(2, 5, 2), torch.tensor([3, 5]))
    again = objective.join(objective.split(features))
    assert again.lengths.tolist() == [3, 5] and torch.equal(again.x[0, :3], features.x[0, :3])
    assert not again.x[0, 3:].any() and torch.equal(again.x[1], features.x[1])


def test_the_best_has_the_fewest_errors_and_the_next_score_breaks_ties():
    objective = Symbols(["blank", "a"], ["words", "letters"])
    rank = [objective.rank({"words": w, "letters": l}) for w, l in ((100, 90), (100, 80), (99.9, 120))]  # noqa: E741
    assert rank == sorted(rank)


def test_what_a_task_asks_for():
    part = LabelledPart([0], sequences([[1]]))  # pyright: ignore[reportArgumentType]
    assert isinstance(objective_of(Task("t", (), ("symbol_errors",), part, symbols=("blank", "a"))), Symbols)
    assert isinstance(objective_of(Task("t", ("a", "b"), ("accuracy",), part)), Classes)
    assert isinstance(objective_of(Task("t", (), ("pearson",), part)), Values)
    with pytest.raises(ValueError, match="t has both classes and symbols"):
        objective_of(Task("t", ("a", "b"), ("accuracy",), part, symbols=("blank", "a")))


def test_a_linear_map_on_features_learns_on_standardised_ones_and_reads_raw_ones():
    """Two classes told apart by a channel of tiny variance far from 0."""
    rng = np.random.default_rng(0)
    labels = torch.tensor([0, 1] * 20)
    features = [torch.tensor([500.0 + 1e-2 * label, rng.normal()]).float() for label in labels.tolist()]
    out = torch.nn.Linear(2, 2)

    def loss(chosen, numbers):
        assert torch.stack(chosen).abs().max() < 5
        return torch.nn.functional.cross_entropy(out(torch.stack(chosen)), labels[list(numbers)])

    fit_linear(out, features, loss, steps=100, batch=8, lr=0.1, rng=rng)
    assert torch.equal(out(torch.stack(features)).argmax(1), labels)


# ------------------------------------------------------------------------------------------------- what is withheld


def test_spans_of_tokens_and_channels():
    config = FinetuneConfig(mask_prob=0.5, mask_length=4, channel_mask_prob=0.25, channel_mask_length=8)
    layouts = [Layout((40,)), Layout((30,))]
    drawn = FinetuneMasking(config, 64)(layouts, [generator(0, "x", i) for i in range(2)])
    assert drawn is not None and drawn.hidden is not None and drawn.channels is not None
    assert drawn.hidden.shape == (2, 40) and drawn.channels.shape == (2, 64)
    assert drawn.hidden[0].sum() == drawn.hidden[1].sum() > 0 and not drawn.hidden[1, 30:].any()
    shares = [FinetuneMasking(config, 64)(layouts, [generator(n, "x", i) for i in range(2)]) for n in range(200)]
    assert 0.15 < np.mean([s.channels.float().mean() for s in shares]) < 0.26
    assert FinetuneMasking(FinetuneConfig(), 64)(layouts, []) is None
    only = FinetuneMasking(FinetuneConfig(mask_prob=0.5), 64)(layouts, [generator(0, "x", i) for i in range(2)])
    assert only is not None and only.channels is None


# -------------------------------------------------------------------------------------------------------- the run


@pytest.fixture
def pretrained(d2v, tmp_path: Path) -> Path:
    run = tmp_path / "pretrained"
    assert d2v("run", "modality=toy", f"out={run}", "train.max_steps=3", "data.extra_tokens=1")[0] == 0
    return run


@pytest.fixture
def finetune(d2v, pretrained: Path, tmp_path: Path):
    """finetune("name", "labels=12") -> (status, printed, folder): on sequences of symbols."""

    def call(name: str, *words: str):
        out = tmp_path / name
        given = ("offsets.spelled=true", *words)
        status, text = d2v("run", "stage=finetune", f"from={pretrained}", f"out={out}", *given)
        return status, text, out

    return call


def scores_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]


LEARNING = ("optim.lr=1e-2", "finetune.head_steps=40", "finetune.head_lr=5e-2")


def test_it_learns_to_spell_and_leaves_everything(finetune):
    status, text, out = finetune("run", *LEARNING, "train.max_steps=60")
    assert status == 0, text
    assert "The head was first trained alone, 40 steps on 48 samples' features." in text
    scores = scores_of(out)
    result = json.loads((out / "summary.json").read_text())["finetune"]
    best = min(score["symbol_errors"] for score in scores)
    assert result["dev"]["symbol_errors"] == best and result["test"]["symbol_errors"] < 40
    assert result["best_step"] == next(score["step"] for score in scores if score["symbol_errors"] == best)
    lines = [line.split("\t") for line in (out / "predictions-test.tsv").read_text().splitlines()]
    assert lines[0] == ["id", "label", "predicted"] and len(lines) == 32
    edits = sum(edit_distance([ord(x) for x in p.split()], [ord(x) for x in t.split()]) for _, t, p in lines[1:])
    count = sum(len(label.split()) for _, label, _ in lines[1:])
    assert result["test"]["symbol_errors"] == pytest.approx(100 * edits / count, abs=0.01)
    assert json.loads((out / "task.json").read_text())["symbols"] == ["blank", "a", "b"]


def test_what_is_loaded_spells_what_the_run_wrote(finetune):
    _, _, out = finetune("run", *LEARNING)
    loaded = load_finetuned(out)
    part = loaded.modality.task().test
    kept = loaded.objective.keep(loaded.outputs([part.samples[i] for i in range(31)]))
    told = {
        line.split("\t")[0]: line.split("\t")[2] for line in (out / "predictions-test.tsv").read_text().splitlines()
    }
    for i, one in enumerate(kept):
        assert " ".join(loaded.objective.symbols[s] for s in one) == told[part.samples.id(i)]
    with pytest.raises(UserError, match="tells symbols, not classes or values"):
        load_classifier(out)
    encoder = load(out)
    assert encoder.encode(encoder.modality.collate([part.samples[0]]))[-1].shape[1] == encoder.config.model.embed_dim


def test_the_head_alone_is_much_better_than_a_new_one(finetune):
    words = ("optim.lr=1e-9", "train.max_steps=1", "finetune.eval_every=1")
    new, first = (finetune(f"run{n}", *words, f"finetune.head_steps={n}", "finetune.head_lr=5e-2")[2] for n in (0, 60))
    assert scores_of(first)[0]["symbol_errors"] < scores_of(new)[0]["symbol_errors"] - 15


@pytest.mark.parametrize("extra", [(), ("finetune.batch=null",)])
def test_stopped_and_resumed_is_the_same(finetune, extra):
    from .test_finetune import stopping_after, weights_of

    words = (*LEARNING, "finetune.mask_prob=0.3", "finetune.mask_length=2", "finetune.channel_mask_prob=0.2",
             "finetune.channel_mask_length=4", *extra)  # fmt: skip
    assert finetune("straight", *words)[0] == 0
    with stopping_after(7):
        assert finetune("stopped", *words)[0] == 130
    status, _, out = finetune("stopped", *words, "resume=auto", "train.num_workers=1")
    straight = out.parent / "straight"
    assert status == 0
    for name in ("scores.jsonl", "predictions-test.tsv", "task.json"):
        assert (out / name).read_bytes() == (straight / name).read_bytes(), name
    a, b = weights_of(out), weights_of(straight)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_masks_are_drawn_while_training_and_never_while_scoring(finetune, monkeypatch):
    seen: dict[bool, list] = {True: [], False: []}
    forward = Network.forward

    def look(self, inputs, corruption=None, frozen=False):
        seen[self.training].append(corruption)
        return forward(self, inputs, corruption, frozen)

    monkeypatch.setattr(Network, "forward", look)
    words = ("finetune.mask_prob=0.5", "finetune.mask_length=2", "train.max_steps=5", "finetune.freeze_steps=2")
    assert finetune("run", *words)[0] == 0
    assert len(seen[True]) == 5 and all(one is not None and one.hidden.any() for one in seen[True])
    assert seen[False] and all(one is None for one in seen[False])


def test_withheld_tokens_and_channels_do_not_reach_the_network(make, pretrained):
    modality = make("stage=finetune", f"from={pretrained}", "offsets.spelled=true", "data.extra_tokens=1")
    network = build_network(modality, Symbols(["blank", "a"], ["symbol_errors"])).eval()
    encoder = network.student.encoder
    seen = []
    view = encoder.view
    encoder.view = lambda tokens, masks: (seen.append((tokens, masks)), view(tokens, masks))[1]  # pyright: ignore
    x = torch.randn(2, 12, 4)
    hidden, channels = torch.zeros(2, 12, dtype=torch.bool), torch.zeros(2, 16, dtype=torch.bool)
    hidden[0, 3:5] = channels[1, 8:] = True
    width = modality.config.model.embed_dim
    network({"x": x}, Corruption(hidden, channels[:, :width]))
    network({"x": x})
    (corrupted, masks), (plain, _) = seen
    assert masks is None and corrupted.x.shape == plain.x.shape  # no token leaves the sequence
    assert corrupted.x[0, 3:5].abs().max() < 0.06 < plain.x[0, 3:5].abs().max()
    assert torch.equal(corrupted.x[0, 5:], plain.x[0, 5:])
    assert not corrupted.x[1, :, 8:width].any() and torch.equal(corrupted.x[1, :, :8], plain.x[1, :, :8])


def test_learning_rates_are_tried_and_the_best_on_dev_is_kept(finetune):
    words = ("finetune.lrs=[1e-7,1e-2,3e-3]", "train.max_steps=30", "finetune.head_steps=0")
    status, text, out = finetune("run", *words)
    assert status == 0, text
    result = json.loads((out / "summary.json").read_text())["finetune"]
    dev = {one["lr"]: one["dev"]["symbol_errors"] for one in result["rates"]}
    assert dev[result["lr"]] == min(dev.values()) == result["dev"]["symbol_errors"] and result["lr"] != 1e-7
    trials = [out / "rates" / f"{rate:g}" for rate in dev]
    for trial in trials:  # only the one that was kept is tested
        assert "test" not in json.loads((trial / "summary.json").read_text())["finetune"]
        assert (trial / "config.yaml").is_file()
    assert "test" in result and (out / "predictions-test.tsv").is_file()
    kept = load_finetuned(out).network.state_dict()
    alone = load_finetuned(out / "rates" / f"{result['lr']:g}").network.state_dict()
    assert all(torch.equal(kept[name], alone[name]) for name in kept)
    assert "already complete" in finetune("run", *words, "resume=auto")[1]


def test_a_search_that_was_stopped_goes_on(finetune):
    from .test_finetune import stopping_after

    words = ("finetune.lrs=[1e-2,3e-3]", "train.max_steps=6")
    assert finetune("straight", *words)[0] == 0
    with stopping_after(9):  # in the second trial
        status, text, out = finetune("stopped", *words)
    assert status == 130 and "one of 2 learning rates" in text and "resume=auto" in text
    assert finetune("stopped", *words, "resume=auto")[0] == 0
    straight = out.parent / "straight"
    assert (out / "predictions-test.tsv").read_bytes() == (straight / "predictions-test.tsv").read_bytes()


def test_the_probe_cannot_spell(d2v, pretrained, tmp_path):
    status, text = d2v("run", "stage=probe", f"from={pretrained}", "offsets.spelled=true", f"out={tmp_path / 'no'}")
    assert status == 2 and "asks for symbols, and stage=probe tells classes apart" in text


def test_a_blank_in_a_label_is_refused(make, pretrained, monkeypatch):
    import d2v_toy

    from d2v_core.labelled import open_task

    made = make("stage=finetune", f"from={pretrained}", "offsets.spelled=true")
    task = made.task()
    task.train.labels[3] = np.array([1, 0, 1])
    monkeypatch.setattr(d2v_toy.ToyModality, "task", lambda self: task)
    with pytest.raises(ValueError, match="labels of train outside the 3 symbols, of which 0 is none"):
        open_task(made)


def test_sorted_batches_by_size_hold_everything_once_and_crop_nothing(make, pretrained):
    from d2v_core.batching import LabelledSteps, labelled_batches

    made = make("stage=finetune", f"from={pretrained}", "offsets.spelled=true", "data.batch=64", "data.micro_batch=32")
    part = made.task().train
    seen = [name for one in labelled_batches(made, part, ctc.padded, None) for name in one.ids]
    assert sorted(seen) == sorted(part.samples.id(i) for i in range(60))
    steps = iter(LabelledSteps(made, part, ctc.padded, batch=None, seed=0))
    for _ in range(5):
        _, _, batches = next(steps)
        assert len(batches) == 2
        for batch in batches:
            rows, width = batch.inputs["x"].shape[:2]
            assert rows == 1 or rows * width <= 32
            for name in batch.ids:
                assert part.samples.sizes[int(name.split("-")[1])] <= width
