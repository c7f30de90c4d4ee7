"""The API's documentation as one page without scripts, generated from its OpenAPI schema."""

from __future__ import annotations

from html import escape
from typing import Any

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Content-Security-Policy of the page."""
_STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem }
code, h2 { font-family: ui-monospace, monospace } h2 { margin-top: 2.5rem; font-size: 1.1rem }
table { border-collapse: collapse; width: 100% } td { border-top: 1px solid #8888; padding: .3rem .6rem .3rem 0;
vertical-align: top } @media (prefers-color-scheme: dark) { body { background: #111; color: #eee }
a { color: #9cf } }"""


def render(schema: dict[str, Any]) -> str:
    """Return the HTML page for an OpenAPI schema: every route with its fields and responses."""
    operations = [
        _operation(schema, method, path, operation)
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    ]
    description = "".join(f"<p>{_text(part)}</p>" for part in schema["info"]["description"].split("\n\n"))
    title = escape(schema["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}: API</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body><h1>{title}: API</h1>'
        f"{description}<p>Machine-readable: "
        f'<a href="openapi.json">openapi.json</a></p>{"".join(operations)}</body></html>'
    )


def _operation(schema: dict[str, Any], method: str, path: str, operation: dict[str, Any]) -> str:
    bodies = operation.get("requestBody", {}).get("content", {})
    form = _resolve(schema, bodies.get("multipart/form-data", {}).get("schema", {}))
    fields = [(name, field.get("description", "")) for name, field in form.get("properties", {}).items()]
    responses = [(status, response.get("description", "")) for status, response in operation["responses"].items()]
    summary, description = operation.get("summary", ""), operation.get("description", "")
    return (
        f"<section><h2>{method.upper()} {escape(path)}</h2><p>{_text(summary)}. {_text(description)}</p>"
        + (f"<p>Fields</p>{_table(fields)}" if fields else "")
        + f"<p>Responses</p>{_table(responses)}</section>"
    )


def _resolve(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Return `part` of the schema, or the component that it refers to."""
    name = part.get("$ref", "").rpartition("/")[2]
    return schema["components"]["schemas"][name] if name else part


def _table(rows: list[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td><code>{escape(name)}</code></td><td>{_text(about)}</td></tr>" for name, about in rows)
    return f"<table>{cells}</table>"


def _text(text: str) -> str:
    """Return escaped text in which backticks enclose code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
