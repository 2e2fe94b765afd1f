"""The figures of a model card, as tables in Markdown."""

from collections.abc import Sequence

from outlier_mlx.checkpoints.info import Info
from outlier_mlx.errors import one_line
from outlier_mlx.measure.eval_results import Evaluation
from outlier_mlx.measure.measured import Measured
from outlier_mlx.terminal import size
from outlier_mlx.tiers.choose import CONTEXTS


def sizes(info: Info) -> str:
    """Bytes by part, and the memory that contexts take."""
    rows = [
        f"| {row.kind} | {row.params:,} | {row.nbytes:,} | {row.bits_per_weight:.2f} |"
        for row in info.rows
    ]
    text = "## Size\n\n| part | parameters | bytes | bits per weight |\n|---|---:|---:|---:|\n"
    text += "\n".join(rows)
    text += f"\n\nA token uses {info.active_params:,} of the parameters."
    if not info.kv_bytes_per_token:
        return text
    text += "\n\n| tokens of context | KV cache, 16 bits | with the weights |\n|---:|---:|---:|\n"
    caches = [(tokens, tokens * info.kv_bytes_per_token) for tokens in CONTEXTS]
    return text + "\n".join(
        f"| {tokens:,} | {size(cache)} | {size(info.nbytes + cache)} |" for tokens, cache in caches
    )


def perplexities(measured: Sequence[Measured]) -> str:
    """What `perplexity --record` found."""
    head = "| text | SHA-256 | perplexity | loss, ± nats | tokens | windows of | in | on |"
    rows = [
        f"| {code(one.text)} | {code(one.sha256[:12])} | {one.perplexity:.4f}"
        f" | {one.standard_error:.4f} | {one.tokens:,} | {one.window} | {one.dtype}"
        f" | {plain(one.chip)} |"
        for one in measured
    ]
    lines = ["## Perplexity", "", head, "|---|---|---:|---:|---:|---:|---|---|", *rows]
    far = [
        f"From {code(one.against)} on {code(one.text)}: KL divergence {one.kl:.5f} nats, the same"
        f" likeliest token for {100 * one.agreement:.2f} %."
        for one in measured
        if one.kl is not None and one.agreement is not None
    ]
    return "\n".join([*lines, *([""] if far else []), *far])


def scores(evaluations: Sequence[Evaluation]) -> str:
    """What `eval` found."""
    lines = ["## Scores"]
    for one in evaluations:
        versions = ", ".join(f"{name} {version}" for name, version in one.versions.items())
        how = f"On the {one.device.upper()}, in {one.config.get('dtype')}"
        if one.config.get("limit"):
            how += f", at most {one.config['limit']} documents a task"
        lines += ["", plain(f"{how}; {versions}") + ":", ""]
        lines += ["| task | metric | few-shot | documents | score | standard error |"]
        lines += ["|---|---|---:|---:|---:|---:|"]
        for result in one.results:
            metric = result.metric
            if result.filter != "none":
                metric += f", {result.filter}"
            shots = "" if result.fewshot is None else result.fewshot
            figures = " | ".join(_figure(value) for value in (result.value, result.stderr))
            lines.append(
                f"| {code(result.task)} | {code(metric)} | {shots} | {result.n} | {figures} |"
            )
    return "\n".join(lines)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def plain(value: object) -> str:
    """Text of others in Markdown: without what would be markup."""
    return "".join(c for c in one_line(str(value))[:300] if c not in "`|<>[]*_\\")


def code(value: object) -> str:
    """Text of others as code in Markdown."""
    return f"`{''.join(c for c in one_line(str(value))[:300] if c not in '`|')}`"
