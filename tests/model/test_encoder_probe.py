"""What is found by running an encoder once, and what follows from it."""

import pytest
import torch
from tiny import SEQ2SEQ, TEXT_ENCODERS, VISION_ENCODERS, make_batch, make_tasks
from tiny_encoders import make_tiny
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    BigBirdConfig,
    Data2VecVisionConfig,
    HieraConfig,
    IBertConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Swinv2Config,
    ViTMAEConfig,
    ViTMAEModel,
)
from transformers.modeling_outputs import BaseModelOutput

from mm_transformers import Classification, Generation, MMTransformerConfig, MMTransformerForMultiTask
from mm_transformers.model.encoder_probe import probe, traits_of, unused_parameters
from mm_transformers.model.encoders import build_encoder, encoder_width, max_text_positions


TASKS = [Classification("x", labels=["a", "b"])]


def save(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def from_saved(model, folder, modality="text", **kwargs):
    """A fused model with this encoder, and a tiny one of the other modality."""
    torch.manual_seed(0)
    other = TEXT_ENCODERS["bert"]() if modality != "text" else VISION_ENCODERS["vit"]()
    paths = {"vision" if modality == "text" else "text": save(AutoModel.from_config(other), folder / "other")}
    return MMTransformerForMultiTask.from_encoders(
        **paths, **{modality: save(model, folder / "encoder")}, num_fusion_attention_heads=1, freeze=[],
        **{"tasks": TASKS, **kwargs},
    )  # fmt: skip


def without_gradient(model):
    model.train()
    ids = torch.arange(6, 18).reshape(2, 6)
    output = model(input_ids=ids, labels={"x": torch.tensor([0, 1])})
    output.loss.backward()
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["marian", "roformer", "xlnet", "esm", "longformer", "markuplm", "siglip2_text_model"])
def test_loaded_parameters_all_get_gradients(text, tmp_path):
    """Loading makes parameters want gradients that no forward pass uses; DDP would wait for them."""
    model = from_saved(make_tiny(text, "text"), tmp_path)
    assert without_gradient(model) == []
    model.save_pretrained(tmp_path / "fused")
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path / "fused")
    assert without_gradient(loaded) == []
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert {name for name, _ in loaded.named_parameters()} == {name for name, _ in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("text", ["marian", "bart", "t5"])
def test_parameters_of_an_encoder_decoder_all_get_gradients(text, tmp_path):
    torch.manual_seed(0)
    path = save(AutoModelForSeq2SeqLM.from_config(SEQ2SEQ[text]()), tmp_path / "text")
    model = MMTransformerForMultiTask.from_encoders(path, tasks=[Generation("out", max_length=4)])
    model.save_pretrained(tmp_path / "fused")
    for fused in (model, MMTransformerForMultiTask.from_pretrained(tmp_path / "fused")):
        fused.train()
        labels = {"out": torch.tensor([[5, 6, 2]])}
        fused(input_ids=torch.tensor([[7, 8, 2]]), labels=labels).loss.backward()
        assert [name for name, p in fused.named_parameters() if p.grad is None] == []


def test_zero_is_a_gradient():
    """A parameter that is multiplied by 0 is used; one that is only there is not."""
    model = nn.Module()
    model.used, model.silent, model.idle = (nn.Parameter(torch.ones(2)) for _ in range(3))
    model.fixed = nn.Parameter(torch.ones(2), requires_grad=False)
    assert unused_parameters(model, lambda: model.used + 0 * model.silent) == ["idle", "fixed"]
    assert model.used.grad is None
    assert not model.fixed.requires_grad


def test_experts_that_no_token_is_sent_to_are_trained_later(tmp_path):
    model = from_saved(make_tiny("switch_transformers", "text"), tmp_path)
    assert traits_of(model.config.text_config)["routed"] is True
    model.train()
    states = model.model(input_ids=torch.tensor([[7]])).last_hidden_state
    (states * torch.randn(32)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if "experts" in name}
    assert all(gradient is not None for gradient in gradients.values())
    assert {bool(gradient.abs().max() > 0) for gradient in gradients.values()} == {True, False}


_IMAGE = dict(image_size=32, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37)
CHECKPOINTED = {
    "swin": VISION_ENCODERS["swin"],
    "swinv2": lambda: Swinv2Config(
        image_size=32, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 4], window_size=4
    ),
    "hiera": lambda: HieraConfig(
        image_size=[32, 32], embed_dim=8, depths=[1, 1], num_heads=[1, 2], patch_size=[7, 7], patch_stride=[4, 4],
        patch_padding=[3, 3], query_stride=[2, 2], masked_unit_size=[4, 4], num_query_pool=1,
    ),
    "data2vec-vision": lambda: Data2VecVisionConfig(**_IMAGE, patch_size=8),
    "ibert": lambda: IBertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
        max_position_embeddings=42, pad_token_id=1,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    """Also for encoders whose embeddings return more than one tensor."""
    config = CHECKPOINTED[name]()
    parts = {"text_config": config} if name == "ibert" else {"vision_config": config}
    parts = {"text_config": TEXT_ENCODERS["bert"](), "vision_config": VISION_ENCODERS["vit"](), **parts}
    torch.manual_seed(0)
    model = MMTransformerForMultiTask(
        MMTransformerConfig(**parts, tasks=make_tasks(), num_fusion_attention_heads=4, fusion_dropout=0.0)
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    gradients = []
    for checkpointed in (False, True):
        model.zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model(**make_batch()).loss.backward()
        gradients.append({key: parameter.grad.clone() for key, parameter in model.named_parameters()})
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_disable()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["esm", "markuplm", "clap_text_model", "led", "mpt", "roberta", "bart", "ibert"])
def test_longest_text_is_the_longest_that_transformers_takes(text):
    model = make_tiny(text, "text")
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    limit = max_text_positions(model.config)

    def runs(length):
        try:
            return bool(encoder(input_ids=torch.full((1, length), 7)).last_hidden_state.isfinite().all())
        except (IndexError, ValueError, RuntimeError):
            return False

    with torch.no_grad():
        if text == "led":  # 16,384 positions take long; the windows of 512 tokens are what is tried
            assert limit == encoder.embed_positions.num_embeddings == 16384
        else:
            assert runs(limit)
            assert not runs(limit + 1)


def test_width_is_that_of_a_projection(tmp_path):
    """AltCLIP projects what RoBERTa gives to another width than `hidden_size`."""
    encoder = make_tiny("altclip_text_model", "text")
    assert encoder_width(encoder.config) == encoder.config.project_dim != encoder.config.hidden_size
    model = from_saved(encoder, tmp_path)
    assert model(input_ids=torch.tensor([[7, 8]])).logits["x"].shape == (1, 2)


def test_masked_autoencoder_sees_all_patches_in_order(tmp_path):
    """In evaluation and in training, as transformers does without masking and without shuffling."""
    config = ViTMAEConfig(**_IMAGE, patch_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    torch.manual_seed(0)
    model = from_saved(ViTMAEModel(config), tmp_path, "vision")
    pixels = torch.randn(3, 3, 32, 32)
    plain = ViTMAEModel.from_pretrained(tmp_path / "encoder", mask_ratio=0.0).eval()
    with torch.no_grad():
        expected = plain(pixels, noise=torch.arange(16.0).expand(3, -1)).last_hidden_state
        for _ in range(2):
            torch.testing.assert_close(model.model.encode("vision", pixel_values=pixels)[0], expected)


class OddConfig(PreTrainedConfig):
    model_type = "odd_for_a_test"
    image_size: int = 16
    oddity: str = "none"


class OddModel(PreTrainedModel):
    """A vision encoder of a user, which is not a function of one picture."""

    config_class = OddConfig
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(3, 6)
        self.post_init()

    def forward(self, pixel_values):
        states = self.linear(pixel_values.flatten(2).transpose(1, 2))
        if self.config.oddity == "random":
            states = states + torch.randn_like(states)
        if self.config.oddity == "batch":
            states = states - states.sum(0) / 2
        if self.config.oddity == "training" and self.training:
            raise RuntimeError("no training here")
        return BaseModelOutput(states)


@pytest.mark.parametrize(("oddity", "message"), [
    ("random", "in evaluation it outputs other tokens each time for the same input"),
    ("training", r"it fails on one blank image of shape \(1, 3, 16, 16\): no training here"),
])  # fmt: skip
def test_encoder_that_is_no_function_of_its_input_is_refused(oddity, message, tmp_path):
    AutoConfig.register("odd_for_a_test", OddConfig, exist_ok=True)
    AutoModel.register(OddConfig, OddModel, exist_ok=True)
    with pytest.raises(ValueError, match=f"'odd_for_a_test' cannot be the vision encoder: {message}"):
        from_saved(OddModel(OddConfig(oddity=oddity)), tmp_path, "vision")
    model = from_saved(OddModel(OddConfig()), tmp_path / "plain", "vision")
    assert "one_by_one" not in traits_of(model.config.vision_config)


def test_encoder_that_mixes_images_runs_on_one_at_a_time(tmp_path):
    AutoConfig.register("odd_for_a_test", OddConfig, exist_ok=True)
    AutoModel.register(OddConfig, OddModel, exist_ok=True)
    model = from_saved(OddModel(OddConfig(oddity="batch")), tmp_path, "vision").model
    pixels = torch.randn(3, 3, 16, 16)
    together, _ = model.encode("vision", pixel_values=pixels)
    assert torch.equal(together[1], model.encode("vision", pixel_values=pixels[1:2])[0][0])


def test_probing_leaves_no_trace(tmp_path):
    """Weights, running statistics and random numbers are those of loading alone."""
    torch.manual_seed(0)
    encoder = AutoModel.from_config(VISION_ENCODERS["resnet"]())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    model = from_saved(encoder, tmp_path, "vision")
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.model.vision_model.state_dict()[name], tensor), name
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert not torch.equal(state, torch.get_rng_state())  # new weights were drawn
    config = AutoConfig.from_pretrained(tmp_path / "encoder")
    assert not hasattr(config, "encoder_traits")


@pytest.mark.slow
def test_config_without_traits_loads_and_answers_alike(tmp_path):
    """As checkpoints that were saved before there were any."""
    model = from_saved(make_tiny("marian", "text"), tmp_path)
    del model.config.text_config.encoder_traits, model.config.vision_config.encoder_traits
    model.save_pretrained(tmp_path / "fused")
    assert "encoder_traits" not in (tmp_path / "fused" / "config.json").read_text()
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path / "fused").eval()
    batch = {"input_ids": torch.tensor([[7, 8, 9], [9, 9, 4]]), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits["x"], model.eval()(**batch).logits["x"])
    assert without_gradient(loaded) == []


def test_several_end_tokens():
    """As instruct models have them."""
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        eos_token_id=[1, 2], pad_token_id=0,
    )  # fmt: skip
    assert probe(AutoModel.from_config(config), "text")["width"] == 16


def test_big_bird_attends_to_all_words():
    """Its own choice of blocks is random, and lasts until a text is short."""
    config = BigBirdConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, block_size=4,
        num_random_blocks=1, max_position_embeddings=128,
    )  # fmt: skip
    model = build_encoder(config, "text").eval()
    assert config.attention_type == model.config.attention_type == "original_full"


def test_weights_loaded_for_inference_only():
    with torch.inference_mode():
        traits = probe(AutoModel.from_config(TEXT_ENCODERS["bert"]()), "text")
    assert traits["unused"] == []
