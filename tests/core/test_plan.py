"""A plan against what really happens: FLOPs and bytes of a real step, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from d2v_core import UserError, parts, plan, profile
from d2v_core.run import build_model
from d2v_core.trainer import Updater

DIM, LAYERS = 32, 3
SMALL = (f"model.embed_dim={DIM}", f"model.num_layers={LAYERS}", "model.num_heads=4", "target.top_k_layers=2")
MIB = 2**20


@pytest.fixture
def roomy(monkeypatch):
    """A device of 1 GiB, whatever the machine has."""
    monkeypatch.setattr(plan, "memory_of", lambda device: plan.Memory(1024 * MIB, 1024 * MIB))


def real_step(modality, count):
    batch = plan.planned_micro_batch(modality)
    updater = Updater(build_model(modality).train(), modality.config, torch.device("cpu"))
    with plan.Counter() as counter, sdpa_kernel(SDPBackend.MATH):
        updater.update(0, [batch] * count, modality.teacher_inputs)
    return batch, sum(counter.flops.values())


@pytest.mark.parametrize("words", [(), ("train.num_masks=3",), ("data.crop=false",), ("encoder=own",)], ids=str)
def test_flops_are_those_of_a_real_step(make, words):
    modality = make(*SMALL, *words)
    batch, counted = real_step(modality, 1)
    (cost,) = plan.costs(modality, [[batch]], torch.device("cpu"), "fp32")
    assert sum(cost.flops.values()) == pytest.approx(counted, rel=0.02)


def test_flops_by_hand(make):
    """Of the teacher: four products of D x D and two of D x 4D for each token and block, and two for attention."""
    modality = make(*SMALL, "data.min_size=24", "model.mlp_ratio=4")
    batch = plan.planned_micro_batch(modality)
    (cost,) = plan.costs(modality, [[batch]], torch.device("cpu"), "fp32")
    rows, _, length = batch.masks.hidden.shape
    encoder = LAYERS * 2 * rows * length * (12 * DIM**2 + 2 * length * DIM)
    assert cost.flops["teacher"] == cost.flops["student"] == encoder
    assert cost.flops["student, backward"] == 2 * encoder
    assert cost.flops["feature encoder"] == 2 * rows * length * 4 * DIM
    assert cost.flops["predictor"] == 2 * len(batch.masks.scored_rows) * DIM**2


def test_weights_and_bytes_are_those_of_the_network(make):
    modality = make(*SMALL)
    made = plan.make_plan(modality)
    model = build_model(modality)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(w.trainable for w in made.weights.values()) == trained
    assert made.weights["transformer"].total == sum(p.numel() for p in model.student.transformer.parameters())
    own = model.teacher.own_state().values()
    assert made.weights["teacher's own"].total == sum(t.numel() for t in own)
    updater = Updater(model, modality.config, torch.device("cpu"))
    updater.update(0, [plan.planned_micro_batch(modality)], modality.teacher_inputs)
    state = [v for one in updater.optimizer.state.values() for v in one.values()]
    assert made.bytes["optimizer"] == sum(v.numel() * v.element_size() for v in state)
    assert made.bytes["gradients"] == 4 * trained == made.bytes["weights"]


def test_memory_is_that_of_a_real_step(make):
    """The same storages live and die when the step is computed: the second step, which has the optimizer's moments."""
    modality = make(*SMALL)
    batch = plan.planned_micro_batch(modality)
    (cost,) = plan.costs(modality, [[batch]], torch.device("cpu"), "fp32")
    model = build_model(modality).train()
    updater = Updater(model, modality.config, torch.device("cpu"))
    updater.update(0, [batch], modality.teacher_inputs)
    updater.optimizer.zero_grad(set_to_none=True)
    with plan.Counter() as counter:
        state = [v for one in updater.optimizer.state.values() for v in one.values()]
        for tensor in [*model.parameters(), *model.buffers(), *state, *batch.inputs.values()]:
            counter.add(tensor)
        updater.update(1, [batch], modality.teacher_inputs)
    assert cost.peak == pytest.approx(counter.peak, rel=0.02)


def test_more_masks_cost_the_student_alone(make):
    found = [plan.make_plan(make(*SMALL, f"train.num_masks={count}")) for count in (1, 3)]
    assert found[1].flops["teacher"] == found[0].flops["teacher"]
    assert found[1].flops["student"] == 3 * found[0].flops["student"]
    assert found[1].peaks["fp32"].total > found[0].peaks["fp32"].total
    assert (found[1].micro_batch.samples, found[1].micro_batch.copies) == (found[0].micro_batch.samples, 3)


def test_a_plan_changes_no_random_number_and_computes_nothing(make):
    before = torch.get_rng_state()
    plan.make_plan(make(*SMALL))
    assert torch.equal(before, torch.get_rng_state())
    model = plan.hollow_model(make(*SMALL))
    assert all(p.is_meta for p in model.parameters())


def test_suggests_what_fits(make, monkeypatch):
    modality = make(*SMALL, "data.num_samples=400", "data.batch=4800", "data.micro_batch=4800", "data.min_size=24")
    monkeypatch.setattr(plan, "memory_of", lambda device: plan.Memory(1024 * MIB, 1024 * MIB))
    roomy = plan.make_plan(modality)
    assert roomy.fits and roomy.suggestion == plan.Suggestion(4800, 1, ("data.micro_batch=4800",))
    tight = round(roomy.peaks["fp32"].total * 0.5)
    monkeypatch.setattr(plan, "memory_of", lambda device: plan.Memory(tight, tight))
    made = plan.make_plan(modality)
    assert not made.fits and made.suggestion is not None and made.suggestion.accumulation > 1
    (word,) = made.suggestion.words
    small = plan.make_plan(make(*SMALL, "data.num_samples=400", "data.batch=4800", "data.min_size=24", word))
    assert small.fits and small.accumulation == made.suggestion.accumulation
    with pytest.raises(UserError, match=rf"micro-batch of this run needs .*data.micro_batch={made.suggestion.size}"):
        plan.refuse_impossible(modality, modality.dataset("train"), torch.device("cpu"))


def test_a_run_that_cannot_fit_is_refused_before_its_first_step(d2v, monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "memory_of", lambda device: plan.Memory(MIB, MIB))
    large = ("data.num_samples=80", "data.batch=960", "data.micro_batch=960")
    status, text = d2v("run", "modality=toy", *SMALL, *large, f"out={tmp_path / 'run'}", "train.num_workers=0")
    assert status == 2 and "A micro-batch of this run needs" in text
    assert not (tmp_path / "run" / "checkpoints").exists()
    status, text = d2v("run", "modality=toy", "model.embed_dim=4096", "model.num_layers=900", "model.num_heads=4",
                       "train.num_workers=0", f"out={tmp_path / 'other'}")  # fmt: skip
    assert status == 2 and "This network cannot be trained" in text


def test_a_run_that_fits_is_not_looked_at_closely(make, roomy, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a plan was made")

    monkeypatch.setattr(plan, "costs", never)
    modality = make(*SMALL)
    plan.refuse_impossible(modality, modality.dataset("train"), torch.device("cpu"))


def test_the_command(d2v, roomy):
    status, text = d2v("plan", "modality=toy", *SMALL)
    assert status == 0 and "FLOPs of a step" in text and "peak of a micro-batch" in text
    status, text = d2v("plan", "modality=toy", "--json", *SMALL)
    made = json.loads(text)
    assert status == 0 and made["flops"]["total"] > 0 and made["peaks"]["bf16"]["total"] > 0 and made["fits"] is True
    assert d2v("plan", "modality=toy", "stage=finetune", "from=x")[0] == 2


def test_a_question_about_values_is_an_error(make, monkeypatch):
    modality = make(*SMALL)
    encoder = type(modality.feature_encoder())
    embed = encoder.embed
    monkeypatch.setattr(encoder, "embed", lambda self, inputs: embed(self, inputs) if inputs["x"].max() > 0 else None)
    with pytest.raises(UserError, match="asks for values"):
        plan.make_plan(modality)


def test_the_profile(d2v, tmp_path):
    out = tmp_path / "profile"
    status, text = d2v("profile", "modality=toy", *SMALL, "steps=2", f"out={out}", "train.num_workers=0")
    assert status == 0
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines() if line.endswith("%")}
    assert set(rows) == {*profile.ORDER, "all"}
    times = {name: float(words[-2]) for name, words in rows.items()}
    assert sum(v for k, v in times.items() if k != "all") == pytest.approx(times["all"], abs=0.5)
    assert all(times[name] > 0 for name in ("teacher", "student", "backward"))
    events = json.loads((out / "trace.json").read_text())["traceEvents"]
    assert {"teacher", "student", "backward", "optimizer"} <= {event.get("name") for event in events}
    assert d2v("profile", "modality=toy", "steps=none")[0] == 2


def test_watching_leaves_the_model_as_it_was(make):
    modality = make(*SMALL)
    updater = Updater(build_model(modality).train(), modality.config, torch.device("cpu"))
    before = {name: dict(vars(module)) for name, module in updater.model.named_modules()}
    seen = []
    batch = plan.planned_micro_batch(modality)
    with parts.watched(updater.model, updater, seen.append):
        updater.update(0, [batch], modality.teacher_inputs)
    assert {name: vars(module).keys() for name, module in updater.model.named_modules()} == {
        name: value.keys() for name, value in before.items()
    }
    order = [parts.FEATURES, parts.TEACHER, parts.STUDENT, parts.PREDICTOR, parts.BACKWARD[parts.STUDENT],
             parts.BACKWARD[parts.FEATURES], parts.OPTIMIZER, parts.TEACHER_UPDATE]  # fmt: skip
    assert [seen.index(part) for part in order] == sorted(seen.index(part) for part in order)
