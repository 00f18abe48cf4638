"""Functions that answer do so in evaluation mode, and leave every module in the mode that it was in."""

import threading

import numpy as np
import pytest
import torch
from tiny import make_image, make_model, make_processor
from transformers import pipeline
from writers import TOPIC, make_writer

from mm_transformers import Generation, MMDataCollator
from mm_transformers.analysis import ablate, contrastive_accuracy, explain, faithfulness
from mm_transformers.analysis.report import write_report
from mm_transformers.analysis.report.answered_rows import answers_to
from mm_transformers.cli.page import answers_as_html
from mm_transformers.cli.reload import answers_of
from mm_transformers.model.answers import evaluation_mode
from mm_transformers.model.predictions import Predictions
from mm_transformers.sharing import export
from mm_transformers.training.predictor import Predictor


ROWS = [
    {"text": "a cat sat on the mat", "image": make_image(1), "topic": TOPIC.labels[0], "german": "the dog"},
    {"text": "dog", "image": make_image(2), "topic": TOPIC.labels[1], "german": "red cat"},
    {"text": "the sun in the rain", "image": None, "topic": TOPIC.labels[1], "german": "sun"},
]
PARTS = [{name: row[name] for name in ("text", "image") if row[name] is not None} for row in ROWS]


def _page(model, processor, folder):
    return answers_as_html(model, processor, PARTS[0], list(model.tasks), ("text", "image"))


def _report(model, processor, folder):
    write_report(folder / "report.html", model, processor, ROWS, num_examples=1)
    return (folder / "report.html").read_text()


def _collator(model, processor):
    return MMDataCollator(processor, model.config)


def _inputs(processor):
    return processor(text=[row["text"] for row in ROWS], images=[row["image"] for row in ROWS])


def _export(model, processor, folder):
    """Without the exporters: what they are given to trace."""
    traced = []

    def run(module, sample, path, kind, int8):
        with torch.no_grad():
            traced.extend(value.tolist() for value in module(**sample.inputs).values())
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_export", run)
        patch.setattr(export, "check_exporters", lambda kind: None)
        export.export_model(model, processor, folder / "exported", "torch")
    return traced


FUNCTIONS = {
    "explain": lambda m, p, f: [one.to_dict() for one in explain(m, p, PARTS, "topic")],
    "explain written": lambda m, p, f: explain(m, p, PARTS[0], "german").to_dict(),
    "ablate": lambda m, p, f: ablate(m, p, ROWS, num_permutations=1).to_dict()["variants"],
    "faithfulness": lambda m, p, f: faithfulness(m, p, PARTS, "topic", shares=(0.0, 0.5)).positive.tolist(),
    "contrastive_accuracy": lambda m, p, f: contrastive_accuracy(m, _collator(m, p), ROWS, "german", ["a", "b", "sun"]),
    "answers_to": lambda m, p, f: list(answers_to(m, _collator(m, p), ROWS, 2)),
    "write_report": _report,
    "predictions": lambda m, p, f: Predictions.of(m, _inputs(p)).answers(p),
    "predictor": lambda m, p, f: Predictor(m, _collator(m, p))(ROWS),
    "pipeline": lambda m, p, f: pipeline("multimodal", model=m, processor=p, device="cpu")(PARTS),
    "demo page": _page,
    "answers_of": lambda m, p, f: {name: values.tolist() for name, values in answers_of(m, _inputs(p)).items()},
    "export_model": _export,
}


def numbers_in(value) -> list:
    """All that was answered, in order, with numbers apart."""
    if isinstance(value, dict):
        return [x for key in value for x in numbers_in(value[key])]
    if isinstance(value, (list, tuple)):
        return [x for part in value for x in numbers_in(part)]
    return [value]


def make() -> torch.nn.Module:
    return make_writer("bart", tasks=[TOPIC, Generation("german", max_length=4)], freeze=["vision"])


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_model_in_training_mode_answers_as_in_evaluation_mode(name, tmp_path):
    processor, answers = make_processor(), []
    for number, training in enumerate([False, True]):
        model = make().train(training)
        # Not all alike: a part that somebody keeps in the other mode stays in it.
        model.heads.train(not training)
        if not training:
            model.heads.eval()
        modes = [module.training for module in model.modules()]
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.manual_seed(number)
        answers.append(numbers_in(FUNCTIONS[name](model, processor, folder)))
        if name != "pipeline":  # transformers puts a model into evaluation mode when a pipeline is made of it
            assert [module.training for module in model.modules()] == modes, (
                "every module is in the mode that it was in"
            )
    for found, expected in zip(answers[1], answers[0], strict=True):
        if isinstance(expected, float):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        else:
            assert found == expected


def test_the_test_would_notice_dropout():
    inputs = _inputs(make_processor())
    model = make().train()
    with torch.no_grad():
        first, second = (model(**inputs).logits["topic"] for _ in range(2))
    assert not torch.allclose(first, second)


def test_a_report_that_is_left_early_leaves_the_mode():
    """Also between two batches."""
    model, processor = make().train(), make_processor()
    modes = [module.training for module in model.modules()]
    batches = answers_to(model, _collator(model, processor), ROWS, 1)
    next(batches)
    assert [module.training for module in model.modules()] == modes
    batches.close()
    broken = answers_to(model, _collator(model, processor), [ROWS[0], {"text": None}], 1)
    next(broken)
    with pytest.raises(ValueError, match="row 0|Row 0"):
        next(broken)
    assert [module.training for module in model.modules()] == modes


def test_threads_share_the_evaluation_mode():
    """None of them finds dropout on, and the last one restores what was."""
    model = make_model(fusion_dropout=0.5, classifier_dropout=0.5).train()
    model.heads.eval()
    before = [module.training for module in model.modules()]
    seen: list[bool] = []

    def work() -> None:
        for _ in range(50):
            with evaluation_mode(model):
                seen.append(any(module.training for module in model.modules()))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 200
    assert not any(seen)
    assert [module.training for module in model.modules()] == before
