"""Step-1, the language model of Step-Audio, as a transformers model, without remote code.

Its modules are those of `aqaa.backbone.layers`; here they meet transformers' masks, caches, outputs
and files. One class is the 130 B model (AQAA paper 2.2) and the 4 M one trained here.
"""

from dataclasses import asdict

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from aqaa.backbone import attention, inputs
from aqaa.backbone.layers import Head, Step1Attention, Step1DecoderLayer, Trunk


@strict
class Step1Config(PreTrainedConfig):
    """Sizes of a Step-1 model; fields as in the published config.json, defaults as in its class."""

    model_type = "step1"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "num_key_value_heads": "num_attention_groups",
        "max_position_embeddings": "max_seq_len",
    }
    base_model_tp_plan = {  # cut by outputs, then by inputs: one sum over GPUs for each block
        **{f"layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"},
        **{f"layers.*.mlp.{name}_proj": "colwise" for name in ("gate", "up")},
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "bias"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 65_536
    hidden_size: int = 5120
    intermediate_size: int = 13_312
    num_hidden_layers: int = 48
    num_attention_heads: int = 40
    num_attention_groups: int = 8
    max_seq_len: int = 4096
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 3
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False  # transformers 4 and vLLM assume True and lose lm_head
    bias_dtype: str = "float32"  # "model": distance bias in the dtype of the weights, as published

    def validate_architecture(self):
        heads, groups = self.num_attention_heads, self.num_attention_groups
        if self.hidden_size % heads or heads % groups:
            rule = f"divide hidden_size {self.hidden_size} and be a multiple of {groups} groups"
            raise ValueError(f"{heads} heads must {rule}")


class Step1AQAAConfig(Step1Config):
    """AQAA's own checkpoint: Step-1's fields, beside those of the parts that see pictures."""

    model_type = "mmgpt_step1_v2"


class Step1PreTrainedModel(PreTrainedModel):
    config: Step1Config
    config_class = Step1Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Step1DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = False
    _supports_attention_backend = False
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": Step1DecoderLayer, "attentions": Step1Attention}

    def __init__(self, config, *args, **kwargs):
        attention.check_implementation(config._attn_implementation)
        super().__init__(config, *args, **kwargs)

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        """Choose "sdpa" or "eager". Raises ValueError for any other."""
        one = not isinstance(attn_implementation, dict)
        for name in [attn_implementation] if one else attn_implementation.values():
            attention.check_implementation(name)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls):
        """transformers looks for its own call in this file; our layers read the name themselves."""
        return True


class Step1Model(Trunk, Step1PreTrainedModel):
    """Embedding, decoder layers, last norm."""

    def __init__(self, config):
        super().__init__(config)
        self.add_layers(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, cache=None,
        inputs_embeds=None, use_cache=None, segment_ids=None, past_key_values=None, seq_idx=None,
        cu_seq_lens_q=None, cu_seq_lens_k=None, **kwargs,
    ):  # fmt: skip
        """Hidden states of tokens (B, T), or of embeddings (B, T, D).

        attention_mask: (B, K) of ones and zeros, or (B, 1, T, K), which then says all. cache, or
        past_key_values: a Cache of transformers. segment_ids (B, T): several examples in one row,
        each of one number ≥ 1; 0 is padding; attention stays within an example, and no cache is
        made. Without them the examples are told as trainers do: by position_ids that start over,
        seq_idx, or cu_seq_lens_q. Of positions nothing else is used: the bias needs distances only.
        Raises TypeError for other keywords of that kind, ValueError for packed rows and a cache.
        """
        inputs.refuse_unknown(kwargs)
        attention.check_implementation(self.config._attn_implementation)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = inputs.one_cache(cache, past_key_values)
        n_query = hidden_states.shape[1]
        past, n_key = 0, n_query
        if cache is not None:  # a static one has more slots than tokens so far
            past, n_key = cache.get_seq_length(), cache.get_mask_sizes(n_query, 0)[0]
        inputs.check_mask(attention_mask, past, n_query, n_key)
        ends = cu_seq_lens_k if cu_seq_lens_q is None else cu_seq_lens_q
        marks = {"position_ids": position_ids, "seq_idx": seq_idx, "cu_seq_lens": ends}
        on_cpu = hidden_states.device.type == "cpu"
        by_runs = self.training and cache is None and not use_cache and on_cpu
        segment_ids = inputs.segments(
            hidden_states, attention_mask, segment_ids, marks, cache, past, by_runs
        )
        if segment_ids is not None:
            return BaseModelOutputWithPast(self._packed(hidden_states, segment_ids))
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        bias = self.bias(n_query, n_key, past)
        if attention_mask is not None:
            bias = attention.with_mask(bias, attention_mask)
        hidden_states = self.run(hidden_states, bias, cache)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{inputs.CACHE: cache})

    def _packed(self, hidden_states, segment_ids):
        """Packed rows: run by run on a CPU, through one mask on a GPU, which likes few large calls.

        Also through a mask where an example has gaps, for "eager", and where the call is compiled.
        """
        on_cpu = hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()
        by_runs = on_cpu and self.config._attn_implementation != "eager"
        sizes = attention.segment_sizes(segment_ids) if by_runs else None
        if sizes is not None:
            longest = max(max(sizes), 1)
            return self.run(hidden_states, self.bias(longest, longest), sizes=sizes)
        n = hidden_states.shape[1]
        same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]  # (B, 1, T, T)
        return self.run(hidden_states, attention.with_mask(self.bias(n, n), same))


class Step1ForCausalLM(Head, Step1PreTrainedModel, GenerationMixin):
    """Step1Model and its output layer (never tied to the embedding)."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    tokenizer = None  # if a TextTokenizer is put here, save_pretrained writes it too

    def __init__(self, config):
        super().__init__(config)
        self.model = Step1Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, cache=None,
        inputs_embeds=None, labels=None, use_cache=None, logits_to_keep=0, segment_ids=None,
        past_key_values=None, **kwargs,
    ):  # fmt: skip
        """Logits (B, T, V); see Step1Model.forward.

        labels (B, T), −100 where there is no loss, are shifted here.
        """
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            cache=cache, inputs_embeds=inputs_embeds, use_cache=use_cache, segment_ids=segment_ids,
            past_key_values=past_key_values, **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss, size = None, self.config.vocab_size
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=out.hidden_states, attentions=out.attentions,
            **{inputs.CACHE: getattr(out, inputs.CACHE)},
        )  # fmt: skip

    def generate(self, *args, cache=None, past_key_values=None, **kwargs):
        """GenerationMixin.generate; the cache may have either name, in all transformers."""
        if (cache := inputs.one_cache(cache, past_key_values)) is not None:
            kwargs[inputs.CACHE] = cache
        return super().generate(*args, **kwargs)

    def save_pretrained(self, save_directory, is_main_process=True, *args, **kwargs):
        """PreTrainedModel.save_pretrained, and the tokenizer if there is one, for AutoTokenizer."""
        if self.tokenizer is not None and is_main_process:
            self.tokenizer.save_pretrained(save_directory)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)


def build(backbone, **overrides):
    """A Step1ForCausalLM with fresh weights from a config.BackboneConfig."""
    return Step1ForCausalLM(Step1Config(**asdict(backbone), **overrides))


def from_plain(plain):
    """A Step1ForCausalLM around the very modules of a layers.PlainStep1: they share changes."""
    if isinstance(plain, Step1ForCausalLM):
        return plain
    with torch.device("meta"):  # its own modules are thrown away at once
        model = build(plain.config)
    for name in ("embed_tokens", "layers", "norm", "one_token"):
        setattr(model.model, name, getattr(plain.model, name))
    model.lm_head = plain.lm_head
    for layer in model.model.layers:
        layer.self_attn.config = model.config  # where set_attn_implementation writes
    return model.train(plain.training)


AutoConfig.register(Step1Config.model_type, Step1Config, exist_ok=True)
AutoConfig.register(Step1AQAAConfig.model_type, Step1AQAAConfig, exist_ok=True)
AutoModelForCausalLM.register(Step1Config, Step1ForCausalLM, exist_ok=True)
