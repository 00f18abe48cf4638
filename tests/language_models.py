"""Tiny decoder-only language models of several families, models with them as text encoders, and batches for these."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tiny import VISION_ENCODERS, VOCAB_SIZE, make_batch, make_image, make_image_processor, make_tokenizer, open_gates
from tokenizers import processors
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    SmolLM3Config,
    TrainingArguments,
)
from writers import TOPIC

from mm_transformers import Generation, MMTransformerConfig, MMTransformerForMultiTask, MMTransformerProcessor


# Weights this large, or a random model would write the same token over and over.
_IDS = dict(vocab_size=VOCAB_SIZE, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3)
_ROTARY = dict(
    **_IDS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=37,
    max_position_embeddings=64,
)  # fmt: skip

LANGUAGE_MODELS = {
    "llama": lambda: LlamaConfig(**_ROTARY),
    "llama, tied": lambda: LlamaConfig(**_ROTARY, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**_ROTARY, head_dim=8),
    # Windows shorter than the texts, and logits that are bent.
    "gemma3": lambda: Gemma3TextConfig(
        **_ROTARY, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=5.0, query_pre_attn_scalar=8,
    ),
    "mistral": lambda: MistralConfig(**_ROTARY, sliding_window=6),
    "phi": lambda: PhiConfig(**{**_ROTARY, "num_key_value_heads": 4}),
    "gpt2": lambda: GPT2Config(**_IDS, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "smollm3": lambda: SmolLM3Config(**_ROTARY, no_rope_layers=[1, 0]),
    "gpt-neox": lambda: GPTNeoXConfig(**{k: v for k, v in _ROTARY.items() if k != "num_key_value_heads"}),
    "mamba": lambda: MambaConfig(
        **_IDS, hidden_size=32, num_hidden_layers=2, state_size=8, conv_kernel=4, expand=2, use_mambapy=False,
    ),
}  # fmt: skip


def falcon_h1_config() -> FalconH1Config:
    """It scales the embeddings of ids, and of nothing else."""
    return FalconH1Config(
        **_ROTARY, embedding_multiplier=5.6, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
        mamba_n_groups=1, mamba_chunk_size=16,
    )  # fmt: skip


def gemma3n_config() -> Gemma3nTextConfig:
    """It has embeddings of ids for each layer, and states of four dimensions between its layers."""
    return Gemma3nTextConfig(
        **_ROTARY, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"],
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCAB_SIZE, altup_num_inputs=2, laurel_rank=4,
        num_kv_shared_layers=0, activation_sparsity_pattern=[0.0, 0.0],
    )  # fmt: skip


def save_language_model(folder: Path, kind: str = "llama", seed: int = 3) -> dict[str, str]:
    """The folders of a language model and of a vision encoder, with tokenizer and image processor."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(LANGUAGE_MODELS[kind]()).save_pretrained(folder / "text")
    AutoModel.from_config(VISION_ENCODERS["vit"]()).save_pretrained(folder / "vision")
    make_prompt_tokenizer().save_pretrained(folder / "text")
    make_image_processor().save_pretrained(folder / "vision")
    return {"text": str(folder / "text"), "vision": str(folder / "vision")}


def make_language_model(kind="llama", seed=0, gates_open=True, tasks=None, **kwargs) -> MMTransformerForMultiTask:
    """A model whose text encoder writes, with new weights; of a kind, or of a config."""
    torch.manual_seed(seed)
    tasks = [TOPIC, Generation("german", max_length=8)] if tasks is None else tasks
    kwargs = {"vision_config": VISION_ENCODERS["vit"](), "num_fusion_layers": 2, **kwargs}
    config = MMTransformerConfig(
        text_config=LANGUAGE_MODELS[kind]() if isinstance(kind, str) else kind,
        tasks=tasks,
        num_fusion_attention_heads=4,
        initializer_range=0.2,
        **kwargs,
    )
    model = MMTransformerForMultiTask(config).eval()
    if gates_open:
        open_gates(model)
    return model


def make_prompt_tokenizer() -> PreTrainedTokenizerFast:
    """As that of most language models: no special tokens around a text, and no padding token."""
    tokenizer = make_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.Sequence([])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", bos_token="[CLS]", eos_token="[SEP]", model_max_length=64,
        model_input_names=["input_ids", "attention_mask"], chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


# The form of a chat; the words of the roles are those of the tiny vocabulary.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} in {% endfor %}{% if add_generation_prompt %}is {% endif %}"
)


def to_the_left(batch: dict) -> dict:
    """The same batch with the padding of its texts on the left."""
    lengths = batch["attention_mask"].sum(1).tolist()
    moved = {
        name: torch.stack([row.roll(len(row) - length) for row, length in zip(batch[name], lengths, strict=True)])
        for name in ("input_ids", "attention_mask")
    }
    return {**batch, **moved}


def texts_of(batch: dict) -> dict:
    """The texts alone, as a language model of transformers takes them to write."""
    return {name: to_the_left(batch)[name] for name in ("input_ids", "attention_mask")}


WORDS = ["red dog", "green cat", "blue crane", "small bat", "big desk", "lovely sun"]


def make_llm_processor() -> MMTransformerProcessor:
    tokenizer = make_prompt_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return MMTransformerProcessor(image_processor=make_image_processor(), tokenizer=tokenizer)


def make_rows(n=12) -> list[dict]:
    """Some without a text, a picture or a label."""
    return [
        {
            "text": "" if i % 4 == 0 else WORDS[i % 6], "image": None if i % 4 == 1 else make_image(i % 3),
            "topic": [0, 1, 2, None][i % 4], "german": None if i % 5 == 4 else WORDS[i % 6].split()[-1],
        }
        for i in range(n)
    ]  # fmt: skip


def make_args(path, **kwargs):
    defaults = dict(
        per_device_train_batch_size=4, per_device_eval_batch_size=5, max_steps=3, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True, learning_rate=1e-3, dataloader_pin_memory=False,
    )  # fmt: skip
    return TrainingArguments(str(path), **{**defaults, **kwargs})


# What holds wherever the fusion stands


def assert_greedy_is_the_argmax_of_the_logits(model, batch: dict) -> None:
    written = model.generate(**batch, max_new_tokens=5)
    ended = (written == 2).cumsum(1) - (written == 2).to(torch.int64) > 0  # places after the end
    labels = written.masked_fill(ended, -100)
    logits = model(**batch, labels={"german": labels}).logits["german"]
    known = labels != -100
    assert torch.equal(logits.argmax(-1)[known], labels[known])


def assert_caches_make_no_difference(model, batch: dict) -> None:
    for beams in (1, 2):
        cached = model.generate(**batch, num_beams=beams, use_cache=True)
        assert torch.equal(cached, model.generate(**batch, num_beams=beams, use_cache=False))


def written_alone(model, batch: dict, row: int, **options) -> torch.Tensor:
    """The answer to a row of a batch that is padded on the right, by itself."""
    images = batch["image_index"][row][batch["image_index"][row] >= 0]
    return model.generate(
        input_ids=batch["input_ids"][row][batch["attention_mask"][row].bool()][None],
        pixel_values=batch["pixel_values"][images] if len(images) else None,
        image_index=torch.arange(len(images))[None],
        **options,
    )[0]


def assert_it_learns_to_write(trainer) -> None:
    """A trainer whose language model is frozen learns its training rows, which are its evaluation rows."""
    before = {name: p.clone() for name, p in trainer.model.named_parameters() if ".text_model." in name}
    assert trainer.evaluate()["eval_german_exact_match"] == 0.0
    trainer.train()
    assert trainer.evaluate()["eval_german_exact_match"] > 0.8
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def assert_threads_do_not_disturb_each_other(model: MMTransformerForMultiTask) -> None:
    """Threads that write with other pictures at the same time do not disturb each other."""
    batch = make_batch(labels=False)
    batches = [{**batch, "pixel_values": factor * batch["pixel_values"]} for factor in (1.0, -1.0, 3.0)]
    expected = [model.generate(**one) for one in batches]
    assert not torch.equal(expected[0], expected[1])
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda one: [model.generate(**one) for _ in range(4)], batches))
    for answers, answer in zip(found, expected, strict=True):
        assert all(torch.equal(one, answer) for one in answers)
