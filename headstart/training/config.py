"""Settings of a training run: a YAML file, changed by the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Suppress

from headstart.arguments import AT_LEAST_0, AT_LEAST_1, FINITE_POSITIVE, FRACTION, check_fields
from headstart.command_line import parse_settings
from headstart.data.mixture import MixturePart
from headstart.data.shards import TokenShards
from headstart.errors import UsageError
from headstart.formats.registry import load_data_tokenizer
from headstart.hardware import dtype_on
from headstart.model.config import ModelConfig
from headstart.objective.backends import LossConfig
from headstart.objective.head_weights import HeadWeights
from headstart.settings_loader import load_settings
from headstart.training.adapt.config import AdaptConfig
from headstart.training.auxiliary.base import Auxiliary, AuxiliarySettings
from headstart.training.auxiliary.masked_inputs import MaskConfig
from headstart.training.auxiliary.registers import RegisterConfig
from headstart.training.auxiliary.token_order import TokenOrderConfig
from headstart.training.init_from import fill_settings
from headstart.training.optimizer import OptimizerConfig
from headstart.training.parallel import ParallelConfig
from headstart.training.profiling import ProfileConfig
from headstart.training.trackers import WatchConfig
from headstart.training.yaml_settings import expand_preset, read_mapping, to_plain, write_mapping


@dataclass(frozen=True)
class DataConfig:
    """Data of a run."""

    sources: tuple[str, ...] = ("python-stdlib",)
    """Files, folders, globs, or python-stdlib; prepared once into the run folder."""
    path: Path | None = None
    """Folder that `headstart prepare` wrote; the run then ignores sources, tokenizer and validation_fraction. The YAML
    file can name several folders with weights: `mixture: [{path: data/a, weight: 9}, ...]`."""
    # Not on the command line: its flags would be subcommands.
    mixture: Annotated[tuple[MixturePart, ...] | None, Suppress] = None
    """Several prepared folders, mixed by weight (docs/mixing.md), in place of `path`."""
    tokenizer: str = "bytes"
    """bytes, a tokenizer.json, or a folder that holds one."""
    validation_fraction: float = 0.02
    """Fraction of the documents held out for validation."""
    conversations: bool = False
    """Read rows of `sources` that have messages as conversations: the tokenizer's chat template renders them, and only
    the assistant's replies are predicted. Rows with a text and text files are read as they are."""
    attention_within_documents: bool = False
    """Stop attention at document boundaries (the paper does not mention it; comparable work does not)."""
    allow_changed: bool = False
    """Resume even though the data or its tokenizer has changed since the checkpoint was written; for one start."""

    def __post_init__(self) -> None:
        if self.path is not None and self.mixture is not None:
            raise UsageError(f"data.path {self.path} and data.mixture are both given; leave one of them out")
        if self.mixture is not None and not self.mixture:
            raise UsageError("data.mixture is empty; name folders that headstart prepare wrote, or leave it out")
        if not self.prepared and not self.sources:
            raise UsageError("data.sources is empty; name a file, a folder, or python-stdlib")
        check_fields(self, "data.", validation_fraction=FRACTION)

    @property
    def prepared(self) -> tuple[MixturePart, ...]:
        """Prepared folders; empty if the run prepares its own from `sources`."""
        return self.mixture or (() if self.path is None else (MixturePart(self.path),))


@dataclass(frozen=True)
class BatchConfig:
    """Tokens of one optimizer step: rows x accumulate x length, divided among all processes."""

    rows: int = 8
    """Rows of a micro-batch, the most that one process computes at once."""
    accumulate: int = 1
    """Micro-batches of one optimizer step, those of all processes together."""
    length: int | None = None
    """Tokens of a row (None: model.context)."""

    def __post_init__(self) -> None:
        check_fields(self, "batch.", rows=AT_LEAST_1, accumulate=AT_LEAST_1, length=AT_LEAST_1)


@dataclass(frozen=True)
class ValidationConfig:
    """Loss, bits per byte and top-1 of every head on held-out documents."""

    every: int = 100
    """Steps between validations; the last step always has one (0: only that one)."""
    rows: int = 64
    """Rows scored, spread over the validation split (of each source, if several are mixed)."""
    patience: int = 0
    """Validations in a row without more tokens per pass of the sample after which the run ends (0: never)."""

    def __post_init__(self) -> None:
        check_fields(self, "validation.", every=AT_LEAST_0, rows=AT_LEAST_1, patience=AT_LEAST_0)


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints, from which a killed run resumes."""

    every: int = 500
    """Steps between checkpoints; the last step always has one (0: only that one)."""
    keep_last: int = 2
    """Number of newest checkpoints to keep (0: all)."""
    keep_every: int = 0
    """Keep checkpoints of steps divisible by this for good (0: none)."""

    def __post_init__(self) -> None:
        check_fields(self, "checkpoints.", every=AT_LEAST_0, keep_last=AT_LEAST_0, keep_every=AT_LEAST_0)


@dataclass(frozen=True)
class RunConfig:
    """A training run."""

    steps: int
    """Optimizer steps in all."""
    run_dir: Path = Path("runs/train")
    """Folder of the run: config.yaml, metrics.jsonl, data/, checkpoints/, model/."""
    seed: int = 0
    """Seed of the first weights, the order of the data and the choice of held-out documents."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:1, ..."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of matrix products (auto: bfloat16, but float32 on a CPU without instructions for it); weights, gradients
    and the optimizer's state stay float32."""
    compile: bool | None = None
    """Compile each block with torch.compile: up to a minute at the start, faster steps after it (None: in runs long
    enough to gain from it)."""
    threads: int | None = None
    """CPU threads (None: torch's choice, and fewer while other programs keep processors busy)."""
    minutes: float | None = None
    """Minutes of training, after which the run ends, with `steps` at the latest: the learning rate and the head weights
    follow the clock. Time between two starts of a run does not count. The weights then depend on the machine's speed
    (None: the steps alone decide)."""
    init_from: Path | None = None
    """Model whose weights the run starts from: a directory, a GGUF file, or OWNER/NAME on the hub. The run then takes
    its sizes and its tokenizer. With model.heads below the model's, heads 2 and up are dropped; further heads begin
    like head 1. Optimizer, schedule and data are new (None: weights from the seed)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Sizes, heads, wiring; in YAML also `preset: 100M` (Table S14), with changes."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data of the run."""
    batch: BatchConfig = field(default_factory=BatchConfig)
    """Tokens of one optimizer step."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and learning rate."""
    head_weights: HeadWeights = field(default_factory=HeadWeights)
    """Weights of the heads' losses."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Loss of a head."""
    masked_inputs: MaskConfig = field(default_factory=MaskConfig)
    """Inputs hidden from the model: teacherless training, random masks (docs/methods.md)."""
    token_order: TokenOrderConfig = field(default_factory=TokenOrderConfig)
    """Token order prediction (docs/methods.md)."""
    registers: RegisterConfig = field(default_factory=RegisterConfig)
    """Register tokens (docs/methods.md)."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Validation on held-out documents."""
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints, from which a killed run resumes."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Distribution of the model over several processes (torchrun)."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """Trackers, and the sample written at each validation."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Steps to profile."""
    # Not on the command line: `headstart adapt` writes it, with the shape of the model.
    adapt: Annotated[AdaptConfig | None, Suppress] = None
    """Existing model that gets new heads (`headstart adapt`); None: the run trains a new model."""

    def __post_init__(self) -> None:
        check_fields(self, "", steps=AT_LEAST_1, threads=AT_LEAST_1, seed=AT_LEAST_0, minutes=FINITE_POSITIVE)
        if self.model.draft_vocab is not None and self.adapt is None:
            raise UsageError(
                "model.draft_vocab is for heads on an existing model (headstart adapt --draft-vocab); leave it out, or "
                "drop such heads of the model to start from with --model.heads 1"
            )
        if self.minutes is not None and self.adapt is not None:
            raise UsageError("minutes is for new models; heads on an existing model train for a number of steps")
        if self.validation.patience and not self.watch.sample_tokens:
            raise UsageError(
                "validation.patience waits for tokens per pass of the sample; set watch.sample_tokens above 0"
            )
        self.head_weights.check(self.model.heads)
        for method in self.methods:
            method.check(adapted=self.adapt is not None, sampled=self.head_weights.sampled, ahead=self.model.ahead)
        if self.length > self.model.context:
            raise UsageError(
                f"batch.length {self.length} is above model.context {self.model.context}; lower one or raise the other"
            )

    @property
    def methods(self) -> tuple[AuxiliarySettings, ...]:
        """Sections of the auxiliary objectives that are on (docs/methods.md)."""
        sections = (getattr(self, item.name) for item in dataclasses.fields(self))
        return tuple(section for section in sections if isinstance(section, AuxiliarySettings) and section.on)

    @property
    def auxiliaries(self) -> tuple[Auxiliary, ...]:
        """Auxiliary objectives of the run."""
        return tuple(method.auxiliary(self.token_of(method.name), self.seed) for method in self.methods)

    @property
    def own_tokens(self) -> tuple[str, ...]:
        """Auxiliary objectives whose token is a row of its own, in the order of these rows, the last of the model's."""
        return tuple(method.name for method in self.methods if method.has_token and method.named_token is None)

    def token_of(self, method: str) -> int:
        """Return the id of the token of an auxiliary objective, or a number without meaning if it has none."""
        settings: AuxiliarySettings = getattr(self, method)
        if settings.named_token is not None or not settings.has_token:
            return settings.named_token or 0
        return self.model.vocab_size - len(self.own_tokens) + self.own_tokens.index(method)

    @property
    def result(self) -> str:
        """Folder in the run folder for what the run makes: "model", or "heads" for heads without their model."""
        return "heads" if self.adapt is not None and self.adapt.heads_only else "model"

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.batch.length or self.model.context

    @property
    def positions(self) -> int:
        """Positions that the model computes for a row: its tokens, and those of auxiliary objectives."""
        return self.length + sum(method.extra_positions(self.length) for method in self.methods)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch.rows * self.batch.accumulate * self.length

    @property
    def in_bfloat16(self) -> bool:
        """True if matrix products run in bfloat16; `on` must have decided it."""
        assert self.dtype != "auto"
        return self.dtype == "bfloat16"

    def on(self, device: str) -> RunConfig:
        """Return the run with the dtype that "auto" means on "cpu", "cuda", ..."""
        return replace(self, dtype=dtype_on(device, self.dtype))

    def micro_batches(self, processes: int) -> tuple[int, int]:
        """Return the micro-batches of one process in a step, and the rows of each.

        The step's rows are the same for every number of processes. Raises UsageError if they cannot be divided.
        """
        rows = self.batch.rows * self.batch.accumulate
        if rows % processes:
            raise UsageError(
                f"batch.rows {self.batch.rows} x batch.accumulate {self.batch.accumulate} = {rows} rows a step cannot "
                f"be shared by {processes} processes; take a multiple of {processes} rows or other processes"
            )
        mine = rows // processes
        at_once = max(size for size in range(1, min(mine, self.batch.rows) + 1) if mine % size == 0)
        return mine // at_once, at_once


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply command-line settings (`--model.dim 512 --steps 60`) to it.

    `model.vocab_size` follows from the tokenizer if neither gives it. Raises UsageError for unknown keys, wrong types
    and impossible values; an unknown flag ends the program with status 2, `--help` with 0.
    """
    path = Path(path)
    config = read_config(path, overrides)
    if overrides:
        config = parse_settings(RunConfig, overrides, f"headstart train {path}", config)
    return fit_vocabulary(config, gives_vocabulary(path, overrides))


def read_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, which `overrides` are yet to be applied to.

    `model.vocab_size` is not yet that of the tokenizer (`fit_vocabulary`).
    """
    return load_settings(RunConfig, expand_preset(fill_settings(read_mapping(path), overrides), path), path)


def gives_vocabulary(path: Path, overrides: Sequence[str] = ()) -> bool:
    """Return whether a YAML file or command-line settings give `model.vocab_size`."""
    flags = {flag.split("=")[0].replace("_", "-") for flag in overrides}
    return "--model.vocab-size" in flags or "vocab_size" in (read_mapping(path).get("model") or {})


def fit_vocabulary(config: RunConfig, given: bool) -> RunConfig:
    """Set `model.vocab_size` to what the data needs, or check it if it is `given`."""
    if not given and config.init_from is None:
        size = _vocab_size(config.data) + len(config.own_tokens)
        return replace(config, model=replace(config.model, vocab_size=size))
    if not config.data.prepared:  # prepared shards are checked when they are opened
        check_vocab_size(config, _vocab_size(config.data), repr(config.data.tokenizer))
    return config


def check_vocab_size(config: RunConfig, tokenizer_size: int, tokenizer: str) -> None:
    """Raise UsageError if the vocabulary lacks a row for an id of the tokenizer or of an auxiliary objective."""
    own = len(config.own_tokens)
    if config.model.vocab_size < tokenizer_size + own:
        more = f" and {own} for {' and '.join(config.own_tokens)}" if own else ""
        fix = f"leave model.vocab_size out, or take {tokenizer_size + own}"
        if config.init_from is not None:
            fix = f"take data encoded with the tokenizer of {config.init_from}" + (", and a token of it" if own else "")
        raise UsageError(
            f"model.vocab_size {config.model.vocab_size} is smaller than the {tokenizer_size} of the tokenizer "
            f"{tokenizer}{more}; {fix}"
        )
    for method in config.methods:
        named = method.named_token
        if named is not None and named >= config.model.vocab_size:
            raise UsageError(
                f"{method.name}.token {named} is no id of a vocabulary of {config.model.vocab_size}; take a smaller "
                "one, or leave it out"
            )


def _vocab_size(data: DataConfig) -> int:
    if not data.prepared:
        return load_data_tokenizer(data.tokenizer).vocab_size
    return int(TokenShards.open(data.prepared[0].path, "train").manifest["vocab_size"])


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write all settings, defaults included, as YAML that `load_config` reads back equal."""
    write_mapping(Path(path), to_plain(config))


# Settings that a resumed run cannot change: they decide the weights, the data or its order.
FIXED = (
    "seed",
    "minutes",
    "init_from",
    "model",
    "data.sources",
    "data.path",
    "data.mixture",
    "data.tokenizer",
    "data.validation_fraction",
    "data.conversations",
    "batch.length",
    "optimizer.kind",
    "adapt",
    "token_order",
)
# Settings whose change is not reported: they do not change the result.
QUIET = (
    "run_dir",
    "device",
    "threads",
    "compile",
    "validation",
    "checkpoints",
    "parallel",
    "watch",
    "profile",
    "data.allow_changed",
    "adapt.cache_states",
    "adapt.cache_gib",
    "adapt.heads_only",
)


def differences(old: object, new: object, prefix: str = "") -> dict[str, tuple[object, object]]:
    """Return the settings in which two configurations differ: dotted name -> (old, new)."""
    found: dict[str, tuple[object, object]] = {}
    for item in dataclasses.fields(old):  # type: ignore[arg-type]
        a, b, name = getattr(old, item.name), getattr(new, item.name), prefix + item.name
        if dataclasses.is_dataclass(a) and dataclasses.is_dataclass(b):
            found.update(differences(a, b, f"{name}."))
        elif a != b:
            found[name] = (a, b)
    return found


def is_under(name: str, prefixes: Sequence[str]) -> bool:
    """Return whether the dotted `name` is one of `prefixes` or below it."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)
