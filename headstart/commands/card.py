"""A model's card: README.md with what it is, what was measured of it, and how it is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headstart.commands.evaluate import ACCEPTANCE_FILE
from headstart.decoding.policy.calibration import (
    TUNING_FILE,
    AcceptanceTable,
    PassCosts,
    Tuning,
    acceptance_name,
    parse_measured,
)
from headstart.errors import UsageError
from headstart.fileio import read_json
from headstart.formats.families import family_of
from headstart.formats.heads import HEADS_CONFIG, StoredHeads
from headstart.formats.hf_code_export import MODELING_FILE
from headstart.formats.registry import load_config
from headstart.model.config import ModelConfig

MARK = "<!-- written by headstart push -->"
"""A line in cards of Headstart, which may be written again."""


def write_card(
    directory: Path, name: str, licence: str | None, base_model: str | None, evaluation: dict[str, Any] | None = None
) -> str:
    """Return the text of README.md for a model directory, with the numbers of a results.json of `headstart evaluate`.

    It may also hold heads without their model, whose base is then named by heads.json unless `base_model` is given. The
    card reports what the directory's files hold: acceptance.json (`headstart evaluate --record`), tuning.json
    (`headstart tune`). Raises UsageError for no model, or files that are damaged.
    """
    heads = StoredHeads.read(directory) if (directory / HEADS_CONFIG).is_file() else None
    config = load_config(directory) if heads is None else heads.model
    if heads is None:
        parts = [_front(licence, base_model), MARK, _introduction(directory, name, config, base_model)]
    else:
        base_model = base_model or heads.base
        parts = [_front(licence, base_model, adapter=True), MARK, _introduce_heads(name, heads, base_model)]
    try:
        parts += [_measured(directory, config, evaluation)]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UsageError(
            f"{directory}: {ACCEPTANCE_FILE}, {TUNING_FILE} or the results hold something unknown ({error!r}); "
            "measure again, or delete them"
        ) from error
    use = _usage(directory, name, config) if heads is None else _use_of_heads(name, base_model)
    parts += [use, _licence(licence)]
    return "\n\n".join(parts) + "\n"


def _front(licence: str | None, base_model: str | None, adapter: bool = False) -> str:
    lines = ["pipeline_tag: text-generation", "tags: [multi-token-prediction, speculative-decoding, headstart]"]
    if licence is not None:
        lines.insert(0, f"license: {licence}")
    if base_model is not None and "/" in base_model:  # another name is of no model on the hub
        lines.append(f"base_model: {base_model}")
        lines += ["base_model_relation: adapter"] if adapter else []
    return "\n".join(["---", *lines, "---"])


def _introduction(directory: Path, name: str, config: ModelConfig, base_model: str | None) -> str:
    n, total = config.heads, config.parameters()["total"]
    origin = (
        "" if base_model is None else f" Its heads were added to [{base_model}](https://huggingface.co/{base_model})."
    )
    kinds = _kinds(config) if n > 1 else "one head"
    further = "a token" if n == 2 else f"up to {n - 1} tokens"
    drafts = (
        f"Head k predicts the k-th token behind a position: one pass proposes {further} behind the next "
        "one, and keeps what is right."
        if n > 1
        else "It decodes one token a pass."
    )
    other = (
        "Trunk and head 1 are an ordinary Hugging Face model; the other heads lie in `heads/`."
        if config.kind.plain_decoder
        else "Only Headstart reads it."
    )
    rows = [
        ("parameters", f"{total:,}"),
        ("heads", f"{n}: {kinds}" if n > 1 else kinds),
        ("shape", f"{config.layers} blocks in all, {config.dim} wide, {config.attention_heads} attention heads"),
        ("vocabulary, context", f"{config.vocab_size:,} tokens, {config.context:,} tokens"),
    ]
    return "\n".join(
        [
            f"# {name}",
            "",
            f"A language model that predicts {n} tokens at once "
            "([arXiv 2404.19737](https://arxiv.org/abs/2404.19737)), made with Headstart."
            if n > 1
            else "A language model, made with Headstart.",
            f"{drafts}{origin} {other}",
            "",
            *_table(["", ""], rows),
        ]
    )


def _kinds(config: ModelConfig) -> str:
    drafted = "" if config.draft_vocab is None else f", over the {config.draft_vocab:,} most frequent tokens"
    return f"{config.head_kind} heads, wired {config.wiring}{drafted}"


def _introduce_heads(name: str, heads: StoredHeads, base_model: str | None) -> str:
    config, counts = heads.model, heads.model.parameters()
    added = counts["total"] - counts["next_token_path"]
    base = "its base"
    if base_model is not None:
        base = f"[{base_model}](https://huggingface.co/{base_model})" if "/" in base_model else base_model
    rows = [
        ("parameters", f"{added:,}, in addition to {counts['next_token_path']:,} of the model"),
        ("heads", f"2 to {config.heads}: {_kinds(config)}"),
        ("model", f"{family_of(config).model_type}, {config.next_token_layers} blocks, {config.dim} wide"),
        ("SHA-256 of the model's tensors", f"`{heads.identity.sha256}`"),
    ]
    return "\n".join(
        [
            f"# {name}",
            "",
            f"Draft heads for {base}, without the model, made with Headstart. Head k predicts the k-th token behind a "
            "position, so the model decodes several tokens per pass, and writes the same as without them.",
            "",
            *_table(["", ""], rows),
        ]
    )


def _measured(directory: Path, config: ModelConfig, evaluation: dict[str, Any] | None) -> str:
    parts = [*_acceptance(directory), *_speed(directory), *_heads(evaluation or {})]
    if not parts:
        parts = ["Nothing was measured yet: neither how often drafts are right, nor what they are worth in speed."]
    return "\n\n".join(["## Measured", *parts])


def _acceptance(directory: Path) -> list[str]:
    file = directory / ACCEPTANCE_FILE
    if not file.is_file():
        return []
    ways = read_json(file)
    heads = max(len(way["acceptance"]) for way in ways.values())
    rows = [
        [name, f"{way['tokens_per_pass']:.2f}", *(f"{share:.0%}" for share in way["acceptance"]), _repeated(way)]
        for name, way in ways.items()
    ]
    header = ["", "tokens per pass", *(f"head {k}" for k in range(2, heads + 2)), "repeated 8-grams"]
    lines = [
        "Share of passes that keep the draft of head k, where all heads before it are right too (`headstart evaluate`)."
        " Loops are easily drafted: repeated 8-grams say how much of the text stood in it before.",
        "",
        *_table(header, rows),
    ]
    return ["\n".join(lines)]


def _repeated(way: dict[str, Any]) -> str:
    share = way.get("repeated_8_grams")
    return "" if share is None else f"{share:.0%}"


def _speed(directory: Path) -> list[str]:
    file = directory / TUNING_FILE
    if not file.is_file():
        return []
    content = read_json(file)
    rows = []
    for entry in content["costs"]:
        here = entry["setting"]
        greedy, sampled = (
            parse_measured(AcceptanceTable, content[acceptance_name(here)][way]) for way in ("greedy", "sampled")
        )
        costs = parse_measured(PassCosts, entry)
        tuning = Tuning(greedy, sampled, costs)
        for slots, plain in zip(costs.slots, costs.plain):
            gain, heads = max((tuning.expected_speedup(slots, k), k) for k in range(1, len(greedy.mean) + 2))
            where = f"{here['processor']}, {here['threads']} threads"
            rows.append([where, here["dtype"], slots, f"{plain:.2f}", f"{gain:.2f} with {heads}"])
    if not rows:
        return []
    lines = [
        "What decoding with heads is expected to write over plain decoding, from measured costs of passes and measured "
        "acceptance, greedily (`headstart tune`):",
        "",
        *_table(["machine", "dtype", "sequences at once", "plain pass, ms", "times plain, with heads"], rows),
    ]
    return ["\n".join(lines)]


def _heads(evaluation: dict[str, Any]) -> list[str]:
    heads = evaluation.get("heads")
    if not heads:
        return []
    bits, right = heads["bits_per_byte"], heads["top1"]
    rows = [[k, f"{b:.3f}", f"{r:.1%}"] for k, (b, r) in enumerate(zip(bits, right), start=1)]
    text = ", ".join(Path(str(source)).name for source in heads["text"])
    lines = [
        f"On {heads['documents']} documents ({text}), read with teacher forcing (`headstart evaluate`):",
        "",
        *_table(["head", "bits per byte", "top-1"], rows),
    ]
    return ["\n".join(lines)]


def _usage(directory: Path, name: str, config: ModelConfig) -> str:
    lines = ["## Use", "", "```python", "import headstart", "", f'model = headstart.load("{name}")']
    if (directory / "tokenizer.json").is_file():
        lines += ['print(model.generate("Once", max_new_tokens=100).text)', "```"]
    else:
        lines += ["print(model.generate([1, 2, 3], max_new_tokens=100).tokens)  # it has no tokenizer", "```"]
    if config.heads > 1:
        lines += [
            "",
            "In Headstart decoding with any number of heads is lossless by default: token for token the text of plain "
            "decoding, greedy or sampled with the same seed. The acceptance rules `rejection` and `block` are lossless "
            "in distribution; those called `lossy-...` are not, and q4 and q8 are other models.",
        ]
    if config.kind.plain_decoder:
        code = (directory / MODELING_FILE).is_file()
        lines += ["", "```python", "from transformers import AutoModelForCausalLM", ""]
        lines += [f'model = AutoModelForCausalLM.from_pretrained("{name}")  # trunk and head 1']
        if code:
            lines += [f'model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)']
            lines += ["model.generate(ids)  # with all heads"]
        lines += ["```"]
        if code and config.heads > 1:
            lines += [
                "",
                "With its code, `generate` writes what it writes without: the same tokens greedily and, after the same "
                "`torch.manual_seed`, sampled, up to the rounding of logits.",
            ]
    return "\n".join(lines)


def _use_of_heads(name: str, base_model: str | None) -> str:
    base = base_model or "BASE"
    lines = ["## Use", "", "```python", "import headstart", "", f'model = headstart.load("{base}", heads="{name}")']
    lines += ['print(model.generate("Once", max_new_tokens=100).text)', "```"]
    lines += ["", "```", f"headstart generate {base} --heads-from {name} --prompt Once --stats"]
    lines += [f"headstart serve {base} --heads-from {name}", "```", ""]
    lines += [
        "The model may be the original or a GGUF file of it, also a quantized one. Another model is refused. In "
        "Headstart decoding with any number of heads is lossless by default: token for token the text of plain "
        "decoding, greedy or sampled with the same seed."
    ]
    return "\n".join(lines)


def _licence(licence: str | None) -> str:
    text = f"`{licence}`." if licence is not None else "None was given: ask its owner before you use it."
    return f"## Licence\n\n{text}"


def _table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(str(cell).replace('|', '/') for cell in line)} |" for line in lines]
