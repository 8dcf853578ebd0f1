"""Options of vLLM: those that an operator may give, by its own parser.

Names vLLM, which is imported only once options are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steering.errors import UnsupportedConfiguration

if TYPE_CHECKING:
    from argparse import Namespace

STEERING_OPTIONS = ("worker_cls", "worker_extension_cls", "scheduler_cls", "additional_config")
"""vLLM options that steering sets or that could undo it."""

GATEWAY_OPTIONS = (
    "model",
    "served_model_name",
    "host",
    "port",
    "uds",
    "grpc",
    "grpc_port",
    "headless",
    "api_server_count",
    "api_key",
    "ssl_keyfile",
    "ssl_certfile",
    "ssl_ca_certs",
    "root_path",
    "middleware",
    "allowed_origins",
    "allow_credentials",
    "tokens_only",
    "enable_scale_out",
    "trust_request_chat_template",
    "trust_request_mm_kwargs",
    "return_tokens_as_token_ids",
    "sse_keep_alive_interval",
)
"""vLLM options of its own HTTP server, which does not run here."""


def parse_options(model: Path, name: str, options: Sequence[str], defaults: Mapping[str, Any]) -> Namespace:
    """VLLM's options by its own parser.

    Args:
        model: local folder.
        name: to serve it under.
        options: what the operator gave after `--`.
        defaults: by the name of vLLM's argument, used where the operator gave none.

    Raises:
        UnsupportedConfiguration: an option that steering or the gateway owns.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(prog="trimtab serve --"))  # type: ignore[no-untyped-call]
    plain = parser.parse_args([])
    parser.set_defaults(**defaults)
    given: Namespace = parser.parse_args(list(options))
    for option in (*STEERING_OPTIONS, *GATEWAY_OPTIONS):
        if getattr(given, option, None) != getattr(plain, option, None):
            why = "steering sets it" if option in STEERING_OPTIONS else "the gateway has its own, or does without"
            raise UnsupportedConfiguration(f"vLLM's option --{option.replace('_', '-')} cannot be used here: {why}")
    given.model, given.served_model_name = str(model), [name]
    given.enable_prompt_tokens_details = True
    return given


def versions() -> str:
    """VLLM's version."""
    import vllm

    return str(vllm.__version__)
