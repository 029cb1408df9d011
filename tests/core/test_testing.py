"""The conformance kit finds what it is meant to find: faults planted in the toy modality, each with its sentence."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from d2v_core import Layout, LinearPredictor, Masks, SpanMasking, Tokens, plugins
from d2v_core.decoder import ConvDecoder, DecoderConfig
from d2v_core.masking import BlockMasking, BlockMaskingConfig, SpanMaskingConfig
from d2v_core.promises import PROMISES, Case
from d2v_core.testing import Conformance, cases, check, held
from d2v_core.visible import take_visible, take_visible_padding

TOY = Path(__file__).parent / "toy"
spec = importlib.util.spec_from_file_location("d2v_toy", TOY / "d2v_toy.py")  # on the path only while a test runs
assert spec is not None and spec.loader is not None
toy = sys.modules.setdefault("d2v_toy", importlib.util.module_from_spec(spec))
if not hasattr(toy, "ToyModality"):
    spec.loader.exec_module(toy)
ToyConfig, ToyDataset, ToyEncoder, ToyModality = toy.ToyConfig, toy.ToyDataset, toy.ToyEncoder, toy.ToyModality
TINY2 = """
method: data2vec2
model: {embed_dim: 16, num_layers: 2, num_heads: 2}
target: {top_k_layers: 2, layer_norms: [instance]}
teacher: {ema_decay: 0.9, ema_end_decay: 0.99}
optim: {lr: 3.0e-3, warmup_ratio: 0.2}
mask: {mask_prob: 0.5, mask_length: 2}
decoder: {dim: 16, groups: 4, kernel: 3, layers: 2}
data: {crop: false}
"""


class VisibleToy(ToyEncoder):
    """Visible tokens only, each with a learned place."""

    def __init__(self, model, extra_tokens):
        super().__init__(model, extra_tokens)
        del self.mask_embedding

    def view(self, tokens, masks):
        x, padding_mask, index = tokens.x + self.places[: tokens.x.shape[1]], tokens.padding_mask, None
        if masks is not None:
            x, padding_mask = take_visible(x, masks), take_visible_padding(padding_mask, masks)
            index = masks.visible.flatten(0, 1)
        return Tokens(x, padding_mask, tokens.grid, index=index)


class Toy(ToyModality):
    """The toy with data2vec 2.0 as well."""

    methods = ("data2vec", "data2vec2")
    encoder_of: ClassVar = {"data2vec": ToyEncoder, "data2vec2": VisibleToy}
    folder = TOY / "recipes"
    leaky = False

    @classmethod
    def recipes(cls):
        return cls.folder

    @classmethod
    def method_sections(cls, encoder, method):
        return {"data": ToyConfig, "mask": BlockMaskingConfig, "decoder": DecoderConfig}

    def masking(self):
        if self.config.method == "data2vec2":
            return BlockMasking(self.config.section("mask", BlockMaskingConfig))
        return super().masking()

    def feature_encoder(self):
        return self.encoder_of[self.config.method](self.config.model, self.data.extra_tokens)

    def predictor(self):
        if self.config.method == "data2vec2":
            return ConvDecoder(self.config.section("decoder", DecoderConfig), 16, 1, leaky_padding=self.leaky)
        return super().predictor()

    def teacher_parts(self):
        parts = dict(super().teacher_parts())
        if self.config.method == "data2vec2":
            del parts["encoder.mask_embedding"]
        return parts


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """install(kind): what `plugins.load` finds, with presets of both methods."""

    def put(kind):
        folder = tmp_path / "recipes"
        if not folder.exists():
            shutil.copytree(TOY / "recipes", folder)
            (folder / "tiny2.yaml").write_text(TINY2)
        monkeypatch.setattr(Toy, "folder", folder)
        monkeypatch.setattr(plugins, "load", lambda name: kind)
        return kind

    return put


def sentence(kind, promise: str, method: str) -> str:
    """What the kit says of a promise; empty where it is kept."""
    preset = "tiny" if method == "data2vec" else "tiny2"
    result = held(promise, Case(kind, preset, "shared", method, True))
    assert result.status in ("kept", "broken"), result
    return result.text if result.status == "broken" else ""


def test_the_toy_keeps_every_promise(install):
    install(Toy)
    results = [*check("toy", encoder="shared"), *check("toy", encoder="own", promises=["padding", "teacher"])]
    assert [r for r in results if r.status != "kept"] == []
    assert {r.case for r in results} == {"data2vec, shared", "data2vec, own", "data2vec2, shared", "data2vec2, own"}
    assert {r.promise for r in results} == set(PROMISES)
    assert sum(r.promise == "door" for r in results) == 1 and sum(r.promise == "padding" for r in results) == 4
    remarks = {r.promise: r.text for r in results if r.case == "data2vec2, shared"}
    assert (
        remarks["share"].split("stated ")[0].startswith(remarks["share"].split("stated ")[1])
        and "padded to" in remarks["padding"]
    )


# ---------------------------------------------------------------------------------------------------- planted faults


class OneTooMany(Toy):
    def layout(self, sample):
        return Layout((len(sample) + 1,))


class Halves(Toy):
    class Encoder(ToyEncoder):
        def embed(self, inputs):
            tokens = super().embed(inputs)
            return replace(tokens, x=tokens.x.half())


class Upside(Toy):
    class Encoder(ToyEncoder):
        def embed(self, inputs):
            tokens = super().embed(inputs)
            return replace(tokens, padding_mask=None if tokens.padding_mask is None else ~tokens.padding_mask)


class NoPaddingMask(Toy):
    class Encoder(ToyEncoder):
        def embed(self, inputs):
            return replace(super().embed(inputs), padding_mask=None)


class Uncounted(Toy):
    class Encoder(ToyEncoder):
        def view(self, tokens, masks):
            view = super().view(tokens, masks)
            return replace(view, x=torch.cat([view.x[:, :1], view.x], 1))


class OneBiasTooFew(Toy):
    class Encoder(ToyEncoder):
        def attention_bias(self, tokens):
            return [torch.zeros(1, 1, 1, 1)]


class MeanOverPadding(Toy):
    class Encoder(ToyEncoder):
        def view(self, tokens, masks):
            return super().view(replace(tokens, x=tokens.x - tokens.x.mean(1, keepdim=True)), masks)


class OverSamples(Toy):
    class Encoder(ToyEncoder):
        def embed(self, inputs):
            tokens = super().embed(inputs)
            return replace(tokens, x=tokens.x - tokens.x.mean((0, 1)))


class LeakyDecoder(Toy):
    leaky = True


class HidesPadding(Toy):
    def masking(self):
        return lambda layouts, copies, rngs: Masks.of(
            np.stack([rng.random((copies, max(x.num_tokens for x in layouts))) < 0.5 for rng in rngs])
        )


class GlobalChance(Toy):
    def masking(self):
        policy = SpanMasking(SpanMaskingConfig(mask_length=3))
        return lambda layouts, copies, rngs: policy(layouts, copies, [np.random.default_rng() for _ in rngs])


class AlwaysTheSame(Toy):
    def masking(self):
        policy = SpanMasking(SpanMaskingConfig(mask_length=3))
        return lambda layouts, copies, rngs: policy(layouts, copies, [np.random.default_rng(1) for _ in rngs])


class CopiesAlike(Toy):
    def masking(self):
        policy = SpanMasking(SpanMaskingConfig(mask_length=3))
        return lambda layouts, copies, rngs: Masks.of(policy(layouts, 1, rngs).hidden.expand(-1, copies, -1))


class AllHidden(Toy):
    def masking(self):
        def policy(layouts, copies, rngs):
            hidden = np.zeros((len(layouts), copies, max(x.num_tokens for x in layouts)), bool)
            for row, layout in zip(hidden, layouts, strict=True):
                row[:, : layout.num_tokens] = True
            return Masks.of(hidden)

        return policy


class NothingScored(Toy):
    def masking(self):
        policy = SpanMasking(SpanMaskingConfig(mask_length=3))

        def masks(layouts, copies, rngs):
            hidden = policy(layouts, copies, rngs).hidden
            scored = hidden.clone()
            scored[0, 0] = False
            return Masks.of(hidden, scored)

        return masks


class ShowsHidden(Toy):
    def masking(self):
        policy = BlockMasking(BlockMaskingConfig(mask_prob=0.5, mask_length=2))

        def masks(layouts, copies, rngs):
            drawn = policy(layouts, copies, rngs)
            all_ = torch.arange(drawn.hidden.shape[2]).expand(*drawn.hidden.shape)
            return Masks.of(drawn.hidden, visible=all_)

        return masks


class Boasting(Toy):
    def masking(self):
        policy = super().masking()
        policy.hidden_share = lambda layout: (0.8, 0.8)
        return policy


class MixesFirst(Toy):
    """Positions by a convolution over content that is not hidden yet."""

    class Encoder(ToyEncoder):
        def __init__(self, model, extra_tokens):
            super().__init__(model, extra_tokens)
            self.conv = nn.Conv1d(model.embed_dim, model.embed_dim, 3, padding=1)

        def view(self, tokens, masks):
            x = tokens.x if tokens.padding_mask is None else tokens.x.masked_fill(tokens.padding_mask.unsqueeze(-1), 0)
            places = self.conv(x.transpose(1, 2)).transpose(1, 2)
            view = super().view(tokens, masks)
            return replace(view, x=view.x + places.repeat_interleave(len(view.x) // len(places), 0))


class Remembers(Toy):
    class Encoder(ToyEncoder):
        def embed(self, inputs):
            tokens = super().embed(inputs)
            self.last = tokens.x.detach().mean()
            return tokens

        def view(self, tokens, masks):
            view = super().view(tokens, masks)
            return replace(view, x=view.x + self.last)


class BlindTeacher(Toy):
    class Encoder(ToyEncoder):
        def view(self, tokens, masks):
            return super().view(replace(tokens, x=0 * tokens.x) if masks is None else tokens, masks)


class BlindStudent(Toy):
    class Encoder(ToyEncoder):
        def view(self, tokens, masks):
            return super().view(tokens if masks is None else replace(tokens, x=0 * tokens.x), masks)


class CopiesApart(Toy):
    """Rows in the order copy, sample instead of sample, copy."""

    class Encoder(ToyEncoder):
        def view(self, tokens, masks):
            if masks is None:
                return super().view(tokens, None)
            swapped = Masks.of(masks.hidden.transpose(0, 1).reshape(masks.hidden.shape))
            return super().view(tokens, swapped)


class NoPlace(Toy):
    class Encoder(ToyEncoder):
        def view(self, tokens, masks):
            view = super().view(tokens, masks)
            return replace(view, x=view.x - self.places[: tokens.x.shape[1]])


class NoVisiblePlace(Toy):
    class Visible(VisibleToy):
        def view(self, tokens, masks):
            places = self.places[: tokens.x.shape[1]]
            return super().view(replace(tokens, x=tokens.x - places), masks)


class Misspelled(Toy):
    def teacher_parts(self):
        return {"": "average", "encoder.embeding": "share"}


class Incomplete(Toy):
    def teacher_parts(self):
        return {"encoder": "average"}


class Outside(Toy):
    class Encoder(ToyEncoder):
        def __init__(self, model, extra_tokens):
            super().__init__(model, extra_tokens)
            self.gain = nn.Parameter(torch.ones(model.embed_dim))

        def embed(self, inputs):
            tokens = super().embed(inputs)
            return replace(tokens, x=self.gain * tokens.x)


class Forgotten(Toy):
    class Encoder(ToyEncoder):
        def __init__(self, model, extra_tokens):
            super().__init__(model, extra_tokens)
            self.unused = nn.Linear(2, 2)


class Detached(Toy):
    class Encoder(ToyEncoder):
        def embed(self, inputs):
            tokens = super().embed(inputs)
            return replace(tokens, x=tokens.x.detach())


class Shuffled(Toy):
    class Predictor(LinearPredictor):
        def forward(self, tokens, masks):
            return super().forward(tokens, masks).roll(1, 0)

    def predictor(self):
        return self.Predictor(16)


class GlobalCrop(Toy):
    def prepare(self, sample, size, rng):
        start = np.random.randint(0, max(len(sample) - size, 0) + 1)
        return sample[start : start + size] + 0.1 * np.random.rand()


class Counting(Toy):
    """Its encoder counts its updates where no checkpoint looks."""

    class Encoder(ToyEncoder):
        def __init__(self, model, extra_tokens):
            super().__init__(model, extra_tokens)
            self.calls = 0

        def view(self, tokens, masks):
            self.calls += 1
            view = super().view(tokens, masks)
            return replace(view, x=view.x * (1 + 0.1 * self.calls))


class OtherWhenCompiled(Toy):
    class Encoder(ToyEncoder):
        def view(self, tokens, masks):
            view = super().view(tokens, masks)
            return replace(view, x=-view.x) if torch.compiler.is_compiling() else view


class Assigns(Toy):
    """float32 into bfloat16 by index, which autocast does not convert."""

    class Encoder(ToyEncoder):
        def view(self, tokens, masks):
            x = tokens.x.clone()
            if masks is not None:
                x[masks.hidden[:, 0]] = self.mask_embedding
                masks = Masks.of(torch.zeros_like(masks.hidden))
            return super().view(replace(tokens, x=x), masks)


class Collapsed(Toy):
    class Encoder(ToyEncoder):
        def embed(self, inputs):
            tokens = super().embed(inputs)
            return replace(tokens, x=tokens.x * 0)

        def view(self, tokens, masks):
            view = super().view(tokens, masks)
            return replace(view, x=view.x * 0 + self.places[0])


@dataclass
class Wordless:
    num_samples: int = 14


class NoSentence(Toy):
    @classmethod
    def sections(cls, encoder):
        return {**super().sections(encoder), "more": Wordless}


class Writes(Toy):
    def __init__(self, config):
        super().__init__(config)
        config.model.dropout = 0.3


class SameNames(Toy):
    def dataset(self, split):
        class Data(ToyDataset):
            def id(self, index):
                return "sample"

        return Data(self.data)


class NewNames(Toy):
    def dataset(self, split):
        salt = np.random.rand()

        class Data(ToyDataset):
            def id(self, index):
                return f"{salt}-{index}"

        return Data(self.data)


class ReadsByChance(Toy):
    def dataset(self, split):
        class Data(ToyDataset):
            def __getitem__(self, index):
                return super().__getitem__(index) + np.float32(np.random.rand())

        return Data(self.data)


class ListOfSizes(Toy):
    def dataset(self, split):
        data = ToyDataset(self.data)
        data.sizes = list(data.sizes)
        return data


class OpenFile(Toy):
    def dataset(self, split):
        data = ToyDataset(self.data)
        data.log = lambda: None
        return data


class NumbersForNames(Toy):
    def dataset(self, split):
        return _Numbered(self.data)


class _Numbered(ToyDataset):
    def id(self, index):
        return index


class NeverCrops(Toy):
    def prepare(self, sample, size, rng):
        return sample


class Arrays(Toy):
    def collate(self, samples):
        return {name: value.numpy() for name, value in super().collate(samples).items()}


class Pair(Toy):
    def collate(self, samples):
        return tuple(super().collate(samples).values())


class Doubles(Toy):
    def collate(self, samples):
        return {name: x.double() if name == "x" else x for name, x in super().collate(samples).items()}


class Reversed(Toy):
    def collate(self, samples):
        return super().collate(samples[::-1])


class DropsContent(Toy):
    class Encoder(ToyEncoder):
        def embed(self, inputs):
            tokens = super().embed(inputs)
            return replace(tokens, x=nn.functional.dropout(tokens.x, 0.1, self.training))


class NoPolicy(Toy):
    def masking(self):
        return None


FAULTS = [
    (NumbersForNames, "data", r"dataset.id\(0\) gives int; expected a str"),
    (NeverCrops, "data", r"prepare\(\) leaves \d+ tokens of sample 'sample-\d+' when .* size 12.*crop=False"),
    (Arrays, "data", r"collate\(\) gives 'x' as .* float32; expected a tensor"),
    (Pair, "gradients", r"collate\(\) gives tuple; expected a mapping"),
    (Doubles, "shapes", r"collate\(\) gives 'x' as .* torch.float64, .* give torch.float32"),
    (Reversed, "shapes", r"embed\(\) marks .* collate\(\) keeps the order of its samples"),
    (DropsContent, "shapes", r"embed\(\) gives other values in training than in eval mode.*belong into view"),
    (NoPolicy, "masks", r"masking\(\) gives NoneType; expected a policy"),
    (OneTooMany, "shapes", r"embed\(\) gives x of shape .* layout\(\) and model.embed_dim .* say"),
    (Halves, "shapes", r"gives x as torch.float16; expected torch.float32"),
    (Upside, "shapes", r"marks \d+ tokens of sample \d as padding, but by layout\(\) it has \d+ of \d+"),
    (NoPaddingMask, "shapes", r"gives no padding_mask"),
    (Uncounted, "shapes", r"view\(tokens, None\) gives x of shape .*0 extra tokens"),
    (OneBiasTooFew, "shapes", r"1 biases for 2 blocks"),
    (MeanOverPadding, "padding", r"gives other values after embed\(\) and view\(\).*Keep padding out of means"),
    (OverSamples, "padding", r"gives other values after embed\(\) and view\(\).*let no sample look at another"),
    (LeakyDecoder, "padding", r"Predictions depend on what stands at padded places"),
    (HidesPadding, "masks", r"The policy hides padding: a sample of \d+ tokens stands in a batch of \d+"),
    (GlobalChance, "masks", r"Two masks drawn with the same generators differ"),
    (AlwaysTheSame, "masks", r"Masks are the same for every seed"),
    (CopiesAlike, "masks", r"All masked copies of a sample are alike"),
    (AllHidden, "masks", r"tokens of a sample are hidden: there is nothing left to predict them from"),
    (NothingScored, "masks", r"has none that is scored, so nothing is learnt from it"),
    (ShowsHidden, "masks", r"Masks.visible shows the student places that are hidden"),
    (Boasting, "share", r"states that 80.0 to 80.0 % of \d+ tokens are hidden, but the mean over 400 masks is"),
    (MixesFirst, "hiding", r"Changing the content of hidden tokens changes what the student is given"),
    (CopiesApart, "hiding", r"Changing the content of hidden tokens changes what the student is given"),
    (Remembers, "hiding", r"gives something else after embed\(\) was called with other samples"),
    (BlindTeacher, "hiding", r"the teacher must see all tokens"),
    (BlindStudent, "hiding", r"it sees no content at all"),
    (NoPlace, "place", r"Of (\d+) pairs of hidden tokens, \1 come out of the transformer alike, such as numbers"),
    (NoVisiblePlace, "place", r"Of (\d+) pairs of visible tokens of one content, \1 come out of the transformer alike"),
    (Misspelled, "teacher", r"names 'encoder.embeding', but no parameter of the student begins like that"),
    (Incomplete, "teacher", r"no entry for the parameter 'transformer"),
    (Outside, "teacher", r"embed\(\) uses the parameter 'gain', which lies outside of self.embedding"),
    (Forgotten, "gradients", r"No gradient reaches encoder.unused.weight, encoder.unused.bias"),
    (Detached, "gradients", r"No gradient reaches encoder.embedding.weight"),
    (Shuffled, "predictions", r"changes predictions of other rows.*in the order of Masks.scored_rows"),
    (GlobalCrop, "determinism", r"the batches differ.*never from NumPy's or Python's"),
    (Counting, "resume", r"Stopped after 2 of 4 steps and gone on.*is in no checkpoint"),
    (OtherWhenCompiled, "compiled", r"Compiled, the loss is"),
    (Assigns, "bf16", r"With train.precision=bf16 an update fails: .*\(test_testing.py, line \d+, in view\)"),
    (Collapsed, "learning", r"After 50 steps target_std is 0.*the representation collapses"),
    (NoSentence, "recipes", r"The option more.num_samples has no sentence"),
    (Writes, "recipes", r"Writes\(config\) writes to the configuration of preset=tiny: model.dropout: 0.1, then 0.3"),
    (SameNames, "data", r"Two samples are called 'sample'"),
    (NewNames, "data", r"Opened a second time, the data set gives its samples other names"),
    (ReadsByChance, "data", r"read and prepared twice with the same random numbers, gives other values of 'x'"),
    (ListOfSizes, "data", r"dataset.sizes is list; expected a \(len,\) int64 array"),
    (OpenFile, "data", r"cannot be pickled"),
]  # fmt: skip
OF_2 = {LeakyDecoder, ShowsHidden, NoVisiblePlace}


@pytest.mark.parametrize(("kind", "promise", "text"), FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_planted_fault_is_found_and_explained(install, monkeypatch, kind, promise: str, text: str):
    install(kind)
    inner = {"data2vec": getattr(kind, "Encoder", ToyEncoder), "data2vec2": getattr(kind, "Visible", VisibleToy)}
    monkeypatch.setattr(kind, "encoder_of", inner)
    found = sentence(kind, promise, "data2vec2" if kind in OF_2 else "data2vec")
    assert re.search(text, found), found


def test_every_promise_is_broken_by_some_fault():
    assert {promise for _, promise, _ in FAULTS} == PROMISES.keys() - {"door"}


def test_a_recipe_that_does_not_learn(install):
    kind = install(Toy)
    path = kind.folder / "tiny.yaml"
    path.write_text(path.read_text().replace("lr: 1.0e-3", "lr: 0.0"))
    found = sentence(kind, "learning", "data2vec")
    assert re.search(r"In 50 steps on the built-in data .* it does not fall\. Look at optim.lr", found), found


def test_presets_that_are_missing_or_wrong(install):
    kind = install(Toy)
    (kind.folder / "tiny2.yaml").unlink()
    broken = [r for r in check("toy", promises=["masks"]) if r.status == "broken"]
    assert {r.case for r in broken} == {"data2vec2, shared", "data2vec2, own"}
    assert "No preset in" in broken[0].text and "is for method=data2vec2" in broken[0].text
    (kind.folder / "large.yaml").write_text("model: {embed_dims: 8}\n")
    assert re.search("preset=large cannot be used: .*embed_dims", sentence(kind, "recipes", "data2vec"))
    (kind.folder / "large.yaml").unlink()
    (kind.folder / "finetune" / "odd.yaml").write_text("finetune: {batches: 8}\n")
    assert re.search("preset odd of stage=finetune cannot be used: .*batches", sentence(kind, "recipes", "data2vec"))
    case = Case(kind, "tiny", "shared", "data2vec", True)
    (kind.folder / "tiny.yaml").rename(kind.folder / "small.yaml")
    assert re.search(r"There is no .*tiny.yaml", held("recipes", case).text)


def test_an_error_inside_a_modality_names_its_place(install):
    class Fails(Toy):
        def collate(self, samples):
            raise KeyError("channel")

    install(Fails)
    found = sentence(Fails, "shapes", "data2vec")
    assert re.search(r"Checking this ended with KeyError: 'channel' \(test_testing.py, line \d+, in collate\)", found)


def test_data_that_cannot_be_read(install):
    class Broken(Toy):
        def __init__(self, config):
            super().__init__(config)
            self.data = replace(self.data, bad=list(range(14)))

    install(Broken)
    assert "14 samples of dataset('train') cannot be read" in sentence(Broken, "shapes", "data2vec")


def test_the_smallest_preset_of_a_method_is_taken(install):
    kind = install(Toy)
    (kind.folder / "large2.yaml").write_text(TINY2.replace("embed_dim: 16", "embed_dim: 32"))
    assert [(c.method, c.encoder, c.preset, c.own) for c in cases(kind)] == [
        ("data2vec", "shared", "tiny", True), ("data2vec", "own", "tiny", False),
        ("data2vec2", "shared", "tiny2", True), ("data2vec2", "own", "tiny2", False),
    ]  # fmt: skip


DOOR = "from d2v_core.hookspecs import hookimpl\n{}\n@hookimpl\ndef d2v_modality():\n    return None\n"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (DOOR.format("D2V_CONTRACT = 1\nimport torch"), "Importing .* imports torch.*inside of it"),
        (DOOR.format(""), "does not say for which version of the contract it was built. Write D2V_CONTRACT = 1"),
        (DOOR.format("from d2v_core.hookspecs import CONTRACT_VERSION as D2V_CONTRACT"), "does not say for which"),
        (DOOR.format("D2V_CONTRACT = 1\nimport gone"), "cannot be imported in a process of its own: Module.*gone"),
        (DOOR.format("D2V_CONTRACT = 1"), ""),
    ],
)
def test_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install, code: str, text: str):
    module = f"d2v_door_{tmp_path.name}"
    folder = tmp_path / "d2v_door-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: d2v-door\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(f"[d2v.modalities]\ndoor = {module}\n")
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    kind = install(type("Door", (Toy,), {"name": "door"}))
    found = sentence(kind, "door", "data2vec")
    assert re.search(text, found) if text else found == ""


# ----------------------------------------------------------------------------------------- the verb and the test class


def test_the_verb(install, d2v):
    install(Toy)
    status, text = d2v("check", "toy", "method=data2vec", "encoder=shared", "promises=[shapes,masks]")
    assert status == 0 and "toy: data2vec, shared" in text and "All 2 promises kept" in text
    install(NoPlace)
    NoPlace.encoder_of = {**Toy.encoder_of, "data2vec": NoPlace.Encoder}
    status, text = d2v("check", "toy", "method=data2vec", "promises=[place]")
    assert status == 2 and "2 of 2 promises broken" in text and "pairs of hidden tokens" in text
    status, text = d2v("check", "--help")
    assert status == 0 and all(promise in text for promise in PROMISES)
    for words, expected in (
        (["toy", "method=data2vec3"], "method=data2vec3 is not one of toy's methods: data2vec, data2vec2"),
        (["toy", "promises=[pading]"], "promises=pading is not one of the promises"),
        (["toy", "metod=x"], "check: .*Did you mean: 'method'"),
        (["method=data2vec"], "needs the name of a modality first: d2v check NAME method=data2vec. Installed: .*toy"),
        ([], "needs the name of a modality first: d2v check NAME. Installed: "),
    ):
        status, text = d2v("check", *words)
        assert status == 2 and re.search(expected, " ".join(text.split())), text


def test_a_modality_that_is_not_there(d2v):
    status, text = d2v("check", "smell")
    assert status == 2 and "There is no modality 'smell'" in text


CONFORMANCE = """
from d2v_core.testing import Conformance

class TestToy(Conformance):
    modality = "toy"
"""


def test_the_class_in_a_plugins_own_tests(python, tmp_path: Path):
    """In three lines; a fault is a failed test with its sentence."""
    (tmp_path / "test_toy.py").write_text(CONFORMANCE)
    (tmp_path / "test_gone.py").write_text(CONFORMANCE.replace('"toy"', '"gone"'))
    run = (
        "import pytest, sys; sys.exit(pytest.main(['-q', '-rA', '-p', 'no:cacheprovider', "
        "'-k', 'shapes or masks or door or load']))"
    )
    done = python(run, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    for name in ("data2vec-shared-door", "data2vec-shared-shapes", "data2vec-own-masks"):
        assert f"PASSED test_toy.py::TestToy::test_promise[{name}]" in done.stdout
    assert "FAILED test_gone.py::TestToy::test_promise[load]" in done.stdout
    assert "There is no modality 'gone'" in done.stdout
    assert Conformance.__doc__
