"""The sections of the card."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...data.markdown import plain_markdown
from ...model.configuration_mm_transformer import MMTransformerConfig
from ...model.messages import listed
from ...model.modalities import modalities_of
from ...model.table_kinds import column_of
from ...model.tasks import Task
from .facts import CardFacts


def sections_of(facts: CardFacts) -> dict[str, str]:
    """Heading -> Markdown; "" is the heading of the text above the first one."""
    tasks = facts.config.get_tasks()
    sections = {
        "": _introduction(facts, tasks),
        **({} if facts.is_adapter else {"## Use": _use(facts)}),
        "## Tasks": _tasks(tasks),
        "## Encoders": _encoders(facts),
    }
    if facts.measurements:
        sections["## Results"] = _results(facts, tasks)
    if facts.ablation:
        sections["## What each modality is good for"] = facts.ablation
    if facts.calibration:
        sections["## How far to trust an answer"] = facts.calibration
    if facts.training is not None:
        sections["## Training"] = markdown_table(
            ["", ""], [[name, plain_markdown(value)] for name, value in facts.training.rows.items()]
        )
    sections["## Limits"] = _limits(facts, tasks)
    return sections


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """
    A table in Markdown.

    Args:
        header, rows: cells in Markdown; see [`plain_markdown`].
    """
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _introduction(facts: CardFacts, tasks: Mapping[str, Task]) -> str:
    others = (" or ".join(part.nouns for part in modalities_of(name)) for name in facts.config.modalities)
    inputs = [*(["text"] if facts.config.reads_text else []), *others]
    size = f", {facts.num_parameters / 1e6:,.1f} million parameters" if facts.num_parameters else ""
    return (
        f"# {plain_markdown(facts.name.rpartition('/')[2])}\n\nA model that reads {listed(inputs)} and answers "
        f"{len(tasks)} task{'s' if len(tasks) > 1 else ''}: {', '.join(tasks)}. "
        f"{plain_markdown(facts.config.fusion_type.replace('_', '-'))} fusion{size}; made with mm_transformers."
    )


def _table_cell(column: Mapping[str, Any]) -> str:
    """A typical cell of a column of the table, as code."""
    example = column_of(column).example()
    return f"{json.dumps(column['name'], ensure_ascii=False)}: {json.dumps(example, ensure_ascii=False)}"


def _cells(facts: CardFacts, key: str, value: str) -> list[str]:
    """A cell for each column of a part of a row, as code."""
    columns = facts.input_columns.get(key, [key])
    return [f"{json.dumps(column, ensure_ascii=False)}: {value}" for column in columns]


def _use(facts: CardFacts) -> str:
    row, setup = [], []
    if facts.config.reads_text:
        row += _cells(facts, "text", '"What you want to know about."')
    if "vision" in facts.config.modalities:
        setup += ["from PIL import Image", ""]
        row += _cells(facts, "image", 'Image.new("RGB", (224, 224))')
    if "audio" in facts.config.modalities:
        setup = ["import numpy as np", *setup] if setup else ["import numpy as np", ""]
        row += _cells(facts, "audio", '{"array": np.zeros(16_000), "sampling_rate": 16_000}')
    if facts.config.table_config is not None:
        row += [_table_cell(column) for column in facts.config.table_config.columns[:3]]
    code = [
        *setup,
        "from transformers import pipeline",
        "",
        f'pipe = pipeline("multimodal", model={json.dumps(facts.name, ensure_ascii=False)}, trust_remote_code=True)',
        f"print(pipe({{{', '.join(row)}}}))",
    ]
    others = "Images may also be paths, addresses or bytes. " if "vision" in facts.config.modalities else ""
    others += "Each input can be left out. " if len(row) > 1 else ""
    return (
        "```python\n"
        + "\n".join(code)
        + f"\n```\n\n{others}After `import mm_transformers`, `trust_remote_code=True` is "
        "not needed, and no code of this repository is run."
    )


def _tasks(tasks: Mapping[str, Task]) -> str:
    rows = []
    for task in tasks.values():
        labels = task.label_names
        more = f", ... ({len(labels)} in all)" if len(labels) > 20 else ""
        shown = ", ".join(map(plain_markdown, labels[:20])) + more
        rows.append([task.name, plain_markdown(task.kind.replace("_", " ")), shown])
    return markdown_table(["task", "kind", "labels"], rows)


def _encoders(facts: CardFacts) -> str:
    rows = []
    for name in (*facts.config.read_modalities, "decoder"):
        config = getattr(facts.config, f"{name}_config", None)
        if config is not None:
            source = base_model_of(config)
            link = f"[{source}](https://huggingface.co/{source})" if source else "from a config or a folder"
            license = plain_markdown(facts.encoder_licenses.get(source or "", ""))
            rows.append([name, plain_markdown(config.model_type), link, license])
    return markdown_table(["modality", "architecture", "pretrained", "license"], rows)


def _results(facts: CardFacts, tasks: Mapping[str, Task]) -> str:
    values: dict[tuple[str, str], dict[str, float]] = {}
    for measured in facts.measurements:
        for task in tasks.values():
            for metric, value in measured.of_task(task, tasks).items():
                values.setdefault((task.name, metric), {})[measured.split] = value
    splits = [measured.split for measured in facts.measurements]
    rows = [
        [*map(plain_markdown, name), *(f"{found[split]:.4g}" if split in found else "" for split in splits)]
        for name, found in values.items()
    ]
    return markdown_table(["task", "metric", *map(plain_markdown, splits)], rows)


def _limits(facts: CardFacts, tasks: Mapping[str, Task]) -> str:
    lines = ["It knows only the labels above."] if any(task.label_names for task in tasks.values()) else []
    if not facts.measurements:
        lines.append("Its quality has not been measured.")
    else:
        lines.append("The results are valid for data like the test data. Nothing else has been measured.")
    if facts.config.reads_text and facts.config.modalities and not facts.ablation:
        lines.append("It has not been measured whether it uses more than the text.")
    lines.append("It has the biases of its pretrained encoders.")
    return "\n".join(f"- {line}" for line in lines)


_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)?")


def base_model_of(config: MMTransformerConfig) -> str:
    """The Hub id of an encoder, "" if it has none."""
    name = str(getattr(config, "_name_or_path", "") or "")
    return name if _HUB_ID.fullmatch(name) else ""
