"""Chooses pretrained encoders when the user names none."""

from typing import NamedTuple

from huggingface_hub import constants, try_to_load_from_cache


class Encoder(NamedTuple):
    """
    A pretrained encoder of the Hub.

    Args:
        name: its id.
        suits: what it is good for, and its size.
    """

    name: str
    suits: str


# By modality; the first is the default.
ENCODERS = {
    "text": (
        Encoder("sentence-transformers/all-MiniLM-L6-v2", "English, 23 M parameters, fast"),
        Encoder("intfloat/multilingual-e5-small", "100 languages, 118 M parameters"),
        Encoder("answerdotai/ModernBERT-base", "long English texts, 149 M parameters"),
    ),
    "vision": (
        Encoder("facebook/dinov2-small", "photographs, 22 M parameters, fast"),
        Encoder("google/siglip2-base-patch16-224", "photographs and drawings, 93 M parameters"),
        Encoder("google/vit-base-patch16-224-in21k", "photographs, 86 M parameters"),
    ),
    "audio": (
        Encoder("openai/whisper-tiny", "speech in 99 languages, 8 M parameters, fast"),
        Encoder("facebook/wav2vec2-base", "English speech, 95 M parameters"),
        Encoder("MIT/ast-finetuned-audioset-10-10-0.4593", "music and noises, 87 M parameters"),
    ),
}


def choose_encoder(modality: str) -> str:
    """
    The id of an encoder: one that is in the cache of the Hub, or else the default, which will be downloaded.

    Args:
        modality: "text", "vision" or "audio".

    Raises:
        ValueError: one sentence that names three encoders, if none is in the cache and the Hub must not be used.

    Example:

    ```python
    >>> choose_encoder("text")
    'sentence-transformers/all-MiniLM-L6-v2'
    ```
    """
    known = ENCODERS[modality]
    for encoder in known:
        if isinstance(try_to_load_from_cache(encoder.name, "config.json"), str):
            return encoder.name
    if constants.is_offline_mode():
        raise ValueError(f"No {modality} encoder is named, and none is in the cache of the Hub. {advice(modality)}")
    return known[0].name


def advice(modality: str) -> str:
    """Which encoders there are, and how to name one that is on this machine."""
    listed = "; ".join(f"{encoder.name} ({encoder.suits})" for encoder in ENCODERS[modality])
    return (
        f"Good ones are: {listed}. Without a connection, give a folder: --{modality} my-encoder, which "
        "`hf download <name> --local-dir my-encoder` has filled on another machine."
    )
