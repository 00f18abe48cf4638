"""The fused model: encoders, fusion, task layers."""

from functools import partial
from typing import Any, Optional

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import can_return_tuple, logging

from .configuration_mm_transformer import MMTransformerConfig
from .decoders import build_seq2seq
from .encoder_classes import takes_audio_mask
from .encoders import build_encoder, encoder_width
from .encoding import Encoding
from .fusion import Stream, fusion_class
from .fusion_layers import StreamProjection, masked_mean
from .generation import TextWriting
from .linear_probe import with_probe
from .modeling_base import MMTransformerPreTrainedModel
from .modeling_outputs import MMTransformerModelOutput, MMTransformerOutput
from .new_heads import load_with_tasks
from .pairs import PairReading
from .regularization import regularization_loss, take_starting_point
from .streams import FrameEmbedding, ItemOrder, NullText, check_index, check_keywords, drop_modalities
from .task_base import TaskHeads, check_label_shape
from .token_reduction import build_token_reduction


logger = logging.get_logger(__name__)


class MMTransformerModel(Encoding, MMTransformerPreTrainedModel):
    """
    A text encoder and encoders of images and sound, joined by a fusion in which text tokens see the tokens of the
    others.

    Args:
        config ([`MMTransformerConfig`]): What to build.
        text_model, vision_model, audio_model (`PreTrainedModel`, *optional*):
            Encoders that exist already, with `config.text_config`, ... as their configs. By default they are built from
            the config, with new weights.
    """

    def __init__(
        self,
        config: MMTransformerConfig,
        text_model: Optional[PreTrainedModel] = None,
        vision_model: Optional[PreTrainedModel] = None,
        audio_model: Optional[PreTrainedModel] = None,
    ):
        super().__init__(config)
        self._frozen_encoders: list[str] = []
        width = encoder_width(config.text_config)
        self.has_decoder = config.has_decoder
        if text_model is None and self.has_decoder:
            text_model = build_seq2seq(config.text_config, config.decoder_config)
        # If a task writes text, this is a whole encoder-decoder; fused is what its encoder gives.
        self.text_model = text_model if text_model is not None else build_encoder(config.text_config, "text")
        self.vision_model = self.audio_model = self.fusion = None
        if config.modalities:
            self.null_text = NullText(width)
            options = config.fusion_kwargs
            self.fusion = fusion_class(config.fusion_type, options)(config, config.modalities, width, **options)
        if config.vision_config is not None:
            self.vision_model = vision_model or build_encoder(config.vision_config, "vision")
            self.vision_projection = StreamProjection(config, encoder_width(config.vision_config))
            self.vision_reduction = build_token_reduction(config, config.vision_token_reduction)
            self.frame_embedding = FrameEmbedding(config.frame_embedding, config.num_frames, config.fusion_hidden_size)
        if config.audio_config is not None:
            self.audio_model = audio_model or build_encoder(config.audio_config, "audio")
            self.audio_takes_mask = takes_audio_mask(self.audio_model)
            self.audio_projection = StreamProjection(config, encoder_width(config.audio_config))
        for name in config.modalities if config.item_order else []:
            setattr(self, f"{name}_order", ItemOrder(config.fusion_hidden_size))
        self.post_init()
        self.freeze()

    @property
    def text_encoder(self) -> PreTrainedModel:
        return self.text_model.get_encoder() if self.has_decoder else self.text_model

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None,
        pixel_values: Optional[torch.Tensor] = None,
        image_index: Optional[torch.Tensor] = None,
        frame_index: Optional[torch.Tensor] = None,
        input_values: Optional[torch.Tensor] = None,
        input_features: Optional[torch.Tensor] = None,
        audio_attention_mask: Optional[torch.Tensor] = None,
        audio_index: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        text_features: Optional[torch.Tensor] = None,
        image_features: Optional[torch.Tensor] = None,
        audio_features: Optional[torch.Tensor] = None,
        audio_feature_mask: Optional[torch.Tensor] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: bool | list[int] | None = None,
        **kwargs,
    ) -> MMTransformerModelOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, text_len)`): Token ids of the text.
            attention_mask (`torch.Tensor` of shape `(batch, text_len)`, *optional*):
                1 at tokens, 0 at padding. A row of zeros has no text; a learned vector stands in for it.
            token_type_ids (`torch.LongTensor` of shape `(batch, text_len)`, *optional*): For encoders that take them.
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*):
                The distinct images, and frames of videos, of the batch.
            image_index (`torch.LongTensor` of shape `(batch, max_images)`, *optional*):
                Which images belong to each row, -1 for none. Defaults to one image per row, in order.
            frame_index (`torch.LongTensor` of shape `(batch, max_images)`, *optional*):
                For images that are frames of a video, which frame it is, counted from 0; -1 for pictures.
            input_values or input_features (`torch.FloatTensor` of shape `(num_clips, ...)`, *optional*):
                The distinct clips of sound of the batch, as the audio encoder takes them.
            audio_attention_mask (`torch.Tensor` of shape `(num_clips, samples or frames)`, *optional*):
                1 where the clip is, 0 at padding, at the rate of the encoder's input.
            audio_index (`torch.LongTensor` of shape `(batch, max_clips)`, *optional*):
                Which clips belong to each row, -1 for none. Defaults to one clip per row, in order.
            inputs_embeds (`torch.FloatTensor` of shape `(batch, text_len, text hidden size)`, *optional*):
                Instead of `input_ids`, for encoders that take it.
            text_features (`torch.FloatTensor` of shape `(batch, text_len, text hidden size)`, *optional*):
                What the text encoder gives, as [`encode`] returns it; it then does not run, and `input_ids` may be left
                out. The same holds for images and sound:
            image_features (`torch.FloatTensor` of shape `(num_images, tokens, vision hidden size)`, *optional*):
                Instead of `pixel_values`.
            audio_features (`torch.FloatTensor` of shape `(num_clips, tokens, audio hidden size)`, *optional*):
                Instead of `input_values` or `input_features`.
            audio_feature_mask (`torch.BoolTensor` of shape `(num_clips, tokens)`, *optional*):
                Which of `audio_features` belong to the clip and not to its padding; all by default.
            output_attentions, output_hidden_states (`bool`, *optional*):
                Whether to return those of the fusion; default to those of the config. `output_hidden_states=[0, -1]`
                returns those layers, and `None` in the places of others.

        Raises:
            ValueError: if the images or clips do not fit the rows, are given twice, or the model has no encoder for
                them.
            TypeError: if there is no such argument.
        """
        check_keywords(self, kwargs)
        encoded, kept = self.encode_rows(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            pixel_values=pixel_values,
            image_index=image_index,
            frame_index=frame_index,
            input_values=input_values,
            input_features=input_features,
            audio_attention_mask=audio_attention_mask,
            audio_index=audio_index,
            inputs_embeds=inputs_embeds,
            text_features=text_features,
            image_features=image_features,
            audio_features=audio_features,
            audio_feature_mask=audio_feature_mask,
        )
        return self.fuse(encoded, output_attentions, output_hidden_states, kept)

    def encode_rows(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None,
        pixel_values: Optional[torch.Tensor] = None,
        image_index: Optional[torch.Tensor] = None,
        frame_index: Optional[torch.Tensor] = None,
        input_values: Optional[torch.Tensor] = None,
        input_features: Optional[torch.Tensor] = None,
        audio_attention_mask: Optional[torch.Tensor] = None,
        audio_index: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        text_features: Optional[torch.Tensor] = None,
        image_features: Optional[torch.Tensor] = None,
        audio_features: Optional[torch.Tensor] = None,
        audio_feature_mask: Optional[torch.Tensor] = None,
    ) -> tuple[dict[str, Stream], Optional[dict[str, torch.Tensor]]]:
        """
        The encoders alone: what [`forward`] does before the fusion, with the same arguments.

        Returns:
            The tokens of each modality, as [`fuse`] takes them, and in training with modality dropout which rows keep
            which modality.
        """
        text = next((x for x in (input_ids, inputs_embeds, text_features) if x is not None), None)
        if text is None:
            raise ValueError(
                "Give the texts as input_ids, inputs_embeds or text_features; attention_mask 0 says that there are "
                "none."
            )
        batch_size, device = text.shape[0], text.device
        if attention_mask is None:
            attention_mask = torch.ones(text.shape[:2], dtype=torch.int64, device=device)
        items: dict[str, Any] = {
            "vision": {"pixel_values": pixel_values, "features": image_features},
            "audio": {"input_values": input_values, "input_features": input_features, "features": audio_features},
        }
        for name, values in items.items():
            items[name] = {key: value for key, value in values.items() if value is not None and value.shape[0] > 0}
            if len(items[name]) > 1:
                raise ValueError(f"The {name} input is given as {' and as '.join(items[name])}; give one of them.")
        checked = {
            "vision": self._index("vision", image_index, items["vision"], batch_size, device),
            "audio": self._index("audio", audio_index, items["audio"], batch_size, device),
        }
        index = {name: rows for name, (rows, _) in checked.items()}
        is_full = {name: full for name, (_, full) in checked.items()}
        if audio_attention_mask is not None and items["audio"]:
            num_clips = next(iter(items["audio"].values())).shape[0]
            if audio_attention_mask.shape[0] != num_clips:
                raise ValueError(
                    f"audio_attention_mask has {audio_attention_mask.shape[0]} rows for {num_clips} clips."
                )
            items["audio"]["attention_mask"] = audio_attention_mask
        if items["audio"]:
            items["audio"]["feature_mask"] = audio_feature_mask
        kept = None
        if self.training and self.config.modality_dropout_probabilities:
            present = {name: (index[name] >= 0).any(-1) for name in self.config.modalities}
            present["text"] = attention_mask.bool().any(-1)
            kept = drop_modalities(present, self.config.modality_dropout_probabilities)
            attention_mask = attention_mask * kept["text"][:, None]
            index.update({m: index[m].masked_fill(~kept[m][:, None], -1) for m in self.config.modalities})
            is_full = dict.fromkeys(is_full, False)

        text_inputs = {"input_ids": input_ids, "token_type_ids": token_type_ids, "inputs_embeds": inputs_embeds}
        encoded = {"text": self._encode_text(attention_mask, text_features, **text_inputs)}
        for name in self.config.modalities:
            frames = frame_index if name == "vision" else None
            stream = self._encode_items(name, items[name], index[name], frames, is_full[name])
            if stream is not None:
                encoded[name] = stream
        return encoded, kept

    def fuse(
        self,
        encoded: dict[str, Stream],
        output_attentions: Optional[bool] = None,
        output_hidden_states: bool | list[int] | None = None,
        kept: Optional[dict[str, torch.Tensor]] = None,
    ) -> MMTransformerModelOutput:
        """
        What [`forward`] does after the encoders have run.

        Args:
            encoded: modality -> its tokens; "text" and whatever else there is.
            kept: modality -> (batch,) bool, what modality dropout has left of each row.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions and self.config._attn_implementation != "eager":
            logger.warning_once(
                f"attn_implementation={self.config._attn_implementation!r} returns no attentions; load the model with "
                "attn_implementation='eager', or call model.set_attn_implementation('eager')."
            )
        text = encoded["text"]
        last_hidden_state, fused = text.hidden_states, None
        if self.fusion is not None:
            streams = [stream for name, stream in encoded.items() if name != "text"]
            fused = self.fusion(text.hidden_states, text.mask, streams, output_attentions, output_hidden_states)
            last_hidden_state = fused.hidden_states
        return MMTransformerModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=masked_mean(last_hidden_state, text.mask),
            attention_mask=text.mask,
            encoded=encoded,
            kept=kept,
            hidden_states=fused.all_hidden_states if fused is not None else None,
            attentions=fused.attentions if fused is not None else None,
            cross_attentions=fused.cross_attentions if fused is not None else None,
        )

    def _index(
        self, name: str, index: Optional[torch.Tensor], items: dict[str, torch.Tensor], batch_size: int, device
    ) -> tuple[torch.Tensor, bool]:
        num_items = next(iter(items.values())).shape[0] if items else 0
        if items and name not in self.config.modalities:
            raise ValueError(
                f"This model has no {name} encoder (its config has no `{name}_config`), but got "
                f"{'images' if name == 'vision' else 'sound'}."
            )
        names = ("image_index", "images") if name == "vision" else ("audio_index", "clips")
        return check_index(index, batch_size, num_items, device, *names)


class MMTransformerForMultiTask(TextWriting, PairReading, MMTransformerPreTrainedModel):
    """
    The fused model with a task layer for each of `config.tasks`. Its loss is the sum over the tasks of `loss_weight`
    times the mean loss of what is labelled, plus the regularizer.

    Args:
        config ([`MMTransformerConfig`]): What to build; needs at least one task.
        text_model, vision_model, audio_model (`PreTrainedModel`, *optional*): See [`MMTransformerModel`].

    Raises:
        ValueError: if there is no task.
    """

    # Each loss is divided by the number of labels of its own task, which the Trainer cannot know.
    accepts_loss_kwargs = False

    def __init__(self, config: MMTransformerConfig, **encoders):
        super().__init__(config)
        self.tasks = config.get_tasks()
        if not self.tasks:
            raise ValueError(
                "MMTransformerForMultiTask needs tasks, for example tasks=[Classification('topic', labels=[...])]."
            )
        self.model = MMTransformerModel(config, **encoders)
        width = encoder_width(config.text_config)
        heads = {
            name: with_probe(task.build_head(config, width), task, config)
            for name, task in self.tasks.items()
            if not task.needs_decoder
        }
        self.heads = TaskHeads(heads)
        # Towards which an L2-SP regularizer pulls: the weights with which training started. Not part of the weights.
        self.starting_point: Optional[dict[str, torch.Tensor]] = None
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, tasks=None, **kwargs):
        """
        As [`MMTransformerPreTrainedModel.from_pretrained`] does.

        Args:
            tasks (`list[Task]`, *optional*):
                The tasks that the model is to have in place of the saved ones. New tasks, and those of another kind or
                with other labels, get heads with new weights; the others keep their heads.

        Raises:
            OSError: one sentence, if files are missing or damaged.
            ValueError: one sentence, if the config or the shapes of weights do not fit, or if only one of the saved and
                the new tasks writes, for which the decoder would be missing or lost.

        Example:

        ```python
        >>> saved = MMTransformerForMultiTask.from_pretrained("my-model")
        >>> tasks = [*saved.tasks.values(), Classification("mood", labels=["bad", "good"])]
        >>> model = MMTransformerForMultiTask.from_pretrained("my-model", tasks=tasks)
        ```
        """
        if "num_labels" in kwargs:
            raise ValueError("num_labels belongs to a task: give tasks=[Classification('name', labels=[...])].")
        load = partial(super().from_pretrained, pretrained_model_name_or_path, *args)
        if tasks is None and kwargs.get("config") is None:
            return load(**kwargs)
        return load_with_tasks(load, pretrained_model_name_or_path, tasks, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: Optional[torch.Tensor] = None,
        attention_mask: Optional[torch.Tensor] = None,
        token_type_ids: Optional[torch.Tensor] = None,
        pixel_values: Optional[torch.Tensor] = None,
        image_index: Optional[torch.Tensor] = None,
        frame_index: Optional[torch.Tensor] = None,
        input_values: Optional[torch.Tensor] = None,
        input_features: Optional[torch.Tensor] = None,
        audio_attention_mask: Optional[torch.Tensor] = None,
        audio_index: Optional[torch.Tensor] = None,
        inputs_embeds: Optional[torch.Tensor] = None,
        text_features: Optional[torch.Tensor] = None,
        image_features: Optional[torch.Tensor] = None,
        audio_features: Optional[torch.Tensor] = None,
        audio_feature_mask: Optional[torch.Tensor] = None,
        encoder_outputs: Optional[MMTransformerModelOutput] = None,
        labels: Optional[dict[str, torch.Tensor]] = None,
        num_items_in_batch: Optional[dict[str, torch.Tensor]] = None,
        output_attentions: Optional[bool] = None,
        output_hidden_states: bool | list[int] | None = None,
        **kwargs,
    ) -> MMTransformerOutput:
        r"""
        Args:
            labels (`dict[str, torch.Tensor]`, *optional*):
                Labels of the tasks, by name; -100 (integers) or NaN (floats) where a row has none. A task that is not
                in it has no label at all.
            num_items_in_batch (`dict[str, torch.Tensor]`, *optional*):
                By how much to divide the summed loss of each task, instead of the number of its labels in `labels`;
                under `"regularization"`, by how much to divide the regularizer. This is how one optimiser step over
                several batches gets the loss of one big batch.
            encoder_outputs ([`MMTransformerModelOutput`], *optional*):
                What `self.model` gave for these inputs, if that is known already.
            input_ids, attention_mask, token_type_ids, pixel_values, image_index, frame_index, input_values,
            input_features, audio_attention_mask, audio_index, inputs_embeds, text_features, image_features,
            audio_features, audio_feature_mask, output_attentions, output_hidden_states:
                See [`MMTransformerModel.forward`].

        Raises:
            ValueError: if `labels` names a task that the model does not have, labels have another shape than their
                task wants, or the images do not fit the rows.
            TypeError: if there is no such argument.
        """
        check_keywords(self, kwargs)
        outputs = encoder_outputs
        if outputs is None:
            outputs = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                token_type_ids=token_type_ids,
                pixel_values=pixel_values,
                image_index=image_index,
                frame_index=frame_index,
                input_values=input_values,
                input_features=input_features,
                audio_attention_mask=audio_attention_mask,
                audio_index=audio_index,
                inputs_embeds=inputs_embeds,
                text_features=text_features,
                image_features=image_features,
                audio_features=audio_features,
                audio_feature_mask=audio_feature_mask,
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
            )
        logits = self.heads(outputs)
        loss = losses = None
        if labels is not None:
            if outputs.kept is not None:
                labels = {name: self.tasks[name].labels_left(value, outputs.kept) if name in self.tasks else value
                          for name, value in labels.items()}  # fmt: skip
            for name, task in self.tasks.items():
                if task.needs_decoder:
                    logits[name] = self.read_written(task, outputs, labels.get(name))
                elif task.needs_mismatches and name in labels:
                    mismatched = self.judge_mismatched(name, outputs, logits, labels[name])
                    logits[name] = torch.cat([logits[name], mismatched], 1)
            losses = self._losses(logits, labels, num_items_in_batch or {})
            weights = {name: task.loss_weight for name, task in self.tasks.items()}
            loss = torch.stack([value * weights.get(name, 1.0) for name, value in losses.items()]).sum()
        return MMTransformerOutput(
            loss=loss,
            losses=losses,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )

    def _losses(
        self, logits: dict[str, torch.Tensor], labels: dict[str, torch.Tensor], divisors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        unknown = sorted(set(labels) - set(self.tasks))
        if unknown:
            raise ValueError(f"labels has {unknown[0]!r}, but the tasks of this model are {', '.join(self.tasks)}.")
        losses = {}
        for name, task in self.tasks.items():
            if name in labels:
                check_label_shape(task, logits[name], labels[name])
                total, count = task.loss(logits[name], labels[name])
                divisor = divisors.get(name, count)
                losses[name] = total / torch.where(divisor > 0, divisor, torch.ones_like(divisor))
            else:
                # The head takes part in every backward pass, so that DDP finds all of its parameters.
                losses[name] = logits[name].float().sum() * 0.0
        if self.config.regularization is not None:
            losses["regularization"] = self.regularization_loss() / divisors.get("regularization", 1)
        return losses

    @property
    def new_modules(self) -> list[str]:
        """
        The names of the parts that are no part of a pretrained encoder. Whoever trains adapters gives them as
        `modules_to_save`, so that they are trained, and saved with the adapters:
        `LoraConfig(target_modules=[...], modules_to_save=model.new_modules)`.
        """
        parts = [name for name, child in self.model.named_children() if not name.endswith("_model")]
        names = [name for name in parts if any(True for _ in getattr(self.model, name).parameters())]
        return [*names, "heads"] if self.heads.names else names

    def regularization_loss(self) -> torch.Tensor:
        """lambda times the sum of the penalties; needs `config.regularization`."""
        if self.starting_point is None:
            self.starting_point = take_starting_point(self, self.config.regularization)
        return regularization_loss(self, self.config.regularization, self.starting_point)

    def decode(self, outputs: MMTransformerOutput, word_index: Optional[torch.Tensor] = None) -> list[dict[str, Any]]:
        """
        The answers in words: for each row a dict from task name to answer, such as `{"sentiment": {"label":
        "positive", "score": 0.98}}`. For tasks that write, see [`generate`].

        Args:
            outputs: what the model returned.
            word_index (`torch.LongTensor` of shape `(batch, text_len)`, *optional*):
                From the processor; tasks that label words then answer per word instead of per token.
        """
        answers = {
            name: task.decode(outputs.logits[name], word_index)
            for name, task in self.tasks.items()
            if not task.needs_decoder
        }
        num_rows = len(next(iter(answers.values()), []))
        return [{name: answers[name][row] for name in answers} for row in range(num_rows)]


__all__ = [
    "MMTransformerForMultiTask",
    "MMTransformerModel",
    "MMTransformerPreTrainedModel",
]
