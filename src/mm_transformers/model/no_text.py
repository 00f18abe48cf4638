"""The stand-ins of a model that reads no text: a tokenizer without words, and a text encoder that learns nothing."""

from typing import Any

from transformers import BertConfig, PreTrainedTokenizerFast


# The width of the fusion of such a model, that of FT-Transformer (https://arxiv.org/abs/2106.11959).
WIDTH, HEADS = 192, 4
_TOKENS = {"[PAD]": 0, "[UNK]": 1}
_LONGEST = 8


def tokenizer_without_words() -> Any:
    """A tokenizer with padding and an unknown token only."""
    # Inside, since only a new model needs it; transformers needs it, so it is always installed.
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel(_TOKENS, unk_token="[UNK]"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=_LONGEST
    )


def config_without_text() -> BertConfig:
    """The config of a text encoder for [`tokenizer_without_words`]. Its outputs are not used: no row has a text."""
    return BertConfig(
        vocab_size=len(_TOKENS),
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        intermediate_size=WIDTH,
        max_position_embeddings=_LONGEST,
        type_vocab_size=1,
        pad_token_id=0,
    )
