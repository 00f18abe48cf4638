"""Models whose heads have a linear probe with random weights."""

import torch
from tiny import MAPPED_ENCODERS, make_config, open_gates

from mm_transformers import MMTransformerForMultiTask
from mm_transformers.model.linear_probe import LinearProbe


def set_probes(model, **scales: float) -> None:
    """Random weights for all probes, the same at each call; those of a modality times its scale."""
    generator = torch.Generator().manual_seed(7)
    for part in model.modules():
        if isinstance(part, LinearProbe):
            with torch.no_grad():
                part.linear.weight.copy_(2 * torch.randn(part.linear.weight.shape, generator=generator))
                part.linear.bias.copy_(torch.randn(part.linear.bias.shape, generator=generator))
                for name, (block, _) in zip(part.widths, part.blocks, strict=True):
                    part.linear.weight[:, block] *= scales.get(name, 1.0)


def make_probed(vision="vit", gates_open=True, **kwargs) -> MMTransformerForMultiTask:
    """What the fusion adds is as large as what the probes say, so that each is seen to go wrong."""
    torch.manual_seed(0)
    config = make_config(vision="vit" if vision in MAPPED_ENCODERS else vision, linear_probe=True, **kwargs)
    config.initializer_range = 0.3
    if vision in MAPPED_ENCODERS:
        config.vision_config = MAPPED_ENCODERS[vision]()
    model = MMTransformerForMultiTask(config).eval()
    if gates_open:
        open_gates(model)
    set_probes(model)
    return model
