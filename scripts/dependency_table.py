"""Does weighting words by dependency depth help? MDLM, then BD3-LM from it, on the grammar.

    python scripts/dependency_table.py [--jobs N] [--seeds 1,2,3] [--out FOLDER] [override ...]

One command from trees to table: looks at the grammar's gold trees (mode=parse_depth), trains an
MDLM and from it a BD3-LM with blocks of 16 for every share and seed with equal data, noise and
updates (configs/experiment/grammar_dependency.yaml), measures the unweighted bound, its parts by
depth (mode=depth_eval) and the share of grammatical samples. `random` deals the same weights to
other words of the block: what the tree is worth is the difference to it, not to no weights at all.
Writes table.md, table.json and dependency.png. A finished stage is not run again.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evaluation.statistics import MeanEstimate, mean_interval  # noqa: E402
from evaluation.tables import text_table  # noqa: E402
from scripts.stages import stage  # noqa: E402


class Variant(NamedTuple):
    """What stands for the depth, its share, and whether the root is the heavy end."""

    alpha: float
    mode: str = "dependency"
    reverse: bool = True

    @property
    def name(self) -> str:
        """As the folders of the recipes are named."""
        return f"a{self.alpha}_normalized_{self.mode}_reverse{self.reverse}"

    @property
    def overrides(self) -> tuple[str, ...]:
        """What tells it from the experiment's defaults."""
        return (
            f"masking.mix_alpha={self.alpha}",
            f"masking.depth_mode={self.mode}",
            f"masking.reverse={str(self.reverse).lower()}",
        )


BASELINE = Variant(0.0)
VARIANTS = (
    BASELINE, Variant(0.0625), Variant(0.25), Variant(1.0), Variant(0.25, "random"),
    Variant(1.0, "random"), Variant(1.0, reverse=False),
)  # fmt: skip
BLOCKS = ("algo=bd3lm", "block_size=16", "trainer.max_steps=1000", "trainer.val_check_interval=500")
SAMPLES = ("sampling.batch_size=500", "sampling.num_sample_batches=2")
HEADER = (
    "share", "depth", "heavy", "BD3-LM nats/token", "95 % over seeds", "minus share 0",
    "95 %, paired", "minus random", "95 %, paired", "MDLM nats/token", "minus share 0",
    "95 %, paired", "grammatical", "95 % over seeds",
)  # fmt: skip
DEEPEST = 6  # deeper words are few


def measure(variant: Variant, seed: int, out: Path, overrides: Sequence[str]) -> dict:
    """Train both models of one variant and seed, and measure them."""
    folder = out / f"{variant.name}_seed{seed}"
    common = ("experiment=grammar_dependency", f"seed={seed}", *variant.overrides)
    stage(folder / "mdlm", *common, *overrides)
    first = folder / "mdlm" / "checkpoints" / "last.ckpt"
    start = f"training.from_pretrained={first}"
    stage(folder / "bd3lm", *common, *BLOCKS, start, *overrides)
    second = folder / "bd3lm" / "checkpoints" / "last.ckpt"
    found: dict = {"variant": variant._asdict(), "seed": seed}
    for name, checkpoint in {"mdlm": first, "bd3lm": second}.items():
        asked = f"eval.checkpoint_path={checkpoint}"
        # The masks of the bound are those of seed 1 in all runs, so that differences are of models.
        found[name] = stage(
            folder / f"{name}_eval", "mode=depth_eval", asked, "mode.num_samples=0", "seed=1",
            "eval.split=test", "eval.num_draws=8", "loader.eval_global_batch_size=500",
        )  # fmt: skip
    asked = f"eval.checkpoint_path={second}"
    found["samples"] = stage(folder / "samples", "mode=sample_eval", asked, *SAMPLES)
    return found


def of(results: Sequence[dict], variant: Variant) -> dict[int, dict]:
    """The results of one variant by seed."""
    return {r["seed"]: r for r in results if r["variant"] == variant._asdict()}


def values(runs: dict[int, dict], model: str, metric: str = "nll") -> list[float]:
    """One metric over the seeds; a depth that no test sentence has is in none of them."""
    return [run[model][metric] for run in runs.values()]


def difference(
    results: Sequence[dict],
    variant: Variant,
    model: str,
    metric: str = "nll",
    reference: Variant = BASELINE,
) -> list[float]:
    """The metric minus that of the reference with the same seed."""
    base = of(results, reference)
    runs = of(results, variant)
    return [
        runs[seed][model][metric] - base[seed][model][metric]
        for seed in sorted(runs.keys() & base.keys())
    ]


def row(results: Sequence[dict], variant: Variant) -> tuple:
    """One line of the table."""
    runs = of(results, variant)
    heavy = "-" if variant.alpha == 0 else ("root" if variant.reverse else "leaves")
    control = Variant(variant.alpha, "random", variant.reverse)
    has_control = variant.mode != "random" and control in VARIANTS
    mean = mean_interval(values(runs, "bd3lm"))
    rates = [run["samples"]["grammatical_rate"] for run in runs.values()]
    rate = mean_interval(rates)
    return (
        variant.alpha,
        variant.mode if variant.alpha else "-",
        heavy,
        mean.value,
        interval(mean),
        *_moved(results, variant, "bd3lm", None if variant == BASELINE else BASELINE),
        *_moved(results, variant, "bd3lm", control if has_control else None),
        mean_interval(values(runs, "mdlm")).value,
        *_moved(results, variant, "mdlm", None if variant == BASELINE else BASELINE),
        f"{rate.value:.1%}",
        interval(rate, ".1%"),
    )


def _moved(
    results: Sequence[dict], variant: Variant, model: str, reference: Variant | None
) -> tuple[str | None, str | None]:
    """Mean difference to the reference over seeds, and its interval."""
    if reference is None:
        return None, None
    moved = mean_interval(difference(results, variant, model, reference=reference))
    return f"{moved.value:+.4f}", interval(moved, "+.4f")


def interval(estimate: MeanEstimate, form: str = ".4f") -> str:
    """[low, high], or a dash where one seed says nothing of the others."""
    if math.isnan(estimate.low):
        return "-"
    return f"[{estimate.low:{form}}, {estimate.high:{form}}]"


def depth_table(results: Sequence[dict], model: str) -> str:
    """Nats per token by depth: of the baseline, and how much the variants differ, mean of seeds."""
    depths = range(DEEPEST + 1)
    base = of(results, BASELINE)
    rows: list = [
        ["share 0", *(mean_interval(values(base, model, f"nll/depth_{d}")).value for d in depths)]
    ]
    for variant in VARIANTS[1:]:
        moved = [difference(results, variant, model, f"nll/depth_{d}") for d in depths]
        cells = [mean_interval(m) for m in moved]
        rows.append([variant.name, *(f"{c.value:+.3f}{'*' if _clear(c) else ''}" for c in cells)])
    header = [f"{model}, nats by depth", *(str(d) for d in depths)]
    return text_table(header, rows) + (
        "\n* the 95 % interval over seeds excludes 0, as one cell in twenty would by chance"
    )


def _clear(estimate: MeanEstimate) -> bool:
    return estimate.low > 0 or estimate.high < 0


def plot(results: Sequence[dict], path: Path) -> None:
    """Differences to share 0, over the share and by depth, with intervals over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for mode, colour in {"dependency": "C0", "random": "C1"}.items():
        chosen = [v for v in VARIANTS[1:] if v.mode == mode and v.reverse]
        cells = [mean_interval(difference(results, v, "bd3lm")) for v in chosen]
        error = [(c.high - c.low) / 2 for c in cells]
        shares = [v.alpha for v in chosen]
        left.errorbar(
            shares, [c.value for c in cells], error, marker="o", capsize=3, color=colour, label=mode
        )
    left.axhline(0, color="black", linewidth=0.8)
    left.set_xscale("symlog", base=2, linthresh=0.0625)
    left.set(
        xlabel="share of the depth's weights (mix_alpha)", ylabel="nats per token minus share 0"
    )
    left.legend(frameon=False, title="BD3-LM, root heavy")
    depths = list(range(DEEPEST + 1))
    for variant in (v for v in VARIANTS if v.alpha == 1.0):
        metrics = [f"nll/depth_{d}" for d in depths]
        cells = [mean_interval(difference(results, variant, "bd3lm", m)) for m in metrics]
        label = f"{variant.mode}, {'root' if variant.reverse else 'leaves'} heavy"
        right.plot(depths, [c.value for c in cells], marker="o", label=label)
    right.axhline(0, color="black", linewidth=0.8)
    right.set(xlabel="depth of the word", ylabel="nats per token minus share 0")
    right.legend(frameon=False, title="share 1")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Parse, run everything, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=1, help="models trained at the same time")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--out", type=Path, default=Path("outputs/dependency_table"))
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for every training")
    options = parser.parse_intermixed_args()
    out = options.out.resolve()
    parsed = stage(out / "parse", "mode=parse_depth", "data=grammar", "model.length=32")
    print(f"gold trees: {parsed['train/tokens_of_words']:.0f} tokens with a depth,"
          f" {parsed['train/accounted_for']:.0%} accounted for")  # fmt: skip
    # Seed by seed, so that what is there after a while compares all variants.
    work = [(variant, int(seed)) for seed in options.seeds.split(",") for variant in VARIANTS]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda job: measure(*job, out, options.overrides), work))
    (out / "table.json").write_text(json.dumps(results, indent=1))
    tables = [text_table(HEADER, [row(results, variant) for variant in VARIANTS])]
    tables += [depth_table(results, model) for model in ("bd3lm", "mdlm")]
    print("\n\n".join(tables))
    (out / "table.md").write_text("\n\n".join(tables) + "\n")
    plot(results, out / "dependency.png")


if __name__ == "__main__":
    main()
