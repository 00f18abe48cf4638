"""`mm-transformers calibrate`: how far to trust the answers of a saved model."""

import json
from pathlib import Path

from ..analysis.calibration import calibrate
from ..data.files import check_writable
from ..model.safe_writing import write_atomically
from .predict import Reading, load_with_rows
from .processes import say


def run_calibration(
    model_folder: Path,
    file: Path,
    training_file: Path | None,
    output: Path | None,
    min_rows: int,
    hide: bool,
    batch_size: int,
    reading: Reading,
) -> None:
    """
    Calibrates a saved model, and saves it in its folder.

    Raises:
        ValueError, OSError: one sentence.
    """
    if not model_folder.is_dir():
        raise ValueError(
            f"{model_folder} is no folder of a saved model: a calibration can be written to a folder only."
        )
    if output is not None:
        check_writable(output)
    model, collator, rows = load_with_rows(str(model_folder), file, reading)
    training_rows = None
    if training_file is not None:
        _, _, training_rows = load_with_rows(str(model_folder), training_file, reading)
    result = calibrate(
        model, collator, rows, training_rows=training_rows, min_rows=min_rows, hide=hide, batch_size=batch_size
    )
    say(str(result))
    model.save_pretrained(model_folder)
    say(f"Wrote the calibration to {model_folder}.")
    if output is not None:
        with write_atomically(output) as target:
            target.write((json.dumps(result.to_dict(), indent=2) + "\n").encode())
        picture = output.with_suffix(".png")
        with write_atomically(picture) as drawn:
            result.plot().savefig(drawn, format="png", dpi=120)
        say(f"Wrote {output} and {picture}.")
