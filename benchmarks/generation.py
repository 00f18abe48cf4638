"""
How fast does the fused model write, beside the encoder-decoder that it is made of?

Both get the states that their encoders have given, so that what is timed is the writing alone: the same decoder, the
same number of tokens, greedy and with beams.

    python benchmarks/generation.py
"""

import torch
from harness import in_turns, parser, prepare, report
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
    made = parser(__doc__, size=None, repeats=5)
    made.add_argument("--width", type=int, default=512)
    made.add_argument("--layers", type=int, default=6)
    made.add_argument("--vocab_size", type=int, default=32_000)
    made.add_argument("--batch_size", type=int, default=8)
    made.add_argument("--text_len", type=int, default=32)
    made.add_argument("--new_tokens", type=int, default=32)
    made.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    args = made.parse_args()
    prepare(args)
    dtype = getattr(torch, args.dtype)
    model = make_model(args.width, args.layers, args.vocab_size, args.new_tokens).to(args.device, dtype)
    bare = AutoModelForSeq2SeqLM.from_config(model.config.text_config).to(args.device, dtype).eval()
    bare.load_state_dict(model.model.text_model.state_dict())
    ids = torch.randint(3, args.vocab_size, (args.batch_size, args.text_len), device=args.device)
    pixels = torch.randn(args.batch_size, 3, 224, 224, device=args.device, dtype=dtype)
    mask = torch.ones_like(ids)
    length = dict(min_new_tokens=args.new_tokens, max_new_tokens=args.new_tokens)
    with torch.no_grad():
        fused_states = model.model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
        bare_states = bare.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
    names = ("width", "layers", "vocab_size", "batch_size", "text_len", "new_tokens")
    for beams in args.beams:
        ways = {
            # A fresh output each time: beams are written into it.
            "bare": lambda beams=beams: bare.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=bare_states),
                attention_mask=mask,
                num_beams=beams,
                **length,
            ),
            "fused": lambda beams=beams: model.generate("german", fused_states, num_beams=beams, **length),
        }
        seconds = in_turns(ways, args.repeats, args.device, warmup=1)
        tokens = args.batch_size * args.new_tokens
        per_token = {way: [each / tokens for each in values] for way, values in seconds.items()}
        shapes = {name: getattr(args, name) for name in names}
        report("generation, seconds per token", per_token, "bare", args, beams=beams, **shapes)


if __name__ == "__main__":
    main()
