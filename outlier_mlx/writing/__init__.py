"""Writing model folders: parts, manifest, tokenizer, licences and card; whole or not at all."""
