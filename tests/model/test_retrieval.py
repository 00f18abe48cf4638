"""Texts and the pictures that belong to them: the contrastive loss, recall, and mismatched pairs."""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import make_batch, make_clip, make_config, make_feature_extractor, make_image, make_model, make_processor
from transformers import EvalPrediction, TrainingArguments, set_seed

from mm_transformers import (
    Classification,
    Matching,
    MMDataCollator,
    MMTrainer,
    MMTransformerForMultiTask,
    MMTransformerProcessor,
    MultiTaskMetrics,
    Retrieval,
)
from mm_transformers.model.fusion_base import Stream
from mm_transformers.training.metrics.mismatches import draw_mismatches
from mm_transformers.training.metrics.retrieval_metrics import RetrievalRecall


FIND = Retrieval("find", embedding_size=8)


def belong(one, other, labels, side) -> bool:
    """Whether some row holds both, or two rows of one group do."""
    return any(
        a[side] == one and b[1 - side] == other and (i == j or (a[2] == b[2] and a[2] != -1))
        for i, a in enumerate(labels) for j, b in enumerate(labels)
    )  # fmt: skip


def loss_by_loops(logits, labels) -> float:
    """Symmetric InfoNCE as one would tell it, one pair after the other."""
    rows = [i for i, ids in enumerate(labels) if ids[0] != -100]
    total = 0.0
    for i in rows:
        for side in (0, 1):
            scores = {j: sum(a * b for a, b in zip(logits[i][side], logits[j][1 - side], strict=True)) for j in rows}
            all_of_them = sum(math.exp(s) for s in scores.values())
            good = [j for j in rows if belong(labels[i][side], labels[j][1 - side], labels, side)]
            total -= sum(math.log(math.exp(scores[j]) / all_of_them) for j in good) / len(good) / 2
    return total


ids = st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(-1, 1)) | st.just((-100, -100, -100))


@settings(max_examples=60, deadline=None)
@given(labels=st.lists(ids, min_size=1, max_size=6), seed=st.integers(0, 99))
def test_loss_equals_that_of_loops(labels, seed):
    logits = torch.randn(len(labels), 2, 4, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    total, count = FIND.loss(logits, torch.tensor(labels))
    assert count == sum(row[0] != -100 for row in labels)
    assert total.item() == pytest.approx(loss_by_loops(logits.tolist(), labels), rel=1e-5, abs=1e-5)
    total.backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[[row[0] == -100 for row in labels]] == 0).all()


def test_without_repetitions_it_is_the_loss_of_clip():
    torch.manual_seed(0)
    logits = torch.randn(5, 2, 8)
    labels = torch.arange(15).reshape(5, 3)
    scores, target = logits[:, 0] @ logits[:, 1].T, torch.arange(5)
    expected = (
        torch.nn.functional.cross_entropy(scores, target) + torch.nn.functional.cross_entropy(scores.T, target)
    ) / 2
    total, count = FIND.loss(logits, labels)
    torch.testing.assert_close(total / count, expected)


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one_batch(tmp_path):
    """With 3 rows here and 2 there: every row is told apart from those of the other process, and learns from them."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, torch, torch.distributed as dist\n"
        "from mm_transformers import Retrieval\n"
        "dist.init_process_group('gloo')\n"
        "assert dist.get_world_size() == 2\n"
        "rank = dist.get_rank()\n"
        "data = torch.load(os.environ['DATA'])\n"
        "rows = slice(0, 3) if rank == 0 else slice(3, 5)\n"
        "weight = data['weight'].clone().requires_grad_()\n"
        "total, count = Retrieval('find').loss(data['inputs'][rows] @ weight, data['labels'][rows])\n"
        "total.backward()\n"
        "dist.all_reduce(weight.grad)\n"
        "dist.all_reduce(total.detach())\n"
        "torch.save({'grad': weight.grad, 'total': total}, f\"{os.environ['DATA']}.{rank}\")\n"
    )
    torch.manual_seed(0)
    data = {"inputs": torch.randn(5, 2, 6), "weight": torch.randn(6, 6), "labels": torch.arange(15).reshape(5, 3)}
    data["labels"][4, 0] = data["labels"][0, 0]  # a match across processes
    torch.save(data, tmp_path / "data")
    weight = data["weight"].clone().requires_grad_()
    total, _ = FIND.loss(data["inputs"] @ weight, data["labels"])
    total.backward()
    environment = {**os.environ, "DATA": str(tmp_path / "data"), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in (0, 1):
        found = torch.load(tmp_path / f"data.{rank}")
        torch.testing.assert_close(found["grad"], weight.grad)
        torch.testing.assert_close(found["total"], total.detach())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_recall_equals_that_of_loops(data):
    texts, items = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))
    pairs = data.draw(
        st.lists(
            st.tuples(st.integers(0, texts - 1), st.integers(0, items - 1), st.integers(-1, 1)), min_size=1, max_size=12
        )
    )
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    # Small whole numbers, so that some are equally similar.
    vectors = {0: rng.integers(-1, 2, (texts, 3)), 1: rng.integers(-1, 2, (items, 3))}
    predictions = [[*vectors[0][t], *vectors[1][i]] for t, i, _ in pairs]
    found = RetrievalRecall().compute(predictions=predictions, references=[list(pair) for pair in pairs])
    assert list(found) == RetrievalRecall.names()
    used = {0: sorted({t for t, _, _ in pairs}), 1: sorted({i for _, i, _ in pairs})}
    groups = {}
    for t, i, group in pairs:
        if group != -1:
            groups.setdefault(group, (set(), set()))[0].add(t)
            groups[group][1].add(i)

    def belong(t, i):
        return (t, i) in {(a, b) for a, b, _ in pairs} or any(t in g[0] and i in g[1] for g in groups.values())

    for name, side in (("from_text", 0), ("to_text", 1)):
        for k in (1, 5, 10):
            hits = []
            for q in used[side]:
                good = {c: belong(q, c) if side == 0 else belong(c, q) for c in used[1 - side]}
                order = sorted(good, key=lambda c: (-(vectors[side][q] @ vectors[1 - side][c]), good[c]))
                hits.append(any(good[c] for c in order[:k]))
            assert found[f"{name}_recall_at_{k}"] == pytest.approx(np.mean(hits)), (name, k)


def make_pair_model(tasks, **kwargs):
    return make_model(tasks=tasks, **kwargs)


ROWS = [
    {"text": "a red cat", "image": make_image(0)},
    {"text": "the dog", "image": make_image(1)},
    {"text": "a red cat", "image": make_image(2)},  # the text of the first
    {"text": "rain", "image": make_image(1)},  # the picture of the second
    {"text": "sun", "image": None},
    {"text": None, "image": make_image(3)},
]


class TestRetrievalModel:
    def test_labels_say_which_rows_share_what(self):
        model = make_pair_model([FIND])
        labels = MMDataCollator(make_processor(), model.config)(ROWS)["labels"]["find"]
        text, item, group = labels.T
        assert (labels == -100).all(1).tolist() == [False] * 4 + [True] * 2
        assert text[0] == text[2] and len(set(text[:4].tolist())) == 3  # noqa: PT018
        assert item[1] == item[3] and len(set(item[:4].tolist())) == 3  # noqa: PT018
        assert (group[:4] == -1).all()
        # The same in another batch, from a file in place of an object.
        again = MMDataCollator(make_processor(), model.config)(ROWS[1:3])["labels"]["find"]
        assert torch.equal(again, labels[1:3])

    def test_a_column_names_groups(self):
        task = Retrieval("find", column="subject")
        collator = MMDataCollator(make_processor(), make_config(tasks=[task]))
        cells = ["cats", True, "cats", None, "x", "y"]
        labels = collator([{**row, "subject": cell} for row, cell in zip(ROWS, cells, strict=True)])["labels"]["find"]
        assert (labels[:, 0] == -100).tolist() == [False, False, False, True, True, True]
        assert labels[0, 2] == labels[2, 2] >= 0
        assert labels[1, 2] == -1
        with pytest.raises(ValueError, match=r"row 0 of the batch, column 'subject': task 'find': expected an id"):
            collator([{**ROWS[0], "subject": [1]}])

    def test_texts_and_pictures_apart_are_as_in_the_model(self):
        model, processor = make_pair_model([FIND]), make_processor()
        inputs = processor(text=[r["text"] for r in ROWS[:4]], images=[r["image"] for r in ROWS[:4]])
        with torch.no_grad():
            logits = model(**inputs).logits["find"]
        texts = model.encode_text(**inputs)
        images = model.encode_image(inputs["pixel_values"])[inputs["image_index"][:, 0]]
        scale = math.sqrt(1 / 0.07)
        torch.testing.assert_close(logits, torch.stack([texts, images], 1) * scale)
        torch.testing.assert_close(texts.norm(dim=1), torch.ones(4))
        # The picture has no say in the vector of the text, nor the fusion.
        torch.testing.assert_close(model.encode_text(**processor(text=["the dog"]))[0], texts[1], rtol=1e-4, atol=1e-5)
        answers = model.decode(model(**inputs))
        assert answers[1]["find"]["similarity"] == pytest.approx((texts[1] * images[1]).sum().item(), abs=1e-5)

    def test_sounds_too(self):
        task = Retrieval("hear", modality="audio", embedding_size=8)
        model = make_pair_model([task, FIND], audio="wav2vec2")
        processor = MMTransformerProcessor(
            make_processor().image_processor, make_processor().tokenizer, make_feature_extractor()
        )
        inputs = processor(
            text=["a", "b"], images=[make_image(), None], audio=[make_clip(), make_clip(0.2, 900)], sampling_rate=16_000
        )
        with torch.no_grad():
            logits = model(**inputs).logits
        torch.testing.assert_close(
            model.encode_audio(**inputs), torch.nn.functional.normalize(logits["hear"][:, 1], dim=-1)
        )
        assert (logits["find"][1, 1] == 0).all()
        with pytest.raises(
            ValueError, match=r"task must name a Retrieval task, one of \['hear', 'find'\], but is None"
        ):
            model.encode_text(**inputs)
        assert model.encode_text(**inputs, task="find").shape == (2, 8)

    def test_every_parameter_gets_a_gradient_and_the_scale_is_bounded(self):
        model = make_pair_model([FIND, Matching("match")]).train()
        batch = MMDataCollator(make_processor(), model.config)(ROWS)
        model(**batch).loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None] == []
        assert all(p.grad.isfinite().all() for p in model.parameters())
        with torch.no_grad():
            model.heads.find.logit_scale.fill_(50.0)
            norms = model.eval()(**batch).logits["find"][:4].norm(dim=-1)
        torch.testing.assert_close(norms, torch.full_like(norms, 10.0))

    def test_a_batch_without_pairs_costs_nothing(self):
        model = make_pair_model([FIND, Matching("match"), Classification("topic", labels=["a", "b"])]).train()
        rows = [{"text": "sun", "image": None, "topic": "a"}, {"text": "rain", "image": None, "topic": "b"}]
        outputs = model(**MMDataCollator(make_processor(), model.config)(rows))
        assert outputs.losses["find"] == outputs.losses["match"] == 0
        outputs.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    @pytest.mark.parametrize(
        ("task", "message"),
        [
            (lambda: Retrieval("x", modality="text"), "modality must be 'vision' or 'audio' or 'table', but is 'text'"),
            (lambda: Retrieval("x", embedding_size=0), "embedding_size must be an integer >= 1, but is 0"),
            (lambda: Retrieval("x", temperature=0), "temperature must be at least 0.01"),
            (
                lambda: make_model(tasks=[Retrieval("x", modality="audio")]),
                "the model has no such encoder; it has text, v",
            ),
            (
                lambda: make_model(tasks=[Matching("x", modality="audio")]),
                "the model has no such encoder; it has text, v",
            ),
        ],
    )
    def test_clear_errors(self, task, message):
        with pytest.raises(ValueError, match=message):
            task()

    def test_a_batch_of_one(self, tmp_path):
        arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=1, report_to=[])
        with pytest.raises(
            ValueError, match=r"Task 'find' compares the rows of a batch, but a batch has only one row: set"
        ):
            MMTrainer(make_pair_model([FIND]), arguments, processing_class=make_processor(), train_dataset=ROWS)


class TestMatching:
    def test_mismatched_pairs_are_those_of_other_rows(self):
        """What the model says of a text with the picture chosen for it is what it says of a row that has these two."""
        model, processor = make_pair_model([FIND, Matching("match")]), make_processor()
        batch = MMDataCollator(processor, model.config)(ROWS[:4])
        with torch.no_grad():
            outputs = model(**batch)
            logits, vectors = outputs.logits["match"], outputs.logits["find"]
            similarity = vectors[:, 0] @ vectors[:, 1].T
            forbidden = [{0, 2}, {1, 3}, {0, 2}, {1, 3}]  # themselves, and those with an equal text or picture
            for i in range(4):
                others = [j for j in range(4) if j not in forbidden[i]]
                picture = max(others, key=lambda j: similarity[i, j])
                text = max(others, key=lambda j: similarity[j, i])
                pairs = [(i, i), (i, picture), (text, i)]
                inputs = processor(
                    text=[ROWS[t]["text"] for t, _ in pairs], images=[ROWS[p]["image"] for _, p in pairs]
                )
                expected = model(**inputs).logits["match"][:, 0]
                torch.testing.assert_close(logits[i], expected, rtol=1e-4, atol=1e-5)

    def test_in_training_the_similar_are_drawn_more_often(self):
        model = make_pair_model([FIND, Matching("match")])
        batch = MMDataCollator(make_processor(), model.config)(
            [ROWS[0], ROWS[1], {"text": "sun", "image": make_image(9)}]
        )
        with torch.no_grad():
            outputs = model.model(**{k: v for k, v in batch.items() if k != "labels"})
            logits = model.heads(outputs)
            logits["find"] = torch.zeros(3, 2, 8)
            logits["find"][:, 0, 0] = 1.0
            logits["find"][:, 1, 0] = torch.tensor([0.0, 0.0, 2.0])  # every text is nearer to the third picture
            seen = []
            model.heads.match.register_forward_hook(lambda head, args, out: seen.append(out[:, 0]))
            model.heads.match.train()
            for module in model.heads.match.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
            torch.manual_seed(0)
            for _ in range(200):
                model.judge_mismatched("match", outputs, logits, batch["labels"]["match"])
        pictures = torch.stack(seen[::2])[:, 0]  # of the first text: the second picture or the third
        values, counts = pictures.round(decimals=5).unique(return_counts=True)
        assert len(values) == 2
        assert counts.max().item() / 200 == pytest.approx(math.e**2 / (1 + math.e**2), abs=0.08)

    def test_loss_and_metrics_by_hand(self):
        task = Matching("match")
        logits = torch.tensor([[1.0, -2.0, 0.5], [0.3, math.nan, math.nan], [3.0, math.nan, math.nan]])
        labels = torch.tensor([[1, 5, 6, -1], [0, 7, 8, -1], [-100] * 4])
        total, count = task.loss(logits, labels)

        def bce(x, y):
            return -math.log(1 / (1 + math.exp(-x if y else x)))

        assert count == 2
        assert total.item() == pytest.approx((bce(1, 1) + bce(-2, 0) + bce(0.5, 0)) / 3 + bce(0.3, 0))
        metrics = MultiTaskMetrics(make_config(tasks=[task]))
        scores = metrics(EvalPrediction(predictions={"match": logits.numpy()}, label_ids={"match": labels.numpy()}))
        assert scores["match_accuracy"] == pytest.approx(2 / 4)
        assert task.decode(logits)[0] == {"match": True, "score": pytest.approx(1 / (1 + math.exp(-1)))}

    def test_labels(self):
        task = Matching("match", column="belongs")
        collator = MMDataCollator(make_processor(), make_config(tasks=[task]))
        cells = [True, 0, None, False, True, True]
        labels = collator([{**row, "belongs": cell} for row, cell in zip(ROWS, cells, strict=True)])["labels"]["match"]
        assert labels[:, 0].tolist() == [1, 0, -100, 0, -100, -100]
        with pytest.raises(ValueError, match="column 'belongs': task 'match': expected True or False"):
            collator([{**ROWS[0], "belongs": "yes"}])

    def test_only_one_pair_has_no_other(self):
        model = make_pair_model([Matching("match")])
        batch = MMDataCollator(make_processor(), model.config)(ROWS[:1])
        logits = model(**batch).logits["match"]
        assert logits.isnan().tolist() == [[False, True, True]]
        assert model(**batch).loss.isfinite()


COLORS = ["red", "green", "blue"]


def colored(number: int, seed: int) -> datasets.Dataset:
    """A picture of one color, and a text that names it, with a number that both show."""
    rng = np.random.default_rng(seed)
    rows = {"text": [], "image": []}
    for _ in range(number):
        color, dark = int(rng.integers(3)), int(rng.integers(2))
        pixels = rng.integers(0, 40, (16, 16, 3))
        pixels[..., color] += 100 if dark else 210
        rows["text"].append(f"{'small' if dark else 'big'} {COLORS[color]}")
        rows["image"].append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return datasets.Dataset.from_dict(
        rows, features=datasets.Features(text=datasets.Value("string"), image=datasets.Image())
    )


@pytest.mark.slow
def test_it_learns_to_find_and_to_match(tmp_path):
    set_seed(0)
    tasks = [Retrieval("find", embedding_size=16), Matching("match", loss_weight=3.0)]
    model = MMTransformerForMultiTask(make_config(vision="resnet", tasks=tasks, initializer_range=0.1))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=150, per_device_train_batch_size=32, learning_rate=3e-3, report_to=[],
        disable_tqdm=True, save_strategy="no", per_device_eval_batch_size=48,
    )  # fmt: skip
    # Six texts, of which each has many pictures; among 6 candidates chance finds 1 in 6.
    test = colored(48, 1)
    trainer = MMTrainer(
        model, arguments, processing_class=make_processor(), train_dataset=colored(256, 0), eval_dataset=test
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_find_to_text_recall_at_1"] < 0.5
    assert after["eval_find_to_text_recall_at_1"] > 0.9
    assert after["eval_find_from_text_recall_at_1"] > 0.9
    assert after["eval_match_accuracy"] > 0.95
    # Wrong pictures for all: the model must say so.
    wrong = test.remove_columns("image").add_column("match", [False] * 48)
    wrong = datasets.concatenate_datasets(
        [wrong, test.select_columns("image").select(np.roll(np.arange(48), 1))], axis=1
    )
    differ = [i for i in range(48) if test[i]["text"] != test[i - 1]["text"]]
    assert trainer.evaluate(wrong.select(differ))["eval_match_accuracy"] > 0.8
    assert "heads.find.logit_scale" not in trainer.get_decay_parameter_names(model)


def test_it_is_saved(tmp_path):
    model = make_pair_model([Retrieval("find", embedding_size=8, temperature=0.2), Matching("match")])
    model.save_pretrained(tmp_path)
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path)
    assert loaded.tasks == model.tasks
    batch = make_batch(labels=False)
    with torch.no_grad():
        for name, value in model(**batch).logits.items():
            torch.testing.assert_close(loaded(**batch).logits[name], value)
    assert Path(tmp_path, "config.json").read_text().count('"retrieval"') == 1


def test_what_dropout_takes_away_is_no_pair():
    """Rows that lose their picture in this step teach neither which picture is theirs nor that it matches."""
    tasks = [FIND, Matching("match")]
    model = make_pair_model(tasks, modality_dropout={"vision": 0.5}, fusion_dropout=0.0, classifier_dropout=0.0).train()
    rows = [
        {"text": f"the {word}", "image": make_image(i)} for i, word in enumerate(["cat", "dog", "sun", "rain", "bat"])
    ]
    batch = MMDataCollator(make_processor(), model.config)(rows)
    seen = {}
    model.model.register_forward_hook(lambda module, args, output: seen.update(output=output))
    for seed in range(5):
        torch.manual_seed(seed)
        outputs = model(**batch)
        kept = seen["output"].kept["vision"]
        vectors = outputs.logits["find"][kept].tolist()
        expected = loss_by_loops(vectors, batch["labels"]["find"][kept].tolist()) / max(int(kept.sum()), 1)
        assert outputs.losses["find"].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
        known = ~outputs.logits["match"].isnan()
        assert known[:, 0].all()
        assert known[:, 1].tolist() == [bool(k) and int(kept.sum()) > 1 for k in kept]


def test_half_precision_knows_no_nan():
    model = make_pair_model([FIND, Matching("match")]).half()
    batch = MMDataCollator(make_processor(), model.config)(ROWS)
    batch["pixel_values"] = batch["pixel_values"].half()
    for training in (False, True):
        outputs = model.train(training)(**batch)
        assert outputs.logits["find"].isfinite().all()
        assert (outputs.logits["find"][4, 1] == 0).all()
        assert outputs.loss.isfinite()


def test_one_vector_per_row_where_rows_are_asked_for():
    model, processor = make_pair_model([FIND]), make_processor()
    frames = [make_image(i) for i in range(3)]
    inputs = processor(
        text=["a", "b", "c", "d"], images=[make_image(7), None, [make_image(7), make_image(8)], None],
        videos=[None, None, None, frames],
    )  # fmt: skip
    with torch.no_grad():
        expected = torch.nn.functional.normalize(model(**inputs).logits["find"][:, 1], dim=-1)
    torch.testing.assert_close(model.encode_image(**inputs), expected)
    with pytest.raises(ValueError, match="encode_audio needs sound: input_values or input_features"):
        model.encode_audio()


@pytest.mark.parametrize("cell", [np.int64(3), torch.tensor(3), 3.0, np.float64(3.0)])
def test_ids_as_tables_hold_them(cell):
    collator = MMDataCollator(make_processor(), make_config(tasks=[Retrieval("find", column="subject")]))
    rows = [{**ROWS[0], "subject": cell}, {**ROWS[1], "subject": 3}, {**ROWS[3], "subject": np.False_}]
    labels = collator(rows)["labels"]["find"]
    assert labels[0, 2] == labels[1, 2] >= 0
    assert (labels[2] == -100).all()


@pytest.mark.parametrize("temperature", [0.0, -1.0, 0.005, math.nan, math.inf])
def test_a_temperature_below_its_bound_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be at least 0.01"):
        Retrieval("find", temperature=temperature)


def test_the_temperature_comes_back_from_its_bound():
    head = make_model(tasks=[Retrieval("find", embedding_size=8, temperature=0.01)]).heads.find
    with torch.no_grad():
        head.logit_scale.add_(0.5)  # as far as an optimiser may have gone
    stream = Stream("text", torch.randn(4, 3, head.text_projection.in_features), torch.ones(4, 3, dtype=torch.bool))
    items = Stream("vision", torch.randn(4, 3, head.item_projection.in_features), torch.ones(4, 3, dtype=torch.bool))
    logits = head(SimpleNamespace(encoded={"text": stream, "vision": items}))
    assert torch.allclose(logits.norm(dim=-1) ** 2, torch.full((4, 2), 100.0), rtol=1e-4)
    total, _ = Retrieval("find").loss(logits, torch.arange(12).reshape(4, 3))
    total.backward()
    assert head.logit_scale.grad.item() != 0


class TestWhatTheModelSees:
    """Rows are equal if their token ids, or their pixels, are."""

    collator = MMDataCollator(make_processor(), make_config(tasks=[FIND]))

    def ids(self, *rows) -> list[list[int]]:
        return self.collator(list(rows))["labels"]["find"].tolist()

    def test_texts(self):
        image = make_image(0)
        texts = ["a cat", "A  Cat ", "a cat.", "a cat " * 40, "a cat " * 50]  # the last two are cut alike
        rows = self.ids(*({"text": text, "image": image} for text in texts))
        assert rows[0][0] == rows[1][0]
        assert rows[3][0] == rows[4][0]
        assert len({row[0] for row in rows}) == 3

    def test_pictures_of_another_form(self):
        wide, tall = (Image.new("RGB", size, "red") for size in ((8, 2), (2, 8)))
        again = Image.new("RGB", (8, 2), "red")
        rows = self.ids(*({"text": "a cat", "image": image} for image in (wide, tall, again)))
        assert rows[0][1] == rows[2][1] != rows[1][1]


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(-1, 2)), max_size=12), data=st.data())
def test_drawn_pairs_are_no_matches(rows, data):
    """And there is one wherever there may be one."""
    verdicts = [data.draw(st.sampled_from([1, 1, 1, 0, -100])) for _ in rows]
    ids = [row if verdict != -100 else (-100,) * 3 for row, verdict in zip(rows, verdicts, strict=True)]
    labels = torch.tensor([(v, *row) for v, row in zip(verdicts, ids, strict=True)]).reshape(-1, 4)
    drawn = draw_mismatches(labels)
    pairs = [row for row, verdict in zip(ids, verdicts, strict=True) if verdict == 1]
    for i, (row, verdict) in enumerate(zip(ids, verdicts, strict=True)):
        for side in (0, 1):
            may = [
                j for j, other in enumerate(ids)
                if verdict == 1 == verdicts[j] and not belong(row[side], other[1 - side], pairs, side)
            ]  # fmt: skip
            assert (drawn[i, side] in may) if may else (drawn[i, side] == -1)
    assert drawn.equal(draw_mismatches(labels))


def test_mismatched_pairs_are_drawn_alike():
    """Of three others, each about a third of the times."""
    labels = torch.tensor([[1, i, 10 + i, -1] for i in range(4)])
    drawn = torch.stack([draw_mismatches(labels, seed) for seed in range(300)])
    for row in range(4):
        for side in (0, 1):
            counts = drawn[:, row, side].bincount(minlength=4)
            assert counts[row] == 0
            assert (counts.sum(), counts.max() < 140, counts[counts > 0].min() > 60) == (300, True, True)


def test_matching_is_measured_on_the_same_pairs_whatever_the_batches(tmp_path):
    model, processor = make_pair_model([Matching("match")]), make_processor()
    rows = [
        {"text": f"the {word}", "image": make_image(i), "match": None if i == 3 else True}
        for i, word in enumerate(["cat", "dog", "sun", "rain", "bat", "red cat"])
    ] + [{"text": "the dog", "image": make_image(0), "match": False}, {"text": "sun", "image": None}]
    results = []
    for batch_size in (1, 3, 8):
        args = TrainingArguments(
            str(tmp_path), per_device_eval_batch_size=batch_size, report_to=[], use_cpu=True, disable_tqdm=True
        )
        trainer = MMTrainer(model, args, processing_class=processor, eval_dataset=rows)
        results.append(trainer.predict(rows))
    # By hand: each pair alone.
    labels = torch.from_numpy(results[0].label_ids["match"])
    drawn, expected = draw_mismatches(labels), []
    pairs = [0, 1, 2, 4, 5]
    assert [i for i in range(8) if drawn[i, 0] >= 0] == pairs
    with torch.no_grad():
        for i in pairs:
            other, text = drawn[i].tolist()
            for t, p in ((i, i), (i, other), (text, i)):
                inputs = processor(text=[rows[t]["text"]], images=[rows[p]["image"]])
                expected.append((model(**inputs).logits["match"].item(), t == p))
        inputs = processor(text=["the dog"], images=[make_image(0)])
        lone = model(**inputs).logits["match"].item()
    right = [(score > 0) == truth for score, truth in expected] + [lone <= 0]
    for result in results:
        assert result.metrics["test_match_accuracy"] == pytest.approx(np.mean(right))
        np.testing.assert_allclose(
            result.predictions["match"][pairs].reshape(-1), [score for score, _ in expected], rtol=1e-4, atol=1e-5
        )
        assert np.isnan(result.predictions["match"][[3, 6, 7], 1:]).all()
        assert result.metrics["test_loss"] == pytest.approx(results[0].metrics["test_loss"], rel=1e-5)


def test_a_model_that_always_says_yes_is_right_a_third_of_the_times(tmp_path):
    """One row per batch holds no mismatched pair."""
    model = make_pair_model([Matching("match")])
    model.heads.match.out_proj.weight.data.zero_()
    model.heads.match.out_proj.bias.data.fill_(3.0)
    args = TrainingArguments(str(tmp_path), per_device_eval_batch_size=1, report_to=[], use_cpu=True)
    rows = [{"text": f"the {word}", "image": make_image(i)} for i, word in enumerate(["cat", "dog", "sun", "rain"])]
    metrics = MMTrainer(model, args, processing_class=make_processor(), eval_dataset=rows).evaluate()
    assert metrics["eval_match_accuracy"] == pytest.approx(1 / 3)


def test_predictions_have_the_order_of_the_rows_if_lengths_are_grouped(tmp_path):
    model = make_model(tasks=[Classification("topic", labels=["a", "b"])])
    rows = [{"text": "a cat " * (1 + i * 7 % 5), "length": 2 * (1 + i * 7 % 5)} for i in range(12)]
    data = datasets.Dataset.from_list(rows)
    options = {"report_to": [], "use_cpu": True, "per_device_eval_batch_size": 2, "disable_tqdm": True}
    plain, grouped = (
        MMTrainer(model, TrainingArguments(str(tmp_path), **options, **more), processing_class=make_processor())
        for more in ({}, {"train_sampling_strategy": "group_by_length"})
    )
    expected = plain.predict(data).predictions["topic"]
    np.testing.assert_allclose(grouped.predict(data).predictions["topic"], expected, rtol=1e-4, atol=1e-5)


def test_a_diverged_model_is_not_scored_as_perfect():
    task, nan = Matching("match"), math.nan
    labels = torch.tensor([[1, 5, 6, -1], [0, 7, 8, -1]])
    total, count = task.loss(torch.tensor([[nan, nan, nan], [nan, nan, nan]]), labels)
    assert count == 2
    assert total.isnan()


@pytest.mark.slow
def test_rows_that_share_a_text_are_drawn_for_at_once():
    """Each text is looked through once, however many rows have it."""
    shared = torch.tensor([[1, 7, i, -1] for i in range(4_000)])
    assert (draw_mismatches(shared) == -1).all()
    shared[-1, 1] = 8
    drawn = draw_mismatches(shared)
    assert (drawn[:-1, 0] == len(shared) - 1).all()  # the only picture that does not belong to the text
