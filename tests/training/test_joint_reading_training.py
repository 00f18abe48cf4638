"""Language models that read pictures themselves, by layers inside or a prefix: trained, cached, ablated, adapted."""

import pytest
import torch
from datasets import Dataset
from language_models import (
    assert_it_learns_to_write,
    make_args,
    make_language_model,
    make_llm_processor,
    make_rows,
    save_language_model,
)
from tiny import make_batch, make_image, make_model, make_processor
from writers import LABELS, TOPIC

from mm_transformers import (
    FeatureCache,
    Generation,
    Matching,
    MMDataCollator,
    MMTrainer,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    Predictor,
    Retrieval,
)
from mm_transformers.analysis import ablate
from mm_transformers.sharing.export import export_model


GERMAN = Generation("german", max_length=8)
KINDS = {"inside": {"fusion_layers_every": 1, "num_fusion_layers": 1}, "prefix": {"fusion_type": "prefix"}}
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind, **kwargs) -> MMTransformerForMultiTask:
    return make_language_model(**{**KINDS[kind], **kwargs})


@pytest.mark.slow
@every_kind
def test_it_learns_to_write_what_is_in_the_picture(kind, tmp_path):
    """The language model is frozen and the text is the same in all rows: what is written comes from the pictures."""
    words = ["red dog", "green cat", "blue crane", "small bat", "big desk", "lovely sun"]
    rows = Dataset.from_list([{"text": "the", "image": make_image(i), "german": words[i]} for i in range(6)])
    model = make(kind, tasks=[GERMAN], freeze=["text"], gates_open=False)
    trainer = MMTrainer(
        model, make_args(tmp_path, max_steps=100, learning_rate=5e-3, per_device_train_batch_size=6),
        processing_class=make_llm_processor(), train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip
    assert_it_learns_to_write(trainer)


@pytest.mark.slow
@every_kind
def test_ablation_reads_the_texts_again_without_pictures(kind):
    model, processor = make(kind), make_llm_processor()
    rows = [row for row in make_rows(12) if row["text"] and row["image"] is not None]
    found = ablate(model, processor, rows, ["german", "topic"], batch_size=3, num_permutations=1)
    collator = MMDataCollator(processor, model.config)

    def losses(**changed) -> dict:
        batch = collator([{**row, **changed} for row in rows])
        with torch.no_grad():
            return model(**batch).losses

    for task in ("german", "topic"):
        assert found.variants["all"][f"{task}_loss"] == pytest.approx(losses()[task].item(), rel=1e-3)
        expected = losses(image=None)[task].item()
        assert found.variants["text only"][f"{task}_loss"] == pytest.approx(expected, rel=1e-3)
        expected = losses(text="")[task].item()
        assert found.variants["image only"][f"{task}_loss"] == pytest.approx(expected, rel=1e-3)


@every_kind
def test_features_of_texts_are_not_cached(kind, tmp_path):
    model, rows = make(kind, freeze=["text", "vision"]), Dataset.from_list(make_rows())
    collator = MMDataCollator(make_llm_processor(), model.config)
    cached = FeatureCache(tmp_path).prepare(model, collator, rows)
    batch, expected = cached([rows[i] for i in range(12)]), collator([rows[i] for i in range(12)])
    assert "image_features" in batch
    assert "text_features" not in batch
    calls = []
    model.model.vision_model.register_forward_hook(lambda *_: calls.append("vision"))
    with torch.no_grad():
        losses = model(**batch).losses
        assert calls == []
        torch.testing.assert_close(losses, model(**expected).losses, rtol=1e-4, atol=1e-4)


@every_kind
def test_only_texts_could_be_cached(kind, tmp_path):
    model, rows = make(kind, freeze=["text"]), Dataset.from_list(make_rows())
    collator = MMDataCollator(make_llm_processor(), model.config)
    with pytest.raises(ValueError, match="so its outputs depend on more than the text and cannot be cached, and"):
        FeatureCache(tmp_path).prepare(model, collator, rows)


@every_kind
@pytest.mark.parametrize("tasks", [[GERMAN], [TOPIC, GERMAN]], ids=["alone", "beside a head"])
def test_evaluation_writes_what_generate_writes(kind, tasks):
    model, batch = make(kind, tasks=tasks), make_batch(labels=False)
    labels = {name: value for name, value in LABELS.items() if name in model.tasks}
    outputs, written = model.forward_and_write(labels=labels, **batch)
    assert torch.equal(written["german"], model.generate(**batch))
    with torch.no_grad():
        torch.testing.assert_close(outputs.losses, model(**batch, labels=labels).losses, rtol=1e-4, atol=1e-4)
    calls = []
    model.model.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    model.forward_and_write(labels=labels, generation_kwargs={"max_new_tokens": 1}, **batch)
    # The text alone and with pictures for heads; the answer, and what is written.
    assert len(calls) == (2 if len(tasks) == 1 else 4)


@pytest.mark.slow
@every_kind
def test_adapters_of_the_language_model(kind, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model, batch = make(kind, gates_open=False), make_batch(labels=False)
    adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=model.new_modules)
    adapters.exclude_modules = r".*fusion.*"
    before = model.generate(**batch)
    adapted = get_peft_model(model, adapters)
    assert torch.equal(adapted.generate(**batch), before)
    rows = Dataset.from_list(make_rows())
    trainer = MMTrainer(
        adapted, make_args(tmp_path, max_steps=4, learning_rate=5e-2), processing_class=make_llm_processor(),
        train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip
    trainer.train()
    assert {"eval_german_bleu", "eval_german_loss", "eval_topic_accuracy"} <= set(trainer.evaluate())
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("fusion" in name and "modules_to_save" in name for name in trained)
    assert not any(".text_model." in name and "lora" not in name for name in trained)
    adapted.save_pretrained(tmp_path / "adapters")
    adapted.eval()
    loaded = PeftModel.from_pretrained(make(kind, gates_open=False), str(tmp_path / "adapters")).eval()
    assert torch.equal(loaded.generate(**batch, pad_token_id=2), adapted.generate(**batch))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch, labels=LABELS).losses, adapted(**batch, labels=LABELS).losses)


@every_kind
def test_pretrained_parts_saved_and_read_by_the_predictor(kind, tmp_path):
    encoders = save_language_model(tmp_path / "encoders")
    model = MMTransformerForMultiTask.from_encoders(**encoders, tasks=[TOPIC, GERMAN], **KINDS[kind])
    model.save_pretrained(tmp_path / "model")
    processor = MMTransformerProcessor.from_encoders(**encoders)
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path / "model")
    rows = [{key: row[key] for key in ("text", "image")} for row in make_rows(5)]
    inputs = processor(text=[row["text"] for row in rows], images=[row["image"] for row in rows])
    expected = [text.strip() for text in processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)]
    answers = list(Predictor(loaded, processor, batch_size=2)(rows))
    assert [answer["german"]["text"] for answer in answers] == expected


@every_kind
def test_retrieval_and_matching_compare_texts_that_have_seen_no_picture(kind):
    """A text that has read its own picture would match it at once."""
    model = make(kind, tasks=[Retrieval("search"), Matching("match"), GERMAN], linear_probe=True)
    batch = make_batch(image_index=[[0], [-1], [1], [2]], labels=False)
    with torch.no_grad():
        outputs = model.model(**batch)
        vectors = model.embed(**batch, task="search")["text"]
        alone = model.embed(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], task="search")["text"]
        torch.testing.assert_close(vectors, alone)
        encoded = {**outputs.encoded, "vision": outputs.encoded["vision"].of_rows(torch.tensor([2, 1, 3, 0]))}
        swapped = model.model(**{**batch, "image_index": torch.tensor([[1], [-1], [2], [0]])})
        shown = batch["attention_mask"].bool()
        found = model.model.fuse(encoded).last_hidden_state
    torch.testing.assert_close(found[shown], swapped.last_hidden_state[shown], rtol=1e-4, atol=1e-4)


def test_a_linear_start_with_layers_inside_is_that_of_the_encoders():
    """With closed gates the head adds nothing to the probe, also in rows without a text."""
    model = make("inside", gates_open=False, linear_probe=True)
    torch.nn.init.normal_(model.heads.topic.probe.linear.weight)
    batch = make_batch(labels=False)
    batch["attention_mask"][0] = 0
    with torch.no_grad():
        outputs = model.model(**batch)
        torch.testing.assert_close(model(**batch).logits["topic"], model.heads.topic.probe(outputs))


@every_kind
def test_modality_dropout_also_drops_texts(kind):
    model = make(kind, modality_dropout={"text": 0.9, "vision": 0.5}).train()
    torch.manual_seed(0)
    loss = model(**make_batch(labels=False), labels=LABELS).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@every_kind
def test_what_is_not_supported_says_so(kind, tmp_path):
    with pytest.raises(ValueError, match="A model whose language model writes cannot be exported"):
        export_model(make(kind), make_llm_processor(), tmp_path / "exported")
    with pytest.raises(ValueError, match="A model whose text encoder reads other modalities itself .* cannot be ex"):
        export_model(make(kind, tasks=[TOPIC]), make_llm_processor(), tmp_path / "exported")


@pytest.mark.slow
def test_an_encoder_with_a_prefix_is_trained_from_rows(tmp_path):
    model, processor = make_model("bert", tasks=[TOPIC], fusion_type="prefix", linear_probe=True), make_processor()
    rows = Dataset.from_list([{key: row[key] for key in ("text", "image", "topic")} for row in make_rows()])
    trainer = MMTrainer(
        model, make_args(tmp_path), processing_class=processor, train_dataset=rows, eval_dataset=rows
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_topic_loss"] > 0
