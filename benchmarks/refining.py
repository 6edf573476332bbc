"""Decoding by refined blocks: the exact cache beside re-reading the prefix for every block.

    python benchmarks/refining.py [--model smollm2] [--new 256] [--prompt 128] [--iterations 2]
        [--block-size 4] [--batch 1] [--threads 2]

The reference does what samplers of block diffusion commonly do: for every block it reads the whole
prefix anew, keeps its keys and values in a cache of transformers, and copies that cache for every
pass over the block. Both refine in the same way and must write the same tokens (a difference is
printed and ends in exit code 1). Third, the best of 4 candidates with a score head of random
weights, whose passes cost what those of a trained one cost; it picks by its log-probabilities.

The weights are not adapted to blocks, so no block is sure of itself: all passes are made.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import DynamicCache, PreTrainedModel  # noqa: E402

from decoding.best_of import BestOf  # noqa: E402
from decoding.candidates import BeamBayes  # noqa: E402
from decoding.chain import Refinement  # noqa: E402
from decoding.generate import GenerationRequest, GenerationSettings  # noqa: E402
from decoding.refine import RefineGenerator  # noqa: E402
from evaluation.tables import text_table  # noqa: E402
from models.causal import CausalTarget  # noqa: E402
from models.scorer import ScoreHead, ScoreScale  # noqa: E402
from runtime.shared_target import open_target  # noqa: E402

HEADER = ("decoding", "seconds", "tokens/s", "times", "CPU-s", "passes", "tokens/pass")


class Reference:
    """A block behind a prefix that was read for it alone; a `decoding.chain.BlockRunner`."""

    def __init__(self, target: CausalTarget, model: PreTrainedModel, forbidden_V: Tensor) -> None:
        self.target, self.model, self.forbidden_V = target, model, forbidden_V
        self.table_VD, self.blank_id = target.embedding_VD, target.mask_token_id
        self.passes = 0

    def logits(self, hidden_PD: Tensor) -> Tensor:
        """What the head makes of hidden states."""
        return self.model.get_output_embeddings()(hidden_PD)

    def read(self, prefix: list[int], size: int) -> None:
        """The whole prefix, block by block."""
        self.cache, self.length = DynamicCache(config=self.model.config), len(prefix)
        if prefix:
            block_S = torch.arange(len(prefix)) // size
            mask_SS = torch.zeros(len(prefix), len(prefix))
            mask_SS.masked_fill_(block_S[:, None] < block_S[None], float("-inf"))
            self.model.base_model(
                input_ids=torch.tensor([prefix]), attention_mask=mask_SS[None, None],
                past_key_values=self.cache, use_cache=True,
            )  # fmt: skip

    def run(self, inputs_YSD: Tensor, copies: int = 1) -> Tensor:
        """One pass over the block, on a copy of the cache."""
        self.passes += 1
        size = inputs_YSD.shape[1]
        return self.model.base_model(
            inputs_embeds=inputs_YSD,
            attention_mask=torch.zeros(1, 1, size, self.length + size),
            position_ids=torch.arange(self.length, self.length + size)[None],
            past_key_values=copy.deepcopy(self.cache),
            use_cache=True,
        ).last_hidden_state


@torch.no_grad()
def reread(
    target: CausalTarget, model: PreTrainedModel, refinement: Refinement, prompt: list[int],
    new: int, size: int, forbidden_V: Tensor,
) -> tuple[list[int], int]:  # fmt: skip
    """An answer, and how many passes over blocks it took."""
    runner, tokens = Reference(target, model, forbidden_V), list(prompt)
    while len(tokens) < len(prompt) + new:
        start = len(tokens) // size * size
        runner.read(tokens[:start], size)
        given = tokens[start:]
        block_1S = torch.tensor([given + [target.mask_token_id] * (size - len(given))])
        given_1S = torch.arange(size)[None] < len(given)
        refined = refinement.refine(runner, block_1S, given_1S)
        tokens = tokens[:start] + refined.token_XS[0].tolist()
    return tokens[len(prompt) :][:new], runner.passes


def random_head(target: CausalTarget) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Scores by a head in the size of the target."""
    scale = ScoreScale("fixed", 1.0, 0.1, 100.0)
    head = ScoreHead.beside(target.model, layers=1, bounded=True, scale=scale).eval()

    def scores(hidden_XCSD: Tensor, tokens_XCS: Tensor, written_XS: Tensor) -> Tensor:
        """gamma s."""
        copies = tokens_XCS.shape[1]
        token_YSD = target.embedding_VD[tokens_XCS.flatten(0, 1)]
        written_YS = written_XS.repeat_interleave(copies, 0)
        return head(hidden_XCSD.flatten(0, 1), token_YSD, written_YS).view(-1, copies)

    return scores


def answer(
    target: CausalTarget, prompts: list[list[int]], options: argparse.Namespace,
    refinement: Refinement, best_of: BestOf | None, scores: object,
) -> tuple[list[list[int]], float]:  # fmt: skip
    """Answers with the exact cache, and the mean number of passes over blocks of one."""
    settings = GenerationSettings(max_new_tokens=options.new, stop_ids=())
    generator = RefineGenerator(
        target, settings, options.block_size, refinement, options.batch, best_of=best_of,
        scores=scores if best_of else None, device="cpu",  # type: ignore[arg-type]
    )  # fmt: skip
    requests = [GenerationRequest(str(n), prompt_ids=p) for n, p in enumerate(prompts)]
    results = {r.id: r for r in generator.generate(requests)}
    # One more reads the whole blocks of a prompt.
    prompt_passes = sum(len(prompt) >= options.block_size for prompt in prompts)
    nfe = sum(r.work["nfe"] for r in results.values() if r.work)
    passes = (nfe - prompt_passes) / len(results)
    return [results[r.id].token_ids or [] for r in requests], passes


def timed(call: Callable[[], tuple]) -> tuple[tuple, float, float]:
    """Result, seconds and CPU seconds of a call."""
    began, cpu = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - began, time.process_time() - cpu


def main() -> None:
    """Print the table; the exit code is 1 if the answers differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    for name, value in (
        ("new", 256), ("prompt", 128), ("iterations", 2), ("block-size", 4), ("batch", 1),
        ("threads", 2),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("config", ["algo=dflash", f"model={options.model}"])
    target = open_target(cast(dict, OmegaConf.to_container(cfg.model, resolve=True)))
    generator = torch.Generator().manual_seed(0)
    most = len(target.tokenizer)
    prompts = torch.randint(0, most, (options.batch, options.prompt), generator=generator).tolist()
    forbidden_V = torch.arange(len(target.embedding_VD)) >= most
    forbidden_V[target.mask_token_id] = True
    refinement = Refinement(options.iterations)
    tokens, size = options.batch * options.new, options.block_size

    def reference(model: PreTrainedModel) -> tuple[list[list[int]], float]:
        """All prompts, one after the other."""
        answers, passes = zip(
            *(
                reread(target, model, refinement, p, options.new, size, forbidden_V)
                for p in prompts
            ),
            strict=True,
        )
        return list(answers), sum(passes) / len(passes)

    best_of, scores = BestOf(4, BeamBayes(1), alpha=0.0), random_head(target)
    answer(target, [p[:8] for p in prompts], options, Refinement(1), None, None)  # warm up
    cases: dict[str, Callable[[], tuple]] = {
        "re-reading every block": lambda: reference(target.model),
        "re-reading, packed weights": lambda: reference(target.decoding_model),
        "exact cache": lambda: answer(target, prompts, options, refinement, None, None),
        "exact cache, best of 4": lambda: answer(
            target, prompts, options, refinement, best_of, scores
        ),
    }
    rows, first, slowest = [], None, 0.0
    for name, call in cases.items():
        (answers, passes), seconds, cpu = timed(call)
        first, slowest = first or answers, slowest or seconds
        if answers != first:
            print(f"{name}: writes other tokens")
        rows.append(
            (name, f"{seconds:.1f}", f"{tokens / seconds:.1f}", f"{slowest / seconds:.1f}",
             f"{cpu:.1f}", f"{passes:.0f}", f"{options.new / passes:.2f}", answers == first)
        )  # fmt: skip
    print(text_table(HEADER, [row[:-1] for row in rows]))
    sys.exit(not all(row[-1] for row in rows))


if __name__ == "__main__":
    main()
