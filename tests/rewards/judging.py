"""Judges for tests: templates of a line, and generators that say what they are told to."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from decoding.generate import GenerationRequest, GenerationResult, GenerationSettings
from decoding.server import ServerGenerator
from models.causal import CausalTarget
from models.tiny_causal import tiny_causal
from rewards.continuation import Case, Pair, Preference
from rewards.judge_backends import WrittenReplies
from rewards.judge_prompts import JudgePrompt
from rewards.judges import PromptedPreference, PromptedReward


def score_prompt(**changed: Any) -> JudgePrompt:
    """Asks with the candidate alone, so that the candidate says what a server does."""
    options = {
        "name": "toy", "version": 1, "question": "$candidate", "reply": "", "field": "SCORE",
        "answers": {"1": 1.0, "0.5": 0.5, "0": 0.0},
    }  # fmt: skip
    return JudgePrompt(**{**options, **changed})


def winner_prompt(**changed: Any) -> JudgePrompt:
    """Asks with both candidates."""
    options = {
        "name": "toy_pair", "version": 1, "question": "$first|$second", "reply": "",
        "field": "winner", "answers": {"A": "first", "B": "second", "C": "tie"},
    }  # fmt: skip
    return JudgePrompt(**{**options, **changed})


def case(candidate: str, name: str = "") -> Case:
    return Case(name or candidate, "a prefix", "a reference", candidate)


class Scripted:
    """A generator that answers by a function of the question and the request's id."""

    def __init__(self, says: Callable[[str, str], str], settings: GenerationSettings) -> None:
        self.says, self.settings = says, settings
        self.asked: list[GenerationRequest] = []

    def identity(self) -> dict[str, Any]:
        return {"target": "scripted"}

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[GenerationResult]:
        for request in list(requests):
            self.asked.append(request)
            text = self.says(request.messages[-1]["content"], request.id)
            yield GenerationResult(request.id, text=text, finish="stop")


def scripted(says: Callable[[str, str], str]) -> WrittenReplies:
    """A backend that writes what `says` says."""
    return WrittenReplies(
        lambda settings: Scripted(says, settings), GenerationSettings(temperature=0.7)
    )


def server_reward(url: str, max_failures: int = 100, **options: Any) -> PromptedReward:
    """A judge behind a server that never stops by itself, unless told to."""
    fast = {
        "retries": 0, "backoff_s": 0.0, "concurrency": 4, "timeout_s": 20.0, "token_ids": "none",
        "model": "toy",
    }  # fmt: skip
    own = {key: options.pop(key) for key in list(options) if key in fast}
    backend = WrittenReplies(
        lambda settings: ServerGenerator(
            settings, url, max_failures=max_failures, **{**fast, **own}
        ),
        GenerationSettings(max_new_tokens=50),
    )
    never = {"max_invalid_rate": 1.0, "max_failures": 1000}
    return PromptedReward(score_prompt(), backend, **{**never, **options})


class Biased:
    """Always prefers what is shown first, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def compare(self, pairs: list[Pair]) -> list[Preference]:
        self.asked += len(pairs)
        return [Preference("first") for _ in pairs]

    def identity(self) -> dict[str, Any]:
        return {"judge": "biased"}


class Longer:
    """Prefers the longer text, whatever the order."""

    def compare(self, pairs: list[Pair]) -> list[Preference]:
        return [
            Preference("tie" if len(p.first) == len(p.second)
                       else "first" if len(p.first) > len(p.second) else "second")
            for p in pairs
        ]  # fmt: skip

    def identity(self) -> dict[str, Any]:
        return {"judge": "longer"}


def pairwise(says: Callable[[str, str], str], **options: Any) -> PromptedPreference:
    return PromptedPreference(winner_prompt(), scripted(says), **options)


@functools.cache
def taught() -> CausalTarget:
    """A tiny model that has learned to answer "good" by {"SCORE": 1} and "bad" by {"SCORE": 0}."""
    target = tiny_causal(num_hidden_layers=2, hidden_size=32, init_std=0.02, length=64)
    model, end = target.model, target.tokenizer.eos_token_id
    rows = []
    for said, score in (("good", 1), ("bad", 0)):
        prompt = target.chat_ids([{"role": "user", "content": said}])
        answer = [*target.tokenizer.encode(f'{{"SCORE": {score}}}'), end]
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    model.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        for ids, labels in rows:
            model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)
    return target
