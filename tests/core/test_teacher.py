"""The teacher: what is averaged, copied and shared, and that nothing else ever changes it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2v_core.teacher import EMATeacher, part_of


class Net(nn.Module):
    """One parameter of each kind, a buffer of indices and a running statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.average, self.copied, self.shared = (nn.Linear(3, 3) for _ in range(3))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("index", torch.arange(5))
        self.register_buffer("running", torch.zeros(3))

    def forward(self, x):
        return self.drop(self.average(x) + self.copied(x) + self.shared(x))


PARTS = {"": "average", "copied": "copy", "shared": "share"}


def move(net: nn.Module, amount: float) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += amount


def test_updates_at_constant_decay_match_the_closed_form():
    net = Net()
    teacher = EMATeacher(net, PARTS)
    start = net.average.weight.detach().clone()
    move(net, 1.0)  # the student jumps once and stays
    decay, n = 0.9, 7
    for _ in range(n):
        teacher.update(net, decay)
    torch.testing.assert_close(teacher.module.average.weight, start + (1 - decay**n), atol=1e-6, rtol=0)
    torch.testing.assert_close(net.average.weight, start + 1.0)  # the student is untouched


def test_one_step_moves_by_one_minus_decay_even_where_that_is_small():
    net = Net()
    teacher = EMATeacher(net, PARTS)
    before = teacher.module.average.bias.double().clone()
    net.average.bias.data += 0.5
    teacher.update(net, 0.9999)
    moved = teacher.module.average.bias.double() - before
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5e-4), atol=1e-7, rtol=0)


def test_shared_parameters_are_the_students_own():
    net = Net()
    teacher = EMATeacher(net, PARTS)
    assert teacher.module.shared.weight is net.shared.weight
    assert teacher.module.average.weight.data_ptr() != net.average.weight.data_ptr()
    assert net.shared.weight.requires_grad
    move(net, 1.0)
    assert torch.equal(teacher.module.shared.weight, net.shared.weight)
    assert teacher.shares("shared") and not teacher.shares("average")


def test_shares_means_every_parameter_under_the_prefix():
    teacher = EMATeacher(Net(), {"": "average", "shared.weight": "share"})
    assert not teacher.shares("shared")


def test_copied_frozen_and_buffers_follow_at_once():
    net = Net()
    teacher = EMATeacher(net, PARTS)
    move(net, 1.0)
    net.index += 10
    net.running += 3.0
    assert not torch.equal(teacher.module.copied.weight, net.copied.weight)
    teacher.update(net, 0.9999)
    assert torch.equal(teacher.module.copied.weight, net.copied.weight)
    assert torch.equal(teacher.module.frozen, net.frozen)
    assert torch.equal(teacher.module.index, torch.arange(10, 15)) and teacher.module.index.dtype == torch.int64
    assert torch.equal(teacher.module.running, net.running)


@pytest.mark.parametrize("decay", [1.0, 1.5])
def test_decay_of_one_freezes_the_average_and_only_that(decay: float):
    net = Net()
    teacher = EMATeacher(net, PARTS)
    before = teacher.module.average.weight.clone()
    move(net, 1.0)
    teacher.update(net, decay)
    assert torch.equal(teacher.module.average.weight, before)
    assert torch.equal(teacher.module.copied.weight, net.copied.weight)


def test_decay_of_zero_makes_the_teacher_equal_bit_for_bit():
    net = Net()
    teacher = EMATeacher(net, PARTS)
    for p in net.parameters():
        p.data = torch.randn_like(p) * 1e-3
    teacher.update(net, 0.0)
    for ours, theirs in zip(teacher.module.parameters(), net.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_no_gradient_reaches_what_is_the_teachers_own():
    net = Net()
    teacher = EMATeacher(net, PARTS)
    for name, parameter in teacher.named_parameters():
        assert parameter.requires_grad == name.startswith("module.shared."), name
    teacher.module(torch.randn(2, 3)).sum().backward()
    assert teacher.module.average.weight.grad is None and teacher.module.copied.weight.grad is None
    assert net.average.weight.grad is None


def test_always_in_eval_mode_whatever_it_is_told():
    teacher = EMATeacher(Net(), PARTS)
    for module in (teacher, nn.Sequential(teacher)):
        module.train()
        assert not any(m.training for m in teacher.modules())
    x = torch.randn(4, 3)
    assert torch.equal(teacher.module(x), teacher.module(x))


def test_a_teacher_of_a_student_in_train_mode_leaves_the_student_there():
    net = Net().train()
    EMATeacher(net, PARTS)
    assert all(m.training for m in net.modules())


def test_longest_prefix_of_whole_words_decides():
    parts = {"": "average", "encoder": "copy", "encoder.embedding": "share", "encoder.embedding.conv.weight": "average"}
    assert part_of("transformer.x", parts) == "average"
    assert part_of("encoder.norm", parts) == "copy"
    assert part_of("encoder.embedding.conv.bias", parts) == "share"
    assert part_of("encoder.embedding.conv.weight", parts) == "average"
    assert part_of("encoder_2.norm", parts) == "average"  # "encoder" is not a word of it
    assert part_of("encoder.embedding_norm", parts) == "copy"
    with pytest.raises(KeyError, match=r"no entry for the parameter .*a\.b.*encoder.*\"\" for everything else"):
        part_of("a.b", {"encoder": "copy"})
    with pytest.raises(KeyError, match="no entry for the parameter"):
        EMATeacher(Net(), {"average": "average"})


def test_own_state_round_trip_and_its_errors():
    net = Net()
    teacher = EMATeacher(net, PARTS)
    move(net, 1.0)
    teacher.update(net, 0.5)
    state = {name: tensor.clone() for name, tensor in teacher.own_state().items()}
    assert not any(name.startswith("shared.") for name in state)  # the student's checkpoint has them
    assert {"average.weight", "copied.bias", "frozen", "index", "running"} <= state.keys()
    other = EMATeacher(Net(), PARTS)
    other.load_own_state(state)
    for name, tensor in other.own_state().items():
        assert torch.equal(tensor, state[name])
    shorter = {k: v for k, v in state.items() if k != "frozen"}
    with pytest.raises(KeyError, match=r"missing \['frozen'\].*unknown \['extra'\]"):
        other.load_own_state({**shorter, "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"teacher frozen: stored \(4,\), model \(3,\)"):
        other.load_own_state({**state, "frozen": torch.zeros(4)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_refused(dtype: torch.dtype):
    with pytest.raises(ValueError, match=rf"average.weight is {dtype}.*use autocast"):
        EMATeacher(Net().to(dtype), PARTS)
