"""What `freeze` keeps as it is."""

import pytest
import torch
from language_models import make_language_model, texts_of
from rows import make_args, make_dataset
from tiny import SEQ2SEQ, TEXT_ENCODERS, VISION_ENCODERS, make_batch, make_model, make_processor, make_tasks, open_gates
from transformers import AutoModel, AutoModelForSeq2SeqLM
from writers import LABELS, make_writer

from mm_transformers import Generation, MMTrainer, MMTransformerForMultiTask, MMTransformerModel


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names_in(model, prefix: str) -> set[str]:
    names = {name for name, _ in model.named_parameters() if name.startswith(prefix)}
    assert names
    return names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("freeze", "prefixes"),
    [
        (["vision"], ["model.vision_model."]),
        (["text", "vision"], ["model.text_model.", "model.vision_model."]),
        (["text_model.embeddings"], ["model.text_model.embeddings."]),
        (["text_model.encoder.layer.1", "fusion"], ["model.text_model.encoder.layer.1.", "model.fusion."]),
    ],
)
def test_freezes_what_is_named_and_nothing_else(freeze, prefixes, tmp_path):
    model = make_model(freeze=freeze)
    expected = {name for name, _ in model.named_parameters()} - set().union(*(names_in(model, p) for p in prefixes))
    assert trained(model) == expected
    model.save_pretrained(tmp_path)
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path)
    assert loaded.config.freeze == freeze
    assert trained(loaded) == expected
    assert trained(AutoModel.from_pretrained(tmp_path)) == expected
    thawed, _ = MMTransformerForMultiTask.from_pretrained(tmp_path, freeze=[], output_loading_info=True)
    assert trained(thawed) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("cls", [MMTransformerModel, MMTransformerForMultiTask])
def test_from_encoders(cls, tmp_path):
    AutoModel.from_config(TEXT_ENCODERS["bert"]()).save_pretrained(tmp_path / "text")
    AutoModel.from_config(VISION_ENCODERS["vit"]()).save_pretrained(tmp_path / "vision")
    model = cls.from_encoders(
        text=str(tmp_path / "text"), vision=str(tmp_path / "vision"), freeze=["vision", "text_model.embeddings"],
        modality_dropout={"vision": 0.1}, tasks=make_tasks(), num_fusion_attention_heads=4,
    )  # fmt: skip
    prefix = "" if cls is MMTransformerModel else "model."
    frozen = names_in(model, f"{prefix}vision_model.") | names_in(model, f"{prefix}text_model.embeddings.")
    assert trained(model) == {name for name, _ in model.named_parameters()} - frozen


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (["audio"], "freeze names 'audio', but the encoders of this model are text, vision."),
        (["text_model.embedding"], "freeze names 'text_model.embedding', but there are no such parameters. Use "
         "text, vision, or a sub-module of the model, one of text_model, .*fusion.*, or of one of these"),
        (["vision_model.lay"], "freeze names 'vision_model.lay', but there are no such parameters"),
        (["heads"], "freeze names 'heads', but there are no such parameters"),
        ([3], "freeze must be a list of strings, such as \\['vision'\\], but is \\[3\\]"),
    ],
)  # fmt: skip
def test_refuses(freeze, message):
    with pytest.raises(ValueError, match=message):
        make_model(freeze=freeze)


def test_a_frozen_encoder_runs_as_in_evaluation():
    """Its dropout is off; that of an encoder of which a part is frozen stays on, as that of what is trained."""
    model = make_model(freeze=["vision", "text_model.embeddings"])
    inner, pixels = model.model, make_batch()["pixel_values"]
    for config in (model.config.vision_config, model.config.text_config):
        assert config.hidden_dropout_prob is not None
    for module in inner.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    expected = inner.vision_model(pixels).last_hidden_state
    model.train()
    assert not any(module.training for module in inner.vision_model.modules())
    assert all(module.training for module in inner.text_model.modules())
    features, mask = inner.encode("vision", pixel_values=pixels)
    assert mask is None
    assert not features.requires_grad
    torch.testing.assert_close(features, expected, rtol=0, atol=0)
    # Explanations ask for the gradient of the input, and get it.
    features, _ = inner.encode("vision", pixel_values=pixels.clone().requires_grad_())
    assert features.requires_grad


@pytest.mark.parametrize("freeze", [["vision"], ["text", "vision"], ["text", "vision", "audio"]])
@pytest.mark.parametrize("empty", [False, True])
def test_all_that_is_trained_takes_part_in_every_backward_pass(freeze, empty):
    audio = "wav2vec2" if "audio" in freeze else None
    model, batch = make_model(audio=audio, freeze=freeze, frame_embedding="learned").train(), make_batch()
    if empty:
        batch.pop("pixel_values")
        batch["image_index"] = torch.full((4, 1), -1)
    calls = []
    for modality in freeze:
        model.model.encoder(modality).register_forward_hook(lambda *_, modality=modality: calls.append(modality))
    model(**batch).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    # No blank input for an encoder that has nothing to learn.
    assert calls == [m for m in freeze if m == "text" or (m == "vision" and not empty)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["marian", "t5"])
def test_text_of_an_encoder_decoder_is_its_encoder(kind, tmp_path):
    """What the decoder shares with it is frozen too, all else of the decoder is trained."""
    model = make_writer(kind, freeze=["text"])
    encoder = model.model.text_model.get_encoder()
    assert not any(p.requires_grad for p in encoder.parameters())
    decoder = model.model.text_model.get_decoder()
    own = {name for name, p in decoder.named_parameters() if all(p is not q for q in encoder.parameters())}
    unfrozen = make_writer(kind).model.text_model.get_decoder()  # Marian's positions are never trained
    assert own & trained(unfrozen)
    assert trained(decoder) == own & trained(unfrozen)
    model.save_pretrained(tmp_path)
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path)
    # Which `from_pretrained` of transformers makes a parameter like any other.
    assert trained(loaded) - {"model.text_model.model.decoder.embed_positions.weight"} == trained(model)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    model.train()
    assert not encoder.training
    assert decoder.training
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    batch = {**make_batch(labels=False), "labels": LABELS}
    model(**batch).loss.backward()
    optimizer.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.state_dict().items())
    batch.pop("labels")
    assert model.eval().generate("german", **batch).shape[0] == 4


def test_from_encoders_that_write(tmp_path):
    AutoModelForSeq2SeqLM.from_config(SEQ2SEQ["bart"]()).save_pretrained(tmp_path)
    model = MMTransformerForMultiTask.from_encoders(
        text=str(tmp_path), tasks=[Generation("german", max_length=8)], freeze=["text"]
    )
    assert model.model.is_frozen("text")


def test_gradient_checkpointing_gives_the_same_gradients():
    model, batch = make_model(freeze=["vision"]), make_batch()
    torch.manual_seed(0)
    model(**batch).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    model(**batch).loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)
        else:
            assert p.grad is None


def test_adapters_within_a_frozen_encoder_are_trained(tmp_path):
    """Whoever puts adapters into an encoder wants them trained, whatever `freeze` says of its own weights."""
    peft = pytest.importorskip("peft")
    base = make_model(freeze=["text", "vision"])
    lora = peft.LoraConfig(target_modules=r".*text_model.*\.(query|value)", modules_to_save=["heads"])
    model = peft.get_peft_model(base, lora).train()
    assert not base.model.is_frozen("text")
    assert base.model.is_frozen("vision")
    assert base.model.text_model.training
    assert not base.model.vision_model.training
    model(**make_batch()).loss.backward()
    adapters = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert adapters
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters)


def test_a_frozen_encoder_may_be_of_another_precision():
    model = make_model(freeze=["vision"])
    model.model.vision_model.to(torch.bfloat16)
    model.train()
    outputs = model(**make_batch())
    outputs.loss.backward()
    assert outputs.loss.dtype == torch.float32
    assert model.model.encode("vision", **{"pixel_values": make_batch()["pixel_values"]})[0].dtype == torch.bfloat16


@pytest.mark.parametrize("encoder", ["bert", "marian"])
def test_a_frozen_text_encoder_may_be_of_another_precision(encoder):
    writes = encoder in SEQ2SEQ
    model = make_writer(encoder) if writes else make_model(encoder)
    open_gates(model)
    batch = make_batch(labels=False)
    expected = model.eval()(**batch).logits["topic"]
    model.model.text_model.to(torch.bfloat16)
    found = model(**batch).logits["topic"]
    assert found.dtype == torch.float32
    assert 0 < (found - expected).abs().max() < 0.1 * expected.abs().max()
    model.train()(**batch, labels=LABELS if writes else {"topic": LABELS["topic"]}).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.model.fusion.parameters())
    if writes:
        assert len(model.eval().generate("german", **batch, max_new_tokens=3)) == 4


@pytest.mark.parametrize("kwargs", [{}, {"fusion_layers_every": 1}, {"fusion_type": "prefix"}], ids=str)
def test_a_frozen_language_model_may_be_of_another_precision(kwargs):
    model = make_language_model(gates_open=False, freeze=["text", "vision"], **kwargs)
    language_model = model.model.text_model.to(torch.bfloat16)
    batch = make_batch(labels=False)
    if "fusion_type" not in kwargs:
        # Closed gates: what the language model writes, to the last bit.
        texts = texts_of(batch)
        bare = language_model.generate(**texts, max_new_tokens=4, do_sample=False)[:, texts["input_ids"].shape[1] :]
        assert torch.equal(model.generate("german", **batch, max_new_tokens=4), bare)
    open_gates(model)
    outputs = model.train()(**batch, labels=LABELS)
    outputs.loss.backward()
    assert outputs.logits["topic"].dtype == torch.float32
    grads = [p.grad for p in model.model.fusion.parameters() if p.requires_grad]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert any(grad.abs().sum() > 0 for grad in grads)


def test_half_precision_keeps_what_is_frozen(tmp_path):
    make_model(freeze=["vision", "fusion"]).save_pretrained(tmp_path)
    model = MMTransformerForMultiTask.from_pretrained(tmp_path, dtype=torch.bfloat16)
    gates = {name: p for name, p in model.named_parameters() if name.endswith("gate_alpha")}
    assert gates
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in gates.values())


@pytest.mark.nightly
def test_compiles_without_a_graph_break():
    model, batch = make_model(freeze=["text", "vision"]), make_batch()
    torch._dynamo.reset()
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_exports():
    model, batch = make_model(freeze=["text", "vision"]), make_batch(labels=False)
    exported = torch.export.export(model, (), batch, strict=False).module()
    expected = model(**batch).logits
    for name, logits in exported(**batch)["logits"].items():
        torch.testing.assert_close(logits, expected[name])


@pytest.mark.slow
def test_the_trainer_leaves_frozen_weights_alone_and_resumes(tmp_path):
    data, processor = make_dataset(), make_processor()
    model = make_model(freeze=["vision", "text_model.embeddings"])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = make_args(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, weight_decay=0.1)
    MMTrainer(model, args, processing_class=processor, train_dataset=data).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    again = make_model(freeze=["vision", "text_model.embeddings"])
    trainer = MMTrainer(again, args, processing_class=processor, train_dataset=data)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter, dict(model.named_parameters())[name], msg=name)
