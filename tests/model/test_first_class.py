"""
What transformers' shared tests ask of its own models: initialisation, loading in every way, ties, resizing, outputs,
attention implementations, half precision, batching.
"""

import copy
import pickle

import pytest
import torch
from cases import first_quickly
from safetensors import safe_open
from tiny import (
    AUDIO_ENCODERS,
    FUSION_KINDS,
    SEQ2SEQ,
    TEXT_ENCODERS,
    make_batch,
    make_config,
    make_model,
)
from torch import nn
from transformers import AutoModel, BertModel, Wav2Vec2Model
from writers import make_small_writer

from mm_transformers import MMTransformerForMultiTask, MMTransformerModel


TEXTS = ["bert", "roberta", "t5", "modernbert"]
VISIONS = ["vit", "clip-vision", "siglip-vision", "convnextv2", "swin"]


def padded_for(model, **kwargs) -> dict:
    batch = make_batch(labels=False, **kwargs)
    pad = model.config.text_config.pad_token_id or 0
    batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], pad)
    return batch


def logits_of(model, batch) -> torch.Tensor:
    with torch.no_grad():
        logits = model(**batch).logits
    return torch.cat([value.flatten().float() for value in logits.values()])


def assert_same(first, second) -> None:
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0, msg=name)


# Initialisation


@pytest.mark.parametrize("fusion", FUSION_KINDS)
def test_every_weight_of_the_fusion_and_the_heads_is_initialised(fusion):
    """Built where memory holds rubbish: nothing of it may be left."""
    config = make_config(fusion_type=fusion, fusion_hidden_size=48)
    with torch.device("meta"):
        model = MMTransformerForMultiTask(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(1e6 if tensor.is_floating_point() else 7)
        # As `from_pretrained` leaves a model whose weights are all missing.
        for module in model.modules():
            module._is_hf_initialized = False
        model.init_weights()
    # Positions and the like are made by the modules themselves, which no meta device runs.
    for name, value in model.named_parameters():
        assert value.abs().max() < 10, name
        if name.endswith("gate_alpha"):
            assert value.item() == 0
        elif value.ndim == 1 and name.endswith("bias"):
            assert (value == 0).all(), name
    for name, module in model.model.fusion.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
        if isinstance(module, nn.Linear):
            assert 0.5 * 0.02 < module.weight.std() < 1.5 * 0.02, name


def test_a_seed_decides_all_weights():
    assert_same(make_model(seed=3), make_model(seed=3))
    first, second = make_model(seed=3).state_dict(), make_model(seed=4).state_dict()
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_initializer_range_is_heeded():
    torch.manual_seed(0)
    model = MMTransformerForMultiTask(make_config(initializer_range=0.3))
    assert 0.25 < model.model.fusion.layers[0].cross_attention.q_proj.weight.std() < 0.35


@pytest.mark.parametrize("fusion", first_quickly(FUSION_KINDS))
def test_missing_weights_are_initialised_and_told(fusion, tmp_path):
    """A base model is the beginning of one with tasks; what it lacks is new, and reported."""
    base = make_model(fusion_type=fusion).model
    base.save_pretrained(tmp_path)
    config = make_config(fusion_type=fusion)
    model, info = MMTransformerForMultiTask.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert info["missing_keys"] == {name for name in model.state_dict() if name.startswith("heads.")}
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert_same(model.model, base)
    for name, value in model.heads.named_parameters():
        if value.ndim == 2:
            assert 0.01 < value.std() < 0.03, name
        elif name.endswith("bias"):
            assert (value == 0).all(), name


@pytest.mark.parametrize("audio", first_quickly(AUDIO_ENCODERS))
def test_an_encoder_that_is_added_to_a_checkpoint_is_initialised(audio, tmp_path, monkeypatch):
    """Where memory is what was there before, nothing of it may be left; weight-normed layers included."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    make_model().model.save_pretrained(tmp_path)
    torch.use_deterministic_algorithms(True)  # uninitialised memory is filled with NaN
    try:
        config = make_config(audio=audio)
        model, info = MMTransformerModel.from_pretrained(tmp_path, config=config, output_loading_info=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert any(name.startswith("audio_model.") for name in info["missing_keys"])
    built = MMTransformerModel(make_config(audio=audio)).state_dict()
    for name, value in model.state_dict().items():
        assert value.isfinite().all(), name
        if name in info["missing_keys"] and value.ndim > 1 and value.numel() > 100:
            assert value.float().std() == pytest.approx(built[name].float().std(), rel=0.5), name


def test_a_pretrained_weight_normed_layer_is_not_initialised_again(tmp_path):
    encoder = Wav2Vec2Model(AUDIO_ENCODERS["wav2vec2"]())
    encoder.save_pretrained(tmp_path / "audio")
    BertModel(TEXT_ENCODERS["bert"]()).save_pretrained(tmp_path / "text")
    model = MMTransformerModel.from_encoders(str(tmp_path / "text"), audio=str(tmp_path / "audio"))
    assert_same(model.audio_model, encoder)


def test_unexpected_weights_are_told(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    base, info = MMTransformerModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == {name for name in model.state_dict() if name.startswith("heads.")}
    assert not info["missing_keys"]
    assert_same(base, model.model)


# Loading


@pytest.mark.parametrize("text", first_quickly(TEXTS))
@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}])
def test_every_way_of_loading_gives_the_same(text, options, tmp_path):
    model = make_model(text)
    model.save_pretrained(tmp_path)
    batch = padded_for(model)
    for cls in (MMTransformerForMultiTask, AutoModel):
        loaded = cls.from_pretrained(tmp_path, **options)
        assert not loaded.training
        assert not any(parameter.is_meta for parameter in loaded.parameters())
        assert_same(loaded, model)
        torch.testing.assert_close(logits_of(loaded, batch), logits_of(model, batch))


@pytest.mark.parametrize("fusion", first_quickly(FUSION_KINDS))
def test_layers_on_the_disk(fusion, tmp_path):
    """`device_map` may put whole parts on the disk; they are read when they run."""
    model = make_model(fusion_type=fusion)
    model.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    device_map = {f"model.{name}": "cpu" for name, _ in model.model.named_children()}
    device_map |= {"heads": "cpu", "model.vision_model": "disk", "model.fusion": "disk"}
    loaded = MMTransformerForMultiTask.from_pretrained(
        tmp_path / "saved", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert any(parameter.is_meta for parameter in loaded.model.vision_model.parameters())
    batch = make_batch(labels=False)
    torch.testing.assert_close(logits_of(loaded, batch), logits_of(model, batch))


def test_device_map_auto_keeps_layers_whole(tmp_path):
    """With little room, layers move as wholes: what a layer adds to must be where it is."""
    from accelerate import infer_auto_device_map

    model = make_model(num_fusion_layers=3)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    placed = infer_auto_device_map(
        model, max_memory={0: size // 2, "cpu": size}, no_split_module_classes=model._no_split_modules
    )
    assert set(placed.values()) == {0, "cpu"}
    for name, module in model.named_modules():
        if type(module).__name__ in model._no_split_modules:
            inside = {device for place, device in placed.items() if place.startswith(f"{name}.")}
            assert not inside, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vision", first_quickly(VISIONS))
def test_precision_is_kept_and_asked_for(dtype, vision, tmp_path):
    model = make_model(vision=vision).to(dtype)
    model.save_pretrained(tmp_path)
    for options in ({}, {"dtype": "auto"}, {"dtype": dtype}):
        loaded = MMTransformerForMultiTask.from_pretrained(tmp_path, **options)
        for name, value in loaded.named_parameters():
            kept = torch.float32 if name.endswith(("gate_alpha", "logit_scale")) else dtype
            assert value.dtype == kept, name
    assert MMTransformerForMultiTask.from_pretrained(tmp_path, dtype=torch.float32).dtype == torch.float32
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = {str(file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
    assert {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[dtype] in stored


@pytest.mark.parametrize("fusion", FUSION_KINDS)
@pytest.mark.parametrize("dtype", first_quickly([torch.bfloat16, torch.float16]))
def test_half_precision_is_near_full_precision(fusion, dtype):
    model = make_model(fusion_type=fusion)
    batch = make_batch(labels=False)
    expected = logits_of(model, batch)
    half = copy.deepcopy(model).to(dtype)
    half_batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    found = logits_of(half, half_batch)
    assert found.isfinite().all()
    assert (found - expected).abs().max() < 0.05 * expected.abs().max() + 0.02


def test_pickles_are_not_read_unless_asked_for(tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        MMTransformerForMultiTask.from_pretrained(tmp_path)
    assert_same(MMTransformerForMultiTask.from_pretrained(tmp_path, use_safetensors=False), model)


def test_copies_are_independent_and_equal():
    model, batch = make_model(), make_batch(labels=False)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits_of(made, batch), logits_of(model, batch))
        with torch.no_grad():
            next(made.parameters()).add_(1)
    assert_same(model, make_model())


# Embeddings and ties


@pytest.mark.parametrize("kind", first_quickly(SEQ2SEQ))
@pytest.mark.parametrize("pad_to_multiple_of", first_quickly([16, None]))
def test_resized_embeddings(kind, pad_to_multiple_of, tmp_path):
    model = make_small_writer(kind)
    batch = padded_for(model)
    old = model.get_input_embeddings().weight.detach().clone()
    tied = model.get_output_embeddings() is not None and model.config.text_config.tie_word_embeddings
    model.resize_token_embeddings(105, pad_to_multiple_of=pad_to_multiple_of)
    size = 112 if pad_to_multiple_of else 105
    text_model = model.model.text_model
    assert model.config.vocab_size == text_model.config.vocab_size == size
    assert model.get_input_embeddings().weight.shape == (size, 32)
    torch.testing.assert_close(model.get_input_embeddings().weight[:99], old)
    assert text_model.get_output_embeddings().weight.shape[0] == size
    if tied:
        assert text_model.get_output_embeddings().weight is model.get_input_embeddings().weight
    # The new ids can be read and learned, and the model is saved with them.
    batch["input_ids"][0, 0] = 104
    labels = {"german": torch.tensor([[104, 2]] * 4)}
    loss = model(**batch, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert model.get_input_embeddings().weight.grad[104].abs().sum() > 0
    model.save_pretrained(tmp_path)
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path)
    assert_same(loaded, model)
    model.resize_token_embeddings(60)
    labels = {"german": torch.tensor([[59, 2]] * 4)}
    assert model(**padded_for(model) | {"input_ids": torch.full((4, 9), 59)}, labels=labels).logits["german"].shape == (
        4, 2, 60,
    )  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_resized_embeddings_of_an_encoder(text):
    model = make_model(text)
    batch = padded_for(model)
    before = logits_of(model, batch)
    embeddings = model.resize_token_embeddings(105, pad_to_multiple_of=8)
    assert embeddings.weight.shape[0] == 112 == model.config.vocab_size == model.config.text_config.vocab_size
    torch.testing.assert_close(logits_of(model, batch), before)


@pytest.mark.parametrize("kind", first_quickly(SEQ2SEQ, 2))
def test_ties_stay_ties(kind, tmp_path):
    model = make_small_writer(kind)

    def shared(model):
        places: dict[int, list[str]] = {}
        for name, value in model.named_parameters(remove_duplicate=False):
            places.setdefault(value.data_ptr(), []).append(name)
        return sorted(sorted(names) for names in places.values() if len(names) > 1)

    ties = shared(model)
    assert ties
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    assert all(len(stored & set(names)) == 1 for names in ties), "a shared weight is stored once"
    assert shared(MMTransformerForMultiTask.from_pretrained(tmp_path)) == ties
    model.resize_token_embeddings(120)
    assert shared(model) == ties


def test_embeddings_can_be_replaced():
    model = make_model()
    new = nn.Embedding(99, 32)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new is model.model.text_model.get_input_embeddings()
    assert model.num_parameters() == sum(parameter.numel() for parameter in model.parameters())


# Outputs


@pytest.mark.parametrize("fusion", FUSION_KINDS)
@pytest.mark.parametrize("from_config", first_quickly([False, True]))
def test_shapes_of_hidden_states_and_attentions(fusion, from_config):
    options = {"output_attentions": True, "output_hidden_states": True}
    model = make_model(fusion_type=fusion, attn_implementation="eager", **(options if from_config else {}))
    batch = make_batch(labels=False)
    outputs = model(**batch, **({} if from_config else options))
    layers, heads, rows, length = 2, 4, 4, 9
    patches = 2 * 17  # two places for images, 4 x 4 patches and [CLS] each
    assert {tuple(states.shape) for states in outputs.hidden_states} == {(rows, length, 32)}
    assert len(outputs.hidden_states) == (2 if fusion == "late" else layers + 1)
    with_pictures = torch.tensor([0, 2, 3])  # the second row has none
    for kept, keys in ((outputs.attentions, None), (outputs.cross_attentions, patches)):
        assert kept is None or len(kept) == layers
        for weights in kept or ():
            assert weights.shape[:2] == (rows, heads)
            assert keys is None or weights.shape[2:] == (length, keys)
            torch.testing.assert_close(weights.sum(-1)[with_pictures], torch.ones(weights.shape[:-1])[with_pictures])
            assert keys is None or (weights[1] == 0).all()
    assert (outputs.cross_attentions is not None) == (fusion in ("cross_attention", "co_attention"))
    plain = model(**batch, output_attentions=False, output_hidden_states=False)
    assert plain.hidden_states is None
    assert plain.attentions is None
    assert plain.cross_attentions is None
    # A tuple holds the same, in order, without what is None.
    as_tuple = model(**batch, output_attentions=False, output_hidden_states=False, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == 1
    for name, value in as_tuple[0].items():
        torch.testing.assert_close(value, plain.logits[name])


@pytest.mark.parametrize("fusion", FUSION_KINDS)
def test_attentions_lie_on_the_way_to_the_output(fusion):
    """So that explanations can weigh them by their gradients; rows without pictures included."""
    model = make_model(fusion_type=fusion, attn_implementation="eager")
    outputs = model(**make_batch(labels=False), output_attentions=True, output_hidden_states=True)
    shown = [*(outputs.cross_attentions or ()), *(outputs.attentions or ()), *outputs.hidden_states]
    for kept in shown:
        kept.retain_grad()
    outputs.logits["entities"].sum().backward()
    for kept in shown:
        assert kept.grad.abs().sum() > 0


@pytest.mark.parametrize("fusion", FUSION_KINDS)
@pytest.mark.parametrize("side", first_quickly(["left", "right"]))
def test_attention_implementations_agree_in_values_and_gradients(fusion, side):
    batch = make_batch(labels=True)
    if side == "left":
        for name in ("input_ids", "attention_mask"):
            batch[name] = batch[name].flip(-1)
    losses, gradients = [], []
    for implementation in ("eager", "sdpa"):
        model = make_model(fusion_type=fusion)
        model.set_attn_implementation(implementation)
        assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "is_causal") and hasattr(m, "config")} == {implementation}  # fmt: skip  # noqa: E501
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss)
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("text", first_quickly(TEXTS))
@pytest.mark.parametrize("vision", VISIONS)
def test_a_row_answers_alone_as_in_a_batch(text, vision):
    model = make_model(text, vision)
    batch = padded_for(model)
    with torch.no_grad():
        together = model(**batch).logits
    for row in range(4):
        length = int(batch["attention_mask"][row].sum())
        images = batch["image_index"][row][batch["image_index"][row] >= 0]
        alone = {
            "input_ids": batch["input_ids"][row : row + 1, :length],
            "attention_mask": batch["attention_mask"][row : row + 1, :length],
            "image_index": torch.arange(len(images))[None],
        }
        if len(images):
            alone["pixel_values"] = batch["pixel_values"][images]
        with torch.no_grad():
            logits = model(**alone).logits
        for name, value in logits.items():
            expected = together[name][row : row + 1, :length] if name == "entities" else together[name][row : row + 1]
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", FUSION_KINDS)
def test_a_small_batch_can_be_learned_by_heart(fusion):
    model = make_model(fusion_type=fusion, fusion_dropout=0.0, classifier_dropout=0.0).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch = make_batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = None
    for _ in range(60):
        loss = model(**batch).loss
        first = loss.item() if first is None else first
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    outputs = model.eval()(**batch)
    assert outputs.loss < 0.05 * first
    for name in ("topic", "sentiment"):
        known = batch["labels"][name] >= 0
        assert (outputs.logits[name].argmax(-1) == batch["labels"][name])[known].all()


# Generation


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=str,
)
@pytest.mark.parametrize("kind", first_quickly(["bart", "t5"]))
def test_generation_in_every_way(kind, options):
    model = make_small_writer(kind)
    batch = padded_for(model)
    torch.manual_seed(1)
    ids = model.generate(**batch, **options)
    torch.manual_seed(1)
    torch.testing.assert_close(model.generate(**batch, **options), ids)
    assert ids.shape[0] == 4 * options.get("num_return_sequences", 1)
    assert ids.shape[1] <= 6 + 1
    full = model.generate(**batch, **options, return_dict_in_generate=True, output_scores=True)
    assert full.sequences.shape[0] == ids.shape[0]
    assert len(full.scores) == full.sequences.shape[1] - 1


def test_an_assistant_is_refused():
    model = make_small_writer()
    with pytest.raises(ValueError, match="assistant_model"):
        model.generate(**padded_for(model), assistant_model=make_small_writer(seed=1))


# Slow: they compile


@pytest.mark.nightly
@pytest.mark.parametrize("fusion", FUSION_KINDS)
def test_compiled_in_one_graph(fusion):
    model, batch = make_model(fusion_type=fusion), make_batch(labels=False)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(logits_of(compiled, batch), logits_of(model, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("fusion", FUSION_KINDS)
def test_flex_attention_agrees(fusion):
    model = make_model(fusion_type=fusion, fusion_hidden_size=64)
    batch = make_batch(labels=False)
    expected = logits_of(model, batch)
    model.config._attn_implementation = "flex_attention"
    for module in model.model.fusion.modules():
        if hasattr(module, "config"):
            assert module.config is model.config
    torch.testing.assert_close(logits_of(model, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSION_KINDS)
def test_hidden_states_of_some_layers(fusion):
    """As transformers' own models answer: the layers that are asked for, `None` in the places of others."""
    model, batch = make_model(fusion_type=fusion), make_batch(labels=False)
    full = model(**batch, output_hidden_states=True).hidden_states
    some = model(**batch, output_hidden_states=[0, -1]).hidden_states
    assert len(some) == len(full) > 1
    assert all(state is None for state in some[1:-1])
    assert torch.equal(some[0], full[0])
    assert torch.equal(some[-1], full[-1])
