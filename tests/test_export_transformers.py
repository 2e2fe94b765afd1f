"""Tiers as checkpoints of stock transformers: the numbers, and the logits that it computes."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import tracemalloc
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from transformers import AutoTokenizer

from outlier_mlx.checkpoints.export import export_tier
from outlier_mlx.checkpoints.info import inspect
from outlier_mlx.errors import CheckpointWarning
from outlier_mlx.models.config import parse_config
from outlier_mlx.models.tier_fields import tier_fields
from outlier_mlx.runtime.affine2 import EXPERT_FORMAT_VERSION, ROWS
from outlier_mlx.tiers.verify import verify_tier
from tests import builders, damage
from tests.engine import forward, load, tier_of
from tests.goldens import golden
from tests.library import Library
from tests.program import ROOT, assert_refused, run
from tests.tensor_file import read_arrays, read_stored
from tests.test_bases import LLAMA3, YARN
from tests.test_model import ODD

WEIGHTS = "model-00001-of-00001.safetensors"
GOLDENS = [
    *("export_per_file", "packed_experts_dir", "packed_monolith", "v0_toy_dense"),
    *("v0_toy_gqa_bias", "v0_toy_moe", "v1_real_sharded", "v2_real_perchannel"),
    *("v32_alpha_json_partial", "v32_alpha_tensors", "v33_overlay_yarn"),
]
SHORTER = {"factor": 0.5, "original_max_position_embeddings": 64}
# Other shapes, and the class that computes each.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("qwen2_moe", {"tied": True, "moe_layers": None, "kv_heads": 4}),
    "odd": ("qwen2_moe", ODD | {"experts": 5, "top_k": 1, "scale_form": "per_row"}),
    "yarn": ("qwen2_moe", {"yarn": YARN | {"attention_factor": 0.8}}),
    "yarn, no factor": ("qwen2_moe", {"yarn": YARN}),
    "yarn, shorter": ("qwen2_moe", {"yarn": SHORTER}),
    "llama": ("qwen2_moe", {"family": "llama", "scaling": LLAMA3}),
    "linear": ("qwen2_moe", {"family": "llama", "scaling": {"rope_type": "linear", "factor": 2.0}}),
    "mistral": ("qwen2_moe", {"family": "mistral", "rope_theta": 1e4}),
    "qwen3": ("qwen3_moe", {"family": "qwen3", "head_dim": 24, "tied": True, "yarn": YARN}),
    "qwen3, no experts": ("qwen3", {"family": "qwen3", "head_dim": 24, "moe_layers": ()}),
    "qwen2, no experts": ("qwen2", {"moe_layers": (), "yarn": YARN}),
    "llama, no experts": ("llama", {"family": "llama", "biases": True, "moe_layers": ()}),
    "mistral, no experts": ("mistral", {"family": "mistral", "head_dim": 8, "moe_layers": ()}),
    "mistral, biases": ("llama", {"family": "mistral", "biases": True, "moe_layers": ()}),
}
# How the embedded tier is stored: MLX's 4, 6 and 8 bits, halves, and experts as 2-bit codes.
RECIPES = ["q4", "q4-mixed", "q8", "bf16"]
# The Python that has torch and transformers.
PYTHON = (
    Path(os.environ.get("OUTLIER_TRANSFORMERS") or ROOT / ".venv-torch").absolute() / "bin/python"
)


def exported(tier: Path, out: Path, **how: Any) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*no tokenizer", CheckpointWarning)
        return export_tier(tier, out, "transformers", **how).path


def wide_tier(place: Path) -> Path:
    """A tier with matrices that are many slabs large."""
    wide: dict[str, Any] = {"hidden": 1280, "expert_intermediate": 3072, "vocab": 64}
    few: dict[str, Any] = {"experts": 1, "top_k": 1, "layers": 2, "moe_layers": (1,)}
    built = builders.write_overlay(place / "o", **wide, **few, tokenizer=False)
    return tier_of(built.path, None, place / "t", tier="q4")


def shape_tier(name: str, path: Path, **recipe: Any) -> Path:
    options = SHAPES[name][1]
    if options.get("moe_layers") == ():
        return tier_without_experts(path, **options)
    built = builders.write_overlay(path / "overlay", tokenizer=False, **options)
    return tier_of(built.path, None, path / "tier", **recipe)


def tier_without_experts(path: Path, **dims: Any) -> Path:
    """A base with the config of a tier, whose `convert` makes such tiers on Qwen2 only."""
    built = builders.write_base(path, base_dtype="F32", tokenizer=False, **dims)
    stored: dict[str, Any] = {
        "dtype": "float32",
        "ternary": {"format": ROWS, "version": EXPERT_FORMAT_VERSION},
    }
    stored["num_experts_per_tok"] = 2
    fields = built.config | tier_fields(parse_config(built.config), 0) | stored
    (built.path / "config.json").write_text(json.dumps(fields))
    return built.path


# What is written


def test_every_number(tmp_path: Path):
    """The shared expert's gate is 1/2, so its down projection is doubled; alphas are folded."""
    built = builders.write_overlay(tmp_path / "o", tokenizer=False, scale_form="per_row")
    tier = tier_of(built.path, None, tmp_path / "t")
    found = read_arrays(exported(tier, tmp_path / "e") / WEIGHTS)
    for name, value in built.base.items():
        layer = int(name.split(".")[2]) if ".mlp." in name else -1
        if layer in built.dims.routed_layers:
            name = name.replace(".mlp.", ".mlp.shared_expert.")
            value = value * (2 if "down_proj" in name else 1)
        np.testing.assert_array_equal(found.pop(name), value)
    for layer, router in built.routers.items():
        prefix = f"model.layers.{layer}.mlp"
        np.testing.assert_array_equal(found.pop(f"{prefix}.gate.weight"), router)
        gate = found.pop(f"{prefix}.shared_expert_gate.weight")
        assert gate.shape == (1, 64) and not gate.any()
        for expert, alpha in enumerate(built.alphas[layer].astype(np.float32)):
            for part in ("gate", "up", "down"):
                scale = built.scales[layer, expert, part].reshape(-1, 1).astype(np.float32)
                scale = scale * alpha if part == "down" else scale
                weights = found.pop(f"{prefix}.experts.{expert}.{part}_proj.weight")
                np.testing.assert_array_equal(weights, scale * built.trits[layer, expert, part])
    assert not found


def test_an_int4_base_is_what_mlx_computes_from_it(library: Library, tmp_path: Path):
    tier = library.demo_tier("q4-mixed")
    found = read_arrays(exported(tier, tmp_path / "e") / WEIGHTS)
    stored = {name: mx.array(value) for name, value in read_arrays(tier / WEIGHTS).items()}
    said = json.loads((tier / "config.json").read_text())["quantization"]
    paths = [name.removesuffix(".biases") for name in stored if name.endswith(".biases")]
    assert len(paths) == 4 * 7 + 1 and {how["bits"] for how in said.values() if type(how) is dict}
    for path in paths:
        how = said.get(path, said)
        scales, biases = (stored[f"{path}.{s}"].astype(mx.float32) for s in ("scales", "biases"))
        triple = (stored[f"{path}.weight"], scales, biases)
        weights = np.array(mx.dequantize(*triple, group_size=how["group_size"], bits=how["bits"]))
        twice = 2 if "shared_expert.down_proj" in path else 1
        np.testing.assert_array_equal(found[f"{path}.weight"], twice * weights)


@pytest.mark.parametrize("name", SHAPES)
def test_the_class_and_its_config(name: str, tmp_path: Path):
    """Fields that version 4.57 and version 5 of transformers both read."""
    model_type, dims = SHAPES[name]
    folder = exported(shape_tier(name, tmp_path), tmp_path / "e")
    config = json.loads((folder / "config.json").read_text())
    size = builders.Dims(**{k: v for k, v in dims.items() if k != "scale_form"})
    assert config["model_type"] == model_type
    assert config["rope_theta"] == size.rope_theta and "rope_parameters" not in config
    assert config["tie_word_embeddings"] == size.tied
    assert ("lm_head.weight" in read_stored(folder / WEIGHTS)) != size.tied
    scaling = size.scaling or (size.yarn and {"rope_type": "yarn"} | size.yarn)
    if name == "yarn, shorter":  # transformers would take 1
        scaling = SHORTER | {"rope_type": "yarn", "attention_factor": 0.1 * np.log(0.5) + 1}
    assert config["rope_scaling"] == scaling
    gone = {"model_file", "ternary", "quantization", "moe_layers", "base_model_type", "auto_map"}
    assert not gone & set(config)
    if not size.routed_layers:
        assert "num_experts" not in config
        return
    assert config["norm_topk_prob"] is True and config["decoder_sparse_step"] == 1
    assert config["mlp_only_layers"] == [n for n in range(4) if n not in size.routed_layers]
    assert (config["num_experts"], config["num_experts_per_tok"]) == (size.experts, size.top_k)
    if model_type == "qwen3_moe":
        assert config["moe_intermediate_size"] == size.intermediate + size.expert_intermediate
    else:
        assert config["moe_intermediate_size"] == size.expert_intermediate
        assert config["shared_expert_intermediate_size"] == size.intermediate
        assert config["qkv_bias"] is (size.family == "qwen2")


def test_command(library: Library, tmp_path: Path):
    """It says how large the checkpoint becomes, replaces nothing unasked, and can be verified."""
    tier, out = library.demo_tier("q4"), tmp_path / "hf"
    export = ("export", tier, "--format", "transformers", "--out", out)
    done = run(*export)
    assert done.out == "" and "21.9 MB of weights in float32" in done.err
    assert inspect(out).moe_layers == 3  # of four
    verify_tier(out)
    assert_refused(run(*export, code=1), "exists", "hf")
    run(*export, "--force", "--dtype", "bfloat16", "--quiet")
    verify_tier(out)
    dtypes = {stored.dtype for stored in read_stored(out / WEIGHTS).values()}
    assert dtypes == {"BF16", "F32"}  # the routers
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    run("export", tier, "--out", tmp_path / "e", "--dtype", "bfloat16", code=2)


@pytest.mark.parametrize(
    ("dims", "said"),
    [
        ({"family": "llama", "biases": True}, ("FFNs have biases",)),
        ({"family": "mistral", "head_dim": 20}, ("4 heads of 20", "hidden_size 64", "4.57")),
    ],
)
def test_what_transformers_cannot_express(
    dims: dict[str, Any], said: tuple[str, ...], tmp_path: Path
):
    built = builders.write_overlay(tmp_path / "o", tokenizer=False, **dims)
    tier = tier_of(built.path, None, tmp_path / "t")
    command = ("export", tier, "--format", "transformers", "--out", tmp_path / "e")
    assert_refused(run(*command, code=1), "stock transformers cannot express this tier", *said)
    assert not (tmp_path / "e").exists()


def test_windows_cannot_be_expressed(tmp_path: Path):
    tier = shape_tier("mistral", tmp_path)
    types = ["full_attention", "sliding_attention"] * 2
    damage.edit_config(tier, layer_types=types, sliding_window=16)
    command = ("export", tier, "--format", "transformers", "--out", tmp_path / "e")
    assert_refused(run(*command, code=1), "window of tokens")


@pytest.mark.parametrize("name", ["my tier", "Größe \U0001f642", 'a"b\\c'])
def test_the_card_names_any_folder(name: str, library: Library, tmp_path: Path):
    folder = exported(library.demo_tier("q4"), tmp_path / name)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    assert texts.count(name) == 2


@pytest.mark.slow
def test_memory_is_a_few_slabs(tmp_path: Path):
    """15 MB of weights in float32 go through in slabs of two."""
    tier = wide_tier(tmp_path)
    tracemalloc.start()
    exported(tier, tmp_path / "e")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60_000_000, peak


def test_every_chat_template_comes_along(tmp_path: Path):
    """Also those that transformers writes in a folder of their own."""
    built = builders.write_overlay(tmp_path / "o")
    more = {"chat_template.jinja": "usual", "additional_chat_templates/tool_use.jinja": "tools"}
    (built.path / "additional_chat_templates").mkdir()
    for name, text in more.items():
        (built.path / name).write_text(text)
    tier = tier_of(built.path, None, tmp_path / "t")
    for folder in (tier, exported(tier, tmp_path / "e")):
        verify_tier(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        assert tokenizer.chat_template == {"default": "usual", "tool_use": "tools"}


# What stock transformers computes


def _tiers(library: Library, root: Path) -> dict[str, tuple[Path, list[int]]]:
    """Every case: its tier, and the tokens of a prompt."""
    prompt = builders.Built(root, builders.Dims(), {}, {}).prompt(40)
    found = {name: (shape_tier(name, root / name), prompt) for name in SHAPES}
    found |= {name: (library.demo_tier(name), [*range(40, 100), 1500]) for name in RECIPES}
    wide = library.overlay(expert_intermediate=96).path
    affine = tier_of(wide, None, root / "affine2", experts="affine2", tier="q4")
    found["affine2"] = (affine, prompt)
    for name in GOLDENS:
        case = golden(name)
        tier = tier_of(case.overlay, case.base, root / name)
        found[name] = (tier, case.tokens)
    return found


@dataclass(frozen=True)
class Stock:
    """A version of transformers that runs without this project's own modules and without a network.

    Attributes:
        version: the beginning of its version.
        path: the folder of its packages, if they are not installed.
    """

    version: str
    path: Path | None

    def run(self, *arguments: str | Path, input: str = "", place: Path = ROOT) -> str:
        """Run Python with these arguments in a folder; what it prints."""
        gone = ("PYTHONPATH", "VIRTUAL_ENV")
        kept = {key: value for key, value in os.environ.items() if key not in gone}
        kept |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        kept |= {"PYTHONPATH": str(self.path)} if self.path is not None else {}
        done = subprocess.run(
            [PYTHON, *arguments], input=input, capture_output=True, text=True, cwd=place, env=kept
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module", params=["4.57", "5"])
def stock(request: pytest.FixtureRequest) -> Stock:
    """A version of transformers, with PyTorch."""
    if not PYTHON.exists():
        pytest.skip("needs .venv-torch, which ./scripts/setup_transformers.sh makes")
    return Stock(request.param, PYTHON.parents[1] / "version4" if request.param != "5" else None)


@dataclass(frozen=True)
class Case:
    """A tier's export, tokens, and the logits of the tier."""

    export: Path
    tokens: list[int]
    logits: np.ndarray


@pytest.fixture(scope="module")
def cases(library: Library, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("cases")
    return {
        name: Case(
            exported(tier, root / "hf" / name), tokens, forward(load(tier, "float32"), tokens)
        )
        for name, (tier, tokens) in _tiers(library, root).items()
    }


@pytest.fixture(scope="module")
def differences(
    stock: Stock, cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, float]:
    """For each case, by how much the logits of transformers differ from the tier's at most."""
    root = tmp_path_factory.mktemp("transformers")
    jobs = [
        (str(case.export), case.tokens, str(root / f"{name}.npy")) for name, case in cases.items()
    ]
    version = stock.run(ROOT / "tests/hf_logits.py", input=json.dumps(jobs))
    assert version.startswith(f"{stock.version}.")
    return {
        name: float(np.abs(case.logits - np.load(root / f"{name}.npy")).max())
        for name, case in cases.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SHAPES, *RECIPES, "affine2", *GOLDENS])
def test_logits_of_stock_transformers(name: str, differences: dict[str, float]):
    assert differences[name] < 1e-4


@pytest.mark.slow
def test_the_card_of_the_export_runs(stock: Stock, library: Library, tmp_path: Path):
    """Its quickstart generates text, and the tokenizer is that of the tier."""
    folder = exported(library.demo_tier("q4"), tmp_path / "hf")
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1
    texts = ["The sea", "Where is  Vega?\n\n12345 ships' crews, naïve — ok", "<|im_end|> x"]
    more = f"\nimport json\nprint(json.dumps([tokenizer(t)['input_ids'] for t in {texts!r}]))"
    *text, tokens = stock.run("-c", code[0] + more, place=tmp_path).splitlines()
    assert "\n".join(text).startswith("Once upon a time") and len("".join(text)) > 30
    own = AutoTokenizer.from_pretrained(library.demo_tier("q4"), local_files_only=True)
    assert json.loads(tokens) == [own(text)["input_ids"] for text in texts]
