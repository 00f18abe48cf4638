"""Which parameter learns how fast."""

import re

import pytest
import torch
from cases import first_quickly
from datasets import Dataset
from tiny import make_model, make_processor
from torch import nn
from transformers import TrainingArguments

from mm_transformers import Classification, Generation, MMTrainer, MMTrainingArguments
from mm_transformers.training.learning_rates import layer_numbers


ROWS = Dataset.from_list([{"text": "red cat", "image": None, "topic": "food"}] * 4)


def rates_of(tmp_path, model, arguments=MMTrainingArguments, **options) -> dict[str, float]:
    """The rates with which a trainer would begin, by the names of the parameters."""
    args = arguments(str(tmp_path), use_cpu=True, report_to=[], learning_rate=1e-3, **options)
    trainer = MMTrainer(model, args, processing_class=make_processor(), train_dataset=ROWS)
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    return {name: rates[id(dict(model.named_parameters())[name])] for name in names}


def test_parts_have_their_own_rates(tmp_path):
    rates = rates_of(
        tmp_path, make_model(), encoder_learning_rate=1e-5, fusion_learning_rate=1e-4, head_learning_rate=1e-2
    )
    for name, rate in rates.items():
        if name.endswith("gate_alpha"):
            expected = 1e-3  # ten times that of the fusion
        elif name.startswith("heads."):
            expected = 1e-2
        elif name.startswith(("model.text_model.", "model.vision_model.")):
            expected = 1e-5
        else:
            expected = 1e-4
        assert rate == pytest.approx(expected), name
    assert set(rates_of(tmp_path, make_model(), TrainingArguments).values()) == {1e-3, 1e-2}


@pytest.mark.parametrize(
    ("text", "vision"), first_quickly([("bert", "vit"), ("distilbert", "dinov2"), ("modernbert", "clip-vision")])
)
def test_lower_layers_learn_more_slowly(tmp_path, text, vision):
    """With 2 layers: embeddings at decay^3, layers at decay^2 and decay, what follows them as the last."""
    rates = rates_of(tmp_path, make_model(text, vision), layerwise_lr_decay=0.5, encoder_learning_rate=1e-4)
    seen = set()
    for name, rate in rates.items():
        if name.startswith(("model.text_model.", "model.vision_model.")):
            layer = re.search(r"\blayers?\.(\d)\.", name)
            before = "embed" in name or "pre_layrnorm" in name
            power = 2 - int(layer[1]) if layer else 3 if before else 1
            assert rate == pytest.approx(1e-4 * 0.5**power), name
            seen.add(power)
        elif not name.endswith("gate_alpha"):
            assert rate == pytest.approx(1e-3), name
    assert seen == {1, 2, 3}


@pytest.mark.parametrize("text", ["t5", "marian"])
def test_both_halves_of_an_encoder_decoder_have_layers(tmp_path, text):
    import tiny

    config = tiny.MMTransformerConfig(
        text_config=tiny.SEQ2SEQ[text](), vision_config=tiny.VISION_ENCODERS["vit"](), num_fusion_layers=1,
        tasks=[Generation("german", max_length=16), Classification("topic", labels=["food", "travel"])],
    )  # fmt: skip
    rates = rates_of(tmp_path, tiny.MMTransformerForMultiTask(config), layerwise_lr_decay=0.5)
    layers = {}
    for name, rate in rates.items():
        found = re.search(r"text_model\..*(encoder|decoder)\.(?:layers|block)\.(\d)\.", name)
        if found:
            layers.setdefault((found[1], int(found[2])), set()).add(round(rate / 1e-3, 6))
    assert layers == {
        ("encoder", 0): {0.25}, ("encoder", 1): {0.5}, ("decoder", 0): {0.25}, ("decoder", 1): {0.5},
    }  # fmt: skip


@pytest.mark.parametrize("audio", ["wav2vec2", "whisper"])
def test_every_weight_of_an_audio_encoder_has_a_rate(tmp_path, audio):
    # The weight-normed convolution of Wav2Vec2 keeps its weights in a list that holds no layers.
    model = make_model(audio=audio)
    rates = rates_of(tmp_path, model, encoder_learning_rate=1e-4, layerwise_lr_decay=0.5)
    heard = {name: rate for name, rate in rates.items() if name.startswith("model.audio_model.")}
    layers = max(layer_numbers(model.model.audio_model).values())
    assert len(heard) > 10
    assert max(heard.values()) == pytest.approx(1e-4 * 0.5)
    assert all(1e-4 * 0.5 ** (layers + 1) * 0.999 < rate < 1e-4 for rate in heard.values())


def test_stages_are_taken_apart():
    model = make_model("bert", "swin").model.vision_model
    numbers = layer_numbers(model)
    blocks = [numbers[id(next(stage.blocks[0].parameters()))] for stage in model.encoder.layers]
    assert blocks == [1, 2]
    assert numbers[id(next(model.embeddings.parameters()))] == 0


def test_numbers_are_in_the_order_of_the_layers():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
            self.between = nn.Linear(1, 1)
            self.layers = nn.ModuleList([nn.Linear(1, 1)])
            self.norm = nn.LayerNorm(1)

    encoder = Encoder()
    numbers = layer_numbers(encoder)
    parts = [encoder.conv[0], encoder.conv[1], encoder.between, encoder.layers[0], encoder.norm]
    assert [numbers[id(part.weight)] for part in parts] == [1, 2, 2, 3, 3]


def test_rates_follow_the_schedule(tmp_path):
    """In one step of SGD each part moves by its own rate."""
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = MMTrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], learning_rate=0.1, head_learning_rate=0.0, optim="sgd", max_steps=1,
        lr_scheduler_type="constant", max_grad_norm=0.0, disable_tqdm=True,
    )  # fmt: skip
    MMTrainer(model, args, processing_class=make_processor(), train_dataset=ROWS).train()
    for name, p in model.named_parameters():
        if name.startswith("heads."):
            assert torch.equal(p, before[name])
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_wrong_rates_are_told(tmp_path):
    with pytest.raises(ValueError, match="layerwise_lr_decay must be greater than 0 and at most 1, but is 1.5"):
        MMTrainingArguments(str(tmp_path), layerwise_lr_decay=1.5)
    with pytest.raises(ValueError, match="fusion_learning_rate must be at least 0, but is -1"):
        MMTrainingArguments(str(tmp_path), fusion_learning_rate=-1)
