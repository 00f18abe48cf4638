"""What all models of this type have in common: how they begin, and how they are saved."""

import difflib
import inspect
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers import initialization as init

from .checkpoint_checks import check_fit, checked, is_pickle_error, what_is_wrong
from .configuration_mm_transformer import MMTransformerConfig
from .custom_code import write_model_code
from .decoders import load_seq2seq
from .encoders import HUB_KWARGS, encoder_config_from_pretrained, load_encoder
from .fusion_layers import Gate
from .input_checks import check_finite_weights, check_layout, is_finite, what_is_wrong_with_inputs
from .safe_writing import saved_aside
from .task_base import task_from_dict


# Of models with pretrained encoders; `docs/defaults.md` says how it was chosen.
MODALITY_DROPOUT = 0.3

# What `save_pretrained(push_to_hub=True)` hands on to `push_to_hub`.
_PUSHING = ("repo_id", "commit_message", "private", "token", "create_pr", "max_shard_size", "revision", "tags")


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
    _keep_in_fp32_modules_strict = ["gate_alpha", "logit_scale"]
    # Whether weights were read from a file, and no answer was computed with them yet.
    _is_unproven = False
    _no_split_modules = ["CrossAttentionLayer", "CoAttentionLayer", "SelfAttentionLayer"]

    @classmethod
    def is_custom_code(cls) -> bool:
        # Custom code is not initialised module by module, which would leave gates, latents and whole encoders as the
        # allocator gave them.
        return False

    def post_init(self):
        super().post_init()
        # Those of all fusions, heads and families of encoders are named; FSDP and loading want only what there is.
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}
        names = {part for name in self.state_dict() for part in name.split(".")}
        self._keep_in_fp32_modules_strict -= set(type(self)._keep_in_fp32_modules_strict) - names

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, Gate):
            init.zeros_(module.gate_alpha)
        elif hasattr(module, "init_own_parameters"):
            module.init_own_parameters(self.config.initializer_range)

    @torch.no_grad()
    def initialize_weights(self):
        # The audio encoders of transformers leave the weight of a weight-normed layer as the allocator gave it, if a
        # checkpoint lacks it: what they initialise is the product that the layer makes of its two parameters.
        for module in self.modules():
            if is_parametrized(module, "weight") and hasattr(module.parametrizations.weight, "original1"):
                direction = module.parametrizations.weight.original1
                if not direction.is_meta and not getattr(direction, "_is_hf_initialized", False):
                    # As torch does for convolutions; the layer takes it apart into direction and length.
                    module.weight = nn.init.kaiming_uniform_(torch.empty_like(direction), a=5**0.5)
        super().initialize_weights()

    @staticmethod
    def _finalize_model_loading(model, load_config, loading_info):
        # Before memory is taken for weights that are missing or do not fit.
        if not getattr(load_config, "is_quantized", False):
            check_fit(model, loading_info)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def __call__(self, *args, **kwargs):
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        names = list(inspect.signature(type(self).forward).parameters)[1:] if args else ()
        check_layout(self, {**dict(zip(names, args, strict=False)), **kwargs})
        try:
            outputs = super().__call__(*args, **kwargs)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
            problem = what_is_wrong_with_inputs(self, error, args, kwargs)
            if problem is None:
                raise
            raise ValueError(problem) from error
        if self._is_unproven:
            self._is_unproven = False
            if not is_finite(outputs):
                check_finite_weights(self)
        return outputs

    def enable_input_require_grads(self):
        """
        As [`~transformers.PreTrainedModel.enable_input_require_grads`] does, also for encoders whose embeddings return
        more than one tensor (Swin, Hiera, I-BERT).
        """

        def want_gradient(module, inputs, output):
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
        """As [`~transformers.PreTrainedModel.resize_token_embeddings`] does, for encoder and decoder."""
        inner = getattr(self, "model", self)
        if not inner.has_decoder:
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        text_model, config = inner.text_model, self.config
        if pad_to_multiple_of is not None:
            # Rounded up here, since Marian gives its bias the number that was asked for.
            size = new_num_tokens if new_num_tokens is not None else config.vocab_size
            new_num_tokens = -(-size // pad_to_multiple_of) * pad_to_multiple_of
        if config.decoder_config is None:
            # An encoder-decoder knows what else has the size of its vocabulary.
            return text_model.resize_token_embeddings(new_num_tokens, mean_resizing=mean_resizing)
        # One that was put together does not, and its parts have configs of their own.
        text_model.decoder.resize_token_embeddings(new_num_tokens, mean_resizing=mean_resizing)
        embeddings = text_model.encoder.resize_token_embeddings(new_num_tokens, mean_resizing=mean_resizing)
        config.text_config.vocab_size = config.decoder_config.vocab_size = embeddings.num_embeddings
        return embeddings

    def save_pretrained(self, save_directory, is_main_process: bool = True, push_to_hub: bool = False, **kwargs):
        """
        As [`~transformers.PreTrainedModel.save_pretrained`] does, and copies the code of the model into the folder, so
        that it can be loaded with `trust_remote_code=True` where this package is not installed. Of a model with
        adapters, the adapters alone are saved.
        """
        # In the original layout of a vision tower its keys have other names, and the Trainer, which resumes by
        # `load_state_dict(strict=False)`, would leave them out.
        kwargs.setdefault("save_original_format", False)
        hub_kwargs = {name: kwargs.pop(name) for name in _PUSHING if name in kwargs} if push_to_hub else {}
        if not is_main_process or os.path.isfile(save_directory) or kwargs.get("distributed_checkpoint"):
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        else:
            with saved_aside(save_directory) as staged:
                super().save_pretrained(staged, is_main_process=is_main_process, **kwargs)
                # Of adapters (`add_adapter`), they alone are saved, without a config that would name any code.
                if not getattr(self, "_hf_peft_config_loaded", False):
                    write_model_code(staged, self)
        if push_to_hub:
            # Not by the stock method, which uploads before the code is there.
            self.push_to_hub(hub_kwargs.pop("repo_id", Path(save_directory).name), **hub_kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        As [`~transformers.PreTrainedModel.from_pretrained`] does, from safetensors only: a pickle is read if
        `use_safetensors=False` says so. With this package installed, no code of the checkpoint is run.

        Raises:
            OSError: one sentence, if files are missing or damaged.
            ValueError: one sentence, if the config does not fit, or the checkpoint lacks weights or has others.
                `ignore_mismatched_sizes=True` loads what there is.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        path = pretrained_model_name_or_path
        try:
            with checked(path, kwargs):
                loaded = super().from_pretrained(path, *args, **kwargs)
        except Exception as error:
            wrong = what_is_wrong(path, error, **kwargs)
            if wrong is None:
                raise
            # A message of torch that says how to run a pickle is not passed on.
            raise wrong from (None if is_pickle_error(error) else error)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info=True
        # Loaded weights are new parameters, which want gradients.
        getattr(model, "model", model).freeze()
        model._is_unproven = True
        return loaded

    @classmethod
    def from_encoders(cls, text: str, vision: Optional[str] = None, audio: Optional[str] = None, **kwargs):
        """
        A model with pretrained encoders and a new fusion, whose gates are closed: until it is trained, its
        `last_hidden_state` is that of the text encoder.

        Args:
            text (`str`): Hub id or local folder of a text encoder; of CLIP and SigLIP the text tower is taken, of an
                encoder-decoder the encoder, and if a task writes text the decoder too.
            vision (`str`, *optional*): Hub id or local folder of a vision encoder; of CLIP and SigLIP the vision tower.
            audio (`str`, *optional*): Hub id or local folder of an audio encoder; of Whisper the encoder is taken.
            kwargs: fields of [`MMTransformerConfig`] (`tasks`, `fusion_type`, `num_fusion_layers`, ...), of which
                `num_fusion_layers` defaults to 1 here, `linear_probe`, `freeze_batch_norm` and `item_order` to `True`,
                `freeze` to `["vision"]` (Zhai et al. 2022, https://arxiv.org/abs/2111.07991; `[]` trains all, which
                encoders with new weights need), and `modality_dropout` to 0.3 of each modality (of the text only if no
                task writes); everything else (`revision`, `token`, `dtype`, `attn_implementation`, ...) goes to
                `AutoModel.from_pretrained`.

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
        options = {name: kwargs.pop(name) for name in list(kwargs) if name in MMTransformerConfig.__annotations__}
        for name in kwargs:
            meant = difflib.get_close_matches(name, MMTransformerConfig.__annotations__, n=1, cutoff=0.85)
            if meant:
                raise ValueError(f"from_encoders knows no {name!r}; did you mean {meant[0]!r}?")
        # What is pretrained can be probed, and its running statistics are better than those of small batches.
        options.setdefault("linear_probe", True)
        options.setdefault("freeze_batch_norm", True)
        options.setdefault("item_order", vision is not None or audio is not None)
        options.setdefault("num_fusion_layers", 1)
        if vision is not None:
            options.setdefault("freeze", ["vision"])
        given = {"text": text, "vision": vision, "audio": audio}
        tasks = options.get("tasks") or []
        options.setdefault("modality_dropout", _modality_dropout([name for name, path in given.items() if path], tasks))
        # A checkpoint may be stored in half precision; training starts from float32 unless told otherwise.
        kwargs.setdefault("dtype", torch.float32)
        # A wrong option is told before gigabytes are read.
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if name in kwargs}
        text_config = encoder_config_from_pretrained(text, "text", **hub_kwargs)
        # What names other encoders is checked when these are known.
        early = {name: value for name, value in options.items() if name not in ("freeze", "modality_dropout")}
        config = MMTransformerConfig(**early, text_config=text_config)
        encoders, chosen = {}, {}
        for modality, path in given.items():
            if path is not None and modality == "text" and config.has_decoder:
                encoder = load_seq2seq(path, config.decoder_config, **kwargs)
                encoder_config = encoder.config if config.decoder_config is None else encoder.encoder.config
                options["text_config"] = encoder_config
                encoders["text_model"] = encoder
                chosen["text"] = (encoder_config, encoder_config._attn_implementation)
            elif path is not None:
                encoder, encoder_config = load_encoder(path, modality, **kwargs)
                options[f"{modality}_config"] = encoder_config
                encoders[f"{modality}_model"] = encoder
                chosen[modality] = (encoder_config, encoder_config._attn_implementation)
        config = MMTransformerConfig(**options, attn_implementation=kwargs.get("attn_implementation"))
        with _default_dtype(encoders["text_model"].dtype):
            model = cls(config, **encoders).eval()
        # A new config resets the attention implementation of its parts, which built encoders do not choose again.
        for encoder_config, implementation in chosen.values():
            encoder_config._attn_implementation = implementation
        return model


def _modality_dropout(modalities: list[str], tasks: list[Any]) -> dict[str, float]:
    """By modality; none of the text where a task writes, since it translates or continues that text."""
    if len(modalities) < 2:
        return {}
    kinds = [task_from_dict(task) if isinstance(task, dict) else task for task in tasks]
    keeps_text = any(task.needs_decoder for task in kinds)
    return {name: MODALITY_DROPOUT for name in modalities if not (name == "text" and keeps_text)}


@contextmanager
def _default_dtype(dtype: torch.dtype):
    """New parameters have this dtype."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)
