"""Files: lazy safetensors, a streaming sharded writer, folders that appear whole, the hub."""
