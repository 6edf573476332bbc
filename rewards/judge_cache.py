"""What a judge has answered before, on disk or in memory: a question is paid for once."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.journal import Journal, Row


def question_key(identity: dict[str, Any], question: str, repeat: int) -> str:
    """Identity of a question to one judge: who is asked, in which words and order, which time.

    The repeat is part of it because it seeds what the judge draws.
    """
    content = json.dumps([identity, question, repeat], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


class JudgeCache:
    """Valid answers by the key of their question; invalid ones are asked for again.

    The file is opened by the first question, when it is known which rank of how many this is: every
    rank has one of its own. It belongs to one process at a time.

    Args:
        path: the file; None keeps answers in memory.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._rows: dict[str, Row] = {}
        self._journal: Journal | None = None

    def get(self, key: str) -> Row | None:
        """What was answered; None if nothing was."""
        journal = self._opened()
        if journal is None:
            return self._rows.get(key)
        return journal.read(key) if key in journal else None

    def put(self, key: str, answer: str, said: str) -> None:
        """Keep an answer, which from now on survives the end of this process."""
        row = {"id": key, "answer": answer, "said": said}
        journal = self._opened()
        if journal is None:
            self._rows[key] = row
        else:
            journal.append(row)

    def close(self) -> None:
        """Bring everything to disk."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def _opened(self) -> Journal | None:
        if self._journal is None and self.path is not None:
            self._journal = Journal(_of_rank(self.path))
        return self._journal


def _of_rank(path: Path) -> Path:
    rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    return path.with_suffix(f".rank{rank}{path.suffix}") if rank else path
