"""The notebooks: each runs from top to bottom with tiny encoders, and is the same as its twin in Python."""

import json
import re
from pathlib import Path

import matplotlib
import pytest
from language_models import LANGUAGE_MODELS, make_prompt_tokenizer
from tiny import TEXT_ENCODERS, VISION_ENCODERS, make_image, make_image_processor, make_tokenizer
from transformers import AutoModel, AutoModelForCausalLM


FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
TWINS = sorted(FOLDER.glob("*.py"))


def cells_of(script: Path) -> list[str]:
    """The code of each cell of a script in the percent format; magics and shell commands are comments there."""
    cells = re.split(r"^# %%", script.read_text(), flags=re.MULTILINE)[1:]
    code = [cell.partition("\n")[2].strip() for cell in cells if not cell.startswith(" [markdown]")]
    return [re.sub(r"^(\s*)# ([%!])", r"\1\2", cell, flags=re.MULTILINE) for cell in code]


def save_stamps(folder: Path) -> Path:
    """Pictures with captions beside them, in folders, as those of Tux Paint."""
    for i in range(48):
        place = folder / "stamps" / ("animals", "clothes", "food", "household", "plants", "vehicles")[i % 6]
        place.mkdir(parents=True, exist_ok=True)
        make_image(i).save(place / f"{i}.png")
        words = (("red", "green", "blue", "small")[i % 4], ("dog", "cat", "crane", "sun")[i // 4 % 4])
        (place / f"{i}.txt").write_text(f"A {' '.join(words)} {i}.\nde.utf8=Ein Bild.\n", "utf-8")
    return folder / "stamps"


@pytest.mark.parametrize("script", TWINS, ids=lambda path: path.stem)
def test_the_notebook_is_its_twin_and_was_run(script):
    notebook = json.loads(script.with_suffix(".ipynb").read_text())
    cells = ["".join(cell["source"]).strip() for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells == cells_of(script)
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error"]
    # Nothing of the machine that ran it.
    assert not re.search(r"/(tmp|home|root|Users|work)/", json.dumps(notebook))


@pytest.mark.slow
@pytest.mark.parametrize("script", TWINS, ids=lambda path: path.stem)
def test_it_runs(script, tmp_path, monkeypatch):
    matplotlib.use("agg")
    text, vision = tmp_path / "text", tmp_path / "vision"
    AutoModel.from_config(TEXT_ENCODERS["bert"]()).save_pretrained(text)
    make_tokenizer().save_pretrained(text)
    AutoModel.from_config(VISION_ENCODERS["vit"]()).save_pretrained(vision)
    make_image_processor().save_pretrained(vision)
    language_model = tmp_path / "language_model"
    config = LANGUAGE_MODELS["llama"]()
    config.num_hidden_layers = 4  # the notebook has a fusion before every fourth layer
    AutoModelForCausalLM.from_config(config).save_pretrained(language_model)
    make_prompt_tokenizer().save_pretrained(language_model)
    places = {"TEXT": text, "VISION": vision, "LANGUAGE_MODEL": language_model, "STAMPS": save_stamps(tmp_path)}
    for name, value in {**places, "ROWS": 72, "EPOCHS": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)
    exec(compile(script.read_text(), script.name, "exec"), {"__name__": "notebook"})
    assert [path for path in tmp_path.rglob("model.safetensors") if path.parent not in (text, vision, language_model)]
