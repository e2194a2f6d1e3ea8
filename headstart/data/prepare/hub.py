"""Read Hugging Face datasets: `hf:NAME` streamed from the hub, `hf:PATH` from a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from headstart.data.prepare.documents import Document, Field, Skipped
from headstart.errors import UsageError, first_line, needs_extra

PREFIX = "hf:"
ROWS = 1 << 14
"""Rows of a saved dataset in one unit of work."""


def is_dataset(source: str) -> bool:
    """Return whether a source names a dataset."""
    return source.startswith(PREFIX)


def folder_of(source: str) -> Path | None:
    """Return the folder that `hf:PATH` names; None for a name on the hub."""
    path = Path(os.path.expanduser(source.removeprefix(PREFIX)))
    return path if path.exists() else None


def parts_of(source: str, split: str, config: str | None) -> list[tuple[int, int]]:
    """Return the parts that can be read separately: (shard, shards) of a stream, (first row, end) of a folder."""
    rows = load_rows(source, split, config)
    if _is_streamed(rows):
        count = rows.num_shards
        return [(index, count) for index in range(count)]
    return [(begin, min(begin + ROWS, len(rows))) for begin in range(0, len(rows), ROWS)]


def read_part(
    source: str, split: str, config: str | None, field: Field, begin: int, end: int
) -> Iterator[Document | Skipped]:
    """Yield the documents of one of `parts_of`. Raise UsageError if a row lacks the field or a stream breaks."""
    rows = load_rows(source, split, config)
    available = rows.column_names
    columns = [] if available is None else field.columns(available)
    if columns is None:
        raise UsageError(
            f'{source}: no field "{field.name}"; name one with headstart prepare --text-field: {", ".join(available)}'
        )
    streamed = _is_streamed(rows)
    part = rows.shard(num_shards=end, index=begin) if streamed else rows.select(range(begin, end))
    if columns:
        part = part.select_columns(columns)  # pictures and the like are not decoded
    folder = folder_of(source)
    label = folder.resolve().name if folder else source.removeprefix(PREFIX)
    row = 0 if streamed else begin
    records = iter(part)
    while True:
        where = f"{begin}:{row}" if streamed else f"{row}"
        try:
            record = next(records)
        except StopIteration:
            return
        except Exception as error:  # network, file system and formats raise many kinds of errors
            raise UsageError(
                f"{source}: stopped at row {where} ({first_line(error)}); run the command again"
            ) from error
        yield from field.documents(record, f"{label}/{split}:{where}", f"{source}, row {where}", 1)
        row += 1


def column_names(source: str, split: str, config: str | None) -> list[str]:
    """Return the columns of a dataset, or those of its first row if a stream does not know them.

    Raises UsageError if the dataset cannot be opened or the stream breaks.
    """
    rows = load_rows(source, split, config)
    if rows.column_names is not None:
        return list(rows.column_names)
    try:
        return list(next(iter(rows), {}))
    except Exception as error:  # as in read_part
        raise UsageError(f"{source}: has no first row to read ({first_line(error)}); run the command again") from error


@lru_cache(maxsize=1)  # opening a dataset of the hub takes many requests
def load_rows(source: str, split: str, config: str | None) -> Any:
    """Open a folder of `save_to_disk` as a `datasets.Dataset`, anything else as a `datasets.IterableDataset`."""
    with needs_extra(f"{source}: reading datasets", "data"):
        import datasets
    datasets.disable_progress_bars()
    folder = folder_of(source)
    name = str(folder) if folder else source.removeprefix(PREFIX)
    try:
        if folder and ((folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()):
            saved = datasets.load_from_disk(name)
            if isinstance(saved, datasets.DatasetDict):
                if split not in saved:
                    raise UsageError(f"{source}: has no split {split!r}; name one with --split: {', '.join(saved)}")
                return saved[split]
            return saved
        return datasets.load_dataset(name, config, split=split, streaming=True)
    except UsageError:
        raise
    except Exception as error:  # the library raises many kinds of errors
        raise UsageError(
            f"{source}: cannot be opened ({first_line(error)}); check the name, --split {split}, --hf-config and the "
            f"network, or name a folder that datasets can load"
        ) from error


def _is_streamed(rows: Any) -> bool:
    return not hasattr(rows, "__len__")
