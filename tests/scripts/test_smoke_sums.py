"""The sums that the recipes of thinking mid-training are tried with."""

from data.annotation import source_sha
from data.worked_sums import sums_of, worked
from scripts.thinking.smoke_sums import QUESTIONS, SIZES, chain, documents, questions


def test_sums_of_the_smoke_corpus():
    """Sums are right, the annotator finds each of them, and no document is there twice."""
    for split, number in SIZES.items():
        rows = list(documents(split))
        assert len({source_sha(row["text"]) for row in rows}) == number
        for row in rows:
            lines = row["text"].splitlines()
            assert [text for _, text in sums_of(row["text"])] == [
                line.rpartition(" = ")[0] for line in lines
            ]
            for line in lines:
                text, _, answer = line.rpartition(" = ")
                assert worked(text).rpartition(" = ")[2] == answer and int(answer) >= 0
    asked = list(questions())
    assert len(asked) == QUESTIONS == len({row["question"] for row in asked})
    assert all(worked(row["question"][:-2]).endswith(f"= {row['answer']}") for row in asked)
    assert chain("a") == chain("a") != chain("b")
