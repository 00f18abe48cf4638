"""The small model of the demo, and its training: encoders made from configs, with new weights."""

import math
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import datasets
import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    PreTrainedTokenizerFast,
    ResNetConfig,
    TrainingArguments,
    ViTImageProcessorPil,
    set_seed,
)

from ..data.embedded import TASK_LABELS, TRANSLATIONS
from ..model.configuration_mm_transformer import MMTransformerConfig
from ..model.modeling_mm_transformer import MMTransformerForMultiTask
from ..model.processing_mm_transformer import MMTransformerProcessor
from ..model.tasks import Classification, Generation, Task
from ..training.trainer import MMTrainer
from .progress import use_rich_progress


IMAGE_SIZE = 64


def make_processor(
    texts: list[str], languages: Sequence[str] = tuple(TRANSLATIONS), image_size: int = IMAGE_SIZE
) -> MMTransformerProcessor:
    """
    A tokenizer trained on the texts, and an image processor that scales pixels to -1..1.

    The tokenizer has a token "[language]" for each language.
    """
    # Byte-level, so that decoding restores every text exactly.
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    special = ["[PAD]", "[CLS]", "[SEP]", *(f"[{language}]" for language in languages)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=2000, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        additional_special_tokens=special[3:],
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )
    # By Pillow, so that the results of the demo do not depend on an installed torchvision.
    image_processor = ViTImageProcessorPil(size={"height": image_size, "width": image_size})
    return MMTransformerProcessor(image_processor=image_processor, tokenizer=tokenizer)


def make_tasks(tokenizer: PreTrainedTokenizerFast) -> list[Task]:
    """A classification for each of the labels, and two translations by one decoder with a language token."""
    choices = [Classification(name, labels=labels) for name, labels in TASK_LABELS.items()]
    starts = {language: tokenizer.convert_tokens_to_ids(f"[{language}]") for language in TRANSLATIONS}
    return choices + [
        Generation(name, max_length=16, decoder_start_ids=[start], loss_weight=2.0) for name, start in starts.items()
    ]


def make_config(
    tokenizer: PreTrainedTokenizerFast, fusion_type: str, with_images: bool, dropout: float = 0.1
) -> MMTransformerConfig:
    """
    A BERT of 1 layer, a ResNet of 3, 1 layer of fusion and a decoder of 1, each of width 64.

    So small a model cannot overfit in so few epochs: with `dropout=0.0` it learns the same in fewer steps.
    """
    # The usual 0.02 is meant for widths of 768; in so narrow a layer the signal of pictures would be too weak.
    text = dict(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        initializer_range=0.1,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=tokenizer.pad_token_id,
    )
    decoder = BertConfig(
        **text, is_decoder=True, bos_token_id=tokenizer.cls_token_id, eos_token_id=tokenizer.sep_token_id
    )
    vision = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic")
    return MMTransformerConfig(
        text_config=BertConfig(**text),
        vision_config=vision if with_images else None,
        decoder_config=decoder,
        fusion_type=fusion_type,
        num_fusion_layers=1,
        fusion_dropout=dropout,
        classifier_dropout=dropout,
        initializer_range=0.1,
        tasks=make_tasks(tokenizer),
    )


def train(
    name: str,
    data: datasets.DatasetDict,
    processor: MMTransformerProcessor,
    config: MMTransformerConfig,
    steps: int,
    seed: int,
    output_dir: Path,
    console: Optional[Console] = None,
) -> MMTrainer:
    """Trains a new model, with some evaluations on the validation split."""
    set_seed(seed)
    # A worker reads the pictures of the next batch while the model trains. Only a forked one starts at once.
    num_workers = int(multiprocessing.get_start_method() == "fork")
    arguments = TrainingArguments(
        str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=288,  # a half of the validation split: the decoder is called less often
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, steps // 2),
        weight_decay=0.01,
        eval_strategy="steps",
        eval_steps=math.ceil(steps / 3),
        logging_steps=max(1, steps // 40),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        dataloader_num_workers=num_workers,
        dataloader_persistent_workers=num_workers > 0,
        seed=seed,
    )
    trainer = MMTrainer(
        MMTransformerForMultiTask(config),
        arguments,
        processing_class=processor,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
    )
    use_rich_progress(trainer, name, console or Console())
    trainer.train()
    return trainer
