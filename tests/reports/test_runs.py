"""Reading run folders: live ones, broken ones, ones of different shapes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from headstart.errors import UsageError
from headstart.reports.runs import Curve, common_heads, differences, fade, read_run, read_runs, summary


def step_line(step: int, heads: int = 2, **changes: Any) -> dict[str, Any]:
    losses = {f"loss/head{k}": 5.0 / step + k for k in range(1, heads + 1)}
    line = {"step": step, "tokens": step * 100, **losses, "lr": 0.1, "grad_norm": 2.0 / step, "clipped": step <= 2,
            "tokens_per_second": 50.0, "mfu": 0.2, "memory_gib": 0.5 + step / 10}  # fmt: skip
    return {**line, **changes}


def write(folder: Path, lines: list[Any], config: str = "steps: 9\nmodel: {heads: 2}\n") -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def test_a_run_is_read_whole(tmp_path) -> None:
    lines = [step_line(step) for step in range(1, 5)]
    lines[2] |= {"grad_norm": None, "skipped": 1, "clipped": False}
    sample = {"text": "abc", "tokens_per_pass": 1.5, "acceptance": [0.5]}
    lines.append({"step": 4, "tokens": 400, "validation/bits_per_byte/head1": 2.5, "sample": sample})
    run = read_run(write(tmp_path / "a", lines))
    assert (run.name, run.heads, run.steps, run.tokens, run.skipped) == ("a", 2, 4, 400, [3])
    assert run.seconds == pytest.approx(8.0)
    assert list(run.curve("grad_norm").tokens) == [100, 200, 400]
    assert list(run.curve("grad_norm").seconds) == [2, 4, 8]
    assert list(run.curve("sample/tokens_per_pass").values) == [1.5]
    assert run.sample is not None and run.sample["step"] == 4
    assert run.settings == {"steps": 9, "model.heads": 2}
    found = summary(run, 1e-9)  # hardly smoothed
    assert found["loss/head1"] == pytest.approx(5 / 4 + 1) and found["clip_rate"] == 0.5 and found["skipped"] == 1
    assert found["validation/bits_per_byte/head1"] == 2.5 and found["memory_gib"] == pytest.approx(0.9)
    assert found["training_seconds"] == pytest.approx(8) and found["expected_tokens_per_pass"] is None


def test_time_is_what_the_steps_took(tmp_path) -> None:
    lines = [step_line(1), step_line(2, tokens=600, tokens_per_second=125.0)]
    assert read_run(write(tmp_path / "a", lines)).seconds == pytest.approx(100 / 50 + 500 / 125)


def test_a_run_that_is_going_on(tmp_path, capsys) -> None:
    folder = write(tmp_path / "a", [step_line(1), step_line(2)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tokens": 300, "loss/he')
    assert read_run(folder).steps == 2
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('ad1": 1.0}')  # whole, but its line is not at its end
    assert read_run(folder).steps == 2
    assert capsys.readouterr().err == ""


def test_lines_that_are_no_records_are_counted(tmp_path, capsys) -> None:
    torn = ["", "[1, 2]", '{"step": "x", "tokens": 1}', '{"loss": 2}', "\x00\x00"]
    run = read_run(write(tmp_path / "a", [step_line(1), *torn, step_line(2)]))
    assert run.steps == 2 and "5 lines are no records of a run" in capsys.readouterr().err


def test_values_that_are_no_numbers_are_left_out(tmp_path) -> None:
    odd = step_line(2, tokens_per_second=None, lr="fast", mfu=[1], memory_gib=math.nan)
    run = read_run(write(tmp_path / "a", [step_line(1), odd, step_line(3, **{"loss/head1": None})]))
    assert len(run.curve("loss/head1").values) == 2 and len(run.curve("lr").values) == 2
    assert len(run.curve("memory_gib").values) == 2
    assert run.seconds == pytest.approx(4.0)  # step 2 took a time that nobody knows


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "not a run folder (metrics.jsonl: No such file"),
        (lambda folder: folder.mkdir(), "not a run folder"),
        (lambda folder: folder.write_text("x"), "not a run folder"),
        (lambda folder: write(folder, []), "holds no training step yet"),
        (lambda folder: write(folder, [{"step": 1, "tokens": 5, "validation/loss/head1": 2}]), "no training step yet"),
        (lambda folder: write(folder, [step_line(1)], config="a: [1"), "config.yaml:1: not YAML"),
    ],
)
def test_what_is_no_run_is_told_in_one_line(make, message, tmp_path) -> None:
    make(tmp_path / "a")
    with pytest.raises(UsageError) as caught:
        read_run(tmp_path / "a")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_without_its_configuration_a_run_still_has_curves(tmp_path) -> None:
    folder = write(tmp_path / "a", [step_line(1)])
    (folder / "config.yaml").unlink()
    assert read_run(folder).settings == {}


def test_folders_of_one_name_are_called_by_their_paths(tmp_path) -> None:
    paths = [write(tmp_path / parent / "run", [step_line(1)]) for parent in "ab"]
    paths.append(write(tmp_path / "other", [step_line(1)]))
    assert [run.name for run in read_runs(paths)] == [str(paths[0]), str(paths[1]), "other"]


def test_with_different_numbers_of_heads_only_head_1_is_compared(tmp_path) -> None:
    two, same, eight = (write(tmp_path / name, [step_line(1, n)]) for name, n in (("a", 2), ("b", 2), ("c", 8)))
    assert common_heads(read_runs([two, same])) == [1, 2]
    assert common_heads(read_runs([two, same, eight])) == [1]


def test_settings_that_differ(tmp_path) -> None:
    a = write(tmp_path / "a", [step_line(1)], "steps: 9\nrun_dir: a\nmodel: {heads: 2, dim: 8}\n")
    b = write(tmp_path / "b", [step_line(1)], "steps: 9\nrun_dir: b\nmodel: {heads: 4, dim: 8}\nseed: 1\n")
    assert differences(read_runs([a, b])) == {"model.heads": [2, 4], "seed": [None, 1]}
    assert differences(read_runs([a])) == {}


def test_smoothing_is_a_mean_that_fades_in_tokens() -> None:
    curve = Curve()
    for tokens, value in ((100, 1.0), (200, 3.0), (400, 5.0)):
        curve.tokens.append(tokens)
        curve.values.append(value)
    one, two = math.exp(-1), math.exp(-2)  # a step of 100 tokens, and one of 200
    last = (two * (one * 1 + 3) + 5) / (two * (one + 1) + 1)
    assert curve.smoothed(100) == pytest.approx([1.0, (one * 1 + 3) / (one + 1), last])
    assert curve.smoothed(1e12) == pytest.approx([1.0, 2.0, 3.0])


def test_all_runs_are_smoothed_over_the_same_tokens(tmp_path) -> None:
    short = write(tmp_path / "short", [step_line(step) for step in range(1, 6)])
    assert fade(read_runs([short])) == 1000  # ten steps
    long = write(tmp_path / "long", [step_line(1), step_line(2000)])
    assert fade(read_runs([short, long])) == 0.02 * 200_000
