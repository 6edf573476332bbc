"""MaskedAdapt and DraftRefine: losses and gradients against one sequence under one dense mask."""

import itertools

import pytest
import torch

from refine import masked_inputs
from runtime.errors import ConfigError
from tests.block_runs import build, prepared
from tests.blocks import dense_mask
from tests.models.test_backbone import dense_hidden

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


def test_injected_tokens_are_no_more_than_a_beginning(folder):
    """They are read, but any rule may put something else there; what is given stays."""
    algorithm, _, batch = build(folder, "draft_refine", "refine/commit=threshold")
    layout, injected = batch["layout"], batch["inputs"]["injected"].flatten(0, 1)
    reader, given = algorithm.reader(batch), ~layout.predict_BMS.flatten(0, 1)
    state = algorithm._injected(reader, layout, batch["inputs"]["injected"])
    assert torch.equal(state.committed_XS, given)
    truth = layout.target_BMS.flatten(0, 1)
    known = truth.masked_fill(~(given | injected), algorithm.special.mask)
    assert torch.equal(state.inputs_XSD, algorithm.backbone.embed(known))
    after, _ = algorithm.refinement.passes(reader, state, given, most=1)
    changed = after.token_XS != truth
    assert changed[injected].any() and not changed[given].any()


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
    layout = batch["layout"]
    mask = batch["inputs"]["mask"][:, 0].view(layout.predict_BMS.shape)
    terms = algorithm.loss_terms(batch)
    hidden, place, weight = algorithm.last_pass(algorithm.reader(batch), layout, batch["inputs"])
    assert torch.equal(place.sort().values, layout.predict_BMS.flatten().nonzero()[:, 0])
    assert (weight == 1).all() and len(hidden) == terms.weight
    plain_one, _, _ = masked
    total = 0.0
    for chosen in (mask, ~mask & layout.predict_BMS):
        inputs = masked_inputs([chosen], torch.ones(chosen.shape))
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
