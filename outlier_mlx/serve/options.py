"""The server's options."""

from dataclasses import dataclass

from outlier_mlx.engine.generate import Options
from outlier_mlx.errors import OutlierError
from outlier_mlx.serve.access import Access, host_name, is_address
from outlier_mlx.serve.cache_dir import CacheDir


@dataclass(frozen=True)
class ServeOptions:
    """Options of the server. Those without a description here are options of `mlx_lm.server`.

    Attributes:
        host: address or name to bind.
        port: port to bind; 0 picks a free port.
        api_key: the key that requests must send; required unless the host is a loopback address.
        allow_origins: allowed web origins, such as "https://chat.example"; "*" allows any.
        allow_hosts: allowed Host names besides `host`, "localhost" and IP addresses.
        max_tokens: largest number of tokens in a response, and the default for requests that set
            none.
        max_body: largest size of a request body in bytes.
        max_context: largest number of tokens in prompt and response together; None: the model's
            context length.
        max_clients: requests answered at a time; further ones get status 503.
        cache_memory: memory for all KV caches, in bytes; requests wait for it. None: no limit.
        prompt_lookup: look up drafts in prompt and text for a response that is generated alone, if
            there is no draft model.
        idle_unload: minutes without a request after which the model is unloaded; None: never.
        cache_dir: where KV caches are kept on disk, too; None: nowhere.
        strict: refuse requests with parameters that would have no effect.

    Raises:
        OutlierError: an option has a value that is not allowed.
    """

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    max_tokens: int = 4096
    max_body: int = 4_000_000
    max_context: int | None = None
    max_clients: int = 64
    cache_memory: int | None = None
    idle_unload: float | None = None
    cache_dir: CacheDir | None = None
    strict: bool = False
    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    prefill_step_size: int = 2048
    prompt_lookup: bool = True
    num_draft_tokens: int = 3
    decode_concurrency: int = 32
    prompt_concurrency: int = 8
    prompt_cache_size: int | None = None
    prompt_cache_bytes: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000

    def __post_init__(self) -> None:
        """Check the options."""
        Options(kv_bits=self.kv_bits, kv_group_size=self.kv_group_size)  # checks these two
        key = self.api_key
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key):
            raise OutlierError("the API key must be printable ASCII, without spaces around it")
        if key == "":
            raise OutlierError("the API key is empty")
        for origin in self.allow_origins:
            scheme, found, rest = origin.partition("://")
            if origin not in ("*", "null") and not (scheme and found and rest.rstrip("/") == rest):
                raise OutlierError(f"--allow-origin {origin}: expected SCHEME://HOST[:PORT], or *")

        for host in self.allow_hosts:
            if not host_name(host) or set(host) & set("/ *"):
                raise OutlierError(f"--allow-host {host}: expected a name, such as mac.local")

    def access(self) -> Access:
        """The access rules that follow from host, origins and key."""
        names = [host_name(host) for host in (self.host, *self.allow_hosts)]
        return Access(
            frozenset(name for name in names if name and not is_address(name)),
            frozenset(origin.lower() for origin in self.allow_origins),
            self.api_key,
        )
