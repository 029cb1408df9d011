"""Labelled text: what is read from files, what becomes of it, and whole runs of fine-tuning and probing."""

from __future__ import annotations

import json
import pickle
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import d2v_core
from d2v_core import checkpoint, cli
from d2v_core.batching import LabelledSteps
from d2v_core.config import load_config
from d2v_core.contract import Task
from d2v_core.errors import UserError
from d2v_core.labelled import open_task
from d2v_core.objectives import class_targets
from d2v_core.schedules import lr_at
from d2v_text import glue, grammar
from d2v_text.labelled import BagOfTokens, GlueConfig, encode, from_files
from d2v_text.modality import TextModality
from d2v_text.tokenizer import BOS, BPE, EOS, PAD, load_tokenizer, train_tokenizer

WORDS = ["the film is good", "a bad film", "he reads the book", "no one likes this book at all", "it is a fine day"]
TINY = ("model.embed_dim=32", "model.num_layers=2", "model.num_heads=2", "target.top_k_layers=2",
        "train.num_workers=0", "train.tensorboard=false", "train.log_every=1", "train.probe=false")  # fmt: skip
TUNE = ("train.max_steps=4", "finetune.eval_every=2", "finetune.batch=6", "train.num_workers=0",
        "train.tensorboard=false", "train.log_every=1")  # fmt: skip
D2v = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "t.json"
    train_tokenizer(WORDS * 3, 300).save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: Path) -> BPE:
    return load_tokenizer(tokenizer_file)


@pytest.fixture
def d2v(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> D2v:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*words: str, verb: str = "run") -> tuple[int, str]:
        status = cli.main([verb, *words])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Path) -> Path:
    """Pre-training runs of two steps: `text` on files, `grammar` on the built-in one."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("\n".join(WORDS * 20))
    words = ("modality=text", *TINY, "train.max_steps=2", "data.batch_tokens=512")
    assert cli.main(["run", *words, f"out={folder / 'text'}", f"data.path={folder / 'text.txt'}",
                     f"data.tokenizer={tokenizer_file}", f"data.cache={folder}"]) == 0  # fmt: skip
    assert cli.main(["run", *words, f"out={folder / 'grammar'}", "data.grammar_documents=30"]) == 0
    return folder


def write(path: Path, rows: Sequence[Sequence[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sst(folder: Path, train: int = 24, dev: int = 9) -> Path:
    for name, count in (("train", train), ("dev", dev)):
        rows = [(f"{WORDS[i % 5]} {i}", str(i % 2)) for i in range(count)]
        write(folder / f"{name}.tsv", [("sentence", "label"), *rows])
    return folder


def read(path: Path | str, tokenizer: BPE, max_tokens: int = 64, max_bad_ratio: float = 0.01, **options) -> Task:
    return from_files(str(path), GlueConfig(**options), tokenizer, max_tokens, max_bad_ratio)


def texts(part, tokenizer: BPE) -> list[str]:
    return [tokenizer.decode(part.samples[i].tolist()) for i in range(len(part.samples))]


# One row of each task, and how its text and label must come out.
ROWS: dict[str, tuple[list[str], str, float]] = {
    "SST-2": (["a bad film", "1"], "<s>a bad film</s>", 1),
    "MRPC": (["1", "10", "11", "the film", "a book"], "<s>the film</s></s>a book</s>", 1),
    "QQP": (["7", "8", "9", "the film", "a book", "0"], "<s>the film</s></s>a book</s>", 0),
    "STS-B": (["0", "g", "f", "2012", "1", "s", "t", "the film", "a book", "3.8"], "<s>the film</s></s>a book</s>",
              0.76),
    "MNLI": (["0", "1", "1n", "fiction", "( x )", "( y )", "p", "q", "the film", "a book", "entailment", "neutral"],
             "<s>the film</s></s>a book</s>", 2),
    "QNLI": (["0", "the film", "a book", "not_entailment"], "<s>the film</s></s>a book</s>", 1),
    "RTE": (["0", "the film", "a book", "entailment"], "<s>the film</s></s>a book</s>", 0),
    "WNLI": (["0", "the film", "a book", "1"], "<s>the film</s></s>a book</s>", 1),
    "CoLA": (["gj04", "0", "*", "a bad film"], "<s>a bad film</s>", 0),
}  # fmt: skip


@pytest.mark.parametrize("by", ["folder", "header", "option"])
@pytest.mark.parametrize("name", list(glue.TASKS))
def test_each_task_is_read_as_it_is_laid_out(name: str, by: str, tokenizer: BPE, tmp_path: Path):
    known, (row, text, label) = glue.TASKS[name], ROWS[name]
    folder = tmp_path / (name if by == "folder" else "data")
    rows = [list(known.header), row] if known.has_header else [row]
    write(folder / "train.tsv", rows * 1 + [row])
    matched = "_matched" if name == "MNLI" else ""
    # MNLI's dev files have five annotators' labels before the one that counts
    dev = [r[:10] + ([f"label{i}" for i in range(1, 6)] + ["gold_label"] if i == 0 else ["entailment"] * 5 + [row[-1]])
           for i, r in enumerate(rows)] if matched else rows  # fmt: skip
    write(folder / f"dev{matched}.tsv", dev)
    write(folder / f"test{matched}.tsv", [("index", "sentence"), ("0", "a book")])  # secret labels
    task = read(folder, tokenizer, task=name.lower().replace("-", "") if by == "option" else None)
    if by == "header" and name == "SST-2":
        assert task.name == "data"  # two columns that anybody may have; read the same way
    else:
        assert (task.name, task.metrics) == (name, known.metrics)
        assert task.classes == known.classes
    assert task.dev is not None and task.test is None
    for part in (task.train, task.dev):
        assert set(texts(part, tokenizer)) == {text}
        expected = label if task.classes != ("1",) else 0
        assert part.labels == pytest.approx([expected] * len(part.labels)), part.labels
        assert part.labels.dtype == (np.float32 if name == "STS-B" else np.int64)
    assert "has no labels and is not used" in task.train.samples.describe()
    first = 2 if known.has_header else 1
    assert [task.train.samples.id(i) for i in range(2)] == [f"train-{first}", f"train-{first + 1}"]


def test_the_dev_part_serves_to_choose_or_to_test(tokenizer: BPE, tmp_path: Path):
    sst(tmp_path / "SST-2")
    chooses = read(tmp_path / "SST-2", tokenizer)
    tests = read(tmp_path / "SST-2", tokenizer, dev_part="test")
    assert chooses.dev is not None and chooses.test is None and tests.dev is None and tests.test is not None
    assert texts(chooses.dev, tokenizer) == texts(tests.test, tokenizer)
    assert tests.test.samples.id(0) == "test-2" and chooses.dev.samples.id(0) == "dev-2"
    write(tmp_path / "SST-2" / "test.tsv", [("sentence", "label"), ("one more", "1")])  # somebody has labels for it
    both = read(tmp_path / "SST-2", tokenizer)
    assert both.test is not None and texts(both.test, tokenizer) == ["<s>one more</s>"]
    again = read(tmp_path / "SST-2", tokenizer, dev_part="test")
    assert again.test is not None and len(again.test.samples) == 9
    (tmp_path / "SST-2" / "dev.tsv").unlink()
    with pytest.raises(UserError, match=r"glue.dev_part=test, but there is no dev.tsv"):
        read(tmp_path / "SST-2", tokenizer, dev_part="test")


def test_mnli_has_two_dev_files(tokenizer: BPE, tmp_path: Path):
    rows = [list(glue.TASKS["MNLI"].header), ROWS["MNLI"][0]]
    for name, count in (("train", 3), ("dev_matched", 1), ("dev_mismatched", 2)):
        write(tmp_path / "MNLI" / f"{name}.tsv", [rows[0], *[rows[1]] * count])
    for matched, count in ((True, 1), (False, 2)):
        task = read(tmp_path / "MNLI", tokenizer, matched=matched)
        assert task.dev is not None and len(task.dev.labels) == count


@pytest.mark.parametrize(
    ("lengths", "room", "left"),
    [((3, 4), 10, (3, 4)), ((10, 10), 10, (5, 5)), ((3, 20), 10, (3, 7)), ((20, 3), 10, (7, 3)), ((9, 9), 9, (5, 4)),
     ((7, 6), 12, (6, 6)), ((0, 30), 8, (0, 8))],
)  # fmt: skip
def test_of_a_pair_the_longer_side_is_cut(lengths, room, left, tokenizer: BPE):
    a, b = ("x" * n for n in lengths)  # a byte each: no merge has two x
    (ids,), cut = encode(tokenizer, [(a, b)], room + 4)
    (x,) = tokenizer.encode(["x"])[0]
    assert ids.tolist() == [BOS, *[x] * left[0], EOS, EOS, *[x] * left[1], EOS]
    assert cut == (sum(lengths) > room)


def test_a_single_text_is_cut(tokenizer: BPE):
    (ids, short), cut = encode(tokenizer, [("x" * 20,), ("x",)], 10)
    assert len(ids) == 10 and ids[0] == BOS and ids[-1] == EOS and cut == 1 and len(short) == 3


def test_samples_lie_in_one_array(tokenizer: BPE, tmp_path: Path):
    task = read(sst(tmp_path / "SST-2"), tokenizer)
    data = task.train.samples
    assert data.sizes.tolist() == [len(data[i]) for i in range(24)] and data.flat.dtype == np.uint16
    assert texts(task.train, tokenizer) == [f"<s>{WORDS[i % 5]} {i}</s>" for i in range(24)]
    assert task.train.labels.tolist() == [i % 2 for i in range(24)]
    again = pickle.loads(pickle.dumps(data))
    assert np.array_equal(again[7], data[7]) and again.id(7) == data.id(7) == "train-9"


# ----------------------------------------------------------------------------------------------------- one's own files


def test_own_files_with_named_columns(tokenizer: BPE, tmp_path: Path):
    write(tmp_path / "a.tsv", [("id", "mood", "words"), ("1", "sad", 'the "film'), ("2", "glad", "a book")])
    task = read(tmp_path / "a.tsv", tokenizer, columns=["words"], label="mood")
    assert task.classes == ("glad", "sad") and task.train.labels.tolist() == [1, 0] and task.name == "a"
    assert task.metrics == ("accuracy",) and task.dev is None and task.test is None
    assert texts(task.train, tokenizer) == ['<s>the "film</s>', "<s>a book</s>"]  # a quote is a character
    (tmp_path / "b.csv").write_text('label,sentence1,sentence2\n10,"the film, it","a\nbook"\n9,no,yes\n')
    task = read(tmp_path / "b.csv", tokenizer)
    assert task.classes == ("9", "10") and task.train.labels.tolist() == [1, 0]  # by number
    assert texts(task.train, tokenizer)[0] == "<s>the film, it</s></s>a\nbook</s>"
    lines = [{"text": "the film", "label": 1.5}, {"text": "a book", "label": "-2"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = read(tmp_path / "c.jsonl", tokenizer, regression=True)
    assert task.classes == () and task.train.labels.tolist() == [1.5, -2.0] and task.metrics[0] == "pearson_spearman"
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("train", "dev", "test"):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": w, "label": "ab"[i % 2]}) for i, w in
                                                        enumerate(WORDS)))  # fmt: skip
    task = read(folder, tokenizer)
    assert task.dev is not None and task.test is not None and task.classes == ("a", "b") and task.name == "mine"


def test_irregular_rows_are_counted_and_named(tokenizer: BPE, tmp_path: Path):
    """The official QQP has some, whose fields are too few; lines of other encodings and empty ones occur elsewhere."""
    row = ROWS["QQP"][0]
    file = write(tmp_path / "QQP" / "train.tsv", [glue.TASKS["QQP"].header, row, ["8", "9", "10", "cut off"], [], row])
    with file.open("ab") as f:
        f.write("9\t1\t2\tcaf\u00e9\tbar\t1\n".encode("latin-1") + b"9\t1\t2\t\t\t1\n" + b"9\t1\t2\t\tone side\t1\n")
    with pytest.raises(UserError, match=r"3 of 6 lines cannot be read, more than data.max_bad_ratio=0.01"):
        read(tmp_path / "QQP", tokenizer)
    task = read(tmp_path / "QQP", tokenizer, max_bad_ratio=0.6)
    said = task.train.samples.describe()
    assert "train.tsv line 3: 4 fields, not 6" in said and "train.tsv line 6: no UTF-8" in said
    assert "train.tsv line 7: no text" in said and "3 of 6 rows of train.tsv" in said
    assert [task.train.samples.id(i) for i in range(3)] == ["train-2", "train-5", "train-8"]
    assert task.train.labels.tolist() == [0, 0, 1]
    assert texts(task.train, tokenizer)[2] == "<s></s></s>one side</s>"


def test_unreadable_records(tokenizer: BPE, tmp_path: Path):
    lines = ['{"text": "a", "label": 0}', '{"text": "b", "label": 1}', "{", "[1]", '{"text": 5, "label": 0}',
             '{"label": 0}', '{"text": " ", "label": 0}']  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines) + "\n")
    task = read(tmp_path / "a.jsonl", tokenizer, max_bad_ratio=0.9)
    said = task.train.samples.describe()
    assert "5 of 7 lines left out" in said and "line 5: no JSON" in said and "line 7: no object" in said
    assert "line 9: 'text' is not text" in said and "line 11: no key 'text' (keys: 'label')" in said
    assert len(task.train.labels) == 2 and "line 13: no text" in said


@pytest.mark.parametrize(
    ("rows", "name", "said"),
    [
        ([("sentense", "label"), ("a", "0")], "SST-2", "no column 'sentence'. Its columns: 'sentense', 'label'. Did"),
        ([("sentence",), ("a",)], "SST-2", "no column 'label'"),
        ([("index", "sentence1", "label"), ("0", "a", "entailment")], "RTE", "no column 'sentence2'"),
        ([("sentence", "label"), ("a", "positive")], "SST-2", "train.tsv line 2: the label 'positive' is not one of"),
        ([glue.TASKS["STS-B"].header, (*"0123456", "a", "b", "high")], "STS-B", "line 2: the label 'high' is not a"),
        ([glue.TASKS["STS-B"].header, (*"0123456", "a", "b", "nan")], "STS-B", "'nan' is not a number"),
        ([("sentence", "label")], "SST-2", "has no row with text and a label"),
        ([], "SST-2", "has no line"),
        ([("a", "b"), ("x", "y")], "mine", "which column is the text? It has: 'a', 'b'"),
        ([("text", "mood"), ("x", "y")], "mine", "no column 'label'. Its columns: 'text', 'mood'"),
        ([("text", "label"), *((f"t {i}", f"{i}.5") for i in range(30))], "mine", "30 different values in 30 rows"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said(rows, name: str, said: str, tokenizer: BPE, tmp_path: Path):
    write(tmp_path / name / "train.tsv", rows)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name, tokenizer)
    assert said in str(caught.value)


def test_a_class_that_training_lacks(tokenizer: BPE, tmp_path: Path):
    write(tmp_path / "mine" / "train.tsv", [("text", "label"), ("a", "x"), ("b", "y")])
    write(tmp_path / "mine" / "dev.tsv", [("text", "label"), ("a", "x"), ("b", "z")])
    with pytest.raises(UserError, match=r"dev.tsv line 3: the label 'z' is not one of the classes x, y, which are"):
        read(tmp_path / "mine", tokenizer)


def test_a_folder_that_is_not_it(tokenizer: BPE, tmp_path: Path):
    sst(tmp_path / "glue" / "SST-2")
    sst(tmp_path / "glue" / "CoLA")
    with pytest.raises(UserError, match=r"has no train.tsv.*There is one in CoLA, SST-2: give data.path=.*CoLA"):
        read(tmp_path / "glue", tokenizer)
    assert read(tmp_path / "glue", tokenizer, task="sst2").name == "SST-2"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has no train.tsv \(nor .*There is: nothing"):
        read(tmp_path / "empty", tokenizer)
    with pytest.raises(UserError, match=r"does not exist.*Did you mean 'glue'"):
        read(tmp_path / "gluee", tokenizer)
    with pytest.raises(UserError, match=r"glue.task=SST2b is none of: CoLA.*Did you mean SST-2\?"):
        read(tmp_path / "glue", tokenizer, task="SST2b")
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(UserError, match=r"labelled text is read from .tsv, .csv, .jsonl files"):
        read(tmp_path / "a.txt", tokenizer)


@pytest.mark.parametrize(("name", "counts", "share"), [("SST-2", (67349, 872), 0.509), ("CoLA", (8551, 1043), 0.691),
                                                        ("RTE", (2490, 277), 0.527)])  # fmt: skip
def test_the_real_files(name: str, counts, share: float, tokenizer: BPE, tmp_path: Path, request):
    """shared/data beside the repository has three of the tasks; counts and majority shares are those of its README."""
    archive = request.config.rootpath.parent / "shared" / "data" / "glue" / "glue.tar.xz"
    if not archive.is_file():
        pytest.skip(f"{archive} is not there")
    with tarfile.open(archive) as tar:
        for part in ("train", "dev"):
            member = tar.extractfile(f"glue/{name}/{part}.tsv")
            assert member is not None
            (tmp_path / name).mkdir(exist_ok=True)
            lines = member.read().splitlines(keepends=True)
            (tmp_path / name / f"{part}.tsv").write_bytes(b"".join(lines if part == "dev" else lines[:2001]))
            if part == "train":
                assert len(lines) - glue.TASKS[name].has_header == counts[0]
    task = read(tmp_path / name, tokenizer, max_bad_ratio=0.0)
    assert task.dev is not None and len(task.dev.labels) == counts[1]
    larger = np.bincount(task.dev.labels).max() / counts[1]
    assert larger == pytest.approx(share, abs=6e-4)


# ------------------------------------------------------------------------------------------------------------ features


def test_the_bag_of_tokens():
    ids = torch.tensor([[BOS, 9, 7, 9, EOS, PAD], [BOS, 5, EOS, EOS, 7, EOS]])
    counts = BagOfTokens(12)({"ids": ids})
    assert counts.shape == (2, 12)
    assert (
        counts[0].nonzero().flatten().tolist() == [7, 9] and counts[0, 9] == 2 and counts[1, [5, 7]].tolist() == [1, 1]
    )
    hashed = BagOfTokens(50_000)
    assert hashed({"ids": ids}).shape == (2, 8192) and hashed({"ids": ids})[0].sum() == 3
    assert torch.bincount(hashed.bucket, minlength=8192).max() < 12  # 6.1 on average


def test_the_built_in_task(runs: Path):
    config, _ = load_config(["stage=finetune", f"from={runs / 'grammar'}"], lambda _: TextModality)
    task = TextModality(config).task()
    assert task.dev is not None and task.test is not None and task.classes == ("exchanged", "acceptable")
    for split, part in (("train", task.train), ("dev", task.dev), ("test", task.test)):
        assert part.labels.mean() == 0.5
        for i in range(40):
            sentence = grammar.document(split, 1000 + i)[0]
            ids = part.samples[i].tolist()
            assert ids[0] == BOS and ids[-1] == EOS and part.samples.id(i) == f"{split}-{1000 + i}"
            assert sorted(ids[1:-1]) == sorted(sentence.ids)
            differs = [at for at, (a, b) in enumerate(zip(ids[1:-1], sentence.ids, strict=True)) if a != b]
            if part.labels[i]:
                assert not differs
            else:
                assert len(differs) == 2 and differs[1] == differs[0] + 1
                assert sentence.roles[differs[0]] != sentence.roles[differs[1]]


# --------------------------------------------------------------------------------------------------------------- runs


def test_labels_stay_with_their_samples(runs: Path, tmp_path: Path, tokenizer: BPE):
    data = sst(tmp_path / "SST-2")
    config, _ = load_config(["stage=finetune", f"from={runs / 'text'}", f"data.path={data}"], lambda _: TextModality)
    made = TextModality(config)
    split = open_task(made)
    seen: dict[int, list[tuple[tuple[str, ...], list, list]]] = {}
    for workers in (0, 2):
        steps = iter(
            LabelledSteps(made, split.train, class_targets(2), batch=6, micro_batch=4, seed=0, num_workers=workers)
        )
        batches = [batch for _ in range(5) for batch in next(steps)[2]]
        steps.close()
        for batch in batches:
            assert batch.targets is not None
            for name, ids, target in zip(batch.ids, batch.inputs["ids"], batch.targets, strict=True):
                i = int(name.removeprefix("train-")) - 2
                assert tokenizer.decode([t for t in ids.tolist() if t != PAD]) == f"<s>{WORDS[i % 5]} {i}</s>"
                assert target.argmax() == i % 2
        seen[workers] = [(b.ids, b.inputs["ids"].tolist(), b.targets.tolist()) for b in batches]  # pyright: ignore
    assert seen[0] == seen[2]


def test_a_fine_tuning_run_and_what_it_leaves(d2v: D2v, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data = sst(tmp_path / "SST-2")
    words = ("stage=finetune", f"from={runs / 'text'}", f"data.path={data}", *TUNE)
    status, said = d2v(*words, "out=one")
    assert status == 0 and "SST-2: 24 of 24 labelled samples to train on, 9 to choose on" in said, said
    assert "24 of 24 rows of train.tsv" in said
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (runs / "text" / "tokenizer.json").read_bytes()
    same = ("optim.schedule=constant", "optim.warmup_ratio=0")
    half = [word.replace("max_steps=4", "max_steps=2") for word in words]
    others = [word.replace("num_workers=0", "num_workers=2") for word in words]
    for given in ((*half, "out=parts"), (*words, "out=parts", "resume=auto"), (*others, "out=whole")):
        status, said = d2v(*given, *same)
        assert status == 0, said

    def state(name: str) -> dict[str, torch.Tensor]:
        return checkpoint.load(checkpoint.list_checkpoints(tmp_path / name / "checkpoints")[-1]).model

    parts, whole = state("parts"), state("whole")
    assert all(torch.equal(tensor, parts[key]) for key, tensor in whole.items())
    rows = (tmp_path / "one" / "predictions-dev.tsv").read_text().splitlines()[1:]
    expected = {f"dev-{i + 2}": str(i % 2) for i in range(9)}
    assert {row.split("\t")[0]: row.split("\t")[1] for row in rows} == expected
    # Nothing but the folder is needed: neither the pre-training run, nor the data, nor the tokenizer.
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "one").rename(tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = Path("moved/config.yaml")
    config.write_text(config.read_text().replace(str(runs), "/nowhere").replace(str(data), "/gone"))
    loaded = d2v_core.load_classifier("moved")
    samples = [loaded.modality.sample(f"{WORDS[i % 5]} {i}") for i in range(9)]
    probabilities = loaded.predict(samples)
    assert loaded.classes == ("0", "1") and probabilities.shape == (9, 2)
    predicted = {f"dev-{i + 2}": loaded.classes[int(p.argmax())] for i, p in enumerate(probabilities)}
    assert {row.split("\t")[0]: row.split("\t")[2] for row in rows} == predicted
    assert d2v_core.load("moved").encode(loaded.modality.inputs("the film"))[0].shape[1] == 32


def test_regression_and_pairs_run(d2v: D2v, runs: Path, tmp_path: Path):
    known = glue.TASKS["STS-B"]
    rows = [[str(i), *"gfyost", WORDS[i % 5], WORDS[i % 3], str(i % 6)] for i in range(20)]
    write(tmp_path / "STS-B" / "train.tsv", [known.header, *rows])
    write(tmp_path / "STS-B" / "dev.tsv", [known.header, *rows[:7]])
    status, said = d2v("stage=finetune", f"from={runs / 'text'}", "data.path=STS-B", "out=run", *TUNE)
    assert status == 0 and "one value each" in said and "divided by 5" in said, said
    values = {
        r.split("\t")[0]: float(r.split("\t")[1]) for r in Path("run/predictions-dev.tsv").read_text().splitlines()[1:]
    }
    assert values == {f"dev-{i + 2}": pytest.approx(i % 6 / 5) for i in range(7)}
    loaded = d2v_core.load_classifier("run")
    pair = loaded.modality.sample(WORDS[0], WORDS[1])
    assert loaded.predict([pair]).shape == (1,) and (pair == EOS).sum() == 3
    status, said = d2v("stage=probe", f"from={runs / 'text'}", "data.path=STS-B", "out=probe")
    assert status == 2 and "asks for values" in said


def test_a_probe_run(d2v: D2v, runs: Path, tmp_path: Path):
    data = sst(tmp_path / "SST-2", train=60)
    status, said = d2v("stage=probe", f"from={runs / 'text'}", f"data.path={data}", "glue.dev_part=test", "out=probe")
    assert status == 0, said
    table = json.loads(Path("probe/summary.json").read_text())["table"]
    assert [row["system"] for row in table] == [s for s in ("pretrained", "untrained", "bag of tokens") for _ in "ab"]
    assert all(0 <= row["test"]["accuracy"] <= 100 for row in table)


def test_the_built_in_task_runs_at_once(d2v: D2v, runs: Path):
    status, said = d2v("stage=finetune", f"from={runs / 'grammar'}", "out=run", *TUNE)
    assert status == 0 and "follow the built-in grammar" in said and "2 classes" in said, said
    loaded = d2v_core.load_classifier("run")
    assert loaded.predict([np.array([BOS, 5, 6, EOS])]).shape == (1, 2)


def test_the_tokenizer_is_that_of_the_run(d2v: D2v, runs: Path, tmp_path: Path, tokenizer_file: Path):
    data = f"data.path={sst(tmp_path / 'SST-2')}"
    train_tokenizer([word.upper() for word in WORDS] * 3, 300).save("other.json")
    text, on_grammar = f"from={runs / 'text'}", f"from={runs / 'grammar'}"
    for words, expected in (
        ((text, data, "data.tokenizer=other.json"), "data.tokenizer=other.json is not the tokenizer that from="),
        ((text, data, "data.tokenizer=gone.json"), "data.tokenizer=gone.json is no file"),
        ((on_grammar, data), "was trained on the built-in grammar, whose words are not those of a text"),
        ((on_grammar, data, f"data.tokenizer={tokenizer_file}"), "was trained on the built-in grammar"),
        ((text,), "was trained on text, and there is no data.path"),
        ((text, data, "glue.task=CoLAA"), "Did you mean CoLA?"),
        ((text, data, "glue.max_tokens=4"), "glue.max_tokens=4 must be at least 8"),
        ((text, data, "glue.columns=[a,b,c]"), "must be one column, or two"),
    ):
        status, said = d2v("stage=finetune", *words, "out=run", *TUNE)
        assert status == 2 and expected in said, said
        assert not Path("run").exists()
    copy = tmp_path / "copy.json"  # the same tokenizer under another name is no other one
    copy.write_bytes(tokenizer_file.read_bytes())
    assert d2v("stage=finetune", text, data, f"data.tokenizer={copy}", "out=run", *TUNE)[0] == 0


# ------------------------------------------------------------------------------------------------------------- recipes

OFFICIAL = {  # batch, warm-up, max updates, lr: fairseq, examples/roberta/config/finetuning
    "cola": (16, 320, 5336, 1e-5), "mnli": (32, 7432, 123873, 1e-5), "mrpc": (16, 137, 2296, 1e-5),
    "qnli": (32, 1986, 33112, 1e-5), "qqp": (32, 28318, 113272, 1e-5), "rte": (16, 122, 2036, 2e-5),
    "sst-2": (32, 1256, 20935, 1e-5), "sts-b": (16, 214, 3598, 2e-5),
}  # fmt: skip
PRESETS = sorted(p.stem for p in (TextModality.recipes() / "finetune").glob("*.yaml"))


def test_there_is_a_recipe_for_each_task():
    assert (
        set(PRESETS) == {"tiny", "small", *OFFICIAL} == {"tiny", "small", *(n.lower() for n in glue.TASKS)} - {"wnli"}
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_recipes(preset: str, runs: Path):
    config, _ = load_config(["stage=finetune", f"from={runs / 'text'}", f"preset={preset}"], lambda _: TextModality)
    TextModality(config)
    optim, tune, steps = config.optim, config.finetune, config.train.max_steps
    warmup = round(optim.warmup_ratio * steps)
    assert optim.schedule == "linear" and tune.eval_every <= steps
    assert lr_at(warmup, steps, optim) == pytest.approx(optim.lr) and lr_at(steps, steps, optim) == 0
    assert lr_at(warmup // 2, steps, optim) == pytest.approx(optim.lr * (warmup // 2) / warmup)
    if preset in OFFICIAL:
        assert (tune.batch, warmup, steps, optim.lr) == OFFICIAL[preset]
        assert (optim.betas, optim.eps, optim.weight_decay, optim.clip_grad_norm) == ([0.9, 0.98], 1e-6, 0.1, None)
        assert (config.model.dropout, config.model.attention_dropout, tune.head_dropout) == (0.1, 0.1, 0.0)
        assert tune.pool == "first" and tune.head_hidden and config.model.embed_dim == 32
        task = config.section("glue", GlueConfig).task
        assert task is not None and task.lower() == preset
