"""What each modality is good for, against rows that were emptied and exchanged by hand."""

import math
from collections import Counter

import pytest
import torch
from test_trainer import make_args, make_dataset, make_rows
from tiny import make_model, make_processor

from mm_transformers import MMDataCollator, MMTrainer
from mm_transformers.analysis.ablation import ablate


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    return MMTrainer(make_model(seed=2), make_args(tmp_path_factory.mktemp("out")), processing_class=make_processor())


def accuracy_by_hand(model, rows: list[dict], task: str) -> float:
    """Each row alone, by the model itself."""
    collator = MMDataCollator(make_processor(), model.config)
    right = []
    for row in rows:
        if row[task] is None:
            continue
        batch = collator([row])
        labels = batch.pop("labels")[task]
        with torch.no_grad():
            right.append((model(**batch).logits[task].argmax(-1) == labels).item())
    return sum(right) / len(right)


def test_variants_are_what_they_are_called(trainer):
    rows = make_rows(24)
    ablation = ablate(trainer, make_dataset(24), seed=5)
    assert list(ablation.variants) == ["all", "text only", "image only", "image shuffled"]
    model = trainer.model
    for task in ("topic", "sentiment"):
        by_hand = {
            "all": rows,
            "text only": [{**row, "image": None} for row in rows],
            "image only": [{**row, "text": None, "entities": None} for row in rows if row["image"] is not None],
        }
        for variant, changed in by_hand.items():
            found = ablation.variants[variant][f"{task}_accuracy"]
            assert found == pytest.approx(accuracy_by_hand(model, changed, task)), (variant, task)
    # Words are gone with the text.
    assert "entities_accuracy" in ablation.variants["text only"]
    assert "entities_accuracy" not in ablation.variants["image only"]


def test_exchanged_pictures_go_round_once():
    from mm_transformers.analysis.ablation import _exchanged

    rows = make_dataset(24)
    for seed in range(5):
        moved = _exchanged(rows, ["image"], seed)
        assert moved.remove_columns("image")[:] == rows.remove_columns("image")[:]
        before, after = ([cell and cell.tobytes() for cell in data["image"]] for data in (rows, moved))
        assert [cell is None for cell in after] == [cell is None for cell in before]
        assert Counter(after) == Counter(before)
    numbered = rows.remove_columns("image").add_column("image", [None if i % 3 == 0 else f"{i}.png" for i in range(24)])
    moved = _exchanged(numbered, ["image"], 0)["image"]
    follows = {own: other for own, other in zip(numbered["image"], moved, strict=True) if own is not None}
    walked, place = [], "1.png"
    while place not in walked:
        walked.append(place)
        place = follows[place]
    assert len(walked) == 16, "one cycle through all, so none keeps its own"


def test_majority_table_and_log(trainer):
    rows, before = make_dataset(24), list(trainer.state.log_history)
    ablation = ablate(trainer, rows)
    assert trainer.state.log_history == before
    known = [label for label in rows["topic"] if label is not None]
    assert ablation.majority["topic"] == Counter(known).most_common(1)[0][1] / len(known)
    lines = ablation.to_markdown().splitlines()
    assert lines[0] == "| task | metric | all | text only | image only | image shuffled | majority class |"
    topic = next(line for line in lines if line.startswith("| topic |"))
    assert f"| {ablation.variants['all']['topic_accuracy']:.3f} |" in topic
    values = ablation.to_dict()["variants"]["all"]
    assert all(math.isfinite(value) for value in values.values())


def test_what_cannot_be_ablated_is_told(trainer, tmp_path):
    with pytest.raises(ValueError, match=r"datasets\.Dataset"):
        ablate(trainer, make_rows(4))
    with pytest.raises(ValueError, match="nothing to leave out"):
        ablate(trainer, make_dataset(4).remove_columns("image"))
