"""compressed-tensors: what LLM-Compressor and the Ascend converters write, declared in config.json."""
