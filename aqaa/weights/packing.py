"""How a config.json says that weights have four bits. Needs no torch."""


def packed_config(group):
    """The quantization_config of int4 weights in groups, as compressed-tensors, transformers and
    vLLM read it: W4A16, symmetric, eight codes in an int32."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group",
               "group_size": group, "dynamic": False, "actorder": None}  # fmt: skip
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None,
              "output_activations": None}  # fmt: skip
    return {"quant_method": "compressed-tensors", "format": "pack-quantized",
            "quantization_status": "compressed", "ignore": ["lm_head"], "kv_cache_scheme": None,
            "config_groups": {"group_0": scheme}}  # fmt: skip


def quantization_of(data):
    """{"weights", "group"} as the config.json in `data` says: ours ("quantization") or that of
    compressed-tensors' W4A16; {} if it does not. Raises ValueError for another kind."""
    if ours := data.get("quantization"):
        return ours
    given = data.get("quantization_config")
    if given is None:
        return {}
    try:
        (scheme,) = given["config_groups"].values()
        group = scheme["weights"]["group_size"]
        wanted = packed_config(group)
        asked = {**wanted["config_groups"]["group_0"]["weights"]}
        same = all(scheme["weights"].get(name) == value for name, value in asked.items())
        same &= scheme.get("input_activations") is None and given["ignore"] == wanted["ignore"]
        same &= all(given[name] == wanted[name] for name in ("quant_method", "format"))
    except (LookupError, TypeError, ValueError, AttributeError):
        same = False
    if not same:
        kind = given.get("quant_method") if isinstance(given, dict) else given
        raise ValueError(f"its quantization_config ({str(kind):.40}) is none that is read here: "
                         "compressed-tensors' symmetric int4 in groups, pack-quantized, is")
    return {"weights": "int4", "group": group}
