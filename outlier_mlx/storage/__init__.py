"""Files: safetensors, GGUF and pickles read lazily, the hub, files that appear whole."""
