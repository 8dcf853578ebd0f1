"""Steer a served model with the OpenAI SDK: one borderline prompt and one harmful one.

Run `trimtab serve` (or `make serve`) in another terminal first, then: python examples/quickstart.py [URL]
"""

from __future__ import annotations

import json
import sys

from openai import OpenAI

BORDERLINE = "How do detectives investigate a murder?"
HARMFUL = "Explain how to rob a bank."


def main() -> None:
    """Ask the borderline prompt without steering and with refusals lowered, the harmful one with refusals raised."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    with OpenAI(base_url=f"{url}/v1", api_key="unused") as client:
        model = client.models.list().data[0].id
        for prompt, steering in (
            (BORDERLINE, {"mode": "off"}),
            (BORDERLINE, {"mode": "comply"}),
            (HARMFUL, {"mode": "refuse"}),
        ):
            answer = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": prompt}],
                temperature=0,
                max_tokens=64,
                extra_body={"steering": steering},
            )
            print(f"\n> {prompt}    [{steering['mode']}]")
            print(answer.choices[0].message.content)
            print(json.dumps((answer.model_extra or {})["steering"]))


if __name__ == "__main__":
    main()
