"""Outputs of a frozen model for every row, stored before the first step: heads that are trained alone read them.

Stored are the output of the trunk, and for heads that learn from head 1 its most probable tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.console import Progress, say
from headstart.data.batches import BatchStream
from headstart.data.mixture import Source
from headstart.data.shards import TokenShards
from headstart.decoding.kernels.pack import multiplies_blocks, pack
from headstart.errors import UsageError
from headstart.formats.hub import SUFFIX
from headstart.formats.registry import load_model
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer, compute_dtype
from headstart.objective.inputs import LikelyTokens, StepInputs, Teacher
from headstart.training.adapt.hidden_states import HiddenStates
from headstart.training.config import RunConfig
from headstart.training.step import autocast

LIKELY = 64
"""Tokens that are stored of head 1's distribution. Together they have nearly all of its probability."""


class StoredOutputs:
    """The stored outputs for the rows of all sources, validation included."""

    def __init__(
        self,
        model: Transformer,
        config: RunConfig,
        digests: Mapping[str, str],
        sources: Sequence[Source],
        progress: Callable[..., Progress],
    ) -> None:
        """Compute what is missing.

        Args:
            model: the frozen model, with new heads.
            config: the run.
            digests: of the model's files.
            sources: the data.
            progress: makes progress bars.

        Raises:
            UsageError: the outputs would take too much room.
        """
        assert config.adapt is not None and config.adapt.cache_states is not None
        self._model, self._config, self._progress = model, config, progress
        self._splits = [source.train for source in sources]
        self._splits += [source.validation for source in sources if source.validation is not None]
        streams = [self._stream(split, needed=i < len(sources)) for i, split in enumerate(self._splits)]
        rows = [0 if stream is None else stream.rows_of[0] for stream in streams]
        blocks = _reads_blocks(config, str(model.device))
        origin: dict[str, Any] = {
            "model": dict(digests),
            "trunk_layers": config.model.trunk_layers,
            "data": [_content(split) for split in self._splits],
            "products": config.dtype,
            "weights": "packed blocks" if blocks else config.adapt.frozen_dtype,
            "attention_within_documents": config.data.attention_within_documents,
            **({"handed_out": list(config.model.handed_out)} if config.model.handed_out else {}),
        }

        def read(compute: Callable[[StepInputs], Tensor]) -> Callable[[int, int, int], Tensor]:
            def of_rows(source: int, first: int, stop: int) -> Tensor:
                stream = streams[source]
                assert stream is not None
                return compute(self._inputs(stream, source, first, stop))

            return of_rows

        dtype = torch.bfloat16 if config.in_bfloat16 else torch.float32
        folder, dim = config.adapt.cache_states, config.model.state_dim
        self._states = HiddenStates(folder, origin, rows, config.length, dim, dtype)
        self._say_size(sum(rows), sum(rows[: len(sources)]))
        if sum(self._states.done()) < sum(rows):
            self._reader = _block_reader(config.adapt.model, config.model) if blocks else model
            self._fill("hidden states", self._states, read(self._trunk_output), sum(rows))
            self._reader = model
        self._likely: HiddenStates | None = None
        if config.loss.heads != "cross-entropy":
            d2t = model.unembedding.d2t
            origin["likely"] = [LIKELY, None if d2t is None else hashlib.sha256(d2t.numpy().tobytes()).hexdigest()]
            width = 2 * min(LIKELY, config.model.drafted_tokens)
            self._likely = HiddenStates(folder, origin, rows, config.length, width, torch.float32)
            self._fill("likely tokens", self._likely, read(self._likely_tokens), sum(rows))

    def add(self, inputs: StepInputs, split: TokenShards | None = None) -> StepInputs:
        """Add the stored outputs to rows of the training data, or of a validation split."""
        assert inputs.places is not None
        device, places = inputs.tokens.device, inputs.places
        if split is not None:
            places = places + torch.tensor([self._splits.index(split), 0])
        # The trunk's residual stream is in the dtype of its weights.
        z_BTD = self._states.of(places).to(device, self._model.trunk.embedding.weight.dtype)
        likely = None
        if self._likely is not None:
            ids, p = self._likely.of(places).to(device).chunk(2, -1)
            likely = LikelyTokens(ids.long(), p)
        return replace(inputs, z=z_BTD, likely=likely)

    def _stream(self, split: TokenShards, needed: bool) -> BatchStream | None:
        """Return the rows of a split in order, or None if it is too short for one and not `needed`."""
        config = self._config
        try:
            return BatchStream(
                split, rows=1, length=config.length, heads=config.model.offset_of_heads, seed=0, shuffle=False
            )
        except UsageError:
            if needed:
                raise
            return None

    def _inputs(self, stream: BatchStream, source: int, first: int, stop: int) -> StepInputs:
        """Return some rows of a split."""
        stream.load_state_dict({"epoch": 0, "row": first})
        batches = [next(stream) for _ in range(stop - first)]
        return StepInputs(
            torch.cat([batch.tokens for batch in batches]),
            torch.cat([batch.targets for batch in batches]),
            torch.cat([batch.documents for batch in batches]),
            self._config.data.attention_within_documents,
            torch.tensor([[source, row] for row in range(first, stop)]),
        ).to(self._model.trunk.embedding.weight.device)

    @torch.no_grad()
    def _trunk_output(self, inputs: StepInputs) -> Tensor:
        """Return what the heads read."""
        if self._reader is not self._model:
            return self._reader.latents(inputs.tokens, [])[0]
        within = inputs.documents if inputs.attention_within_documents else None
        with autocast(self._config, inputs.tokens.device):
            return self._model.latents(inputs.tokens, [], within)[0]

    @torch.no_grad()
    def _likely_tokens(self, inputs: StepInputs) -> Tensor:
        """Return the tokens and their probabilities as one tensor (B, T, 2 x LIKELY); float32 holds all ids."""
        assert inputs.places is not None
        model = self._model
        z_BTD = self._states.of(inputs.places).to(inputs.tokens.device, model.trunk.embedding.weight.dtype)
        with autocast(self._config, inputs.tokens.device):
            attend, positions = inputs.attention()
            rotary = model.rotary(positions, compute_dtype(model.trunk.embedding.weight))
            teacher = Teacher.of_latents(model, z_BTD, rotary, attend).among(model.unembedding.d2t)
        likely = LikelyTokens.of(teacher, LIKELY)
        return torch.cat([likely.ids.float(), likely.p], -1)

    def _fill(self, name: str, states: HiddenStates, read: Callable[[int, int, int], Tensor], rows: int) -> None:
        assert self._config.adapt is not None
        states.check_room(int(self._config.adapt.cache_gib * 2**30))
        if missing := rows - sum(states.done()):
            with self._progress(name, missing, unit="rows") as bar:
                states.fill(read, self._config.batch.rows, bar.advance)

    def _say_size(self, rows: int, of_training: int) -> None:
        config, states = self._config, self._states
        visits = config.steps * config.tokens_per_step / (of_training * config.length)
        say(
            f"hidden states of {rows:,} rows in {config.dtype}, {states.bytes / 2**30:,.2f} GiB in {states.folder}; "
            f"this run reads each {visits:.1f} times" + ("" if visits > 1 else ", so storing them saves nothing")
        )


def _block_reader(file: Path, config: ModelConfig) -> Transformer:
    """Return a model in blocks whose trunk is that of `config`, the model with the new heads."""
    reader = load_model(file, torch.float32, blocks=True)
    if reader.config.trunk_layers < config.trunk_layers:  # it counts the last block as its head 1
        reader.trunk.blocks.append(reader.head(1))
    reader.trunk.handed_out = config.handed_out
    return pack(reader)


def _content(split: TokenShards) -> list[Any]:
    """Return what the rows of a split hold, without the name that its text had: digests of tokens and documents."""
    summary = split.manifest["splits"][split.split]
    return [[shard["sha256"], shard.get("targets")] for shard in summary["shards"]] + [summary["starts"]["sha256"]]


def _reads_blocks(config: RunConfig, device: str) -> bool:
    """Say whether states come from the blocks of a GGUF file: made faster, and those of decoding."""
    assert config.adapt is not None
    within = config.data.attention_within_documents
    return config.adapt.model.suffix == SUFFIX and not within and multiplies_blocks(device)
