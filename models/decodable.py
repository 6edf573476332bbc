"""Which targets can have drafts, and decode rows that each have a length of their own."""

from typing import Any

from models.grouped_attention import NAME

# Frequencies of these follow the longest row of a pass: a row would depend on those beside it, and
# keys in the cache on when they were written.
_ROPE_BY_LENGTH = ("longrope", "dynamic")
# The attention of `models.backbone`, which without a pattern of its own is one of these, too.
BLOCK_PATTERN = "block_pattern"
# Attentions that take the additive mask of [B, 1, Q, S] that rows of unlike lengths need.
_MASKED_ATTENTION = ("eager", "sdpa", "flex_attention")
# What some models do to their logits behind the head.
_LOGIT_CHANGES = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def check_logits(config: Any, name: str) -> None:
    """Refuse a model whose logits are not what its head says.

    Args:
        config: of a causal model of `transformers`.
        name: what the user calls the target.

    Raises:
        ValueError: the setting by which the logits are changed behind the head.
    """
    for key in _LOGIT_CHANGES:
        value = getattr(config, key, None)
        if value not in (None, 1.0):
            raise ValueError(
                f"target {name}: {key}={value}; allowed: targets whose logits are those of their"
                " head, or a server in its place"
            )


def check_head(model: Any, name: str) -> None:
    """Refuse a model whose predictions are not softmax(W h), W being the matrix of its head.

    Args:
        model: a causal model of `transformers`.
        name: what the user calls the target.

    Raises:
        ValueError: logits that are changed behind the head, or a head with a bias.
    """
    check_logits(model.config, name)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise ValueError(
            f"target {name}: a head with a bias; allowed for drafts, which share the target's head:"
            " a head without bias"
        )


def check_decodable(config: Any, name: str) -> None:
    """Refuse what a cache of rows of unlike lengths would answer wrongly.

    Args:
        config: of a causal model of `transformers`.
        name: what the user calls the target.

    Raises:
        ValueError: layers or a window that forget, because refused drafts cannot be taken back
            from them; rotary embeddings that change with the length of a pass; an attention
            without masks.
    """
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise ValueError(
            f"target {name}: layers of {', '.join(sorted(kinds))}; allowed: full_attention, or a"
            " server in its place"
        )
    window = getattr(config, "sliding_window", None)
    # Where layers have no kinds of their own, a window is that of all of them.
    everywhere = window is not None and not getattr(config, "layer_types", None)
    if everywhere and window < config.max_position_embeddings:
        raise ValueError(
            f"target {name}: sliding_window={window} of {config.max_position_embeddings} positions;"
            " allowed: null, or a server in its place"
        )
    for rope in rope_types(getattr(config, "rope_parameters", None)):
        if rope in _ROPE_BY_LENGTH:
            raise ValueError(
                f"target {name}: rope_type={rope}, which depends on the longest row; allowed:"
                " default, linear, llama3, yarn, or a server in its place"
            )
    attention = getattr(config, "_attn_implementation", None)
    if attention is not None and attention not in (*_MASKED_ATTENTION, NAME, BLOCK_PATTERN):
        raise ValueError(
            f"target {name}: attn_implementation={attention}, which takes no such mask; allowed:"
            f" {', '.join(_MASKED_ATTENTION)}"
        )


def rope_types(parameters: Any) -> list[str]:
    """Of all layers: `rope_parameters` may be given for each kind of layer apart."""
    if not isinstance(parameters, dict):
        return []
    own = parameters.get("rope_type", parameters.get("type"))
    nested = [kind for part in parameters.values() for kind in rope_types(part)]
    return [*([own] if isinstance(own, str) else []), *nested]
