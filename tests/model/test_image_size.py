"""Pictures of another size than the encoder was pretrained on."""

import pytest
import torch
import yaml
from command_line import mm
from PIL import Image
from recipes import save_encoders, write_csv
from tiny import (
    IMAGE_SIZE,
    MAPPED_ENCODERS,
    VISION_ENCODERS,
    make_batch,
    make_image,
    make_model,
    make_processor,
    make_tasks,
)
from transformers import CLIPImageProcessor, ConvNextImageProcessor, LevitConfig, ViTImageProcessor, pipeline

from mm_transformers import MMDataCollator, MMTransformerConfig, MMTransformerForMultiTask, MMTransformerProcessor
from mm_transformers.model.image_size import check_size, own_size, set_size, size_of


LARGE = 48
KINDS = ["vit", "deit", "beit", "dinov2", "dinov3", "swin", "convnextv2", "resnet", "clip-vision", "siglip-vision"]


def with_size(batch, height, width):
    generator = torch.Generator().manual_seed(0)
    return {**batch, "pixel_values": torch.randn(3, 3, height, width, generator=generator)}


@pytest.mark.parametrize("kind", KINDS)
def test_larger_pictures_give_more_tokens_and_gradients(kind):
    model = make_model(vision=kind).train()
    own = model.model.encode("vision", pixel_values=torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))[0].shape[1]
    batch = with_size(make_batch(), LARGE, 2 * IMAGE_SIZE)
    outputs = model(**batch)
    outputs.loss.backward()
    assert model.model.encode("vision", pixel_values=batch["pixel_values"])[0].shape[1] > own
    without = [name for name, p in model.model.vision_model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


@pytest.mark.parametrize("kind", ["vit", "clip-vision", "siglip-vision"])
def test_features_are_those_of_the_encoder_with_interpolated_positions(kind):
    model = make_model(vision=kind)
    large, usual = torch.randn(2, 3, LARGE, LARGE), torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.no_grad():
        found, _ = model.model.encode("vision", pixel_values=large)
        encoder = model.model.vision_model
        expected = encoder(pixel_values=large, interpolate_pos_encoding=True).last_hidden_state
        assert torch.equal(found, expected)
        # Nothing changes at the usual size.
        assert torch.equal(model.model.encode("vision", pixel_values=usual)[0], encoder(usual).last_hidden_state)


def test_a_row_alone_answers_alike():
    model, batch = make_model(), with_size(make_batch(labels=False), LARGE, LARGE)
    with torch.no_grad():
        together = model(**batch).logits["topic"]
        alone = model(
            input_ids=batch["input_ids"][:1], attention_mask=batch["attention_mask"][:1],
            pixel_values=batch["pixel_values"][:2], image_index=torch.tensor([[0, 1]]),
        ).logits["topic"]  # fmt: skip
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-5)


class TestImageProcessor:
    @pytest.mark.parametrize(
        ("image_processor", "size"),
        [
            (ViTImageProcessor(size={"height": 32, "width": 32}), 48),
            (ViTImageProcessor(size={"height": 32, "width": 32}), (40, 48)),
            (CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}), 64),
            (CLIPImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}), (40, 64)),
            (ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8), 48),
            (ConvNextImageProcessor(size={"shortest_edge": 384}), 400),
        ],
    )
    @pytest.mark.parametrize("shape", [(20, 30), (300, 100)])
    def test_pictures_get_the_size(self, image_processor, size, shape):
        image_processor = type(image_processor)(**image_processor.to_dict())
        set_size(image_processor, size)
        pixels = image_processor(Image.new("RGB", shape), return_tensors="pt")["pixel_values"]
        height, width = (size, size) if isinstance(size, int) else size
        assert pixels.shape == (1, 3, height, width)
        assert size_of(image_processor) in (None, (height, width))

    @pytest.mark.parametrize("side", [{"a": 1}, 0, -1, 2.5, "32", True, None, [32]])
    def test_a_broken_size_is_none(self, side):
        image_processor = ViTImageProcessor()
        image_processor.size = {"height": 32, "width": side}
        assert size_of(image_processor) is None
        image_processor.size = {"height": side, "width": 32}
        assert size_of(image_processor) is None

    def test_the_cropped_rim_keeps_its_share(self):
        image_processor = CLIPImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
        set_size(image_processor, 448)
        assert image_processor.size["shortest_edge"] == 512

    @pytest.mark.parametrize("size", [0, -3, True, "48", (1, 2, 3), (48, 0.5)])
    def test_what_is_no_size(self, size):
        with pytest.raises(ValueError, match="image_size must be a whole number of pixels, or height and width"):
            set_size(ViTImageProcessor(), size)

    def test_sizes_that_cannot_be_replaced(self):
        with pytest.raises(ValueError, match="ConvNextImageProcessor.* has the size .*shortest_edge.* cannot replace"):
            set_size(ConvNextImageProcessor(size={"shortest_edge": 32}), (40, 48))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = save_encoders(tmp_path_factory.mktemp("encoders"))
    return {"text": str(folder / "text"), "vision": str(folder / "vision")}


class TestFromEncoders:
    def test_a_saved_model_keeps_it(self, encoders, tmp_path):
        processor = MMTransformerProcessor.from_encoders(**encoders, image_size=LARGE)
        model = MMTransformerForMultiTask.from_encoders(**encoders, tasks=make_tasks())
        assert processor(text=["a"], images=[make_image()])["pixel_values"].shape[-2:] == (LARGE, LARGE)
        MMDataCollator(processor, model.config)
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        pipe = pipeline("multimodal", model=str(tmp_path))
        assert size_of(pipe.processor.image_processor) == (LARGE, LARGE)
        with torch.no_grad():
            expected = model.decode(model(**processor(text=["a red dog"], images=[make_image()])))[0]
        found = pipe({"text": "a red dog", "image": make_image()}, tasks=["topic"])
        assert found["topic"] == pytest.approx(expected["topic"])

    def test_wrong_sizes_are_told(self, encoders):
        with pytest.raises(ValueError, match="image_size needs a vision encoder"):
            MMTransformerProcessor.from_encoders(encoders["text"], image_size=48)
        with pytest.raises(ValueError, match="larger than .*kept_image_pixels"):
            MMTransformerProcessor.from_encoders(**encoders, image_size=100_000)

    @pytest.mark.slow
    def test_a_recipe_trains_and_predicts(self, encoders, tmp_path):
        make_image(1).save(tmp_path / "1.png")
        rows = [{"text": f"row {i}", "image": "1.png", "topic": ["a", "b"][i % 2]} for i in range(8)]
        write_csv(tmp_path / "rows.csv", rows)
        recipe = {
            "data": {"train": "rows.csv", "validation": "rows.csv"}, "model": {**encoders, "image_size": LARGE},
            "tasks": [{"name": "topic", "kind": "classification"}],
            "training": {"output_dir": str(tmp_path / "out"), "max_steps": 1, "use_cpu": True, "report_to": "none"},
        }  # fmt: skip
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        mm("train", tmp_path / "recipe.yaml")
        processor = MMTransformerProcessor.from_pretrained(tmp_path / "out")
        assert size_of(processor.image_processor) == (LARGE, LARGE)
        mm("predict", tmp_path / "out", tmp_path / "rows.csv", "--output", tmp_path / "a.csv")


class TestEncodersOfOneSize:
    def test_are_told_before_the_first_batch(self):
        levit: LevitConfig = MAPPED_ENCODERS["levit"]()
        assert own_size(levit) == (64, 64)
        text = make_model().config.text_config
        config = MMTransformerConfig(text_config=text, vision_config=levit, tasks=make_tasks())
        message = r"\('levit'\) reads no pictures of 32 x 32 pixels, which .*: leave image_size at 64 x 64, or"
        with pytest.raises(ValueError, match=message):
            MMDataCollator(make_processor(), config)

    @pytest.mark.parametrize("kind", KINDS)
    def test_others_pass_without_memory_for_weights(self, kind):
        check_size(VISION_ENCODERS[kind](), ViTImageProcessor(size={"height": LARGE, "width": 64}))
