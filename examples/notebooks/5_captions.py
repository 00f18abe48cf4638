# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Captions with a language model
#
# One checkpoint that writes and classifies: a small language model, a vision encoder, and a fusion between them. The
# data are drawings of Tux Paint with their captions in many languages.

# %%
import sys

if "google.colab" in sys.modules:
    # %pip install --quiet mm-transformers
    # !apt-get install --quiet tuxpaint-stamps-default
    pass

# %%
import os
from pathlib import Path

import numpy as np
from datasets import Dataset, Image
from matplotlib import pyplot as plt

from mm_transformers import (
    Classification,
    Generation,
    MMTrainer,
    MMTrainingArguments,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
)
from mm_transformers.analysis import explain

STAMPS = Path(os.environ.get("STAMPS", "/usr/share/tuxpaint/stamps"))
FOLDERS = ["animals", "clothes", "food", "household", "plants", "vehicles"]

# %% [markdown]
# ## The data
#
# Beside each picture lies a file with the English caption in its first line. The folder is the label. Rows with the
# same caption are all in the training rows, or all in the test rows.

# %%
rows = []
for folder in FOLDERS:
    for file in sorted((STAMPS / folder).rglob("*.txt")):
        if file.with_suffix(".png").exists():
            caption = file.read_text("utf-8").splitlines()[0]
            picture = str(file.with_suffix(".png"))
            rows.append({"text": "A drawing of", "image": picture, "caption": caption, "folder": folder})
random = np.random.default_rng(0)
captions = sorted({row["caption"] for row in rows})
held_out = set(random.choice(captions, len(captions) // 4, replace=False).tolist())
most = int(os.environ.get("ROWS", 400))
train = Dataset.from_list([row for row in rows if row["caption"] not in held_out][:most]).cast_column("image", Image())
test = Dataset.from_list([row for row in rows if row["caption"] in held_out][: most // 4]).cast_column("image", Image())
len(train), len(test)

# %% [markdown]
# ## The model
#
# A `Generation` task makes the language model write. The head of the `Classification` reads the same states. The
# language model stays frozen; only the fusion and the head are trained.

# %%
encoders = {
    "text": os.environ.get("LANGUAGE_MODEL", "HuggingFaceTB/SmolLM2-135M"),
    "vision": os.environ.get("VISION", "google/efficientnet-b0"),
}
processor = MMTransformerProcessor.from_encoders(**encoders)
model = MMTransformerForMultiTask.from_encoders(
    **encoders,
    tasks=[Generation("caption", max_length=16), Classification("folder", labels=sorted(set(train["folder"])))],
    freeze=["text", "vision"],
    dtype={"text": "bfloat16"},  # frozen, so half of the memory is enough; the rest stays in float32
    fusion_layers_every=4,
)


def write(rows):
    """A caption for each row."""
    inputs = processor(text=list(rows["text"]), images=list(rows["image"]))
    written = model.eval().generate("caption", **inputs, max_new_tokens=16)
    return [text.strip() for text in processor.batch_decode(written, skip_special_tokens=True)]


# %% [markdown]
# Before the training it writes what the language model writes, word for word. The picture has no influence yet.

# %%
write(test.select(range(2)))

# %%
arguments = MMTrainingArguments(
    "caption-model",
    num_train_epochs=float(os.environ.get("EPOCHS", 15)),
    per_device_train_batch_size=16,
    learning_rate=1e-3,
    eval_strategy="no",
    save_strategy="no",
    report_to="none",
)
trainer = MMTrainer(
    model,
    arguments,
    processing_class=processor,
    train_dataset=train,
    feature_cache="caption-features",
)
trainer.train()

# %% [markdown]
# ## What it writes
#
# 250 pictures teach a small model little. It finds the kind of thing more often than the thing.

# %%
some = test.select(random.choice(len(test), 8, replace=False))
figure, axes = plt.subplots(2, 4, figsize=(8, 4), dpi=70, layout="constrained")
for axis, row, text in zip(axes.flat, some, write(some), strict=True):
    axis.imshow(row["image"].convert("RGBA"))
    axis.set_title(f"{text}\n({row['caption']})", fontsize=7, wrap=True)
    axis.axis("off")

# %% [markdown]
# ## Does it look at the picture?
#
# The same test rows with their own pictures, without pictures, and with pictures in random order.

# %%
pictures = list(test["image"])
variants = {
    "right": pictures,
    "none": [None] * len(pictures),
    "of another row": [pictures[i] for i in random.permutation(len(pictures))],
}
for name, cells in variants.items():
    changed = Dataset.from_list(
        [{**row, "image": cell} for row, cell in zip(test, cells, strict=True)], features=test.features
    )
    scores = trainer.evaluate(changed)
    print(
        f"picture {name}: loss of captions {scores['eval_caption_loss']:.2f}, chrF {scores['eval_caption_chrf']:.1f}, "
        f"folder right in {100 * scores['eval_folder_accuracy']:.0f}%"
    )

# %% [markdown]
# ## What a caption rests on

# %%
row = {"text": "A drawing of", "image": test[0]["image"]}
explanation = explain(model, processor, row, task="caption", answer=test[0]["caption"])
explanation.plot()

# %%
trainer.save_model("caption-model")

# %% [markdown]
# More about language models: [use an LLM](../../docs/how-to/language-model.md).
