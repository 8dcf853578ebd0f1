"""Settings: read once, from the command line first and from `TRIMTAB_*` variables second.

Knows nothing of vLLM, torch or HTTP.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from server.observe.log import LogFormat
from server.service import Limits
from steering.errors import UnsupportedConfiguration

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Share = Annotated[float, Field(ge=0, le=1)]


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
        bundle_folder: bundles in it may be loaded while this server runs; None where none may.
        max_header_bytes, max_header_fields: more are not read of a request's line and headers.
        header_timeout: for the line and headers, from their first byte or from the connection.
        max_body_bytes: more are not read.
        body_timeout: for the whole body.
        keep_alive_interval: after so long without anything to send, a stream gets a comment.
        write_timeout: a client is cut off that so long has left unread what waits to be sent.
        max_inflight: requests answered at once.
        outcome_timeout, first_token_timeout, between_timeout, total_timeout: see `server.service.Limits`.
        heartbeat_interval: between requests of one token, steered and not, that the server sends itself while no other
            is answered; 0 for never.
        heartbeat_timeout: for each; `/readyz` answers 503 when one fails.
        heartbeat_failures: in a row, after which `/livez` answers 503 as well.
        death_delay: from the death of the engine to the end of this process, which ends with 1.
        canary_interval: between two runs of the canary, which asks fixed prompts of every gated profile; 0 for none.
        canary_prompts: file of them, a JSON object `{"set", "prompt"}` a line; None asks those that come with this.
        canary_profiles: whom it asks; empty for those with a gate.
        canary_most_inflight: it waits while more other requests are being answered.
        drift_reference: file of score counts by profile, as `trimtab bundle reference-scores` writes it, instead of
            those of the bundles' reports.
        judge_url, judge_model, judge_api_key: a model judge at an OpenAI-compatible API, which a sample of the answers
            is sent to; None for none.
        judge_profiles: whose answers may be sent there, or `*`; no others are.
        judge_rates: share of answers by `category/decision`, `category/*`, `*/decision` or `*`.
        judge_per_minute: most answers.
        judge_calibration: what `trimtab judge calibrate --judge llm --out` wrote of that judge.
        enforced_share: of a profile's requests, how many are steered, by profile or `*`; 0 decides and counts alone.
        log_format: lines for people (`text`) or machines (`json`).
        log_scores: lines and spans of requests tell what probes read.
        otlp_endpoint: collector that spans go to, the engine's as well; by gRPC unless
            OTEL_EXPORTER_OTLP_TRACES_PROTOCOL says `http/protobuf`.
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
    bundle_folder: Path | None = None
    max_header_bytes: Annotated[int, Field(ge=1024, le=1_048_576)] = 16 * 1024
    max_header_fields: Annotated[int, Field(ge=16, le=10_000)] = 100
    header_timeout: Seconds = 10.0
    max_body_bytes: Annotated[int, Field(ge=1024)] = 2_000_000
    body_timeout: Seconds = 30.0
    keep_alive_interval: Seconds = 15.0
    write_timeout: Seconds = 60.0
    max_inflight: Annotated[int, Field(ge=1)] = 1024
    outcome_timeout: Seconds = 5.0
    first_token_timeout: Seconds = 120.0
    between_timeout: Seconds = 60.0
    total_timeout: Seconds = 600.0
    heartbeat_interval: Annotated[float, Field(ge=0, le=86_400)] = 30.0
    heartbeat_timeout: Seconds = 30.0
    heartbeat_failures: Annotated[int, Field(ge=1, le=100)] = 3
    death_delay: Annotated[float, Field(ge=0, le=600)] = 5.0
    canary_interval: Annotated[float, Field(ge=0, le=604_800)] = 0.0
    canary_prompts: Path | None = None
    canary_profiles: tuple[str, ...] = ()
    canary_most_inflight: Annotated[int, Field(ge=0)] = 8
    drift_reference: Path | None = None
    judge_url: Annotated[str, Field(pattern=r"^https?://[^\s]+$", max_length=2048)] | None = None
    judge_model: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    judge_api_key: SecretStr | None = None
    judge_profiles: tuple[str, ...] = ()
    judge_rates: Mapping[str, Share] = Field(default_factory=lambda: {"*": 0.02})
    judge_per_minute: Annotated[int, Field(ge=1, le=100_000)] = 60
    judge_calibration: Path | None = None
    enforced_share: Mapping[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    log_format: LogFormat = LogFormat.TEXT
    log_scores: bool = False
    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://[^\s]+$", max_length=2048)] | None = None
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
