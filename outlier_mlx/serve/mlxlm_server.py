"""mlx-lm's HTTP server, of which only the part that generates is used.

`mlx_lm.server` has no public Python API; this is the only module that imports from it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from outlier_mlx.errors import OutlierError
from outlier_mlx.serve.request import Request

try:
    from mlx_lm.server import (
        CompletionRequest,
        GenerationArguments,
        GenerationContext,
        LogitsProcessorArguments,
        ModelDescription,
        ModelProvider,
        Response,
        ResponseGenerator,
        SamplingArguments,
    )
except ImportError as error:
    raise OutlierError(f"the server of this mlx-lm version is not supported: {error}") from None

__all__ = [
    "GenerationArguments",
    "GenerationContext",
    "ModelProvider",
    "Prompt",
    "Response",
    "ResponseGenerator",
    "as_mlx_lm",
]


@dataclass
class Prompt(CompletionRequest):
    """A prompt as mlx-lm has it.

    Attributes:
        tokens: what `ResponseGenerator._tokenize` returns for it; set before it is generated from.
        abandoned: whether nobody waits for the reply any more.
    """

    tokens: Any = None
    abandoned: bool = False


def as_mlx_lm(request: Request, model: str) -> tuple[Prompt, GenerationArguments]:
    """A request as mlx-lm has it, without its stop words.

    Args:
        request: what to generate.
        model: the model's name. mlx-lm batches only requests for the same model.
    """
    sampling = vars(request.sampling)
    text = request.prompt if isinstance(request.prompt, str) else ""
    prompt = Prompt(
        request_type="text" if request.messages is None else "chat",
        prompt=text,
        messages=request.messages or [],
        tools=request.tools or None,
        role_mapping=None,
    )
    if isinstance(request.prompt, list):
        prompt.tokens = request.prompt, [request.prompt], ["assistant"], "normal", None
    arguments = GenerationArguments(
        model=ModelDescription(model, draft="", adapter=""),
        sampling=_of(SamplingArguments, sampling),
        logits=_of(LogitsProcessorArguments, sampling),
        stop_words=[],
        max_tokens=request.max_tokens,
        num_draft_tokens=0,
        logprobs=request.alternatives is not None,
        top_logprobs=request.alternatives or 0,
        seed=request.seed,
        chat_template_kwargs=request.template,
    )
    return prompt, arguments


def _of(kind: Callable[..., Any], values: dict[str, Any]) -> Any:
    return kind(**{field.name: values[field.name] for field in fields(kind)})  # type: ignore[arg-type]
