"""From an autoregressive model to best-of-n block diffusion, offline, and what every step is worth.

    python scripts/refine/journey.py [--out FOLDER] [--jobs N] [--size small|smoke]
        [--until drafts|scorers|tables] [override ...]

A tiny causal model on tasks of reasoning-gym whose answers can be checked. The stages, each a run
of main.py:

    prompts    training prompts with their answers; held-out ones are only used by the benchmark
    ar         the autoregressive model (algo=sft_raw)
    masked     stage 1: masked block diffusion from it (algo=masked_adapt)
    control    masked_adapt again from stage 1, for as many tokens as stage 2
    refined    stage 2: draft and refine from stage 1 (algo=draft_refine)
    nce        stage 3: scorers on the frozen stage 2: beam_perround, beam_lastround, temp07
    plateau    shorter: a scale in fp32, fixed, in bf16, and copies of the truth not masked
    scorer     mode=scorer_eval of each, with the alpha that was best on half of the rows; beside it
               what picking by the log-probability of the autoregressive model gains
    benchmark  ar, control, refined, and best of 4 with every scorer, on held-out prompts
    table      refined is the baseline; table_thresholds: control and refined with fewer passes

A finished stage is not run again, so the command goes on where it was broken off. Writes and prints
FOLDER/plateau.md (.png), scorer/*/scorer.md, table/benchmark_table.md (.json, .png) and that of
table_thresholds; FOLDER is a path without commas and spaces. Overrides hold for every training.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.files import read_objects  # noqa: E402
from data.journal import encode_row  # noqa: E402
from data.storage import atomic_file, exclusive  # noqa: E402
from scripts.refine.plateau import plateau_table, plot_plateau  # noqa: E402
from scripts.stages import Stages  # noqa: E402

TASKS = (
    "{chain_sum:{min_terms:2,max_terms:3,min_digits:1,max_digits:2},"
    "basic_arithmetic:{min_terms:2,max_terms:3,min_digits:1,max_digits:2},"
    "spell_backward:{min_word_len:3,max_word_len:7}}"
)


class Size(NamedTuple):
    """How much of everything.

    train, held_out: prompts per task. model: overrides. steps: of ar, masked, refined (and
    control), of a scorer, and of one for the plateau. validate: steps between validations.
    """

    train: int
    held_out: int
    model: tuple[str, ...]
    steps: tuple[int, int, int, int, int]
    validate: int


SIZES = {
    "small": Size(
        12_000, 400,
        ("model.hidden_size=128", "model.num_hidden_layers=4", "+model.init_std=0.02"),
        (2400, 600, 600, 600, 300), 200,
    ),
    "smoke": Size(
        40, 4, ("model.hidden_size=32", "model.num_hidden_layers=2", "+model.init_std=0.02"),
        (4, 4, 4, 4, 4), 2,
    ),
}  # fmt: skip
# How candidates are proposed and scored, by the names of the published variants.
SCORERS = {
    "beam_perround": ("bon.score_agg=perround", "bon.rounds=2"),
    "beam_lastround": ("bon.score_agg=lastround", "bon.rounds=2"),
    "temp07": (
        "bon/proposal=softmax_sampling", "bon.proposal.temperature=0.7", "bon.score_agg=perround",
        "bon.rounds=1",
    ),
}  # fmt: skip
# The scale of few steps has far to go.
FAST_SCALE = "scorer.scale.lr_mult=30"
# What the plateau is made of: "slow" is the head's own rate, in place of ten times that.
PLATEAU = {
    "fp32": (),
    "bf16": ("scorer.scale.dtype=bfloat16",),
    "fp32, slow": ("scorer.scale.lr_mult=1",),
    "bf16, slow": ("scorer.scale.dtype=bfloat16", "scorer.scale.lr_mult=1"),
    "fixed": ("scorer.scale.mode=fixed",),
    "fixed, copies": ("scorer.scale.mode=fixed", "nce.dedup=false"),
    "fp32, copies": ("nce.dedup=false",),
}
# Of the commit rule, beside its default of 0.9: what fewer passes cost.
THRESHOLDS = (0.5, 0.7)


class Journey(Stages):
    """The stages below one folder."""

    def __init__(self, out: Path, size: Size, jobs: int, overrides: Sequence[str]) -> None:
        super().__init__(out, jobs)
        self.size, self.overrides = size, overrides

    def prompts(self) -> None:
        """Training prompts, and the rows that training reads: with their answers."""
        self.run(
            "prompts", "mode=prompts", "prompts=reasoning_gym", "prompts.template='{question}'",
            f"prompts.train_size={self.size.train}", f"prompts.held_out_size={self.size.held_out}",
            "~prompts.tasks", f"+prompts.tasks={TASKS}",
        )  # fmt: skip
        answered = self.out / "prompts" / "answered.jsonl"
        if answered.is_file():
            return
        # All of it or nothing: a short file would be trained on as if it were all.
        with exclusive(answered, "--out"), atomic_file(answered, "--out") as file:
            for _, row in read_objects(self.out / "prompts" / "rows.jsonl"):
                file.write(encode_row(row | {"response": str(row["answer"]), "finish": "stop"}))

    def train(self, name: str, steps: int, before: str | None, *overrides: str) -> None:
        """A training from the best weights of another one."""
        start = [] if before is None else [f"training.from_pretrained={self.checkpoint(before)}"]
        self.run(
            name, "model=tiny_causal", *self.size.model, "model.length=256", "data=chat",
            f"data.files={self.out}/prompts/answered.jsonl", "data.valid_fraction=0.02",
            "data.thinking=true", "training.ema=0", "loader.global_batch_size=16", "trainer=cpu",
            "optim.beta2=0.95", "lr_scheduler=cosine_warmup",
            f"lr_scheduler.warmup_steps={max(1, steps // 20)}", f"trainer.max_steps={steps}",
            f"trainer.val_check_interval={self.size.validate}", *start, *overrides,
            *self.overrides,
        )  # fmt: skip

    def checkpoint(self, name: str) -> Path:
        """The weights of a training that are gone on from and measured.

        Scorers are measured on validation rows, so theirs are the last weights, not those that did
        best on these rows.
        """
        which = "last" if name.startswith("nce/") else "best"
        return self.out / name / "checkpoints" / f"{which}.ckpt"

    def drafts(self) -> None:
        """The autoregressive model, stage 1, stage 2 and its control."""
        ar, masked, refined, *_ = self.size.steps
        self.train("ar", ar, None, "algo=sft_raw", "optim.lr=2e-3")
        blocks = ("data.align=4", "block_size=4", "optim.lr=1e-3")
        stage_1 = ("algo=masked_adapt", "training.resample=true", "training.sampling_eps_min=0.25")
        self.train("masked", masked, "ar", *stage_1, *blocks)
        tokens = refined * 16 * 256
        stage_2 = ("algo=draft_refine", f"algo.injection.tokens={tokens // 2}")
        self.together(
            [
                lambda: self.train("control", refined, "masked", *stage_1, *blocks),
                lambda: self.train("refined", refined, "masked", *stage_2, *blocks),
            ]
        )

    def scorers(self) -> None:
        """Three scorers; and shorter runs of what the scale and copies of the truth do."""
        *_, long, short = self.size.steps
        calls = [
            self._scorer(f"nce/{name}", long, (*options, FAST_SCALE))
            for name, options in SCORERS.items()
        ]
        calls += [
            self._scorer(f"plateau/{_folder(name)}", short, (*SCORERS["beam_lastround"], *options))
            for name, options in PLATEAU.items()
        ]
        self.together(calls)
        curves = {name: self.out / "plateau" / _folder(name) / "metrics.csv" for name in PLATEAU}
        plot_plateau(self.out / "plateau.png", curves)
        (self.out / "plateau.md").write_text(plateau_table(curves))

    def _scorer(self, name: str, steps: int, options: Sequence[str]) -> Callable[[], None]:
        blocks = ("data.align=4", "block_size=4", "optim.lr=3e-4", "algo=nce")
        return lambda: self.train(name, steps, "refined", *blocks, *options)

    def measured(self) -> None:
        """Every scorer on held-out blocks; the benchmark with the alpha that suits it."""
        alphas = {}
        for name in SCORERS:
            found = self.run(
                f"scorer/{name}", "mode=scorer_eval", "mode.blocks=data",
                f"eval.checkpoint_path={self.checkpoint(f'nce/{name}')}",
                f"mode.judge={self.checkpoint('ar')}",
            )  # fmt: skip
            # Where none is better than greedy, what the default changes is of interest.
            alphas[name] = found.get("tuned/alpha") or 0.1
        runs: dict[str, tuple[Path, tuple[str, ...]]] = {
            name: (self.checkpoint(name), ()) for name in ("ar", "control", "refined")
        }
        for name, alpha in alphas.items():
            runs[f"best_of_4_{name}"] = (self.checkpoint(f"nce/{name}"), (f"bon.alpha={alpha}",))
        faster = {
            f"{name}_{threshold}": (
                self.checkpoint(name),
                (f"refine.commit.threshold={threshold}",),
            )
            for name in ("control", "refined")
            for threshold in THRESHOLDS
        }
        asked = runs | faster
        self.together([self._benchmark(name, *asked[name]) for name in asked])
        self._table("table", list(runs), "refined")
        self._table("table_thresholds", ["control", "refined", *faster], "control")

    def show(self) -> None:
        """Print every table."""
        scorers = [f"scorer/{name}/scorer.md" for name in SCORERS]
        tables = [f"{name}/benchmark_table.md" for name in ("table", "table_thresholds")]
        for name in ("plateau.md", *scorers, *tables):
            print(f"\n{self.out / name}\n\n{(self.out / name).read_text()}", flush=True)

    def _table(self, folder: str, names: Sequence[str], baseline: str) -> None:
        folders = ",".join(str(self.out / "benchmark" / name) for name in names)
        self.run(
            folder, "mode=benchmark_table", f"mode.runs=[{folders}]",
            f"mode.baseline={self.out / 'benchmark' / baseline}",
        )  # fmt: skip

    def _benchmark(self, name: str, checkpoint: Path, options: Sequence[str]) -> Callable[[], dict]:
        gym = "benchmark.reasoning_gym"
        return lambda: self.run(
            f"benchmark/{name}", "mode=benchmark_eval", "benchmark=reasoning_gym",
            f"eval.checkpoint_path={checkpoint}", f"mode.label={name}", "mode.thinking=true",
            "mode.workers=1", "trainer=cpu", f"{gym}.format=chat", f"{gym}.shots=0",
            f"{gym}.prompts.template='{{question}}'", f"{gym}.max_new_tokens=16",
            f"{gym}.prompts.train_size={self.size.train}",
            f"{gym}.prompts.held_out_size={self.size.held_out}",
            f"~{gym}.prompts.tasks", f"+{gym}.prompts.tasks={TASKS}", *options,
        )  # fmt: skip


def _folder(name: str) -> str:
    return name.replace(", ", "_")


def main() -> None:
    """Run what is not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/refine_journey"))
    parser.add_argument("--jobs", type=int, default=1, help="stages at a time where they can be")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--until", choices=("drafts", "scorers", "tables"), default="tables")
    parser.add_argument("overrides", nargs="*", help="of every training")
    options = parser.parse_args()
    journey = Journey(options.out.resolve(), SIZES[options.size], options.jobs, options.overrides)
    journey.prompts()
    journey.drafts()
    if options.until != "drafts":
        journey.scorers()
    if options.until == "tables":
        journey.measured()
        journey.show()


if __name__ == "__main__":
    main()
