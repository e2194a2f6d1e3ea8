"""Make the training data of the draft heads for SmolLM2 (`smollm2-135m-heads/`): the prompts, and the answers to keep.

    python models/smollm2.py prompts DATA PROMPTS.jsonl
    python models/smollm2.py answers ANSWERS.jsonl KEPT.jsonl

DATA holds prompts/ (prompts of T0 templates, seeds of Self-Instruct), gsm8k/, mbpp/ and spec_bench/ as JSON lines.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GSM8K_QUESTIONS = 1500
MBPP_TRAINING_TASKS = range(601, 975)
WORDS = 13
"""A prompt that shares so many words in a row with a benchmark question is left out."""
LEAST_SHARE = 0.2
"""Least characters of an answer per character of its prompt: long passages with short answers cost most and teach
least."""
LEAST_CHARACTERS = 40
"""Least characters of an answer."""


def lines(path: Path) -> Iterator[Any]:
    """Yield the objects of a file of JSON lines."""
    with path.open(encoding="utf-8") as file:  # str.splitlines would also cut at separators within texts
        yield from map(json.loads, file)


def runs_of_words(text: str) -> set[str]:
    """Return all runs of `WORDS` words, in lower case and without punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + WORDS]) for i in range(len(words) - WORDS + 1)}


def write_prompts(data: Path, out: Path) -> None:
    """Write all prompts in random order, without those that the benchmarks contain."""
    found = [
        row["prompt"] for name in ("t0_prompts", "self_instruct_seeds") for row in lines(data / f"prompts/{name}.jsonl")
    ]
    found += [row["question"] for row in lines(data / "gsm8k/train.jsonl")][:GSM8K_QUESTIONS]
    found += [row["text"] for row in lines(data / "mbpp/mbpp.jsonl") if row["task_id"] in MBPP_TRAINING_TASKS]
    tested: set[str] = set()
    for question in lines(data / "spec_bench/question.jsonl"):
        tested.update(*map(runs_of_words, question["turns"]))
    for row in lines(data / "gsm8k/test.jsonl"):
        tested |= runs_of_words(row["question"])
    kept = [prompt for prompt in found if tested.isdisjoint(runs_of_words(prompt))]
    random.Random(0).shuffle(kept)
    out.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in kept), encoding="utf-8")
    print(f"{len(kept):,} prompts; {len(found) - len(kept)} stand in the benchmarks and are left out")


def keep_answers(answers: Path, out: Path) -> None:
    """Write the conversations whose answers are long enough, in random order."""
    kept = []
    for row in lines(answers):
        size = {False: 0, True: 0}
        for message in row["messages"]:
            size[message["role"] == "assistant"] += len(message["content"])
        if size[True] > LEAST_CHARACTERS and size[True] >= LEAST_SHARE * size[False]:
            kept.append(json.dumps(row) + "\n")
    random.Random(0).shuffle(kept)
    out.write_text("".join(kept), encoding="utf-8")
    print(f"{len(kept):,} conversations kept")


def main() -> None:
    """Run the command."""
    commands = {"prompts": write_prompts, "answers": keep_answers}
    if len(sys.argv) != 4 or sys.argv[1] not in commands:
        sys.exit("usage: python models/smollm2.py prompts DATA PROMPTS.jsonl, or answers ANSWERS.jsonl KEPT.jsonl")
    commands[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))


if __name__ == "__main__":
    main()
