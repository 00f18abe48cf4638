"""
How fast does an exported model write, with the graph of further tokens and without it?

All ways write the same texts from the same pictures and texts, greedily; the model of PyTorch has a cache too.

    python benchmarks/export_writing.py
"""

import tempfile

import torch
from generation import make_model
from harness import in_turns, parser, prepare, report
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from mm_transformers import MMTransformerProcessor
from mm_transformers.sharing.export import export_model
from mm_transformers.sharing.exported_model import ExportedModel


def make_processor(vocab_size: int) -> MMTransformerProcessor:
    words = {"<pad>": 0, "</s>": 1, "<s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, vocab_size)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **special)
    return MMTransformerProcessor(ViTImageProcessorPil(), wrapped)


def main() -> None:
    made = parser(__doc__, size=None, repeats=5)
    made.add_argument("--width", type=int, default=256)
    made.add_argument("--layers", type=int, default=4)
    made.add_argument("--vocab_size", type=int, default=8_000)
    made.add_argument("--batch_size", type=int, default=4)
    made.add_argument("--text_len", type=int, default=16)
    made.add_argument("--new_tokens", type=int, nargs="+", default=[16, 64])
    args = made.parse_args()
    prepare(args)
    most = max(args.new_tokens)
    model, processor = make_model(args.width, args.layers, args.vocab_size, most), make_processor(args.vocab_size)
    ids = torch.randint(4, args.vocab_size, (args.batch_size, args.text_len))
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(args.batch_size, 3, 224, 224),
        "image_index": torch.arange(args.batch_size)[:, None],
    }
    with tempfile.TemporaryDirectory() as folder:
        export_model(model, processor, f"{folder}/graphs")
        cached, uncached = (ExportedModel(f"{folder}/graphs") for _ in range(2))
    uncached.model.text_model.step = None
    names = ("width", "layers", "vocab_size", "batch_size", "text_len")
    for count in args.new_tokens:
        length = dict(min_new_tokens=count, max_new_tokens=count)
        writers = {"exported, no cache": uncached, "exported, cache": cached, "PyTorch, cache": model}
        texts = [writer.generate("german", **inputs, **length) for writer in writers.values()]
        assert all(torch.equal(text, texts[0]) for text in texts), "the ways write different texts"
        ways = {
            way: lambda writer=writer, length=length: writer.generate("german", **inputs, **length)
            for way, writer in writers.items()
        }
        seconds = in_turns(ways, args.repeats, args.device, warmup=1)
        tokens = args.batch_size * count
        per_token = {way: [each / tokens for each in values] for way, values in seconds.items()}
        shapes = {name: getattr(args, name) for name in names}
        report(
            "exported generation, seconds per token", per_token, "exported, no cache", args, new_tokens=count, **shapes
        )


if __name__ == "__main__":
    main()
