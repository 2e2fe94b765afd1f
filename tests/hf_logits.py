"""Logits that stock transformers computes.

A program for any Python that has torch and transformers: it imports nothing of this project.
"""

import json
import sys


def main() -> None:
    """Read jobs, [folder, tokens, output] each, and save logits (T, V) float32 to each output."""
    import numpy as np
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    for folder, tokens, out in json.load(sys.stdin):
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
        wrong = {key: found for key, found in loaded.items() if found}
        assert not wrong, f"{folder}: {wrong}"
        assert [type(model).__name__] == model.config.architectures
        with torch.no_grad():
            np.save(out, model(torch.tensor([tokens])).logits[0].numpy())
    print(transformers.__version__)


if __name__ == "__main__":
    main()
