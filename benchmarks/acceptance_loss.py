"""Losses of speculative drafts: the fused pass beside whole logits, time and memory.

    python benchmarks/acceptance_loss.py [--json FILE] [--precision fp32 bf16] [--repeats N]
    python benchmarks/acceptance_loss.py --chunks     # how many rows of logits at a time
    python benchmarks/acceptance_loss.py --device cuda

V = 151,936 tokens, D = 1024, 64 anchors in blocks of 16 (15 slots predict, all valid) over 384
positions, the ratio of 512 anchors to 3072 tokens. A step is the loss and its gradient by the
draft's hidden states, from the target's last hidden states on: what a variant needs of the
target, logits or a summary of them, it computes itself. Random numbers; the arithmetic does not
depend on them.

    whole        autograd of objectives/draft_losses.py: logits of draft and teacher, [960, V] each
    whole, lean  the same with one softmax cross-entropy call for the KL (fewer tensors of [960, V])
    fused        objectives/fused_acceptance.py, the target as a summary of every position
    fused, p     the same, the target as its hidden states

Each cell is a process of its own. Memory is the greatest resident memory minus that just before the
first step (head and hidden states are there already); on a GPU, that of torch's allocator. Rates
count predicted slots; medians over the steps after one that is not counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

VOCABULARY, FEATURES, ANCHORS, SLOTS, POSITIONS = 151_936, 1024, 64, 15, 384
OBJECTIVES = ("kd", "survival_eal")
VARIANTS = ("whole", "whole, lean", "fused", "fused, p")
HEADER = (
    "cell", "s/step", "slots/s", "slots/CPU-s", "peak MiB", "x faster", "x less memory",
)  # fmt: skip


class Inputs:
    """What every variant starts from."""

    def __init__(self, precision: str, device: str) -> None:
        import torch

        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        torch.manual_seed(0)
        self.head = (torch.randn(VOCABULARY, FEATURES, device=device) * 0.05).to(dtype)
        self.target = torch.randn(POSITIONS, FEATURES, device=device).to(dtype)
        anchors = torch.randperm(POSITIONS - SLOTS, device=device)[:ANCHORS].sort().values
        self.index = anchors[:, None] + torch.arange(SLOTS, device=device)
        noise = torch.randn(ANCHORS, SLOTS, FEATURES, device=device).to(dtype)
        self.hidden = (self.target[self.index] + noise).requires_grad_()
        self.labels = torch.randint(VOCABULARY, (ANCHORS, SLOTS), device=device)
        self.valid = torch.ones(ANCHORS, SLOTS, dtype=torch.bool, device=device)


def objective_of(name: str) -> "AcceptanceObjective":  # noqa: F821
    """KD with decay 7, or survival-EAL with lambda 1."""
    from objectives.acceptance import AcceptanceObjective

    return {
        "kd": AcceptanceObjective(kl_weight=1.0, position="decay", gamma=7.0),
        "survival_eal": AcceptanceObjective(1.0, 1.0, position="survival"),
    }[name]


def whole(x: Inputs, name: str, lean: bool) -> "Tensor":
    """The loss by all logits of draft and teacher in fp32."""
    import torch
    import torch.nn.functional as F

    from objectives import draft_losses
    from objectives.acceptance import decay_weights, expected_accepted_length, survival_weights

    with torch.no_grad():
        teacher = (x.target @ x.head.t()).float()[x.index]
    logits = (x.hidden @ x.head.t()).float()
    if not lean:
        if name == "kd":
            return draft_losses.kd_loss(logits, teacher, x.labels, x.valid, 7.0)
        return draft_losses.survival_eal_loss(logits, teacher, x.labels, x.valid, 1.0)
    p = teacher.softmax(-1)
    del teacher
    # KL without the entropy of p, a constant: the cheapest that torch offers on whole logits.
    kl = F.cross_entropy(logits.flatten(0, 1), p.flatten(0, 1), reduction="none").view(
        x.index.shape
    )
    if name == "kd":
        return draft_losses.weighted_mean(kl, x.valid * decay_weights(SLOTS, 7.0, device=kl.device))
    chosen = logits.gather(-1, x.labels[..., None])[..., 0]
    a = (chosen - logits.logsumexp(-1)).exp()
    weight = survival_weights(a.detach(), x.valid)
    reward = expected_accepted_length(a, x.valid).sum() / (ANCHORS * SLOTS)
    return draft_losses.weighted_mean(kl, weight) - reward


def fused(x: Inputs, name: str, summary: bool, chunk: int | None = None) -> "Tensor":
    """The same without logits."""
    from objectives.fused_acceptance import fused_acceptance_loss, teacher_summary

    objective = objective_of(name)
    teacher = {"teacher_hidden_UD": x.target}
    if summary:
        names = "expected_UD", "entropy_U"
        teacher = dict(zip(names, teacher_summary(x.target, x.head, chunk=chunk), strict=True))
    found = fused_acceptance_loss(
        x.hidden, x.head, x.labels, x.valid, objective=objective, teacher_index_NK=x.index,
        rows=ANCHORS * SLOTS, chunk=chunk, **teacher,
    )  # fmt: skip
    kl = found.terms.kl_N.sum() / found.weight
    return objective.kl_weight * kl - objective.reward_weight * found.terms.reward_N.sum() / (
        ANCHORS * SLOTS
    )


def loss_of(variant: str, x: Inputs, name: str) -> "Tensor":
    """The loss of a variant ("fused 120": with chunks of 120 rows); all have the same gradient."""
    kind, _, chunk = variant.partition("fused ")
    if chunk:
        return fused(x, name, True, int(chunk))
    if variant.startswith("fused"):
        return fused(x, name, variant == "fused")
    return whole(x, name, kind == "whole, lean")


def resident_mib() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


class PeakMemory:
    """The greatest memory inside a `with`, above that at its beginning, in MiB."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def __enter__(self) -> "PeakMemory":
        import torch

        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
            return self
        self.before = self.highest = resident_mib()
        self.running = True
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while self.running:
            self.highest = max(self.highest, resident_mib())
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        import torch

        if self.cuda:
            self.mib = torch.cuda.max_memory_allocated() / 2**20 - self.before
            return
        self.running = False
        self.thread.join()
        self.mib = self.highest - self.before


def warm_up(device: str) -> None:
    """Libraries take their own memory at the first product; it is nobody's."""
    import torch

    a = torch.randn(64, 256, device=device, requires_grad=True)
    (a @ torch.randn(256, 512, device=device)).log_softmax(-1).sum().backward()


def time_steps(step: Callable[[], None], repeats: int, device: str) -> dict:
    """Seconds and CPU seconds of `repeats` steps."""
    import torch

    wall, cpu = [], []
    for _ in range(repeats):
        start, used = time.perf_counter(), time.process_time()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    return {"seconds": wall, "cpu_seconds": cpu}


def cell(variant: str, name: str, precision: str, device: str, repeats: int) -> dict:
    """Peak memory of the first step, and the times of later ones."""
    import torch

    from models.precision import use_fastest_exact_matmul
    from runtime.memory import keep_freed_memory

    use_fastest_exact_matmul()
    x = Inputs(precision, device)

    def step() -> None:
        (x.hidden.grad,) = torch.autograd.grad(loss_of(variant, x, name), x.hidden)

    warm_up(device)
    with PeakMemory(device) as peak:
        step()
    keep_freed_memory()
    step()
    norm = float(x.hidden.grad.float().norm())
    return {"peak_mib": peak.mib, "gradient_norm": norm, **time_steps(step, repeats, device)}


def run_alone(*arguments: str, threads: int) -> dict:
    """This file again, in a fresh process."""
    count = str(threads)
    # Threads that wait sleep, so that CPU seconds count work also on a busy machine.
    variables = {**os.environ, "OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count,
                 "OMP_WAIT_POLICY": "PASSIVE"}  # fmt: skip
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def measure(options: argparse.Namespace) -> list[dict]:
    """All cells. Variants take turns, so that a busy moment of the machine hits each of them."""
    results = []
    for precision in options.precision:
        for name in OBJECTIVES:
            rounds: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
            for _ in range(options.rounds):
                for variant in VARIANTS:
                    rounds[variant].append(run_alone(
                        "--cell", variant, name, precision, "--device", options.device,
                        "--repeats", str(options.repeats), threads=options.threads,
                    ))  # fmt: skip
            for variant, runs in rounds.items():
                seconds = [s for run in runs for s in run["seconds"]]
                cpu = [s for run in runs for s in run["cpu_seconds"]]
                results.append({
                    "precision": precision, "objective": name, "variant": variant,
                    "seconds": statistics.median(seconds), "best": min(seconds),
                    "cpu_seconds": statistics.median(cpu),
                    "peak_mib": statistics.median(run["peak_mib"] for run in runs),
                    "gradient_norm": runs[0]["gradient_norm"],
                })  # fmt: skip
                print(results[-1], file=sys.stderr, flush=True)
    return results


def table(results: list[dict]) -> str:
    """Cells beside the `whole` of the same precision and objective."""
    from evaluation.tables import text_table

    rows, slots = [], ANCHORS * SLOTS
    for r in results:
        key = r["precision"], r["objective"]
        base = next(
            b for b in results
            if (b["precision"], b["objective"]) == key and b["variant"] == "whole"
        )  # fmt: skip
        rows.append((
            f"{r['precision']} {r['objective']} {r['variant']}", r["seconds"],
            slots / r["seconds"], slots / r["cpu_seconds"], r["peak_mib"],
            base["seconds"] / r["seconds"], base["peak_mib"] / r["peak_mib"],
        ))  # fmt: skip
    return text_table(HEADER, rows)


def chunk_table(options: argparse.Namespace) -> str:
    """The fused pass with chunks of different size."""
    from evaluation.tables import text_table

    rows = []
    for precision in options.precision:
        for chunk in (30, 60, 120, 240, 480, 960):
            run = run_alone(
                "--cell", f"fused {chunk}", "survival_eal", precision, "--device", options.device,
                "--repeats", str(options.repeats), threads=options.threads,
            )  # fmt: skip
            middle = statistics.median(run["seconds"])
            rows.append((precision, chunk, middle, min(run["seconds"]), run["peak_mib"]))
            print(rows[-1], file=sys.stderr, flush=True)
    return text_table(("precision", "rows", "s/step", "best", "peak MiB"), rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--precision", nargs="+", default=["fp32"], choices=["fp32", "bf16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes of a cell")
    parser.add_argument("--chunks", action="store_true", help="sizes of the chunk instead")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(cell(*options.cell, options.device, options.repeats)))
    elif options.chunks:
        print(chunk_table(options))
    else:
        results = measure(options)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
        print(table(results))


if __name__ == "__main__":
    main()
