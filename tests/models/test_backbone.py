import pytest
import torch

from decoding.block_reader import BlockReader
from models.backbone import Backbone, architecture_of, from_architecture
from tests.blocks import LENGTH, SIZE, dense_mask, laid_out, small_backbone, small_target

BACKENDS = ("math", "sdpa")
# Rotations, norms and softmax are in fp32 whatever the weights are in.
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def dense_hidden(backbone: Backbone, inputs_BQD, position_BQ, mask_BQK):
    """Hidden states under one dense mask, by transformers' own attention."""
    bias = torch.zeros(mask_BQK.shape, dtype=inputs_BQD.dtype)
    bias = bias.masked_fill(~mask_BQK, float("-inf"))[:, None]
    # A row of padding that sees nothing would be nan; it sees itself.
    blind = (~mask_BQK).all(-1)
    bias[:, 0][blind] = 0.0
    backbone.model.set_attn_implementation("eager")
    try:
        return backbone.model.base_model(
            inputs_embeds=inputs_BQD, position_ids=position_BQ, attention_mask=bias
        ).last_hidden_state
    finally:
        backbone.model.set_attn_implementation("block_pattern")


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_passes_equal_the_dense_mask(backend):
    backbone = small_backbone(backend)
    ids_BL, segment_BL, _, layout = laid_out()
    blank_BL = torch.where(torch.rand(ids_BL.shape) < 0.5, ids_BL, backbone.blank_id)
    with torch.no_grad():
        both = backbone.embed(torch.cat([blank_BL, ids_BL], 1))
        want = dense_hidden(backbone, both, layout.position_BL.repeat(1, 2), dense_mask(segment_BL))
        reader = BlockReader.over_rows(backbone, ids_BL, layout, SIZE, only_keys=False)
        got_XSD = reader.run(backbone.embed(layout.of_blocks(blank_BL)).flatten(0, 1))
    real = segment_BL >= 0
    torch.testing.assert_close(reader.clean_BLD[real], want[:, LENGTH:][real], **CLOSE)
    want_BMSD = torch.stack(
        [want[b, :LENGTH].unflatten(0, (-1, SIZE))[layout.block_BM[b]] for b in range(len(ids_BL))]
    )
    exists_X = layout.exists_BM.flatten()
    torch.testing.assert_close(got_XSD[exists_X], want_BMSD.flatten(0, 1)[exists_X], **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_see_their_past_and_themselves_alone(backend):
    """Perturbed: a later block, another document (nothing changes); the past, the block itself."""
    backbone = small_backbone(backend)
    ids_BL, _, _, layout = laid_out()

    def run(ids_BL, blocks_BMS):
        with torch.no_grad():
            reader = BlockReader.over_rows(backbone, ids_BL, layout, SIZE)
            return reader.run(backbone.embed(blocks_BMS).flatten(0, 1)).unflatten(0, (3, -1))

    blocks_BMS = layout.of_blocks(ids_BL).clone()
    before = run(ids_BL, blocks_BMS)
    for row in range(3):
        for place in range(0, LENGTH, 3):
            changed_BL = ids_BL.clone()
            changed_BL[row, place] = (ids_BL[row, place] + 7) % 200 + 20
            moved = (run(changed_BL, blocks_BMS) - before).abs().amax((-1, -2)) > 1e-9
            block_M = layout.block_BM[row]
            start, stop = layout.start_BN[row][block_M], layout.stop_BN[row][block_M]
            expected = (start <= place) & (place < stop) & layout.exists_BM[row]
            assert torch.equal(moved[row] & layout.exists_BM[row], expected)
            assert not moved[[r for r in range(3) if r != row]].any()
    own = blocks_BMS.clone()
    own[1, 2, 3] = 99
    moved = (run(ids_BL, own) - before).abs().amax(-1) > 1e-9
    assert moved[1, 2].all() and int(moved.sum()) == SIZE


def test_flex_masks_are_the_dense_ones():
    backbone = small_backbone("flex")
    _, segment_BL, _, layout = laid_out()
    attention = backbone.attention(layout.start_BN, layout.stop_BN, LENGTH, SIZE)
    allowed = attention.tiles.mask_mod
    dense = dense_mask(segment_BL)
    number = torch.arange(LENGTH)
    for b in range(3):
        entries = allowed(
            torch.tensor(b), torch.tensor(0), number[:, None], torch.arange(2 * LENGTH)[None]
        )
        # Keys: the clean text, then the blocks themselves.
        want = torch.cat([dense[b, :LENGTH, LENGTH:], dense[b, :LENGTH, :LENGTH]], 1)
        real = segment_BL[b] >= 0
        assert torch.equal(entries[real], want[real])


def test_true_tokens_as_a_candidate_are_the_clean_text():
    """The positive of a scorer needs no segment of its own."""
    backbone = small_backbone()
    ids_BL, _, _, layout = laid_out()
    with torch.no_grad():
        reader = BlockReader.over_rows(backbone, ids_BL, layout, SIZE, only_keys=False)
        tokens_XS = layout.target_BMS.flatten(0, 1)
        as_candidate = reader.run(backbone.embed(tokens_XS.repeat_interleave(3, 0)), copies=3)
    clean_BMSD = torch.stack(
        [
            reader.clean_BLD[b].unflatten(0, (-1, SIZE))[layout.block_BM[b]]
            for b in range(len(ids_BL))
        ]
    )
    exists_X = layout.exists_BM.flatten()
    got = as_candidate.unflatten(0, (-1, 3))[exists_X]
    for copy in range(3):
        torch.testing.assert_close(got[:, copy], clean_BMSD.flatten(0, 1)[exists_X], **CLOSE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_breaking_off_the_clean_pass_changes_no_gradient(checkpointing):
    def gradients(only_keys):
        backbone = small_backbone(dtype="float64")
        backbone.model.requires_grad_(True).train()
        if checkpointing:
            backbone.checkpoint_activations()
        ids_BL, _, _, layout = laid_out()
        reader = BlockReader.over_rows(backbone, ids_BL, layout, SIZE, only_keys)
        blank = torch.full_like(layout.target_BMS, backbone.blank_id)
        hidden = reader.run(backbone.embed(blank).flatten(0, 1))
        hidden[layout.exists_BM.flatten()].square().sum().backward()
        return {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}

    whole, part = gradients(False), gradients(True)
    assert len(whole) > 20
    for name in whole:
        torch.testing.assert_close(part[name], whole[name], **CLOSE)


def test_without_a_pattern_it_is_the_causal_model():
    target = small_target()
    ids = torch.randint(10, 250, (2, 17))
    with torch.no_grad():
        want = target.model(ids).logits
        backbone = Backbone(target.model, target.mask_token_id, 260)
        got = backbone.model(ids).logits
    torch.testing.assert_close(got, want)


def test_architecture_travels():
    target = small_target()
    described = architecture_of(target.model)
    again = from_architecture(described)
    again.load_state_dict(target.model.state_dict())
    ids = torch.randint(10, 250, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, target.model(ids).logits)
    with pytest.raises(ValueError, match="model_type=nothing"):
        from_architecture({"model_type": "nothing"})


def test_blank_is_the_mean_of_what_is_known():
    backbone = small_backbone()
    backbone.initialise_blank()
    table = backbone.table_VD
    known = [i for i in range(260) if i != backbone.blank_id]
    torch.testing.assert_close(table[backbone.blank_id], table[known].mean(0))
    assert backbone.forbidden_V[backbone.blank_id] and int(backbone.forbidden_V.sum()) == 1


def test_what_cannot_be_is_refused():
    target = small_target()
    with pytest.raises(ValueError, match="mask_token=999"):
        Backbone(target.model, 999, 260)
