"""AR, BD3-LM and MDLM on a language whose entropy is known: train, evaluate, sample, tabulate.

    python scripts/grammar_table.py [--jobs N] [--out FOLDER] [override ...]

Every model sees the same sentences in the same order for the same number of updates
(configs/experiment/grammar_table.yaml). Writes table.md, table.json and approach.png (distance to
the entropy against updates). A finished stage is not run again.
"""

import argparse
import json
import math
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from callbacks.metrics_csv import read_metrics  # noqa: E402
from evaluation.tables import text_table  # noqa: E402
from scripts.stages import stage  # noqa: E402

MODELS = {
    "AR": ("algo=ar",),
    "BD3-LM, L'=1": ("algo=bd3lm", "block_size=1", "training.sampling_eps_min=1.0"),
    "BD3-LM, L'=4": ("algo=bd3lm", "block_size=4"),
    "BD3-LM, L'=16": ("algo=bd3lm", "block_size=16"),
    "MDLM": ("algo=mdlm",),
}
SAMPLES = ("sampling.batch_size=500", "sampling.num_sample_batches=4")
HEADER = ("model", "nats/token", "s.e.", "gap to entropy", "s.e.", "grammatical", "95 % interval")


def measure(name: str, out: Path, overrides: list[str]) -> dict:
    """Train, evaluate and sample one model."""
    folder = out / re.sub(r"[^A-Za-z0-9]+", "-", name.replace("'", ""))
    stage(folder / "train", "experiment=grammar_table", *MODELS[name], *overrides)
    checkpoint = f"eval.checkpoint_path={folder / 'train' / 'checkpoints' / 'last.ckpt'}"
    evaluate = ("eval.split=test", "eval.num_draws=16", "loader.eval_global_batch_size=500")
    likelihood = stage(folder / "ppl_eval", "mode=ppl_eval", checkpoint, *evaluate, *overrides)
    samples = stage(folder / "sample_eval", "mode=sample_eval", checkpoint, *SAMPLES, *overrides)
    curve = [
        (row["step"], row["val/nll"])
        for row in read_metrics(folder / "train" / "metrics.csv")
        if "val/nll" in row
    ]
    return {"model": name, "likelihood": likelihood, "samples": samples, "curve": curve}


def row(result: dict) -> tuple:
    """One line of the table."""
    likelihood, samples = result["likelihood"], result["samples"]
    interval = (samples["grammatical_rate_low"], samples["grammatical_rate_high"])
    return (
        result["model"],
        likelihood["nll"],
        likelihood["nll_se"],
        likelihood["gap"],
        likelihood["gap_se"],
        samples["grammatical_rate"],
        f"[{interval[0]:.3f}, {interval[1]:.3f}]",
    )


def plot(results: list[dict], entropy: float, path: Path) -> None:
    """Validation nats per token above the entropy, against updates, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for result in results:
        steps, nats = zip(*result["curve"], strict=True)
        axes.plot(
            steps, [value - entropy for value in nats], marker="o", ms=3, label=result["model"]
        )
    axes.set(
        xscale="log", yscale="log", xlabel="updates", ylabel="nats per token above the entropy"
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def validation_entropy() -> float:
    """True nats per token of the validation sentences: the floor of the curves.

    The test sentences' own value, of which the table's gaps are taken, differs from it by chance.
    """
    from data.grammar import Grammar

    grammar = Grammar()
    documents = list(grammar.documents("validation"))
    tokens = sum(len(document["text"].split()) + 1 for document in documents)
    return -math.fsum(document["log_prob"] for document in documents) / tokens


def main() -> None:
    """Parse, run everything, write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--jobs", type=int, default=1, help="models trained at the same time")
    parser.add_argument("--out", type=Path, default=Path("outputs/grammar_table"))
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for every run")
    options = parser.parse_intermixed_args()
    out = options.out.resolve()
    with ThreadPoolExecutor(options.jobs) as pool:
        results = list(pool.map(lambda name: measure(name, out, options.overrides), MODELS))
    first = results[0]["likelihood"]
    lines = [
        f"entropy of the grammar {first['entropy']:.4f} nats per token;"
        f" of the {first['rows']:.0f} test sentences {first['true_nll']:.4f}",
        "",
        text_table(HEADER, [row(result) for result in results]),
    ]
    print("\n".join(lines))
    (out / "table.md").write_text("\n".join(lines) + "\n")
    (out / "table.json").write_text(json.dumps(results, indent=1))
    plot(results, validation_entropy(), out / "approach.png")


if __name__ == "__main__":
    main()
