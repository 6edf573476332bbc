"""Decoding block by block behind an exact cache: finished blocks are never read again.

Keys and values in the cache are those of final, hard tokens. A block that has just been finished is
written in the same pass in which the next one is read for the first time,

    [ finished block b | block b + 1 ],    b sees the cache and itself, b + 1 also b,

so that exactness costs no pass. Candidates of a block share its row's cache: W segments of S tokens
stand side by side behind the same context, each blind to the others, and nothing is copied.

Legend: B rows, G segments of a pass, W copies, S block size, T tokens a pass sees, D features.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from models.causal import CausalTarget
from models.row_cache import RowCache


class BlockCache:
    """Rows that grow by blocks, each at its own length; a `decoding.chain.BlockRunner`.

    Args:
        target: the model, with its tokenizer.
        block_size: S.
        num_rows: most rows at a time.
        forbidden_V: tokens that are never written.
    """

    def __init__(
        self, target: CausalTarget, block_size: int, num_rows: int, forbidden_V: Tensor
    ) -> None:
        self._model = target.decoding_model
        self._head = target.decoding_head
        self._table_VD = target.embedding_VD
        self._blank_id, self._forbidden_V = target.mask_token_id, forbidden_V
        self.block_size = block_size
        self.cache = RowCache(self._model.config.num_hidden_layers, num_rows)
        # Finished blocks that are not in the cache yet, by row; None for a row that has none.
        self._finished: list[Tensor | None] = []

    @property
    def table_VD(self) -> Tensor:
        """The embeddings."""
        return self._table_VD

    @property
    def blank_id(self) -> int:
        """The token that stands for "not known yet"."""
        return self._blank_id

    @property
    def forbidden_V(self) -> Tensor:
        """Tokens that are never written."""
        return self._forbidden_V

    def logits(self, hidden_PD: Tensor) -> Tensor:
        """[*P, V] what the head makes of hidden states."""
        return self._head(hidden_PD)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row that are final, those that wait to be written included."""
        pairs = zip(self.cache.lengths, self._finished, strict=True)
        return [length + (0 if block is None else self.block_size) for length, block in pairs]

    def enter(self, prompts: Sequence[Sequence[int]]) -> None:
        """Read the whole blocks of some prompts, whose rows come last; the rest is given later."""
        size, device = self.block_size, self._model.device
        lengths = [len(prompt) // size * size for prompt in prompts]
        self._finished += [None] * len(prompts)
        if not max(lengths):
            self.cache.begin(len(prompts), device)
            return
        ids_PS = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for place, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            ids_PS[place, :length] = torch.tensor(prompt[:length], dtype=torch.long)
        block_S = torch.arange(max(lengths), device=device) // size
        hidden_SS = block_S[:, None] < block_S[None, :]
        mask_SS = torch.zeros(hidden_SS.shape, dtype=self._model.dtype, device=device)
        fresh = DynamicCache(config=self._model.config)
        # Padding stands on the right, in blocks of its own that nobody of a prompt looks at.
        self._model.base_model(
            input_ids=ids_PS.to(device),
            attention_mask=mask_SS.masked_fill_(hidden_SS, float("-inf"))[None, None],
            past_key_values=fresh,
            use_cache=True,
        )
        self.cache.admit(fresh, lengths)

    def finish(self, tokens_BS: Tensor) -> None:
        """The next block of every row is this; the next pass writes it."""
        assert all(block is None for block in self._finished), "a pass comes between two blocks"
        self._finished = list(tokens_BS)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these."""
        self.cache.keep(rows)
        self._finished = [self._finished[row] for row in rows]

    def run(self, inputs_YSD: Float[Tensor, "Y S D"], copies: int = 1) -> Float[Tensor, "Y S D"]:
        """A pass over blocks behind what is final, Y = B W; finished blocks are written with it."""
        rows, size = len(self._finished), self.block_size
        inputs_BGSD = inputs_YSD.unflatten(0, (rows, copies))
        writes_B = torch.tensor([block is not None for block in self._finished])
        writing = bool(writes_B.any())
        if writing:
            inputs_BGSD = torch.cat([self._written()[:, None], inputs_BGSD], dim=1)
        writes_B = writes_B.to(inputs_YSD.device)
        hidden_BQD = self._model.base_model(
            inputs_embeds=inputs_BGSD.flatten(1, 2),
            attention_mask=self._mask(writes_B, writing, inputs_BGSD.shape[1]),
            position_ids=self._positions(writes_B, writing, inputs_BGSD.shape[1]),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.cache.commit([size if block is not None else 0 for block in self._finished])
        self._finished = [None] * rows
        hidden_BGSD = hidden_BQD.unflatten(1, (-1, size))
        return hidden_BGSD[:, int(writing) :].flatten(0, 1)

    def _written(self) -> Tensor:
        """[B, S, D] embeddings of the finished blocks; BLANKs of rows that have none."""
        blank_S = torch.full((self.block_size,), self._blank_id, device=self._table_VD.device)
        tokens = [blank_S if block is None else block for block in self._finished]
        return self._table_VD[torch.stack(tokens)]

    def _positions(self, writes_B: Tensor, writing: bool, segments: int) -> Tensor:
        """[B, G S] places of the tokens of a pass in their row."""
        size = self.block_size
        slot_S = torch.arange(size, device=writes_B.device)
        length_B = torch.tensor(self.cache.lengths, device=writes_B.device)
        next_B = length_B + size * writes_B
        first_BG = next_B[:, None].repeat(1, segments)
        if writing:
            first_BG[:, 0] = length_B
        return (first_BG[..., None] + slot_S).flatten(1)

    def _mask(self, writes_B: Tensor, writing: bool, segments: int) -> Tensor:
        """[B, 1, G S, T] 0 and -inf: the cache, the own segment, and the block being written."""
        size, lengths = self.block_size, self.cache.lengths
        length_B = torch.tensor(lengths, device=writes_B.device)
        place_T = torch.arange(max(lengths) + segments * size, device=writes_B.device)
        behind_BT = place_T - length_B[:, None]
        # Places in the cache have a negative number, those of no segment too large a one.
        segment_BT = torch.div(behind_BT, size, rounding_mode="floor")
        segment_G1 = torch.arange(segments, device=writes_B.device)[:, None]
        seen_BGT = (segment_BT < 0)[:, None] | (segment_BT[:, None] == segment_G1)
        if writing:
            seen_BGT |= (writes_B[:, None] & (segment_BT == 0))[:, None]
        mask_BGT = torch.zeros(seen_BGT.shape, dtype=self._model.dtype, device=writes_B.device)
        mask_BGT = mask_BGT.masked_fill_(~seen_BGT, float("-inf"))
        return mask_BGT.repeat_interleave(size, dim=1)[:, None]
