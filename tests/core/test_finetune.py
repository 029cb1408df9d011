"""Fine-tuning and probing on the toy's labelled task."""

from __future__ import annotations

import json
import math
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import d2v_core
from d2v_core import load, load_classifier
from d2v_core.checkpoint import list_checkpoints
from d2v_core.config import FinetuneConfig, ModelConfig
from d2v_core.contract import Tokens
from d2v_core.data2vec import mean_of_valid
from d2v_core.errors import UserError
from d2v_core.finetune import Finetuner
from d2v_core.objectives import Classes, PooledHead, Values
from d2v_core.probe import fit_knn, pooled_layers


@pytest.fixture
def pretrained(d2v, tmp_path: Path) -> Path:
    run = tmp_path / "pretrained"
    assert d2v("run", "modality=toy", f"out={run}", "train.max_steps=3", "data.extra_tokens=1")[0] == 0
    return run


@pytest.fixture
def finetune(d2v, pretrained: Path, tmp_path: Path):
    """finetune("name", "labels=12") -> (status, printed, folder)."""

    def call(name: str, *words: str):
        out = tmp_path / name
        status, text = d2v("run", "stage=finetune", f"from={pretrained}", f"out={out}", *words)
        return status, text, out

    return call


def summary_of(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def weights_of(run: Path, folder: str = "checkpoints") -> dict[str, torch.Tensor]:
    return load_file(list_checkpoints(run / folder)[-1] / "model.safetensors")


# ------------------------------------------------------------------------------------------------------ the parts


def test_a_head_by_hand():
    model = ModelConfig(embed_dim=2)
    x = torch.tensor([[[9.0, 9.0], [1.0, 2.0], [3.0, 4.0], [5.0, 100.0]]])
    padding = torch.tensor([[False, False, False, True]])
    tokens = Tokens(x, padding, (3,), num_extra=1)
    assert torch.equal(mean_of_valid(tokens), torch.tensor([[2.0, 3.0]]))
    head = PooledHead(model, FinetuneConfig(pool="mean"), 3)
    assert torch.allclose(head(tokens), head.out(torch.tensor([[2.0, 3.0]])))
    head = PooledHead(model, FinetuneConfig(pool="first", head_hidden=True), 3)
    assert torch.allclose(head(tokens), head.out(torch.tanh(head.hidden(torch.tensor([[9.0, 9.0]])))))
    head = PooledHead(model, FinetuneConfig(head_norm=True, head_init_std=2e-5), 3)
    assert torch.allclose(head(tokens), head.out(torch.tensor([[-1.0, 1.0]])), atol=1e-4)
    assert head.out.weight.abs().max() < 1e-4 and not head.out.bias.any()


def test_losses_by_hand():
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    hard = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    plainly = Classes("ab", ["accuracy"])
    plain = math.log(1 + math.exp(-2)) + math.log(2)
    assert plainly.loss(logits, hard).item() == pytest.approx(plain)
    wrong = math.log(1 + math.exp(2)) + math.log(2)  # all weight on the other class
    smoothed = 0.9 * plain + 0.1 * (plain + wrong) / 2
    assert Classes("ab", ["accuracy"], 0.1).loss(logits, hard).item() == pytest.approx(smoothed)
    shared = torch.tensor([[0.25, 0.75], [0.0, 1.0]])
    expected = 0.25 * math.log(1 + math.exp(-2)) + 0.75 * math.log(1 + math.exp(2)) + math.log(2)
    assert plainly.loss(logits, shared).item() == pytest.approx(expected)
    assert Values(["pearson"]).loss(torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 1.0])).item() == 5.0


def test_votes_of_neighbours_by_hand():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    classify = fit_knn(x, torch.tensor([0, 1, 1]), 2, k=2, temperature=0.5)
    votes = classify(torch.tensor([[2.0, 0.0], [-3.0, 3.0]]))
    root = 2**-0.5
    assert torch.allclose(votes, torch.tensor([[1.0, math.exp(-2)], [0.0, 2 * math.exp((root - 1) / 0.5)]]), atol=1e-5)
    assert fit_knn(x, torch.tensor([0, 1, 1]), 2, k=99)(x).shape == (3, 2)


def test_pooled_features_of_a_batch_are_those_of_its_samples(pretrained):
    loaded = load(pretrained)
    samples = [loaded.modality.dataset("train")[i] for i in range(4)]
    together = pooled_layers(loaded.student, loaded.modality.collate(samples))
    assert len(together) == 3  # the input and two blocks
    for i, sample in enumerate(samples):
        alone = loaded.encode(loaded.modality.collate([sample]))
        for a, b in zip(together, alone, strict=True):
            assert torch.allclose(a[i], b.mean(0), atol=1e-5)


# -------------------------------------------------------------------------------------------------------- the run


def test_it_learns_and_leaves_everything(finetune):
    status, text, out = finetune("run", "optim.lr=1e-2", "train.max_steps=60", "data.extra_tokens=1")
    assert status == 0 and "Weights of the student from" in text
    result = summary_of(out)["finetune"]
    assert result["test"]["accuracy"] > 90 and result["labels"] == 48 and summary_of(out)["stage"] == "finetune"
    scores = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [score["step"] for score in scores] == list(range(5, 61, 5))
    assert scores[0]["accuracy"] < 80
    best = max(score["accuracy"] for score in scores)
    assert result["dev"]["accuracy"] == best
    assert result["best_step"] == next(score["step"] for score in scores if score["accuracy"] == best)
    assert json.loads((out / "task.json").read_text())["classes"] == ["class-0", "class-1", "class-2"]
    lines = [line.split("\t") for line in (out / "predictions-test.tsv").read_text().splitlines()]
    assert lines[0] == ["id", "label", "predicted", "probability"] and len(lines) == 32
    right = sum(label == predicted for _, label, predicted, _ in lines[1:])
    assert result["test"]["accuracy"] == pytest.approx(100 * right / 31, abs=0.01)


def test_a_loaded_classifier_says_what_the_run_wrote(finetune):
    _, _, out = finetune("run")
    classifier = load_classifier(out)
    assert classifier.classes == ("class-0", "class-1", "class-2")
    assert classifier.step == summary_of(out)["finetune"]["best_step"]
    part = classifier.modality.task().test
    probabilities = classifier.predict([part.samples[i] for i in range(31)])
    assert torch.allclose(probabilities.sum(1), torch.ones(31), atol=1e-5)
    told = {name: (predicted, float(p)) for name, _, predicted, p in
            (line.split("\t") for line in (out / "predictions-test.tsv").read_text().splitlines()[1:])}  # fmt: skip
    for i, row in enumerate(probabilities):
        predicted, p = told[part.samples.id(i)]
        assert classifier.classes[int(row.argmax())] == predicted and row.max().item() == pytest.approx(p, abs=1e-3)
    encoder = load(out)
    best = weights_of(out, "best")
    assert all(torch.equal(t, best[f"student.{n}"]) for n, t in encoder.student.state_dict().items())


@contextmanager
def stopping_after(count: int):
    update, seen = Finetuner.update, []

    def counted(self, batches):
        seen.append(None)
        if len(seen) == count:
            signal.raise_signal(signal.SIGINT)
        return update(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finetuner, "update", counted)
        yield


@pytest.mark.parametrize("stop", [1, 5, 7, 14])
def test_stopped_and_resumed_is_the_same(finetune, stop):
    words = ("finetune.ema_decay=0.8", "model.drop_path=0.2", "offsets.mixed=true", "finetune.freeze_steps=3")
    assert finetune("straight", *words)[0] == 0
    with stopping_after(stop):
        status, text, out = finetune("stopped", *words)
    assert status == 130 and f"after step {stop}" in text
    status, text, out = finetune("stopped", *words, "resume=auto", "train.num_workers=2")
    straight = out.parent / "straight"
    assert status == 0 and f"step-{stop:08d}" in text
    for name in ("scores.jsonl", "predictions-test.tsv", "predictions-dev.tsv", "task.json"):
        assert (out / name).read_bytes() == (straight / name).read_bytes(), name
    for folder in ("checkpoints", "best"):
        a, b = weights_of(out, folder), weights_of(straight, folder)
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert finetune("stopped", *words, "resume=auto")[1].count("already complete") == 1


def test_what_it_starts_from(finetune, pretrained, monkeypatch):
    seen = []
    update = Finetuner.update

    def look(self, batches):
        if self.progress.step == 0:
            seen.append({n: p.clone() for n, p in self.model.student.named_parameters()})
        return update(self, batches)

    monkeypatch.setattr(Finetuner, "update", look)
    for weights in ("student", "teacher", "untrained"):
        assert finetune(weights, f"finetune.weights={weights}", "train.max_steps=1")[0] == 0
    for found, expected in zip(
        seen, (load(pretrained), load(pretrained, teacher=True), load(pretrained, untrained=True)), strict=True
    ):
        for name, tensor in expected.student.named_parameters():
            assert torch.equal(found[name], tensor), name
    assert not torch.equal(seen[0]["transformer.blocks.0.fc1.weight"], seen[1]["transformer.blocks.0.fc1.weight"])
    assert not torch.equal(seen[0]["transformer.blocks.0.fc1.weight"], seen[2]["transformer.blocks.0.fc1.weight"])


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], prefix: str) -> set[bool]:
    return {not torch.equal(before[n], after[f"student.{n}"]) for n in before if n.startswith(prefix)}


def test_the_head_learns_alone_at_first_and_frozen_parts_never(finetune, pretrained):
    before = dict(load(pretrained).student.named_parameters())
    _, _, out = finetune("head", "finetune.freeze_steps=20")
    after = weights_of(out)
    assert moved(before, after, "") == {False}
    _, _, other = finetune("never", "finetune.freeze_steps=20", "optim.lr=0")
    assert not torch.equal(after["head.out.weight"], weights_of(other)["head.out.weight"])
    _, _, out = finetune("half", "finetune.freeze_steps=10")
    assert moved(before, weights_of(out), "transformer") == {True}
    _, _, out = finetune("frozen", "finetune.frozen=[encoder.embedding]")
    assert moved(before, weights_of(out), "encoder.embedding") == {False}
    assert moved(before, weights_of(out), "transformer") == {True}
    status, text, _ = finetune("wrong", "finetune.frozen=[encoder.embeding]")
    assert status == 2 and "finetune.frozen=encoder.embeding" in text and "encoder.embedding" in text


def test_learning_rates_fall_towards_the_input(finetune, monkeypatch):
    rates = {}
    update = Finetuner.update

    def look(self, batches):
        read = update(self, batches)
        names = {id(p): n for n, p in self.model.named_parameters()}
        for group in self.optimizer_step.optimizer.param_groups:
            rates.update({names[id(p)]: group["lr"] for p in group["params"]})
        return read

    monkeypatch.setattr(Finetuner, "update", look)
    words = ("finetune.layer_decay=0.5", "optim.schedule=constant", "optim.warmup_ratio=0", "optim.lr=0.008")
    assert finetune("run", *words, "train.max_steps=1")[0] == 0
    assert rates["head.out.weight"] == pytest.approx(0.008)
    assert rates["student.transformer.blocks.1.fc1.weight"] == pytest.approx(0.004)
    assert rates["student.transformer.blocks.0.fc1.weight"] == pytest.approx(0.002)
    assert rates["student.encoder.embedding.weight"] == rates["student.encoder.places"] == pytest.approx(0.001)


def test_accumulation_changes_nothing(finetune):
    plain = ("model.dropout=0", "model.attention_dropout=0", "train.max_steps=5")
    _, _, whole = finetune("whole", *plain)
    _, _, parts = finetune("parts", *plain, "finetune.micro_batch=5")  # 5 + 5 + 2 samples
    a, b = ([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
            for run in (whole, parts))  # fmt: skip
    assert len(a) == 5 and a == pytest.approx(b, rel=1e-5)


def test_the_average_is_what_is_scored(finetune):
    """With a decay of 1 it stays at the first update's weights, whatever is learned after."""
    words = ("finetune.ema_decay=1.0", "optim.schedule=constant", "optim.warmup_ratio=0", "finetune.eval_every=1")
    _, _, out = finetune("average", *words, "train.max_steps=6")
    scores = {json.loads(line)["accuracy"] for line in (out / "scores.jsonl").read_text().splitlines()}
    assert len(scores) == 1
    best, last = weights_of(out, "best"), weights_of(out)
    assert not torch.equal(best["head.out.weight"], last["head.out.weight"])


def test_regression(finetune):
    status, _, out = finetune("values", "offsets.num_classes=1", "optim.lr=1e-2", "train.max_steps=60")
    result = summary_of(out)["finetune"]
    assert status == 0 and result["metrics"] == ["pearson_spearman", "pearson"] and result["test"]["pearson"] > 80
    assert (out / "predictions-test.tsv").read_text().startswith("id\tlabel\tpredicted\n")
    classifier = load_classifier(out)
    assert classifier.classes == () and classifier.predict([classifier.modality.task().test.samples[0]]).shape == (1,)


def test_an_unreadable_sample_is_named_and_left_out(finetune):
    status, text, out = finetune("bad", "offsets.bad_test=true", "train.max_steps=2")
    assert status == 0 and text.count("skipped test-0: broken on purpose") == 1
    assert summary_of(out)["skipped"] == {"test-0": "broken on purpose"}
    assert len((out / "predictions-test.tsv").read_text().splitlines()) == 31


# ----------------------------------------------------------------------------------------------------- the probe


def test_probe(d2v, pretrained, tmp_path):
    out = tmp_path / "probe"
    status, text = d2v("run", "stage=probe", f"from={pretrained}", f"out={out}", "labels=40", "offsets.bad_test=true")
    assert status == 0, text
    summary = summary_of(out)
    rows = summary["table"]
    assert [(row["system"], row["classifier"]) for row in rows] == [
        (system, classifier)
        for system in ("pretrained", "untrained", "channel means")
        for classifier in ("linear", "kNN")
    ]
    assert summary["labels"] == 40 and summary["skipped"] == {"test-0": "broken on purpose"}
    assert rows[0]["test"]["accuracy"] > 90 and {row["layer"] for row in rows[4:]} == {0}
    assert all(0 <= row["layer"] <= 2 for row in rows)
    status, text = d2v("run", "stage=probe", f"from={pretrained}", "offsets.num_classes=1", f"out={tmp_path / 'no'}")
    assert status == 2 and "asks for values" in text


# ---------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stage=finetune", "modality=toy"], "stage=finetune needs from=RUN"),
        (["stage=probe", "from=/nowhere"], "from=/nowhere is not a run folder: it has no config.yaml"),
        (
            ["modality=toy", "labels=10"],
            "uses none: leave it out, or add stage=finetune from=RUN",
        ),
        (
            ["modality=toy", "finetune.batch=3"],
            "stage=pretrain has no section finetune, stage=finetune or stage=probe has",
        ),
    ],
)
def test_what_a_stage_needs(d2v, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, text = d2v("run", *words)
    assert status == 2 and message in text and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["target.top_k_layers=1"], "target.top_k_layers=1: stage=finetune has no section target"),
        (["modality=image"], "is a run of modality=toy, not image"),
        (["preset=tinny"], "preset='tinny' is not one of toy's for stage=finetune: tiny. Did you mean tiny?"),
        (["labels=ten"], "labels=ten must be a number of samples such as 500, a share such as 10%, or"),
        (["finetune.micro_batch=13"], "finetune.micro_batch=13 must lie between 1 and finetune.batch=12"),
        (["labels=10m"], "labels=10m: offsets counts samples"),
        (["finetune.batch=null", "finetune.micro_batch=4"], "finetune.batch=null does not"),
        (["finetune.lrs=[1e-3,1e-3]"], "must be learning rates above 0, each once"),
        (["finetune.layer_decay=1.5"], "finetune.layer_decay=1.5 must lie between 0.0 and 1.0"),
        (["finetune.pool=max"], "finetune.pool=max must be one of: mean, first"),
        (["model.num_layers=3"], "do not fit this configuration"),
        (["data.extra_tokens=0"], "do not fit this configuration"),
    ],
)
def test_what_fine_tuning_refuses(finetune, words, message):
    status, text, out = finetune("run", *words)
    assert status == 2 and message in text, text
    assert not out.exists()


def test_a_fine_tuning_run_is_no_source(finetune, d2v, pretrained):
    _, _, out = finetune("run", "train.max_steps=1")
    status, text = d2v("run", "stage=probe", f"from={out}")
    assert status == 2 and "is itself the folder of stage=finetune: give its pre-training run" in text
    with pytest.raises(UserError, match="it has no teacher"):
        load(out, teacher=True)
    with pytest.raises(UserError, match=r"of stage=pretrain, not of stage=finetune. First .* from=\S+ data.path"):
        load_classifier(pretrained)
    (out / "task.json").write_text("{")
    with pytest.raises(UserError, match=r"task.json cannot be read"):
        d2v_core.load_classifier(out)


def test_a_modality_without_labels_says_so(d2v, pretrained, monkeypatch):
    import d2v_toy

    monkeypatch.delattr(d2v_toy.ToyModality, "task")
    status, text = d2v("run", "stage=probe", f"from={pretrained}")
    assert status == 2 and "The modality toy has no labelled data" in text
