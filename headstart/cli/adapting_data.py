"""Commands that make data for heads: distill-data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from headstart.cli.common import print_json, use_threads


def distill_data(
    model: Positional[str | None] = None,
    *,
    prompts: Path,
    out: Path,
    chat: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.3,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    drop_unfinished: bool = False,
    heads: int | None = None,
    slots: int = 8,
    exact: bool = True,
    dtype: Literal["bfloat16", "float32"] | None = None,
    device: str = "cpu",
    threads: int | None = None,
    json: bool = False,
) -> None:
    """Let a model write the data that its heads are to be trained on.

    Stopped or killed, the same command resumes where it was.

    Args:
        model: a model directory (default: the model in the box).
        prompts: .jsonl with "prompt", "text" or "messages" in each line, or plain text, a prompt a line. In
            conversations every question is answered in turn, whatever answers the file has.
        chat: prompts that are text are messages of a user: the model's chat template writes them, and conversations are
            written. (Text is otherwise continued as it stands, which a chat model was not trained for.)
        out: the .jsonl to write; headstart prepare reads it (conversations with --conversations).
        max_new_tokens: at most this many tokens an answer.
        temperature: 0 is greedy.
        top_k: keep the k most probable tokens (0: all).
        top_p: keep the most probable tokens that reach this probability together (1: all).
        min_p: keep tokens at least this probable relative to the best (0: all).
        seed: of all; every answer has one of its own, made of it and of its place in the file.
        drop_unfinished: leave out what was still going on after --max-new-tokens, which would be trained on as an end.
        heads: how many heads decode (default: those worth it). The output does not depend on it.
        slots: how many answers are written at once. The output does not depend on it.
        exact: bit-identical output for every number of heads; --no-exact is faster, equal up to rounding.
        dtype: bfloat16 or float32 (default: as stored; float32 on a CPU without instructions for bfloat16).
        device: cpu, cuda, ...
        threads: CPU threads (default: torch's choice).
        json: print what was written as JSON.
    """
    import headstart
    from headstart.commands.distill_data import DistillSettings, distill
    from headstart.console import Progress, say
    from headstart.formats.bundled import model_directory

    use_threads(threads)
    directory = model_directory(model)
    loaded = headstart.load(directory, dtype=dtype, device=device)
    settings = DistillSettings(max_new_tokens, temperature, top_k, top_p, min_p, seed, drop_unfinished, chat)
    with Progress("distill", unit="prompts") as bar:

        def progress(done: int, total: int, numbers: dict[str, Any]) -> None:
            bar.update(done, total, **numbers)

        found = distill(
            loaded,
            directory,
            prompts,
            out,
            settings,
            heads=heads,
            slots=slots,
            exact=exact,
            progress=progress,
            report=say,
        )
    if found["too_long"]:
        say(f"{found['too_long']:,} prompts as long as the context were left out")
    if found["unfinished"]:
        what = "left out" if drop_unfinished else "kept"
        say(f"{found['unfinished']:,} were not at an end after {max_new_tokens} tokens, and {what}")
    say(f"{found['written']:,} written, {found['tokens']:,} tokens, {found['tokens_per_pass']} a pass: {out}")
    if json:
        print_json(found)
