"""Overlays on disk in the forms that `builders.write_overlay` does not write.

Each `to_*` turns a V3.2 folder, written with one shard, into another form in place: what a reader
should find is what the builder said. Bytes are made here, without the package.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from tests.builders import PARTS, Array, Built, Dims, base_weights
from tests.tensor_file import Stored, read_stored, stored, write_stored

SHARD = "model.safetensors"
LEAVES = tuple(f"{part}_{leaf}" for part in PARTS for leaf in ("ternary", "scale"))


def expert_key(layer: int, expert: int, leaf: str) -> str:
    """A V3.2 key, such as "model.layers.1.mlp.experts.0.gate_ternary"."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{leaf}"


def experts_of(built: Built) -> list[tuple[int, int]]:
    """(layer, expert) of every expert, in order."""
    return [(n, e) for n in built.dims.routed_layers for e in range(built.dims.experts)]


def rewrite(path: Path, tensors: dict[str, Stored]) -> None:
    """Write a safetensors file, or remove it if there is nothing to write."""
    if tensors:
        write_stored(path, tensors)
    else:
        path.unlink()


def take_experts(built: Built) -> dict[tuple[int, int], dict[str, Stored]]:
    """Take the experts out of the shard: their six tensors by bare key."""
    tensors = read_stored(built.path / SHARD)
    experts = {
        (n, e): {leaf: tensors.pop(expert_key(n, e, leaf)) for leaf in LEAVES}
        for n, e in experts_of(built)
    }
    rewrite(built.path / SHARD, tensors)
    return experts


def to_expert_files(
    built: Built, *, trainer: bool = False, name: str = "{:02}_expert_{:02}"
) -> Built:
    """A file for each expert, and routers in the file and under the keys of an export or trainer.

    With the base in it, the base's tensors stay where they are.
    """
    folder = built.path / "experts"
    folder.mkdir()
    for place, tensors in take_experts(built).items():
        write_stored(folder / f"layer_{name.format(*place)}.safetensors", tensors)
    rest = read_stored(built.path / SHARD)
    routers = {}
    for n in built.routers:
        router = rest.pop(f"model.layers.{n}.mlp.router.weight")
        routers[f"layer_{n:02}_router_weight" if trainer else f"layers.{n}.router.weight"] = router
    rewrite(built.path / SHARD, rest)
    if trainer:
        (built.path / "router").mkdir()
        write_stored(built.path / "router/router_weights.safetensors", routers)
    else:
        write_stored(built.path / "router_state.safetensors", routers)
        (built.path / "manifest.json").write_text('{"files": ["nobody knows"]}')
    return built


def to_repacked(built: Built) -> Built:
    """What the published repack tool makes of expert files: shards of `base.model.*` keys."""
    experts = list(take_experts(built).items())
    for i, (place, tensors) in enumerate(experts):
        named = {f"base.{expert_key(*place, leaf)}": tensor for leaf, tensor in tensors.items()}
        name = f"expert-{i + 1:05d}-of-{len(experts):05d}.safetensors"
        write_stored(built.path / name, named)
    return built


TOY = (
    ("model.embed_tokens.weight", "embed_tokens.weight"),
    ("model.norm.weight", "norm.weight"),
    ("model.layers.", "layers."),
    (".self_attn.", ".attn."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".mlp.router.weight", ".ffn.router_weight"),
    (".mlp.experts.", ".ffn.experts."),
    ("_ternary", "_proj.weight"),
    ("_scale", "_proj.scale"),
    (".mlp.", ".ffn.shared."),
)


def toy_key(key: str) -> str:
    """A V3.2 key as V0 spells it."""
    for new, old in TOY:
        key = key.replace(new, old)
    return key


def toy_config(dims: Dims) -> dict[str, Any]:
    """config.json of V0, which says neither eps nor the RoPE base."""
    return {
        "model_type": "outlier_moe",
        "n_layers": dims.layers,
        "hidden_dim": dims.hidden,
        "n_heads": dims.heads,
        "n_kv_heads": dims.kv_heads,
        "intermediate_dim": dims.intermediate,
        "vocab_size": dims.vocab,
        "max_seq_len": 256,
    }


def to_toy(built: Built, *, biases: bool = True) -> Built:
    """V0: every layer MoE, no alphas. Build with `moe_layers=None, alpha="none"`."""
    assert built.dims.moe_layers is None
    config = toy_config(built.dims)
    config |= {
        "outlier_num_experts": built.dims.experts,
        "outlier_num_experts_per_tok": built.dims.top_k,
    }
    (built.path / "config.json").write_text(json.dumps(config))
    tensors = read_stored(built.path / SHARD)
    kept = {key: tensor for key, tensor in tensors.items() if biases or "bias" not in key}
    write_stored(built.path / SHARD, {toy_key(key): tensor for key, tensor in kept.items()})
    return built


def write_toy_dense(path: Path, **dims: Any) -> Built:
    """V0 without experts; `base` of what is returned holds the FFN as it is used."""
    size = Dims(moe_layers=(), experts=0, **dims)
    weights = {key: stored(value, "F32") for key, value in base_weights(size).items()}
    used = {key: tensor.array() for key, tensor in weights.items()}
    tensors = {}
    for key, tensor in weights.items():
        name = toy_key(key)
        if ".mlp." in key:
            name = name.replace(".shared.", ".").replace("_proj.weight", "_proj.latent_weight")
            w = used[key]
            a = np.abs(w).mean(dtype=np.float64).astype(np.float32)
            used[key] = (a * ((w > a / 2).astype(np.float32) - (w < -a / 2))).astype(np.float32)
        tensors[name] = tensor
    path.mkdir(parents=True)
    config = toy_config(size)
    (path / "config.json").write_text(json.dumps(config))
    write_stored(path / SHARD, tensors)
    return Built(path, size, config, used)


def pack_flat(trits: Array) -> bytes:
    """Base 3, five to a byte over the flattened tensor, the first in the least digit."""
    digits = trits.reshape(-1).astype(np.int64) + 1
    groups = np.append(digits, [1] * (-digits.size % 5)).reshape(-1, 5)
    return (groups @ 3 ** np.arange(5)).astype(np.uint8).tobytes()


def packed_parts(tensors: dict[str, Stored]) -> dict[str, bytes]:
    """The six parts of a packed expert by bare key."""
    parts = {}
    for leaf in LEAVES:
        value = tensors[leaf].array()
        parts[leaf] = (
            pack_flat(value) if leaf.endswith("ternary") else value.astype("<f2").tobytes()
        )
    return parts


def index_entry(key: str, tensor: Stored, nbytes: int) -> dict[str, Any]:
    """An entry of index.json."""
    entry: dict[str, Any] = {"file": key.replace(".", "_") + ".bin", "shape": list(tensor.shape)}
    if key.endswith("ternary"):
        size = int(np.prod(tensor.shape))
        entry |= {"dtype": "uint8", "format": "tq10", "original_bytes": size}
    else:
        entry |= {"dtype": "float16", "format": "raw"}
    return entry | {"packed_bytes": nbytes}


def to_packed(built: Built, *, monolith: bool = False, prefix: str = "base.") -> Built:
    """`packed_experts/`, with a file a tensor or all of them in experts.bin."""
    folder = built.path / "packed_experts"
    folder.mkdir()
    index, experts = {}, {}
    for place, tensors in take_experts(built).items():
        parts = experts[place] = packed_parts(tensors)
        for leaf, data in parts.items():
            key = prefix + expert_key(*place, leaf)
            index[key] = index_entry(key, tensors[leaf], len(data))
            if not monolith:
                (folder / index[key]["file"]).write_bytes(data)
    (folder / "index.json").write_text(json.dumps(index, indent=2))
    (folder / "meta.json").write_text(json.dumps({"model_ref": "synthetic", "format": "tq10"}))
    if monolith:
        (folder / "experts.bin").write_bytes(pack_monolith(experts))
    return built


def padded(data: bytes) -> bytes:
    """Zeros up to a multiple of 4096."""
    return data + bytes(-len(data) % 4096)


def pack_monolith(experts: dict[tuple[int, int], dict[str, bytes]]) -> bytes:
    """An experts.bin of the parts of every (layer, expert)."""
    lengths = [len(part) for part in next(iter(experts.values())).values()]
    layers = len({layer for layer, _ in experts})
    head = b"OEXS" + struct.pack("<5I", 1, layers, len(experts) // layers, len(experts), 6)
    begin = 4096 + len(padded(bytes(32 * len(experts))))
    table, data = b"", b""
    for (layer, expert), parts in sorted(experts.items()):
        joined = b"".join(parts.values())
        table += struct.pack("<4Q", layer, expert, begin + len(data), len(joined))
        data += padded(joined)
    return padded(head + struct.pack("<6Q", *lengths)) + padded(table) + data


def to_gguf(
    built: Built, *, kind: str = "TQ1_0", naming: str = "merged", routers: bool = True
) -> Built:
    """experts.gguf, written by the package `gguf`; `naming` is "merged", "split" or "overlay"."""
    import gguf

    quantize = {"TQ1_0": gguf.quants.TQ1_0, "TQ2_0": gguf.quants.TQ2_0}[kind]
    writer = gguf.GGUFWriter(built.path / "experts.gguf", "outlier")
    writer.add_array("outlier.some_array", [1, 2, 3])
    writer.add_array("outlier.names", ["a", "bc"])
    raw = gguf.GGMLQuantizationType[kind]

    def blocks(layer: int, expert: int, part: str) -> Array:
        scale = built.scales[layer, expert, part].reshape(-1, 1)
        return quantize.quantize(built.trits[layer, expert, part] * scale)

    take_experts(built)
    rest = read_stored(built.path / SHARD)
    for n in built.dims.routed_layers:
        if routers:
            router = rest.pop(f"model.layers.{n}.mlp.router.weight").array().astype(np.float32)
            writer.add_tensor(f"blk.{n}.ffn_gate_inp.weight", router)
        for part in PARTS:
            packed = [blocks(n, e, part) for e in range(built.dims.experts)]
            if naming == "merged":
                writer.add_tensor(
                    f"blk.{n}.ffn_{part}_exps.weight", np.stack(packed), raw_dtype=raw
                )
                continue
            for e, one in enumerate(packed):
                name = f"blk.{n}.ffn_{part}.{e}.weight"
                if naming == "overlay":
                    name = expert_key(n, e, f"{part}_ternary")
                writer.add_tensor(name, one, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rewrite(built.path / SHARD, rest)
    return built


# torch.save without torch: the pickle is assembled instruction by instruction.


class Pickle:
    """A pickle in the making; storages of its tensors are kept aside."""

    def __init__(self) -> None:
        self.code = b"\x80\x02"
        self.storages: list[bytes] = []

    def dump(self, value: Any) -> Pickle:
        """Append a value: None, bool, number, string, list, tuple, dict, or array for a tensor."""
        if value is None or isinstance(value, bool):
            self.code += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            self.code += b"J" + struct.pack("<i", value)
        elif isinstance(value, float):
            self.code += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            data = value.encode()
            self.code += b"X" + struct.pack("<I", len(data)) + data
        elif isinstance(value, tuple):
            self.code += b"("
            for item in value:
                self.dump(item)
            self.code += b"t"
        elif isinstance(value, list):
            self.code += b"]("
            for item in value:
                self.dump(item)
            self.code += b"e"
        elif isinstance(value, dict):
            self.code += b"}("
            for key, item in value.items():
                self.dump(key).dump(item)
            self.code += b"u"
        else:
            self.tensor(np.asarray(value))
        return self

    def tensor(self, value: Array, kind: str | None = None, *, parameter: bool = False) -> None:
        """Append a tensor, of rank 0 or 1 for good files; `kind` defaults to the array's own."""
        kind = (
            kind or {"float32": "Float", "float16": "Half", "float64": "Double"}[value.dtype.name]
        )
        data = stored(value, "BF16").data if kind == "BFloat16" else value.tobytes()
        if parameter:
            self.code += b"ctorch._utils\n_rebuild_parameter\n("
        self.code += b"ctorch._utils\n_rebuild_tensor_v2\n(("
        self.dump("storage")
        self.code += f"ctorch\n{kind}Storage\n".encode()
        self.dump(str(len(self.storages))).dump("cpu").dump(value.size)
        self.code += b"tQ"
        strides = tuple(s // value.itemsize for s in np.ascontiguousarray(value).strides)
        self.dump(0).dump(tuple(value.shape)).dump(strides if value.ndim else ()).dump(False)
        self.code += b"ccollections\nOrderedDict\n)RtR"
        if parameter:
            self.code += b"\x88ccollections\nOrderedDict\n)RtR"
        self.storages.append(data)


def torch_zip(pickle: Pickle, *, folder: str = "archive", byteorder: str = "little") -> bytes:
    """The zip that `torch.save` makes of a pickle."""
    import io
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{folder}/data.pkl", pickle.code + b".")
        archive.writestr(f"{folder}/byteorder", byteorder)
        for i, data in enumerate(pickle.storages):
            archive.writestr(f"{folder}/data/{i}", data)
        archive.writestr(f"{folder}/version", "3\n")
    return buffer.getvalue()


def torch_save(path: Path, value: Any) -> None:
    """Write a value as `torch.save` would."""
    path.write_bytes(torch_zip(Pickle().dump(value)))
