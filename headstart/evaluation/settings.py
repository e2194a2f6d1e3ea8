"""Options of single tasks of `headstart evaluate`, and file names. Importing them does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PROMPTS_FILE = "prompts.jsonl"
"""File of a model directory with prompts: text that the model was not trained on."""


@dataclass(frozen=True)
class CodeSettings:
    """The tasks humaneval, mbpp, mbpp-sanitized, apps-introductory, codecontests, gsm8k-answers."""

    source: str | None = None
    """A .jsonl or .jsonl.gz file with the problems, or hf:NAME (None: the task's data set on the hub). For one task."""
    samples: int = 10
    """Programs generated for each problem at each temperature above 0; at 0 there is one."""
    temperatures: tuple[float, ...] = (0.2, 0.8)
    """Temperatures to sample at. pass@k is given for each, and for the best one at each k (the paper's oracle
    temperature)."""
    top_p: float = 0.95
    """Keep the most probable tokens whose probabilities add up to this."""
    k: tuple[int, ...] = (1, 10, 100)
    """Values of k to give pass@k for, as far as there are samples."""
    new_tokens: int = 256
    """The largest number of tokens per program."""
    problems: int | None = None
    """Take only this many problems, the first ones."""
    cut_prompts: bool = False
    """Keep the end of a prompt if it does not fit into the model's context with its program; the report counts such
    prompts. Without this option such a model is refused."""
    rewarded: bool = False
    """End prompts of codecontests with the line that precedes correct programs in training (`prepare --rewards`)."""
    shots: int = 0
    """gsm8k-answers: solved problems before each question, the first ones of the training split (the paper: 8)."""
    examples: str | None = None
    """gsm8k-answers: a .jsonl file with the problems of --code.shots, or hf:NAME (None: the hub's)."""
    compare_plain: bool = False
    """Generate the programs a second time with head 1 alone, to compare the times; the programs must be the same."""
    workers: int = 2
    """Programs run at once."""


@dataclass(frozen=True)
class SuiteSettings:
    """The tasks spec-bench, mt-bench, gsm8k, humaneval-prompts, mbpp-prompts and prompts: speculative decoding."""

    file: Path | None = None
    """The suite's file (None: in the folder that the environment variable HEADSTART_SUITES names, or fetched). For one
    task."""
    temperatures: tuple[float, ...] = (0.0, 1.0)
    """Temperatures to decode at."""
    acceptance: str = "match"
    """Rule that accepts drafts, as of `headstart generate`: match, rejection, block, lossy-..."""
    heads: int | None = None
    """Heads in every pass, head 1 included (None: as many as pay, by the policy; it is on)."""
    lookup: int = 0
    """The largest number of drafts per pass that are looked up in the sequence itself."""
    tree: str | None = None
    """Draft trees, as of `headstart generate`: the number of drafts, nodes such as 0,1,0.0, or sizes such as 4x3:8."""
    plain: bool = True
    """Decode each prompt plainly too, for the speed-up and to compare the outputs."""
    against: Path | None = None
    """Folder that another run of the same suite wrote (its --out): the report compares the speeds prompt by prompt, as
    with a server that --url named there."""
    raw: bool = False
    """Continue questions as text, without the chat template: for models without one."""


@dataclass(frozen=True)
class LmEvalSettings:
    """Tasks named lm-eval:NAME, such as lm-eval:arc_easy (docs/evaluation.md)."""

    include_path: Path | None = None
    """A folder with task files of your own (.yaml, as lm-eval reads them)."""
    defaults: bool = True
    """Find lm-eval's own tasks too; looking through them takes some seconds."""
    few_shot: int | None = None
    """Examples before each question (None: as the task says)."""
    chat: bool = False
    """Write questions through the model's chat template (lm-eval's --apply_chat_template)."""
    limit: int | None = None
    """Take only this many documents of each task, the first ones."""
    new_tokens: int | None = None
    """The largest number of tokens per answer, instead of the task's own."""


@dataclass(frozen=True)
class SummarySettings:
    """The tasks cnn-dailymail, multi-news, orangesum, pn-summary, samsum, thaisum, wikisummary, xsum: summaries."""

    source: Path | None = None
    """A .jsonl file with the documents to summarize, in the fields of the set (None: its test split on the hub)."""
    choose: bool = False
    """MODEL is the folder of a run: take the checkpoint with the best ROUGE-L on the validation split, as the paper
    does after every epoch."""
    validation: Path | None = None
    """A .jsonl file with the documents of the validation split (None: that on the hub)."""
    documents: int | None = None
    """Take only this many documents of each split, the first ones."""
    new_tokens: int = 128
    """The largest number of tokens per summary. A longer document loses its end; the report counts such documents."""
    prompt: str = "{document}\n\nSummary:"
    """Text around a document, as in the data that the model was finetuned on."""
    stop: tuple[str, ...] = ("\n\n",)
    """Strings that end a summary, in addition to the model's end token."""
