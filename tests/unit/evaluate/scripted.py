"""A small OpenAI-compatible server that decides by words of the prompt: no model, no gateway.

A prompt's first number is its probability of refusal; without one it is 0.5. Prompts with `kill` are refused unsteered.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import httpx2
from openai import AsyncOpenAI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

CATEGORIES = ("Safety", "Humanizing")
PROFILES = ("refusal-control", "pooled", "random-category", "random-control")
RESPOND = 12


class ScriptedServer:
    """What it was asked, and how it misbehaves.

    Attributes:
        asked: bodies of every completion request.
        failing: status by the beginning of a prompt, given once for each number in the list.
        has_gate: mode auto is offered.
        disobeys: answers say something else than was asked.
    """

    def __init__(self, *, has_gate: bool = True, has_tokens: bool = True) -> None:
        self.asked: list[dict[str, Any]] = []
        self.failing: dict[str, list[int]] = {}
        self.has_gate = has_gate
        self.has_tokens = has_tokens
        self.disobeys = False
        self.label = "scripted@sha256:0123456789ab"
        self.counts: Counter[str] = Counter()
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/steering", self._steering),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
            ]
        )

    def client(self, max_retries: int = 0) -> AsyncOpenAI:
        """The SDK, speaking to this server."""
        http = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=self.app))
        return AsyncOpenAI(base_url="http://scripted/v1", api_key="x", http_client=http, max_retries=max_retries)

    async def _models(self, _request: Request) -> JSONResponse:
        model = {"id": "scripted", "object": "model", "created": 0, "owned_by": "x", "max_model_len": 64}
        return JSONResponse({"object": "list", "data": [model]})

    async def _steering(self, _request: Request) -> JSONResponse:
        token = (lambda name: f"[{name}]") if self.has_tokens else (lambda _: None)
        return JSONResponse(
            {
                "version": "0",
                "default_profile": "refusal-control",
                "modes": ["auto", "refuse", "comply", "off"] if self.has_gate else ["refuse", "comply", "off"],
                "profiles": list(PROFILES),
                "bundles": [
                    {"label": self.label, "categories": [{"name": name, "token": token(name)} for name in CATEGORIES]}
                ],
            }
        )

    async def _complete(self, request: Request) -> JSONResponse:
        body = json.loads(await request.body())
        self.asked.append(body)
        prompt = body["messages"][0]["content"]
        for begin, statuses in self.failing.items():
            if prompt.startswith(begin) and statuses:
                status = statuses.pop(0)
                return _error("engine_overloaded" if status == 503 else "odd", status)
        if len(prompt) > 60:
            return _error("context_length_exceeded", 400)
        steering = body["steering"]
        decision, score = self._decide(prompt, steering)
        refused = "kill" in prompt if decision in ("abstain", "off") else decision == "refuse"
        if body.get("logit_bias", {}).get(str(RESPOND), 0) >= 100:
            refused = False
        category = "Safety" if "kill" in prompt else "Humanizing"
        told: dict[str, Any] = {
            "applied": decision in ("refuse", "comply"),
            "decision": "comply" if self.disobeys else decision,
            "category": category if steering["mode"] == "auto" else None,
            "edit": f"edit-{decision}" if decision in ("refuse", "comply") else None,
            "strength": 1.0 if decision in ("refuse", "comply") else 0.0,
            "verdict": {
                "refused": refused if self.has_tokens else None,
                "category": category if refused and self.has_tokens else None,
                "detector": "refusal_token" if self.has_tokens else "none",
            },
        }
        if steering.get("report") == "full":
            told["scores"] = {"refusal": score, "categories": {"Safety": 0.6, "Humanizing": 0.4}}
        text = "I cannot help you with that." if refused else f"Here is how it is done: {prompt}."
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": text if body["max_tokens"] > 1 else ""},
        }
        if body.get("logprobs"):
            top = [{"token": "[Safety]", "logprob": -0.5 if refused else -3.0, "bytes": None}]
            choice["logprobs"] = {"content": [{"token": "x", "logprob": -0.5, "bytes": None, "top_logprobs": top}]}
        usage = {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}
        return JSONResponse(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "scripted",
                "choices": [choice],
                "usage": usage,
                "steering": told,
            }
        )

    def _decide(self, prompt: str, steering: dict[str, Any]) -> tuple[str, float]:
        found = re.search(r"0\.\d+", prompt)
        score = float(found.group()) if found else 0.5
        if steering["mode"] != "auto":
            return steering["mode"], score
        pair = steering.get("thresholds", {"comply_below": 0.2, "refuse_above": 0.8})
        if score >= pair["refuse_above"]:
            return "refuse", score
        return ("comply", score) if score <= pair["comply_below"] else ("abstain", score)


def _error(code: str, status: int) -> JSONResponse:
    body = {"error": {"message": code, "type": "x", "code": code, "param": None}}
    return JSONResponse(body, status_code=status, headers={"x-should-retry": "true"} if status == 503 else {})
