"""Names and options of official implementations: the parts that every table and every configuration goes through."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from d2v_core.errors import UserError
from d2v_core.official import NameTable, Options, fairseq_blocks, flattened, gradients, moved

TABLE = NameTable(
    (
        ("mask", "student.mask"),
        ("convs.#.0.", "student.convs.#."),
        ("head.", "predictor."),
        ("head.0.", "predictor."),
        *fairseq_blocks("encoder."),
    )
)


def test_names_go_there_and_back():
    official = {
        "mask": torch.rand(3), "convs.12.0.weight": torch.rand(2), "head.bias": torch.rand(1),
        **{f"encoder.layers.7.self_attn.{part}_proj.weight": torch.rand(2, 2) for part in "qkv"},
        "encoder.layers.7.final_layer_norm.bias": torch.rand(2),
    }  # fmt: skip
    ours, unknown = TABLE.to_d2v(official)
    assert not unknown
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == {
        "student.mask": (3,), "student.convs.12.weight": (2,), "predictor.bias": (1,),
        "student.transformer.blocks.7.attention.qkv.weight": (6, 2), "student.transformer.blocks.7.norm2.bias": (2,),
    }  # fmt: skip
    stacked = ours["student.transformer.blocks.7.attention.qkv.weight"]
    assert torch.equal(stacked[2:4], official["encoder.layers.7.self_attn.k_proj.weight"])
    back, unknown = TABLE.to_official(ours)
    assert not unknown and back.keys() == official.keys()
    assert all(torch.equal(back[name], official[name]) for name in official)


def test_an_old_name_is_read_and_never_written():
    ours, _ = TABLE.to_d2v({"head.0.weight": torch.ones(1)})
    assert ours.keys() == {"predictor.weight"}
    assert TABLE.to_official(ours)[0].keys() == {"head.weight"}
    with pytest.raises(UserError, match=r"give predictor.weight twice, the second time as head.0.weight"):
        TABLE.to_d2v({"head.weight": torch.ones(1), "head.0.weight": torch.ones(1)})


@pytest.mark.parametrize("name", ["masks", "mask.weight", "convs.x.0.weight", "convs.1.0.gamma", "xhead.weight"])
def test_names_that_are_not_in_the_table(name: str):
    assert TABLE.to_d2v({name: torch.ones(1)}) == ({}, [name])
    assert TABLE.to_official({f"student.{name}": torch.ones(1)}) == ({}, [f"student.{name}"])


def test_queries_alone_are_not_enough():
    with pytest.raises(UserError, match=r"blocks\.0\.attention\.qkv\.bias the official weights lack k_proj, v_proj\."):
        TABLE.to_d2v({"encoder.layers.0.self_attn.q_proj.bias": torch.ones(1)})


def test_names_are_moved():
    assert moved({"a.b": 1, "c": 2}, "", "x.") == {"x.a.b": 1, "x.c": 2}
    assert moved({"x.a": 1, "c": 2}, "x.", "") == {"a": 1, "c": 2}


def test_sections_become_one():
    assert flattened({"a": 1, "b": {"c": {"d": [2]}, "e": None}, "f": {}}) == {"a": 1, "b.c.d": [2], "b.e": None}


def test_gradients_leave_the_teacher_out():
    model = nn.ModuleDict({"student": nn.Linear(1, 1), "teacher": nn.Linear(1, 1)})
    model["student"].weight.sum().backward()  # pyright: ignore
    given = gradients(model)
    assert given.keys() == {"student.weight", "student.bias"}
    assert given["student.weight"] is not None and given["student.bias"] is None


def test_options_become_words():
    options = Options({"depth": 3, "rate": 0.5, "_name": "x"})
    options.fixed({"only": "this"})
    values = {
        "a": options.take("depth", int), "b": options.take("rate", (int, float)), "c": options.take("none", int, 7),
        "d": None, "e": True, "f": ["x", "y"], "g": [],
    }  # fmt: skip
    assert options.left() == ["_name"]
    assert options.words(values, "it", []) == ["a=3", "b=0.5", "c=7", "d=null", "e=true", "f=[x,y]", "g=[]"]


def test_all_that_does_not_fit_is_named_at_once():
    options = Options({"depth": "3", "flag": 1, "number": True, "anything": True, "only": "that", "rest": 0})
    options.fixed({"only": "this", "absent": 1})
    taken = [options.take("depth", int), options.take("flag", bool), options.take("number", (int, float))]
    assert taken == [None] * 3 and options.take("missing", int) is None and options.take("anything") is True
    options.take("depth", int)  # named once, however often it is asked for
    with pytest.raises(UserError) as caught:
        options.words({}, "data2vec", options.left())
    assert str(caught.value) == (
        "The official configuration does not fit data2vec as d2v has it:\n  only='that': d2v has only 'this'\n"
        "  depth='3' is str\n  flag=1 is int\n  number=True is bool\n  missing is missing\n  unknown: rest"
    )
