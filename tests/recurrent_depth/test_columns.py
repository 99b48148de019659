"""Keys and values that grow in place are still values: older states stay as they were, and a second continuation copies."""

from collections.abc import Callable

import pytest
import torch

from latentcot.backbone.state import LayerState
from latentcot.recurrent_depth import DepthLoop, ExitRule, StepCache
from latentcot.recurrent_depth.columns import LateTensors, OpenColumns, StoredColumns, Tail, runs_of


@pytest.fixture
def loop(make_backbone) -> DepthLoop:
    made = DepthLoop(make_backbone(mixers=["attention"] * 4, initializer_range=0.1)).double()
    with torch.no_grad():
        made.adapter.weight[:, :32] *= 0.1
    return made


@pytest.fixture
def reader(loop) -> Callable:
    ids = torch.randint(11, 20, (3, 40), generator=torch.Generator().manual_seed(2))
    start = 0.6 * torch.randn(3, 40, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    @torch.no_grad()
    def read(state, policy, at, new=1, rows=slice(None), rule=None):
        piece = slice(at, at + new)
        more = {} if rule is None else {"exit_rule": rule}
        return loop.recur(
            ids[rows, piece],
            6,
            initial_state=start[rows, piece],
            state=state,
            use_cache=True,
            step_cache=policy,
            **more,
        )

    return read


POLICIES = [StepCache(), StepCache("latest"), StepCache("skip"), StepCache("compress_s", 4)]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: p.kind)
def test_a_state_can_be_continued_twice(reader, policy):
    rule = None if policy.plain else ExitRule("latent_difference", 0.05)
    first = reader(None, policy, 0, 4).state
    for at in range(4, 8):
        first = reader(first, policy, at, rule=rule).state
    kept = first.fork()
    one = reader(first, policy, 8, rule=rule)
    two = reader(first, policy, 20, rule=rule)  # another token in the same place
    again = reader(kept, policy, 20, rule=rule)
    torch.testing.assert_close(two.logits, again.logits, atol=1e-12, rtol=0)
    assert not torch.equal(one.logits, two.logits)
    for place, entry in kept.entries.items():  # the state in the middle is what it was
        for name, tensor in entry.tensors.items():
            assert torch.equal(first.entries[place][name], tensor), place
    # and both continuations go on apart
    a, b = (reader(s, policy, 9, rule=rule).logits for s in (one.state, two.state))
    assert not torch.equal(a, b)
    torch.testing.assert_close(reader(again.state, policy, 9, rule=rule).logits, b, atol=1e-12, rtol=0)


def test_columns_are_taken_and_buffers_grow(reader):
    policy = StepCache()
    state = reader(None, policy, 0, 2).state
    buffers = set()
    for at in range(2, 40):
        before, state = state, reader(state, policy, at).state
        entry = state.entries[1, 3]
        assert isinstance(entry, StoredColumns)
        assert entry["keys"].shape[2] == at + 1
        assert entry["keys"].data_ptr() == entry.buffer.keys.data_ptr()
        if at > 2 and isinstance(old := before.entries[1, 3], StoredColumns) and old.buffer is entry.buffer:
            assert entry.buffer.filled == at + 1
        buffers.add(id(entry.buffer))
    assert len(buffers) <= 3  # copied once when it begins, then every 32 columns
    whole = reader(None, policy, 0, 40)
    torch.testing.assert_close(whole.logits[:, -1], reader(reader(None, policy, 0, 39).state, policy, 39).logits[:, 0])


@pytest.mark.parametrize("kind", ["latest", "skip"])
def test_places_that_no_row_reached_are_filled_when_one_does(reader, kind):
    """Until then they cost nothing; whoever looks sees the copies, or zeros, that they will hold."""
    policy = StepCache(kind)
    state = reader(None, policy, 0, 4).state
    early = ExitRule("latent_difference", torch.inf, min_steps=2)
    for at in range(4, 8):
        state = reader(state, policy, at, rule=early).state
    late = state.entries[1, 4]
    assert isinstance(late.tensors, LateTensors)
    assert isinstance(late.tensors.own.tensors, dict)  # not one inside the other, however many tokens
    assert isinstance(state.entries[1, 1], StoredColumns)
    assert late["keys"].shape == state.entries[1, 1]["keys"].shape
    assert late.nbytes == state.entries[1, 1].nbytes
    expected = state.entries[1, 1]["values"][:, :, 4:] * (kind == "latest")
    assert torch.equal(late["values"][:, :, 4:], expected)
    plain = state.fork()
    assert not any(isinstance(entry.tensors, LateTensors) for entry in plain.entries.values())
    kept = state.entries[1, 4]["keys"].clone()
    deep = reader(state, policy, 8)  # all six recurrences
    torch.testing.assert_close(deep.logits, reader(plain, policy, 8).logits, atol=1e-12, rtol=0)
    assert isinstance(deep.state.entries[1, 4], StoredColumns)
    assert torch.equal(deep.state.entries[1, 4]["keys"][:, :, :8], kept)
    assert torch.equal(state.entries[1, 4]["keys"], kept)  # the state before is what it was
    torch.testing.assert_close(reader(state, policy, 8).logits, deep.logits, atol=1e-12, rtol=0)  # and goes on twice
    for at in range(8, 40):  # beyond the room of the first buffer
        state = reader(state, policy, at, rule=early if at < 39 else None).state
        plain = reader(plain, policy, at, rule=early if at < 39 else None).state.fork()
    for place, entry in plain.entries.items():
        for name, tensor in entry.tensors.items():
            torch.testing.assert_close(state.entries[place][name], tensor, atol=1e-12, rtol=0)


def test_chosen_rows_make_a_state_of_their_own(reader):
    policy = StepCache("latest")
    state = reader(reader(None, policy, 0, 4).state, policy, 4).state
    part = state.select(torch.tensor([2, 0]))
    assert not any(isinstance(entry, StoredColumns) for entry in part.entries.values())
    alone = reader(part, policy, 5, rows=torch.tensor([2, 0]))
    together = reader(state, policy, 5)
    torch.testing.assert_close(alone.logits, together.logits[[2, 0]], atol=1e-12, rtol=0)


def test_inference_mode_and_no_grad_may_follow_one_another(reader):
    policy = StepCache()
    with torch.inference_mode():
        state = reader(reader(None, policy, 0, 4).state, policy, 4).state
    expected = reader(reader(None, policy, 0, 5).state, policy, 5).logits
    torch.testing.assert_close(reader(state, policy, 5).logits, expected, atol=1e-12, rtol=0)


def test_rows_are_read_in_the_fewest_slices():
    assert runs_of(torch.tensor([3])) == [slice(3, 4, 1)]
    assert runs_of(torch.arange(5)) == [slice(0, 5, 1)]
    assert runs_of(torch.tensor([1, 4, 7, 8, 9, 20])) == [slice(1, 8, 3), slice(8, 10, 1), slice(20, 21, 1)]
    every = torch.arange(40)
    for seed in range(20):
        rows = (torch.rand(40, generator=torch.Generator().manual_seed(seed)) < 0.5).nonzero()[:, 0]
        runs = runs_of(rows)
        assert runs is not None
        assert torch.cat([every[run] for run in runs]).tolist() == rows.tolist()


@pytest.mark.parametrize("columns", [4, 700], ids=["copied", "read in runs"])
def test_rows_are_attended_to_alike_in_every_way(columns):
    """Rows gathered, rows read run by run, and all rows: the same numbers, with a mask and with shared keys."""
    torch.manual_seed(0)

    rows = torch.tensor([0, 2, 3, 6])
    keys, values = torch.randn(7, 2, columns, 8).double(), torch.randn(7, 2, columns, 8).double()
    q, k, v = torch.randn(7, 4, 1, 8).double(), torch.randn(7, 2, 1, 8).double(), torch.randn(7, 2, 1, 8).double()
    seen = torch.rand(7, 1, 1, columns + 1) > 0.3
    seen[..., -1] = True
    assert runs_of(rows) == [slice(0, 3, 2), slice(3, 7, 3)]
    entry = LayerState("attention", {"keys": keys, "values": values})
    for mask in (None, seen):
        whole = OpenColumns("attention", {}, Tail(entry)).attend(q, k, v, mask)
        for runs in (None, runs_of(rows)):
            tail = Tail(entry)
            tail.put(k[:1] + 1, v[:1], torch.tensor([2]))  # replaced below
            part = None if mask is None else mask[rows]
            got = OpenColumns("attention", {}, tail, rows, runs).attend(q[rows], k[rows], v[rows], part)
            torch.testing.assert_close(got, whole[rows], atol=1e-12, rtol=0)
            tail.fill(torch.tensor([1, 4, 5]))
            kept = tail.close()
            assert torch.equal(kept["keys"][rows, :, -1], k[rows, :, 0])
            assert kept["values"][[1, 4, 5], :, -1].count_nonzero() == 0
            assert torch.equal(kept["keys"][:, :, :-1], keys)
