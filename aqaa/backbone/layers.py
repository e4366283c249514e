"""The decoder of Step-1 in plain torch: what both sizes, every engine and transformers share.

RMSNorm, grouped-query attention with a square-root distance bias, and SwiGLU; no biases, no
rotation, no tied embeddings (AQAA paper 2.2). Nothing here knows transformers, whose import takes
twice as long as torch's and would delay the first answer: `aqaa.backbone.step1` makes a
transformers model of these same modules. Shapes: B rows, T tokens, D hidden_size, H heads of d
values, G groups of keys and values, V ids.
"""

import torch
import torch.nn.functional as F
from torch import nn

from aqaa.backbone import attention


class Step1RMSNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) · weight; mean in fp32, products in the dtype of x."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        if x.dtype == torch.float32:  # torch's own is the same in one pass
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)  # (…, 1)
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
        self.scaling = self.head_dim**-0.5  # keeps q·k of the size of one product, whatever d is
        shared = config.num_attention_groups * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, shared, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, shared, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x, bias, cache=None, sizes=None):
        """x (B, T, D) → (output (B, T, D), weights (B, H, T, K) or None).

        bias (B|1, H, T, K). cache: its update(keys, values, layer) returns those of all K tokens so
        far; one that has `attend`, as fast/graph_decoder.py's, also brings its own attention and
        needs no bias. sizes: the rows are packed examples, see attention.segments.
        """
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (proj(x).view(shape) for proj in (self.q_proj, self.k_proj, self.v_proj))
        bias, weights = attention.local_heads(bias, q.shape[2]), None  # q (B, T, H, d)
        if sizes is not None:
            q, k, v = (y.flatten(0, 1) for y in (q, k, v))  # (B·T, H or G, d)
            out = attention.segments(q, k, v, bias, sizes, self.scaling)
        else:
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, H or G, T, d)
            if cache is not None:  # earlier keys and values are not computed again
                k, v = cache.update(k, v, self.layer_idx)  # (B, G, K, d)
            if hasattr(cache, "attend"):
                out = cache.attend(q, k, v, self.scaling)
            elif getattr(self.config, "_attn_implementation", None) == "eager":
                out, weights = attention.eager(q, k, v, bias, self.scaling)
            else:
                out = attention.sdpa(q, k, v, bias, self.scaling)
            out = out.transpose(1, 2)  # (B, T, H, d)
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
        # Both parts only add to the stream, so gradients and early features pass all layers.
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(normed, bias, cache, sizes)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class Trunk:
    """Embedding, decoder layers and last norm: `embed_tokens`, `layers`, `norm`.

    A class of nn.Module mixes it in. config: sizes as of config.BackboneConfig, or a Step1Config.
    """

    gradient_checkpointing = False  # set by transformers' gradient_checkpointing_enable()
    one_token = None  # fast/cpu_step.py puts a faster `run` of a single token here

    def add_layers(self, config):
        """Make the modules, with fresh weights."""
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        layers = (Step1DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.layers = nn.ModuleList(layers)
        self.norm = Step1RMSNorm(config.hidden_size, config.rms_norm_eps)

    def run(self, hidden_states, bias, cache=None, sizes=None):
        """The layers and the last norm, (B, T, D) → (B, T, D): what all ways of use share."""
        if self.one_token is not None:
            out = self.one_token(self, hidden_states, bias, cache)
            if out is not None:
                return out
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                # Keep no activations: the backward pass computes them once more.
                again = self._gradient_checkpointing_func
                hidden_states = again(layer.__call__, hidden_states, bias, cache, sizes)
            else:
                hidden_states = layer(hidden_states, bias, cache, sizes)
        return self.norm(hidden_states)

    def bias(self, n_query, n_key, first=0):
        """The distance bias (1, H, Q, K) of queries at slots first, first+1, … on our device."""
        weight = self.embed_tokens.weight
        slope = attention.slopes(self.config.num_attention_heads).to(weight.device)
        bias = attention.sqrt_bias(slope, n_query, n_key, first)
        rounded = getattr(self.config, "bias_dtype", "float32") == "model"
        return bias.to(weight.dtype) if rounded else bias


class Head:
    """`model`, a Trunk, and `lm_head`, the output layer."""

    def logits(self, hidden_states, positions=None, rows=None):
        """Logits of next ids, only where they are wanted: (P, R), or (…, R) without positions.

        hidden_states (B, T, D) or (…, D). positions: bool (B, T), or indices of the flattened
        (B·T,). rows: a slice or ids (R,) of the vocabulary.
        """
        if positions is not None:
            chosen = positions.flatten() if positions.dtype == torch.bool else positions
            hidden_states = hidden_states.flatten(0, -2)[chosen]  # (P, D)
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
    """A Step-1 model for hidden states (`model.run`) and `logits`: all that an answer takes.

    Its weights have the published names. `step1.from_plain` makes a transformers model of it.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.model = config, PlainTrunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
