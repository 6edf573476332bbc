"""MaskedAdapt and DraftRefine: their losses against slow ones, likelihoods, runs, checkpoints."""

import itertools
import math

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from algorithm import Algorithm
from callbacks.metrics_csv import read_metrics
from data.tokenization import tokenizer_state, with_mask_token
from decoding.generate import GenerationRequest, GenerationSettings
from models.backbone import architecture_of
from pretrained import PretrainedAlgorithm
from refine import BlockModel, DraftRefine, MaskedAdapt
from runtime.config import to_plain
from runtime.errors import CheckpointError, ConfigError
from tests.block_runs import build, configure, fit, plain, prepared, tiny_blocks
from tests.blocks import dense_mask, small_target
from tests.models.test_backbone import dense_hidden
from tests.runs import call_main, last

SIZE = 4
THRESHOLD = 0.5
COMMITS = (f"refine.commit.threshold={THRESHOLD}",)
CLOSE = {"rtol": 1e-3, "atol": 2e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("refine")


@pytest.fixture(scope="module")
def masked(folder):
    return build(folder, "masked_adapt")


@pytest.fixture(scope="module")
def draft(folder):
    built = build(folder, "draft_refine", *COMMITS)
    with torch.no_grad():
        built[0].backbone.head_VD.mul_(4)  # some places are that sure, and a few blocks
    return built


MASKS = {}  # by segments: each takes a second


class Dense:
    """Everything that is read and written, place by place and pass by pass."""

    def __init__(self, algorithm, batch):
        self.algorithm, self.backbone, self.batch = algorithm, algorithm.backbone, batch
        self.ids, self.segment = batch["input_ids"], batch["segment"]
        key = tuple(self.segment.flatten().tolist())
        self.mask = MASKS.setdefault(key, None)
        if self.mask is None:
            self.mask = MASKS[key] = dense_mask(self.segment, algorithm.block_size)
        self.places = (batch["response"] != 0) & (self.segment >= 0)
        # Documents without an answer in a block need no prediction there.
        written = ((batch["response"] == 1) & (self.segment >= 0)).unflatten(1, (-1, SIZE))
        self.places &= written.any(-1).repeat_interleave(SIZE, 1)
        self.position = torch.zeros_like(self.ids)
        for row in range(len(self.ids)):
            for place in range(1, self.ids.shape[1]):
                if self.segment[row, place] == self.segment[row, place - 1]:
                    self.position[row, place] = self.position[row, place - 1] + 1

    def hidden(self, noisy_BLD):
        """Of the noisy half."""
        both = torch.cat([noisy_BLD, self.backbone.embed(self.ids)], 1)
        found = dense_hidden(self.backbone, both, self.position.repeat(1, 2), self.mask)
        return found[:, : self.ids.shape[1]]

    def log_p(self, noisy_BLD):
        logits = self.hidden(noisy_BLD) @ self.backbone.head_VD.T
        return logits.index_fill(-1, torch.tensor(self.backbone.blank_id), -torch.inf).log_softmax(
            -1
        )

    def embed_with(self, hidden_BL):
        """Clean text with BLANK at some places."""
        return self.backbone.embed(self.ids.masked_fill(hidden_BL, self.backbone.blank_id))

    def cross_entropy(self, noisy_BLD):
        return -self.log_p(noisy_BLD).gather(-1, self.ids[..., None])[..., 0]


def two_rows(data):
    rows = next(iter(data.train_loader(max_steps=1, accumulate=2)))
    assert rows["segment"][:2].max() > 0, "several documents to a row"
    return {name: column[:2] for name, column in rows.items()}


def gradients(algorithm, loss):
    algorithm.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in algorithm.named_parameters() if p.grad is not None}


def assert_same(algorithm, terms, slow_loss):
    torch.testing.assert_close(terms.loss, slow_loss, rtol=1e-4, atol=0)
    found, wanted = (gradients(algorithm, loss) for loss in (terms.loss, slow_loss))
    assert found.keys() == wanted.keys() and len(found) > 20
    for name in wanted:
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(
            found[name] / scale, wanted[name] / scale, **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("weighting", ["bound", "uniform"])
def test_masked_adapt_is_its_dense_self(masked, weighting, monkeypatch):
    algorithm, data, _ = masked
    monkeypatch.setattr(algorithm, "weighting", weighting)
    rows = two_rows(data)
    batch = prepared(algorithm, rows, step=3)
    terms = algorithm.loss_terms(batch)
    slow = Dense(algorithm, rows)
    noise = algorithm.process.draw(slow.places, rows["position"], (3,))
    hidden = noise.mask_BL & slow.places
    weight = noise.weight_BL if weighting == "bound" else torch.ones_like(noise.weight_BL)
    loss_BL = slow.cross_entropy(slow.embed_with(hidden)) * weight * hidden
    assert 10 < hidden.sum() < slow.places.sum() == terms.weight
    torch.testing.assert_close(
        terms.row_losses, loss_BL.sum(-1).double().detach(), rtol=1e-4, atol=0
    )
    assert_same(algorithm, terms, loss_BL.sum())


def refined_inputs(slow, known_BL, passes):
    """What the last of `passes` passes reads: Alg. 2 of arXiv 2606.08357, one place at a time."""
    backbone = slow.backbone
    blank, table = backbone.blank_id, backbone.table_VD
    inputs_BLD = slow.embed_with(slow.places & ~known_BL)
    done = set()
    for _ in range(passes - 1):
        with torch.no_grad():
            p = slow.log_p(inputs_BLD).exp()
        rows = [list(row) for row in inputs_BLD]
        for b, first in itertools.product(range(len(slow.ids)), range(0, slow.ids.shape[1], SIZE)):
            places = [i for i in range(first, first + SIZE) if slow.places[b, i]]
            if not places or (b, first) in done:
                continue
            sure = True
            for i in range(first, first + SIZE):
                if i not in places:
                    continue  # a given place is sure
                best = int(p[b, i].argmax())
                sure = sure and float(p[b, i, best]) >= THRESHOLD
                a = 1.0 if sure else float(p[b, i, best])
                rows[b][i] = a * table[best] + (1 - a) * table[blank]
            if sure:
                done.add((b, first))
        inputs_BLD = torch.stack([torch.stack(row) for row in rows])
    return inputs_BLD, done


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_draft_refine_is_its_dense_self(draft, passes):
    """The gradient, too: through the text and the inputs of the last pass, BLANK's row included."""
    algorithm, data, _ = draft
    rows = two_rows(data)
    batch = prepared(algorithm, rows)
    batch["inputs"]["passes"] = passes
    terms = algorithm.loss_terms(batch)
    slow = Dense(algorithm, rows)
    known = torch.zeros_like(slow.places)
    layout, injected = batch["layout"], batch["inputs"]["injected"]
    for b, m, s in injected.nonzero().tolist():
        known[b, int(layout.block_BM[b, m]) * SIZE + s] = True
    assert 0.2 < known.sum() / slow.places.sum() < 0.4
    inputs, done = refined_inputs(slow, known, passes)
    assert passes == 1 or 0 < len(done) < layout.exists_BM.sum()
    loss = (slow.cross_entropy(inputs) * slow.places).sum()
    assert terms.weight == slow.places.sum()
    assert_same(algorithm, terms, loss)
    blank = algorithm.backbone.table_VD.grad[algorithm.special.mask]
    assert blank.abs().max() > 0


def test_earlier_passes_learn_nothing(draft, monkeypatch):
    """What they say decides the inputs, as numbers: with all runs detached but the last one."""
    algorithm, _, batch = draft
    batch["inputs"]["passes"] = 3
    wanted = gradients(algorithm, algorithm.loss_terms(batch).loss)
    passes, runs = [], algorithm.backbone.read_blocks

    def counted(*args, **kwargs):
        passes.append(torch.is_grad_enabled())
        return runs(*args, **kwargs)

    monkeypatch.setattr(algorithm.backbone, "read_blocks", counted)
    found = gradients(algorithm, algorithm.loss_terms(batch).loss)
    assert passes == [False, False, True]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_passes_and_injection_are_keyed_by_the_step(draft):
    algorithm, data, _ = draft
    rows = next(iter(data.train_loader(max_steps=1, accumulate=2)))
    drawn = [prepared(algorithm, rows, step)["inputs"] for step in range(12)]
    assert {one["passes"] for one in drawn} == {1, 2, 3}
    assert len({one["injected"].sum().item() for one in drawn}) > 3
    part = {name: value[1:3] for name, value in rows.items()}
    cut = prepared(algorithm, part, 5)
    whole = prepared(algorithm, rows, 5)
    blocks = cut["layout"].block_BM.shape[1]
    assert torch.equal(cut["inputs"]["injected"], whole["inputs"]["injected"][1:3, :blocks])
    # The share falls with the tokens seen: 8 rows of 96 in every step.
    algorithm.injection = {"start": 0.8, "end": 0.0, "tokens": 8 * 96 * 10}
    rates = [prepared(algorithm, rows, step)["inputs"]["rate"] for step in (0, 5, 10, 99)]
    algorithm.injection = algorithm.config["algo"]["injection"]
    assert rates == pytest.approx([0.8, 0.4, 0.0, 0.0])


def test_complementary_masks_cover_every_place_once(folder, masked):
    algorithm, _, batch = build(
        folder, "masked_adapt", "algo.complementary=true", "algo.weighting=uniform"
    )
    layout, mask = batch["layout"], batch["inputs"]["mask"]
    terms = algorithm.loss_terms(batch)
    hidden, place, weight = algorithm.last_pass(algorithm.reader(batch), layout, batch["inputs"])
    assert torch.equal(place.sort().values, layout.predict_BMS.flatten().nonzero()[:, 0])
    assert (weight == 1).all() and len(hidden) == terms.weight
    plain_one, _, _ = masked
    total = 0.0
    for chosen in (mask, ~mask & layout.predict_BMS):
        inputs = {"mask": chosen, "weight": torch.ones_like(batch["inputs"]["weight"])}
        total += plain_one.loss_terms({**batch, "inputs": inputs}).loss.item()
    assert terms.loss.item() == pytest.approx(total, rel=1e-5)
    with pytest.raises(ConfigError, match=r"complementary=true: algo\.weighting=bound .*uniform"):
        build(folder, "masked_adapt", "algo.complementary=true")


@pytest.mark.parametrize("name", ["masked_adapt", "draft_refine", "sft_raw"])
def test_checkpointing_activations_changes_nothing(folder, name):
    found = []
    for chosen in ("false", "true"):
        algorithm, _, batch = build(folder, name, f"algo.gradient_checkpointing={chosen}")
        algorithm.train()
        if name == "draft_refine":
            batch["inputs"]["passes"] = 3
        terms = algorithm.loss_terms(batch)
        found.append((terms.loss.item(), gradients(algorithm, terms.loss)))
        layers = algorithm.backbone.model.base_model.layers
        assert all(
            getattr(layer, "gradient_checkpointing", False) == (chosen == "true")
            for layer in layers
        )
    (loss, one), (same, other) = found
    assert loss == pytest.approx(same, rel=1e-6)
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=1e-4, msg=key)


def four_words():
    backend = Tokenizer(WordLevel({"a": 0, "b": 1, "end": 2, "blank": 3}, unk_token="a"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="end", pad_token="end", mask_token="blank"
    )


def narrow(folder, size=SIZE, name="draft_refine"):
    """A model of three words and BLANK, so that all blocks can be listed."""
    config = to_plain(configure(folder, folder / "unused", name, f"block_size={size}"))
    shape = architecture_of(small_target(num_hidden_layers=2).model)
    config["algo"]["backbone"] = {**shape, "vocab_size": 4}
    torch.manual_seed(1)
    kind = DraftRefine if name == "draft_refine" else MaskedAdapt
    algorithm = kind(config, tokenizer_state(with_mask_token(four_words(), 3)))
    with torch.no_grad():
        for parameter in algorithm.backbone.model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
    assert algorithm.special.mask == 3
    return algorithm


def every(places):
    return [list(block) for block in itertools.product(range(3), repeat=places)]


def rows_of(prompt, answers):
    """A batch of one document each."""
    size = len(prompt) + len(answers[0])
    ids = torch.tensor([[*prompt, *answer] for answer in answers])
    response = torch.tensor([[0] * len(prompt) + [1] * (size - len(prompt))]).expand(len(ids), -1)
    batch = {"input_ids": ids, "segment": torch.zeros_like(ids), "response": response}
    return batch | {"index": torch.arange(len(ids))}


@pytest.mark.parametrize("prompt", [[1, 0, 2, 2], [1, 0, 2, 2, 0]])
def test_the_likelihoods_of_all_blocks_sum_to_one(folder, prompt):
    """A whole block behind a prompt, and what a prompt has left of one."""
    algorithm = narrow(folder)
    answers = every(8 - len(prompt))
    batch = rows_of(prompt, answers)
    found = algorithm.evaluate({**batch, "layout": algorithm.layout(batch)}, 0)
    p = (-found.nll).exp()
    assert len(p) == 3 ** (8 - len(prompt)) and p.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert p.max() > 3 * p.min() and (found.tokens == 8 - len(prompt)).all()
    few = [0, 7, 20]
    scored = algorithm.loglikelihood([(prompt, answers[n]) for n in few])
    for n, (nats, _) in zip(few, scored, strict=True):
        assert nats == pytest.approx(-float(found.nll[n]), rel=1e-5)


def test_what_stands_behind_an_answer_is_summed_over(folder):
    """The last block is filled up with places to write, which the likelihood leaves out."""
    algorithm = narrow(folder)
    p = [
        math.exp(nats) for nats, _ in algorithm.loglikelihood([([1, 0, 2, 2], a) for a in every(3)])
    ]
    assert sum(p) == pytest.approx(1.0, abs=1e-5)
    whole = [
        math.exp(nats)
        for nats, _ in algorithm.loglikelihood(
            [([1, 0, 2, 2], [0, 2, 1, last]) for last in range(3)]
        )
    ]
    assert sum(whole) == pytest.approx(p[every(3).index([0, 2, 1])], rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_chain_rule_one_token_after_the_other(folder, size):
    """Blocks of one token are a causal model that is asked at a BLANK behind the text, and with
    larger ones each place is asked with BLANKs up to the end of its block."""
    algorithm = narrow(folder, size)
    tokens, prompt = [1, 0, 2, 2, 0, 1, 1, 2], 3
    wanted = 0.0
    for place in range(prompt, len(tokens)):
        end = place // size * size + size
        ids = torch.tensor([[*tokens[:place], *[3] * (end - place)]])
        block = torch.arange(end) // size
        bias = torch.zeros(end, end).masked_fill(block[:, None] < block[None], -torch.inf)
        algorithm.backbone.model.set_attn_implementation("eager")
        with torch.no_grad():
            logits = algorithm.backbone.model(ids, attention_mask=bias[None, None]).logits[0, place]
            if size == 1:
                algorithm.backbone.model.set_attn_implementation("sdpa")
                causal = algorithm.backbone.model(ids).logits[0, place]
                torch.testing.assert_close(causal, logits, rtol=1e-4, atol=1e-5)
        wanted += float(logits[:3].log_softmax(-1)[tokens[place]])
    algorithm.backbone.model.set_attn_implementation("block_pattern")
    [(nats, _)] = algorithm.loglikelihood([(tokens[:prompt], tokens[prompt:])])
    assert nats == pytest.approx(wanted, rel=1e-5)
    # It is no likelihood of the causal model itself, which predicts from the token before.
    [(causal, _)] = PretrainedAlgorithm.loglikelihood(
        algorithm, [(tokens[:prompt], tokens[prompt:])]
    )
    assert abs(causal - nats) > 0.01


def test_greedy_is_what_refinement_writes(folder):
    algorithm = narrow(folder)
    prompt = [1, 0, 2, 2, 0]
    settings = GenerationSettings(max_new_tokens=3, stop_ids=())
    generator = algorithm.generator(settings, device="cpu")
    [result] = generator.generate([GenerationRequest("a", prompt_ids=prompt)])
    pairs = [(prompt, answer) for answer in every(3)]
    greedy = [
        answer
        for answer, (_, best) in zip(every(3), algorithm.loglikelihood(pairs), strict=True)
        if best
    ]
    assert greedy == [result.token_ids]


def test_a_likelihood_without_a_prompt_begins_behind_an_end(folder):
    algorithm = narrow(folder)
    [(nats, _)] = algorithm.loglikelihood([([], [0, 1, 2])])
    [(same, _)] = algorithm.loglikelihood([([algorithm.special.eos], [0, 1, 2])])
    assert nats == same


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
                    if not (response == 1)[first : first + SIZE].any():
                        continue
                    got, needed = decoded(model, ids, first, predict)
                    truth = ids[first : first + SIZE]
                    blocks += 1
                    places += int(predict.sum())
                    right += int(((got == truth) & predict).sum())
                    exact += bool((got == truth).all())
                    passes += needed
    metrics = [r for r in read_metrics(journey / "draft_refine" / "metrics.csv") if "val/nll" in r][
        -1
    ]
    assert metrics["val/nll"] == pytest.approx(nats / tokens, rel=1e-4)
    assert metrics["val/block_exact"] == pytest.approx(exact / blocks)
    assert metrics["val/token_accuracy"] == pytest.approx(right / places)
    assert metrics["val/tokens_per_pass"] == pytest.approx(places / passes)


def decoded(model, ids, first, predict):
    """One block behind the text before it, by the generator's own way: tokens, passes."""
    given = int((~predict).sum())
    settings = GenerationSettings(max_new_tokens=SIZE - given, stop_ids=())
    request = GenerationRequest("a", prompt_ids=ids[: first + given].tolist())
    [result] = model.generator(settings, device="cpu").generate([request])
    return torch.tensor([*ids[first : first + given].tolist(), *result.token_ids]), result.work[
        "nfe"
    ]


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


@pytest.mark.parametrize("name", ["masked_adapt", "draft_refine"])
def test_adapters_alone_are_trained(folder, tmp_path, name):
    lora = "algo.lora={r: 4, lora_alpha: 8, target_modules: all-linear}"
    fit(folder, tmp_path, name, lora, "trainer.max_steps=3")
    fresh, _, _ = build(folder, name, lora)
    trained = opened(tmp_path.parent, tmp_path.name, weights="raw")
    before, after = fresh.state_dict(), trained.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved and all("lora_" in key for key in moved)
    assert answers(trained, [[1, 50, 60]])


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
        (
            ("data.align=null",),
            "block_size=4: a document begins or ends inside of a block; allowed: data.align=4",
        ),
        (("block_size=8",), "block_size=8: a document begins or ends inside of a block"),
        (
            ("model.length=90", "data.align=2"),
            "block_size=4: allowed are divisors of model.length=90",
        ),
        (("algo.lora={rank: 4}",), "algo.lora: "),
        (("refine.commit.threshold=2.0",), "refine.commit.threshold=2.0: "),
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


def test_rows_without_documents_are_refused(folder, tmp_path, capfd):
    chosen = tiny_blocks(
        folder, lambda folder: ("data=pydocs", "data.tokenizer_name_or_path=target")
    )
    assert call_main(("algo=draft_refine", *chosen, f"paths.run_dir={tmp_path}")) == 2
    [line] = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("DataError: data=pydocs: rows that do not say where documents begin;")
    assert "experiment=block_text" in line


def test_plain_text_in_blocks(folder, tmp_path):
    metrics = fit(folder, tmp_path, "draft_refine", "trainer.max_steps=4", data=plain)
    assert metrics["val/nll"] > 0 and metrics["val/block_exact"] < 1
