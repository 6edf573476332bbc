"""Who answers the prompts of an acceptance measurement, and the rows it leaves.

An answerer turns conversations into replies with their verify cycles: here with a target in this
process, in `evaluation.server_acceptance` with a server that runs draft and target.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from data.errors import DataError
from decoding.drafts import Draft
from decoding.speculate import speculate
from decoding.verification import Verification
from evaluation.degeneration import is_degenerate
from models.causal import CausalTarget
from objectives.keyed import fold_key

Message = dict[str, str]


@dataclass(frozen=True)
class Question:
    """One turn to answer.

    Attributes:
        benchmark: the prompt set.
        id: of the prompt.
        turn: its number in the conversation, from 0.
        messages: the conversation so far; the last turn is the user's.
    """

    benchmark: str
    id: str
    turn: int
    messages: Sequence[Message]

    @property
    def key(self) -> int:
        """The request's number among sampled answers, the same in every batch and order."""
        name = f"{self.benchmark}\n{self.id}\n{self.turn}"
        # Half a surrogate pair, which JSON can bring, has no other bytes.
        return fold_key(list(name.encode("utf-8", "surrogatepass")))


@dataclass(frozen=True)
class Reply:
    """One answer, or why there is none.

    Attributes:
        text: without special tokens.
        token_ids: None where a server does not give them.
        tokens: how many there are, an end token included.
        cycles: verify passes; None where a server only counts over all requests.
        accepted, last_uncut: see `evaluation.acceptance`; None where a server does not tell.
        finish: stop or length.
        error: why there is no answer; then nothing else counts.
    """

    text: str = ""
    token_ids: Sequence[int] | None = None
    tokens: int = 0
    cycles: int | None = None
    accepted: Sequence[int] | None = None
    last_uncut: int | None = None
    finish: str = ""
    error: str | None = None

    @property
    def degenerate(self) -> bool:
        """Whether it ends in a loop: of tokens, or of words where there are none."""
        return is_degenerate(self.text.split() if self.token_ids is None else self.token_ids)


@runtime_checkable
class Answerer(Protocol):
    """Answers questions with a draft."""

    @property
    def drafted(self) -> int:
        """K, drafted tokens per verify cycle."""
        ...

    def answer(self, questions: Sequence[Question]) -> list[Reply]:
        """One reply per question, in order."""
        ...


@dataclass(frozen=True)
class LocalAnswerer:
    """A target in this process with a draft.

    Attributes:
        target: with its tokenizer and chat template.
        draft: what proposes tokens.
        rule: what accepts them.
        max_new_tokens: limit of an answer.
        thinking: `enable_thinking` of the chat template.
        seed: of sampled answers.
    """

    target: CausalTarget
    draft: Draft
    rule: Verification
    max_new_tokens: int
    thinking: bool = False
    seed: int = 0

    @property
    def drafted(self) -> int:
        """K of the draft."""
        return self.draft.drafted

    def answer(self, questions: Sequence[Question]) -> list[Reply]:
        """All of them together; a prompt that leaves no room for an answer, or that the chat
        template refuses, is an error reply."""
        prompts: dict[int, list[int]] = {}
        replies: list[Reply] = []
        for place, question in enumerate(questions):
            try:
                prompts[place] = self.prompt_ids(question)
                replies.append(Reply())
            except ValueError as error:
                replies.append(Reply(error=str(error)))
        if not prompts:
            return replies
        results = speculate(
            self.target.decoding_model,
            self.draft,
            list(prompts.values()),
            self.rule,
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.target.stop_ids,
            seed=self.seed,
            requests=[questions[place].key for place in prompts],
        )
        for place, result in zip(prompts, results, strict=True):
            assert result.finish is not None
            replies[place] = Reply(
                text=str(self.target.tokenizer.decode(result.token_ids, skip_special_tokens=True)),
                token_ids=result.token_ids,
                tokens=len(result.token_ids),
                cycles=len(result.cycles),
                accepted=result.cycles,
                last_uncut=result.last_uncut,
                finish=result.finish,
            )
        return replies

    def prompt_ids(self, question: Question) -> list[int]:
        """The tokens of a conversation.

        Raises:
            ValueError: it leaves no room for an answer, or the chat template refuses it.
        """
        longest = self.target.max_positions
        ids = self.target.chat_ids(question.messages, self.thinking)
        if len(ids) >= longest:
            raise DataError(f"prompt of {len(ids)} tokens; the target has room for {longest}")
        return ids


def conversation_turns(row: Mapping[str, Any]) -> list[str | None]:
    """The user's turns behind the messages of a prompt row; None stands for the messages.

    A row with `turns` holds all of the user's, the first of them the one that `messages` ends with.

    Raises:
        DataError: `turns` are no texts.
    """
    turns = row.get("turns")
    if turns is None:
        return [None]
    if not (isinstance(turns, list) and turns and all(isinstance(t, str) for t in turns)):
        raise DataError(f"row {row.get('id')!r}: 'turns' must be a list of texts")
    return [None, *turns[1:]]


def answer_conversations(
    answerer: Answerer, benchmark: str, rows: Sequence[Mapping[str, Any]], messages: Sequence[Any]
) -> list[list[Reply]]:
    """Replies to every turn of some prompts; later turns see the answerer's own earlier replies.

    A conversation ends with a turn that has no answer.

    Args:
        answerer: who replies.
        benchmark: the prompt set.
        rows: prompts, maybe with `turns`.
        messages: the first turn of each, as a conversation.
    """
    talks = [list(first) for first in messages]
    turns = [conversation_turns(row) for row in rows]
    replies: list[list[Reply]] = [[] for _ in rows]
    for number in range(max(map(len, turns))):
        going = [
            place for place, own in enumerate(turns)
            if number < len(own) and all(reply.error is None for reply in replies[place])
        ]  # fmt: skip
        for place in going:
            said = turns[place][number]
            if said is not None:
                talks[place].append({"role": "user", "content": said})
        questions = [Question(benchmark, rows[p]["id"], number, tuple(talks[p])) for p in going]
        for place, reply in zip(going, answerer.answer(questions) if going else [], strict=True):
            replies[place].append(reply)
            talks[place].append({"role": "assistant", "content": reply.text})
    return replies


def answer_row(
    draft: str, benchmark: str, prompt: Mapping[str, Any], turn: int, reply: Reply, drafted: int
) -> dict[str, Any]:
    """A row of acceptance.jsonl (`evaluation.acceptance.read_answer`)."""
    return {
        "draft": draft,
        "benchmark": benchmark,
        "id": prompt["id"],
        "turn": turn,
        "source": prompt["source"],
        "tokens": reply.tokens,
        "cycles": reply.cycles,
        "accepted": None if reply.accepted is None else list(reply.accepted),
        "last_uncut": reply.last_uncut,
        "drafted": drafted,
        "finish": reply.finish,
        "degenerate": reply.degenerate,
        "text": reply.text,
    }
