from __future__ import annotations

import io
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from headstart.errors import UsageError
from headstart.training.config import BatchConfig, DataConfig
from headstart.training.loop import train
from headstart.training.optimizer import OptimizerConfig
from headstart.training.run_folder import RunFolder, RunLog


def test_a_folder_of_another_run_is_refused(tiny, corpus) -> None:
    config = tiny(steps=2, seed=0)
    train(config)
    before = (config.run_dir / "config.yaml").read_text()
    for other, name in [
        (replace(config, model=replace(config.model, dim=32)), "model.dim 16, not 32"),
        (replace(config, seed=1), "seed 0, not 1"),
        (replace(config, data=DataConfig(sources=(str(corpus),))), r"data.sources \('python-stdlib',\), not"),
        (replace(config, batch=BatchConfig(rows=4, length=12)), "batch.length None, not 12"),
        (replace(config, optimizer=OptimizerConfig(kind="muon")), "optimizer.kind adamw, not muon"),
    ]:
        with pytest.raises(UsageError, match=f"run: holds a run with {name}[^\n]*; give another --run-dir$"):
            train(replace(other, steps=4))
    assert (config.run_dir / "config.yaml").read_text() == before


def test_a_folder_with_somebody_elses_config_is_refused(tiny) -> None:
    config = tiny()
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text("port: 80\n")
    with pytest.raises(UsageError, match=r"config.yaml: there is no setting port; .*give another --run-dir"):
        train(config)
    assert (config.run_dir / "config.yaml").read_text() == "port: 80\n"


def test_a_folder_that_cannot_be_written_is_refused(tiny, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match=r"cannot be written .*; give a --run-dir you may write to") as raised:
            train(tiny(run_dir=place))
        assert "\n" not in str(raised.value)


def test_two_processes_do_not_share_a_folder(tiny) -> None:
    config = tiny()
    script = "import sys, fcntl; f = open(sys.argv[1], 'a'); fcntl.flock(f, 2); print(1, flush=True); input()"
    config.run_dir.mkdir()
    other = subprocess.Popen(
        [sys.executable, "-c", script, config.run_dir / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(UsageError, match=r"another process is training there"):
        train(config)
    other.communicate(b"\n")
    train(config)


def test_leftovers_of_a_killed_save_are_removed(tiny) -> None:
    config = tiny()
    left = [config.run_dir / "checkpoints" / ".step-00000002.writing-1", config.run_dir / ".model.writing-1"]
    for folder in left:
        folder.mkdir(parents=True)
        (folder / "x").write_text("x")
    (config.run_dir / ".metrics.jsonl.writing-1").write_text("x")
    train(config)
    assert not list(config.run_dir.glob("**/.*.writing-*"))


def test_the_log_is_cut_and_goes_on(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "v": 1}\nnot json\n{"step": 3}\n{"st')
    log = RunLog(path, 2)
    log.write({"step": 3, "again": True})
    log.sync()
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 2, "v": 1}\n{"step": 3, "again": true}\n'


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_under_the_log_gets_a_line(tmp_path) -> None:
    log = RunLog(tmp_path / "metrics.jsonl", 0)
    log.close()
    log._file = io.FileIO("/dev/full", "w")
    with pytest.raises(UsageError, match=r"metrics.jsonl: cannot be written .No space left") as raised:
        log.write({"step": 1})
    assert raised.value.status == 1
    log.close()


def test_without_file_locks_a_run_still_starts(tiny, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with (tmp := RunFolder(tiny().run_dir)).claimed():
        assert tmp.path.is_dir()
