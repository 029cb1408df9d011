"""The mistakes that users make, through the command line: exit status, the words of the answer, what is left behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from d2v_core import checkpoint, cli
from d2v_core.config import load_config

from ..runs import Answer, call_d2v, options

TINY = {
    "modality": "audio",
    "model.embed_dim": "32",
    "model.num_layers": "2",
    "model.num_heads": "2",
    "target.top_k_layers": "2",
    "data.synthetic_clips": "6",
    "data.batch_s": "6",
    "train.max_steps": "3",
    "train.num_workers": "0",
    "train.tensorboard": "false",
    "train.probe": "false",
}


Run = Callable[..., Answer]


@pytest.fixture
def d2v(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`d2v run` on tiny sizes in a folder of its own; later words replace earlier ones of the same key."""

    def call(*words: str, verb: str = "run", base: dict[str, str] = TINY) -> Answer:
        given = call_d2v(capsys, base, options(words), verb)
        assert "Traceback" not in given.out + given.error
        return given

    return call


def refused(answer: Answer, *fragments: str) -> str:
    assert answer.status == 2, answer
    assert answer.error.startswith("d2v: "), answer
    for fragment in fragments:
        assert fragment in answer.error, answer.error
    return answer.error


def noise(seconds: float = 1.5, rate: int = 16000, channels: int = 1) -> np.ndarray:
    shape = (round(seconds * rate), channels)
    return (0.1 * np.random.default_rng(0).standard_normal(shape)).astype(np.float32)


def clips(folder: Path | str, count: int = 4, suffix: str = ".flac", seconds: float = 1.5, **kind) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        x = noise(seconds, kind.get("rate", 16000), kind.get("channels", 1))
        sf.write(folder / f"{i}{suffix}", x, kind.get("rate", 16000))
    return folder


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def steps_in(run: Path) -> list[int]:
    return [checkpoint.step_of(path) for path in checkpoint.list_checkpoints(run / "checkpoints")]


# ------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("word", "fragments"),
    [
        ("train.max_step=5", ["train.max_step is not an option", "Did you mean: 'max_steps'?"]),
        ("trian.max_steps=5", ["trian is not an option", "Did you mean: 'train'?"]),
        ("data.pth=x", ["data.pth is not an option", "Did you mean: 'path'?"]),
        ("model.lr=1", ["model.lr is not an option.", "There is optim.lr."]),
        ("mask_prob=0.5", ["mask_prob is not an option.", "There is mask.mask_prob."]),
        ("train.max_steps=abc", ["train.max_steps=abc must be a whole number.", "Optimizer updates."]),
        ("train.max_steps=1.5", ["train.max_steps=1.5 must be a whole number."]),
        ("optim.lr=fast", ["optim.lr=fast must be a number.", "Peak learning rate."]),
        ("model.layer_scale=x", ["model.layer_scale=x must be a number or null."]),
        ("train.probe=maybe", ["train.probe=maybe must be true or false."]),
        ("seed=x", ["seed=x must be a whole number."]),
        ("train.precision=fp61", ["train.precision=fp61 must be one of: fp32, bf16, fp16.", "Did you mean fp16?"]),
        ("target.layer_norms=[instanse]", ["target.layer_norms=[instanse] must be a list", "one of: instance, layer"]),
        ("optim.betas=3", ["optim.betas=3 must be a list", "each a number."]),
        ("train=3", ["train=3: train is a section, so write train.OPTION=value."]),
        ("model.dropout={", ["model.dropout={ must be a number."]),
        (
            "modality=vidio",
            ["There is no modality 'vidio'. Installed: audio, text, vision.", "Did you mean vision or audio?"],
        ),
        ("modality=", ["modality is missing: add modality=NAME", "Installed: audio"]),
        ("preset=tinny", ["preset='tinny' is not one of audio's: base, base2,", "Did you mean tiny?"]),
        ("stage=pretran", ["stage=pretran must be one of: pretrain, finetune, probe.", "Did you mean pretrain?"]),
        ("encoder=logml", ["encoder='logml' is not one of audio's: logmel, waveform.", "Did you mean logmel?"]),
        ("resume=auto", ["resume=auto needs out=FOLDER"]),
        ("resume=yes", ["resume=yes must be one of: never, auto."]),
    ],
)
def test_a_word_that_cannot_be(d2v: Run, tmp_path: Path, word: str, fragments: list[str]) -> None:
    refused(d2v(word), *fragments)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train.max_steps=-1", "train.max_steps=-1 must be at least 1"),
        ("train.num_workers=-2", "train.num_workers=-2 must be at least 0"),
        ("train.keep_checkpoints=0", "train.keep_checkpoints=0 must be at least 1"),
        ("optim.lr=-1", "optim.lr=-1.0 must be at least 0"),
        ("optim.lr=nan", "optim.lr=nan must be finite and at least 0"),
        ("optim.weight_decay=-1", "optim.weight_decay=-1.0 must be at least 0"),
        ("optim.betas=[0.9,1]", "optim.betas=[0.9, 1.0] must be two numbers from 0 to below 1"),
        ("optim.warmup_ratio=2", "optim.warmup_ratio=2.0 must lie between 0.0 and 1.0"),
        ("optim.clip_grad_norm=0", "optim.clip_grad_norm=0.0 must be above 0; null = no clipping"),
        ("teacher.ema_decay=1.1", "teacher.ema_decay=1.1 must lie between 0.0 and 1.0"),
        ("teacher.ema_anneal_steps=-1", "teacher.ema_anneal_steps=-1 must be at least 0"),
        ("model.num_heads=3", "model.embed_dim=32 must be a multiple of model.num_heads=3"),
        ("model.mlp_ratio=-1", "model.mlp_ratio=-1.0 must be above 0"),
        ("model.dropout=1", "model.dropout=1.0 must lie between 0.0 and 0.99"),
        ("target.top_k_layers=3", "target.top_k_layers=3 must lie between 1 and 2"),
        ("loss.scale=half", "loss.scale=half must be inverse_sqrt, mean, sum or a number"),
        ("train.device=gpu", "train.device=gpu must be auto, cpu, cuda or cuda:N"),
        ("train.precision=fp16 train.device=cpu", "train.precision=fp16 needs a GPU. On a CPU use bf16 or fp32."),
        ("data.batch_s=-1", "data.batch_s=-1.0 must be above 0"),
        ("data.batch_s=nan", "data.batch_s=nan must be above 0"),
        ("data.min_s=30", "data.min_s=30.0 must lie between 0 and data.max_s=10.0"),
        ("data.min_s=0 data.max_s=0.001", "data.max_s=0.001 must be at least 0.075 s, which is two tokens"),
        ("data.sample_rate=16", "data.sample_rate=16 must lie between 4000 and 768000 Hz"),
        ("data.synthetic_clips=0", "data.synthetic_clips=0 must be above 0"),
        ("data.max_bad_ratio=30", "data.max_bad_ratio=30.0 must lie between 0 and 1"),
        ("data.also=[x]", "data.also=['x'] goes together with data.path, which is not given"),
        ("data.path=x data.also=[y] data.repeat=[2]", "data.repeat=[2] must have a number from 1 on for data.path and"),
        ("data.path=x data.repeat=[0]", "data.repeat=[0] must have a number from 1 on"),
        ("data.micro_batch_s=7", "data.micro_batch_s=7.0 must lie between 0 and data.batch_s=6.0"),
        ("mask.mask_prob=1.5", "mask.mask_prob=1.5 must lie between 0 and 1"),
        ("mask.mask_length=0", "mask.mask_length=0 must be at least 1"),
        ("mask.min_spans=-1", "mask.min_spans=-1 must be at least 0"),
        ("mask.mask_dropout=1", "mask.mask_dropout=1.0 must lie between 0 and 1"),
        ("positions.groups=7", "model.embed_dim=32 must be a multiple of positions.groups=7"),
        ("positions.groups=0", "positions.groups=0 must be at least 1"),
        ("positions.depth=0", "positions.depth=0 must be at least 1"),
        ("features.stride=0", "features.stride=0 must be at least 1"),
        ("features.hop_s=1", "features.hop_s=1.0 must lie between one sample and features.window_s=0.025"),
        (
            "encoder=waveform features.strides=[0,2,2,2,2,2,2]",
            "features.strides=[0, 2, 2, 2, 2, 2, 2] must be at least",
        ),
        (
            "encoder=waveform features.kernels=[3]",
            "features.kernels=[3] and features.strides=[5, 2, 2, 2, 2, 2, 2] must",
        ),
    ],
)
def test_a_value_out_of_range(d2v: Run, tmp_path: Path, words: str, message: str) -> None:
    refused(d2v(*words.split(), "out=run"), message)
    assert not (tmp_path / "run").exists()


def test_all_problems_at_once(d2v: Run) -> None:
    refused(d2v("optim.lr=-1", "train.max_steps=0"), "This configuration cannot work:", "optim.lr=-1", "max_steps=0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(d2v: Run, tmp_path: Path) -> None:
    refused(d2v("train.device=cuda", "out=run"), "train.device=cuda, but torch sees no CUDA device", "cpu or auto")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["rum"], ["'rum' is not a command. There are: run, config, plan, profile, modalities", "Did you mean run?"]),
        (["run"], ["modality is missing: add modality=NAME", "Installed: audio"]),
        (["run", "modality=audio", "--steps", "5"], ["'--steps' is not of the form key=value", "train.max_steps=100"]),
        (["run", "modality=audio", "seed=1", "seed=2"], ["seed is given twice: '1' and '2'"]),
        (["config", "modality=audio", "optim.lrr=1"], ["optim.lrr is not an option", "Did you mean: 'lr'?"]),
    ],
)
def test_words_of_another_form(capsys: pytest.CaptureFixture[str], words: list[str], fragments: list[str]) -> None:
    refused(Answer(cli.main(words), *capsys.readouterr()), *fragments)


@pytest.mark.parametrize("name", ["2024_01", "1e3", "no", "@x", "[a]", "a: b", "0123"])
def test_a_folder_name_is_text_whatever_yaml_makes_of_it(name: str) -> None:
    config, _ = load_config(["modality=audio", f"out={name}", f"data.path={name}"])
    assert config.out == config.to_dict()["data"]["path"] == name
    assert load_config(["modality=audio", "data.path=null"])[0].to_dict()["data"]["path"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [(["rum"], "Did you mean run?"), (["run", "modality=audio", "data.path=/nowhere/x"], "does not exist")],
)
def test_as_a_process(tmp_path: Path, words: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, "-m", "d2v_core", *words], cwd=tmp_path, capture_output=True, text=True)
    refused(Answer(done.returncode, done.stdout, done.stderr), message)
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("runs/*"))


# -------------------------------------------------------------------------------------------------------- the files


def test_a_missing_folder(d2v: Run, tmp_path: Path) -> None:
    clips("speech")
    refused(d2v("data.path=speach", "out=run"), "data.path=speach does not exist", "Did you mean 'speech'?")
    assert not (tmp_path / "run").exists()
    assert d2v("data.path=speech", "out=run").status == 0  # the name of the run is not used up


def test_an_empty_folder(d2v: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(d2v("data.path=empty"), "no audio files in", "found no files at all", "mend the path")
    assert not list(tmp_path.glob("runs/*"))


def test_a_folder_of_other_files(d2v: Run, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    for name in ("a.txt", "b.txt", "c.m4a"):
        (tmp_path / "other" / name).write_text("x")
    refused(d2v("data.path=other"), "no audio files in", "found 2 x .txt, 1 x .m4a", "ffmpeg -i in.m4a out.flac")
    refused(d2v("data.path=other/a.txt"), "expected a folder, a .tsv table or an audio file (.aif")


def test_another_rate_and_two_channels(d2v: Run) -> None:
    clips("telephone", suffix=".wav", rate=8000, channels=2)
    answer = d2v("data.path=telephone", "out=run")
    assert answer.status == 0
    assert "4 clips, 6.0 s at 16000 Hz; 4 resampled (4 from 8000 Hz)" in answer.out
    refused(
        d2v("data.path=telephone", "data.rate_policy=refuse"),
        "4 of 4 files are not at data.sample_rate=16000 Hz, first 0.wav at 8000 Hz",
        "data.rate_policy=resample, or data.sample_rate=8000",
    )


@pytest.fixture
def broken(d2v: Run) -> Path:
    """Ten files, of which three cannot be used."""
    folder = clips("broken", 7)
    (folder / "text.wav").write_text("hello, this is no sound")
    whole = (folder / "0.flac").read_bytes()
    (folder / "half.flac").write_bytes(whole[: len(whole) // 2])
    sf.write(folder / "nan.wav", np.full(24000, np.nan, np.float32), 16000, subtype="FLOAT")
    return folder


def test_too_many_broken_files(d2v: Run, broken: Path, tmp_path: Path) -> None:
    refused(
        d2v("data.path=broken", "out=run"),
        "3 of 10 audio files (30.0%) are unreadable, more than data.max_bad_ratio=0.01 allows",
        "half.flac (damaged",
        "nan.wav (24000 samples are NaN or infinite, the first is number 0)",
        "text.wav (not an audio file that libsndfile can read",
        "raise data.max_bad_ratio",
    )
    assert not (tmp_path / "run").exists()


def test_going_on_without_the_broken_files(d2v: Run, broken: Path, tmp_path: Path) -> None:
    answer = d2v("data.path=broken", "data.max_bad_ratio=0.5", "out=run")
    assert answer.status == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for text in (answer.out, summary["data"]):
        assert "7 clips" in text
        assert "3 unreadable" in text
        assert all(name in text for name in ("half.flac", "nan.wav", "text.wav"))
    assert summary["skipped"] == {}  # found before training, so that no step met them


def test_broken_files_that_headers_do_not_show(d2v: Run, broken: Path, tmp_path: Path) -> None:
    answer = d2v("data.path=broken", "data.max_bad_ratio=0.5", "data.verify=headers", "data.batch_s=20", "out=run")
    assert answer.status == 0
    skipped = json.loads((tmp_path / "run" / "summary.json").read_text())["skipped"]
    assert set(skipped) == {"half.flac", "nan.wav"}
    assert "skipped nan.wav: " in answer.out
    assert "NaN or infinite" in answer.out
    last = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["skipped"] == 2


def test_every_file_too_short(d2v: Run) -> None:
    clips("short", seconds=0.3)
    refused(
        d2v("data.path=short"), "none of 4 audio files is usable, 4 are shorter than data.min_s=1 s", "Lower data.min_s"
    )


def test_a_batch_smaller_than_one_clip(d2v: Run) -> None:
    clips("speech", 3)
    assert d2v("data.path=speech", "data.batch_s=0.5").status == 0


def test_several_data_sets(d2v: Run, tmp_path: Path) -> None:
    clips("speech", 5)
    clips("more", 2, ".wav", rate=8000)
    answer = d2v("data.path=speech", "data.also=[more]", "data.repeat=[1,3]", "train.max_steps=6", "out=run")
    assert answer.status == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for text in (answer.out, summary["data"]):
        assert "speech: 5 clips" in text
        assert "more, 3 times an epoch: 2 clips, 3.0 s at 16000 Hz; 2 resampled" in text
    data = load_config(["stage=finetune", "from=run"])[0].to_dict()["data"]
    assert (data["path"], data["also"], data["repeat"]) == (None, [], [])  # which fine-tuning would refuse


def test_several_data_sets_of_which_one_cannot_be(d2v: Run, tmp_path: Path) -> None:
    clips("speech")
    refused(d2v("data.path=speech", "data.also=[speach]", "out=run"), "data.also=speach does not exist", "'speech'?")
    refused(d2v("data.path=speech", "data.also=[speech]", "out=run"), "name speech twice", "data.repeat")
    assert not (tmp_path / "run").exists()


def test_a_file_name_that_looks_like_markup(d2v: Run, tmp_path: Path) -> None:
    folder = clips("speech")
    sf.write(folder / "a[bold]b.wav", np.full(24000, np.nan, np.float32), 16000, subtype="FLOAT")
    answer = d2v("data.path=speech", "data.verify=headers", "data.batch_s=20", "out=run[1]")
    assert answer.status == 0
    assert "skipped a[bold]b.wav: " in answer.out
    assert "The run lies in run[1]." in answer.out


class Vanishing:
    """Does something to the data when the given step has been made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], object]) -> None:
        from d2v_core.trainer import Updater

        update = Updater.update

        def spy(updater, at, *rest):
            if at == step:
                action()
            return update(updater, at, *rest)

        monkeypatch.setattr(Updater, "update", spy)


def test_files_that_break_while_training(d2v: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = clips("speech", 4, ".wav")

    def damage() -> None:
        (folder / "0.wav").unlink()
        data = (folder / "1.wav").read_bytes()
        (folder / "1.wav").write_bytes(data[:1000])

    Vanishing(monkeypatch, 0, damage)
    answer = d2v("data.path=speech", "data.batch_s=8", "train.max_steps=6", "out=run")
    assert answer.status == 0
    assert "skipped 0.wav: " in answer.out
    assert "no such file" in answer.out
    assert "skipped 1.wav: " in answer.out
    assert "truncated" in answer.out
    assert answer.out.count("skipped 0.wav") == 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 6
    assert set(summary["skipped"]) == {"0.wav", "1.wav"}


def test_all_files_vanish(d2v: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = clips("speech", 4)
    Vanishing(monkeypatch, 0, lambda: [path.unlink() for path in folder.iterdir()])
    refused(d2v("data.path=speech", "train.max_steps=50"), "None of the 4 samples can be read; the first: ", ".flac")


def test_masks_that_hide_nothing(d2v: Run) -> None:
    refused(d2v("mask.mask_prob=1e-9", "mask.min_spans=0"), "Nothing to learn from", "masks hide nothing")


# --------------------------------------------------------------------------------------------------- the run folder


def test_out_is_a_file(d2v: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refused(d2v("out=file"), "out=file is a file; give a folder for the run.")
    assert (tmp_path / "file").read_text() == "mine"


def test_out_holds_something_else(d2v: Run, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for resume in ("never", "auto"):
        refused(d2v("out=full", f"resume={resume}"), "out=full is not empty and holds no run", "Nothing there is over")
    assert digests(tmp_path / "full").keys() == {"thesis.txt"}


def test_a_run_is_not_overwritten(d2v: Run, tmp_path: Path) -> None:
    assert d2v("out=run").status == 0
    before = digests(tmp_path / "run")
    refused(d2v("out=run"), "out=run is not empty (it holds a run), and nothing there is overwritten", "resume=auto")
    refused(d2v("out=run", "seed=1"), "nothing there is overwritten")
    refused(
        d2v("out=run", "resume=auto", "seed=1", "optim.lr=1e-5"),
        "The run in run has another configuration",
        "optim.lr: stored 0.002, now 1e-05",
        "seed: stored 0, now 1",
        "from=run",
    )
    answer = d2v("out=run", "resume=auto")
    assert answer.status == 0
    assert "run is already complete; nothing to do." in answer.out
    assert digests(tmp_path / "run") == before


@pytest.mark.parametrize("out", ["/dev/null/run", "/proc/run"])
def test_a_place_where_nothing_can_be_made(d2v: Run, out: str) -> None:
    refused(d2v(f"out={out}"), f"The run folder out={out} cannot be written: ", "out=FOLDER")


@pytest.mark.parametrize("method", ["mkdir", "write_text", "replace"])
def test_a_folder_that_may_not_be_written(d2v: Run, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def deny(*given, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(Path, method, deny)
        answer = d2v("out=run")
    refused(answer, "The run folder out=run cannot be written: Permission denied.", "you may write to")


def test_a_full_disk_at_a_checkpoint(d2v: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("out=run", "train.max_steps=4", "train.checkpoint_every=2", "train.log_every=1")
    assert d2v("out=straight", *words[1:]).status == 0
    save_file = checkpoint.save_file
    calls: list[Path] = []

    def full(tensors, path, *rest):
        calls.append(path)
        if len(calls) > 4:  # three files of step 2, the first of step 4
            path.write_bytes(b"part of a file")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        answer = d2v(*words)
    refused(
        answer, "The checkpoint of step 4 cannot be written", "No space left on device", "are intact", "resume=auto"
    )
    assert steps_in(tmp_path / "run") == [2]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert d2v(*words, "resume=auto").status == 0
    weights = [checkpoint.load(tmp_path / name / "checkpoints" / "step-00000004") for name in ("run", "straight")]
    assert all(torch.equal(weights[0].model[name], weights[1].model[name]) for name in weights[0].model)


def test_a_full_disk_as_the_libraries_report_it(tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk: safetensors and torch have errors of their own for it."""
    code = (
        "import resource, sys; from d2v_core import cli;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); sys.exit(cli.main(sys.argv[1:]))"
    )
    words = [f"{key}={value}" for key, value in TINY.items()]
    done = subprocess.run(
        [sys.executable, "-c", code, "run", *words, "out=run"], cwd=tmp_path, capture_output=True, text=True
    )
    answer = Answer(done.returncode, done.stdout, done.stderr)
    refused(answer, "The checkpoint of step 3 cannot be written to run/checkpoints", "make room")
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_full_disk_while_logging(d2v: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from d2v_core.metrics import MetricsFile

    def full(*given):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MetricsFile, "write", full)
    refused(d2v("out=run"), "The run in run stopped", "No space left on device", "make room", "out=run resume=auto")


def test_a_damaged_checkpoint(d2v: Run, tmp_path: Path) -> None:
    words = ("out=run", "train.checkpoint_every=2")
    assert d2v(*words).status == 0
    newest = tmp_path / "run" / "checkpoints" / "step-00000003"
    weights = checkpoint.load(newest).model
    names = sorted(path.name for path in newest.iterdir())
    assert len(names) == 5
    for name in names:
        for content in ((newest / name).read_bytes()[: (newest / name).stat().st_size // 2], b"", b"garbage" * 9):
            (tmp_path / "run" / "summary.json").unlink()
            (newest / name).write_bytes(content)
            answer = d2v(*words, "resume=auto")
            assert answer.status == 0, answer.err
            assert f"The checkpoint run/checkpoints/step-00000003 cannot be read: {name}" in answer.out
            assert "is now called damaged-step-00000003" in answer.out and "step-00000002" in answer.out
            again = checkpoint.load(newest).model
            assert all(torch.equal(again[key], weights[key]) for key in weights)
    assert steps_in(tmp_path / "run") == [2, 3]
    assert len(list((tmp_path / "run" / "checkpoints").glob("damaged-*"))) == 15


def test_only_damaged_checkpoints(d2v: Run, tmp_path: Path) -> None:
    """Nothing is begun anew behind one's back."""
    assert d2v("out=run").status == 0
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "checkpoints" / "step-00000003" / "model.safetensors").write_bytes(b"")
    refused(d2v("out=run", "resume=auto"), "The checkpoint run/checkpoints/step-00000003 cannot be read")
    assert steps_in(tmp_path / "run") == [3]


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("modality: [audio", ["run/config.yaml", "YAML"]),
        ("- a list", ["run/config.yaml holds no mapping"]),
        ("just words", ["run/config.yaml is damaged: it has no key `modality`"]),
        ("", ["run/config.yaml is damaged"]),
        ("modality: audio", ["The run in run has another configuration", "encoder: stored None, now 'logmel'"]),
    ],
)
def test_a_damaged_configuration(d2v: Run, tmp_path: Path, text: str, fragments: list[str]) -> None:
    assert d2v("out=run").status == 0
    (tmp_path / "run" / "config.yaml").write_text(text)
    refused(d2v("out=run", "resume=auto"), *fragments)
    assert (tmp_path / "run" / "config.yaml").read_text() == text


# ----------------------------------------------------------------------------------------------------------- from=


def test_from_something_that_is_no_run(d2v: Run, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for source in ("folder", "nowhere"):
        refused(d2v(f"from={source}", "out=run"), f"{source} is not a run folder: it has no config.yaml")
    refused(d2v("from=foldr", "out=run"), f"there is no 'foldr' in {tmp_path}. Did you mean 'folder'?")
    (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    refused(d2v("from=runs/mine", "out=run"), "Give the folder that `d2v run` names when it ends")
    (tmp_path / "runs" / "mine" / "config.yaml").write_text("modality: audio")
    refused(d2v("from=runs", "out=run"), "Run folders in it: mine")
    refused(d2v("from=runs/mine/checkpoints", "out=run"), "The folder around it is one: runs/mine")
    (tmp_path / "folder" / "config.yaml").write_text("modality: audio")
    refused(
        d2v("from=folder", "out=run"),
        "folder has no complete checkpoint in folder/checkpoints",
        "out=folder resume=auto",
    )
    assert not (tmp_path / "run").exists()


def test_from_a_run_of_other_sizes(d2v: Run, tmp_path: Path) -> None:
    assert d2v("out=source").status == 0
    before = digests(tmp_path / "source")
    refused(
        d2v("from=source", "model.embed_dim=64", "out=wide"),
        "The weights in source/checkpoints/step-00000003 do not fit this configuration",
        "predictor.linear.bias: stored (32,), expected (64,)",
    )
    refused(
        d2v("from=source", "model.num_layers=3", "out=deep"),
        "Missing: ['student.transformer.blocks.2.",
        "Use the preset, encoder and sizes of the run that made them.",
    )
    assert digests(tmp_path / "source") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
