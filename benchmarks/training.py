"""Training tokens per CPU-second and peak memory, one thread, beside a straightforward step.

    python benchmarks/training.py [--steps N] [--quick]

model=small (12 x 768), length 128, vocabulary 30,522, batch 8, dropout 0.1. Every cell is a process
of its own. "step" is the bare step on random tokens; "main.py" is the program itself, with its
data, keyed masks, Lightning, guard, logging. Random tokens make no difference to the arithmetic.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

VOCABULARY, LENGTH, BATCH, BLOCK = 30_522, 128, 8, 16
ALGORITHMS = ("mdlm", "bd3lm")
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
IMPLEMENTATIONS = ("reference", "step", "step compiled", "main.py")


def step_flops(algorithm: str, masked: int) -> float:
    """Matrix-product FLOPs that a step needs, forward and backward, of the linear layers.

    Per layer and token 2 * 12 H^2; the last layer's query, output and MLP only for the rows that
    are predicted, and only keys and values of the clean half, which lacks its last block.
    """
    size, layers, noisy = 768, 12, BATCH * LENGTH
    tokens = noisy + (BATCH * (LENGTH - BLOCK) if algorithm == "bd3lm" else 0)
    full = (layers - 1) * tokens * 24 * size**2
    last = tokens * 4 * size**2 + noisy * 2 * size**2 + masked * 18 * size**2
    return 3.0 * (full + last + masked * 2 * size * VOCABULARY)


def bare_step(implementation: str, algorithm: str, precision: str) -> Callable[[], None]:
    """One training step as a function without arguments."""
    import torch

    from benchmarks.reference import ReferenceStep, ReferenceTrainer
    from models.attention import BlockDiffusionAttention, FullAttention
    from models.dit import DiT
    from models.ema import ExponentialMovingAverage
    from models.precision import use_fastest_exact_matmul
    from objectives.likelihood import head_cross_entropy
    from runtime.memory import keep_freed_memory

    torch.manual_seed(0)
    block = BLOCK if algorithm == "bd3lm" else None
    network = DiT(
        vocab_size=VOCABULARY, hidden_size=768, n_blocks=12, n_heads=12, length=LENGTH,
        compile=implementation == "step compiled",
    ).train()  # fmt: skip
    low = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")

    def batch() -> tuple["Tensor", ...]:
        """x_0, x_t, mask and weights of a batch of random tokens."""
        x0 = torch.randint(0, VOCABULARY - 1, (BATCH, LENGTH))
        rate = (torch.arange(BATCH) + torch.rand(1)) / BATCH
        mask = torch.rand(BATCH, LENGTH) < rate[:, None]
        weight = (1 / rate.clamp(min=1e-3))[:, None].expand(BATCH, LENGTH)
        return x0, x0.masked_fill(mask, VOCABULARY - 1), mask, weight

    if implementation == "reference":
        reference, trainer = ReferenceStep(network, block), ReferenceTrainer(network)

        def step() -> None:
            """All logits, dense mask, default optimiser."""
            x0, xt, _, weight = batch()
            with low:
                loss = reference.loss(x0, xt, weight, VOCABULARY - 1)
            trainer.step(loss)

        return step

    use_fastest_exact_matmul()
    keep_freed_memory()
    cpu, parameters = torch.device("cpu"), list(network.parameters())
    if block is None:
        attention = FullAttention(LENGTH, False, "auto", cpu)
    else:
        attention = BlockDiffusionAttention(LENGTH, block, "auto", cpu)
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.0, fused=True)
    ema, head = ExponentialMovingAverage(parameters, 0.9999), network.output_layer.linear

    def step() -> None:
        """What a training step of this project computes."""
        x0, xt, mask, weight = batch()
        rows = mask.flatten().nonzero()[:, 0]
        ids = xt if block is None else torch.cat([xt, x0[:, :-block]], dim=1)
        with low:
            features = network(ids, attention, rows_M=rows)
            loss, _ = head_cross_entropy(
                features, head.weight, head.bias, x0.flatten()[rows], weight.flatten()[rows],
                VOCABULARY - 1,
            )  # fmt: skip
        (loss / x0.numel()).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters], foreach=True)
        optimizer.grad_scale = (norm + 1e-6).clamp(min=1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(parameters)

    return step


def program(algorithm: str, precision: str, steps: int) -> dict:
    """CPU seconds per step of `python main.py`, by a timing callback inside it."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "seconds.json"
        command = [
            sys.executable, str(ROOT / "main.py"),
            "--config-dir", str(ROOT / "benchmarks" / "configs"), "data=random_text",
            f"algo={algorithm}", "model=small",
            f"model.length={LENGTH}", f"loader.global_batch_size={BATCH}", "trainer=cpu",
            f"trainer.precision={PRECISIONS[precision]}", f"trainer.max_steps={steps}",
            "plugins=[benchmarks]", "+callbacks.timer._target_=benchmarks.timer.StepTimer",
            f"+callbacks.timer.path={result}", "~callbacks.checkpoints", "~callbacks.graceful_stop",
            "~callbacks.final_validation", "trainer.val_check_interval=1000000",
            "+trainer.enable_checkpointing=false", f"paths.run_dir={folder}/run",
            f"paths.cache_dir={folder}/cache",
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        figures = json.loads(result.read_text())
    return {"seconds": figures["seconds"][1:], "rss_gib": figures["rss_gib"]}


def cell(implementation: str, algorithm: str, precision: str, steps: int) -> dict:
    """Measure one cell, in this process or in that of main.py."""
    if implementation == "main.py":
        return program(algorithm, precision, steps + 1)
    from benchmarks.timer import peak_rss_gib, time_steps

    seconds = time_steps(bare_step(implementation, algorithm, precision), steps)
    return {"seconds": seconds, "rss_gib": peak_rss_gib()}


def run_alone(*arguments: str) -> dict:
    """This file again, in a fresh process with one thread."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def table(steps: int, implementations: tuple[str, ...]) -> str:
    """All cells: tokens per CPU-second (best, median), ratio to the reference, memory."""
    from evaluation.tables import text_table

    rates = run_alone("--rates")
    rows = []
    for algorithm in ALGORITHMS:
        for precision in PRECISIONS:
            baseline = None
            for implementation in implementations:
                figures = run_alone(
                    "--cell", implementation, algorithm, precision, "--steps", str(steps)
                )
                best, middle = min(figures["seconds"]), statistics.median(figures["seconds"])
                baseline = baseline or best
                flops = step_flops(algorithm, BATCH * LENGTH // 2) / best / 1e9
                rows.append((
                    f"{algorithm} {precision} {implementation}", BATCH * LENGTH / best,
                    BATCH * LENGTH / middle, baseline / best, f"{flops / rates[precision]:.0%}",
                    figures["rss_gib"],
                ))  # fmt: skip
                print(rows[-1], file=sys.stderr, flush=True)
    header = ("cell", "tok/CPU-s best", "median", "x reference", "of GEMM rate", "RSS GiB")
    title = ", ".join(f"{name} products {rate:.0f} GFLOP/s" for name, rate in rates.items())
    return f"{title} (one thread)\n{text_table(header, rows)}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--rates", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(cell(*options.cell, options.steps)))
    elif options.rates:
        import torch

        from benchmarks.timer import product_rate
        from models.precision import use_fastest_exact_matmul

        use_fastest_exact_matmul()
        types = {"fp32": torch.float32, "bf16": torch.bfloat16}
        print(json.dumps({name: product_rate(dtype) for name, dtype in types.items()}))
    else:
        print(table(options.steps, tuple(options.only)))


if __name__ == "__main__":
    main()
