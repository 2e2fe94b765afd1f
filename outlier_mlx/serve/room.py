"""How many conversations at a time there is memory for."""

from dataclasses import dataclass
from pathlib import Path

from outlier_mlx.engine.memory import Budget, budget, check_fits, needs_of

# What mlx-lm's server does unless told otherwise.
MOST_ANSWERS = 32
MOST_PROMPTS = 8
MOST_CONVERSATIONS = MOST_ANSWERS + MOST_PROMPTS - 1


@dataclass(frozen=True)
class Room:
    """What a server may do at a time; names and meanings are those of `mlx_lm.server`'s options.

    Attributes:
        decode_concurrency: answers generated together.
        prompt_concurrency: prompts read together.
        prompt_cache_bytes: bytes of all KV caches from which on none is kept for later; None: any
            number.
    """

    decode_concurrency: int = MOST_ANSWERS
    prompt_concurrency: int = MOST_PROMPTS
    prompt_cache_bytes: int | None = None

    @property
    def conversations(self) -> int:
        """How many have a KV cache under way at most.

        mlx-lm goes on reading prompts while there is place for one more answer, and never has
        fewer places for answers than for prompts.
        """
        answers = max(self.decode_concurrency, self.prompt_concurrency)
        return answers + self.prompt_concurrency - 1


def share(conversations: int, prompts: int | None = None) -> Room:
    """Room for so many conversations under way, a quarter of them being read unless told."""
    prompts = prompts or max(1, min(MOST_PROMPTS, conversations // 4))
    return Room(max(1, min(MOST_ANSWERS, conversations - prompts + 1)), prompts)


def find_room(
    folder: Path,
    tokens: int,
    answers: int | None = None,
    prompts: int | None = None,
    cache_bytes: int | None = None,
    *,
    kv_bits: int | None = None,
    clients: int = MOST_CONVERSATIONS,
    available: Budget | None = None,
) -> tuple[Room, int]:
    """Share out the memory that a model leaves among conversations.

    Args:
        folder: the model's.
        tokens: tokens that a conversation has.
        answers: answers to be generated together; None: as many as fit, 32 at most.
        prompts: prompts to be read together; None: some, 8 at most.
        cache_bytes: bytes of KV caches from which on none is kept; None: as many as there are.
        kv_bits: of a quantized KV cache; mlx-lm then generates for one request at a time.
        clients: connections at a time, each of which waits for one answer.
        available: what there is; by default, what this machine gives.

    Returns:
        What the server may do, and how many conversations that is.

    Raises:
        OutlierError: what was asked for does not fit, or not even one conversation does.
    """
    available = available or budget()
    needs = needs_of(folder, available)
    one = needs.cache(tokens, kv_bits)
    free = max(0, available.nbytes - needs.weights)
    fit = free // one if one else MOST_CONVERSATIONS
    if answers is None:
        room = share(min(fit, MOST_CONVERSATIONS), prompts)
    else:
        room = Room(answers, prompts or max(1, min(MOST_PROMPTS, answers // 4)))
    under_way = 1 if kv_bits is not None else min(clients, room.conversations)
    cures = ["a smaller --max-context"]
    if under_way > 1 and fit:
        cures.insert(0, f"--decode-concurrency {share(fit).decode_concurrency}")
    check_fits(folder, tokens, kv_bits, available, conversations=under_way, cures=cures)
    if one:
        # Without batches, mlx-lm does not count what is under way.
        most = free - one if kv_bits is not None else free
        cache_bytes = most if cache_bytes is None else min(cache_bytes, most)
    return Room(room.decode_concurrency, room.prompt_concurrency, cache_bytes), under_way
