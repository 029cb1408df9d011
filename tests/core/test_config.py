"""What a configuration accepts, and what it says about the rest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
from omegaconf import OmegaConf

from d2v_core import config as configuration
from d2v_core.config import (
    CORE_SECTIONS,
    KEYS,
    ModelConfig,
    from_dict,
    load_config,
    opt,
    options,
    parse_arguments,
    read_yaml,
)
from d2v_core.errors import UserError


def error_of(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(["modality=toy", *words])
    return str(caught.value)


def test_defaults_then_the_recipe_then_the_command_line():
    config, kind = load_config(["modality=toy", "model.num_layers=3", "target.layer_norms=[layer,instance]"])
    assert kind.name == "toy" and config.modality == "toy" and config.preset == "tiny" and config.encoder == "shared"
    assert config.model.mlp_ratio == ModelConfig().mlp_ratio  # default
    assert config.model.embed_dim == 16 != ModelConfig().embed_dim  # recipe
    assert config.model.num_layers == 3  # command line over the recipe's 2
    assert config.target.layer_norms == ["layer", "instance"]
    assert config.sections["data"].crop is True and config.sections.keys() == {"data", "mask"}


@pytest.mark.parametrize(
    ("word", "key", "hint"),
    [
        ("sed=1", "sed", "'?seed'?"),
        ("train.max_stps=3", "train.max_stps", "'?max_steps'?"),
        ("data.num_sample=3", "data.num_sample", "'?num_samples'?"),
        ("modl.embed_dim=3", "modl", "'?model'?"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_key(word: str, key: str, hint: str):
    import re

    text = error_of(word)
    assert re.search(rf"{key} is not an option.* Did you mean(:| one of:)? {hint}", text), text
    assert "`d2v config modality=toy` lists every option" in text


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("train.max_steps=abc", ("train.max_steps=abc", "whole number")),
        ("train.max_steps=1.5", ("train.max_steps=1.5", "whole number")),
        ("optim.lr=fast", ("optim.lr=fast", "a number")),
        ("data.crop=perhaps", ("data.crop=perhaps", "true or false")),
        ("model.norm=pst", ("model.norm=pst", "post", "pre", "Did you mean post?")),
        ("target.layer_norms=[instnce]", ("target.layer_norms", "instnce", "instance, layer, batch, group")),
        ("target.layer_norms=[layer", ("target.layer_norms=[layer", "a list")),
        ("optim=3", ("optim=3", "section")),
        ("train=null", ("train", "section")),
        ("train.max_steps=null", ("train.max_steps", "whole number")),
        ("seed=x", ("seed=x", "whole number")),
    ],
)
def test_a_value_of_the_wrong_type_names_key_value_and_what_is_expected(word: str, parts: tuple[str, ...]):
    text = error_of(word)
    assert all(part in text for part in parts), text


def test_a_key_in_the_wrong_section_is_told_its_own():
    assert "model.lr is not an option. There is optim.lr." in error_of("model.lr=1")
    assert "There is data.micro_batch." in error_of("train.micro_batch=1")
    assert "There is train.max_steps." in error_of("max_steps=1")


def test_text_stays_text_whatever_yaml_would_make_of_it():
    for value in (
        "1e5",
        "007",
        "true",
        "*.x",
        "a: b",
        "[x",
        "2024-01-01",
        "@x",
        "~",
        "null and void",
        "#1",
        "a=b",
        "'q'",
    ):
        config, _ = load_config(["modality=toy", f"out={value}"])
        assert config.out == value
        again = from_dict(OmegaConf.to_container(OmegaConf.create(config.to_yaml())), type_of("toy"), "there")
        assert again.out == value
    assert load_config(["modality=toy", "out=null"])[0].out is None


def type_of(name: str):
    from d2v_core import plugins

    return plugins.load(name)


def test_unknown_names():
    with pytest.raises(UserError, match=r"There is no modality 'tou'. Installed: .*toy.*Did you mean toy\?"):
        load_config(["modality=tou"])
    with pytest.raises(UserError, match=r"modality is missing: .*Installed: .*toy"):
        load_config(["train.max_steps=3"])
    assert "preset='tny' is not one of toy's: tiny. Did you mean tiny?" in error_of("preset=tny")
    said = error_of("encoder=shred")
    assert "encoder='shred' is not one of toy's: shared, own" in said and "Did you mean shared?" in said


def test_words_that_are_no_options():
    for word in ("train.max_steps", "--help-me", "=3", "1x=2", "a b=2", ""):
        with pytest.raises(UserError, match=r"is not of the form key=value"):
            parse_arguments([word])
    with pytest.raises(UserError, match=r"seed is given twice: '1' and '2'"):
        parse_arguments(["seed=1", "train.max_steps=3", "seed=2"])
    assert parse_arguments(["data.path=/a=b", "x="]) == {"data.path": "/a=b", "x": ""}


@pytest.mark.parametrize("comments", [False, True])
def test_the_printed_configuration_reads_back_as_itself(tmp_path: Path, comments: bool):
    words = ["modality=toy", "encoder=own", "from=runs/earlier", "out=x", "resume=auto", "model.layer_scale=1e-4",
             "optim.betas=[0.5,0.6]", "target.layer_norms=[]", "loss.scale=0.5", "optim.clip_grad_norm=1"]  # fmt: skip
    config, kind = load_config(words)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(comments))
    stored = read_yaml(path)
    assert stored["from"] == "runs/earlier" and "from_run" not in stored
    again = from_dict(stored, kind, "there")
    assert again == config and again.from_run == "runs/earlier"
    assert again.to_yaml() == config.to_yaml()


def test_the_command_prints_what_parses_back_with_a_sentence_for_every_option(d2v, tmp_path: Path):
    status, text = d2v("config", "modality=toy", "train.max_steps=77")
    assert status == 0
    (tmp_path / "config.yaml").write_text(text)
    again = from_dict(read_yaml(tmp_path / "config.yaml"), type_of("toy"), "there")
    assert again == load_config(["modality=toy", "train.max_steps=77"])[0]
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line and not line.lstrip().startswith(("#", "-")):
            above = lines[number - 1].lstrip() if number else ""
            assert above.startswith("# ") and len(above) > 5, f"no sentence above {line!r}"
    assert "# Optimizer updates.\n  max_steps: 77" in text
    assert "# Tokens per optimizer step." in text  # of the modality's own section


def test_every_field_has_a_sentence():
    for name, kind in {**CORE_SECTIONS, **type_of("toy").sections("shared")}.items():
        for field in dataclasses.fields(kind):
            assert field.metadata.get("doc", "").endswith("."), f"{name}.{field.name}"
        assert kind.__doc__ and not kind.__doc__.startswith(kind.__name__)
    assert all(doc.endswith(".") for _, doc in KEYS.values())


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.num_heads=3", "model.embed_dim=16 must be a multiple of model.num_heads=3"),
        ("model.num_layers=0", "model.num_layers=0 must be at least 1"),
        ("model.dropout=1.5", "model.dropout=1.5 must lie between 0.0 and 0.99"),
        ("target.top_k_layers=3", "target.top_k_layers=3 must lie between 1 and 2"),
        ("loss.beta=-1", "loss.beta=-1.0 must be at least 0.0"),
        ("loss.scale=big", "loss.scale=big must be inverse_sqrt, mean, sum or a number"),
        ("loss.scale=nan", "loss.scale=nan must be inverse_sqrt, mean, sum or a number"),
        ("teacher.ema_decay=1.1", "teacher.ema_decay=1.1 must lie between"),
        ("optim.betas=[0.9]", r"optim.betas=\[0.9\] must be two numbers"),
        ("optim.betas=[0.9,1.0]", r"optim.betas=\[0.9, 1.0\] must be two numbers"),
        ("optim.lr=nan", "optim.lr=nan must be"),
        ("optim.warmup_ratio=2", "optim.warmup_ratio=2.0 must lie between 0.0 and 1.0"),
        ("optim.clip_grad_norm=0", "optim.clip_grad_norm=0.0 must be above 0"),
        ("train.max_steps=0", "train.max_steps=0 must be at least 1"),
        ("train.keep_checkpoints=0", "train.keep_checkpoints=0 must be at least 1"),
        ("train.num_workers=-1", "train.num_workers=-1 must be at least 0"),
        ("train.device=gpu", "train.device=gpu must be auto, cpu, cuda or cuda:N"),
        ("stage=pretrian", "stage=pretrian must be one of: pretrain, finetune, probe. Did you mean pretrain?"),
        ("resume=atuo", "resume=atuo must be one of: never, auto. Did you mean auto?"),
        ("resume=auto", "resume=auto needs out=FOLDER"),
    ],
)
def test_what_types_cannot_say(word: str, message: str):
    import re

    text = error_of(word)
    assert "This configuration cannot work" in text and re.search(message.replace("?", r"\?"), text), text


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([{"a": 1}, 0.98], r"optim.betas=\[\{'a': 1\}, 0.98\]: \{'a': 1\} is no plain value"),
        ([0.9, [1]], r"optim.betas=\[0.9, \[1\]\]: \[1\] is no plain value"),
        ({"a": 1}, "In there: a list stands where a mapping is meant, or the reverse"),
    ],
)
def test_a_stored_configuration_with_something_else_in_a_list(betas: object, message: str):
    config, kind = load_config(["modality=toy"])
    stored = cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.create(config.to_yaml())))
    with pytest.raises(UserError, match=message):
        from_dict(stored | {"optim": stored["optim"] | {"betas": betas}}, kind, "there")


def test_a_stored_key_with_a_backslash_in_it():
    config, kind = load_config(["modality=toy"])
    stored = cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.create(config.to_yaml())))
    with pytest.raises(UserError, match=r"model\.embed\\kdim is not an option"):
        from_dict(stored | {"model": stored["model"] | {"embed\\kdim": 4}}, kind, "there")


def test_tri_stage_needs_room_and_an_end_above_zero():
    words = ("optim.schedule=tri_stage", "optim.warmup_ratio=0.2", "optim.hold_ratio=0.9", "optim.final_lr_ratio=0")
    text = error_of(*words)
    assert "optim.warmup_ratio + optim.hold_ratio" in text and "optim.final_lr_ratio must be above 0" in text
    load_config(["modality=toy", *words[:1], "optim.warmup_ratio=0.1", words[2], "optim.final_lr_ratio=0.01"])


def test_all_problems_are_told_at_once():
    text = error_of("train.max_steps=0", "loss.beta=-1", "model.num_heads=3")
    assert text.count("\n  ") == 3


def test_a_typo_in_a_recipe_names_the_recipe(tmp_path: Path):
    class Other(type_of("toy")):
        @classmethod
        def recipes(cls) -> Path:
            return tmp_path

    (tmp_path / "tiny.yaml").write_text("model: {embed_dmi: 8}\n")
    with pytest.raises(UserError, match=r"In preset tiny: model.embed_dmi is not an option.*embed_dim"):
        load_config(["modality=toy"], lambda name: Other)
    (tmp_path / "tiny.yaml").write_text("encoder: own\nmodel: {embed_dim: 12}\n")
    assert load_config(["modality=toy"], lambda name: Other)[0].encoder == "own"
    assert load_config(["modality=toy", "encoder=shared"], lambda name: Other)[0].encoder == "shared"
    (tmp_path / "tiny.yaml").write_text("model: [\n")
    with pytest.raises(UserError, match=r"tiny.yaml is not valid YAML"):
        load_config(["modality=toy"], lambda name: Other)


def test_a_recipe_may_build_on_another(tmp_path: Path):
    class Other(type_of("toy")):
        @classmethod
        def recipes(cls) -> Path:
            return tmp_path

    (tmp_path / "first.yaml").write_text("encoder: own\nmodel: {embed_dim: 12, num_layers: 1}\ntrain: {max_steps: 7}\n")
    (tmp_path / "second.yaml").write_text("like: first\nmodel: {num_layers: 3}\n")
    (tmp_path / "third.yaml").write_text("like: second\nencoder: shared\noptim: {lr: 0.5}\n")
    words = ["modality=toy", "target.top_k_layers=1", "model.num_heads=2"]
    config = load_config([*words, "preset=third"], lambda name: Other)[0]
    assert (config.encoder, config.model.embed_dim, config.model.num_layers) == ("shared", 12, 3)
    assert (config.train.max_steps, config.optim.lr, config.preset) == (7, 0.5, "third")
    (tmp_path / "third.yaml").write_text("like: frist\n")
    with pytest.raises(
        UserError, match=r"preset='frist' is not one of toy's: first, second, third. Did you mean first"
    ):
        load_config([*words, "preset=third"], lambda name: Other)


def test_files_that_hold_no_configuration(tmp_path: Path):
    path = tmp_path / "config.yaml"
    with pytest.raises(UserError, match=r"config.yaml does not exist"):
        read_yaml(path)
    path.write_text("- 1\n- 2\n")
    with pytest.raises(UserError, match=r"config.yaml holds no mapping"):
        read_yaml(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"config.yaml (cannot be read as|is not valid) YAML"):
        read_yaml(path)
    with pytest.raises(UserError, match=r"there has no key `encoder`"):
        from_dict({"modality": "toy"}, type_of("toy"), "there")


def test_a_modality_cannot_take_a_section_of_the_core():
    for name in ("train", "seed", "from"):

        class Greedy(type_of("toy")):
            @classmethod
            def sections(cls, encoder: str, name=name):
                return {name: ModelConfig}

        with pytest.raises(TypeError, match=rf"modality 'toy' declares sections that the core has: \['{name}'\]"):
            load_config(["modality=toy"], lambda _, kind=Greedy: kind)


def test_sections_are_read_by_name_and_type(make):
    config = make().config
    assert config.section("mask", type(config.sections["mask"])).mask_length == 3
    with pytest.raises(TypeError, match=r"section 'mask' is SpanMaskingConfig, expected ModelConfig"):
        config.section("mask", ModelConfig)
    with pytest.raises(TypeError, match=r"section 'nothing' is NoneType"):
        config.section("nothing", ModelConfig)


@dataclass
class Verb:
    run: str = opt("", "A folder.")
    steps: int = opt(3, "How many.")


def test_options_of_a_plugins_own_verb():
    assert options(Verb, ["run=a", "steps=4"], "verb") == Verb("a", 4)
    with pytest.raises(UserError, match=r"verb: .*stepz.*(?s:.*)`d2v verb --help` lists the options"):
        options(Verb, ["stepz=4"], "verb")
    with pytest.raises(UserError, match=r"verb: .*(?s:.*)--help"):
        options(Verb, ["steps=x"], "verb")
    with pytest.raises(UserError, match=r"not of the form key=value"):
        options(Verb, ["x"], "verb")


def test_default_lists_are_not_shared():
    a, b = configuration.TargetConfig(), configuration.TargetConfig()
    a.layer_norms.append("layer")
    assert b.layer_norms == []
