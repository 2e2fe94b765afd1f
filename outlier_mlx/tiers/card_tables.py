"""Parts of a tier's model card: memory, perplexities and scores."""

from collections.abc import Sequence
from typing import Any

from outlier_mlx.checkpoints.info import Info
from outlier_mlx.measure.eval_results import Evaluation
from outlier_mlx.measure.measured import Measured
from outlier_mlx.terminal import size
from outlier_mlx.tiers.choose import CONTEXTS
from outlier_mlx.writing.card import code, plain


def memory(info: Info) -> str:
    """The parameters that a token uses, and the memory that contexts take."""
    text = f"A token uses {info.active_params:,} of the parameters."
    if not info.kv_bytes_per_token:
        return text
    text += "\n\n| tokens of context | KV cache, 16 bits | with the weights |\n|---:|---:|---:|\n"
    caches = [(tokens, tokens * info.kv_bytes_per_token) for tokens in CONTEXTS]
    return text + "\n".join(
        f"| {tokens:,} | {size(cache)} | {size(info.nbytes + cache)} |" for tokens, cache in caches
    )


def as_metadata(title: str, measured: Sequence[Measured]) -> dict[str, Any]:
    """Perplexities as the hub shows them: fields of `huggingface_hub.ModelCardData`."""
    from huggingface_hub import EvalResult

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=one.text,
            dataset_revision=one.sha256,
            metric_type="perplexity",
            metric_value=one.perplexity,
            metric_args={"window": one.window, "tokens": one.tokens, "dtype": one.dtype},
        )
        for one in measured
    ]
    return {"model_name": title, "eval_results": results} if results else {}


def results(measured: Sequence[Measured], evaluations: Sequence[Evaluation]) -> list[str]:
    """The sections on what was found with a model, in the order of the card."""
    return [
        *([_perplexities(measured)] if measured else []),
        *([_scores(evaluations)] if evaluations else []),
    ]


def _perplexities(measured: Sequence[Measured]) -> str:
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


def _scores(evaluations: Sequence[Evaluation]) -> str:
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
