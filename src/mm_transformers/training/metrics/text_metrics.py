"""Offline metrics of written answers: those of sacrebleu and rouge_score, as `evaluate.Metric`s."""

import re
from typing import Any, ClassVar

import datasets
import evaluate


class TextMetric(evaluate.Metric):
    """
    A metric of texts against one reference each.

    Subclasses set `key`, the name of the metric and of its result, and implement [`score`].
    """

    key: ClassVar[str]
    less_is_better: ClassVar[bool] = False

    @classmethod
    def names(cls) -> list[str]:
        """The names of its results."""
        return [cls.key]

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, float]:
        return {self.key: float(self.score(list(references), list(predictions)))}

    def score(self, references: list[str], predictions: list[str]) -> float:
        raise NotImplementedError

    @classmethod
    def fits(cls, references: Any) -> bool:
        """Whether the metric can compare such values."""
        return isinstance(references, list)


class Bleu(TextMetric):
    """
    BLEU of the whole corpus, 0 to 100 (https://arxiv.org/abs/1804.08771).

    Args:
        tokenize (`str`, *optional*, defaults to `"13a"`): sacrebleu's tokenizer; `"zh"` for Chinese, `"char"` for
            languages without spaces.
    """

    key = "bleu"

    def __init__(self, tokenize: str = "13a", **kwargs: Any):
        super().__init__(**kwargs)
        self.tokenize = tokenize

    def score(self, references: list[str], predictions: list[str]) -> float:
        from sacrebleu import corpus_bleu

        return corpus_bleu(predictions, [references], tokenize=self.tokenize).score


class ChrF(TextMetric):
    """chrF of the whole corpus, 0 to 100: F-score of character n-grams (https://aclanthology.org/W15-3049)."""

    key = "chrf"

    def score(self, references: list[str], predictions: list[str]) -> float:
        from sacrebleu import corpus_chrf

        return corpus_chrf(predictions, [references]).score


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
