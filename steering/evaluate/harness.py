"""General benchmarks of a served model by lm-evaluation-harness, each arm a `steering` field in the request.

Its model type `local-chat-completions` puts every generation argument it does not know into the body as it is, which is
how `steering` travels. It cannot ask for the likelihood of a given text over chat, so that MMLU and HumanEval are their
generating variants. An optional package: nothing else needs it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steering.errors import OperatorError

TASKS = {"gsm8k": "gsm8k", "ifeval": "ifeval", "humaneval": "humaneval_instruct", "mmlu": "mmlu_generative"}
"""Names here, and the harness's name of the task that asks for text."""

RUNS_CODE = frozenset({"humaneval"})

PACKAGE = "lm_eval"


def check_installed(tasks: Sequence[str], *, allows_code: bool) -> None:
    """Say what is missing before anything is asked.

    Raises:
        OperatorError: an unknown task, the package is not there, or a task runs code of the model unasked.
    """
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        raise OperatorError(f"no task {unknown}; tasks: {sorted(TASKS)}")
    running = sorted(RUNS_CODE & set(tasks))
    if running and not allows_code:
        raise OperatorError(
            f"{running} runs code that the model wrote, on this machine: allow it with --run-code, in a sandbox"
        )
    if importlib.util.find_spec(PACKAGE) is None:
        raise OperatorError(
            "benchmarks need lm-evaluation-harness, which is not installed: pip install 'lm-eval[api,ifeval]'; "
            "the suites of `trimtab eval run` need nothing more"
        )


def benchmark(
    *,
    url: str,
    model: str,
    tasks: Sequence[str],
    arms: Mapping[str, Mapping[str, Any]],
    limit: int | None,
    concurrency: int,
    allows_code: bool,
    include: Path | None = None,
    key: str | None = None,
) -> dict[str, Any]:
    """Results of each task under each arm, as the harness reports them, beside the arm's field.

    Args:
        url: root of the served API.
        arms: `steering` field by name.
        limit: questions of a task at most; None for all.
        include: folder of task files that go before the harness's own of the same name, such as one over local data.
        key: of the API; None sends the harness's own, which is OPENAI_API_KEY.

    Raises:
        OperatorError: see `check_installed`; or the harness ended with an error, which is told.
    """
    check_installed(tasks, allows_code=allows_code)
    harness = importlib.import_module(PACKAGE)
    manager = None
    if include is not None:
        manager = importlib.import_module(f"{PACKAGE}.tasks").TaskManager(include_path=str(include))
    told: dict[str, Any] = {
        "model": model,
        "harness": getattr(harness, "__version__", None),
        "tasks": {name: TASKS[name] for name in tasks},
        "limit": limit,
        "arms": {},
    }
    for name, steering in arms.items():
        try:
            found = harness.simple_evaluate(
                model="local-chat-completions",
                model_args={
                    "model": model,
                    "base_url": f"{url.rstrip('/')}/v1/chat/completions",
                    "num_concurrent": concurrency,
                    "max_retries": 3,
                    "tokenized_requests": False,
                    **({} if key is None else {"header": {"Authorization": f"Bearer {key}"}}),
                },
                tasks=[TASKS[task] for task in tasks],
                gen_kwargs={"steering": dict(steering)},
                apply_chat_template=True,
                task_manager=manager,
                limit=limit,
                confirm_run_unsafe_code=allows_code,
                log_samples=False,
            )
        except Exception as error:
            raise OperatorError(
                f"lm-evaluation-harness ended under arm {name!r}: {type(error).__name__}: {error}. Its data must be "
                "reachable, or local by --include-path, and its prompts must fit the served context; what the server "
                "refused is in the lines above"
            ) from error
        told["arms"][name] = {"steering": dict(steering), "results": found["results"]}
    return told
