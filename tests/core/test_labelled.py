"""Which labelled samples are trained on, and the figures that score a task."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_core.batching import LabelledSteps, labelled_batches, plan_labelled_epoch
from d2v_core.config import num_labels
from d2v_core.contract import LabelledPart
from d2v_core.errors import UserError
from d2v_core.keyed import generator, seeded
from d2v_core.labelled import draw, ids, open_task
from d2v_core.objectives import class_targets
from d2v_core.scores import SCORES, score_all

# ------------------------------------------------------------------------------------------------------- subsets


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.data())
def test_a_drawn_part_has_its_size_and_every_class_its_share(labels, data):
    labels = np.array(labels)
    count = data.draw(st.integers(0, len(labels)))
    chosen, others = draw(labels, True, count, data.draw(st.integers(0, 5)), "labels")
    assert len(chosen) == count and sorted([*chosen, *others]) == list(range(len(labels)))
    present = np.unique(labels)
    for label in present:
        exact = (labels == label).sum() * count / len(labels)
        got = (labels[chosen] == label).sum()
        assert abs(got - exact) < len(present) and (count < len(present) or got >= 1)
    if len(present) == 1 or all((labels == label).sum() * count % len(labels) == 0 for label in present):
        assert all((labels[chosen] == label).sum() * len(labels) == (labels == label).sum() * count
                   for label in present) or count < len(present)  # fmt: skip


def test_shares_of_equal_classes_are_equal_and_follow_the_seed():
    labels = np.arange(800) % 10
    chosen, _ = draw(labels, True, 80, 0, "labels")
    assert (np.bincount(labels[chosen]) == 8).all()
    assert np.array_equal(chosen, draw(labels, True, 80, 0, "labels")[0])
    assert not np.array_equal(chosen, draw(labels, True, 80, 1, "labels")[0])
    assert not np.array_equal(chosen, draw(labels, True, 80, 0, "dev")[0])


@pytest.mark.parametrize(
    ("words", "available", "number"),
    [(None, 70, 70), ("10%", 70, 7), ("0.5%", 1000, 5), ("12", 70, 12), ("100%", 70, 70), ("12", 9, 9),
     ("1.5", 70, 0), ("ten", 70, 0), ("-3", 70, 0), ("0", 70, 0)],
)  # fmt: skip
def test_labels_is_a_number_or_a_share(words, available, number):
    assert num_labels(words, available) == number


@pytest.fixture
def toy(make, d2v, tmp_path):
    """The toy modality as fine-tuning sees it: toy("labels=12")."""
    run = tmp_path / "pretrained"
    assert d2v("run", "modality=toy", f"out={run}", "train.max_steps=1", "train.probe=false")[0] == 0
    return lambda *words: make("stage=finetune", f"from={run}", *words)


def test_the_dev_part_does_not_depend_on_the_seed_and_is_never_trained_on(toy):
    splits = [open_task(toy(f"seed={seed}", "labels=12")) for seed in (0, 1)]
    devs, trains = [ids(s.dev) for s in splits], [ids(s.train) for s in splits]
    assert devs[0] == devs[1] and len(devs[0]) == 12  # 20 % of 60
    assert trains[0] != trains[1] and len(trains[0]) == 12
    for dev, train, split in zip(devs, trains, splits, strict=True):
        assert not set(dev) & set(train)
        assert (np.bincount(split.train.labels) == 4).all()
        for part in (split.train, split.dev):  # labels still belong to their samples
            assert [int(name.split("-")[1]) % 3 for name in ids(part)] == list(part.labels)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["labels=49"], r"labels=49, but the training part of offsets has 48 samples"),
        (["labels=1%"], r"labels=1% is less than one of the 48"),
        (["finetune.dev_ratio=0"], r"has no dev part and finetune.dev_ratio=0"),
        (["finetune.dev_ratio=0.001"], r"too few to hold 0 of them back"),
    ],
)
def test_too_little_to_train_or_choose_on(toy, words, message):
    """1 % of 48 rounds to none."""
    with pytest.raises(UserError, match=message):
        open_task(toy(*words))


def test_labels_and_samples_must_be_as_many(toy):
    part = toy().task().train
    with pytest.raises(ValueError, match="3 labels for 60 samples"):
        LabelledPart(part.samples, part.labels[:3])


# ------------------------------------------------------------------------------------------------------- batches


def test_an_epoch_has_every_sample_once_in_batches_of_like_length():
    sizes = generator(0, "sizes").integers(1, 100, 1003)
    plan = plan_labelled_epoch(sizes, 16, 16, 3, 0)
    seen = [i for step in plan for micro in step for i in micro.indices]
    assert len(plan) == 62 and len(set(seen)) == len(seen) == 992
    assert all(micro.size == max(sizes[list(micro.indices)]) for step in plan for micro in step)
    padded = sum(micro.size * len(micro.indices) for step in plan for micro in step)
    assert padded < 1.1 * sizes[seen].sum()
    assert plan != plan_labelled_epoch(sizes, 16, 16, 3, 1) and plan == plan_labelled_epoch(sizes, 16, 16, 3, 0)
    lengths = [step[0].size for step in plan]
    assert lengths != sorted(lengths)  # short and long batches alternate


def test_a_batch_that_is_larger_than_the_data_is_all_of_it():
    ((micro,),) = plan_labelled_epoch(np.array([3, 1, 2]), 8, 8, 0, 0)
    assert sorted(micro.indices) == [0, 1, 2]


def test_micro_batches_share_out_a_batch():
    (step,) = plan_labelled_epoch(np.ones(10, int), 10, 4, 0, 0)
    assert [len(micro.indices) for micro in step] == [4, 4, 2]
    assert [(micro.part, micro.num_parts) for micro in step] == [(0, 3), (1, 3), (2, 3)]


def test_every_sample_is_scored_once_with_its_own_label(toy):
    modality = toy()
    part = modality.task().test
    for batch in (4, 50):
        batches = list(labelled_batches(modality, part, class_targets(3), batch))
        assert sorted(name for one in batches for name in one.ids) == sorted(f"test-{i}" for i in range(31))
        for one in batches:
            assert [int(name.split("-")[1]) % 3 for name in one.ids] == one.targets.argmax(1).tolist()
            for row, name in enumerate(one.ids):
                sample = part.samples[int(name.split("-")[1])]
                assert torch.equal(one.inputs["x"][row, : len(sample)], torch.from_numpy(sample))  # not augmented


def test_workers_change_nothing(toy):
    modality = toy("offsets.mixed=true")
    part = modality.task().train

    def first(workers: int) -> list:
        steps = iter(
            LabelledSteps(modality, part, class_targets(3), batch=12, micro_batch=8, seed=2, num_workers=workers)
        )
        taken = [next(steps) for _ in range(7)]
        steps.close()
        return taken

    for (*place, plain), (*same, workers) in zip(first(0), first(2), strict=True):
        assert place == same and [len(batch.ids) for batch in plain] == [8, 4]
        for a, b in zip(plain, workers, strict=True):
            assert a.ids == b.ids and torch.equal(a.targets, b.targets) and torch.equal(a.inputs["x"], b.inputs["x"])
            assert torch.allclose(a.targets.sum(1), torch.ones(len(a.ids))) and ((a.targets > 0).sum(1) <= 2).all()


def test_training_samples_are_augmented_anew_in_each_epoch(toy):
    modality = toy()
    part = modality.task().train
    seen: dict[str, list] = {}
    steps = LabelledSteps(modality, part, class_targets(3), batch=12, micro_batch=12, seed=0)
    for _, (_, _, (batch,)) in zip(range(10), steps):  # noqa: B905
        for row, name in enumerate(batch.ids):
            seen.setdefault(name, []).append(batch.inputs["x"][row, :12])
    assert len(seen) == 60 and all(len(views) == 2 and not torch.equal(*views) for views in seen.values())


def test_seeded_rules_the_global_generators_and_gives_them_back():
    import random

    def drawn() -> tuple:
        return random.random(), np.random.rand(), torch.rand(()).item()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [drawn(), drawn()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    first = drawn()
    with seeded(generator(0, "x")):
        inside = drawn()
    assert [first, drawn()] == expected
    with seeded(generator(0, "x")):
        assert drawn() == inside
    with seeded(generator(1, "x")):
        assert not set(drawn()) & set(inside)


# -------------------------------------------------------------------------------------------------------- scores


def test_scores_by_hand():
    labels, predicted = np.array([1, 1, 1, 0, 0, 0, 0, 0]), np.array([1, 1, 0, 1, 0, 0, 0, 0])
    # tp 2, fn 1, fp 1, tn 4
    assert SCORES["accuracy"](predicted, labels) == 75.0
    assert SCORES["f1"](predicted, labels) == pytest.approx(200 / 3)
    assert SCORES["accuracy_f1"](predicted, labels) == pytest.approx((75 + 200 / 3) / 2)
    assert SCORES["matthews"](predicted, labels) == pytest.approx(100 * (2 * 4 - 1 * 1) / (3 * 3 * 5 * 5) ** 0.5)
    values, told = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 10.0])
    mean, told_mean = values.mean(), told.mean()
    covariance = ((values - mean) * (told - told_mean)).sum()
    by_hand = covariance / (((values - mean) ** 2).sum() * ((told - told_mean) ** 2).sum()) ** 0.5
    assert SCORES["pearson"](told, values) == pytest.approx(100 * by_hand)
    assert SCORES["spearman"](told, values) == pytest.approx(80.0)  # 1 - 6 * 2 / (4 * 15)
    assert SCORES["pearson_spearman"](told, values) == pytest.approx((100 * by_hand + 80) / 2)


def test_scores_where_nothing_varies():
    labels, same = np.array([0, 0, 1]), np.zeros(3, int)
    assert SCORES["matthews"](same, labels) == 0 and SCORES["f1"](same, same) == 0
    assert SCORES["pearson"](same.astype(float), labels) == SCORES["spearman"](same.astype(float), labels) == 0


def test_an_unknown_score_is_named():
    with pytest.raises(ValueError, match="must be one of accuracy, f1"):
        score_all(("acuracy",), np.zeros(1), np.zeros(1))
