"""A language model that writes, in training, evaluation, the pipeline, tables of rows, ablations and adapters."""

import pytest
import torch
from datasets import Dataset
from language_models import (
    WORDS,
    assert_it_learns_to_write,
    make_args,
    make_language_model,
    make_llm_processor,
    make_rows,
    save_language_model,
)
from tiny import make_batch, make_image
from torch import nn
from transformers import Trainer, pipeline
from writers import LABELS, TOPIC

from mm_transformers import (
    Classification,
    FeatureCache,
    Generation,
    MMDataCollator,
    MMTrainer,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    MultiTaskMetrics,
    Predictor,
)
from mm_transformers.analysis import ablate, explain
from mm_transformers.sharing.export import export_model


GERMAN = Generation("german", max_length=8)


@pytest.fixture
def folder(tmp_path):
    """A model and its processor, as a person makes them of pretrained parts."""
    encoders = save_language_model(tmp_path / "encoders")
    model = MMTransformerForMultiTask.from_encoders(**encoders, tasks=[TOPIC, GERMAN])
    model.save_pretrained(tmp_path / "model")
    MMTransformerProcessor.from_encoders(**encoders).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_tokenizer_without_padding_pads_with_the_end(folder):
    processor = MMTransformerProcessor.from_pretrained(folder)
    assert processor.tokenizer.pad_token == "[SEP]"
    assert processor(text=["red", "red dog"])["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_labels_are_the_answer_and_its_end():
    processor = make_llm_processor()
    batch = MMDataCollator(processor, make_language_model().config)(
        [{"text": "a dog", "image": None, "german": "red cat"}]
    )
    ids = processor.tokenizer.convert_tokens_to_ids
    assert batch["input_ids"].tolist() == [[ids("a"), ids("dog")]]
    assert batch["labels"]["german"].tolist() == [[ids("red"), ids("cat"), ids("[SEP]")]]


def test_texts_leave_room_for_the_answer():
    config = make_language_model("gpt2", tasks=[Generation("german", max_length=60)]).config
    batch = MMDataCollator(make_llm_processor(), config)([{"text": "a dog " * 40, "image": None, "german": "cat"}])
    assert batch["input_ids"].shape[1] == 64 - 59
    model = make_language_model("gpt2", tasks=[Generation("german", max_length=60)])
    batch.pop("labels")
    assert model.generate(**batch, min_new_tokens=60).shape[1] == 60


@pytest.mark.slow
def test_trainer_scores_what_is_written(tmp_path):
    model, rows, processor = make_language_model(), Dataset.from_list(make_rows()), make_llm_processor()
    trainer = MMTrainer(
        model, make_args(tmp_path), processing_class=processor, train_dataset=rows, eval_dataset=rows
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_german_bleu", "eval_german_chrf", "eval_german_exact_match", "eval_topic_f1"} <= set(metrics)
    collator, total, count, right, labelled = MMDataCollator(processor, model.config), 0.0, 0, 0, 0
    model.eval()
    for row in rows:
        if row["german"] is None:
            continue
        batch = collator([row])
        labels = batch.pop("labels")
        logits, tokens = model(**batch, labels=labels).logits["german"][0], labels["german"][0]
        total += nn.functional.cross_entropy(logits, tokens, reduction="sum", ignore_index=-100).item()
        count += int((tokens != -100).sum())
        written = processor.tokenizer.decode(model.generate(**batch)[0], skip_special_tokens=True)
        right += written.strip() == row["german"]
        labelled += 1
    assert metrics["eval_german_loss"] == pytest.approx(total / count, rel=1e-4)
    assert metrics["eval_german_exact_match"] == pytest.approx(right / labelled)


@pytest.mark.slow
def test_it_learns_to_write_what_is_in_the_picture(tmp_path):
    """The language model is frozen and the text is the same in all rows: what is written comes from the pictures."""
    rows = [{"text": "the", "image": make_image(i), "german": WORDS[i]} for i in range(6)]
    model = make_language_model(tasks=[GERMAN], freeze=["text"], gates_open=False, num_fusion_layers=1)
    trainer = MMTrainer(
        model, make_args(tmp_path, max_steps=80, learning_rate=5e-3, per_device_train_batch_size=6),
        processing_class=make_llm_processor(), train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
    )  # fmt: skip
    assert_it_learns_to_write(trainer)


@pytest.mark.slow
def test_the_plain_trainer_trains_it(tmp_path):
    model, rows, processor = make_language_model(), Dataset.from_list(make_rows()), make_llm_processor()
    trainer = Trainer(
        model, make_args(tmp_path, remove_unused_columns=False), data_collator=MMDataCollator(processor, model.config),
        train_dataset=rows, eval_dataset=rows, compute_metrics=MultiTaskMetrics(model.config, processor),
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_german_loss"] > 0


def test_pipeline_and_predictor_write_what_generate_writes(folder):
    model, processor = MMTransformerForMultiTask.from_pretrained(folder), MMTransformerProcessor.from_pretrained(folder)
    rows = [{key: row[key] for key in ("text", "image")} for row in make_rows(5)]
    inputs = processor(text=[row["text"] for row in rows], images=[row["image"] for row in rows])
    expected = [text.strip() for text in processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)]
    assert len(set(expected)) > 2
    pipe = pipeline("multimodal", model=folder)
    assert [answer["german"]["text"] for answer in pipe(rows)] == expected
    answers = list(Predictor(model, processor, batch_size=2)(rows))
    assert [answer["german"]["text"] for answer in answers] == expected
    assert [answer["topic"]["label"] for answer in answers] == [answer["topic"]["label"] for answer in pipe(rows)]
    # Beams of the pipeline are those of `generate`.
    beams = processor.batch_decode(model.generate(**inputs, num_beams=3), skip_special_tokens=True)
    found = pipe(rows, tasks=["german"], generate_kwargs={"num_beams": 3})
    assert [answer["german"]["text"] for answer in found] == [text.strip() for text in beams]


@pytest.mark.slow
def test_ablation_takes_texts_and_pictures_away():
    model, processor = make_language_model(), make_llm_processor()
    rows = [row for row in make_rows(8) if row["text"]]
    found = ablate(model, processor, rows, ["german"], batch_size=3, num_permutations=1)
    collator = MMDataCollator(processor, model.config)

    def loss(**changed) -> float:
        labelled = [{**row, **changed} for row in rows if row["german"] is not None]
        with torch.no_grad():
            return model(**collator(labelled)).losses["german"].item()

    assert found.variants["all"]["german_loss"] == pytest.approx(loss(), rel=1e-3)
    assert found.variants["text only"]["german_loss"] == pytest.approx(loss(image=None), rel=1e-3)


def test_what_is_not_supported_says_so(tmp_path):
    model, processor = make_language_model(), make_llm_processor()
    with pytest.raises(ValueError, match="A model whose language model writes cannot be exported"):
        export_model(model, processor, tmp_path / "exported")


@pytest.mark.slow
def test_a_head_beside_it_is_explained():
    found = explain(
        make_language_model(attn_implementation="eager"), make_llm_processor(),
        {"text": "a dog", "image": make_image(0)}, task="topic",
    )  # fmt: skip
    assert found.text is not None


@pytest.mark.slow
def test_adapters_of_the_language_model(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = make_language_model(gates_open=False)
    adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=model.new_modules)
    before = model.generate(**make_batch(labels=False))
    adapted = get_peft_model(model, adapters)
    assert torch.equal(adapted.generate(**make_batch(labels=False)), before)
    rows = Dataset.from_list(make_rows())
    trainer = MMTrainer(
        adapted, make_args(tmp_path, max_steps=4, learning_rate=5e-2), processing_class=make_llm_processor(),
        train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip
    trainer.train()
    assert {"eval_german_bleu", "eval_german_loss", "eval_topic_accuracy"} <= set(trainer.evaluate())
    adapted.save_pretrained(tmp_path / "adapters")
    adapted.eval()
    batch = make_batch(labels=False)
    loaded = PeftModel.from_pretrained(make_language_model(gates_open=False), str(tmp_path / "adapters")).eval()
    # The trainer gave the model the padding of the tokenizer.
    assert torch.equal(loaded.generate(**batch, pad_token_id=2), adapted.generate(**batch))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch, labels=LABELS).losses, adapted(**batch, labels=LABELS).losses)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = make_language_model().train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.config.fusion_dropout = 0.0
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**make_batch(labels=False), labels=LABELS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)


def test_a_new_head_beside_it(folder):
    tasks = [TOPIC, GERMAN, Classification("mood", labels=["bad", "good"])]
    model = MMTransformerForMultiTask.from_pretrained(folder, tasks=tasks)
    outputs = model(**make_batch(labels=False))
    assert outputs.logits["mood"].shape == (4, 2)
    assert model.generate(**make_batch(labels=False)).shape[0] == 4


@pytest.mark.slow
@pytest.mark.parametrize("tasks", [[TOPIC, GERMAN], [GERMAN]], ids=["beside a head", "alone"])
def test_features_of_a_frozen_language_model_are_cached(tasks, tmp_path):
    """The head reads the stored features; the language model runs for the answers only, and the pictures never."""
    model, rows = make_language_model(tasks=tasks, freeze=["text", "vision"]), Dataset.from_list(make_rows())
    collator = MMDataCollator(make_llm_processor(), model.config)
    cached = FeatureCache(tmp_path).prepare(model, collator, rows)
    batch, expected = cached([rows[i] for i in range(12)]), collator([rows[i] for i in range(12)])
    assert "text_features" in batch
    assert "image_features" in batch
    calls = []
    model.model.text_encoder.register_forward_hook(lambda *_: calls.append("text"))
    model.model.vision_model.register_forward_hook(lambda *_: calls.append("vision"))
    with torch.no_grad():
        losses = model(**batch).losses
        assert calls == ["text"]
        torch.testing.assert_close(losses, model(**expected).losses, rtol=1e-4, atol=1e-4)
    labels = batch.pop("labels"), expected.pop("labels")
    assert labels[0].keys() == labels[1].keys()
    assert torch.equal(model.generate(**batch), model.generate(**expected))


def test_scores_do_not_depend_on_chance(tmp_path, recwarn, caplog):
    """Also if the pretrained model asks for random draws."""
    model, processor, rows = make_language_model(tasks=[GERMAN]), make_llm_processor(), make_rows(8)
    expected = [model.generate(**make_batch(labels=False)) for _ in range(2)]
    assert torch.equal(*expected)
    trainer = MMTrainer(model, make_args(tmp_path), processing_class=processor, eval_dataset=rows, train_dataset=rows)
    greedy = trainer.evaluate()
    config = model.generation_config
    config.do_sample, config.temperature, config.top_k, config.top_p = True, 2.0, 60, 0.9
    written = [model.generate(**make_batch(labels=False)) for _ in range(2)]
    assert written[0].shape != written[1].shape or not torch.equal(*written)
    found = trainer.evaluate()
    assert {k: found[k] for k in ("eval_german_chrf", "eval_loss")} == {
        k: greedy[k] for k in found.keys() & {"eval_german_chrf", "eval_loss"}
    }
    answers = {explain(model, processor, {"text": "a red dog"}, task="german").answer for _ in range(3)}
    assert len(answers) == 1
    tables = [ablate(model, processor, rows, num_additive_rows=0).to_markdown() for _ in range(2)]
    assert tables[0] == tables[1]
    assert not [message for message in caplog.messages if "do_sample" in message]
    assert not [one for one in recwarn if "do_sample" in str(one.message)]
