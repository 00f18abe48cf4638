"""Configuration of the fused model."""

import difflib
import os
import re
from typing import Any, ClassVar, Optional

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME

from .calibration import check_calibration
from .decoders import check_decoder, check_starts, decoder_vocab_size, is_language_model
from .encoder_classes import sub_config_of
from .encoder_dtypes import check_encoder_dtypes
from .encoders import encoder_width
from .freeze_rules import check_freeze
from .fusion import fusion_class
from .fusion_layers import TEXT_POOLINGS
from .hub_kernels import check_values
from .joint_reading import check_joint
from .label_cells import is_finite_number
from .limits import limits
from .messages import check_folder, one_line, shortened
from .modalities import OTHER_ENCODERS, own_encoders
from .regularization import check_regularization
from .safe_writing import drop_link
from .table import TableConfig
from .tasks import Task, task_from_dict
from .token_reduction import check_token_reduction


_LONGEST_MESSAGE = 1000


@strict
class MMTransformerConfig(PreTrainedConfig):
    r"""
    Configuration of a [`MMTransformerModel`] or [`MMTransformerForMultiTask`].

    It covers a text encoder, a vision and an audio encoder (or one of them), their fusion and the tasks.

    Args:
        text_config (`dict` or `PreTrainedConfig`, *optional*):
            Config of any text encoder of `AutoModel`. A `dict` needs its `model_type`. Defaults to BERT-base.
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            Config of any vision encoder of `AutoModel`. `None` for a model without images.
        audio_config (`dict` or `PreTrainedConfig`, *optional*):
            Config of any audio encoder of `AutoModel` (Wav2Vec2, HuBERT, WavLM, Whisper, AST, ...). `None` for a model
            without sound.
        table_config (`dict` or [`TableConfig`], *optional*):
            The columns of numbers and categories; [`table_columns`] makes it from training rows. `None` for a model
            without them. A modality of your own has a field of its own, `{encoder}_config`.
        decoder_config (`dict` or `PreTrainedConfig`, *optional*):
            Config of a decoder of `AutoModelForCausalLM` (BERT, GPT-2, BART, ...), for tasks that write text if the
            text encoder has no decoder. It must have `decoder_start_token_id` (or `bos_token_id`), `eos_token_id` and
            `pad_token_id`.
        fusion_type (`str`, *optional*, defaults to `"cross_attention"`):
            `"cross_attention"`, `"co_attention"`, `"bottleneck"`, `"merged"`, `"late"`, `"prefix"`, or a kind of your
            own.
        fusion_layers_every (`int`, *optional*):
            For a decoder-only language model as text encoder: the fusion stands inside, before every n-th layer, with
            `num_fusion_layers` layers at each place (https://arxiv.org/abs/2204.14198). 4 is usual. By default it
            stands behind the last layer.
        fusion_kwargs (`dict`, *optional*): Options of the fusion kind, for example `{"num_latents": 8}`.
        fusion_hidden_size (`int`, *optional*): Width of the fusion. Defaults to that of the text encoder.
        num_fusion_layers (`int`, *optional*, defaults to 3):
            Number of fusion layers. `from_encoders` sets it to 1.
        num_fusion_attention_heads (`int`, *optional*):
            Attention heads of each fusion layer. Defaults to those of the text encoder, or to heads of 64.
        fusion_dropout (`float`, *optional*, defaults to 0.1): Dropout in attention and feed-forward of the fusion.
        classifier_dropout (`float`, *optional*, defaults to 0.1): Dropout in the task layers.
        modality_dropout (`float` or `dict[str, float]`, *optional*, defaults to 0.0):
            Probability that a row loses a modality in training, such as all of its images. So the model also learns to
            answer without it. A number is for each modality but the text; `{"vision": 0.2, "text": 0.1}` sets it by
            modality. A row always keeps at least one modality. `from_encoders` sets 0.3, also for the text if no task
            writes.
        num_frames (`int`, *optional*, defaults to 8): The largest number of frames of a video.
        frame_embedding (`str`, *optional*, defaults to `"sinusoidal"`):
            The embedding of the numbers of video frames: `"sinusoidal"` or `"learned"`.
        item_order (`bool`, *optional*, defaults to `False`):
            Whether the images, and the clips of sound, of a row have an order, as in "the left one" or "before and
            after". Without it, swapping two images of a row changes nothing. `from_encoders` sets it to `True`.
        vision_token_reduction (`dict`, *optional*):
            Reduces the tokens of each image before the fusion, which saves time with many images or frames per row.
            `{"kind": "merge", "num_tokens": 49}` merges the most similar tokens (https://arxiv.org/abs/2210.09461),
            without parameters. In `{"kind": "resampler", "num_tokens": 32, "num_layers": 2}` learned vectors attend to
            them (https://arxiv.org/abs/2204.14198).
        reads_text (`bool`, *optional*, defaults to `True`):
            Whether rows may have a text. `from_encoders(text=None, ...)` sets it to `False`: a small text encoder then
            stands in, whose outputs are not used.
        freeze_batch_norm (`bool`, *optional*, defaults to `False`):
            Whether batch normalisation in the encoders uses, and keeps, its running statistics in training. Then no row
            depends on its batch. `from_encoders` sets it to `True`.
        linear_probe (`bool`, *optional*, defaults to `False`):
            Whether each head also has a linear layer on the mean encoder outputs. With it, [`MMTrainer`] starts the
            head as the best linear model (https://arxiv.org/abs/2202.10054). `from_encoders` sets it to `True`.
        tasks (`list[dict]` or `list[Task]`, *optional*):
            The tasks, as objects or as the dicts of `config.json`.
        regularization (`dict`, *optional*):
            `{"kind": "l2", "l1" or "l2_sp", "weight": lambda}` adds lambda times a penalty to the loss. The penalty is
            a sum over the matrices of the task layers of all tasks: their squares (or absolute values, or squared
            distances from the start of training). `"tasks": {"topic": {"weight": ...}}` sets weight or kind for one
            task. `"encoders": {"kind": "l2_sp", "weight": ...}` keeps the encoders near their pretrained weights
            (https://arxiv.org/abs/1802.01483).
        task_weighting (`str` or `dict`, *optional*, defaults to `"static"`):
            The task weighting of [`MMTrainer`]: `"static"`, `"uncertainty"`, `"famo"`, `"db_mtl"`, `"gradnorm"`,
            `"pcgrad"`, or a kind of your own; with options: `{"kind": "famo", "learning_rate": 0.01}`.
        text_pooling (`str`, *optional*, defaults to `"mean"`):
            The vector of a text for heads, linear probes, retrieval and embeddings: `"mean"` of its tokens, or the
            `"last"` one, which alone has read the whole text in a decoder-only language model.
        initializer_range (`float`, *optional*, defaults to 0.02): Standard deviation of new weights.
        freeze (`list[str]`, *optional*):
            The parts that are not trained. `"text"`, `"vision"` or `"audio"` is a whole encoder; for an
            encoder-decoder, the encoder with the embeddings that its decoder shares; for a language model that writes,
            all of it. Or the name of a sub-module of
            [`MMTransformerModel`], such as `"text_model.embeddings"`. `from_encoders` sets it to `["vision"]`.
        calibration (`dict`, *optional*):
            How far to trust answers, by the modalities that a row has; [`calibrate`] writes it. `None` leaves
            probabilities as they are.
        encoder_dtypes (`dict[str, str]`, *optional*):
            The encoders that are stored in another dtype than the rest of the model, such as `{"text": "bfloat16"}`;
            `save_pretrained` writes it.

    Raises:
        ValueError: one sentence, if something does not fit.

    Example:

    ```python
    >>> from transformers import BertConfig, ViTConfig
    >>> from mm_transformers import Classification, MMTransformerConfig, MMTransformerForMultiTask

    >>> config = MMTransformerConfig(
    ...     text_config=BertConfig(),
    ...     vision_config=ViTConfig(),
    ...     tasks=[Classification("sentiment", labels=["negative", "neutral", "positive"])],
    ... )
    >>> model = MMTransformerForMultiTask(config)  # random weights; see `from_encoders` for pretrained ones
    ```
    """

    model_type = "mm_transformer"
    # `sub_configs` and not `sub_configs_defaults`, which transformers 5.17 lacks.
    sub_configs: ClassVar[dict[str, type]] = {
        "text_config": AutoConfig,
        "vision_config": AutoConfig,
        "audio_config": AutoConfig,
        "table_config": TableConfig,
        "decoder_config": AutoConfig,
    }
    attribute_map = {
        "hidden_size": "fusion_hidden_size",
        "num_hidden_layers": "num_fusion_layers",
        "num_attention_heads": "num_fusion_attention_heads",
    }

    # The losses are for the logs, other outputs for callers: the Trainer gathers the logits alone.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["losses", "hidden_states", "attentions", "cross_attentions"]

    text_config: dict | PreTrainedConfig | None = None
    vision_config: dict | PreTrainedConfig | None = None
    audio_config: dict | PreTrainedConfig | None = None
    table_config: dict | PreTrainedConfig | None = None
    decoder_config: dict | PreTrainedConfig | None = None
    fusion_type: str = "cross_attention"
    fusion_layers_every: int | None = None
    fusion_kwargs: dict | None = None
    fusion_hidden_size: int | None = None
    num_fusion_layers: int = 3
    num_fusion_attention_heads: int | None = None
    fusion_dropout: float | int = 0.1
    classifier_dropout: float | int = 0.1
    modality_dropout: float | int | dict = 0.0
    num_frames: int = 8
    frame_embedding: str = "sinusoidal"
    item_order: bool = False
    vision_token_reduction: dict | None = None
    reads_text: bool = True
    linear_probe: bool = False
    freeze_batch_norm: bool = False
    tasks: list | None = None
    regularization: dict | None = None
    task_weighting: str | dict = "static"
    text_pooling: str = "mean"
    initializer_range: float = 0.02
    freeze: list | None = None
    calibration: dict | None = None
    encoder_dtypes: dict | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = _resolve(self.text_config or {"model_type": "bert"}, "text")
        self.vision_config = _resolve(self.vision_config, "vision")
        self.audio_config = _resolve(self.audio_config, "audio")
        for name, encoder in own_encoders().items():
            field = f"{name}_config"
            self.sub_configs[field] = encoder.own.config_class  # of a modality that was registered later
            setattr(self, field, resolve_own(kwargs.pop(field, getattr(self, field, None)), name))
        self.decoder_config = _resolve(self.decoder_config, "decoder")
        if self.decoder_config is not None:
            self.decoder_config.is_decoder = self.decoder_config.add_cross_attention = True
        self.fusion_kwargs = dict(self.fusion_kwargs or {})
        # Models that were saved with such tasks still load.
        check_starts([task for task in self.tasks or [] if hasattr(task, "to_dict") and task.needs_decoder])
        self.tasks = [task.to_dict() if hasattr(task, "to_dict") else task for task in self.tasks or []]

        if self.fusion_hidden_size is None:
            self.fusion_hidden_size = encoder_width(self.text_config)
        if self.num_fusion_attention_heads is None:
            heads = getattr(self.text_config, "num_attention_heads", None)
            fits = isinstance(heads, int) and heads > 0 and self.fusion_hidden_size % heads == 0
            self.num_fusion_attention_heads = heads if fits else max(1, self.fusion_hidden_size // 64)
        # Also run by `@strict` whenever the config is saved; here they raise a plain `ValueError`.
        self.validate_fusion()
        self.validate_tasks()
        self.validate_freeze()
        self.validate_calibration()
        self.validate_encoder_dtypes()
        # So that tools that expect one classifier find the labels of the first.
        labels = next((list(map(str, task["labels"])) for task in self.tasks if "labels" in task), None)
        if labels is not None:
            self.id2label = dict(enumerate(labels))
            self.label2id = {label: i for i, label in enumerate(labels)}
        if not __name__.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}."):
            # They are only for users of a copied code; a config that is saved alone has no copy.
            kwargs.pop("custom_pipelines", None)
            kwargs.pop("auto_map", None)
        for name in kwargs:
            # Other names are kept: a later release may have them.
            meant = difflib.get_close_matches(name, MMTransformerConfig.__annotations__, n=1, cutoff=0.85)
            if meant and name not in self.attribute_map:
                raise ValueError(f"MMTransformerConfig has no field {name!r}; did you mean {meant[0]!r}?")
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        for name in self.sub_configs:
            # Hub ids tell the origin of an encoder; a folder of this machine is meaningless to others.
            if isinstance(values.get(name), dict) and _is_folder(values[name].get("_name_or_path")):
                values[name].pop("_name_or_path")
        return values

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As [`~transformers.PreTrainedConfig.save_pretrained`], but a link in the way is replaced, not followed."""
        drop_link(os.path.join(save_directory, "config.json"))
        return super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> "MMTransformerConfig":
        values = _read(cls, pretrained_model_name_or_path, kwargs)
        if values.get("model_type") != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a model of type {values.get('model_type')!r}, not "
                f"{cls.model_type!r}. To use it as an encoder of a new model, call `from_encoders`."
            )
        _check_auto_map(values, pretrained_model_name_or_path)
        check_values(values)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        As [`~transformers.PreTrainedConfig.from_dict`].

        Raises:
            ValueError: one sentence, if a value has a wrong type or does not fit.
        """
        if not isinstance(config_dict, dict):
            raise ValueError(f"A config must be a dict, but is a {type(config_dict).__name__}.")
        _check_auto_map(config_dict, kwargs.get("name_or_path"))
        check_values(config_dict)
        if kwargs.get("tasks") is not None:  # objects, which only a new config accepts
            config_dict = {**config_dict, "tasks": kwargs.pop("tasks")}
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"The config has a wrong value: {_without_preamble(error)}") from error
        except ValueError as error:
            if len(str(error)) < _LONGEST_MESSAGE:
                raise
            raise ValueError(one_line(error, _LONGEST_MESSAGE)) from error  # the error includes the whole value
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
            # The check of transformers, of all values of all parts.
            raise ValueError(f"The config has a wrong value: {type(error).__name__}: {one_line(error)}") from error

    def get_tasks(self) -> dict[str, Task]:
        """The tasks by name, in order."""
        tasks = [task_from_dict(task) for task in self.tasks]
        return {task.name: task for task in tasks}

    @property
    def modalities(self) -> list[str]:
        """The modalities of the model beside text, in the order of the streams of fusions."""
        return [name for name in OTHER_ENCODERS if getattr(self, f"{name}_config", None) is not None]

    @property
    def table_columns(self) -> list[str]:
        """The names of the columns of numbers and categories that the model reads; none without `table_config`."""
        return [] if self.table_config is None else self.table_config.names

    @property
    def modality_dropout_probabilities(self) -> dict[str, float]:
        """`modality_dropout` by modality."""
        if isinstance(self.modality_dropout, dict):
            return self.modality_dropout
        return dict.fromkeys(self.modalities, self.modality_dropout) if self.modality_dropout else {}

    @property
    def has_decoder(self) -> bool:
        """Whether some task writes text, so that the text model is a whole encoder-decoder or language model."""
        return any(task.needs_decoder for task in self.get_tasks().values())

    @property
    def has_language_model(self) -> bool:
        """Whether some task writes text, and the text model is the decoder-only language model that writes it."""
        return self.has_decoder and self.decoder_config is None and is_language_model(self.text_config)

    @property
    def read_modalities(self) -> list[str]:
        """What the model reads: "text", unless it reads no texts, and the `modalities`."""
        return [*(["text"] if self.reads_text else []), *self.modalities]

    @property
    def reads_jointly(self) -> bool:
        """Whether the text encoder reads the other modalities itself: by layers inside of it, or as a prefix."""
        if not self.modalities:
            return False
        kind = fusion_class(self.fusion_type, self.fusion_kwargs or {})
        return bool(self.fusion_layers_every) or kind.is_read_by_text

    @property
    def begins_texts(self) -> bool:
        """Whether a row without a text begins with the first token of texts, also for heads."""
        return self.reads_jointly and is_language_model(self.text_config)

    @property
    def decoder_vocab_size(self) -> int:
        return decoder_vocab_size(self.text_config, self.decoder_config)

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.text_config.vocab_size = value

    def validate_fusion(self) -> None:
        """Part of `@strict`-powered validation."""
        fusion_class(self.fusion_type, self.fusion_kwargs or {})
        check_joint(self)
        own = {
            "num_fusion_layers": self.num_fusion_layers,
            "fusion_kwargs": self.fusion_kwargs or {},
            "vision_token_reduction": self.vision_token_reduction or {},
        }
        check_sizes(own, "config")
        width, heads = self.fusion_hidden_size, self.num_fusion_attention_heads
        if self.num_fusion_layers < 1 or width < 1 or heads < 1:
            raise ValueError(
                "num_fusion_layers, fusion_hidden_size and num_fusion_attention_heads must be at least 1, but are "
                f"{self.num_fusion_layers}, {width} and {heads}."
            )
        if width % heads != 0:
            raise ValueError(
                f"fusion_hidden_size ({width}) must be a multiple of num_fusion_attention_heads ({heads})."
            )
        if self.num_frames < 1 or self.frame_embedding not in ("sinusoidal", "learned"):
            raise ValueError(
                "num_frames must be at least 1 and frame_embedding 'sinusoidal' or 'learned', but they are "
                f"{self.num_frames} and {self.frame_embedding!r}."
            )
        if self.text_pooling not in TEXT_POOLINGS:
            raise ValueError(
                f"text_pooling must be one of {', '.join(TEXT_POOLINGS)}, but is {shortened(self.text_pooling)}."
            )
        if not is_finite_number(self.initializer_range) or self.initializer_range < 0:
            raise ValueError(f"initializer_range must be at least 0 and finite, but is {self.initializer_range}.")
        check_token_reduction(self.vision_token_reduction)
        unknown = sorted(set(self.modality_dropout_probabilities) - {"text", *self.modalities})
        if unknown:
            raise ValueError(
                f"modality_dropout names {unknown[0]!r}, but the modalities of this model are "
                f"{', '.join(['text', *self.modalities])}."
            )
        values = {name: getattr(self, name) for name in ("fusion_dropout", "classifier_dropout")}
        values.update({f"modality_dropout[{k!r}]": v for k, v in self.modality_dropout_probabilities.items()})
        if not isinstance(self.modality_dropout, dict):
            values["modality_dropout"] = self.modality_dropout
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, but is {shortened(value)}.")

    def validate_tasks(self) -> None:
        """Part of `@strict`-powered validation."""
        if not self.reads_text and not self.modalities:
            raise ValueError("A model without text needs another input: vision_config, audio_config or table_config.")
        seen = set()
        inputs = set(self.table_columns)
        for task in (task_from_dict(task) for task in self.tasks):
            if task.column in inputs:
                raise ValueError(
                    f"Column {task.column!r} has the labels of task {task.name!r}, so it cannot be an input of the "
                    "table."
                )
        for task in (task_from_dict(task) for task in self.tasks):
            if task.name in seen:
                raise ValueError(f"Two tasks are called {task.name!r}; give each task a different name.")
            seen.add(task.name)
        writing = [task for task in self.get_tasks().values() if task.needs_decoder]
        check_decoder(self.text_config, self.decoder_config, writing)
        mixes = bool(self.modalities) and fusion_class(self.fusion_type, self.fusion_kwargs or {}).mixes_text
        if mixes and self.has_language_model:
            raise ValueError(
                f"Task {writing[0].name!r} is written token by token, but in fusion_type {self.fusion_type!r} text "
                "tokens depend on later ones: use fusion_type='cross_attention' or 'prefix'."
            )
        check_regularization(self.regularization, self.get_tasks())

    def validate_freeze(self) -> None:
        """Part of `@strict`-powered validation."""
        check_freeze(self.freeze, ["text", *self.modalities])

    def validate_calibration(self) -> None:
        """Part of `@strict`-powered validation."""
        check_calibration(self.calibration, self.get_tasks())

    def validate_encoder_dtypes(self) -> None:
        """Part of `@strict`-powered validation."""
        check_encoder_dtypes(self.encoder_dtypes, ["text", *self.modalities])


def _read(cls: Any, path: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    The content of `config.json`.

    Raises:
        OSError: one sentence, if there is no such folder or file, or it holds no config.
    """
    check_folder(path)
    try:
        values, _ = cls.get_config_dict(path, **kwargs)
    except (AttributeError, TypeError, RecursionError, UnicodeDecodeError) as error:
        raise OSError(f"config.json of {str(path)!r} is not a config: {one_line(error)}") from error
    if not isinstance(values, dict):
        raise OSError(f"config.json of {str(path)!r} is not a config: it holds a {type(values).__name__}.")
    if not values and os.path.isdir(path) and not os.path.isfile(os.path.join(path, "config.json")):
        raise ValueError(f"{path} holds no model: it has no config.json.")
    return values


def _without_preamble(error: Exception) -> str:
    """The part of a strict dataclass's error with the field and the problem."""
    text = one_line(error)
    return re.sub(r"^Validation error for field '\w+': (\w+Error: )?", "", text)


def check_sizes(values: Any, where: str) -> None:
    """
    Checks the config of an encoder before it is built: a loop over a billion layers would never end.

    Raises:
        ValueError: one sentence, if a size is negative, or there are too many layers.
    """
    for name, value in values.items():
        for number in value if isinstance(value, (list, tuple)) else [value]:
            is_number = isinstance(number, int) and not isinstance(number, bool)
            if is_number and _LAYERS.search(name) and number > limits().config_layers:
                raise ValueError(
                    f"{where}.{name} is {number:,}, but the limit is {limits().config_layers:,} layers. To raise it, "
                    "call set_limits(config_layers=...)."
                )
            if is_number and name == "image_size" and number**2 > limits().image_pixels:
                raise ValueError(
                    f"{where}.image_size is {number:,}, so images would have more pixels than the limit image_pixels="
                    f"{limits().image_pixels:,} allows; change it by set_limits(image_pixels=...)."
                )
            if is_number and _COUNTS.search(name) and number < 0:
                raise ValueError(f"{where}.{name} must not be negative, but is {number:,}.")
        if isinstance(value, dict):
            check_sizes(value, f"{where}.{name}")


_LAYERS = re.compile(r"layers?$|^n_layer|depths?$|blocks?$|num_stages|block_repeats")
_COUNTS = re.compile(
    r"^(vocab|hidden|intermediate|embedding|image|patch)_size$|^(num|n|encoder|decoder)_\w*(layers?|heads?)$"
    r"|^(dim|embed_dim|hidden_dim|d_model|d_ff|depths?)$"
)


def check_traits(config: Any, where: str) -> None:
    """
    Checks `encoder_traits`.

    Raises:
        ValueError: one sentence, if they do not have the form of [`load_encoder`].
    """
    traits = getattr(config, "encoder_traits", None)
    if traits is None:
        return
    width = traits.get("width") if isinstance(traits, dict) else 0
    shortest = traits.get("shortest", 1) if isinstance(traits, dict) else 0
    unused = traits.get("unused", []) if isinstance(traits, dict) else 0
    is_right = (
        isinstance(traits, dict)
        and all(isinstance(number, int) and number > 0 for number in (1 if width is None else width, shortest))
        and isinstance(unused, (list, tuple))
        and all(isinstance(name, str) for name in unused)
    )
    if not is_right:
        raise ValueError(f"{where}.encoder_traits is not in the format of this package: {shortened(traits)}.")


def _is_folder(name_or_path: Any) -> bool:
    return isinstance(name_or_path, str) and (os.path.isabs(name_or_path) or os.path.isdir(name_or_path))


def _check_auto_map(values: dict[str, Any], path: Any) -> None:
    """Checks that code is named `module.Class`, beside the config; transformers adds the Hub id before it."""
    if not isinstance(values.get("auto_map") or {}, dict):
        raise ValueError("auto_map must name the code of each Auto class, as in a saved model.")
    for name, references in (values.get("auto_map") or {}).items():
        for reference in references if isinstance(references, (list, tuple)) else [references]:
            repo, _, code = str(reference).rpartition("--")
            beside = not repo or path is None or repo == str(path)
            if reference is not None and not (beside and re.fullmatch(r"[^\W\d]\w*\.[^\W\d]\w*", code)):
                raise ValueError(
                    f"auto_map of {'the config' if path is None else str(path)} asks for code outside of it "
                    f"({name}: {reference!r}), which is not run; it must name a file beside config.json, as in "
                    f"'{MMTransformerConfig.__module__.rpartition('.')[2]}.MMTransformerConfig'."
                )


def resolve_own(config: Any, name: str) -> Optional[PreTrainedConfig]:
    """
    The config of an encoder that transformers lacks, from a dict or as it is.

    Raises:
        ValueError: one sentence, if it has another type or a wrong value.
    """
    if config is None:
        return None
    encoder = own_encoders()[name].own
    kind = encoder.config_class
    if isinstance(config, dict):
        values = {key: value for key, value in config.items() if key != "model_type"}
        if config.get("model_type", kind.model_type) != kind.model_type:
            raise ValueError(
                f"{name}_config has the model_type {config['model_type']!r}, but must have {kind.model_type!r}."
            )
        check_sizes(values, f"{name}_config")
        try:
            config = kind(**values)
        except StrictDataclassError as error:
            raise ValueError(f"{name}_config has a wrong value: {_without_preamble(error)}") from error
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"{name}_config has a wrong value: {type(error).__name__}: {one_line(error)}") from error
    # Not `isinstance`: code from a folder has classes of its own.
    if getattr(config, "model_type", None) != kind.model_type:
        raise ValueError(f"{name}_config must be a {kind.__name__} or a dict, but is {shortened(config)}.")
    return config


def _resolve(config: Any, modality: str) -> Optional[PreTrainedConfig]:
    """A sub-config as an object: it may be a dict (from JSON), or the config of a model of several modalities."""
    if config is None:
        return None
    if isinstance(config, dict):
        values = dict(config)
        model_type = values.pop("model_type", None)
        if model_type is None:
            raise ValueError(f"{modality}_config is a dict without 'model_type', so its kind of encoder is not known.")
        if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"{modality}_config has the model_type {model_type!r}, which transformers does not know; update "
                "transformers, or register your own config by AutoConfig.register first."
            )
        check_sizes(values, f"{modality}_config")
        try:
            config = AutoConfig.for_model(model_type, **values)
        except Exception as error:  # any error of an encoder's config about a wrong value
            raise ValueError(f"{modality}_config has a wrong value: {_without_preamble(error)}") from error
    config = sub_config_of(config, modality)
    if not isinstance(config.dtype, (torch.dtype, str, type(None))):
        raise ValueError(f"{modality}_config has the dtype {config.dtype!r}, which is not a dtype of torch.")
    check_traits(config, f"{modality}_config")
    if hasattr(config, "auto_map"):
        # Only encoders of transformers or registered by the user; code named by a config is not run.
        del config.auto_map
    return config


__all__ = ["MMTransformerConfig"]
