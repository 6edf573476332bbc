"""What several tokens per forward pass cost: grammatical rate against passes, one checkpoint.

    python scripts/reveal_quality.py CHECKPOINT [--out FOLDER] [override ...]

CHECKPOINT is a diffusion model of `data=grammar`. Every rule draws the same number of samples.
"""

import argparse
from pathlib import Path

from grammar_table import stage

from evaluation.tables import text_table

RULES = {
    "first hitting, 1 per pass": ("sampling.tokens_per_step=1",),
    "first hitting, 2 per pass": ("sampling.tokens_per_step=2",),
    "first hitting, 4 per pass": ("sampling.tokens_per_step=4",),
    "confidence >= 0.9": ("sampling/strategy=confidence", "sampling.confidence_threshold=0.9"),
    "confidence >= 0.7": ("sampling/strategy=confidence", "sampling.confidence_threshold=0.7"),
    "entropy bound 0.1": ("sampling/strategy=entropy_bound", "sampling.entropy_bound=0.1"),
    "entropy bound 0.25": ("sampling/strategy=entropy_bound", "sampling.entropy_bound=0.25"),
    "entropy bound 0.5": ("sampling/strategy=entropy_bound", "sampling.entropy_bound=0.5"),
    "entropy bound 1.0": ("sampling/strategy=entropy_bound", "sampling.entropy_bound=1.0"),
    "4 most confident": ("sampling/strategy=top_k", "sampling.tokens_per_step=4"),
}
HEADER = (
    "rule", "passes", "tokens/pass", "tokens/s", "grammatical", "95 % interval", "log p (true)",
)  # fmt: skip


def main() -> None:
    """Sample with every rule and tabulate."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=Path("outputs/reveal_quality"))
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for every run")
    options = parser.parse_intermixed_args()
    rows = []
    for number, (name, rule) in enumerate(RULES.items()):
        result = stage(
            options.out.resolve() / str(number), "mode=sample_eval",
            f"eval.checkpoint_path={options.checkpoint.resolve()}", "sampling.batch_size=250",
            "sampling.num_sample_batches=4", *rule, *options.overrides,
        )  # fmt: skip
        interval = f"[{result['grammatical_rate_low']:.3f}, {result['grammatical_rate_high']:.3f}]"
        rows.append((
            name, result["nfe"], result["tokens_per_forward"], result["tokens_per_s"],
            result["grammatical_rate"], interval, result.get("grammatical_log_prob"),
        ))  # fmt: skip
    table = text_table(HEADER, rows)
    print(table)
    (options.out / "table.md").write_text(table + "\n")


if __name__ == "__main__":
    main()
