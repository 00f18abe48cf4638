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
# # A first model
#
# One model reads a message and its picture, and answers two questions about them. Training takes a few minutes on two
# CPU cores.
#
# The package draws the data itself: the picture turns the sentiment of a remark, so neither part alone is enough.

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

data = load_demo_dataset(train_size=int(os.environ.get("ROWS", 576)), validation_size=288, test_size=288)
data["train"][0]

# %%
data["train"][0]["image"].resize((192, 192))

# %% [markdown]
# ## Encoders and tasks
#
# Any text encoder and any vision encoder of transformers will do: names of the Hub, or folders.

# %%
encoders = {
    "text": os.environ.get("TEXT", "sentence-transformers/all-MiniLM-L6-v2"),
    "vision": os.environ.get("VISION", "google/efficientnet-b0"),
}
tasks = [Classification(name, labels=sorted(set(data["train"][name]))) for name in ("topic", "sentiment")]
processor = MMTransformerProcessor.from_encoders(**encoders)
model = MMTransformerForMultiTask.from_encoders(**encoders, tasks=tasks)

# %% [markdown]
# ## Training
#
# Each task starts as a linear model of the encoders' outputs. The training goes on from there, and keeps the best
# weights.

# %%
arguments = MMTrainingArguments("first-model", num_train_epochs=float(os.environ.get("EPOCHS", 2)), report_to="none")
trainer = MMTrainer(
    model, arguments, processing_class=processor, train_dataset=data["train"], eval_dataset=data["validation"]
)
trainer.train()
for verdict in trainer.verdicts:
    print(verdict)

# %%
metrics = trainer.evaluate(data["test"], metric_key_prefix="test")
{name: round(value, 3) for name, value in metrics.items() if name.endswith(("accuracy", "f1"))}

# %% [markdown]
# ## Answers
#
# The pipeline takes rows with any of the parts.

# %%
from transformers import pipeline

trainer.save_model("first-model")
pipe = pipeline("multimodal", model="first-model")
row = data["test"][0]
print(row["text"], "->", row["topic"], row["sentiment"])
print("both parts:     ", pipe({"text": row["text"], "image": row["image"]}))
print("without picture:", pipe({"text": row["text"]}))

# %% [markdown]
# Next: [does the picture help?](2_does_the_picture_help.ipynb)
