"""scripts/train.slurm: its flags exist, and it saves, queues itself again, and tells the run's own failures apart."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from headstart.cli import COMMANDS
from headstart.training.config import load_config

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "train.slurm"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")

# Stand-ins for SLURM: srun runs its command here and hands SIGUSR1 on; torchrun waits for it, then fails as a run does
# that was stopped, or ends with the status it was asked for.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
trap 'early=yes; [ -z "$job" ] || kill -USR1 $job' USR1
"$@" &
job=$!
[ -z "$early" ] || kill -USR1 $job
while :; do wait $job; status=$?; kill -0 $job 2>/dev/null || exit $status; done
"""
TORCHRUN = """#!/bin/bash
echo "torchrun $*" >> calls
[ -z "$STATUS" ] || exit "$STATUS"
trap 'echo saved >> calls; exit 1' USR1
echo ready >> calls
for _ in $(seq 100); do sleep 0.1; done
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then printf 'node7\\nnode8\\n'; else echo "scontrol $*" >> calls; fi
"""


def start(folder: Path, arguments: list[str], status: str = "") -> subprocess.Popen[str]:
    for name, text in {"srun": SRUN, "torchrun": TORCHRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "42", "STATUS": status}
    environment = {**os.environ, **slurm, "PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


def test_it_is_bash() -> None:
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0


def test_out_of_time_it_saves_and_queues_itself_again(tmp_path: Path) -> None:
    job = start(tmp_path, ["run.yaml", "--steps", "9"])
    deadline = time.monotonic() + 120
    while "ready" not in calls(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) != 0
    command, *after = [line for line in calls(tmp_path) if line != "ready"]
    assert after == ["saved", "scontrol requeue 42"]
    assert "--rdzv-endpoint node7:29500" in command and "--nnodes 2" in command
    assert command.endswith("-m headstart train run.yaml --steps 9")


@pytest.mark.parametrize("status", ["0", "2"])
def test_a_run_that_ends_by_itself_is_not_queued_again(status: str, tmp_path: Path) -> None:
    assert start(tmp_path, ["run.yaml"], status).wait(120) == int(status)
    assert len(calls(tmp_path)) == 1


def test_without_a_configuration_it_says_how_it_is_called(tmp_path: Path) -> None:
    job = start(tmp_path, [])
    assert "usage: sbatch scripts/train.slurm CONFIG.yaml" in job.communicate(timeout=120)[1]
    assert job.returncode != 0 and calls(tmp_path) == []


def flags(text: str) -> set[str]:
    return set(re.findall(r"(?<=\s)--[a-z][a-z-]*", text))


@pytest.mark.parametrize("file", ["scripts/train.slurm", "docs/scale-out.md"])
def test_every_flag_of_torchrun_exists(file: str) -> None:
    from torch.distributed.run import get_args_parser

    text = (ROOT / file).read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"torchrun( .*?) -m headstart train", text)
    assert commands
    known = set(get_args_parser()._option_string_actions)
    for command in commands:
        assert flags(command) and flags(command) <= known, command


def test_the_run_has_time_to_save() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    warning = int(re.search(r"--signal=B:USR1@(\d+)", text)[1])  # type: ignore[index]
    waiting = int(re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", text)[1])  # type: ignore[index]
    assert waiting < warning
    assert "SIGUSR1" in re.search(r"--signals-to-handle (\S+)", text)[1]  # type: ignore[index]


def test_what_the_page_says_about_headstart_exists(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "scale-out.md").read_text(encoding="utf-8")
    assert set(re.findall(r"headstart (train|prepare|doctor|bench)\b", text)) <= set(COMMANDS)
    for path in re.findall(r"`?((?:configs|scripts|docs)/[\w.-]+\.\w+)", text):
        assert (ROOT / path).exists(), path
    for block in re.findall(r"^```yaml\n(.*?)^```", text, re.M | re.S):
        settings = yaml.safe_load(block)
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"steps": 1, **settings}))
        load_config(tmp_path / "run.yaml")
