"""Wrong use gives one line that names the thing and the fix, and exit status 2; nothing half-written is left."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chats import chat_tokenizer

from headstart import __version__, cli
from headstart.data.tokenizers import ByteTokenizer
from headstart.errors import UsageError
from headstart.formats.huggingface import save_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

ROOT = Path(__file__).parent.parent
IMPORT_TORCH = {"train"}
"""Commands whose help needs torch: it shows the settings of a run."""
SMOKE = str(ROOT / "configs" / "smoke.yaml")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "model"
    config = ModelConfig(dim=32, layers=4, attention_heads=2, heads=3, context=64)
    save_model(Transformer(config), path, ByteTokenizer())
    return str(path)


def call(*arguments: str) -> int:
    """Exit status of `headstart ARGUMENTS`, in this process."""
    before, sys.argv = sys.argv, ["headstart", *arguments]
    try:
        cli.main()
        return 0
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 1
    finally:
        sys.argv = before


def one_line(captured: str) -> str:
    """The error: the last line, and the only one that speaks for the program; progress may stand before it."""
    lines = captured.strip().splitlines()
    assert [line for line in lines if line.startswith("headstart: ")] == lines[-1:], captured
    assert "Traceback" not in captured
    return lines[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "no command 'fly'"),
        (["train"], "needs a configuration file"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
        (["train", SMOKE, "--model.heads", "9", "--run-dir", "RUN"], "leave no layer"),
        (["train", SMOKE, "--model.attention-heads", "7", "--run-dir", "RUN"], "not divisible"),
        (["train", SMOKE, "--data.sources", "nowhere", "--run-dir", "RUN"], "nowhere"),
        (["train", SMOKE, "--data.tokenizer", "nowhere.json", "--run-dir", "RUN"], "nowhere.json"),
        (["train", SMOKE, "--model.vocab-size", "100", "--run-dir", "RUN"], "vocab"),
        (["train", SMOKE, "--dry-run", "--processes", "0"], "--processes is 0"),
        (["train", SMOKE, "--dry-run", "--device-memory", "80XB"], "write it as 80GiB"),
        (["prepare", "nowhere", "--out", "OUT"], "nowhere"),
        (["prepare", "--out", "OUT"], "no source"),
        (["prepare", "nowhere", "--out", "OUT", "--train-bpe", "10"], "257"),
        (["prepare", "nowhere", "--out", "OUT", "--train-bpe", "300", "--tokenizer", "x"], "one of the two"),
        (["prepare", "--out", "OUT", "--verify"], "no such folder"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere"),
        (["generate", "MODEL", "--prompt", ""], "prompt is empty"),
        (["generate", "MODEL", "--prompt", "x" * 64], "shorten the prompt"),
        (["generate", "MODEL", "--prompt", "x", "--heads", "4"], "has 3"),
        (["generate", "MODEL", "--prompt", "x", "--top-p", "2"], "top_p"),
        (["generate", "MODEL", "--prompt", "x", "--threads", "0"], "--threads"),
        (["generate", "MODEL", "--prompt", "x", "--threads", "99999999999999999999"], "--threads"),
        (["generate", "MODEL", "--prompt", "x", "--max-new-tokens", "-3"], "max_new_tokens is -3"),
        (["generate", "MODEL", "--prompt", "x", "--temperature", "nan"], "temperature is nan"),
        (["generate", "MODEL", "--prompt", "x", "--tree", "1000000"], "1,024"),
        (["generate", "MODEL", "--prompt", "x", "--lookup", "1000000000"], "lookup is"),
        (["generate", "MODEL", "--prompt", "x", "--repetition-penalty", "1e-46"], "repetition penalty"),
        (["generate", "MODEL", "--prompt", "x", "--chat"], "no chat template"),
        (["generate", "MODEL", "--prompt", "x", "--system", "y"], "--chat"),
        (["adapt", "MODEL", "--data", "x", "--run-dir", "RUN", "--head-kind", "tall"], "take one of transformer,"),
        (["compare", "nowhere"], "not a run folder"),
        (["compare", "MODEL"], "not a run folder"),
        (["inspect", "nowhere"], "nowhere"),
        (["doctor", "nowhere"], "nowhere"),
        (["bench", "everything"], "no benchmark"),
        (["demo", "--minutes", "0", "--out", "OUT"], "--minutes"),
    ],
)
def test_wrong_use_is_told_in_one_line(arguments, message, model, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = {"MODEL": model, "RUN": str(tmp_path / "run"), "OUT": str(tmp_path / "out")}
    assert call(*[named.get(argument, argument) for argument in arguments]) == 2
    assert message in one_line(capsys.readouterr().err)
    assert not list(tmp_path.rglob("manifest.json")) and not list(tmp_path.rglob("model"))


def test_programs_of_the_checkout_say_where_they_are(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "headstart" / "cli.py"))
    with pytest.raises(UsageError, match=r"^bench/ belongs to Headstart's source.*python -m bench there$"):
        cli.run_command(["bench", "decode"])


def test_an_unknown_flag_is_wrong_use(model, capsys) -> None:
    assert call("generate", model, "--prompt", "x", "--warp", "9") == 2
    assert "warp" in capsys.readouterr().err


def test_debug_shows_where(model) -> None:
    with pytest.raises(Exception, match="prompt is empty"):
        sys.argv = ["headstart", "generate", model, "--prompt", "", "--debug"]
        cli.main()


def test_where_no_model_is_named_it_is_the_one_in_the_box(model, capsys, monkeypatch) -> None:
    from headstart.formats import bundled

    monkeypatch.setattr(bundled, "boxed_model", lambda: Path(model))
    for arguments in (["generate", "--prompt", "def f", "--max-new-tokens", "3"], ["inspect"]):
        assert call(*arguments) == 0
        said = capsys.readouterr()
        assert said.err.startswith(f"model in the box: {model}\n") and said.out
    assert call("evaluate", "--text", SMOKE, "--tasks", "heads") == 0
    said = capsys.readouterr()
    assert f"model in the box: {model}\n" in said.err and "bits per byte" in said.out


def test_generate_streams_the_same_text_for_every_number_of_heads(model, capsys) -> None:
    outputs = set()
    for heads in ("1", "2", "3"):
        assert call("generate", model, "--prompt", "def f", "--max-new-tokens", "30", "--heads", heads, "--stats") == 0
        captured = capsys.readouterr()
        outputs.add(captured.out)
        assert "tokens per pass" in captured.err
    assert len(outputs) == 1


def test_json_goes_alone_to_standard_output(model, capsys) -> None:
    assert call("generate", model, "--prompt", "def f", "--max-new-tokens", "9", "--json", "--temperature", "1") == 0
    result = json.loads(capsys.readouterr().out)
    assert result["stats"]["tokens"] == len(result["tokens"]) <= 9
    assert call("inspect", model, "--json") == 0
    json.loads(capsys.readouterr().out)


def test_prepare_then_train_on_it(tmp_path, capsys) -> None:
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * 200)
    data, run = str(tmp_path / "data"), str(tmp_path / "run")
    assert call("prepare", str(tmp_path / "*.txt"), "--out", data, "--json", "--validation-fraction", "0.3") == 0
    assert json.loads(capsys.readouterr().out)["splits"]["train"]["documents"] >= 2
    small = ["--model.dim", "16", "--batch.rows", "2", "--batch.length", "32", "--validation.rows", "2"]
    assert call("train", SMOKE, "--data.path", data, "--run-dir", run, "--steps", "2", *small) == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 2
    assert call("generate", f"{run}/model", "--prompt", "document", "--max-new-tokens", "5") == 0


def test_verify_names_the_damaged_files(tmp_path, capsys) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "some text"}\n' * 9)
    data = tmp_path / "data"
    assert call("prepare", str(tmp_path / "a.jsonl"), "--out", str(data), "--text-field", "body") == 0
    assert call("prepare", "--out", str(data), "--verify") == 0
    with (data / "train-00000.bin").open("r+b") as file:
        file.write(b"#")
    capsys.readouterr()
    assert call("prepare", "--out", str(data), "--verify") == 1
    assert f"{data}/train-00000.bin: its content is not what prepare wrote" in capsys.readouterr().err
    assert call("prepare", str(tmp_path), "--out", str(data), "--verify") == 2


def test_help_and_version_answer_without_torch() -> None:
    program = (
        "import sys, headstart.cli as c\n"
        "for a in (['--help'], ['--version'], []):\n"
        "    sys.argv = ['headstart', *a]; c.main()\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in cli.COMMANDS) and __version__ in done.stdout


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name not in cli.CHECKOUT_PROGRAMS])
def test_the_table_names_the_modules_and_what_they_do(name) -> None:
    command = importlib.import_module(f"headstart.commands.{name.replace('-', '_')}")
    assert (cli.settings_of(command).__doc__ or "").splitlines()[0] == cli.COMMANDS[name]


@pytest.mark.parametrize("name", sorted(set(cli.COMMANDS) - IMPORT_TORCH))
def test_the_help_of_a_command_answers_without_torch(name) -> None:
    program = (
        f"import sys, headstart.cli as c\nsys.argv = ['headstart', '{name}', '--help']\n"
        "try: c.main()\nexcept SystemExit as end: sys.exit(end.code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and "--" in done.stdout


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help(name, capsys) -> None:
    assert call(name, "--help") == 0
    out = capsys.readouterr().out
    assert cli.COMMANDS[name].split()[0] in out


def test_show_prints_prompt_and_text_with_colours_where_they_show(model, capsys, monkeypatch) -> None:
    generate = ("generate", model, "--prompt", "ab", "--max-new-tokens", "20")
    assert call(*generate) == 0
    text = capsys.readouterr().out
    assert call(*generate, "--show") == 0
    assert capsys.readouterr().out == "ab" + text
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert call(*generate, "--show") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("drafted by: ") and "head 3" in shown and "\x1b[2mab\x1b[0m" in shown


def test_a_reader_that_goes_away_is_no_error(model) -> None:
    command = f"{sys.executable} -m headstart generate {model} --prompt ab --max-new-tokens 60 | head -c 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, cwd=ROOT)
    assert "Traceback" not in done.stderr and "Error" not in done.stderr


def test_profile_alone_records_three_steps(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr("headstart.training.loop.train", seen.append)
    assert call("train", SMOKE, "--profile", "--steps", "7") == 0
    assert (seen[0].profile.steps, seen[0].profile.start, seen[0].steps) == (3, None, 7)


def test_generate_chat_answers_a_question_as_the_template_asks_it(capsys, tmp_path) -> None:
    torch.manual_seed(0)
    tokenizer = chat_tokenizer(tmp_path / "tokenizer")
    config = ModelConfig(vocab_size=264, dim=16, layers=3, attention_heads=2, heads=2, context=128)
    save_model(Transformer(config), tmp_path / "model", tokenizer)
    place = str(tmp_path / "model")
    common = ("--max-new-tokens", "8", "--json")
    assert call("generate", place, "--prompt", "hello", "--chat", "--system", "be brief", *common) == 0
    chat = json.loads(capsys.readouterr().out)["tokens"]
    text = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert call("generate", place, "--prompt", text, *common) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == chat


def test_generate_text_of_a_given_form(model, capsys, tmp_path) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": [[1, 2], "ab"]}')
    outputs = set()
    for given in (["--json-schema", str(schema)], ["--json-schema", schema.read_text()], ["--regex", r'"ab"|\[1, 2\]']):
        assert call("generate", model, "--prompt", "x", *given) == 0
        outputs.add(capsys.readouterr().out.rstrip("\n"))
    assert outputs in ({'"ab"'}, {"[1, 2]"})
    assert call("generate", model, "--prompt", "x", "--regex", "(") == 2
    assert "regular expression: unclosed group" in capsys.readouterr().err
