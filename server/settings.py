"""Settings: read once, from the command line first, from `TRIMTAB_*` variables second, from one TOML file last.

Knows nothing of vLLM, torch or HTTP.
"""

from __future__ import annotations

import ipaddress
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, SecretStr
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from server.access.admission import AccessOrder
from server.limits import Limits
from server.observe.log import LogFormat
from steering.errors import UnsupportedConfiguration

Seconds = Annotated[float, Field(gt=0, le=86_400)]
Share = Annotated[float, Field(ge=0, le=1)]


class Settings(BaseSettings):
    """How this server is run; durations in seconds.

    Attributes:
        config: TOML file of settings, by the names they have here; those given elsewhere go before.
        keys_file: API keys, see `trimtab key`; None lets whoever reaches the server do everything.
        audit_log: where it is put on record who may lower refusals and who administers; needed for keys that may.
        audit_secret_file: by which prompts are hashed there; None makes one beside the log.
        audit_max_bytes, audit_files: the log is rotated at this size, and so many old ones are kept.
        require_signature, signature_key: bundles must be signed by the owner of this public key (PEM).
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
        max_inflight: answers generated at once, counted by `n` and by prompt; more are refused with 503.
        max_connections: open at once, on each port; more are told so with 503 and closed.
        keep_alive_timeout: for the next request on a connection; longer than the 60 of common balancers, which
            otherwise send into connections that are being closed.
        default_max_tokens: of an answer whose request and whose key name no number, within the model's context.
        outcome_timeout, first_token_timeout, between_timeout, total_timeout: see `server.limits.Limits`.
        heartbeat_interval: between requests of one token, steered and not, that the server sends itself while no other
            is answered; 0 for never.
        heartbeat_timeout: for each; `/readyz` answers 503 when one fails. One that waits in vain while others are given
            tokens does not fail.
        heartbeat_failures: in a row, after which `/livez` answers 503 as well.
        death_delay: from the death of the engine to the end of this process, which ends with 1.
        canary_interval: between two runs of the canary, which asks fixed prompts of every gated profile; 0 for none.
        canary_prompts: file of them, a JSON object `{"set", "prompt"}` a line; None asks those that come with this.
        canary_profiles: whom it asks; empty for those with a gate.
        canary_most_inflight: it waits while more other requests are being answered, for an interval at most, and then
            asks one prompt at a time.
        drift_reference: file of score counts by profile, as `trimtab bundle reference-scores` writes it, instead of
            those of the bundles' reports.
        judge_url, judge_model, judge_api_key: a model judge at an OpenAI-compatible API, which a sample of the answers
            is sent to; None for none.
        judge_profiles: whose answers may be sent there, or `*`; no others are, save the canary's where nothing else
            tells.
        judge_rates: share of answers by `category/decision`, `category/*`, `*/decision` or `*`.
        judge_per_minute: most answers.
        judge_calibration: what `trimtab judge calibrate --judge llm --out` wrote of that judge.
        enforced_share: of a profile's requests, how many are steered, by profile or `*`; 0 decides and counts alone.
        log_format: lines for people (`text`) or machines (`json`).
        log_scores: lines and spans of requests tell what probes read.
        commit: that this server was made from, for `steering_build_info`; a checkout tells its own.
        otlp_endpoint: collector that spans go to, the engine's as well; by gRPC unless
            OTEL_EXPORTER_OTLP_TRACES_PROTOCOL says `http/protobuf`.
        drain_delay: from SIGTERM, for load balancers to see `/readyz` answer 503; requests are still taken.
        drain_grace: for requests in flight after that, while new ones are refused with 503.
    """

    model_config = SettingsConfigDict(env_prefix="TRIMTAB_", extra="forbid", frozen=True)

    config: Path | None = None
    keys_file: Path | None = None
    audit_log: Path | None = None
    audit_secret_file: Path | None = None
    audit_max_bytes: Annotated[int, Field(ge=4096)] = 64 * 1024 * 1024
    audit_files: Annotated[int, Field(ge=1, le=10_000)] = 10
    require_signature: bool = False
    signature_key: Path | None = None
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
    max_connections: Annotated[int, Field(ge=1)] = 2048
    keep_alive_timeout: Annotated[int, Field(ge=1, le=86_400)] = 75
    default_max_tokens: Annotated[int, Field(ge=1)] = 4096
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
    commit: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://[^\s]+$", max_length=2048)] | None = None
    drain_delay: Annotated[float, Field(ge=0, le=600)] = 0.5
    drain_grace: Annotated[float, Field(ge=0, le=3600)] = 30.0

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - there are none
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - there are none
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """What is given here goes before what is in the environment, and that before what is in the file."""
        assert isinstance(init_settings, InitSettingsSource)
        path = init_settings.init_kwargs.get("config") or os.environ.get("TRIMTAB_CONFIG")
        if not path:
            return init_settings, env_settings
        return init_settings, env_settings, _file_of(settings_cls, Path(path))

    @property
    def access(self) -> AccessOrder:
        """The share of the settings that says who may do what."""
        return AccessOrder(
            keys=self.keys_file,
            audit_log=self.audit_log,
            audit_secret=self.audit_secret_file,
            audit_bytes=self.audit_max_bytes,
            audit_files=self.audit_files,
        )

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
            answer_tokens=self.default_max_tokens,
            outcome=self.outcome_timeout,
            first_token=self.first_token_timeout,
            between=self.between_timeout,
            total=self.total_timeout,
        )


def check_reach(settings: Settings) -> None:
    """Refuse addresses that others can reach where there are no keys: whoever reaches the server may lower refusals.

    Raises:
        UnsupportedConfiguration: an address of clients or operators is no loopback address.
    """
    if settings.keys_file is not None:
        return
    for option, host, what in (
        ("--host", settings.host, "whoever reaches this server may lower what the model refuses"),
        ("admin_host", settings.admin_host, "whoever reaches this address may load and unload bundles"),
    ):
        if not _is_loopback(host):
            raise UnsupportedConfiguration(
                f"{option} {host} can be reached by others, and no API keys are configured: {what}. Make keys with "
                "`trimtab key create` and name their file with --keys, or listen on 127.0.0.1"
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _file_of(settings: type[BaseSettings], path: Path) -> PydanticBaseSettingsSource:
    try:
        if not path.is_file():  # the source itself would take it for an empty one
            raise UnsupportedConfiguration(f"settings: no file {path}")
        return TomlConfigSettingsSource(settings, toml_file=path)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise UnsupportedConfiguration(f"settings: {path} cannot be read: {error}") from error
