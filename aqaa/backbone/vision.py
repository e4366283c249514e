"""How Step-1 sees: a picture becomes rows of a prompt, beside the embeddings of its ids.

The parts and their order are those of published sisters of the model (AQAA paper 2.2 says that
Step-Omni reads pictures, not how): CLIP-ViT without its class token, two convolutions over the
grid of patches, a projector to the width of the backbone. Shapes: B pictures of S · S pixels, N
patches of C channels, P rows of a prompt of width D.
"""

from math import isqrt
from pathlib import Path

import numpy as np
import torch
from torch import nn

from aqaa.backbone.lora import LoRA

LARGEST = 64_000_000  # pixels; a small file can hold many more


class PictureError(ValueError):
    """A picture that cannot be used; its text says why, in one sentence."""


def pixels(picture, size):
    """A picture (a path, bytes in a BytesIO, an image of PIL, uint8 (H, W, 3)) -> (3, S, S), -1..1.

    What is not square gets white margins, as does what is transparent. Raises PictureError.
    """
    from PIL import Image, ImageOps

    named = str(picture) if isinstance(picture, (str, Path)) else "the picture"
    try:
        if isinstance(picture, (str, Path)) or hasattr(picture, "getvalue"):
            picture = Image.open(picture)
        elif not isinstance(picture, Image.Image):
            picture = Image.fromarray(np.asarray(picture))
        width, height = picture.size  # its head alone is read so far
        if fits := width * height <= LARGEST:
            picture = ImageOps.exif_transpose(picture).convert("RGBA")  # as its camera was held
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as fault:
        missing = isinstance(fault, FileNotFoundError)
        remedy = "check its name" if missing else "give a PNG, JPEG, WebP or GIF"
        what = "is not there" if missing else "is no picture that can be read"
        raise PictureError(f"{named} {what}: {remedy}.") from None
    if not fits:
        fault = f"{named} has {width} x {height} pixels, more than {LARGEST // 10**6} million"
        raise PictureError(f"{fault}: make it smaller.")
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    small = square.convert("RGB").resize((size, size), Image.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1).float() / 127.5 - 1


def patches(config):
    """The ids that hold the place of a picture in a prompt: one a row, between two markers."""
    ids = config.ids
    return [ids.im_start, *[ids.im_patch] * config.vision.rows, ids.im_end]


class Vision(nn.Module):
    """Pictures (B, 3, S, S) → rows (B, P, D). config: AQAAConfig."""

    def __init__(self, config):
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModel  # seconds: only who sees waits

        self.ids, self.config = config.ids, config.vision
        own = ("output_hidden_size", "understand_projector_stride", "lora_rank")
        sizes = {name: size for name, size in vars(self.config).items() if name not in own}
        model = CLIPVisionModel(CLIPVisionConfig(**sizes))
        self.vision_model = getattr(model, "vision_model", model)
        channels = self.config.output_hidden_size
        stride, width = self.config.understand_projector_stride, config.backbone.hidden_size
        self.vit_downsampler = nn.Conv2d(self.config.hidden_size, channels, 2, stride)
        self.vit_downsampler2 = nn.Conv2d(channels, 2 * channels, 3, 2, 1)
        self.vit_large_projector = nn.Linear(2 * channels, width, bias=False)
        self.lora = LoRA(config.backbone, self.config.lora_rank)

    def forward(self, pictures):
        hidden = self.vision_model(pixel_values=pictures).last_hidden_state[:, 1:]  # (B, N, C)
        side = isqrt(hidden.shape[1])
        grid = hidden.transpose(1, 2).unflatten(2, (side, side))  # (B, C, √N, √N)
        # Neighbours become one row, twice: a picture shall not fill the context.
        grid = self.vit_downsampler2(self.vit_downsampler(grid))
        return self.vit_large_projector(grid.flatten(2).transpose(1, 2))

    def embedded(self, embeddings, ids, pictures):
        """Embeddings (B, T, D) of ids (B, T), in which rows of pictures (M, 3, S, S), in their
        order, take the places of the ids that wait for them."""
        rows = self(pictures).flatten(0, 1).to(embeddings.dtype)  # (M P, D)
        return embeddings.masked_scatter((ids == self.ids.im_patch)[..., None], rows)

    def adapted(self, backbone):
        """The backbone as it is where there is a picture: itself, or a copy with `lora` added."""
        return self.lora.added(backbone) if self.config.lora_rank else backbone
