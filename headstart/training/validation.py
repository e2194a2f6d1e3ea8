"""Validation: what every head knows about held-out documents, and a sample that the model writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from headstart.console import say
from headstart.data.batches import IGNORE, Batch, evaluation_batches
from headstart.data.mixture import Source
from headstart.data.shards import TokenShards
from headstart.data.tokenizers import Tokenizer, prompt_ids
from headstart.decoding.engine import Engine, EngineConfig, generate_all
from headstart.decoding.generation import Stats
from headstart.decoding.kernels.pack import pack
from headstart.decoding.settings import Request
from headstart.errors import UsageError
from headstart.model.transformer import TRAINING_ALONE, Transformer
from headstart.objective.inputs import StepInputs, count_targets
from headstart.objective.walk import score_step
from headstart.training.auxiliary.base import StepAuxiliaries
from headstart.training.config import RunConfig
from headstart.training.processes import Processes
from headstart.training.step import autocast


def long_enough(sources: Sequence[Source], config: RunConfig) -> list[Source]:
    """Return the sources whose held-out documents fill one row; a line reports each of the others."""
    found = []
    for source in sources:
        if source.validation is None:
            say(f"{source.train.directory}: has no validation documents, so it is left out of validation")
            continue
        try:
            evaluation_batches(
                source.validation, rows=1, length=config.length, heads=config.model.offset_of_heads, limit_rows=1
            )
        except UsageError as error:
            say(f"left out of validation: {error}")
            continue
        found.append(source)
    if not found:
        say("nothing is validated")
    return found


Complete = Callable[[StepInputs, TokenShards], StepInputs]
"""Adds to rows of a validation split what the trained model knows about them."""


def validate_sources(
    model: Transformer,
    sources: Sequence[Source],
    config: RunConfig,
    processes: Processes,
    complete: Complete = lambda inputs, split: inputs,
) -> dict[str, float]:
    """Return the scores of `validate` for the mixture as a whole, and with several sources also validation/NAME/...

    Every source is scored on `config.validation.rows` rows of its own, so that a rare one is measured as well as the
    others. The whole is their mean by weight: the score of rows taken in proportion to weight, with less noise. Bits
    per byte of the whole are all nats over all bytes of such rows.
    """
    scores = [
        (source, source.validation.bytes_per_token, validate(model, source.validation, config, processes, complete))
        for source in sources
        if source.validation is not None
    ]
    if len(config.data.prepared) <= 1:
        return scores[0][-1]
    whole: dict[str, float] = {}
    # A head has no target in a source whose documents are all short.
    for name in dict.fromkeys(name for *_, record in scores for name in record):
        scored = [(source.weight, size, record) for source, size, record in scores if name in record]
        total = sum(weight for weight, _, _ in scored)
        whole[name] = sum(weight * record[name] for weight, _, record in scored) / total
        if "/bits_per_byte/" in name:
            nats = name.replace("/bits_per_byte/", "/loss/")
            bytes_per_token = sum(weight * size for weight, size, _ in scored) / total
            whole[name] = whole[nats] / math.log(2) / bytes_per_token
    for source, _, record in scores:
        whole |= {key.replace("validation", f"validation/{source.name}", 1): value for key, value in record.items()}
    return whole


def validate(
    model: Transformer,
    shards: TokenShards,
    config: RunConfig,
    processes: Processes,
    complete: Complete = lambda inputs, split: inputs,
) -> dict[str, float]:
    """Return validation/loss/headK (nats per token), validation/bits_per_byte/headK and validation/top1/headK.

    Auxiliary losses are validation/loss/NAME. Sums and counts are added over all rows and processes and divided once.
    A head or loss without targets is left out, and so is a head 1 that never changes. Targets outside a draft
    vocabulary have no loss, and are no hits. A model that is trained without its own answers is scored without them.
    """
    first = 2 if config.adapt is not None and config.adapt.mode == "heads" else 1
    n = config.model.heads
    totals = torch.zeros(
        4, n + 1 - first, dtype=torch.float64, device=processes.device
    )  # loss, hits, those with a loss, targets
    found = evaluation_batches(
        shards,
        rows=config.batch.rows,
        length=config.length,
        heads=config.model.offset_of_heads,
        limit_rows=config.validation.rows,
    )
    micro_batches = [_inputs_of(batch, config).to(processes.device) for batch in _shared_out(found, processes)]
    next_tokens = processes.sum(count_targets(torch.cat([inputs.targets for inputs in micro_batches]))[0])
    auxiliaries = StepAuxiliaries(config.auxiliaries, model, micro_batches, next_tokens, processes)
    for inputs in micro_batches:
        with autocast(config, processes.device):
            scores = score_step(model, complete(inputs, shards), auxiliaries.losses, first)
        sums = [torch.stack([s.loss.double(), s.correct, s.count]) for s in scores]
        totals += torch.cat([torch.stack(sums, dim=1), count_targets(inputs.targets)[None, first - 1 :]])
    record: dict[str, float] = {}
    for k, (loss, correct, count, targets) in enumerate(processes.sum(totals).T.tolist(), start=first):
        if count:
            record[f"validation/loss/head{k}"] = loss / count
            record[f"validation/bits_per_byte/head{k}"] = loss / count / math.log(2) / shards.bytes_per_token
            record[f"validation/top1/head{k}"] = correct / targets
    more = {f"validation/loss/{method}": loss for method, loss in auxiliaries.means().items()}
    return record | {name: loss for name, loss in more.items() if math.isfinite(loss)}


def _inputs_of(batch: Batch, config: RunConfig) -> StepInputs:
    """Return the rows as the trained model is meant to read them."""
    within = config.data.attention_within_documents
    inputs = StepInputs.of_batch(batch, config.model.ahead, attention_within_documents=within)
    for auxiliary in config.auxiliaries:
        inputs = auxiliary.validation_inputs(inputs)
    return inputs


def _shared_out(batches: Iterable[Batch], processes: Processes) -> Iterator[Batch]:
    """Yield this process's batches.

    Every process gets the same number, because each pass gathers weights from all; at the end some get a batch without
    targets.
    """
    batches = iter(batches)
    while group := list(islice(batches, processes.count)):
        if processes.rank < len(group):
            yield group[processes.rank]
        else:
            yield replace(group[0], targets=torch.full_like(group[0].targets, IGNORE))


Prompts = list[tuple[int, ...]]


def sample_prompts(sources: Sequence[Source], tokenizer: Tokenizer, config: RunConfig) -> Prompts:
    """Return the prompts of the sample as token ids: beginnings of held-out documents, or `watch.sample_prompt`.

    Documents are spread over the validation splits. Raises UsageError for a prompt that fills the context: call it at
    the start.
    """
    wanted, splits = config.watch.sample_documents, [each.validation for each in sources if each.validation is not None]
    room = config.model.context - config.watch.sample_tokens
    prompts: Prompts = []
    for place, split in enumerate(splits):
        share = (wanted - len(prompts)) // (len(splits) - place)
        found = (_beginning(split, index) for index in _spread(len(split.documents)))
        prompts += islice((prompt for prompt in found if 0 < len(prompt) < room), share)
    return prompts or [_prompt_tokens(tokenizer, config)]


def _spread(count: int) -> Iterator[int]:
    """Yield 0 .. count - 1 once each, such that the first few lie far apart."""
    stride = max(1, round(count * 0.618))
    while math.gcd(stride, count) > 1:
        stride += 1
    yield from (index * stride % count for index in range(count))


def _beginning(split: TokenShards, index: int) -> tuple[int, ...]:
    """Return a document up to its first target in a conversation, or a quarter of it."""
    document = split.document(index)
    length = len(document) // 4
    if split.targets is not None:
        begin = int(split.documents[index])
        length = int(np.argmax(split.targets[begin : begin + len(document)]))
    return tuple(document[:length].tolist())


def _prompt_tokens(tokenizer: Tokenizer, config: RunConfig) -> tuple[int, ...]:
    prompt = tuple(prompt_ids(tokenizer, config.watch.sample_prompt)) or (tokenizer.end_id,)
    if len(prompt) >= config.model.context:
        raise UsageError(
            f"watch.sample_prompt has {len(prompt)} tokens, model.context is {config.model.context}; shorten the prompt"
        )
    return prompt


def decode_sample(model: Transformer, tokenizer: Tokenizer, prompts: Prompts, config: RunConfig) -> dict[str, Any]:
    """Decode `watch.sample_tokens` tokens greedily with all heads, in the dtype of training, on the device of `model`.

    Each of the `prompts` is continued.

    `model` must be whole (not sharded). It is only read: a second module over the same numbers decodes, so weights,
    gradients, mode and the random state stay as they are. In float32 on a GPU the module shares the memory of the
    weights; elsewhere it takes one copy of them in the dtype of decoding.

    Returns the first text, and over all outputs tokens, passes, tokens_per_pass and acceptance (of heads 2..n): the key
    `sample` of metrics.jsonl.
    """
    dtype = torch.bfloat16 if config.in_bfloat16 else torch.float32
    with torch.device("meta"):
        twin = Transformer(model.config)
    decoding = {name: w for name, w in model.state_dict().items() if name not in TRAINING_ALONE}
    twin.load_state_dict(decoding, assign=True)
    twin = twin.to(dtype)
    # Compiled kernels and fixed shapes do not pay for so few tokens.
    packed = pack(twin, compiled=False)
    new_tokens = config.watch.sample_tokens
    context = min(config.model.context, max(map(len, prompts)) + new_tokens)
    engine = Engine(packed, EngineConfig(len(prompts), context, exact=False), tokenizer=tokenizer)
    outputs = generate_all(engine, [Request(prompt, new_tokens) for prompt in prompts])
    stats = Stats.summed([output.stats for output in outputs])
    return {
        "text": outputs[0].text,
        "tokens": stats.tokens,
        "passes": stats.passes,
        "tokens_per_pass": stats.tokens_per_pass,
        "acceptance": stats.acceptance,
    }


def describe_sample(sample: dict[str, Any]) -> str:
    """Return a line with the tokens per pass and the start of the text."""
    text = repr(sample["text"])[1:-1]
    text = text if len(text) <= 80 else text[:80] + "..."
    return f"sample, {sample['tokens_per_pass']:.2f} tokens per pass: {text}"
