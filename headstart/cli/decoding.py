"""Commands that decode: generate."""

from __future__ import annotations

import sys
from typing import Literal

from tyro.conf import Positional

from headstart.cli.common import print_json, use_threads
from headstart.errors import UsageError


def generate(
    model: Positional[str | None] = None,
    *,
    prompt: str,
    chat: bool = False,
    system: str | None = None,
    max_new_tokens: int = 200,
    heads: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    acceptance: str = "match",
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    json_schema: str | None = None,
    regex: str | None = None,
    logprobs: int | None = None,
    lookup: int = 0,
    tree: str | None = None,
    exact: bool = True,
    dtype: Literal["bfloat16", "float32"] | None = None,
    quantize: Literal["int8"] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    stats: bool = False,
    show: bool = False,
    json: bool = False,
) -> None:
    """Continue a prompt with a model directory, streaming the text.

    Args:
        model: a model directory (default: the model in the box).
        prompt: text to continue; - reads it from standard input.
        chat: the prompt is a user's message: the model's chat template writes it, and the assistant answers.
        system: with --chat, a system message before it.
        max_new_tokens: at most this many tokens.
        heads: how many heads decode, 1 being plain decoding (default: those worth it by what `headstart tune` measured;
            without that by what shows). The output does not depend on it.
        temperature: 0 is greedy.
        top_k: keep the k most probable tokens (0: all).
        top_p: keep the most probable tokens that reach this probability together (1: all).
        min_p: keep tokens at least this probable relative to the best (0: all).
        seed: of the sampling noise.
        stop: strings that end the text.
        acceptance: which drafts are kept: match (the text of plain decoding), rejection or block (lossless in
            distribution, more are kept), or lossy-typical, lossy-top-k:3, lossy-distance, lossy-minimum.
        repetition_penalty: divides positive logits of tokens in prompt and text, multiplies negative ones (1: none).
        presence_penalty: taken once from the logits of tokens in the text.
        frequency_penalty: taken from the logit of a token as often as the text holds it.
        json_schema: write JSON that satisfies this schema: a file, or the schema itself.
        regex: write text that this regular expression matches whole.
        logprobs: with --json, the log-probability of each token and of this many most probable ones.
        lookup: at most this many drafts of a pass are looked up in the text itself.
        tree: windows are trees of several candidates of each head: of this many drafts, or with nodes given as ranks,
            0,1,0.0; 0: chains (default: what `headstart tune --tree-nodes` found best).
        exact: bit-identical output for every number of heads; --no-exact is the fastest path, equal up to rounding.
        dtype: bfloat16 or float32 (default: as stored; float32 on a CPU without instructions for bfloat16).
        quantize: int8: weights and activations of all products in 8 bits, on CPUs; faster, not quite the same model.
        device: cpu, cuda, ...
        threads: CPU threads (default: torch's choice; `headstart doctor` says which is best).
        stats: print tokens per pass, acceptance and speed afterwards, to standard error.
        show: print the prompt too, and each token in the colour of the head that drafted it.
        json: print text, tokens and statistics as JSON instead of streaming.
    """
    import headstart
    from headstart.console import ColouredText, say
    from headstart.data.prompts import Prompt, encode_prompt, turn_ends
    from headstart.decoding.constraints import Constraint
    from headstart.decoding.generation import OriginStream
    from headstart.decoding.settings import GenerationSettings, Penalties
    from headstart.formats.bundled import model_directory

    use_threads(threads)
    text = sys.stdin.read() if prompt == "-" else prompt
    loaded = headstart.load(model_directory(model), dtype=dtype, device=device, quantize=quantize)
    if system is not None and not chat:
        raise UsageError("--system is for conversations; give --chat too")
    before = [] if system is None else [{"role": "system", "content": system}]
    asked: Prompt = [*before, {"role": "user", "content": text}] if chat else text
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        heads=heads,
        acceptance=acceptance,
        penalties=Penalties(repetition_penalty, presence_penalty, frequency_penalty),
        constraint=Constraint.named(json_schema, regex),
        logprobs=logprobs,
        stop=stop,
    )
    request = settings.request(encode_prompt(loaded.tokenizer, asked), ends=turn_ends(loaded.tokenizer, asked))
    context = max(1, min(loaded.config.context, len(request.prompt) + max_new_tokens))
    engine = loaded.engine(1, context, exact, lookup, tree=tree)
    generation = engine.submit(request)
    if show and not json:
        coloured, origins = ColouredText(), OriginStream(generation, loaded.tokenizer)
        coloured.legend("drafted by", loaded.config.heads)
        coloured.prompt(text)
        for _ in engine.run():
            for piece, head in origins.new():
                coloured.piece(piece, head)
    for _, piece in engine.run():  # nothing is left of what was shown
        if not json:
            print(piece, end="", flush=True)
    result = generation.stats
    if json:
        summary = result.summary() | {"finish_reason": generation.finish_reason}
        shown = {"text": generation.text, "tokens": generation.tokens, "stats": summary}
        if logprobs is not None:
            shown |= {"logprobs": generation.logprobs, "top_logprobs": generation.top_logprobs}
        print_json(shown)
        return
    print()
    if stats:
        shares = "  ".join(f"head {k} {share:.0%}" for k, share in enumerate(result.acceptance, start=2))
        say(
            f"{result.tokens} tokens in {result.passes} passes of {result.rows_per_pass:.1f} rows: "
            f"{result.tokens_per_pass:.2f} tokens per pass, {result.tokens_per_second:.0f} tokens/s "
            f"({generation.finish_reason})"
        )
        if shares:
            say(f"accepted drafts: {shares}")
