"""A model's MoE layers with experts in slots, in the place of those with all experts in memory."""

import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from outlier_mlx.engine.distributed.expert_parts import ExpertParts
from outlier_mlx.engine.distributed.ranks import least, ranks
from outlier_mlx.engine.distributed.tensor_parallel import TensorParallel
from outlier_mlx.engine.paging.budget import Experts
from outlier_mlx.engine.paging.lookahead import Lookahead
from outlier_mlx.engine.paging.places import needed
from outlier_mlx.engine.paging.policies import DEFAULT_POLICY, POLICIES
from outlier_mlx.engine.paging.pressure import Pressure
from outlier_mlx.engine.paging.reads import ExpertFiles, beyond_the_cache
from outlier_mlx.engine.paging.skip import leave_out
from outlier_mlx.engine.paging.slots import MATRICES, Pool, slot_nbytes
from outlier_mlx.engine.paging.statistics import PagingStatistics
from outlier_mlx.engine.paging.store import ExpertStore
from outlier_mlx.engine.plan import Plan
from outlier_mlx.engine.quantized import Classes, with_methods
from outlier_mlx.errors import OutlierError
from outlier_mlx.models.config import describe, raw_config
from outlier_mlx.runtime.affine2 import affine_product, row_bytes
from outlier_mlx.runtime.ops import rows_product, use_metal
from outlier_mlx.runtime.switch import TernarySwitchGLU
from outlier_mlx.storage.shards import read_shards
from outlier_mlx.upstream import get_total_parameters

NOT_PAGED = "the model has no experts that could be paged"
_NOT_TRAINED = "paged experts cannot be trained: load the model without paging"
# A prompt is what routes so many (token, expert) pairs for each expert of a layer: it needs nearly
# all of them.
_PROMPT_PAIRS = 4


class PagedSwitchLinear(nn.Module):
    """One matrix of each expert of a layer, in the slots of a store."""

    def __init__(self, store: ExpertStore, layer: int, matrix: str, shape: tuple[int, int]) -> None:
        """Matrices (out, in) called `matrix` of a layer's experts."""
        super().__init__()
        self._store, self._layer, self._matrix = store, layer, matrix
        self.output_dims, self.input_dims = shape

    @property
    def stored(self) -> tuple[mx.array, ...]:
        """The arrays of all slots; see `Pool`."""
        return self._store.pool.arrays[self._matrix]

    @property
    def num_experts(self) -> int:
        """Experts of the layer, in slots or not."""
        return self._store.experts

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Multiply x (..., 1, in) by the experts in `indices` (...): (..., 1, out) float32.

        Where slots are in the affine form, `indices` are slots.
        """
        if not self._store.pool.packed:
            weight, scales, biases = self.stored
            affine = weight, scales, biases
            return affine_product(x.astype(mx.float32), affine, indices, sorted_indices)
        # Shapes, and so the way of multiplying, are those of a layer with all experts in memory.
        # Depending on x, rows are not taken before they are multiplied with.
        slots = mx.depends([self._store.tables.of(self._layer)], [x])[0]
        rows, scales = (array[slots] for array in self.stored)
        return rows_product(x, indices, rows, scales, sorted_indices)


class PagedSwitchGLU(TernarySwitchGLU):
    """The routed experts of a layer, of which those that a token needs are brought into slots."""

    def __init__(
        self,
        glu: TernarySwitchGLU,
        store: ExpertStore,
        lookahead: Lookahead,
        layer: int,
        block: Any,
    ) -> None:
        """The experts of `glu`, whose own arrays are not used.

        Args:
            glu: the experts as they would be in memory.
            store: keeps some of them.
            lookahead: guesses which of them the next layer needs.
            layer: number of the layer.
            block: the MoE block; if it has alphas, experts with alpha 0 are never read.
        """
        nn.Module.__init__(self)
        self.num_experts, self.hidden_dims = glu.num_experts, glu.hidden_dims
        self.store, self.lookahead, self.layer = store, lookahead, layer
        self._block = weakref.ref(block)
        for name in MATRICES:
            rows = glu[name].weight.shape[1]
            setattr(self, name, PagedSwitchLinear(store, layer, name, (rows, glu[name].input_dims)))

    @property
    def slots(self) -> mx.array:
        """The slot of each expert, (experts,) uint32."""
        return self.store.tables.of(self.layer)

    def packed(self) -> tuple[mx.array, ...]:
        """Rows and scales of all slots, of gate, of up and of down."""
        return tuple(array for name in MATRICES for array in self[name].stored)

    def mix(self, x: mx.array, indices: mx.array, weights: mx.array, shared: mx.array) -> mx.array:
        """Bring the experts that are needed into slots, and mix them; see `TernarySwitchGLU.mix`.

        Raises:
            OutlierError: an expert cannot be read, or the model is being trained.
        """
        if self.training:
            raise OutlierError(_NOT_TRAINED)
        store, layer = self.store, self.layer
        store.tables.use_alphas(layer, getattr(self._block(), "alpha", None))
        store.enter(layer)
        prompt = indices.size >= _PROMPT_PAIRS * self.num_experts
        self.lookahead.begin(layer, store.statistics.bytes_read, decodes=not prompt)
        following = self._following() if prompt else None
        if following is None and store.tables.resident(layer):
            store.note(layer, indices, weights)
            routed = bool(store.tables.needable(layer))
        else:
            guess = None if prompt else self.lookahead.guess(layer, x)
            weights, experts = self._bring(indices, weights, shared, guess)
            routed = bool(experts)
        # Without any experts, slots may hold anything, and 0 times that need not be 0.
        y = super().mix(x, indices, weights, shared) if routed else shared + 0
        store.outputs.leave(y)
        if following is not None:
            mx.async_eval(y)
            store.read_early(following, sorted(store.tables.needable(following)), layer)
        return y

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Apply the experts `indices` (..., k) to x (..., hidden): (..., k, hidden) float32.

        Within `mix` they are in slots already; any other caller waits for them.
        """
        mixes = self.store.outputs.in_hand == self.layer
        if not mixes:
            mx.eval(x, indices)
            self.store.enter(self.layer)
            self.store.ensure(self.layer, needed(indices, mx.ones(indices.shape)))
        y = super().__call__(x, indices if self.store.pool.packed else self.slots[indices])
        if not mixes:
            self.store.outputs.leave(y)
        return y

    def _bring(
        self, indices: mx.array, weights: mx.array, shared: mx.array, guess: mx.array | None
    ) -> tuple[mx.array, set[int]]:
        """Bring what is needed into slots; then begin to read what the next layer may need.

        Args:
            indices: as for `mix`.
            weights: as for `mix`.
            shared: as for `mix`.
            guess: experts of the next MoE layer, of the shape of `indices`; None: read nothing.

        Returns:
            The weights, with 0 for experts that are left out, and all other experts that count.
        """
        store, layer = self.store, self.layer
        try:
            mx.async_eval(indices, weights, *([] if guess is None else [guess]))
        except ValueError:  # MLX traces a gradient, or compiles: nothing is computed yet
            raise OutlierError(_NOT_TRAINED) from None
        # What to do while the host looks up slots, and disks read.
        mx.async_eval(shared)
        experts = needed(indices, weights)
        if store.skip:
            missing = store.missing(layer, experts)
            weights, left_out = leave_out(indices, weights, missing, store.skip)
            store.statistics.skipped += left_out
            experts = needed(indices, weights)
        if store.watch is not None:
            store.watch(layer, {expert: store.place(layer, expert) for expert in experts})
        foreseen = self.lookahead.foreseen(layer, experts)
        if foreseen is not None:
            store.statistics.guessed += len(experts)
            store.statistics.foreseen += foreseen
        begun = time.perf_counter()
        store.ensure(layer, experts)
        if guess is not None:
            later, likely = self.lookahead.note_guess(layer, guess)
            usable = store.tables.needable(later)
            store.read_early(later, [expert for expert in likely if expert in usable], layer)
        self.lookahead.note_waited(time.perf_counter() - begun)
        return weights, experts

    def _following(self) -> int | None:
        """The next MoE layer, if a prompt needs experts of it that are in no slot."""
        layers = self.store.layers
        after = layers.index(self.layer) + 1
        if after == len(layers) or self.store.tables.resident(layers[after]):
            return None
        return layers[after]


def paged_classes(
    get_model_classes: Classes, folder: Path, planned: Plan, *, always: bool = False
) -> Classes:
    """The same classes for `mlx_lm.utils.load_model`, whose models page their ternary experts.

    Where all experts have a slot, they are loaded like everything else.

    Args:
        get_model_classes: the classes of a model with all experts in memory.
        folder: the model's, from whose files experts are read.
        planned: what experts may take, and how prompts are read.
        always: keep them in slots even if all fit.
    """

    def methods(model: Any) -> dict[str, Any]:
        def load_weights(
            self: Any, weights: list[tuple[str, mx.array]], strict: bool = True
        ) -> Any:
            paged = _page(self, folder, planned, always)
            kept = [(name, array) for name, array in weights if not name.startswith(paged)]
            return model.load_weights(self, kept, strict)

        return {"load_weights": load_weights}

    return with_methods(get_model_classes, methods)


def _page(model: nn.Module, folder: Path, planned: Plan, always: bool) -> tuple[str, ...]:
    """Put paged experts in the place of ternary ones; returns what names of theirs begin with."""
    blocks: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module.get("switch_mlp"), TernarySwitchGLU)
    }
    if not blocks:
        raise OutlierError(f"{folder.name}: {NOT_PAGED}")
    first = next(iter(blocks.values()))
    glu, top_k = first.switch_mlp, getattr(first, "top_k", 0) or first.num_experts_per_tok
    hidden, packed = glu.gate_proj.input_dims, use_metal()
    nbytes = slot_nbytes(hidden, glu.hidden_dims, packed=packed)
    experts = Experts(len(blocks), glu.num_experts, top_k, nbytes)
    slots = planned.expert_memory.slots_for(experts)
    if slots is None and not always:
        return ()
    prefixes = tuple(f"{name}.switch_mlp." for name in blocks)
    total = slots or experts.total
    files = _open_files(folder, prefixes, total * nbytes)
    pool = Pool(total, hidden, glu.hidden_dims, packed=packed)
    store = ExpertStore(pool, files, POLICIES[DEFAULT_POLICY])
    store.pressure, store.step = Pressure(experts.floor), planned.step
    lookahead = Lookahead(model, store.layers, top_k)
    for name, block in blocks.items():
        layer = int(name.split("layers.")[1].split(".")[0])
        paged = PagedSwitchGLU(block.switch_mlp, store, lookahead, layer, block)
        paged.train(block.training)
        block.switch_mlp = paged
    return prefixes


def _open_files(folder: Path, prefixes: tuple[str, ...], slots_nbytes: int) -> ExpertFiles:
    """The files of experts, whose names begin with `prefixes`."""
    tensors = read_shards(folder)
    stored = {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}
    nbytes = sum(tensor.nbytes for tensor in stored.values())
    others = sum(tensor.nbytes for tensor in tensors.values()) - nbytes
    direct = beyond_the_cache(nbytes, taken=others + slots_nbytes)
    own = ranks()
    if own.size == 1 or own.pipeline:
        return ExpertFiles(stored, direct=direct)
    split = TensorParallel(tensors, describe(raw_config(folder)), own.rank, own.size)
    return ExpertParts(stored, split.cuts, direct=direct)


def store_of(model: nn.Module) -> ExpertStore | None:
    """The store of a model's experts; None if they are not paged."""
    paged = (m.store for m in model.modules() if isinstance(m, PagedSwitchGLU))
    return next(paged, None)


def planned_step(model: nn.Module, most: int) -> int:
    """Tokens of a prompt to process at a time: `most`, or what the plan of any rank has if less."""
    store = store_of(model)
    return least(most if store is None or store.step is None else min(most, store.step))


def statistics_of(model: nn.Module) -> PagingStatistics | None:
    """What a model's experts cost so far; None if they are not paged."""
    store, lookahead = store_of(model), lookahead_of(model)
    if store is None or lookahead is None:
        return None
    probe = lookahead.probe
    return replace(store.statistics, reads_early=probe.on if probe.decided else None)


def lookahead_of(model: nn.Module) -> Lookahead | None:
    """What guesses a model's next experts; None if they are not paged."""
    paged = (m.lookahead for m in model.modules() if isinstance(m, PagedSwitchGLU))
    return next(paged, None)


def skip_experts(model: nn.Module, share: float) -> None:
    """Let a model leave out missing experts that have less than a share of a token's weight.

    Args:
        model: any model; nothing is missing where experts are not paged.
        share: 0 or more, and less than 1; see `leave_out`.

    Raises:
        OutlierError: another share, or the model has no experts that could be paged.
    """
    if not 0 <= share < 1:
        raise OutlierError(f"expert_skip {share:g}: expected 0 or more, and less than 1")
    if share and not any(isinstance(module, TernarySwitchGLU) for module in model.modules()):
        raise OutlierError(f"expert_skip: {NOT_PAGED}")
    if (store := store_of(model)) is not None:
        store.skip = share


def total_parameters(model: nn.Module) -> int:
    """The number of a model's parameters as mlx-lm counts them, experts that are paged included."""
    paged = [module for module in model.modules() if isinstance(module, PagedSwitchLinear)]
    of_experts = sum(
        module.num_experts * module.output_dims * (row_bytes(module.input_dims) + 1)
        for module in paged
    )
    return int(get_total_parameters(model)) + of_experts
