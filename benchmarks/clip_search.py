"""Clip-width search: seconds and choices of `binned` beside the published `exact` way.

    python benchmarks/clip_search.py CHECKPOINT [--batches 20] [--repeats 8]

Both search the same validation rows with the same weights in one process, five widths (36
intervals). The searches are repeated with other random numbers; the truth that a choice is measured
by is the mean of the exact repetitions, without the one that made the choice. "regret" is how much
more the loss varies, in truth, on the interval that was chosen than on the best one.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from callbacks.clip_search import ClipSearch  # noqa: E402
from dataloader import LanguageData  # noqa: E402
from diffusion import Diffusion  # noqa: E402
from evaluation.tables import text_table  # noqa: E402
from objectives.clip_search import candidate_intervals, least_variance  # noqa: E402

WIDTHS = [0.5, 0.6, 0.7, 0.8, 0.9]
# Variances of arXiv 2503.09573, table 2, for blocks of 16 on LM1B; [0, 1] has 7.39.
PUBLISHED = {(1e-3, 0.5): 7.90, (0.3, 0.8): 3.62, (0.5, 1.0): 3.63}
HEADER = ("search", "forward passes", "seconds", "times faster", "regret, mean", "regret, worst")


def search(
    model: Diffusion, batches: list, method: str, draws: int, repeat: int
) -> tuple[float, torch.Tensor]:
    """Seconds and variances of one search over the batches."""
    callback = ClipSearch(WIDTHS, method=method, draws=draws)
    callback.list_intervals(model)
    start = time.perf_counter()
    for number, batch in enumerate(batches):
        callback.draw(model, batch, step=repeat, batch_idx=number)
    return time.perf_counter() - start, callback.variances(model)


def main() -> None:
    """Time and judge both ways."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path, help="of a block diffusion run")
    parser.add_argument("--batches", type=int, default=20, help="validation batches of 16 rows")
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = Diffusion.load_from_checkpoint(options.checkpoint)
    config = model.config | {"loader": model.config["loader"] | {"eval_batch_size": 16}}
    data = LanguageData(config, model.tokenizer)
    loader = data.eval_loader("validation", 16 * options.batches)
    batches = list(loader)
    process = model.process
    intervals = candidate_intervals(WIDTHS, 0.05, process.block_size, process.resample)
    size = process.block_size
    blocks = sum(batch["input_ids"].numel() for batch in batches) // size
    print(f"{len(batches)} batches, {blocks} blocks of {size}, {len(intervals)} intervals")
    ways = {"exact (published)": ("exact", 1), "binned, 1 draw": ("binned", 1),
            "binned, 3 draws": ("binned", 3)}  # fmt: skip
    found = {}
    for name, (method, draws) in ways.items():
        runs = [search(model, batches, method, draws, r) for r in range(options.repeats)]
        found[name] = [seconds for seconds, _ in runs], torch.stack([v for _, v in runs])
    exact = found["exact (published)"][1]
    truth = exact.mean(0)
    slow = statistics.median(found["exact (published)"][0])
    rows = []
    for name, (method, draws) in ways.items():
        seconds, variances = found[name]
        regrets = []
        for row in variances:
            judge = (exact.sum(0) - row) / (len(exact) - 1) if method == "exact" else truth
            choice = least_variance(row)
            assert choice is not None, "losses are finite"
            regrets.append(float(judge[choice] / judge.min() - 1.0))
        passes = len(batches) * (len(intervals) if method == "exact" else draws)
        fast = statistics.median(seconds)
        rows.append((name, passes, fast, slow / fast, statistics.mean(regrets), max(regrets)))
    print(text_table(HEADER, rows))
    for interval, variance in PUBLISHED.items():
        ratio = float(truth[intervals.index(interval)] / truth[0])
        print(
            f"variance on [{interval[0]:g}, {interval[1]:g}] / on [0, 1]: {ratio:.2f} here,"
            f" {variance / 7.39:.2f} published (another model and text)"
        )
    low, high = intervals[int(truth.argmin())]
    print(f"best interval [{low:g}, {high:g}]: {truth.min():.4g}; the full one: {truth[0]:.4g}")


if __name__ == "__main__":
    main()
