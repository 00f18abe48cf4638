"""Whether the right text is likelier than the wrong one: against perplexities counted by hand."""

import math

import datasets
import pytest
import torch
from tiny import SEQ2SEQ, VISION_ENCODERS, make_image, make_processor, open_gates
from transformers.modeling_outputs import BaseModelOutput

from mm_transformers import (
    Classification,
    Generation,
    MMDataCollator,
    MMTransformerConfig,
    MMTransformerForMultiTask,
)
from mm_transformers.analysis.contrastive import contrastive_accuracy
from mm_transformers.data.embedded import GRID, TRANSLATIONS, other_senses


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tasks = [Generation("german", max_length=9), Classification("topic", labels=["a", "b"])]
    config = MMTransformerConfig(
        text_config=SEQ2SEQ["bart"](), vision_config=VISION_ENCODERS["vit"](), tasks=tasks, num_fusion_layers=1
    )
    model = MMTransformerForMultiTask(config).eval()
    open_gates(model)
    return model


ROWS = [
    {"text": f"the {word} is lovely", "german": right, "image": make_image(i) if i % 3 else None}
    for i, (word, right) in enumerate(
        [("cat", "dog"), ("dog", "red cat"), ("sun", "rain"), ("rain", "sun in rain"), ("bat", "bat"), ("crane", "red")]
    )
]
WRONG = ["cat", "dog", "river river", "rain", "bat", "small crane"]


def log_perplexity(model, row: dict, text: str) -> float:
    """One token after the other."""
    processor = make_processor()
    inputs = processor(text=[row["text"]], images=[row["image"]])
    ids = [*processor.tokenizer(text, add_special_tokens=False)["input_ids"], processor.tokenizer.sep_token_id]
    said, total = [2], 0.0  # BART starts with its end
    with torch.no_grad():
        states = model.model(**inputs)
        for token in ids:
            logits = model.model.text_model(
                encoder_outputs=BaseModelOutput(last_hidden_state=states.last_hidden_state),
                attention_mask=inputs["attention_mask"], decoder_input_ids=torch.tensor([said]),
            ).logits[0, -1]  # fmt: skip
            total -= logits.log_softmax(-1)[token].item()
            said.append(token)
    return total / len(ids)


def test_as_counted_by_hand(model):
    collator = MMDataCollator(make_processor(), model.config)
    outcomes = []
    for row, wrong in zip(ROWS, WRONG, strict=True):
        right_one, wrong_one = (log_perplexity(model, row, text) for text in (row["german"], wrong))
        outcomes.append(0.5 if row["german"] == wrong else float(right_one < wrong_one))
    assert 0.5 in outcomes and {0.0, 1.0} <= set(outcomes)  # noqa: PT018
    for batch_size in (1, 4, 6):
        found = contrastive_accuracy(model, collator, ROWS, "german", WRONG, batch_size=batch_size)
        assert found == pytest.approx(sum(outcomes) / 6)
    columns = {name: [row[name] for row in ROWS] for name in ("text", "german", "image")}
    features = datasets.Features(text=datasets.Value("string"), german=datasets.Value("string"), image=datasets.Image())
    data = datasets.Dataset.from_dict(columns, features=features)
    assert contrastive_accuracy(model, collator, data, "german", WRONG) == pytest.approx(sum(outcomes) / 6)


def test_what_does_not_look_has_one_half(model):
    """Each text is there with either answer as the right one."""
    collator = MMDataCollator(make_processor(), model.config)
    texts = [f"the {word} is red" for word in ("cat", "dog", "sun")]
    rows = [{"text": t, "image": None, "german": answer} for t in texts for answer in ("bat", "river in rain")]
    wrong = ["river in rain", "bat"] * 3
    assert contrastive_accuracy(model, collator, rows, "german", wrong) == 0.5


def test_clear_errors(model):
    collator = MMDataCollator(make_processor(), model.config)
    with pytest.raises(ValueError, match="task must be the name of a task that writes text, but is 'topic'"):
        contrastive_accuracy(model, collator, ROWS, "topic", WRONG)
    with pytest.raises(ValueError, match="one wrong text per row, but there are 2 for 6 rows"):
        contrastive_accuracy(model, collator, ROWS, "german", WRONG[:2])
    rows = [*ROWS[:3], {**ROWS[3], "german": None}]
    with pytest.raises(ValueError, match="Row 3 has no text for task 'german'"):
        contrastive_accuracy(model, collator, rows, "german", WRONG[:4], batch_size=3)


def test_the_other_sense():
    for language in TRANSLATIONS:
        texts = [f"Have you seen the {cell.word}?" for cell in GRID]
        answers = [cell.labels[language] for cell in GRID]
        others = other_senses(texts, answers, language)
        for cell, other in zip(GRID, others, strict=True):
            twin = next(c for c in GRID if (c.word, c.intent) == (cell.word, cell.intent) and c.place != cell.place)
            assert other == twin.labels[language]
    assert other_senses(["the crane"], ["C'est la grue."], "french") == ["C'est la grue."]
    assert math.isclose(sum(a == b for a, b in zip(answers, others, strict=True)) / len(GRID), 1 / 12)
