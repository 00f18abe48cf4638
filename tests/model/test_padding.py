"""What an encoder outputs for a row does not depend on the padding of its batch."""

import pytest
import torch
from cases import first_quickly
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import SEQ2SEQ, TEXT_ENCODERS, VISION_ENCODERS, make_model
from transformers import (
    AutoModel,
    CanineConfig,
    ConvBertConfig,
    FNetConfig,
    GPT2Config,
    MobileBertConfig,
    NystromformerConfig,
    PreTrainedConfig,
    Wav2Vec2Config,
    YosoConfig,
)

from mm_transformers import Classification, Generation, MMTransformerConfig, MMTransformerForMultiTask
from mm_transformers.model.encoder_probe import traits_of
from mm_transformers.model.padding import as_long_as, leading_padding, roll_rows, run_by_length


TASKS = [Classification("x", labels=["a", "b"])]
_SIZES = dict(
    vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
    max_position_embeddings=80, pad_token_id=0,
)  # fmt: skip

# Encoders that mix padding on the right into a row.
MIXING = {
    "fnet": lambda: FNetConfig(**_SIZES),
    "canine": lambda: CanineConfig(
        **{**_SIZES, "max_position_embeddings": 256}, num_hash_buckets=50, local_transformer_stride=16
    ),
    "convbert": lambda: ConvBertConfig(**_SIZES, embedding_size=32, head_ratio=2, conv_kernel_size=3),
    "mobilebert": lambda: MobileBertConfig(
        **_SIZES, embedding_size=32, true_hidden_size=32, intra_bottleneck_size=32
    ),
    "nystromformer": lambda: NystromformerConfig(**_SIZES, num_landmarks=4, segment_means_seq_len=4),
    "yoso": lambda: YosoConfig(**_SIZES),
}  # fmt: skip


def texts(lengths, side, pad=0, seed=0):
    """Rows of random ids of these lengths, padded on one side, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(5, 99, (length,), generator=generator) for length in lengths]
    most = max(lengths)
    ids = torch.full((len(rows), most), pad)
    mask = torch.zeros_like(ids)
    for row, values in enumerate(rows):
        places = slice(0, len(values)) if side == "right" else slice(most - len(values), most)
        ids[row, places], mask[row, places] = values, 1
    return rows, {"input_ids": ids, "attention_mask": mask}


def check_rows(model, side, lengths=(3, 11, 6, 1, 6), pad=0):
    """Each row of a padded batch has the states that it has alone."""
    rows, batch = texts(lengths, side, pad)
    with torch.no_grad():
        states = model.model.encode("text", **batch)[0]
        for row, ids in enumerate(rows):
            alone = model.model.encode("text", input_ids=ids[None], attention_mask=torch.ones(1, len(ids)).long())[0]
            given = states[row, batch["attention_mask"][row].bool()]
            torch.testing.assert_close(given, alone[0], rtol=1e-4, atol=2e-5)


def enlarge(model):
    """Weights so large that each token can be told from what comes out."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
    return model


def saved(config: PreTrainedConfig, folder):
    torch.manual_seed(0)
    enlarge(AutoModel.from_config(config)).save_pretrained(folder)
    return str(folder)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), min_size=1, max_size=5))
def test_rolling_moves_leading_padding_to_the_end(mask):
    """Against plain Python; a row without tokens stays as it is, and rolling back gives what was there."""
    mask = torch.tensor(mask)
    values = torch.arange(mask.numel() * 2).reshape(*mask.shape, 2)
    shifts = leading_padding(mask)
    rolled, rolled_mask = roll_rows(values, shifts), roll_rows(mask, shifts)
    for row in range(len(mask)):
        first = mask[row].tolist().index(1) if mask[row].any() else 0
        assert rolled[row].tolist() == values[row].tolist()[first:] + values[row].tolist()[:first]
        assert rolled_mask[row, 0] == mask[row].max()
    assert torch.equal(roll_rows(rolled, -shifts), values)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 4))
def test_rows_of_one_length_run_without_their_padding(lengths, shortest):
    """With an encoder that mixes all places of a row, against a loop over the rows."""

    def run(x, attention_mask):
        assert x.shape[:2] == attention_mask.shape
        return x + x.sum(1, keepdim=True) * 10 + x.shape[1] * 1000

    _, batch = texts(lengths, "right", pad=55)
    x = batch["input_ids"][..., None].float()
    states = run_by_length(run, {"x": x}, batch["attention_mask"], shortest)
    for row, length in enumerate(lengths):
        alone = torch.cat([x[row : row + 1, :length], torch.zeros(1, max(0, shortest - length), 1)], 1)
        expected = run(alone, torch.ones(alone.shape[:2]))
        assert torch.equal(states[row, :length], expected[0, :length])
        assert (states[row, max(length, shortest) :] == 0).all()
    assert as_long_as(states, 3).shape == (len(lengths), 3, 1)


@pytest.mark.parametrize("side", first_quickly(["left", "right"]))
@pytest.mark.parametrize("text", [*TEXT_ENCODERS, "gpt2"])
def test_padding_side_changes_nothing(text, side):
    """Also with absolute positions, which the encoders of transformers count from the left, padding or not."""
    config = GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4) if text == "gpt2" else TEXT_ENCODERS[text]()
    model = enlarge(MMTransformerForMultiTask(MMTransformerConfig(text_config=config, tasks=TASKS))).eval()
    check_rows(model, side, pad=getattr(config, "pad_token_id", None) or 0)


@pytest.mark.parametrize("name", ["bart", "marian", "t5"])
def test_padding_side_changes_nothing_of_an_encoder_decoder(name):
    config = MMTransformerConfig(text_config=SEQ2SEQ[name](), tasks=[Generation("out", max_length=5)])
    model = enlarge(MMTransformerForMultiTask(config)).eval()
    for side in ("left", "right"):
        check_rows(model, side)


def test_other_inputs_of_the_text_are_moved_along():
    """Segments and embeddings lie beside their tokens."""
    model = enlarge(make_model("bert", None))
    rows, batch = texts([4, 9], "left")
    segments = torch.zeros_like(batch["input_ids"])
    segments[0, -2:] = 1
    embeddings = model.model.text_model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad():
        by_ids = model.model.encode("text", **batch, token_type_ids=segments)[0]
        by_embeddings = model.model.encode(
            "text", inputs_embeds=embeddings, attention_mask=batch["attention_mask"], token_type_ids=segments
        )[0]
        alone = model.model.text_model(input_ids=rows[0][None], token_type_ids=torch.tensor([[0, 0, 1, 1]]))
    torch.testing.assert_close(by_ids[0, -4:], alone.last_hidden_state[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_embeddings, by_ids)


@pytest.mark.slow
@pytest.mark.parametrize("text", MIXING)
def test_encoder_that_mixes_padding_is_found_and_runs_by_length(text, tmp_path):
    path, vision = saved(MIXING[text](), tmp_path / "text"), saved(VISION_ENCODERS["vit"](), tmp_path / "vision")
    model = MMTransformerForMultiTask.from_encoders(path, vision, tasks=TASKS, num_fusion_attention_heads=4)
    assert traits_of(model.config.text_config)["by_length"] is True
    model.save_pretrained(tmp_path / "fused")
    for fused in (model, MMTransformerForMultiTask.from_pretrained(tmp_path / "fused")):
        for side in ("left", "right"):
            check_rows(fused, side)
    # A row alone is what transformers gives for it.
    rows, batch = texts([7, 12], "right")
    with torch.no_grad():
        plain = AutoModel.from_pretrained(path).eval()(input_ids=rows[0][None]).last_hidden_state[0]
        torch.testing.assert_close(model.model.encode("text", **batch)[0][0, :7], plain, rtol=1e-4, atol=2e-5)
    fused.train()(**batch, labels={"x": torch.tensor([0, 1])}).loss.backward()
    assert [name for name, p in fused.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("text", ["bert", "roberta", "modernbert", "clip-text"])
def test_encoder_that_masks_padding_runs_on_the_whole_batch(text, tmp_path):
    model = MMTransformerForMultiTask.from_encoders(saved(TEXT_ENCODERS[text](), tmp_path), tasks=TASKS)
    assert "by_length" not in traits_of(model.config.text_config)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_clip_beside_a_longer_one(norm, tmp_path):
    """Group normalisation over time mixes a clip with its padding, so that clips run by length."""
    audio = Wav2Vec2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, conv_dim=(12, 12, 12),
        conv_kernel=(10, 3, 3), conv_stride=(5, 2, 2), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm, do_stable_layer_norm=norm == "layer",
    )  # fmt: skip
    paths = saved(TEXT_ENCODERS["bert"](), tmp_path / "text"), saved(audio, tmp_path / "audio")
    model = MMTransformerForMultiTask.from_encoders(
        paths[0], audio=paths[1], tasks=TASKS, num_fusion_attention_heads=4
    ).eval()
    assert traits_of(model.config.audio_config).get("by_length", False) is (norm == "group")
    clips, mask = torch.randn(2, 600), torch.ones(2, 600, dtype=torch.int64)
    clips[0, 400:], mask[0, 400:] = 0, 0
    with torch.no_grad():
        tokens, kept = model.model.encode("audio", input_values=clips, attention_mask=mask)
        alone = AutoModel.from_pretrained(paths[1]).eval()(clips[:1, :400]).last_hidden_state
    assert kept[0].sum() == alone.shape[1]
    torch.testing.assert_close(tokens[0, kept[0]], alone[0], rtol=1e-4, atol=2e-5)
