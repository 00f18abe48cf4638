"""Prompts of language models: where long ones are cut, what ends them, and rows without a text."""

import pytest
from language_models import make_language_model, make_llm_processor, save_language_model
from tiny import make_image
from transformers import pipeline
from writers import TOPIC

from mm_transformers import Generation, MMDataCollator, MMTransformerProcessor
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


def test_a_task_whose_answer_leaves_no_room_is_refused():
    with pytest.raises(ValueError, match="the decoder has 64 positions, too few for max_length=63"):
        make_language_model(tasks=[Generation("german", max_length=63, decoder_start_ids=[5, 6])])
    make_language_model(tasks=[Generation("german", max_length=62, decoder_start_ids=[5, 6])])
