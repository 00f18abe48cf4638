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
# # Does the picture help?
#
# `ablate` measures what each modality adds. `explain` shows which words and which parts of a picture an answer
# depends on.

# %%
import sys

if "google.colab" in sys.modules:
    # %pip install --quiet mm-transformers
    pass

# %%
import os

from mm_transformers import (
    Classification,
    MMTrainer,
    MMTrainingArguments,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    load_demo_dataset,
)
from mm_transformers.analysis import ablate, explain

data = load_demo_dataset(train_size=int(os.environ.get("ROWS", 576)), validation_size=288, test_size=288)
encoders = {
    "text": os.environ.get("TEXT", "sentence-transformers/all-MiniLM-L6-v2"),
    "vision": os.environ.get("VISION", "google/efficientnet-b0"),
}
tasks = [Classification(name, labels=sorted(set(data["train"][name]))) for name in ("topic", "sentiment", "intent")]
processor = MMTransformerProcessor.from_encoders(**encoders)
model = MMTransformerForMultiTask.from_encoders(**encoders, tasks=tasks)
arguments = MMTrainingArguments("picture-model", num_train_epochs=float(os.environ.get("EPOCHS", 2)), report_to="none")
trainer = MMTrainer(
    model, arguments, processing_class=processor, train_dataset=data["train"], eval_dataset=data["validation"]
)
trainer.train()

# %% [markdown]
# ## For all rows
#
# Scores with both parts, with each alone, with neither, and with the part of another row. The Shapley values share
# the gain between the parts.
# The intent is in the text alone: there the picture must add nothing.

# %%
ablation = ablate(trainer.model, processor, data["test"])
print(ablation.to_markdown())

# %%
ablation.plot()

# %% [markdown]
# ## For one row

# %%
row = {"text": data["test"][0]["text"], "image": data["test"][0]["image"]}
explanation = explain(trainer.model, processor, row, task="sentiment")
explanation.plot()

# %%
explanation.shares

# %% [markdown]
# Colours say what the answer depends on. They do not prove a cause. Next: [from a table to a
# model](3_from_a_table.ipynb)
