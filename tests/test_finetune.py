"""SupervisedFinetune: its loss is that of transformers, packed or not; its runs and likelihoods."""

import math

import pytest
import torch
import torch.nn.functional as F

from algorithm import Algorithm
from callbacks.metrics_csv import read_metrics
from data.errors import DataError
from decoding.generate import GenerationRequest, GenerationSettings
from runtime.errors import ConfigError
from tests.block_runs import build, fit, plain
from tests.runs import last


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def built(folder):
    return build(folder, "sft_raw")


def documents_of(batch):
    """(row, tokens, labels) of every document, with -100 on what is not to be written."""
    for row in range(len(batch["input_ids"])):
        for number in range(int(batch["segment"][row].max()) + 1):
            mine = batch["segment"][row] == number
            tokens, written = batch["input_ids"][row, mine], batch["response"][row, mine] == 1
            yield row, tokens, tokens.where(written, torch.tensor(-100))


def own_loss(model, tokens, labels, blank):
    """Sum of transformers' causal loss over one document, alone; BLANK is not in its softmax."""
    logits = model(input_ids=tokens[None]).logits
    logits = logits.index_fill(-1, torch.tensor(blank), -torch.inf)
    count = int((labels[1:] != -100).sum())
    mean = model.loss_function(logits=logits, labels=labels[None], vocab_size=logits.shape[-1])
    return mean * count, count


def gradients(algorithm, loss):
    algorithm.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in algorithm.named_parameters() if p.requires_grad}


def test_the_loss_is_transformers_own_on_every_document_alone(built):
    algorithm, _, batch = built
    terms = algorithm.loss_terms(batch)
    rows, total, count = torch.zeros(4), torch.zeros(()), 0
    for row, tokens, labels in documents_of(batch):
        loss, places = own_loss(algorithm.backbone.model, tokens, labels, algorithm.special.mask)
        rows[row] += loss.detach()
        total, count = total + loss, count + places
    assert int(batch["segment"].max()) >= 1, "several documents to a row"
    assert terms.weight == count > 50
    torch.testing.assert_close(terms.loss, total, rtol=1e-4, atol=0)
    torch.testing.assert_close(terms.row_losses.float(), rows, rtol=1e-4, atol=0)
    found = gradients(algorithm, terms.loss)
    for name, wanted in gradients(algorithm, total).items():
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-3, msg=name)


def test_packed_documents_are_unpacked_ones(built):
    algorithm, _, batch = built
    parts = list(documents_of(batch))
    shape = len(parts), max(len(tokens) for _, tokens, _ in parts)
    alone = {"input_ids": torch.zeros(shape, dtype=torch.long), "index": torch.arange(len(parts))}
    alone |= {name: torch.full(shape, -1) for name in ("segment", "response")}
    for place, (_, tokens, labels) in enumerate(parts):
        alone["input_ids"][place, : len(tokens)] = tokens
        alone["segment"][place, : len(tokens)] = 0
        alone["response"][place, : len(tokens)] = (labels != -100).long()
    with torch.no_grad():
        packed, single = algorithm.loss_terms(batch), algorithm.loss_terms(alone)
    assert packed.weight == single.weight
    torch.testing.assert_close(packed.loss, single.loss, rtol=1e-5, atol=0)


def test_validation_is_the_loss_and_its_count(built):
    algorithm, _, batch = built
    with torch.no_grad():
        terms, found = algorithm.loss_terms(batch), algorithm.evaluate(batch, 0)
    torch.testing.assert_close(found.nll.float(), terms.row_losses.float(), rtol=1e-5, atol=0)
    assert found.tokens.sum() == terms.weight and algorithm.is_exact


def test_plain_text_is_written_whole(folder):
    """Joined rows without prompts have no column that says so."""
    for align in (1, 4):
        algorithm, _, batch = build(folder, "sft_raw", f"data.align={align}", data=plain)
        terms = algorithm.loss_terms(batch)
        segment, response = batch["segment"], batch["response"]
        begins = F.pad(segment[:, 1:] != segment[:, :-1], (1, 0), value=True)
        written = (segment >= 0) & (response == 1)
        assert bool((response == -1).any()) == (align == 4)
        assert terms.weight == (written & ~begins).sum() > 200


def test_likelihoods_are_those_of_the_model(built):
    algorithm, _, _ = built
    pairs = [([5, 9, 20], [7, 8]), ([], [30, 31, 32]), ([40], [50])]
    model, begin = algorithm.backbone.model, algorithm.tokenizer.bos_token_id
    for (prompt, continuation), (nats, greedy) in zip(
        pairs, algorithm.loglikelihood(pairs), strict=True
    ):
        tokens = [*(prompt or [begin]), *continuation]
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        places = range(len(tokens) - len(continuation) - 1, len(tokens) - 1)
        wanted = sum(float(log_p[p, tokens[p + 1]]) for p in places)
        assert nats == pytest.approx(wanted, rel=1e-5)
        assert greedy == all(int(log_p[p].argmax()) == tokens[p + 1] for p in places)
    best = model(input_ids=torch.tensor([[5, 9, 20]])).logits[0, -1].argmax()
    assert algorithm.loglikelihood([([5, 9, 20], [int(best)])])[0][1] is True


def answers(algorithm, prompts=((5, 9, 20), (40, 41, 42, 43, 44))):
    settings = GenerationSettings(max_new_tokens=12, stop_ids=())
    generator = algorithm.generator(settings, device="cpu")
    requests = [GenerationRequest(str(n), prompt_ids=p) for n, p in enumerate(prompts)]
    return {r.id: r.token_ids for r in generator.generate(requests)}


def slow_answer(model, prompt, new=12):
    tokens = list(prompt)
    for _ in range(new):
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_answers_are_those_of_the_weights_of_now(folder, tmp_path):
    """Steps of the fused optimiser, averages and loaded weights all leave the first answers."""
    algorithm, _, batch = build(folder, "sft_raw", "model.seed=3")
    optimizer = torch.optim.AdamW(algorithm.parameters(), lr=0.05, fused=True)
    found, prints = [], []

    def ask():
        found.append(answers(algorithm))
        prints.append(algorithm.weights_fingerprint)
        assert found[-1]["0"] == slow_answer(algorithm.backbone.model, (5, 9, 20))

    ask()
    ask()
    assert prints[0] == prints[1]
    start = {name: value.clone() for name, value in algorithm.state_dict().items()}
    algorithm.loss_terms(batch).loss.backward()
    # As Lightning calls it, without a trainer.
    algorithm.trainer = _Trainer()
    algorithm.optimizer_step(0, 0, _Stepping(optimizer), lambda: None)
    ask()
    algorithm.load_state_dict(start)
    ask()
    assert len(set(prints)) == 2 and prints[3] == prints[0] and found[3] == found[0] != found[2]


class _Trainer:
    pass


class _Stepping:
    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure):
        closure()
        self.optimizer.step()


def test_what_nobody_defines_is_said():
    algorithm = Algorithm.__new__(Algorithm)
    torch.nn.Module.__init__(algorithm)
    algorithm.config = {"algo": {"name": "mine"}}
    with pytest.raises(ConfigError, match="algo=mine: does not answer prompts"):
        algorithm.generator(GenerationSettings())
    with pytest.raises(ConfigError, match="algo=mine: does not score continuations"):
        algorithm.loglikelihood([([1], [2])])


def test_it_learns_and_the_rates_are_those_of_its_rows(folder, tmp_path):
    metrics = fit(folder, tmp_path, "sft_raw", "trainer.max_steps=16", "training.ema=0")
    rows = [r["train/loss"] for r in read_metrics(tmp_path / "metrics.csv") if "train/loss" in r]
    assert rows[-1] < 0.5 * rows[0]
    model = Algorithm.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    _, data, _ = build(folder, "sft_raw")
    nats = count = 0.0
    for batch in data.eval_loader("validation"):
        for _, tokens, labels in documents_of(batch):
            with torch.no_grad():
                loss, places = own_loss(model.backbone.model, tokens, labels, model.special.mask)
            nats, count = nats + float(loss), count + places
    assert metrics["val/nll"] == pytest.approx(nats / count, rel=1e-4)
    assert metrics["val/ppl"] == pytest.approx(math.exp(nats / count), rel=1e-4)


def test_adapters_alone_are_trained_and_open_with_the_checkpoint(folder, tmp_path):
    lora = "algo.lora={r: 4, lora_alpha: 8, target_modules: all-linear}"
    fit(folder, tmp_path, "sft_raw", lora)
    fresh, _, _ = build(folder, "sft_raw", lora)
    trained = Algorithm.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt", weights="raw")
    before, after = fresh.state_dict(), trained.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    named = {name for name, p in trained.named_parameters() if p.requires_grad}
    # Of the two factors the first begins at random, which is another draw here.
    assert all("lora_" in name for name in moved | named)
    assert any("lora_B" in name and after[name].any() for name in moved)
    assert len(trained.ema.shadow) == len(named) == 28
    kept = last(tmp_path)["optimizer_states"][0]["param_groups"]
    assert sum(len(group["params"]) for group in kept) == len(named)
    assert answers(trained)["0"] == slow_answer(trained.backbone.model, (5, 9, 20))
    for options, message in (
        ("{target_modules: [nothing_like_it]}", r"algo\.lora: .*nothing_like_it"),
        ("{bias: all}", r"algo\.lora\.bias=all: adapters alone are trained"),
    ):
        with pytest.raises(ValueError, match=message):
            build(folder, "sft_raw", f"algo.lora={options}")


def test_another_tokenizer_is_refused(folder):
    with pytest.raises(DataError, match=r"name_or_path=word: not the tokenizer of model=tiny_caus"):
        build(
            folder, "sft_raw", "data=pydocs", "data.tokenizer_name_or_path=word",
            data=lambda folder: (),
        )  # fmt: skip
