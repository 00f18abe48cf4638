"""The race in `examples/race/`, on made-up rows with tiny encoders."""

import itertools
import json
import random
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from scripts import EXAMPLES, run
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import f1_score
from sklearn.model_selection import KFold
from sklearn.preprocessing import StandardScaler
from tiny import TEXT_ENCODERS, VISION_ENCODERS, make_image, make_image_processor, make_tokenizer
from transformers import AutoModel


sys.path.insert(0, str(EXAMPLES))
from real_data import import_script


race = import_script(EXAMPLES / "race/race.py")
render = import_script(EXAMPLES / "race/render.py")
baselines = sys.modules["baselines"]

CLASSES = ("animals", "clothes", "food")
RED, GREEN = (200, 30, 30), (30, 200, 30)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    for name, config, processor in (
        ("text", TEXT_ENCODERS["bert"](), make_tokenizer()),
        ("vision", VISION_ENCODERS["vit"](), make_image_processor()),
    ):
        AutoModel.from_config(config).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return {"text": folder / "text", "vision": folder / "vision"}


@pytest.fixture(scope="module")
def stamps_dir(tmp_path_factory) -> Path:
    """Twenty rows of each class, in the form of the stamps."""
    folder = tmp_path_factory.mktemp("stamps")
    rows = []
    for i in range(60):
        category = CLASSES[i % 3]
        text = f"a {('red', 'green', 'blue')[i % 3]} {random.Random(i).choice(['dog', 'cat', 'desk', 'sun'])}"
        file = folder / f"{i}.png"
        make_image(i).save(file)
        rows.append({"text": text, "hard_text": "a something", "image": {"bytes": file.read_bytes(), "path": None},
                     "category": category, "name": str(i), "family": str(i)})  # fmt: skip
    features = race.import_script(EXAMPLES / "stamps/build_dataset.py").POOL_FEATURES
    table = [{**dict.fromkeys(features), **row} for row in rows]
    datasets.Dataset.from_list(table, features=features).to_parquet(folder / "all.parquet")
    return folder


@pytest.fixture
def the_race(stamps_dir, encoders, tmp_path):
    return race.Race({"stamps": stamps_dir}, encoders["text"], encoders["vision"], tmp_path)


def made_features(seed: int, num_rows: int, missing: float = 0.3, signal: float = 1.5):
    """Three classes; both parts tell them, the text better."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, num_rows)
    labels[:3] = range(3)
    parts = []
    for width, strength in ((5, signal), (7, signal / 2)):
        vectors = generator.normal(size=(num_rows, width)) + strength * np.eye(3, width)[labels]
        parts.append((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32))
    has_image = generator.random(num_rows) > missing
    has_text = ~has_image | (generator.random(num_rows) > 0.1)
    parts = [np.where(there[:, None], part, 0) for part, there in zip(parts, (has_text, has_image), strict=True)]
    return baselines.Features(*parts, has_text, has_image), labels


@pytest.fixture(scope="module")
def fitter():
    return baselines.Baselines(made_features(0, 80), made_features(1, 40), num_classes=3)


# What each method gets


def test_a_share_of_the_labels_is_of_each_class_and_of_the_same_rows_whatever_is_missing(the_race):
    full = the_race.problem(race.Setting("stamps", 0, 0.0, 1.0))
    few = [the_race.problem(race.Setting("stamps", 0, missing, 0.1)) for missing in race.SHARES]
    for part in ("train", "validation"):
        names = [getattr(problem, part)["name"] for problem in few]
        assert names[0] == names[1] == names[2]
        counts = Counter(getattr(full, part)["category"])
        expected = {label: max(1, round(0.1 * count)) for label, count in counts.items()}
        assert Counter(getattr(few[0], part)["category"]) == expected


def test_rows_lack_as_many_pictures_as_the_setting_says(the_race):
    def missing(rows):
        return np.mean([image is None for image in race.undecoded(rows)["image"]])

    for share, tests in race.SHARES.items():
        problem = the_race.problem(race.Setting("stamps", 0, share, 1.0))
        assert missing(problem.train) == pytest.approx(share, abs=0.03)
        assert missing(problem.validation) == pytest.approx(share, abs=0.06)
        assert tuple(problem.tests) == tests
        for rows in (problem.tests, problem.validations):
            assert [missing(part) for part in rows.values()] == pytest.approx(list(tests), abs=0.06)


def test_no_test_row_is_a_training_row(the_race):
    problem = the_race.problem(race.Setting("stamps", 0, 0.0, 1.0))
    used = set(problem.train["name"]) | set(problem.validation["name"])
    assert all(not used & set(rows["name"]) for rows in problem.tests.values())


def test_shuffled_pictures_are_those_of_other_rows(the_race):
    rows = the_race.problem(race.Setting("stamps", 0, 0.3, 1.0)).tests[0.3]
    before, after = (race.undecoded(part)["image"] for part in (rows, race.shuffled(rows, 0)))
    assert [image is None for image in before] == [image is None for image in after]
    there = [i for i, image in enumerate(before) if image is not None]
    assert all(before[i]["bytes"] != after[i]["bytes"] for i in there)
    assert sorted(before[i]["bytes"] for i in there) == sorted(after[i]["bytes"] for i in there)


# Cheap models


def test_features_are_the_means_of_the_encoders_whatever_they_are_batched_with(the_race, encoders):
    problem = the_race.problem(race.Setting("stamps", 0, 0.3, 1.0))
    rows = race.undecoded(problem.validation)
    features, seconds = the_race.store.features(rows)
    text, vision = (AutoModel.from_pretrained(encoders[name]).eval() for name in ("text", "vision"))
    tokenizer, processor = make_tokenizer(), make_image_processor()
    assert seconds[0] > 0
    for i, row in enumerate(problem.validation):
        expected = {"text": None, "image": None}
        with torch.no_grad():
            if row["text"] is not None:
                expected["text"] = text(**tokenizer(row["text"], return_tensors="pt")).last_hidden_state[0].mean(0)
            if row["image"] is not None:
                states = vision(processor(row["image"], return_tensors="pt")["pixel_values"]).last_hidden_state
                expected["image"] = states[0].mean(0)
        for part, mean in expected.items():
            assert features.present(part)[i] == (mean is not None)
            wanted = torch.zeros(1) if mean is None else mean / mean.norm()
            assert torch.allclose(torch.tensor(features.vectors(part)[i]), wanted, atol=1e-5)
    # What has been encoded once is read from the file.
    again = race.FeatureStore(the_race.cache / "means", encoders["text"], encoders["vision"])
    again._add = lambda part, new, encode: pytest.fail(f"{part} is encoded again") if new else None
    assert all(np.array_equal(x, y) for x, y in zip(again.features(rows)[0], features, strict=True))


def test_the_validation_rows_choose_the_logistic_regression(fitter):
    best = {}
    for scaling, weights, strength in itertools.product(
        ("none", "standardised"), (None, "balanced"), baselines.STRENGTHS
    ):
        x, seen = (part.matrix(("text", "image")) for part in (fitter.train, fitter.validation))
        if scaling == "standardised":
            scaler = StandardScaler().fit(x)
            x, seen = scaler.transform(x), scaler.transform(seen)
        model = LogisticRegression(C=strength, class_weight=weights, max_iter=5000, tol=1e-8).fit(x, fitter.labels)
        best[scaling, weights, strength] = f1_score(fitter.truth, model.predict(seen), average="macro"), model, seen
    chosen = fitter.logistic_both.chosen
    score, model, seen = best[chosen["scaling"], chosen["class_weight"], chosen["C"]]
    assert score == max(found[0] for found in best.values())
    expected = model.predict_proba(seen)
    assert np.allclose(fitter.logistic_both.probabilities(fitter.validation), expected, atol=5e-3)


def test_fewer_rows_than_columns_have_the_same_solution():
    features, labels = made_features(0, 9, missing=0)
    x = features.matrix(("text", "image"))
    assert len(x) < x.shape[1]
    expected = LogisticRegression(C=3.0, tol=1e-8, max_iter=5000).fit(x, labels)
    _, model, basis = next(baselines._path(x, labels, None, (3.0,)))
    other = made_features(1, 20)[0].matrix(("text", "image"))
    assert np.allclose(model.predict_proba(other @ basis.T), expected.predict_proba(other), atol=2e-3)


def test_the_strength_of_the_cross_validated_one_is_that_of_scikit_learn():
    fitter = baselines.Baselines(made_features(3, 90), made_features(4, 10), num_classes=3)
    reference = LogisticRegressionCV(
        Cs=baselines.STRENGTHS, cv=KFold(baselines.FOLDS, shuffle=True, random_state=0), scoring="neg_log_loss",
        l1_ratios=(0,), use_legacy_attributes=False, tol=1e-6, max_iter=5000,
    ).fit(fitter.train.matrix(("text", "image")), fitter.labels)  # fmt: skip
    assert fitter.logistic_cross_validated.chosen["C"] == reference.C_


def test_rows_without_a_part_get_the_answer_of_the_other(fitter):
    features, _ = made_features(2, 50)
    answers = {
        name: fitter.fit(name).probabilities(features)
        for name in ("logistic_text", "logistic_image", "logistic_both", "logistic_by_parts", "logistic_average")
    }
    share = fitter.logistic_average.chosen["share_of_text"]
    for i, (text, image) in enumerate(zip(features.has_text, features.has_image, strict=True)):
        alone = "logistic_text" if text else "logistic_image"
        mean = share * answers["logistic_text"][i] + (1 - share) * answers["logistic_image"][i]
        assert np.allclose(answers["logistic_by_parts"][i], answers["logistic_both" if text and image else alone][i])
        assert np.allclose(answers["logistic_average"][i], mean if text and image else answers[alone][i])


def test_the_number_of_trees_is_the_best_on_the_validation_rows(fitter):
    chosen = fitter.boosting_both.chosen["trees"]
    x, seen = (part.matrix(("text", "image"), absent=np.nan) for part in (fitter.train, fitter.validation))
    found = []
    for trees in {chosen, 1, 10, baselines.TREES}:
        model = HistGradientBoostingClassifier(
            learning_rate=0.15, max_iter=trees, max_leaf_nodes=baselines.LEAVES, min_samples_leaf=5, max_bins=32,
            early_stopping=False, random_state=0,
        ).fit(x, fitter.labels)  # fmt: skip
        found.append(f1_score(fitter.truth, model.predict(seen), average="macro"))
        if trees == chosen:
            assert np.allclose(
                fitter.boosting_both.probabilities(fitter.validation), model.predict_proba(seen), atol=1e-6
            )
            own = found[-1]
    assert own == max(found)


@pytest.mark.slow
def test_every_cheap_method_answers_also_where_a_class_has_no_training_row(monkeypatch):
    monkeypatch.setattr(baselines, "TREES", 5)
    train, labels = made_features(0, 60)
    fitter = baselines.Baselines((train, np.minimum(labels, 1)), made_features(1, 30), num_classes=3)
    features, _ = made_features(2, 10)
    for method in baselines.CHEAP:
        answers = fitter.fit(method).probabilities(features)
        assert answers.shape == (10, 3)
        assert np.allclose(answers.sum(1), 1)
        assert not answers[:, 2].any()
        assert (fitter.fit(method).seconds >= 0).all()


# Other packages


PEER = """
import argparse, json, pandas
from pathlib import Path
parser = argparse.ArgumentParser()
for name in ("script", "--folder", "--label", "--text", "--vision", "--seed"):
    parser.add_argument(name)
args = parser.parse_args()
assert args.script.endswith("peers/fit_ludwig.py"), args.script
frames = {file.stem: pandas.read_parquet(file) for file in Path(args.folder).glob("*.parquet")}
width = {len(vector) for frame in frames.values() for vector in frame["image_means"]}
answers = {name: frame[args.label].tolist() for name, frame in frames.items()}
answers["test 0.0"][0] = "food" if answers["test 0.0"][0] != "food" else "animals"
found = {"answers": answers, "seconds": 1, "cpu_seconds": 2, "chosen": {"width": list(width)}}
(Path(args.folder) / "answers.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_a_peer_gets_the_rows_and_its_answers_are_scored(the_race, tmp_path):
    (tmp_path / "peer.py").write_text(PEER)
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path / "peer.py"}" "$@"\n')
    interpreter.chmod(0o755)
    the_race.peers = {"ludwig": interpreter}
    setting = race.Setting("stamps", 0, 0.0, 1.0)
    line = the_race.run(setting, "ludwig")
    num_rows = len(the_race.problem(setting).tests[0.0])
    assert line["tests"]["0.0"]["accuracy"] == pytest.approx(1 - 1 / num_rows)
    assert line["tests"]["0.3"] == line["tests"]["0.7"] == {"accuracy": 1, "f1": 1}
    assert (line["seconds"], line["cpu_seconds"]) == (1, 2)
    assert line["chosen"] == {"width": [24]}
    assert not list(tmp_path.glob("ludwig-*"))


# Results


def fake_line(setting, method, score=None):
    seed = f"{setting}/{method}"
    tests = {
        str(share): {"accuracy": random.Random(f"{seed}/{share}/a").random(),
                     "f1": random.Random(f"{seed}/{share}").random() if score is None else score}
        for share in race.SHARES[setting.missing]
    }  # fmt: skip
    return {**setting._asdict(), "method": method, "tests": tests, "validations": tests, "seconds": 1.0,
            "cpu_seconds": 1.0, "chosen": {}, "machine": "none", "versions": {}}  # fmt: skip


@pytest.mark.parametrize("half", [b"", b'{"data": "sta'])
def test_a_killed_race_goes_on_and_ends_with_the_same_lines(tmp_path, half):
    def wanted():
        return race.jobs(("stamps", "emoji"), range(2), ("majority", "ours", "ours_text"))

    assert race.run_all(fake_line, wanted(), tmp_path / "whole.jsonl") == 2 * 2 * (6 * 2 + 1)
    for stops in (3, 10):
        calls = itertools.count()

        def stopped(setting, method, calls=calls, stops=stops):
            if next(calls) == stops:
                raise KeyboardInterrupt
            return fake_line(setting, method)

        with pytest.raises(KeyboardInterrupt):
            race.run_all(stopped, wanted(), tmp_path / "killed.jsonl")
        with open(tmp_path / "killed.jsonl", "ab") as file:
            file.write(half)
    assert race.run_all(fake_line, wanted(), tmp_path / "killed.jsonl") == 2 * 2 * 13 - 13
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert race.run_all(fake_line, wanted(), tmp_path / "killed.jsonl") == 0


def test_nothing_is_begun_after_the_time_is_up(tmp_path):
    assert race.run_all(fake_line, race.jobs(), tmp_path / "lines.jsonl", minutes=0) == 0


def test_peers_race_on_complete_data_only():
    found = [(setting.data, setting.missing, setting.labels) for setting, _ in race.jobs(methods=["ludwig"])]
    assert set(found) == {("stamps", 0.0, 1.0), ("emoji", 0.0, 1.0)}


@pytest.mark.parametrize(("pools", "splits"), [(["stamps"], 5), (["stamps", "emoji"], 3)])
def test_the_interval_is_that_of_all_draws(pools, splits):
    generator = np.random.default_rng(0)
    gains = []
    for name in pools:
        effects = generator.normal(0.02, 0.03, splits)  # of the splits
        for test in (0.0, 0.3, 0.7):
            cell = render.Cell(name, 1.0, 0.0, test)
            gains.append(
                render.Gain(cell, "majority", list(range(splits)), effects + generator.normal(0, 0.01, splits))
            )
    means = []
    for draws in itertools.product(itertools.product(range(splits), repeat=splits), repeat=len(pools)):
        drawn = dict(zip(pools, draws, strict=True))
        means.append(np.mean([gain.differences[list(drawn[gain.cell.data])] for gain in gains]))
    found = render.interval(gains, draws=40_000)
    assert found == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.05 * np.ptp(means))


def lines_with(scores: dict[str, tuple[list[float], list[float]]]) -> list[dict]:
    """Method -> macro F1 of each split, on the test rows and on the validation rows."""
    lines = []
    for method, (tests, validations) in scores.items():
        for split, (test, validation) in enumerate(zip(tests, validations, strict=True)):
            line = fake_line(race.Setting("stamps", split, 0.3, 1.0), method, test)
            lines.append({**line, "validations": {"0.3": {"accuracy": 0, "f1": validation}}})
    return lines


def test_the_rival_is_chosen_by_validation_rows_and_compared_on_test_rows():
    lines = lines_with({
        "majority": ([0.1, 0.1, 0.1], [0.1, 0.1, 0.1]),
        "logistic_text": ([0.9, 0.9, 0.9], [0.5, 0.6, 0.7]),
        "logistic_both": ([0.5, 0.6, 0.4], [0.8, 0.8, 0.5]),
        "ours": ([0.4, 0.52, 0.31], [1.0, 1.0, 1.0]),
    })  # fmt: skip
    (gain,) = render.gains_of(*render.tables_of(lines))
    assert gain.rival == "logistic_both"
    assert gain.differences == pytest.approx([-0.1, -0.08, -0.09])
    assert gain.deviation == pytest.approx(0.01)
    assert gain.is_below
    cell = "stamps, 100% of labels, 30% of pictures missing everywhere"
    assert f"| {cell} | logistic regression, both | -9.0 | 1.0 | 3 | below |" in render.gain_table([gain])


def test_splits_that_lack_a_method_do_not_count():
    lines = lines_with({
        "majority": ([0.1, 0.1], [0.1, 0.1]),
        "logistic_both": ([0.5], [0.5]),
        "ours": ([0.7, 0.9], [0.7, 0.9]),
    })  # fmt: skip
    (gain,) = render.gains_of(*render.tables_of(lines))
    assert gain.splits == [0]
    assert gain.differences == pytest.approx([0.2])
    assert not gain.is_below


@pytest.mark.slow
def test_the_page_is_filled_from_the_lines(tmp_path):
    lines = [fake_line(setting, method) for setting, method in race.jobs(splits=range(2))]
    for line in lines:
        if line["method"] in ("ours", "ours_frozen"):
            line["verdict"] = {"kept_start": line["split"] == 0}
            line["start"] = {share: {"f1": 0.3, "accuracy": 0.3} for share in line["tests"] if share[0] == "0"}
    page = "".join(
        f"# {what}\n<!-- race: {what} -->\nold\n<!-- end -->\n"
        for what in ("summary", "gain", "f1 stamps", "accuracy emoji", "start", "parts", "time", "plot")
    )
    filled = render.render(lines, page, tmp_path / "race.png")
    assert "old" not in filled
    assert "Not measured" not in filled
    assert (tmp_path / "race.png").stat().st_size > 1000
    assert render.render(lines + lines[:40], filled, tmp_path / "race.png") == filled
    cell = ("stamps", "ours", 0.0, 0.1)
    found = [line for line in lines if (line["data"], line["method"], line["missing"], line["labels"]) == cell]
    values = [line["tests"]["0.3"]["f1"] for line in found]
    assert f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}" in filled
    assert "| ours, defaults | stamps | 6 of 12 |" in filled


@pytest.mark.slow
@pytest.mark.parametrize("page", render.PAGES, ids=lambda page: page.name)
def test_the_pages_hold_the_figures_of_the_results(page, tmp_path):
    results = EXAMPLES.parent / "docs/results/race.jsonl"
    if not results.is_file():
        pytest.skip("there are no results")
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert render.render(lines, page.read_text(), tmp_path / "race.png") == page.read_text()


# The whole


@pytest.mark.nightly
def test_the_race_from_the_command_line(stamps_dir, encoders, tmp_path):
    output = tmp_path / "race.jsonl"
    methods = {"majority", "logistic_both", "pca_boosting", *race.OURS}
    arguments = [
        "--stamps", stamps_dir, "--text", encoders["text"], "--vision", encoders["vision"], "--output", output,
        "--cache", tmp_path / "cache", "--splits", 1, "--data", "stamps", "--missing", 0, "--labels", 1,
        "--methods", *methods,
    ]  # fmt: skip
    done = run(EXAMPLES / "race/race.py", *arguments, cwd=tmp_path)
    assert f"Added {len(methods)} lines" in done.stdout
    lines = {line["method"]: line for line in race.read_lines(output)}
    assert set(lines) == methods
    assert set(lines["ours"]["tests"]) == {"0.0", "0.3", "0.7", "shuffled", "no picture", "no text"}
    assert lines["ours"]["verdict"]["kept_start"] in (True, False)
    # The start depends on the encoders only.
    assert lines["ours"]["verdict"]["linear"] == lines["ours_frozen"]["verdict"]["linear"]
    assert lines["ours"]["start"] == lines["ours_frozen"]["start"]
    if lines["ours"]["verdict"]["kept_start"]:
        assert lines["ours"]["start"]["0.0"] == lines["ours"]["tests"]["0.0"]
    for line in lines.values():
        for found in line["tests"].values():
            assert 0 <= found["f1"] <= 1
    again = run(EXAMPLES / "race/race.py", *arguments, cwd=tmp_path)
    assert "Added 0 lines" in again.stdout
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith("training-")]


def test_what_is_missing_is_told(stamps_dir, encoders, tmp_path, capsys):
    arguments = ["--text", str(encoders["text"]), "--vision", str(encoders["vision"])]
    for more, expected in (
        (["--stamps", str(tmp_path)], "has no all.parquet: make it by examples/stamps/build_dataset.py"),
        (["--stamps", str(stamps_dir), "--data", "emoji"], "--data 'emoji' needs --emoji"),
        (["--stamps", str(stamps_dir), "--methods", "ludwig"], "needs --ludwig"),
    ):
        with pytest.raises(SystemExit):
            race.main([*arguments, *more])
        assert expected in capsys.readouterr().err
