"""Speculative greedy decoding beside plain greedy decoding of the same target, token by token.

    python benchmarks/lossless.py PROMPTS.jsonl ... [--model smollm2 | --checkpoint DRAFT.ckpt]
        [--prompts 200] [--max-new-tokens 64] [--batch-size 8] [--block-size 8] [--threads 2]

Drafts: an oracle (the target's own answer), random tokens, and the trained one of --checkpoint. The
plain answers come from `decoding.local`, whose loop is another one. In single precision two tokens
that are nearly as probable may change places with the shape of a batch: where answers differ, the
gap between the target's two largest logits at that place is printed.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import cast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data.chat import messages_of, read_chat  # noqa: E402
from decoding.drafts import Draft, NetworkDraft, OracleDraft, RandomDraft  # noqa: E402
from decoding.generate import GenerationRequest, GenerationSettings  # noqa: E402
from decoding.local import LocalGenerator  # noqa: E402
from decoding.speculate import speculate  # noqa: E402
from decoding.verification import Greedy  # noqa: E402
from draft import DFlashDraft  # noqa: E402
from evaluation.tables import text_table  # noqa: E402
from models.causal import CausalTarget  # noqa: E402
from runtime.shared_target import open_target  # noqa: E402

HEADER = ("draft", "prompts", "tokens", "different", "tau", "tokens/s", "CPU-s")


def plain_answers(
    target: CausalTarget, prompts: Sequence[list[int]], options: argparse.Namespace
) -> list[list[int]]:
    """The target's greedy answers."""
    settings = GenerationSettings(max_new_tokens=options.max_new_tokens)
    requests = [GenerationRequest(str(n), prompt_ids=ids) for n, ids in enumerate(prompts)]
    results = LocalGenerator(target, settings, 32, device="cpu").generate(requests)
    answers = {result.id: result.token_ids or [] for result in results}
    return [answers[request.id] for request in requests]


def measure(
    name: str,
    draft: Draft,
    target: CausalTarget,
    prompts: Sequence[list[int]],
    answers: Sequence[list[int]],
    options: argparse.Namespace,
) -> tuple:
    """Answer all prompts with a draft and compare; returns a row of the table."""
    began, cpu = time.perf_counter(), time.process_time()
    results = []
    for start in tqdm(range(0, len(prompts), options.batch_size), name, unit="batch"):
        results += speculate(
            target.decoding_model, draft, prompts[start : start + options.batch_size], Greedy(),
            max_new_tokens=options.max_new_tokens, stop_ids=target.stop_ids,
        )  # fmt: skip
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    different = 0
    for prompt, answer, result in zip(prompts, answers, results, strict=True):
        if list(result.token_ids) != answer:
            different += 1
            print(f"{name}: differs at a gap of {logit_gap(target, prompt, answer, result):.2e}")
    tokens = sum(len(result.token_ids) for result in results)
    cycles = sum(len(result.cycles) for result in results)
    tau = (tokens - len(results)) / cycles if cycles else float("nan")
    speed = f"{tokens / seconds:.1f}"
    return name, len(prompts), tokens, different, f"{tau:.3f}", speed, f"{cpu:.0f}"


def logit_gap(target: CausalTarget, prompt: list[int], answer: list[int], result: object) -> float:
    """Between the two most probable tokens where the answers part."""
    other = list(result.token_ids)  # type: ignore[attr-defined]
    same = next(
        (n for n, (a, b) in enumerate(zip(answer, other, strict=False)) if a != b),
        min(len(answer), len(other)),
    )
    with torch.inference_mode():
        logits = target.model(torch.tensor([prompt + answer[:same]])).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    return first - second


def main() -> None:
    """Print the table; the exit code is 1 if answers differ."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", default="smollm2")
    source.add_argument("--checkpoint", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("config", ["algo=dflash", f"model={options.model}"])
    trained = None
    if options.checkpoint is not None:
        trained = cast(DFlashDraft, DFlashDraft.load_from_checkpoint(options.checkpoint))
        target = trained.target
    else:
        target = open_target(cast(dict, OmegaConf.to_container(cfg.model, resolve=True)))
    rows = islice((row for file in options.files for row in read_chat(file)), options.prompts)
    prompts = [target.chat_ids(messages_of(row)) for row in rows]
    answers = plain_answers(target, prompts, options)
    drafted, vocabulary = options.block_size - 1, len(target.head_VD)
    drafts: dict[str, Draft] = {
        "oracle": OracleDraft(
            {tuple(prompt): answer for prompt, answer in zip(prompts, answers, strict=True)},
            drafted, vocabulary,
        ),
        "random": RandomDraft(drafted, vocabulary),
    }  # fmt: skip
    if trained is not None:
        drafts["trained"] = NetworkDraft(
            trained.network, target.embedding_VD, target.decoding_head, options.block_size
        )
    table = [measure(n, d, target, prompts, answers, options) for n, d in drafts.items()]
    print(text_table(HEADER, table))
    sys.exit(any(row[3] for row in table))


if __name__ == "__main__":
    main()
