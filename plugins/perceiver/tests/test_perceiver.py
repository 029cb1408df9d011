"""The perceiver reads each built-in modality, keeps the contract's promises, and shows the student nothing hidden."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d2v_core import cli, plugins
from d2v_core.config import load_config
from d2v_core.contract import Masks, Modality, Raw, RawValues, Tokens
from d2v_core.errors import UserError
from d2v_core.keyed import generator
from d2v_core.promises import PROMISES
from d2v_core.run import build_model, feature_encoder
from d2v_core.testing import Case, cases, check, held

if "perceiver" not in plugins.names(plugins.ENCODERS):
    pytest.skip("d2v-perceiver is not installed: pip install ./plugins/perceiver", allow_module_level=True)

from d2v_perceiver.encoder import PerceiverEncoder, grid_of, together, waves

ROOT = Path(__file__).parents[3]
FEW = {
    "audio": ("data.synthetic_clips=12",),
    "vision": ("data.synthetic_images=24",),
    "text": ("data.grammar_documents=40",),
}
NAMES = [(name, method) for name in FEW for method in ("data2vec", "data2vec2")]
QUICK = ("shapes", "padding", "masks", "share", "hiding", "place", "teacher", "gradients", "predictions", "determinism",
         "resume", "bf16")  # fmt: skip


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One thread, a seed, an empty folder."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    torch.manual_seed(0)


def made(name: str, method: str, *words: str) -> Modality[Any]:
    """With the smallest preset of the method."""
    first = {"vision": "data2vec2"}.get(name, "data2vec")
    preset = "tiny" if method == first else "tiny1" if name == "vision" else "tiny2"
    given = [f"modality={name}", f"preset={preset}", "encoder=perceiver", "train.num_workers=0", *FEW[name], *words]
    config, kind = load_config(given)
    return kind(config)


def batch(modality: Modality[Any], copies: int = 2) -> tuple[Mapping[str, Tensor], Masks, list[int]]:
    """Inputs and masks of three samples, and how many tokens each has."""
    data = modality.dataset("train")
    sizes = [int(min(data.sizes[i], modality.batching().max_size)) for i in range(3)]
    samples = [modality.prepare(data[i], size, generator(0, "test", i)) for i, size in enumerate(sizes)]
    layouts = [modality.layout(sample) for sample in samples]
    masks = modality.masking()(layouts, copies, [generator(1, "test", i) for i in range(3)])
    return modality.collate(samples), masks, [layout.num_tokens for layout in layouts]


def with_other_bytes(name: str, inputs: Mapping[str, Tensor], where: Tensor, modality: Any) -> dict[str, Tensor]:
    """The inputs with other values behind the tokens of (B, T) bool."""
    noise = torch.Generator().manual_seed(3)
    if name == "text":
        other = torch.randint(5, modality.vocabulary.size - 1, where.shape, generator=noise)
        return {**inputs, "ids": torch.where(where, other, inputs["ids"])}
    if name == "audio":
        x = inputs["waveform"].clone()
        hop = modality.geometry.hop
        places = where.repeat_interleave(hop, 1)
        x[:, : places.shape[1]][places] = 5 * torch.randn(int(places.sum()), generator=noise)
        return {**inputs, "waveform": x}
    x, side = inputs["image"], modality.patch_size
    grid = where.view(-1, 1, *modality.grid).repeat_interleave(side, 2).repeat_interleave(side, 3)
    return {**inputs, "image": torch.where(grid, 5 * torch.randn(x.shape, generator=noise), x)}


@pytest.mark.parametrize(("name", "method"), NAMES)
def test_bytes_of_hidden_patches_change_no_bit_of_what_the_student_sees(name: str, method: str) -> None:
    """From the raw input on: not the tokens that the kit changes, but samples, pixels and bytes."""
    modality = made(name, method)
    encoder = feature_encoder(modality).eval()
    inputs, masks, _ = batch(modality)
    with torch.no_grad():
        tokens = encoder.embed(inputs)
        seen, whole = encoder.view(tokens, masks), encoder.view(tokens, None)
        for one in range(masks.num_copies):
            hidden = masks.hidden[:, one]
            assert hidden.any()
            other = encoder.embed(with_other_bytes(name, inputs, hidden, modality))
            rows = slice(one, None, masks.num_copies)
            assert torch.equal(encoder.view(other, masks).x[rows], seen.x[rows])
            assert not torch.allclose(encoder.view(other, None).x, whole.x)
        valid = ~masks.hidden[:, 0] if tokens.padding_mask is None else ~masks.hidden[:, 0] & ~tokens.padding_mask
        shown = encoder.embed(with_other_bytes(name, inputs, valid, modality))
        assert not torch.allclose(encoder.view(shown, masks).x[:: masks.num_copies], seen.x[:: masks.num_copies])


class Late(PerceiverEncoder):
    """The fault: the mask comes after the cross-attention."""

    def view(self, tokens: Tokens, masks: Masks | None) -> Tokens:
        view = super().view(tokens, None)
        if masks is None:
            return view
        x = view.x.repeat_interleave(masks.num_copies, 0)
        x = torch.where(masks.hidden.flatten(0, 1).unsqueeze(-1), self.nothing[1], x)
        padding = None if view.padding_mask is None else view.padding_mask.repeat_interleave(masks.num_copies, 0)
        return Tokens(x, padding, view.grid)


def small_cases(name: str) -> list[Case]:
    """One for each method, on a few of the built-in samples."""
    found = cases(plugins.load(name), "perceiver")
    for case in found:
        case.__dict__["dataset"] = made(name, case.method).dataset("train")
    return found


@pytest.mark.parametrize("name", ["audio", "vision", "text"])
def test_a_mask_that_comes_too_late_is_found_by_the_kit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "load_encoder", lambda name: Late)
    found = held("hiding", small_cases(name)[0])
    assert found.status == "broken" and "Changing the content of hidden tokens changes what the student" in found.text


@pytest.mark.parametrize("name", ["audio", "vision", "text"])
def test_promises(name: str) -> None:
    found = small_cases(name)
    assert [str(case) for case in found] == ["data2vec, perceiver", "data2vec2, perceiver"]
    results = [held(promise, case) for case in found for promise in QUICK]
    assert [result for result in results if result.status != "kept"] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["audio", "vision", "text"])
def test_every_promise(name: str) -> None:
    results = list(check(name, encoder="perceiver"))
    assert [result for result in results if result.status != "kept"] == []
    assert {result.promise for result in results} == set(PROMISES)


@pytest.mark.parametrize(("name", "method"), [("audio", "data2vec"), ("text", "data2vec"), ("text", "data2vec2")])
def test_padding(name: str, method: str) -> None:
    """A sample beside longer ones has the outputs that it has alone."""
    modality = made(name, method, *(["data.crop=false"] if name == "audio" else []))
    student = build_model(modality).student.eval()
    data = modality.dataset("train")
    short, long = (data[int(i)] for i in (data.sizes.argmin(), data.sizes.argmax()))
    with torch.no_grad():
        size = modality.layout(short).num_tokens
        alone, _ = student(student.encoder.embed(modality.collate([short])), None)
        beside, _ = student(student.encoder.embed(modality.collate([long, short])), None)
    assert alone.x.shape[1] == size < beside.x.shape[1]
    assert beside.padding_mask is not None and beside.padding_mask[1].sum() == beside.x.shape[1] - size
    torch.testing.assert_close(beside.x[1, :size], alone.x[0], rtol=1e-4, atol=1e-5)


def test_bytes_of_words() -> None:
    """Spelling, special symbols, cutting; and what stands at places that masking fills."""
    modality = made("text", "data2vec", "embedding.token_bytes=4")
    from d2v_text.grammar import lexicon

    raw, symbols = modality.raw(), lexicon().symbols
    ids = torch.tensor([[0, symbols.index("the"), 20, len(symbols) - 1]])
    values = raw.read({"ids": ids}).values
    assert values.shape == (1, 4, 4) and raw.patch == (4,) and raw.symbols == 262
    assert values[0, 1].tolist() == [*b"the", raw.absent] and values[0, 2].tolist() == list(symbols[20].encode()[:4])
    assert values[0, 0, 0] != values[0, 3, 0] and min(values[0, 0, 0], values[0, 3, 0]) > 256
    assert raw.fill is not None
    filled, there = raw.fill(torch.tensor([[[-1, -2, 20, len(symbols) - 1]]]))
    assert there.tolist() == [[[False, False, True, False]]] and filled[0, 0, 2].equal(values[0, 2])
    encoder = feature_encoder(modality).eval()
    with torch.no_grad():
        content = encoder.embed({"ids": ids}).x.view(1, 4, 4, -1)
    assert (content.any(-1).sum(-1) == torch.tensor([[1, 3, 4, 1]])).all()  # keys of each


def test_replaced_words_are_seen_as_their_replacement() -> None:
    """80/10/10: a student that is shown another word at a hidden place reads its bytes, and not the hidden ones."""
    modality = made("text", "data2vec")
    encoder = feature_encoder(modality).eval()
    ids = torch.arange(30, 38)[None]
    hidden = torch.zeros(1, 8, dtype=torch.bool)
    hidden[0, 3] = True
    fill = torch.where(hidden, 99, -1)
    with torch.no_grad():
        told = encoder.view(encoder.embed({"ids": ids}), Masks.of(hidden, fill=fill)).x
        truly = encoder.view(encoder.embed({"ids": torch.where(hidden, 99, ids)}), None).x
        masked = encoder.view(encoder.embed({"ids": ids}), Masks.of(hidden)).x
    torch.testing.assert_close(told, truly)
    assert not torch.allclose(told, masked)


def test_values_are_read_where_they_stand() -> None:
    """The patches that the modalities describe are those of the input, row-major."""
    modality = made("vision", "data2vec")
    inputs, _, _ = batch(modality)
    values = modality.raw().read(inputs).values
    side, (rows, columns) = modality.patch_size, modality.grid
    assert values.shape == (3, rows * columns, side * side, 3)
    patch = inputs["image"][1, :, side : 2 * side, 2 * side : 3 * side]
    assert values[1, columns + 2].equal(patch.permute(1, 2, 0).reshape(-1, 3))
    modality = made("audio", "data2vec", "stretches.stretch_s=0.02")
    waveform = torch.arange(2 * 1000.0).view(2, 1000)
    read = modality.raw().read({"waveform": waveform, "num_samples": torch.tensor([1000, 700])})
    assert read.values.shape == (2, 3, 320, 1) and read.values[0, 2, 0, 0] == 640
    assert read.padding_mask is not None and read.padding_mask.tolist() == [[False] * 3, [False, False, True]]


@pytest.mark.parametrize(
    ("patch", "keys", "expected"),
    [((640,), 4, 160), ((4, 4), 4, 4), ((4, 4), 16, 1), ((16, 16), 4, 16), ((7,), 4, 7), ((6,), 6, 1), ((2, 8), 4, 4)],
)
def test_neighbours_are_read_together(patch: tuple[int, ...], keys: int, expected: int) -> None:
    assert together(patch, keys) == expected


def test_places() -> None:
    """A query is most like the bytes of its own place, and every place differs from every other."""
    assert grid_of((2, 3)).tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    for shape in ((300,), (9, 11), (3, 5, 5)):
        x = waves(grid_of(shape), num_heads=4, width=24).view(-1, 4, 24)
        for head in x.unbind(1):
            likeness = head @ head.T
            assert (likeness.argmax(1) == torch.arange(len(x))).all()
            assert (likeness.diagonal()[:, None] - likeness + 9 * torch.eye(len(x)) > 1e-3).all()


def words_of(name: str) -> tuple[str, ...]:
    return (f"modality={name}", "encoder=perceiver", *FEW[name])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("perceiver.keys=0",), r"perceiver.keys=0 must be at least 1"),
        (("perceiver.sharpness=-1",), r"perceiver.sharpness=-1.0 must be 0 or more"),
        (("perceiver.width=x",), r"perceiver.width=x must be a whole number.* It means: Channels of a byte"),
        (("perceiver.widht=8",), r"perceiver.widht.* Did you mean: 'width'"),
        (("positions.depth=2",), r"positions is not an option|positions.depth"),
        (("stretches.stretch_s=0",), r"stretches.stretch_s=0.0 must be at least one sample"),
        (("model.embed_dim=4", "model.num_heads=4"), r"a head of 1 channels is too narrow for places on 1 axes"),
    ],
)
def test_options_that_cannot_work(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        config, kind = load_config([*words_of("audio"), *words])
        build_model(kind(config))


def test_symbols_of_unknown_spelling() -> None:
    config, kind = load_config([*words_of("text"), "embedding.vocab_size=1000"])
    with pytest.raises(UserError, match=r"how the symbols are spelt is not known.*Give data.tokenizer=FILE"):
        build_model(kind(config))


def test_bytes_of_a_tokenizer(tmp_path: Path) -> None:
    """Byte-level BPE writes bytes as letters; here they are bytes again."""
    Path("a.txt").write_text("über die Brücke, über den Fluss\n" * 30, encoding="utf-8")
    assert cli.main(["tokenizer", "train", "a.txt", "vocab_size=280", "out=t.json"]) == 0
    config, kind = load_config([*words_of("text"), "data.path=a.txt", "data.tokenizer=t.json", "data.cache=cache"])
    modality = kind(config)
    ids = modality.inputs("über die Brücke")["ids"]
    raw = modality.raw()
    spelt = [value for token in raw.read({"ids": ids}).values[0] for value in token.tolist() if value < 256]
    assert bytes(spelt).decode().strip() == "über die Brücke"
    build_model(modality)


def test_unused_channels_of_fine_tuning_are_refused(tmp_path: Path) -> None:
    run = [*words_of("vision"), "preset=tiny1", "train.max_steps=1", "train.num_workers=0", "train.probe=false"]
    assert cli.main(["run", *run, "out=pre"]) == 0
    tune = ["stage=finetune", "from=pre", "train.max_steps=1", "train.num_workers=0", "labels=20"]
    with pytest.raises(UserError, match=r"finetune.channel_mask_prob: this encoder's tokens have \d+ channels"):
        cli._dispatch(["run", *tune, "finetune.channel_mask_prob=0.5", "out=bad"])
    assert cli.main(["run", *tune, "finetune.mask_prob=0.3", "out=fine"]) == 0


def commands() -> list[list[str]]:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))[:1] == ["d2v"]]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_of_the_readme_run(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words[1] == "run":
        name = next(word.removeprefix("modality=") for word in words if word.startswith("modality="))
        words = [word for word in words if not word.startswith(("train.max_steps=", "stage="))]
        words += [*FEW[name], "stage=pretrain", "train.max_steps=5", "train.num_workers=0", "train.probe=false"]
    elif words[1] == "check":
        words = [*words, "promises=[door,shapes]"]
    assert cli.main(words[1:]) == 0
    printed = capsys.readouterr().out
    if words[1] in ("modalities", "plugins"):
        assert "perceiver" in printed and "d2v-perceiver 0.1.0" in printed


def test_raw_values_are_all_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of three axes, which no built-in modality has."""
    config, _ = load_config(words_of("vision"))

    def read(inputs: Mapping[str, Tensor]) -> RawValues:
        return RawValues(inputs["clips"], None, (2, 3, 4))

    encoder = PerceiverEncoder(Raw((2, 2, 2), channels=5, read=read), config).eval()
    tokens = encoder.embed({"clips": torch.randn(2, 24, 8, 5)})
    hidden = torch.rand(2, 3, 24) < 0.5
    view = encoder.view(tokens, Masks.of(hidden))
    assert tokens.x.shape == (2, 24, encoder.content_dim or 0) and view.x.shape == (6, 24, 96)
    assert view.grid == (2, 3, 4) and view.x.isfinite().all()
