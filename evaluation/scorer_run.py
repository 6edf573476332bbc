"""From batches of held-out text to scored candidates, and the probe for a leak.

Legend: B rows, M blocks of a row, X blocks, C candidates, R rounds, S places, D features.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from decoding.best_of import BestOf, Round, repeats, taken
from decoding.block_reader import BlockReader
from decoding.chain import Refined
from decoding.likelihood import Scores
from evaluation.scorer import ScoredBlocks
from evaluation.scorer_quality import LeakProbe, leak_probe
from objectives.block_layout import BlockLayout
from objectives.keyed import keyed_uniform
from objectives.refinement import token_errors

_PROBE = 0x11  # stream of keyed numbers


class Scorer(Protocol):
    """What is measured: a trained scorer with its backbone (`scorer.CandidateScorer`)."""

    best_of: BestOf
    block_size: int
    seed: int

    def layout(
        self, batch: dict[str, Any], chosen_BN: Tensor | None = None, bucket: int | None = None
    ) -> BlockLayout:
        """The blocks of a batch."""
        ...

    def candidates(
        self, batch: dict[str, Any], layout: BlockLayout, best_of: BestOf
    ) -> tuple[BlockReader, Refined, list[Round]]:
        """The greedy chain of every block behind the true past, and its candidates by round."""
        ...

    def reader(self, batch: dict[str, Any], only_keys: bool = True) -> BlockReader:
        """The clean pass over a batch."""
        ...

    def scores(self, hidden_XCSD: Tensor, tokens_XCS: Tensor, written_XS: Tensor) -> Tensor:
        """[X, C] gamma s."""
        ...


@torch.no_grad()
def scored_blocks(
    scorer: Scorer, batches: Iterable[dict[str, Any]], judge: Scores | None = None
) -> ScoredBlocks:
    """Candidates of every block behind its true past, as decoding proposes and scores them.

    Args:
        scorer: proposes, and scores.
        batches: rows of text.
        judge: another model, whose log-probability of the candidates stands in place of the scores.
    """
    assert scorer.best_of.score_agg != "select_each", "its candidates hold no greedy block"
    parts = [_scored(scorer, {**batch, "layout": scorer.layout(batch)}, judge) for batch in batches]
    joined = {
        name: np.concatenate([part[name] for part in parts], int("_R" in name)) for name in parts[0]
    }
    return ScoredBlocks(**joined)


def _scored(scorer: Scorer, batch: dict[str, Any], judge: Scores | None) -> dict[str, np.ndarray]:
    layout: BlockLayout = batch["layout"]
    best_of = scorer.best_of
    reader, refined, rounds = scorer.candidates(batch, layout, best_of)
    written_XS = layout.predict_BMS.flatten(0, 1)
    target_XS = layout.target_BMS.flatten(0, 1)
    exists_X = layout.exists_BM.flatten()
    assert reader.clean_BLD is not None, "the clean pass was made to its end"
    if judge is None:
        truth_X1SD = layout.of_blocks(reader.clean_BLD).flatten(0, 1)[:, None]
        truth_X = scorer.scores(truth_X1SD, target_XS[:, None], written_XS)[:, 0]
        score_RXC = torch.stack(
            [scorer.scores(r.hidden_XCSD, r.tokens_XCS, written_XS) for r in rounds]
        )
    else:
        tokens_XJS = torch.cat([target_XS[:, None], rounds[-1].tokens_XCS], 1)
        judged_XJ = log_probabilities(judge, batch, layout, tokens_XJS)
        truth_X, score_RXC = judged_XJ[:, 0], judged_XJ[None, :, 1:]
    last, scored_XS = rounds[-1], layout.scored_BMS.flatten(0, 1)
    errors_XC = token_errors(last.tokens_XCS, target_XS[:, None], scored_XS[:, None])
    # Candidates that differ behind the end of the text are one answer.
    text_XCS = last.tokens_XCS.masked_fill(~scored_XS[:, None], 0)
    valid_XC = last.valid_XC & ~repeats(text_XCS, last.valid_XC)
    entropy_X = (refined.entropy_XS * scored_XS).sum(-1) / scored_XS.sum(-1).clamp(min=1)
    row_X = batch["index"][:, None].expand_as(layout.block_BM).flatten()
    columns = {
        "log_q_MC": last.log_q_XC, "score_MC": best_of.aggregate(score_RXC),
        "errors_MC": errors_XC, "valid_MC": valid_XC, "entropy_M": entropy_X,
        "group_M": row_X, "truth_score_M": truth_X,
    }  # fmt: skip
    arrays = {name: _array(column[exists_X]) for name, column in columns.items()}
    # The truth does not change between rounds, as its tokens do not.
    arrays["score_RMC"] = _array(score_RXC[:, exists_X])
    arrays["truth_score_RM"] = np.repeat(arrays["truth_score_M"][None], len(score_RXC), 0)
    return arrays


def log_probabilities(
    judge: Scores, batch: dict[str, Any], layout: BlockLayout, tokens_XJS: Tensor
) -> Tensor:
    """[X, J] log p of what stands at the scored places of a block, given its document before it."""
    ids, begins = batch["input_ids"].tolist(), layout.start_BN.tolist()
    size, per_row = tokens_XJS.shape[-1], layout.block_BM.shape[1]
    scored_XS, blocks = layout.scored_BMS.flatten(0, 1).tolist(), layout.block_BM.flatten().tolist()
    exists, tokens = layout.exists_BM.flatten().tolist(), tokens_XJS.tolist()
    pairs, places = [], []
    for x in (x for x, there in enumerate(exists) if there):
        row, block, written = x // per_row, blocks[x], scored_XS[x]
        first, last = written.index(True), size - written[::-1].index(True)
        before = ids[row][begins[row][block] : block * size + first]
        for j, candidate in enumerate(tokens[x]):
            pairs.append((before, candidate[first:last]))
            places.append((x, j))
    found = torch.zeros(tokens_XJS.shape[:2], dtype=torch.float64)
    if pairs:
        values = [value for value, _ in judge.loglikelihood(pairs)]
        found[tuple(torch.tensor(places).T)] = torch.tensor(values, dtype=torch.float64)
    return found.to(tokens_XJS.device)


def _array(column: Tensor) -> np.ndarray:
    wanted = column.double() if column.is_floating_point() else column
    return wanted.cpu().numpy()


@torch.no_grad()
def probe_leak(scorer: Scorer, batches: Iterable[dict[str, Any]]) -> LeakProbe:
    """Whether the scorer knows a slot by how it was read instead of by what it holds.

    In one block of every row a candidate, drawn among all of its set, takes the place of the truth:
    it is read as clean text, where training reads the truth, and the others as candidates. It may
    come first in 1 of n cases.
    """
    scores, valid = zip(*(_probed(scorer, batch) for batch in batches), strict=True)
    return leak_probe(np.concatenate(scores), np.concatenate(valid))


def _probed(scorer: Scorer, batch: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Scores and existence of slots [B, 1 + C] of one block of every row."""
    whole = scorer.layout(batch)
    blocks = batch["input_ids"].shape[1] // scorer.block_size
    uniform_BK = keyed_uniform((scorer.seed, _PROBE), batch["index"].cpu(), blocks + 1)
    uniform_BK = uniform_BK.to(batch["input_ids"].device)
    # 1. one block of every row
    order_BN = uniform_BK[:, 1:].masked_fill(~whole.written_BN, 2.0).argsort(1).argsort(1)
    layout = scorer.layout(batch, order_BN == 0, bucket=1)
    keep_B = layout.exists_BM[:, 0]
    batch = {**batch, "layout": layout}
    _, _, rounds = scorer.candidates(batch, layout, scorer.best_of)
    found, first = rounds[0], slice(0, layout.block_BM.numel(), layout.block_BM.shape[1])
    tokens_BCS, valid_BC = found.tokens_XCS[first], found.valid_XC[first]
    # 2. one of its candidates, each as likely as any other
    number_B = (uniform_BK[:, 0] * valid_BC.sum(-1)).long()
    moved_BS = taken(tokens_BCS, number_B)
    # 3. read where the truth stands in training
    ids_BL = batch["input_ids"].clone()
    place_BS = layout.block_BM[:, :1] * scorer.block_size
    place_BS = place_BS + torch.arange(scorer.block_size, device=place_BS.device)
    ids_BL.scatter_(1, place_BS, moved_BS)
    reader = scorer.reader({**batch, "input_ids": ids_BL}, only_keys=False)
    assert reader.clean_BLD is not None, "the clean pass was made to its end"
    clean_BSD = layout.of_blocks(reader.clean_BLD)[:, 0]
    written_BS = layout.predict_BMS[:, 0]
    score_B1 = scorer.scores(clean_BSD[:, None], moved_BS[:, None], written_BS)
    score_BC = scorer.scores(found.hidden_XCSD[first], tokens_BCS, written_BS)
    # Its own slot is empty now.
    others_BC = valid_BC.scatter(1, number_B[:, None], False)
    score_BJ = torch.cat([score_B1, score_BC], 1)[keep_B]
    valid_BJ = torch.cat([torch.ones_like(others_BC[:, :1]), others_BC], 1)[keep_B]
    return _array(score_BJ), valid_BJ.cpu().numpy()
