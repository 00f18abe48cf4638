"""Tiny models with a task that writes: the decoder of an encoder-decoder, or a new one, and labels for `make_batch`."""

import torch
from tiny import SEQ2SEQ, VISION_ENCODERS, VOCAB_SIZE, open_gates
from transformers import BartConfig, BertConfig, GPT2Config

from mm_transformers import Classification, Generation, MMTransformerConfig, MMTransformerForMultiTask


TOPIC = Classification("topic", labels=["animals", "food", "travel"])
LABELS = {
    "topic": torch.tensor([0, 2, -100, 1]),
    "german": torch.tensor([[5, 6, 7, 2], [8, 2, -100, -100], [-100] * 4, [9, 9, 2, -100]]),
}
DECODERS = {
    "bert": lambda: BertConfig(
        vocab_size=VOCAB_SIZE, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=40,
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=24, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        n_positions=40,
    ),
    "bart": lambda: BartConfig(
        vocab_size=VOCAB_SIZE, d_model=24, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=37,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, decoder_start_token_id=1, max_position_embeddings=40,
    ),
}  # fmt: skip


def make_writer(kind="marian", seed=0, gates_open=True, tasks=None, **kwargs) -> MMTransformerForMultiTask:
    torch.manual_seed(seed)
    tasks = [TOPIC, Generation("german", max_length=8)] if tasks is None else tasks
    config = MMTransformerConfig(
        text_config=SEQ2SEQ[kind](), vision_config=VISION_ENCODERS["vit"](), tasks=tasks, num_fusion_layers=2,
        num_fusion_attention_heads=4, initializer_range=0.2, **kwargs,
    )  # fmt: skip
    model = MMTransformerForMultiTask(config).eval()
    if gates_open:
        open_gates(model)
    return model


def make_small_writer(kind="bart", seed=0, **kwargs) -> MMTransformerForMultiTask:
    """One layer of fusion and one task, which writes short texts."""
    torch.manual_seed(seed)
    config = MMTransformerConfig(
        text_config=SEQ2SEQ[kind](), vision_config=VISION_ENCODERS["vit"](), num_fusion_layers=1,
        tasks=[Generation("german", max_length=6)], **kwargs,
    )  # fmt: skip
    model = MMTransformerForMultiTask(config).eval()
    open_gates(model)
    return model
