"""
Fine-tunes a text encoder and a vision or audio encoder, fused, on several tasks of a data set of your own.

    python finetune.py --train_file train.csv --validation_file validation.csv \
        --tasks "sentiment:classification,score:regression,tags:multi_label" \
        --text distilbert/distilbert-base-uncased --vision google/vit-base-patch16-224-in21k \
        --output_dir out --do_train --do_eval

For several GPUs, put `accelerate launch` in place of `python`. All options of `MMTrainingArguments` can be
given; `python finetune.py --help` lists them, and `python finetune.py options.json` reads them from a file.

Data are CSV, JSON lines or Parquet files, or whatever `datasets.load_dataset` takes by name: a data set of the Hub, or
a folder, also of images with a `metadata.csv`. Each row has a text, an image, a video or a sound (or several, or none)
and one column per task; an empty cell is a missing label. Without validation rows, a share of the training rows is held
out (--validation_fraction); this script measures on them and never trains on them (--refit has no effect).

A task of the kind generation writes text; it needs an encoder-decoder as text encoder, such as
Helsinki-NLP/opus-mt-en-de or google-t5/t5-small. The kinds retrieval and matching need no column.
"""

import json
import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import HfArgumentParser, set_seed

from mm_transformers import (
    MMDataCollator,
    MMTrainer,
    MMTrainingArguments,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
)
from mm_transformers.data.labels import check_labels, complete_task, prepare_labels
from mm_transformers.data.loading import check_columns, hold_out, load_files, load_named, sample_rows
from mm_transformers.model.tasks import Task
from mm_transformers.training.checkpoints import newest_complete_checkpoint


logger = logging.getLogger("finetune")


@dataclass
class ModelArguments:
    text: str = field(metadata={"help": "Hub id or folder of the text encoder."})
    vision: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the vision encoder; without it, images are not read."}
    )
    audio: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the audio encoder; without it, sounds are not read."}
    )
    fusion_type: str = field(
        default="cross_attention",
        metadata={"help": "How text meets the rest: cross_attention, co_attention, bottleneck, merged or late."},
    )
    num_fusion_layers: int = field(default=1, metadata={"help": "Number of fusion layers."})
    train_vision: bool = field(
        default=False, metadata={"help": "Train the vision encoder, too; needed if its weights are new."}
    )
    modality_dropout: float | None = field(
        default=None,
        metadata={"help": "Probability with which a row loses its images, or its sounds, in training; 0.3 by default."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where to keep what comes from the Hub."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Whether to run code that a model repository of the Hub brings along."}
    )


@dataclass
class DataArguments:
    tasks: str = field(
        metadata={
            "help": "'name:kind,name:kind,...', where a name is a column and a kind is classification, multi_label, "
            "regression, token_classification, generation, retrieval or matching; or a "
            "JSON file with a list of tasks as config.json stores them, "
            'such as {"kind": "classification", "name": "sentiment", "loss_weight": 0.5}. Labels that are not given '
            "are those of the training rows."
        }
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "A data set of the Hub or a folder, as datasets.load_dataset takes it."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration, if it has several."})
    train_file: str | None = field(default=None, metadata={"help": "CSV, JSON lines or Parquet file to train on."})
    validation_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    test_file: str | None = field(default=None, metadata={"help": "The same, to predict."})
    text_column: str = field(default="text", metadata={"help": "Column of texts."})
    image_column: str = field(default="image", metadata={"help": "Column of images, or of their paths."})
    video_column: str = field(default="video", metadata={"help": "Column of videos, or of their paths."})
    audio_column: str = field(default="audio", metadata={"help": "Column of sounds, or of their paths."})
    image_root: str | None = field(
        default=None,
        metadata={
            "help": "Where relative paths of images, videos and sounds start; defaults to the folder of each file."
        },
    )
    label_separator: str = field(
        default="|", metadata={"help": "What separates the labels of a multi_label cell in a CSV file."}
    )
    on_bad_file: str = field(
        default="raise", metadata={"help": "raise: stop at a file that cannot be read; drop: treat it as absent."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest text in tokens; defaults to what the text encoder takes."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on this many rows at most."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on this many rows at most."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Predict this many rows at most."})

    def __post_init__(self):
        if (self.dataset_name is None) == (self.train_file is None):
            raise ValueError("Say what to train on, by either --train_file or --dataset_name.")
        if self.dataset_name is not None and self.image_root is not None:
            raise ValueError("--image_root goes with --train_file; a data set has its images, or whole paths.")

    @property
    def files(self) -> dict[str, str]:
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return {split: path for split, path in files.items() if path is not None}


def parse_tasks(text: str) -> list[dict[str, Any]]:
    """
    The tasks of `--tasks`, as dicts; labels may still be missing.

    Raises:
        ValueError: if it is neither a list of 'name:kind' nor a JSON file with a list of objects.
    """
    if text.endswith(".json"):
        tasks = json.loads(Path(text).read_text(encoding="utf-8"))
        if not isinstance(tasks, list) or not all(isinstance(task, dict) and "name" in task for task in tasks):
            raise ValueError(f"{text} must hold a list of tasks, each an object with a 'kind' and a 'name'.")
        return tasks
    tasks = []
    for part in text.split(","):
        name, colon, kind = (piece.strip() for piece in part.partition(":"))
        if not (name and colon and kind):
            raise ValueError(f"--tasks must read 'name:kind,name:kind,...' or name a .json file, but has {part!r}.")
        tasks.append({"kind": kind, "name": name})
    return tasks


def load_data(args: DataArguments, model_args: ModelArguments) -> datasets.DatasetDict:
    """The splits that there are, paths of images made absolute, the columns that the model reads checked."""
    if args.dataset_name is not None:
        data = load_named(args.dataset_name, args.dataset_config_name, model_args.cache_dir)
    else:
        media = (args.image_column, args.video_column, args.audio_column)
        data = load_files(args.files, media, args.image_root, model_args.cache_dir, option="--{split}_file")
    wanted = {"--text_column": (args.text_column,)}
    if model_args.vision is not None:
        wanted["--image_column (or --video_column)"] = (args.image_column, args.video_column)
    if model_args.audio is not None:
        wanted["--audio_column"] = (args.audio_column,)
    check_columns(data, wanted)
    return data


def write_answers(path: Path, tasks: dict[str, Task], predictions: dict[str, Any], processor, word_index) -> None:
    """One JSON object per row, with the answer to each task."""
    answers = {}
    for name, task in tasks.items():
        if task.needs_decoder:
            ids = predictions[name]["generated_ids"]
            ids = np.where(ids == -100, processor.tokenizer.pad_token_id, ids)
            answers[name] = [{"text": t.strip()} for t in processor.batch_decode(ids, skip_special_tokens=True)]
        else:
            answers[name] = task.decode(torch.from_numpy(predictions[name]), word_index)
    with path.open("w", encoding="utf-8") as file:
        for values in zip(*answers.values(), strict=True):
            file.write(json.dumps(dict(zip(answers, values, strict=True)), ensure_ascii=False) + "\n")


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, MMTrainingArguments))
    if len(sys.argv) == 2 and sys.argv[1].endswith(".json"):
        model_args, data_args, training_args = parser.parse_json_file(sys.argv[1])
    else:
        model_args, data_args, training_args = parser.parse_args_into_dataclasses()

    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    for name in ("finetune", "mm_transformers"):
        logging.getLogger(name).setLevel(logging.INFO if training_args.should_log else logging.ERROR)
    if not training_args.validation_fraction > 0:
        raise ValueError("--validation_fraction must be more than 0: this script always holds out validation rows.")
    set_seed(training_args.seed)

    # One process prepares the files in the cache, the others read them there.
    with training_args.main_process_first(desc="reading the data"):
        data = load_data(data_args, model_args)
        task_dicts = parse_tasks(data_args.tasks)
        data = prepare_labels(data, task_dicts)
    # Before any row is put aside: a rare label may be in those rows only.
    tasks = [complete_task(task, data["train"], data_args.label_separator) for task in task_dicts]
    check_labels(data, tasks, data_args.text_column, data_args.label_separator)
    kinds = ("text_column", "image_column", "video_column", "audio_column", "label_separator")
    hold_out(data, training_args.validation_fraction, {kind: getattr(data_args, kind) for kind in kinds}, tasks)
    data["train"] = sample_rows(data["train"], data_args.max_train_samples)
    data["validation"] = sample_rows(data["validation"], data_args.max_eval_samples)

    hub = {"cache_dir": model_args.cache_dir, "trust_remote_code": model_args.trust_remote_code}
    if training_args.do_train:
        encoders = {"text": model_args.text, "vision": model_args.vision, "audio": model_args.audio}
        processor = MMTransformerProcessor.from_encoders(**encoders, **hub)
        options = {"fusion_type": model_args.fusion_type, "num_fusion_layers": model_args.num_fusion_layers}
        if model_args.modality_dropout is not None:
            options["modality_dropout"] = model_args.modality_dropout
        if model_args.train_vision:
            options["freeze"] = []
        model = MMTransformerForMultiTask.from_encoders(**encoders, tasks=tasks, **options, **hub)
    else:
        if not Path(training_args.output_dir, "config.json").is_file():
            raise ValueError(f"{training_args.output_dir} holds no model to measure; add --do_train to train one.")
        processor = MMTransformerProcessor.from_pretrained(training_args.output_dir)
        model = MMTransformerForMultiTask.from_pretrained(training_args.output_dir)
    collator = MMDataCollator(
        processor,
        model.config,
        text_column=data_args.text_column,
        image_column=data_args.image_column,
        video_column=data_args.video_column,
        audio_column=data_args.audio_column,
        on_bad_file=data_args.on_bad_file,
        max_length=data_args.max_length,
        label_separator=data_args.label_separator,
    )
    trainer = MMTrainer(
        model,
        training_args,
        data_collator=collator,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        processing_class=processor,
    )

    # Training comes first: a Trainer that has evaluated before no longer trains on several processes.
    if training_args.do_train:
        checkpoint = training_args.resume_from_checkpoint
        if checkpoint is None:
            checkpoint = newest_complete_checkpoint(training_args.output_dir)
            if checkpoint is not None:
                logger.info(f"Going on from {checkpoint}; to start anew, choose another --output_dir.")
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
        metrics["train_samples"] = len(data["train"])
        trainer.save_model()
        trainer.log_metrics("train", metrics)
        trainer.save_metrics("train", metrics)
        trainer.save_state()

    if training_args.do_eval:
        metrics = trainer.evaluate()
        metrics["eval_samples"] = len(data["validation"])
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)

    if training_args.do_predict:
        if "test" not in data:
            raise ValueError("--do_predict needs a test split; name its file by --test_file.")
        rows = sample_rows(data["test"], data_args.max_predict_samples)
        output = trainer.predict(rows, metric_key_prefix="predict")
        output.metrics["predict_samples"] = len(rows)
        trainer.log_metrics("predict", output.metrics)
        trainer.save_metrics("predict", output.metrics)
        if trainer.is_world_process_zero():
            path = Path(training_args.output_dir) / "predictions.jsonl"
            texts = [text or "" for text in rows[data_args.text_column]]
            words = processor(text=texts, max_length=collator.max_length, return_word_index=True)["word_index"]
            write_answers(path, model.tasks, output.predictions, processor, words)
            logger.info(f"Wrote {path}.")


if __name__ == "__main__":
    main()
