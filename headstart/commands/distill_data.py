"""`headstart distill-data`: let a model write the text that its heads are then trained on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from headstart.console import Progress, print_json, say
from headstart.errors import UsageError
from headstart.hardware import use_threads


@dataclass(frozen=True, kw_only=True)
class DistillDataSettings:
    """Let a model write the text that its heads are then trained on.

    A file that was not finished grows on when the same command is started again.
    """

    model: Positional[str | None] = None
    """A model directory or a GGUF file (None: the model in the box)."""
    heads_from: str | None = None
    """A directory of draft heads for the model, or its name on the hub (docs/heads.md). The output does not depend on
    it."""
    prompts: Path | None = None
    """.jsonl with "prompt", "text" or "messages" in each line, or plain text with a prompt a line. In a conversation
    each question is answered in turn; answers in the file are ignored."""
    self_prompts: int = 0
    """Number of prompts that the model writes itself, as messages of a user (arXiv 2406.08464), without --prompts.
    Those that differ are kept in OUT.prompts.jsonl and answered."""
    self_prompt_temperature: float = 1.0
    """Temperature of the prompts that the model writes."""
    out: Path
    """The .jsonl to write. `headstart prepare` reads it (conversations with --conversations)."""
    chat: bool = False
    """Take prompts that are text as messages of a user: the model's chat template writes them, and the output holds
    conversations. (Without it, text is continued as it stands, for which a chat model was not trained.)"""
    max_new_tokens: int = 256
    """The largest number of tokens per answer."""
    temperature: float = 0.3
    """Temperature of the sampling; 0 is greedy."""
    top_k: int = 0
    """Keep the k most probable tokens (0: all)."""
    top_p: float = 1.0
    """Keep the most probable tokens whose probabilities add up to this (1: all)."""
    min_p: float = 0.0
    """Keep tokens at least this probable relative to the most probable one (0: all)."""
    beams: int = 1
    """Continuations kept by a beam search for the most probable answer, as Stern et al. distill (1: sample). Slow: each
    token runs the model over the whole text, and --temperature and the other options of sampling are not used."""
    seed: int = 0
    """Seed of the whole file; each answer gets a seed made of it and of the place of its prompt."""
    drop_unfinished: bool = False
    """Leave out answers cut off at --max-new-tokens; training would take the cut for an end."""
    heads: int | None = None
    """Number of heads that decode (None: as many as pay). The output does not depend on it."""
    slots: int = 8
    """Number of answers decoded together. The output does not depend on it."""
    exact: bool = True
    """Give bit-identical output for every number of heads; --no-exact is faster, equal up to rounding."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """dtype of the weights (None: as stored; float32 on a CPU without instructions for bfloat16)."""
    device: str = "cpu"
    """cpu, cuda, ..."""
    threads: int | None = None
    """CPU threads (None: torch's choice)."""
    json: bool = False
    """Print counts as JSON."""


def run(settings: DistillDataSettings) -> None:
    """Write the answers, and say how many there are."""
    import headstart
    from headstart.commands.self_distillation import DistillSettings, distill, write_self_prompts
    from headstart.decoding.settings import GenerationSettings
    from headstart.formats.bundled import find_model

    if (settings.prompts is None) == (settings.self_prompts <= 0):
        raise UsageError("give either --prompts FILE or --self-prompts N, N at least 1")
    if settings.beams < 1 or (settings.beams > 1 and settings.prompts is None):
        raise UsageError("--beams is 1 or more, and answers --prompts; the model's own prompts are sampled")
    use_threads(settings.threads)
    directory, heads = find_model(settings.model, settings.heads_from)
    loaded = headstart.load(directory, settings.dtype, settings.device, heads=heads)
    distillation = DistillSettings(
        settings.prompts or settings.out.with_suffix(".prompts.jsonl"),
        settings.out,
        GenerationSettings.named_in(settings),
        chat=settings.chat or settings.prompts is None,
        drop_unfinished=settings.drop_unfinished,
        beams=settings.beams,
        slots=settings.slots,
        exact=settings.exact,
        prompts_key=None if settings.prompts else f"own, temperature {settings.self_prompt_temperature}",
    )
    if settings.prompts is None:
        asking = replace(distillation.generation, temperature=settings.self_prompt_temperature)
        drawing = replace(distillation, generation=asking)
        with Progress("self-prompts", unit="prompts") as bar:
            count = settings.self_prompts
            kept = write_self_prompts(loaded, directory, drawing, count, progress=bar.update, report=say)
        say(f"{kept:,} of {count:,} prompts are complete and differ: {distillation.prompts}")
    with Progress("distill", unit="prompts") as bar:
        found = distill(loaded, directory, distillation, progress=bar.update, report=say)
    if found["too_long"]:
        say(f"{found['too_long']:,} prompts as long as the context were left out")
    if found["unfinished"]:
        what = "left out" if settings.drop_unfinished else "kept"
        say(f"{found['unfinished']:,} were not at an end after {settings.max_new_tokens} tokens, and {what}")
    say(f"{found['written']:,} written, {found['tokens']:,} tokens, {found['tokens_per_pass']} a pass: {settings.out}")
    if settings.json:
        print_json(found)
