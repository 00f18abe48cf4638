"""Other tasks for a saved model: which heads are kept, which are new."""

import pytest
import torch
from cases import first_quickly
from tiny import SEQ2SEQ, VISION_ENCODERS, make_batch, make_model
from transformers import AutoModel

from mm_transformers import (
    Classification,
    Generation,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    Regression,
    Retrieval,
)
from mm_transformers.model.new_heads import check_same_heads


TOPIC = Classification("topic", labels=["animals", "food", "travel"])
STARS = Regression("stars")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make_model(tasks=[TOPIC, STARS], linear_probe=True).save_pretrained(folder)
    return folder


def same_head(a, b, name) -> bool:
    a, b = (getattr(model.heads, name).state_dict() for model in (a, b))
    return a.keys() == b.keys() and all(a[key].shape == b[key].shape and torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("load", first_quickly([AutoModel.from_pretrained, MMTransformerForMultiTask.from_pretrained]))
def test_a_task_is_added(folder, load, tmp_path, caplog):
    saved = MMTransformerForMultiTask.from_pretrained(folder)
    mood = Classification("mood", labels=["bad", "good"])
    model = load(folder, tasks=[*saved.tasks.values(), mood]).eval()
    assert list(model.tasks) == ["topic", "stars", "mood"]
    assert [task["name"] for task in model.config.tasks] == ["topic", "stars", "mood"]
    batch = make_batch(labels=False)
    with torch.no_grad():
        expected, found = saved.eval()(**batch).logits, model(**batch).logits
    assert torch.equal(found["topic"], expected["topic"])
    assert torch.equal(found["stars"], expected["stars"])
    assert found["mood"].shape == (len(found["topic"]), 2)
    assert found["mood"].isfinite().all()
    assert not model.heads.mood.probe.linear.weight.any()  # so that a linear start is possible
    model.save_pretrained(tmp_path)
    again = MMTransformerForMultiTask.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits["mood"], found["mood"])


@pytest.mark.parametrize(
    "changed",
    [
        Classification("topic", labels=["animals", "food"]),  # another shape
        Classification("topic", labels=["travel", "food", "animals"]),  # the same shape, another meaning
        Retrieval("topic", embedding_size=8),  # another kind
    ],
)
def test_a_task_that_has_changed_gets_a_new_head(folder, changed):
    saved = MMTransformerForMultiTask.from_pretrained(folder)
    model, info = MMTransformerForMultiTask.from_pretrained(folder, tasks=[changed, STARS], output_loading_info=True)
    assert model.tasks["topic"] == changed
    assert same_head(model, saved, "stars")
    assert not same_head(model, saved, "topic")
    assert isinstance(info, dict)


def test_options_of_the_loss_change_no_head(folder):
    saved = MMTransformerForMultiTask.from_pretrained(folder)
    topic = Classification("topic", labels=TOPIC.labels, loss_weight=0.5, column="other", class_weights={"food": 2.0})
    model = MMTransformerForMultiTask.from_pretrained(folder, tasks=[topic])
    assert same_head(model, saved, "topic")
    assert list(model.tasks) == ["topic"]
    assert model.config.tasks[0]["loss_weight"] == 0.5


@pytest.mark.parametrize("way", ["tasks", "config"])
def test_a_head_keeps_its_scale(way, tmp_path, caplog):
    """The weights of the head are those of the old scale: with another one all answers would be other numbers."""
    saved = make_model(tasks=[TOPIC, Regression("stars", scale=100.0)]).eval()
    saved.save_pretrained(tmp_path)
    tasks = [TOPIC, Regression("stars", loss_weight=0.5)]
    given = {"tasks": tasks} if way == "tasks" else {"config": MMTransformerConfig.from_pretrained(
        tmp_path, tasks=[task.to_dict() for task in tasks])}  # fmt: skip
    model = MMTransformerForMultiTask.from_pretrained(tmp_path, **given).eval()
    assert (model.tasks["stars"].scale, model.tasks["stars"].loss_weight) == (100.0, 0.5)
    batch = make_batch(labels=False)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits["stars"], saved(**batch).logits["stars"])
    assert "keeps the head of the saved model, and so its scale 100.0, not 1.0" in caplog.text
    with pytest.raises(ValueError, match="'stars' has scale 100.0 there, but scale 1.0 in this model"):
        check_same_heads(saved.tasks, {task.name: task for task in tasks}, "checkpoint-1")


def test_a_config_with_other_tasks_says_the_same(folder):
    config = MMTransformerConfig.from_pretrained(folder, tasks=[Classification("topic", labels=["c", "b", "a"])])
    saved = MMTransformerForMultiTask.from_pretrained(folder)
    assert not same_head(MMTransformerForMultiTask.from_pretrained(folder, config=config), saved, "topic")


def test_other_weights_that_do_not_fit_are_still_told(folder):
    config = MMTransformerConfig.from_pretrained(folder)
    config.text_config.intermediate_size *= 2
    with pytest.raises(ValueError, match="has the shape"):
        MMTransformerForMultiTask.from_pretrained(folder, config=config, tasks=[Regression("new")])


def test_what_cannot_be_added_is_told(folder, tmp_path):
    with pytest.raises(ValueError, match="writes text, but text_config .* has no decoder"):
        MMTransformerForMultiTask.from_pretrained(folder, tasks=[TOPIC, Generation("german")])
    with pytest.raises(ValueError, match="num_labels is not an option of the model"):
        MMTransformerForMultiTask.from_pretrained(folder, num_labels=5)
    config = MMTransformerConfig(
        text_config=SEQ2SEQ["bart"](), vision_config=VISION_ENCODERS["vit"](), num_fusion_layers=1,
        tasks=[TOPIC, Generation("german", decoder_start_ids=[2], max_length=8)],
    )  # fmt: skip
    MMTransformerForMultiTask(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The saved model has a decoder, so it must keep a task that writes"):
        MMTransformerForMultiTask.from_pretrained(tmp_path, tasks=[TOPIC])
    model = MMTransformerForMultiTask.from_pretrained(
        tmp_path, tasks=[STARS, Generation("french", decoder_start_ids=[2], max_length=8)]
    )
    assert list(model.tasks) == ["stars", "french"]


def test_other_options_of_the_config_may_be_given_too(folder, tmp_path):
    model = MMTransformerForMultiTask.from_pretrained(
        folder, tasks=[TOPIC, Regression("new")], classifier_dropout=0.25, dtype=torch.bfloat16
    )
    assert model.config.classifier_dropout == 0.25
    assert next(model.heads.new.parameters()).dtype == torch.bfloat16
    model = MMTransformerForMultiTask.from_pretrained(folder, config=str(folder), tasks=[Regression("new")])
    assert list(model.tasks) == ["new"]
    with pytest.raises(ValueError, match="needs the folder or the Hub id of a saved model"):
        MMTransformerForMultiTask.from_pretrained(
            None, config=model.config, state_dict=model.state_dict(), tasks=[Regression("new")]
        )
