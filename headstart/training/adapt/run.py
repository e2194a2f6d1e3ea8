"""A run on an existing model: its new heads, its frozen parameters, and the checks of its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headstart.console import Progress, say
from headstart.data.mixture import Source
from headstart.data.shards import TokenShards
from headstart.data.tokenizers import TOKENIZER_FILE, PretrainedTokenizer, Tokenizer
from headstart.errors import UsageError
from headstart.fileio import read_json, sha256_of, write_text
from headstart.formats.generation_config import keep_generation
from headstart.formats.heads import save_heads
from headstart.formats.hub import SUFFIX, name_of
from headstart.formats.huggingface import save_model
from headstart.formats.registry import format_at, load_config, load_dtype, load_model, load_model_tokenizer
from headstart.model.config import ModelConfig
from headstart.model.transformer import Transformer
from headstart.objective.inputs import StepInputs, Teacher
from headstart.training import checkpoints
from headstart.training.adapt.config import AdaptConfig
from headstart.training.adapt.draft_vocabulary import most_frequent
from headstart.training.adapt.lora import Lora
from headstart.training.adapt.new_heads import HEAD_FIELDS, config_with_heads, freeze, new_parameters, with_heads
from headstart.training.adapt.stored_outputs import StoredOutputs
from headstart.training.config import RunConfig
from headstart.training.new_model import blocks_compiled, build_model
from headstart.training.parallel import parallelize, whole_model
from headstart.training.processes import Processes
from headstart.training.schedule import stage_of

SOURCE_FILE = "source.json"
"""File in the run folder: digests of the existing model when the run began."""


class ExistingModel:
    """A model with new heads on it, and what a step on it needs in addition to the rows."""

    def __init__(
        self,
        config: RunConfig,
        processes: Processes,
        sources: Sequence[Source],
        progress: Callable[..., Progress] = Progress,
    ) -> None:
        """Load the model and add the heads; store the trunk's hidden states if the run reads stored ones.

        Several processes share the weights as for a new model; the first one reads the existing model.

        Raises UsageError if the model is missing, if `config.model` did not grow from it, if it has changed since the
        run began, if `sources` use another tokenizer, and for several processes if some weights are not trained.
        """
        assert config.adapt is not None
        self._config, self._adapt, self._processes = config, config.adapt, processes
        adapt = config.adapt

        def check() -> None:
            check_vocabulary(sources, adapt.model, config.model.vocab_size)
            check_processes(config, processes.count)
            check_shape(load_config(adapt.model), config)
            check_unchanged(adapt.model, config.run_dir)

        processes.on_main(check)
        self.stored_dtype = load_dtype(adapt.model)
        """Dtype of the existing model's files."""
        check_frozen_dtype(config, self.stored_dtype)
        self._original: Transformer | None = None
        self._stored: StoredOutputs | None = None
        self.lora: Lora | None = None
        if processes.count > 1:

            def read() -> dict[str, Tensor]:
                return dict(with_heads(load_model(adapt.model), config.model, config.seed).state_dict())

            self.model, self.sums = build_model(config, processes, read)
            self.heads, self._trained = new_parameters(self.model), {name for name, _ in self.model.named_parameters()}
        else:
            self._build_alone(sources, progress)

    def _build_alone(self, sources: Sequence[Source], progress: Callable[..., Progress]) -> None:
        """Build the model of a run of one process, which may leave weights frozen."""
        config, adapt, processes = self._config, self._adapt, self._processes
        old = load_model(adapt.model)
        d2t = _draft_vocabulary(config.model, sources)
        model = with_heads(old.to(getattr(torch, adapt.frozen_dtype)), config.model, config.seed, d2t)
        del old
        self.model = model.to(processes.device)
        self.heads = new_parameters(self.model)
        """Names of the parameters of the new heads."""
        self._trained, self.lora = trained_parameters(self.model, adapt, config.seed)
        freeze(self.model, self._trained)
        if adapt.self_distilled and self.lora is None:
            self._original = load_model(adapt.model).to(device=processes.device, dtype=torch.float32)
            self._original.requires_grad_(False)
        if adapt.cache_states is not None:
            self._stored = StoredOutputs(self.model, config, digests(adapt.model), sources, progress)
        torch.manual_seed(config.seed)
        compile = blocks_compiled(config, processes)
        self.sums = parallelize(self.model, None, config.parallel, compile=compile, dtype=config.dtype)

    def begin_step(self, step: int, extended: int) -> None:
        """Freeze what step `step` (from 0) does not train; `extended` is `Position.extended`."""
        freeze(self.model, self.heads if stage_of(step, self._config, extended).heads_alone else self._trained)

    def complete(self, inputs: StepInputs) -> StepInputs:
        """Add the stored outputs of the frozen model, or the model as it was as the teacher of head 1."""
        if self._stored is not None:
            return self._stored.add(inputs)
        if not self._adapt.self_distilled:
            return inputs
        if self.lora is not None:
            with self.lora.off():
                return replace(inputs, teacher=Teacher.of_tokens(self.model, inputs))
        assert self._original is not None
        return replace(inputs, teacher=Teacher.of_tokens(self._original, inputs))

    def complete_held_out(self, inputs: StepInputs, split: TokenShards) -> StepInputs:
        """Add the stored outputs of the frozen model to rows of a validation split."""
        return inputs if self._stored is None else self._stored.add(inputs, split)

    def tokenizer(self, of_data: Tokenizer) -> Tokenizer:
        """Return the model's own tokenizer, or that of the data if it has none."""
        return load_model_tokenizer(self._adapt.model) or of_data

    def whole(self) -> Transformer | None:
        """Return the model without additions: LoRA's products are added to the weights.

        With several processes it is a whole copy on the first one; all of them call it.
        """
        if self._processes.count > 1:
            return whole_model(self.model, self.stored_dtype, keep=self._processes.main)
        return self.model if self.lora is None else self.lora.merged(self.model)

    def save(self, whole: Transformer, directory: Path, tokenizer: Tokenizer) -> None:
        """Write the model directory in the existing model's dtype, so that frozen weights keep their bytes.

        The stop tokens of the existing model stay. What LoRA trained is also written as a peft adapter, RUN/adapter.
        A run of heads alone writes those without the model.
        """
        if self._adapt.heads_only:
            # A quantized base has no dtype that its heads could take over; two bytes are enough for drafts.
            dtype = torch.bfloat16 if self._adapt.model.suffix == SUFFIX else self.stored_dtype
            save_heads(whole, directory, name_of(self._adapt.model), dtype)
            return
        if self.lora is not None:
            self.lora.save(self.model, self._config.run_dir / "adapter", str(self._adapt.model))
        save_model(whole, directory, tokenizer, dtype=self.stored_dtype)
        keep_generation(self._adapt.model, directory)


def _draft_vocabulary(model: ModelConfig, sources: Sequence[Source]) -> Tensor | None:
    """Return the draft vocabulary of new heads, if they have one, and report its share of the training data."""
    if (size := model.draft_vocab) is None:
        return None
    d2t, covered = most_frequent([source.train for source in sources], model.vocab_size, size)
    say(f"a draft vocabulary of {size:,} tokens covers {covered:.1%} of those to be predicted")
    return d2t


def trained_parameters(model: Transformer, adapt: AdaptConfig, seed: int) -> tuple[set[str], Lora | None]:
    """Return the names of the parameters that a run trains in its last stage, and LoRA's products, if it has them.

    The products are added to `model`.
    """
    if adapt.lora is not None:
        heads, lora = new_parameters(model), Lora(model, adapt.lora, seed)
        return heads | lora.names, lora
    return (new_parameters(model) if adapt.mode == "heads" else {name for name, _ in model.named_parameters()}), None


def check_processes(config: RunConfig, count: int) -> None:
    """Raise UsageError for several processes, unless the run trains all weights from the first step."""
    adapt = config.adapt
    assert adapt is not None
    whole = adapt.mode == "joint" and adapt.heads_first == 0
    if count > 1 and (not whole or adapt.lora or adapt.self_distilled or config.model.draft_vocab):
        raise UsageError(
            "adapt on several processes trains all weights from the first step: take --mode joint --heads-first 0 "
            "without --lora, --self-distilled and --draft-vocab, or start it without torchrun"
        )


def check_frozen_dtype(config: RunConfig, stored: torch.dtype) -> None:
    """Raise UsageError if frozen weights, stored in `stored`, cannot be held in the dtype of the settings."""
    assert config.adapt is not None
    name, model = config.adapt.frozen_dtype, config.adapt.model
    if name != "float32" and stored != getattr(torch, name):
        raise UsageError(
            f"adapt.frozen_dtype {name}: {model} is stored in {str(stored).removeprefix('torch.')}, and rounding it "
            "would change what it writes; take float32"
        )
    if name != "float32" and not config.in_bfloat16:
        raise UsageError(f"adapt.frozen_dtype {name} needs dtype bfloat16; this run has {config.dtype}")


def check_shape(old: ModelConfig, config: RunConfig) -> None:
    """Raise UsageError unless `config.model` is the shape `old` with new heads."""
    model, adapt = config.model, config.adapt
    assert adapt is not None
    expected = config_with_heads(
        old,
        model.heads,
        model.head_kind,
        model.wiring,
        replace_heads=adapt.replace_heads,
        take_layers=adapt.take_layers,
        **{name: getattr(model, name) for name in HEAD_FIELDS},
    )
    if expected != model:
        raise UsageError(
            f"{adapt.model}: the run's model is not this one with heads added; start it anew with headstart adapt"
        )


def check_unchanged(model: Path, run_dir: Path) -> None:
    """Record digests of the model's files when the run begins; raise UsageError if they have changed later.

    Checkpoints hold neither the weights that are never trained nor the tokenizer.
    """
    now = digests(model)
    if (tokenizer := model / TOKENIZER_FILE).is_file():
        now[TOKENIZER_FILE] = sha256_of(tokenizer)
    record = run_dir / SOURCE_FILE
    if not checkpoints.all_steps(run_dir / "checkpoints"):
        record.unlink(missing_ok=True)
    try:
        before = json.loads(record.read_text(encoding="utf-8"))["sha256"]
    except FileNotFoundError:
        write_text(record, json.dumps({"model": str(model), "sha256": now}, indent=2) + "\n")
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{record}: cannot be read ({error}); give another --run-dir") from error
    if TOKENIZER_FILE not in before:  # a run of an older Headstart, which did not record it
        now.pop(TOKENIZER_FILE, None)
    if before != now:
        raise UsageError(f"{model}: is another than when {run_dir} began; put it back, or give another --run-dir")


def digests(model: Path) -> dict[str, str]:
    """Return the SHA-256 of the files that hold the weights of a model, except its further heads."""
    files = (file for file in format_at(model).files(model) if file.parent in (model, model.parent))
    return {file.name: sha256_of(file) for file in files if file.suffix in (".safetensors", SUFFIX)}


def check_vocabulary(sources: Sequence[Source], model: Path, vocab_size: int) -> None:
    """Raise UsageError if the shards were encoded with another tokenizer than the model's."""
    for source in sources:
        folder, needed = source.train.directory, int(source.train.manifest["vocab_size"])
        if needed > vocab_size:
            raise UsageError(
                f"{folder}: its tokenizer has {needed} ids, {model} a vocabulary of {vocab_size}; prepare the text "
                f"with --tokenizer {model}"
            )
        ours, theirs = folder / "tokenizer" / TOKENIZER_FILE, _definition(model)
        if ours.is_file() and theirs is not None and _vocabulary(read_json(ours)) != _vocabulary(theirs):
            raise UsageError(
                f"{folder}: was encoded with another tokenizer than {model} has; prepare it with --tokenizer {model}"
            )


def _definition(model: Path) -> dict[str, Any] | None:
    """Return the content of a model's tokenizer.json, or what it would be for the tokenizer of a GGUF file."""
    if (model / TOKENIZER_FILE).is_file():
        return read_json(model / TOKENIZER_FILE)
    tokenizer = load_model_tokenizer(model) if model.is_file() else None
    return tokenizer.definition() if isinstance(tokenizer, PretrainedTokenizer) else None


def _vocabulary(content: dict[str, Any]) -> object:
    return content["model"], [(token["id"], token["content"]) for token in content.get("added_tokens", [])]


def flops_per_token(config: RunConfig) -> int:
    """Count the FLOPs of training on one token, like `ModelConfig.flops_per_token`.

    Frozen parameters only run forward, and the unembedding gets no gradient. Joint runs are counted in their second
    stage. Positions of auxiliary objectives are counted like tokens.
    """
    model, whole = config.model, config.model.flops_per_token(config.length) * config.positions // config.length
    whole += sum(method.extra_flops(model) for method in config.methods)
    if config.adapt is None or config.adapt.mode == "joint":
        return whole
    unembedding = model.vocab_size * model.dim
    without_heads = model.next_token_decoder.flops_per_token(config.length)
    frozen = 0 if model.kind.own_unembeddings else 2 * model.drafted_tokens * model.dim * (model.heads - 1)
    heads = whole - without_heads - frozen
    return (without_heads - 6 * unembedding) // 3 + heads
