"""The front matter of the card for the Hub, as entries that can be merged."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ...model.modalities import ENCODERS
from ...model.tasks import Task
from .facts import CardFacts
from .sections import base_model_of


_LISTS = ("tags", "language", "datasets", "base_model", "metrics")
_RESULT = "result "


def entries_of(facts: CardFacts) -> dict[str, Any]:
    """Name -> value: one entry for each key, each element of a list and each result."""
    tasks = facts.config.get_tasks()
    entries: dict[str, Any] = {"library_name": "transformers"}
    hub_tasks = [task.hub_task for task in tasks.values()]
    if hub_tasks and hub_tasks[0] != Task.hub_task:
        entries["pipeline_tag"] = hub_tasks[0]
    media = [ENCODERS[name].hub_tag for name in facts.config.modalities]
    tags = ["mm_transformers", "multimodal", "multi-task", *media]
    entries.update({f"tags {tag}": tag for tag in tags})
    configs = [getattr(facts.config, f"{name}_config", None) for name in ("text", *facts.config.modalities)]
    base_models = sorted({source for config in configs if config is not None and (source := base_model_of(config))})
    entries.update({f"base_model {source}": source for source in base_models})
    if len(base_models) > 1:
        # Otherwise the Hub shows several as a merge of their weights.
        entries["base_model_relation"] = "finetune"
    for key, value in facts.said.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        if key in _LISTS:
            entries.update({f"{key} {item}": item for item in values})
        else:
            entries[key] = value
    for measured in facts.measurements:
        for task in tasks.values():
            for metric, value in measured.of_task(task, tasks).items():
                result = {
                    "task_type": task.hub_task,
                    "dataset_type": measured.dataset or "unknown",
                    "dataset_name": measured.dataset or f"{measured.split} data",
                    "dataset_split": measured.split,
                    "metric_type": metric,
                    "metric_name": f"{task.name} {metric}",
                    "metric_value": value,
                }
                entries[f"{_RESULT}{measured.split} {task.name} {metric}"] = result
    return entries


def entries_in(data: ModelCardData, facts: CardFacts) -> dict[str, Any]:
    """The entries of an existing card."""
    values = data.to_dict()
    values.pop("model-index", None)
    entries: dict[str, Any] = {}
    for key, value in values.items():
        if key in _LISTS and isinstance(value, list):
            entries.update({f"{key} {item}": item for item in value})
        elif key in _LISTS and value is not None:
            entries[f"{key} {value}"] = value
        elif key not in ("model_name", "eval_results"):
            entries[key] = value
    tasks = facts.config.get_tasks()
    for result in data.eval_results or []:
        known = {name: getattr(result, name) for name in EvalResult.__dataclass_fields__}
        entries[_name_of(known, tasks)] = {name: value for name, value in known.items() if value is not None}
    return entries


def to_card_data(entries: Mapping[str, Any], model_name: str) -> ModelCardData:
    values: dict[str, Any] = {}
    results = []
    for name, value in entries.items():
        key = name.split(" ", 1)[0]
        if name.startswith(_RESULT):
            results.append(EvalResult(**value))
        elif key in _LISTS:
            values.setdefault(key, []).append(value)
        else:
            values[name] = value
    if results:
        values.update(eval_results=results, model_name=model_name)
    return ModelCardData(**values)


def _name_of(result: Mapping[str, Any], tasks: Mapping[str, Task]) -> str:
    name = str(result.get("metric_name") or result["metric_type"])
    owner, _, metric = name.partition(" ")
    if owner in tasks and metric:
        return f"{_RESULT}{result.get('dataset_split')} {owner} {metric}"
    return f"{_RESULT}{result.get('dataset_type')} {result.get('dataset_split')} {result.get('task_type')} {name}"
