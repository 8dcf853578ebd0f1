"""Settings: read once, from the command line first and from `TRIMTAB_*` variables second.

Knows nothing of vLLM, torch or HTTP.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.service import Limits
from steering.errors import UnsupportedConfiguration

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class Settings(BaseSettings):
    """How this server is run; durations in seconds.

    Attributes:
        host, port: where clients are answered. Without API keys only loopback addresses are allowed.
        admin_host, admin_port: where operators and their monitoring are answered: metrics, health, administration.
        model: local model folder; None serves the demo.
        bundles: bundle folders, the default one first; empty serves the demo's.
        served_model_name: what clients send as `model`.
        accept_transfer: bundles made for another model of the same shape are accepted.
        steer_layers: decoder blocks that carry the op beside those the bundles need, for bundles loaded later: numbers
            with commas between them, or "all".
        check_finite: steered requests whose residuals become infinite or no numbers are ended with an error.
        max_body_bytes: more are not read.
        body_timeout: for the whole body.
        max_inflight: requests answered at once.
        outcome_timeout, first_token_timeout, between_timeout, total_timeout: see `server.service.Limits`.
        drain_delay: from SIGTERM, for load balancers to see `/readyz` answer 503.
        drain_grace: for requests in flight, after that.
    """

    model_config = SettingsConfigDict(env_prefix="TRIMTAB_", extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    admin_host: str = "127.0.0.1"
    admin_port: Annotated[int, Field(ge=0, le=65_535)] = 8001
    model: Path | None = None
    bundles: tuple[Path, ...] = ()
    served_model_name: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    accept_transfer: bool = False
    steer_layers: Annotated[str, Field(pattern=r"^(all|\d{1,4}(,\d{1,4})*)?$")] = ""
    check_finite: bool = False
    max_body_bytes: Annotated[int, Field(ge=1024)] = 2_000_000
    body_timeout: Seconds = 30.0
    max_inflight: Annotated[int, Field(ge=1)] = 1024
    outcome_timeout: Seconds = 5.0
    first_token_timeout: Seconds = 120.0
    between_timeout: Seconds = 60.0
    total_timeout: Seconds = 600.0
    drain_delay: Annotated[float, Field(ge=0, le=600)] = 0.5
    drain_grace: Annotated[float, Field(ge=0, le=3600)] = 30.0

    @property
    def armed_layers(self) -> tuple[int, ...] | Literal["all"]:
        """`steer_layers` as numbers."""
        if self.steer_layers == "all":
            return "all"
        return tuple(int(number) for number in self.steer_layers.split(",") if number)

    @property
    def limits(self) -> Limits:
        """The service's share of the settings."""
        return Limits(
            inflight=self.max_inflight,
            outcome=self.outcome_timeout,
            first_token=self.first_token_timeout,
            between=self.between_timeout,
            total=self.total_timeout,
        )


def check_host(host: str) -> None:
    """Refuse addresses that others can reach: without API keys, whoever reaches the server may lower refusals.

    Raises:
        UnsupportedConfiguration: not a loopback address, and not the name `localhost`.
    """
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if not is_loopback:
        raise UnsupportedConfiguration(
            f"--host {host} can be reached by others, and no API keys are configured: whoever reaches this server "
            "may lower what the model refuses. Listen on 127.0.0.1 and put a proxy that authenticates in front"
        )
