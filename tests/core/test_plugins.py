"""Distributions that are missing, broken or at odds, each as metadata and a module in a folder on sys.path."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from d2v_core import plugins
from d2v_core.errors import UserError
from d2v_core.hookspecs import CONTRACT_VERSION

GOOD = """
from d2v_core.hookspecs import hookimpl
@hookimpl
def d2v_modality():
    from d2v_toy import ToyModality
    class Renamed(ToyModality):
        name = {name!r}
    return Renamed
"""


ODD = GOOD.format(name="odd")


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """distribution("dist", "modality", code): installs it; the module is named after the distribution."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(dist: str, name: str, code: str, group: str = plugins.GROUP, value: str = "{module}") -> str:
        module = f"{dist.replace('-', '_')}_{tmp_path.name}"
        folder = tmp_path / f"{dist.replace('-', '_')}-1.5.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.5\n")
        (folder / "entry_points.txt").write_text(f"[{group}]\n{name} = {value.format(module=module)}\n")
        (tmp_path / f"{module}.py").write_text(code)
        monkeypatch.delitem(sys.modules, module, raising=False)
        return module

    return install


def test_a_stranger_is_found_listed_and_loaded_like_the_built_ins(distribution, d2v):
    module = distribution("d2v-extra", "extra", GOOD.format(name="extra"))
    assert plugins.Plugin("extra", "d2v-extra", "1.5", module, None) in plugins.installed()
    assert plugins.load("extra").name == "extra"
    status, text = d2v("modalities")
    assert status == 0 and f"d2v-extra 1.5  {module}" in text and "d2v-toy 1.0  d2v_toy" in text
    assert plugins.names() == sorted(plugins.names()) and {"extra", "toy"} <= set(plugins.names())
    status, text = d2v("config", "modality=extra")
    assert status == 0 and "modality: extra" in text


CONTRACT = "D2V_CONTRACT = {}\n" + GOOD


def test_the_contract_version_is_read_without_importing(distribution):
    """A plugin of another time may fail in its first line; the reason is said instead."""
    for number, dist in ((0, "d2v-old"), (99, "d2v-new")):
        distribution(dist, dist[4:], CONTRACT.format(number, name=dist[4:]) + "import gone\n")
    with pytest.raises(
        UserError,
        match=r"modality 'old' from d2v-old 1.5, module .* is refused: d2v-old 1.5 was built for version 0 of the "
        r"contract, this d2v \(.*\) has version 1. Install a newer d2v-old, or an older d2v\.",
    ):
        plugins.load("old")
    with pytest.raises(UserError, match=r"built for version 99 of the contract.*Install a newer d2v"):
        plugins.load("new")
    contracts = {p.name: p.contract for p in plugins.installed()}
    assert contracts["old"] == 0 and contracts["new"] == 99 and contracts["toy"] == CONTRACT_VERSION


@pytest.mark.parametrize(
    ("line", "declared"),
    [
        ("D2V_CONTRACT = 1", 1), ("D2V_CONTRACT: int = 1", 1), ("D2V_CONTRACT = one", None), ("", None),
        ("D2V_CONTRACT = '1'", None), ("if True:\n    D2V_CONTRACT = 1", None), ("D2V_CONTRACT", None), ("x = (", None),
    ],
)  # fmt: skip
def test_what_counts_as_a_declaration(distribution, line: str, declared: int | None):
    distribution("d2v-says", "says", f"{line}\n")
    assert next(p.contract for p in plugins.installed() if p.name == "says") == declared


def test_the_contract_of_a_module_in_a_package_is_read_without_importing_the_package(distribution, tmp_path: Path):
    package = tmp_path / f"deep_{tmp_path.name}"
    package.mkdir()
    (package / "__init__.py").write_text("import gone")
    (package / "plugin.py").write_text("D2V_CONTRACT = 7")
    distribution("d2v-deep", "deep", "", value=f"{package.name}.plugin")
    assert next(p.contract for p in plugins.installed() if p.name == "deep") == 7


def test_one_that_declares_nothing_counts_as_built_for_the_first_version(distribution):
    distribution("d2v-silent", "silent", GOOD.format(name="silent"))
    assert plugins.load("silent").name == "silent"  # for as long as that is the version


def test_who_provides_what_and_what_is_wrong_with_it(distribution, d2v, tmp_path: Path):
    """Each fault has its sentence, and none keeps the others from being shown, loaded or run."""
    distribution("d2v-fine", "fine", CONTRACT.format(1, name="fine"))
    distribution("d2v-old", "old", CONTRACT.format(0, name="old"))
    distribution("d2v-broken", "broken", "import a_library_that_is_not_there")
    distribution("d2v-quits", "quits", "import sys; sys.exit(3)")
    distribution("d2v-typo", "typo", GOOD.format(name="typo").replace("def d2v_modality", "def d2v_modalty"))
    distribution("d2v-wrong", "wrong", GOOD.format(name="wrong").replace("return Renamed", "return 3"))
    distribution("d2v-missing", "missing", "", value="no_such_module_anywhere")
    for dist in ("d2v-one", "d2v-two"):
        distribution(dist, "twice", GOOD.format(name="twice"))
    distribution("d2v-verbs", "odd-verb", "import gone", plugins.COMMANDS, "{module}:main")
    status, text = d2v("plugins")
    assert status == 0
    for title, sentence in (
        ("d2v-fine 1.5", "contract 1, fits\n    loads"),
        ("d2v-old 1.5", "REFUSED: d2v-old 1.5 was built for version 0"),
        ("d2v-broken 1.5", "cannot be imported: ModuleNotFoundError"),
        ("d2v-quits 1.5", "cannot be imported: SystemExit: 3"),
        ("d2v-typo 1.5", "has a hook that d2v does not know"),
        ("d2v-wrong 1.5", "returns 3 from d2v_modality"),
        ("d2v-missing 1.5", "cannot be imported: ModuleNotFoundError"),
        ("d2v-one 1.5", "The modality 'twice' is claimed by"),
        ("d2v-two 1.5", "The modality 'twice' is claimed by"),
        ("d2v-verbs 1.5", "The command 'odd-verb' from d2v-verbs cannot be loaded"),
        ("d2v-toy 1.0", "contract 1, fits\n    loads"),
    ):
        part = text.split(f"{title}\n")[1].split("\nd2v-")[0]
        assert sentence in part, part
    status, text = d2v("modalities")
    assert status == 0 and "twice" in text and "cannot be used: d2v-one 1.5 and d2v-two 1.5 both claim it" in text
    assert "contract 1 (not declared)" in text and "REFUSED: d2v-old" in text
    assert d2v("config", "modality=fine")[0] == 0
    assert d2v("run", "modality=toy", "train.max_steps=1", f"out={tmp_path / 'run'}")[0] == 0
    status, text = d2v("config", "modality=old")
    assert status == 2 and "is refused: d2v-old 1.5 was built for version 0" in text


FAULTS = {
    "an import that fails": (
        "import gone",
        "cannot be imported: ModuleNotFoundError: No module named 'gone'. Reinstall",
    ),
    "a hook misspelled": (ODD.replace("def d2v_modality", "def d2v_modalty"), "has a hook that d2v does not know"),
    "another type returned": (ODD.replace("return Renamed", "return 3"), "returns 3 from d2v_modality(); expected"),
    "an old contract": (CONTRACT.format(0, name="odd"), "was built for version 0 of the contract, this d2v"),
    "two distributions": (ODD, "The modality 'odd' is claimed by d2v-odd 1.5"),
}


@pytest.mark.parametrize(("code", "sentence"), FAULTS.values(), ids=FAULTS.keys())
def test_a_broken_plugin_stops_no_other_modality(distribution, d2v, tmp_path: Path, code: str, sentence: str):
    """It says what is wrong when it is asked for; a run of another modality trains to its end, equal to the bit."""
    words = ("run", "modality=toy", "train.max_steps=2", "train.tensorboard=false", "train.probe=false")
    assert d2v(*words, f"out={tmp_path / 'before'}")[0] == 0
    distribution("d2v-odd", "odd", code)
    if "claimed" in sentence:
        distribution("d2v-odd-too", "odd", code)
    for verb in (("run", "modality=odd"), ("config", "modality=odd"), ("check", "odd")):
        status, text = d2v(*verb)
        assert status == 2 and sentence in text and "Traceback" not in text, text
    status, text = d2v(*words, f"out={tmp_path / 'beside'}")
    assert status == 0 and "odd" not in text
    weights = [next((tmp_path / run).glob("checkpoints/step-*/model.safetensors")) for run in ("before", "beside")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert d2v("modalities")[0] == 0 and d2v("--help")[0] == 0
    assert sentence.split(";")[0] in d2v("plugins")[1]


def test_unknown(d2v):
    with pytest.raises(UserError, match=r"There is no modality 'smell'\. Installed: .*toy.* pip install it"):
        plugins.load("smell")
    assert d2v("run", "modality=smell")[0] == 2


def test_broken_import_names_the_distribution_and_stops_nobody_else(distribution, d2v):
    distribution("d2v-broken", "broken", "import a_library_that_is_not_there")
    with pytest.raises(
        UserError,
        match=r"modality 'broken' from d2v-broken 1.5, module .* cannot be imported: ModuleNotFoundError: .*"
        "a_library_that_is_not_there.*Reinstall or remove d2v-broken; nothing else is affected",
    ):
        plugins.load("broken")
    assert plugins.load("toy").name == "toy"
    assert d2v("modalities")[0] == 0 and "broken" in d2v("modalities")[1]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("x = ", "cannot be imported: SyntaxError"),
        ("raise RuntimeError('no GPU')", "cannot be imported: RuntimeError: no GPU"),
        ("", "has no hook d2v_modality.*Define `@hookimpl def d2v_modality"),
        ("def d2v_modality(): return 3", "has no hook d2v_modality"),  # the marker was forgotten
        (ODD.replace("def d2v_modality", "def d2v_modalty"), "hook that d2v does not know.*d2v_modalty"),
        (ODD.replace("d2v_modality()", "d2v_modality(colour)"), "hook that d2v does not know.*colour"),
        (ODD.replace("return Renamed", "return 3"), r"returns 3 from d2v_modality\(\); expected"),
        (ODD.replace("return Renamed", "return dict"), "returns <class 'dict'>.*d2v_core.Modality"),
        (ODD.replace("return Renamed", "return None"), "has no hook d2v_modality"),
        (ODD.replace("class", "import gone\n    class"), r"fails in d2v_modality\(\): ModuleNotFound"),
        (GOOD.format(name="other"), "calls itself 'other'; its `name` and the entry point's must agree"),
    ],
)  # fmt: skip
def test_each_mistake_of_a_plugin_is_named(distribution, code: str, message: str):
    distribution("d2v-odd", "odd", code)
    with pytest.raises(UserError, match=f"(?s)The plugin of modality 'odd' from d2v-odd 1.5.*{message}"):
        plugins.load("odd")


def test_two_distributions_with_one_name_are_refused(distribution):
    one, two = (distribution(dist, "twice", GOOD.format(name="twice")) for dist in ("d2v-one", "d2v-two"))
    with pytest.raises(UserError, match=r"The modality 'twice' is claimed by .*Uninstall all but one") as caught:
        plugins.load("twice")
    assert all(text in str(caught.value) for text in ("d2v-one 1.5", "d2v-two 1.5", one, two))
    assert plugins.names().count("twice") == 1


def test_a_distribution_seen_twice_is_one(distribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As when an editable install also lies in the working directory."""
    distribution("d2v-same", "same", GOOD.format(name="same"))
    alias = tmp_path.parent / f"{tmp_path.name}-alias"
    alias.symlink_to(tmp_path)
    monkeypatch.syspath_prepend(str(alias))
    assert plugins.load("same").name == "same"


COMMAND = "def main(argv):\n    print('called with', argv)\n    return 7\n"


def test_commands_of_plugins(distribution, d2v):
    distribution("d2v-verbs", "toy-probe", COMMAND, plugins.COMMANDS, "{module}:main")
    status, text = d2v("toy-probe", "a=1", "b")
    assert status == 7 and "called with ['a=1', 'b']" in text
    assert "d2v toy-probe" in d2v("--help")[1] and "d2v-verbs 1.5" in d2v("--help")[1]
    status, text = d2v("toy-prob")
    assert status == 2 and "'toy-prob' is not a command" in text and "Did you mean toy-probe?" in text


@pytest.mark.parametrize(
    ("code", "value"),
    [("import gone", "{module}:main"), ("", "{module}:main"), (COMMAND, "{module}"), ("1/0", "{module}:main")],
)
def test_a_command_that_cannot_be_loaded(distribution, d2v, code: str, value: str):
    distribution("d2v-verbs", "odd", code, plugins.COMMANDS, value)
    status, text = d2v("odd")
    assert status == 2 and "The command 'odd' from d2v-verbs cannot be loaded" in text


def test_commands_of_two_distributions_with_one_name(distribution, d2v):
    for dist in ("d2v-one", "d2v-two"):
        distribution(dist, "twice", COMMAND, plugins.COMMANDS, "{module}:main")
    status, text = d2v("twice")
    assert status == 2 and "The command 'twice' is claimed by" in text


ENCODER = """
D2V_CONTRACT = 1
from functools import cache
from d2v_core.hookspecs import hookimpl
@hookimpl
def d2v_encoder():
    return made()
@cache
def made():
    from dataclasses import dataclass
    import torch
    from torch import nn
    from d2v_core import RawEncoder, Tokens
    from d2v_core.config import opt
    @dataclass
    class Config:
        gain: float = opt(1.0, "Factor of the content.")
    class Mean(RawEncoder):
        name, section, content_dim = {name!r}, Config, 5
        def __init__(self, raw, config):
            super().__init__(raw, config)
            self.gain = config.section({name!r}, Config).gain
            self.embedding = nn.Linear(raw.channels, 5)
            self.out = nn.Linear(5, config.model.embed_dim)
            self.hidden = nn.Parameter(torch.randn(config.model.embed_dim))
            self.places = nn.Parameter(torch.randn(100, config.model.embed_dim))
        def embed(self, inputs):
            raw = self.read(inputs)
            return Tokens(self.gain * self.embedding(raw.values).mean(2), raw.padding_mask, raw.grid)
        def view(self, tokens, masks):
            x, padding = self.out(tokens.x), tokens.padding_mask
            if masks is not None:
                x = x.repeat_interleave(masks.num_copies, 0)
                x = torch.where(masks.hidden.flatten(0, 1).unsqueeze(-1), self.hidden.to(x.dtype), x)
                padding = None if padding is None else padding.repeat_interleave(masks.num_copies, 0)
            return Tokens(x + self.places[: x.shape[1]].to(x.dtype), padding, tokens.grid)
    return Mean
"""
READABLE = """
D2V_CONTRACT = 1
from d2v_core.hookspecs import hookimpl
@hookimpl
def d2v_modality():
    import torch
    from d2v_core import Raw, RawValues
    from d2v_toy import CHANNELS, ToyModality
    def read(inputs):
        x = inputs["x"]
        padding = torch.arange(x.shape[1]) >= inputs["sizes"][:, None] if "sizes" in inputs else None
        return RawValues(x.unsqueeze(2), padding, (x.shape[1],))
    class Readable(ToyModality):
        name = "readable"
        @classmethod
        def sections(cls, encoder):
            return {{**super().sections(encoder), **cls.more}}
        @classmethod
        def raw_sections(cls, method):
            return ToyModality.sections("")
        def raw(self):
            return Raw((1,), CHANNELS, read)
        def teacher_parts(self):
            return {{"": "average", "encoder.embedding": "share"}} if self.reads_raw else super().teacher_parts()
        @classmethod
        def recipes(cls):
            from pathlib import Path
            return Path({recipes!r})
    from dataclasses import dataclass
    from d2v_core.config import opt
    @dataclass
    class Own:
        size: int = opt(3, "Only of its own encoders.")
    Readable.more = {{"own": Own}}
    return Readable
"""


@pytest.fixture
def readable(distribution, tmp_path: Path) -> None:
    """A modality that any encoder can read, whose preset has a section of its own encoders', and such an encoder."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    toy = (Path(__file__).parent / "toy" / "recipes" / "tiny.yaml").read_text()
    (recipes / "tiny.yaml").write_text(toy + "own: {size: 7}\nencoder: shared\n")
    distribution("d2v-readable", "readable", READABLE.format(recipes=str(recipes)))
    distribution("d2v-mean", "mean", ENCODER.format(name="mean"), plugins.ENCODERS)


def test_an_encoder_of_another_distribution(readable, d2v, tmp_path: Path):
    """It is listed, configured, trained, continued and loaded; what only the modality's own encoders have is gone."""
    status, text = d2v("modalities")
    assert status == 0 and "Encoders of any modality (encoder=NAME):\n" in text
    assert re.search(r"\nmean +d2v-mean 1.5  d2v_mean_\S+  contract 1, fits", text)
    assert re.search(r"d2v-mean 1.5\n  encoder  mean +d2v_mean_\S+  contract 1, fits\n    loads", d2v("plugins")[1])
    status, text = d2v("config", "modality=readable")
    assert status == 0 and "size: 7" in text and "mean:" not in text
    status, text = d2v("config", "modality=readable", "encoder=mean", "mean.gain=2")
    assert status == 0 and "gain: 2.0" in text and "Factor of the content" in text and "size: 7" not in text
    status, text = d2v("config", "modality=readable", "encoder=mean", "own.size=2")
    assert status == 2 and "own" in text and "is not an option" in text
    words = ["run", "modality=readable", "encoder=mean", f"out={tmp_path / 'run'}"]
    assert d2v(*words, "train.max_steps=2")[0] == 0
    assert d2v(*words, "train.max_steps=3", "resume=auto")[0] == 0
    import d2v_core

    run = d2v_core.load(tmp_path / "run")
    assert type(run.student.encoder).__name__ == "Mean" and run.config.section("mean", object).gain == 1.0


def test_the_kit_holds_such_a_pair_to_the_contract(readable, monkeypatch: pytest.MonkeyPatch):
    from d2v_core.promises import PROMISES
    from d2v_core.testing import check

    kept = [name for name in PROMISES if name not in ("data", "learning", "compiled")]  # its class cannot be pickled
    results = list(check("readable", encoder="mean", promises=kept))
    assert [result for result in results if result.status != "kept"] == []
    assert {result.promise for result in results} == set(kept)
    assert "d2v_mean" in next(result.text for result in results if result.promise == "door")
    mean = plugins.load_encoder("mean")
    monkeypatch.setattr(plugins, "load_encoder", lambda name: type("Wide", (mean,), {"content_dim": 6}))
    (found,) = check("readable", encoder="mean", promises=["shapes"])
    assert found.status == "broken" and "model.embed_dim (or content_dim) say" in found.text


def test_what_no_encoder_can_read_is_refused_with_the_reason(distribution, d2v):
    distribution("d2v-mean", "mean", ENCODER.format(name="mean"), plugins.ENCODERS)
    status, text = d2v("config", "modality=toy", "encoder=mean")
    assert status == 2 and "toy can be read by its own encoders only (shared, own): it does not say which raw" in text
    status, text = d2v("config", "modality=toy", "encoder=maen")
    assert status == 2 and "encoder='maen' is not one of toy's: shared, own; plugins bring: mean" in text
    assert "Did you mean mean?" in text
    status, text = d2v("check", "toy", "encoder=maen")
    assert status == 2 and "is not one of toy's encoders and the plugins': shared, own, mean" in text


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import a_library_that_is_not_there", "cannot be imported: ModuleNotFoundError.*nothing else is affected"),
        (ENCODER.format(name="other"), "brings an encoder that calls itself 'other'"),
        (ENCODER.format(name="odd").replace("return made()", "return 3"), r"returns 3 from d2v_encoder\(\); expected a "
         "subclass of d2v_core.RawEncoder"),
        (ENCODER.format(name="odd").replace("def d2v_encoder", "def d2v_encodr"), "has a hook that d2v does not know"),
        (GOOD.format(name="odd"), "has no hook d2v_encoder. Define `@hookimpl def d2v_encoder"),
        ("D2V_CONTRACT = 0", "is refused: d2v-odd 1.5 was built for version 0"),
    ],
)  # fmt: skip
def test_a_broken_encoder_is_named_and_stops_nobody_else(
    readable, distribution, d2v, tmp_path: Path, code: str, message: str
):
    distribution("d2v-odd", "odd", code, plugins.ENCODERS)
    status, text = d2v("config", "modality=readable", "encoder=odd")
    assert status == 2 and re.search(f"(?s)The plugin of encoder 'odd' from d2v-odd 1.5.*{message}", text)
    assert re.search(message, d2v("plugins")[1], re.S)
    assert d2v("run", "modality=readable", "train.max_steps=1", f"out={tmp_path / 'own'}")[0] == 0
    assert d2v("run", "modality=readable", "encoder=mean", "train.max_steps=1", f"out={tmp_path / 'mean'}")[0] == 0


def test_two_encoders_of_one_name_are_refused(readable, distribution, d2v, tmp_path: Path):
    distribution("d2v-second", "mean", ENCODER.format(name="mean"), plugins.ENCODERS)
    status, text = d2v("config", "modality=readable", "encoder=mean")
    assert status == 2 and "The encoder 'mean' is claimed by d2v-mean 1.5" in text and "d2v-second 1.5" in text
    assert "mean" in d2v("modalities")[1] and "both claim it" in d2v("modalities")[1]
    assert d2v("config", "modality=readable")[0] == 0


def test_an_encoder_named_like_a_section_is_refused(readable, distribution, d2v):
    distribution("d2v-data", "data", ENCODER.format(name="data"), plugins.ENCODERS)
    status, text = d2v("config", "modality=readable", "encoder=data")
    assert status == 2 and "encoder=data cannot be used: readable has a section of that name" in text


def test_a_run_whose_encoder_is_gone_says_so(readable, d2v, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert d2v("run", "modality=readable", "encoder=mean", "train.max_steps=1", f"out={tmp_path / 'run'}")[0] == 0
    (tmp_path / "d2v_mean-1.5.dist-info" / "entry_points.txt").write_text("")
    import d2v_core

    with pytest.raises(UserError, match=r"There is no encoder 'mean'\. Installed: .*declares it: pip install"):
        d2v_core.load(tmp_path / "run")


LAZY = """
import sys
from d2v_core import cli
status = cli.main({words!r})
heavy = sorted({{"torch", "omegaconf", "numpy", "rich", "d2v_toy", "broken_module"}} & set(sys.modules))
print("STATUS", status, "IMPORTED", heavy)
"""


@pytest.mark.parametrize("words", [["modalities"], ["--help"], [], ["run", "--help"], ["--version"], ["nonsense"]])
def test_listing_and_help_import_nothing_heavy_and_no_plugin(python, words: list[str]):
    out = python(LAZY.format(words=words)).stdout
    assert out.splitlines()[-1] == f"STATUS {2 if words == ['nonsense'] else 0} IMPORTED []"


def test_importing_the_package_imports_no_torch(python):
    out = python("import sys, d2v_core; print('torch' in sys.modules, d2v_core.__version__)").stdout
    assert out.startswith("False ")
    out = python("import sys, d2v_core.hookspecs, d2v_core.plugins; print('torch' in sys.modules)").stdout
    assert out == "False\n"


def test_public_names_are_there_and_others_are_not():
    import d2v_core

    for name in d2v_core.__all__:
        assert getattr(d2v_core, name) is not None
    with pytest.raises(AttributeError, match="module 'd2v_core' has no attribute 'Nothing'"):
        _ = d2v_core.Nothing


def test_what_does_not_exist_at_the_command_line(d2v):
    status, text = d2v("rnu", "modality=toy")
    assert status == 2 and "'rnu' is not a command" in text and "Did you mean run?" in text
    assert d2v("run", "--help")[0] == 0 and d2v("config", "-h")[0] == 0
    status, text = d2v("--version")
    assert status == 0 and text.startswith("d2v ")


def test_python_m_is_the_command(environment, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-m", "d2v_core", "nonsense"], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("d2v: 'nonsense' is not a command")


def test_a_reader_that_leaves_early_is_no_error_to_shout_about(environment, tmp_path: Path):
    """As in `d2v modalities | true`: the pipe is closed before anything is written."""
    environment.pop("PYTHONUNBUFFERED")
    for words in (["modalities"], ["--help"]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-m", "d2v_core", *words],
            env=environment,
            cwd=tmp_path,
            stdout=writer,
            stderr=subprocess.PIPE,
        )
        os.close(writer)
        assert done.stderr == b"" and done.returncode == 1
