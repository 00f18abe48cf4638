"""Every public name has an example in its docstring, and every example runs."""

import doctest
import inspect
import math
import types

import datasets
import pytest
import torch
from recipes import save_encoders
from tiny import SEQ2SEQ, TEXT_ENCODERS, VISION_ENCODERS, make_image, make_model, make_processor
from transformers import AutoModelForSequenceClassification

import mm_transformers
from mm_transformers import (
    Classification,
    Generation,
    MMDataCollator,
    MMTrainingArguments,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    analysis,
)
from mm_transformers.model import registry
from mm_transformers.model.fusion import FUSION_KINDS
from mm_transformers.model.fusion_layers import Gate, masked_mean
from mm_transformers.model.generation import AnswerDecoder
from mm_transformers.model.label_cells import is_missing
from mm_transformers.model.limits import limits
from mm_transformers.model.linear_problem import BinaryProblem, MultinomialProblem, RidgeProblem
from mm_transformers.model.predictions import Predictions
from mm_transformers.model.table_kinds import COLUMNS
from mm_transformers.model.task_base import TASK_KINDS, PooledHead
from mm_transformers.training.metrics.multi_task_metrics import METRICS


PUBLIC = [(module, name) for module in (mm_transformers, analysis) for name in module.__all__]
# Documented by the classes that inherit from it, or by the model whose output it is.
WITHOUT = {"MMTransformerPreTrainedModel", "MMTransformerModelOutput", "MMTransformerOutput"}
WITHOUT |= {"Ablation", "Explanation", "Faithfulness"}  # given by ablate, explain and faithfulness
OTHERS = [Predictions, registry.registered, AnswerDecoder, MultinomialProblem, BinaryProblem, RidgeProblem]
# Models of the Hub and large configs -> tiny ones.
TINY = {
    "distilbert/distilbert-base-uncased": "encoders/text",
    "google/vit-base-patch16-224-in21k": "encoders/vision",
    "from transformers import BertConfig, ViTConfig": "pass",
    "my-text-encoder": "encoders/text",
}


def documented():
    """Each object with an example, once."""
    found = {}
    for name, value in [*((n, getattr(m, n)) for m, n in PUBLIC), *((o.__name__, o) for o in OTHERS)]:
        own = vars(value).items() if inspect.isclass(value) else ()
        members = {f"{name}.{key}": one for key, one in own if inspect.isroutine(one) or isinstance(one, property)}
        for key, one in {name: value, **members}.items():
            text = getattr(one, "__doc__", None)
            if isinstance(text, str) and ">>>" in text:
                found[key] = text
    return found


EXAMPLES = documented()


@pytest.mark.parametrize("name", [name for _, name in PUBLIC if name not in WITHOUT])
def test_every_public_name_has_an_example(name):
    assert name in EXAMPLES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the examples find in the current folder."""
    folder = tmp_path_factory.mktemp("examples")
    save_encoders(folder / "encoders")
    tasks = [Classification("sentiment", labels=["negative", "neutral", "positive"])]
    make_model(tasks=tasks).save_pretrained(folder / "my-model")
    make_processor().save_pretrained(folder / "my-model")
    make_image(1).save(folder / "rain.jpg")
    make_image(2).save(folder / "dog.png")
    listings = [f"{thing} number {i},{1900 + i},{thing}s,{i * 7}.5" for i in range(30) for thing in ("chair", "lamp")]
    (folder / "listings.csv").write_text("title,year,category,price\n" + "\n".join(listings))
    (folder / "rows.csv").write_text("id,text,photo\n1,a red dog,dog.png\n2,the cat,\n")
    return folder


def names_of_examples(folder):
    tasks = [Classification("sentiment", labels=["negative", "neutral", "positive"])]
    config = MMTransformerConfig(
        text_config=SEQ2SEQ["bart"](),
        vision_config=VISION_ENCODERS["vit"](),
        tasks=[*tasks, Generation("german", max_length=5)],
    )
    model = MMTransformerForMultiTask(config).eval()
    processor = make_processor()
    rows = [{"text": "a red dog", "image": None, "sentiment": "negative"}] * 4
    return {
        **{name: getattr(module, name) for module, name in PUBLIC},
        **{"math": math, "torch": torch, "load_dataset": datasets.load_dataset},
        "evaluate": types.SimpleNamespace(load=lambda name: METRICS["f1_micro"](keep_in_memory=True)),
        **{"Predictions": Predictions, "PooledHead": PooledHead, "is_missing": is_missing, "Gate": Gate},
        **{"masked_mean": masked_mean, "registered": registry.registered, "AnswerDecoder": AnswerDecoder},
        **{cls.__name__: cls for cls in (MultinomialProblem, BinaryProblem, RidgeProblem)},
        "AutoModelForSequenceClassification": AutoModelForSequenceClassification,
        "BertConfig": TEXT_ENCODERS["bert"],
        "ViTConfig": VISION_ENCODERS["vit"],
        "encoders": {"text": "encoders/text", "vision": "encoders/vision", "tasks": tasks},
        "model": model, "processor": processor, "rows": rows, "data": {"test": rows},
        "args": MMTrainingArguments(str(folder / "out"), max_steps=1, use_cpu=True, report_to="none"),
        "tweets": [{"tweet": "the cat", "image": None, "mood": "negative", "sentiment": "negative"}] * 4,
        "collator": MMDataCollator(processor, model.config), "inputs": processor(text=["a red dog"]),
        "translations": [{"text": "a red dog", "image": None, "german": "der Hund"}],
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_runs(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("mm_transformers.model.limits._current", limits())
    text = EXAMPLES[name]
    for old, new in TINY.items():
        text = text.replace(old, new)
    kinds = dict(TASK_KINDS), dict(FUSION_KINDS), dict(COLUMNS)
    names = names_of_examples(folder)
    try:
        for example in doctest.DocTestParser().get_examples(text):
            exec(compile(example.source, f"<example of {name}>", "single"), names)
    finally:
        for registry_of, before in zip((TASK_KINDS, FUSION_KINDS, COLUMNS), kinds, strict=True):
            registry_of.clear()
            registry_of.update(before)
