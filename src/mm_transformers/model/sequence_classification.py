"""A model with one choice to make, for whoever expects nothing else."""

from typing import Optional

import torch
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import can_return_tuple

from .configuration_mm_transformer import MMTransformerConfig
from .modeling_mm_transformer import MMTransformerForMultiTask


class MMTransformerForSequenceClassification(MMTransformerForMultiTask):
    """
    A [`MMTransformerForMultiTask`] whose only task is a [`Classification`], with inputs and outputs as other models for
    sequence classification have them: `AutoModelForSequenceClassification` loads it, and
    `pipeline("text-classification")` takes it.

    Raises:
        ValueError: if the model has other tasks.
    """

    auto_classes = ("AutoModelForSequenceClassification",)

    def __init__(self, config: MMTransformerConfig, **encoders):
        super().__init__(config, **encoders)
        tasks = list(self.tasks.values())
        if len(tasks) != 1 or tasks[0].auto_class not in self.auto_classes:
            found = ", ".join(f"{task.name} ({task.kind})" for task in tasks) or "none"
            raise ValueError(
                f"AutoModelForSequenceClassification takes models with one task, a classification; the tasks of this "
                f"one are: {found}. Load it by AutoModel."
            )

    @can_return_tuple
    def forward(
        self, input_ids: Optional[torch.Tensor] = None, labels: Optional[torch.Tensor] = None, **kwargs
    ) -> SequenceClassifierOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, text_len)`): Token ids of the text.
            labels (`torch.LongTensor` of shape `(batch,)`, *optional*): Ids of labels, -100 where missing.
            kwargs: see [`MMTransformerForMultiTask.forward`].
        """
        [name] = self.tasks
        outputs = super().forward(input_ids=input_ids, labels=None if labels is None else {name: labels}, **kwargs)
        return SequenceClassifierOutput(
            loss=outputs.loss,
            logits=outputs.logits[name],
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = ["MMTransformerForSequenceClassification"]
