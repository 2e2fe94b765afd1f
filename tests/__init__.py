"""Tests, and the modules that help them.

- The judges: `reference` (the model in NumPy), `reference_reader`, `affine`, `goldens`, `trits`.
- Models on disk: `builders` (bases, overlays), `form_builders` and `forms` (every form of overlay),
  `awq_builder`, `gguf_builder`, `merging`, `plain_models`, `alpha_overlays`; `library` makes each
  once, for the fixtures of `conftest`.
- Files and folders: `tensor_file`, `folders`, `damage` (one thing wrong at a time), `refusals`.
- What runs: `program` (the command line), `engine` (conversions and forward passes), `importing`,
  `evaluating`, `serving`, `hub` and `hub_uploads` (stand-ins for the Hugging Face hub), `screen`
  (terminals), `pages` (the documentation's commands), `preloaded` (commands in forks),
  `environments`, `metal`, `kernel_cases`; `memory` (what MLX has in use).
- `marks`: which cases are slow.

`reference` and its reader, and the builders that they are tried on, import nothing of the package.
"""

import os
import signal
import sys
from pathlib import Path

# mlx-lm runs a tier's own code, and Python would leave its bytecode in tiers that tests share. With
# none at all, each program would compile mlx-lm, transformers and this package for a second or two.
# This module is the first that any test imports, so that nothing is compiled twice.
os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = str(
    Path(__file__).resolve().parents[1] / ".cache" / "bytecode"
)
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Programs in the background of a shell ignore Ctrl-C, and so would all that tests start from there.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
