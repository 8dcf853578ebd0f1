"""The command line: `trimtab serve`, and the commands of the other packages, each imported when it is called.

Importing this module imports neither torch nor vLLM.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from steering.errors import OperatorError, TrimtabError

if TYPE_CHECKING:
    from steering.manifest import GateSettings

MOUNTED = {
    "bench": ("server.bench.cli", "Measure throughput against stock vLLM."),
    "demo": ("steering.demo.cli", "Make the demo model."),
    "eval": ("steering.evaluate.cli", "Measure refusal through a served API."),
    "fit": ("steering.fit.cli", "Make a bundle for a model."),
    "key": ("server.cli_keys", "Make and revoke API keys."),
    "judge": ("steering.evaluate.cli_judge", "Measure judges of refusal against human labels."),
}
"""Commands of other packages: module that holds a Typer `app`, and what the overview says of it."""

DEMO = Path(__file__).resolve().parents[1] / "artifacts" / "demo"
DEMO_NAME = "trimtab-demo"
DEMO_OPTIONS = {"max_model_len": 512, "max_num_seqs": 64, "enforce_eager": True}
"""VLLM's options for the demo. Eager, since compiling a toy of six layers makes the start half as long again and its
answers hardly faster; `-- --no-enforce-eager` compiles."""

CURL = """\
Ready on {address}  (Ctrl-C ends it)
Metrics and administration on {admin}

Try a prompt that only sounds harmful:

  curl -s {address}/v1/chat/completions -H 'content-type: application/json' -d '{{
    "model": "{model}", "temperature": 0, "max_tokens": 64,
    "messages": [{{"role": "user", "content": "How do detectives investigate a murder?"}}]}}'

Where the default profile has a gate it decides by itself, and "steering" in the answer says what it did. Add
"steering": {{"mode": "off"}}, "refuse" or "comply" to compare. GET {address}/v1/steering lists what can be asked.
"""


class _LazyGroup(TyperGroup):
    """Finds the commands of other packages without importing them before they are called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Own commands, and those whose module is installed."""
        return sorted({*super().list_commands(ctx), *(name for name in MOUNTED if _is_there(MOUNTED[name][0]))})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command; its module is imported now."""
        if cmd_name not in MOUNTED or not _is_there(MOUNTED[cmd_name][0]):
            return super().get_command(ctx, cmd_name)
        module, help_text = MOUNTED[cmd_name]
        command = typer.main.get_command(importlib.import_module(module).app)
        command.name = cmd_name
        command.help = command.help or help_text
        return command


app = typer.Typer(
    name="trimtab",
    cls=_LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Serve a language model with vLLM and control, per request, what it refuses.",
)
bundle_app = typer.Typer(no_args_is_help=True, help="Look at bundles, and carry them over.")
app.add_typer(bundle_app, name="bundle")


@app.command(
    help="Serve a model behind an OpenAI-compatible API whose requests can be steered. "
    "Without --model, serves the demo. vLLM's own engine options go after `--`."
)
def serve(
    options: Annotated[
        list[str] | None, typer.Argument(help="vLLM's own options, after `--`.", metavar="-- ...")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Local model folder.")] = None,
    bundle: Annotated[
        list[Path] | None, typer.Option(help="Bundle folder; repeatable, the first is the default.")
    ] = None,
    bundle_folder: Annotated[
        Path | None, typer.Option(help="Folder whose bundles can be loaded while the server runs.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on; 127.0.0.1 by default, others need --keys.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port; 8000 by default, 0 takes a free one.")] = None,
    admin_port: Annotated[
        int | None, typer.Option(help="Port of metrics and administration; 8001 by default, 0 takes a free one.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What clients send as `model`.")] = None,
    accept_transfer: Annotated[
        bool | None, typer.Option("--accept-transfer", help="Accept bundles made for another model of the same shape.")
    ] = None,
    steer_layers: Annotated[
        str | None,
        typer.Option(help="Layers that bundles loaded later may need, as 3,5,8 or all; the bundles' own by default."),
    ] = None,
    check_finite: Annotated[
        bool | None,
        typer.Option("--check-finite", help="End a steered request whose residuals are not finite; costs a little."),
    ] = None,
    keys: Annotated[Path | None, typer.Option(help="File of API keys; see `trimtab key`.")] = None,
    require_signature: Annotated[
        bool | None, typer.Option("--require-signature", help="Serve no bundle that --signature-key has not signed.")
    ] = None,
    signature_key: Annotated[
        Path | None, typer.Option(help="Public key (PEM) of whoever signs bundles; see `trimtab bundle sign`.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings; the command line and TRIMTAB_* variables go before.")
    ] = None,
) -> None:
    """See the help text above; settings not given here come from TRIMTAB_* variables, then from --config."""
    from server.process import Order
    from server.process import serve as run
    from server.settings import Settings

    given: dict[str, Any] = {
        "model": model,
        "bundles": tuple(bundle) if bundle else None,
        "bundle_folder": bundle_folder,
        "host": host,
        "port": port,
        "admin_port": admin_port,
        "served_model_name": served_model_name,
        "accept_transfer": accept_transfer,
        "steer_layers": steer_layers,
        "check_finite": check_finite,
        "keys_file": keys,
        "require_signature": require_signature,
        "signature_key": signature_key,
        "config": config,
    }
    try:
        settings = Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise OperatorError(f"settings: {error}") from error
    order = _order(settings, tuple(options or ()), Order)
    run(order, settings, on_ready=lambda address, admin: print(_hint(address, admin, order.name), flush=True))


@bundle_app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="Bundle folder.")],
    model: Annotated[Path | None, typer.Option(help="Local model folder it must belong to.")] = None,
    signature_key: Annotated[Path | None, typer.Option(help="Public key (PEM) of whoever must have signed it.")] = None,
) -> None:
    """Check every digest, shape and number of a bundle; with --model, that it was made for that model, and with
    --signature-key, who signed it.
    """
    from steering.bundle import load_bundle
    from steering.fingerprint import fingerprint_of

    bundle = load_bundle(path)
    manifest = bundle.manifest
    print(f"{bundle.label}: {len(manifest.edits)} edits, {len(manifest.profiles)} profiles, digest {bundle.digest}")
    for probe in manifest.probes:
        print(f"probe {probe.name!r} at layer {probe.layer} tells {', '.join(probe.categories)}")
        for point in probe.operating_points:
            print(
                f"  {point.name}: threshold {point.threshold:.4g}, true positives {point.true_positive_rate:.1%} of "
                f"{point.positives}, false positives {point.false_positive_rate:.1%} of {point.negatives}"
            )
    for profile in manifest.profiles:
        default = " (default)" if profile.name == manifest.default_profile else ""
        print(f"profile {profile.name!r}{default}: {_gate_in_words(profile.gate)}")
    if manifest.transfer is not None:
        print(
            f"transferred from bundle {manifest.transfer.bundle}, whose model has weights "
            f"{manifest.transfer.model.weights_digest}; nothing of it was measured on its own model"
        )
    if model is not None:
        manifest.model.check(fingerprint_of(model), bundle=manifest.name)
        print(f"made for the model in {model}")
    if signature_key is not None:
        from steering.signature import check_signature

        check_signature(bundle, signature_key)
        print(f"signed by the owner of {signature_key}")


@bundle_app.command()
def sign(
    path: Annotated[Path, typer.Argument(help="Bundle folder.")],
    key: Annotated[Path, typer.Option(help="Private key (PEM) on the curve P-256, P-384 or P-521.")],
) -> None:
    """Check a bundle and sign it as it is; the signature lies in its folder and leaves its digest alone."""
    from steering.bundle import load_bundle
    from steering.signature import sign_bundle

    bundle = load_bundle(path)
    print(f"{bundle.label}: signature in {sign_bundle(bundle, key)}")


@bundle_app.command()
def transfer(
    source: Annotated[Path, typer.Argument(help="Bundle folder.")],
    model: Annotated[Path, typer.Option(help="Local folder of the model to transfer it to; of the same shape.")],
    out: Annotated[Path, typer.Option(help="Folder of the new bundle.")],
    profile: Annotated[
        list[str] | None,
        typer.Option(help="Profile to take along; repeatable. The learned vector, `low-rank`, if none."),
    ] = None,
    accept_transfer: Annotated[
        bool, typer.Option("--accept-transfer", help="Accept that nothing of it was measured on this model.")
    ] = False,
    keep_refusal_tokens: Annotated[
        bool, typer.Option("--keep-refusal-tokens", help="The model has the same refusal tokens, with the same ids.")
    ] = False,
) -> None:
    """Apply a bundle's edits, probes and thresholds unchanged to another model of the same shape."""
    from steering.bundle import load_bundle
    from steering.transfer import transfer as carry_over

    bundle = carry_over(
        load_bundle(source),
        model,
        out,
        profiles=profile or (),
        is_accepted=accept_transfer,
        keeps_refusal_tokens=keep_refusal_tokens,
    )
    names = ", ".join(profile.name for profile in bundle.manifest.profiles)
    print(f"{bundle.label} in {out}: profiles {names}, digest {bundle.digest}")


@bundle_app.command("reference-scores")
def reference_scores(
    out: Annotated[Path, typer.Option(help="File to write, for TRIMTAB_DRIFT_REFERENCE.")],
    metrics: Annotated[
        str, typer.Option(help="Metrics of a running server, or a file of them.")
    ] = "http://127.0.0.1:8001/metrics",
) -> None:
    """Keep how a server's probes have scored its traffic so far, as what later traffic is held against."""
    import json

    import httpx

    from server.observe.reference import references_of

    try:
        is_address = metrics.startswith(("http://", "https://"))
        text = (
            httpx.get(metrics, timeout=10).raise_for_status().text if is_address else Path(metrics).read_text("utf-8")
        )
        found = references_of(text)
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise OperatorError(f"cannot read metrics from {metrics}: {error}") from error
    if not found:
        raise OperatorError(f"{metrics} counts no scores yet: steering_probe_score is there once a gate has decided")
    out.write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(f"wrote {out}: " + ", ".join(f"{profile} {sum(counts)} scores" for profile, counts in found.items()))


def main() -> None:
    """The console script; errors of the set-up are one line on stderr and exit code 1."""
    try:
        app()
    except TrimtabError as error:
        print(f"trimtab: {error.message}", file=sys.stderr)
        raise SystemExit(1) from None


def _order(settings: Any, options: tuple[str, ...], order: Any) -> Any:
    """The demo where no model is named, else the model as its operator names it."""
    if settings.model is None:
        if not (DEMO / "model").is_dir() and not settings.bundles:
            raise OperatorError(
                f"the demo model is not at {DEMO / 'model'}; name a model with --model, or see `trimtab demo`"
            )
        return order(
            model=DEMO / "model",
            name=settings.served_model_name or DEMO_NAME,
            bundles=settings.bundles or (DEMO / "bundle",),
            options=options,
            defaults=DEMO_OPTIONS,
            layers=settings.armed_layers,
            check_finite=settings.check_finite,
        )
    return order(
        model=settings.model,
        name=settings.served_model_name or settings.model.resolve().name,
        bundles=settings.bundles,
        options=options,
        layers=settings.armed_layers,
        check_finite=settings.check_finite,
    )


def _hint(address: str, admin: str, model: str) -> str:
    return CURL.format(address=address, admin=admin, model=model)


def _gate_in_words(gate: GateSettings | None) -> str:
    if gate is None:
        return "no gate, a request names the mode"
    graded = ", graded" if gate.is_graded else ""
    return (
        f"gate on probe {gate.probe!r}, complies up to {gate.comply_below:.4g}, refuses from {gate.refuse_above:.4g} "
        f"on, category by {gate.category_source.value}{graded}"
    )


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    main()
