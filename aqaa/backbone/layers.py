"""The decoder of Step-1 in plain torch: what both sizes, every engine and transformers' form have in common.

RMSNorm, grouped-query attention with a square-root distance bias, and SwiGLU; no biases, no rotation, no tied
embeddings (AQAA paper 2.2). Nothing here knows transformers: to import it takes twice as long as torch, which the first
answer would notice. `aqaa.backbone.step1` makes a transformers model of these same modules.
"""

import torch
import torch.nn.functional as F
from torch import nn

from aqaa.backbone import attention


class _TrainNorm(torch.autograd.Function):
    """RMSNorm of fp32 x (…, D) that answers in `dtype`, written for few passes over memory: a CPU trains 1/6 faster."""

    @staticmethod
    def forward(ctx, x, weight, eps, dtype):
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight)
        return (x * scale).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        x, scale, weight = ctx.saved_tensors
        shape, grad, x, scale = x.shape, grad.flatten(0, -2).float(), x.flatten(0, -2), scale.flatten(0, -2)
        product = grad * x
        grad_weight = (product.t() @ scale)[:, 0]
        along = (product @ weight)[:, None].mul_(scale.pow(3)).div_(-x.shape[-1])
        return (grad * weight).mul_(scale).addcmul_(x, along).view(shape), grad_weight, None, None


class Step1RMSNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) · weight; mean in fp32, products in the dtype of x (not so in Llama)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        if x.dtype == torch.float32 and torch.is_autocast_enabled("cpu") and x.device.type == "cpu" and x.requires_grad:
            return _TrainNorm.apply(x, self.weight, self.eps, torch.get_autocast_dtype("cpu"))
        if x.dtype == torch.float32:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return x * scale.to(x.dtype) * self.weight


class Step1MLP(nn.Module):
    """SwiGLU: down(silu(gate x) · up x)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Step1Attention(nn.Module):
    """Queries of all heads; keys and values of a few groups, each shared by several heads (GQA)."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        shared = config.num_attention_groups * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, bias, cache=None, sizes=None):
        """x (B, T, D) → (output (B, T, D), weights or None). bias (B|1, H, T, K); sizes: see attention.segments."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(x).view(shape) for proj in (self.q_proj, self.k_proj, self.v_proj))  # (B, T, heads, d)
        bias, weights = attention.local_heads(bias, q.shape[2]), None
        if sizes is not None:
            q, k, v = (y.flatten(0, 1) for y in (q, k, v))
            out = attention.segments(q, k, v, bias, sizes, self.scaling)
        else:
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, heads, T, d)
            if cache is not None:
                k, v = cache.update(k, v, self.layer_idx)
            if getattr(self.config, "_attn_implementation", None) == "eager":
                out, weights = attention.eager(q, k, v, bias, self.scaling)
            else:
                out = attention.sdpa(q, k, v, bias, self.scaling)
            out = out.transpose(1, 2)
        return self.o_proj(out.reshape(*x.shape[:-1], -1)), weights


class Step1DecoderLayer(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = Step1Attention(config, layer_idx)
        self.mlp = Step1MLP(config)
        self.input_layernorm = Step1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = Step1RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, bias, cache=None, sizes=None):
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), bias, cache, sizes)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Trunk:
    """Embedding, decoder layers and last norm: `embed_tokens`, `layers`, `norm`; a class of nn.Module adds its own way.

    config: sizes as of config.BackboneConfig, or a Step1Config.
    """

    gradient_checkpointing = False  # set by transformers' gradient_checkpointing_enable()

    def add_layers(self, config):
        """Make the modules, with fresh weights."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(Step1DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Step1RMSNorm(config.hidden_size, config.rms_norm_eps)

    def run(self, hidden_states, bias, cache=None, sizes=None):
        """The layers and the last norm, nothing else: (B, T, D) → (B, T, D). What `forward` and our decoder share."""
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:  # keep no activations: the backward pass makes them anew
                hidden_states = self._gradient_checkpointing_func(layer.__call__, hidden_states, bias, cache, sizes)
            else:
                hidden_states = layer(hidden_states, bias, cache, sizes)
        return self.norm(hidden_states)

    def bias(self, n_query, n_key, first=0):
        """The distance bias (1, H, Q, K) of queries at slots first, first+1, …, on the model's device."""
        slope = attention.slopes(self.config.num_attention_heads).to(self.embed_tokens.weight.device)
        bias = attention.sqrt_bias(slope, n_query, n_key, first)
        rounded = getattr(self.config, "bias_dtype", "float32") == "model"
        return bias.to(self.embed_tokens.weight.dtype) if rounded else bias


class Head:
    """`model`, a Trunk, and `lm_head`, the output layer."""

    def logits(self, hidden_states, positions=None, rows=None):
        """Scores of next ids, only where they are wanted.

        hidden_states (B, T, D) or (…, D); positions: bool (B, T) or an index of the flattened (B·T,), which positions;
        rows: slice, or ids (R,), which part of the vocabulary. Returns (P, R), or (…, R) if positions is None.
        """
        if positions is not None:
            flat = hidden_states.flatten(0, -2)
            hidden_states = flat[positions.flatten() if positions.dtype == torch.bool else positions]
        if rows is None:
            return self.lm_head(hidden_states)
        if type(self.lm_head) is not nn.Linear:  # a quantised layer has no rows to take
            return self.lm_head(hidden_states)[..., rows]
        return F.linear(hidden_states, self.lm_head.weight[rows])


class PlainTrunk(Trunk, nn.Module):
    """The trunk and nothing else."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.add_layers(config)


class PlainStep1(Head, nn.Module):
    """A Step-1 model that can be asked for hidden states (`model.run`) and for logits: all that an answer takes.

    Names of weights are those of the published checkpoints. `step1.from_plain` makes a transformers model of it.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.model = config, PlainTrunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
