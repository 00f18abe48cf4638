"""`mm-transformers calibrate`: how far to trust the answers of a saved model."""

import json
from pathlib import Path

import datasets

from ..analysis.ablation.tables import as_markdown
from ..analysis.calibration import calibrate
from ..analysis.calibration.results import CalibrationResult
from ..data.files import check_writable
from ..data.markdown import plain_markdown
from ..model.safe_writing import write_atomically
from ..training.card.card_file import CARD_NAME, write_card
from ..training.card.facts import CardFacts
from ..training.recipe import RECIPE_NAME, read_recipe
from ..training.recipe.builders import load_data, training_arguments
from ..training.recipe.table_hashes import TABLES_NAME, has_new_test_rows
from .predict import Reading, load_model, load_with_rows
from .processes import say


def run_calibration(
    model_folder: Path,
    file: Path | None,
    training_file: Path | None,
    output: Path | None,
    min_rows: int,
    hide: bool,
    batch_size: int,
    reading: Reading,
) -> None:
    """
    Calibrates a saved model, and saves it in its folder.

    Args:
        file: labelled rows that the model was not trained on; by default the test rows of the recipe in the folder.
        training_file: the rows of the training; by default those of the recipe if `file` is not given, else a random
            half of the rows of `file`.

    Raises:
        ValueError, OSError: one sentence.
    """
    if not model_folder.is_dir():
        raise ValueError(
            f"{model_folder} is no folder of a saved model: a calibration can be written to a folder only."
        )
    if output is not None:
        check_writable(output)
    training_rows = None
    if file is None:
        model, collator, *_ = load_model(str(model_folder), reading)
        rows, training_rows = _rows_of_recipe(model_folder)
        say(f"The {len(rows):,} test rows of {RECIPE_NAME} are used.")
    else:
        model, collator, rows = load_with_rows(str(model_folder), file, reading)
    if training_file is not None:
        _, _, training_rows = load_with_rows(str(model_folder), training_file, reading)
    result = calibrate(
        model, collator, rows, training_rows=training_rows, min_rows=min_rows, hide=hide, batch_size=batch_size
    )
    say(str(result))
    model.save_pretrained(model_folder)
    name = model_folder.resolve().name
    columns = collator.processor.input_columns
    write_card(
        model_folder,
        CardFacts(name, model.config, calibration=_for_card(result, len(rows)), input_columns=columns),
    )
    say(f"Wrote the calibration to {model_folder}, and its figures to {CARD_NAME}.")
    if output is not None:
        with write_atomically(output) as target:
            target.write((json.dumps(result.to_dict(), indent=2) + "\n").encode())
        picture = output.with_suffix(".png")
        with write_atomically(picture) as drawn:
            result.plot().savefig(drawn, format="png", dpi=120)
        say(f"Wrote {output} and {picture}.")


def _rows_of_recipe(model_folder: Path) -> tuple[datasets.Dataset, datasets.Dataset]:
    """
    The test rows and the training rows of the recipe beside a model.

    Raises:
        ValueError: one sentence, if there are none, or the table has changed since the training.
    """
    path = model_folder / RECIPE_NAME
    if not path.is_file():
        raise ValueError(f"{model_folder} has no {RECIPE_NAME}: name a FILE of labelled rows.")
    recipe = read_recipe(path)
    splits = load_data(recipe, training_arguments(recipe)).splits
    if "test" not in splits:
        raise ValueError(f"{path} holds out no test rows: name a FILE of labelled rows.")
    has_new_rows = has_new_test_rows(recipe, model_folder)
    if has_new_rows:
        raise ValueError(
            f"{recipe.data.train} has changed since the training, so the model may have been trained on its present "
            "test rows: name a FILE of labelled rows that it was not trained on."
        )
    if has_new_rows is None:
        say(f"{model_folder} has no {TABLES_NAME}, so it is not known whether the table is that of the training.")
    return splits["test"], splits["train"]


def _for_card(result: CalibrationResult, num_rows: int) -> str:
    """The tables of the result as Markdown."""
    about = (
        f"Calibrated on {num_rows:,} rows, by the inputs that a row has. The errors say how far the probabilities are "
        "from the shares of right answers. Sizes are numbers of labels in a set, or lengths of an interval."
    )
    tables = [as_markdown(table, 200) for table in result.tables()]
    return "\n\n".join([about, *tables, *map(plain_markdown, result.notes)])
