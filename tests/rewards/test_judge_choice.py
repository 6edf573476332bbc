"""Judging by likelihood equals the brute force over the allowed answers."""

import pytest
import torch

from models.tiny_causal import tiny_causal
from rewards.continuation import Pair
from rewards.judge_backends import ConstrainedChoice, Question, most_likely
from rewards.judges import PromptedPreference, PromptedReward
from tests.rewards.judging import case, score_prompt, winner_prompt

ANSWERS = {"none": 1.0, "possible": 0.5, "definite": 0.0}


@pytest.fixture(scope="module")
def target():
    return tiny_causal(num_hidden_layers=2, hidden_size=32, dtype="float64")


def brute_force(target, ids, answers):
    """log p of every answer behind the ids, a whole forward pass each, token by token."""
    scores = []
    for answer in answers:
        said = target.tokenizer.encode(answer, add_special_tokens=False)
        logits = target.model(input_ids=torch.tensor([ids + said])).logits[0].log_softmax(-1)
        scores.append(sum(float(logits[len(ids) - 1 + n, token]) for n, token in enumerate(said)))
    return scores


@pytest.mark.parametrize("chat", [True, False])
def test_the_answer_is_the_most_likely_one(target, chat):
    prompt = score_prompt(answers=ANSWERS, system="You judge.", cue="Made up:")
    backend = ConstrainedChoice(target, batch_size=3, chat=chat, device="cpu")
    questions = [Question(str(n), "text " * (n % 4) + str(n)) for n in range(7)]
    found = dict(backend.ask(prompt, questions))
    assert [*found] == [one.id for one in questions]
    for question in questions:
        if chat:
            turns = [("system", "You judge."), ("user", question.text)]
            ids = target.chat_ids([{"role": role, "content": text} for role, text in turns])
            ids += target.tokenizer.encode("Made up:", add_special_tokens=False)
        else:
            ids = target.tokenizer.encode(f"You judge.\n\n{question.text}\n\nMade up:")
        scores = brute_force(target, ids, [f" {answer}" for answer in ANSWERS])
        best = [*ANSWERS][scores.index(max(scores))]
        assert found[question.id].answer == best
        told = [float(part.split(": ")[1]) for part in found[question.id].said.split(", ")]
        assert told == pytest.approx(scores, abs=1e-4)


def test_scores_and_preferences_come_from_choices(target):
    backend = ConstrainedChoice(target, device="cpu")
    reward = PromptedReward(score_prompt(answers=ANSWERS), backend)
    ids = backend.read_ids(reward.template, "some text")
    scores = brute_force(target, ids, [f" {answer}" for answer in ANSWERS])
    (found,) = reward.judge([case("some text")])
    assert found.score == [*ANSWERS.values()][scores.index(max(scores))]
    judge = PromptedPreference(winner_prompt(answers={"A": "first", "B": "second"}), backend)
    (found,) = judge.compare([Pair("1", "", "x", "y")])
    scores = brute_force(target, backend.read_ids(judge.template, "x|y"), [" A", " B"])
    assert found.winner == ("first" if scores[0] > scores[1] else "second")


def test_a_question_that_does_not_fit_is_invalid_not_cut(target):
    backend = ConstrainedChoice(target, batch_size=2, chat=False, device="cpu")
    overhead = len(backend.read_ids(score_prompt(), ""))
    longest = target.max_positions + 1 - len(" 0.5")
    texts = ["x" * (longest - overhead + more) for more in (0, 1)] + ["short"]
    found = dict(backend.ask(score_prompt(), [Question(str(n), t) for n, t in enumerate(texts)]))
    assert [found[name].answer is None for name in "012"] == [False, True, False]
    assert found["1"].reason == f"too long a question: {longest + 1} tokens, allowed {longest}"


def test_equally_likely_answers_are_none():
    assert most_likely("AB", [-1.0, -2.0]).answer == "A"
    assert most_likely("AB", [-2.0, -1.0]).answer == "B"
    assert most_likely("ABC", [-1.0, -1.0, -2.0]).answer is None


def test_who_judges_is_part_of_the_identity(target):
    one = ConstrainedChoice(target, device="cpu").identity()
    assert one["model"]["fingerprint"] == target.fingerprint and one["chat"] is True
    assert ConstrainedChoice(target, before="", device="cpu").identity() != one
