"""
How fast does the fused model write, beside the encoder-decoder that it is made of?

Both get the states that their encoders have given, so that what is timed is the writing alone: the same decoder, the
same number of tokens, greedy and with beams. They take turns within one process; the ratio is that of the medians.

    python benchmarks/generation.py
"""

import argparse
import json
import platform
import statistics
import time

import torch
import transformers
from transformers import AutoModelForSeq2SeqLM, MarianConfig, ViTConfig
from transformers.modeling_outputs import BaseModelOutput

from mm_transformers import Generation, MMTransformerConfig, MMTransformerForMultiTask


def make_model(width: int, layers: int, vocab_size: int, max_length: int) -> MMTransformerForMultiTask:
    """A Marian of random weights with a small ViT; the sizes of Helsinki-NLP/opus-mt-en-de are 512, 6 and 58101."""
    text = MarianConfig(
        vocab_size=vocab_size, decoder_vocab_size=vocab_size, d_model=width, encoder_layers=layers,
        decoder_layers=layers, encoder_attention_heads=8, decoder_attention_heads=8, encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width, pad_token_id=0, eos_token_id=1, bos_token_id=2, decoder_start_token_id=0,
        forced_eos_token_id=None,
    )  # fmt: skip
    vision = ViTConfig(hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768)
    torch.manual_seed(0)
    return MMTransformerForMultiTask(
        MMTransformerConfig(text_config=text, vision_config=vision, tasks=[Generation("german", max_length=max_length)])
    ).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab_size", type=int, default=32_000)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--text_len", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    model = make_model(args.width, args.layers, args.vocab_size, args.new_tokens).to(args.device)
    bare = AutoModelForSeq2SeqLM.from_config(model.config.text_config).to(args.device).eval()
    bare.load_state_dict(model.model.text_model.state_dict())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, args.vocab_size, (args.batch_size, args.text_len), generator=generator).to(args.device)
    pixels = torch.randn(args.batch_size, 3, 224, 224, generator=generator).to(args.device)
    mask = torch.ones_like(ids)
    length = dict(min_new_tokens=args.new_tokens, max_new_tokens=args.new_tokens)
    with torch.no_grad():
        fused_states = model.model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
        bare_states = bare.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state

    def seconds(write) -> float:
        if args.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        write()
        if args.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for beams in args.beams:
        ways = {
            "fused": lambda beams=beams: model.generate("german", fused_states, num_beams=beams, **length),
            # A fresh output each time: beams are written into it.
            "bare": lambda beams=beams: bare.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=bare_states),
                attention_mask=mask,
                num_beams=beams,
                **length,
            ),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(args.repeats + 1):
            for name, write in ways.items():
                taken = seconds(write)
                if repeat:  # the first warms up
                    times[name].append(taken)
        tokens = args.batch_size * args.new_tokens
        rates = {name: tokens / statistics.median(values) for name, values in times.items()}
        ratios = [b / f for f, b in zip(times["fused"], times["bare"], strict=True)]
        rounded = {name: round(rate, 1) for name, rate in rates.items()}
        print(
            json.dumps(
                {
                    "benchmark": "generation", "beams": beams, "tokens_per_second": rounded,
                    "ratio": round(rates["fused"] / rates["bare"], 3),
                    "ratio_of_each_turn": [round(min(ratios), 3), round(max(ratios), 3)],
                    "device": args.device, "machine": platform.machine(), "threads": torch.get_num_threads(),
                    "torch": torch.__version__, "transformers": transformers.__version__,
                    "shapes": {name: getattr(args, name) for name in
                               ("width", "layers", "vocab_size", "batch_size", "text_len", "new_tokens")},
                }
            )
        )  # fmt: skip


if __name__ == "__main__":
    main()
