"""The model card: it is true, its example runs, the Hub can read it, and what a person wrote stays."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rows import make_args, make_dataset
from tiny import SEQ2SEQ, make_model, make_processor
from transformers import pipeline

from mm_transformers import (
    Generation,
    MMTrainer,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    Regression,
    TableConfig,
)
from mm_transformers.training.card.card_file import write_card
from mm_transformers.training.card.facts import CardFacts, Measurement, _duration
from mm_transformers.training.card.manual_edits import (
    add_memory,
    fingerprint,
    join_sections,
    merge,
    split_sections,
    take_memory,
)
from mm_transformers.training.card.sections import sections_of as every_section


def train(folder: Path, **kwargs) -> MMTrainer:
    args = make_args(folder, **{"eval_strategy": "steps", "eval_steps": 2, **kwargs})
    rows = make_dataset(8)
    trainer = MMTrainer(
        make_model(), args, train_dataset=rows, eval_dataset=rows, processing_class=make_processor()
    )  # fmt: skip
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "my-model"
    trainer = train(folder)
    trainer.metrics_of_test = trainer.evaluate(make_dataset(12), metric_key_prefix="test")
    trainer.save_model()
    return trainer


@pytest.fixture
def card(trained):
    path = Path(trained.args.output_dir, "README.md")
    path.unlink(missing_ok=True)
    trained.create_model_card()
    return path


def sections_of(path: Path) -> dict[str, str]:
    return split_sections(take_memory(ModelCard.load(path).text)[0])


# What it says


@pytest.mark.slow
def test_results_are_those_that_were_measured_on_the_weights_that_are_saved(trained, card):
    results = ModelCard.load(card).data.eval_results
    wanted = {
        name.removeprefix("test_").replace("_", " ", 1): value
        for name, value in trained.metrics_of_test.items()
        if re.match(r"test_(topic|sentiment|tags|score|entities)_(?!loss)", name)
    }
    assert {r.metric_name: r.metric_value for r in results if r.dataset_split == "test"} == wanted
    # Step 2 was measured too, but those weights are not saved.
    last = next(logs for logs in trained.state.log_history if logs["step"] == 3 and "eval_loss" in logs)
    found = {r.metric_name: r.metric_value for r in results if r.dataset_split == "eval"}
    assert found["score mae"] == last["eval_score_mae"]
    assert {result.dataset_split for result in results} == {"test", "eval"}
    for name, value in wanted.items():
        task, metric = name.split(" ", 1)
        line = next(
            line for line in sections_of(card)["## Results"].splitlines() if line.startswith(f"| {task} | {metric} |")
        )
        assert line.endswith(f" {value:.4g} |")


@pytest.mark.slow
def test_the_best_checkpoint_is_what_counts(tmp_path):
    trainer = train(
        tmp_path / "m", max_steps=4, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="loss", learning_rate=5.0,
    )  # fmt: skip
    assert trainer.state.best_global_step == 2
    trainer.create_model_card()
    best = next(logs for logs in trainer.state.log_history if logs["step"] == 2 and "eval_loss" in logs)
    found = {
        result.metric_name: result.metric_value
        for result in ModelCard.load(tmp_path / "m" / "README.md").data.eval_results
    }
    assert found["score mae"] == best["eval_score_mae"]


def test_tasks_training_and_nothing_of_this_machine(trained, card):
    text, sections = card.read_text(), sections_of(card)
    assert "| topic | classification | animals, food, travel |" in sections["## Tasks"]
    assert "| steps | 3 |" in sections["## Training"]
    assert "| learning rate | 0.01 |" in sections["## Training"]
    seconds = next(logs["train_runtime"] for logs in trained.state.log_history if "train_runtime" in logs)
    assert f"| time | {round(seconds)} s |" in sections["## Training"]
    assert "| text | bert |" in sections["## Encoders"]
    assert sections["## Limits"]
    assert str(Path(trained.args.output_dir).parent) not in text
    assert str(Path.home()) + "/" not in text
    data = ModelCard.load(card).data
    assert data.library_name == "transformers"
    assert {"mm_transformers", "image"} <= set(data.tags)
    assert data.get("license") is None
    assert data.get("language") is None
    assert data.get("datasets") is None


@pytest.mark.slow
def test_the_example_runs(trained, card, tmp_path):
    """As a reader would run it, beside the model's folder, and without the package too."""
    code = re.search(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[1]
    assert 'model="my-model"' in code
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=card.parent.parent, capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = eval(done.stdout)
    assert set(answer) == {"topic", "sentiment", "tags", "score", "entities"}
    assert answer["topic"]["label"] in ("animals", "food", "travel")


def test_encoders_and_several_base_models():
    text_config = SEQ2SEQ["marian"]()
    text_config._name_or_path = "Helsinki-NLP/opus-mt-en-de"
    config = MMTransformerConfig(
        text_config=text_config,
        vision_config={"model_type": "vit", "_name_or_path": "google/vit-base-patch16-224-in21k"},
        tasks=[Generation("german", max_length=8)],
    )
    facts = CardFacts("me/model", config, encoder_licenses={"google/vit-base-patch16-224-in21k": "apache-2.0"})
    from mm_transformers.training.card.metadata import entries_of
    from mm_transformers.training.card.sections import sections_of as sections_from

    shown = sections_from(facts)["## Encoders"]
    assert "https://huggingface.co/Helsinki-NLP/opus-mt-en-de" in shown
    assert shown.count("apache-2.0") == 1
    entries = entries_of(facts)
    assert entries["base_model Helsinki-NLP/opus-mt-en-de"] == "Helsinki-NLP/opus-mt-en-de"
    assert entries["base_model_relation"] == "finetune"
    assert entries["pipeline_tag"] == "translation"


LICENSES = """
import time
from transformers import ViTConfig
from mm_transformers import MMTransformerConfig
from mm_transformers.training.card.card_file import licenses_of
vision = ViTConfig()
vision._name_or_path = "google/vit-base-patch16-224-in21k"
print(licenses_of(MMTransformerConfig(vision_config=vision)))
"""


@pytest.mark.slow
def test_a_hub_that_does_not_answer_costs_no_card():
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", LICENSES], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{}"


# What a person wrote


def test_what_a_person_wrote_stays(trained, card):
    text = card.read_text()
    text = text.replace("## Tasks", "## Who we are\n\nTwo people.\n\n## Tasks", 1)
    text = re.sub(r"## Limits\n.*?(?=\n<!--)", "## Limits\n\nDo not use it at all.\n", text, flags=re.DOTALL)
    text = re.sub(r"## Encoders\n.*?(?=## Results)", "", text, flags=re.DOTALL)
    text = text.replace("- multi-task\n", "- ours\n").replace("library_name: transformers", "library_name: ours")
    card.write_text(text)
    for _ in range(2):
        trained.create_model_card(license="mit")
        sections, data = sections_of(card), ModelCard.load(card).data
        assert sections["## Who we are"] == "Two people."
        assert sections["## Limits"] == "Do not use it at all."
        assert "## Encoders" not in sections
        assert "| steps | 3 |" in sections["## Training"]
        assert list(sections)[:4] == ["", "## Use", "## Who we are", "## Tasks"]
        assert "ours" in data.tags
        assert "multi-task" not in data.tags
        assert data.library_name == "ours"
        assert data.license == "mit"
    trained.create_model_card()
    assert ModelCard.load(card).data.license == "mit", "said once, it stays"


def test_a_later_measurement_renews_its_own_and_leaves_the_rest(trained, card):
    config = trained.model.config
    before = ModelCard.load(card).data.eval_results
    facts = CardFacts("my-model", config, [Measurement("test", {"topic_accuracy": 0.125})], ablation="| a |\n| --- |")
    write_card(card.parent, facts)
    sections, results = sections_of(card), ModelCard.load(card).data.eval_results
    assert sections["## Training"], "what only the trainer knew"
    assert sections["## What each modality is good for"] == "| a |\n| --- |"
    found = {result.metric_name: result.metric_value for result in results}
    assert found == {**{r.metric_name: r.metric_value for r in before}, "topic accuracy": 0.125}


@pytest.mark.slow
def test_numbers_of_another_training_go(trained, card, tmp_path):
    other = train(tmp_path / "other", max_steps=1, eval_strategy="no")
    (tmp_path / "other" / "README.md").write_text(card.read_text())
    other.create_model_card()
    data = ModelCard.load(tmp_path / "other" / "README.md").data
    assert not data.eval_results, "step 1 was not measured"
    assert "## Results" not in sections_of(tmp_path / "other" / "README.md")
    assert "| steps | 1 |" in sections_of(tmp_path / "other" / "README.md")["## Training"]


def test_a_card_that_was_there_before_is_kept(trained, card):
    card.write_text("---\nlicense: cc0-1.0\ntags: [mine]\n---\n\n# Mine\n\nHello.\n\n## Use\n\nAs you like.\n")
    trained.create_model_card()
    sections, data = sections_of(card), ModelCard.load(card).data
    assert sections[""] == "# Mine\n\nHello."
    assert sections["## Use"] == "As you like."
    assert "## Results" in sections
    assert data.license == "cc0-1.0"
    assert "mine" in data.tags
    card.write_text("---\nlicense: [\n---\n\n# Mine\n")
    with pytest.raises(ValueError, match="front matter"):
        trained.create_model_card()
    assert card.read_text() == "---\nlicense: [\n---\n\n# Mine\n", "nothing is lost"


names = st.sampled_from([f"## {letter}" for letter in "ABCDEF"])
texts = st.sampled_from(["one", "two", "three"])


@given(st.dictionaries(names, texts), st.dictionaries(names, texts), st.dictionaries(names, texts), st.data())
def test_merging_never_loses_what_a_person_did(first, second, edits, data):
    """Written, edited (changed, added, removed), written again: against the rule, entry by entry."""
    card, memory = merge({}, first, {})
    assert card == first
    removed = data.draw(st.sets(st.sampled_from(sorted(first)))) if first else set()
    edited = {name: value for name, value in {**card, **edits}.items() if name not in removed}
    again, memory = merge(edited, second, memory)
    for name in {*first, *second, *edited}:
        untouched = name in first and edited.get(name) == first[name]
        if name in first and name not in edited:
            assert name not in again, "removed"
        elif name in edited and not untouched:
            assert again[name] == edited[name], "a person's"
        else:
            assert again.get(name) == second.get(name), "ours"
    assert merge(again, second, memory)[0] == again, "written again, nothing changes"


bodies = st.sampled_from(["x", "```\n## no\n```", "### h\ny"])


@given(st.dictionaries(st.sampled_from(["", "## A", "## B", "## C"]), bodies))
@settings(max_examples=50)
def test_sections_and_memory_survive_the_file(sections):
    sections = dict(sorted(sections.items()))
    text = add_memory(join_sections(sections), {"sections": {"## A": fingerprint("x")}})
    body, memory = take_memory(text)
    expected = {"": "", **sections}
    assert {k: v for k, v in split_sections(body).items() if k or v} == {k: v for k, v in expected.items() if k or v}
    assert memory == {"sections": {"## A": fingerprint("x")}}


# Where it is written


@pytest.mark.parametrize("kind", ["bart"])
def test_a_model_that_writes_has_a_card(kind, tmp_path):
    config = MMTransformerConfig(text_config=SEQ2SEQ[kind](), tasks=[Generation("german", max_length=6)])
    model = MMTransformerForMultiTask(config)
    write_card(tmp_path, CardFacts("me/m", config, [Measurement("test", {"german_bleu": 12.5})]))
    assert ModelCard.load(tmp_path / "README.md").data.eval_results[0].metric_value == 12.5
    assert model.can_generate()


@pytest.mark.slow
def test_the_command_measures_and_writes(trained, card, tmp_path):
    from command_line import mm

    rows = make_dataset(8)
    (tmp_path / "images").mkdir()
    with open(tmp_path / "rows.jsonl", "w") as file:
        for i, row in enumerate(rows):
            if row["image"] is not None:
                row["image"].save(tmp_path / "images" / f"{i}.png")
            row["image"] = None if row["image"] is None else f"images/{i}.png"
            file.write(json.dumps(row) + "\n")
    folder = card.parent
    mm(
        "card",
        folder,
        "--data",
        tmp_path / "rows.jsonl",
        "--split",
        "held-out",
        "--license",
        "mit",
        "--dataset",
        "me/d",
    )
    sections, data = sections_of(card), ModelCard.load(card).data
    tables = " ".join(sections["## What each modality is good for"].replace("|", " | ").split())
    assert "| task | metric | all | text only | image only | nothing |" in tables
    assert "| task | metric | text shuffled | image shuffled | majority class |" in tables
    assert "| steps | 3 |" in sections["## Training"]
    held_out = [result for result in data.eval_results if result.dataset_split == "held-out"]
    assert {"topic accuracy", "score mae"} <= {result.metric_name for result in held_out}
    assert {result.dataset_type for result in held_out} == {"me/d"}
    assert data.license == "mit"
    assert data.datasets == ["me/d"]
    assert yaml.safe_load(card.read_text().split("---")[1])["model-index"][0]["name"] == "my-model"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (90061, "25 h 1 min"),
    ],
)
def test_times_are_written_for_people(seconds, text):
    assert _duration(seconds) == text


def test_the_example_has_the_columns_of_the_training():
    model, processor = make_model(), make_processor()
    processor.input_columns = {"text": ["title", "full text"], "image": ["photo"]}
    use = every_section(CardFacts("me/m", model.config, input_columns=processor.input_columns))["## Use"]
    row = eval(re.search(r"pipe\((\{.*\})\)", use)[1], {"Image": Image})
    assert set(row) == {"title", "full text", "photo"}
    assert set(pipeline("multimodal", model=model, processor=processor)(row)) == set(model.tasks)


def test_a_model_that_reads_no_text():
    table = TableConfig(columns=[{"name": "price", "kind": "number", "mean": 3.0, "std": 2.0}], hidden_size=16)
    model = MMTransformerForMultiTask.from_encoders(text=None, table=table, tasks=[Regression("cost")])
    sections = every_section(CardFacts("me/my-model", model.config))
    assert "A model that reads numbers and categories and answers 1 task: cost." in sections[""]
    row = eval(re.search(r"pipe\((\{.*\})\)", sections["## Use"])[1])
    assert set(row) == {"price"}
    processor = MMTransformerProcessor.from_encoders(text=None, table=table)
    assert set(pipeline("multimodal", model=model, processor=processor)(row)) == {"cost"}
    assert "Each input can be left out" not in sections["## Use"]
    assert "| text |" not in sections["## Encoders"]
    assert "| table |" in sections["## Encoders"]
    assert "labels" not in sections["## Limits"]
    assert "more than the text" not in sections["## Limits"]
    sections = every_section(CardFacts("me/my-model", make_model().config))
    assert "A model that reads text and pictures or video and answers" in sections[""]
    assert "It knows only the labels above." in sections["## Limits"]
    assert "Each input can be left out" in sections["## Use"]
