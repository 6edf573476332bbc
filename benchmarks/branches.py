"""A training pass over the samples of a prefix: the prefix read once, or with every sample.

    python benchmarks/branches.py [--samples K] [--prefix L] [--sampled Q] [--hidden D] [--layers N]

Forward and backward pass over K samples of one prefix, with the sum of their log-probabilities as
the loss, in a model of random weights. Both ways have the same gradient, which is checked; the
ratio is by CPU seconds, the least of three passes of each.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.timer import time_steps  # noqa: E402
from decoding.branches import branches  # noqa: E402
from decoding.rollout_record import Rollout  # noqa: E402
from evaluation.tables import text_table  # noqa: E402
from models.backbone import Backbone  # noqa: E402
from models.precision import use_fastest_exact_matmul  # noqa: E402
from models.tiny_causal import tiny_causal  # noqa: E402
from objectives.token_log_probs import token_log_probs  # noqa: E402

PASSES, TOLERANCE = 3, 1e-3


def made_rollouts(samples: int, prefix: int, sampled: int, vocabulary: int) -> list[Rollout]:
    """Random tokens behind one random prompt."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(4, vocabulary, (prefix,), generator=generator).tolist()
    suffixes = torch.randint(4, vocabulary, (samples, sampled), generator=generator).tolist()
    zeros = [0.0] * sampled
    return [
        Rollout("a", k, prompt, [], [], suffix, None, zeros, "stop", "length", False)
        for k, suffix in enumerate(suffixes)
    ]


def once(backbone: Backbone, rollouts: list[Rollout]) -> None:
    """Backward pass of the sum of log-probabilities of all samples' tokens."""
    backbone.zero_grad()
    read = branches(rollouts)
    hidden_MD = backbone.read_branches(*read[:4]).flatten(0, 1)[read.place_M]
    token_M = read.branch_NQ.flatten()[read.place_M + 1]
    token_log_probs(hidden_MD, backbone.logits, token_M).sum().backward()


def anew(backbone: Backbone, rollouts: list[Rollout]) -> None:
    """The same, with every prompt read for each of its samples, all of them side by side."""
    backbone.zero_grad()
    ids_KL = torch.tensor([one.prompt_ids + one.sampled_ids for one in rollouts])
    place_KL = torch.arange(ids_KL.shape[1]).expand_as(ids_KL)
    attention = backbone.attention(torch.zeros_like(place_KL), place_KL, ids_KL.shape[1], 1)
    hidden_KLD, _ = backbone.read(ids_KL, place_KL, attention)
    assert hidden_KLD is not None, "all of the last layer was asked for"
    first = len(rollouts[0].prompt_ids)
    hidden_MD = hidden_KLD[:, first - 1 : -1].flatten(0, 1)
    token_log_probs(hidden_MD, backbone.logits, ids_KL[:, first:].flatten()).sum().backward()


def gradient(backbone: Backbone, step: Callable[[], None]) -> torch.Tensor:
    """Of all weights, in one vector."""
    step()
    return torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None])


def main() -> None:
    """Print the table; the exit code is 1 if the gradients differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, value in (
        ("samples", 16), ("prefix", 384), ("sampled", 176), ("hidden", 256), ("layers", 6),
        ("threads", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    use_fastest_exact_matmul()
    target = tiny_causal(
        hidden_size=options.hidden, num_hidden_layers=options.layers, init_std=0.02,
        max_position_embeddings=options.prefix + options.sampled,
    )  # fmt: skip
    backbone = Backbone(target.model, target.mask_token_id, len(target.tokenizer))
    backbone.requires_grad_(True).train()
    rollouts = made_rollouts(options.samples, options.prefix, options.sampled, 260)
    cases: dict[str, Callable[[], None]] = {
        "read with every sample": lambda: anew(backbone, rollouts),
        "read once": lambda: once(backbone, rollouts),
    }
    wanted, found = (gradient(backbone, step) for step in cases.values())
    seconds = {name: min(time_steps(step, PASSES)) for name, step in cases.items()}
    slow = seconds["read with every sample"]
    header = ("prefix", "CPU s", "times")
    rows = [(name, f"{time:.2f}", f"{slow / time:.2f}") for name, time in seconds.items()]
    print(text_table(header, rows))
    error = float((wanted - found).norm() / wanted.norm())
    print(f"gradients differ by {error:.1e} of their norm")
    sys.exit(error > TOLERANCE)


if __name__ == "__main__":
    main()
