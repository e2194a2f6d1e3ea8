"""`headstart generate`: continue a prompt."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from headstart.console import ColouredText, print_json, say
from headstart.errors import UsageError
from headstart.hardware import use_threads

if TYPE_CHECKING:
    from headstart.api import LanguageModel
    from headstart.data.prompts import Prompt
    from headstart.decoding.engine import Engine
    from headstart.decoding.generation import Generation
    from headstart.decoding.settings import Request


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """Continue a prompt, and print the text as it is decoded."""

    model: Positional[str | None] = None
    """A model directory or a GGUF file (None: the model in the box)."""
    heads_from: str | None = None
    """A directory of draft heads for the model, or its name on the hub (docs/heads.md)."""
    prompt: str
    """Text to continue; - reads it from standard input."""
    chat: bool = False
    """Take the prompt as a user's message: the model's chat template writes it, and the assistant answers."""
    system: str | None = None
    """System message before the prompt (with --chat)."""
    max_new_tokens: int = 200
    """The largest number of tokens to generate."""
    heads: int | None = None
    """Number of heads that decode; 1 is plain decoding (None: as many as pay according to `headstart tune`, or else
    according to the first passes). The output does not depend on it."""
    temperature: float = 0.0
    """Temperature of the sampling; 0 is greedy."""
    top_k: int = 0
    """Keep the k most probable tokens (0: all)."""
    top_p: float = 1.0
    """Keep the most probable tokens whose probabilities add up to this (1: all)."""
    min_p: float = 0.0
    """Keep tokens at least this probable relative to the most probable one (0: all)."""
    seed: int = 0
    """Seed of the sampling noise."""
    stop: tuple[str, ...] = ()
    """Strings that end the text."""
    acceptance: str = "match"
    """Rule that accepts drafts: match (the text of plain decoding), rejection or block (lossless in distribution,
    accept more), or lossy-typical, lossy-top-k:3, lossy-distance, lossy-minimum."""
    repetition_penalty: float = 1.0
    """Divide positive logits of tokens in prompt and text by this, and multiply negative ones (1: no penalty)."""
    presence_penalty: float = 0.0
    """Subtract this from the logits of tokens in the text."""
    frequency_penalty: float = 0.0
    """Subtract this from the logit of a token once for each time that the text holds it."""
    json_schema: str | None = None
    """Write JSON that satisfies this schema: a file, or the schema itself."""
    regex: str | None = None
    """Write text that this regular expression matches as a whole."""
    logprobs: int | None = None
    """Add to the JSON the log-probability of each token and of this many most probable ones."""
    lookup: int = 0
    """The largest number of drafts per pass that are looked up in the text itself."""
    tree: str | None = None
    """Use windows that are trees, with several candidates per head: the number of drafts, or nodes given as ranks such
    as 0,1,0.0, or for eagle3 heads the sizes of a dynamic tree such as 4x3:8; 0: chains (None: what `headstart tune
    --tree-nodes` found best)."""
    exact: bool = True
    """Give bit-identical output for every number of heads; --no-exact is the fastest path, equal up to rounding."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """dtype of the weights (None: as stored; float32 on a CPU without instructions for bfloat16)."""
    quantize: Literal["q4", "q8"] | None = None
    """q4 or q8: weights in blocks of 4 or 8 bits, on CPUs; faster and smaller, but not quite the same model."""
    loss_text: Path | None = None
    """A text on which to measure the loss in bits per token (with --quantize; None: a short one)."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    threads: int | None = None
    """CPU threads (None: torch's choice; `headstart doctor` says which number is best)."""
    stats: bool = False
    """Print tokens per pass, acceptance and speed afterwards, to standard error."""
    show: bool = False
    """Print the prompt too, and each token in the colour of the head that drafted it."""
    json: bool = False
    """Print text, tokens and statistics as JSON instead of streaming the text."""


def run(settings: GenerateSettings) -> None:
    """Generate, and print the text or the JSON."""
    from headstart.api import load_and_report
    from headstart.formats.bundled import find_model

    use_threads(settings.threads)
    text = sys.stdin.read() if settings.prompt == "-" else settings.prompt
    path, heads = find_model(settings.model, settings.heads_from)
    loaded = load_and_report(path, settings.dtype, settings.device, settings.quantize, heads, settings.loss_text)
    if settings.system is not None and not settings.chat:
        raise UsageError("--system is for conversations; give --chat too")
    before = [] if settings.system is None else [{"role": "system", "content": settings.system}]
    prompt: Prompt = [*before, {"role": "user", "content": text}] if settings.chat else text
    request = _request(settings, loaded, prompt)
    context = max(1, min(loaded.config.context, len(request.prompt) + settings.max_new_tokens))
    engine = loaded.engine(1, context, settings.exact, settings.lookup, tree=settings.tree)
    generation = engine.submit(request)
    if settings.json:
        for _ in engine.run():
            pass
        print_json(_as_json(generation))
        return
    if settings.show:
        _show(engine, generation, loaded, text)
    else:
        for _, piece in engine.run():
            print(piece, end="", flush=True)
    print()
    if settings.stats:
        _say_stats(generation)


def _request(settings: GenerateSettings, loaded: LanguageModel, prompt: Prompt) -> Request:
    from headstart.data.prompts import encode_prompt, turn_ends
    from headstart.decoding.constraints import Constraint
    from headstart.decoding.settings import GenerationSettings, Penalties

    generation = GenerationSettings.named_in(
        settings,
        penalties=Penalties(settings.repetition_penalty, settings.presence_penalty, settings.frequency_penalty),
        constraint=Constraint.named(settings.json_schema, settings.regex),
    )
    return generation.request(encode_prompt(loaded.tokenizer, prompt), ends=turn_ends(loaded.tokenizer, prompt))


def _show(engine: Engine, generation: Generation, loaded: LanguageModel, prompt: str) -> None:
    """Decode, and print the prompt and each piece of text in the colour of the head that drafted it."""
    from headstart.decoding.generation import OriginStream

    coloured, origins = ColouredText(), OriginStream(generation, loaded.tokenizer)
    coloured.legend("drafted by", loaded.config.heads)
    coloured.prompt(prompt)
    for _ in engine.run():
        for piece, head in origins.new():
            coloured.piece(piece, head)


def _as_json(generation: Generation) -> dict[str, Any]:
    summary = generation.stats.summary() | {"finish_reason": generation.finish_reason}
    found = {"text": generation.text, "tokens": generation.tokens, "stats": summary}
    if generation.request.logprobs is not None:
        found |= {"logprobs": generation.logprobs, "top_logprobs": generation.top_logprobs}
    return found


def _say_stats(generation: Generation) -> None:
    stats = generation.stats
    say(
        f"{stats.tokens} tokens in {stats.passes} passes of {stats.rows_per_pass:.1f} rows: "
        f"{stats.tokens_per_pass:.2f} tokens per pass, {stats.tokens_per_second:.0f} tokens/s "
        f"({generation.finish_reason})"
    )
    shares = "  ".join(f"head {k} {share:.0%}" for k, share in enumerate(stats.acceptance, start=2))
    if shares:
        say(f"accepted drafts: {shares}")
