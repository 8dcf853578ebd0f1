"""What the dashboard asks, row by row.

Knows nothing of how Grafana spells it.
"""

from __future__ import annotations

from panel import GREEN, RED, YELLOW, Panel, Row, q, quantile, quantiles, rate, stat

NOW = Row(
    title="Now",
    panels=(
        stat("Ready", "sum(steering_ready{HERE})", (0, RED), (1, GREEN), text="Servers that take requests."),
        stat(
            "Edits not applied",
            "sum(steering_unapplied_total{HERE})",
            (1, RED),
            text="Answers withheld since the engine did not confirm their edit. Must be 0.",
        ),
        stat(
            "Requests",
            'sum(rate(steering_requests_total{HERE,endpoint=~"CHAT"}[$__rate_interval]))',
            text="For answers, per second.",
            unit="reqps",
        ),
        stat(
            "Server errors, 10 min",
            "job:steering_server_errors:ratio10m",
            (0.001, YELLOW),
            (0.01, RED),
            text="Share of requests that ended with a status of 5xx.",
            unit="percentunit",
        ),
        stat("In flight", "sum(steering_inflight_requests{HERE})", text="Requests being answered."),
        stat(
            "Rows taken",
            "sum(steering_rows_in_use{HERE}) / sum(steering_rows_limit{HERE})",
            (0.7, YELLOW),
            (0.9, RED),
            text="Of the rows that steered requests need in the engine; beyond them is 503.",
            unit="percentunit",
        ),
        stat(
            "Enforced",
            "min(steering_enforced_share{HERE})",
            (0, YELLOW),
            (1, GREEN),
            text="Share of requests whose decisions are carried out; 0 is shadow mode. The least of all profiles.",
            unit="percentunit",
        ),
        stat("Alerts", 'count(ALERTS{alertstate="firing"}) or vector(0)', (1, RED), text="Firing now."),
    ),
)

REFUSALS = Row(
    title="Refusals of live traffic (they mix what the model does with who asked what)",
    panels=(
        Panel(
            title="Refused by category, 1 h",
            text="Of gated and steered answers whose verdict is known. Read it with n beside it.",
            queries=(q("category:steering_refusal:ratio1h", "{{category}}"),),
            unit="percentunit",
            limits=(0, 1),
        ),
        Panel(
            title="n behind it, 1 h",
            text="Answers behind each rate; of fewer than 50 a rate says little.",
            queries=(q("category:steering_answers:increase1h", "{{category}}"),),
        ),
        Panel(
            title="Refused by decision, 1 h",
            text="Comply should be low, refuse high; off is the bare model.",
            queries=(
                q("decision_mode:steering_refusal:ratio1h", "{{decision}} ({{mode}})"),
                q("decision_mode:steering_answers:increase1h", "n {{decision}} ({{mode}})"),
            ),
            kind="table",
            unit="percentunit",
            renamed=(("Value #A", "refused"), ("Value #B", "n")),
        ),
        Panel(
            title="Decisions",
            text="What was decided per request; in shadow mode it was not done.",
            queries=(q(rate("steering_decisions_total", "decision", "mode"), "{{decision}} ({{mode}})"),),
            unit="reqps",
            is_stacked=True,
        ),
        Panel(
            title="Decisions by category",
            text="What gates took prompts for, and what was decided.",
            queries=(
                q(
                    rate("steering_decisions_total", "category", "decision", where='HERE,decision!="off"'),
                    "{{category}}: {{decision}}",
                ),
            ),
            unit="reqps",
            is_stacked=True,
        ),
        Panel(
            title="What came out",
            text="Choices by outcome; unknown is where no detector could tell.",
            queries=(q(rate("steering_outcomes_total", "outcome", "detector"), "{{outcome}} ({{detector}})"),),
            unit="cps",
            is_stacked=True,
        ),
    ),
)

CANARY = Row(
    title="Canary: the same prompts to each profile, again and again",
    panels=(
        Panel(
            title="Over-refusal",
            text="Share refused of what should be answered, in the last run; none is the model without steering.",
            queries=(q('profile_set:steering_canary_refusal:ratio{set!~"harmful.*|other"}', "{{profile}}: {{set}}"),),
            unit="percentunit",
            width=7,
            limits=(0, 1),
        ),
        Panel(
            title="Under-refusal",
            text="Share answered of what should be refused, in the last run; none is the model without steering.",
            queries=(q('1 - profile_set:steering_canary_refusal:ratio{set=~"harmful.*"}', "{{profile}}: {{set}}"),),
            unit="percentunit",
            width=7,
            limits=(0, 1),
        ),
        Panel(
            title="n behind them",
            text="Prompts with a known verdict in the last run; alerts need 50.",
            queries=(q("profile_set:steering_canary_prompts:min", "{{profile}}: {{set}}"),),
            width=4,
        ),
        Panel(
            title="Since the last run",
            text="The canary gives way to clients.",
            queries=(q("time() - max by (profile) (steering_canary_last_run_timestamp_seconds{HERE})", "{{profile}}"),),
            unit="s",
            width=3,
        ),
        Panel(
            title="Runs given up",
            text="In an hour, and why.",
            queries=(q("sum by (reason) (increase(steering_canary_skipped_total{HERE}[1h]))", "{{reason}}"),),
            width=3,
        ),
    ),
)

GATE = Row(
    title="Gate",
    panels=(
        Panel(
            title="Refusal probabilities that gates read",
            text="How many prompts lie where; mass between the thresholds is what the gate leaves alone.",
            queries=(q("sum by (le) (increase(steering_probe_score_bucket{HERE}[$__rate_interval]))", "{{le}}"),),
            kind="heatmap",
            limits=(None, None),
        ),
        Panel(
            title="Drift of scores against the fit",
            text="Population stability index: below 0.1 none, above 0.25 much.",
            queries=(q("max by (profile) (steering_probe_drift_psi{HERE})", "{{profile}}"),),
            steps=((0.1, YELLOW), (0.25, RED)),
        ),
        Panel(
            title="Scores behind it",
            text="In the window; below 200 no index is given.",
            queries=(q("min by (profile) (steering_probe_drift_samples{HERE})", "{{profile}}"),),
            width=4,
        ),
        Panel(
            title="Taken for",
            text="Categories by who named them.",
            queries=(q(rate("steering_probe_categories_total", "category", "source"), "{{category}} ({{source}})"),),
            unit="reqps",
            width=4,
            is_stacked=True,
        ),
    ),
)

COST = Row(
    title="What steering costs",
    panels=(
        Panel(
            title="First token, steered or not",
            text="Of streams, from admission to the first confirmed token.",
            queries=quantiles("steering_time_to_first_token_seconds", "steered", "steered: {{steered}}"),
            unit="s",
        ),
        Panel(
            title="Whole answer, steered or not",
            text="Prompts and lengths differ between the two: refusals are short.",
            queries=quantiles(
                "steering_request_duration_seconds", "steered", "steered: {{steered}}", 'HERE,endpoint=~"CHAT"'
            ),
            unit="s",
        ),
        Panel(
            title="Stages, p99",
            text="Where the gateway's own time goes.",
            queries=(q(quantile(0.99, "steering_stage_duration_seconds", "stage"), "{{stage}}"),),
            unit="s",
        ),
        Panel(
            title="Prompt tokens from the prefix cache",
            text="Steered prompts share their clean blocks; what lacks is the price of keeping edits apart.",
            queries=(
                q(
                    "sum by (steered) (increase(steering_prompt_tokens_cached_total{HERE}[10m])) / "
                    '(sum by (steered) (increase(steering_tokens_total{HERE,kind="prompt"}[10m])) > 0)',
                    "steered: {{steered}}",
                ),
            ),
            unit="percentunit",
            limits=(0, 1),
        ),
        Panel(
            title="Tokens",
            text="Read and written, per second.",
            queries=(q(rate("steering_tokens_total", "kind", "steered"), "{{kind}}, steered: {{steered}}"),),
            unit="cps",
            is_stacked=True,
        ),
        Panel(
            title="Rows",
            text="For steered requests in the engine.",
            queries=(
                q("sum(steering_rows_in_use{HERE})", "taken"),
                q("sum(steering_rows_limit{HERE})", "limit"),
            ),
        ),
    ),
)

SERVICE = Row(
    title="Service",
    panels=(
        Panel(
            title="Latency by endpoint",
            text="From a request's first byte to its answer's last.",
            queries=quantiles(
                "steering_request_duration_seconds", "endpoint", "{{endpoint}}", 'HERE,endpoint=~"/v1/.*"'
            ),
            unit="s",
        ),
        Panel(
            title="Requests by status",
            text="499 is a client that left.",
            queries=(q(rate("steering_requests_total", "status", where='HERE,endpoint=~"/v1/.*"'), "{{status}}"),),
            unit="reqps",
            is_stacked=True,
        ),
        Panel(
            title="Errors by code",
            text="Also those told in a stream, whose status was 200.",
            queries=(q(rate("steering_errors_total", "code"), "{{code}}"),),
            unit="cps",
            is_stacked=True,
        ),
        Panel(
            title="Engine's queue",
            text="By vLLM's own count.",
            queries=(
                q("sum(vllm:num_requests_running{HERE})", "running"),
                q("sum(vllm:num_requests_waiting{HERE})", "waiting"),
            ),
        ),
        Panel(
            title="Clients that left",
            text="Before their answer was complete, or too slow to read it.",
            queries=(
                q("sum(rate(steering_client_disconnects_total{HERE}[$__rate_interval]))", "left"),
                q("sum(rate(steering_stream_stalls_total{HERE}[$__rate_interval]))", "too slow"),
            ),
            unit="cps",
        ),
        Panel(
            title="Turned away",
            text="For want of a key or a permission, or over a key's limits.",
            queries=(q(rate("steering_rejections_total", "reason"), "{{reason}}"),),
            unit="reqps",
            is_stacked=True,
        ),
        Panel(
            title="Audit",
            text="Records written; failures must be 0.",
            queries=(
                q(rate("steering_audit_records_total", "event"), "{{event}}"),
                q("sum(rate(steering_audit_failures_total{HERE}[$__rate_interval]))", "failures"),
            ),
            unit="cps",
            width=6,
        ),
        Panel(
            title="Bundles loaded and unloaded",
            text="While running, since the start.",
            queries=(q("sum by (action, result) (steering_bundle_loads_total{HERE})", "{{action}}: {{result}}"),),
            width=6,
        ),
        Panel(
            title="Bundles",
            text="Loaded now.",
            queries=(q("count by (bundle, version, transferred) (steering_bundle_info{HERE} == 1)"),),
            kind="table",
            width=7,
            renamed=(("Value", "servers"),),
        ),
        Panel(
            title="Versions",
            text="Running now.",
            queries=(q("count by (version, vllm) (steering_build_info{HERE})"),),
            kind="table",
            width=5,
            renamed=(("Value", "servers"),),
        ),
    ),
)

JUDGE = Row(
    title="Judge (where one is configured; no request waits for it)",
    panels=(
        Panel(
            title="Refused by category as the judge sees it, 1 d",
            text="Of sampled answers, with n. Sampled by category: do not sum over categories.",
            queries=(
                q("category:steering_judged_refusal:ratio1d", "{{category}}"),
                q("category:steering_judged:increase1d", "n {{category}}"),
            ),
            kind="table",
            unit="percentunit",
            renamed=(("Value #A", "refused"), ("Value #B", "n")),
        ),
        Panel(
            title="Agreement",
            text="With people's labels at calibration, and with other detectors on the last answers.",
            queries=(q("min by (judge, against) (steering_judge_agreement_ratio{HERE})", "{{judge}}: {{against}}"),),
            unit="percentunit",
            limits=(0, 1),
        ),
        Panel(
            title="Sampled, failed, waiting",
            text="Failures are no verdicts, and are counted by reason.",
            queries=(
                q("sum(rate(steering_judge_sampled_total{HERE}[$__rate_interval]))", "sampled"),
                q(rate("steering_judge_failures_total", "reason"), "failed: {{reason}}"),
                q("sum(steering_judge_queue{HERE})", "waiting"),
            ),
        ),
    ),
)

ROWS = (NOW, REFUSALS, CANARY, GATE, COST, SERVICE, JUDGE)
