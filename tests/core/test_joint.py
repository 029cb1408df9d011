"""Several modalities on one transformer: the toy of the other tests, and a stranger that a plugin brings."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from d2v_core import UserError, load
from d2v_core.checkpoint import list_checkpoints
from d2v_core.config import read_yaml
from d2v_core.joint import Balance, JointModel, JointTrainer, order_of
from d2v_core.jointconfig import Joint, apportion, from_stored, load_joint
from d2v_core.run import build_model
from d2v_core.schedules import decay_at, lr_at
from d2v_core.trainer import Updater

BELL = """
from pathlib import Path
from d2v_core.hookspecs import hookimpl
D2V_CONTRACT = 1

@hookimpl
def d2v_modality():
    from d2v_toy import ToyModality
    class Bell(ToyModality):
        name = "bell"
        unit = "strokes"
        @classmethod
        def recipes(cls):
            return Path(__file__).parent / "bell_recipes"
    return Bell
"""
RECIPE = """
model: {embed_dim: 16, num_layers: 2, num_heads: 2, dropout: 0.1, attention_dropout: 0.1}
target: {top_k_layers: 1, layer_norms: [layer]}
loss: {scale: sum}
teacher: {ema_decay: 0.5, ema_end_decay: 0.6}
optim: {lr: 3.0e-3, warmup_ratio: 0.0, weight_decay: 0.1, decay_all: false, betas: [0.8, 0.9], clip_grad_norm: 2.0}
mask: {mask_prob: 0.4, mask_length: 2}
train: {max_steps: 3, log_every: 1, checkpoint_every: 100, num_threads: 1, num_workers: 0, tensorboard: false}
data: {num_samples: 9, extra_tokens: 1, batch: 64, micro_batch: 64}
"""


@pytest.fixture(autouse=True)
def bell(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A distribution with the modality `bell`, on the path."""
    home = tmp_path_factory.mktemp("bell")
    info = home / "d2v_bell-1.0.dist-info"
    (home / "bell_recipes").mkdir()
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: d2v-bell\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[d2v.modalities]\nbell = d2v_bell_plugin\n")
    (home / "d2v_bell_plugin.py").write_text(BELL)
    (home / "bell_recipes" / "tiny.yaml").write_text(RECIPE)
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.delitem(sys.modules, "d2v_bell_plugin", raising=False)
    return home


def words(out: Path | str, *more: str) -> list[str]:
    return ["run", "modality=[toy,bell]", f"out={out}", *more]


def trainer(tmp_path: Path, *more: str) -> JointTrainer:
    """Built, without data."""
    made = JointTrainer(Joint(load_joint(["modality=[toy,bell]", *more])), tmp_path, Console(quiet=True))
    made.build(True)
    return made


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def stopping_after(count: int) -> Generator[None]:
    """The process gets SIGINT while its count-th update from now is running."""
    update, seen = Updater.update, []

    def counted(self: Updater, *args: Any) -> Any:
        seen.append(None)
        if len(seen) == count:
            signal.raise_signal(signal.SIGINT)
        return update(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Updater, "update", counted)
        yield


# ------------------------------------------------------------------------------------------------------------- turns


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any))
def test_turns_are_spread_evenly(updates: list[int]) -> None:
    order, total = order_of(updates), sum(updates)
    assert [int((order == i).sum()) for i in range(len(updates))] == updates
    for step in range(total + 1):
        for i, count in enumerate(updates):
            assert abs(int((order[:step] == i).sum()) - step * count / total) <= len(updates) / 2


@given(st.integers(1, 500), st.lists(st.floats(0, 10), min_size=1, max_size=5).filter(lambda one: sum(one) > 0.1))
def test_shares_become_whole_updates(total: int, shares: list[float]) -> None:
    counts = apportion(total, shares)
    assert sum(counts) == total
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - total * share / sum(shares)) < 1 + 1e-6


def test_as_many_updates_as_each_ones_own_preset_has() -> None:
    config = load_joint(["modality=[toy,bell]"])
    assert config.updates == {"toy": 6, "bell": 3} and config.train.max_steps == 9
    assert list(order_of([6, 3])) == [0, 1, 0, 0, 1, 0, 0, 1, 0]
    assert load_joint(["modality=[toy,bell]", "bell.train.max_steps=6"]).updates == {"toy": 6, "bell": 6}
    assert load_joint(["modality=[toy,bell]", "train.max_steps=30"]).updates == {"toy": 20, "bell": 10}
    shared = load_joint(["modality=[toy,bell]", "train.max_steps=8", "joint.shares=[1,3]"])
    assert shared.updates == {"toy": 2, "bell": 6}
    assert shared.own("toy").train.max_steps == 2 and shared.own("bell").train.max_steps == 6


# ----------------------------------------------------------------------------------------------------- configuration


def test_options_alone_are_for_all_and_prefixed_ones_for_one() -> None:
    config = load_joint(
        ["modality=bell, toy", "optim.lr=7e-4", "toy.optim.lr=5e-4", "bell.data.num_samples=5", "seed=4"]
    )
    bell, toy = config.members["bell"], config.members["toy"]
    assert list(config.members) == ["bell", "toy"] and (bell.optim.lr, toy.optim.lr) == (7e-4, 5e-4)
    assert bell.sections["data"].num_samples == 5 and toy.sections["data"].num_samples == 14
    assert bell.seed == toy.seed == config.seed == 4
    assert bell.teacher.ema_decay == 0.5 and toy.teacher.ema_decay == 0.9  # of their presets


def test_the_preset_joint_is_taken_where_there_is_one(bell: Path) -> None:
    assert {m.preset for m in load_joint(["modality=[toy,bell]"]).members.values()} == {"tiny"}
    (bell / "bell_recipes" / "joint.yaml").write_text("like: tiny\noptim: {lr: 0.25}\n")
    config = load_joint(["modality=[toy,bell]"])
    assert config.preset == "tiny+joint" and config.members["bell"].optim.lr == 0.25
    assert load_joint(["modality=[toy,bell]", "bell.preset=tiny"]).members["bell"].optim.lr == 3e-3


def test_the_stored_configuration_is_the_same(tmp_path: Path) -> None:
    config = load_joint(["modality=[toy,bell]", "joint.weights=[1,2]", "train.max_steps=20", "toy.mask.mask_length=2"])
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    read = from_stored(read_yaml(tmp_path / "config.yaml"), "config.yaml")
    assert read.to_dict() == config.to_dict() and read.updates == config.updates
    assert {n: read.own(n).to_dict() for n in read.members} == {n: config.own(n).to_dict() for n in config.members}


def test_every_option_has_a_sentence(d2v: Callable[..., tuple[int, str]]) -> None:
    status, text = d2v("config", "modality=[toy,bell]")
    assert status == 0
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if line.strip() and not line.strip().startswith(("#", "-")):
            assert lines[i - 1].strip().startswith("#"), line
    assert sum(line.startswith("model:") for line in lines) == 1 and "  # What bell" not in text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["modality=[toy]"], "modality=[toy] names 1 modality. A joint run has at least two; one alone is written"),
        (["modality=[]"], "modality=[] names no modality"),
        (["modality=[toy,bell,toy]"], "names toy twice"),
        (["modality=[toy,bel]"], "There is no modality 'bel'. Installed:"),
        (["data.batch=8"], "data.batch=8 belongs to one modality. Write toy.data.batch=8 or bell.data.batch=8."),
        (["encoder=own"], "encoder=own belongs to one modality"),
        (["toy.data.batsh=8"], "Of toy (its options begin with toy.): In the command line: data.batsh is not an"),
        (["bell.mask.mask_prob=2"], "Of bell (its options begin with bell.): This configuration cannot work"),
        (["toy.preset=nothing"], "preset='nothing' is not one of toy's: tiny."),
        (["optm.lr=1"], "optm.lr=1 is no option of a joint run. There are toy, bell, joint, model"),
        (["optm.lr=1"], "Did you mean optim.lr?"),
        (["train.max_steps=none"], "train.max_steps=none must be a whole number"),
        (["train.max_steps=0"], "train.max_steps=0 must be at least 1"),
        (["train.max_steps=1"], "train.max_steps=1 leaves no update for bell, whose share is"),
        (["toy.train.precision=bf16"], "the loop is everybody's. Write train.precision=bf16"),
        (["toy.seed=1"], "a joint run has seed once"),
        (["toy.from=x"], "a joint run has from once"),
        (["from=x"], "from=x has no meaning for a joint run"),
        (["labels=10%"], "labels=10% has no meaning for a joint run"),
        (["stage=finetune"], "other stages work on one of them: give modality=NAME and from=RUN"),
        (["stage=all"], "stage=all: nothing follows pre-training"),
        (["joint.shares=[1]"], "joint.shares=[1.0] has 1 numbers for 2 modalities (toy, bell): one for each"),
        (["joint.shares=[1,-1]"], "joint.shares=[1.0, -1.0] must be numbers 0 or more, not all 0"),
        (["joint.shares=[0,0]"], "joint.shares=[0.0, 0.0] must be numbers 0 or more, not all 0"),
        (["joint.shares=[.inf,1]"], "must be numbers 0 or more"),
        (["joint.weights=[1,0]"], "joint.weights=[1.0, 0.0] must be numbers above 0"),
        (["joint.weights=[1,2,3]"], "joint.weights=[1.0, 2.0, 3.0] has 3 numbers for 2 modalities"),
        (["joint.lr_scale=0"], "joint.lr_scale=0.0 must be above 0"),
        (["joint.balance=norm"], "joint.balance=norm must be one of: gradient_norm, none"),
        (["joint.share=[1,1]"], "joint.share is not an option. Did you mean: 'shares'?"),
        (["resume=perhaps"], "resume=perhaps must be one of: never, auto"),
        (["bell.model.num_layers=3"], "share one transformer, because theirs differ in\n  model.num_layers: toy 2"),
        (["bell.model.embed_dim=32"], "model.embed_dim: toy 16, bell 32"),
        (["bell.model.num_heads=4"], "model.num_heads: toy 2, bell 4"),
        (["bell.model.norm=pre"], "model.norm: toy post, bell pre"),
        (["bell.model.mlp_ratio=2"], "model.mlp_ratio: toy 4.0, bell 2.0"),
        (["toy.model.dropout=0"], "model.dropout: toy 0.0, bell 0.1"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_there_is_a_folder(
    d2v: Callable[..., tuple[int, str]], tmp_path: Path, given: list[str], said: str
) -> None:
    out = tmp_path / "run"
    several = [] if given[0].startswith("modality=") else ["modality=[toy,bell]"]
    status, text = d2v("run", *several, *given, f"out={out}", *([] if "resume" in given[0] else ["resume=never"]))
    assert status == 2 and said in text and "Traceback" not in text
    assert not out.exists()


def test_a_modality_that_is_installed_but_not_in_the_list(d2v: Callable[..., tuple[int, str]], bell: Path) -> None:
    (bell / "d2v_bell-1.0.dist-info" / "entry_points.txt").write_text(
        "[d2v.modalities]\nbell = d2v_bell_plugin\nbowl = d2v_bell_plugin\n"
    )
    status, text = d2v("run", "modality=[toy,bell]", "bowl.data.batch=3")
    assert status == 2 and "bowl.data.batch=3: bowl is not in modality=[toy,bell]." in text


def test_several_processes_are_refused(
    d2v: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, text = d2v(*words(tmp_path / "run"), "launch.processes=2")
    assert status == 2 and "A run of several modalities has one process: leave out launch.processes" in text
    monkeypatch.setenv("WORLD_SIZE", "2")  # what torchrun sets
    status, text = d2v(*words(tmp_path / "run"))
    assert status == 2 and "A run of several modalities has one process" in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["plan", "profile"])
def test_verbs_for_one_modality_say_so(d2v: Callable[..., tuple[int, str]], verb: str) -> None:
    status, text = d2v(verb, "modality=[toy,bell]")
    assert status == 2 and "several modalities are for `d2v run` and `d2v config`" in text


# --------------------------------------------------------------------------------------------------------- the model


def test_one_transformer_with_one_storage(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    toy, bell = (made.model.models[name].student for name in ("toy", "bell"))
    pairs = list(zip(toy.transformer.parameters(), bell.transformer.parameters(), strict=True))
    assert len(pairs) > 20 and all(a is b and a.data_ptr() == b.data_ptr() for a, b in pairs)
    names = made.model.state()
    assert sum(name.startswith("transformer.") for name in names) == len(pairs)
    assert not any("student.transformer" in name for name in names)
    assert len({t.data_ptr() for t in names.values() if t.numel()}) == sum(t.numel() > 0 for t in names.values())
    # Each part has the weights that it would have in a run of its own, and so has the transformer.
    for name, modality in made.members.items():
        alone = build_model(modality)
        for (key, a), b in zip(alone.named_parameters(), made.model.models[name].parameters(), strict=True):
            assert torch.equal(a, b), key


def test_models_on_different_transformers_are_refused(tmp_path: Path) -> None:
    members = trainer(tmp_path).members
    with pytest.raises(ValueError, match="do not have one and the same transformer"):
        JointModel({name: build_model(modality) for name, modality in members.items()})


def next_batches(made: JointTrainer) -> Callable[[str], Any]:
    made.open_data()
    loaders = {name: iter(loader) for name, loader in made.steps().loaders.items()}
    return lambda name: next(loaders[name])[2]


def test_a_gradient_reaches_the_transformer_from_each(tmp_path: Path) -> None:
    made = trainer(tmp_path, "model.dropout=0", "model.attention_dropout=0")
    batches = next_batches(made)
    found: dict[str, list[Tensor]] = {}
    for name, modality in made.members.items():
        made.model.zero_grad(set_to_none=True)
        (batch, *_) = batches(name)
        made.model.models[name](batch.inputs, batch.masks, modality.teacher_inputs(batch)).loss_sum.backward()
        gradients = [p.grad for p in made.model.transformer.parameters()]
        assert all(g is not None and g.isfinite().all() for g in gradients)
        assert sum(g.abs().sum().item() > 0 for g in gradients if g is not None) > len(gradients) - 3  # biases of keys
        (other,) = made.model.models.keys() - {name}
        own = [p for n, p in made.model.models[other].named_parameters() if "transformer" not in n]
        assert own and all(p.grad is None for p in own)
        found[name] = [g.clone() for g in gradients if g is not None]
    assert not any(torch.equal(a, b) for a, b in zip(found["toy"], found["bell"], strict=True) if a.any())


def copies(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def turns(made: JointTrainer, count: int, look: Callable[[str, int], None]) -> None:
    """Updates as the loop makes them; look: is called after each with whose it was and the number of its own."""
    batches = next_batches(made)
    for _ in range(count):
        name = made.turn_at(made.progress.step)
        own = made.updates_of(name, made.progress.step)
        made.update(batches(name))
        made.progress.step += 1
        look(name, own)


@pytest.mark.parametrize("teacher", ["own", "shared"])
def test_an_average_of_the_transformer_moves_once_in_a_step(tmp_path: Path, teacher: str) -> None:
    """By the decay of the one whose turn it is; without a turn, the transformer of a teacher that has one of its own
    stays where it is."""
    made = trainer(tmp_path, f"joint.teacher={teacher}")
    models = made.model.models
    average = {name: copies(model.teacher.module.transformer) for name, model in models.items()}
    rest = {name: copies(model.teacher.module.encoder) for name, model in models.items()}
    if teacher == "shared":
        assert models["toy"].teacher.module.transformer is models["bell"].teacher.module.transformer

    def look(name: str, own: int) -> None:
        config = made.members[name].config
        decay = decay_at(own + 1, config.train.max_steps, config.teacher)
        student = copies(made.model.transformer)
        for other, model in models.items():
            if other == name or teacher == "shared":
                before = average[other]
                average[other] = {key: decay * before[key] + (1 - decay) * student[key] for key in student}
            for key, value in copies(model.teacher.module.transformer).items():
                torch.testing.assert_close(value, average[other][key], rtol=1e-5, atol=1e-7)
                average[other][key] = value
            moved = copies(model.teacher.module.encoder)
            if other != name:
                assert all(torch.equal(moved[key], rest[other][key]) for key in moved)
            rest[other] = moved

    turns(made, 6, look)


def test_teachers_that_follow_in_different_ways_cannot_share(
    d2v: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from d2v_toy import ToyModality

    parts = ToyModality.teacher_parts
    monkeypatch.setattr(
        ToyModality, "teacher_parts",
        lambda self: {**parts(self), **({"transformer.blocks.1": "copy"} if self.name == "bell" else {})},
    )  # fmt: skip
    status, text = d2v(*words(tmp_path / "run", "joint.teacher=shared"))
    assert status == 2 and "joint.teacher=shared: the teachers cannot have one transformer" in text
    assert "transformer.blocks.1" in text and "toy average, bell copy" in text
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------------ updates


def test_balanced_gradients_are_as_long_as_one_another() -> None:
    balance, one = Balance(3), torch.ones(())
    assert balance.factor(0) == 1
    for member, length in ((0, 4.0), (1, 1.0), (0, 6.0), (2, 0.5)):
        balance.note(member, torch.tensor(length), one)
    assert balance.lengths.tolist() == pytest.approx([5.0, 1.0, 0.5]) and balance.counts.tolist() == [2, 1, 1]
    balanced = [balance.factor(i).item() * length for i, length in enumerate((5.0, 1.0, 0.5))]
    assert balanced == pytest.approx([6.5 / 3] * 3)
    before = balance.lengths.clone()
    balance.note(1, torch.tensor(math.nan), torch.zeros(()))  # of an update that is skipped
    assert torch.equal(balance.lengths, before) and balance.counts.tolist() == [2, 1, 1]


def test_a_member_alone_is_left_as_it_is() -> None:
    balance = Balance(2)
    for length in (0.3, 0.7, 1e-12, 1e12):
        balance.note(1, torch.tensor(length), torch.ones(()))
        assert balance.factor(1) == 1


@pytest.mark.parametrize("balance", ["gradient_norm", "none"])
def test_what_a_gradient_counts_in_the_transformer(tmp_path: Path, balance: str) -> None:
    """Its length, as the optimizer is given it: by `weights` where the lengths are made alike, else by `weights` and
    what the losses make of it; elsewhere nothing is scaled. The network stays as it is here, and no length falls."""
    still = ("optim.lr=0", "train.max_steps=60", "joint.shares=[1,1]", "joint.weights=[1,3]")
    made = trainer(tmp_path, f"joint.balance={balance}", *still)
    lengths: dict[str, list[float]] = {"toy": [], "bell": []}
    wholes: dict[str, list[float]] = {"toy": [], "bell": []}

    def look(name: str, own: int) -> None:
        del own
        lengths[name].append(length_of([p.grad for p in made.model.transformer.parameters()]))
        wholes[name].append(length_of([p.grad for p in made.model.models[name].predictor.parameters()]))

    turns(made, 60, look)
    seen = {name: float(np.mean(values[5:])) for name, values in lengths.items()}
    unscaled = dict(zip(made.names, made.model.balance.lengths.tolist(), strict=True))
    assert not 0.5 < unscaled["bell"] / unscaled["toy"] < 2  # one loss is a sum over channels, and is clipped
    expected = 3.0 if balance == "gradient_norm" else 3.0 * unscaled["bell"] / unscaled["toy"]
    assert seen["bell"] / seen["toy"] == pytest.approx(expected, rel=0.15)
    plain = trainer(tmp_path, "joint.balance=none", *still[:3])
    others: dict[str, list[float]] = {"toy": [], "bell": []}
    turns(plain, 12, lambda name, own: others[name].append(
        length_of([p.grad for p in plain.model.models[name].predictor.parameters()])))  # fmt: skip
    assert all(wholes[name][:6] == others[name] for name in others)


def length_of(gradients: list[Tensor | None]) -> float:
    return torch.nn.utils.get_total_norm([g for g in gradients if g is not None]).item()


def test_an_update_in_which_every_block_is_left_out(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.model.transformer.layer_drop = 1.0
    before = copies(made.model.transformer)
    lengths: list[list[float]] = []

    def look(name: str, own: int) -> None:
        del name, own
        lengths.append(made.model.balance.counts.tolist())

    turns(made, 4, look)
    assert lengths[-1] == [0, 0] and all(
        torch.equal(p, before[n]) for n, p in made.model.transformer.named_parameters()
    )


def test_in_its_turn_a_modality_has_its_own_options(tmp_path: Path) -> None:
    made = trainer(tmp_path, "joint.lr_scale=0.5")
    optimizer = made.optimizer_step.optimizer
    trunk = {id(p) for p in made.model.transformer.parameters()}
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in everything}) == len(everything) == sum(p.requires_grad for p in made.model.parameters())
    seen: set[str] = set()

    def look(name: str, own: int) -> None:
        seen.add(name)
        config = made.members[name].config
        lr = lr_at(own, config.train.max_steps, config.optim)
        for group in optimizer.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            ours = [p for p in moved if id(p) in trunk]
            assert group["lr"] == pytest.approx(lr * (0.5 if ours else 1.0)) or not moved
            if moved:
                assert tuple(group["betas"]) == tuple(config.optim.betas)
                vectors = all(p.dim() <= 1 for p in moved)
                decays = config.optim.decay_all or not vectors
                assert group["weight_decay"] == (config.optim.weight_decay if decays else 0.0)

    turns(made, 5, look)
    assert seen == {"toy", "bell"}
    state = optimizer.state
    steps = {name: {int(state[p]["step"]) for n, p in model.named_parameters() if p in state and "transformer" not in n}
             for name, model in made.model.models.items()}  # fmt: skip
    assert steps == {"toy": {3}, "bell": {2}}
    assert {int(state[p]["step"]) for p in made.model.transformer.parameters()} == {5}


# --------------------------------------------------------------------------------------------------------------- runs


def test_a_share_of_nothing_leaves_the_other_its_own_run(
    d2v: Callable[..., tuple[int, str]], read_run: Any, tmp_path: Path
) -> None:
    """Bit for bit: metrics, student, predictor and teacher."""
    steps = "train.max_steps=7"
    assert d2v("run", "modality=toy", f"out={tmp_path / 'alone'}", steps)[0] == 0
    assert d2v(*words(tmp_path / "joint", steps, "joint.shares=[1,0]"))[0] == 0
    alone, tensors = read_run(tmp_path / "alone")
    joint, _ = read_run(tmp_path / "joint")
    for a, b in zip(alone, joint, strict=True):
        for key in ("loss", "target_std", "pred_std", "grad_norm", "masked", "lr", "ema_decay"):
            assert a[key] == b[f"toy/{key}"], key
        assert b["toy/factor"] == 1 and b["lr"] == a["lr"] and "bell/loss" not in b
    for part in ("model", "teacher"):
        folder = list_checkpoints(tmp_path / "joint" / "toy" / "checkpoints")[-1]
        from safetensors.torch import load_file

        stored = load_file(folder / f"{part}.safetensors")
        for name, tensor in stored.items():
            assert torch.equal(tensor, tensors[f"{part}.{name}"]), name
    never = load(tmp_path / "joint", modality="bell")
    assert never.step == 0


STEPS = 10


def long(out: Path, *more: str) -> list[str]:
    return words(out, f"train.max_steps={STEPS}", "joint.shares=[2,1]", "model.layer_drop=0.2", *more)


@pytest.fixture
def straight(d2v: Callable[..., tuple[int, str]], tmp_path: Path) -> Path:
    out = tmp_path / "straight"
    assert d2v(*long(out))[0] == 0
    return out


@pytest.mark.parametrize(("stop", "workers"), [(1, (0, 0)), (4, (1, 0)), (5, (0, 1))])
def test_stopped_and_resumed_is_the_same(
    d2v: Callable[..., tuple[int, str]],
    read_run: Any,
    straight: Path,
    tmp_path: Path,
    stop: int,
    workers: tuple[int, int],
) -> None:
    out = tmp_path / "stopped"
    with stopping_after(stop):
        status, text = d2v(*long(out, f"train.num_workers={workers[0]}"))
    assert status == 130 and f"Stopped by SIGINT after step {stop} of {STEPS}; a checkpoint is saved." in text
    assert not (out / "summary.json").exists()
    with pytest.raises(UserError, match=r"has no folder bell yet: it comes when the joint run ends"):
        load(out, modality="bell")
    torch.manual_seed(99)  # nothing hangs on the global stream
    status, text = d2v(*long(out, f"train.num_workers={workers[1]}", "resume=auto"))
    assert status == 0 and f"Going on from {out}/checkpoints/step-{stop:08d}" in text
    (lines_a, tensors_a), (lines_b, tensors_b) = read_run(straight), read_run(out)
    assert lines_a == lines_b and [line["step"] for line in lines_a] == list(range(1, STEPS + 1))
    assert tensors_a.keys() == tensors_b.keys()
    for name in tensors_a:
        assert torch.equal(tensors_a[name], tensors_b[name]), name
    for name in ("toy", "bell"):
        (_, own_a), (_, own_b) = (_member(run / name) for run in (straight, out))
        assert all(torch.equal(own_a[key], own_b[key]) for key in own_a)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (straight, out)]
    assert summaries[0]["amounts"] == summaries[1]["amounts"] and summaries[0]["updates"] == {"toy": 7, "bell": 3}


def test_stopped_while_it_reads_is_the_same(
    d2v: Callable[..., tuple[int, str]], read_run: Any, straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read and not used when the signal came is read once more."""
    from d2v_toy import ToyModality

    out, seen, collate = tmp_path / "stopped", list[str](), ToyModality.collate

    def counted(self: Any, samples: Any) -> Any:
        seen.append(self.name)
        if len(seen) == 5:
            signal.raise_signal(signal.SIGINT)
        return collate(self, samples)

    with monkeypatch.context() as patch:
        patch.setattr(ToyModality, "collate", counted)
        status, text = d2v(*long(out, "train.check_memory=false"))
    assert status == 130 and "Stopped by SIGINT after step " in text
    assert d2v(*long(out, "train.check_memory=false", "resume=auto"))[0] == 0
    (lines_a, tensors_a), (lines_b, tensors_b) = read_run(straight), read_run(out)
    assert lines_a == lines_b
    assert all(torch.equal(tensors_a[name], tensors_b[name]) for name in tensors_a)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (straight, out)]
    assert summaries[0]["amounts"] == summaries[1]["amounts"]


def _member(run: Path) -> tuple[str, dict[str, Tensor]]:
    from safetensors.torch import load_file

    (folder,) = list_checkpoints(run / "checkpoints")
    return folder.name, load_file(folder / "model.safetensors") | {
        f"teacher.{n}": t for n, t in load_file(folder / "teacher.safetensors").items()
    }


@pytest.mark.parametrize("teacher", ["own", "shared"])
def test_what_a_run_leaves(d2v: Callable[..., tuple[int, str]], tmp_path: Path, teacher: str) -> None:
    out = tmp_path / "run"
    status, text = d2v(*words(out, f"joint.teacher={teacher}"))
    assert status == 0 and "9 updates in" in text and "toy 6 (" in text and "bell 3 (" in text
    assert sorted(p.name for p in out.iterdir()) == [
        "bell", "checkpoints", "config.yaml", "metrics.jsonl", "summary.json", "toy"
    ]  # fmt: skip
    summary = json.loads((out / "summary.json").read_text())
    assert summary["modality"] == ["toy", "bell"] and summary["steps"] == 9 and summary["updates"]["bell"] == 3
    last = lines_of(out)[-1]
    assert last["toy/updates"] == 6 and last["bell/updates"] == 3
    assert last["loss"] == pytest.approx((last["toy/loss"] + last["bell/loss"]) / 2)
    for name, updates in (("toy", 6), ("bell", 3)):
        assert (out / name / "config.yaml").is_file() and _member(out / name)[0] == f"step-{updates:08d}"
        assert read_yaml(out / name / "config.yaml")["train"]["max_steps"] == updates
        run = load(out, modality=name)
        assert run.config.modality == name and run.step == updates
        inputs = {"x": torch.randn(1, 9, 4)}
        layers, averaged = run.encode(inputs), load(out / name, teacher=True).encode(inputs)
        assert [one.shape for one in layers] == [(9, 16)] * 3
        assert not any(torch.equal(a, b) for a, b in zip(layers, averaged, strict=True))
        assert not torch.equal(layers[-1], load(out, modality=name, untrained=True).encode(inputs)[-1])
    a, b = (load(out, modality=name).student.transformer for name in ("toy", "bell"))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    status, text = d2v(*words(out, f"joint.teacher={teacher}", "resume=auto"))
    assert status == 0 and "already complete" in text


def test_loading_says_what_is_missing(d2v: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert d2v(*words(out))[0] == 0
    with pytest.raises(UserError, match=r"is a joint run of toy, bell, and which of them is meant is not said"):
        load(out)
    with pytest.raises(UserError, match=r"is a joint run of toy, bell, not of modality=drum\."):
        load(out, modality="drum")
    with pytest.raises(UserError, match=r"is a run of modality=toy, not bell\."):
        load(out / "toy", modality="bell")
    assert load(out / "toy").config.modality == load(out / "toy", modality="toy").config.modality == "toy"


def test_one_of_them_is_put_to_use(d2v: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    """Fine-tuned, probed and gone on with, from the joint run's folder or its own."""
    out = tmp_path / "run"
    assert d2v(*words(out))[0] == 0
    tune = ["run", "stage=finetune", f"from={out}", "preset=tiny", "train.max_steps=2"]
    status, text = d2v(*tune, "modality=toy", f"out={tmp_path / 'a'}")
    assert status == 0 and f"Weights of the student from {out / 'toy'}, step 6." in text
    status, text = d2v("run", "stage=probe", f"from={out / 'toy'}", f"out={tmp_path / 'b'}")
    assert status == 0
    status, text = d2v("run", "modality=bell", f"from={out}", f"out={tmp_path / 'c'}", "train.max_steps=2")
    assert status == 0 and f"Weights from {out / 'bell' / 'checkpoints' / 'step-00000003'}" in text
    status, text = d2v(*tune, f"out={tmp_path / 'd'}")
    assert status == 2 and "which of them is meant is not said: give modality=NAME" in text


def test_a_member_does_not_go_on_alone(d2v: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert d2v(*words(out))[0] == 0
    status, text = d2v("run", "modality=toy", f"out={out / 'toy'}", "resume=auto", "train.max_steps=20")
    assert (
        status == 2
        and "is one modality of a joint run, which alone can go on" in text
        and f"from={out / 'toy'}" in text
    )
    status, text = d2v("run", "modality=toy", f"out={out}", "resume=auto")
    assert status == 2 and f"The run in {out} has modality=[toy,bell], not toy." in text


def test_resuming_with_other_options_is_refused_and_more_steps_prolong(
    d2v: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert d2v(*words(out))[0] == 0
    status, text = d2v(*words(out, "resume=auto", "bell.optim.lr=0.5", "joint.weights=[1,2]", "train.log_every=3"))
    assert status == 2 and "bell.optim.lr: stored 0.003, now 0.5" in text and "joint.weights: stored [], now" in text
    assert "log_every" not in text
    status, text = d2v(*words(out, "resume=auto", "train.max_steps=15"))
    assert status == 0 and f"Going on from {out}/checkpoints/step-00000009" in text
    assert json.loads((out / "summary.json").read_text())["updates"] == {"toy": 10, "bell": 5}
    assert _member(out / "bell")[0] == "step-00000005"


def test_an_older_run_without_an_option_goes_on(d2v: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    out = tmp_path / "run"
    with stopping_after(3):
        assert d2v(*words(out))[0] == 130
    stored = read_yaml(out / "config.yaml")
    del stored["joint"]["lr_scale"], stored["bell"]["train"]["num_masks"], stored["toy"]["data"]["extra_tokens"]
    OmegaConf.save(OmegaConf.create(stored), out / "config.yaml")
    assert d2v(*words(out, "resume=auto"))[0] == 0


def test_collapse_is_told_of_the_one_that_collapses(d2v: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    status, text = d2v(*words(tmp_path / "run", "bell.guard.min_pred_std=50", "bell.guard.after_steps=1"))
    assert status == 2 and "The representation of bell has collapsed: at step 2 pred_std is" in text
    assert "below bell.guard.min_pred_std=50.0" in text and "bell.teacher.ema_decay closer to 1" in text


def test_unreadable_samples_are_named_with_their_modality(d2v: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    out = tmp_path / "run"
    status, text = d2v(*words(out, "bell.data.bad=[1]", "train.max_steps=20"))
    assert status == 0 and text.count("skipped bell:sample-1: sample 1 is broken on purpose") == 1
    assert json.loads((out / "summary.json").read_text())["skipped"] == {
        "bell:sample-1": "sample 1 is broken on purpose"
    }


def test_one_of_them_has_nothing_to_learn_from(d2v: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    bad = f"bell.data.bad={list(range(9))}".replace(" ", "")
    status, text = d2v(*words(tmp_path / "run", bad))
    assert status == 2 and "Nothing to learn from" in text and "Traceback" not in text


def test_a_step_that_is_not_finite_is_skipped_with_its_samples(
    d2v: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from d2v_toy import ToyModality

    collate, out = ToyModality.collate, tmp_path / "run"
    spoilt: list[str] = []

    def spoil(self: Any, samples: Any) -> Any:
        inputs = dict(collate(self, samples))
        if self.name == "bell" and not spoilt:
            spoilt.append("once")
            inputs["x"] = inputs["x"] * math.nan
        return inputs

    monkeypatch.setattr(ToyModality, "collate", spoil)
    status, text = d2v(*words(out))
    assert status == 0 and "fault step 2" in text
    (fault,) = [json.loads(line) for line in (out / "faults.jsonl").read_text().splitlines()]
    assert fault["step"] == 2 and all(name.startswith("bell:sample-") for name in fault["samples"])
    last = lines_of(out)[-1]
    assert last["bad_steps"] == 1 and math.isfinite(last["bell/loss"]) and math.isfinite(last["bell/factor"])
