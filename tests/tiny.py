"""Tiny random encoders of many kinds, a tiny tokenizer, and batches: what the tests are made of."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    ASTConfig,
    ASTFeatureExtractor,
    BartConfig,
    BeitConfig,
    BertConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    ConvNextV2Config,
    CvtConfig,
    DebertaV2Config,
    DeiTConfig,
    Dinov2Config,
    DINOv3ViTConfig,
    DistilBertConfig,
    EfficientNetConfig,
    ElectraConfig,
    HubertConfig,
    LevitConfig,
    M2M100Config,
    MarianConfig,
    MBartConfig,
    MobileNetV1Config,
    MobileNetV2Config,
    MobileViTConfig,
    ModernBertConfig,
    MPNetConfig,
    MT5Config,
    PreTrainedTokenizerFast,
    RegNetConfig,
    ResNetConfig,
    RobertaConfig,
    SiglipTextConfig,
    SiglipVisionConfig,
    SwiftFormerConfig,
    SwinConfig,
    T5Config,
    ViTConfig,
    ViTImageProcessor,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    XLMRobertaConfig,
)

from mm_transformers import (
    Classification,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    MultiLabel,
    Regression,
    TokenClassification,
)


VOCAB_SIZE = 99
IMAGE_SIZE = 32

_BERT = dict(
    vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
    max_position_embeddings=40, pad_token_id=0,
)  # fmt: skip
_ROBERTA = {**_BERT, "max_position_embeddings": 42, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
_VIT = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, image_size=IMAGE_SIZE,
    patch_size=8,
)  # fmt: skip

TEXT_ENCODERS = {
    "bert": lambda: BertConfig(**_BERT),
    "roberta": lambda: RobertaConfig(**_ROBERTA),
    "xlm-roberta": lambda: XLMRobertaConfig(**_ROBERTA),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=VOCAB_SIZE, dim=32, n_layers=2, n_heads=4, hidden_dim=37, max_position_embeddings=40, pad_token_id=0
    ),
    "electra": lambda: ElectraConfig(**_BERT, embedding_size=16),
    "mpnet": lambda: MPNetConfig(**_ROBERTA),
    "deberta-v2": lambda: DebertaV2Config(
        **_BERT, relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=8, type_vocab_size=0
    ),
    "modernbert": lambda: ModernBertConfig(
        **{**_BERT, "intermediate_size": 36}, cls_token_id=2, sep_token_id=3, bos_token_id=2, eos_token_id=3,
        local_attention=8, global_attn_every_n_layers=2,
    ),
    "t5": lambda: T5Config(
        vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=0
    ),
    "clip-text": lambda: CLIPTextConfig(**_BERT, projection_dim=16, bos_token_id=2, eos_token_id=3),
    "siglip-text": lambda: SiglipTextConfig(**_BERT, projection_size=16, bos_token_id=2, eos_token_id=3),
}  # fmt: skip

VISION_ENCODERS = {
    "vit": lambda: ViTConfig(**_VIT),
    "deit": lambda: DeiTConfig(**_VIT),
    "beit": lambda: BeitConfig(**_VIT),
    "dinov2": lambda: Dinov2Config(**_VIT),
    "dinov3": lambda: DINOv3ViTConfig(**{**_VIT, "num_attention_heads": 3}, num_register_tokens=2),
    "swin": lambda: SwinConfig(
        image_size=IMAGE_SIZE, patch_size=4, embed_dim=12, depths=[1, 1], num_heads=[2, 4], window_size=4
    ),
    "convnextv2": lambda: ConvNextV2Config(num_stages=2, hidden_sizes=[12, 24], depths=[1, 1], image_size=IMAGE_SIZE),
    "resnet": lambda: ResNetConfig(embedding_size=12, hidden_sizes=[12, 24], depths=[1, 1], layer_type="basic"),
    "clip-vision": lambda: CLIPVisionConfig(**_VIT, projection_dim=16),
    "siglip-vision": lambda: SiglipVisionConfig(**_VIT),
}

# Those whose configs do not say the width of their tokens as `hidden_size`, or say another one.
MAPPED_ENCODERS = {
    "cvt": lambda: CvtConfig(embed_dim=[8, 12, 24], depth=[1, 2, 3], num_heads=[1, 1, 2]),
    "efficientnet": lambda: EfficientNetConfig(
        image_size=IMAGE_SIZE, width_coefficient=0.25, depth_coefficient=1.0, hidden_dim=320, hidden_act="relu6",
        kernel_sizes=[3, 3], in_channels=[32, 16], out_channels=[16, 24], strides=[1, 2], num_block_repeats=[1, 2],
        expand_ratios=[1, 6],
    ),
    "levit": lambda: LevitConfig(
        image_size=2 * IMAGE_SIZE, hidden_sizes=[16, 24, 32], num_attention_heads=[1, 2, 2], depths=[1, 1, 1],
        key_dim=[8, 8, 8], mlp_ratio=[2, 2, 2], attention_ratio=[2, 2, 2], drop_path_rate=0,
    ),
    "mobilenet_v1": lambda: MobileNetV1Config(image_size=IMAGE_SIZE, depth_multiplier=0.05, min_depth=4),
    "mobilenet_v2": lambda: MobileNetV2Config(
        image_size=IMAGE_SIZE, depth_multiplier=0.1, finegrained_output=False, min_depth=4
    ),
    "mobilevit": lambda: MobileViTConfig(
        image_size=IMAGE_SIZE, hidden_sizes=[12, 16, 20], neck_hidden_sizes=[8, 8, 12, 12, 16, 16, 28],
        num_attention_heads=2,
    ),
    "regnet": lambda: RegNetConfig(embedding_size=12, hidden_sizes=[12, 24], depths=[1, 1], groups_width=4),
    "swiftformer": lambda: SwiftFormerConfig(image_size=IMAGE_SIZE, embed_dims=[8, 8, 12, 24], depths=[1, 1, 1, 1]),
}  # fmt: skip

# Those that take waveforms: a token per 20 samples (1.25 ms), and the norm that does not mix a clip with its padding.
_WAVES = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, conv_dim=(12, 12, 12),
    conv_kernel=(10, 3, 3), conv_stride=(5, 2, 2), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    feat_extract_norm="layer", do_stable_layer_norm=True, conv_bias=True,
)  # fmt: skip
AUDIO_ENCODERS = {
    "wav2vec2": lambda: Wav2Vec2Config(**_WAVES),
    "hubert": lambda: HubertConfig(**_WAVES),
    "wavlm": lambda: WavLMConfig(**_WAVES, num_buckets=20),
    "whisper": lambda: WhisperConfig(
        vocab_size=VOCAB_SIZE, d_model=24, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=37, decoder_ffn_dim=37, num_mel_bins=16, max_source_positions=50,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    ),
    "ast": lambda: ASTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37, num_mel_bins=16,
        max_length=24, patch_size=8, frequency_stride=8, time_stride=8,
    ),
}  # fmt: skip
FEATURE_EXTRACTORS = {
    "whisper": lambda: WhisperFeatureExtractor(feature_size=16, chunk_length=1),
    "ast": lambda: ASTFeatureExtractor(num_mel_bins=16, max_length=24),
}

FUSION_KINDS = ["cross_attention", "co_attention", "bottleneck", "merged", "late"]


_SEQ2SEQ = dict(
    vocab_size=VOCAB_SIZE, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=37, decoder_ffn_dim=37, max_position_embeddings=40, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, init_std=0.5,
)  # fmt: skip
_T5 = dict(
    vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4, pad_token_id=0, eos_token_id=2,
    decoder_start_token_id=0, initializer_factor=2.0,
)  # fmt: skip

# Encoder-decoders; 1 begins and 2 ends a text, as [CLS] and [SEP] of `make_tokenizer`.
SEQ2SEQ = {
    "marian": lambda: MarianConfig(**{**_SEQ2SEQ, "decoder_start_token_id": 0, "decoder_vocab_size": VOCAB_SIZE}),
    "bart": lambda: BartConfig(**_SEQ2SEQ),
    "mbart": lambda: MBartConfig(**_SEQ2SEQ),
    "m2m100": lambda: M2M100Config(**_SEQ2SEQ),
    "t5": lambda: T5Config(**_T5),
    "mt5": lambda: MT5Config(**_T5),
}


def make_tasks():
    return [
        Classification("topic", labels=["animals", "food", "travel"]),
        Classification("sentiment", labels=["negative", "positive"], loss_weight=0.5),
        MultiLabel("tags", labels=["red", "green", "blue"]),
        Regression("score"),
        TokenClassification("entities", labels=["O", "NAME"], loss_weight=2.0),
    ]


def make_config(text="bert", vision="vit", audio=None, **kwargs) -> MMTransformerConfig:
    kwargs.setdefault("tasks", make_tasks())
    kwargs.setdefault("num_fusion_layers", 2)
    kwargs.setdefault("num_fusion_attention_heads", 4)
    return MMTransformerConfig(
        text_config=TEXT_ENCODERS[text](),
        vision_config=None if vision is None else VISION_ENCODERS[vision](),
        audio_config=None if audio is None else AUDIO_ENCODERS[audio](),
        **kwargs,
    )


def make_model(text="bert", vision="vit", audio=None, seed=0, gates_open=True, **kwargs) -> MMTransformerForMultiTask:
    """A model in evaluation mode; its gates are open, since behind closed ones nothing could be seen to go wrong."""
    torch.manual_seed(seed)
    model = MMTransformerForMultiTask(make_config(text, vision, audio, **kwargs)).eval()
    if gates_open:
        open_gates(model)
    return model


def open_gates(model: torch.nn.Module, value: float = 0.7) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate_alpha"):
                parameter.fill_(value)


WORDS = (
    "the a red green blue small big dog cat crane bat river desk sun rain picnic is was in over on very lovely ruined"
)


def make_tokenizer(pad_token_id: int = 0, max_length: int = 40) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of letters and a few whole words; four special tokens, [PAD] with the id asked for."""
    special = ["[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    special.insert(pad_token_id, "[PAD]")
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    tokens = special + letters + [f"##{letter}" for letter in letters] + sorted(set(WORDS.split()) - set(letters))
    vocab = {token: i for i, token in enumerate(tokens)}
    assert len(vocab) <= VOCAB_SIZE
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = [(token, backend.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=max_length, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def make_feature_extractor(audio: str = "wav2vec2"):
    return FEATURE_EXTRACTORS.get(audio, Wav2Vec2FeatureExtractor)()


def make_clip(seconds: float = 0.1, frequency: float = 440.0, rate: int = 16_000, seed: int = 0) -> np.ndarray:
    """A tone with some noise."""
    time = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).normal(scale=0.05, size=time.shape)
    return (0.5 * np.sin(2 * np.pi * frequency * time) + noise).astype(np.float32)


def make_image_processor(**kwargs):
    return ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, **kwargs)


def make_processor() -> MMTransformerProcessor:
    return MMTransformerProcessor(image_processor=make_image_processor(), tokenizer=make_tokenizer())


def make_image(seed: int = 0, size=(20, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_batch(num_images=3, text_len=9, image_index=((0, 1), (-1, -1), (1, -1), (2, 0)), seed=0, labels=True) -> dict:
    """Rows with two images, none, one shared with another row, and two; the second row has no label but the first."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.tensor(image_index)
    rows = index.shape[0]
    mask = torch.ones(rows, text_len, dtype=torch.int64)
    for row in range(rows):
        mask[row, text_len - row % 4 :] = 0
    mask[0] = 1
    ids = torch.randint(5, VOCAB_SIZE, (rows, text_len), generator=generator)
    batch = {
        "input_ids": torch.where(mask.bool(), ids, 0),
        "attention_mask": mask,
        "pixel_values": torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
        "image_index": index,
    }
    if labels:
        nan = float("nan")
        words = torch.randint(0, 2, (rows, text_len), generator=generator)
        entities = torch.where(mask.bool(), words, -100)
        entities[1] = -100
        batch["labels"] = {
            "topic": torch.tensor([0, 2, -100, 1])[:rows],
            "sentiment": torch.tensor([1, -100, 0, 1])[:rows],
            "tags": torch.tensor([[0.0, 1, 1], [nan, nan, nan], [0, 0, 0], [1, 0, 0]])[:rows],
            "score": torch.tensor([0.5, nan, -1.0, 2.0])[:rows],
            "entities": entities,
        }
    return batch


def to_pad_id(batch: dict, pad_token_id: int) -> dict:
    """The same batch for an encoder that pads with another id."""
    ids = torch.where(batch["attention_mask"].bool(), batch["input_ids"], pad_token_id)
    return {**batch, "input_ids": ids}


def make_audio_processor(audio="wav2vec2", images=True) -> MMTransformerProcessor:
    image_processor = make_image_processor() if images else None
    return MMTransformerProcessor(image_processor, make_tokenizer(), make_feature_extractor(audio))


def rows_of(batch: dict, rows: list[int]) -> dict:
    """Some rows of a batch, with the images that they have, and no padding that they do not need."""
    index = batch["image_index"][rows]
    images = sorted({i for row in index.tolist() for i in row if i >= 0})
    index = torch.tensor([[images.index(i) if i >= 0 else -1 for i in row] for row in index.tolist()])
    index = index[:, : max(1, int((index >= 0).sum(1).max()))]
    length = int(batch["attention_mask"][rows].sum(1).max())
    result = {name: batch[name][rows, :length] for name in ("input_ids", "attention_mask")}
    if images:
        result.update(pixel_values=batch["pixel_values"][images], image_index=index)
    return result
