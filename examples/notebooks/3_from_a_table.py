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
# # From a table to a model
#
# `fit` looks at the columns of a table, decides what each is for, trains one model for all targets, and measures it
# on held-out rows.
#
# Here the table has numbers only: 442 patients of scikit-learn's diabetes set. Two columns are predicted. Texts and
# pictures work the same way.

# %%
import sys

if "google.colab" in sys.modules:
    # %pip install --quiet mm-transformers
    pass

# %%
import os

import pandas as pd
from sklearn.datasets import load_diabetes

table = load_diabetes(as_frame=True, scaled=False).frame.rename(columns={"target": "progression"})
table["sex"] = table["sex"].map({1.0: "a", 2.0: "b"})
table["risk"] = pd.cut(table["bp"], [0, 85, 100, 200], labels=["low", "middle", "high"]).astype(str)
table = table.drop(columns="bp")
table.loc[::7, "bmi"] = None  # missing cells are fine
table.head()

# %%
from mm_transformers import fit

result = fit(table, predict=["progression", "risk"], output="patients", training={"report_to": "none"})

# %% [markdown]
# ## Scores on held-out rows
#
# Beside a linear model and a constant answer. `patients/report.html` has more: errors, calibration, what each column
# is good for, labels that may be wrong.

# %%
for verdict in result.verdicts:
    print(verdict)

# %% [markdown]
# ## New rows
#
# Any cell may be missing.

# %%
result.predict([{"age": 59, "bmi": 32.1, "s5": 4.86}, {"age": 30}])

# %% [markdown]
# ## Train again
#
# All decisions are in a recipe. Change it, and train by `mm-transformers train recipe.yaml`.

# %%
print((result.output / "recipe.yaml").read_text().replace(os.getcwd(), "."))

# %% [markdown]
# Next: [missing parts](4_missing_parts.ipynb)
