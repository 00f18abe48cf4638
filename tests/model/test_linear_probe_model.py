"""Models whose heads have a linear probe: every rule that holds for others, with probes whose weights are not 0."""

import importlib.util

import numpy as np
import pytest
import torch
from cases import first_quickly
from probes import make_probed, set_probes
from tiny import (
    FUSION_KINDS,
    VOCAB_SIZE,
    make_batch,
    make_clip,
    make_feature_extractor,
    make_image,
    make_image_processor,
    make_model,
    make_processor,
    make_tasks,
    make_tokenizer,
    rows_of,
)
from writers import make_writer

from mm_transformers import Generation, Matching, MMTransformerForMultiTask, MMTransformerProcessor, Retrieval
from mm_transformers.analysis import ablate
from mm_transformers.analysis.ablation.encoded_rows import EncodedRows, pairs
from mm_transformers.model.fusion_base import Stream
from mm_transformers.model.linear_probe import LinearProbe, ProbedHead
from mm_transformers.model.modeling_mm_transformer import MMTransformerModelOutput


every_fusion = pytest.mark.parametrize("fusion", first_quickly(FUSION_KINDS))
one_fusion_and_slowly_all = pytest.mark.parametrize(
    "fusion", [pytest.param(kind, marks=[pytest.mark.nightly] if i else []) for i, kind in enumerate(FUSION_KINDS)]
)


def logits_of(model, batch: dict) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return model(**batch).logits


def check_equal(found: dict, expected: dict, rtol=1e-4, atol=1e-5) -> None:
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")  # noqa: B023


# What it answers


@pytest.mark.slow
@pytest.mark.parametrize("vision", ["vit", "resnet"])
@pytest.mark.parametrize("audio", [None, "wav2vec2"])
def test_behind_closed_gates_the_answers_are_those_of_linear_models(vision, audio):
    """Of unit-length means of the encoder outputs and indicators, by the encoders alone, one row after the other."""
    model = make_probed(vision=vision, audio=audio, gates_open=False)
    processor = MMTransformerProcessor(
        make_image_processor(), make_tokenizer(), make_feature_extractor() if audio else None
    )
    images, clip = [make_image(i) for i in range(3)], make_clip(0.1)
    rows = [("a red dog", [images[0], images[1]], [clip]), ("rain", [], []), (None, [images[1]], [clip, clip[:900]])]
    sound = dict(audio=[clips for *_, clips in rows], sampling_rate=16_000) if audio else {}
    inputs = processor(text=[text for text, *_ in rows], images=[pictures for _, pictures, _ in rows], **sound)
    found = logits_of(model, inputs)
    encoders = model.model
    for i, (text, pictures, clips) in enumerate(rows):
        means, text_states = {}, None
        with torch.no_grad():
            if text:
                text_states = encoders.text_model(**processor(text=[text])).last_hidden_state[0]
                means["text"] = text_states.mean(0)
            for picture in pictures:
                pixels = processor(text=["a"], images=[picture])["pixel_values"]
                states = encoders.vision_model(pixel_values=pixels).last_hidden_state[0]
                mean = states.flatten(1).mean(1) if states.ndim == 3 else states.mean(0)
                means["vision"] = means.get("vision", 0) + mean / len(pictures)
            for one in clips if audio else []:
                heard = processor(text=["a"], audio=[one], sampling_rate=16_000)["input_values"]
                mean = encoders.audio_model(heard).last_hidden_state[0].mean(0)
                means["audio"] = means.get("audio", 0) + mean / len(clips)
        for name in ("topic", "score", "entities"):
            probe, features = getattr(model.heads, name).probe, []
            for modality, width in probe.widths.items():
                vector = means.get(modality, torch.zeros(width))
                if name == "entities" and modality == "text" and text:
                    vector = text_states[1]  # the first word
                there = torch.ones(1) * (modality in means)
                features += [vector / vector.norm() if modality in means else vector, there]
            expected = probe.linear.weight @ torch.cat(features) + probe.linear.bias
            logits = found[name][i, 1] if name == "entities" else found[name][i].reshape(-1)
            torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


@every_fusion
def test_probes_and_heads_add_up(fusion):
    model, batch = make_probed(fusion_type=fusion), make_batch(labels=False)
    both = logits_of(model, batch)
    outputs = model.model(**batch)
    for name in model.tasks:
        head = getattr(model.heads, name)
        assert isinstance(head, ProbedHead)
        fused = type(outputs)(**outputs)
        text = outputs.encoded["text"]
        fused.last_hidden_state = outputs.last_hidden_state - text.hidden_states
        mask = text.mask[..., None]
        fused.pooler_output = (fused.last_hidden_state * mask).sum(1) / mask.sum(1)
        expected = head.head(fused) + head.probe(outputs).view_as(both[name])
        torch.testing.assert_close(both[name], expected, rtol=1e-4, atol=1e-5)
        assert head.head(fused).abs().max() > 1e-4, "the fused part matters in these tests"


# Absent is absent


@every_fusion
@pytest.mark.parametrize("width", [32, 16])
def test_each_row_answers_as_it_does_alone(fusion, width):
    model, batch = make_probed(fusion_type=fusion, fusion_hidden_size=width), make_batch(labels=False)
    together = logits_of(model, batch)
    for row in range(4):
        for name, logits in logits_of(model, rows_of(batch, [row])).items():
            expected = together[name][row][: logits.shape[1]] if name == "entities" else together[name][row]
            torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-5)


@every_fusion
@pytest.mark.parametrize("scale", [100.0, float("nan")])
def test_what_other_rows_have_leaves_no_trace(fusion, scale):
    """Not even NaN in the pictures of others."""
    model, batch = make_probed(fusion_type=fusion), make_batch(labels=False)
    text_only = logits_of(model, {name: batch[name] for name in ("input_ids", "attention_mask")})
    first = logits_of(model, batch)
    other = logits_of(model, {**batch, "pixel_values": batch["pixel_values"] * scale})
    for name in first:
        assert torch.equal(first[name][1], other[name][1])
        torch.testing.assert_close(first[name][1], text_only[name][1], rtol=1e-5, atol=1e-6)


@every_fusion
def test_texts_that_are_missing_leave_no_trace(fusion):
    model, batch = make_probed(fusion_type=fusion), make_batch(labels=False)
    batch["attention_mask"][2:] = 0
    first = logits_of(model, batch)
    other = logits_of(model, {**batch, "input_ids": (batch["input_ids"] + 7) % VOCAB_SIZE})
    check_equal({n: x[2:] for n, x in other.items()}, {n: x[2:] for n, x in first.items()}, atol=1e-6)


@every_fusion
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_side_does_not_matter(fusion, side):
    model = make_probed(text="t5", fusion_type=fusion)  # relative positions: the text may stand anywhere
    ids = torch.randint(5, VOCAB_SIZE, (1, 6), generator=torch.Generator().manual_seed(1))
    pixels = make_batch()["pixel_values"][:1]
    padding = torch.zeros(1, 4, dtype=torch.int64)
    order = (lambda a, b: [b, a]) if side == "left" else (lambda a, b: [a, b])
    padded = dict(
        input_ids=torch.cat(order(ids, padding), 1), attention_mask=torch.cat(order(torch.ones_like(ids), padding), 1)
    )
    expected = logits_of(model, dict(input_ids=ids, pixel_values=pixels))
    found = logits_of(model, dict(padded, pixel_values=pixels))
    found["entities"] = found["entities"][:, padded["attention_mask"][0] == 1]
    check_equal(found, expected)


# Training


@every_fusion
@pytest.mark.parametrize("missing", ["nothing", "pictures", "texts", "most"])
def test_every_parameter_takes_part_in_each_backward_pass(fusion, missing):
    model = make_probed(vision="resnet", fusion_type=fusion, num_fusion_layers=1).train()
    check_gradients(model, missing)


@pytest.mark.parametrize("missing", ["nothing", "pictures", "most"])
def test_every_parameter_of_a_convolutional_encoder_takes_part(missing):
    check_gradients(make_probed(vision="efficientnet", num_fusion_layers=1, freeze_batch_norm=True).train(), missing)


def check_gradients(model, missing: str) -> None:
    index = {"pictures": [[-1]] * 4, "most": [[-1], [0], [-1], [-1]]}.get(missing, [[0, 1], [-1, -1], [1, -1], [2, 0]])
    batch = make_batch(image_index=index)
    if missing == "pictures":
        del batch["pixel_values"]
    if missing in ("texts", "most"):
        batch["attention_mask"][0 if missing == "texts" else 2 :] = 0
        batch["labels"]["entities"][batch["attention_mask"] == 0] = -100
    model(**batch).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert [name for name, gradient in gradients.items() if not gradient.isfinite().all()] == []
    of_vision = [gradient for name, gradient in gradients.items() if "vision_model" in name]
    assert any(gradient.any() for gradient in of_vision) == (missing != "pictures")


def test_gradients_of_what_is_missing_are_finite_in_half_precision():
    """Of a mean of zeros the direction has a slope of 1e12, for which float16 has no number."""
    probe = LinearProbe({"text": 4, "vision": 3}, 2)
    torch.nn.init.ones_(probe.linear.weight)
    states = torch.zeros(2, 5, 4, dtype=torch.float16, requires_grad=True)
    means = torch.randn(1, 3).half().requires_grad_()
    text = Stream("text", states, torch.ones(2, 5, dtype=torch.bool), item_means=states.mean(1))
    vision = Stream("vision", torch.zeros(1, 1, 3), None, torch.tensor([[-1], [-1]]), item_means=means)
    outputs = MMTransformerModelOutput(encoded={"text": text, "vision": vision})
    assert torch.equal(probe(outputs), probe.linear.bias.expand(2, 2))
    probe(outputs).sum().backward()
    assert not states.grad.any()
    assert not means.grad.any()


@every_fusion
def test_a_few_steps_lower_the_loss_and_move_the_probes(fusion):
    model, batch = make_probed(fusion_type=fusion).train(), make_batch()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    moved = [name for name, p in model.named_parameters() if "probe" in name and not torch.equal(p, before[name])]
    assert len(moved) == 2 * len(model.tasks)


@every_fusion
def test_half_precision_is_near_full_precision(fusion):
    model, batch = make_probed(fusion_type=fusion), make_batch()
    expected = logits_of(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(**batch)
    check_equal({name: logits.float() for name, logits in outputs.logits.items()}, expected, rtol=0.1, atol=0.3)
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    half = model.to(torch.bfloat16)
    found = logits_of(half, {**batch, "pixel_values": batch["pixel_values"].bfloat16()})
    assert all(logits.dtype == torch.bfloat16 for logits in found.values())
    check_equal({name: logits.float() for name, logits in found.items()}, expected, rtol=0.1, atol=0.5)


def test_pairs_that_do_not_match_are_judged():
    """Streams of other rows are fused anew, with means that no matching head reads."""
    tasks = [*make_tasks()[:1], Retrieval("pairs", embedding_size=8), Matching("fits")]
    model = make_probed(tasks=tasks)
    assert [name for name in model.tasks if isinstance(getattr(model.heads, name), ProbedHead)] == ["topic"]
    batch = make_batch(image_index=[[0], [-1], [1], [2]], labels=False)
    ids = torch.tensor([[1, 11, 21, -1], [-100] * 4, [1, 12, 22, -1], [1, 13, 23, -1]])
    labels = {"fits": ids, "pairs": ids[:, 1:].clamp(min=-100), "topic": torch.tensor([0, 1, 2, 0])}
    outputs = model(**batch, labels=labels)
    judged, plain = outputs.logits["fits"], logits_of(make_model(tasks=tasks), batch)["fits"]
    assert judged.shape == (4, 3)
    assert plain.shape == (4, 1)
    assert judged[[0, 2, 3]].isfinite().all()
    outputs.loss.backward()
    assert model.heads.topic.probe.linear.weight.grad.any()
    # By hand: the text of each row with the picture of the most similar other row that does not match.
    with torch.no_grad():
        vectors = outputs.logits["pairs"].detach()
        similar = (vectors[:, 0] @ vectors[:, 1].T).masked_fill(torch.eye(4, dtype=torch.bool), -torch.inf)
        similar[:, 1] = -torch.inf
        chosen = similar.argmax(1)
        index = torch.tensor([[0], [-1], [1], [2]])[chosen]
        expected = model(**{**batch, "image_index": index}).logits["fits"][:, 0]
    torch.testing.assert_close(judged[[0, 2, 3], 1], expected[[0, 2, 3]], rtol=1e-4, atol=1e-5)


# Graphs


@pytest.mark.nightly
@one_fusion_and_slowly_all
def test_compiles_without_a_graph_break(fusion):
    model, batch = make_probed(fusion_type=fusion), make_batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found, expected = compiled(**batch), model(**batch)
    check_equal(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@one_fusion_and_slowly_all
@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_exported_graphs_answer_alike(fusion, kind, tmp_path):
    """Rows without pictures, batches without any, rows without a text, several pictures, shared ones."""
    pytest.importorskip("transformers.exporters.quantizers", reason="needs a newer transformers")
    if kind == "onnx" and importlib.util.find_spec("onnxruntime") is None:
        pytest.skip("needs mm-transformers[onnx]")
    from mm_transformers.sharing.export import export_model
    from mm_transformers.sharing.exported_model import ExportedModel

    model, processor = make_probed(fusion_type=fusion), make_processor()
    export_model(model, processor, tmp_path / "out", kind)
    exported, shared = ExportedModel(tmp_path / "out", trust_pickle=True), make_image(7)
    for texts, images in (
        (["a red dog"], [None]),
        (["a cat", "over the rain in a very small river", "sun"], [None] * 3),
        (["a"] * 5, [[make_image(i) for i in range(4)], None, [shared], [shared], []]),
        (["a dog", None, None], [make_image(4), make_image(5), [shared, make_image(6)]]),
    ):
        inputs = processor(text=texts, images=images)
        found, expected = exported(**inputs).logits, logits_of(model, inputs)
        for name, logits in expected.items():
            assert (found[name] - logits).abs().max() < 1e-5 * max(1, logits.abs().max()), (name, texts)
            assert logits.abs().max() > 0.1


# What is missing or exchanged, from streams that are encoded once


def close(found, expected, name):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=lambda text: f"{name}: {text}")


@pytest.mark.slow
@every_fusion
@pytest.mark.parametrize("audio", [None, "wav2vec2"])
def test_views_of_encoded_rows_are_those_of_changed_inputs(fusion, audio):
    model = make_probed(fusion_type=fusion, audio=audio)
    processor = MMTransformerProcessor(
        make_image_processor(), make_tokenizer(), make_feature_extractor() if audio else None
    )
    pictures, clip = [make_image(i) for i in range(4)], make_clip(0.1)
    rows = [
        {"text": "a red dog", "vision": pictures[:2], "audio": [clip]},
        {"text": "rain over the river", "vision": None, "audio": []},
        {"text": None, "vision": [pictures[2]], "audio": [clip[:900], clip]},
        {"text": "the big cat", "vision": [pictures[0], pictures[3], pictures[2]], "audio": []},
    ]
    names = ["text", *model.config.modalities]

    def inputs_of(rows):
        sound = dict(audio=[row["audio"] for row in rows], sampling_rate=16_000) if audio else {}
        return processor(text=[row["text"] for row in rows], images=[row["vision"] for row in rows], **sound)

    def answers(outputs):
        return {name: model(encoder_outputs=outputs).logits[name] for name in ("topic", "tags", "score")}

    def check(found, changed, view):
        expected = logits_of(model, inputs_of(changed))
        for name, logits in found.items():
            close(logits, expected[name], (view, name))

    nothing = {"text": None, "vision": None, "audio": []}
    with torch.no_grad():
        # Encoded apart, with other lengths and numbers of items.
        parts = [EncodedRows.of(model.model, inputs_of(part)) for part in (rows[:1], rows[1:3], rows[3:])]
        encoded, own = EncodedRows.together(parts), np.arange(4)
        assert encoded.present("text").tolist() == [True, True, False, True]
        for kept in [{"text"}, {"vision"}, {"text", "vision"}, set(), set(names), {"audio"} & set(names)]:
            changed = [{**nothing, **{name: row[name] for name in kept}} for row in rows]
            check(answers(encoded.view(dict.fromkeys(names, own), frozenset(kept))), changed, kept)
        source = np.array([3, 1, 0, 2])
        for name in names:
            changed = [{**row, name: rows[i][name]} for row, i in zip(rows, source, strict=True)]
            check(answers(encoded.view({**dict.fromkeys(names, own), name: source})), changed, f"others' {name}")
        for first, second in pairs(4, 16):
            changed = [
                {name: rows[i if name == "text" else j][name] for name in ("text", "vision", "audio")}
                for i, j in zip(first.tolist(), second.tolist(), strict=True)
            ]
            others = {name: second for name in names if name != "text"}
            check(answers(encoded.view({"text": first, **others})), changed, "pairs")


@pytest.mark.slow
def test_ablation_of_a_model_that_reads_by_its_probe_alone():
    """Without weights for pictures, these are worth nothing; with them, something."""
    model, processor = make_probed(gates_open=False, tasks=make_tasks()[:1]), make_processor()
    labels = model.tasks["topic"].labels
    rows = [
        {"text": "a red dog", "image": make_image(i), "topic": labels[i % 3]} for i in range(12)
    ]  # fmt: skip
    probe = model.heads.topic.probe
    set_probes(model, vision=0.0, text=0.0)
    without = ablate(model, processor, rows, num_permutations=2)
    assert without.contributions["topic"].shapley["vision"] == pytest.approx(0, abs=1e-6)
    # The linear model of the pictures that has them by heart, in the least squares.
    with torch.no_grad():
        inputs = processor(text=[row["text"] for row in rows], images=[row["image"] for row in rows])
        features = probe.features(model.model(**inputs))[:, probe.blocks[1][0]]
        targets = torch.eye(3)[[labels.index(row["topic"]) for row in rows]]
        probe.linear.weight[:, probe.blocks[1][0]] = (torch.linalg.pinv(features) @ (targets - 1 / 3)).T
        probe.linear.bias.zero_()
        for _, column in probe.blocks:
            probe.linear.weight[:, column] = 0
    found = ablate(model, processor, rows, num_permutations=2)
    assert found.variants["all"]["topic_accuracy"] == 1
    assert found.variants["image only"]["topic_accuracy"] == 1
    assert found.variants["text only"]["topic_accuracy"] < 0.5
    assert found.variants["image shuffled"]["topic_accuracy"] < 0.8


# Adapters


@pytest.mark.slow
def test_adapters_train_save_and_merge_probes(tmp_path):
    peft = pytest.importorskip("peft")
    base = make_probed()
    lora = peft.LoraConfig(
        target_modules=r".*(text|vision)_model.*\.(query|value)", modules_to_save=base.new_modules,
        init_lora_weights=False,
    )  # fmt: skip
    model, batch = peft.get_peft_model(base, lora), make_batch()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, _ in model.named_parameters() if ".probe." in name and "modules_to_save" in name} <= trained
    probe = model.base_model.model.heads.topic.probe.linear
    before = probe.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
    assert not torch.equal(probe.weight, before)
    model.eval()
    batch.pop("labels")
    expected = logits_of(model, batch)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make_probed(), tmp_path).eval()
    check_equal(logits_of(again, batch), expected, atol=1e-6)
    merged = again.merge_and_unload()
    assert isinstance(merged.heads.topic, ProbedHead)
    check_equal(logits_of(merged, batch), expected)
    merged.save_pretrained(tmp_path / "merged")
    check_equal(logits_of(MMTransformerForMultiTask.from_pretrained(tmp_path / "merged"), batch), expected)


# What is encoded beforehand, and what writes


def test_features_of_a_cache_answer_alike():
    model, batch = make_probed(), make_batch(labels=False)
    batch["attention_mask"][3] = 0
    with torch.no_grad():
        texts, _ = model.model.encode(
            "text", input_ids=batch["input_ids"], attention_mask=batch["attention_mask"].clamp(min=0)
        )
        images, _ = model.model.encode("vision", pixel_values=batch["pixel_values"])
    given = dict(text_features=texts, attention_mask=batch["attention_mask"], image_features=images)
    check_equal(logits_of(model, {**given, "image_index": batch["image_index"]}), logits_of(model, batch))


@pytest.mark.slow
def test_tasks_that_write_have_no_probe():
    tasks = [*make_tasks()[:1], Generation("german", max_length=8)]
    model, plain = (make_writer(tasks=tasks, linear_probe=probe) for probe in (True, False))
    plain.load_state_dict(model.state_dict(), strict=False)
    inputs = make_processor()(text=["a cat", "the dog"], images=[make_image(1), None])
    assert "german" not in model.heads.names
    assert isinstance(model.heads.topic, ProbedHead)
    assert torch.equal(model.generate("german", **inputs), plain.generate("german", **inputs))
