"""Columns of numbers and categories: reading, encoding, and the rules that every modality must keep."""

import copy
import itertools
import json
import math
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from tiny import (
    FUSION_KINDS,
    TEXT_ENCODERS,
    VISION_ENCODERS,
    make_image,
    make_image_processor,
    make_tokenizer,
    open_gates,
)
from transformers import pipeline

from mm_transformers import (
    Classification,
    MMDataCollator,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    Regression,
    TableConfig,
    set_limits,
    table_columns,
)
from mm_transformers.model.table import TableEncoder, TableReader
from mm_transformers.model.table_kinds import column_of, read_category, read_number
from mm_transformers.training.linear_start.probe_start import probes_of


PRICE = {"name": "price", "kind": "number", "mean": 3.0, "std": 2.0}
YEAR = {"name": "year", "kind": "number", "mean": 2000.0, "std": 10.0}
BRAND = {"name": "brand", "kind": "category", "values": ["acme", "zeta"]}
TABLE = TableConfig(columns=[PRICE, BRAND, YEAR], hidden_size=16)
PROCESSOR = MMTransformerProcessor(make_image_processor(), make_tokenizer(), table_config=TABLE)
CELLS = {"price": 4.0, "brand": "zeta", "year": 1990}


def make_model(table=TABLE, tasks=None, **options) -> MMTransformerForMultiTask:
    torch.manual_seed(0)
    config = MMTransformerConfig(
        text_config=TEXT_ENCODERS["bert"](),
        vision_config=VISION_ENCODERS["vit"](),
        table_config=table,
        tasks=tasks or [Classification("topic", labels=["a", "b", "c"])],
        num_fusion_layers=2,
        **options,
    )
    model = MMTransformerForMultiTask(config).eval()
    open_gates(model)
    return model


def logits_of(model, rows) -> torch.Tensor:
    columns = {name: [row.get(name) for row in rows] for name in ("text", "images", "table")}
    with torch.no_grad():
        return model(**PROCESSOR(**columns)).logits["topic"]


# Reading cells


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        (3, 3.0), (3.5, 3.5), (np.int64(3), 3.0), (np.float32(0.5), 0.5), (torch.tensor(2.0), 2.0), (True, 1.0),
        (" 3.5 ", 3.5), ("-1e3", -1000.0), (None, None), (math.nan, None), ("", None), ("  ", None), ("nan", None),
        (pd.NA, None), (np.float64("nan"), None),
    ],
)  # fmt: skip
def test_numbers_are_read(cell, number):
    assert read_number(cell) == number


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (math.inf, "inf is not finite"), ("-inf", "is not finite"), ("abc", "'abc' is no number"),
        ("1_000", "'1_000' is no number"), ("3,5", "'3,5' is no number"), ([1], "expected a number, but got [1]"),
        (10**400, "is not finite"), ("1e999", "is not finite"), ("9" * 500, "is no number"),
    ],
)  # fmt: skip
def test_what_is_no_number_is_told(cell, message):
    with pytest.raises(ValueError, match=r".") as error:
        read_number(cell)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("acme", "acme"), (" acme ", "acme"), (3, "3"), (3.0, "3"), (np.int64(3), "3"), (0.5, "0.5"), (True, "True"),
        (None, None), ("", None), (math.nan, None), (np.str_("x"), "x"),
    ],
)  # fmt: skip
def test_categories_are_read(cell, value):
    assert read_category(cell) == value


def test_a_category_is_no_list():
    with pytest.raises(ValueError, match=r"^expected a text or a whole number, but got \['a'\] of type list$"):
        read_category(["a"])


def test_processor_gives_standardised_numbers_and_ids():
    inputs = PROCESSOR(
        text=["a", "b", None, "c", "d"],
        table=[CELLS, None, {"brand": "unheard of"}, {"price": None, "brand": "", "year": math.nan}, {"price": "7"}],
    )
    assert inputs["table_index"].tolist() == [[0], [-1], [1], [-1], [2]]
    nan = math.nan
    expected = torch.tensor([[0.5, -1.0], [nan, nan], [2.0, nan]])
    torch.testing.assert_close(inputs["table_numbers"], expected, equal_nan=True)
    assert inputs["table_categories"].tolist() == [[2], [0], [-1]]
    assert inputs["attention_mask"].any(-1).tolist() == [True, True, False, True, True]


def test_a_huge_number_stays_finite():
    assert TableReader(TABLE)({"price": 1e300}).tolist()[0] == 100.0
    assert TableReader(TABLE)({"price": -1e300}).tolist()[0] == -100.0


def test_a_number_far_outside_the_training_rows_is_told_once_for_a_column(caplog):
    read = TableReader(TABLE)
    with caplog.at_level("WARNING"):
        read({"price": 50.0})
        assert not caplog.messages
        read({"price": 1e12})
        read({"price": -1e12})
    (message,) = caplog.messages
    assert "Column 'price' has 1e+12, more than 100 standard deviations from the mean" in message


def test_a_processor_makes_its_reader_once_and_warns_once(caplog, monkeypatch):
    made, init = [], TableReader.__init__
    monkeypatch.setattr(TableReader, "__init__", lambda reader, config: made.append(config) or init(reader, config))
    processor = MMTransformerProcessor(make_image_processor(), make_tokenizer(), table_config=copy.deepcopy(TABLE))
    with caplog.at_level("WARNING"):
        for _ in range(3):
            processor(text="a", table={"price": 1e12})
    assert len(made) == len(caplog.messages) == 1
    for other in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        assert torch.equal(
            other(text="a", table=CELLS)["table_numbers"], processor(text="a", table=CELLS)["table_numbers"]
        )


@pytest.mark.parametrize("change", ["config", "columns", "column"])
def test_a_processor_whose_columns_change_reads_them_anew(change):
    processor = MMTransformerProcessor(make_image_processor(), make_tokenizer(), table_config=copy.deepcopy(TABLE))
    config = processor.table_config

    def read():
        inputs = processor(text="a", table={"price": 7.0, "brand": "new"})
        return inputs["table_numbers"][0, 0].item(), inputs["table_categories"][0].tolist()

    assert read() == (2.0, [0])
    if change == "config":
        processor.table_config = TableConfig(columns=[{**PRICE, "mean": 7.0}, BRAND])
        assert read() == (0.0, [0])
    elif change == "columns":
        config.columns = [*config.columns, {"name": "colour", "kind": "category", "values": ["red"]}]
        assert read() == (2.0, [0, -1])
    else:
        next(column for column in config.columns if column["name"] == "brand")["values"] = ["other", "new"]
        assert read() == (2.0, [2])


def test_a_number_of_minus_one_is_no_missing_category():
    """-1 marks a missing category, but is a number like any other."""
    assert TableReader(TABLE)({"price": 1.0}).tolist()[0] == -1.0


def test_the_error_of_a_cell_names_row_and_column():
    with pytest.raises(ValueError, match=r"^table\[1\]: column 'price': 'abc' is no number$"):
        PROCESSOR(text=["a", "b"], table=[None, {"price": "abc"}])


# Statistics


def test_statistics_are_those_of_numpy():
    rng = np.random.default_rng(0)
    prices, years = rng.lognormal(3, 2, 50), rng.integers(1900, 2000, 50)
    brands = rng.choice(["b", "a", "c"], 50, p=[0.2, 0.5, 0.3])
    rows = [
        {"price": None if i == 3 else float(p), "year": str(y), "brand": b}
        for i, (p, y, b) in enumerate(zip(prices, years, brands, strict=True))
    ]
    table = table_columns(rows, ["price", "year", "brand"])
    known = np.delete(prices, 3)
    assert [column["kind"] for column in table.columns] == ["number", "number", "category"]
    assert table.columns[0]["mean"] == pytest.approx(known.mean())
    assert table.columns[0]["std"] == pytest.approx(known.std())
    assert table.columns[1]["mean"] == pytest.approx(years.mean())
    counts = pd.Series(brands).value_counts()
    assert [counts[value] for value in table.columns[2]["values"]] == sorted(counts, reverse=True)


def test_statistics_of_a_data_frame_and_a_data_set():
    import datasets

    frame = pd.DataFrame({"price": [1.0, None, 3.0], "size": ["S", "M", None], "label": [0, 1, 0]})
    features = datasets.Features({
        "price": datasets.Value("float64"), "size": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["no", "yes"]),
    })  # fmt: skip
    data = datasets.Dataset.from_pandas(frame, features=features)
    assert table_columns(frame, ["price", "size"]).columns == table_columns(data, ["price", "size"]).columns
    assert table_columns(data, ["label"]).columns[0]["values"] == ["no", "yes"]  # names, not ids


@pytest.mark.parametrize(
    ("cells", "kind", "column"),
    [
        ([1, 1, 1], None, {"kind": "number", "mean": 1.0, "std": 1.0}),
        ([0.1, 0.1, 0.1], None, {"kind": "number", "mean": pytest.approx(0.1), "std": 1.0}),
        ([1e300, -1e300], None, {"kind": "number", "mean": 0.0, "std": 1e300}),
        ([0, 0], None, {"kind": "number", "mean": 0.0, "std": 1.0}),
        (["10115", "80331"], "category", {"kind": "category", "values": ["10115", "80331"]}),
        ([1.0, 2.0, 2.0], "category", {"kind": "category", "values": ["2", "1"]}),
        ([True, False, True], None, {"kind": "category", "values": ["True", "False"]}),
        (["1", "x", None], None, {"kind": "category", "values": ["1", "x"]}),
    ],
)
def test_kinds_of_columns(cells, kind, column):
    found = table_columns([{"x": cell} for cell in cells], {"x": kind})
    assert found.columns == [{"name": "x", **column}]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"price": "number"}, "Row 1, column 'price': 'abc' is no number."),
        (
            {"price": "colour"},
            "Column 'price' must have one of the kinds 'number', 'date', 'category', but has 'colour'.",
        ),
        (["empty"], "Column 'empty' has no value in the training rows; leave it out."),
        (["nowhere"], "The training rows have no column 'nowhere'."),
        (["text"], "Column 'text' of the table has the name of another input of the row; rename it."),
        ([], "columns is empty: give the names of the columns of numbers and categories."),
        ("price", "columns must be a list of names, or a dict from name to kind, but is 'price'."),
    ],
)
def test_columns_that_do_not_fit(columns, message):
    rows = [{"price": 1, "empty": None, "text": "a"}, {"price": "abc", "empty": " ", "text": "b"}]
    with pytest.raises(ValueError, match=r".") as error:
        table_columns(rows, columns)
    assert str(error.value) == message


def test_limits():
    try:
        set_limits(category_values=2)
        with pytest.raises(ValueError, match="'x' has 3 different values, too many for a category"):
            table_columns([{"x": "a"}, {"x": "b"}, {"x": "c"}], ["x"])
        set_limits(table_columns=1)
        with pytest.raises(ValueError, match="The table has 2 columns, more than the limit table_columns=1;"):
            TableConfig(columns=[PRICE, YEAR])
    finally:
        set_limits(category_values=10_000, table_columns=1_000)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([PRICE, PRICE], "two columns 'price'"),
        ([{**PRICE, "std": 0}], "finite mean and a std above 0"),
        ([{**PRICE, "mean": math.nan}], "finite mean and a std above 0"),
        ([{**PRICE, "mean": "3"}], "finite mean and a std above 0"),
        ([{**BRAND, "values": "ab"}], "a list of texts"),
        ([{**BRAND, "values": [""]}], "a list of texts"),
        ([{**BRAND, "values": ["a", "a"]}], "lists a value twice"),
        ([{"name": "price", "kind": "number"}], "must have kind, mean, name, std, but has kind, name"),
        ([{**PRICE, "kind": "colour"}], "must have one of the kinds 'number', 'date', 'category', but has 'colour'"),
        ([{**PRICE, "name": "image"}], "the name of another input"),
        (["price"], "Column 0 of the table must be a dict with a name and a kind, but is 'price'"),
    ],
)
def test_a_wrong_config_is_one_sentence(columns, message):
    with pytest.raises(ValueError, match=r".") as error:
        MMTransformerConfig(table_config={"columns": columns})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 10}, "must be a multiple of num_attention_heads"),
        ({"dropout": 1.0}, "dropout of the table must be at least 0 and less than 1"),
        ({"num_hidden_layers": 10**9}, "table_config.num_hidden_layers is 1,000,000,000"),
        ({"model_type": "vit"}, "table_config has the model_type 'vit', but must have 'mm_table'"),
        ({"hidden_size": "wide"}, "table_config has a wrong value"),
    ],
)
def test_wrong_sizes_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=r".") as error:
        MMTransformerConfig(table_config={"columns": [PRICE], **options})
    assert message in str(error.value)


def test_a_model_needs_columns():
    with pytest.raises(ValueError, match="^table_config has no columns"):
        make_model(TableConfig())


def test_a_label_is_no_input():
    with pytest.raises(ValueError, match="^Column 'price' has the labels of task 'cost', so it cannot be an input"):
        MMTransformerConfig(table_config=TABLE, tasks=[Regression("cost", column="price")])


# Encoding


def test_tokens_by_hand():
    torch.manual_seed(0)
    encoder = TableEncoder(TABLE)
    encoder.init_own_parameters(0.02)
    tokens, mask = encoder(table_numbers=torch.tensor([[0.5, math.nan]]), table_categories=torch.tensor([[2]]))
    assert TABLE.token_names == ["price", "year", "brand"]
    torch.testing.assert_close(tokens[0, 0], 0.5 * encoder.number_weight[0] + encoder.number_bias[0])
    torch.testing.assert_close(tokens[0, 2], encoder.value_weight[2] + encoder.category_bias[0])
    assert mask.tolist() == [[True, False, True]]
    assert tokens.isfinite().all()


def test_all_unknown_values_are_one_and_differ_from_missing():
    model = make_model()
    rows = [{"text": "a", "table": {"brand": brand}} for brand in ("x", "y", "acme", None)]
    x, y, acme, missing = logits_of(model, rows)
    torch.testing.assert_close(x, y)  # matrix products may depend on the place in the batch
    assert not torch.allclose(x, acme)
    assert not torch.allclose(x, missing)


def test_columns_have_vectors_of_their_own():
    table = TableConfig(columns=[BRAND, {**BRAND, "name": "maker"}], hidden_size=8, num_attention_heads=2)
    encoder = TableEncoder(table)
    encoder.init_own_parameters(0.02)
    tokens, _ = encoder(table_categories=torch.tensor([[1, 1]]))
    assert not torch.allclose(tokens[0, 0], tokens[0, 1])


@pytest.mark.parametrize("layers", [0, 2])
def test_a_missing_cell_has_no_effect(layers):
    """Whatever stands for the column: its parameters do not matter where the cell is missing."""
    model = make_model(TableConfig(columns=TABLE.columns, hidden_size=16, num_hidden_layers=layers))
    rows = [{"text": "a", "table": {"price": 3.0, "brand": "acme"}}, {"text": "a", "table": CELLS}]
    before = logits_of(model, rows)
    with torch.no_grad():
        model.model.table_model.number_weight[1] += torch.randn(16)
        model.model.table_model.number_bias[1] -= torch.randn(16)
    after = logits_of(model, rows)
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


@pytest.mark.parametrize("fusion", FUSION_KINDS)
def test_a_row_without_cells_answers_as_without_the_table(fusion):
    model = make_model(fusion_type=fusion)
    rows = [{"text": "a cat", "table": None}, {"text": "a cat", "table": {"price": None}}]
    alone = logits_of(model, rows)
    beside = logits_of(model, [*rows, {"text": "a cat", "table": CELLS}])
    torch.testing.assert_close(alone[0], alone[1])  # matrix products may depend on the place in the batch
    torch.testing.assert_close(beside[:2], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(beside[2], beside[0])


def test_absent_is_absent_bit_for_bit():
    """A row without cells gets the states of its text, however many tables are beside it."""
    model = make_model().model
    inputs = PROCESSOR(text=["a cat", "a cat"], table=[None, CELLS])
    plain = PROCESSOR(text=["a cat", "a cat"])
    with torch.no_grad():
        assert torch.equal(model(**inputs).last_hidden_state[0], model(**plain).last_hidden_state[0])


@pytest.mark.parametrize("fusion", FUSION_KINDS)
def test_every_subset_answers_as_it_does_alone(fusion):
    model = make_model(fusion_type=fusion, item_order=True)
    whole = {"text": "a lovely cat", "images": make_image(0), "table": CELLS}
    subsets = [names for n in (1, 2, 3) for names in itertools.combinations(whole, n)]
    rows = [{name: whole[name] for name in names} for names in subsets]
    together = logits_of(model, rows)
    for i, row in enumerate(rows):
        torch.testing.assert_close(together[i], logits_of(model, [row])[0], rtol=1e-4, atol=1e-5)
    differences = (together[:, None] - together[None]).abs().amax(-1) + torch.eye(len(rows))
    assert differences.min() > 1e-6


def test_closed_gates_leave_the_text_unchanged():
    torch.manual_seed(0)
    config = MMTransformerConfig(text_config=TEXT_ENCODERS["bert"](), table_config=TABLE, tasks=[])
    from mm_transformers import MMTransformerModel

    model = MMTransformerModel(config).eval()
    inputs = PROCESSOR(text=["a cat"], table=[CELLS])
    with torch.no_grad():
        states = model.text_model(input_ids=inputs["input_ids"]).last_hidden_state
        assert torch.equal(model(**inputs).last_hidden_state, states)


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("cells", [CELLS, None])
def test_every_parameter_takes_part_in_every_step(cells, layers):
    table = TableConfig(columns=TABLE.columns, hidden_size=16, num_hidden_layers=layers)
    model = make_model(table, linear_probe=True, item_order=True).train()
    inputs = PROCESSOR(text=["a cat", "b"], table=[cells, None])
    model(**inputs, labels={"topic": torch.tensor([0, 1])}).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_modality_dropout_drops_the_table():
    model = make_model(modality_dropout={"table": 0.999999}).train()
    inputs = PROCESSOR(text=["a cat", None], table=[CELLS, CELLS])
    kept = model.model(**inputs).kept
    assert kept["table"].tolist() == [False, True], "a row keeps at least one modality"
    assert "table_order" not in dict(model.model.named_children())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("table_categories"), "The table input of this model consists of table_numbers and"),
        (lambda x: x.update(table_index=torch.tensor([[5]])), "table_index must hold numbers from -1"),
        (lambda x: x.update(table_number=1), "takes no argument 'table_number'"),
        (lambda x: x.update(table_numbers=torch.zeros(1, 1)), "table_numbers must have 2 columns, one per column of"),
        (lambda x: x.update(table_numbers=torch.zeros(1)), "table_numbers must have 2 axes, but has the shape"),
        (lambda x: x.update(table_numbers=[[1.0, 2.0]]), "table_numbers must be a tensor of floating-point numbers"),
        (lambda x: x.update(table_categories=torch.zeros(1, 1)), r"table_categories must hold integers \(int64\)"),
        (lambda x: x.update(table_index=[[0]]), "table_index must be a tensor of integers"),
    ],
)
def test_wrong_tensors(change, message):
    inputs = dict(PROCESSOR(text=["a"], table=[CELLS]))
    change(inputs)
    with pytest.raises((ValueError, TypeError), match=message):
        make_model()(**inputs)


def test_a_model_without_columns_refuses_them():
    config = MMTransformerConfig(
        text_config=TEXT_ENCODERS["bert"](), tasks=[Classification("topic", labels=["a", "b"])]
    )
    model = MMTransformerForMultiTask(config)
    with pytest.raises(ValueError, match="^This model has no table encoder"):
        model(**PROCESSOR(text=["a"], table=[CELLS]))
    plain = MMTransformerProcessor(None, make_tokenizer())
    with pytest.raises(ValueError, match="^This processor has no table_config, but got table. It belongs to a model"):
        plain(text=["a"], table=[CELLS])


# Linear start


@pytest.mark.parametrize("bins", [0, 8])
def test_linear_features_are_those_of_scikit_learn(bins):
    """With the weights of a logistic regression on the same features, the model answers as it does."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({
        "price": rng.normal(3, 2, 80), "year": rng.integers(1950, 2020, 80).astype(float),
        "brand": rng.choice(["acme", "zeta", "other"], 80),
    })  # fmt: skip
    topics = (frame["price"] + (frame["brand"] == "acme") * 2 + rng.normal(0, 1, 80) > 3.5).astype(int)
    table = table_columns(frame, ["price", "year", "brand"])
    if not bins:
        columns = [{key: x for key, x in column.items() if key != "bins"} for column in table.columns]
        table = TableConfig(columns=columns)
    assert table.num_bins == [bins, bins]

    def shares(name):
        edges = next(found for found in table.columns if found["name"] == name).get("bins", [])
        pairs, mean = list(itertools.pairwise(edges)), frame[name].mean()
        return FunctionTransformer(
            lambda x: np.column_stack([
                np.interp(x[name], pair, [0, 1]) - np.interp(mean, pair, [0, 1]) for pair in pairs
            ] or [np.zeros((len(x), 0))]),
            feature_names_out=lambda _, __: [f"{name}_{i}" for i in range(len(pairs))],
        )  # fmt: skip

    reference = make_pipeline(
        make_column_transformer(
            (StandardScaler(), ["price", "year"]), (shares("price"), ["price"]), (shares("year"), ["year"]),
            (OneHotEncoder(), ["brand"]),
        ),
        LogisticRegression(max_iter=1000, tol=1e-8),
    ).fit(frame, topics)  # fmt: skip
    processor = MMTransformerProcessor.from_encoders(text=None, table=table)
    model = MMTransformerForMultiTask.from_encoders(
        text=None, table=table, tasks=[Classification("topic", labels=["0", "1"])]
    )
    [probe] = probes_of(model)["topic"]
    block, indicator = probe.blocks[1]
    names = reference[0].get_feature_names_out().tolist()
    order = ["standardscaler__price", "standardscaler__year"]
    order += [f"functiontransformer-{i}__{name}_{b}" for i, name in ((1, "price"), (2, "year")) for b in range(bins)]
    order += [f"onehotencoder__brand_{value}" for value in table.columns[2]["values"]]
    weights = torch.tensor(reference[1].coef_[0][[names.index(name) for name in order]], dtype=torch.float32)
    with torch.no_grad():
        probe.linear.weight[1, block], probe.linear.weight[1, indicator] = weights, float(reference[1].intercept_[0])
        logits = model(**processor(table=frame.to_dict("records"))).logits["topic"]
    expected = reference.predict_proba(frame)
    np.testing.assert_allclose(logits.softmax(-1).numpy(), expected, atol=1e-5)


def test_a_missing_cell_counts_as_the_mean_and_as_no_value():
    model = make_model(linear_probe=True)
    inputs = PROCESSOR(text=["a", "a", "a"], table=[{"price": 5.0}, {"brand": "?"}, None])
    [probe] = probes_of(model)["topic"]
    with torch.no_grad():
        features = probe.features(model.model(**inputs))
    block, indicator = probe.blocks[-1]
    assert features[:, block].tolist() == [[1.0, 0.0, 0.0, 0.0], [0.0] * 4, [0.0] * 4]
    assert features[:, indicator].tolist() == [1.0, 1.0, 0.0]


def test_one_hots_are_bounded():
    values = [str(i) for i in range(3000)]
    columns = [{"name": f"c{i}", "kind": "category", "values": values} for i in range(40)]
    assert len(TableConfig(columns=columns).one_hots) == 40 * 102
    assert len(TableConfig(columns=columns[:1]).one_hots) == 256


# Files


def test_saved_and_loaded(tmp_path):
    model = make_model(linear_probe=True)
    rows = [{"text": "a", "table": CELLS}, {"table": {"brand": "new"}}, {"text": "b"}]
    expected = logits_of(model, rows)
    model.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path).eval()
    processor = MMTransformerProcessor.from_pretrained(tmp_path)
    assert processor.table_config.columns == TABLE.columns
    assert loaded.config.table_columns == processor.table_columns == ["price", "brand", "year"]
    columns = {name: [row.get(name) for row in rows] for name in ("text", "table")}
    with torch.no_grad():
        assert torch.equal(loaded(**processor(**columns)).logits["topic"], expected)
    assert json.loads((tmp_path / "config.json").read_text())["table_config"]["columns"] == TABLE.columns


def test_files_without_a_table_are_as_before(tmp_path):
    MMTransformerProcessor(make_image_processor(), make_tokenizer()).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert not {"table_config", "reads_text"} & set(saved)


# Rows


def test_pipeline_takes_the_columns_by_their_names():
    model = make_model()
    pipe = pipeline("multimodal", model=model, processor=PROCESSOR)
    rows = [{"text": "a", "price": 5, "brand": "acme"}, {"year": "1999"}, {"text": "b", "image": make_image(1)}]
    found = pipe(rows, batch_size=3)
    table = [{"price": 5, "brand": "acme"}, {"year": "1999"}, None]
    inputs = PROCESSOR(text=["a", None, "b"], images=[None, None, make_image(1)], table=table)
    with torch.no_grad():
        scores = model(**inputs).logits["topic"].softmax(-1).max(-1).values
    assert [row["topic"]["score"] for row in found] == pytest.approx(scores.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "price": "abc"}, "Row 1: column 'price': 'abc' is no number"),
        ({"text": "a", "pric": 3}, "Row 1 has the key 'pric'; did you mean 'price'?"),
        ({"price": None}, "Row 1 has no content in 'text', 'image', 'video', 'audio', 'price', 'brand' and 'year'."),
        ({"brand": ["a"]}, "Row 1: column 'brand': expected a text or a whole number, but got ['a'] of type list"),
    ],
)
def test_pipeline_names_the_row(row, message):
    pipe = pipeline("multimodal", model=make_model(), processor=PROCESSOR)
    with pytest.raises(ValueError, match=r".") as error:
        pipe(["a", row])
    assert str(error.value) == message


def test_pipeline_reads_the_names_of_a_data_set():
    import datasets

    features = datasets.Features({"brand": datasets.ClassLabel(names=["zeta", "acme"])})
    data = datasets.Dataset.from_list([{"brand": 0}, {"brand": 1}], features=features)
    pipe = pipeline("multimodal", model=make_model(), processor=PROCESSOR)
    expected = pipe([{"brand": "zeta"}, {"brand": "acme"}])
    assert list(pipe(data)) == expected
    assert list(pipe(data.to_iterable_dataset())) == expected
    assert expected[0] != expected[1]


def test_collator_reads_the_columns():
    collator = MMDataCollator(PROCESSOR, make_model().config)
    batch = collator([{"text": "a", **CELLS, "topic": "a"}, {"text": None, "price": 3.0}, {"text": "c", "price": None}])
    expected = PROCESSOR(text=["a", None, "c"], table=[CELLS, {"price": 3.0}, None])
    for name in ("table_numbers", "table_categories", "table_index"):
        torch.testing.assert_close(batch[name], expected[name], equal_nan=True)
    assert batch["labels"]["topic"].tolist() == [0, -100, -100]
    assert collator.input_columns == ["text", "image", "video", "price", "brand", "year"]


def test_collator_names_row_and_column():
    collator = MMDataCollator(PROCESSOR, make_model().config, on_bad_file="drop")
    message = "^row 1 of the batch, column 'price': 'abc' is no number; correct it, or leave the cell empty.$"
    with pytest.raises(ValueError, match=message):
        collator([{"text": "a"}, {"text": "b", "price": "abc"}])
    with pytest.raises(
        ValueError, match="^row 0 of the batch has no content in 'text', 'image', 'video', 'price', 'brand'"
    ):
        collator([{"text": "", "price": None}])


def test_rows_need_no_column_of_texts():
    collator = MMDataCollator(PROCESSOR, make_model().config, text_column=None)
    batch = collator([{"price": 3.0}, {"brand": "acme"}])
    assert batch["attention_mask"].sum() == 0
    with pytest.raises(ValueError, match="^row 0 of the batch has no content in 'image', 'video', 'price'"):
        collator([{"text": "not read"}])


def test_collator_checks_that_processor_and_model_fit():
    config = make_model().config
    other = MMTransformerProcessor(make_image_processor(), make_tokenizer(), table_config=TableConfig(columns=[PRICE]))
    with pytest.raises(ValueError, match="^The processor has another table_config than the model"):
        MMDataCollator(other, config)
    with pytest.raises(ValueError, match="^The processor has no table_config, unlike the model"):
        MMDataCollator(MMTransformerProcessor(make_image_processor(), make_tokenizer()), config)


def test_a_model_without_text():
    table = TableConfig(columns=[PRICE, BRAND])
    tasks = [Classification("topic", labels=["a", "b"])]
    processor = MMTransformerProcessor.from_encoders(text=None, table=table)
    model = MMTransformerForMultiTask.from_encoders(text=None, table=table, tasks=tasks)
    assert not model.config.reads_text
    assert all(not parameter.requires_grad for parameter in model.model.text_model.parameters())
    assert len(pipeline("multimodal", model=model, processor=processor)([{"price": 3.0}, {"brand": "acme"}])) == 2
    with pytest.raises(ValueError, match="^This processor belongs to a model that reads no text, but got one.$"):
        processor(text=["a cat"], table=[{"price": 3.0}])
    with pytest.raises(ValueError, match="^A model without text needs another input"):
        MMTransformerForMultiTask.from_encoders(text=None, tasks=tasks)


@pytest.mark.parametrize("mean", [0.4, -1, 19723, 499_999, 500_000, 1e300, -499_999, -500_000, -1e300])
def test_the_example_of_a_column_of_dates(mean):
    column = column_of({"name": "sold", "kind": "date", "mean": mean, "std": 1.0, "format": "%Y-%m-%d"})
    # pandas has no such days, so numpy is the reference.
    day = str(np.datetime64(math.floor(min(max(mean, -500_000), 500_000)), "D"))
    assert column.example() in (day, day.lstrip("0"))  # some C libraries write the year 601 without its zero
