"""Offline metrics of written answers: those of sacrebleu and rouge_score, as `evaluate.Metric`s."""

import re
from typing import Any

from .base import TextMetric, register_metric


@register_metric
class Bleu(TextMetric):
    """
    BLEU of the whole corpus, 0 to 100 (https://arxiv.org/abs/1804.08771).

    Args:
        tokenize (`str`, *optional*, defaults to `"13a"`): sacrebleu's tokenizer; `"zh"` for Chinese, `"char"` for
            languages without spaces.
    """

    key, scale = "bleu", 100.0

    def __init__(self, tokenize: str = "13a", **kwargs: Any):
        super().__init__(**kwargs)
        self.tokenize = tokenize

    def score(self, references: list[str], predictions: list[str]) -> float:
        from sacrebleu import corpus_bleu

        return corpus_bleu(predictions, [references], tokenize=self.tokenize).score


@register_metric
class ChrF(TextMetric):
    """chrF of the whole corpus, 0 to 100: F-score of character n-grams (https://aclanthology.org/W15-3049)."""

    key, scale = "chrf", 100.0

    def score(self, references: list[str], predictions: list[str]) -> float:
        from sacrebleu import corpus_chrf

        return corpus_chrf(predictions, [references]).score


@register_metric
class ExactMatch(TextMetric):
    """
    Share of the rows with an exact text, white space around it aside.

    Letters that the tokenizer cannot write, such as capitals for an uncased one, are never right.
    """

    key = "exact_match"

    def score(self, references: list[str], predictions: list[str]) -> float:
        pairs = zip(references, predictions, strict=True)
        return sum(reference.strip() == prediction.strip() for reference, prediction in pairs) / len(references)


class _Words:
    """Lower-case words of any script; of scripts without spaces between words, characters."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", text.lower())


@register_metric
class RougeL(TextMetric):
    """
    Mean over the rows of ROUGE-L, 0 to 1 (https://aclanthology.org/W04-1013), for captions.

    It compares words, or characters in Chinese and Japanese. Needs `rouge_score`.
    """

    key = "rouge_l"

    def score(self, references: list[str], predictions: list[str]) -> float:
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise ImportError("The metric 'rouge_l' needs `rouge-score`: pip install rouge-score") from error
        scorer = RougeScorer(["rougeL"], tokenizer=_Words())
        scores = [scorer.score(r, p)["rougeL"].fmeasure for r, p in zip(references, predictions, strict=True)]
        return sum(scores) / len(scores)
