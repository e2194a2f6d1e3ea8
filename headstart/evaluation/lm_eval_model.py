"""Connect a model to EleutherAI's lm-eval: likelihoods by head 1, and outputs by the engine.

Importing this file needs the extra `eval` and registers the model with lm-eval under the name "headstart".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from headstart.api import LanguageModel, load
from headstart.console import Progress
from headstart.data.chat_template import need_chat_template
from headstart.data.tokenizers import prompt_ids
from headstart.decoding.settings import GenerationSettings
from headstart.errors import UsageError

Pair = tuple[Any, Sequence[int], Sequence[int]]
"""A request: (anything, tokens of the context, tokens of the continuation)."""


@register_model("headstart")
class HeadstartLM(TemplateLM):
    """lm-eval's model over a `LanguageModel` or a model directory.

    Args:
        model: an opened model, or the name of a directory.
        batch_size: rows read, and requests decoded, at once.
        heads: number of heads that decode (None: like `LanguageModel.generate`); results do not depend on it.
    """

    def __init__(
        self,
        model: LanguageModel | str,
        batch_size: int | str | None = 8,
        heads: int | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.model = load(model, dtype=dtype, device=device or "cpu") if isinstance(model, str) else model
        self.batch, self.heads = int(batch_size or 8), heads
        self.context = self.model.config.context
        self.cut = 0
        """Number of requests whose beginning did not fit into the context."""
        self.tokens = 0
        self.passes = self.committed = 0
        """Tokens committed, and passes that they took, over all outputs."""
        self._start = list(self.model.tokenizer.start_ids)
        self._end = self.model.tokenizer.end_id
        if self._end is None:
            raise UsageError("this tokenizer has no end token, which lm-eval puts before text; name one")

    @property
    def eot_token_id(self) -> int:
        """Return the end token."""
        assert self._end is not None
        return self._end

    @property
    def prefix_token_id(self) -> int:
        """Return the token before text without a context: the start token, or else the end token."""
        return self._start[0] if self._start else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Return the name of the tokenizer."""
        return self.model.tokenizer.name

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the source of the tokenizer's chat template; None if lm-eval does not use one.

        Raises UsageError if there is none, and for any name but "default".
        """
        if not chat_template:
            return None
        if isinstance(chat_template, str) and chat_template != "default":
            raise UsageError(f"apply_chat_template={chat_template!r}: only the default template is read; give True")
        return need_chat_template(self.model.tokenizer).source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation up to where the assistant begins to write.

        Without `add_generation_prompt` the text ends with the last message, which the model continues. If a template
        refuses system messages they are left out, as in lm-eval's own Hugging Face model.
        """
        template = need_chat_template(self.model.tokenizer)
        try:
            text = template.render(chat_history, prompt=add_generation_prompt)
        except UsageError:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            text = template.render(others, prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        if last not in text:
            raise UsageError("the chat template changes the last message, so it cannot be continued; leave it out")
        return text[: text.rindex(last) + len(last)]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text, after the start token unless `add_special_tokens` is False."""
        tokenizer = self.model.tokenizer
        return tokenizer.encode(string) if add_special_tokens is False else prompt_ids(tokenizer, string)

    def _fitted(self, ids: list[int], room: int) -> list[int]:
        """Return the end of `ids` that fits into `room`, after the start tokens if `ids` begins with them."""
        if len(ids) <= room:
            return ids
        self.cut += 1
        kept = self._start if ids[: len(self._start)] == self._start and len(self._start) < room else []
        return kept + ids[len(kept) - room :]

    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return for each request the log-probability of the continuation, and whether greedy decoding gives it."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        # Rows of similar length are read together. The longest come first, so memory runs out at once or never.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
        with Progress("likelihoods", len(order), unit="requests") as bar:
            for start in range(0, len(order), self.batch):
                places = order[start : start + self.batch]
                for place, answer in zip(places, self._read([requests[i] for i in places])):
                    found[place] = answer
                bar.advance(len(places))
        return found

    @torch.no_grad()
    def _read(self, requests: Sequence[Pair]) -> list[tuple[float, bool]]:
        rows, sizes = [], []
        for _, before, after in requests:
            # The last token is not read, because nothing follows it.
            row = self._fitted([*before, *after], self.context + 1)
            rows.append(row)
            sizes.append(min(len(after), len(row) - max(1, len(self._start))))
        width = max(map(len, rows)) - 1
        # Padding follows each row, so no token of the row attends to it.
        tokens = torch.tensor(
            [row[:-1] + [0] * (width - len(row) + 1) for row in rows], device=self.model.transformer.device
        )
        latents = self.model.transformer.latents(tokens, [1])[1]
        answers = []
        for row, size, z_TD in zip(rows, sizes, latents):
            if size == 0:
                answers.append((0.0, True))
                continue
            # Logits of the continuation alone: those of a whole row would take V numbers per token.
            logits = self.model.transformer.unembedding(z_TD[None, len(row) - 1 - size : len(row) - 1])[0].float()
            targets = torch.tensor(row[-size:], device=logits.device)
            chances = logits.log_softmax(-1).gather(-1, targets[:, None])
            answers.append((float(chances.sum()), bool((logits.argmax(-1) == targets).all())))
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text, read in windows of the context, each token once."""
        pieces: list[Pair] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.context,
                context_len=1,
            )
            for window in map(make_disjoint_window, windows):
                pieces.append((None, *window))
                owners.append(i)
        totals = [0.0] * len(requests)
        for i, (chance, _) in zip(owners, self._loglikelihood_tokens(pieces)):
            totals[i] += chance
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the output after each context, up to a stop string, decoded by the engine with all heads."""
        requested = []
        for number, request in enumerate(requests):
            text, options = request.args
            options = dict(options)
            until = options.pop("until", None) or []
            new = int(options.pop("max_gen_toks", 256))
            temperature = float(options.pop("temperature", 0.0)) if options.pop("do_sample", False) else 0.0
            if new >= self.context:
                raise UsageError(
                    f"the task asks for {new} new tokens, the model's context is {self.context}; "
                    f"ask for fewer: --lm-eval.new-tokens {self.context // 2}"
                )
            prompt = self.tok_encode(text) or [self.eot_token_id]
            prompt = self._fitted(prompt, self.context - new)
            settings = GenerationSettings(
                max_new_tokens=new,
                temperature=temperature,
                top_k=int(options.pop("top_k", 0) or 0),
                top_p=float(options.pop("top_p", 1.0)),
                seed=number,
                heads=self.heads,
                stop=until,
            )
            requested.append(settings.request(prompt))
        if not requested:
            return []
        engine = self.model.engine(min(self.batch, len(requested)), prefill_budget=None)
        generations = [engine.submit(request) for request in requested]
        with Progress("outputs", len(requested), unit="requests") as bar:
            while engine.busy:
                bar.advance(sum(generation.finished for generation, _ in engine.step()))
        self.tokens += sum(generation.stats.tokens for generation in generations)
        self.passes += sum(generation.stats.passes for generation in generations)
        self.committed += sum(generation.stats.tokens + generation.stats.ends for generation in generations)
        return [generation.text for generation in generations]
