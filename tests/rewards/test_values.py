"""Plain values cross as what they were, and nothing else does."""

import json
import math
from collections import Counter, OrderedDict, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.jail.values import decode, encode

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary() | st.complex_numbers(allow_nan=False)
    | st.builds(range, st.integers(), st.integers(), st.integers(1, 5))
)  # fmt: skip
hashable = st.recursive(
    scalars, lambda parts: st.lists(parts).map(tuple) | st.frozensets(parts), max_leaves=6
)
values = st.recursive(
    hashable | st.sets(hashable),
    lambda parts: st.lists(parts) | st.lists(parts).map(tuple) | st.dictionaries(hashable, parts),
    max_leaves=12,
)


def through(value):
    return decode(json.loads(json.dumps(encode(value))))


@settings(max_examples=40)
@given(values)
def test_a_value_is_what_it_was(value):
    """To the kind of every part: repr tells 1 from 1.0 and True, and -0.0 from 0.0."""
    crossed = through(value)
    assert crossed == value and type(crossed) is type(value)
    if not any(kind in repr(value) for kind in ("{", "set(")):
        assert repr(crossed) == repr(value)


def test_large_numbers_and_odd_ones():
    for value in (10**9999, -(2**64), 2**64 - 1, math.inf, -math.inf, -0.0, "\ud800"):
        assert repr(through([value])[0] == value) == "True"
    assert math.isnan(through(math.nan)) and through(True) is True


@pytest.mark.parametrize("kind", [Counter, OrderedDict, lambda d: defaultdict(int, d)])
def test_mappings_become_dictionaries(kind):
    crossed = through(kind({"a": 1, (1, 2): 2}))
    assert type(crossed) is dict and crossed == {"a": 1, (1, 2): 2}


@pytest.mark.parametrize(
    "value",
    [
        object(), print, type("E", (int,), {})(1), type("L", (list,), {})(), iter([]), bytearray(),
        [1, {2: (3, {4: object()})}],
    ],
)  # fmt: skip
def test_others_are_refused(value):
    with pytest.raises(TypeError, match="no plain value"):
        encode(value)


@pytest.mark.parametrize(
    "value",
    [
        {}, {"a": 1}, [], ["other", 1], [1], [["list"]], ["int"], ["int", 1], ["int", "x"],
        ["bytes", 1], ["bytes", "x"], ["range", "a"], ["range", 1, 2, 0], ["complex", []],
        ["dict", 1], ["dict", [1]], ["dict", [["list"], 1]], ["set", ["list"]], ["list", {}],
    ],
)  # fmt: skip
def test_what_is_no_value_is_refused(value):
    with pytest.raises(ValueError):
        decode(value)
