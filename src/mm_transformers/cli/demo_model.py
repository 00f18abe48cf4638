"""The small model of the demo, and its training: encoders made from configs, with new weights."""

import math
from pathlib import Path
from typing import Optional

import datasets
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    PreTrainedTokenizerFast,
    ResNetConfig,
    TrainingArguments,
    ViTImageProcessorPil,
    set_seed,
)

from ..data.embedded import TASK_LABELS
from ..model.configuration_mm_transformer import MMTransformerConfig
from ..model.modeling_mm_transformer import MMTransformerForMultiTask
from ..model.processing_mm_transformer import MMTransformerProcessor
from ..model.tasks import Classification
from ..training.trainer import MMTrainer
from .progress import use_rich_progress


IMAGE_SIZE = 64


def make_processor(texts: list[str]) -> MMTransformerProcessor:
    """A tokenizer trained on the texts, and an image processor that scales pixels to -1..1."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    backend.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=2000, special_tokens=special, show_progress=False)
    )
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
        model_input_names=["input_ids", "attention_mask"],
    )
    # By Pillow, so that what the demo prints does not depend on whether torchvision is installed.
    image_processor = ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return MMTransformerProcessor(image_processor=image_processor, tokenizer=tokenizer)


def make_config(vocab_size: int, fusion_type: str, with_images: bool) -> MMTransformerConfig:
    """A BERT of 1 layer, a ResNet of 3 and 1 layer of fusion, each of width 64."""
    # The usual 0.02 is made for widths of 768; in so narrow a layer the pictures would be whispered.
    text = BertConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    vision = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic")
    return MMTransformerConfig(
        text_config=text,
        vision_config=vision if with_images else None,
        fusion_type=fusion_type,
        num_fusion_layers=1,
        initializer_range=0.1,
        tasks=[Classification(name, labels=labels) for name, labels in TASK_LABELS.items()],
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
    """Trains a new model, with some looks at the validation split on the way."""
    set_seed(seed)
    arguments = TrainingArguments(
        str(output_dir),
        max_steps=steps,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=128,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, steps // 2),
        weight_decay=0.01,
        eval_strategy="steps",
        eval_steps=math.ceil(steps / 8),
        logging_steps=max(1, steps // 40),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
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
