"""
Does the sound help? Sentences spoken by espeak-ng in several voices; a model reads them, hears them, or both.

Three in ten rows have no written sentence, only the sound:

- *sentiment*: words and tone of voice together tell. "What a lovely crane" in a lively voice is positive; in a flat one
  it is sarcasm, hence negative. Gloomy words in a flat voice are meant, hence negative, in a lively one they are not,
  hence neutral.
- *speaker*: female or male? Only the voice tells.
- *word*: which of twelve things is it about? Written in most rows; in the others it must be heard.

The test split has voices and sentences that training does not have. The encoders are small and start from random
weights, so this needs neither a GPU nor the network.

    apt install espeak-ng
    pip install -c constraints.txt -e ".[audio]"
    python train.py --output_dir speech_results
"""

import argparse
import itertools
import json
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    PreTrainedTokenizerFast,
    TrainingArguments,
    WhisperConfig,
    WhisperFeatureExtractor,
    set_seed,
)
from transformers.utils import logging

from mm_transformers import (
    Classification,
    MMTrainer,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
)


WORDS = ("bill", "crane", "bank", "bulb", "stock", "bug", "branch", "range", "buck", "web", "mint", "plant")
# What is said -> whether its words are cheerful. Those of the test split are made of words that training has, too.
SENTENCES = {
    "train": {
        "what a lovely {}": True, "i am so glad about the {}": True, "the {} is wonderful": True,
        "how nice to see the {}": True, "what an awful {}": False, "i am so tired of the {}": False,
        "the {} is terrible": False, "how sad to see the {}": False,
    },
    "test": {
        "the {} is so lovely": True, "i am glad to see the {}": True, "the {} is so awful": False,
        "i am tired of the {}": False,
    },
}  # fmt: skip
# Pitch (0 to 99) and words per minute.
TONES = {"lively": (70, 190), "flat": (25, 140)}
SENTIMENTS = {
    (True, "lively"): "positive", (True, "flat"): "negative", (False, "flat"): "negative", (False, "lively"): "neutral",
}  # fmt: skip
# Variants of espeak-ng's English voice; f: female, m: male.
VOICES = {"train": ("f1", "f2", "f4", "m1", "m2", "m3", "m5", "m6"), "test": ("f3", "m4", "m7")}
TEXT_MISSING = 0.3
SECONDS, MEL_BINS = 3, 40
VIEWS = {"fused": "text and sound", "text": "text alone", "audio": "sound alone"}
SHUFFLED, SILENT, MAJORITY = "fused, sounds shuffled", "fused, no sound", "always the commonest class"
TASKS = ("sentiment", "speaker", "word")


def speak(path: Path, sentence: str, tone: str, voice: str, rng: random.Random) -> None:
    """Writes a WAV file."""
    pitch, speed = (round(value * rng.uniform(0.9, 1.1)) for value in TONES[tone])
    command = ["espeak-ng", "-v", f"en-us+{voice}", "-p", str(pitch), "-s", str(speed), "-w", str(path), sentence]
    subprocess.run(command, check=True, capture_output=True)


def build_data(folder: Path) -> datasets.DatasetDict:
    """Speaks the combinations of sentence, word, tone and voice: half of those of training, all of those of testing."""
    splits = {}
    rng = random.Random(0)
    for split in ("train", "test"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        combinations = list(itertools.product(SENTENCES[split], WORDS, TONES, VOICES[split]))
        if split == "train":
            combinations = rng.sample(combinations, len(combinations) // 2)
        rows = []
        for i, (sentence, word, tone, voice) in enumerate(combinations):
            path = folder / split / f"{i}.wav"
            text = sentence.format(word)
            if not path.exists():
                speak(path, text, tone, voice, random.Random(i))
            rows.append(
                {
                    "text": None if rng.random() < TEXT_MISSING else text,
                    "audio": str(path),
                    "sentiment": SENTIMENTS[SENTENCES[split][sentence], tone],
                    "speaker": "female" if voice.startswith("f") else "male",
                    "word": word,
                }
            )
        # Not decoded by `datasets`, which would need a package more; the collator does it.
        splits[split] = datasets.Dataset.from_list(rows).cast_column("audio", datasets.Audio(decode=False))
    return datasets.DatasetDict(splits)


def make_processor(rows: datasets.Dataset) -> MMTransformerProcessor:
    words = sorted({word for text in rows["text"] if text for word in text.split()})
    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=32, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    extractor = WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=SECONDS)
    return MMTransformerProcessor(tokenizer=tokenizer, feature_extractor=extractor)


def make_model(view: str, vocab_size: int) -> MMTransformerForMultiTask:
    """A BERT of 1 layer, a Whisper encoder of 2 and 1 layer of fusion, of width 96."""
    text = BertConfig(
        vocab_size=vocab_size, hidden_size=96, num_hidden_layers=1, num_attention_heads=4, intermediate_size=192,
        max_position_embeddings=32, initializer_range=0.1,
    )  # fmt: skip
    audio = WhisperConfig(
        vocab_size=8, d_model=96, encoder_layers=2, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=192, decoder_ffn_dim=96, num_mel_bins=MEL_BINS,
        max_source_positions=50 * SECONDS, init_std=0.06, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    labels = {"sentiment": ["negative", "neutral", "positive"], "speaker": ["female", "male"], "word": list(WORDS)}
    return MMTransformerForMultiTask(
        MMTransformerConfig(
            text_config=text,
            audio_config=None if view == "text" else audio,
            num_fusion_layers=1,
            initializer_range=0.1,
            modality_dropout={"audio": 0.1} if view == "fused" else 0.0,
            tasks=[Classification(name, labels=labels[name]) for name in TASKS],
        )
    )


def seen_by(view: str, rows: datasets.Dataset) -> datasets.Dataset:
    if view == "text":
        rows = rows.remove_columns("audio")
        return rows.filter(lambda row: row["text"] is not None)  # of the others nothing is left
    if view == "audio":
        return rows.remove_columns("text").add_column("text", [None] * len(rows))
    return rows


def shuffle_sounds(rows: datasets.Dataset, seed: int) -> datasets.Dataset:
    """Every sentence with the sound of another row; no row keeps its own."""
    order = np.random.default_rng(seed).permutation(len(rows))
    donor = np.empty_like(order)
    donor[order] = np.roll(order, 1)
    sounds = rows.select_columns("audio").select(donor)
    return datasets.concatenate_datasets([rows.remove_columns("audio"), sounds], axis=1)


def train(args, view: str, seed: int, rows: datasets.Dataset, processor) -> MMTrainer:
    set_seed(seed)
    arguments = TrainingArguments(
        str(args.output_dir / "training"),
        max_steps=args.steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=96,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        weight_decay=0.05,
        logging_steps=max(1, args.steps // 4),
        save_strategy="no",
        report_to=[],
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=seed,
    )
    model = make_model(view, len(processor.tokenizer))
    trainer = MMTrainer(model, arguments, processing_class=processor, train_dataset=rows)
    trainer.train()
    return trainer


def evaluate(trainer: MMTrainer, rows: datasets.Dataset) -> dict[str, float]:
    """Accuracies; of the word where it is written and where it is only heard."""
    predictions = trainer.predict(rows)
    tasks = trainer.model.config.get_tasks()
    right = {
        name: np.array([tasks[name].labels[i] for i in predictions.predictions[name].argmax(-1)])
        == np.array(rows[name])
        for name in TASKS
    }
    written = np.array([text is not None for text in rows["text"]])
    columns = {"sentiment": right["sentiment"], "speaker": right["speaker"]}
    columns |= {"word, written": right["word"][written], "word, only heard": right["word"][~written]}
    return {name: float(values.mean()) if len(values) else float("nan") for name, values in columns.items()}


def commonest(rows: datasets.Dataset) -> dict[str, float]:
    shares = {name: Counter(rows[name]).most_common(1)[0][1] / len(rows) for name in TASKS}
    return {
        "sentiment": shares["sentiment"], "speaker": shares["speaker"], "word, written": shares["word"],
        "word, only heard": shares["word"],
    }  # fmt: skip


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("speech_results"), help="where to write (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many models of each kind (%(default)s)")
    parser.add_argument("--steps", type=int, default=400, help="training steps, of 32 rows each (%(default)s)")
    args = parser.parse_args(arguments)
    if args.seeds < 1 or args.steps < 1:
        parser.error("--seeds and --steps must be at least 1.")
    return args


def main() -> None:
    args = parse_arguments()
    if shutil.which("espeak-ng") is None:
        sys.exit("espeak-ng is not installed: apt install espeak-ng")
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    start, console = time.perf_counter(), Console()
    with console.status("Speaking ..."):
        data = build_data(args.output_dir / "sounds")
    console.print(f"{len(data['train']):,} sentences to learn from, {len(data['test']):,} to be tested on")
    processor = make_processor(data["train"])
    results: dict[str, list[dict[str, float]]] = {MAJORITY: [commonest(data["test"])]}
    for view, title in VIEWS.items():
        for seed in range(args.seeds):
            began = time.perf_counter()
            trainer = train(args, view, seed, seen_by(view, data["train"]), processor)
            test = seen_by(view, data["test"])
            results.setdefault(title, []).append(evaluate(trainer, test))
            if view == "fused":
                heard = test.filter(lambda row: row["text"] is not None)
                results.setdefault(SHUFFLED, []).append(evaluate(trainer, shuffle_sounds(test, seed)))
                results.setdefault(SILENT, []).append(evaluate(trainer, heard.remove_columns("audio")))
                if seed == 0:
                    trainer.save_model(str(args.output_dir / "model"))
            shown = ", ".join(f"{name} {100 * value:.1f} %" for name, value in results[title][-1].items())
            console.print(f"{title}, seed {seed}: {shown}, in {time.perf_counter() - began:.0f} s")
            report = {"settings": {"seeds": args.seeds, "steps": args.steps}, "accuracy": results}
            (args.output_dir / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    table = Table(title="Accuracy in %, mean ± standard deviation over seeds; voices and sentences never heard before")
    table.add_column("what the model has", style="bold", no_wrap=True)
    for column in results[MAJORITY][0]:
        table.add_column(column, justify="right")
    for name, runs in results.items():
        cells = []
        for column in runs[0]:
            values = [100 * run[column] for run in runs if not np.isnan(run[column])]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "–")
        table.add_row(name, *cells)
    console.print(table)
    console.print(f"Wrote results.json and model/ to {args.output_dir}, in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
