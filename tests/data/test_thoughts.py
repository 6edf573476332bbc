"""Thoughts in texts: what goes in comes out, and nothing else changes."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.thoughts import (
    Delimiters,
    Insertion,
    Limits,
    Rejected,
    canonical,
    checked,
    passages,
    placed,
    raw_of,
    segments_of,
    sentences,
    splice,
    strip_thoughts,
    word_coverage,
)

THINK = Delimiters()
SUM = "Question: 12 + 7 - 3 =\nAnswer: 16\n"
# Letters that a delimiter is made of, white space of several kinds, and any other character.
ALPHABET = st.one_of(st.sampled_from("<>/think \n\t\u00a0ab.!"), st.characters(codec="utf-8"))
TEXT = st.text(ALPHABET, max_size=30).filter(lambda text: not THINK.within(text))
THOUGHT = TEXT.filter(str.strip)


def test_a_thought_stands_between_what_is_before_and_after_it():
    place = SUM.index(" 16")
    augmented = splice(SUM, [Insertion(place, "12 + 7 = 19, 19 - 3 = 16")], THINK)
    assert augmented == (
        "Question: 12 + 7 - 3 =\nAnswer: <think>12 + 7 = 19, 19 - 3 = 16</think> 16\n"
    )
    assert strip_thoughts(augmented, THINK) == SUM
    assert splice("foobar", [Insertion(3, " x ")], THINK) == "foo<think>x</think>bar"


@given(TEXT, st.lists(st.tuples(st.floats(0, 1), THOUGHT), max_size=6), st.booleans())
@settings(max_examples=60, deadline=None)
def test_splicing_and_stripping_is_the_identity(text, asked, unlike):
    delimiters = Delimiters("[t", "]>") if unlike else THINK
    if any(delimiters.within(one) for one in (text, *(thought for _, thought in asked))):
        return
    insertions = [Insertion(round(share * len(text)), thought) for share, thought in asked]
    augmented = splice(text, insertions, delimiters)
    assert strip_thoughts(augmented, delimiters) == text
    segments = segments_of(augmented, delimiters)
    assert [segment.is_thought for segment in segments] == [False, True] * len(asked) + [False]
    in_order = sorted(insertions, key=lambda one: one.position)
    assert [one.text for one in segments if one.is_thought] == [
        one.thought.strip() for one in in_order
    ]
    limits = Limits(len(asked), len(asked))
    assert checked(text, augmented, delimiters, limits) == segments
    assert word_coverage(text, raw_of(segments)) == 1.0


@pytest.mark.parametrize(
    ("raw", "augmented"),
    [
        ("foo bar", "foo <think>x</think> bar"),
        ("foo bar", "foo <think>x</think>bar"),
        ("foo bar", "foo<think>x</think> bar"),
        ("foo bar", "foo\n<think>x</think>\n\nbar\n"),
        ("foo bar", "<think>x</think> foo bar"),
        ("foo bar", "foo bar\n<think>x</think>"),
        ("ﬁne … x\u00a0y", "fine <think>x</think> ... x y"),
    ],
)
def test_a_text_written_anew_may_differ_in_white_space_and_forms(raw, augmented):
    assert [one.text for one in checked(raw, augmented, THINK, Limits()) if one.is_thought] == ["x"]


@pytest.mark.parametrize(
    ("raw", "augmented", "reason"),
    [
        ("foo bar", "foo <think>x</think> Bar", "text_changed"),
        ("foo bar", "foo <think>x</think>", "text_changed"),
        ("foobar", "foo <think>x</think> bar", "text_changed"),
        ("foo", "<think>x foo", "unbalanced"),
        ("foo", "foo </think>", "unbalanced"),
        ("foo", "foo </think> <think>x</think>", "unbalanced"),
        ("foo", "foo <think>a <think>b</think></think>", "nested"),
        ("foo", "foo <think> </think>", "empty_thought"),
        ("foo <think>", "foo <think> <think>x</think>", "delimiter_in_text"),
        ("foo", "foo", "too_few_thoughts"),
        ("foo", "<think>a</think>foo<think>b</think> <think>c</think>", "too_many_thoughts"),
        ("foo", "foo <think>a b c d</think>", "thought_too_long"),
        ("a b c d e f", "a b c d e f <think>x y z</think>", "too_long"),
    ],
)
def test_what_is_refused_says_why(raw, augmented, reason):
    limits = Limits(1, 2, max_thought_words=3, max_words=8)
    with pytest.raises(Rejected, match=f"^{reason}$") as error:
        checked(raw, augmented, THINK, limits)
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("text", "thought", "reason"),
    [
        ("a </think>", "x", "delimiter_in_text"),
        ("a", "x <think>", "delimiter_in_thought"),
        ("a", " \n", "empty_thought"),
    ],
)
def test_splicing_refuses_what_could_not_be_read_again(text, thought, reason):
    with pytest.raises(Rejected, match=f"^{reason}$"):
        splice(text, [Insertion(0, thought)], THINK)


def test_places_are_sentences_or_quotes():
    text = 'He said "no." She left!  Why?\n\n- a list of 3.5 things\n'
    assert [text[slice(*span)] for span in sentences(text)] == [
        'He said "no."', "She left!", "Why?", "- a list of 3.5 things",
    ]  # fmt: skip
    found = placed(text, [{"after": 2, "thought": "a"}, {"after": " of 3.5", "thought": "b"}])
    assert found == [Insertion(text.index("  Why"), "a"), Insertion(text.index(" things"), "b")]
    assert strip_thoughts(splice(text, found, THINK), THINK) == text


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"after": 1, "thought": "a"}, "not_a_list"),
        (["a"], "not_a_list"),
        ([{"after": 1}], "not_a_list"),
        ([{"after": True, "thought": "a"}], "not_a_list"),
        ([{"after": " ", "thought": "a"}], "not_a_list"),
        ([{"after": 0, "thought": "a"}], "no_such_sentence"),
        ([{"after": 3, "thought": "a"}], "no_such_sentence"),
        ([{"after": "ten", "thought": "a"}], "quote_not_found"),
        ([{"after": "o", "thought": "a"}], "quote_ambiguous"),
    ],
    ids=lambda value: value if isinstance(value, str) else re.sub(r"\W+", "_", str(value)),
)
def test_a_place_that_is_none_says_why(asked, reason):
    with pytest.raises(Rejected, match=f"^{reason}$"):
        placed("One. Two of four.", asked)


@given(TEXT)
@settings(max_examples=60, deadline=None)
def test_between_sentences_there_is_only_white_space(text):
    spans, last = sentences(text), 0
    for start, end in spans:
        assert not text[last:start].strip() and text[start:end].strip() == text[start:end] != ""
        last = end
    assert not text[last:].strip()


@given(
    st.lists(st.sampled_from(["One. ", "two three ", "four!\n", "five six seven. "])),
    st.integers(1, 6),
)
@settings(max_examples=40, deadline=None)
def test_passages_are_the_text_in_whole_sentences(pieces, most):
    text = "".join(pieces)
    found = list(passages(text, most))
    assert "".join(found) == text and all(found)
    for passage in found:
        assert len(passage.split()) <= most or len(sentences(passage)) == 1
    assert list(passages(text, None)) == [text]


@pytest.mark.parametrize(
    "pair",
    [("<", "/>"), ("<a>", "<a>b"), ("<a<", "b>"), ("ab", "bc"), ("", "ab")],
    ids=["short", "contained", "itself", "each other", "empty"],
)
def test_delimiters_can_be_told_apart(pair):
    with pytest.raises(DataError, match=r"^open=.*, close=.*: allowed .*texts of"):
        Delimiters(*pair)


@given(st.text("<think>/ ", max_size=40))
@settings(max_examples=60, deadline=None)
def test_an_escaped_text_has_no_delimiter(text):
    escaped = THINK.escaped(text)
    assert not THINK.within(escaped) and escaped.replace(" ", "") == text.replace(" ", "")
    assert THINK.within(text) or escaped == text


def test_limits_that_exclude_each_other():
    with pytest.raises(DataError, match=r"max_thoughts=1: allowed at least min_thoughts=2"):
        Limits(2, 1)


def test_coverage_counts_words_as_often_as_they_occur():
    assert word_coverage("a b b c", "b c d") == 0.5 and word_coverage("", "a") == 1.0
    assert canonical(" \uff21\u00a0\n b ") == "A b"
