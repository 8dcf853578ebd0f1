"""What a start would say of many configurations, in a process of their own; `driver` has the processes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.integration.engine import driver

KIND = "configurations"


@dataclass(kw_only=True)
class Configurations:
    """Engine options by name, each on top of a model and a bundle, of which no engine is started.

    Attributes:
        model, bundle: local folders.
        arguments: of `vllm.EngineArgs`, by name of the configuration.
        kind: tells the process what to play.
    """

    model: str
    bundle: str
    arguments: dict[str, dict[str, Any]]
    kind: str = KIND


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the check said of each configuration, empty where it is accepted, and architectures of vLLM's registry that
    take more than text.
    """

    messages: dict[str, str]
    multimodal: list[str]


def tell(question: Configurations, folder: Path) -> Told:
    """Have a process make each configuration as an engine would, and check it as the model does when it is built."""
    return Told(**driver.deliver(asdict(question), driver.environment_of({}, v2_interpreted=False), folder))


def run_configurations(question: Path) -> Told:
    """Answer in this process."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models.registry import _MULTIMODAL_MODELS

    from steering.engine.compat import check_configuration
    from steering.engine.options import options_from
    from steering.engine.plugin import engine_arguments
    from steering.errors import OperatorError

    fields = json.loads(question.read_text())
    messages = {}
    for name, arguments in fields["arguments"].items():
        own = {"model": fields["model"], "skip_tokenizer_init": True, **engine_arguments([Path(fields["bundle"])])}
        config = EngineArgs(**{**own, **arguments}).create_engine_config()
        try:
            options = options_from(config)
            assert options is not None
            check_configuration(config, options)
            messages[name] = ""
        except OperatorError as error:
            messages[name] = error.message
    return Told(messages=messages, multimodal=sorted(_MULTIMODAL_MODELS))
