"""The scripts for clusters and rented machines, with stand-ins for what those provide."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from d2v_core.config import load_config

DOCS = Path(__file__).parents[2] / "docs"
# Stands for torchrun with a run in it: leaves its words, waits to be told to end or to be done, saves.
TORCHRUN = """#!/bin/bash
printf '%s\\n' "$@" > "$STAND/words"
for word in "$@"; do case $word in out=*) out=${word#out=} ;; esac; done
trap 'mkdir -p "$out/checkpoints/step-00000005"; touch "$STAND/saved"; exit 1' TERM
touch "$STAND/begun"
while [ ! -e "$STAND/finish" ]; do sleep 0.05; done
mkdir -p "$out"; touch "$out/summary.json"
exit "$(cat "$STAND/finish")"
"""


@pytest.fixture
def stand(tmp_path: Path) -> Path:
    """A folder of stand-ins, first on the path."""
    folder = tmp_path / "stand"
    folder.mkdir()
    commands = {
        "torchrun": TORCHRUN,
        "srun": '#!/bin/bash\nexec "$@"\n',
        "scontrol": '#!/bin/bash\n[ "$1" = show ] && printf "one\\ntwo\\n" || echo "$@" >> "$STAND/asked"\n',
        "curl": '#!/bin/bash\n[ -e "$STAND/taken" ] && echo TRUE\n',
    }
    for name, text in commands.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def begin(script: str, stand: Path, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PATH": f"{stand}:{os.environ['PATH']}", "STAND": str(stand), "EVERY": "0.1",
                   "SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "one,two"}  # fmt: skip
    return subprocess.Popen(["bash", DOCS / script, *words], env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)


def ended(job: subprocess.Popen[str]) -> tuple[int, str]:
    _, error = job.communicate(timeout=30)
    return job.returncode, error


def d2v_words(stand: Path) -> list[str]:
    words = (stand / "words").read_text().splitlines()
    assert words[words.index("-m") : words.index("-m") + 3] == ["-m", "d2v_core", "run"]
    return words[words.index("-m") + 3 :]


WORDS = ["modality=text", "preset=tiny", "stage=pretrain"]


@pytest.mark.parametrize("script", ["slurm.sh", "preemptible.sh"])
def test_a_run_to_its_end(script: str, stand: Path, tmp_path: Path):
    job = begin(script, stand, *WORDS, f"out={tmp_path}/run")
    wait_for(stand / "begun")
    (stand / "finish").write_text("0")
    assert ended(job) == (0, "")
    assert d2v_words(stand) == [*WORDS, f"out={tmp_path}/run", "resume=auto"]
    config, _ = load_config(d2v_words(stand))
    assert config.resume == "auto"
    assert not (stand / "asked").exists()


@pytest.mark.parametrize("script", ["slurm.sh", "preemptible.sh"])
def test_a_folder_is_asked_for(script: str, stand: Path):
    status, error = ended(begin(script, stand, *WORDS))
    assert status == 2 and "Give out=FOLDER" in error and not (stand / "begun").exists()


def test_a_job_whose_time_is_up_saves_and_goes_back_into_the_queue(stand: Path, tmp_path: Path):
    job = begin("slurm.sh", stand, *WORDS, f"out={tmp_path}/run")
    wait_for(stand / "begun")
    job.send_signal(signal.SIGTERM)
    assert ended(job)[0] == 1
    assert (stand / "saved").exists()
    assert (stand / "asked").read_text() == "requeue 7\n"


def test_a_job_that_fails_by_itself_does_not_go_back(stand: Path, tmp_path: Path):
    job = begin("slurm.sh", stand, *WORDS, f"out={tmp_path}/run")
    wait_for(stand / "begun")
    (stand / "finish").write_text("2")
    assert ended(job)[0] == 2
    assert not (stand / "asked").exists()


@pytest.mark.parametrize("how", ["notice", "shutdown"])
def test_a_machine_that_is_taken_away_saves(stand: Path, tmp_path: Path, how: str):
    job = begin("preemptible.sh", stand, *WORDS, f"out={tmp_path}/run")
    wait_for(stand / "begun")
    if how == "notice":
        (stand / "taken").touch()
    else:
        job.send_signal(signal.SIGTERM)
    assert ended(job)[0] == 1
    assert (stand / "saved").exists()
