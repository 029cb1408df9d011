"""A plan against what really happens: FLOPs and bytes of a real step, and what is refused."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from d2v_core import UserError, counting, memory, parts, plan, profile, run
from d2v_core.contract import BadSample
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
    with counting.Counter() as counter, sdpa_kernel(SDPBackend.MATH):
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
    with counting.Counter() as counter:
        state = [v for one in updater.optimizer.state.values() for v in one.values()]
        for tensor in [*model.parameters(), *model.buffers(), *state, *batch.inputs.values()]:
            counter.add(tensor)
        updater.update(1, [batch], modality.teacher_inputs)
    assert cost.peak == pytest.approx(counter.peak, rel=0.02)


def test_more_masks_cost_the_student_alone(make):
    found = [plan.make_plan(make(*SMALL, f"train.num_masks={count}")) for count in (1, 3)]
    assert found[1].flops["teacher"] == found[0].flops["teacher"]
    assert found[1].flops["student"] == 3 * found[0].flops["student"]
    assert found[1].peaks["fp32"].predicted > found[0].peaks["fp32"].predicted
    assert (found[1].micro_batch.samples, found[1].micro_batch.copies) == (found[0].micro_batch.samples, 3)


def test_a_plan_changes_no_random_number_and_computes_nothing(make):
    before = torch.get_rng_state()
    plan.make_plan(make(*SMALL))
    assert torch.equal(before, torch.get_rng_state())
    model = counting.hollow_model(make(*SMALL))
    assert all(p.is_meta for p in model.parameters())


def test_suggests_what_fits(make, monkeypatch):
    # Attention with dropout is a product for each head of each sample, which 200 samples make many.
    words = (*SMALL, "model.attention_dropout=0", "data.num_samples=400", "data.batch=4800", "data.min_size=24")
    modality = make(*words, "data.micro_batch=4800")
    monkeypatch.setattr(plan, "memory_of", lambda device: plan.Memory(1024 * MIB, 1024 * MIB))
    roomy = plan.make_plan(modality)
    assert roomy.fits and roomy.suggestion == plan.Suggestion(4800, 1, "data.micro_batch=4800")
    tight = round(roomy.peaks["fp32"].predicted * 0.5)
    monkeypatch.setattr(plan, "memory_of", lambda device: plan.Memory(tight, tight))
    made = plan.make_plan(modality)
    assert not made.fits and made.suggestion is not None and made.suggestion.accumulation > 1
    word = made.suggestion.option
    small = plan.make_plan(make(*words, word))
    assert small.fits and small.accumulation == made.suggestion.accumulation


LARGE = ("data.num_samples=80", "data.batch=960", "data.micro_batch=960", "train.num_workers=0")


def needed(modality):
    """Bytes that a step needs at least, by the plan."""
    return plan.make_plan(modality).peaks["fp32"].tensors


def with_memory(monkeypatch, total):
    monkeypatch.setattr(plan, "memory_of", lambda device: plan.Memory(round(total), round(total)))
    monkeypatch.setattr(memory, "FIXED", 0)  # which is more than all of these small networks


def test_a_run_that_cannot_fit_is_refused_with_what_fits(d2v, make, monkeypatch, tmp_path):
    bytes_needed = needed(make(*SMALL, *LARGE))
    with_memory(monkeypatch, 0.7 * bytes_needed)
    words = ("run", "modality=toy", *SMALL, *LARGE, "train.max_steps=1", f"out={tmp_path / 'run'}")
    status, text = d2v(*words)
    assert status == 2 and "A step of this run cannot fit" in text and "train.check_memory=false" in text
    assert not (tmp_path / "run" / "checkpoints").exists()
    hint = re.search(r"data\.micro_batch=\d+", text)[0]
    smaller = [hint if word.startswith("data.micro_batch=") else word for word in words]
    with_memory(monkeypatch, 0.7 * bytes_needed)
    assert d2v(*smaller)[0] == 0
    other = [word for word in words if not word.startswith("out=")]
    assert d2v(*other, f"out={tmp_path / 'tried'}", "train.check_memory=false")[0] == 0


def test_a_run_that_just_fits_is_not_refused(make, monkeypatch):
    """What is refused is what its tensors alone make impossible, neither more nor much less."""
    modality = make(*SMALL, *LARGE, "data.min_size=24")
    dataset, bytes_needed = modality.dataset("train"), needed(modality)
    with_memory(monkeypatch, 1.01 * bytes_needed)
    plan.refuse_micro_batch(modality, dataset, torch.device("cpu"))
    with_memory(monkeypatch, 0.97 * bytes_needed)
    with pytest.raises(UserError, match="cannot fit"):
        plan.refuse_micro_batch(modality, dataset, torch.device("cpu"))


def test_a_network_that_cannot_fit_is_refused_before_it_is_made(d2v, monkeypatch, tmp_path):
    def made(modality):
        model = build_model(modality)
        assert all(parameter.is_meta for parameter in model.parameters())
        return model

    monkeypatch.setattr(run, "build_model", made)
    with_memory(monkeypatch, MIB // 2)
    status, text = d2v("run", "modality=toy", *SMALL, "train.num_workers=0", f"out={tmp_path / 'run'}")
    assert status == 2 and "This network cannot be trained" in text and "take 1 MiB" in text


def test_data_that_cannot_be_read_is_not_the_plans_affair(make, monkeypatch):
    with_memory(monkeypatch, 1)
    modality = make(*SMALL)
    dataset = modality.dataset("train")

    def unreadable(self, index):
        raise BadSample("broken")

    monkeypatch.setattr(type(dataset), "__getitem__", unreadable)
    plan.refuse_micro_batch(modality, dataset, torch.device("cpu"))


def test_the_command(d2v, roomy):
    status, text = d2v("plan", "modality=toy", *SMALL)
    assert status == 0 and "1e9 FLOPs" in text and "predicted" in text
    status, text = d2v("plan", "modality=toy", "--json", *SMALL)
    made = json.loads(text)
    assert status == 0 and made["flops"]["total"] > 0 and made["peaks"]["bf16"]["tensors"] > 0 and made["fits"] is True
    assert made["moved"]["total"] > made["bytes"]["weights"]


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
