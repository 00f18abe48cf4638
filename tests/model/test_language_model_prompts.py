"""Prompts of language models: where long ones are cut, what ends them, and rows without a text."""

from functools import partial

import pytest
import torch
from language_models import LANGUAGE_MODELS, make_args, make_language_model, make_llm_processor, save_language_model
from tiny import make_batch, make_image
from tokenizers import processors
from transformers import pipeline
from writers import TOPIC, make_writer

from mm_transformers import (
    Generation,
    MMDataCollator,
    MMTrainer,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    Predictor,
)
from mm_transformers.analysis import explain


GERMAN = Generation("german", max_length=8)
LONG = "red dog " * 40 + "blue"


def test_a_long_prompt_keeps_its_end(tmp_path):
    """A question, or the beginning of the answer in a chat."""
    processor = MMTransformerProcessor.from_encoders(**save_language_model(tmp_path / "encoders"))
    row = processor.without_chat({"messages": [{"role": "user", "content": LONG}]})
    processor.save_pretrained(tmp_path / "processor")
    for one in (processor, MMTransformerProcessor.from_pretrained(tmp_path / "processor")):
        ids = one(text=[row["text"]])["input_ids"][0]
        assert len(ids) == 64
        assert one.tokenizer.decode(ids).endswith("red dog blue in is")


def test_texts_leave_room_for_the_answer():
    model, processor = make_language_model(tasks=[TOPIC, GERMAN], attn_implementation="eager"), make_llm_processor()
    model.generation_config.eos_token_id = None  # writes on and on
    collator = MMDataCollator(processor, model.config)
    assert collator([{"text": LONG}])["input_ids"].shape[1] == 64 - 8 + 1
    pipe = pipeline("multimodal", model=model, processor=processor)
    row = {"text": LONG, "image": make_image(0)}
    short = {**row, "text": " ".join(LONG.split()[:57])}
    assert pipe(row) == pipe(short)
    assert len(processor.tokenizer(pipe(row)["german"]["text"], add_special_tokens=False)["input_ids"]) > 2
    whole, part = (explain(model, processor, one, task="german") for one in (row, short))
    assert (whole.answer, len(whole.tokens)) == (part.answer, len(part.tokens)) == (pipe(row)["german"]["text"], 57)


def test_a_collator_tells_that_a_long_text_leaves_no_room_for_a_prefix(caplog):
    config = LANGUAGE_MODELS["llama"]()
    config.max_position_embeddings = 61  # a warning is shown once
    model, processor = make_language_model(config, fusion_type="prefix"), make_llm_processor()
    MMDataCollator(processor, model.config, max_length=61 - 17 - 7)
    assert not caplog.records
    MMDataCollator(processor, model.config)
    (record,) = caplog.records
    assert "a text may have 54 of the 61 positions of the text encoder, which leaves no room" in record.message
    row = {"text": LONG, "image": make_image(0)}
    with pytest.raises(ValueError, match="Prefix and text have up to"):
        model(**MMDataCollator(processor, model.config)([row]))
    model(**MMDataCollator(processor, model.config, max_length=61 - 17 - 7)([row]))


def test_a_row_without_a_text_begins_as_it_does_in_training():
    """Of a model that reads texts only."""
    model = make_language_model(tasks=[TOPIC, GERMAN], vision_config=None)
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [0, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 4, [0] * 4]),
    }
    begun = {"input_ids": torch.tensor([[model.model.begin_id]]), "attention_mask": torch.tensor([[1]])}
    labels = {"german": torch.tensor([[7, 8, 9], [7, 8, 9]])}
    with torch.no_grad():
        expected = model(**begun, labels={"german": labels["german"][1:]}).logits["german"][0]
        apart = model(encoder_outputs=model.model(**inputs), labels=labels)
        for outputs in (model(**inputs, labels=labels), apart):
            torch.testing.assert_close(outputs.logits["german"][1], expected, rtol=1e-4, atol=1e-4)
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    assert torch.equal(model.generate(**inputs, **options)[1], model.generate(**begun, **options)[0])


def test_generation_stops_where_the_tokenizer_ends_an_answer(tmp_path):
    """The generation config of a pretrained model may name other tokens than its config."""
    processor, rows = make_llm_processor(), [{"text": "red dog", "german": "dog"}]
    end = processor.tokenizer.eos_token_id
    for stops, expected in (([7], [7, end]), (None, end), ([end, 7], [end, 7]), (end, end)):
        model = make_language_model(tasks=[GERMAN])
        model.generation_config.eos_token_id = stops
        MMTrainer(model, make_args(tmp_path), processing_class=processor, eval_dataset=rows)
        assert model.generation_config.eos_token_id == expected
    model.config.text_config.eos_token_id = 7  # the generation config decides
    MMDataCollator(processor, model.config)


def test_a_tokenizer_that_ends_every_prompt_is_refused():
    processor, config = make_llm_processor(), make_language_model(tasks=[GERMAN]).config
    backend = processor.tokenizer.backend_tokenizer
    special = [("[SEP]", processor.tokenizer.eos_token_id)]
    backend.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=special)
    message = (
        r"Task 'german': the tokenizer ends every text with '\[SEP\]', after which a language model writes nothing"
    )
    with pytest.raises(ValueError, match=message):
        MMDataCollator(processor, config)
    # For heads it may be the token that has read the text.
    MMDataCollator(processor, make_language_model(tasks=[TOPIC]).config)


@pytest.mark.parametrize("ids", [None, [5, 6]])
def test_tasks_that_would_write_the_same_are_told(ids, tmp_path, caplog):
    tasks = [Generation(name, max_length=8, decoder_start_ids=ids) for name in ("german", "french")]
    encoders = save_language_model(tmp_path)
    for make in (make_language_model, make_writer, partial(MMTransformerForMultiTask.from_encoders, **encoders)):
        caplog.clear()
        make(tasks=tasks)
        assert "Tasks 'german' and 'french' write the same answer to the same row" in caplog.text
    caplog.clear()
    make_language_model(tasks=[*tasks[:1], Generation("french", max_length=8, decoder_start_ids=[7])])
    assert "to the same row" not in caplog.text
    # A model that was saved with such tasks loads.
    values = make_language_model(tasks=tasks[:1]).config.to_dict()
    values["tasks"] = [task.to_dict() for task in tasks]
    assert list(MMTransformerConfig.from_dict(values).get_tasks()) == ["german", "french"]


def test_a_task_whose_answer_leaves_no_room_is_refused():
    with pytest.raises(ValueError, match="the decoder has 64 positions, too few for max_length=63"):
        make_language_model(tasks=[Generation("german", max_length=63, decoder_start_ids=[5, 6])])
    make_language_model(tasks=[Generation("german", max_length=62, decoder_start_ids=[5, 6])])


@pytest.mark.parametrize("kwargs", [{}, {"fusion_layers_every": 1}, {"fusion_type": "prefix"}], ids=str)
def test_a_model_that_only_writes_reads_each_text_once(kwargs, tmp_path):
    model, processor, calls = make_language_model(tasks=[GERMAN], **kwargs), make_llm_processor(), []
    options, row = {"min_new_tokens": 3, "max_new_tokens": 3}, {"text": "red dog", "image": make_image(0)}
    model.model.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    ids = model.generate(**processor(text=[row["text"]], images=[row["image"]]), **options)
    assert len(calls) == 3
    pipe = pipeline("multimodal", model=model, processor=processor)
    answer = pipe(row, generate_kwargs=options)["german"]["text"]
    assert len(calls) == 6
    assert answer == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert Predictor(model, processor, **options)([row])[0]["german"]["text"] == answer
    assert len(calls) == 9


def test_a_model_in_training_mode_writes_as_in_evaluation_mode():
    """Otherwise modality dropout would drop the pictures of a prompt."""
    model, batch = make_language_model(modality_dropout={"vision": 0.9}), make_batch(labels=False)
    expected = model.generate(**batch)
    model.train()
    for _ in range(3):
        assert torch.equal(model.generate(**batch), expected)
    assert model.training
    assert model.model.fusion.training
