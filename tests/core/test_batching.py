"""Which samples meet in which step, and that neither workers nor an interruption change it."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from d2v_core.batching import LENGTH_NOISE, StepLoader, plan_epoch, plan_shards
from d2v_core.contract import Batch, Batching
from d2v_core.errors import UserError

SIZES = np.random.default_rng(0).integers(20, 400, 500)
BATCHING = Batching(batch=4000, micro_batch=1000, max_size=300, crop=True)


def groups_of(plan) -> list[tuple[int, ...]]:
    return [micro.indices for step in plan for micro in step]


def test_a_plan_is_a_function_of_its_arguments_and_epochs_differ():
    a = plan_epoch(SIZES, BATCHING, seed=1, epoch=3)
    assert a == plan_epoch(SIZES, BATCHING, seed=1, epoch=3)
    assert groups_of(a) != groups_of(plan_epoch(SIZES, BATCHING, seed=1, epoch=4))
    assert groups_of(a) != groups_of(plan_epoch(SIZES, BATCHING, seed=2, epoch=3))
    one, two = (set(map(frozenset, groups_of(plan_epoch(SIZES, BATCHING, 1, epoch)))) for epoch in (3, 4))
    assert len(one & two) < len(one) / 10  # other company, not only another order


def test_each_sample_at_most_once_and_all_but_the_last_step_used():
    plan = plan_epoch(SIZES, BATCHING, 0, 0)
    used = Counter(i for group in groups_of(plan) for i in group)
    assert max(used.values()) == 1
    assert sum(np.minimum(SIZES, 300)[list(used)]) > 0.9 * np.minimum(SIZES, 300).sum()
    seen = set(used)
    for epoch in range(1, 5):
        seen |= {i for group in groups_of(plan_epoch(SIZES, BATCHING, 0, epoch)) for i in group}
    assert len(seen) == len(SIZES)  # what one epoch leaves over another takes


def test_steps_are_whole_and_numbered():
    plan = plan_epoch(SIZES, BATCHING, 0, 2)
    assert {len(step) for step in plan} == {4}
    for number, step in enumerate(plan):
        assert [(m.epoch, m.step, m.part, m.num_parts) for m in step] == [(2, number, part, 4) for part in range(4)]


@pytest.mark.parametrize("crop", [True, False])
def test_micro_batches_respect_their_budget_and_are_filled(crop: bool):
    batching = replace(BATCHING, crop=crop)
    capped = np.minimum(SIZES, 300)
    fill = []
    for group in groups_of(plan_epoch(SIZES, batching, 0, 0)):
        assert len(group) * capped[list(group)].max() <= 1000
        fill.append(capped[list(group)].sum() / 1000)
    assert np.mean(fill) > 0.8


def test_samples_of_like_length_meet_and_are_cropped_to_the_shortest_or_padded_to_the_longest():
    lost = total = 0
    for step in plan_epoch(SIZES, BATCHING, 0, 0):
        for micro in step:
            sizes = np.minimum(SIZES, 300)[list(micro.indices)]
            assert micro.size == sizes.min()
            lost, total = lost + (sizes - sizes.min()).sum(), total + sizes.sum()
    assert lost / total < LENGTH_NOISE
    for micro in itertools.chain(*plan_epoch(SIZES, replace(BATCHING, crop=False), 0, 0)):
        assert micro.size == np.minimum(SIZES, 300)[list(micro.indices)].max()


def test_a_sample_larger_than_the_budget_runs_alone():
    plan = plan_epoch(np.array([500, 500, 10, 10]), Batching(100, 100, 1000), 0, 0)
    assert sorted(len(group) for group in groups_of(plan)) == [1, 1, 2]


def test_a_data_set_smaller_than_one_step_still_gives_one():
    for epoch in range(3):
        plan = plan_epoch(np.array([10, 11, 12]), BATCHING, 0, epoch)
        assert len(plan) == 1 and sorted(plan[0][0].indices) == [0, 1, 2]


def content(batch: Batch) -> tuple:
    masks = None if batch.masks is None else (batch.masks.hidden.tolist(), batch.masks.scored_rows.tolist())
    inputs = {name: value.tolist() for name, value in batch.inputs.items()}
    return inputs, masks, batch.ids, batch.amount, batch.skipped


def take(loader: StepLoader, count: int) -> list:
    iterator = iter(loader)
    try:
        return [
            (epoch, step, [content(batch) for batch in batches])
            for epoch, step, batches in itertools.islice(iterator, count)
        ]
    finally:
        iterator.close()


@pytest.mark.parametrize("words", [(), ("data.crop=false",), ("data.bad=[3,5]",)])
def test_batches_are_the_same_for_any_number_of_workers_and_from_any_start(make, words):
    modality = make(*words)
    dataset = modality.dataset("train")

    def loader(**arguments) -> StepLoader:
        return StepLoader(modality, dataset, seed=5, **arguments)

    count = 2 * loader().steps_per_epoch + 2
    whole = take(loader(), count)
    assert [w[0] for w in whole] == sorted(w[0] for w in whole) and whole[-1][0] >= 2
    for workers in (1, 2):
        torch.manual_seed(workers), np.random.seed(workers)
        assert take(loader(num_workers=workers), count) == whole
    for start in (1, len(whole) // 2):
        epoch, step, _ = whole[start]
        assert take(loader(epoch=epoch, step=step), count - start) == whole[start:]
        assert take(loader(epoch=epoch, step=step, num_workers=2), count - start) == whole[start:]
    # a run that stopped behind the last step of an epoch
    last = max(step for epoch, step, _ in whole if epoch == 0)
    assert take(loader(epoch=0, step=last + 1), 1) == [w for w in whole if w[0] == 1][:1]


def test_masks_and_crops_of_a_sample_differ_between_epochs(make):
    modality = make("data.num_samples=1", "data.min_size=24", "data.batch=24", "data.micro_batch=24")
    steps = take(StepLoader(modality, modality.dataset("train"), seed=0), 4)
    assert len({str(batches[0][1]) for _, _, batches in steps}) == 4
    assert {batches[0][2] for _, _, batches in steps} == {("sample-0",)}


def test_unreadable_samples_are_named_and_leave_the_others_alone(make):
    words = ("mask.same_count=false", "data.batch=48")
    good, bad = make(*words), make(*words, "data.bad=[3,5]")
    named = set()
    for (*_, ours), (*_, theirs) in zip(
        take(StepLoader(good, good.dataset("train"), seed=0), 20),
        take(StepLoader(bad, bad.dataset("train"), seed=0), 20),
        strict=True,
    ):
        for a, b in zip(ours, theirs, strict=True):
            lost = {"sample-3", "sample-5"} & set(a[2])
            assert {name for name, _ in b[4]} == lost and a[4] == ()
            named |= set(b[4])
            kept = [i for i, name in enumerate(a[2]) if name not in lost]
            assert [a[2][i] for i in kept] == list(b[2])
            assert [a[1][0][i] for i in kept] == (b[1][0] if b[1] else [])  # hidden
            assert [a[0]["x"][i] for i in kept] == (b[0]["x"] if kept else [])
    assert named == {("sample-3", "sample 3 is broken on purpose"), ("sample-5", "sample 5 is broken on purpose")}


def test_a_micro_batch_of_unreadable_samples_alone(make):
    modality = make("data.num_samples=2", "data.bad=[0,1]")
    ((_, _, batches),) = take(StepLoader(modality, modality.dataset("train"), seed=0), 1)
    ((inputs, masks, ids, amount, skipped),) = batches
    assert inputs == {} and masks is None and ids == () and amount == 0 and len(skipped) == 2


def test_amount_counts_what_is_left_after_cropping(make):
    modality = make()
    for _, _, batches in take(StepLoader(modality, modality.dataset("train"), seed=0), 5):
        for inputs, _, ids, amount, _ in batches:
            assert amount == len(ids) * len(inputs["x"][0])


def test_copies_of_masks_reach_the_batch(make):
    modality = make()
    _, _, batches = next(iter(StepLoader(modality, modality.dataset("train"), seed=0, num_copies=3)))
    assert batches[0].masks is not None and batches[0].masks.num_copies == 3


def test_errors(make):
    empty = make("data.num_samples=0")
    with pytest.raises(UserError, match="The data set is empty"):
        StepLoader(empty, empty.dataset("train"), seed=0)
    none = make("data.micro_batch=0")
    with pytest.raises(UserError, match=r"The batch must hold something.*micro_batch=0"):
        StepLoader(none, none.dataset("train"), seed=0)


# ------------------------------------------------------------------------------------------------------ shard by shard

SHARDS = np.arange(len(SIZES)) * 40 // len(SIZES)
BY_SHARD = replace(BATCHING, open_shards=2)


def test_shards_are_dealt_to_the_micro_batches_of_a_step() -> None:
    """No shard is read for two places of a step, so none by two processes that have places r, r + n of each."""
    plan = plan_shards(SIZES, SHARDS, BY_SHARD, 0, 0)
    parts = len(plan[0])
    assert parts > 1 and all(len(step) == parts for step in plan) and len(plan) > 3
    owners: dict[int, set[int]] = {}
    for step in plan:
        for micro in step:
            for i in micro.indices:
                owners.setdefault(int(SHARDS[i]), set()).add(micro.part)
    assert all(len(places) == 1 for places in owners.values())
    seen = [i for group in groups_of(plan) for i in group]
    assert len(seen) == len(set(seen)) > 0.75 * len(SIZES)


def test_shards_are_gone_through_a_few_at_a_time() -> None:
    """A stream comes back to no shard that it has left behind, and never has more than two open."""
    plan = plan_shards(SIZES, SHARDS, BY_SHARD, 0, 0)
    for part in range(len(plan[0])):
        windows = [frozenset(int(SHARDS[i]) for i in step[part].indices) for step in plan]
        assert all(len(shards) <= 2 for shards in windows)
        first, last = dict[int, int](), dict[int, int]()
        for at, shards in enumerate(windows):
            for shard in shards:
                first.setdefault(shard, at)
                last[shard] = at
        opened = sorted(first, key=lambda shard: first[shard])
        for earlier, later in zip(opened, opened[2:], strict=False):
            assert last[earlier] < first[later] or first[earlier] == first[later]


def test_a_plan_by_shards_follows_from_its_arguments() -> None:
    a = plan_shards(SIZES, SHARDS, BY_SHARD, 1, 3)
    assert a == plan_shards(SIZES, SHARDS, BY_SHARD, 1, 3)
    for other in (plan_shards(SIZES, SHARDS, BY_SHARD, 1, 4), plan_shards(SIZES, SHARDS, BY_SHARD, 2, 3)):
        assert groups_of(a) != groups_of(other)
    everything: set[int] = set()
    for epoch in range(8):
        everything |= {i for group in groups_of(plan_shards(SIZES, SHARDS, BY_SHARD, 0, epoch)) for i in group}
    assert len(everything) == len(SIZES), "what one epoch leaves over, another has"


def test_too_few_shards() -> None:
    with pytest.raises(UserError, match=r"deals tars to the .* but there are 1 tars"):
        plan_shards(SIZES, np.zeros(len(SIZES), dtype=np.int64), BY_SHARD, 0, 0)
