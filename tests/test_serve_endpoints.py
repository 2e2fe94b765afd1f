"""The pages of the APIs name every endpoint, parameter and item; other endpoints are refused."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import openai
import pytest
from openai.types.responses.response_create_params import ResponseCreateParamsBase

from outlier_mlx.serve.apis.endpoints import ENDPOINTS, UNSUPPORTED
from outlier_mlx.serve.apis.items import ITEM_FIELDS
from outlier_mlx.serve.apis.responses import (
    OWN_FIELDS,
    REASONING_FIELDS,
    RESPONSE_FIELDS,
    TEXT_FIELDS,
    TOOL_FIELDS,
)
from outlier_mlx.serve.fields import FIELDS
from outlier_mlx.serve.static import FILES
from tests.pages import table
from tests.program import ROOT
from tests.scripted import PLAIN
from tests.serving import Running, ServeScript

#: Fields of tools that a client has no reason to send.
UNTOLD = ("defer_loading", "async", "allowed_callers", "output_schema", "namespace")


@pytest.fixture(scope="module")
def plain(serve_script: ServeScript) -> Running:
    return serve_script("Sure", template=PLAIN)


def test_every_parameter_of_the_api_is_in_the_table():
    names = {*ResponseCreateParamsBase.__annotations__, "stream"}
    assert not [name for name in names if name not in RESPONSE_FIELDS]
    assert {name for name in names if RESPONSE_FIELDS[name].endpoint} == set()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda c: c.embeddings.create(model="x", input="a"), "/v1/embeddings"),
        (lambda c: c.moderations.create(input="a"), "/v1/moderations"),
        (lambda c: c.images.generate(prompt="a"), "/v1/images/generations"),
        (lambda c: c.audio.speech.create(model="x", input="a", voice="b"), "/v1/audio/speech"),
        (lambda c: c.files.list(), "/v1/files"),
        (lambda c: c.batches.list(), "/v1/batches"),
        (lambda c: c.conversations.create(), "/v1/conversations"),
        (lambda c: c.vector_stores.list(), "/v1/vector_stores"),
    ],
)
def test_other_endpoints_are_refused_by_name(plain: Running, call: Any, named: str):
    with pytest.raises(openai.NotFoundError) as caught:
        call(plain.new_client(max_retries=2))
    assert f"this server does not support {named}: " in caught.value.message
    assert caught.value.code == "unsupported_endpoint"


def listed(names: Iterable[str]) -> str:
    *first, last = [f"`{name}`" for name in names]
    return f"{', '.join(first)} and {last}"


def test_the_page_has_the_tables():
    text = (ROOT / "docs/apis.md").read_text(encoding="utf-8")
    page = " ".join(text.split())
    honoured = {n: f for n, f in RESPONSE_FIELDS.items() if f.use == "honoured" and not f.endpoint}
    shared = [n for n, f in honoured.items() if n in FIELDS and f.values == FIELDS[n].values]
    assert f"{listed(shared)}. These are honoured, too:" in page
    own = {name: str(field.values) for name, field in honoured.items() if name not in shared}
    assert table(text, "### Parameters of responses") == own
    assert table(text, "### Items") == {
        name: listed(n for n, field in fields.items() if field.use == "honoured")
        for name, fields in ITEM_FIELDS.items()
    }
    refused = {n: f.harmless for n, f in OWN_FIELDS.items() if f.use == "refused"}
    assert f"These are refused: {listed(n for n in refused if not refused[n])};" in page
    for name, values in refused.items():
        for value in values:
            assert f"`{name}` other than `{json.dumps(value)}`" in page
    accepted = [name for name, field in OWN_FIELDS.items() if field.use == "accepted"]
    assert f"{listed(accepted)} are accepted" in page
    for fields in (TEXT_FIELDS, REASONING_FIELDS, TOOL_FIELDS, *ITEM_FIELDS.values()):
        told = [n for n in fields if n not in UNTOLD]
        assert not [name for name in told if f"`{name}`" not in page]
    assert listed(UNSUPPORTED) in page


def test_each_endpoint_is_on_a_page():
    names = ("serve", "apis", "anthropic")
    pages = "".join((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in names)
    for path, method in ENDPOINTS.items():
        if path not in FILES and path != "/chat/completions":
            assert f"`{method} {path}`" in pages
