"""The language model behind vLLM: client, plugin, model class and rules; token ids go there and come back."""
