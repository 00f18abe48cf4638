"""Any text encoder with some vision encoder, and the reverse."""

import logging

import pytest
import torch
from cases import first_quickly
from safetensors.torch import load_file, save_file
from tiny import (
    IMAGE_SIZE,
    MAPPED_ENCODERS,
    TEXT_ENCODERS,
    VISION_ENCODERS,
    make_batch,
    make_config,
    make_model,
    make_processor,
    make_tasks,
    open_gates,
    to_pad_id,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    CLIPConfig,
    CLIPModel,
    GPT2Config,
    HGNetV2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Sam2VisionConfig,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextModel,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    WhisperConfig,
)
from transformers.modeling_outputs import BaseModelOutput

from mm_transformers import Classification, MMTransformerConfig, MMTransformerForMultiTask, MMTransformerModel
from mm_transformers.model.encoders import encoder_width, load_encoder, max_text_positions


# Each text encoder meets another vision encoder, until all of both have been met.
PAIRS = [(text, list(VISION_ENCODERS)[i % len(VISION_ENCODERS)]) for i, text in enumerate(TEXT_ENCODERS)] + [
    ("bert", vision) for vision in VISION_ENCODERS if vision != "vit"
]


def batch_for(model, **kwargs):
    pad = model.config.text_config.pad_token_id
    return to_pad_id(make_batch(**kwargs), 0 if pad is None else pad)


@pytest.mark.slow
@pytest.mark.parametrize(("text", "vision"), PAIRS)
def test_every_parameter_gets_a_gradient(text, vision):
    model = make_model(text, vision).train()
    batch = batch_for(model)
    batch["attention_mask"][3] = 0  # a row without text
    model(**batch).loss.backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert idle == []
    assert all(p.grad.isfinite().all() for p in model.parameters())
    silent = {name for name, p in model.named_parameters() if p.grad.abs().max() == 0}
    # Keys are compared with each other, so a bias common to all of them changes nothing: its gradient is 0.
    unreached = {name for name in silent if not name.endswith(("k_proj.bias", "key.bias"))}
    assert not {name for name in unreached if name.startswith(("heads", "model.fusion", "model.vision_projection"))}
    # Inside the encoders: tokens, positions and segments that are not in the batch are rows of tables that are.
    assert not unreached, unreached


@pytest.mark.parametrize(("text", "vision"), first_quickly(PAIRS))
def test_saved_model_loads_equal(text, vision, tmp_path):
    model = make_model(text, vision)
    model.save_pretrained(tmp_path)
    loaded, info = MMTransformerForMultiTask.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    expected = model.state_dict()
    assert expected.keys() == loaded.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    batch = batch_for(model)
    with torch.no_grad():
        logits, loaded_logits = model(**batch).logits, loaded(**batch).logits
    for name in logits:
        torch.testing.assert_close(loaded_logits[name], logits[name], rtol=0, atol=0)


@pytest.mark.parametrize(("text", "vision"), PAIRS)
def test_absent_image_is_absent(text, vision):
    """A row without an image answers as it does alone, and as if there were no images at all."""
    model = make_model(text, vision)
    batch = batch_for(model, labels=False)
    alone = {"input_ids": batch["input_ids"][1:2, :8], "attention_mask": batch["attention_mask"][1:2, :8]}
    with torch.no_grad():
        together = model.model(**batch).last_hidden_state[1, :8]
        single = model.model(**alone).last_hidden_state[0]
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-5)


def make_mapped(vision):
    torch.manual_seed(0)
    config = MMTransformerConfig(
        text_config=TEXT_ENCODERS["bert"](), vision_config=MAPPED_ENCODERS[vision](), tasks=make_tasks(),
        num_fusion_layers=2, num_fusion_attention_heads=4,
    )  # fmt: skip
    model = MMTransformerForMultiTask(config)
    open_gates(model)
    batch = make_batch()
    batch["pixel_values"] = torch.randn(3, 3, 2 * IMAGE_SIZE, 2 * IMAGE_SIZE)
    return model, batch


@pytest.mark.parametrize("vision", [*MAPPED_ENCODERS, "resnet", "convnextv2", "swin"])
def test_width_is_that_of_the_output(vision):
    """Against a forward pass of the real model, by transformers alone."""
    config = {**MAPPED_ENCODERS, **VISION_ENCODERS}[vision]()
    size = getattr(config, "image_size", IMAGE_SIZE)
    states = AutoModel.from_config(config).eval()(pixel_values=torch.zeros(1, 3, size, size)).last_hidden_state
    assert encoder_width(config) == (states.shape[1] if states.ndim == 4 else states.shape[2])


@pytest.mark.slow
@pytest.mark.parametrize("vision", MAPPED_ENCODERS)
def test_feature_maps_are_tokens(vision, tmp_path):
    """Every parameter gets a gradient, a saved model loads equal, and an absent image is absent."""
    model, batch = make_mapped(vision)
    model.train()(**batch).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []

    model.eval()
    model.save_pretrained(tmp_path)
    loaded, info = MMTransformerForMultiTask.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    batch.pop("labels")
    alone = {"input_ids": batch["input_ids"][1:2, :8], "attention_mask": batch["attention_mask"][1:2, :8]}
    with torch.no_grad():
        logits, loaded_logits = model(**batch).logits, loaded(**batch).logits
        together = model.model(**batch).last_hidden_state[1, :8]
        single = model.model(**alone).last_hidden_state[0]
        states = AutoModel.from_config(model.config.vision_config).eval()
        states.load_state_dict(model.model.vision_model.state_dict())
        states = states(pixel_values=batch["pixel_values"]).last_hidden_state
        features, _ = model.model.encode("vision", pixel_values=batch["pixel_values"])
    for name in logits:
        torch.testing.assert_close(loaded_logits[name], logits[name], rtol=0, atol=0)
    torch.testing.assert_close(together, single, rtol=1e-4, atol=1e-5)
    tokens = torch.stack([s.flatten(1).T for s in states]) if states.ndim == 4 else states
    torch.testing.assert_close(features, tokens)


def test_reading_the_width_leaves_no_trace():
    config = MAPPED_ENCODERS["efficientnet"]()
    config._attn_implementation = "sdpa"
    before, state = config.to_json_string(use_diff=False), torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.inference_mode():
            assert encoder_width(config) == 320
    finally:
        torch.set_default_dtype(torch.float32)
    assert config.to_json_string(use_diff=False) == before
    assert config._attn_implementation == "sdpa"
    assert torch.equal(torch.get_rng_state(), state)


class BandsConfig(PreTrainedConfig):
    model_type = "bands_for_a_test"
    num_bands: int = 6
    image_size: int = 16


class BandsModel(PreTrainedModel):
    """An encoder of a user, whose forward pass depends on values."""

    config_class = BandsConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(3, config.num_bands)
        self.idle = nn.Linear(3, 3)
        self.post_init()

    def forward(self, pixel_values):
        darkest = pixel_values.amin().item()
        return BaseModelOutput(self.linear((pixel_values - darkest).flatten(2).transpose(1, 2)))


def test_forward_that_depends_on_values():
    AutoConfig.register("bands_for_a_test", BandsConfig)
    AutoModel.register(BandsConfig, BandsModel)
    config = MMTransformerConfig(text_config=TEXT_ENCODERS["bert"](), vision_config=BandsConfig(), tasks=make_tasks())
    model = MMTransformerForMultiTask(config).train()
    assert encoder_width(config.vision_config) == 6
    model(**{**make_batch(), "pixel_values": torch.randn(3, 3, 16, 16)}).loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert "idle.weight" in dict(model.model.vision_model.named_buffers())


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXT_ENCODERS)
def test_new_model_is_the_text_encoder(text, tmp_path):
    """Rule 2, against the pretrained encoder loaded by transformers alone."""
    config = TEXT_ENCODERS[text]()
    torch.manual_seed(1)
    build = SiglipTextModel._from_config if text == "siglip-text" else AutoModel.from_config
    pretrained = build(config).eval()
    pretrained.save_pretrained(tmp_path / "text")
    vision = AutoModel.from_config(VISION_ENCODERS["vit"]())
    vision.save_pretrained(tmp_path / "vision")
    model = MMTransformerModel.from_encoders(
        text=str(tmp_path / "text"), vision=str(tmp_path / "vision"), num_fusion_attention_heads=4
    )
    batch = batch_for(model, labels=False)
    if config.is_encoder_decoder:
        pretrained = pretrained.get_encoder()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected = pretrained(**inputs).last_hidden_state
        actual = model(**batch).last_hidden_state
    keep = batch["attention_mask"].bool()
    torch.testing.assert_close(actual[keep], expected[keep], rtol=0, atol=1e-6)
    for name, tensor in vision.state_dict().items():
        if name in model.vision_model.state_dict():
            assert torch.equal(model.vision_model.state_dict()[name], tensor), name


@pytest.mark.parametrize(("cls", "config_class", "kinds"), [
    (CLIPModel, CLIPConfig, ("clip-text", "clip-vision")),
    (SiglipModel, SiglipConfig, ("siglip-text", "siglip-vision")),
])  # fmt: skip
def test_towers_of_a_two_tower_checkpoint(cls, config_class, kinds, tmp_path):
    torch.manual_seed(2)
    text_config, vision_config = TEXT_ENCODERS[kinds[0]](), VISION_ENCODERS[kinds[1]]()
    both = cls(config_class(text_config=text_config.to_dict(), vision_config=vision_config.to_dict())).eval()
    both.save_pretrained(tmp_path)
    model = MMTransformerModel.from_encoders(text=str(tmp_path), vision=str(tmp_path), num_fusion_attention_heads=4)
    batch = batch_for(model, labels=False)
    with torch.no_grad():
        expected = both.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state
        actual = model.vision_model(pixel_values=batch["pixel_values"]).last_hidden_state
        torch.testing.assert_close(actual, expected)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        expected = both.text_model(**inputs).last_hidden_state
        torch.testing.assert_close(model(**batch).last_hidden_state, expected)


def test_encoder_of_a_translation_checkpoint(tmp_path):
    torch.manual_seed(3)
    T5ForConditionalGeneration(TEXT_ENCODERS["t5"]()).save_pretrained(tmp_path)
    model = MMTransformerModel.from_encoders(text=str(tmp_path))
    assert not any("decoder." in name for name, _ in model.named_parameters())


def test_new_weights_are_initialised_as_transformers_does():
    """Encoders built inside the fused model are not left as the allocator gave them."""
    model = make_model("bert", "dinov2", gates_open=False)
    state = model.state_dict()
    assert state["model.text_model.encoder.layer.0.attention.self.query.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert state["model.fusion.layers.0.cross_attention.q_proj.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert state["heads.topic.dense.weight"].std() == pytest.approx(0.02, rel=0.1)
    assert state["model.fusion.layers.0.attention_gate.gate_alpha"].item() == 0
    assert torch.equal(state["model.vision_projection.layer_norm.weight"], torch.ones(24))


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"text_config": Wav2Vec2Config()}, "'wav2vec2' cannot be the text encoder: it takes 'input_values', not"),
    ({"vision_config": GPT2Config()}, "'gpt2' cannot be the vision encoder: it takes 'input_ids', not 'pixel_values'"),
    ({"text_config": WhisperConfig()}, "'whisper' cannot be the text encoder"),
    ({"vision_config": HGNetV2Config()}, "its output has no `last_hidden_state`"),
    ({"vision_config": Siglip2VisionConfig()}, r"it fails on one blank image of shape \(1, 3, 224, 224\): .*missing 2"),
    ({"vision_config": Sam2VisionConfig()}, r"its output has the shape \(1, 7, 7, 768\), not"),
])  # fmt: skip
def test_encoder_that_cannot_work_says_why(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MMTransformerModel(MMTransformerConfig(**{"text_config": TEXT_ENCODERS["bert"](), **kwargs}))


def test_encoder_of_unknown_width_says_so():
    config = VISION_ENCODERS["resnet"]()
    config.hidden_sizes = None
    with pytest.raises(ValueError, match="'resnet' cannot be the vision encoder: it cannot be built: "):
        MMTransformerModel(MMTransformerConfig(text_config=TEXT_ENCODERS["bert"](), vision_config=config))


@pytest.mark.parametrize("text", [name for name in TEXT_ENCODERS if name != "t5"])
def test_longest_text_is_taken_and_no_longer_one(text):
    """The limit that the collator cuts to is the true one."""
    model = make_model(text, None, tasks=[Classification("x", labels=["a", "b"])])
    limit = max_text_positions(model.config.text_config)
    assert limit == 40
    ids = torch.full((1, limit), 7)
    assert model(input_ids=ids).logits["x"].isfinite().all()
    if text not in ("modernbert", "deberta-v2"):  # rotary and relative positions have no table to run out of
        with pytest.raises((IndexError, ValueError, RuntimeError)):
            model(input_ids=torch.full((1, limit + 1), 7))


def test_resize_embeddings():
    model = make_model()
    model.resize_token_embeddings(120)
    assert model.config.vocab_size == model.config.text_config.vocab_size == 120
    assert model(input_ids=torch.tensor([[119]])).logits["topic"].shape == (1, 3)


def test_configs_are_shared_with_the_encoders():
    config = make_config()
    model = MMTransformerForMultiTask(config)
    assert model.model.text_model.config is model.config.text_config
    model.set_attn_implementation("eager")
    assert model.model.text_model.config._attn_implementation == "eager"
    assert model.model.vision_model.config._attn_implementation == "eager"


def test_processor_matches_model():
    assert make_processor().tokenizer.model_max_length == 40


@pytest.fixture
def load_reports(caplog):
    """Collects transformers' reports on loaded weights, whatever the level of its loggers was."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.WARNING, logger.name):
        yield lambda: {text for text in caplog.messages if "LOAD REPORT" in text}
    logger.removeHandler(caplog.handler)


def test_missing_weights_are_reported_and_unused_ones_are_not(tmp_path, load_reports):
    AutoModelForMaskedLM.from_config(TEXT_ENCODERS["bert"]()).save_pretrained(tmp_path)
    load_encoder(str(tmp_path), "text")  # without the head, whose weights are not used
    assert not load_reports()
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if name.endswith("query.weight"))
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load_encoder(str(tmp_path), "text")
    assert [gone.removeprefix("bert.") in report for report in load_reports()] == [True]
