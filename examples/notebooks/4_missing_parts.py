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
# # Missing parts
#
# Real tables have gaps. A row without its picture trains the model all the same, and the model answers it from the
# text. This notebook measures how
# much that costs.

# %%
import sys

if "google.colab" in sys.modules:
    # %pip install --quiet mm-transformers
    pass

# %%
import os

import numpy as np

from mm_transformers import (
    Classification,
    MMTrainer,
    MMTrainingArguments,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    load_demo_dataset,
)

data = load_demo_dataset(train_size=int(os.environ.get("ROWS", 576)), validation_size=288, test_size=288)
random = np.random.default_rng(0)


def without(rows, column, share):
    """The rows, of which a share has lost the cell of a column."""
    gone = set(random.choice(len(rows), int(share * len(rows)), replace=False).tolist())
    return rows.map(lambda row, i: {column: None if i in gone else row[column]}, with_indices=True)


train = without(without(data["train"], "image", 0.3), "sentiment", 0.3)
{name: sum(cell is None for cell in train[name]) for name in ("text", "image", "topic", "sentiment")}

# %% [markdown]
# ## Training with gaps
#
# No row is dropped, and nothing is filled in. A row without a label trains the other tasks. A missing picture is
# masked out.

# %%
encoders = {
    "text": os.environ.get("TEXT", "sentence-transformers/all-MiniLM-L6-v2"),
    "vision": os.environ.get("VISION", "google/efficientnet-b0"),
}
tasks = [Classification(name, labels=sorted(set(data["train"][name]))) for name in ("topic", "sentiment")]
processor = MMTransformerProcessor.from_encoders(**encoders)
model = MMTransformerForMultiTask.from_encoders(**encoders, tasks=tasks)
arguments = MMTrainingArguments("gaps-model", num_train_epochs=float(os.environ.get("EPOCHS", 2)), report_to="none")
trainer = MMTrainer(model, arguments, processing_class=processor, train_dataset=train, eval_dataset=data["validation"])
trainer.train()

# %% [markdown]
# ## Testing with gaps
#
# The best possible accuracy from the text alone is 62.5% for the sentiment and 50% for the topic.

# %%
import matplotlib.pyplot as plt

shares = [0.0, 0.5, 1.0]
scores = {task.name: [] for task in tasks}
for share in shares:
    measured = trainer.evaluate(without(data["test"], "image", share), metric_key_prefix="test")
    for name, found in scores.items():
        found.append(100 * measured[f"test_{name}_accuracy"])
figure, axes = plt.subplots(figsize=(5, 3))
for name, found in scores.items():
    axes.plot([100 * share for share in shares], found, marker="o", label=name)
axes.set(xlabel="rows without their picture, %", ylabel="accuracy, %", ylim=(0, 105))
axes.legend()
scores

# %% [markdown]
# ## Absent is absent
#
# A row without a picture has the same answer whatever else is in its batch.

# %%
from mm_transformers import Predictor

predictor = Predictor(trainer.model, processor, ["sentiment"])
text = data["test"][0]["text"]
alone = predictor([{"text": text}])[0]
others = [{"text": "Hello!", "image": row["image"]} for row in data["test"].select(range(5))]
among = predictor([{"text": text}, *others])[0]
alone, among
