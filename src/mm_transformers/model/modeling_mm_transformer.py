"""
The fused model, from its outputs to its heads.

[`MMTransformerModel`] runs encoders and fusion, [`MMTransformerForMultiTask`] adds a head per task,
[`MMTransformerForSequenceClassification`] has one head only.
"""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, TypeVar, cast

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import GenerationConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import ModelOutput, can_return_tuple, logging

from .answers import decode_answers, evaluation_mode
from .checkpoint_checks import check_fit, checked, is_pickle_error, what_is_wrong
from .configuration_mm_transformer import MMTransformerConfig
from .custom_code import reference, warn_if_not_copied, write_code
from .decoders import build_writer, text_encoder_of
from .distributed import is_sharded
from .embeddings import embed_rows, rows_with_text, unit_length
from .encoder_classes import blank_input, takes_audio_mask
from .encoder_dtypes import dtypes_of_encoders, loading, main_dtype, restore_dtypes, saved_dtypes
from .encoder_features import EncoderFeatures
from .encoders import build_encoder, encoder_width
from .freeze_rules import batch_norms, freeze_parameters, frozen_batch_norm
from .fusion import Stream
from .fusion_base import FusionOutput, computed_dtype
from .fusion_layers import TEXT_POOLINGS, Gate, StreamProjection, masked_mean
from .generation import AnswerDecoder, WritingTask, split_inputs, task_that_writes, writing_tasks
from .input_checks import check_finite_weights, check_layout, is_finite, what_is_wrong_with_inputs
from .joint_reading import build_fusion, fuse_jointly
from .language_model import LanguageModelWriter, read_contiguously
from .linear_probe import with_probe
from .modalities import ENCODERS, OTHER_ENCODERS, modalities_of, own_encoders, own_inputs
from .new_heads import load_with_tasks
from .oddness import Oddness
from .pairs import PairTask, choose_partners, may_mismatch
from .pretrained_encoders import default_dtype, load_encoders, split_options, with_defaults
from .regularization import regularization_loss, take_starting_point
from .row_streams import other_streams
from .safe_writing import saved_aside
from .streams import FRAME_EMBEDDINGS, ItemOrder, NullText, check_index, check_keywords, drop_modalities
from .task_base import Task, TaskHeads, check_label_shape
from .token_reduction import build_token_reduction


logger = logging.get_logger(__name__)

_Model = TypeVar("_Model", bound="MMTransformerPreTrainedModel")

# The arguments that `save_pretrained(push_to_hub=True)` passes on to `push_to_hub`.
_PUSHING = ("repo_id", "commit_message", "private", "token", "create_pr", "max_shard_size", "revision", "tags")


@dataclass
class MMTransformerModelOutput(ModelOutput):
    """
    Output of [`MMTransformerModel`]: the encoder outputs, fused.

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, text_len, text hidden size)`):
            The fused states: the text tokens, after attending to the other modalities of their row.
        pooler_output (`torch.FloatTensor` of shape `(batch, text hidden size)`):
            Mean of `last_hidden_state` over the tokens that are not padding, or the last of these (`text_pooling`).
        attention_mask (`torch.BoolTensor` of shape `(batch, text_len)`):
            True at tokens, False at padding. In rows without a text, the first place holds a learned vector and is
            True.
        encoded (`dict[str, Stream]`):
            The encoder outputs before the fusion: modality -> its tokens and their mask. Modalities that the batch
            lacks are absent.
        kept (`dict[str, torch.BoolTensor]`, *optional*, in training with modality dropout):
            Modality -> `(batch,)`, the rows that keep it after dropout.
        hidden_states (`tuple(torch.FloatTensor)`, *optional*, when `output_hidden_states=True`):
            Text tokens before and after each fusion layer, `(batch, text_len, fusion_hidden_size)`.
        attentions (`tuple(torch.FloatTensor)`, *optional*, when `output_attentions=True`):
            Self-attention of each fusion layer, in the fusion kinds that have it.
        cross_attentions (`tuple(torch.FloatTensor)`, *optional*, when `output_attentions=True`):
            Attention of text tokens to the tokens of images, sound and columns in each fusion layer,
            `(batch, heads, text_len, max_images * tokens per image + max_clips * tokens per clip + columns)`; 0 in
            rows without any. Needs `attn_implementation="eager"`.
    """

    last_hidden_state: Optional[torch.Tensor] = None
    pooler_output: Optional[torch.Tensor] = None
    attention_mask: Optional[torch.Tensor] = None
    encoded: Optional[dict[str, Stream]] = None
    kept: Optional[dict[str, torch.Tensor]] = None
    hidden_states: Optional[tuple[torch.Tensor, ...]] = None
    attentions: Optional[tuple[torch.Tensor, ...]] = None
    cross_attentions: Optional[tuple[torch.Tensor, ...]] = None


@dataclass
class MMTransformerOutput(ModelOutput):
    """
    Output of [`MMTransformerForMultiTask`].

    Args:
        loss (`torch.FloatTensor` of shape `()`, *optional*, when `labels` is given):
            Sum of `loss_weight * losses[task]` over the tasks, plus `losses["regularization"]`.
        losses (`dict[str, torch.Tensor]`, *optional*, when `labels` is given):
            The mean loss of each task over its labels, 0 without any; and `"regularization"`, if there is one.
        logits (`dict[str, torch.Tensor]`): The logits of each task, in the shape of its class.
        hidden_states, attentions, cross_attentions: see [`MMTransformerModelOutput`].
    """

    loss: Optional[torch.Tensor] = None
    losses: Optional[dict[str, torch.Tensor]] = None
    logits: Optional[dict[str, torch.Tensor]] = None
    hidden_states: Optional[tuple[torch.Tensor, ...]] = None
    attentions: Optional[tuple[torch.Tensor, ...]] = None
    cross_attentions: Optional[tuple[torch.Tensor, ...]] = None


class MMTransformerPreTrainedModel(PreTrainedModel):
    """Initialisation, saving and the attention implementations, for all models of this type."""

    config: MMTransformerConfig
    config_class = MMTransformerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("text", "image", "video", "audio")
    output_modalities = ("text",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["gate_alpha", "logit_scale", "oddness"]
    # A config whose calibration was removed may stand beside its statistics.
    _keys_to_ignore_on_load_unexpected = [r"^oddness\."]
    # True from loading until the first forward pass, which finds weights that are NaN.
    _is_unproven = False
    _no_split_modules = ["CrossAttentionLayer", "CoAttentionLayer", "SelfAttentionLayer"]

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers skips `_init_weights` on parts of custom code, so gates, latents and whole encoders would keep
        # uninitialised memory.
        return False

    def post_init(self) -> None:
        super().post_init()
        # The class lists the layers of all fusions and encoders; FSDP and loading need only those of this model.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}
        names = {part for name in self.state_dict() for part in name.split(".")}
        self._keep_in_fp32_modules_strict -= set(type(self)._keep_in_fp32_modules_strict) - names

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Gate):
            init.zeros_(module.gate_alpha)
        elif hasattr(module, "init_own_parameters"):
            module.init_own_parameters(self.config.initializer_range)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        # If a checkpoint lacks a weight-normed layer, the audio encoders of transformers leave its two parameters
        # uninitialised: they initialise the product of the two.
        for module in self.modules():
            if is_parametrized(module, "weight") and hasattr(module.parametrizations.weight, "original1"):
                direction = module.parametrizations.weight.original1
                if not direction.is_meta and not getattr(direction, "_is_hf_initialized", False):
                    # As in torch for convolutions; the layer splits it into direction and length.
                    module.weight = nn.init.kaiming_uniform_(torch.empty_like(direction), a=5**0.5)
        super().initialize_weights()

    @staticmethod
    def _finalize_model_loading(model: PreTrainedModel, load_config: Any, loading_info: Any) -> Any:
        # Before memory is used for weights that are missing or have other shapes.
        if not getattr(load_config, "is_quantized", False):
            check_fit(model, loading_info)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    @property
    def dtype(self) -> torch.dtype:
        """That of fusion and heads; frozen encoders may have another one."""
        return main_dtype(self) or super().dtype

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
        return {**super()._get_dtype_plan(dtype), **saved_dtypes(self.config)}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        names = list(inspect.signature(type(self).forward).parameters)[1:] if args else ()
        check_layout(self, {**dict(zip(names, args, strict=False)), **kwargs})
        try:
            outputs = super().__call__(*args, **kwargs)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            problem = what_is_wrong_with_inputs(self, args, kwargs)
            if problem is None:
                raise
            raise ValueError(problem) from error
        if self._is_unproven:
            self._is_unproven = False
            if not is_finite(outputs):
                check_finite_weights(self)
        return outputs

    def enable_input_require_grads(self) -> None:
        """
        As [`~transformers.PreTrainedModel.enable_input_require_grads`] does, also for encoders whose embeddings return
        more than one tensor (Swin, Hiera, I-BERT).
        """

        def want_gradient(module: nn.Module, inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, (tuple, list)) else output
            if isinstance(states, torch.Tensor) and states.is_floating_point():
                states.requires_grad_(True)

        embeddings: dict[int, nn.Module] = {}
        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                try:
                    found = module.get_input_embeddings()
                except NotImplementedError:
                    continue
                if isinstance(found, nn.Module):
                    embeddings[id(found)] = found
        # Where `disable_input_require_grads` looks for them.
        self._require_grads_hooks = [module.register_forward_hook(want_gradient) for module in embeddings.values()]
        if self._require_grads_hooks:
            self._require_grads_hook = self._require_grads_hooks[0]

    def resize_token_embeddings(
        self,
        new_num_tokens: Optional[int] = None,
        pad_to_multiple_of: Optional[int] = None,
        mean_resizing: bool = True,
    ) -> nn.Module:
        """As [`~transformers.PreTrainedModel.resize_token_embeddings`] does; with a decoder, that of both."""
        inner = getattr(self, "model", self)
        if not inner.has_decoder:
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        text_model, config = inner.text_model, self.config
        if pad_to_multiple_of is not None:
            # Rounded up here, since Marian gives its bias the number that was asked for.
            size = new_num_tokens if new_num_tokens is not None else config.vocab_size
            new_num_tokens = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if config.decoder_config is None:
            # An encoder-decoder resizes all tensors with the size of its vocabulary.
            return text_model.resize_token_embeddings(new_num_tokens, mean_resizing=mean_resizing)
        # A decoder behind another encoder has a separate config.
        text_model.decoder.resize_token_embeddings(new_num_tokens, mean_resizing=mean_resizing)
        embeddings = text_model.encoder.resize_token_embeddings(new_num_tokens, mean_resizing=mean_resizing)
        config.text_config.vocab_size = config.decoder_config.vocab_size = embeddings.num_embeddings
        return embeddings

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        As [`~transformers.PreTrainedModel.save_pretrained`], and copies the code of the model into the folder.

        So it can be loaded with `trust_remote_code=True` without this package. For a model with adapters, the adapters
        alone are saved.
        """
        # In the original layout of a vision tower its keys have other names, and the Trainer, which resumes by
        # `load_state_dict(strict=False)`, would leave them out.
        kwargs.setdefault("save_original_format", False)
        self.config.encoder_dtypes = dtypes_of_encoders(self)
        hub_kwargs = {name: kwargs.pop(name) for name in _PUSHING if name in kwargs} if push_to_hub else {}
        if not is_main_process or os.path.isfile(save_directory) or kwargs.get("distributed_checkpoint"):
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        else:
            with saved_aside(save_directory) as staged:
                super().save_pretrained(staged, is_main_process=is_main_process, **kwargs)
                # Of a model with adapters (`add_adapter`), only these are saved, without a config.
                if not getattr(self, "_hf_peft_config_loaded", False):
                    write_code(staged, __file__, "config.json", self._code_entries())
        if push_to_hub:
            # Not by the stock method, which uploads before the code is there.
            self.push_to_hub(hub_kwargs.pop("repo_id", Path(save_directory).name), **hub_kwargs)

    def _code_entries(self) -> dict[str, dict[str, Any]]:
        """What `config.json` says of the code beside the weights: entry -> name -> class."""
        # Inside, since only saving needs it. The code of a pulled model includes a pipeline because it is listed here.
        from .pipeline_mm_transformer import MultimodalEmbeddingPipeline, MultimodalPipeline

        fusion = getattr(self, "model", self).fusion
        if fusion is not None:
            warn_if_not_copied(getattr(fusion, "kind_of_places", type(fusion)))
        for name, encoder_kind in own_encoders().items():
            if encoder_kind.own is not None and name in self.config.modalities:
                warn_if_not_copied(encoder_kind.own)
        auto_map = {"AutoConfig": reference(MMTransformerConfig), "AutoModel": reference(MMTransformerModel)}
        if not hasattr(self, "tasks"):
            return {"auto_map": auto_map}
        for task in self.tasks.values():
            warn_if_not_copied(type(task))
        auto_map["AutoModel"] = reference(MMTransformerForMultiTask)
        if MMTransformerForSequenceClassification.takes(self.tasks):
            cls = MMTransformerForSequenceClassification
            auto_map["AutoModelForSequenceClassification"] = reference(cls)
        classes = {"multimodal": MultimodalPipeline, "multimodal-feature-extraction": MultimodalEmbeddingPipeline}
        pipelines = {
            name: {"impl": reference(one), "pt": ["AutoModel"], "type": "multimodal"} for name, one in classes.items()
        }
        return {"auto_map": auto_map, "custom_pipelines": pipelines}

    @classmethod
    def from_pretrained(
        cls: type[_Model], pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> _Model:
        """
        As [`~transformers.PreTrainedModel.from_pretrained`], but from safetensors only.

        A pickle is read only with `use_safetensors=False`. With this package installed, no code of the checkpoint is
        run.

        Raises:
            OSError: one sentence, if files are missing or damaged.
            ValueError: one sentence, if the config does not fit, or the checkpoint lacks weights or has others.
                `ignore_mismatched_sizes=True` loads the weights that fit.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        path = pretrained_model_name_or_path
        try:
            with checked(path, kwargs), loading(kwargs):
                loaded = super().from_pretrained(path, *args, **kwargs)
                # With output_loading_info=True, this is a tuple.
                model = loaded[0] if isinstance(loaded, tuple) else loaded
                restore_dtypes(model, model.config)
        except Exception as error:
            wrong = what_is_wrong(path, error, **kwargs)
            if wrong is None:
                raise
            # torch's message tells how to load the pickle anyway.
            raise wrong from (None if is_pickle_error(error) else error)
        # Loading replaces parameters, so `requires_grad` is set again.
        getattr(model, "model", model).freeze()
        model._is_unproven = True
        return loaded

    @classmethod
    def from_encoders(
        cls: type[_Model],
        text: Optional[str],
        vision: Optional[str] = None,
        audio: Optional[str] = None,
        table: Any = None,
        **kwargs: Any,
    ) -> _Model:
        """
        A model with pretrained encoders and a new fusion.

        The gates of the fusion are 0 at the start, so `last_hidden_state` is that of the text encoder until training.

        Args:
            text (`str`): Hub id or local folder of a text encoder. For CLIP and SigLIP this is the text tower. For an
                encoder-decoder it is the encoder, and also the decoder if a task writes text; for a decoder-only
                language model the model, and also its head if a task writes text. `None` for a model that reads no
                text.
            vision (`str`, *optional*): Hub id or local folder of a vision encoder; for CLIP and SigLIP the vision
                tower.
            audio (`str`, *optional*): Hub id or local folder of an audio encoder; for Whisper its encoder.
            table ([`TableConfig`], *optional*): The columns of numbers and categories, from [`table_columns`]. Their
                encoder is new. Likewise a config for each modality of your own, by the name of its encoder.
            kwargs: fields of [`MMTransformerConfig`] (`tasks`, `fusion_type`, `num_fusion_layers`, ...). Some have
                other defaults here: `num_fusion_layers` 1, `linear_probe`, `freeze_batch_norm` and `item_order` `True`.
                `freeze` defaults to `["vision"]` (Zhai et al. 2022, https://arxiv.org/abs/2111.07991); `[]` trains all,
                which encoders with new weights need. `modality_dropout` defaults to 0.3 of each modality (of the text
                only if no task writes). Everything else (`revision`, `token`, `dtype`, `attn_implementation`, ...) goes
                to `AutoModel.from_pretrained`. `dtype` may be a dict, such as `{"text": "bfloat16"}`: encoders that are
                not in it, and all new parts, are in float32. Half precision is for frozen encoders, or under adapters.

        Raises:
            ValueError: one sentence, if an encoder cannot be used or an option does not fit.

        Example:

        ```python
        >>> model = MMTransformerForMultiTask.from_encoders(
        ...     text="distilbert/distilbert-base-uncased",
        ...     vision="google/vit-base-patch16-224-in21k",
        ...     tasks=[Classification("sentiment", labels=["negative", "positive"])],
        ... )
        ```
        """
        given = {"text": text, "vision": vision, "audio": audio}
        paths = {modality: path for modality, path in given.items() if path is not None}
        own = {"table": table, **{name: kwargs.pop(name) for name in own_encoders() if name in kwargs}}
        options, kwargs = split_options(kwargs)
        options |= {f"{name}_config": config for name, config in own.items() if config is not None}
        names = [*paths, *(name for name, config in own.items() if config is not None)]
        loaded = load_encoders(paths, with_defaults(options, names), **kwargs)
        with default_dtype(loaded.dtype):
            model = cls(loaded.config, **loaded.models).eval()
        loaded.restore_attention()
        return model


class MMTransformerModel(MMTransformerPreTrainedModel):
    """
    A text encoder, encoders of images and sound, and a fusion in which text tokens attend to the tokens of the others.

    Args:
        config ([`MMTransformerConfig`]): What to build.
        text_model, vision_model, audio_model (`PreTrainedModel`, *optional*):
            Encoders that exist already, with `config.text_config`, ... as their configs. By default they are built from
            the config, with new weights.

    Example:

    ```python
    >>> model = MMTransformerModel(MMTransformerConfig(text_config=BertConfig(), vision_config=ViTConfig()))
    >>> model(**processor(text=["a red dog"], images=["dog.png"])).last_hidden_state  # (1, text_len, 768)
    ```
    """

    def __init__(
        self,
        config: MMTransformerConfig,
        text_model: Optional[PreTrainedModel] = None,
        vision_model: Optional[PreTrainedModel] = None,
        audio_model: Optional[PreTrainedModel] = None,
    ) -> None:
        super().__init__(config)
        self._frozen_encoders: list[str] = []
        width = encoder_width(config.text_config)
        # Read here, since a config parses its tasks each time.
        self.has_decoder, self.has_language_model = config.has_decoder, config.has_language_model
        self.reads_jointly, self.begins_texts = config.reads_jointly, config.begins_texts
        if text_model is None and self.has_decoder:
            text_model = build_writer(config.text_config, config.decoder_config)
        # If a task writes text, this is a whole encoder-decoder, or a language model with its head.
        self.text_model = text_model if text_model is not None else build_encoder(config.text_config, "text")
        if self.has_language_model:
            read_contiguously(self.text_model.get_output_embeddings())
        self.vision_model = self.audio_model = self.fusion = None
        if config.modalities:
            if not config.begins_texts:
                self.null_text = NullText(width)
            self.fusion = build_fusion(config, self.text_encoder, width)
        if config.vision_config is not None:
            self.vision_model = vision_model or build_encoder(config.vision_config, "vision")
            self.vision_projection = StreamProjection(config, encoder_width(config.vision_config))
            self.vision_reduction = build_token_reduction(config, config.vision_token_reduction)
            frames = FRAME_EMBEDDINGS[config.frame_embedding]
            self.frame_embedding = frames(config.num_frames, config.fusion_hidden_size)
        if config.audio_config is not None:
            self.audio_model = audio_model or build_encoder(config.audio_config, "audio")
            self.audio_takes_mask = takes_audio_mask(self.audio_model)
            self.audio_projection = StreamProjection(config, encoder_width(config.audio_config))
        for name, encoder_kind in own_encoders().items():
            own_config = getattr(config, f"{name}_config", None)
            if encoder_kind.own is not None and own_config is not None:
                setattr(self, f"{name}_model", encoder_kind.own(own_config))
                setattr(self, f"{name}_projection", StreamProjection(config, own_config.hidden_size))
        for name in config.modalities if config.item_order else []:
            if not is_single(name):
                setattr(self, f"{name}_order", ItemOrder(config.fusion_hidden_size))
        self.post_init()
        self.freeze()

    @property
    def text_encoder(self) -> PreTrainedModel:
        return text_encoder_of(self.text_model) if self.has_decoder else self.text_model

    def encoder(self, modality: str) -> Any:
        """The encoder of "text", "vision" or another modality; of a text model that writes the part that reads."""
        return self.text_encoder if modality == "text" else getattr(self, f"{modality}_model")

    def embedding_width(self, name: str) -> int:
        """The width of the vectors of "text" or another modality that [`MMTransformerForMultiTask.embed`] gives."""
        config = getattr(self.config, f"{name}_config")
        return config.hidden_size if ENCODERS[name].own is not None else encoder_width(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def freeze(self) -> None:
        """
        Sets `requires_grad=False` for all parameters that `config.freeze` names.

        A completely frozen encoder runs in evaluation mode and without gradients, so its outputs depend on its inputs
        alone. Called when the model is built, and after weights were loaded, since these are new parameters.

        Raises:
            ValueError: if there are no parameters of such a name.
        """
        encoders = {modality: self.encoder(modality) for modality in ("text", *self.config.modalities)}
        if self.has_language_model:
            encoders["text"] = self.text_model  # with its head
        self._frozen_encoders = freeze_parameters(self, self.config.freeze or [], encoders)
        self.train(self.training)

    def is_frozen(self, modality: str) -> bool:
        """Whether `config.freeze` covers the whole encoder, and nothing in it, such as an adapter, is trained."""
        return modality in self._frozen_encoders and not any(
            parameter.requires_grad for parameter in self.encoder(modality).parameters()
        )

    def train(self, mode: bool = True) -> "MMTransformerModel":
        super().train(mode)
        for modality in self._frozen_encoders:
            if self.is_frozen(modality):
                self.encoder(modality).eval()
        if mode and self.config.freeze_batch_norm:
            for modality in ("text", *self.config.modalities):
                for layer in batch_norms(self.encoder(modality)):
                    layer.eval()
        return self

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
        **kwargs: Any,
    ) -> MMTransformerModelOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, text_len)`): Token ids of the text.
            attention_mask (`torch.Tensor` of shape `(batch, text_len)`, *optional*):
                1 at tokens, 0 at padding. A row of zeros has no text; a learned vector takes its place.
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
                The features of the text encoder, as [`encode`] returns them; it then does not run, and `input_ids` may
                be left out. The same holds for images and sound:
            image_features (`torch.FloatTensor` of shape `(num_images, tokens, vision hidden size)`, *optional*):
                Instead of `pixel_values`.
            audio_features (`torch.FloatTensor` of shape `(num_clips, tokens, audio hidden size)`, *optional*):
                Instead of `input_values` or `input_features`.
            audio_feature_mask (`torch.BoolTensor` of shape `(num_clips, tokens)`, *optional*):
                Which of `audio_features` belong to the clip and not to its padding; all by default.
            table_numbers (`torch.FloatTensor` of shape `(num_tables, num_numbers)`, *optional*):
                The standardised numbers of the rows that have columns; NaN where one is missing.
            table_bins (`torch.FloatTensor` of shape `(num_tables, num_bins)`, *optional*):
                Their shares of the bins of [`TableConfig`], minus those of the mean; NaN where one is missing.
            table_categories (`torch.LongTensor` of shape `(num_tables, num_categories)`, *optional*):
                The ids of their categories; -1 where one is missing, 0 for an unknown value.
            table_index (`torch.LongTensor` of shape `(batch, 1)`, *optional*):
                Which of them belongs to each row, -1 for none. Defaults to one per row, in order.
            output_attentions, output_hidden_states (`bool`, *optional*):
                Whether to return those of the fusion; default to those of the config. `output_hidden_states=[0, -1]`
                returns those layers, and `None` in the places of others.

        Raises:
            ValueError: if the images or clips do not fit the rows, are given twice, or the model has no encoder for
                them.
            TypeError: if there is no such argument.
        """
        own = own_inputs(kwargs)
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
            **own,
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
        **own: Optional[torch.Tensor],
    ) -> tuple[dict[str, Stream], Optional[dict[str, torch.Tensor]]]:
        """
        The part of [`forward`] before the fusion, with the same arguments.

        Returns:
            The tokens of each modality, for [`fuse`]; in training with modality dropout also the modalities that each
                row keeps.
        """
        given_own = own_inputs(own)
        check_keywords(self, own)
        text = next((x for x in (input_ids, inputs_embeds, text_features) if x is not None), None)
        if text is None:
            raise ValueError(
                "Give the texts as input_ids, inputs_embeds or text_features. For rows without text, set "
                "attention_mask to 0."
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
        for name, encoder_kind in own_encoders().items():
            given = {key: given_own.get(key) for key in encoder_kind.inputs}
            items[name] = {key: value for key, value in given.items() if value is not None and value.shape[0] > 0}
            own_config = getattr(self.config, f"{name}_config", None)
            needed = {} if own_config is None or encoder_kind.own is None else encoder_kind.own.blank_input(own_config)
            if items[name] and needed and items[name].keys() != needed.keys():
                raise ValueError(f"The {name} input of this model consists of {' and '.join(needed)}.")
        indexes = {"image_index": image_index, "audio_index": audio_index, **given_own}
        checked = {
            name: self._item_index(name, indexes.get(encoder_kind.index or ""), items[name], batch_size, device)
            for name, encoder_kind in OTHER_ENCODERS.items()
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
        encoded = {"text": self._text_stream(attention_mask, text_features, **text_inputs)}
        if (self.has_language_model or self.reads_jointly) and input_ids is not None:
            encoded["text"] = encoded["text"]._replace(token_ids=self.prompt_ids(input_ids, attention_mask))
        for name in self.config.modalities:
            frames = frame_index if name == "vision" else None
            stream = self._item_stream(name, items[name], index[name], frames, is_full[name])
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
        The part of [`forward`] after the encoders.

        Args:
            encoded: modality -> its tokens; "text", and others if there are any.
            kept: modality -> (batch,) bool, which rows have it after modality dropout.
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
        text, fused = encoded["text"], None
        wanted = {"output_attentions": bool(output_attentions), "output_hidden_states": output_hidden_states or False}
        if self.reads_jointly:
            fused = fuse_jointly(self, encoded, wanted)
        elif self.fusion is not None:
            fused = self.fusion(text.hidden_states, text.mask, other_streams(encoded), **wanted)
        return self.output_of(encoded, fused, kept)

    def output_of(
        self,
        encoded: dict[str, Stream],
        fused: Optional[FusionOutput] = None,
        kept: Optional[dict[str, torch.Tensor]] = None,
    ) -> MMTransformerModelOutput:
        """The output for encoded rows, and what a fusion gave for them; by default the text states, unfused."""
        text = encoded["text"]
        last_hidden_state = text.hidden_states if fused is None else fused.hidden_states
        return MMTransformerModelOutput(
            last_hidden_state=last_hidden_state,
            pooler_output=self.pool_text(last_hidden_state, text.mask),
            attention_mask=text.mask,
            encoded=encoded,
            kept=kept,
            hidden_states=fused.all_hidden_states if fused is not None else None,
            attentions=fused.attentions if fused is not None else None,
            cross_attentions=fused.cross_attentions if fused is not None else None,
        )

    def encode(self, modality: str, **inputs: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        """
        The features that the encoder of a modality outputs, before the fusion.

        Args:
            inputs: `input_ids`, `attention_mask`, ... of texts; `pixel_values` of images; `input_values` or
                `input_features`, and `attention_mask` at the rate of these, of sounds; `table_numbers`,
                `table_bins` and `table_categories` of columns.

        Returns:
            The features (items, tokens, encoder width), and for sounds which of them belong to the clip and not to its
            padding, (items, tokens) bool, if the encoder says so; for columns, which are not missing.
        """
        if ENCODERS[modality].own is not None:
            return self.encoder(modality)(**inputs)
        run = EncoderFeatures(
            modality,
            self.encoder(modality),
            getattr(self.config, f"{modality}_config"),
            training=self.training,
            is_frozen=self.is_frozen(modality),
            takes_mask=modality != "audio" or self.audio_takes_mask,
        )
        return run(**inputs)

    def in_fusion_dtype(self, states: torch.Tensor) -> torch.Tensor:
        """States of texts in the dtype of the fusion: a frozen encoder may have another one, such as bfloat16."""
        if self.fusion is None or torch.is_autocast_enabled(states.device.type):
            return states
        return states.to(computed_dtype(self.fusion) or states.dtype)

    def _text_stream(
        self, attention_mask: torch.Tensor, features: Optional[torch.Tensor] = None, **inputs: Optional[torch.Tensor]
    ) -> Stream:
        given = {name: value for name, value in inputs.items() if value is not None}
        if self.begins_texts:
            return self._begun_text_stream(attention_mask, features, **given)
        # A row without a text has one token, a learned vector; the outputs of the encoder are not used there.
        present = attention_mask.bool().any(-1)
        if features is None:
            shown = torch.where(present[:, None], attention_mask, 1) if self.fusion is not None else attention_mask
            states, _ = self.encode("text", attention_mask=shown, **given)
        else:
            states = self._known_states(features, attention_mask)
        states = self.in_fusion_dtype(states)
        means = self.pool_text(states, attention_mask.bool()) if self.config.linear_probe else None
        if self.fusion is None:
            return Stream("text", states, attention_mask.bool(), item_means=means)
        first = torch.arange(states.shape[1], device=states.device) == 0
        # Not by `torch.where`, which ONNX Runtime lacks for truth values.
        mask = attention_mask.bool() | (~present[:, None] & first)
        return Stream("text", self.null_text(states, present), mask, item_means=means)

    def _begun_text_stream(
        self, attention_mask: torch.Tensor, features: Optional[torch.Tensor] = None, **given: torch.Tensor
    ) -> Stream:
        """The same for a language model that reads the first token of texts where a row has none."""
        first = torch.arange(attention_mask.shape[1], device=attention_mask.device) == 0
        mask = attention_mask.bool() | (~attention_mask.bool().any(-1, keepdim=True) & first)
        if features is None:
            if "input_ids" in given:
                given["input_ids"] = self.prompt_ids(given["input_ids"], attention_mask)
            states, _ = self.encode("text", attention_mask=mask.to(torch.int64), **given)
        else:
            states = self._known_states(features, attention_mask)
        states = self.in_fusion_dtype(states)
        means = self.pool_text(states, attention_mask.bool()) if self.config.linear_probe else None
        return Stream("text", states, mask, item_means=means)

    def _known_states(self, features: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        if features.shape[:2] != attention_mask.shape:
            raise ValueError(
                f"text_features must begin with the shape of attention_mask, {tuple(attention_mask.shape)}, but "
                f"have {tuple(features.shape)}."
            )
        return features.to(self.text_encoder.dtype)

    def no_text(self, num_rows: int) -> Stream:
        """The text stream of rows without a text, with one token."""
        device = self.device
        ids = torch.zeros(num_rows, 1, dtype=torch.int64, device=device)
        absent = torch.zeros_like(ids)
        if self.begins_texts:
            stream = self._begun_text_stream(absent[:1], input_ids=ids[:1])
            stream = Stream("text", stream.tokens.expand(num_rows, -1, -1))
        else:
            vector = self.null_text.weight.to(self.text_encoder.dtype)
            stream = Stream("text", self.in_fusion_dtype(vector.expand(num_rows, 1, -1)))
        if self.has_language_model or self.reads_jointly:
            stream = stream._replace(token_ids=self.prompt_ids(ids, absent))
        return stream

    def pool_text(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The vector of each text, as `config.text_pooling` says: (batch, text_len, width) -> (batch, width)."""
        return TEXT_POOLINGS[self.config.text_pooling](states, mask)

    @property
    def begin_id(self) -> int:
        """The token that a language model continues in rows without a text."""
        config = getattr(self.text_model, "generation_config", None) or self.config.text_config
        known = [config.bos_token_id, config.eos_token_id, config.pad_token_id]
        ids = [value[0] if isinstance(value, (list, tuple)) else value for value in known if value is not None]
        return ids[0] if ids else 0

    def prompt_ids(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """
        The ids of the texts; rows without a text have the token that begins one, where they have [`NullText`].

        For an encoder that is no language model, they have -1 there.
        """
        begin_id = self.begin_id if self.has_language_model or self.begins_texts else -1
        is_absent = ~attention_mask.bool().any(-1, keepdim=True)
        first = torch.arange(input_ids.shape[1], device=input_ids.device) == 0
        return input_ids.masked_fill(is_absent & first, begin_id)

    def _item_stream(
        self,
        name: str,
        items: dict[str, torch.Tensor],
        index: torch.Tensor,
        frame_index: Optional[torch.Tensor] = None,
        is_full: bool = False,
    ) -> Optional[Stream]:
        """
        The tokens of each row in one modality; `None` if no row has any and nothing is trained.

        Args:
            index, is_full: as [`check_index`] gives them.
        """
        if items and index.shape[1] > 0:
            tokens, token_mask, means = self._item_tokens(name, items)
        elif not self.training and not is_sharded(self.encoder(name)):
            return None
        else:
            # Encoder and projection run in every training step, even if one rank has no item: DDP refuses unused
            # parameters, and FSDP waits for this rank, in evaluation too. A frozen encoder that is not sharded need
            # not run.
            own, config = ENCODERS[name].own, getattr(self.config, f"{name}_config")
            if own is not None:
                blank = own.blank_input(config)
            elif self.is_frozen(name) and not is_sharded(self.encoder(name)):
                blank = {"features": torch.zeros(1, 1, encoder_width(config))}
            else:
                blank = blank_input(config, name)
            with frozen_batch_norm(getattr(self, f"{name}_model")):
                tokens, token_mask, means = self._item_tokens(name, {k: v.to(index.device) for k, v in blank.items()})
            # Masked, so one token is enough.
            tokens, token_mask = tokens[:, :1], token_mask if token_mask is None else token_mask[:, :1]
            index, frame_index = torch.full_like(index[:, :1], -1), None
            if index.shape[1] == 0:
                index = torch.full((index.shape[0], 1), -1, device=index.device)
        offsets = None
        if name == "vision":
            if frame_index is not None:
                if frame_index.shape != index.shape:
                    raise ValueError(
                        f"frame_index must have the shape of image_index, {tuple(index.shape)}, but has "
                        f"{tuple(frame_index.shape)}."
                    )
                self.frame_embedding.check(frame_index)
                offsets = self.frame_embedding(frame_index, tokens.dtype)
            elif self.training and self.config.frame_embedding == "learned":
                # Its parameters need a gradient in every step.
                offsets = self.frame_embedding(torch.full_like(index, -1), tokens.dtype)
        scales = None
        if self.config.item_order and not is_single(name):
            tokens, scales, shifts = getattr(self, f"{name}_order")(index, tokens)
            offsets = shifts if offsets is None or shifts is None else offsets + shifts
        return Stream(name, tokens, token_mask, index, offsets, is_full and token_mask is None, means, scales)

    def _item_tokens(
        self, name: str, items: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]:
        """
        The tokens of each item, (num_items, tokens per item, fusion_hidden_size), their mask, and for linear probes the
        mean of the encoder outputs, (num_items, encoder width).
        """
        means = None
        if ENCODERS[name].own is not None:
            features, mask = self.encoder(name)(**items)
            if self.config.linear_probe:
                means = self.encoder(name).linear_features(features, mask, **items)
            return getattr(self, f"{name}_projection")(features), mask, means
        if "features" in items:
            features, mask = items["features"].to(self.encoder(name).dtype), items.get("feature_mask")
        else:
            features, mask = self.encode(name, **{key: x for key, x in items.items() if key != "feature_mask"})
        tokens = getattr(self, f"{name}_projection")(features)
        if self.config.linear_probe:
            means = features.mean(1) if mask is None else masked_mean(features, mask)
        return (self.vision_reduction(tokens) if name == "vision" else tokens), mask, means

    def _item_index(
        self,
        name: str,
        index: Optional[torch.Tensor],
        items: dict[str, torch.Tensor],
        batch_size: int,
        device: torch.device,
    ) -> tuple[torch.Tensor, bool]:
        num_items = next(iter(items.values())).shape[0] if items else 0
        kind = ENCODERS[name]
        if items and name not in self.config.modalities:
            got = "sound" if name == "audio" else kind.plural
            raise ValueError(f"This model has no {name} encoder (its config has no `{name}_config`), but got {got}.")
        plural = "clips" if name == "audio" else kind.plural
        return check_index(index, batch_size, num_items, device, kind.index or "", plural)


def is_single(encoder: str) -> bool:
    """Whether a row has one item of this encoder at most, so that its items have no order."""
    return all(modality.is_single for modality in modalities_of(encoder))


class _CanGenerate:
    """`can_generate()`, a classmethod in transformers. Here the class can, and a model if one of its tasks writes."""

    def __get__(self, model: Optional[PreTrainedModel], owner: type) -> Callable[[], bool]:
        return lambda: model is None or model.config.has_decoder


class MMTransformerForMultiTask(MMTransformerPreTrainedModel):
    """
    The fused model with a head for each of `config.tasks`. Its loss is the sum over the tasks of `loss_weight` times
    the mean loss over the labels, plus the regularizer.

    Args:
        config ([`MMTransformerConfig`]): What to build; needs at least one task.
        text_model, vision_model, audio_model (`PreTrainedModel`, *optional*): See [`MMTransformerModel`].

    Raises:
        ValueError: if there is no task.

    Example:

    ```python
    >>> model = MMTransformerForMultiTask.from_pretrained("my-model")
    >>> outputs = model(**processor(text=["Lovely weather!"], images=["rain.jpg"]))
    >>> model.decode(outputs)
    [{'sentiment': {'label': 'positive', 'score': 0.98}}]
    ```
    """

    if TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> MMTransformerOutput: ...

    # Each loss is divided by the number of labels of its own task, which the Trainer does not know.
    accepts_loss_kwargs = False
    can_generate = _CanGenerate()

    def __init__(self, config: MMTransformerConfig, **encoders: Any) -> None:
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
        odd = (config.calibration or {}).get("oddness")
        self.oddness: Optional[Oddness] = None if odd is None else Oddness(odd)
        # The weights at the start of training, for an L2-SP regularizer; not saved.
        self.starting_point: Optional[dict[str, torch.Tensor]] = None
        self.post_init()

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        tasks: Optional[Sequence[Task | dict[str, Any]]] = None,
        **kwargs: Any,
    ) -> _Model:
        """
        As [`MMTransformerPreTrainedModel.from_pretrained`] does.

        Args:
            tasks (`list[Task]`, *optional*):
                The tasks of the loaded model, in place of the saved ones. New tasks, and those of another kind or with
                other labels, get heads with new weights; the others keep their heads.

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
            raise ValueError(
                "num_labels is not an option of the model: give tasks=[Classification('name', labels=[...])]."
            )
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
        **kwargs: Any,
    ) -> MMTransformerOutput:
        r"""
        Args:
            labels (`dict[str, torch.Tensor]`, *optional*):
                Labels of the tasks, by name; -100 (integers) or NaN (floats) where a row has none. A task without an
                entry has no labels.
            num_items_in_batch (`dict[str, torch.Tensor]`, *optional*):
                The divisor of the summed loss of each task, instead of the number of its labels in `labels`; under
                `"regularization"`, the divisor of the regularizer. With it, one optimiser step over several batches
                has the loss of one big batch.
            encoder_outputs ([`MMTransformerModelOutput`], *optional*):
                The output of `self.model` for these inputs, if it is known already.
            kwargs: all other arguments are those of [`MMTransformerModel.forward`].

        Raises:
            ValueError: if `labels` names a task that the model does not have, labels have another shape than their
                task wants, or the images do not fit the rows.
            TypeError: if there is no such argument.
        """
        own = own_inputs(kwargs)
        check_keywords(self, kwargs)
        read: dict[str, torch.Tensor] = {}
        if encoder_outputs is None:
            given = dict(
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
                image_features=image_features,
                audio_features=audio_features,
                audio_feature_mask=audio_feature_mask,
                **own,
            )
            encode = partial(
                self.model, **given, output_attentions=output_attentions, output_hidden_states=output_hidden_states
            )
            if text_features is None and input_ids is not None and self.model.reads_jointly and not self.heads.names:
                text_features = self._zero_states(input_ids)
            at_once = labels is not None and input_ids is not None and self._reads_at_once
            if at_once and self.model.reads_jointly and not self._shows(output_attentions, output_hidden_states):
                first, its_task = next(iter(writing_tasks(self.tasks).items()))
                encoded, kept = self.model.encode_rows(**given, text_features=text_features)
                read[first], fused = LanguageModelWriter(self.model).read_jointly(its_task, labels.get(first), encoded)
                encoder_outputs = self.model.output_of(encoded, fused, kept)
            elif at_once and not self.model.reads_jointly and text_features is None:
                mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                first, its_task = next(iter(writing_tasks(self.tasks).items()))
                read[first], encoder_outputs = LanguageModelWriter(self.model).read(
                    its_task, labels.get(first), lambda states: encode(text_features=states), input_ids, mask
                )
            else:
                encoder_outputs = encode(inputs_embeds=inputs_embeds, text_features=text_features)
        logits = self.heads(encoder_outputs)
        loss = losses = None
        if labels is not None:
            self._warn_of_calibration()
            kept = encoder_outputs.kept
            if kept is not None:
                labels = {
                    name: self.tasks[name].labels_left(value, kept) if name in self.tasks else value
                    for name, value in labels.items()
                }
            writing = writing_tasks(self.tasks)
            for name, task in self.tasks.items():
                if name in read:
                    logits[name] = read[name]
                elif name in writing:
                    logits[name] = self.read_written(writing[name], encoder_outputs, labels.get(name))
                elif task.needs_mismatches and name in labels:
                    mismatched = self.judge_mismatched(name, encoder_outputs, logits, labels[name])
                    logits[name] = torch.cat([logits[name], mismatched], 1)
            losses = self._losses(logits, labels, num_items_in_batch or {})
            weights = {name: task.loss_weight for name, task in self.tasks.items()}
            loss = torch.stack([value * weights.get(name, 1.0) for name, value in losses.items()]).sum()
        return MMTransformerOutput(
            loss=loss,
            losses=losses,
            logits=logits,
            hidden_states=encoder_outputs.hidden_states,
            attentions=encoder_outputs.attentions,
            cross_attentions=encoder_outputs.cross_attentions,
        )

    def _warn_of_calibration(self) -> None:
        # `MMTrainer` removes the calibration; other loops cannot know of it.
        is_training = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if is_training and self.config.calibration is not None:
            logger.warning_once(
                "Training changes the probabilities, so the calibration of the model no longer holds: remove it by "
                "`model.config.calibration = None`, and calibrate the trained model again."
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
        The names of all parts outside of the encoders.

        With adapters, pass them as `modules_to_save`, so that they are trained and saved:
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
        return decode_answers(self.tasks, outputs.logits, word_index)

    @property
    def _answer_decoder(self) -> AnswerDecoder | LanguageModelWriter:
        # Created each time, since PEFT and FSDP replace `text_model` by other modules.
        if self.model.has_language_model:
            return LanguageModelWriter(self.model)
        return AnswerDecoder(self.model.text_model)

    @property
    def _reads_at_once(self) -> bool:
        """Whether one pass of a language model reads the texts, for heads, and the answers behind them."""
        # A text that is dropped in training is no prompt, either.
        drops_text = self.training and "text" in self.config.modality_dropout_probabilities
        return self.model.has_language_model and not drops_text

    def _zero_states(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Zeros in place of the states of the texts alone, where no head reads these."""
        return torch.zeros(*input_ids.shape, encoder_width(self.config.text_config), device=input_ids.device)

    def _shows(self, output_attentions: Optional[bool], output_hidden_states: bool | list[int] | None) -> bool:
        config = self.config
        shown = config.output_attentions if output_attentions is None else output_attentions
        states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return bool(shown) or states not in (None, False)

    def read_written(
        self, task: WritingTask, encoder_outputs: MMTransformerModelOutput, labels: Optional[torch.Tensor]
    ) -> torch.Tensor:
        """The decoder's logits at each place of the labels, (batch, length, vocabulary); see [`AnswerDecoder`]."""
        return self._answer_decoder.logits(task, encoder_outputs, labels)

    def decoder_start_ids(self, task: WritingTask) -> list[int]:
        """The ids that the decoder gets before it writes the answer of this task."""
        return self._answer_decoder.start_ids(task)

    @torch.no_grad()
    def generate(
        self,
        task: Optional[str] = None,
        encoder_outputs: Optional[MMTransformerModelOutput] = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        Writes the answers of one task: `processor.batch_decode(ids, skip_special_tokens=True)` turns them into texts.
        Encoders and fusion run once per row, whatever the number of beams and steps. The model runs in evaluation mode.

        Args:
            task (`str`, *optional*): Name of a [`Generation`] task; may be left out if there is only one.
            encoder_outputs ([`MMTransformerModelOutput`], *optional*):
                The output of `self.model` for these inputs, if it is known already.
            kwargs: the inputs of [`MMTransformerModel.forward`]; everything else (`num_beams`, `do_sample`,
                `max_new_tokens`, `generation_config`, `return_dict_in_generate`, ...) is for
                [`~transformers.GenerationMixin.generate`]. Defaults are those of the pretrained model
                (`model.generation_config`), which may ask for random draws (`do_sample`).

        Returns:
            (batch, length) int64: the ids of the tokens; the first ones are those that the decoder starts with,
            [`decoder_start_ids`]. The text that a language model continues is left out.

        Raises:
            ValueError: if there is no such task, it does not write, or `assistant_model` is given.

        Example:

        ```python
        >>> ids = model.generate("german", **processor(text=["Lovely weather!"]), num_beams=4)
        ```
        """
        writing = task_that_writes(self.tasks, task)
        inputs, options = split_inputs(type(self.model).forward, kwargs)
        with evaluation_mode(self):
            if encoder_outputs is None:
                if self.model.has_language_model and inputs.get("input_ids") is not None:
                    # The language model reads the texts as it writes; here they are for heads alone.
                    inputs["text_features"] = self._zero_states(inputs["input_ids"])
                if self.model.has_language_model and self.model.reads_jointly:
                    encoder_outputs = self.model.output_of(self.model.encode_rows(**inputs)[0])
                else:
                    encoder_outputs = self.model(**inputs)
            return self._answer_decoder.generate(writing, encoder_outputs, **options)

    @torch.no_grad()
    def forward_and_write(
        self,
        labels: Optional[dict[str, torch.Tensor]] = None,
        generation_kwargs: Optional[dict[str, Any]] = None,
        **inputs: torch.Tensor,
    ) -> tuple[MMTransformerOutput, dict[str, torch.Tensor]]:
        """
        The output of the model, and the answers of the tasks that write, (batch, length) int64 without the
        [`decoder_start_ids`]. Encoders and fusion run once.

        Args:
            labels, inputs: as [`MMTransformerForMultiTask.forward`] takes them.
            generation_kwargs (`dict`, *optional*): For [`~transformers.GenerationMixin.generate`].
        """
        encoder_outputs = self.encode_for_answers(**inputs)
        # Not by a call of the model: under FSDP this already is one.
        outputs = self.forward(encoder_outputs=encoder_outputs, labels=labels)
        options = generation_kwargs or {}
        written = {
            name: self.write(task, encoder_outputs, **options) for name, task in writing_tasks(self.tasks).items()
        }
        return outputs, written

    def encode_for_answers(self, **inputs: torch.Tensor) -> MMTransformerModelOutput:
        """
        The output of `self.model` for rows that are to be answered, from one pass through encoders and fusion.

        If only a language model reads the texts, they are not read before it writes; their states are then 0.

        Args:
            inputs: as [`MMTransformerModel.forward`] takes them.
        """
        ids = inputs.get("input_ids")
        if ids is None or not self.model.has_language_model or self.heads.names or self.oddness is not None:
            return self.model(**inputs)
        return self.model.output_of(self.model.encode_rows(**{**inputs, "text_features": self._zero_states(ids)})[0])

    def write(self, task: WritingTask, encoder_outputs: MMTransformerModelOutput, **kwargs: Any) -> torch.Tensor:
        """
        The answer of each row, (batch, length) int64, without the [`decoder_start_ids`].

        Args:
            task ([`Generation`]): The task to answer.
            encoder_outputs, kwargs: as [`generate`] takes them.

        Raises:
            ValueError: if the decoder writes another number of answers than one per row.
        """
        ids = self.generate(task.name, encoder_outputs, **kwargs)
        return self._answer_decoder.without_start(task, ids, len(encoder_outputs.last_hidden_state))

    def adjust_generation_fn(self, *args: Any, **kwargs: Any) -> None:
        """Called by `from_pretrained`, to read the saved generation config."""
        self.model.text_model.adjust_generation_fn(*args, **kwargs)

    @property
    def generation_config(self) -> Optional[GenerationConfig]:
        """That of the decoder."""
        model = getattr(self, "model", None)  # there is none while the model is being built
        return model.text_model.generation_config if model is not None and self.can_generate() else None

    @generation_config.setter
    def generation_config(self, value: Optional[GenerationConfig]) -> None:
        if getattr(self, "model", None) is not None and self.can_generate():
            self.model.text_model.generation_config = value

    @torch.no_grad()
    def embed(
        self, task: Optional[str] = None, normalize: bool = False, **inputs: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """
        The vectors of rows, for search, clustering or other models.

        Args:
            task (`str`, *optional*): Name of a [`Retrieval`] task: the vectors with which it compares texts and items,
                of length 1. By default the means of the states.
            normalize (`bool`, *optional*, defaults to `False`): Scales all vectors to length 1.
            inputs: as [`MMTransformerModel.forward`] takes them.

        Returns:
            Name -> (batch, width) float32, NaN where a row lacks the modality. `"fused"` is the mean of the fused
            states. `"text"`, `"vision"`, `"audio"` and `"table"` are the means of the encoder outputs before the
            fusion; of several pictures the mean of their vectors. With `task`, `"text"` and the modality of the task.

        Raises:
            ValueError: if there is no such task.

        Example:

        ```python
        >>> vectors = model.embed(**processor(text=["Lovely weather!"]))
        >>> {name: tuple(vector.shape) for name, vector in vectors.items()}
        {'fused': (1, 768), 'text': (1, 768), 'vision': (1, 768)}
        ```
        """
        with evaluation_mode(self):
            if task is None:
                vectors = embed_rows(self.model, inputs)
            else:
                head = getattr(self.heads, self._retrieval_task(task, None))
                vectors = head.embed(self.model.encode_rows(**inputs)[0], rows_with_text(inputs))
        return unit_length(vectors) if normalize else vectors

    @torch.no_grad()
    def encode_text(
        self,
        input_ids: torch.Tensor,
        attention_mask: Optional[torch.Tensor] = None,
        task: Optional[str] = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        The vectors of texts, for search: their dot products with those of [`encode_image`] are cosines.

        Only the text encoder runs.

        Args:
            input_ids (`torch.LongTensor` of shape `(num_texts, text_len)`): The tokens.
            attention_mask (`torch.Tensor`, *optional*): Of the same shape; 0 is padding.
            task (`str`, *optional*): Name of a [`Retrieval`] task; may be left out if there is only one.
            kwargs: other inputs of the text encoder, such as `token_type_ids`; inputs of other encoders are ignored.

        Returns:
            (num_texts, embedding_size), of length 1.

        Raises:
            ValueError: if there is no such task.
        """
        name = self._retrieval_task(task, None)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        inputs = {"token_type_ids": kwargs["token_type_ids"]} if "token_type_ids" in kwargs else {}
        stream = self.model._text_stream(attention_mask, input_ids=input_ids, **inputs)
        return getattr(self.heads, name).embed_text(stream)

    @torch.no_grad()
    def encode_image(
        self,
        pixel_values: torch.Tensor,
        image_index: Optional[torch.Tensor] = None,
        frame_index: Optional[torch.Tensor] = None,
        task: Optional[str] = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        The same for pictures, (num_images, channels, height, width) -> (num_images, embedding_size).

        Only the vision encoder runs. With `image_index` (and `frame_index`, for videos) there is one vector per row, as
        in training: (batch, embedding_size), 0 if a row has no picture.
        """
        return self._embed_items("vision", task, {"pixel_values": pixel_values}, image_index, frame_index)

    @torch.no_grad()
    def encode_audio(self, task: Optional[str] = None, **inputs: torch.Tensor) -> torch.Tensor:
        """The same for sounds: `input_values` or `input_features`, `audio_attention_mask` and `audio_index`."""
        wanted = ("input_values", "input_features")
        items: dict[str, torch.Tensor] = {name: inputs[name] for name in wanted if name in inputs}
        if "audio_attention_mask" in inputs:
            items["attention_mask"] = inputs["audio_attention_mask"]
        if not set(items) & set(wanted):
            raise ValueError("encode_audio needs sound: input_values or input_features, as the processor gives them.")
        return self._embed_items("audio", task, items, inputs.get("audio_index"))

    def _embed_items(
        self,
        modality: str,
        task: Optional[str],
        items: dict[str, torch.Tensor],
        index: Optional[torch.Tensor] = None,
        frame_index: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        name = self._retrieval_task(task, modality)
        if index is not None:
            rows, _ = self.model._item_index(modality, index, items, index.shape[0], index.device)
            return getattr(self.heads, name).embed_item(self.model._item_stream(modality, items, rows, frame_index))
        return getattr(self.heads, name).embed_item(Stream(modality, *self.model._item_tokens(modality, items)[:2]))

    def _retrieval_task(self, task: Optional[str], modality: Optional[str]) -> str:
        known = [
            name
            for name, other in self.tasks.items()
            if hasattr(getattr(self.heads, name, None), "embed_text")
            and modality in (None, cast(PairTask, other).modality)
        ]
        if task is None and len(known) == 1:
            return known[0]
        if task not in known:
            of = f" of {modality}" if modality else ""
            raise ValueError(f"task must name a Retrieval task{of}, one of {known}, but is {task!r}.")
        return task

    def judge_mismatched(
        self,
        name: str,
        encoder_outputs: MMTransformerModelOutput,
        logits: dict[str, torch.Tensor],
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """
        The logits of a [`Matching`] head for mismatched pairs, (batch, 2); NaN if the batch holds no mismatch.

        The first pairs each text with the item of another row, the second each item with the text of another row. See
        [`choose_partners`].

        The choice uses the similarity of a [`Retrieval`] task of the same modality. Without one, all are equally
        similar, and evaluation takes the first.
        """
        encoded, head = encoder_outputs.encoded, getattr(self.heads, name)
        modality = cast(PairTask, self.tasks[name]).modality
        if modality not in encoded:
            return logits[name].new_full((labels.shape[0], 2), torch.nan)
        allowed = may_mismatch(labels)
        similarity = torch.zeros(allowed.shape, device=labels.device)
        for other, task in self.tasks.items():
            found = task.pair_similarity(logits[other], modality) if other in logits else None
            if found is not None:
                similarity = found
                break
        judged = []
        for swapped, scores, may in ((modality, similarity, allowed), ("text", similarity.T, allowed.T)):
            chosen, is_there = choose_partners(scores, may, at_random=head.training)
            mismatched = self.model.fuse({**encoded, swapped: encoded[swapped].of_rows(chosen)})
            judged.append(torch.where(is_there, head(mismatched)[:, 0], torch.nan))
        return torch.stack(judged, 1)


class MMTransformerForSequenceClassification(MMTransformerForMultiTask):
    """
    A [`MMTransformerForMultiTask`] whose only task is a [`Classification`].

    It has the inputs and outputs of other models for sequence classification. So `AutoModelForSequenceClassification`
    loads it, and `pipeline("text-classification")` runs it.

    Raises:
        ValueError: if the model has other tasks.

    Example:

    ```python
    >>> model = AutoModelForSequenceClassification.from_pretrained("my-model")
    >>> model(**processor(text=["Lovely weather!"])).logits  # (1, num_labels)
    ```
    """

    def __init__(self, config: MMTransformerConfig, **encoders: Any) -> None:
        super().__init__(config, **encoders)
        if not self.takes(self.tasks):
            found = ", ".join(f"{name} ({task.kind})" for name, task in self.tasks.items()) or "none"
            raise ValueError(
                "AutoModelForSequenceClassification loads models with one Classification task, but this model has: "
                f"{found}. Load it by AutoModel."
            )

    @staticmethod
    def takes(tasks: Mapping[str, Task]) -> bool:
        """Whether a model with these tasks can be of this class."""
        return [task.auto_class for task in tasks.values()] == ["AutoModelForSequenceClassification"]

    @can_return_tuple
    def forward(
        self, input_ids: Optional[torch.Tensor] = None, labels: Optional[torch.Tensor] = None, **kwargs: Any
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


__all__ = [
    "MMTransformerForMultiTask",
    "MMTransformerForSequenceClassification",
    "MMTransformerModel",
    "MMTransformerModelOutput",
    "MMTransformerOutput",
    "MMTransformerPreTrainedModel",
]
