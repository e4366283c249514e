"""Linear layers whose weights have 4 or 8 bits; activations stay as they are.

int4 keeps a scale for each `group` inputs of each output, int8 and fp8 one for each output. All
three are symmetric: weight = code · scale. Codes come from rounding to the nearest, with a search
for the scale that errs least, or from GPTQ (Frantar et al. 2023). `forward` is the reference:
unpack, then an ordinary product; aqaa/fast/triton_kernels.py does it in one pass. Shapes: W (N, K).
"""

import torch
import torch.nn.functional as F
from torch import nn

from aqaa.config import check_group

DTYPE = torch.bfloat16  # of the scales
SHRINK = torch.linspace(1, 0.65, 15)  # what the search multiplies the widest scale by
DAMP = 0.01  # of the mean of the Hessian's diagonal, added to it
AT_ONCE = 1 << 24  # weights rounded together
BLOCK = 128  # inputs that GPTQ rounds before it updates all later ones


class QuantizedLinear(nn.Module):
    """y = x Wᵀ without a bias, W kept as codes and scales; subclasses say how a code is stored.

    Buffers: `qweight` (layout: see the subclass) and `scale` (N, K / group) bfloat16. Both may live
    on `meta`. Raises ValueError if the group does not divide K.
    """

    name, bits, group_by_default = "", 8, None  # no group: one scale for each output
    storage = torch.uint8  # dtype of `qweight`
    lowest, highest, top = 0.0, 0.0, 0.0  # range of the codes, and the code of the largest weight
    product = None  # a faster function (layer, x) → y: see aqaa/fast/graph_decoder.py

    def __init__(self, in_features, out_features, group=None, device=None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.group = group or self.group_by_default or in_features
        check_group(in_features, self.group)
        width, groups = in_features * self.bits // 8, in_features // self.group
        for name, size, dtype in (("qweight", width, self.storage), ("scale", groups, DTYPE)):
            buffer = torch.empty(out_features, size, dtype=dtype, device=device)
            self.register_buffer(name, buffer)

    @classmethod
    def from_weights(cls, weight, group=None, hessian=None, search=True):
        """Quantise `weight` (N, K); hessian (K, K), the mean of x xᵀ over inputs: round by GPTQ."""
        group = group or cls.group_by_default or weight.shape[1]
        check_group(weight.shape[1], group)
        # Rounding takes some rows at a time: the search needs several copies in fp32.
        rows = max(1, AT_ONCE // weight.shape[1]) if hessian is None else len(weight)
        scales, codes = [], []
        for part in weight.split(rows):
            scale = find_scale(cls, part, group, search)
            if hessian is None:
                grouped = part.float().unflatten(1, (-1, group))  # (n, K / group, group)
                rounded = cls.nearest(grouped / scale.float()[..., None]).flatten(1)
            else:
                rounded = gptq(cls, part, scale, hessian)
            codes.append(cls.pack(rounded))
            scales.append(scale)
        layer = cls(weight.shape[1], weight.shape[0], group, "meta")
        layer.qweight, layer.scale = torch.cat(codes), torch.cat(scales)
        return layer

    @classmethod
    def from_linear(cls, linear, group=None, **options):
        """Quantise an nn.Linear; see from_weights. Raises ValueError if it has a bias."""
        if linear.bias is not None:
            raise ValueError("a layer with a bias cannot be quantised: Step-1 has none")
        return cls.from_weights(linear.weight.detach(), group, **options)

    @classmethod
    def nearest(cls, x):
        """The code nearest to each number, as float32."""
        return x.round().clamp_(cls.lowest, cls.highest)

    @classmethod
    def pack(cls, codes):
        """Codes (N, K) float32 → `qweight`."""
        return codes.to(cls.storage)

    @classmethod
    def unpack(cls, qweight):
        """`qweight` → codes (N, K) float32."""
        return qweight.float()

    def codes(self):
        """All codes (N, K) float32."""
        return self.unpack(self.qweight)

    def dequantized(self, dtype=torch.float32):
        """W (N, K) in `dtype`; code · scale is rounded once, from fp32."""
        codes = self.codes().unflatten(1, (-1, self.group))  # (N, K / group, group)
        return (codes * self.scale.float()[..., None]).flatten(1).to(dtype)

    def forward(self, x):
        return self.product(self, x) if self.product else F.linear(x, self.dequantized(x.dtype))

    def extra_repr(self):
        return f"{self.in_features}, {self.out_features}, {self.name}, group={self.group}"


class Int4Linear(QuantizedLinear):
    """Two codes a byte.

    `qweight` uint8 (N, K/2), contiguous: byte [n, j] holds input k = 2j in its low nibble and
    k = 2j + 1 in its high one; code = nibble − 8, in −8 … 7. `scale` (N, K/group): groups are runs
    of inputs, W[n, k] = (nibble − 8) · scale[n, k // group]. A scale may be negative: its sign lets
    the largest weight of the group fall on the side of −8, which has one step more.
    """

    name, bits, group_by_default = "int4", 4, 128
    lowest, highest, top = -8.0, 7.0, -8.0

    @classmethod
    def pack(cls, codes):
        nibbles = (codes + 8).to(torch.uint8)
        return nibbles[:, 0::2] | nibbles[:, 1::2] << 4

    @classmethod
    def unpack(cls, qweight):
        return torch.stack((qweight & 15, qweight >> 4), -1).flatten(1).float() - 8


class Int8Linear(QuantizedLinear):
    """`qweight` int8 (N, K), codes −127 … 127; `scale` (N, 1)."""

    name, storage = "int8", torch.int8
    lowest, highest, top = -127.0, 127.0, 127.0


class Fp8Linear(QuantizedLinear):
    """`qweight` uint8 (N, K), the bytes of float8_e4m3fn; `scale` (N, 1).

    As uint8 they survive `model.to(dtype)`; `.view(torch.float8_e4m3fn)` costs nothing.
    """

    name = "fp8"
    lowest, highest, top = -448.0, 448.0, 448.0

    @classmethod
    def nearest(cls, x):
        return x.clamp(cls.lowest, cls.highest).to(torch.float8_e4m3fn).float()

    @classmethod
    def pack(cls, codes):
        return codes.to(torch.float8_e4m3fn).view(torch.uint8)

    @classmethod
    def unpack(cls, qweight):
        return qweight.view(torch.float8_e4m3fn).float()


FORMATS = {cls.name: cls for cls in (Int4Linear, Int8Linear, Fp8Linear)}


def find_scale(cls, weight, group, search=True):
    """Scales (N, K / group) of `weight` (N, K) in DTYPE, for the format `cls`.

    The largest weight of a group gets the code cls.top. With 4 bits a search shrinks the scale
    where cutting the largest weights costs less squared error than coarse steps for all others.
    """
    grouped = weight.float().unflatten(1, (-1, group))  # (N, K / group, group)
    extreme = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))  # (N, K / group, 1)
    widest = extreme / cls.top if cls.top < 0 else extreme.abs() / cls.top
    widest = torch.where(extreme == 0, 1.0, widest)
    best, least = widest.to(DTYPE), torch.full_like(widest, torch.inf)
    for share in SHRINK.tolist() if search and cls.bits == 4 else ():
        scale = (widest * share).to(DTYPE)
        rounded = cls.nearest(grouped / scale.float()) * scale.float()
        error = (rounded - grouped).square_().sum(-1, keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best[..., 0]


def gptq(cls, weight, scale, hessian):
    """Codes (N, K) of `weight` by GPTQ: inputs that matter most first, later ones correct errors.

    scale (N, K / group) is known beforehand, so the order of the inputs is free ("act order" with
    static groups). hessian (K, K): the mean of x xᵀ. Raises ValueError if it is not finite.
    """
    if not hessian.isfinite().all():
        fault = "the calibration dialogues gave activations that are not finite"
        raise ValueError(f"{fault}: the weights are damaged")
    weight, hessian = weight.float(), hessian.to(weight.device, torch.float32).clone()
    diagonal = hessian.diagonal()  # a view
    diagonal += DAMP * diagonal.mean().clamp(min=1e-8)
    order = diagonal.argsort(descending=True)
    weight, hessian = weight[:, order], hessian[order][:, order]
    step = scale.float().repeat_interleave(weight.shape[1] // scale.shape[1], 1)[:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty_like(weight)
    # Row i of `upper` says how each later input best makes up for an error at input i.
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        errors = torch.zeros_like(weight[:, start:end])
        for i in range(start, end):
            codes[:, i] = cls.nearest(weight[:, i] / step[:, i])
            error = (weight[:, i] - codes[:, i] * step[:, i]) / upper[i, i]
            weight[:, i + 1 : end] -= error[:, None] * upper[i, i + 1 : end]
            errors[:, i - start] = error
        weight[:, end:] -= errors @ upper[start:end, end:]
    return codes[:, order.argsort()]


def empty_linears(module, weights, group=None, skip=("lm_head",), device="meta"):
    """Replace the linear layers within `module` by empty ones of a format, to be filled."""
    cls = format_of(weights)
    for name, linear in list(linears(module, skip)):
        module.set_submodule(name, cls(linear.in_features, linear.out_features, group, device))
    return module


def format_in(data):
    """{"weights", "group"} of what a file says of its format. Raises ValueError."""
    data = data if isinstance(data, dict) else {}
    weights, group = data.get("weights"), data.get("group")
    if not isinstance(weights, str) or weights not in FORMATS:
        names = ", ".join(FORMATS)
        raise ValueError(f"its format is {str(weights):.40}, one of {names} is expected")
    if group is not None and (type(group) is not int or group < 1):
        raise ValueError(f"its group is {str(group):.40}, a number of inputs is expected")
    return {"weights": weights, "group": group}


def format_within(module):
    """The same of the quantised layers within a module; None if there are none."""
    layer = next((part for part in module.modules() if isinstance(part, QuantizedLinear)), None)
    return layer and {"weights": layer.name, **({"group": layer.group} if layer.bits == 4 else {})}


def numbers(module, name, tensor):
    """The tensor `name` of a module's state as numbers: the bytes of fp8 codes may be NaN."""
    owner, _, leaf = name.rpartition(".")
    fp8 = leaf == "qweight" and isinstance(module.get_submodule(owner), Fp8Linear)
    return tensor.view(torch.float8_e4m3fn) if fp8 else tensor


def format_of(weights):
    """The class of a format's name. Raises ValueError for an unknown one."""
    if weights not in FORMATS:
        raise ValueError(f"unknown format {weights!r}: choose one of {', '.join(FORMATS)}")
    return FORMATS[weights]


def linears(module, skip=()):
    """(name, nn.Linear) of those within `module` whose name does not end in one of `skip`."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) and not name.endswith(tuple(skip)):
            yield name, part
