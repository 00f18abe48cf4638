"""The answer to explain, and its score."""

from typing import Any, NamedTuple, Optional

import torch
from transformers import PreTrainedTokenizerBase

from ...model.generation import writing_tasks
from ...model.modeling_mm_transformer import MMTransformerForMultiTask, MMTransformerModelOutput
from ...model.processing_mm_transformer import MMTransformerProcessor
from ...model.task_base import LabelContext
from ...model.task_token_classification import split_words


class Asked(NamedTuple):
    """
    The answers to explain.

    Args:
        scores (batch,): before any softmax; gradients start here.
        answers: one per row.
        words: the word in question of each row, if any.
    """

    scores: torch.Tensor
    answers: list[Any]
    words: list[Optional[str]]


class Question(NamedTuple):
    """
    The request for an explanation.

    Args:
        task: name of a task.
        answer: label or text to explain; `None` for the answer of the model.
        word: number of the word of the text, or of the written answer, counted from 0; `None` for all of them.
        generation_options: for tasks that write.
    """

    task: str
    answer: Any
    word: Optional[int]
    generation_options: dict[str, Any]

    def ask(
        self,
        model: MMTransformerForMultiTask,
        processor: MMTransformerProcessor,
        outputs: MMTransformerModelOutput,
        texts: list[str],
        word_index: Optional[torch.Tensor],
        answers: Optional[list[Any]] = None,
        first_row: int = 0,
    ) -> Asked:
        """
        The answers and their scores.

        Args:
            outputs: of the encoders and the fusion.
            texts, word_index: of the rows.
            answers: the known answers, one per row.
            first_row: the number of the first row in messages.

        Raises:
            ValueError: if the task has no such answer, or a row no such word.
        """
        task = model.tasks[self.task]
        answers = [self.answer] * len(texts) if answers is None else answers
        if task.needs_decoder:
            return self._ask_written(model, processor, outputs, texts, answers, first_row)
        places: Optional[torch.Tensor] = None
        words: list[Optional[str]] = [None] * len(texts)
        if task.is_token_level:
            places, words = self._places_of_words(texts, word_index, first_row)
        elif self.word is not None:
            raise ValueError(f"Task {self.task!r} has one answer for the whole row: leave out `word`.")
        scores, found = task.answer_scores(model(encoder_outputs=outputs).logits[self.task], answers, places)
        return Asked(scores, found, words)

    def _places_of_words(self, texts: list[str], word_index: Any, first_row: int) -> tuple[torch.Tensor, list[Any]]:
        if self.word is None:
            return word_index >= 0, [None] * len(texts)
        places = word_index == self.word
        for row in range(len(texts)):
            if not places[row].any():
                raise ValueError(
                    f"Row {first_row + row} has no word {self.word}: the model reads only "
                    f"{int(word_index[row].max()) + 1} words of its text."
                )
        return places, [text[slice(*split_words(text)[self.word])] for text in texts]

    def _ask_written(
        self,
        model: MMTransformerForMultiTask,
        processor: MMTransformerProcessor,
        outputs: MMTransformerModelOutput,
        texts: list[str],
        answers: list[Any],
        first_row: int,
    ) -> Asked:
        task, tokenizer = model.tasks[self.task], processor.tokenizer
        writing = writing_tasks(model.tasks)[self.task]
        if any(answer is None for answer in answers):
            written = model.write(writing, outputs, **self.generation_options)
            found = processor.batch_decode(written, skip_special_tokens=True)
            answers = [text.strip() if answer is None else answer for answer, text in zip(answers, found, strict=True)]
        encoded = [task.encode_label(answer, "") for answer in answers]
        context = LabelContext(tokenizer=tokenizer, prompts=texts if model.config.has_language_model else None)
        labels = task.collate_labels(encoded, context).to(outputs.last_hidden_state.device)
        ids = [[i for i in row if i != -100] for row in labels.tolist()]
        places: Optional[torch.Tensor] = None
        words: list[Optional[str]] = [None] * len(answers)
        if self.word is not None:
            places = torch.zeros_like(labels, dtype=torch.bool)
            for row, row_ids in enumerate(ids):
                numbers, words[row] = self._written_word(tokenizer, first_row + row, row_ids, answers[row])
                places[row, numbers] = True
        scores, _ = task.answer_scores(model.read_written(writing, outputs, labels), ids, places)
        return Asked(scores, answers, words)

    def _written_word(
        self, tokenizer: PreTrainedTokenizerBase, row: int, ids: list[int], answer: str
    ) -> tuple[list[int], str]:
        # The number of words after a token gives the word of the token.
        counts = [len(tokenizer.decode(ids[: i + 1], skip_special_tokens=True).split()) for i in range(len(ids))]
        numbers = [i for i, count in enumerate(counts[:-1]) if count - 1 == self.word]
        if not numbers:
            raise ValueError(f"Row {row}: the answer {answer!r} has no word {self.word}.")
        return numbers, tokenizer.decode(ids, skip_special_tokens=True).split()[self.word]
