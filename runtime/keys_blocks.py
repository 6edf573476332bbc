"""The keys of algorithms that write blocks: `algo`, `refine`, `bon`, `nce` and `scorer`."""

from typing import Any

from runtime.key_kinds import Key, choice, component, flag, integer, number

# What the score of a loss becomes (`objectives.pairing`, which needs torch).
LEARNT = ("log p0 - log q", "log p0")

_OPTIONAL = {"optional": True}
_NULLABLE = {"nullable": True}
# A commit rule, a proposal, ... of one's own has options of its own.
_COMMIT = {"optional": True, "of": "decoding.commit"}
_SOFT = {"optional": True, "of": "decoding.soft_inputs"}
_PROPOSAL = {"optional": True, "of": "decoding.candidates"}


def is_learnt(value: Any) -> bool:
    """{sampled: TEXT, beam: TEXT}, with texts of `LEARNT`; a beam may be refused by null."""
    if not isinstance(value, dict) or set(value) != {"sampled", "beam"}:
        return False
    return value["sampled"] in LEARNT and value["beam"] in (*LEARNT, None)


BLOCK_KEYS: tuple[Key, ...] = (
    flag("algo.writes_blocks", **_OPTIONAL),
    choice("algo.weighting", "bound", "uniform", **_OPTIONAL),
    flag("algo.complementary", **_OPTIONAL),
    flag("algo.shards", **_OPTIONAL),
    integer("algo.max_passes", 1, **_OPTIONAL),
    number("algo.injection.start", "[0, 1]", **_OPTIONAL),
    number("algo.injection.end", "[0, 1]", **_OPTIONAL),
    number("algo.injection.tokens", "[0, inf)", **_OPTIONAL),
    flag("algo.gradient_checkpointing", **_OPTIONAL),
    Key(
        "algo.lora",
        lambda v: isinstance(v, dict) and v != {},
        "{r:16,target_modules:all-linear}",
        nullable=True,
        optional=True,
    ),
    # refinement
    integer("refine.iterations", 1, **_OPTIONAL),
    component("refine.commit"),
    number("refine.commit.threshold", "[0, 1]", **_COMMIT),
    number("refine.commit.bound", "[0, inf)", **_COMMIT),
    component("refine.soft_inputs"),
    flag("refine.soft_inputs.everywhere", **_SOFT),
    integer("refine.soft_inputs.top", 1, **_SOFT),
    flag("refine.soft_inputs.renormalise", **_SOFT),
    number("refine.soft_inputs.scale", "(-inf, inf)", **_SOFT),
    number("refine.soft_inputs.steep", "(-inf, inf)", **_SOFT),
    number("refine.soft_inputs.centre", "(-inf, inf)", **_SOFT),
    # best of n
    integer("bon.count", 2, **_OPTIONAL),
    integer("bon.rounds", 1, **_OPTIONAL),
    choice("bon.score_agg", "select_each", "perround", "lastround", **_OPTIONAL),
    number("bon.alpha", "[0, inf)", **_OPTIONAL),
    choice("bon.form", "additive", "convex", "scorer_only", **_OPTIONAL),
    choice("bon.pick", "argmax", "gumbel", **_OPTIONAL),
    number("bon.gumbel_temperature", "(0, inf)", **_OPTIONAL),
    integer("bon.seed", 0, **_OPTIONAL),
    component("bon.proposal"),
    number("bon.proposal.temperature", "(0, inf)", **_PROPOSAL),
    integer("bon.proposal.tries", 1, **_PROPOSAL),
    flag("bon.proposal.include_greedy", **_PROPOSAL),
    integer("bon.proposal.max_swap", 0, **_PROPOSAL),
    # scorer
    component("nce.loss"),
    Key(
        "nce.learns",
        is_learnt,
        "{sampled: TEXT, beam: TEXT} with TEXT "
        + " or ".join(f'"{text}"' for text in LEARNT)
        + ", beam also null",
        nullable=True,
        optional=True,
    ),
    flag("nce.dedup", **_OPTIONAL),
    choice("nce.positive", "truth", "fewest_errors", **_OPTIONAL),
    number("nce.target_temperature", "[0, inf)", **_OPTIONAL),
    number("nce.l2", "[0, inf)", **_OPTIONAL),
    integer("nce.blocks_per_row", 1, **_OPTIONAL, **_NULLABLE),
    integer("nce.eval_batches", 0, **_OPTIONAL),
    integer("scorer.layers", 0, **_OPTIONAL),
    flag("scorer.bounded", **_OPTIONAL),
    choice("scorer.scale.mode", "fixed", "learnable", **_OPTIONAL),
    choice("scorer.scale.dtype", "float32", "bfloat16", **_OPTIONAL),
    number("scorer.scale.init", "(0, inf)", **_OPTIONAL),
    number("scorer.scale.min", "(0, inf)", **_OPTIONAL),
    number("scorer.scale.max", "(0, inf)", **_OPTIONAL),
    number("scorer.scale.lr_mult", "(0, inf)", **_OPTIONAL),
)
