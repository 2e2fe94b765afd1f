"""How many conversations fit in memory at the same time."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from outlier_mlx.engine.distributed.ranks import least
from outlier_mlx.engine.machine import Budget
from outlier_mlx.engine.memory import budget, check_fits, draft_nbytes
from outlier_mlx.engine.needs import Needs, Use, needs_of
from outlier_mlx.engine.paging.budget import ALL, AUTO, ExpertMemory
from outlier_mlx.engine.plan import Part, Plan, plan
from outlier_mlx.models.config import describe, raw_config
from outlier_mlx.models.sizes import context_length

# The defaults of mlx-lm's server.
MAX_RESPONSES = 32
MAX_PROMPTS = 8
MAX_CONVERSATIONS = MAX_RESPONSES + MAX_PROMPTS - 1


@dataclass(frozen=True)
class Capacity:
    """What a server does at the same time. The names are those of `mlx_lm.server`'s options.

    Attributes:
        decode_concurrency: responses generated together.
        prompt_concurrency: prompts processed together.
        prompt_cache_bytes: largest size of all KV caches together, in bytes; beyond it, caches of
            finished conversations are dropped. None: no limit.
        cache_memory: memory for all KV caches, in bytes; requests wait for it. None: no limit.
            mlx-lm has no such option.
    """

    decode_concurrency: int = MAX_RESPONSES
    prompt_concurrency: int = MAX_PROMPTS
    prompt_cache_bytes: int | None = None
    cache_memory: int | None = None

    @property
    def conversations(self) -> int:
        """The largest number of conversations that have a KV cache in use at the same time.

        mlx-lm processes more prompts while there is room for one more response, and allows at
        least as many responses as prompts.
        """
        responses = max(self.decode_concurrency, self.prompt_concurrency)
        return responses + self.prompt_concurrency - 1


def capacity_for(conversations: int, prompts: int | None = None) -> Capacity:
    """The capacity for this many conversations; by default, a quarter of them are prompts."""
    prompts = prompts or _quarter(conversations)
    return Capacity(max(1, min(MAX_RESPONSES, conversations - prompts + 1)), prompts)


def common_capacity(capacity: Capacity) -> Capacity:
    """What all ranks have room for; where there is one alone, what is given."""
    unlimited = 1 << 62
    found = {
        name: least(unlimited if value is None else value)
        for name, value in asdict(capacity).items()
    }
    return Capacity(**{name: None if n == unlimited else n for name, n in found.items()})  # type: ignore[arg-type]


def usual_tokens(folder: Path, response: int) -> int:
    """Tokens of a conversation to count memory for: 4096 and a response, or the context's.

    Args:
        folder: the model folder.
        response: largest number of tokens of a response.
    """
    usual = 4096 + response
    return min(usual, context_length(describe(raw_config(folder))) or usual)


def find_capacity(
    folder: Path,
    use: Use,
    responses: int | None = None,
    prompts: int | None = None,
    cache_bytes: int | None = None,
    *,
    clients: int = MAX_CONVERSATIONS,
    memory: ExpertMemory = ALL,
    draft: Path | None = None,
    available: Budget | None = None,
) -> tuple[Capacity, int, Plan]:
    """Divide the memory that weights and activations leave free among conversations.

    Args:
        folder: the model folder.
        use: a conversation; with a quantized KV cache, mlx-lm generates for one request at a time.
        responses: responses to generate together; None: as many as fit, at most 32.
        prompts: prompts to process together; None: a quarter of the conversations, at most 8.
        cache_bytes: largest size of all KV caches together, in bytes; None: all free memory.
        clients: connections at a time; each waits for one response.
        memory: what routed experts may take. `AUTO`: what is left beside the conversations that
            were asked for, or one.
        draft: folder of a draft model, which has a KV cache for each conversation, too.
        available: memory for weights and caches; None: what this machine has.

    Returns:
        The server's capacity, its number of conversations at the same time, and the plan by which
        the model is to be loaded.

    Raises:
        OutlierError: the requested number does not fit, or not even one conversation does.
    """
    available = available or budget()
    needs = needs_of(folder, available.on_cpu, wide=use.wide)
    one = needs.cache(use.tokens, use.kv_bits, use.kv_group_size, use.kv_start)
    beside, drafts = (0, 0) if draft is None else draft_nbytes(draft, use, available)
    one += drafts
    batches, asked = use.kv_bits is None, None

    def together(capacity: Capacity) -> int:
        return min(clients, capacity.conversations) if batches else 1

    if responses is not None:
        asked = Capacity(responses, prompts or _quarter(responses))
        use = replace(use, conversations=together(asked), prompts=asked.prompt_concurrency)
    first = plan(folder, use, memory, available, beside=beside + use.conversations * drafts)
    left = available.nbytes - first.loaded - beside
    if memory == AUTO and first.slots is not None:
        # Slots got what is best for so many conversations; no more of them take the headroom.
        left -= available.headroom
    room = _Room(needs, replace(use, step=first.step), left, one)
    read = prompts or room.prompts()
    fitting = capacity_for(room.conversations(read), read)
    capacity = asked or fitting
    conversations = together(capacity)
    cures = ["a smaller --max-context"]
    if conversations > 1 and room.conversations(read):
        cures.insert(0, f"--decode-concurrency {fitting.decode_concurrency}")
    planned = check_fits(
        folder,
        replace(room.use, conversations=conversations, prompts=capacity.prompt_concurrency),
        available,
        memory=first.expert_memory,
        cures=cures,
        draft=draft,
    )
    if one:
        free = max(room.free(capacity.prompt_concurrency), conversations * one)
        # Without batches, mlx-lm does not count the cache of the current conversation.
        limit = free if batches else free - one
        cache_bytes = limit if cache_bytes is None else min(cache_bytes, limit)
        capacity = replace(capacity, cache_memory=free)
        planned = replace(
            planned,
            kv_cache=Part(free, "what is left, for all conversations"),
            beside=replace(planned.beside, nbytes=beside),
        )
    return replace(capacity, prompt_cache_bytes=cache_bytes), conversations, planned


@dataclass(frozen=True)
class _Room:
    """What the weights leave free, for KV caches and for what is computed.

    Attributes:
        needs: what the model takes.
        use: how it is going to be used; how many prompts are read together varies.
        nbytes: bytes that are left.
        one: bytes of a conversation's KV caches; 0: not known.
    """

    needs: Needs
    use: Use
    nbytes: int
    one: int

    def free(self, prompts: int) -> int:
        """Bytes for KV caches, if so many prompts are read together."""
        return max(0, self.nbytes - self.needs.working(replace(self.use, prompts=prompts)))

    def conversations(self, prompts: int) -> int:
        """How many conversations fit, if so many prompts are read together."""
        if self.one == 0:
            return MAX_CONVERSATIONS
        return min(self.free(prompts) // self.one, MAX_CONVERSATIONS)

    def prompts(self) -> int:
        """How many prompts to read together: at most a quarter of the conversations, or one."""
        # The more are read together, the less is left for conversations.
        numbers = range(MAX_PROMPTS, 1, -1)
        return next((n for n in numbers if n <= self.conversations(n) // 4), 1)


def _quarter(conversations: int) -> int:
    """Prompts to read together, of so many conversations."""
    return max(1, min(MAX_PROMPTS, conversations // 4))
