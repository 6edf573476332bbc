"""Two-stage rollouts: one reading of a prefix for all of its samples, beside `generate`.

    python benchmarks/rollouts.py [--model smollm2] [--prefixes 1] [--samples 16] [--prefix 384]
        [--thought 12] [--suffix 32] [--measured 4] [--top-p 1] [--threads 2]

The reference does what a straightforward sampler does with transformers: `generate` once per sample
and stage, the prompt read anew each time, the closing delimiter appended in between. `--measured`
of the samples of a prefix are enough for its rate. The second reference has the samples of a prefix
decode together, by `generate` with `num_return_sequences`. Tokens that end a thought or a suffix
are forbidden, so that all have the same lengths.

The log-probabilities of the rollouts must be those of a pass without a cache: one further away than
1e-3 is printed and ends in exit code 1. "times" are by CPU seconds, which other work on the machine
disturbs least; peak memory (Linux) is above what was there before, weights included.
"""

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import GenerationConfig, PreTrainedModel  # noqa: E402

from decoding.rollout import LocalRollouts, sampling_distribution  # noqa: E402
from decoding.rollout_record import Rollout, RolloutSettings  # noqa: E402
from evaluation.tables import text_table  # noqa: E402
from models.causal import CausalTarget  # noqa: E402
from models.precision import use_fastest_exact_matmul  # noqa: E402
from runtime.shared_target import open_target  # noqa: E402

HEADER = ("rollouts", "samples", "seconds", "tokens/s", "tokens/CPU-s", "times", "peak MiB")
# Reserved tokens of SmolLM2; every other model has its last two, which are as good for timing.
DELIMITERS = ("<jupyter_start>", "<jupyter_output>")
TOLERANCE = 1e-3


class Written(NamedTuple):
    """One sample of a reference."""

    thought_ids: list[int]
    suffix_ids: list[int]


def continued(
    model: PreTrainedModel, prompts: list[list[int]], new: int, copies: int,
    settings: RolloutSettings, forbidden: list[int],
) -> list[list[int]]:  # fmt: skip
    """`new` tokens behind every prompt, `copies` times, by `generate`."""
    how = GenerationConfig(
        do_sample=True, temperature=settings.temperature, top_p=settings.top_p, top_k=0,
        max_new_tokens=new, min_new_tokens=new, suppress_tokens=forbidden, pad_token_id=0,
        num_return_sequences=copies,
    )  # fmt: skip
    ids_PL = torch.tensor(prompts)
    found_BL = model.generate(ids_PL, attention_mask=torch.ones_like(ids_PL), generation_config=how)
    return cast(Tensor, found_BL)[:, ids_PL.shape[1] :].tolist()


def by_generate(
    model: PreTrainedModel, prompt: list[int], samples: int, together: bool,
    settings: RolloutSettings, forbidden: list[int],
) -> list[Written]:  # fmt: skip
    """The samples of one prefix in two stages, one after the other or all together."""
    if not together:
        return [by_generate(model, prompt, 1, True, settings, forbidden)[0] for _ in range(samples)]
    thoughts = continued(model, [prompt], settings.thought_tokens, samples, settings, forbidden)
    closed = [[*prompt, *thought, settings.close_id] for thought in thoughts]
    suffixes = continued(model, closed, settings.suffix_tokens, 1, settings, forbidden)
    return [Written(*one) for one in zip(thoughts, suffixes, strict=True)]


@torch.no_grad()
def furthest(
    model: PreTrainedModel, rollout: Rollout, settings: RolloutSettings, forbidden_V: Tensor
) -> float:
    """Greatest distance of a rollout's log-probabilities from those of a pass without a cache."""
    tokens = torch.tensor([*rollout.prompt_ids, *rollout.sampled_ids])
    chosen = torch.tensor(rollout.chosen()).nonzero()[:, 0] + len(rollout.prompt_ids)
    hidden_LD = model.base_model(input_ids=tokens[None]).last_hidden_state[0]
    logits_MV = model.get_output_embeddings()(hidden_LD[chosen - 1])
    p_MV = sampling_distribution(logits_MV, settings.temperature, settings.top_p, forbidden_V)
    logp_M = p_MV.gather(-1, tokens[chosen, None])[:, 0].log()
    return float((logp_M - torch.tensor(rollout.logprobs())).abs().max())


def delimiters(target: CausalTarget) -> tuple[int, int]:
    """Two tokens that stand for those of a thought."""
    known, most = target.tokenizer.get_vocab(), len(target.tokenizer)
    first, second = (known.get(text, most - n) for n, text in enumerate(DELIMITERS, 1))
    return first, second


class Cost(NamedTuple):
    """What samples cost."""

    name: str
    samples: int
    seconds: float
    tokens_s: float
    tokens_cpu_s: float
    peak_mib: float

    def row(self, first: "Cost") -> tuple[str, ...]:
        """For the table, beside the first of its rows."""
        times = self.tokens_cpu_s / first.tokens_cpu_s
        return (
            self.name, str(self.samples), f"{self.seconds:.1f}", f"{self.tokens_s:.1f}",
            f"{self.tokens_cpu_s:.1f}", f"{times:.1f}", f"{self.peak_mib:.0f}",
        )  # fmt: skip


def timed(name: str, call: Callable[[], list], new: int) -> tuple[list, Cost]:
    """Samples of `new` tokens each, and what they cost."""
    # What others have freed goes back first. The system's own peak, begun anew: a thread that looks
    # would be in the way of what it watches.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident_mib("VmRSS")
    began, cpu = time.perf_counter(), time.process_time()
    found = call()
    seconds, cpu_s = time.perf_counter() - began, time.process_time() - cpu
    tokens = len(found) * new
    peak_mib = resident_mib("VmHWM") - before
    return found, Cost(name, len(found), seconds, tokens / seconds, tokens / cpu_s, peak_mib)


def resident_mib(field: str) -> float:
    """VmRSS, the memory of this process, or VmHWM, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def read_options() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--top-p", type=float, default=1.0)
    for name, value in (
        ("prefixes", 1), ("samples", 16), ("prefix", 384), ("thought", 12), ("suffix", 32),
        ("measured", 4), ("threads", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def main() -> None:
    """Print the table; the exit code is 1 if log-probabilities are wrong."""
    options = read_options()
    torch.set_num_threads(options.threads)
    use_fastest_exact_matmul()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("config", ["algo=dflash", f"model={options.model}"])
    target = open_target(cast(dict, OmegaConf.to_container(cfg.model, resolve=True)))
    opening, closing = delimiters(target)
    settings = RolloutSettings(
        opening, closing, target.stop_ids, options.thought, options.suffix, top_p=options.top_p,
        rows=options.prefixes * options.samples,
    )  # fmt: skip
    most = len(target.tokenizer)
    forbidden_V = torch.arange(len(target.embedding_VD)) >= most
    forbidden_V[[opening, closing, target.mask_token_id, *target.stop_ids]] = True
    forbidden = forbidden_V.nonzero()[:, 0].tolist()
    generator = torch.Generator().manual_seed(0)
    shape = options.prefixes, options.prefix
    prompts = [
        [*ids, opening] for ids in torch.randint(0, most, shape, generator=generator).tolist()
    ]
    sampler = LocalRollouts(target.decoding_model, settings, forbidden_V)

    def reference(samples: int, together: bool) -> list[Written]:
        """Of all prefixes, one after the other."""
        return [
            written
            for prompt in prompts
            for written in by_generate(target.model, prompt, samples, together, settings, forbidden)
        ]

    named = [(str(number), prompt) for number, prompt in enumerate(prompts)]
    cases: dict[str, Callable[[], list]] = {
        "generate, one by one": lambda: reference(options.measured, False),
        "generate, together": lambda: reference(options.samples, True),
        "shared prefix": lambda: sampler.sample(named, options.samples),
    }
    # Whoever comes first would pay for reading the weights from the disk.
    by_generate(target.model, prompts[0][:16], 1, False, settings, forbidden)
    sampler.continuations([("warm", prompts[0][:16])], 1)
    new, found, costs = options.thought + options.suffix, [], []
    for name, call in cases.items():
        found, cost = timed(name, call, new)
        costs.append(cost)
    print(text_table(HEADER, [cost.row(costs[0]) for cost in costs]))
    worst = max(furthest(target.model, one, settings, forbidden_V) for one in found[::8])
    print(f"log-probabilities: at most {worst:.1e} from those of a pass without a cache")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
