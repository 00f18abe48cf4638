"""Writes the card of a model into its folder."""

import os
from functools import cache
from pathlib import Path
from typing import Any, Optional

import huggingface_hub
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.constants import HF_HUB_OFFLINE

from ...model.configuration_mm_transformer import MMTransformerConfig
from ...model.messages import one_line
from ...model.safe_writing import leads_outside, write_text_atomically
from .facts import CardFacts, Measurement, TrainedModel, measurements_of, training_of
from .manual_edits import add_memory, fingerprint, join_sections, merge, split_sections, take_memory
from .metadata import entries_in, entries_of, to_card_data
from .sections import base_model_of, sections_of


CARD_NAME = "README.md"


def write_card(folder: str | os.PathLike[str], facts: CardFacts) -> ModelCard:
    """
    Writes `README.md`, or renews the generated parts of an existing one.

    Args:
        folder (`str` or `Path`): That of the model.
        facts ([`CardFacts`]): The known facts. Sections without known facts stay unchanged, unless they describe an
            earlier training.

    Raises:
        ValueError: if the front matter of the existing card is no YAML.
    """
    path = Path(folder, CARD_NAME)
    memory: dict[str, Any] = {}
    data: Any = ModelCardData()
    text = ""
    has_card = path.is_file() and not leads_outside(path, Path(folder))
    if has_card:
        content, memory = take_memory(path.read_text(encoding="utf-8"))
        try:
            card = ModelCard(content, ignore_metadata_errors=True)
        except Exception as error:  # from YAML
            raise ValueError(
                f"{path} cannot be updated, since its front matter is not valid YAML: {one_line(error)}"
            ) from error
        data, text = card.data, card.text
    new_sections, new_entries = sections_of(facts), entries_of(facts)
    old_sections = split_sections(text) if has_card else {}
    old_entries = entries_in(data, facts) if has_card else {}
    remembered = {name: dict(memory.get(name, {})) for name in ("sections", "metadata")}
    trained = fingerprint(facts.training.rows) if facts.training is not None else None
    if trained is None or trained == memory.get("training"):
        # The weights are the same, so the facts of the trainer are still true.
        new_sections = _with_known(new_sections, old_sections, remembered["sections"])
        new_entries = _with_known(new_entries, old_entries, remembered["metadata"])
    sections, section_memory = merge(old_sections, new_sections, remembered["sections"])
    entries, entry_memory = merge(old_entries, new_entries, remembered["metadata"])
    for key in facts.said:  # a given value is a person's
        entry_memory = {name: value for name, value in entry_memory.items() if name.split(" ", 1)[0] != key}
    front = to_card_data(entries, facts.name.rpartition("/")[2])
    remember = {"sections": section_memory, "metadata": entry_memory, "training": trained or memory.get("training")}
    card = ModelCard(f"---\n{front.to_yaml()}\n---\n\n{join_sections(sections)}")
    write_text_atomically(path, add_memory(card.content, remember))
    return card


def write_trainer_card(
    trainer: TrainedModel,
    folder: str | os.PathLike[str],
    name: Optional[str] = None,
    ablation: Optional[str] = None,
    **said: Any,
) -> ModelCard:
    """
    The card of a trainer's training and measurements.

    Args:
        trainer ([`MMTrainer`]): After training.
        said: `license`, `language`, `datasets`, `tags`; `None` values are left out.
    """
    model = trainer.fused_model
    said = {key: value for key, value in said.items() if value is not None}
    datasets = said.get("datasets")
    measurements = measurements_of(trainer)
    if datasets:
        one = datasets if isinstance(datasets, str) else datasets[0]
        measurements = [Measurement(m.split, m.metrics, one) for m in measurements]
    facts = CardFacts(
        name=name or Path(folder).resolve().name,
        config=model.config,
        measurements=measurements,
        training=training_of(trainer),
        ablation=ablation,
        said=said,
        encoder_licenses=licenses_of(model.config),
        num_parameters=model.num_parameters(),
        is_adapter=hasattr(trainer.accelerator.unwrap_model(trainer.model), "get_base_model"),
        input_columns=getattr(trainer.processing_class, "input_columns", {}),
    )
    return write_card(folder, facts)


def licenses_of(config: MMTransformerConfig) -> dict[str, str]:
    """Hub id of an encoder -> its license; empty if the Hub cannot be reached."""
    parts = [getattr(config, f"{name}_config", None) for name in ("text", "vision", "audio")]
    sources = {base_model_of(part) for part in parts if part is not None} - {""}
    known = {} if HF_HUB_OFFLINE else {source: _license_of(source) for source in sorted(sources)}
    return {source: license for source, license in known.items() if license}


@cache  # a trainer that pushes each checkpoint asks once
def _license_of(source: str) -> Optional[str]:
    try:
        data = huggingface_hub.model_info(source, timeout=5).card_data
    except Exception:  # any error (no network, not found, gated): the card is written anyway
        return None
    return str(data["license"]) if data is not None and data.get("license") else None


def _with_known(new: dict[str, Any], old: dict[str, Any], remembered: dict[str, str]) -> dict[str, Any]:
    """Adds entries that were generated before, are unknown now, and are unchanged."""
    known = {
        name: old[name]
        for name, generated in remembered.items()
        if name not in new and name in old and fingerprint(old[name]) == generated
    }
    return {**new, **known}
