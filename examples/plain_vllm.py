"""Steering under vLLM's own server, for those who run their own front end: Ray Serve LLM, production-stack, llm-d.

The engine's arguments for a bundle, checked against the model, and a request that carries a plan:

    vllm serve MODEL $(python examples/plain_vllm.py arguments MODEL BUNDLE)
    python examples/plain_vllm.py ask BUNDLE "How do detectives investigate a murder?" --mode comply
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from openai import OpenAI

from steering.bundle import load_bundle
from steering.engine.options import engine_arguments
from steering.fingerprint import fingerprint_of
from steering.plan import PLAN_KEY, Mode
from steering.profile_plan import plan_of_profile


def arguments(model: Path, bundle: Path) -> dict[str, str]:
    """VLLM's engine options by name, without the dashes, as text; the JSON holds no spaces, so no shell splits it.

    Raises:
        BundleError: the bundle is damaged, or was made for another model; vLLM's own server does not look.
    """
    loaded = load_bundle(bundle)
    loaded.manifest.model.check(fingerprint_of(model), bundle=loaded.manifest.name)
    return {
        name.replace("_", "-"): value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        for name, value in engine_arguments([bundle]).items()
    }


def ask(url: str, bundle: Path, prompt: str, *, profile: str | None, mode: Mode | None) -> str:
    """One answer under a profile of the bundle; a plan the engine cannot follow is an error, never an answer."""
    plan = plan_of_profile(load_bundle(bundle), profile, mode=mode)
    with OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        answer = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=64,
            extra_body={"vllm_xargs": {PLAN_KEY: plan.to_json()}},
        )
    return answer.choices[0].message.content or ""


def main() -> None:
    """Print arguments, or an answer."""
    parser = argparse.ArgumentParser(description="Steering under vLLM's own server.")
    commands = parser.add_subparsers(dest="command", required=True)
    printed = commands.add_parser("arguments", help="vLLM's options, for its command line")
    printed.add_argument("model", type=Path)
    asked = commands.add_parser("ask", help="one steered request")
    for command in (printed, asked):
        command.add_argument("bundle", type=Path)
    asked.add_argument("prompt")
    asked.add_argument("--url", default="http://127.0.0.1:8000")
    asked.add_argument("--profile")
    asked.add_argument("--mode", type=Mode, choices=(Mode.AUTO, Mode.REFUSE, Mode.COMPLY))
    given = parser.parse_args()
    if given.command == "arguments":
        print(" ".join(f"--{name} {value}" for name, value in arguments(given.model, given.bundle).items()))
    else:
        print(ask(given.url, given.bundle, given.prompt, profile=given.profile, mode=given.mode))


if __name__ == "__main__":
    main()
