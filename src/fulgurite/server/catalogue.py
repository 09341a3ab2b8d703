"""The models there are, from their cards alone: as JSON for programs, and as pages for people."""

import asyncio
import html
import json
from dataclasses import fields
from string import Template
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import HTMLResponse, Response

from fulgurite.cards import card
from fulgurite.parameters import Parameters
from fulgurite.picture_file import FORMATS, file_bytes
from fulgurite.records import dollars
from fulgurite.request import Request
from fulgurite.server.problems import error_responses
from fulgurite.server.service import Service, demo_notice

# A card's fields that are no client's business:
NETWORKS = {"preview_rgb", "unet", "vae", "fast_decoder", "text_encoders", "weights"}
EXAMPLE = {"prompt": "futuristic spacecraft", "num_steps": 8, "seed": 12345}

PYTHON = Template("""\
import requests

response = requests.post(
    "$url",
    headers={"Authorization": "Bearer YOUR_KEY"},
    json=$body,
)
response.raise_for_status()
with open("output.png", "wb") as file:
    file.write(response.content)""")

CURL = Template("""\
curl --fail-with-body "$url" \\
    -H "Authorization: Bearer YOUR_KEY" \\
    -H "Content-Type: application/json" \\
    -d '$body' \\
    -o output.png""")

JAVASCRIPT = Template("""\
import { writeFile } from "node:fs/promises";

const response = await fetch("$url", {
  method: "POST",
  headers: { "Authorization": "Bearer YOUR_KEY", "Content-Type": "application/json" },
  body: JSON.stringify($body),
});
if (!response.ok) throw new Error(await response.text());
await writeFile("output.png", Buffer.from(await response.arrayBuffer()));""")

FRAME = Template("""\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
  :root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
  body { max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
  img { max-width: 100%; border-radius: .5rem; }
  pre { overflow-x: auto; padding: 1rem; border: 1px solid #8886; border-radius: .5rem; font-size: .85rem; }
  table { border-collapse: collapse; width: 100%; }
  th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884; }
</style>
$body
</html>
""")

FRONT = Template("""\
<h1>Fulgurite</h1>
<p>Pictures from a prompt: <code>POST $url</code> answers with one. It asks for an API key, which whoever runs this
server gives you. A model's page has examples to copy; <a href="/docs">the documentation</a> has all requests.</p>
<table><tr><th>model<th>cost</tr>$models</table>""")

LISTED = Template("""\
<tr><td><a href="/models/$id">$name</a> <code>$id</code><br>$description $demo<td>$cost</tr>""")

PAGE = Template("""\
<nav><a href="/">All models</a> · <a href="/docs">Documentation</a></nav>
<h1>$name</h1>
<p>$description</p>
<p>$demo</p>
<img src="/models/$id/example.png" alt="An example made by this server: $prompt" onerror="this.remove()">
<table>$facts</table>
<h2>Parameters</h2>
<table><tr><th>name<th>type<th>default<th>bounds<th>what it does</tr>$parameters</table>
<h2>Python</h2><pre>$python</pre>
<h2>curl</h2><pre>$curl</pre>
<h2>JavaScript</h2><pre>$javascript</pre>""")


def add_catalogue(app: FastAPI, service: Service) -> None:
    examples: dict[str, asyncio.Task[bytes]] = {}

    @app.get("/api/v1/models")
    async def catalogue(http: HTTPRequest) -> dict[str, Any]:
        """The models there are."""
        return {"models": [described(model, http, service) for model in service.served]}

    @app.get("/api/v1/models/{model:path}", responses=error_responses(404, 422))
    async def catalogue_entry(http: HTTPRequest, model: str) -> dict[str, Any]:
        """One model: its card, its parameters as JSON Schema, and examples for this server."""
        service.check_served(model)
        return described(model, http, service)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def front(http: HTTPRequest) -> str:
        """What people find who open the server's address."""
        return rendered_front([described(model, http, service) for model in service.served], f"{http.base_url}api/v1")

    @app.get("/models/{model:path}/example.png", response_class=Response, include_in_schema=False)
    async def example(model: str) -> Response:
        """A picture of the model, drawn at the first visit."""
        service.check_served(model)
        if model not in examples or (examples[model].done() and examples[model].exception()):
            examples[model] = asyncio.create_task(drawn_example(model, service))
        picture = await asyncio.shield(examples[model])
        return Response(picture, media_type=FORMATS["png"], headers={"Cache-Control": "max-age=86400"})

    @app.get("/models/{model:path}", response_class=HTMLResponse, include_in_schema=False)
    async def page(http: HTTPRequest, model: str) -> str:
        """The model's page."""
        service.check_served(model)
        return rendered(described(model, http, service))


async def drawn_example(model: str, service: Service) -> bytes:
    drawn_by = service.settings.drawn_by(model)
    width, height = card(drawn_by).usual_size
    asked = Parameters.model_validate(EXAMPLE | {"width": width, "height": height})
    job = service.engine.submit(drawn_by, Request(**asked.model_dump()))
    return await asyncio.to_thread(file_bytes, await asyncio.wrap_future(job), FORMATS["png"])


def described(model: str, http: HTTPRequest, service: Service) -> dict[str, Any]:
    """A model as clients see it: the card's fields, and what follows from them."""
    of_model = card(model)
    shown = {field.name: getattr(of_model, field.name) for field in fields(of_model) if field.name not in NETWORKS}
    url, price = f"{http.base_url}api/v1", service.price(model)
    shown |= {
        "cost_microdollars": price,
        "cost": f"${dollars(price)} per image",
        "endpoint_url": url,
        "page_url": f"{http.base_url}models/{model}",
        "parameters": parameters_of(model, service),
        "examples": examples_for(model, url),
    }
    if (drawn_by := service.settings.drawn_by(model)) != model:
        shown |= {"answered_by": drawn_by, "demo": demo_notice(model, drawn_by)}
    return shown


def parameters_of(model: str, service: Service) -> dict[str, Any]:
    """The parameters as JSON Schema, with what is this model's own."""
    drawn_by = service.settings.drawn_by(model)
    schema = Parameters.model_json_schema()
    schema["properties"]["decoder"] |= {
        "enum": list(card(drawn_by).decoders),
        "default": service.settings.usual_decoder(drawn_by),
    }
    return schema


def examples_for(model: str, url: str) -> dict[str, str]:
    body = {"model": model, "data": EXAMPLE}
    compact, indented = json.dumps(body), json.dumps(body, indent=4)
    return {
        "python": PYTHON.substitute(url=url, body=indented.replace("\n", "\n    ")),
        "curl": CURL.substitute(url=url, body=compact),
        "javascript": JAVASCRIPT.substitute(url=url, body=indented.replace("\n", "\n  ").replace("    ", "  ")),
    }


def escaped(shown: dict[str, Any]) -> dict[str, str]:
    """For a page; a model's demo is empty where it draws itself."""
    return {name: html.escape(str(value)) for name, value in ({"demo": ""} | shown).items()}


def framed(title: str, body: str) -> str:
    """A whole page; ``body`` is HTML."""
    return FRAME.substitute(title=html.escape(title), body=body)


def rendered_front(models: list[dict[str, Any]], url: str) -> str:
    """The page of all models; everything that comes from a card or from the client's own address is escaped."""
    listed = [LISTED.substitute(escaped(model)) for model in models]
    return framed("Fulgurite", FRONT.substitute(url=html.escape(url), models="".join(listed)))


def rendered(model: dict[str, Any]) -> str:
    """The page; everything that comes from a card or from the client's own address is escaped."""
    facts = {
        "Model": model["id"],
        "Type": model["type"],
        "Cost": model["cost"],
        "Hosted regions": ", ".join(model["hosted_regions"]) or "none",
        "Available regions": ", ".join(model["available_regions"]),
        "Base architecture": model["base_architecture"],
        "Endpoint URL": model["endpoint_url"],
        "Step schedules": ", ".join(map(str, model["schedules"])) or "any number of steps",
        "Licence": model["license"],
    }
    required = model["parameters"]["required"]
    # Of what may be null too, what it else is.
    parameters = {name: has | has.get("anyOf", [{}])[0] for name, has in model["parameters"]["properties"].items()}
    rows = (
        (
            name,
            has["type"],
            "required" if name in required else has.get("default", "random"),
            bounds(has),
            has["description"],
        )
        for name, has in parameters.items()
    )
    body = PAGE.substitute(
        escaped(model | model["examples"] | {"prompt": EXAMPLE["prompt"]}),
        facts="".join(row("th", "td", fact) for fact in facts.items()),
        parameters="".join(row("td", "td", parameter) for parameter in rows),
    )
    return framed(model["name"], body)


def row(first: str, others: str, cells: tuple[Any, ...]) -> str:
    head, *rest = (html.escape(str(cell)) for cell in cells)
    return f"<tr><{first}>{head}" + "".join(f"<{others}>{cell}" for cell in rest) + "</tr>"


def bounds(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " or ".join(schema["enum"])
    if "minimum" in schema:
        return f"{schema['minimum']} to {schema['maximum']}"
    return f"{schema.get('minLength', 0)} to {schema['maxLength']} characters"
