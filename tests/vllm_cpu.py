"""Square-root ALiBi in vLLM's CPU attention, which vLLM itself has on GPUs only: for tests.vllm_served.

vLLM loads `register` in each of its processes, by an entry point that the tests write, and imports the rest by name.
Plain torch over the paged cache; its bias is vLLM's slopes times the root of the distance.
"""

from functools import cache

import torch
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend


def register():
    register_backend(AttentionBackendEnum.CPU_ATTN, "tests.vllm_cpu.Backend")


class Backend(CPUAttentionBackend):
    @classmethod
    def supports_alibi_sqrt(cls):
        return True

    @staticmethod
    def get_impl_cls():
        return Attention


@cache
def make_buffers():
    """Layers on several machines hand over through buffers that vLLM makes in a trial run. It leaves that out on a CPU
    with --enforce-eager, and the second machine would fail at the first answer."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    usual = CPUModelRunner.initialize_kv_cache

    def initialize(self, *given, **options):
        usual(self, *given, **options)
        if self.parallel_config.pipeline_parallel_size > 1:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )

    CPUModelRunner.initialize_kv_cache = initialize


class Attention(CPUAttentionBackendImpl):
    def __init__(self, *args, use_alibi_sqrt=False, **options):
        super().__init__(*args, **options)
        make_buffers()
        if not use_alibi_sqrt or self.sliding_window >= 0:
            raise NotImplementedError("this stand-in is for Step-1: square-root ALiBi over the whole context")

    def do_kv_cache_update(self, layer, key, value, kv_cache, slot_mapping):
        """kv_cache (blocks, G, block size, 2 d): keys, then values, of each place. Theirs has an order for kernels."""
        n, size = len(slot_mapping), kv_cache.shape[2]
        both = torch.cat([part[:n].view(n, self.num_kv_heads, self.head_size) for part in (key, value)], -1)
        used = slot_mapping >= 0  # the others are padding
        kv_cache[slot_mapping[used] // size, :, slot_mapping[used] % size] = both[used].to(kv_cache.dtype)

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, **scales):
        if attn_metadata is None:  # vLLM tries how much memory it needs
            return output
        starts, lengths = attn_metadata.query_start_loc.tolist(), attn_metadata.seq_lens.tolist()
        made, size = output.view(-1, self.num_heads, self.head_size), kv_cache.shape[2]
        for row, length in enumerate(lengths):
            new = slice(starts[row], starts[row + 1])  # of the sequence the last ids are new
            n_new = new.stop - new.start
            blocks = attn_metadata.block_table[row, : -(-length // size)].long()
            cached = kv_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length].to(query.dtype)  # (G, n, 2 d)
            distance = torch.arange(length - n_new, length)[:, None] - torch.arange(length)
            bias = -self.alibi_slopes.view(-1, 1, 1) * distance.clamp(min=0).sqrt()
            mask = bias.masked_fill(distance < 0, float("-inf")).to(query.dtype)
            asked = query[new].view(n_new, self.num_heads, self.head_size).transpose(0, 1)
            answer = torch.nn.functional.scaled_dot_product_attention(
                asked, *cached.chunk(2, -1), mask, scale=self.scale, enable_gqa=True
            )
            made[new] = answer.transpose(0, 1)
        return output
