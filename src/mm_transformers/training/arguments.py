"""Training arguments with what is special to a fused model."""

from dataclasses import dataclass, field
from typing import Optional

from transformers import Seq2SeqTrainingArguments


@dataclass
class MMTrainingArguments(Seq2SeqTrainingArguments):
    """
    [`~transformers.Seq2SeqTrainingArguments`], in which tasks that write do so in evaluation unless told otherwise,
    with learning rates for the parts of the model and an order of rows that share images. [`MMTrainer`] takes plain
    [`~transformers.TrainingArguments`] too.

    Args:
        encoder_learning_rate (`float`, *optional*):
            Of the encoders, and of the decoder if there is one. Defaults to `learning_rate`.
        fusion_learning_rate (`float`, *optional*):
            Of all that is between encoders and heads. Defaults to `learning_rate`. Gates learn ten times as fast.
        head_learning_rate (`float`, *optional*): Of the task layers. Defaults to `learning_rate`.
        layerwise_lr_decay (`float`, *optional*, defaults to 1.0):
            Layers of encoders learn the more slowly the lower they are: the highest at this times the rate of the
            encoders, the next at its square, ..., and the embeddings the most slowly (ELECTRA,
            https://arxiv.org/abs/2003.10555; usual are 0.65 to 0.95).
        rows_per_image (`int`, *optional*, defaults to 1):
            Rows of one image come up to so many at a time, in an otherwise random order: a batch reads and encodes each
            image once, so an epoch is the faster the more rows share theirs. Batches hold fewer images then.

    Raises:
        ValueError: if `layerwise_lr_decay` is not in (0, 1], a rate is negative, or `rows_per_image` is less than 1 or
            is asked for together with another order of the rows.
    """

    predict_with_generate: bool = field(
        default=True, metadata={"help": "Whether tasks that write do so in evaluation."}
    )
    encoder_learning_rate: Optional[float] = field(
        default=None, metadata={"help": "Learning rate of the encoders; defaults to learning_rate."}
    )
    fusion_learning_rate: Optional[float] = field(
        default=None, metadata={"help": "Learning rate of the fusion; defaults to learning_rate."}
    )
    head_learning_rate: Optional[float] = field(
        default=None, metadata={"help": "Learning rate of the task layers; defaults to learning_rate."}
    )
    layerwise_lr_decay: float = field(
        default=1.0, metadata={"help": "By how much more slowly each layer of an encoder learns than the one above it."}
    )
    rows_per_image: int = field(
        default=1, metadata={"help": "How many rows that share an image come together in the order of training."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.rows_per_image < 1:
            raise ValueError(f"rows_per_image must be at least 1, but is {self.rows_per_image}.")
        if self.rows_per_image > 1 and self.train_sampling_strategy != "random":
            raise ValueError(
                f"rows_per_image={self.rows_per_image} is an order of the rows of its own: leave out "
                f"train_sampling_strategy={self.train_sampling_strategy!r}."
            )
        if not 0 < self.layerwise_lr_decay <= 1:
            raise ValueError(
                f"layerwise_lr_decay must be greater than 0 and at most 1, but is {self.layerwise_lr_decay}."
            )
        for name in ("encoder_learning_rate", "fusion_learning_rate", "head_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and rate < 0:
                raise ValueError(f"{name} must be at least 0, but is {rate}.")
