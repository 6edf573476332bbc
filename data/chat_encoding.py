"""From conversations to tokens: the prompt as the target reads it, then the answer it gave."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from data.blocks import FEATURE_DTYPE, IDS, RESPONSE, PackingReport, TokenBatch
from data.chat import Message
from data.encoding import next_batch
from data.errors import DataError
from data.source import Document
from data.tokenization import SpecialIds


@dataclass(frozen=True)
class ChatEncoder:
    """Encodes documents of `data.chat.ChatFiles`.

    Columns: `input_ids`, and `response`, 1 on the tokens of the answer (its end-of-turn token
    included) and 0 on those of the prompt.

    Args:
        thinking: whether templates that know the word are told to let the target think; a row that
            says so itself (`thinking`) is believed.
    """

    thinking: bool = False

    def __call__(
        self,
        documents: Iterable[Document],
        tokenizer: PreTrainedTokenizerFast,
        special: SpecialIds,
        report: PackingReport,
    ) -> Iterator[TokenBatch]:
        """Tokens of all conversations, in batches.

        Raises:
            DataError: no chat template, a conversation that it refuses, or an id that is no token.
        """
        iterator = iter(documents)
        while batch := next_batch(iterator):
            parts = [self._encode(row, tokenizer, special) for row in batch]
            flags = [
                np.repeat(np.array([0, 1], FEATURE_DTYPE), [len(prompt), len(answer)])
                for prompt, answer in parts
            ]
            ids = np.concatenate([np.concatenate(part) for part in parts])
            lengths = np.array([len(flag) for flag in flags])
            report.documents += len(batch)
            report.tokens += int(lengths.sum())
            # Nothing is hidden in an answer, so the token stands for itself.
            report.documents_with_mask += sum(special.mask in np.concatenate(p) for p in parts)
            yield TokenBatch({IDS: ids, RESPONSE: np.concatenate(flags)}, lengths)

    def _encode(
        self, row: Document, tokenizer: PreTrainedTokenizerFast, special: SpecialIds
    ) -> tuple[np.ndarray, np.ndarray]:
        thinking = row.get("thinking", self.thinking)
        prompt = prompt_ids(tokenizer, row["messages"], thinking, f"row {row['id']!r}")
        answer = row.get("response_ids")
        if answer is None:
            answer = tokenizer.encode(row["response"], add_special_tokens=False)
            if row.get("finish") != "length":
                answer = [*answer, special.eos]
        ids = np.asarray(prompt, np.uint32), np.asarray(answer, np.int64).astype(np.uint32)
        if len(answer) and max(answer) >= special.vocab_size:
            raise DataError(
                f"row {row['id']!r}: response_ids has {max(answer)}, but the tokenizer knows"
                f" {special.vocab_size} ids; it was answered by another target"
            )
        return ids


def prompt_ids(
    tokenizer: PreTrainedTokenizerFast, messages: list[Message], thinking: bool, name: str
) -> list[int]:
    """The prompt in the template of the target, up to where its answer begins.

    Raises:
        DataError: there is no template, or it refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template; use that of the target"
            " (data.tokenizer_name_or_path=target)"
        )
    try:
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False, enable_thinking=thinking
        )
    # The template is a program of the target's authors: it may raise anything.
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{name}: the chat template refuses it ({reason})") from error
    return ids  # type: ignore[return-value]
