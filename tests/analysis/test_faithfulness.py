"""Do explanations point at what decides, and is the answer lost with what they point at? On data where it is known."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import (
    FUSION_KINDS,
    TEXT_ENCODERS,
    VISION_ENCODERS,
    make_image_processor,
    make_model,
    make_tokenizer,
)

from mm_transformers import (
    Classification,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
)
from mm_transformers.analysis import explain, faithfulness
from mm_transformers.analysis.explaining.faithfulness import Faithfulness, _without
from mm_transformers.data.embedded import load_pointing_dataset


pytestmark = pytest.mark.usefixtures("without_shares")
COLORS = {"red": (220, 40, 40), "blue": (40, 40, 220)}
FILLERS = ["the", "on", "a", "is", "it"]
PATCH = 8


def make_rows(count: int, seed: int) -> list[dict]:
    """One patch of 16 may have a colour, which decides one task; one word of six may decide the other."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        pixels = rng.integers(100, 156, (32, 32, 3)).astype(np.uint8)
        color, animal = str(rng.choice([*COLORS, "none"])), str(rng.choice(["cat", "dog", "none"]))
        y, x = rng.integers(0, 4, 2) * PATCH
        if color != "none":
            pixels[y : y + PATCH, x : x + PATCH] = COLORS[color]
        words = list(rng.choice(FILLERS, 6))
        place = int(rng.integers(0, 6))
        if animal != "none":
            words[place] = animal
        rows.append({
            "text": " ".join(words), "image": Image.fromarray(pixels), "color": color, "animal": animal,
            "box": (x, y, x + PATCH, y + PATCH), "word": place,
        })  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def processor():
    return MMTransformerProcessor(make_image_processor(), make_tokenizer())


@pytest.fixture(scope="module", params=[*FUSION_KINDS, "cross_attention with probes"])
def model(request, processor):
    kind, _, has_probes = request.param.partition(" with ")
    labels = {"color": [*COLORS, "none"], "animal": ["cat", "dog", "none"]}
    tasks = [Classification(name, labels=names) for name, names in labels.items()]
    # The usual 0.02 is made for widths of 768.
    text, vision = TEXT_ENCODERS["bert"](), VISION_ENCODERS["vit"]()
    text.initializer_range = vision.initializer_range = 0.15
    config = MMTransformerConfig(
        text_config=text, vision_config=vision, tasks=tasks, fusion_type=kind, num_fusion_layers=1,
        num_fusion_attention_heads=4, initializer_range=0.15, linear_probe=bool(has_probes),
    )  # fmt: skip
    # From seed 0 the bottleneck learns to read the colour off all patches, so no patch is irrelevant to it.
    torch.manual_seed(1 if request.param == "bottleneck" else 0)
    model = MMTransformerForMultiTask(config).train()
    rows = make_rows(512, seed=0)
    inputs = processor(text=[row["text"] for row in rows], images=[row["image"] for row in rows])
    labels = {task.name: torch.tensor([task.labels.index(row[task.name]) for row in rows]) for task in tasks}
    probes = [p for name, p in model.named_parameters() if ".probe." in name]
    others = [p for name, p in model.named_parameters() if ".probe." not in name]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": probes, "lr": 0.1}], lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        chosen = torch.randperm(len(rows), generator=generator)[:64]
        batch = {name: inputs[name][chosen] for name in ("input_ids", "attention_mask", "pixel_values")}
        loss = model(**batch, labels={name: label[chosen] for name, label in labels.items()}).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def hit_rate(model, processor, rows, task, method) -> float:
    """How often the most relevant patch, or word, is the one that decides."""
    given = [{"text": row["text"], "image": row["image"]} for row in rows]
    hits = []
    for row, explanation in zip(rows, explain(model, processor, given, task, method), strict=True):
        if task == "color":
            x, y = explanation.images[0].peak()
            left, top, right, bottom = row["box"]
            hits.append(left <= x < right and top <= y < bottom)
        else:
            relevances = [word.relevance for word in explanation.words]
            hits.append(int(np.argmax(relevances)) == row["word"])
    return float(np.mean(hits))


@pytest.mark.slow
@pytest.mark.parametrize(("task", "chance"), [("color", 1 / 16), ("animal", 1 / 6)])
def test_chefer_points_at_what_decides(model, processor, task, chance):
    rows = [row for row in make_rows(96, seed=1) if row[task] != "none"]
    found = explain(model, processor, given(rows), task)
    assert np.mean([e.answer == row[task] for e, row in zip(found, rows, strict=True)]) > 0.95
    assert hit_rate(model, processor, rows, task, "chefer") > chance + 0.25
    assert hit_rate(model, processor, rows, task, "random") < chance + 0.15


@pytest.mark.slow
@pytest.mark.parametrize("task", ["color", "animal"])
def test_the_answer_goes_with_what_is_relevant(model, processor, task):
    modality = "vision" if task == "color" else "text"
    rows = given([row for row in make_rows(72, seed=2) if row[task] != "none"])
    found, floor = (
        faithfulness(model, processor, rows, task, method, modalities=[modality]) for method in ("chefer", "random")
    )
    assert found.positive_auc < floor.positive_auc - 0.05
    assert found.negative_auc > floor.negative_auc + 0.05
    assert found.positive[:, 0] == pytest.approx(found.negative[:, 0]), "nothing is gone at first"


def test_the_area_is_that_of_trapezoids_under_the_mean_curve():
    positive = np.array([[1.0, 0.5, 0.0], [0.8, 0.3, 0.2]])
    found = Faithfulness((0.0, 0.2, 1.0), positive, np.full((2, 3), 0.7))
    # The mean curve is 0.9, 0.4, 0.1.
    assert found.positive_auc == pytest.approx(0.65 * 0.2 + 0.25 * 0.8)
    assert found.negative_auc == pytest.approx(0.7)
    assert Faithfulness((0.2, 0.6), positive[:, :2], positive[:, :2]).positive_auc == pytest.approx(0.65)


def test_curves_are_the_probabilities_of_the_answers_to_the_changed_rows(processor):
    """In batches of two and one; against a pass over all rows without their most, or least, relevant parts."""
    model, rows = make_model(), given(make_rows(3, seed=5))
    found = faithfulness(model, processor, rows, "topic", shares=(0.0, 0.5), batch_size=2)
    explanations = explain(model, processor, rows, "topic")
    ids = [model.tasks["topic"].labels.index(explanation.answer) for explanation in explanations]
    inputs = dict(processor(text=[row["text"] for row in rows], images=[row["image"] for row in rows]))
    for first, curve in ((True, found.positive), (False, found.negative)):
        for place, share in enumerate(found.shares):
            changed = _without(inputs, explanations, share, first, ("text", "vision"))
            with torch.no_grad():
                expected = model(**changed).logits["topic"].softmax(-1)[range(3), ids]
            np.testing.assert_allclose(curve[:, place], expected, rtol=1e-4)
    with_text_alone = faithfulness(model, processor, rows, "topic", modalities=["text"], shares=(0.5,))
    changed = _without(inputs, explanations, 0.5, True, ("text",))
    assert torch.equal(changed["pixel_values"], inputs["pixel_values"])
    assert (with_text_alone.positive[:, 0] != found.positive[:, 1]).all()


def given(rows: list[dict]) -> list[dict]:
    return [{"text": row["text"], "image": row["image"]} for row in rows]


def test_integrated_gradients_sum_to_the_difference(processor):
    """Completeness: relevances sum to the score less that of the baseline, up to the steps of the sum."""
    pytest.importorskip("captum")
    model = make_model(num_fusion_layers=1)
    row = given(make_rows(1, seed=3))[0]
    explanation = explain(model, processor, row, "topic", "integrated_gradients")
    inputs = processor(text=[row["text"]], images=[row["image"]])
    tokenizer = processor.tokenizer
    special = torch.isin(inputs["input_ids"], torch.tensor(tokenizer.all_special_ids))
    blank = {
        **inputs,
        "input_ids": torch.where(special, inputs["input_ids"], tokenizer.pad_token_id),
        "pixel_values": torch.zeros_like(inputs["pixel_values"]),
    }
    with torch.no_grad():
        label = model.tasks["topic"].labels.index(explanation.answer)
        full, empty = (model(**x).logits["topic"][0, label].item() for x in (inputs, blank))
    total = sum(token.relevance for token in explanation.tokens) + explanation.images[0].patches.sum()
    assert total == pytest.approx(full - empty, rel=0.02, abs=1e-4)


def test_integrated_gradients_of_several_pictures_words_and_batches(processor):
    pytest.importorskip("captum")
    model = make_model()
    rows = [
        {"text": "a cat", "image": [row["image"] for row in make_rows(2, seed=4)]},
        {"text": "it is the dog on a mat"},
        {"image": make_rows(1, seed=5)[0]["image"]},
    ]
    together = explain(model, processor, rows, "topic", "integrated_gradients")
    for row, found in zip(rows, together, strict=True):
        alone = explain(model, processor, row, "topic", "integrated_gradients")
        assert [t.relevance for t in found.tokens] == pytest.approx([t.relevance for t in alone.tokens], abs=1e-4)
        for one, other in zip(found.images, alone.images, strict=True):
            np.testing.assert_allclose(one.patches, other.patches, atol=1e-4)
    assert [len(found.images) for found in together] == [2, 0, 1]


def test_what_is_taken_away_is_what_was_asked(processor):
    model, rows = make_model(), given(make_rows(3, seed=6))
    explanations = explain(model, processor, rows, "topic")
    inputs = dict(processor(text=[row["text"] for row in rows], images=[row["image"] for row in rows]))
    for share in (0.0, 0.25, 0.5):
        most, least = (_without(inputs, explanations, share, first, ("text", "vision")) for first in (True, False))
        for changed, first in ((most, True), (least, False)):
            for i, explanation in enumerate(explanations):
                places = inputs["attention_mask"][i].nonzero()[:, 0].tolist()
                own = [(t.relevance, p) for t, p in zip(explanation.tokens, places, strict=True) if t.start < t.end]
                gone = [r for r, p in own if changed["attention_mask"][i, p] == 0]
                kept = [r for r, p in own if changed["attention_mask"][i, p] == 1]
                assert len(gone) == round(share * len(own))
                if gone and kept:
                    assert (min(gone) >= max(kept)) if first else (max(gone) <= min(kept))
                differs = (changed["pixel_values"][i] != inputs["pixel_values"][i]).any(0)
                patches = differs.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).flatten(2).any(-1)
                assert patches.sum() == round(share * 16)
    with pytest.raises(ValueError, match="chooses one label"):
        faithfulness(model, processor, rows, "score")


def test_the_pointing_data_hide_each_picture_in_a_quarter():
    data = load_pointing_dataset(train_size=24, validation_size=8, test_size=16)
    again = load_pointing_dataset(train_size=24, validation_size=8, test_size=16)
    corners = set()
    for row, other in zip(data["train"], again["train"], strict=True):
        assert row["image"].tobytes() == other["image"].tobytes()
        left, top, right, bottom = row["box"]
        assert (right - left, bottom - top) == (32, 32)
        corners.add((left, top))
        for task in ("topic", "sentiment"):
            if row[f"{task}_word"]:
                word = row["text"][slice(*row[f"{task}_word"])]
                assert word.isalpha()
        assert row["topic_word"], "every message has one ambiguous word"
    assert corners == {(0, 0), (32, 0), (0, 32), (32, 32)}
