"""`mm-transformers card`: the card of a saved model, with its metrics on a file of rows."""

from pathlib import Path
from typing import Any

from ..data.sources import media_of
from ..model.configuration_mm_transformer import MMTransformerConfig
from ..model.processing_mm_transformer import MMTransformerProcessor
from ..model.safe_writing import write_atomically
from ..training.card.card_file import CARD_NAME, licenses_of, write_card
from ..training.card.facts import CardFacts, Measurement
from .metrics_table import print_ablation
from .predict import Reading, ablation_of, evaluator
from .processes import say


ABLATION_PICTURE = "ablation.png"


def run_card(
    folder: Path,
    file: Path | None,
    split: str,
    with_ablation: bool,
    name: str | None,
    said: dict[str, Any],
    batch_size: int,
    reading: Reading,
) -> None:
    """
    Writes the card of a model.

    Args:
        folder: that of the model.
        file: labelled rows to measure it on; `None` to measure nothing.
        split: the name of these rows in the card.
        with_ablation: whether to measure the contribution of each modality.
        name: the Hub id in the example of the card.
        said: license, language, datasets, tags.

    Raises:
        ValueError, OSError: one sentence.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model: it has no config.json.")
    facts = CardFacts(
        name=name or folder.resolve().name,
        config=MMTransformerConfig.from_pretrained(folder),
        said={key: value for key, value in said.items() if value},
        input_columns=_input_columns(folder),
    )
    facts.encoder_licenses = licenses_of(facts.config)
    if file is not None:
        with evaluator(str(folder), file, batch_size, reading) as (trainer, rows):
            if (
                with_ablation
                and facts.config.modalities
                and set(media_of(trainer.data_collator)) & set(rows.column_names)
            ):
                ablation = ablation_of(trainer, rows, batch_size)
                metrics = next(iter(ablation.variants.values()))
                with write_atomically(folder / ABLATION_PICTURE) as picture:
                    ablation.plot().savefig(picture, format="png", dpi=110)
                facts.ablation = f"{ablation.to_markdown()}\n\n![Scores and contributions]({ABLATION_PICTURE})"
                print_ablation(ablation)
            else:
                metrics = trainer.evaluate()
            measured = {key.removeprefix("eval_"): value for key, value in metrics.items()}
            dataset = (facts.said.get("datasets") or [None])[0]
            facts.measurements = [Measurement(split, measured, dataset)]
            facts.num_parameters = trainer.fused_model.num_parameters()
    write_card(folder, facts)
    say(f"Wrote {folder / CARD_NAME}.")


def _input_columns(folder: Path) -> dict[str, list[str]]:
    """The columns of the training table that the processor beside a model knows."""
    try:
        return MMTransformerProcessor.from_pretrained(folder).input_columns
    except OSError:  # the model was saved alone
        return {}
