"""Rows of messages: the text is that of the tokenizer's template, the pictures are those of the parts."""

import pytest
import torch
from language_models import make_language_model, make_prompt_tokenizer
from tiny import make_image, make_image_processor, make_processor
from transformers import pipeline

from mm_transformers import Generation, MMTransformerProcessor, TableConfig


@pytest.fixture
def processor():
    tokenizer = make_prompt_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return MMTransformerProcessor(image_processor=make_image_processor(), tokenizer=tokenizer)


def chat(*parts, role="user"):
    return {"role": role, "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}


def text(words):
    return {"type": "text", "text": words}


def test_the_text_is_that_of_the_template(processor):
    messages = [chat("the red dog"), chat("a cat", role="assistant"), chat("the sun")]
    row = processor.without_chat({"messages": messages, "id": 7})
    assert row == {"text": "the red dog in a cat in the sun in is ", "id": 7}
    expected = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert row["text"] == expected


def test_pictures_are_those_of_the_parts(processor):
    first, second = make_image(1), make_image(2)
    row = processor.without_chat({"messages": [chat({"type": "image", "image": first}, text("the dog"))]})
    assert row == {"text": "the dog in is ", "image": first}
    parts = [text("the dog"), {"type": "image", "image": first}, text("a cat"), {"type": "image", "path": "b.png"}]
    row = processor.without_chat({"messages": [chat(*parts), chat({"type": "image", "image": second})]})
    assert row == {"text": "the dog\na cat in  in is ", "image": [first, "b.png", second]}


def test_the_message_of_the_assistant_is_continued(processor):
    row = processor.without_chat({"messages": [chat("the dog"), chat("is", role="assistant")]})
    assert row["text"] == "the dog in is"


def test_the_first_token_is_there_once(processor):
    tokenizer = processor.tokenizer
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    row = {"messages": [chat("the dog")]}
    assert processor.without_chat(row)["text"].startswith("[CLS]the dog")
    assert processor(text=[processor.without_chat(row)["text"]])["input_ids"].tolist()[0].count(1) == 1
    adding = make_processor()  # its tokenizer adds the token by itself
    adding.tokenizer.bos_token, adding.tokenizer.chat_template = "[CLS]", tokenizer.chat_template
    ids = adding(text=[adding.without_chat(row)["text"]])["input_ids"].tolist()[0]
    assert ids.count(1) == 1


def test_the_pipeline_reads_messages(processor):
    torch.manual_seed(0)
    model = make_language_model(tasks=[Generation("german", max_length=8)])
    pipe = pipeline("multimodal", model=model, processor=processor)
    image = make_image(3)
    messages = [chat({"type": "image", "image": image}, text("the red dog"))]
    given = {"text": "the red dog in is ", "image": image}
    assert pipe({"messages": messages}) == pipe(given)
    with pytest.raises(ValueError, match="Row 1: messages must be a list of dicts"):
        pipe([given, {"messages": "hello"}])
    assert pipe({"messages": messages}) != pipe({"text": given["text"], "image": make_image(4)})


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages must be a list of dicts with 'role' and 'content', such as .* but is 'hello'"),
        ([], "messages must be a list of dicts"),
        ([{"role": "user"}], "messages must be a list of dicts"),
        ([chat({"type": "image"})], r"A part of a message must be .* but is \{'type': 'image'\}"),
        ([chat({"type": "smell", "smell": 3}, text("a"))], "A part of a message must be"),
        ([{"role": "user", "content": 3}], "A part of a message must be .* but is 3"),
        ([chat(*[{"type": "video", "path": "a.mp4"}] * 2)], "A chat has one video at most"),
    ],
)
def test_messages_of_another_form(messages, message, processor):
    with pytest.raises(ValueError, match=message):
        processor.without_chat({"messages": messages})


def test_what_is_given_twice(processor):
    with pytest.raises(ValueError, match="A row has 'text' and messages with it: give it once"):
        processor.without_chat({"messages": [chat("a dog")], "text": "a cat"})


def test_a_tokenizer_without_a_template():
    with pytest.raises(ValueError, match="messages need a tokenizer with a chat template, which this one lacks"):
        make_processor().without_chat({"messages": [chat("a dog")]})


def test_a_template_that_fails(processor):
    processor.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="The chat template of the tokenizer fails on the messages: roles must alter"):
        processor.without_chat({"messages": [chat("a dog")]})


def test_a_column_called_messages_is_no_chat(processor):
    table = TableConfig(columns=[{"name": "messages", "kind": "number", "mean": 3.0, "std": 2.0}], hidden_size=16)
    for known in (processor, make_processor()):  # with a chat template, and without one
        parts = {"image_processor": known.image_processor, "tokenizer": known.tokenizer}
        with_number = MMTransformerProcessor(**parts, table_config=table)
        assert with_number.with_keys({"messages": 12, "text": "a"}) == {"messages": 12, "text": "a"}
        assert with_number.row_keys.count("messages") == 1
        with_text = MMTransformerProcessor(**parts, input_columns={"text": ["messages"]})
        assert with_text.with_keys({"messages": "the red dog"}) == {"text": "the red dog"}
        assert with_text.row_keys.count("messages") == 1
    assert processor.with_keys({"messages": [chat("the dog")]}) == {"text": "the dog in is "}
