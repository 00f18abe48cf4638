"""Answers that continue a text have the ids that they have in the whole text."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from language_models import make_language_model
from tiny import make_image_processor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mm_transformers import Generation, MMDataCollator, MMTransformerProcessor
from mm_transformers.model.task_base import LabelContext
from mm_transformers.model.text_tokens import continuing_ids


WORDS = ["a", "drawing", "of", "the", "dog", "Dog", "boat", "ein", "Boot", "is", "red.", "It's", "7"]
CORPUS = [" ".join(WORDS), "\n".join(WORDS), "a drawing of a dog", "ein Boot is red.", "the boat: a drawing"] * 20


def byte_level() -> PreTrainedTokenizerFast:
    """As that of GPT-2, Llama 3, Qwen and SmolLM: a word behind a space has another id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False,
    ))  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def metaspace() -> PreTrainedTokenizerFast:
    """As that of Llama 2 and Mistral: the first word of a text gets a space, too."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<pad>", "<s>", "</s>", "<unk>"], show_progress=False,
    ))  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZERS = {"byte level": byte_level(), "metaspace": metaspace()}
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(" ".join)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@every_tokenizer
@given(before=sentences, text=sentences)
def test_the_ids_are_those_in_the_whole_text(tokenizer, before, text):
    [found] = continuing_ids(tokenizer, [text], [before])
    assert ids_of(tokenizer, before) + found == ids_of(tokenizer, f"{before} {text}")


@given(before=sentences, text=sentences, gap=st.sampled_from(["\n", "\n\n", ":\n"]))
def test_behind_a_line_break_there_is_no_space(before, text, gap):
    tokenizer = TOKENIZERS["byte level"]
    [found] = continuing_ids(tokenizer, [text], [before + gap])
    assert ids_of(tokenizer, before + gap) + found == ids_of(tokenizer, before + gap + text)


@every_tokenizer
def test_what_has_no_text_before_it_stands_alone(tokenizer):
    assert continuing_ids(tokenizer, ["dog", ""], ["", "a"]) == [ids_of(tokenizer, "dog"), []]


def test_a_space_of_its_own_is_no_second_one():
    tokenizer = TOKENIZERS["byte level"]
    spaced, plain = continuing_ids(tokenizer, [" dog", "dog"], ["a", "a"])
    assert spaced == plain


@pytest.mark.parametrize(("before", "text"), [("a", "小狗"), ("图", "dog"), ("a red </s>", "dog"), ("หมา", "แมว")])
def test_scripts_without_spaces_and_special_tokens_get_none(before, text):
    tokenizer = TOKENIZERS["byte level"]
    assert continuing_ids(tokenizer, [text], [before]) == [ids_of(tokenizer, text)]


def test_labels_continue_the_prompt_or_the_start_ids():
    tokenizer = TOKENIZERS["byte level"]
    end = tokenizer.eos_token_id
    context = LabelContext(tokenizer=tokenizer, prompts=["a drawing of", "x", "the boat:\n", ""])
    values = ["the dog", None, "the dog", "the dog"]
    found = [[i for i in row if i != -100] for row in Generation("english").collate_labels(values, context).tolist()]
    assert found == [
        [*ids_of(tokenizer, " the dog"), end], [], [*ids_of(tokenizer, "the dog"), end],
        [*ids_of(tokenizer, "the dog"), end],
    ]  # fmt: skip
    started = Generation("english", decoder_start_ids=ids_of(tokenizer, "of a"))
    rows = started.collate_labels(values, context).tolist()
    assert [[i for i in row if i != -100] for row in rows] == [
        [*ids_of(tokenizer, " the dog"), end], [], *[[*ids_of(tokenizer, " the dog"), end]] * 2
    ]  # fmt: skip


def test_the_collator_knows_the_prompts():
    tokenizer = TOKENIZERS["byte level"]
    model = make_language_model(tasks=[Generation("english", max_length=8)])
    model.config.text_config.eos_token_id = tokenizer.eos_token_id
    model.resize_token_embeddings(len(tokenizer))
    processor = MMTransformerProcessor(tokenizer=tokenizer, image_processor=make_image_processor())
    batch = MMDataCollator(processor, model.config)([{"text": "a drawing of", "image": None, "english": "the dog"}])
    whole = torch.cat([batch["input_ids"], batch["labels"]["english"]], 1)[0]
    assert tokenizer.decode(whole, skip_special_tokens=True) == "a drawing of the dog"
