"""The page at `/`: ask, watch the decision, settle what was escalated. One static file that asks this server alone."""

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from so8t.serving.service import Service


def content_policy(html: str) -> str:
    """The Content-Security-Policy of a page: its own inline script and style by their sums, and this server; nothing else."""

    def sums(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in found)

    return (
        f"default-src 'none'; script-src {sums('script')}; style-src {sums('style')}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def page_routes(_: Service) -> APIRouter:
    """The route."""
    routes = APIRouter()
    html = files("so8t").joinpath("templates", "agent.html").read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": content_policy(html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }

    @routes.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    return routes
