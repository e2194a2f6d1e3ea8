"""Run `headstart tune` from end to end: the file it writes, its effect on decoding, and the settings it refuses."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import headstart
from headstart import cli
from headstart.commands.inspect import inspect
from headstart.data.tokenizers import ByteTokenizer
from headstart.decoding.drafters.tree import DraftTree
from headstart.decoding.engine import Engine
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.policy.calibration import PRIOR, TUNING_FILE, AcceptanceTable, read_tuning
from headstart.decoding.settings import Request, Sampling
from headstart.errors import UsageError
from headstart.evaluation.free_running import draft_ranks
from headstart.formats.huggingface import save_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

SMALL = ("--prompt-tokens", 8, "--new-tokens", 24, "--batches", 2, 1, "--seconds", 0.01, "--threads", 1)


def directory_of(path, heads: int, **fields):
    torch.manual_seed(0)
    fields = {"head_kind": "replicated", **fields}
    config = ModelConfig(dim=32, layers=3, attention_heads=2, context=64, heads=heads, **fields)
    save_model(Transformer(config), path, ByteTokenizer())
    (path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"def f{i}(x):"}) + "\n" for i in range(4)))
    return path


@pytest.fixture
def directory(tmp_path):
    return directory_of(tmp_path / "model", 3)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tune(*arguments: object) -> None:
    before, sys.argv = sys.argv, ["headstart", "tune", *map(str, arguments)]
    try:
        cli.main()
    finally:
        sys.argv = before


def test_tuning_is_written_and_used(directory, capsys) -> None:
    tune(directory, *SMALL)
    out = capsys.readouterr().out
    assert "head 3" in out and "batch 2, ms" in out
    content = json.loads((directory / TUNING_FILE).read_text())
    assert len(content["acceptance"]["greedy"]["mean"]) == 2
    assert content["costs"][0]["slots"] == [1, 2] and len(content["costs"][0]["drafting"][0]) == 3
    assert content["costs"][0]["setting"]["threads"] == 1 and content["costs"][0]["prompts"] == 4
    assert TUNING_FILE in inspect(directory)["files"]

    model = headstart.load(directory)
    policy = model.engine(exact=False).policy
    assert policy is not None and policy.calibration.current.costs.slots == (1, 2)
    assert model.engine(exact=False).policy is not policy  # each engine has its own policy
    chosen = model.generate("def f(", max_new_tokens=40, exact=False)
    plain = model.generate("def f(", max_new_tokens=40, heads=1, exact=False)
    assert chosen.tokens == plain.tokens
    # The costs of one thread do not hold for two.
    torch.set_num_threads(2)
    online = model.engine(exact=False).policy
    assert (online is not None and online.calibration.online) == backend_of(model.transformer).row_exact

    # Again, with --json: this machine's entry is replaced, another one's stays.
    content["costs"][0]["setting"]["processor"] = "another"
    (directory / TUNING_FILE).write_text(json.dumps(content))
    tune(directory, *SMALL, "--json")
    assert json.loads(capsys.readouterr().out)["batches"][1]["batch"] == 2
    tune(directory, *SMALL)
    costs = json.loads((directory / TUNING_FILE).read_text())["costs"]
    assert [entry["setting"]["processor"] == "another" for entry in costs] == [True, False]


def test_tree_nodes_measures_trees(directory, capsys) -> None:
    tune(directory, *SMALL, "--tree-nodes", 5, "--json")
    found = json.loads(capsys.readouterr().out)
    assert [tree["nodes"] for tree in found["trees"]] == [1, 2, 1, 2, 3, 4, 5]
    kept = [tree["tokens_per_pass"] for tree in found["trees"]]
    assert kept[:2] == sorted(kept[:2]) and kept[2:] == sorted(kept[2:])
    file = directory / TUNING_FILE
    content = json.loads(file.read_text())
    entry = content["costs"][0]
    assert entry["tree_rows"] == [2, 3, 4, 6] and [len(costs) for costs in entry["tree"]] == [4, 4]
    assert entry["draft_tree"] == found["tree"]
    table = content["acceptance"]["greedy"]
    assert [len(head) for head in table["rank_mean"]] == [8, 8]
    assert [[len(bins) for bins in head] for head in table["rank_by_confidence"]] == [[12] * 8] * 2

    # A tree that pays is used, with the rows that are worth their cost, and changes no token.
    entry.update(
        tree_rows=[2, 5],
        tree=[[0.1, 0.1]] * 2,
        plain=[1.0, 1.0],
        drafting=[[0.1, 9.0, 9.0]] * 2,
        draft_tree="0,1,0.0,1.0",
    )
    file.write_text(json.dumps(content))
    model = headstart.load(directory)
    engine = model.engine(exact=False)
    assert str(engine.tree) == "0,1,0.0,1.0" and engine.policy.tree is engine.tree
    assert model.engine(exact=False, tree=0).tree is None and model.engine(exact=False, lookup=2).tree is None
    assert len(model.engine(exact=False, tree=3).tree.paths) == 3
    tree = model.generate("def f(", max_new_tokens=50, exact=False)
    plain = model.generate("def f(", max_new_tokens=50, heads=1, exact=False)
    assert tree.tokens == plain.tokens and tree.stats.siblings > 0
    # One that does not is not.
    entry["drafting"] = [[0.1, 0.01, 0.01]] * 2
    file.write_text(json.dumps(content))
    assert headstart.load(directory).engine(exact=False).tree is None
    entry["draft_tree"] = "0,0.0,0.0.0"
    file.write_text(json.dumps(content))
    with pytest.raises(UsageError, match="not of a model with 3 heads"):
        headstart.load(directory).engine()


def test_tree_nodes_measures_trees_that_grow(tmp_path, capsys) -> None:
    directory = directory_of(tmp_path / "steps", 3, head_kind="eagle3", wiring="causal")
    tune(directory, *SMALL, "--tree-nodes", 5, "--json")
    found = json.loads(capsys.readouterr().out)
    assert [tree["tree"] for tree in found["trees"]][2:] == ["2x1:1", "2x2:2", "2x2:3", "2x2:4", "2x2:5"]
    file = directory / TUNING_FILE
    content = json.loads(file.read_text())
    for table in (content["acceptance"]["greedy"], content["acceptance"]["sampled"]):
        assert len(table["row_mean"]) == 5 and all(0 <= share <= 1 for share in table["row_mean"])
        assert table["by_worth"] == sorted(table["by_worth"]) or max(table["row_mean"]) > 0
    entry = content["costs"][0]
    entry.update(plain=[1.0, 1.0], drafting=[[0.1, 9.0, 9.0]] * 2, tree=[[0.1] * 4] * 2, draft_tree="2x2:5")
    file.write_text(json.dumps(content))
    model = headstart.load(directory)
    engine = model.engine(exact=False)
    assert str(engine.tree) == "2x2:5" and engine.policy.tree is engine.tree
    assert (
        model.engine(exact=False, tree="2x2:4").policy is not None and model.engine(exact=False, tree=6).policy is None
    )
    tree, plain = (model.generate("def f(", max_new_tokens=50, heads=heads, exact=False) for heads in (None, 1))
    assert tree.tokens == plain.tokens and tree.stats.siblings > 0
    for name, wrong in (("row_mean", [0.5] * 4), ("by_worth", [0.5])):
        damaged = json.loads(file.read_text())
        damaged["acceptance"]["greedy"][name] = wrong
        file.write_text(json.dumps(damaged))
        with pytest.raises(UsageError, match="not of a model with 3 heads"):
            headstart.load(directory).engine()
        file.write_text(json.dumps(content))


def test_tables_of_rows_count_right_paths() -> None:
    seen = [[(0.9, True), (0.3, False)]] * 30 + [[(0.9, False), (0.015, True)]] * 10
    table = AcceptanceTable.uniform(0.5, 3).with_rows(seen)
    assert table.row_mean == (0.75, 0.25)
    shares = table.chances_by_worth([0.9, 0.3, 0.015, 0.001])
    assert shares[0] == pytest.approx((30 + PRIOR * 0.925) / (40 + PRIOR)) and shares[1] == pytest.approx(
        PRIOR * 0.35 / (30 + PRIOR)
    )
    assert shares[2] == pytest.approx((10 + PRIOR * 0.015) / (10 + PRIOR)) and shares[3] == pytest.approx(0.0025)


def test_tables_of_ranks_count_observed_ranks() -> None:
    seen = [[(0.99, 0), (0.5, 1)]] * 30 + [[(0.05, 1), (0.5, 9)]] * 10 + [[(0.05, 9), (0.5, 0)]] * 60
    table = AcceptanceTable((0.3, 0.3), ((0.3,) * 12,) * 2).with_ranks(seen, 2)
    assert table.rank_mean[0] == pytest.approx((30.1 / 101, 10.1 / 101))
    # Head 3 counts if head 2 had the right token among its candidates.
    assert table.rank_mean[1] == pytest.approx((0.1 / 41, 30.1 / 41))
    sure, unsure = table.rank_by_confidence[0][0][-1], table.rank_by_confidence[0][0][0]
    assert sure == pytest.approx((30 + PRIOR * 30.1 / 101) / (30 + PRIOR)) and unsure < 0.02
    chances = table.chances([0.99, 0.5], DraftTree.parse("0,1,0.0,0.1"))
    assert chances[0] == pytest.approx(sure) and chances[3] > 0.5 > chances[2]
    assert table.chances([], DraftTree.parse("0,1")) == []


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_ranks_match_the_drafts_of_decoding(directory, temperature) -> None:
    model, n = headstart.load(directory).transformer, 3
    drafted: list[tuple[int, int, float]] = []

    def watch(generation, fed, accepted) -> None:
        root = len(generation.request.prompt) + len(generation.tokens) - 1
        drafted.append((root - 1, accepted, generation.window.confidences[0]))

    engine = Engine(model, watch=watch)
    generation = engine.submit(Request(tuple(b"def f("), 50, Sampling(temperature, seed=4)))
    while engine.busy:
        engine.step()
    text = [*generation.request.prompt, *generation.tokens]
    passes = [one for one in drafted if one[0] + n < len(text)]
    found = draft_ranks(model, text, [row for row, _, _ in passes], generation.request.sampling)
    for (_, accepted, confidence), heads in zip(passes, found):
        ranks = [rank for _, rank in heads]
        assert (ranks[0] == 0) == (accepted > 0) and (ranks == [0, 0]) == (accepted == 2)
        assert heads[0][0] == pytest.approx(confidence, rel=1e-3)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace('"mean"', '"mein"'),
        lambda text: text.replace('"slots"', '"sluts"'),
        lambda text: json.dumps({**json.loads(text), "costs": 3}),
    ],
)
def test_a_damaged_file_is_named_with_the_fix(directory, damage) -> None:
    tune(directory, *SMALL)
    file = directory / TUNING_FILE
    file.write_text(damage(file.read_text()))
    with pytest.raises(UsageError, match=f"{TUNING_FILE}.*(tune|again)"):
        headstart.load(directory).generate("def f(")


def test_a_tuning_of_another_model_is_refused(directory, tmp_path) -> None:
    tune(directory, *SMALL)
    other = directory_of(tmp_path / "other", 4)
    (other / TUNING_FILE).write_text((directory / TUNING_FILE).read_text())
    model = headstart.load(other).transformer
    with pytest.raises(UsageError, match="not of a model with 4 heads"):
        read_tuning(other, model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seconds", 0), "--seconds is 0"),
        (("--batches", 0), "--batches 0"),
        (("--tree-nodes", -1), "--tree-nodes is -1"),
        (("--temperature", 0), "--temperature is 0"),
        (("--prompt-tokens", 60, "--new-tokens", 60), "context 64"),
        (("--prompts", "nothing.txt"), "nothing.txt: cannot be read"),
    ],
)
def test_impossible_settings_are_refused(directory, capsys, arguments, message) -> None:
    with pytest.raises(SystemExit) as stopped:
        tune(directory, *arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (directory / TUNING_FILE).exists()


def test_a_model_with_one_head_has_nothing_to_tune(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        tune(directory_of(tmp_path / "model", 1), *SMALL)
    assert "one head" in capsys.readouterr().err
