"""The Python API: load a model, generate, stream, compute logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.arguments import whole_number
from headstart.console import say
from headstart.data.prompts import Prompt, encode_prompt, split_prompts, turn_ends
from headstart.data.tokenizers import Tokenizer
from headstart.decoding.constraints import Constraint
from headstart.decoding.drafters.tree import parse_tree
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.generation import Generation, Stats
from headstart.decoding.kernels.backend import backend_of
from headstart.decoding.kernels.blocks import Quantize, parse_quantize
from headstart.decoding.kernels.pack import decoding_dtype, multiplies_blocks, pack
from headstart.decoding.policy.calibration import Tuning, read_tuning
from headstart.decoding.policy.online import Observations, OnlineCalibration
from headstart.decoding.policy.policy import DraftPolicy
from headstart.decoding.quantization_loss import QuantizationLoss, pack_and_measure
from headstart.decoding.settings import GenerationSettings, Penalties, Request, Sampling
from headstart.errors import UsageError
from headstart.fileio import regular
from headstart.formats.bundled import find_model
from headstart.formats.hub import local_path
from headstart.formats.registry import load_model_and_tokenizer
from headstart.hardware import release_freed_memory
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer

__all__ = ["Constraint", "GenerationSettings", "LanguageModel", "Output", "Penalties", "Request", "Sampling", "load"]

FROM_SETTINGS: Any = object()
"""Default of an argument that a settings object also holds."""


@dataclass
class Output:
    """One generated text."""

    text: str
    """Generated text, without the prompt and a stop string; "" for a model without a tokenizer."""
    tokens: list[int]
    """Generated token ids, without an end token."""
    finish_reason: str
    """Reason of the end: "end" (end token, or a satisfied constraint that allows nothing more), "stop" (stop string),
    "length", or "stuck" (the constraint allows no token of this model)."""
    origins: list[int]
    """Origin of each token: 1 for head 1, k for an accepted draft of head k, 0 where it was looked up, -1 where the
    constraint left no choice."""
    stats: Stats
    """Passes, acceptance and speed."""
    logprobs: list[float]
    """Log-probability of each token under the model, before penalties and temperature, if requested."""
    top_logprobs: list[list[tuple[int, float]]]
    """The most probable (token, log-probability) pairs at each token, best first, if requested."""
    prompt_logprobs: list[float]
    """Log-probability of each token of the prompt but the first, if requested."""
    prompt_top_logprobs: list[list[tuple[int, float]]]
    """The most probable pairs at each of these tokens, best first, if requested."""

    @classmethod
    def of(cls, generation: Generation) -> Output:
        """Return the output of a generation that has ended."""
        return cls(
            generation.text,
            generation.tokens,
            generation.finish_reason or "",
            generation.origins,
            generation.stats,
            generation.logprobs,
            generation.top_logprobs,
            generation.prompt_logprobs,
            generation.prompt_top_logprobs,
        )


class LanguageModel:
    """A model ready to decode, with its tokenizer. Made by `headstart.load`."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        directory: Path | None = None,
        quantize: Quantize | None = None,
        measure_loss: bool | str = False,
    ) -> None:
        """Put `model` into decoding form; `directory` holds what `headstart tune` measured of it, if anything did.

        For `quantize` and `measure_loss` see `load`.
        """
        self.config: ModelConfig = model.config
        self.quantization_loss: QuantizationLoss | None = None
        """Bits per token before and after quantizing, if they are measured."""
        if quantize and measure_loss and tokenizer is not None:
            text = measure_loss if isinstance(measure_loss, str) else None
            packed, self.quantization_loss = pack_and_measure(model, quantize, tokenizer, text)
        else:
            packed = pack(model, quantize=quantize)
        self.transformer = packed
        """The model itself, in decoding form."""
        self._tokenizer = tokenizer
        self._directory = directory
        self._tunings: dict[int, Tuning | None] = {}
        self._observations: dict[int, Observations] = {}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, with `encode(text)` and `decode(tokens)`. Raises UsageError if the model has none."""
        if self._tokenizer is None:
            raise UsageError("this model has no tokenizer; give prompts as lists of token ids")
        return self._tokenizer

    def engine(
        self,
        slots: int = 1,
        context: int | None = None,
        exact: bool = True,
        lookup: int = 0,
        prefill_budget: int | None = 256,
        prefix_reuse: bool = True,
        tree: int | str | None = None,
    ) -> Engine:
        """Return a decoding engine over this model, for many requests at once (docs/decoding.md).

        For the arguments see `EngineConfig`, for `tree` see `generate`. Raises UsageError where the caches do not fit
        into memory.
        """
        tuning = self._tuning()
        draft_tree = None
        if tree is not None:
            draft_tree = parse_tree(
                tree, self.config.heads, () if tuning is None else tuning.greedy.rank_mean, self.config.kind.one_cache
            )
            tuning = None if tuning is None else replace(tuning, tree=None)
        policy = self._untuned(tree, lookup) if tuning is None else DraftPolicy(tuning)
        return Engine(
            self.transformer,
            EngineConfig(
                slots=slots,
                context=context,
                exact=exact,
                lookup=lookup,
                prefill_budget=prefill_budget,
                prefix_reuse=prefix_reuse,
                tree=draft_tree,
            ),
            tokenizer=self._tokenizer,
            policy=policy,
        )

    def _untuned(self, tree: int | str | None, lookup: int) -> DraftPolicy | None:
        """Return a policy that calibrates itself while decoding.

        None where the rows of a pass change last bits: the output would depend on timings.
        """
        undrafted = self.config.heads == 1 and not lookup
        if tree is not None or undrafted or not backend_of(self.transformer).row_exact:
            return None
        observations = self._observations.setdefault(torch.get_num_threads(), Observations(self.transformer))
        return DraftPolicy(OnlineCalibration(observations))

    def _tuning(self) -> Tuning | None:
        """Return what `headstart tune` measured with the current number of threads."""
        threads = torch.get_num_threads()
        if threads not in self._tunings:
            directory = self._directory
            self._tunings[threads] = None if directory is None else read_tuning(directory, self.transformer)
        return self._tunings[threads]

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        max_new_tokens: int = FROM_SETTINGS,
        *,
        settings: GenerationSettings | None = None,
        exact: bool = True,
        lookup: int = 0,
        tree: int | str | None = None,
        **fields: Any,
    ) -> Output | list[Output]:
        """Continue a prompt, or a list of prompts as one ragged batch.

        Args:
            prompt: text, token ids (a list, an array or a tensor), or messages, [{"role": "user", "content": "..."}],
                which the model's chat template renders with the assistant's turn opened.
            max_new_tokens: most tokens to generate (default: as in `settings`, 256 without).
            settings: what to generate and how (None: the defaults of `GenerationSettings`).
            exact: whether the output is bit-identical for every `heads`; False takes the fastest shapes, equal up to
                rounding.
            lookup: most drafts of a pass to look up in the sequence itself, for models without drafting heads and
                outputs that repeat long pieces. The output does not depend on it.
            tree: draft trees with several candidates of each head: their number of drafts, or their nodes as
                "0,1,0.0" (see `DraftTree`), or of heads that draft step by step the sizes of dynamic trees as "4x3:8"
                (see `DynamicTree`); 0 for chains (None: the best shape that `headstart tune --tree-nodes` measured).
                The output does not depend on it.
            fields: fields of `GenerationSettings` by name, which replace those of `settings`: temperature, top_k,
                top_p, min_p, seed, heads, acceptance, penalties, constraint, logprobs, prompt_logprobs, stop,
                stop_tokens, ignore_ends, keep_stop.

        Returns:
            An Output, or a list of them for a list of prompts.

        Raises:
            UsageError: an empty prompt, one longer than the context, unknown tokens, unknown settings or settings out
                of range, a constraint that cannot be compiled or satisfied.
        """
        prompts, several = split_prompts(prompt)
        settings = _settings(settings, max_new_tokens, fields)
        requests = [self._request(one, settings, seed) for one, seed in zip(prompts, settings.seeds(len(prompts)))]
        engine = self._engine_for(requests, exact, lookup, tree)
        outputs = [Output.of(generation) for generation in generate_all(engine, requests)]
        return outputs if several else outputs[0]

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int = FROM_SETTINGS,
        *,
        settings: GenerationSettings | None = None,
        exact: bool = True,
        lookup: int = 0,
        tree: int | str | None = None,
        **fields: Any,
    ) -> Iterator[str]:
        """Yield the text of one prompt's output as it is committed, in whole characters; arguments as of `generate`."""
        _ = self.tokenizer
        request = self._request(prompt, _settings(settings, max_new_tokens, fields), None)
        engine = self._engine_for([request], exact, lookup, tree)
        engine.submit(request)
        return (text for _, text in engine.run() if text)

    def _request(self, prompt: Prompt, settings: GenerationSettings, seed: int | None) -> Request:
        return settings.request(
            encode_prompt(self._tokenizer, prompt), seed=seed, ends=turn_ends(self._tokenizer, prompt)
        )

    def _engine_for(self, requests: Sequence[Request], exact: bool, lookup: int, tree: int | str | None) -> Engine:
        """Return an engine with a slot for each request, and no more cache than they can fill."""
        longest = max((len(request.prompt) + request.max_new_tokens for request in requests), default=1)
        context = max(1, min(self.config.context, longest))
        return self.engine(len(requests), context, exact, lookup, prefill_budget=None, tree=tree)

    @torch.no_grad()
    def logits(self, tokens: Tensor | Sequence[Sequence[int]], heads: int | None = None) -> Tensor:
        """(B, T) int64 -> (B, T, K, V) logits of heads 1..K (None: all), entry k-1 predicting t+k; no gradient.

        Raises UsageError for tokens of another shape or type or beyond the vocabulary, and for heads out of range.
        """
        heads = self.config.heads if heads is None else whole_number("heads", heads, 1, self.config.heads)
        try:
            given = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError("the tokens are no table of ids; give rows of one length, as [[1, 2], [3, 4]]") from error
        if given.ndim != 2 or not given.numel() or given.dtype == torch.bool or given.is_floating_point():
            kind = f"{str(given.dtype).removeprefix('torch.')} of shape {tuple(given.shape)}"
            raise UsageError(f"the tokens are {kind}; give whole numbers of shape (batch, time), as [[1, 2], [3, 4]]")
        tokens_BT = given.to(self.transformer.device, torch.int64)
        for token in (int(tokens_BT.min()), int(tokens_BT.max())):
            if not 0 <= token < self.config.vocab_size:
                raise UsageError(
                    f"the tokens hold {token}; this model's vocabulary has {self.config.vocab_size} tokens"
                )
        return self.transformer(tokens_BT, heads=heads)


def _settings(settings: GenerationSettings | None, max_new_tokens: int, named: Mapping[str, Any]) -> GenerationSettings:
    length = {} if max_new_tokens is FROM_SETTINGS else {"max_new_tokens": max_new_tokens}
    return GenerationSettings.with_fields(settings, {**length, **named})


_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16, "float64": torch.float64}


def load(
    path: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    quantize: Quantize | None = None,
    heads: str | Path | None = None,
    measure_loss: bool | str = False,
) -> LanguageModel:
    """Load a model for decoding.

    Args:
        path: a directory that `headstart train` wrote, a Hugging Face model directory (docs/existing-models.md lists
            the families), a GGUF file, or the name OWNER/NAME of a model on the hub (None: the bundled model, a small
            byte-level model of Python code, models/README.md).
        dtype: "bfloat16", "float32", ... (None: as stored; float32 where a CPU would multiply that in software). On a
            CPU the quantized matrices of a GGUF file stay as they are unless a dtype is given.
        device: "cpu", "cuda", ...
        quantize: "q4" or "q8" puts the weights of all products in blocks of 4 or 8 bits and computes the rest in
            float32; for CPUs. The model is then a different one, close to the original (docs/decoding.md).
        heads: a directory of draft heads for this model, or its name on the hub (docs/heads.md); what `headstart tune`
            measures is kept in it.
        measure_loss: whether to measure the bits per token before and after quantizing, for
            `LanguageModel.quantization_loss`: on a short text of this package, or on the text given. A model without
            a tokenizer is not measured.

    Raises UsageError for a directory that is missing, foreign, truncated or of an unsupported kind, for `quantize` with
    another dtype or device, and for heads of another model.
    """
    if isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise UsageError(f"dtype {dtype!r} is unknown; take one of {', '.join(_DTYPES)}")
        dtype = _DTYPES[dtype]
    quantize = parse_quantize(quantize)
    path, heads = find_model(path, heads, report=False)
    heads = None if heads is None else local_path(heads)
    blocks = dtype is None and quantize is None and multiplies_blocks(device)
    model, tokenizer = load_model_and_tokenizer(path, dtype, device, heads, blocks)
    if dtype is None:
        model = model.to(decoding_dtype(model, quantize))
    loaded = LanguageModel(model, tokenizer, heads or path, quantize, measure_loss)
    release_freed_memory()
    return loaded


def _text_of(file: Path) -> str:
    try:
        return regular(file).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UsageError(f"--loss-text {file}: {error.strerror}; name a text file that you may read") from error


def load_and_report(
    path: str | Path | None,
    dtype: str | None,
    device: str,
    quantize: Quantize | None,
    heads: str | Path | None = None,
    loss_text: Path | None = None,
) -> LanguageModel:
    """Load a model as `load` does, for a command: the loss of quantizing is measured and reported in a line.

    `loss_text` is a file to measure it on (None: a short text of this package).
    """
    if quantize is None and loss_text is not None:
        raise UsageError("--loss-text is for --quantize; give both, or neither")
    measured = quantize is not None if loss_text is None else _text_of(loss_text)
    loaded = load(path, dtype, device, quantize, heads, measured)
    if quantize:
        loss = loaded.quantization_loss
        say(f"{quantize}: the model has no tokenizer, so the loss is not measured" if loss is None else str(loss))
    return loaded
