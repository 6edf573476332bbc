"""Small models and rows of documents for what reads and writes blocks."""

import torch
from torch import Tensor

from models.backbone import Backbone
from models.causal import CausalTarget
from models.tiny_causal import tiny_causal
from objectives.block_layout import BlockLayout, block_layout

SIZE = 4


def small_target(seed: int = 0, **options: object) -> CausalTarget:
    """A causal model of random weights, with a tokenizer of bytes."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "max_position_embeddings": 256}
    return tiny_causal(**{**sizes, "init_std": 0.3, "seed": seed, **options})


def small_backbone(backend: str = "math", seed: int = 0, **options: object) -> Backbone:
    """Its backbone, in double precision unless said otherwise."""
    target = small_target(seed, **{"dtype": "float64", **options})
    return Backbone(target.model, target.mask_token_id, 260, backend)


def rows(
    documents: list[list[tuple[int, int]]], length: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, segments and responses of rows of (prompt, answer) lengths, aligned and filled."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(documents), length
    ids_BL = torch.zeros(shape, dtype=torch.long)
    segment_BL, response_BL = torch.full(shape, -1), torch.full(shape, -1)
    for row, parts in enumerate(documents):
        place = 0
        for number, (prompt, answer) in enumerate(parts):
            size = prompt + answer
            end = place + size + -size % SIZE
            ids_BL[row, place : place + size] = torch.randint(10, 250, (size,), generator=generator)
            ids_BL[row, place + size : end] = 2  # the end token
            segment_BL[row, place:end] = number
            response_BL[row, place : place + prompt] = 0
            response_BL[row, place + prompt : place + size] = 1
            place = end
    return ids_BL, segment_BL, response_BL


DOCUMENTS = [[(5, 6), (3, 9), (8, 3)], [(2, 13), (9, 4)], [(0, 30)]]
LENGTH = 40


def laid_out() -> tuple[Tensor, Tensor, Tensor, BlockLayout]:
    """Three rows of packed documents and their blocks."""
    columns = rows(DOCUMENTS, LENGTH)
    return *columns, block_layout(*columns, SIZE)


def dense_mask(segment_BL: Tensor, size: int = SIZE) -> Tensor:
    """[B, 2L, 2L] who sees whom of [blocks | clean text], from the definition, one by one."""
    batch, length = segment_BL.shape
    mask = torch.zeros(batch, 2 * length, 2 * length, dtype=torch.bool)
    for b in range(batch):
        for q in range(2 * length):
            for k in range(2 * length):
                i, j = q % length, k % length
                same = segment_BL[b, i] == segment_BL[b, j]
                block_q, block_k = i // size, j // size
                q_clean, k_clean = q >= length, k >= length
                if not q_clean and not k_clean:
                    sees = block_q == block_k
                elif not q_clean:
                    sees = block_k < block_q
                else:
                    sees = k_clean and block_k <= block_q
                mask[b, q, k] = bool(same) and sees
    return mask
