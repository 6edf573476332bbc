"""Judges that are asked in words: scores, repeats, cache, counts, and when they give up."""

import json

import pytest

from decoding.generate import GenerationSettings
from decoding.local import LocalGenerator
from models.tiny_causal import tiny_causal
from rewards.continuation import Case, Judgement, Pair, Preference
from rewards.judge_backends import WrittenReplies
from rewards.judge_counts import JudgeError
from rewards.judges import ByScore, CombinedReward, PromptedPreference, PromptedReward
from tests.rewards.judging import case, pairwise, score_prompt, scripted, winner_prompt

PATIENT = {"max_failures": 100, "max_invalid_rate": 1.0}


def echoing(**options):
    """The candidate is what the judge says."""
    return PromptedReward(score_prompt(), scripted(lambda text, _: text), **options)


def score(value):
    return json.dumps({"SCORE": value})


def test_scores_are_what_answers_mean_and_invalid_ones_are_no_zeros():
    judge = echoing(**PATIENT)
    found = judge.judge([case(score(1)), case("hm"), case(score(0)), case(score(0.5))])
    assert found == [
        Judgement(1.0), Judgement(None, "no JSON object: hm"), Judgement(0.0), Judgement(0.5),
    ]  # fmt: skip
    assert judge.counts.metrics() == {
        "asked": 4, "valid": 3, "cached": 0, "invalid": 1, "invalid/no JSON object": 1,
        "invalid_rate": 0.25,
    }  # fmt: skip
    assert echoing().counts.metrics() == {"asked": 0, "valid": 0, "cached": 0, "invalid": 0}
    assert echoing().judge([]) == []


def alternating(text, request_id, seen=None):
    """Asked again about the same it says something else; about "bad" the first time nothing."""
    earlier = seen.setdefault(text, [])
    earlier.append(request_id)
    return "?" if text == "bad" and len(earlier) == 1 else score(len(earlier) % 2)


def test_repeats_have_seeds_of_their_own_and_are_averaged_without_the_invalid_ones():
    seen = {}
    backend = scripted(lambda text, name: alternating(text, name, seen))
    judge = PromptedReward(score_prompt(), backend, repeats=3, **PATIENT)
    found = judge.judge([case("good"), case("bad")])
    assert found == [Judgement(2 / 3), Judgement(1 / 2)]
    assert all(len(names) == len(set(names)) == 3 for names in seen.values())
    assert judge.counts.metrics()["asked"] == 6 and judge.counts.invalid.total() == 1
    again = {}
    backend = scripted(lambda text, name: alternating(text, name, again))
    PromptedReward(score_prompt(), backend, repeats=3, **PATIENT).judge([case("bad"), case("good")])
    assert again == seen, "seeds depend on the question alone"


def test_of_repeats_the_majority_prefers():
    answers = {"ab": "AAB", "ba": "ABB", "tt": "ABC", "bad": "xyz", "half": "xBz"}
    count = {}

    def says(text, _):
        name = text.split("|")[0]
        count[name] = count.get(name, -1) + 1
        return json.dumps({"winner": answers[name][count[name]]})

    judge = pairwise(says, repeats=3, **PATIENT)
    found = judge.compare([Pair(name, "", name, "other") for name in answers])
    assert [one.winner for one in found] == ["first", "second", "tie", None, "second"]
    assert found[3] == Preference(None, 'not an allowed answer: "x"')


def test_equal_questions_are_asked_once():
    judge = echoing()
    assert judge.judge([case(score(1), "a"), case(score(1), "b")]) == [Judgement(1.0)] * 2
    assert len(judge.backend.generator.asked) == 1
    assert judge.counts.metrics()["cached"] == 1 and judge.counts.metrics()["asked"] == 2


@pytest.mark.parametrize("place", ["file", "memory"])
def test_what_is_cached_is_not_asked_again(tmp_path, place):
    path = tmp_path / "answers.jsonl" if place == "file" else None
    judge = echoing(cache=path, **PATIENT)
    cases = [case(score(1)), case("hm"), case(score(0))]
    first = judge.judge(cases)
    judge.close()
    if path:
        judge = echoing(cache=path, repeats=1, max_characters=1999, **PATIENT)
    asked = len(judge.backend.generator.asked)
    assert judge.judge(cases) == first
    fresh = [one.messages[-1]["content"] for one in judge.backend.generator.asked[asked:]]
    assert fresh == ["hm"], "only what was invalid"
    assert judge.counts.cached == 2
    if path:
        row = json.loads(path.read_text().splitlines()[0])
        assert (row["answer"], row["said"]) == ("1", score(1))


@pytest.mark.parametrize("what", ["template", "backend"])
def test_another_judge_has_other_answers(tmp_path, what):
    path = tmp_path / "answers.jsonl"
    echoing(cache=path).judge([case(score(1))])
    prompt = score_prompt(version=2) if what == "template" else score_prompt()
    backend = scripted(lambda text, _: text)
    if what == "backend":
        backend.settings = GenerationSettings(temperature=0.7, seed=5)
    judge = PromptedReward(prompt, backend, cache=path)
    judge.judge([case(score(1))])
    assert judge.counts.cached == 0 and len(path.read_text().splitlines()) == 2


def test_orders_are_different_questions():
    judge = pairwise(lambda text, _: json.dumps({"winner": "A"}))
    judge.compare([Pair("1", "", "x", "y"), Pair("2", "", "y", "x")])
    assert len(judge.backend.generator.asked) == 2


def test_every_text_is_cut_and_nothing_but_the_template_is_shown():
    prompt = score_prompt(question="$prefix/$candidate")
    judge = PromptedReward(prompt, scripted(lambda *_: score(1)), max_characters=3)
    judge.judge([Case("1", "abcdef", "reference", "uvwxyz")])
    assert judge.backend.generator.asked[0].messages == [{"role": "user", "content": "def/uvw"}]


def test_a_judge_writes_what_the_reply_asks_for_and_knows_who_it_is():
    prompt = score_prompt(reply="JSON please.\n", system="You judge.\n")
    judge = PromptedReward(prompt, scripted(lambda *_: score(1)))
    judge.judge([case("text")])
    assert judge.backend.generator.asked[0].messages == [
        {"role": "system", "content": "You judge."},
        {"role": "user", "content": "text\n\nJSON please."},
    ]


def test_too_many_failures_in_a_row_end_the_run():
    judge = echoing(max_failures=3)
    judge.judge([case("a"), case("b"), case(score(1)), case("c"), case("d")])
    with pytest.raises(JudgeError, match=r"^judge toy: 3 in a row .*max_failures=3.*: e$"):
        judge.judge([case("e"), case(score(0))])


def test_too_large_a_share_of_failures_ends_the_run():
    judge = echoing(max_invalid_rate=0.5, window=4)
    judge.judge([case("a"), case(score(1)), case("b"), case(score(0))])
    assert judge.counts.invalid.total() == 2, "half of them are borne"
    judge.judge([case(score(0.5))])
    with pytest.raises(JudgeError, match=r"judge toy: 3 of the last 4 .*\(max_invalid_rate=0.5\)"):
        judge.judge([case("c"), case("d"), case("e")])


def test_cached_answers_do_not_hide_a_failing_judge(tmp_path):
    path = tmp_path / "answers.jsonl"
    echoing(cache=path).judge([case(score(1))])
    judge = echoing(cache=path, max_failures=2)
    with pytest.raises(JudgeError):
        judge.judge([case("a"), case(score(1)), case("b")])


def test_what_was_answered_before_the_stop_is_kept(tmp_path):
    path = tmp_path / "answers.jsonl"
    judge = echoing(cache=path, max_failures=1)
    with pytest.raises(JudgeError):
        judge.judge([case(score(1)), case("a"), case(score(0))])
    assert len(path.read_text().splitlines()) == 1


def test_a_local_model_that_writes_no_json_gives_no_rewards():
    target = tiny_causal(num_hidden_layers=2, hidden_size=32)
    backend = WrittenReplies(
        lambda settings: LocalGenerator(target, settings), GenerationSettings(max_new_tokens=5)
    )
    judge = PromptedReward(score_prompt(), backend, **PATIENT)
    found = judge.judge([case("a"), case("b")])
    assert [one.score for one in found] == [None, None]
    assert judge.counts.invalid == {"no JSON object": 2}
    with pytest.raises(JudgeError):
        PromptedReward(score_prompt(), backend, max_failures=2).judge([case("a"), case("b")])


class Fixed:
    def __init__(self, scores):
        self.scores = scores

    def judge(self, cases):
        return [Judgement(self.scores[one.candidate], "why") for one in cases]

    def identity(self):
        return {"fixed": self.scores}


def test_sums_of_rewards():
    parts = {"safety": Fixed({"a": 1.0, "b": 1.0}), "fact": Fixed({"a": 0.5, "b": None})}
    reward = CombinedReward(parts)
    assert reward.judge([case("a"), case("b")]) == [Judgement(1.5), Judgement(None, "fact: why")]
    assert reward.identity()["parts"]["fact"] == {"fixed": {"a": 0.5, "b": None}}
    with pytest.raises(ValueError, match="nothing to add up"):
        CombinedReward({})


def test_of_two_scores_the_higher_one_is_preferred():
    judge = ByScore(Fixed({"a": 1.0, "b": 0.5, "c": None}))
    pairs = [Pair(f"{x}{y}", "", x, y) for x, y in ("ab", "ba", "aa", "ac", "ca")]
    assert [one.winner for one in judge.compare(pairs)] == ["first", "second", "tie", None, None]


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda b: PromptedReward(winner_prompt(), b), r"has no \$candidate"),
        (lambda b: PromptedPreference(score_prompt(), b), r"has no \$first; .* \$first and \$sec"),
        (lambda b: PromptedReward(score_prompt(answers={"1": True, "0": 0}), b), "answers.1=True"),
        (lambda b: PromptedPreference(winner_prompt(answers={"A": "a", "B": 1}), b), "answers.A=a"),
        (lambda b: echoing(repeats=0), "repeats=0"),
        (lambda b: echoing(window=0), "window=0"),
        (lambda b: echoing(max_invalid_rate=1.5), "max_invalid_rate=1.5"),
    ],
    ids=["pairwise", "pointwise", "score", "winner", "repeats", "window", "rate"],
)
def test_bad_options(build, reason):
    with pytest.raises(ValueError, match=reason):
        build(scripted(lambda *_: ""))
