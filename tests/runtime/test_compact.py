"""What is tied is stored once, and a view does not drag its storage along."""

import io
from collections import OrderedDict

import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.compact import compact, ties
from tests.support import equal


def saved(tree) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


def reloaded(tree):
    return torch.load(io.BytesIO(saved(tree)), weights_only=True)


def test_a_row_leaves_its_table_behind():
    table = torch.arange(100_000.0).view(1000, 100)
    tree = {"a": [table[7]], "b": (table[7], {"c": table[8, ::2]})}
    assert len(saved(tree)) > 400_000 > 5_000 > len(saved(compact(tree)))
    assert equal(compact(tree), tree)
    first, (second, _) = compact(tree)["a"][0], compact(tree)["b"]
    assert first.untyped_storage().nbytes() == 400 and table.untyped_storage().nbytes() == 400_000
    assert tree["a"][0].data_ptr() == table[7].data_ptr(), "what was given is not changed"
    both = compact(tree)
    assert both["a"][0] is both["b"][0]
    assert torch.equal(first, second)


def test_what_fills_its_storage_goes_on_sharing_it():
    """Tied weights, a transposed one, and the parts of a packed projection."""
    packed = torch.randn(30, 20)
    tree = {"q": packed[:10], "k": packed[10:], "t": packed.T, "w": packed, "again": packed}
    found = compact(tree)
    assert found is tree
    assert len(saved(tree)) < 2 * packed.numel() * 4
    assert ties(tree) == {"again": "w"} == ties(reloaded(tree))


def test_ties_are_views_of_one_form():
    weight = torch.randn(4, 4)
    state = {"a": weight, "b": weight.T, "c": torch.nn.Parameter(weight), "d": weight.clone(),
             "e": weight[:2], "none": torch.empty(0), "zero": torch.empty(0)}  # fmt: skip
    assert ties(state) == {"c": "a"}


def test_the_state_of_a_module_keeps_its_versions():
    module = torch.nn.BatchNorm1d(3)
    state = module.state_dict()
    state["half"] = torch.arange(10.0)[:5]
    found = compact(state)
    assert isinstance(found, OrderedDict) and list(found) == list(state)
    assert found._metadata == state._metadata and found is not state
    assert found["half"].untyped_storage().nbytes() == 20


def test_other_values_are_left_alone():
    tree = {"n": None, "text": "abc", "sparse": torch.eye(3).to_sparse(), "size": torch.Size([2]),
            "meta": torch.empty(3, device="meta"), "view": torch.zeros(9)[:1]}  # fmt: skip
    found = compact(tree)
    assert {k: v for k, v in found.items() if k != "view"}.keys() == tree.keys() - {"view"}
    assert found["sparse"] is tree["sparse"] and found["size"] == tree["size"]
    assert type(found["size"]) is torch.Size and found["text"] == "abc"


slices = st.tuples(st.integers(0, 19), st.integers(0, 20), st.integers(1, 3))


@given(st.lists(slices, min_size=1, max_size=6))
def test_values_stay_and_no_storage_is_larger_than_its_views(cuts):
    base = torch.arange(20)
    tree = [base[low : low + length : step] for low, length, step in cuts]
    found = compact(tree)
    assert equal(found, tree) and equal(reloaded(found), tree)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in found}
    assert sum(storages.values()) <= sum(x.nbytes for x in tree)
    for i, one in enumerate(tree):
        for j, other in enumerate(tree):
            if (
                one.shape == other.shape
                and one.stride() == other.stride()
                and (one.storage_offset() == other.storage_offset())
            ):
                assert found[i].data_ptr() == found[j].data_ptr()
