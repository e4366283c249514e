"""What a backbone learnt last, kept apart from it: to see, and to answer second questions.

The mini learnt both when all else was learnt. Each is added to a copy of its weights, which answers
where there is a picture, or a turn before; everywhere else the backbone is what it was. The full
model learnt them with the rest and has neither.
"""

from copy import deepcopy

import torch
from torch import nn

from aqaa.backbone.layers import Step1DecoderLayer


class LoRA(nn.Module):
    """Low-rank changes of a trunk's matrices, W + up · down (2106.09685), all layers in one."""

    def __init__(self, config, rank):
        super().__init__()
        self.layers, self.names = config.num_hidden_layers, {}
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        with torch.device("meta"):  # for its shapes
            layer = Step1DecoderLayer(config, 0)
        for name, linear in layer.named_modules() if rank else ():
            if isinstance(linear, nn.Linear):
                n, k = linear.weight.shape
                key = name.rpartition(".")[2]
                self.names[key] = name
                self.down[key] = nn.Parameter(torch.randn(self.layers, rank, k) / k**0.5)
                self.up[key] = nn.Parameter(torch.zeros(self.layers, n, rank))  # no change yet

    def changes(self):
        """(name of a weight in the trunk, its change (N, K)), one by one."""
        for key, name in self.names.items():
            for layer, change in enumerate(self.up[key] @ self.down[key]):
                yield f"layers.{layer}.{name}.weight", change

    def added(self, backbone):
        """A copy of a backbone with the changes added, in eval mode."""
        backbone = deepcopy(backbone)
        with torch.no_grad():
            for name, change in self.changes():
                backbone.model.get_parameter(name).add_(change)
        return backbone.eval()


class Turns(LoRA):
    """What the mini learnt about second questions; without turns before it stays what it was.

    config: AQAAConfig.
    """

    RANK = 8

    def __init__(self, config):
        super().__init__(config.backbone, self.RANK)
