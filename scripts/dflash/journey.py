"""From prompts to a table of acceptance, offline: a target, its labels, three drafts, their tau.

    python scripts/dflash/journey.py [--out FOLDER] [--jobs N] [--gsm8k FILE] [--size small|smoke]
        [--until labels|drafts] [--control] [override ...]

The stages of the published drafts at the size of two cores, each a run of main.py:

    prompts        reasoning-gym (training and held-out), HumanEval, GSM8K if a local copy is given
    decontaminate  no training prompt that overlaps with an evaluation prompt
    regenerate     the target answers every prompt, greedy
    subtract, mix  sets of exact counts, each without the prompts of those before it
    train          M1 (KD) -> M1.5 (EAL) -> M1.6 (survival-EAL), each from the one before
    acceptance     tau on held-out prompts and HumanEval, and the table of the three

    control        with --control: KD on the sets of M1.5 and M1.6 too, for as many steps, and the
                   table of M1.6 beside it, which differs from it in the losses alone

A finished stage is not run again, so the command goes on where it was broken off. Writes
acceptance_table.md, .json and .png to FOLDER/table (and FOLDER/table_control), a path without
commas and spaces.
"""

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from scripts.stages import stage  # noqa: E402


class Size(NamedTuple):
    """How much of everything.

    experiment: of the drafts. target: overrides of regenerate.
    per_task, held_out, gsm8k: prompts. answer: most tokens of a label. counts: rows of the
    three sets, as (reasoning-gym, GSM8K). steps: updates of the three drafts.
    evaluated: most tokens of an evaluated answer. problems: of HumanEval, None for all. timed:
    prompts of each benchmark that are answered with and without a draft, for the speed.
    """

    experiment: str
    target: tuple[str, ...]
    per_task: int
    held_out: int
    gsm8k: int
    answer: int
    counts: tuple[tuple[int, int], ...]
    steps: tuple[int, ...]
    evaluated: int
    problems: int | None
    timed: int


SIZES = {
    "small": Size(
        "dflash_smollm2", ("model=smollm2",), 170, 10, 400, 160,
        ((900, 220), (250, 80), (250, 80)), (800, 300, 300), 128, None, 8,
    ),
    "smoke": Size(
        "dflash_smollm2_smoke", ("model=tiny_causal", "model.max_position_embeddings=2048"),
        8, 1, 8, 24, ((40, 0), (12, 0), (12, 0)), (8, 4, 4), 16, 4, 1,
    ),
}  # fmt: skip
# The drafts, in the order in which each starts from the one before it.
DRAFTS = (("m1", "kd"), ("m1_5", "eal"), ("m1_6", "survival_eal"))
CONTROL = ("kd_1_5", "kd_1_6")  # from M1, on the sets of the later two


class Journey:
    """The stages below one folder."""

    def __init__(self, out: Path, size: Size, jobs: int, gsm8k: Path | None) -> None:
        self.out, self.size, self.jobs, self.gsm8k = out, size, jobs, gsm8k

    def run(self, name: str, *overrides: str) -> dict:
        """One stage, by the name of its folder."""
        print(f"{name} ...", flush=True)
        metrics = stage(self.out / name, *overrides)
        shown = {key: value for key, value in metrics.items() if key.count("/") < 2}
        print(f"{name}: {shown}", flush=True)
        return metrics

    def rows(self, name: str) -> str:
        """The rows that a data stage left."""
        return str(self.out / name / "rows.jsonl")

    def prompts(self) -> None:
        """Training and evaluation prompts, the former without any overlap with the latter."""
        size = self.size
        gym = (
            "mode=prompts", "prompts=reasoning_gym", f"prompts.train_size={size.per_task}",
            f"prompts.held_out_size={size.held_out}",
        )  # fmt: skip
        self.run("prompts/reasoning_gym", *gym)
        self.run("prompts/held_out", *gym, "prompts.split=held_out")
        limit = () if size.problems is None else (f"mode.limit={size.problems}",)
        self.run("prompts/humaneval", "mode=prompts", "prompts=humaneval", *limit)
        train = [self.rows("prompts/reasoning_gym")]
        if self.gsm8k is not None:
            self.run(
                "prompts/gsm8k", "mode=prompts", "prompts=gsm8k",
                f"prompts.table.files={self.gsm8k}", f"mode.limit={size.gsm8k}",
            )  # fmt: skip
            train.append(self.rows("prompts/gsm8k"))
        against = [self.rows("prompts/held_out"), self.rows("prompts/humaneval")]
        self.run(
            "prompts/clean", "mode=decontaminate", f"mode.input={_listed(train)}",
            f"mode.against={_listed(against)}",
        )  # fmt: skip

    def labels(self) -> None:
        """What the target says to every training prompt."""
        size, shards = self.size, range(self.jobs)

        def shard(number: int) -> None:
            """The prompts of one process."""
            self.run(
                f"labels/{number}", "mode=regenerate", *size.target,
                f"mode.input={self.rows('prompts/clean')}", f"mode.max_new_tokens={size.answer}",
                f"mode.shard={number}", f"mode.num_shards={self.jobs}",
            )  # fmt: skip

        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(shard, shards))
        self.run("labels/audit", "mode=audit_labels", f"mode.input={_listed(self.answers)}")

    @property
    def answers(self) -> list[str]:
        """The files of labels, as mode=regenerate names those of a shard."""
        shards = [f"-{n}-of-{self.jobs}" for n in range(self.jobs)] if self.jobs > 1 else [""]
        return [
            str(self.out / "labels" / str(number) / f"answers{shard}.jsonl")
            for number, shard in enumerate(shards)
        ]

    def sets(self) -> None:
        """One set per draft: no prompt of an earlier one, exact counts of every source."""
        seen: list[str] = []
        for (name, _), (gym, gsm8k) in zip(DRAFTS, self.size.counts, strict=True):
            pool = self.answers
            if seen:
                # The tasks are made by templates, so that nearly the same is still another task.
                self.run(
                    f"sets/{name}_unseen", "mode=subtract", f"mode.input={_listed(pool)}",
                    f"mode.against={_listed(seen)}", "mode.near=null",
                )  # fmt: skip
                pool = [self.rows(f"sets/{name}_unseen")]
            counts = {"gym": gym} | ({"gsm8k": gsm8k} if self.gsm8k is not None else {})
            wanted = ",".join(f"{group}:{count}" for group, count in counts.items())
            self.run(
                f"sets/{name}", "mode=mix", f"mode.input={_listed(pool)}",
                f"mode.counts={{{wanted}}}",
                "mode.groups={gym:['reasoning_gym/*'],gsm8k:[gsm8k]}"
                if self.gsm8k is not None
                else "mode.groups={gym:['reasoning_gym/*']}",
            )  # fmt: skip
            seen.append(self.rows(f"sets/{name}"))

    def drafts(self, overrides: list[str]) -> None:
        """KD, then EAL, then survival-EAL, each from the weights before."""
        before: str | None = None
        for number, (name, objective) in enumerate(DRAFTS):
            asked = self._training(number, objective, overrides)
            self.run(f"features_{name}", "mode=cache_features", *asked)
            before = self._train(name, asked, before)

    def control(self, overrides: list[str]) -> None:
        """KD in place of the later two."""
        before = DRAFTS[0][0]
        for number, name in enumerate(CONTROL, start=1):
            before = self._train(name, self._training(number, "kd", overrides), before)

    def _training(self, number: int, objective: str, overrides: list[str]) -> list[str]:
        """Overrides of a training on the set of draft `number`."""
        name, steps = DRAFTS[number][0], self.size.steps[number]
        asked = [
            f"experiment={self.size.experiment}", f"objective={objective}",
            f"data.files={self.rows(f'sets/{name}')}", f"trainer.max_steps={steps}",
            f"lr_scheduler.warmup_steps={round(0.04 * steps)}",
            f"algo.feature_cache={self.out / 'features' / name}",
        ]  # fmt: skip
        if objective == "kd":
            asked.append("objective.gamma=4.0")  # of blocks of 8
        return [*asked, *overrides]

    def _train(self, name: str, asked: list[str], before: str | None) -> str:
        """A draft from the best weights of the one before; returns its name."""
        start = [] if before is None else [f"training.from_pretrained={self.checkpoint(before)}"]
        self.run(f"drafts/{name}", *asked, *start)
        return name

    def checkpoint(self, name: str) -> Path:
        """The weights of a draft that are evaluated and gone on from."""
        return self.out / "drafts" / name / "checkpoints" / "best.ckpt"

    def acceptance(self, overrides: list[str], control: bool) -> None:
        """Every draft on the same prompts, then the table; of the control the last draft."""
        names, last = [name for name, _ in DRAFTS], CONTROL[-1]
        for name in names:
            self._evaluate(name, overrides)
        self._table("table", names)
        if control:
            self._evaluate(last, overrides)
            self._table("table_control", [last, names[-1]])

    def _evaluate(self, name: str, overrides: list[str]) -> None:
        sets = {
            "humaneval": self.rows("prompts/humaneval"),
            "reasoning_gym": self.rows("prompts/held_out"),
        }
        prompts = ",".join(f"{name}:{path}" for name, path in sets.items())
        self.run(
            f"acceptance/{name}", "mode=acceptance_eval",
            f"eval.checkpoint_path={self.checkpoint(name)}",
            f"mode.prompts={{{prompts}}}", f"mode.max_new_tokens={self.size.evaluated}",
            f"mode.timed_prompts={self.size.timed}", "mode.batch_size=32", *overrides,
        )  # fmt: skip

    def _table(self, folder: str, names: list[str]) -> None:
        runs = _listed([str(self.out / "acceptance" / name) for name in names])
        self.run(folder, "mode=acceptance_table", f"mode.runs={runs}")


def _listed(paths: list[str]) -> str:
    return f"[{','.join(paths)}]"


def main() -> None:
    """Run what is not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/dflash_journey"))
    parser.add_argument("--jobs", type=int, default=1, help="processes that answer prompts")
    parser.add_argument("--gsm8k", type=Path, help="a local train.jsonl of GSM8K")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--until", choices=("labels", "drafts"))
    parser.add_argument("--control", action="store_true", help="KD of equal length too")
    parser.add_argument("overrides", nargs="*", help="of training and evaluation")
    options = parser.parse_args()
    gsm8k = options.gsm8k and options.gsm8k.resolve()
    journey = Journey(options.out.resolve(), SIZES[options.size], options.jobs, gsm8k)
    journey.prompts()
    journey.labels()
    journey.sets()
    if options.until == "labels":
        return
    journey.drafts(options.overrides)
    if options.control:
        journey.control(options.overrides)
    if options.until == "drafts":
        return
    journey.acceptance(options.overrides, options.control)


if __name__ == "__main__":
    main()
