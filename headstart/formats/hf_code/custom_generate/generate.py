"""Decoding with all heads of a model that Headstart has written, several tokens per pass. Needs torch, transformers.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    model.generate(ids, max_new_tokens=100, do_sample=True, temperature=0.8)

A pass feeds the last token and the drafts of heads 2..n behind it. Head 1 verifies the drafts, and the pass keeps those
that are right, up to the first wrong one. The output is that of decoding with head 1: greedily token for token, up to
the rounding of logits. Sampling draws noise like transformers, once for each position, and drafts are made with the
noise of their own positions: after the same `torch.manual_seed` the tokens are those that `generate` of transformers
samples, in fewer passes.

Logits processors see, for each position, the tokens before it. Not supported: other ways of decoding (beams,
contrastive search, assistants), processors that keep state between calls, `prefix_allowed_tokens_fn`, your own stopping
criteria and streamers with several prompts, your own caches, and results of `return_dict_in_generate` other than
`sequences`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, StoppingCriteriaList, StopStringCriteria
from transformers.utils import ModelOutput

OTHER_WAYS = (
    *("penalty_alpha", "dola_layers", "constraints", "force_words_ids", "diversity_penalty"),
    *("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"),
)
"""Settings of other ways of decoding."""
PROCESSORS = (
    *("MinLength", "MinNewTokensLength", "RepetitionPenalty", "EncoderRepetitionPenalty", "NoRepeatNGram"),
    *("EncoderNoRepeatNGram", "SequenceBias", "NoBadWords", "PrefixConstrained", "ForcedBOSToken", "ForcedEOSToken"),
    *("InfNanRemove", "SuppressTokensAtBegin", "SuppressTokens", "Watermark"),
)
WARPERS = ("Temperature", "TopP", "TopK", "TopH", "MinP", "Typical", "Epsilon", "Eta")
STATELESS = {
    *(f"{name}LogitsProcessor" for name in PROCESSORS),
    *(f"{name}LogitsWarper" for name in WARPERS),
    *("ExponentialDecayLengthPenalty", "LogitNormalization"),
}
"""Processors of transformers that depend only on the tokens."""
ROW_BY_ROW = {"MaxLengthCriteria", "MaxTimeCriteria", "EosTokenCriteria", "StopStringCriteria"}
"""Stopping criteria of transformers that judge each sequence alone."""


@dataclass
class HeadstartOutput(ModelOutput):
    """The result of `return_dict_in_generate=True`."""

    sequences: Tensor | None = None
    """(B, length): prompts and generated tokens, padded at the end."""
    passes: int | None = None
    """Number of passes after the one over the prompt."""


def generate(
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    model: Any,
    heads: int | None = None,
    custom_generate: Any = None,
    trust_remote_code: bool | None = None,
    **options: Any,
) -> Any:
    """Generate like transformers with `heads` heads (None: all; 1: one token per pass, the same output)."""
    if custom_generate is not None:  # a way of decoding that the caller names
        options |= {"custom_generate": custom_generate, "trust_remote_code": trust_remote_code}
        options |= {} if heads is None else {"heads": heads}
        return GenerationMixin.generate(model, inputs, generation_config, **options)
    if not hasattr(model, "head_logits"):
        raise ValueError("this model was loaded without its heads; load it with trust_remote_code=True")
    if options.get("assistant_model") is not None:
        raise ValueError("the heads of the model draft; leave assistant_model out")
    if options.get("position_ids") is not None:
        raise ValueError("position_ids: decoding with heads counts positions itself; leave it out")
    if options.get("token_healing", getattr(generation_config or model.generation_config, "token_healing", False)):
        raise ValueError("token_healing: decoding with heads takes prompts as they are; leave it out")
    tokenizer, stop_strings = options.pop("tokenizer", None), options.pop("stop_strings", None)
    if stop_strings is not None:
        criteria = list(options.pop("stopping_criteria", None) or [])
        criteria.append(StopStringCriteria(stop_strings=stop_strings, tokenizer=tokenizer))
        options["stopping_criteria"] = StoppingCriteriaList(criteria)
    constrained = options.get("prefix_allowed_tokens_fn") is not None
    decode = partial(_decode, heads=heads, constrained=constrained, stream=options.get("streamer"))
    return GenerationMixin.generate(model, inputs, generation_config, custom_generate=decode, **options)


def _decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    heads: int | None = None,
    constrained: bool = False,
    stream: Any = None,
    **more: Any,
) -> Any:
    """Run the decoding loop on what transformers has prepared. `more` holds arguments of `forward`."""
    n = model.settings.heads if heads is None else heads
    if not 1 <= n <= model.settings.heads:
        raise ValueError(f"heads is {n}; it must lie between 1 and the {model.settings.heads} of this model")
    _refuse(input_ids, generation_config, constrained, more)
    _refuse_objects(len(input_ids), n, logits_processor, stopping_criteria, stream)
    batch = _Batch(model, input_ids, more.get("attention_mask"), logits_processor, generation_config, n)
    passes = 0  # after the one over the prompt
    index_BW = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    while True:
        for b, tokens in enumerate(batch.step(index_BW, prompt=passes == 0)):
            for token in tokens:
                batch.text[b, batch.ends[b]] = token
                batch.ends[b] += 1
                if stream is not None:
                    stream.put(token.reshape(1).cpu())
                if bool(stopping_criteria(batch.text[b : b + 1, : batch.ends[b]], None).all()):
                    batch.running[b] = False
                    break
        if not any(batch.running):
            break
        batch.draft()
        # The next window: the last token, and the drafts behind it.
        last_B1 = torch.tensor(batch.ends, device=input_ids.device)[:, None] - 1
        index_BW = last_B1 + torch.arange(n, device=input_ids.device)
        passes += 1
    if stream is not None:
        stream.end()
    length, pad_token = max(batch.ends), generation_config._pad_token_tensor
    sequences = batch.text[:, :length].clone()
    for b, end in enumerate(batch.ends):
        sequences[b, end:] = 0 if pad_token is None else pad_token
    return HeadstartOutput(sequences, passes) if generation_config.return_dict_in_generate else sequences


class _Batch:
    """Sequences in generation, each of its own length. Indices count from the start of the padded prompt."""

    def __init__(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor | None, processors: Any, config: Any, n: int
    ) -> None:
        B, self.start = input_ids.shape
        self.model, self.n, self.processors = model, n, processors
        # With one token per pass of one sequence, processors are called like in transformers, and may keep state.
        self.watched = [] if n == B == 1 else _may_keep_state(processors)
        self.state = _state(self.watched)
        self.sampled = config.do_sample
        room = config.max_length + n
        self.text = torch.zeros(B, room, dtype=torch.long, device=input_ids.device)
        self.text[:, : self.start] = input_ids
        self.ends = [self.start] * B
        """Length of each sequence, prompt and padding included."""
        self.running = [True] * B
        self.pad_B = torch.zeros(B, dtype=torch.long, device=input_ids.device)
        if attention_mask is not None:
            self.pad_B = (attention_mask == 0).sum(-1)
        modeling = sys.modules[type(model).__module__]
        self.rows = partial(modeling.Rows, model, pad_B=self.pad_B)
        self.cache = modeling.Cache(model, B, room)
        self.noise: dict[int, Tensor] = {}
        self.drawn = 0  # steps of noise so far
        self.sequential = model.settings.head_kind == "sequential"
        self.latents: dict[int, Tensor] = {}
        """Latents (B, D) of heads 2..n at the last accepted rows."""
        self.trunk_BSD = None
        """For sequential heads, the trunk's latents of all rows so far."""

    def step(self, index_BW: Tensor, prompt: bool) -> list[list[Tensor]]:
        """Run a pass over the tokens at `index`, prompts or windows, and return the tokens that each sequence gains.

        A sequence that has ended gains none.
        """
        model, (B, W) = self.model, index_BW.shape
        rows = self.rows(index_BW, reach=int(index_BW.max()))
        latents = {0: model.trunk(self.text.gather(1, index_BW), rows, self.cache)}
        for k in [1] if self.sequential else range(1, self.n + 1):
            for step in model.path(k):
                if step not in latents:
                    latents[step] = model.head(step, latents[model.parents[step]], rows, self.cache)
        # Only the last row of a prompt gives a token; every row of a window may.
        first = W - 1 if prompt else 0
        scores_BWV = model.unembed(latents[1][:, first:], 1).float()
        came: list[list[Tensor]] = []
        accepted = []
        for b in range(B):
            tokens: list[Tensor] = []
            for row in range(first, W if self.running[b] else first):
                place = int(index_BW[b, row]) + 1
                tokens.append(self.choose(scores_BWV[b, row - first], b, place))
                if row + 1 == W or tokens[-1] != self.text[b, place]:
                    break
            accepted.append(first + max(len(tokens), 1) - 1)
            came.append(tokens)
        at_B = torch.tensor(accepted, device=index_BW.device)
        every = torch.arange(B, device=index_BW.device)
        self.latents = {k: latents[k][every, at_B] for k in latents if k}
        self.last_B = index_BW[every, at_B]
        if self.sequential:
            if self.trunk_BSD is None:
                self.trunk_BSD = latents[0].new_zeros(B, self.text.shape[1] + 1, latents[0].shape[-1])
            self.trunk_BSD[every[:, None], rows.slot_BW] = latents[0]
            self.fresh = W if prompt else self.n
        self._forget_noise()
        return came

    def draft(self) -> None:
        """Append the drafts of heads 2..n to the sequences."""
        if self.sequential and self.n > 1:
            self._draft_in_turn()
            return
        for k in range(2, self.n + 1):
            scores_BV = self.model.unembed(self.latents[k], k).float()
            self._put(k, scores_BV)

    def _put(self, k: int, scores_BV: Tensor) -> None:
        for b, last in enumerate(self.last_B.tolist()):
            if self.running[b]:
                self.text[b, last + k] = self.choose(scores_BV[b], b, last + k)

    def _draft_in_turn(self) -> None:
        """Draft with sequential heads, one after the other, because each reads the token of the one before.

        The last n rows are computed anew: rows that are new since the last pass, or whose heads read a draft. Rows
        before them have read accepted tokens.
        """
        index_BW = self.last_B[:, None] + torch.arange(1 - self.fresh, 1, device=self.last_B.device)
        rows = self.rows(index_BW, reach=int(index_BW.max()))
        every_B1 = torch.arange(len(index_BW), device=index_BW.device)[:, None]
        latent_BWD = self.trunk_BSD[every_B1, rows.slot_BW]
        for k in range(2, self.n + 1):
            ahead_BW = self.text.gather(1, (index_BW + k - 1).clamp(min=0))
            latent_BWD = self.model.head(k, latent_BWD, rows, self.cache, ahead_BW)
            self._put(k, self.model.unembed(latent_BWD[:, -1], k).float())

    def choose(self, scores_V: Tensor, b: int, place: int) -> Tensor:
        """Return the token of sequence b at index `place`, by scores of head 1 or of a drafting head."""
        if len(self.processors):
            # Processors may depend on the number of sequences: they get all, and the row of this one is used.
            shown_BV = scores_V.expand(len(self.text), -1).clone()
            random = torch.get_rng_state() if self.watched else None
            scores_V = self.processors(self.text[:, :place], shown_BV)[b]
            if random is not None:
                _refuse_changes(self.watched, self.state, random)
        if not self.sampled:
            return scores_V.argmax()
        return (scores_V.softmax(-1) / self._noise(place - self.start, scores_V)[b]).argmax()

    def _noise(self, step: int, like_V: Tensor) -> Tensor:
        """Return the noise (B, V) of torch.multinomial in step `step` of decoding one token per pass."""
        while self.drawn <= step:
            self.noise[self.drawn] = like_V.new_empty(len(self.text), len(like_V)).exponential_()
            self.drawn += 1
        return self.noise[step]

    def _forget_noise(self) -> None:
        first = min(end for end, running in zip(self.ends, self.running) if running) - self.start
        self.noise = {step: noise for step, noise in self.noise.items() if step >= first}


def _refuse(input_ids: Tensor, config: Any, constrained: bool, more: dict[str, Any]) -> None:
    if input_ids.shape[1] == 0 or more.get("inputs_embeds") is not None:
        raise ValueError("give the prompt as input_ids, one token at least")
    if config.num_beams > 1:
        raise ValueError("num_beams: decoding with heads writes one text; take num_beams=1")
    for name in OTHER_WAYS:
        if getattr(config, name, None):
            raise ValueError(f"{name}: decoding with heads knows greedy text and sampling; leave it out")
    if (getattr(config, "num_beam_groups", None) or 1) > 1 or config.cache_implementation == "quantized":
        raise ValueError("num_beam_groups and quantized caches: decoding with heads has neither; leave them out")
    if constrained and len(input_ids) > 1:
        raise ValueError("prefix_allowed_tokens_fn: give one prompt at a time")
    if config.output_scores or config.output_logits or config.output_attentions or config.output_hidden_states:
        raise ValueError("decoding with heads keeps no scores, logits, attentions or hidden states; leave them out")
    past, mask = more.get("past_key_values"), more.get("attention_mask")
    if past is not None and past.get_seq_length() > 0:
        raise ValueError("past_key_values: decoding with heads keeps its own; leave it out")
    if mask is not None and bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise ValueError("attention_mask: pad prompts on the left")


def _refuse_objects(B: int, n: int, processors: Any, criteria: Any, stream: Any) -> None:
    """Refuse objects whose calls would differ from those in transformers."""
    for processor in processors:
        if _of_transformers(processor) and type(processor).__name__ not in STATELESS and not n == B == 1:
            raise ValueError(f"{type(processor).__name__}: {_KEEPS_STATE}")
    for criterion in criteria if B > 1 else []:
        if not (_of_transformers(criterion) and type(criterion).__name__ in ROW_BY_ROW):
            raise ValueError(f"{type(criterion).__name__}: sequences end one by one here; give one prompt at a time")
    if stream is not None and B > 1:
        raise ValueError("streamer: give one prompt at a time")


_KEEPS_STATE = "it keeps state, and drafts change its calls; take one prompt and heads=1, or leave it out"
ATTRIBUTES = ("__dict__", "__self__", "__closure__", "cell_contents", "__defaults__")


def _of_transformers(thing: Any) -> bool:
    return type(thing).__module__.partition(".")[0] in ("transformers", "tokenizers")


def _may_keep_state(processors: Any) -> list[Any]:
    """Return the processors, or functions in them, that are not of transformers."""
    things = [getattr(processor, "_prefix_allowed_tokens_fn", processor) for processor in processors]
    return [thing for thing in things if not _of_transformers(thing)]


def _refuse_changes(watched: list[Any], state: Any, random: Tensor) -> None:
    """Refuse processors whose state has changed, or that drew random numbers."""
    if _state(watched) != state or not torch.equal(torch.get_rng_state(), random):
        names = ", ".join(getattr(thing, "__name__", type(thing).__name__) for thing in watched)
        raise ValueError(f"logits processor {names}: {_KEEPS_STATE}")


def _state(thing: Any, depth: int = 6) -> Any:
    """Return the state of `thing` in a form for comparison."""
    if isinstance(thing, Tensor):
        return id(thing), thing._version
    if depth == 0 or isinstance(thing, (torch.nn.Module, type)) or _of_transformers(thing):
        return id(thing)
    if isinstance(thing, dict):
        return [(repr(key), _state(value, depth - 1)) for key, value in thing.items()]
    if isinstance(thing, (list, tuple)):
        return [_state(each, depth - 1) for each in thing]
    parts = [getattr(thing, name, None) for name in ATTRIBUTES]
    if all(part is None for part in parts):
        return repr(thing)
    return [id(thing), *(_state(part, depth - 1) for part in parts)]
