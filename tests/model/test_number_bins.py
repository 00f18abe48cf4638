"""Piecewise-linear numbers: bins, shares, and the model that reads them."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.preprocessing import SplineTransformer
from tiny import TEXT_ENCODERS, make_tokenizer, open_gates

from mm_transformers import (
    MMDataCollator,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    Regression,
    TableConfig,
    table_columns,
)
from mm_transformers.model.number_bins import CentredShares, find_bins, shares_of_bins
from mm_transformers.model.table import TableEncoder, TableReader
from mm_transformers.training.linear_start.probe_start import probes_of


PRICE = {"name": "price", "kind": "number", "mean": 3.0, "std": 2.0}
BINNED = {**PRICE, "bins": [0.0, 2.0, 4.0, 20.0]}
DAY = {"name": "day", "kind": "date", "format": "", "mean": 15_000.0, "std": 10.0, "bins": [14_990, 15_000, 15_010]}
BRAND = {"name": "brand", "kind": "category", "values": ["acme", "zeta"]}
SIZE = {"name": "size", "kind": "number", "mean": 0.0, "std": 1.0}
TABLE = TableConfig(columns=[SIZE, BINNED, BRAND, DAY], hidden_size=16)
PROCESSOR = MMTransformerProcessor(None, make_tokenizer(), table_config=TABLE)

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
EDGES = st.lists(NUMBERS, min_size=2, max_size=9, unique=True).map(sorted)


def make_model(table=TABLE, **options) -> MMTransformerForMultiTask:
    torch.manual_seed(0)
    config = MMTransformerConfig(
        text_config=TEXT_ENCODERS["bert"](), table_config=table, tasks=[Regression("cost")], num_fusion_layers=1,
        **options,
    )  # fmt: skip
    model = MMTransformerForMultiTask(config).eval()
    open_gates(model)
    return model


# The place of a number in bins


@given(edges=EDGES, number=NUMBERS)
def test_shares_are_those_of_exact_fractions(edges, number):
    expected = [
        min(max((Fraction(number) - Fraction(low)) / (Fraction(high) - Fraction(low)), Fraction(0)), Fraction(1))
        for low, high in itertools.pairwise(edges)
    ]
    assert shares_of_bins(number, edges) == pytest.approx([float(share) for share in expected], rel=1e-9, abs=1e-12)


@given(edges=EDGES, number=NUMBERS, mean=NUMBERS)
def test_centred_shares_are_safe_in_float32(edges, number, mean):
    shares = torch.tensor(CentredShares({"mean": mean, "bins": edges})(number), dtype=torch.float32)
    assert shares.abs().max() <= 1
    assert CentredShares({"mean": mean, "bins": edges})(mean) == [0.0] * (len(edges) - 1)
    assert all(map(math.isnan, CentredShares({"mean": mean, "bins": edges})(None)))


def test_shares_are_sums_of_the_splines_of_scikit_learn():
    rng = np.random.default_rng(0)
    edges = np.sort(rng.lognormal(3, 2, 9))
    numbers = np.concatenate([rng.lognormal(3, 2, 200), edges, [-5.0, 0.0, 1e9]])
    splines = SplineTransformer(degree=1, knots=edges[:, None], extrapolation="constant").fit_transform(
        numbers[:, None]
    )
    expected = splines[:, ::-1].cumsum(1)[:, ::-1][:, 1:]
    found = np.array([shares_of_bins(number, edges.tolist()) for number in numbers])
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e12, -1e12])
def test_tiny_bins_far_from_zero(offset):
    edges = [offset, offset + 2**-8, offset + 2**-7]
    assert shares_of_bins(offset + 3 * 2**-9, edges) == [1.0, 0.5]


def test_one_huge_value_does_not_blur_the_others():
    """Standardised, the small values would be equal in float32."""
    values = [float(i) for i in range(79)] + [1e15]
    table = table_columns([{"x": value} for value in values], ["x"])
    reader = TableReader(table)
    numbers, shares = zip(*((row[:1], row[1:]) for row in (reader({"x": x}) for x in (30.0, 31.0))), strict=True)
    assert np.float32(numbers[0]) == np.float32(numbers[1])
    assert np.abs(shares[0] - shares[1]).max() > 0.05


# Finding bins


@given(values=st.lists(NUMBERS | st.sampled_from([0.0, 1.0]), max_size=120))
def test_edges_are_values_in_order(values):
    edges = find_bins(values)
    if edges:
        assert set(edges) <= set(values)
        assert 3 <= len(edges) <= 9
        assert (edges[0], edges[-1]) == (min(values), max(values))
        assert all(low < high for low, high in itertools.pairwise(edges))
    else:
        assert len(values) < 20 or len(set(values)) < 3 or max(np.unique(values, return_counts=True)[1]) > 1


@pytest.mark.parametrize(("count", "bins"), [(0, 0), (19, 0), (20, 2), (45, 4), (80, 8), (1000, 8)])
def test_bins_hold_about_as_many_values(count, bins):
    values = np.random.default_rng(0).normal(size=count)
    edges = find_bins(values.tolist())
    assert max(len(edges) - 1, 0) == bins
    if bins:
        counts, _ = np.histogram(values, edges)
        assert counts.max() - counts.min() <= 2


@pytest.mark.parametrize("values", [[0, 1] * 50, [5.0] * 100, [0] * 99 + [1]])
def test_two_values_need_no_bins(values):
    assert "bins" not in table_columns([{"x": value} for value in values], {"x": "number"}).columns[0]


def test_bins_of_numbers_and_dates():
    rows = [{"x": None if i == 7 else i**3, "day": f"2020-01-{1 + i % 28:02d}", "c": "a"} for i in range(60)]
    table = table_columns(rows, {"x": None, "day": "date", "c": None})
    x, day, category = table.columns
    cubes = [i**3 for i in range(60) if i != 7]
    expected = np.quantile(cubes, np.linspace(0, 1, 6), method="inverted_cdf")
    assert x["bins"] == expected.tolist()
    assert day["bins"][0] == 18_262.0  # the first of January 2020
    assert "bins" not in category
    assert TableConfig(columns=table.columns).columns == table.columns


def test_very_wide_tables_have_no_bins():
    values = np.random.default_rng(0).normal(size=(80, 500))
    rows = [{f"x{i}": value for i, value in enumerate(row)} for row in values.tolist()]
    assert sum(table_columns(rows, list(rows[0])[:400]).num_bins) == 400 * 8
    table = table_columns(rows, list(rows[0]))
    assert sum(table.num_bins) == 0
    assert table.names == list(rows[0])


# Configs


@pytest.mark.parametrize(
    ("bins", "message"),
    [
        (None, "must have bins that are a list of 2 to 65 finite numbers, but has None"),
        ("123", "a list of 2 to 65 finite numbers"),
        ([], "a list of 2 to 65 finite numbers"),
        ([1.0], "a list of 2 to 65 finite numbers"),
        (list(range(66)), "a list of 2 to 65 finite numbers"),
        ([0.0, math.nan], "a list of 2 to 65 finite numbers"),
        ([0.0, math.inf], "a list of 2 to 65 finite numbers"),
        ([0, 10**400], "a list of 2 to 65 finite numbers"),
        ([0.0, "1"], "a list of 2 to 65 finite numbers"),
        ([False, True], "a list of 2 to 65 finite numbers"),
        ([[0.0], [1.0]], "a list of 2 to 65 finite numbers"),
        ([0.0, 0.0], "must have bins that increase, but has [0.0, 0.0]"),
        ([1.0, 0.0], "must have bins that increase"),
        ([2**53, 2**53 + 1], "must have bins that increase"),  # equal as floats
    ],
)
@pytest.mark.parametrize("column", [PRICE, DAY])
def test_wrong_bins_are_one_sentence(column, bins, message):
    with pytest.raises(ValueError, match=f"^Column '{column['name']}' of the table must have bins") as error:
        TableConfig(columns=[{**column, "bins": bins}])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_categories_have_no_bins():
    with pytest.raises(ValueError, match="must have kind, name, values, but has bins, kind, name, values"):
        TableConfig(columns=[{**BRAND, "bins": [0.0, 1.0]}])


# The model


def test_the_processor_gives_shares_minus_those_of_the_mean():
    day = str(np.datetime64(15_005, "D"))
    inputs = PROCESSOR(text=["a"] * 3, table=[{"price": 12.0}, {"price": 3.0, "day": day}, {"day": None, "size": 1}])
    nan = math.nan
    # The mean of the prices, 3, has the shares 1, 0.5 and 0, that of the days 1 and 0.
    expected = [[0.0, 0.5, 0.5, nan, nan], [0.0, 0.0, 0.0, 0.0, 0.5], [nan] * 5]
    torch.testing.assert_close(inputs["table_bins"], torch.tensor(expected), equal_nan=True)


def test_tokens_are_those_of_a_loop():
    encoder = TableEncoder(TABLE)
    torch.manual_seed(0)
    encoder.init_own_parameters(0.02)
    numbers, shares = torch.randn(4, 3), torch.randn(4, 5)
    tokens, _ = encoder(table_numbers=numbers, table_bins=shares, table_categories=torch.ones(4, 1, dtype=torch.int64))
    with torch.no_grad():
        for row in range(4):
            for column, places in enumerate([[], [0, 1, 2], [3, 4]]):
                token = encoder.number_bias[column] + numbers[row, column] * encoder.number_weight[column]
                for number, place in enumerate(places):
                    token = token + shares[row, place] * encoder.bin_weight[column, number]
                torch.testing.assert_close(tokens[row, column], token)


def test_columns_without_bins_are_as_before():
    encoder = TableEncoder(TableConfig(columns=[PRICE, BRAND]))
    assert dict(encoder.named_parameters()).keys() == {
        "number_weight", "number_bias", "value_weight", "category_bias"
    }  # fmt: skip
    processor = MMTransformerProcessor(None, make_tokenizer(), table_config=TableConfig(columns=[PRICE, BRAND]))
    inputs = processor(text=["a"], table=[{"price": 4.0}])
    assert "table_bins" not in inputs
    assert inputs["table_numbers"].tolist() == [[0.5]]
    assert TableEncoder.linear_width(TableConfig(columns=[PRICE, BRAND])) == 1 + 2


def test_a_missing_cell_has_no_effect():
    model = make_model()
    rows = [{"text": "a", "table": {"size": 1.0, "day": "2011-01-25"}}, {"text": "a", "table": {"price": 1.0}}]
    inputs = PROCESSOR(**{name: [row[name] for row in rows] for name in ("text", "table")})
    with torch.no_grad():
        before = model(**inputs).logits["cost"]
        model.model.table_model.bin_weight[1] += torch.randn(3, 16)
        after = model(**inputs).logits["cost"]
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])
    assert before.isfinite().all()


@pytest.mark.parametrize("cells", [{"price": 2.0}, {"brand": "acme"}, None])
def test_every_parameter_takes_part_in_every_step(cells):
    model = make_model(linear_probe=True).train()
    inputs = PROCESSOR(text=["a cat", "b"], table=[cells, None])
    model(**inputs, labels={"cost": torch.tensor([0.0, 1.0])}).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("table_bins"), "consists of table_numbers and table_bins and table_categories"),
        (
            lambda x: x.update(table_bins=torch.zeros(1, 4)),
            "table_bins must have 5 columns, one per bin of the columns",
        ),
    ],
)
def test_wrong_tensors(change, message):
    inputs = dict(PROCESSOR(text=["a"], table=[{"price": 1.0}]))
    change(inputs)
    with pytest.raises(ValueError, match=message):
        make_model()(**inputs)


def test_saved_and_loaded(tmp_path):
    model = make_model(linear_probe=True)
    rows = dict(text=["a", None], table=[{"price": 12.0}, {"day": "2011-01-25", "brand": "acme"}])
    model.save_pretrained(tmp_path)
    PROCESSOR.save_pretrained(tmp_path)
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path).eval()
    processor = MMTransformerProcessor.from_pretrained(tmp_path)
    assert processor.table_config.columns == TABLE.columns
    with torch.no_grad():
        found, expected = loaded(**processor(**rows)), model(**PROCESSOR(**rows))
    assert torch.equal(found.logits["cost"], expected.logits["cost"])


def test_the_collator_makes_the_same_tensors():
    rows = [{"text": "a", "price": 12.0, "brand": "zeta"}, {"text": "b", "day": "2011-01-25"}]
    batch = MMDataCollator(PROCESSOR, make_model().config)(rows)
    expected = PROCESSOR(text=["a", "b"], table=[{"price": 12.0, "brand": "zeta"}, {"day": "2011-01-25"}])
    torch.testing.assert_close(batch["table_bins"], expected["table_bins"], equal_nan=True)


def test_the_features_of_a_linear_model():
    """The standardised number, the centred shares of its bins, the one-hots; each with the token of its column."""
    table = TableConfig(columns=[BINNED, BRAND])
    processor = MMTransformerProcessor(None, make_tokenizer(), table_config=table)
    model = make_model(table, linear_probe=True)
    [probe] = probes_of(model)["cost"]
    block, indicator = probe.blocks[-1]
    rows = [{"price": 12.0, "brand": "zeta"}, {"price": 3.0, "brand": "?"}, {"brand": "acme"}, None]
    with torch.no_grad():
        features = probe.features(model.model(**processor(text=["a"] * 4, table=rows)))
    expected = [[4.5, 0.0, 0.5, 0.5, 0.0, 1.0], [0.0] * 6, [0.0, 0.0, 0.0, 0.0, 1.0, 0.0], [0.0] * 6]
    assert features[:, block].tolist() == expected
    assert features[:, indicator].tolist() == [1.0, 1.0, 1.0, 0.0]
    assert TableEncoder.linear_tokens(table) == [0, 0, 0, 0, 1, 1]
    assert TableEncoder.linear_width(table) == 6
