"""Step-1 in vLLM, taken out of AQAA's checkpoint. vLLM imports it by name (see plugin.register)."""

from vllm.model_executor.models.step1 import Step1ForCausalLM
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from aqaa.scale.vllm.client import ATTENTION
from aqaa.scale.vllm.plugin import language_weights


class Step1AQAAForCausalLM(Step1ForCausalLM):
    """vLLM's class, with the backend of the distance bias, lm_head untied, no vision towers."""

    def __init__(self, *, vllm_config, prefix=""):
        attention = vllm_config.attention_config
        attention.backend = attention.backend or AttentionBackendEnum[ATTENTION]
        vllm_config.model_config.hf_config.tie_word_embeddings = False
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def load_weights(self, weights):
        return super().load_weights(language_weights(weights))
