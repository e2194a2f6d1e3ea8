"""Targets against an obvious reference; the stream against itself, cut and resumed everywhere."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headstart.data.batches import IGNORE, BatchStream, evaluation_batches, targets_of
from headstart.data.shards import TokenShards
from headstart.errors import UsageError


def make_shards(lengths, tokens=None):
    """Shards in memory: documents of these lengths, tokens 0, 1, 2, ... unless given."""
    starts = np.cumsum([0, *lengths[:-1]]).astype(np.int64)
    tokens = np.arange(sum(lengths), dtype=np.uint16) if tokens is None else tokens
    return TokenShards(Path("made"), "train", {}, tokens, starts, 1.0)


def slow_targets(tokens, documents, heads):
    rows, width = tokens.shape
    targets = np.full((rows, width - heads, heads), IGNORE)
    for b in range(rows):
        for t in range(width - heads):
            for k in range(1, heads + 1):
                if documents[b, t] == documents[b, t + k]:
                    targets[b, t, k - 1] = tokens[b, t + k]
    return targets


LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def test_head_k_predicts_k_tokens_ahead():
    tokens = np.arange(40)[None]
    targets = targets_of(tokens, np.zeros_like(tokens), 4)
    assert targets.shape == (1, 36, 4) and targets.dtype == np.int64
    for t in range(36):
        for k in range(1, 5):
            assert targets[0, t, k - 1] == t + k


def test_a_stream_of_counted_tokens_counts_on():
    for batch in islice(BatchStream(make_shards([1000]), rows=3, length=16, heads=5, seed=0), 30):
        assert batch.tokens.dtype == batch.targets.dtype == batch.documents.dtype == torch.int64
        assert batch.targets.shape == (3, 16, 5)
        for k in range(1, 6):
            assert torch.equal(batch.targets[..., k - 1], batch.tokens + k)
        assert not batch.documents.any()


@settings(deadline=None)
@given(lengths=LENGTHS, heads=st.integers(1, 5), data=st.data())
def test_targets_stop_at_the_end_of_a_document(lengths, heads, data):
    documents = np.repeat(np.arange(len(lengths)), lengths)
    documents = np.concatenate([documents, np.full(heads, documents[-1])])[None].repeat(2, axis=0)
    tokens = np.array(data.draw(st.lists(st.integers(0, 9), min_size=documents.size, max_size=documents.size)))
    tokens = tokens.reshape(documents.shape)
    expected = slow_targets(tokens, documents, heads)
    np.testing.assert_array_equal(targets_of(tokens, documents, heads), expected)
    for dtype in (torch.int64, torch.uint8):
        tensors = targets_of(torch.from_numpy(tokens).to(dtype), torch.from_numpy(documents), heads)
        assert tensors.dtype == torch.int64
        np.testing.assert_array_equal(tensors.numpy(), expected)


@settings(deadline=None)
@given(lengths=LENGTHS, heads=st.integers(1, 4))
def test_packed_targets_equal_those_of_each_document_alone(lengths, heads):
    documents = np.repeat(np.arange(len(lengths)), lengths)
    tokens = np.arange(100, 100 + len(documents))
    nothing = np.full(heads, -1)  # a document of its own behind the last
    packed = targets_of(np.concatenate([tokens, nothing])[None], np.concatenate([documents, nothing])[None], heads)[0]
    for index in range(len(lengths)):
        alone = np.concatenate([tokens[documents == index], nothing])[None]
        of_its_own = np.concatenate([np.zeros(lengths[index], dtype=int), nothing])[None]
        np.testing.assert_array_equal(packed[documents == index], targets_of(alone, of_its_own, heads)[0])


@settings(deadline=None)
@given(lengths=LENGTHS, heads=st.integers(1, 4), length=st.integers(1, 7))
def test_rows_of_a_split_against_the_obvious_reference(lengths, heads, length):
    shards = make_shards(lengths)
    document = np.repeat(np.arange(len(lengths)), lengths)
    count = (sum(lengths) - heads) // length
    if count < 1:
        with pytest.raises(UsageError, match="take a shorter length or prepare more text"):
            BatchStream(shards, rows=2, length=length, heads=heads, seed=0)
        return
    batches = list(evaluation_batches(shards, rows=2, length=length, heads=heads, limit_rows=None))
    assert [len(batch.tokens) for batch in batches] == [2] * (count // 2) + [1] * (count % 2)
    tokens, targets, documents = (
        torch.cat([getattr(batch, name) for batch in batches]).numpy() for name in ("tokens", "targets", "documents")
    )
    for row in range(count):
        here = slice(row * length, row * length + length + heads)
        np.testing.assert_array_equal(tokens[row], shards.tokens[here][:length])
        expected = slow_targets(shards.tokens[here][None].astype(int), document[here][None], heads)[0]
        np.testing.assert_array_equal(targets[row], expected)
        np.testing.assert_array_equal(documents[row], document[here][:length] - document[here][0])


def test_no_target_is_lost_between_rows():
    batches = list(evaluation_batches(make_shards([103]), rows=4, length=10, heads=3, limit_rows=None))
    for k in range(1, 4):
        seen = torch.cat([batch.targets[..., k - 1].flatten() for batch in batches])
        assert seen.tolist() == list(range(k, 100 + k))


def make_stream(rows=3, seed=7, shuffle=True, **options):
    # 11 rows per epoch: prime, so that batches straddle epochs
    shards = make_shards([13, 1, 40, 22, 16])
    return BatchStream(shards, rows=rows, length=8, heads=3, seed=seed, shuffle=shuffle, **options)


def row_numbers(stream, count):
    rows = []
    while len(rows) < count:
        rows += [int(first) // 8 for first in next(stream).tokens[:, 0]]
    return rows


def equal(a, b):
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "targets", "documents"))


@pytest.mark.parametrize("total", [64 * 20 + 3, 64 * 20 + 40, 64 + 3])
def test_runs_that_differ_in_heads_alone_read_the_same_batches(total):
    # 3 tokens behind the last row: enough for one head and not for 8, which would be another count and another order.
    heads = (1, 2) if total < 64 + 32 else (1, 2, 4, 8, 32)
    streams = [BatchStream(make_shards([total]), rows=3, length=64, heads=n, seed=5) for n in heads]
    for _ in range(15):
        first, *others = [next(stream).tokens for stream in streams]
        assert all(torch.equal(first, other) for other in others)


def test_every_epoch_visits_every_row_once_in_a_fresh_order():
    stream = make_stream()
    assert stream.rows_of == [11]
    rows = row_numbers(stream, 33)
    epochs = [rows[:11], rows[11:22], rows[22:33]]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert row_numbers(make_stream(seed=8), 11)[:11] != epochs[0]
    assert row_numbers(make_stream(shuffle=False), 33)[:33] == list(range(11)) * 3


@pytest.mark.parametrize("rows", [1, 2, 4, 11, 25])
def test_the_order_does_not_depend_on_the_rows_of_a_batch(rows):
    assert row_numbers(make_stream(rows=rows), 50)[:50] == row_numbers(make_stream(rows=1), 50)


def test_ranks_share_each_step():
    whole = make_stream(rows=6)
    parts = [make_stream(rows=2, rank=rank, ranks=3) for rank in range(3)]
    for _ in range(8):
        expected = next(whole)
        got = [next(part) for part in parts]
        for name in ("tokens", "targets", "documents"):
            assert torch.equal(torch.cat([getattr(batch, name) for batch in got]), getattr(expected, name))
        assert all(part.state_dict() == whole.state_dict() for part in parts)


@pytest.mark.parametrize("rows", [1, 3, 11, 30])
def test_a_resumed_stream_equals_an_uninterrupted_one_at_every_cut(rows):
    steps = 25
    stream = make_stream(rows=rows)
    states, batches = [], []
    for _ in range(steps):
        states.append(stream.state_dict())
        batches.append(next(stream))
    resumed = make_stream(rows=rows)
    for cut in reversed(range(steps)):  # backwards: resuming must not lean on where the stream was
        assert set(states[cut]) == {"epoch", "row"}
        resumed.load_state_dict(states[cut])
        assert resumed.state_dict() == states[cut]
        for batch in batches[cut : cut + 6]:
            assert equal(next(resumed), batch)


def test_states_of_other_data_are_refused():
    for state in ({"epoch": 0, "row": 11}, {"epoch": -1, "row": 0}, {"epoch": 0, "row": -1}, {}):
        with pytest.raises(UsageError, match="does not fit 11 rows"):
            make_stream().load_state_dict(state)


def test_the_order_of_a_source_alone_is_that_of_seed_and_epoch():
    # What runs have been trained on: a change here would make their checkpoints resume with other rows.
    expected = [row for epoch in range(3) for row in np.random.default_rng([7, epoch]).permutation(11).tolist()]
    assert row_numbers(make_stream(rows=11), 33) == expected


MIXED = ([13, 1, 40, 22, 16], [30, 31], [50, 3, 9])
"""Documents of three sources, of 11, 7 and 7 rows of 8 tokens."""


def make_mixture(rows=4, weights=(3, 2, 1), **options):
    """Tokens of source i are 1000 * i and up."""
    shards = [make_shards(lengths, np.arange(sum(lengths)) + 1000 * i) for i, lengths in enumerate(MIXED)]
    return BatchStream(shards, weights=weights, rows=rows, length=8, heads=3, seed=7, **options)


def mixed_rows(stream, steps):
    """(source, row) of every row of the next steps."""
    firsts = [int(first) for batch in islice(stream, steps) for first in batch.tokens[:, 0]]
    return [(first // 1000, first % 1000 // 8) for first in firsts]


def test_a_mixture_visits_its_sources_by_weight_each_in_its_own_epochs():
    stream = make_mixture()
    assert stream.rows_of == [11, 7, 7]
    rows = mixed_rows(stream, 33)  # 132 rows: 66, 44 and 22
    visits = [[row for source, row in rows if source == i] for i in range(3)]
    assert [len(rows) for rows in visits] == [66, 44, 22]
    epochs = [[v[k : k + count] for k in range(0, len(v) - count + 1, count)] for v, count in zip(visits, [11, 7, 7])]
    for own, count in zip(epochs, [11, 7, 7]):
        assert all(sorted(epoch) == list(range(count)) for epoch in own)
        assert len({tuple(epoch) for epoch in own}) == len(own)
    assert epochs[1][:3] != epochs[2][:3]  # as many rows, another order
    assert visits[0] == row_numbers(make_stream(rows=1), 66)  # that of the first source alone
    for row in range(1, 133):
        for i, weight in enumerate((3, 2, 1)):
            assert abs(sum(source == i for source, _ in rows[:row]) - row * weight / 6) < 1


def test_rows_of_a_mixture_are_the_rows_of_its_sources():
    """Tokens, targets and documents, document borders included."""
    alone = [
        list(evaluation_batches(make_shards(lengths), rows=1, length=8, heads=3, limit_rows=None)) for lengths in MIXED
    ]
    stream, twin = make_mixture(rows=6), make_mixture(rows=6)
    for _ in range(10):
        batch = next(stream)
        for b, (source, row) in enumerate(mixed_rows(twin, 1)):
            expected = alone[source][row]
            shift = 1000 * source
            assert torch.equal(batch.tokens[b], expected.tokens[0] + shift)
            targets = torch.where(expected.targets[0] == IGNORE, IGNORE, expected.targets[0] + shift)
            assert torch.equal(batch.targets[b], targets)
            assert torch.equal(batch.documents[b], expected.documents[0])


@pytest.mark.parametrize("rows", [1, 3, 7, 40])
def test_a_resumed_mixture_equals_an_uninterrupted_one_at_every_cut(rows):
    stream = make_mixture(rows=rows)
    states, batches = [], []
    for _ in range(20):
        states.append(stream.state_dict())
        batches.append(next(stream))
    resumed = make_mixture(rows=rows)
    for cut in reversed(range(20)):
        assert set(states[cut]) == {"row", "source0", "source1", "source2"}
        assert states[cut]["row"] == cut * rows
        resumed.load_state_dict(states[cut])
        assert resumed.state_dict() == states[cut]
        for batch in batches[cut : cut + 6]:
            assert equal(next(resumed), batch)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_mixture_is_the_same_sequence_for_any_rows_and_ranks(ranks):
    whole = make_mixture(rows=8)
    parts = [make_mixture(rows=8 // ranks, rank=rank, ranks=ranks) for rank in range(ranks)]
    for _ in range(12):
        expected, got = next(whole), [next(part) for part in parts]
        for name in ("tokens", "targets", "documents"):
            assert torch.equal(torch.cat([getattr(batch, name) for batch in got]), getattr(expected, name))
        assert all(part.state_dict() == whole.state_dict() for part in parts)
    # Another number of processes continues the same sequence.
    other = make_mixture(rows=1)
    other.load_state_dict(parts[0].state_dict())
    assert torch.equal(torch.cat([next(other).tokens for _ in range(8)]), next(whole).tokens)


def test_states_of_another_mixture_are_refused():
    state = {"row": 12, "source0": 6, "source1": 4, "source2": 2}
    make_mixture().load_state_dict(state)
    for wrong in (
        {"epoch": 0, "row": 3},
        state | {"row": 13},
        state | {"source3": 0},
        {"row": 12, "source0": 4, "source1": 4, "source2": 4},
        {"row": 10, "source0": 6, "source1": 4},
        {},
    ):
        with pytest.raises(
            UsageError, match=r"does not fit 11 \+ 7 \+ 7 rows per epoch; resume with the data, the weights"
        ):
            make_mixture().load_state_dict(wrong)
    with pytest.raises(UsageError, match="does not fit 11 rows"):
        make_stream().load_state_dict(state)


class Files:
    """Tokens as several files give them: a length and slices, nothing else."""

    def __init__(self, tokens):
        self._tokens = tokens

    def __len__(self):
        return len(self._tokens)

    def __getitem__(self, index):
        assert isinstance(index, slice)
        return self._tokens[index]


def test_tokens_need_a_length_and_slices_only():
    plain = make_shards(list(MIXED[0]))
    several = make_shards(list(MIXED[0]), Files(np.asarray(plain.tokens)))
    for a, b in zip(
        islice(BatchStream(plain, rows=3, length=8, heads=3, seed=0), 10),
        BatchStream(several, rows=3, length=8, heads=3, seed=0),
    ):
        assert equal(a, b)


def test_evaluation_rows_are_spread_evenly():
    shards = make_shards([1003])

    def rows(limit):
        batches = evaluation_batches(shards, rows=4, length=10, heads=3, limit_rows=limit)
        return [int(first) // 10 for batch in batches for first in batch.tokens[:, 0]]

    assert rows(None) == rows(100) == rows(5000) == list(range(100))
    assert rows(5) == [0, 20, 40, 60, 80]
    assert len(set(rows(33))) == 33 and rows(33) == rows(33)
    assert rows(1) == [0]


def test_impossible_settings_are_refused():
    shards = make_shards([20])
    with pytest.raises(UsageError, match="20 tokens and one row needs 21"):
        BatchStream(shards, rows=1, length=17, heads=4, seed=0)
    BatchStream(shards, rows=1, length=16, heads=4, seed=0)
    with pytest.raises(UsageError, match="one row needs 21"):
        evaluation_batches(shards, rows=1, length=17, heads=4, limit_rows=None)
    for options in (
        {"rows": 0, "length": 4, "heads": 1, "seed": 0},
        {"rows": 1, "length": 0, "heads": 1, "seed": 0},
        {"rows": 1, "length": 4, "heads": 0, "seed": 0},
        {"rows": 1, "length": 4, "heads": 1, "seed": -1},
        {"rows": 1, "length": 4, "heads": 1, "seed": 0, "rank": 2, "ranks": 2},
    ):
        with pytest.raises(UsageError):
            BatchStream(shards, **options)
    for sources, weights in (([], []), ([shards], [1, 1]), ([shards, shards], [1])):
        with pytest.raises(UsageError, match=f"{len(sources)} sources and {len(weights)} weights"):
            BatchStream(sources, weights=weights, rows=1, length=4, heads=1, seed=0)
    with pytest.raises(UsageError, match="limit_rows 0"):
        evaluation_batches(shards, rows=1, length=4, heads=1, limit_rows=0)
    with pytest.raises(UsageError, match="heads 0"):
        targets_of(np.zeros((1, 4)), np.zeros((1, 4)), 0)
    with pytest.raises(UsageError, match="for 4 heads both must be"):
        targets_of(np.zeros((1, 4)), np.zeros((1, 4)), 4)
