"""Texts of strangers: an endless cell costs no more than one that is just too long, and gives the same tokens."""

import time

import pytest
from tiny import make_config, make_model, make_processor, make_tokenizer

from mm_transformers import Generation, Limits, MMDataCollator, TokenClassification
from mm_transformers.analysis.explaining.token_places import token_spans
from mm_transformers.model.task_base import LabelContext
from mm_transformers.model.text_tokens import needed_text
from mm_transformers.training.predictor import Predictor


class TestPrefix:
    def test_ordinary_texts_stay_as_they_are(self):
        text = "the red cat is in the sun " * 40
        assert needed_text(make_tokenizer(), text, 40) is text

    def test_the_limit_holds_where_there_is_no_place_to_cut(self, monkeypatch):
        monkeypatch.setattr("mm_transformers.model.limits._current", Limits(text_characters=5000))
        for text in ("x" * 20_000, " " * 20_000, "好" * 20_000):
            assert len(needed_text(make_tokenizer(), text, 40)) == 5000
        left = make_tokenizer()
        left.truncation_side = "left"
        assert needed_text(left, "x" * 9000 + "end", 40).endswith("end")

    def test_a_tokenizer_that_truncates_on_the_left_needs_the_end(self):
        left = make_tokenizer()
        left.truncation_side = "left"
        needed = needed_text(left, huge(100_000) + "the end", 40)
        assert needed.endswith(" the cat the end")
        assert len(needed) < 5000
        # Of an answer that is to be written, the beginning.
        assert needed_text(left, "the end " + huge(100_000), 40, "text_target").startswith("the end the cat")


def huge(words=1_600_000) -> str:
    return "the cat " * (words // 2)


class TestRows:
    def test_a_batch_is_the_same_as_of_a_text_that_is_just_too_long(self):
        task = [TokenClassification("entities", labels=["O", "NAME"])]
        collator = MMDataCollator(make_processor(), make_config(tasks=task))
        batch = collator([{"text": huge(200_000), "entities": ["O", "NAME"] * 100_000}])
        other = collator([{"text": huge(400), "entities": ["O", "NAME"] * 200}])
        for name in ("input_ids", "attention_mask"):
            assert batch[name].tolist() == other[name].tolist()
        assert batch["labels"]["entities"].tolist() == other["labels"]["entities"].tolist()

    def test_eight_megabytes_take_seconds(self):
        """A text without any space, too."""
        processor = make_processor()
        for text in (huge(), "x" * 8_000_000, "\n" * 8_000_000 + "cat"):
            start = time.process_time()
            assert processor(text=[text], max_length=40)["input_ids"].shape[1] <= 40
            assert time.process_time() - start < 5

    def test_targets_that_a_decoder_is_to_write(self):
        task, tokenizer = Generation("german", max_length=9), make_tokenizer()
        context = LabelContext(tokenizer=tokenizer)
        start = time.process_time()
        labels = task.collate_labels([huge(), "a cat"], context)
        assert time.process_time() - start < 5
        assert labels.tolist() == task.collate_labels([huge(100), "a cat"], context).tolist()
        assert task.encode_references([huge()]).shape[1] <= 64 * 9

    def test_answers_for_words_keep_their_places(self):
        tasks = [TokenClassification("entities", labels=["O", "NAME"])]
        model, processor = make_model(tasks=tasks), make_processor()
        collator = MMDataCollator(processor, model.config)
        ((_, answers),) = next(iter(Predictor(model, collator).stream([{"text": huge(3000)}])))
        labels = [word["label"] for word in answers["entities"]]
        assert len(labels) == 3000
        assert None not in labels[:38]
        assert set(labels[38:]) == {None}

    def test_words_of_the_end_of_a_text_keep_their_numbers(self):
        processor = make_processor()
        processor.tokenizer.truncation_side = "left"
        for text in (huge(2000), huge(300_000)):
            start = time.process_time()
            inputs = processor(text=[text], max_length=40, return_word_index=True)
            assert time.process_time() - start < 1
            words = text.count("the cat") * 2
            assert inputs["word_index"][0].tolist() == [-1, *range(words - 38, words), -1]
            assert inputs["input_ids"].tolist() == processor(text=[text], max_length=40)["input_ids"].tolist()

    def test_explanations(self):
        tokenizer = make_tokenizer()
        ids = tokenizer(huge(100), truncation=True, max_length=40)["input_ids"]
        start = time.process_time()
        spans = token_spans(tokenizer, huge(), ids)
        assert time.process_time() - start < 5
        assert spans == token_spans(tokenizer, huge(100), ids)

    @pytest.mark.parametrize("column", ["topic", "tags", "score", "entities"])
    def test_a_label_of_megabytes_is_told_in_a_line(self, column):
        collator = MMDataCollator(make_processor(), make_config())
        for cell in ("x" * 8_000_000, "9" * 8_000_000, "[" * 200_000, ["x" * 8_000_000], '["a",' * 200_000):
            with pytest.raises(ValueError, match=f"column '{column}'") as error:
                collator([{"text": "a", column: cell}])
            assert len(str(error.value)) < 500
