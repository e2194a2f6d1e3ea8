"""Options of `adapt` that let the model write what its heads are trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from headstart.errors import UsageError

ANSWERS_FILE = "answers.jsonl"


@dataclass(frozen=True)
class OwnAnswers:
    """Let the model answer prompts first, and train its heads on the answers, as after `headstart distill-data`."""

    prompts: Path | None = None
    """Prompts as for `headstart distill-data`, in place of --data. The model's answers are kept in
    RUN/answers.jsonl."""
    self_prompts: int = 0
    """Number of prompts that the model writes itself and then answers, in place of --data."""
    answer_tokens: int = 256
    """The largest number of tokens per answer to --prompts or --self-prompts."""
    answer_temperature: float = 0.7
    """Temperature of the answers; 0 is greedy."""

    @property
    def asked(self) -> bool:
        """Return whether the model is to write answers."""
        return self.prompts is not None or self.self_prompts != 0

    def check(self, data: tuple[str, ...]) -> None:
        """Raise UsageError for more than one source of data, or none."""
        if self.asked == bool(data):
            raise UsageError(
                "name what to train on: --data FILE, FOLDER ... or folders that headstart prepare wrote, or else "
                "--prompts FILE or --self-prompts N for the model's own answers"
            )

    def chat(self, model: Path) -> bool:
        """Return whether prompts are messages of a user: if the model has a chat template."""
        from headstart.data.chat_template import load_chat_template
        from headstart.formats.registry import load_model_tokenizer

        tokenizer = load_model_tokenizer(model)
        return tokenizer is not None and load_chat_template(tokenizer) is not None

    def write(self, model: Path, run_dir: Path, seed: int, threads: int | None) -> None:
        """Write the answers to RUN/answers.jsonl, or continue that file."""
        from headstart.commands.distill_data import DistillDataSettings, run

        run(
            DistillDataSettings(
                model=str(model),
                prompts=self.prompts,
                self_prompts=self.self_prompts,
                out=run_dir / ANSWERS_FILE,
                chat=self.chat(model),
                max_new_tokens=self.answer_tokens,
                temperature=self.answer_temperature,
                seed=seed,
                slots=16,
                threads=threads,
            )
        )
