"""Where drafts come from: a DFlash network, nothing, chance, or somebody who knows the answer.

A draft reads the target's tapped layers at the tokens that are committed and proposes logits for
the K tokens behind the anchor, the last committed token. The context is strictly before the anchor:
its own features are known only after the target has seen it.

Legend: B sequences, C new tokens, E taps side by side, K drafted tokens, Q slots, V vocabulary,
D hidden size.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.packed import packed_copy
from objectives.keyed import keyed_uniform

# What a random number is for. Chance must not be the chance that the verification draws by, whose
# keys begin with a user's seed.
_ERRORS, _CHANCE = 2**40, 2**40 + 1


@runtime_checkable
class DraftState(Protocol):
    """A draft at work on some sequences."""

    def extend(self, taps_BCE: Float[Tensor, "B C E"] | None, counts: Sequence[int]) -> None:
        """Of row b the first `counts[b]` tokens are committed, and before the next anchor."""
        ...

    def propose(self, anchor_B: Int[Tensor, " B"]) -> Float[Tensor, "B K V"]:
        """Logits of the K tokens behind the anchors."""
        ...

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows."""
        ...


@runtime_checkable
class Draft(Protocol):
    """A way of drafting."""

    @property
    def drafted(self) -> int:
        """K."""
        ...

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """Layers of the target that are to be tapped; none if the draft reads no features."""
        ...

    def begin(self, prompts: Sequence[Sequence[int]]) -> DraftState:
        """Start with sequences of which nothing is known but these tokens."""
        ...


class NetworkDraft:
    """A DFlash network with the target's embedding and head.

    Args:
        network: `models.dflash.DFlashNetwork`; on a CPU its weights are packed (`models.packed`)
            and must not change afterwards.
        embedding_VD: the target's input embeddings.
        head: the target's output layer, without bias.
        block_size: slots of a block; None is the trained size, and at most it.

    Raises:
        ValueError: a block size the network was not trained for.
    """

    def __init__(
        self, network: Any, embedding_VD: Tensor, head: nn.Linear, block_size: int | None = None
    ) -> None:
        trained, first = network.config.block_size, network.config.first_predicting_slot
        size = trained if block_size is None else block_size
        if not first + 1 <= size <= trained:
            raise ValueError(
                f"mode.block_size={size}: allowed {first + 1} .. {trained}, the trained block size"
            )
        self.network, self.embedding_VD = packed_copy(network), embedding_VD
        self.head, self.block_size, self.first = head, size, first

    @property
    def drafted(self) -> int:
        """Predicting slots of the block."""
        return self.block_size - self.first

    @property
    def layer_ids(self) -> tuple[int, ...]:
        """Those of the network."""
        return self.network.config.target_layer_ids

    def begin(self, prompts: Sequence[Sequence[int]]) -> "NetworkDraftState":
        """An empty context for every sequence."""
        longest = max(map(len, prompts))
        return NetworkDraftState(self, self.network.new_cache(len(prompts), longest))


class NetworkDraftState:
    """The network's context of some sequences."""

    def __init__(self, draft: NetworkDraft, cache: Any) -> None:
        self._draft, self._cache = draft, cache
        network, embedding_VD = draft.network, draft.embedding_VD
        self._dtype = network.fc.weight.dtype
        self._slot_Q = torch.arange(draft.block_size, device=embedding_VD.device)
        mask_D = embedding_VD[network.config.mask_token_id].to(self._dtype)
        self._masks_KD = mask_D.expand(draft.block_size - 1, -1)

    def extend(self, taps_BCE: Float[Tensor, "B C E"] | None, counts: Sequence[int]) -> None:
        """Append features to the context; the anchor's place is then the context's length."""
        assert taps_BCE is not None
        most = max(counts)
        place_C = torch.arange(most, device=taps_BCE.device)
        position_BC = self._cache.length_B[:, None] + place_C
        valid_BC = None
        if any(count < most for count in counts):
            valid_BC = place_C < torch.tensor(counts, device=place_C.device)[:, None]
        features_BCE = taps_BCE[:, :most].to(self._dtype)
        self._draft.network.extend(self._cache, features_BCE, position_BC, valid_BC)

    def propose(self, anchor_B: Int[Tensor, " B"]) -> Float[Tensor, "B K V"]:
        """One pass over [anchor, mask, ...] and the target's head over the predicting slots."""
        draft = self._draft
        anchor_B1D = F.embedding(anchor_B[:, None], draft.embedding_VD).to(self._dtype)
        masks_BKD = self._masks_KD.expand(len(anchor_B), -1, -1)
        position_BQ = self._cache.length_B[:, None] + self._slot_Q
        embeds_BQD = torch.cat([anchor_B1D, masks_BKD], dim=1)
        hidden_BQD = draft.network.draft(self._cache, embeds_BQD, position_BQ)
        # Contiguous: for a cut-out of rows PyTorch would copy the whole head once per sequence.
        drafting_BKD = hidden_BQD[:, draft.first :].to(draft.head.weight.dtype).contiguous()
        return draft.head(drafting_BKD)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop the context of all other rows."""
        self._cache = self._cache.select(torch.tensor(rows, device=self._slot_Q.device))


class NoDraft:
    """Nothing is drafted, so every cycle commits one token: plain decoding, the baseline."""

    drafted = 0
    layer_ids: tuple[int, ...] = ()

    def begin(self, prompts: Sequence[Sequence[int]]) -> "NoDraftState":
        """Nothing to remember."""
        return NoDraftState()


class NoDraftState:
    """Proposes nothing."""

    def extend(self, taps_BCE: Float[Tensor, "B C E"] | None, counts: Sequence[int]) -> None:
        """Nothing to remember."""

    def propose(self, anchor_B: Int[Tensor, " B"]) -> Float[Tensor, "B K V"]:
        """Logits of no token."""
        return torch.zeros(len(anchor_B), 0, 1, device=anchor_B.device)

    def keep(self, rows: Sequence[int]) -> None:
        """Nothing to drop."""


class OracleDraft:
    """Proposes the right answer, or with some probability another token: for bounds and tests.

    With the target's greedy answers and no errors every cycle commits K + 1 tokens, the ceiling of
    any draft; with an error rate of 1 it is a draft of pure chance that is always refused.

    Args:
        answers: the tokens behind every prompt; behind their end it proposes token 0.
        drafted: K.
        vocabulary: V.
        error_rate: probability of another token, independently at every proposed place.
        seed: of the errors.
    """

    layer_ids: tuple[int, ...] = ()

    def __init__(
        self,
        answers: Mapping[tuple[int, ...], Sequence[int]],
        drafted: int,
        vocabulary: int,
        error_rate: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.answers, self.drafted, self.vocabulary = answers, drafted, vocabulary
        self.error_rate, self.seed = error_rate, seed

    def begin(self, prompts: Sequence[Sequence[int]]) -> "OracleState":
        """Look the answers up."""
        return OracleState(
            self,
            [list(self.answers[tuple(prompt)]) for prompt in prompts],
            [zlib.crc32(str(list(prompt)).encode()) for prompt in prompts],
            [-len(prompt) for prompt in prompts],
        )


class OracleState:
    """Answers of some sequences, a number for each prompt, each anchor's place in its answer."""

    def __init__(
        self,
        draft: OracleDraft,
        answers: list[list[int]],
        numbers: list[int],
        places: list[int],
    ) -> None:
        self._draft, self._answers = draft, answers
        self._numbers, self._places = numbers, places

    def extend(self, taps_BCE: Float[Tensor, "B C E"] | None, counts: Sequence[int]) -> None:
        """The anchor is as many tokens further on."""
        self._places = [place + count for place, count in zip(self._places, counts, strict=True)]

    def propose(self, anchor_B: Int[Tensor, " B"]) -> Float[Tensor, "B K V"]:
        """All probability on one token."""
        draft, count = self._draft, self._draft.drafted
        rows = [
            (answer[place + 1 : place + 1 + count] + [0] * count)[:count]
            for answer, place in zip(self._answers, self._places, strict=True)
        ]
        # One counter per prompt and place: 32 bits of the one before 20 bits of the other.
        counters = [
            (number << 20) + place
            for number, place in zip(self._numbers, self._places, strict=True)
        ]
        uniform_BK = keyed_uniform((_ERRORS, draft.seed), torch.tensor(counters), count)
        tokens_BK = torch.tensor(rows, dtype=torch.long).view(len(rows), count)
        wrong_BK = (tokens_BK + 1) % draft.vocabulary
        tokens_BK = torch.where(uniform_BK < draft.error_rate, wrong_BK, tokens_BK)
        return F.one_hot(tokens_BK.to(anchor_B.device), draft.vocabulary).float().log()

    def keep(self, rows: Sequence[int]) -> None:
        """Forget the others."""
        self._answers = [self._answers[row] for row in rows]
        self._numbers = [self._numbers[row] for row in rows]
        self._places = [self._places[row] for row in rows]


class RandomDraft:
    """Logits of chance, a function of (seed, number of cycle, row): a lower bound and for tests.

    Args:
        drafted: K.
        vocabulary: V.
        spread: of the logits, in nats.
        seed: of the logits.
    """

    layer_ids: tuple[int, ...] = ()

    def __init__(self, drafted: int, vocabulary: int, spread: float = 4.0, seed: int = 0) -> None:
        self.drafted, self.vocabulary = drafted, vocabulary
        self.spread, self.seed = spread, seed

    def begin(self, prompts: Sequence[Sequence[int]]) -> "RandomState":
        """Cycle 0 of every row."""
        return RandomState(self, list(range(len(prompts))))


class RandomState:
    """Counts cycles."""

    def __init__(self, draft: RandomDraft, rows: list[int]) -> None:
        self._draft, self._rows, self._cycle = draft, rows, 0

    def extend(self, taps_BCE: Float[Tensor, "B C E"] | None, counts: Sequence[int]) -> None:
        """Chance needs no context."""

    def propose(self, anchor_B: Int[Tensor, " B"]) -> Float[Tensor, "B K V"]:
        """Uniform in [0, spread)."""
        self._cycle += 1
        count, vocabulary = self._draft.drafted, self._draft.vocabulary
        rows_B = torch.tensor(self._rows)
        key = (_CHANCE, self._draft.seed, self._cycle)
        logits = keyed_uniform(key, rows_B, count * vocabulary)
        shaped_BKV = logits.view(-1, count, vocabulary) * self._draft.spread
        return shaped_BKV.to(anchor_B.device)

    def keep(self, rows: Sequence[int]) -> None:
        """The others' numbers are not used again."""
        self._rows = [self._rows[row] for row in rows]
