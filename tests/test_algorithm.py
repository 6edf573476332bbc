"""What every algorithm promises: one gradient however it is cut, no bad step, safe beginnings."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from callbacks.metrics_csv import read_metrics
from diffusion import Diffusion
from runtime.checkpoint import read_checkpoint
from runtime.errors import CheckpointError, NonFiniteError
from runtime.run import load_summary
from tests.runs import ALGORITHMS, best, call_main, configure, fit, last, tiny, write_corpus
from tests.support import equal

UNCUT = ("model.dropout=0", "loader.batch_size=8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("algorithm")


def gradient(run_dir: Path, beta1: float = 0.9) -> list[Tensor]:
    """The gradient of a run of one step without clipping, from the first moments of AdamW."""
    moments = last(run_dir)["optimizer_states"][0]["state"]
    return [moment["exp_avg"] / (1 - beta1) for moment in moments.values()]


def largest_difference(first: list[Tensor], second: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


# One global batch of 8 padded rows as 1, 2, 4 and 8 micro-batches with different numbers of tokens.
@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradient_and_weights_do_not_depend_on_accumulation(folder, tmp_path, name):
    one_step = (*ALGORITHMS[name], *UNCUT, "trainer.max_steps=1", "trainer.gradient_clip_val=null")
    fit(folder, tmp_path / "whole", *one_step)
    expected = gradient(tmp_path / "whole")
    assert max(float(part.abs().max()) for part in expected) > 0.05
    three_steps = (*ALGORITHMS[name], *UNCUT, "trainer.max_steps=3", "optim.lr=1e-3")
    fit(folder, tmp_path / "steps", *three_steps)
    weights = list(last(tmp_path / "steps")["state_dict"].values())
    rows = read_metrics(tmp_path / "steps" / "metrics.csv")
    for size in (4, 2, 1):
        cut = f"loader.batch_size={size}"
        fit(folder, tmp_path / f"cut{size}", *one_step, cut)
        assert largest_difference(gradient(tmp_path / f"cut{size}"), expected) < 1e-6
        fit(folder, tmp_path / f"steps{size}", *three_steps, cut)
        found = list(last(tmp_path / f"steps{size}")["state_dict"].values())
        assert largest_difference(found, weights) < 1e-6
        for row, other in zip(
            rows, read_metrics(tmp_path / f"steps{size}" / "metrics.csv"), strict=True
        ):
            assert row == pytest.approx(other, rel=1e-6)


def test_the_gradient_is_that_of_the_weighted_mean_over_the_global_batch(folder, tmp_path):
    """Against autograd of sum(w l) / (number of scored tokens), without any of the machinery."""
    from dataloader import LanguageData
    from opening import build_algorithm

    overrides = (*ALGORITHMS["mdlm"], *UNCUT, "loader.batch_size=2")
    fit(folder, tmp_path, *overrides, "trainer.max_steps=1", "trainer.gradient_clip_val=null")
    cfg = configure(folder, tmp_path, *overrides)
    data = LanguageData(cfg)
    torch.manual_seed(0)
    model = build_algorithm(cfg, data)
    start = {name: weight.clone() for name, weight in initial_weights(folder, overrides).items()}
    model.load_state_dict(start)
    total, tokens = torch.zeros(()), 0
    for batch, _ in zip(data.train_loader(max_steps=1, accumulate=4), range(4), strict=True):
        terms = model.loss_terms({**batch, "inputs": model.corrupt(batch, 0)})
        total, tokens = total + terms.loss, tokens + int(batch["loss_mask"][:, 1:].sum())
    (total / tokens).backward()
    expected = [weight.grad for weight in model.parameters()]
    assert largest_difference(gradient(tmp_path), expected) < 1e-6


def initial_weights(folder: Path, overrides: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights a run starts from, caught before its first step."""
    caught: dict[str, Tensor] = {}
    original = Diffusion.loss_terms

    def loss_terms(self, batch):
        caught.update({k: v.detach().clone() for k, v in self.state_dict().items()})
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Diffusion, "loss_terms", loss_terms)
        fit(folder, folder / "initial", *overrides, "trainer.max_steps=1", "callbacks=none",
            "logger=none")  # fmt: skip
    return caught


class Sabotage:
    """Spoils optimiser step `step` of a run, and remembers model, weights and rows before it."""

    def __init__(self, patch: pytest.MonkeyPatch, what: str, step: int) -> None:
        self.what, self.step = what, step
        self.model: Diffusion | None = None
        self.rows: list[int] = []
        self.bad = -1
        self._original = Diffusion.loss_terms
        patch.setattr(Diffusion, "loss_terms", lambda model, batch: self.loss_terms(model, batch))

    def loss_terms(self, model, batch):
        if model.trainer.global_step == self.step:
            if self.model is None:
                self.model, self.before = model, snapshot(model)
                if self.what == "gradient":
                    model.backbone.vocab_embed.embedding.register_hook(lambda g: g * torch.inf)
            self.rows += batch["index"].tolist()
            last_micro_batch = len(self.rows) == 8 // model.trainer.world_size
            if self.what == "loss" and last_micro_batch:
                inputs = batch["inputs"]
                owner = inputs["rows"] // model.length
                self.bad = int(batch["index"][owner[-1]])
                inputs["weights"] = inputs["weights"].masked_fill(owner == owner[-1], torch.nan)
        return self._original(model, batch)


def snapshot(model) -> dict:
    optimizer = model.optimizers().optimizer
    return {
        "weights": [weight.detach().clone() for weight in model.parameters()],
        "averages": [shadow.clone() for shadow in model.ema.shadow],
        "moments": [entry["exp_avg"].clone() for entry in optimizer.state.values()],
    }


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_named_and_not_taken(
    folder, tmp_path, monkeypatch, name, what
):
    sabotage = Sabotage(monkeypatch, what, step=2)
    with pytest.raises(NonFiniteError) as error:
        fit(folder, tmp_path, *ALGORITHMS[name])
    rows = [sabotage.bad] if what == "loss" else sabotage.rows
    assert len(sabotage.rows) == 8
    assert str(error.value) == (
        f"non-finite {what} at step 2, rows {rows}: the step was not applied"
    )
    assert error.value.step == 2
    assert equal(snapshot(sabotage.model), sabotage.before)
    assert all(torch.isfinite(weight).all() for weight in sabotage.model.parameters())


def test_a_non_finite_loss_ends_the_run_with_exit_code_3(folder, tmp_path, monkeypatch, capfd):
    Sabotage(monkeypatch, "loss", step=2)
    assert call_main([*tiny(folder), f"paths.run_dir={tmp_path}"]) == 3
    line = capfd.readouterr().err.strip()
    assert line.startswith("NonFiniteError: non-finite loss at step 2, rows [")
    assert "\n" not in line
    summary = load_summary(tmp_path)
    assert (summary["status"], summary["steps"]) == ("nonfinite", 2)


# Beginning from the weights of another run.


@pytest.fixture(scope="module")
def mdlm(folder):
    fit(folder, folder / "mdlm", *ALGORITHMS["mdlm"])
    return best(folder / "mdlm")


def start_from(folder, run_dir, path, *overrides):
    """What a run that starts from `path` holds before its first step: weights, average, step."""
    from dataloader import LanguageData
    from opening import build_algorithm

    cfg = configure(folder, run_dir, f"training.from_pretrained={path}", *overrides)
    return build_algorithm(cfg, LanguageData(cfg))


def test_weights_and_averages_are_taken_over_but_no_counter(folder, mdlm, tmp_path):
    stored = read_checkpoint(mdlm)
    assert stored["global_step"] > 0 and stored["ema"]["num_updates"] > 0
    model = start_from(folder, tmp_path, mdlm, *ALGORITHMS["bd3lm"], "training.ema=0.5")
    assert type(model).__name__ == "BD3LM"
    assert equal(dict(model.state_dict()), dict(stored["state_dict"]))
    assert equal(model.ema.shadow, stored["ema"]["shadow_params"])
    assert (model.ema.num_updates, model.ema.decay) == (0, 0.5)

    fit(
        folder, tmp_path, f"training.from_pretrained={mdlm}", *ALGORITHMS["bd3lm"],
        "trainer.max_steps=2",
    )  # fmt: skip
    content = last(tmp_path)
    assert content["global_step"] == content["ema"]["num_updates"] == 2
    assert content["lr_schedulers"][0]["last_epoch"] == 2
    assert not equal(dict(content["state_dict"]), dict(stored["state_dict"]))


def test_every_tensor_that_does_not_fit_is_named(folder, mdlm, tmp_path):
    deeper = ("model.n_blocks=3", "model.cond_dim=4")
    with pytest.raises(CheckpointError) as error:
        start_from(folder, tmp_path, mdlm, *deeper)
    names = set(read_checkpoint(mdlm)["state_dict"])
    with pytest.warns(UserWarning, match=r"training\.from_pretrained: m"):
        model = start_from(folder, tmp_path, mdlm, *deeper, "training.allow_partial=true")
    ours = model.state_dict()
    message = str(error.value)
    stored = read_checkpoint(mdlm)["state_dict"]
    for name in ours:
        fits = name in names and stored[name].shape == ours[name].shape
        assert (name in message) is not fits, name
        if fits:
            assert torch.equal(ours[name], stored[name])
    assert "training.allow_partial=true" in message and "\n" not in message
    # An average of weights that are not there cannot be taken over: it starts at the weights.
    assert equal(model.ema.shadow, [weight.detach() for weight in model.parameters()])


def test_another_tokenizer_is_refused(folder, mdlm, tmp_path):
    write_corpus(tmp_path, lines=60, seed=5)
    with pytest.raises(CheckpointError, match=r"training\.from_pretrained.*its tokenizer"):
        start_from(tmp_path, tmp_path / "run", mdlm)
