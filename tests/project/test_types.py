"""The types that `py.typed` promises: a user's script with `mypy --strict` sees real types, not `Any`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


mypy = pytest.importorskip("mypy")

# Each line reveals one type; the comment is a part of it.
SCRIPT = """
from transformers import pipeline

from mm_transformers import (
    Classification, MMDataCollator, MMTrainer, MMTrainingArguments, MMTransformerForMultiTask, MMTransformerProcessor,
    MultiTaskMetrics, Predictor, load_demo_dataset,
)
from mm_transformers.analysis import ablate, explain
from mm_transformers.model.pipeline_mm_transformer import MultimodalPipeline


task = Classification("topic", labels=["animals", "food"])
reveal_type(task.labels)  # list[str]
model = MMTransformerForMultiTask.from_encoders(text="some/text", vision="some/vision", tasks=[task])
reveal_type(model)  # MMTransformerForMultiTask
reveal_type(MMTransformerForMultiTask.from_pretrained("my-model"))  # MMTransformerForMultiTask
reveal_type(model.tasks)  # Task
reveal_type(model.config)  # MMTransformerConfig
processor = MMTransformerProcessor.from_encoders(text="some/text", vision="some/vision")
reveal_type(processor)  # MMTransformerProcessor
reveal_type(MMTransformerProcessor.from_pretrained("my-model"))  # MMTransformerProcessor
collator = MMDataCollator(processor, model.config)
batch = collator([{"text": "Lovely weather!"}])
reveal_type(batch)  # dict[str,
reveal_type(model(**batch))  # MMTransformerOutput
reveal_type(model.decode(model(**batch)))  # list[dict[str,
data = load_demo_dataset()
trainer = MMTrainer(model, MMTrainingArguments("out"), processing_class=processor, train_dataset=data["train"])
reveal_type(trainer.train())  # TrainOutput
reveal_type(trainer.evaluate())  # dict[str, float]
reveal_type(trainer.predict(data["test"]))  # PredictionOutput
reveal_type(trainer.verdicts)  # list[
reveal_type(trainer.fused_model)  # MMTransformerForMultiTask
reveal_type(MultiTaskMetrics(model.config, processor))  # MultiTaskMetrics
reveal_type(Predictor.from_pretrained("my-model")([{"text": "Lovely weather!"}]))  # list[dict[str,
pipe: MultimodalPipeline = pipeline("multimodal", "my-model")  # type: ignore[call-overload]
reveal_type(pipe("Lovely weather!"))  # dict[str,
reveal_type(pipe(["Lovely weather!"]))  # list[dict[str,
ablation = ablate(model, processor, data["test"])
reveal_type(ablation)  # Ablation
reveal_type(ablation.variants)  # dict[str, dict[str, float]]
reveal_type(ablation.contributions["topic"].shapley)  # dict[str, float]
reveal_type(ablation.plot())  # Figure
reveal_type(explain(model, processor, {"text": "Lovely weather!"}))  # Explanation
reveal_type(explain(model, processor, ["Lovely weather!"]))  # list[
"""


@pytest.mark.slow
def test_a_script_of_a_user_has_types(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    source = Path(__file__).parents[2] / "src"
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--ignore-missing-imports"]
    done = subprocess.run(
        [*command, "--cache-dir", str(tmp_path / "cache"), str(script)],
        env={**os.environ, "PYTHONPATH": str(source), "MYPYPATH": ""},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert "error:" not in done.stdout, done.stdout + done.stderr
    revealed = [line.split("Revealed type is ")[1] for line in done.stdout.splitlines() if "Revealed type" in line]
    wanted = [line.split("  # ")[1] for line in SCRIPT.splitlines() if line.startswith("reveal_type")]
    assert len(revealed) == len(wanted)
    for found, part in zip(revealed, wanted, strict=True):
        assert part in found
