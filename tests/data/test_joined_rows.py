"""Whole documents joined into rows: nothing lost, nothing cut that fits, segments told apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.blocks import (
    FEATURE_FILL,
    IDS,
    LENGTH,
    ORIGIN,
    RESPONSE,
    SEGMENT,
    PackingReport,
    TokenBatch,
)
from data.errors import DataError
from data.packing import PackingOptions, pack
from data.tokenization import load_tokenizer, special_ids

TOKENIZER = load_tokenizer("word", documents=["a b c d e f g h"])
SPECIAL = special_ids(TOKENIZER)
EOS, PAD = SPECIAL.eos, SPECIAL.pad
LENGTH_OF_ROW = 12


def options(**changes):
    return PackingOptions(
        **{"length": LENGTH_OF_ROW, "wrap": False, "insert_special": False, "insert_eos": False,
           "join": True, **changes}
    )  # fmt: skip


def rows_of(conversations, **changes):
    """Pack (prompt tokens, answer tokens) pairs; ids are running numbers, so each occurs once."""
    report = PackingReport()
    lengths = np.array([prompt + answer for prompt, answer in conversations])
    flags = [np.repeat(np.array([0, 1], np.int8), pair) for pair in conversations]
    ids = np.arange(10, lengths.sum() + 10).astype(np.uint32)
    batch = TokenBatch({IDS: ids, RESPONSE: np.concatenate(flags)}, lengths)
    made = pack([], TOKENIZER, SPECIAL, options(**changes), report, lambda *_: iter([batch]))
    blocks = list(made)
    joined = {n: np.concatenate([b[n] for b in blocks]) for n in blocks[0]} if blocks else {}
    return joined, report, ids, lengths


@given(
    st.lists(st.tuples(st.integers(1, 15), st.integers(1, 15)), min_size=1, max_size=30),
)
def test_every_answered_document_is_in_one_row_once(conversations):
    joined, report, ids, lengths = rows_of(conversations)
    expected, lost, cut = [], 0, 0
    for (prompt, answer), part in zip(
        conversations, np.split(ids, np.cumsum(lengths)[:-1]), strict=True
    ):
        if min(answer, LENGTH_OF_ROW - prompt) < 2:
            lost += 1
            continue
        cut += len(part) > LENGTH_OF_ROW
        expected.append(tuple(part[:LENGTH_OF_ROW]))
    found = []
    for row in range(len(joined.get(IDS, []))):
        segments = joined[SEGMENT][row]
        size = joined[LENGTH][row]
        assert (segments[:size] >= 0).all() and (segments[size:] == -1).all()
        assert (joined[RESPONSE][row, size:] == -1).all()
        numbers = np.unique(segments[:size])
        assert (numbers == np.arange(len(numbers))).all()
        found += [tuple(joined[IDS][row][segments == number]) for number in numbers]
    assert sorted(found) == sorted(expected)
    assert report.unanswered_documents == lost and report.truncated_documents == cut
    kept = sum(map(len, found))
    assert kept + report.dropped_tokens + report.truncated_tokens == len(ids)
    assert report.rows == len(joined.get(IDS, []))


def test_short_documents_fill_the_room_that_long_ones_leave():
    joined, _, _, _ = rows_of([(2, 2), (4, 5), (1, 2), (5, 3)])
    # 9 + 3 and 8 + 4 fill two rows of 12.
    assert joined[LENGTH].tolist() == [12, 12]


def test_a_row_has_no_more_documents_than_segments_have_numbers():
    report = PackingReport()
    batch = TokenBatch(
        {IDS: np.ones(600, np.uint32), RESPONSE: np.ones(600, np.int8)}, np.full(300, 2)
    )
    blocks = list(
        pack([], TOKENIZER, SPECIAL, options(length=600), report, lambda *_: iter([batch]))
    )
    assert [len(np.unique(row[row >= 0])) for row in blocks[0][SEGMENT]] == [128, 128, 44]


def test_one_document_to_a_row():
    report = PackingReport()
    batch = TokenBatch(
        {IDS: np.ones(9, np.uint32), RESPONSE: np.ones(9, np.int8)}, np.array([2, 4, 3])
    )
    blocks = list(
        pack([], TOKENIZER, SPECIAL, options(per_row=1), report, lambda *_: iter([batch]))
    )
    assert blocks[0][LENGTH].tolist() == [4, 3, 2]


@pytest.mark.parametrize("per_row", [1, 2, None])
def test_origins_stay_with_their_documents(per_row):
    sizes, origins = np.array([2, 7, 2, 5, 1, 2]), np.array([40, 41, 42, 41, 43, 40])
    # Every token is the place of its document.
    ids = np.repeat(np.arange(6), sizes).astype(np.uint32)
    batch = TokenBatch({IDS: ids, RESPONSE: np.ones(19, np.int8)}, sizes, origins)
    (block,) = pack(
        [], TOKENIZER, SPECIAL, options(per_row=per_row), PackingReport(), lambda *_: iter([batch])
    )
    assert block[ORIGIN].shape == (len(block[IDS]), per_row or 128)
    seen = []
    for row_ids, segment, row_origins in zip(
        block[IDS], block[SEGMENT], block[ORIGIN], strict=True
    ):
        number = segment.max() + 1
        assert (row_origins[number:] == FEATURE_FILL).all()
        for place in range(number):
            (document,) = set(row_ids[segment == place].tolist())
            assert row_origins[place] == origins[document]
            seen.append(document)
    # That of one token has no second one to be predicted.
    assert sorted(seen) == [0, 1, 2, 3, 5]


def test_joining_leaves_documents_as_they_are():
    for changes in ({"wrap": True}, {"insert_special": True}):
        with pytest.raises(DataError, match=r"data\.join=true.*data\.wrap=false"):
            options(**changes)
    with pytest.raises(DataError, match=r"data\.join=true: conversations.*insert_valid_eos false"):
        rows_of([(2, 2)], insert_eos=True)


def test_caches_of_older_options_are_known_by_the_same_keys():
    old = {"length": 12, "wrap": False, "insert_special": False, "insert_eos": False}
    assert options(join=False, align=1).identity() == old
    assert options(align=1).identity() == old | {"join": True, "per_row": None}
    assert options(align=4).identity() == old | {"join": True, "per_row": None, "align": 4}


def packed(texts, **changes):
    """Pack plain texts of the words a .. h; their ids stand for them."""
    report = PackingReport()
    documents = [{"text": text} for text in texts]
    blocks = list(pack(documents, TOKENIZER, SPECIAL, options(**changes), report))
    names = dict(enumerate(TOKENIZER.convert_ids_to_tokens(range(len(TOKENIZER)))))
    names |= {EOS: ".", PAD: "_"}
    shown = ["".join(names[int(i)] for i in row) for block in blocks for row in block[IDS]]
    return shown, blocks, report


def test_aligned_documents_by_hand():
    # Sizes 5, 3, 2 and 4 take 8, 4, 4 and 4 places: two rows.
    (block,) = (rows := packed(["a b c d e", "f g h", "a b", "c d e f"], align=4))[1]
    assert rows[0] == ["abcde...fgh.", "ab..cdef____"]
    assert block[SEGMENT].tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1, 1, 1, -1, -1, -1, -1],
    ]
    assert block[RESPONSE].tolist() == [
        [1, 1, 1, 1, 1, -1, -1, -1, 1, 1, 1, -1],
        [1, 1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1],
    ]
    assert block[LENGTH].tolist() == [12, 8]
    assert rows[2].fill_tokens == 6 and "6 fill tokens" in str(rows[2])


def test_aligned_conversations_keep_their_prompts():
    joined, report, _, _ = rows_of([(3, 3), (1, 2)], align=4)
    assert joined[IDS].tolist() == [[10, 11, 12, 13, 14, 15, EOS, EOS, 16, 17, 18, EOS]]
    assert joined[RESPONSE].tolist() == [[0, 0, 0, 1, 1, 1, -1, -1, 0, 1, 1, -1]]
    assert joined[SEGMENT].tolist() == [[0] * 8 + [1] * 4]
    assert report.fill_tokens == 3


def test_documents_end_with_eos_if_asked():
    shown, (block,), report = packed(["a b c", " ", "d e", "f g h a b"], insert_eos=True)
    assert shown == ["fghab.abc.__", "de._________"]
    assert RESPONSE not in block and report.empty_documents == 1
    assert block[SEGMENT][0].tolist() == [0] * 6 + [1] * 4 + [-1] * 2


def test_the_eos_of_a_document_is_text_and_fill_is_not():
    shown, (block,), _ = packed(["a b c", "d e f g"], insert_eos=True, align=4)
    assert shown == ["defg....abc."]
    assert block[RESPONSE].tolist() == [[1, 1, 1, 1, 1, -1, -1, -1, 1, 1, 1, 1]]


def test_a_document_that_fills_its_row_loses_its_end_and_its_eos():
    shown, (block,), report = packed(["a b c d e f g h a b c d e"], insert_eos=True, align=4)
    assert shown == ["abcdefghabcd"] and block[RESPONSE].tolist() == [[1] * 12]
    assert (report.truncated_documents, report.truncated_tokens) == (1, 2)


def test_features_have_no_value_on_eos_and_fill():
    report = PackingReport()
    document = {"text": "a b", "features": {"depth": [5, 6]}}
    aligned = options(insert_eos=True, align=4)
    (block,) = pack([document, document], TOKENIZER, SPECIAL, aligned, report)
    assert block["depth"].tolist() == [[5, 6, -1, -1] * 2 + [-1] * 4]
    assert block[RESPONSE].tolist() == [[1, 1, 1, -1] * 2 + [-1] * 4]


@given(
    st.lists(st.tuples(st.integers(0, 15), st.integers(1, 15)), min_size=1, max_size=30),
    st.sampled_from([1, 2, 3, 4, 6, 12]),
)
def test_blocks_never_mix_documents(conversations, align):
    joined, report, ids, lengths = rows_of(conversations, align=align)
    found = []
    for row in range(len(joined.get(IDS, []))):
        segments, response = joined[SEGMENT][row], joined[RESPONSE][row]
        size = joined[LENGTH][row]
        assert size % align == 0
        assert (segments[:size] >= 0).all() and (segments[size:] == FEATURE_FILL).all()
        assert (joined[IDS][row, size:] == PAD).all() and (response[size:] == FEATURE_FILL).all()
        assert (segments.reshape(-1, align) == segments[::align, None]).all()
        for number in range(segments.max() + 1):
            here = segments == number
            text = here & (response != FEATURE_FILL)
            fill = here & ~text
            assert np.flatnonzero(here)[0] % align == 0 and fill.sum() < align
            assert (joined[IDS][row][fill] == EOS).all()
            assert not fill.any() or np.flatnonzero(fill)[0] > np.flatnonzero(text)[-1]
            found.append((tuple(joined[IDS][row][text]), tuple(response[text])))
    expected = []
    for (prompt, answer), part in zip(
        conversations, np.split(ids, np.cumsum(lengths)[:-1]), strict=True
    ):
        if min(answer, LENGTH_OF_ROW - prompt) >= 2:
            flags = [0] * prompt + [1] * answer
            expected.append((tuple(part[:LENGTH_OF_ROW]), tuple(flags[:LENGTH_OF_ROW])))
    assert sorted(found) == sorted(expected)
    kept = sum(len(tokens) for tokens, _ in found)
    assert kept + report.dropped_tokens + report.truncated_tokens == len(ids)
    assert kept + report.fill_tokens == sum(joined.get(LENGTH, []))


@given(
    st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=15), min_size=1, max_size=20),
    st.sampled_from([1, 4, 6]),
    st.booleans(),
)
def test_plain_documents_are_found_again(words, align, insert_eos):
    """However short they are: only the second half of a conversation has to be answered."""
    _, blocks, report = packed(map(" ".join, words), align=align, insert_eos=insert_eos)
    found = []
    for block in blocks:
        text = block[RESPONSE] == 1 if align > 1 else block[SEGMENT] >= 0
        for row in range(len(text)):
            for number in range(block[SEGMENT][row].max() + 1):
                found.append(block[IDS][row][text[row] & (block[SEGMENT][row] == number)].tolist())
    whole = [TOKENIZER.convert_tokens_to_ids(w) + [EOS] * insert_eos for w in words if w]
    assert sorted(found) == sorted(tokens[:LENGTH_OF_ROW] for tokens in whole)
    assert report.dropped_tokens == 0
    assert report.truncated_tokens == sum(max(0, len(t) - LENGTH_OF_ROW) for t in whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"align": 5}, r"data\.align=5: .*divides model\.length=12"),
        ({"align": 0}, r"data\.align=0: allowed an integer >= 1"),
        ({"align": 4, "join": False}, r"data\.align=4: .*data\.join=true"),
    ],
)
def test_alignments_that_are_refused(changes, message):
    with pytest.raises(DataError, match=message) as error:
        options(**changes)
    assert "\n" not in str(error.value)
