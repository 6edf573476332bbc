"""Who judges: a model that writes JSON, or one whose likelihoods of the answers are compared."""

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Generator as Yielding
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Protocol

import torch

from decoding.generate import GenerationRequest, GenerationSettings, Generator
from decoding.likelihood import continuation_likelihoods
from models.causal import CausalTarget
from rewards.judge_prompts import JudgePrompt
from rewards.judge_replies import read_answer

_LONGEST_SAID = 2000


@dataclass(frozen=True)
class Question:
    """One question about texts.

    Attributes:
        id: decides the random numbers of a judge that samples.
        text: rendered.
    """

    id: str
    text: str


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        answer: one of those that the template allows; None: nothing valid.
        reason: one line, where there is none; its kind stands before a colon.
        said: the words, or the likelihoods, that the answer was read from.
    """

    answer: str | None
    reason: str = ""
    said: str = ""


# Replies by the id of their question, as they come.
Replies = Yielding[tuple[str, Reply], None, None]


class Backend(Protocol):
    """Answers questions of a template."""

    def ask(self, prompt: JudgePrompt, questions: Iterable[Question]) -> Replies:
        """A reply to every question, by its id and in any order."""
        ...

    def identity(self) -> dict[str, Any]:
        """Plain values that determine replies."""
        ...


class WrittenReplies:
    """A generator writes what it thinks: a server (`decoding.server`) or a model in this process.

    Args:
        generator: makes one of settings.
        settings: how it is to answer.
    """

    def __init__(self, generator: Callable[..., Generator], settings: GenerationSettings) -> None:
        self.settings = settings
        self.generator = generator(settings=settings)

    def ask(self, prompt: JudgePrompt, questions: Iterable[Question]) -> Replies:
        """Replies as the generator answers, which asks as many at a time as it is made for.

        Raises:
            ValueError: what concerns all requests, such as a server that is dead.
        """
        for result in self.generator.generate(_request(prompt, one) for one in questions):
            if result.error is not None:
                yield result.id, Reply(None, f"no answer: {result.error}")
                continue
            answer, reason = read_answer(result.text, prompt.field, prompt.answers)
            yield result.id, Reply(answer, reason, result.text[-_LONGEST_SAID:])

    def identity(self) -> dict[str, Any]:
        """The model, and the settings that it answers under."""
        return {
            "backend": "written",
            "model": self.generator.identity(),
            "settings": asdict(self.settings),
        }


def _request(prompt: JudgePrompt, question: Question) -> GenerationRequest:
    return GenerationRequest(question.id, messages=_messages(prompt, question.text, prompt.reply))


def _messages(prompt: JudgePrompt, question: str, reply: str = "") -> list[dict[str, str]]:
    content = f"{question}\n\n{reply.strip()}" if reply else question
    asked = [{"role": "user", "content": content}]
    if prompt.system:
        return [{"role": "system", "content": prompt.system.strip()}, *asked]
    return asked


class ConstrainedChoice:
    """A causal model in this process answers what it finds most likely.

        answer = argmax over allowed a of log p(" " + a | question, cue)

    Nothing is drawn, so asking again says the same.

    Args:
        target: the model; it is moved to `device`.
        batch_size: rows of a forward pass.
        chat: whether the question is a turn of a chat; null where the tokenizer has a template.
        before: what stands between cue and answer.
        device: "cpu", "cuda"; None takes a GPU if there is one.
    """

    def __init__(
        self,
        target: CausalTarget,
        batch_size: int = 32,
        chat: bool | None = None,
        before: str = " ",
        device: str | None = None,
    ) -> None:
        self.target, self.batch_size, self.before = target, batch_size, before
        self.chat = target.tokenizer.chat_template is not None if chat is None else chat
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.nn.Module.to(target.model, where)

    def ask(self, prompt: JudgePrompt, questions: Iterable[Question]) -> Replies:
        """Replies in order, some batches of questions at a time."""
        answers = list(prompt.answers)
        tokens = [self._tokens(self.before + answer) for answer in answers]
        incoming = iter(questions)
        while batch := list(islice(incoming, self.batch_size)):
            read = [self.read_ids(prompt, one.text) for one in batch]
            longest = self.target.max_positions + 1 - max(map(len, tokens))
            fitting = [n for n, ids in enumerate(read) if len(ids) <= longest]
            pairs = [(read[n], answer) for n in fitting for answer in tokens]
            found = continuation_likelihoods(self.target, pairs, self.batch_size)
            for n, question in enumerate(batch):
                if n not in fitting:
                    reason = f"too long a question: {len(read[n])} tokens, allowed {longest}"
                    yield question.id, Reply(None, reason)
                    continue
                first = fitting.index(n) * len(answers)
                scores = [one for one, _ in found[first : first + len(answers)]]
                yield question.id, most_likely(answers, scores)

    def read_ids(self, prompt: JudgePrompt, question: str) -> list[int]:
        """What the model reads before an answer, as tokens."""
        if self.chat:
            return self.target.chat_ids(_messages(prompt, question)) + self._tokens(prompt.cue)
        said = f"{prompt.system.strip()}\n\n{question}".strip()
        return self.target.text_ids(f"{said}\n\n{prompt.cue}")

    def _tokens(self, text: str) -> list[int]:
        return list(self.target.tokenizer.encode(text, add_special_tokens=False))

    def identity(self) -> dict[str, Any]:
        """The weights, the vocabulary, and how questions are put to them."""
        return {
            "backend": "choice",
            "model": {
                "target": self.target.name,
                "fingerprint": self.target.fingerprint,
                "dtype": self.target.dtype,
                "tokenizer": self.target.text_fingerprint,
            },
            "chat": self.chat,
            "before": self.before,
        }


def most_likely(answers: Sequence[str], scores: Sequence[float]) -> Reply:
    """The answer with the highest log-likelihood; two equal ones are no answer."""
    said = ", ".join(f"{a}: {score:.4f}" for a, score in zip(answers, scores, strict=True))
    best = [a for a, score in zip(answers, scores, strict=True) if score == max(scores)]
    if len(best) > 1:
        return Reply(None, f"equally likely answers: {said}", said)
    return Reply(best[0], said=said)
