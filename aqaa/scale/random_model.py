"""A model of any size with random weights, to be timed."""

import torch

from aqaa.backbone import layers, quantized_linear, step1
from aqaa.weights.verify import skip_init

STD = 0.02  # of random weights


class Words:
    """Stands in for a text tokenizer: an id for every few letters, and no letters for any id."""

    def __init__(self, ids):
        self.ids = ids

    def encode(self, text, **_):
        return [self.ids.first_text + len(text) % 7] * (len(text) // 4 + 1)

    def decode(self, ids):
        return ""


def random_backbone(backbone, weights, group, device, dtype, seed=0):
    """A Step1ForCausalLM of true size with random weights, quantised or not, drawn on `device`."""
    with torch.device("meta"), skip_init():  # so no more memory is used than the model takes
        model = step1.build(backbone).to(dtype).eval()
    quantized_linear.empty_linears(model, weights, group)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for part in model.modules():
        if isinstance(part, quantized_linear.QuantizedLinear):
            draw(part, generator)
        elif isinstance(part, layers.Step1RMSNorm):
            part.weight.data.fill_(1.0)
        elif isinstance(part, torch.nn.Embedding | torch.nn.Linear):
            part.weight.data.normal_(0, STD, generator=generator)
    return model


def draw(layer, generator):
    """Fill a QuantizedLinear with random weights, in place."""
    low = -127 if layer.qweight.dtype == torch.int8 else 0
    layer.qweight.random_(low, 128 if low else 256, generator=generator)
    if layer.name == "fp8":
        layer.qweight.bitwise_and_(0b1011_1111)  # below 2, and never NaN
    layer.scale.fill_(STD / layer.unpack(layer.qweight[:8]).std().item())
    return layer
