"""Does self-improving pretraining make a better start for thinking? The whole study, offline.

    python scripts/thinking/study.py [--out FOLDER] [--jobs N] [--size small|smoke]
        [--until base|sft|rlmt|tables] [override ...]

A tiny causal model on chain sums of reasoning-gym, whose answers can be checked. The teacher works
out half of the sums term by term; its other thoughts only say how many terms there are. What pays
is for the rewards to find out. The documents are shared out by source: pretrain, phase3, sft, rlmt,
gate. The stages, each a run of main.py:

    problems      documents with their answers, and other, held-out problems
    thoughts      the documents with thoughts between question and answer (mode=insert_thoughts)
    base          a causal model of documents without thoughts
    phase3        self-improving pretraining from it: online DPO, all candidates compared
    continuation  phase3 against base on held-out prefixes (mode=continuation_eval)
    sft           raw_base, think_base, think_phase3; mode=sft_eval and sft_table of each
    rlmt          think_base_rlmt and think_phase3_rlmt (algo=rlmt_paper); from think_base also
                  algo=rlmt_seed, and a short run whose reward is a language model's judgement
    gate          the arms on the same held-out prefixes, with the thought-use probe, and the kinds
                  of thoughts that they have (kinds.py)
    reasoning     n answers of every arm to held-out problems; the tables of all arms

A finished stage is not run again, and one that was broken off goes on, so the command may be killed
at any time and given again. Prints and leaves FOLDER/*/*.md (.json, .png). Overrides hold for every
training.
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
from scripts.stages import Stages  # noqa: E402
from scripts.thinking.kinds import write_kinds  # noqa: E402

TASK = "{chain_sum:{min_terms:2,max_terms:6,min_digits:1,max_digits:1}}"
SHARES = "{pretrain:0.3,phase3:0.1,sft:0.4,rlmt:0.1,gate:0.1}"


class Size(NamedTuple):
    """How much of everything.

    documents: of training; problems: that are held out. model: overrides. steps: of base, phase3,
    an arm of sft, one of rlmt, and of the judged one. rows: of a step of base and of sft. validate:
    steps between validations. samples: of a prefix in training, of a problem in the evaluation.
    prefixes: of a step of phase3, of one of rlmt, and of the gate. judge: the model that judges.
    """

    documents: int
    problems: int
    model: tuple[str, ...]
    steps: tuple[int, int, int, int, int]
    rows: int
    validate: int
    samples: tuple[int, int]
    prefixes: tuple[int, int, int]
    judge: str


SIZES = {
    "small": Size(
        20_000, 400,
        ("model.hidden_size=128", "model.num_hidden_layers=4", "+model.init_std=0.02"),
        (600, 150, 800, 150, 10), 32, 200, (16, 8), (64, 32, 400), "smollm2",
    ),
    "smoke": Size(
        400, 4,
        ("model.hidden_size=32", "model.num_hidden_layers=2", "+model.init_std=0.02"),
        (4, 2, 4, 2, 2), 4, 2, (4, 2), (2, 2, 2), "tiny_causal",
    ),
}  # fmt: skip
THINKING = ("think_base", "think_phase3")
ARMS = ("raw_base", *THINKING, *(f"{name}_rlmt" for name in THINKING))


class Study(Stages):
    """The stages below one folder."""

    def __init__(self, out: Path, size: Size, jobs: int, overrides: Sequence[str]) -> None:
        super().__init__(out, jobs)
        self.size, self.overrides = size, overrides
        self.rows = out / "thoughts" / "rows.jsonl"

    def problems(self) -> None:
        """Training documents, and held-out problems that are none of them."""
        for split in ("train", "held_out"):
            self.run(
                f"problems/{split}", "mode=prompts", "prompts=reasoning_gym",
                f"prompts.split={split}", "prompts.template='{question}'",
                f"prompts.train_size={self.size.documents}",
                f"prompts.held_out_size={self.size.problems}",
                "~prompts.tasks", f"+prompts.tasks={TASK}",
            )  # fmt: skip
        self._write("problems/documents.jsonl", "train", lambda row: {
            "id": row["id"], "text": f"{_expression(row)} = {row['answer']}\n",
        })  # fmt: skip
        self._write("problems/questions.jsonl", "held_out", lambda row: {
            "id": row["id"], "question": f"{_expression(row)} =", "answer": row["answer"],
        })  # fmt: skip

    def _write(self, name: str, split: str, made: Callable[[dict], dict]) -> None:
        """All rows of a split, or no file: a short one would be read as if it were all."""
        path = self.out / name
        if path.is_file():
            return
        with exclusive(path, "--out"), atomic_file(path, "--out") as file:
            for _, row in read_objects(self.out / "problems" / split / "rows.jsonl"):
                file.write(encode_row(made(row)))

    def thoughts(self) -> None:
        """Every document with a thought; half of them work the sum out."""
        self.run(
            "thoughts", "mode=insert_thoughts", "mode/annotator=worked_sums",
            "mode.annotator.marker='='", "mode.annotator.idle=0.5",
            f"mode.input={self.out}/problems/documents.jsonl",
        )  # fmt: skip

    def train(self, name: str, steps: int, before: str | None, *overrides: str) -> None:
        """A training from the last weights of another one."""
        start = [] if before is None else [f"training.from_pretrained={self.checkpoint(before)}"]
        self.run(
            name, "model=tiny_thinker", *self.size.model, "model.length=128",
            *self._documents(), "training.ema=0", "trainer=cpu", "optim.beta2=0.95",
            "lr_scheduler=cosine_warmup",
            f"lr_scheduler.warmup_steps={max(1, steps // 20)}", f"trainer.max_steps={steps}",
            f"trainer.val_check_interval={self.size.validate}", *start, *overrides,
            *self.overrides,
        )  # fmt: skip

    def _documents(self) -> tuple[str, ...]:
        """Those with thoughts, in shares."""
        return (
            "data=thoughts", f"data.files={self.rows}", "~data.shares", f"+data.shares={SHARES}",
            "data.valid_fraction=0.08", "data.end_suffix=true", "data.min_prefix=1",
            "data.min_suffix=1",
        )  # fmt: skip

    def checkpoint(self, name: str) -> Path:
        """The last weights of a training."""
        return self.out / name / "checkpoints" / "last.ckpt"

    def base(self) -> None:
        """The base model."""
        texts = (
            "data.form=raw",
            "data.documents_per_row=null",
            f"loader.global_batch_size={self.size.rows}",
        )
        self.train("base", self.size.steps[0], None, "algo=sft_raw", "optim.lr=2e-3",
                   "data.share=pretrain", *texts)  # fmt: skip

    def phase3(self) -> None:
        """Self-improving pretraining, and whether its continuations beat the base's."""
        online = self._online("phase3", self.size.prefixes[0])
        self.train("phase3", self.size.steps[1], "base", "algo=online_dpo", "judge=verifiable",
                   "optim.lr=5e-5", *online)  # fmt: skip
        self.run(
            "continuation", "mode=continuation_eval", "judge=verifiable", "trainer=cpu",
            f"eval.checkpoint_path={self.checkpoint('phase3')}",
            f"mode.against={self.checkpoint('base')}", "mode.max_new_tokens=12",
        )  # fmt: skip

    def _online(self, share: str, prefixes: int) -> tuple[str, ...]:
        """What trainings on samples have in common."""
        return (
            f"data.share={share}", "data.form=prefixes", f"algo.samples={self.size.samples[0]}",
            "algo.suffix_tokens=12", "algo.rows=512", "algo.rows_per_pass=256",
            f"loader.global_batch_size={prefixes}",
            "loader.eval_global_batch_size=256", "trainer.log_every_n_steps=1",
            "optim.weight_decay=0", "trainer.gradient_clip_val=1.0",
        )  # fmt: skip

    def sft(self) -> None:
        """Self-improving pretraining, three arms, their evaluation and its table."""
        steps = self.size.steps[2]
        starts = {"think_phase3": "phase3", "think_base": "base", "raw_base": "base"}
        self.together([self._arm(name, start, steps) for name, start in starts.items()])
        self._table("sft_table", "mode=sft_table", [f"sft_eval/{name}" for name in starts])

    def _arm(self, name: str, start: str, steps: int) -> Callable[[], None]:
        form = "raw" if name.startswith("raw") else "interleaved"

        def trained() -> None:
            """Train and evaluate."""
            if start == "phase3":
                self.phase3()
            self.train(
                f"sft/{name}", steps, start, "algo=sft_thoughts", "data.share=sft",
                f"data.form={form}", "data.documents_per_row=null", "optim.lr=2e-3",
                f"loader.global_batch_size={self.size.rows}",
            )  # fmt: skip
            self.run(
                f"sft_eval/{name}", "mode=sft_eval", "trainer=cpu", f"mode.label={name}",
                f"eval.checkpoint_path={self.checkpoint(f'sft/{name}')}",
                f"mode.run={self.out / 'sft' / name}", "mode.prompt_tokens=8",
                "+data.documents_per_row=1",
                "mode.max_new_tokens=64",
            )  # fmt: skip

        return trained

    def rlmt(self) -> None:
        """Two arms; from think_base also the other preset, and a judge in place of the rule."""
        steps, judged = self.size.steps[3:]
        runs: dict[str, tuple[str, int, tuple[str, ...]]] = {
            f"{name}_rlmt": (f"sft/{name}", steps, ("algo=rlmt_paper", "optim.lr=5e-5"))
            for name in THINKING
        }
        start = "sft/think_base"
        runs["seed"] = start, steps, ("algo=rlmt_seed", "optim.lr=5e-5")
        runs["judged"] = start, judged, (
            "algo=rlmt_paper", "optim.lr=5e-5", "reward=judge_local", "algo.samples=4",
            f"model@reward.backend.target={self.size.judge}", "loader.global_batch_size=2",
        )  # fmt: skip
        self.together([self._policy(name, *runs[name]) for name in runs])
        self._table("rlmt_table", "mode=rlmt_table", [f"rlmt/{name}" for name in runs])

    def _policy(
        self, name: str, start: str, steps: int, options: Sequence[str]
    ) -> Callable[[], None]:
        reward = () if any(one.startswith("reward=") for one in options) else ("reward=verifiable",)
        return lambda: self.train(
            f"rlmt/{name}", steps, start, *self._online("rlmt", self.size.prefixes[1]), *reward,
            "algo.thought_tokens=96", f"algo.arm={name}", *options,
        )  # fmt: skip

    def measured(self) -> None:
        """The gate, and answers to held-out problems."""
        arms = {name: self.checkpoint(f"sft/{name}") for name in THINKING}
        arms |= {f"{name}_rlmt": self.checkpoint(f"rlmt/{name}_rlmt") for name in THINKING}
        arms["seed"] = self.checkpoint("rlmt/seed")
        listed = ",".join(f"{name}:{path}" for name, path in arms.items())
        arms["raw_base"] = self.checkpoint("sft/raw_base")
        gate = [lambda: self._gate(listed)]
        self.together(gate + [self._answers(name, path) for name, path in arms.items()])
        write_kinds(self.out / "gate", self.out / "thought_kinds")
        pairs = [
            ["think_base", "raw_base"], ["think_phase3", "think_base"],
            ["think_base_rlmt", "think_base"], ["think_phase3_rlmt", "think_phase3"],
            ["think_phase3_rlmt", "think_base_rlmt"], ["think_base_rlmt", "seed"],
        ]  # fmt: skip
        listed = ",".join(f"[{right},{left}]" for right, left in pairs)
        order = ",".join((*ARMS, "seed"))
        self._table(
            "reasoning", "mode=reasoning_table", [f"answers/{name}" for name in arms],
            f"mode.arms=[{order}]", f"mode.comparisons=[{listed}]",
        )  # fmt: skip

    def _gate(self, checkpoints: str) -> None:
        # Of this share no training reads anything, so its larger part is held out as well.
        self.run(
            "gate", "mode=reward_gate", f"mode.checkpoints={{{checkpoints}}}", "reward=verifiable",
            *self._documents(), "data.share=gate", "data.form=prefixes", "eval.split=train",
            f"mode.prefixes={self.size.prefixes[2]}",
            "mode.thought_tokens=96", "mode.suffix_tokens=12", "mode.probe=true", "trainer=cpu",
        )  # fmt: skip

    def _answers(self, name: str, checkpoint: Path) -> Callable[[], dict]:
        return lambda: self.run(
            f"answers/{name}", "mode=reasoning_eval", "benchmark=questions",
            f"benchmark.questions.prompts.table.files={self.out}/problems/questions.jsonl",
            f"eval.checkpoint_path={checkpoint}", f"mode.arm={name}", "mode.temperature=1.0",
            "mode.top_p=1.0", f"mode.samples={self.size.samples[1]}", "mode.max_new_tokens=112",
            "mode.batch_size=128", "trainer=cpu",
            f"mode.prefix_thought={'false' if name.startswith('raw') else 'true'}",
        )  # fmt: skip

    def _table(self, name: str, mode: str, folders: Sequence[str], *overrides: str) -> None:
        listed = ",".join(str(self.out / folder) for folder in folders)
        self.run(name, mode, f"mode.runs=[{listed}]", *overrides)

    def show(self) -> None:
        """Print every table."""
        for path in sorted(self.out.glob("*/*.md")):
            print(f"\n{path}\n\n{path.read_text()}", flush=True)


def _expression(row: dict) -> str:
    return row["metadata"]["expression"]


def main() -> None:
    """Run what is not done yet."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/thinking_study"))
    parser.add_argument("--jobs", type=int, default=1, help="stages at a time where they can be")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--until", choices=("base", "sft", "rlmt", "tables"), default="tables")
    parser.add_argument("overrides", nargs="*", help="of every training")
    options = parser.parse_args()
    study = Study(options.out.resolve(), SIZES[options.size], options.jobs, options.overrides)
    study.problems()
    study.thoughts()
    for name, part in (("base", study.base), ("sft", study.sft), ("rlmt", study.rlmt)):
        part()
        if name == options.until:
            return
    study.measured()
    study.show()


if __name__ == "__main__":
    main()
