"""The language model behind vLLM: client, launch, plugin, model class, rules; ids travel."""
