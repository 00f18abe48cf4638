"""Tasks that write: the decoder of a pretrained encoder-decoder, or a new one, behind the fused encoder."""

import pytest
import torch
from cases import first_quickly
from datasets import Dataset
from tiny import (
    SEQ2SEQ,
    TEXT_ENCODERS,
    VISION_ENCODERS,
    VOCAB_SIZE,
    make_batch,
    make_image,
    make_model,
    make_processor,
    open_gates,
)
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    Seq2SeqTrainingArguments,
    StoppingCriteriaList,
    Trainer,
    TrainingArguments,
    pipeline,
)
from writers import DECODERS, LABELS, TOPIC, make_writer

from mm_transformers import (
    Generation,
    MMDataCollator,
    MMTrainer,
    MMTransformerConfig,
    MMTransformerForMultiTask,
    MMTransformerModel,
    MultiTaskMetrics,
)
from mm_transformers.analysis import ablate
from mm_transformers.model.task_base import LabelContext


every_seq2seq = pytest.mark.parametrize("kind", SEQ2SEQ)


def save_encoders(folder, kind: str) -> dict[str, str]:
    torch.manual_seed(3)
    AutoModelForSeq2SeqLM.from_config(SEQ2SEQ[kind]()).save_pretrained(folder / "text")
    AutoModel.from_config(VISION_ENCODERS["vit"]()).save_pretrained(folder / "vision")
    return {"text": str(folder / "text"), "vision": str(folder / "vision")}


@pytest.mark.slow
@every_seq2seq
@pytest.mark.parametrize("options", [{"num_beams": 1}, {"num_beams": 3}], ids=["greedy", "beam"])
def test_rule_2_a_new_model_writes_what_the_pretrained_one_writes(kind, options, tmp_path):
    encoders = save_encoders(tmp_path, kind)
    model = MMTransformerForMultiTask.from_encoders(**encoders, tasks=[TOPIC, Generation("german", max_length=8)])
    bare = AutoModelForSeq2SeqLM.from_pretrained(encoders["text"]).eval()
    batch = make_batch(labels=False)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    # A random model would else write the same token over and over.
    options = {**options, "no_repeat_ngram_size": 1, "max_new_tokens": 8}
    written = model.generate(task="german", **batch, **options)
    assert torch.equal(written, bare.generate(**text, **options))
    assert len(set(written.flatten().tolist())) > 6

    labels = LABELS["german"]
    inputs = torch.tensor([[0, 5, 6, 7], [0, 8, 2, 0], [0, 0, 0, 0], [0, 9, 9, 2]])
    inputs[:, 0] = bare.config.decoder_start_token_id
    logits = bare(**text, decoder_input_ids=inputs).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    losses = model(**batch, labels={"german": labels}).losses
    torch.testing.assert_close(losses["german"], expected)

    open_gates(model)
    assert not torch.allclose(model(**batch, labels={"german": labels}).losses["german"], expected, atol=1e-3)


@pytest.mark.parametrize("kind", first_quickly(SEQ2SEQ))
def test_every_parameter_gets_a_gradient(kind):
    model = make_writer(kind).train()
    model(**make_batch(labels=False), labels=LABELS).loss.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    # Where nobody has a label, all take part nonetheless.
    model.zero_grad()
    model(**make_batch(labels=False), labels={"topic": LABELS["topic"]}).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.slow
@every_seq2seq
def test_saved_model_writes_the_same(kind, tmp_path):
    model, batch = make_writer(kind), make_batch(labels=False)
    model.generation_config.num_beams = 3
    model.save_pretrained(tmp_path)
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    assert loaded.generation_config.num_beams == 3
    assert torch.equal(model.generate(**batch), loaded.generate(**batch))
    # One matrix for what is read and what is written, where the pretrained model has it so.
    tied = model.model.text_model.config.tie_word_embeddings
    output = loaded.model.text_model.get_output_embeddings().weight
    assert (output is loaded.get_input_embeddings().weight) == bool(tied)


@pytest.mark.parametrize("kind", first_quickly(SEQ2SEQ))
def test_caches_make_no_difference(kind):
    model, batch = make_writer(kind), make_batch(labels=False)
    for beams in (1, 2):
        cached = model.generate(**batch, num_beams=beams, use_cache=True)
        assert torch.equal(cached, model.generate(**batch, num_beams=beams, use_cache=False))


def test_encoders_run_once_per_answer():
    model, calls = make_writer(), []
    model.model.vision_model.register_forward_hook(lambda *_: calls.append("vision"))
    model.model.text_encoder.register_forward_hook(lambda *_: calls.append("text"))
    model.model.fusion.register_forward_hook(lambda *_: calls.append("fusion"))
    model.generate(**make_batch(labels=False), num_beams=3)
    assert sorted(calls) == ["fusion", "text", "vision"]


@pytest.mark.slow
@every_seq2seq
def test_rows_with_and_without_pictures_write_as_they_do_alone(kind):
    model, batch = make_writer(kind), make_batch(labels=False)
    together = model.generate(**batch, num_beams=3)
    for row, index in enumerate(batch["image_index"]):
        length = int(batch["attention_mask"][row].sum())
        images = index[index >= 0]
        alone = model.generate(
            input_ids=batch["input_ids"][row : row + 1, :length],
            pixel_values=batch["pixel_values"][images] if len(images) else None,
            image_index=torch.arange(len(images))[None],
            num_beams=3,
        )[0]
        padded = torch.zeros_like(together[row])
        padded[: len(alone)] = alone
        assert torch.equal(together[row], padded)


def test_loss_is_the_mean_over_the_tokens():
    model = make_writer("t5")
    batch = make_batch(labels=False)
    outputs = model(**batch, labels=LABELS)
    labels, logits = LABELS["german"], outputs.logits["german"]
    assert logits.shape == (4, 4, VOCAB_SIZE)
    values = [
        -logits[row, place].log_softmax(-1)[labels[row, place]]
        for row in range(4) for place in range(4) if labels[row, place] != -100
    ]  # fmt: skip
    torch.testing.assert_close(outputs.losses["german"], torch.stack(values).mean())
    smooth = Generation("german", label_smoothing=0.1)
    total, count = smooth.loss(logits, labels)
    spread = [
        -0.9 * logits[row, place].log_softmax(-1)[labels[row, place]] - 0.1 * logits[row, place].log_softmax(-1).mean()
        for row in range(4) for place in range(4) if labels[row, place] != -100
    ]  # fmt: skip
    torch.testing.assert_close(total / count, torch.stack(spread).mean())


def test_logits_at_a_place_depend_on_the_labels_before_it():
    model, batch = make_writer("bart"), make_batch(labels=False)
    logits = model(**batch, labels=LABELS).logits["german"]
    changed = LABELS["german"].clone()
    changed[0, 2] = 11
    again = model(**batch, labels={"german": changed}).logits["german"]
    torch.testing.assert_close(again[0, :3], logits[0, :3])
    assert not torch.allclose(again[0, 3], logits[0, 3])


def test_greedy_is_the_argmax_of_the_logits():
    model, batch = make_writer("marian"), make_batch(labels=False)
    written = model.generate(**batch, max_new_tokens=5)
    labels = written[:, 1:].masked_fill(written[:, 1:] == 0, -100)
    logits = model(**batch, labels={"german": labels}).logits["german"]
    known = labels != -100
    assert torch.equal(logits.argmax(-1)[known], labels[known])


def test_tasks_share_a_decoder_by_what_it_starts_with():
    tasks = [
        Generation("german", max_length=8, decoder_start_ids=[2, 40]),
        Generation("french", max_length=8, decoder_start_ids=[2, 41, 42]),
    ]
    model, batch = make_writer("bart", tasks=tasks), make_batch(labels=False)
    german, french = model.generate("german", **batch), model.generate("french", **batch)
    assert german[:, :2].tolist() == [[2, 40]] * 4
    assert french[:, :3].tolist() == [[2, 41, 42]] * 4
    labels = {"german": LABELS["german"], "french": LABELS["german"]}
    logits = model(**batch, labels=labels).logits
    assert logits["german"].shape == logits["french"].shape == (4, 4, VOCAB_SIZE)
    assert torch.equal(logits["german"][:, 0].argmax(-1), german[:, 2])
    assert torch.equal(logits["french"][:, 0].argmax(-1), french[:, 3])
    with pytest.raises(
        ValueError, match=r"must name a task that writes text, one of \['german', 'french'\], but is None"
    ):
        model.generate(**batch)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_new_decoder_for_an_encoder_without_one(decoder, tmp_path):
    torch.manual_seed(0)
    AutoModel.from_config(TEXT_ENCODERS["bert"]()).save_pretrained(tmp_path / "text")
    AutoModel.from_config(VISION_ENCODERS["vit"]()).save_pretrained(tmp_path / "vision")
    model = MMTransformerForMultiTask.from_encoders(
        text=str(tmp_path / "text"), vision=str(tmp_path / "vision"), decoder_config=DECODERS[decoder](),
        tasks=[TOPIC, Generation("german", max_length=5)], num_fusion_attention_heads=4,
    )  # fmt: skip
    batch = make_batch(labels=False)
    states = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    encoder = AutoModel.from_pretrained(tmp_path / "text").eval()
    expected = encoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    torch.testing.assert_close(states, expected)
    open_gates(model)
    model.train()
    model(**batch, labels=LABELS).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    model.eval()
    written = model.generate(**batch, num_beams=2)
    assert written[:, 0].tolist() == [1] * 4
    model.save_pretrained(tmp_path / "model")
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.generate(**batch, num_beams=2), written)


@pytest.mark.parametrize("dtype", [torch.bfloat16, {"text": "bfloat16"}], ids=["all", "text"])
def test_a_new_decoder_has_the_dtype_of_its_encoder(dtype, tmp_path):
    AutoModel.from_config(TEXT_ENCODERS["bert"]()).save_pretrained(tmp_path / "text")
    AutoModel.from_config(VISION_ENCODERS["vit"]()).save_pretrained(tmp_path / "vision")
    model = MMTransformerForMultiTask.from_encoders(
        text=str(tmp_path / "text"), vision=str(tmp_path / "vision"), decoder_config=DECODERS["bert"](),
        tasks=[Generation("german", max_length=5)], num_fusion_attention_heads=4, dtype=dtype,
    )  # fmt: skip
    assert {p.dtype for p in model.model.text_model.parameters()} == {torch.bfloat16}
    written = model.generate(**make_batch(labels=False))
    model.save_pretrained(tmp_path / "model")
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path / "model")
    assert {p.dtype for p in loaded.model.text_model.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.generate(**make_batch(labels=False)), written)


def test_an_encoder_decoder_gives_its_encoder_alone_where_nobody_writes():
    model = make_writer("t5", tasks=[TOPIC])
    assert not model.can_generate()
    assert not any("decoder" in name for name in model.state_dict())


def test_can_generate_is_asked_of_classes_as_of_models():
    """In transformers, it is a classmethod: `type(model).can_generate()` is how tools choose a class."""
    assert MMTransformerForMultiTask.can_generate() is True
    assert MMTransformerModel.can_generate() is False
    assert make_writer("bart").can_generate() is True
    assert make_model().can_generate() is False


def test_labels_are_the_text_and_its_end():
    tokenizer = make_processor().tokenizer
    task = Generation("german", max_length=4)
    labels = task.collate_labels(["red dog", None, "the red green blue dog", ""], LabelContext(tokenizer=tokenizer))
    end = tokenizer.sep_token_id
    ids = tokenizer.convert_tokens_to_ids
    assert labels.tolist() == [
        [ids("red"), ids("dog"), end, -100],
        [-100] * 4,
        [ids("the"), ids("red"), ids("green"), end],
        [end, -100, -100, -100],
    ]


# Training


WORDS = ["red dog", "green cat", "blue crane", "small bat", "big desk", "lovely sun"]


def make_rows(n=12) -> Dataset:
    return Dataset.from_list([
        {
            "text": WORDS[i % 6], "image": None if i % 4 == 1 else make_image(i % 3), "topic": [0, 1, 2, None][i % 4],
            "german": None if i % 5 == 4 else WORDS[i % 6].split()[-1],
        }
        for i in range(n)
    ])  # fmt: skip


def make_args(path, cls=TrainingArguments, **kwargs):
    defaults = dict(
        per_device_train_batch_size=4, per_device_eval_batch_size=5, max_steps=3, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True, learning_rate=1e-3, dataloader_pin_memory=False,
    )  # fmt: skip
    return cls(str(path), **{**defaults, **kwargs})


@pytest.mark.slow
def test_trainer_scores_what_is_written(tmp_path):
    model, rows = make_writer(), make_rows()
    processor = make_processor()
    trainer = MMTrainer(
        model, make_args(tmp_path), processing_class=processor, train_dataset=rows, eval_dataset=rows
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_german_bleu", "eval_german_chrf", "eval_german_exact_match", "eval_topic_f1"} <= set(metrics)

    # By hand: row by row, the loss over tokens and the share of the rows that are right.
    collator, total, count, right, labelled = MMDataCollator(processor, model.config), 0.0, 0, 0, 0
    model.eval()
    for row in rows:
        batch = collator([row])
        if row["german"] is None:
            continue
        labels = batch.pop("labels")
        logits = model(**batch, labels=labels).logits["german"][0]
        tokens = labels["german"][0]
        total += nn.functional.cross_entropy(logits, tokens, reduction="sum", ignore_index=-100).item()
        count += int((tokens != -100).sum())
        written = processor.tokenizer.decode(model.generate(**batch)[0], skip_special_tokens=True)
        right += written.strip() == row["german"]
        labelled += 1
    assert metrics["eval_german_loss"] == pytest.approx(total / count, rel=1e-4)
    assert metrics["eval_german_exact_match"] == pytest.approx(right / labelled)


@pytest.mark.slow
def test_it_learns_to_write(tmp_path):
    rows = make_rows(6)
    model = make_writer("bart")
    for parameter in model.parameters():
        parameter.data *= 0.1 if parameter.ndim > 1 else 1.0  # weights for looking at are too large for learning
    trainer = MMTrainer(
        model, make_args(tmp_path, max_steps=60, learning_rate=5e-3, per_device_train_batch_size=6),
        processing_class=make_processor(), train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip
    assert trainer.evaluate()["eval_german_exact_match"] < 0.5
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_german_exact_match"] == 1.0
    assert metrics["eval_german_bleu"] >= 0.0


@pytest.mark.slow
def test_arguments_of_seq2seq_training_are_heeded(tmp_path):
    rows, model = make_rows(), make_writer()
    options = []
    generate = model.model.text_model.generate
    model.model.text_model.generate = lambda *args, **kwargs: options.append(kwargs) or generate(*args, **kwargs)

    def evaluate(**kwargs) -> dict[str, float]:
        args = make_args(tmp_path, Seq2SeqTrainingArguments, **kwargs)
        return MMTrainer(model, args, processing_class=make_processor(), eval_dataset=rows).evaluate()

    assert "eval_german_bleu" not in evaluate(predict_with_generate=False)
    assert options == []
    assert "eval_german_bleu" in evaluate(predict_with_generate=True, generation_num_beams=2, generation_max_length=4)
    assert {(o["num_beams"], o["max_length"]) for o in options} == {(2, 4)}
    options.clear()
    given = GenerationConfig(max_new_tokens=3, num_beams=3)
    given.save_pretrained(tmp_path / "config")
    for config in (given, str(tmp_path / "config")):
        evaluate(predict_with_generate=True, generation_config=config)
        assert {(o["generation_config"].num_beams, o["generation_config"].max_new_tokens) for o in options} == {(3, 3)}
        assert not any("max_new_tokens" in o for o in options)
        options.clear()


@pytest.mark.parametrize("option", [{"num_return_sequences": 2, "num_beams": 2}, {"return_dict_in_generate": True}])
def test_a_row_has_one_answer(option, tmp_path):
    model, processor, rows = make_writer(), make_processor(), make_rows()
    with pytest.raises(ValueError, match="Task 'german': a row has one answer, so num_return_sequences must be 1"):
        pipeline("multimodal", model=model, processor=processor)(
            list(rows["text"])[:3], batch_size=3, generate_kwargs=option
        )
    for name, value in option.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match="Task 'german': a row has one answer"):
        MMTrainer(model, make_args(tmp_path), processing_class=processor, eval_dataset=rows).evaluate()


def test_the_plain_trainer_trains_and_gives_the_loss(tmp_path):
    model, rows, processor = make_writer(), make_rows(), make_processor()
    trainer = Trainer(
        model, make_args(tmp_path, remove_unused_columns=False), train_dataset=rows, eval_dataset=rows,
        data_collator=MMDataCollator(processor, model.config),
        compute_metrics=MultiTaskMetrics(model.config, processor),
    )  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    own = MMTrainer(model, make_args(tmp_path), processing_class=processor, eval_dataset=rows).evaluate()
    assert metrics["eval_german_loss"] == pytest.approx(own["eval_german_loss"], rel=1e-4)


# Bad input


def test_no_decoder():
    with pytest.raises(ValueError, match=r"Task 'german' writes text, but text_config \('bert'\) has no decoder: use"):
        MMTransformerConfig(text_config=TEXT_ENCODERS["bert"](), tasks=[Generation("german", max_length=8)])


def test_a_decoder_that_nobody_needs():
    with pytest.raises(ValueError, match="decoder_config is given, but no task writes text"):
        MMTransformerConfig(text_config=TEXT_ENCODERS["bert"](), decoder_config=DECODERS["bert"](), tasks=[TOPIC])
    with pytest.raises(ValueError, match=r"text_config \('marian'\) already has a decoder: leave out decoder_config"):
        MMTransformerConfig(
            text_config=SEQ2SEQ["marian"](),
            decoder_config=DECODERS["bert"](),
            tasks=[Generation("german", max_length=8)],
        )


def test_a_vocabulary_that_does_not_fit_the_tokenizer():
    decoder = DECODERS["bert"]()
    decoder.vocab_size = 50
    config = MMTransformerConfig(
        text_config=TEXT_ENCODERS["bert"](), decoder_config=decoder, tasks=[Generation("german", max_length=8)]
    )
    with pytest.raises(ValueError, match="has 7., tokens|has 7. tokens|but the decoder can write 50"):
        MMDataCollator(make_processor(), config)


def test_a_decoder_without_a_start():
    model = make_writer("bart", tasks=[Generation("german", max_length=8)])
    model.generation_config.decoder_start_token_id = model.generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="Task 'german': the config of the decoder has no start token"):
        model.generate(**make_batch(labels=False))


def test_more_than_the_decoder_has_positions_for():
    with pytest.raises(ValueError, match="Task 'german': the decoder has 40 positions, too few for max_length=41"):
        MMTransformerConfig(text_config=SEQ2SEQ["bart"](), tasks=[Generation("german", max_length=41)])
    model = make_writer("bart", tasks=[Generation("german", max_length=40)])
    assert model.generate(**make_batch(labels=False), min_new_tokens=40).shape == (4, 41)


def test_a_task_that_does_not_write():
    with pytest.raises(ValueError, match=r"must name a task that writes text, one of \['german'\], but is 'topic'"):
        make_writer().generate("topic", **make_batch(labels=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 0}, "max_length must be an integer >= 1, but is 0"),
        ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and less than 1, but is 1.0"),
        ({"decoder_start_ids": []}, r"decoder_start_ids must be a list of token ids, but is \[\]"),
        ({"decoder_start_ids": ["de"]}, r"decoder_start_ids must be a list of token ids, but is \['de'\]"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=f"Task 'german': {message}"):
        Generation("german", **options)


def test_a_label_that_is_no_text():
    collator = MMDataCollator(make_processor(), make_writer().config)
    with pytest.raises(ValueError, match="column 'german': task 'german': expected a text .* but got"):
        collator([{"text": "a dog", "german": {"a": 3}}])
    # A number in a column of texts is its digits, as in a CSV file.
    assert collator([{"text": "a dog", "german": 3}])["labels"]["german"].tolist()[0][-1] != -100


def test_metrics_need_the_processor():
    with pytest.raises(ValueError, match="Task 'german' writes text, and decoding it needs the processor"):
        MultiTaskMetrics(make_writer().config)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*SEQ2SEQ, *(f"new {kind}" for kind in DECODERS)])
def test_vocabulary_grows(kind, tmp_path):
    """Old tokens are read and written as before, new ones can be."""
    if kind.startswith("new"):
        torch.manual_seed(0)
        tasks = [TOPIC, Generation("german", max_length=8)]
        config = MMTransformerConfig(
            text_config=TEXT_ENCODERS["bert"](), vision_config=VISION_ENCODERS["vit"](), tasks=tasks,
            decoder_config=DECODERS[kind.split()[1]](), num_fusion_layers=1,
        )  # fmt: skip
        model = MMTransformerForMultiTask(config).eval()
    else:
        model = make_writer(kind)
    batch = make_batch(labels=False)
    with torch.no_grad():
        before = model(**batch, labels=LABELS)
    model.resize_token_embeddings(VOCAB_SIZE + 13, mean_resizing=False)
    assert model.config.vocab_size == model.config.decoder_vocab_size == VOCAB_SIZE + 13
    with torch.no_grad():
        after = model(**batch, labels=LABELS)
        new = model(**batch, labels=LABELS | {"german": torch.full((4, 2), VOCAB_SIZE + 5)})
    torch.testing.assert_close(after.logits["topic"], before.logits["topic"])
    torch.testing.assert_close(after.logits["german"][..., :VOCAB_SIZE], before.logits["german"], rtol=1e-4, atol=1e-5)
    assert after.logits["german"].shape[-1] == VOCAB_SIZE + 13
    assert new.loss.isfinite()
    model.save_pretrained(tmp_path)
    loaded = MMTransformerForMultiTask.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**batch, labels=LABELS).loss, after.loss)
    assert loaded.generate(**batch).tolist() == model.generate(**batch).tolist()


def test_a_prompt_is_no_part_of_the_answer(tmp_path):
    """What the decoder is told to start with, in words: metrics see what it has written itself."""
    tokenizer = make_processor().tokenizer
    prompt = [2, *tokenizer.convert_tokens_to_ids(["the", "red"])]
    model = make_writer("bart", tasks=[Generation("german", max_length=8, decoder_start_ids=prompt)])
    trainer = MMTrainer(model, make_args(tmp_path), processing_class=make_processor())
    rows = make_rows()
    output = trainer.predict(rows)
    ids = output.predictions["german"]["generated_ids"]
    inputs = make_processor()(text=list(rows["text"]), images=list(rows["image"]))
    written = model.generate(**inputs)
    assert (written[:, :3] == torch.tensor(prompt)).all()
    for row, expected in zip(ids.tolist(), written[:, 3:].tolist(), strict=True):
        assert [i for i in row if i not in (-100, 0)] == [i for i in expected if i != 0]


def test_one_start_id_is_not_followed_by_a_forced_one():
    model = make_writer("bart", tasks=[Generation("german", max_length=8, decoder_start_ids=[40])])
    model.generation_config.forced_bos_token_id = 7
    batch = make_batch(labels=False)
    ids = model.generate(**batch)
    logits = model(**batch, labels={"german": ids[:, 1:]}).logits["german"]
    assert torch.equal(ids[:, 1], logits[:, 0].argmax(-1))
    # Other threads may generate at the same time, so the config never changes.
    seen = []

    def watch(ids, scores):
        seen.append(model.generation_config.forced_bos_token_id)
        return torch.zeros(len(ids), dtype=torch.bool)

    assert torch.equal(model.generate(**batch, stopping_criteria=StoppingCriteriaList([watch])), ids)
    assert set(seen) == {7}
    assert model.generation_config.forced_bos_token_id == 7


def test_lengths_that_are_asked_for():
    model, batch = make_writer("bart"), make_batch(labels=False)
    model.generation_config.eos_token_id = None  # writes on and on
    assert model.generate(**batch).shape[1] == 1 + 8
    assert model.generate(**batch, generation_config=GenerationConfig(num_beams=2)).shape[1] == 1 + 8
    assert model.generate(**batch, generation_config=GenerationConfig(max_new_tokens=5)).shape[1] == 1 + 5
    assert model.generate(**batch, max_new_tokens=3).shape[1] == 1 + 3
    assert model.generate(**batch, max_length=None, max_new_tokens=None).shape[1] == 1 + 8
    assert model.generate(**batch, word_index=torch.zeros(4, 9)).shape[1] == 1 + 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(eos_token_id=50),
            "ends a text with id 2, but the decoder stops at 50, so generation would never stop: set",
        ),
        (dict(eos_token_id=None), "ends a text with id 2, but the decoder stops at None"),
    ],
)
def test_a_decoder_that_would_never_stop(options, message):
    decoder = DECODERS["bert"]()
    for name, value in options.items():
        setattr(decoder, name, value)
    config = MMTransformerConfig(
        text_config=TEXT_ENCODERS["bert"](), decoder_config=decoder, tasks=[Generation("german", max_length=8)]
    )
    with pytest.raises(ValueError, match=message):
        MMDataCollator(make_processor(), config)


def test_start_ids_that_the_decoder_does_not_know():
    config = make_writer("bart", tasks=[Generation("german", max_length=8, decoder_start_ids=[5000])]).config
    with pytest.raises(ValueError, match="decoder_start_ids holds 5000, but the decoder knows 99 tokens"):
        MMDataCollator(make_processor(), config)


def test_a_tokenizer_of_several_languages():
    """As those of mBART, M2M100 and NLLB: it has to be said which language is to be written."""

    class Multilingual(type(make_processor().tokenizer)):
        tgt_lang = None

        def __call__(self, *args, text_target=None, **kwargs):
            if text_target is not None:
                raise KeyError(None)  # as M2M100's does without a language
            return super().__call__(*args, **kwargs)

    processor = make_processor()
    processor.tokenizer.__class__ = Multilingual
    with pytest.raises(ValueError, match="Multilingual is for several languages. Choose the language to write by"):
        MMDataCollator(processor, make_writer("m2m100").config)
    task = Generation("german", max_length=8, decoder_start_ids=[2, 40])
    batch = MMDataCollator(processor, make_writer("m2m100", tasks=[task]).config)([{"text": "a", "german": "the cat"}])
    assert batch["labels"]["german"][0].tolist()[-1] == 2


@pytest.mark.slow
def test_adapters_on_a_model_that_writes(tmp_path):
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["fusion", "vision_projection", "heads"]
    )
    model = get_peft_model(make_writer("bart", gates_open=False), adapters)
    rows = make_rows()
    trainer = MMTrainer(
        model,
        make_args(tmp_path, max_steps=1),
        processing_class=make_processor(),
        train_dataset=rows,
        eval_dataset=rows,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_german_bleu", "eval_german_loss", "eval_topic_accuracy"} <= set(metrics)


def test_rouge_reads_every_script():
    from mm_transformers.training.metrics.text_metrics import RougeL

    metric = RougeL()
    assert metric.compute(predictions=["嘿嘿 熊"], references=["嘿嘿 熊"]) == {"rouge_l": 1.0}
    assert metric.compute(predictions=["schäl grän"], references=["schön grün"]) == {"rouge_l": 0.0}
    assert metric.compute(predictions=["the red cat"], references=["the cat"])["rouge_l"] == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("cell", "is_right"), [("red cat", True), (" red cat ", True), ("Red Cat", False), ("red 漢 cat", False)]
)
def test_metrics_compare_with_the_cell(cell, is_right, tmp_path, monkeypatch):
    """Not with what the tokenizer, which knows no capitals, makes of it."""
    model, processor = make_writer(), make_processor()
    ids = torch.tensor(processor.tokenizer("red cat", add_special_tokens=False)["input_ids"])
    start = len(model.decoder_start_ids(model.tasks["german"]))

    def write(self, task, encoded, **kwargs):
        return torch.cat([torch.zeros(start, dtype=torch.int64), ids]).expand(len(encoded.last_hidden_state), -1)

    monkeypatch.setattr(type(model), "generate", write)
    rows = [{"text": "red cat", "german": cell}, {"text": "cat", "german": None}] * 3
    trainer = MMTrainer(model, make_args(tmp_path), processing_class=processor, eval_dataset=rows)
    assert trainer.evaluate()["eval_german_exact_match"] == float(is_right)
    ablation = ablate(model, processor, rows, ["german"], batch_size=2, num_permutations=1)
    assert ablation.variants["all"]["german_exact_match"] == float(is_right)
    # A batch for the model itself has nothing that it does not take.
    assert "references" not in trainer.data_collator(rows)


def test_references_beyond_max_length_are_compared_as_a_whole(tmp_path):
    task = Generation("german", max_length=3)
    cells = ["red cat red cat", None, "", "größer 漢"]
    assert task.decode_references(task.encode_references(cells)) == ["red cat red cat", "", "", "größer 漢"]
    assert task.encode_references(cells)[1].tolist() == [-100] * len("red cat red cat")


@pytest.mark.slow
@pytest.mark.parametrize("with_generate", [True, False])
@pytest.mark.parametrize("own_metrics", [False, True])
def test_the_loss_is_the_same_if_nothing_else_is_wanted(with_generate, own_metrics, tmp_path):
    """Batches of 5, 5 and 2 rows with uneven labels: the mean of their means would be another number."""
    model, rows = make_writer(), make_rows()
    results = []
    for loss_only in (False, True):
        options = {"prediction_loss_only": loss_only, "predict_with_generate": with_generate}
        args = make_args(tmp_path, Seq2SeqTrainingArguments, **options)
        trainer = MMTrainer(
            model, args, processing_class=make_processor(), eval_dataset=rows,
            compute_metrics=(lambda prediction: {"own": 1.0}) if own_metrics else None,
        )  # fmt: skip
        results.append(trainer.evaluate())
        output = trainer.predict(rows)
        assert (output.predictions is None) == loss_only
        assert output.metrics["test_loss"] == pytest.approx(results[-1]["eval_loss"])
    everything, only = results
    assert only["eval_loss"] == pytest.approx(everything["eval_loss"], rel=1e-6)
    assert only["eval_german_loss"] == pytest.approx(everything["eval_german_loss"], rel=1e-6)
    assert ("eval_topic_accuracy" in everything) == (not own_metrics)
    assert ("eval_own" in everything) == own_metrics
    assert not {"eval_own", "eval_topic_accuracy", "eval_german_bleu"} & set(only)
    labels = MMDataCollator(make_processor(), model.config)(rows)
    with torch.no_grad():
        assert only["eval_loss"] == pytest.approx(model.eval()(**labels).loss.item(), rel=1e-4)


def test_references_of_long_cells_are_bounded():
    task = Generation("german", max_length=4)
    [long, short] = task.decode_references(task.encode_references(["ä" * 100_000, "ö"]))
    assert (long, short) == ("ä" * 128, "ö")
    cut = task.encode_references(["a" + "ä" * 1000])
    assert task.decode_references(cut) == ["a" + "ä" * 127]  # no half of a letter


def test_batches_of_evaluation_fit_the_model(tmp_path):
    model, rows = make_writer(), make_rows()
    trainer = MMTrainer(model, make_args(tmp_path), processing_class=make_processor(), eval_dataset=rows)
    for batch in trainer.get_eval_dataloader():
        assert torch.isfinite(model(**batch).loss)


def test_metrics_of_an_own_collator_that_knows_some_tasks(tmp_path):
    model, rows = make_writer(tasks=[TOPIC]), [{"text": "red cat", "topic": 0}] * 3
    ours = MMDataCollator(make_processor(), model.config)

    def collate(rows):
        batch = ours(rows)
        return {**batch, "labels": {"topic": batch["labels"]["topic"]}}

    trainer = MMTrainer(
        model, make_args(tmp_path), data_collator=collate, processing_class=make_processor(), eval_dataset=rows,
        compute_metrics=lambda prediction: {"rows": len(prediction.label_ids["topic"])},
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == 3
    assert metrics["eval_topic_loss"] > 0


@pytest.mark.parametrize("loss_only", [False, True])
def test_own_logits_leave_the_loss(loss_only, tmp_path):
    """What `preprocess_logits_for_metrics` makes of the logits has no loss; the loss of the stock Trainer stays."""
    model, rows = make_writer(tasks=[TOPIC]), [{"text": "red cat", "topic": i % 3} for i in range(10)]
    trainer = MMTrainer(
        model, make_args(tmp_path, prediction_loss_only=loss_only), processing_class=make_processor(),
        eval_dataset=rows, compute_metrics=lambda prediction: {"rows": len(prediction.predictions)},
        preprocess_logits_for_metrics=lambda logits, labels: logits["topic"].argmax(-1),
    )  # fmt: skip
    metrics = trainer.evaluate()
    with torch.no_grad():
        expected = model.eval()(**MMDataCollator(make_processor(), model.config)(rows)).loss.item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)  # two batches of 5 rows
    assert metrics.get("eval_rows") == (None if loss_only else 10)
