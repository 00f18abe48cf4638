"""Small encoders with new weights and a tokenizer of the data, in folders from which any library loads them."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)


TOWER = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
LENGTH, IMAGE_SIZE, PATCH_SIZE = 32, 64, 8
START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"


def make_encoders(folder: Path, kind: str, texts: list[str]) -> dict[str, str]:
    """
    Writes both towers, unless they are there.

    Args:
        kind: "clip", a CLIP of two towers in one folder; or "bert-vit", each in its own.

    Returns:
        The folders of the text and of the vision encoder.
    """
    folder = folder / kind
    folders = {"text": folder, "vision": folder}
    if kind == "bert-vit":
        folders = {name: folder / name for name in folders}
    if not folder.exists():
        torch.manual_seed(0)
        tokenizer = _make_tokenizer(texts)
        tokenizer.save_pretrained(folders["text"])
        if kind == "clip":
            _make_clip(folder, tokenizer)
        else:
            _make_bert_and_vit(folders, tokenizer)
    return {name: str(path) for name, path in folders.items()}


def _make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token=END, continuing_subword_prefix="", end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=[START, PAD, END], end_of_word_suffix="</w>")
    backend.train_from_iterator(texts, trainer)
    ids = [(token, backend.token_to_id(token)) for token in (START, END)]
    backend.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=START, eos_token=END, unk_token=END, pad_token=PAD,
        model_max_length=LENGTH, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def _make_clip(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    text = dict(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer), max_position_embeddings=LENGTH,
    )  # fmt: skip
    vision = dict(image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)
    width = TOWER["hidden_size"]
    config = CLIPConfig(
        text_config=dict(**TOWER, **text, projection_dim=width),
        vision_config=dict(**TOWER, **vision, projection_dim=width),
        projection_dim=width,
    )
    CLIPModel(config).save_pretrained(folder)
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )
    image_processor.save_pretrained(folder)


def _make_bert_and_vit(folders: dict[str, Path], tokenizer: PreTrainedTokenizerFast) -> None:
    text = BertConfig(
        **TOWER, vocab_size=len(tokenizer), max_position_embeddings=LENGTH, pad_token_id=tokenizer.pad_token_id
    )
    BertModel(text).save_pretrained(folders["text"])
    ViTModel(ViTConfig(**TOWER, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE)).save_pretrained(folders["vision"])
    ViTImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}).save_pretrained(folders["vision"])
