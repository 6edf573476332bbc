"""Documents in two parts out of rows, and their continuations as they are kept."""

import math
from dataclasses import replace

import pytest
import torch

from data.errors import DataError
from data.journal import Journal
from decoding.generate import GenerationResult
from evaluation.held_out import (
    HeldOut,
    continue_all,
    document_of,
    read_held_out,
    suffix_likelihood,
)


def batch(ids, segment, response, index=(4,)):
    columns = {"input_ids": ids, "segment": segment, "response": response}
    return {name: torch.tensor([row]) for name, row in columns.items()} | {
        "index": torch.tensor(index)
    }


def test_prefixes_and_suffixes_of_all_documents():
    found = read_held_out(
        [
            batch([5, 6, 7, 8, 9, 0], [0, 0, 0, 1, 1, -1], [0, 1, 1, 0, 1, -1]),
            batch([1, 2, 3, 4, 5, 6], [0] * 6, [0, 0, 1, 0, 1, 1], (7,)),
        ],
        "made",
    )
    assert found == [
        HeldOut("4-0", [5], [6, 7]),
        HeldOut("4-1", [8], [9]),
        HeldOut("7-0", [1, 2], [3]),
    ]


def test_what_texts_documents_are_from():
    one = batch([5, 6, 7, 8, 9, 0], [0, 0, 0, 1, 1, -1], [0, 1, 1, 0, 1, -1])
    found = read_held_out([one | {"origin": torch.tensor([[3, 0, -1]])}, one], "made")
    assert [document.document for document in found] == [3, 0, None, None]
    assert [document_of(vars(document), "id") for document in found] == [
        "document 3", "document 0", "4-0", "4-1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("response", "part"), [([0, 0], "suffix"), ([1, 1], "prefix")], ids=["suffix", "prefix"]
)
def test_both_parts_are_needed(response, part):
    with pytest.raises(DataError, match=f"data=made: document 4-0 has no {part}"):
        read_held_out([batch([1, 2], [0, 0], response)], "made")
    with pytest.raises(DataError, match="allowed: data=prefix_suffix"):
        read_held_out([{"input_ids": torch.zeros(1, 2), "index": torch.tensor([0])}], "made")


class Doubling:
    def generate(self, requests):
        for request in requests:
            if request.prompt_ids == [9]:
                yield GenerationResult(request.id, error="too long")
            else:
                text = str(2 * request.prompt_ids[0])
                yield GenerationResult(request.id, text=text, num_tokens=1, finish="length")


def test_continuations_are_kept_and_not_written_again(tmp_path):
    documents = [HeldOut(str(n), [n], [0]) for n in (3, 9, 4)]
    with Journal(tmp_path / "rows.jsonl") as journal:
        done = []
        errors = continue_all(documents, Doubling(), "model", journal, done.append)
        assert errors == {"9": "too long"} and sum(done) == 3
        assert journal.read("model/4") == {
            "id": "model/4", "text": "8", "num_tokens": 1, "finish": "length",
        }  # fmt: skip
        done.clear()
        continue_all(documents, Doubling(), "model", journal, done.append)
        assert sum(done) == 1, "what failed is tried again"
        continue_all(documents[:1], Doubling(), "other", journal, done.append)
        assert len(journal) == 3


def test_likelihood_is_per_token():
    documents = [HeldOut("1", [1], [1, 2, 3]), HeldOut("2", [1], [1])]
    assert suffix_likelihood([6.0, 4.0], documents).value == 2.5


def test_the_error_of_a_likelihood_is_that_over_texts():
    nats, tokens = [6.0, 4.0, 5.0, 1.0], [3, 1, 2, 2]
    alone = [HeldOut(str(n), [1], [1] * size) for n, size in enumerate(tokens)]
    shared = [replace(one, document=n // 2) for n, one in enumerate(alone)]
    # Texts of 10 nats in 4 tokens and 6 in 4: r = 2, deviations 2 and -2, n / (n - 1) = 2.
    value, error = suffix_likelihood(nats, shared)
    assert value == suffix_likelihood(nats, alone).value == 2.0
    assert error == pytest.approx(math.sqrt(2 * 8) / 8)
    # Deviations 0, 2, 1 and -3, n / (n - 1) = 4 / 3.
    assert suffix_likelihood(nats, alone).standard_error == pytest.approx(math.sqrt(4 / 3 * 14) / 8)
    one_text = [replace(one, document=5) for one in alone]
    assert math.isnan(suffix_likelihood(nats, one_text).standard_error)
