"""What generators do with requests before they answer: tokens of a prompt, and who enters next."""

from typing import Protocol, TypeVar, runtime_checkable

from decoding.generate import GenerationRequest
from models.causal import CausalTarget


@runtime_checkable
class Waiting(Protocol):
    """An answer that has not begun."""

    prompt: list[int]


Row = TypeVar("Row", bound=Waiting)


def prompt_of(target: CausalTarget, request: GenerationRequest, thinking: bool) -> list[int]:
    """The tokens of a request's prompt.

    Raises:
        ValueError: none, too many to leave room for an answer, or ids that the model has not.
    """
    if request.messages is not None:
        prompt = target.chat_ids(request.messages, thinking)
    elif request.prompt is not None:
        prompt = target.text_ids(request.prompt)
    else:
        prompt = list(request.prompt_ids or ())
    if not 1 <= len(prompt) < target.max_positions:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens; allowed 1 .. {target.max_positions - 1}"
        )
    if not 0 <= min(prompt) <= max(prompt) < len(target.embedding_VD):
        raise ValueError(f"token ids outside 0 .. {len(target.embedding_VD) - 1}")
    return prompt


def next_prompts(waiting: list[Row], free: int, prefill_tokens: int) -> list[Row]:
    """Take the longest prompts, as many as fit into one forward pass, at least one.

    Args:
        waiting: sorted by length, the longest last.
        free: rows that may enter.
        prefill_tokens: of one pass, padding included.
    """
    longest = len(waiting[-1].prompt)
    count = min(free, max(1, prefill_tokens // longest), len(waiting))
    taken = waiting[-count:]
    del waiting[-count:]
    return taken
