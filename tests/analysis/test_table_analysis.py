"""Ablations and explanations of columns of numbers and categories."""

import numpy as np
import pytest
import torch
from tiny import TEXT_ENCODERS, VISION_ENCODERS, make_image, make_image_processor, make_tokenizer, open_gates

from mm_transformers import (
    Classification,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    Regression,
    TableConfig,
    table_columns,
)
from mm_transformers.analysis import ablate, explain
from mm_transformers.analysis.explaining.methods import METHODS
from mm_transformers.model.linear_probe import ProbedHead
from mm_transformers.training.linear_start.probe_start import probes_of


ROWS = [
    {
        "text": f"a cat {i}", "image": make_image(i) if i % 3 else None, "price": None if i % 5 == 0 else float(i),
        "brand": ["acme", "zeta", None][i % 3], "topic": ["x", "y"][(i % 7) > 3], "cost": float(i % 4),
    }
    for i in range(20)
]  # fmt: skip
TABLE = table_columns(ROWS, ["price", "brand"])
PROCESSOR = MMTransformerProcessor(make_image_processor(), make_tokenizer(), table_config=TABLE)
# With bins of the prices.
BINNED = TableConfig(columns=[{**TABLE.columns[0], "bins": [0.0, 4.0, 9.0, 19.0]}, TABLE.columns[1]])


def make_model(table=TABLE, **options) -> MMTransformerForMultiTask:
    torch.manual_seed(0)
    config = MMTransformerConfig(
        text_config=TEXT_ENCODERS["bert"](),
        vision_config=VISION_ENCODERS["vit"](),
        table_config=table,
        tasks=[Classification("topic", labels=["x", "y"]), Regression("cost")],
        num_fusion_layers=1,
        **options,
    )
    model = MMTransformerForMultiTask(config).eval()
    open_gates(model)
    for probes in probes_of(model).values():
        for probe in probes:
            torch.nn.init.normal_(probe.linear.weight)
    return model


@pytest.mark.parametrize(("table", "linear_probe"), [(TABLE, False), (TABLE, True), (BINNED, False), (BINNED, True)])
def test_the_gain_of_a_column_is_that_of_rows_without_it(table, linear_probe):
    model = make_model(table, linear_probe=linear_probe)
    processor = MMTransformerProcessor(make_image_processor(), make_tokenizer(), table_config=table)
    options = {"num_permutations": 1, "num_additive_rows": 0}
    found = ablate(model, processor, ROWS, **options)
    assert set(found.columns["topic"]) == {"price", "brand"}
    metric, sign = found.contributions["cost"].metric, -1 if found.contributions["cost"].less_is_better else 1
    for column in ("price", "brand"):
        rest = ablate(model, processor, [{**row, column: None} for row in ROWS], **options)
        gain = sign * (found.variants["all"][metric] - rest.variants["all"][metric])
        assert found.columns["cost"][column] == pytest.approx(gain, abs=1e-5)
        gain = found.variants["all"]["topic_accuracy"] - rest.variants["all"]["topic_accuracy"]
        assert found.columns["topic"][column] == pytest.approx(gain, abs=1e-5)
    assert not any("column" in variant for variant in found.variants)
    assert found.to_dict()["columns"] == found.columns
    assert "| task  | column | " in found.to_markdown()


def test_of_many_columns_those_that_change_the_answers_most_are_left_out():
    """Only three of 40 columns have weights in the linear start."""
    names = [f"x{i}" for i in range(40)]
    rng = np.random.default_rng(0)
    rows = [
        {"text": "a cat", **dict(zip(names, map(float, rng.normal(size=40)), strict=True)), "cost": float(i)}
        for i in range(9)
    ]
    table = table_columns(rows, names)
    processor = MMTransformerProcessor(make_image_processor(), make_tokenizer(), table_config=table)
    model = make_model(table, linear_probe=True)
    used = {"x7", "x31", "x39"}
    for probes in probes_of(model).values():
        for probe in probes:
            block, _ = probe.blocks[list(probe.widths).index("table")]
            with torch.no_grad():
                probe.linear.weight[:, block] = torch.tensor([5.0 * (name in used) for name in names])
    for head in (module for module in model.modules() if isinstance(module, ProbedHead)):
        for parameter in head.head.parameters():
            parameter.data.zero_()  # the head reads the columns through the fusion
    found = ablate(model, processor, rows, num_permutations=1, num_additive_rows=0)
    assert len(found.columns["cost"]) == 30
    assert used <= set(found.columns["cost"])
    gains = found.columns["cost"]
    assert {name for name, gain in gains.items() if abs(gain) > 1e-4} == used
    assert "Of the 40 columns, the 30 were left out one by one whose removal changes the answers" in found.to_markdown()
    assert found.to_dict()["num_columns"] == 40


def test_columns_that_read_each_other_are_left_out_together_only():
    table = TableConfig(columns=TABLE.columns, num_hidden_layers=1)
    processor = MMTransformerProcessor(make_image_processor(), make_tokenizer(), table_config=table)
    found = ablate(make_model(table), processor, ROWS, num_permutations=1, num_additive_rows=0)
    assert found.columns == {"topic": {}, "cost": {}}
    assert "without table" in found.variants


@pytest.mark.parametrize("method", [name for name in METHODS if name != "integrated_gradients"])
def test_every_column_has_a_relevance(method):
    explanation = explain(make_model(linear_probe=True), PROCESSOR, ROWS[1], "topic", method)
    assert [(column.name, column.value) for column in explanation.columns] == [("price", 1.0), ("brand", "zeta")]
    assert explanation.to_dict()["columns"][1]["name"] == "brand"
    assert sum(explanation.shares.values()) == pytest.approx(1)
    assert set(explanation.shares) == {"text", "vision", "table"}


def test_missing_cells_have_none():
    explanation = explain(make_model(), PROCESSOR, {"price": "3", "brand": ""}, "topic")
    assert [column.name for column in explanation.columns] == ["price"]
    assert explanation.rests_on == "table 100%"
    assert explain(make_model(), PROCESSOR, {"text": "a"}, "topic").columns == []


def model_of_one_feature(table, feature):
    """Without a fusion, the answer is the sum of the features times their weights: here of one feature of the table."""
    model = make_model(table, linear_probe=True)
    for parameter in model.parameters():
        if parameter.shape == (1,):
            torch.nn.init.zeros_(parameter)  # the gates
    [probe] = probes_of(model)["topic"]
    block, _ = probe.blocks[-1]
    with torch.no_grad():
        probe.linear.weight.zero_()
        probe.linear.weight[:, block.start + feature] = torch.tensor([-1.0, 2.0])
    return model


def test_a_column_alone_in_the_probe_is_the_most_relevant():
    model = model_of_one_feature(TABLE, 2)  # the second brand
    found = explain(model, PROCESSOR, {"text": "a", "price": 9.0, "brand": TABLE.columns[1]["values"][1]}, "topic")
    price, brand = found.columns
    assert found.answer == "y"
    assert price.relevance == pytest.approx(0, abs=1e-6)
    assert brand.relevance > 0.1
    assert found.shares["table"] == pytest.approx(1, abs=1e-3)


def test_the_bins_of_a_number_count_for_its_column():
    model = model_of_one_feature(BINNED, 3)  # the last bin
    processor = MMTransformerProcessor(make_image_processor(), make_tokenizer(), table_config=BINNED)
    found = explain(model, processor, {"text": "a", "price": 19.0, "brand": "acme"}, "topic")
    price, brand = found.columns
    assert found.answer == "y"
    assert price.relevance > 0.1
    assert brand.relevance == pytest.approx(0, abs=1e-6)
    assert found.shares["table"] == pytest.approx(1, abs=1e-3)


def test_integrated_gradients_refuse_columns():
    pytest.importorskip("captum")
    with pytest.raises(ValueError, match="integrated_gradients cannot explain"):
        explain(make_model(), PROCESSOR, ROWS[1], "topic", "integrated_gradients")


def test_the_figure_shows_the_columns():
    explanation = explain(make_model(), PROCESSOR, ROWS[1], "topic")
    shown = [text.get_text() for axes in explanation.plot().axes for text in axes.texts]
    assert "brand: zeta" in shown
