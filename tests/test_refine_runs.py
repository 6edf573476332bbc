"""Whole runs of MaskedAdapt and DraftRefine: warm starts, metrics, checkpoints, what is refused."""

import itertools
from dataclasses import replace

import pytest
import torch

from algorithm import Algorithm
from callbacks.metrics_csv import read_metrics
from data.errors import DataError
from decoding.generate import GenerationRequest, GenerationSettings
from modes import ppl_eval
from pretrained import PretrainedAlgorithm
from refine import BlockModel, DraftRefine, MaskedAdapt
from runtime.errors import CheckpointError
from tests.block_runs import build, fit, plain, tiny_blocks
from tests.runs import call_main, last
from tests.support import compose_config

SIZE = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def journey(folder):
    """sft_raw -> masked_adapt -> draft_refine, each from the one before."""
    path = None
    for name, steps in (("sft_raw", 4), ("masked_adapt", 4), ("draft_refine", 24)):
        start = () if path is None else (f"training.from_pretrained={path}",)
        length = (f"trainer.max_steps={steps}", f"trainer.val_check_interval={min(steps, 8)}")
        fit(folder, folder / name, name, *start, *length, "lr_scheduler=constant_warmup")
        path = folder / name / "checkpoints" / "last.ckpt"
    return folder


def opened(folder, name, **options):
    return Algorithm.load_from_checkpoint(folder / name / "checkpoints" / "last.ckpt", **options)


def test_warm_starts_go_from_one_to_the_next(journey):
    """The first loss of each is that of the weights that it was given."""
    for before, after in itertools.pairwise(("sft_raw", "masked_adapt", "draft_refine")):
        start = last(journey / before)["state_dict"]
        built, _, _ = build(
            journey, after,
            f"training.from_pretrained={journey / before / 'checkpoints' / 'last.ckpt'}",
        )  # fmt: skip
        found = built.state_dict()
        assert found.keys() == start.keys()
        assert all(torch.equal(found[name], start[name]) for name in start)
        assert built.ema.num_updates == 0
        for shadow, wanted in zip(
            built.ema.shadow, last(journey / before)["ema"]["shadow_params"], strict=True
        ):
            assert torch.equal(shadow, wanted)


def test_it_learns(journey):
    rows = read_metrics(journey / "draft_refine" / "metrics.csv")
    first, _, final = (row for row in rows if "val/nll" in row)
    assert final["val/nll"] < 0.8 * first["val/nll"] < 1.0
    for name in ("block_exact", "token_accuracy", "tokens_per_pass"):
        assert final[f"val/{name}"] > first[f"val/{name}"]


def test_validation_metrics_are_what_they_say(journey):
    """Every block of the validation rows alone, by decoding behind its true past."""
    model = opened(journey, "draft_refine")
    _, data, _ = build(journey, "draft_refine")
    blocks = exact = places = right = passes = 0
    nats = tokens = 0.0
    for batch in data.eval_loader("validation"):
        for row in range(len(batch["input_ids"])):
            for number in range(int(batch["segment"][row].max()) + 1):
                mine = batch["segment"][row] == number
                ids, response = batch["input_ids"][row, mine], batch["response"][row, mine]
                answer = int((response == 0).sum())
                written = int((response == 1).sum())
                [(found, _)] = model.loglikelihood(
                    [(ids[:answer].tolist(), ids[answer : answer + written].tolist())]
                )
                nats, tokens = nats - found, tokens + written
                for first in range(0, len(ids), SIZE):
                    predict = (response != 0)[first : first + SIZE]
                    written_here = (response == 1)[first : first + SIZE]
                    if not (response == 1)[first : first + SIZE].any():
                        continue
                    got, needed = decoded(model, ids, first, predict)
                    truth = ids[first : first + SIZE]
                    blocks += 1
                    places += int(written_here.sum())
                    right += int(((got == truth) & written_here).sum())
                    exact += bool((got == truth)[written_here].all())
                    passes += needed
    metrics = [r for r in read_metrics(journey / "draft_refine" / "metrics.csv") if "val/nll" in r][
        -1
    ]
    assert metrics["val/nll"] == pytest.approx(nats / tokens, rel=1e-4)
    assert metrics["val/block_exact"] == pytest.approx(exact / blocks)
    assert metrics["val/token_accuracy"] == pytest.approx(right / places)
    assert metrics["val/tokens_per_pass"] == pytest.approx(places / passes)


def test_an_evaluation_counts_blocks_as_the_training_does(journey, tmp_path):
    path = journey / "draft_refine" / "checkpoints" / "last.ckpt"
    cfg = compose_config(
        "mode=ppl_eval", f"eval.checkpoint_path={path}", "eval.split=validation",
        f"paths.cache_dir={journey}/cache", "trainer=cpu", run_dir=tmp_path,
    )  # fmt: skip
    found = ppl_eval.run(cfg)
    rows = read_metrics(journey / "draft_refine" / "metrics.csv")
    wanted = [row for row in rows if "val/nll" in row][-1]
    for name in ("nll", "block_exact", "token_accuracy", "tokens_per_pass"):
        assert found[name] == pytest.approx(wanted[f"val/{name}"], rel=1e-4), name


def decoded(model, ids, first, predict):
    """One block behind the text before it, by the generator's own way: tokens, passes."""
    given = int((~predict).sum())
    settings = GenerationSettings(max_new_tokens=SIZE - given, stop_ids=())
    request = GenerationRequest("a", prompt_ids=ids[: first + given].tolist())
    [result] = model.generator(settings, device="cpu").generate([request])
    # Whole blocks of a prompt are one pass more.
    passes = result.work["nfe"] - (first + given >= SIZE)
    return torch.tensor([*ids[first : first + given].tolist(), *result.token_ids]), passes


def test_a_checkpoint_opens_with_nothing_else(journey, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the target was asked for")

    model = opened(journey, "draft_refine")
    prompts = [[1, 50, 60], list(range(40, 55))]
    wanted = answers(model, prompts)
    for name in ("runtime.shared_target.open_target", "pretrained.take_target"):
        monkeypatch.setattr(name, fail)
    for name, kind in (
        ("sft_raw", PretrainedAlgorithm),
        ("masked_adapt", MaskedAdapt),
        ("draft_refine", DraftRefine),
    ):
        found = opened(journey, name)
        assert isinstance(found, kind) and not found.training
    assert answers(opened(journey, "draft_refine"), prompts) == wanted
    with pytest.raises(CheckpointError, match="holds DraftRefine, which is not a MaskedAdapt"):
        MaskedAdapt.load_from_checkpoint(journey / "draft_refine" / "checkpoints" / "last.ckpt")


def answers(model, prompts):
    settings = GenerationSettings(max_new_tokens=10, stop_ids=())
    requests = [GenerationRequest(str(n), prompt_ids=p) for n, p in enumerate(prompts)]
    found = model.generator(settings, device="cpu").generate(requests)
    return {result.id: (result.token_ids, result.work) for result in found}


def test_answers_of_the_file_are_those_of_the_model(folder, tmp_path):
    """The model that a run has just trained, and the checkpoint that it left."""
    caught = []
    original = BlockModel.on_train_end

    def on_train_end(self):
        original(self)
        caught.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockModel, "on_train_end", on_train_end)
        fit(folder, tmp_path, "masked_adapt", "trainer.max_steps=3")
    [model] = caught
    prompts = [[1, 50, 60], list(range(40, 55)), [9] * 8]
    with model.ema_weights():
        inside = answers(model, prompts)
        fingerprint = model.weights_fingerprint
    raw = answers(model, prompts)
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert answers(Algorithm.load_from_checkpoint(path), prompts) == inside
    assert answers(Algorithm.load_from_checkpoint(path, weights="raw"), prompts) == raw
    assert Algorithm.load_from_checkpoint(path).weights_fingerprint == fingerprint
    assert model.weights_fingerprint != fingerprint


def test_adapters_alone_are_trained(folder, tmp_path):
    lora = "algo.lora={r: 4, lora_alpha: 8, target_modules: all-linear}"
    fit(folder, tmp_path, "draft_refine", lora, "trainer.max_steps=3")
    fresh, _, _ = build(folder, "draft_refine", lora)
    trained = opened(tmp_path.parent, tmp_path.name, weights="raw")
    before, after = fresh.state_dict(), trained.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved and all("lora_" in key for key in moved)
    prompts = [[1, 50, 60], list(range(40, 55))]
    assert answers(trained, prompts)

    start = f"training.from_pretrained={tmp_path / 'checkpoints' / 'last.ckpt'}"
    token = torch.arange(40, 60)[None]
    logits = trained.backbone.model(token).logits
    # A run without adapters starts from the merged weights, and its average from the average's.
    merged, _, _ = build(folder, "masked_adapt", start)
    torch.testing.assert_close(merged.backbone.model(token).logits, logits, rtol=1e-4, atol=1e-5)
    averaged = opened(tmp_path.parent, tmp_path.name)
    with merged.ema_weights():
        found = merged.backbone.model(token).logits
    wanted = averaged.backbone.model(token).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, logits, rtol=1e-4, atol=1e-5)
    # A scorer ranks what that average writes.
    scorer, _, _ = build(folder, "nce", start)
    torch.testing.assert_close(scorer.backbone.model(token).logits, wanted, rtol=1e-4, atol=1e-5)
    scorer.best_of = replace(scorer.best_of, alpha=0.0)
    greedy, best = answers(averaged, prompts), answers(scorer, prompts)
    assert {key: ids for key, (ids, _) in best.items()} == {
        key: ids for key, (ids, _) in greedy.items()
    }
    # The same adapters go on as they are; other ones begin on the merged average.
    same, _, _ = build(folder, "draft_refine", lora, start)
    assert torch.equal(same.backbone.model(token).logits, logits)
    other, _, _ = build(folder, "draft_refine", lora.replace("r: 4", "r: 2"), start)
    torch.testing.assert_close(other.backbone.model(token).logits, wanted, rtol=1e-4, atol=1e-5)
    assert all(p.requires_grad == ("lora_" in name) for name, p in other.named_parameters())


def test_adapters_begin_on_the_average_of_a_whole_run(folder, tmp_path):
    fit(folder, tmp_path, "masked_adapt", "trainer.max_steps=3")
    start = f"training.from_pretrained={tmp_path / 'checkpoints' / 'last.ckpt'}"
    adapted, _, _ = build(folder, "draft_refine", "algo.lora={target_modules: all-linear}", start)
    whole, token = opened(tmp_path.parent, tmp_path.name), torch.arange(40, 60)[None]
    found, wanted = (model.backbone.model(token).logits for model in (adapted, whole))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["masked_adapt", "draft_refine"])
def test_micro_batches_do_not_change_a_run(folder, tmp_path, name):
    for size in (2, 8):
        fit(folder, tmp_path / str(size), name, f"loader.batch_size={size}", "trainer.max_steps=3")
    one, other = (last(tmp_path / str(size))["state_dict"] for size in (2, 8))
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=2e-4, atol=2e-5, msg=key)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("data.align=null",), "data.align=null: documents have to begin with a block"),
        (("block_size=8",), "data.align=4: documents have to begin with a block of block_size=8"),
        (("model.length=90", "data.align=2"), "block_size=4: does not divide model.length=90"),
        (("algo.lora={rank: 4}",), "algo.lora: "),
        (("refine.commit.threshold=2",), "refine.commit.threshold=2: "),
        (("refine.soft_inputs.top=0", "refine/soft_inputs=topk_soft"), "refine.soft_inputs.top=0"),
        (("algo.max_passes=0",), "algo.max_passes=0: wrong value"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_in_one_line(folder, tmp_path, capfd, overrides, message):
    capfd.readouterr()
    chosen = ("algo=draft_refine", *tiny_blocks(folder), *overrides, f"paths.run_dir={tmp_path}")
    assert call_main(chosen) == 2
    [line] = capfd.readouterr().err.strip().splitlines()
    assert message in line


def test_likelihoods_do_not_depend_on_what_is_asked_beside(journey):
    model = opened(journey, "draft_refine")
    draw = torch.Generator().manual_seed(0)
    pairs = [
        tuple(torch.randint(10, 90, (length,), generator=draw).tolist() for length in lengths)
        for lengths in [(5, 3), (0, 4), (8, 4), (30, 1), (1, 9), (12, 6)] * 4
    ]
    together = model.loglikelihood(pairs)
    for pair, (found, greedy) in zip(pairs, together, strict=True):
        [(wanted, alone)] = model.loglikelihood([pair])
        assert found == pytest.approx(wanted, rel=1e-4) and greedy == alone
    # Of what is too long the end is read.
    longest = model.backbone.model.config.max_position_embeddings
    [(cut, _), (end, _)] = model.loglikelihood(
        [([7] * 10 + [20] * longest, [5]), ([20] * (longest - 1), [5])]
    )
    assert cut == pytest.approx(end, rel=1e-5)
    for pair, message in (
        (([1], []), "a continuation of 0 tokens; allowed 1 .. "),
        (([1], [5] * (longest + 1)), "; allowed 1 .. "),
        (([1], [10**6]), "token ids outside 0 .. "),
    ):
        with pytest.raises(ValueError, match=message):
            model.loglikelihood([pair])


@pytest.mark.parametrize("name", ["draft_refine", "sft_raw"])
def test_text_that_says_not_known_yet_is_refused(folder, name):
    algorithm, data, _ = build(folder, name)
    batch = next(iter(data.train_loader(max_steps=1, accumulate=2)))
    place = (batch["response"][2] == 1).nonzero()[0]
    batch["input_ids"][2, place] = algorithm.special.mask
    message = (
        rf"data=chat: row {int(batch['index'][2])} has '.*' as text to write, which algo={name}"
    )
    with pytest.raises(DataError, match=message):
        algorithm.on_before_batch_transfer(batch, 0)


def test_rows_without_documents_are_refused(folder, tmp_path, capfd):
    chosen = tiny_blocks(
        folder, lambda folder: ("data=pydocs", "data.tokenizer_name_or_path=target")
    )
    assert call_main(("algo=draft_refine", *chosen, f"paths.run_dir={tmp_path}")) == 2
    [line] = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("ConfigError: data.join=false: algo=draft_refine has to know where the")
    assert "experiment=block_text" in line


def test_plain_text_in_blocks(folder, tmp_path):
    metrics = fit(folder, tmp_path, "draft_refine", "trainer.max_steps=4", data=plain)
    assert metrics["val/nll"] > 0 and metrics["val/block_exact"] < 1
