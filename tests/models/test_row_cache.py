"""The cache of rows of different lengths, against whole forward passes."""

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

from models.row_cache import STEP, RowCache, prefill
from models.tiny_causal import tiny_causal


@pytest.fixture(scope="module")
def model():
    return tiny_causal(num_hidden_layers=2, dtype="float64").model


def enter(model, cache, rows):
    with torch.no_grad():
        prefill(model, rows, cache)


def step(model, cache, tokens):
    with torch.no_grad():
        logits = model(
            torch.tensor(tokens)[:, None], position_ids=cache.positions(1),
            attention_mask=cache.mask(1, model.dtype), past_key_values=cache, use_cache=True,
        ).logits  # fmt: skip
    cache.commit([1] * len(tokens))
    return logits[:, 0]


def whole(model, row):
    with torch.no_grad():
        return model(torch.tensor([row])).logits[0, -1]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "decoder"])
def test_rows_that_enter_and_leave_are_as_if_alone(attention):
    if attention == "decoder":  # packed weights and groups, in single precision
        model = tiny_causal(num_hidden_layers=2, num_attention_heads=8).decoding_model
    else:
        options = {"dtype": "float64", "attn_implementation": attention}
        model = tiny_causal(num_hidden_layers=2, **options).model
    draw = torch.Generator().manual_seed(0)
    fresh = lambda n: torch.randint(0, 260, (n,), generator=draw).tolist()  # noqa: E731
    cache, rows = RowCache(2, num_rows=4), []
    # Lengths that need more columns later, rows that take the places of longer ones.
    script = {0: [90, 3, 17], 5: [1], 9: [40], 12: [60, 2]}
    leaving = {4: 0, 8: 1, 11: 0, 12: 0, 30: 2}
    for number in range(45):
        if number in script:
            entering = [fresh(n) for n in script[number]]
            enter(model, cache, entering)
            rows += entering
        tokens = fresh(len(rows))
        logits = step(model, cache, tokens)
        rows = [[*row, token] for row, token in zip(rows, tokens, strict=True)]
        assert cache.lengths == [len(row) for row in rows]
        for place, row in enumerate(rows):
            # The norms of the model round to fp32.
            tolerance = 1e-5 if model.dtype == torch.float64 else 1e-3
            torch.testing.assert_close(logits[place], whole(model, row), atol=tolerance, rtol=0)
        if number in leaving:
            place = leaving[number]
            cache.drop(place)
            rows[place] = rows[-1]
            rows.pop()
    assert len(rows) == 2


def test_a_row_does_not_see_what_stood_in_its_place(model):
    """Columns beyond a row's length hold the keys of a longer row that has left."""
    cache = RowCache(2, num_rows=1)
    enter(model, cache, [list(range(50, 130))])
    cache.drop(0)
    enter(model, cache, [[5, 6, 7]])
    logits = step(model, cache, [8])
    torch.testing.assert_close(logits[0], whole(model, [5, 6, 7, 8]), atol=1e-5, rtol=0)


def test_no_more_rows_than_there_is_room_for(model):
    cache = RowCache(2, num_rows=1)
    enter(model, cache, [[1, 2]])
    with pytest.raises(AssertionError, match="no room"):
        enter(model, cache, [[1, 2]])


def test_blocks_are_kept_in_part_each_row_its_own(model):
    """Verification: 5 tokens are written behind every row, another number stays in each."""
    draw = torch.Generator().manual_seed(1)
    fresh = lambda n: torch.randint(0, 260, (n,), generator=draw).tolist()  # noqa: E731
    rows = [fresh(n) for n in (70, 3, 20)]
    cache = RowCache(2, num_rows=3)
    enter(model, cache, rows)
    for counts in ([5, 1, 2], [1, 1, 1], [3, 5, 4]):
        block = [fresh(5) for _ in rows]
        with torch.no_grad():
            logits = model(
                torch.tensor(block), position_ids=cache.positions(5),
                attention_mask=cache.mask(5, torch.float64), past_key_values=cache, use_cache=True,
            ).logits  # fmt: skip
        for place, row in enumerate(rows):
            torch.testing.assert_close(
                logits[place, -1], whole(model, [*row, *block[place]]), atol=1e-5, rtol=0
            )
        cache.commit(counts)
        rows = [[*row, *new[:n]] for row, new, n in zip(rows, block, counts, strict=True)]
    cache.keep([2, 0])
    assert cache.lengths == [len(rows[2]), len(rows[0])]
    for place, logits in enumerate(step(model, cache, [7, 8])):
        row = [*rows[(2, 0)[place]], (7, 8)[place]]
        torch.testing.assert_close(logits, whole(model, row), atol=1e-5, rtol=0)


def test_memory_is_that_of_the_longest_row_and_a_block(model):
    cache = RowCache(2, num_rows=2)
    enter(model, cache, [[1] * 5, [2]])
    assert cache.layers[0].keys.shape[2] == STEP
    for _ in range(STEP):
        step(model, cache, [1, 1])
    assert cache.layers[0].keys.shape[2] == 2 * STEP


def test_a_cache_that_is_not_needed_any_more_leaves_at_once(model):
    """Its memory would else wait for the garbage collector, which counts objects and not bytes."""
    cache = RowCache(2, num_rows=1)
    enter(model, cache, [[1, 2]])
    held = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert held() is None
    finally:
        gc.enable()


def test_what_a_window_has_cut_off_is_no_row(model):
    cut = DynamicCache()
    for layer in range(2):
        cut.update(torch.zeros(1, 4, 3, 8), torch.zeros(1, 4, 3, 8), layer)
    with pytest.raises(AssertionError, match="forgets nothing"):
        RowCache(2, num_rows=1).admit(cut, [5])
