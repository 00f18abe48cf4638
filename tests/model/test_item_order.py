"""Images and clips of one row have an order: "the left one", "before and after"."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FUSION_KINDS, IMAGE_SIZE, make_batch, make_config, make_model, make_processor
from torch import nn

from mm_transformers import Classification, MMTransformerConfig, MMTransformerForMultiTask
from mm_transformers.model.fusion_base import Stream
from mm_transformers.model.streams import ItemOrder


LEFT = [Classification("left", labels=["dark", "light"])]


def with_order(**kwargs):
    """A model as it is after training: the order has some effect."""
    model = make_model(item_order=True, initializer_range=0.5, **kwargs)
    torch.manual_seed(7)
    for name in model.config.modalities:
        nn.init.normal_(getattr(model.model, f"{name}_order").weight, std=0.2)
    return model


def logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([value.flatten() for value in model(**batch).logits.values()])


def rows_of_two_pictures(num_rows=8):
    """A dark and a light picture per row; which is the left one is all that rows differ in."""
    generator = torch.Generator().manual_seed(0)
    pixels = 0.1 * torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    pixels = pixels + torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1)
    left = torch.arange(num_rows) % 2
    return {
        "input_ids": torch.full((num_rows, 3), 7),
        "attention_mask": torch.ones(num_rows, 3, dtype=torch.int64),
        "pixel_values": pixels,
        "image_index": torch.stack([left, 1 - left], 1),
        "labels": {"left": left},
    }


def trained(fusion: str, item_order: bool):
    torch.manual_seed(0)
    config = make_config(
        fusion_type=fusion, item_order=item_order, tasks=LEFT, num_fusion_layers=1, fusion_dropout=0.0,
        classifier_dropout=0.0, freeze=["text", "vision"], initializer_range=0.3,
    )  # fmt: skip
    model = MMTransformerForMultiTask(config).train()
    batch = rows_of_two_pictures()
    with torch.no_grad():  # the encoders are frozen, so once is enough
        model.eval()
        texts = {name: batch.pop(name) for name in ("input_ids", "attention_mask")}
        batch["text_features"], _ = model.model.encode("text", **texts)
        batch["image_features"], _ = model.model.encode("vision", pixel_values=batch.pop("pixel_values"))
        model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        answers = model(**batch).logits["left"].argmax(-1)
    return (answers == batch["labels"]["left"]).float().mean().item(), model, batch


@pytest.mark.slow
@pytest.mark.parametrize(
    "fusion",
    [
        kind if kind in ("cross_attention", "late") else pytest.param(kind, marks=pytest.mark.nightly)
        for kind in FUSION_KINDS
    ],
)
def test_which_picture_is_the_left_one_can_be_learnt(fusion):
    accuracy, model, batch = trained(fusion, item_order=True)
    assert accuracy == 1.0
    swapped = {**batch, "image_index": batch["image_index"].flip(1)}
    with torch.no_grad():
        assert torch.equal(model(**swapped).logits["left"].argmax(-1), 1 - batch["labels"]["left"])


def test_without_an_order_it_cannot():
    accuracy, *_ = trained("merged", item_order=False)
    assert accuracy == 0.5


@pytest.mark.parametrize("fusion", FUSION_KINDS)
def test_a_new_model_answers_as_one_without_an_order(fusion):
    batch = make_batch(labels=False)
    plain, ordered = make_model(fusion_type=fusion), make_model(fusion_type=fusion, item_order=True)
    assert set(ordered.state_dict()) - set(plain.state_dict()) == {"model.vision_order.weight"}
    torch.testing.assert_close(logits(ordered, batch), logits(plain, batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fusion", FUSION_KINDS)
def test_it_has_a_gradient_from_the_first_step(fusion):
    model = make_model(fusion_type=fusion, item_order=True).train()
    model(**make_batch()).loss.backward()
    gradient = model.model.vision_order.weight.grad
    assert (gradient[0] != 0).any()
    if fusion != "late":  # an average of shifted tokens is shifted as much, which the norm of the layer may hide
        assert (gradient[1] != 0).any()


@pytest.mark.parametrize("fusion", FUSION_KINDS)
def test_swapping_changes_the_answer_of_that_row_only(fusion):
    model = with_order(fusion_type=fusion, tasks=LEFT)
    rows = make_batch(image_index=((0, 1), (2, -1), (-1, -1), (1, 2)), labels=False)
    swapped = {**rows, "image_index": torch.tensor([[1, 0], [2, -1], [-1, -1], [1, 2]])}
    with torch.no_grad():
        first, second = model(**rows).logits["left"], model(**swapped).logits["left"]
    assert (first[0] - second[0]).abs().max() > 1e-3
    torch.testing.assert_close(first[1:], second[1:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("fusion", FUSION_KINDS)
def test_padding_of_the_index_means_nothing(fusion):
    """A row alone, beside rows with more pictures, and with its padding before or between its pictures."""
    model = with_order(fusion_type=fusion, tasks=LEFT)
    batch = make_batch(image_index=((2, 0), (1, -1), (-1, -1), (0, -1)), labels=False)
    wider = torch.tensor([[-1, 2, -1, 0], [-1, -1, -1, 1], [-1, -1, -1, -1], [0, -1, -1, -1]])
    with torch.no_grad():
        expected = model(**batch).logits["left"]
        torch.testing.assert_close(
            model(**{**batch, "image_index": wider}).logits["left"], expected, rtol=1e-5, atol=5e-5
        )
        for row in range(4):
            alone = {name: value[row : row + 1] for name, value in batch.items() if name != "pixel_values"}
            alone["image_index"] = alone["image_index"][:, : (1 if row else 2)]
            answer = model(**alone, pixel_values=batch["pixel_values"]).logits["left"][0]
            torch.testing.assert_close(answer, expected[row], rtol=1e-5, atol=5e-5)


@given(st.lists(st.lists(st.sampled_from([-1, 0, 1, 2]), min_size=5, max_size=5), min_size=1, max_size=4), st.randoms())
@settings(deadline=None, max_examples=30)
def test_places_as_counted_by_hand(rows, random):
    torch.manual_seed(random.randint(0, 99))
    order = ItemOrder(6).double()
    nn.init.normal_(order.weight)
    tokens = torch.randn(3, 4, 6, dtype=torch.float64)
    _, scales, offsets = order(torch.tensor(rows), tokens)
    stream = Stream("vision", tokens, None, torch.tensor(rows), offsets, scales=scales)
    for row, items in enumerate(rows):
        place = 0
        for column, item in enumerate(items):
            if item < 0:
                continue
            waves = [256 ** (-i / 15) * place for i in range(16)]
            waves = torch.tensor(waves, dtype=torch.float32)
            features = torch.cat([waves.sin(), waves.cos() - 1]).double()
            expected = tokens[item] * (1 + features @ order.weight[0]) + features @ order.weight[1]
            shown = stream.hidden_states[row, 4 * column : 4 * column + 4]
            torch.testing.assert_close(shown, expected, rtol=1e-5, atol=1e-5)
            place += 1


def test_any_number_of_pictures_has_an_order():
    order = ItemOrder(8)
    nn.init.normal_(order.weight)
    _, scales, offsets = order(torch.zeros(1, 500, dtype=torch.int64), torch.zeros(1, 1, 8))
    vectors = torch.cat([scales, offsets], -1)[0]
    distances = torch.cdist(vectors, vectors) + 10 * torch.eye(500)
    assert distances.min() > 1e-3
    assert (vectors[0] == 0).all()


def test_clips_and_frames_have_one_too():
    model = with_order(audio="wav2vec2", tasks=LEFT)
    torch.manual_seed(0)
    batch = {
        **make_batch(image_index=((0, 1), (2, 0), (1, 2), (0, 2)), labels=False),
        "input_values": torch.randn(2, 800),
        "audio_index": torch.tensor([[0, 1], [-1, -1], [1, -1], [0, -1]]),
    }
    swapped = {**batch, "audio_index": torch.tensor([[1, 0], [-1, -1], [1, -1], [0, -1]])}
    difference = (logits(model, batch) - logits(model, swapped)).view(4, 2).abs().amax(1)
    assert difference[0] > 1e-4
    assert difference[1:].max() < 1e-6
    frames = {**batch, "frame_index": torch.tensor([[0, 1], [0, 1], [0, 1], [0, 1]])}
    back = {**frames, "image_index": frames["image_index"].flip(1)}
    assert ((logits(model, frames) - logits(model, back)).view(4, 2).abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize("index", [((0, 1), (1, -1), (-1, -1), (2, 0)), ((0,), (1,), (-1,), (2,)), ((-1,),) * 4])
def test_it_takes_part_in_every_step(index):
    """So that DDP finds the same parameters in every process."""
    model = make_model(audio="wav2vec2", item_order=True, gates_open=False).train()
    model(**make_batch(image_index=index)).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("options", [{}, {"vision_token_reduction": {"kind": "merge", "num_tokens": 4}}])
def test_features_of_images_have_the_same_order(options):
    model = with_order(tasks=LEFT, **options)
    batch = make_batch(labels=False)
    with torch.no_grad():
        features, _ = model.model.encode("vision", pixel_values=batch["pixel_values"])
    cached = {**batch, "image_features": features}
    cached.pop("pixel_values")
    torch.testing.assert_close(logits(model, cached), logits(model, batch), rtol=0, atol=1e-6)


def test_adapters_train_and_save_it(tmp_path):
    peft = pytest.importorskip("peft")
    base = with_order(audio="wav2vec2", tasks=LEFT)
    state = copy.deepcopy(base.state_dict())
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=base.new_modules)
    model = peft.get_peft_model(base, config).train()
    batch = {**make_batch(), "labels": {"left": torch.tensor([0, 1, 0, 1])}}
    model(**batch).loss.backward()
    trained = [name for name, p in model.named_parameters() if "vision_order" in name and p.requires_grad]
    assert len(trained) == 1
    parameter = model.get_parameter(trained[0])
    assert (parameter.grad != 0).any()
    with torch.no_grad():
        parameter.add_(parameter.grad, alpha=-1.0)
    model.eval().save_pretrained(tmp_path)
    fresh = make_model(audio="wav2vec2", tasks=LEFT, item_order=True)
    fresh.load_state_dict(state)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path)
    del batch["labels"]
    torch.testing.assert_close(logits(again, batch), logits(model, batch))


def test_it_is_saved_and_an_old_config_has_none(tmp_path):
    model = with_order(tasks=LEFT)
    model.save_pretrained(tmp_path / "new")
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path / "new")
    batch = make_batch(labels=False)
    assert torch.equal(logits(loaded, batch), logits(model, batch))
    old = make_model(tasks=LEFT)
    old.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "config.json"
    values = json.loads(file.read_text())
    del values["item_order"]
    file.write_text(json.dumps(values))
    assert not hasattr(MMTransformerForMultiTask.from_pretrained(tmp_path / "old").model, "vision_order")
    assert MMTransformerConfig.from_pretrained(tmp_path / "old").item_order is False


def test_models_with_pretrained_encoders_have_an_order(tmp_path):
    parts = make_model().model
    parts.text_model.save_pretrained(tmp_path / "text")
    parts.vision_model.save_pretrained(tmp_path / "vision")
    make_processor().tokenizer.save_pretrained(tmp_path / "text")
    model = MMTransformerForMultiTask.from_encoders(
        text=str(tmp_path / "text"), vision=str(tmp_path / "vision"), tasks=LEFT
    )
    assert (model.model.vision_order.weight == 0).all()
    assert "vision_order" in model.new_modules
    alone = MMTransformerForMultiTask.from_encoders(text=str(tmp_path / "text"), tasks=copy.deepcopy(LEFT))
    assert not alone.config.item_order
