"""What a browser is shown: the web page at /, and the API's description at /docs; nothing of another host."""

import base64
from hashlib import sha256
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

from app.security import PAGE_POLICY


def add_docs(app: FastAPI) -> None:
    """Swagger UI at /docs, from this server alone."""
    page = get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=app.title,
        swagger_js_url="/docs/static/swagger-ui-bundle.js",
        swagger_css_url="/docs/static/swagger-ui.css",
        swagger_favicon_url="/docs/static/favicon.png",
    )
    script = bytes(page.body).split(b"<script>")[1].split(b"</script>")[0]  # the page's one inline script
    digest = base64.b64encode(sha256(script).digest()).decode()
    page.headers["Content-Security-Policy"] = PAGE_POLICY.replace("script-src", f"script-src 'sha256-{digest}'")
    app.mount("/docs/static", StaticFiles(packages=[("fastapi_offline", "static")]))
    app.add_api_route("/docs", lambda: page, include_in_schema=False)


def add_page(app: FastAPI, *, docs: bool) -> None:
    """The web page at /, its files under /web; without `docs` it does not point there."""
    folder = Path(__file__).parent / "web"
    index = (folder / "index.html").read_text()
    if not docs:
        index = index.replace('<p>The same over HTTP: <a href="docs">API</a>.</p>', "")
    headers = {"Content-Security-Policy": f"{PAGE_POLICY}; require-trusted-types-for 'script'; trusted-types 'none'"}
    app.mount("/web", StaticFiles(directory=folder))
    app.add_api_route("/", lambda: HTMLResponse(index, headers=headers), include_in_schema=False)
