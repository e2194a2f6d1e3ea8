"""Preparation with many processes, kills and resumes always gives the same folder."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from headstart import fileio
from headstart.data.prepare import pipeline, units
from headstart.data.prepare.bpe import NewBpe
from headstart.data.prepare.pipeline import Preparation, prepare
from headstart.data.prepare.units import Selection
from headstart.data.shards import TokenShards
from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError

ROOT = Path(__file__).parents[3]


class Counting(ByteTokenizer):
    """Bytes; counts the documents that it is given, and dies at one."""

    def __init__(self, fatal=None):
        self.seen, self.fatal = 0, fatal

    def encode(self, text):
        if self.fatal is not None and text.startswith(f"{self.fatal} "):
            raise KeyboardInterrupt
        self.seen += 1
        return super().encode(text)


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """60 lines and 20 files, in some ten units, none too small for other processes."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"text": f"{i} " + "x" * i}) + "\n" for i in range(60)]
    (folder / "rows.jsonl").write_text("".join(lines))
    for i in range(60, 80):
        (folder / f"{i}.txt").write_text(f"{i} " + "y" * i)
    monkeypatch.setattr(units, "UNIT_BYTES", 400)
    monkeypatch.setattr(pipeline, "ALONE_BYTES", 0)
    return folder


def content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_output_does_not_depend_on_the_processes(corpus, tmp_path):
    calls, lines = [], []
    (corpus / "empty.txt").touch()
    for name, workers in (("one", 1), ("four", 4)):
        manifest = prepare(
            [str(corpus)],
            tmp_path / name,
            ByteTokenizer(),
            Preparation(validation_fraction=0.2),
            workers=workers,
            progress=lambda done, total: calls.append((done, total)),
            report=lines.append,
        )
        size = sum(path.stat().st_size for path in corpus.iterdir())
        assert calls[-1] == (size, size) and [done for done, _ in calls] == sorted(done for done, _ in calls)
        calls.clear()
    assert content(tmp_path / "one") == content(tmp_path / "four")
    assert lines == [f"{corpus}: 80 documents read; skipped: 1 empty"] * 2
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "one", "four"}
    train, validation = (manifest["splits"][split] for split in ("train", "validation"))
    assert train["documents"] + validation["documents"] == 80
    assert train["sources"] == {str(corpus): {key: train[key] for key in ("tokens", "documents", "bytes")}}


def test_counts_are_kept_for_each_source(corpus, tmp_path):
    manifest = prepare([f"{corpus}/*.txt", f"{corpus}/*.jsonl"], tmp_path / "out", ByteTokenizer())
    for part in manifest["splits"].values():
        for key in ("tokens", "documents", "bytes"):
            assert part[key] == sum(counts[key] for counts in part["sources"].values())
    sources = [part["sources"] for part in manifest["splits"].values()]
    assert sum(each.get(f"{corpus}/*.jsonl", {"documents": 0})["documents"] for each in sources) == 60


def test_an_interrupted_call_is_gone_on_with(corpus, tmp_path):
    whole = Counting()
    prepare([str(corpus)], tmp_path / "whole", whole)
    first, second, lines = Counting(fatal=40), Counting(), []
    with pytest.raises(KeyboardInterrupt):
        prepare([str(corpus)], tmp_path / "out", first, report=lines.append)
    assert "the same command resumes" in lines[-1] and not (tmp_path / "out").exists()
    prepare([str(corpus)], tmp_path / "out", second, report=lines.append)
    assert "resuming: " in "".join(lines)
    assert first.seen > 20 and whole.seen == 80
    assert 80 - first.seen <= second.seen <= 80 - first.seen + 10  # of the broken unit only
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not (tmp_path / ".out.preparing").exists()


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"validation_fraction": 0.5}, {"selection": Selection(text_field="n.o")}, {"tokenizer": "another"}],
)
def test_other_arguments_start_anew(corpus, tmp_path, change):
    (corpus / "rows.jsonl").unlink()
    with pytest.raises(KeyboardInterrupt):
        prepare([str(corpus)], tmp_path / "out", Counting(fatal=79))
    tokenizer = Counting()
    units_before = set((tmp_path / ".out.preparing" / "units").iterdir())
    if change.pop("tokenizer", None):
        tokenizer.end_id = 254
    tokenizer.fatal = 79
    with pytest.raises(KeyboardInterrupt):
        prepare([str(corpus)], tmp_path / "out", tokenizer, Preparation(**change))
    assert units_before.isdisjoint((tmp_path / ".out.preparing" / "units").iterdir())  # they would fill the disk
    tokenizer.fatal = None
    prepare([str(corpus)], tmp_path / "out", tokenizer, Preparation(**change))
    assert tokenizer.seen >= 20


@pytest.mark.parametrize("file", ["unit.json", "train.documents"])
def test_a_damaged_piece_of_work_is_done_again(corpus, tmp_path, file):
    prepare([str(corpus)], tmp_path / "whole", ByteTokenizer())
    with pytest.raises(KeyboardInterrupt):
        prepare([str(corpus)], tmp_path / "out", Counting(fatal=79))
    pieces = [each for each in (tmp_path / ".out.preparing" / "units").iterdir() if (each / file).stat().st_size]
    for piece in pieces:
        (piece / file).write_bytes(b"")
    manifest = prepare([str(corpus)], tmp_path / "out", Counting())
    whole = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    assert pieces and manifest["splits"] == whole["splits"]


def test_only_what_has_changed_is_encoded_again(corpus, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prepare([str(corpus)], tmp_path / "out", Counting(fatal=59))
    (corpus / "60.txt").write_text("60 changed")
    tokenizer = Counting()
    prepare([str(corpus)], tmp_path / "out", tokenizer)
    prepare([str(corpus)], tmp_path / "fresh", ByteTokenizer())
    assert tokenizer.seen < 40
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


SLOW = """
import sys, time
from pathlib import Path
from headstart.data.prepare import pipeline
from headstart.data.prepare import units
from headstart.data.tokenizers import ByteTokenizer

class Slow(ByteTokenizer):
    def encode(self, text):
        time.sleep(0.02)
        return super().encode(text)

if __name__ == "__main__":
    units.UNIT_BYTES, pipeline.ALONE_BYTES = 400, 0
    pipeline.prepare([sys.argv[1]], sys.argv[2], Slow(), workers=2)
"""


def running(process_id):
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("nothing happened for half a minute")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see which processes are left")
def test_a_killed_process_leaves_no_worker_and_is_gone_on_with(corpus, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    work = tmp_path / ".out.preparing" / "units"
    process = subprocess.Popen(
        [sys.executable, script, str(corpus), str(tmp_path / "out")], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    try:
        wait_until(lambda: len(list(work.glob("[!.]*"))) >= 2 and any(work.glob(".*.writing-*")))
        os.kill(process.pid, signal.SIGSTOP)  # so that it starts nothing between the look and the kill
        workers = [int(path.name.rpartition("-")[2]) for path in work.glob(".*.writing-*")]
    finally:
        process.kill()
        process.wait()
    assert workers and process.pid not in workers
    wait_until(lambda: not any(map(running, workers)))
    (tmp_path / ".out.writing-1").mkdir()  # as a kill while packing leaves it
    finished = len(list(work.glob("[!.]*")))
    assert finished >= 2 and not (tmp_path / "out").exists()

    tokenizer = Counting()
    prepare([str(corpus)], tmp_path / "out", tokenizer)
    prepare([str(corpus)], tmp_path / "whole", ByteTokenizer())
    assert tokenizer.seen < 80
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "out", "whole", "slow.py"}


def test_a_fault_in_a_worker_is_told_and_stops_the_others(corpus, tmp_path):
    with (corpus / "rows.jsonl").open("a") as file:
        file.write("oops\n")
    with pytest.raises(UsageError, match=r"rows\.jsonl, line 61: not JSON"):
        prepare([str(corpus)], tmp_path / "out", ByteTokenizer(), workers=2)
    (corpus / "rows.jsonl").write_text((corpus / "rows.jsonl").read_text().replace("oops\n", ""))
    prepare([str(corpus)], tmp_path / "out", ByteTokenizer(), workers=2)


class Dying(ByteTokenizer):
    def encode(self, text):
        os._exit(9)


def test_a_worker_that_dies_is_told(corpus, tmp_path):
    with pytest.raises(UsageError, match="a worker process died"):
        prepare([str(corpus)], tmp_path / "out", Dying(), workers=2)


def test_a_full_disk_is_told_and_gone_on_with(corpus, tmp_path, monkeypatch):
    real, room = fileio.sync, [40]

    def full(path):
        room[0] -= 1
        if room[0] < 0:
            raise OSError(28, "No space left on device", str(path))
        real(path)

    monkeypatch.setattr(fileio, "sync", full)
    lines = []
    with pytest.raises(UsageError, match="the disk is full"):
        prepare([str(corpus)], tmp_path / "out", ByteTokenizer(), report=lines.append)
    assert "finished work is kept" in lines[-1]
    monkeypatch.setattr(fileio, "sync", real)
    prepare([str(corpus)], tmp_path / "out", ByteTokenizer(), report=lines.append)
    assert any("resuming" in line for line in lines)
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "out"}


def test_two_processes_do_not_prepare_the_same_folder(corpus, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    work = tmp_path / ".out.preparing"
    work.mkdir()
    with (work / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another process is preparing it"):
            prepare([str(corpus)], tmp_path / "out", ByteTokenizer())


@pytest.mark.parametrize(("name", "text", "expected"), [("a.jsonl", "", "nothing"), ("a.txt", "", "1 empty")])
def test_a_source_without_a_document_is_refused(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(UsageError, match=rf"{name}: no document in it \(skipped: {expected}\)"):
        prepare([str(tmp_path / "b.txt"), str(tmp_path / name)], tmp_path / "out", ByteTokenizer())
    with pytest.raises(UsageError, match="no source"):
        prepare([], tmp_path / "out", ByteTokenizer())
    with pytest.raises(UsageError, match="workers 0"):
        prepare([str(tmp_path / "b.txt")], tmp_path / "out", ByteTokenizer(), workers=0)


def test_nothing_is_kept_of_a_source_without_a_document(tmp_path):
    """Units that skipped everything hold nothing to resume from."""
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe")
    lines = []
    with pytest.raises(UsageError, match="no document in it"):
        prepare([str(tmp_path / "a.bin")], tmp_path / "out", ByteTokenizer(), report=lines.append)
    assert lines == [] and [path.name for path in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize(
    ("documents", "line"), [(["same"], "a single document"), (["same"] * 3, "all 3 documents are equal")]
)
def test_documents_that_cannot_be_split_are_reported(tmp_path, documents, line):
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(documents):
        (tmp_path / "corpus" / f"{number}.txt").write_text(text)
    lines = []
    prepare([str(tmp_path / "corpus")], tmp_path / "out", ByteTokenizer(), report=lines.append)
    assert [each for each in lines if "no validation split" in each] == [
        f"{line}: {'it is' if len(documents) == 1 else 'they are'} for training, and there is no validation split"
    ]


def test_workers_do_without_torch():
    code = "import sys, headstart.data.shards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.fixture
def projects(tmp_path):
    """Three folders in one, with files of the same names."""
    for project in ("ant", "bee", "cow"):
        (tmp_path / "code" / project).mkdir(parents=True)
        for i in range(12):
            (tmp_path / "code" / project / f"{i}.py").write_text(f"{project} {i} " + project * 10)
    return tmp_path / "code"


def documents_of(folder, split):
    shards = TokenShards.open(folder, split)
    return [bytes(shards.document(i)[:-1].tolist()).decode() for i in range(len(shards.documents))]


@pytest.mark.parametrize("held_out", ["code/bee", "code/b*/*.py"])
def test_whole_sources_are_held_out_even_of_a_source_that_contains_them(projects, tmp_path, held_out):
    held_out = str(tmp_path / held_out)
    manifest = prepare(
        [str(projects)],
        tmp_path / "out",
        ByteTokenizer(),
        Preparation(validation_fraction=0.0, validation_sources=(held_out,)),
    )
    assert manifest["validation_sources"] == [held_out] and manifest["validation_fraction"] == 0
    train, validation = (documents_of(tmp_path / "out", split) for split in ("train", "validation"))
    assert {text[:3] for text in train} == {"ant", "cow"} and len(train) == 24
    assert {text[:3] for text in validation} == {"bee"} and len(validation) == 12


def test_held_out_sources_and_a_fraction_of_the_others(projects, tmp_path):
    settings = Preparation(validation_fraction=0.5, validation_sources=(str(projects / "bee"),))
    prepare([str(projects / "ant")], tmp_path / "alone", ByteTokenizer(), Preparation(validation_fraction=0.5))
    prepare([str(projects / "ant")], tmp_path / "both", ByteTokenizer(), settings)
    assert documents_of(tmp_path / "both", "train") == documents_of(tmp_path / "alone", "train")
    assert documents_of(tmp_path / "both", "validation") == [
        *documents_of(tmp_path / "alone", "validation"), *(f"bee {i} " + "bee" * 10 for i in sorted(range(12), key=str))
    ]  # fmt: skip


def test_a_held_out_document_never_goes_to_training(projects, tmp_path):
    """Move a document of the other sources if the fraction leaves nothing to train on."""
    settings = Preparation(validation_fraction=0.999, validation_sources=(str(projects / "bee"),))
    prepare([str(projects / "ant")], tmp_path / "out", ByteTokenizer(), settings)
    assert [text[:3] for text in documents_of(tmp_path / "out", "train")] == ["ant"]


def test_a_vocabulary_is_not_learnt_from_what_is_held_out(projects, tmp_path, monkeypatch):
    seen = []
    real = pipeline.bpe.sample

    def sample(units, selection):
        seen.extend(file.path.parent.name for unit in units for file in unit.files)
        return real(units, selection)

    monkeypatch.setattr(pipeline.bpe, "sample", sample)
    prepare([str(projects)], tmp_path / "out", NewBpe(258), Preparation(validation_sources=(str(projects / "bee"),)))
    assert set(seen) == {"ant", "cow"}


def test_holding_everything_out_is_told(projects, tmp_path):
    with pytest.raises(UsageError, match="held out for validation, which leaves nothing to train on"):
        prepare(
            [str(projects / "bee")], tmp_path / "out", ByteTokenizer(), Preparation(validation_sources=(str(projects),))
        )
    with pytest.raises(UsageError, match="nowhere: no such file"):
        prepare([str(projects)], tmp_path / "out", ByteTokenizer(), Preparation(validation_sources=("nowhere",)))
    assert not (tmp_path / "out").exists()
