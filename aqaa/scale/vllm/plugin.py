"""What vLLM loads of this package: Step-1's configurations, AQAA's checkpoint, a logits processor.

`register` is called in each of vLLM's processes (entry point vllm.general_plugins). `Layouts` is no
entry point: vLLM would load it for every model, and its older model runner does not hand the drawn
ids to processors that it found by itself. Without vLLM this module still imports."""

import logging
from contextlib import suppress
from importlib import import_module
from itertools import islice

from aqaa.scale.vllm.client import MODEL_CLASS, TESTED, version
from aqaa.scale.vllm.rules import KEY, Follower, Rules

PROCESSORS = (  # base classes of the V2 and of the older model runner; either may load our class
    "vllm.v1.worker.gpu.sample.logits_processor",
    "vllm.v1.sample.logits_processor",
)
log = logging.getLogger(__name__)


def register():
    """Make vLLM know step1, mmgpt_step1_v2 and our class. Raises EngineError without vLLM."""
    if (installed := version()) != TESTED:
        log.warning("aqaa was tested with vLLM %s, this is %s: install that version if it fails.",
                    TESTED, installed)  # fmt: skip
    from vllm import ModelRegistry

    from aqaa.backbone import step1  # noqa: F401  (registers the configurations with transformers)

    ModelRegistry.register_model(MODEL_CLASS, f"aqaa.scale.vllm.model:{MODEL_CLASS}")
    with suppress(ImportError, AttributeError):  # another version, with another place for it
        _check_prompts()


def _check_prompts():
    """Let vLLM refuse ids that the model has not. It compares them with those of its tokenizer, and
    we start it without one: a single such prompt would end the engine for all listeners."""
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.base import BaseRenderer

    theirs = BaseRenderer.validate_token_ids

    def validate_token_ids(self, token_ids, **options):
        theirs(self, token_ids, **options)
        if self.tokenizer is None:
            count = self.model_config.get_vocab_size()
            if wrong := [token for token in token_ids if not 0 <= token < count]:
                raise VLLMValidationError(f"Token id {wrong[0]} is out of vocabulary: "
                                          f"this model has {count} ids")  # fmt: skip

    BaseRenderer.validate_token_ids = validate_token_ids


def language_weights(weights):
    """(name, tensor) pairs of a checkpoint, vision towers too -> those of Step-1, by its names.
    Which are the language model's shows with its layer 0: what came before is held back till then.
    Raises ModelError if there is none, or a second one."""
    from aqaa.weights import shards

    held, names, prefix, dropped = [], [], None, 0
    for name, tensor in weights:
        names.append(name)
        held.append((name, tensor))
        if prefix is None:
            prefix = next(iter(shards.prefixes(names)), None)
        for known, value in held if prefix is not None else ():
            if ours := shards.inside(known, prefix):
                yield ours, value
            dropped += not ours
        held = [] if prefix is not None else held
    shards.language_model(dict.fromkeys(names), "the checkpoint")  # one, and no other
    if dropped:
        log.info("aqaa: %d tensors that are not the language model's were left out.", dropped)


def _bases():
    for home in PROCESSORS:
        with suppress(ImportError, AttributeError):  # no vLLM here, or one without this runner
            yield import_module(home).LogitsProcessor


class Layouts(*_bases()):
    """Strikes out what the layout of a request does not allow; leaves those without rules alone.
    Both of vLLM's interfaces. V2: (vllm_config, req_states); requests have slots, their ids are in
    its buffers. V1: (vllm_config, device, is_pin_memory); it hands over the list of drawn ids."""

    def __init__(self, vllm_config, state, is_pin_memory=None):
        if vllm_config.speculative_config:
            raise ValueError("aqaa's layouts do not go with speculative decoding: "
                             "leave --speculative-config out.")
        self.state, self.vocabulary = state, vllm_config.model_config.get_vocab_size()
        self.rows = {}  # V2: {slot: Follower}; V1: {row of the batch: (Follower, drawn ids)}

    @classmethod
    def validate_params(cls, sampling_params):
        """Raise ValueError, which the server answers with 400, for rules that cannot be read."""
        _rules(sampling_params)

    def is_argmax_invariant(self):
        return False

    def add_request(self, req_idx, sampling_params):  # V2
        """A request enters slot req_idx, anew or after it had to wait."""
        self.rows.pop(req_idx, None)
        if rules := self._usable(sampling_params):
            self.rows[req_idx] = Follower(rules, int(self.state.prompt_len.np[req_idx]))
        return rules is not None

    def apply(self, logits, ctx=None):
        """logits (rows, V), changed in place. ctx: V2's LogitsContext; without one this is V1."""
        if ctx is None:
            for row, (follower, drawn) in self.rows.items():
                follower.read(drawn[len(follower.ids) - follower.n_prompt :])
                follower.mask(logits[row])
            return logits
        slots, lengths = ctx.idx_mapping_np.tolist(), ctx.seq_lens_upper_bound_np.tolist()
        followers = [(row, self.rows[slot]) for row, slot in enumerate(slots) if slot in self.rows]
        new = [self.state.all_token_ids.gpu[slots[row], len(follower.ids) : lengths[row]]
               for row, follower in followers]  # fmt: skip
        ids = iter(_on_cpu(new))
        for (row, follower), part in zip(followers, new):
            follower.read(list(islice(ids, len(part))))
            follower.mask(logits[row])
        return logits

    def update_state(self, batch_update):  # V1
        from vllm.v1.sample.logits_processor.builtin import process_dict_updates

        process_dict_updates(self.rows, batch_update, self._enter)

    def _enter(self, params, prompt, drawn):
        if prompt is None or not (rules := self._usable(params)):  # None: embeddings have no ids
            return None
        follower = Follower(rules, len(prompt))
        follower.read(prompt)
        return follower, drawn

    def _usable(self, params):
        """The rules of a request, or None, also for ids beyond the model's: the client objects."""
        rules = _rules(params)
        return rules if rules and rules.ids.end <= self.vocabulary else None


def _on_cpu(parts):
    """The numbers of several tensors, in one wait for the GPU."""
    import torch

    return torch.cat(parts).tolist() if parts else []


def _rules(params):
    text = (params.extra_args or {}).get(KEY)
    return None if text is None else Rules.from_json(text)
