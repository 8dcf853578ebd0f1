"""What the dashboard asks, row by row.

Knows nothing of how Grafana spells it.
"""

from __future__ import annotations

from panel import GREEN, RED, YELLOW, Panel, Row, latencies, lines, q, quantile, rate, shares, stacked, stat, table

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
            rate("steering_requests_total", where='HERE,endpoint=~"CHAT"'),
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
            "Queued",
            "sum(vllm:num_requests_waiting{HERE})",
            (1, YELLOW),
            text="Requests that wait in the engine's queue, steered or not.",
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
        shares(
            "Refused by category, 1 h",
            "Of gated and steered answers whose verdict is known. Read it with n beside it.",
            q("category:steering_refusal:ratio1h", "{{category}}"),
        ),
        lines(
            "n behind it, 1 h",
            "Answers behind each rate; of fewer than 50 a rate says little.",
            q("category:steering_answers:increase1h", "{{category}}"),
        ),
        table(
            "Refused by decision, 1 h",
            "Comply should be low, refuse high; off is the bare model.",
            refused=q("decision_mode:steering_refusal:ratio1h", "{{decision}} ({{mode}})"),
            n=q("decision_mode:steering_answers:increase1h", "n {{decision}} ({{mode}})"),
            unit="percentunit",
        ),
        stacked(
            "Decisions",
            "What was decided per request; in shadow mode it was not done.",
            q(rate("steering_decisions_total", "decision", "mode"), "{{decision}} ({{mode}})"),
        ),
        stacked(
            "Decisions by category",
            "What gates took prompts for, and what was decided.",
            q(
                rate("steering_decisions_total", "category", "decision", where='HERE,decision!="off"'),
                "{{category}}: {{decision}}",
            ),
        ),
        stacked(
            "What came out",
            "Choices by outcome; unknown is where no detector could tell.",
            q(rate("steering_outcomes_total", "outcome", "detector"), "{{outcome}} ({{detector}})"),
            unit="cps",
        ),
    ),
)

CANARY = Row(
    title="Canary: the same prompts to each profile, again and again",
    panels=(
        shares(
            "Over-refusal",
            "Share refused of what should be answered, in the last run; none is the model without steering.",
            q('profile_set:steering_canary_refusal:ratio{set!~"harmful.*|other"}', "{{profile}}: {{set}}"),
            width=7,
        ),
        shares(
            "Under-refusal",
            "Share answered of what should be refused, in the last run; none is the model without steering.",
            q('1 - profile_set:steering_canary_refusal:ratio{set=~"harmful.*"}', "{{profile}}: {{set}}"),
            width=7,
        ),
        lines(
            "n behind them",
            "Prompts with a known verdict in the last run; alerts need 50.",
            q("profile_set:steering_canary_prompts:min", "{{profile}}: {{set}}"),
            width=4,
        ),
        lines(
            "Since the last run",
            "The canary gives way to clients; before the first whole run, since it began.",
            q(
                "time() - max by (profile) (steering_canary_last_run_timestamp_seconds{HERE} "
                "or steering_canary_since_timestamp_seconds{HERE})",
                "{{profile}}",
            ),
            unit="s",
            width=3,
        ),
        lines(
            "Runs given up",
            "In an hour, and why.",
            q("sum by (reason) (increase(steering_canary_skipped_total{HERE}[1h]))", "{{reason}}"),
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
        lines(
            "Drift of scores against the fit",
            "Population stability index: below 0.1 none, above 0.25 much.",
            q("max by (profile) (steering_probe_drift_psi{HERE})", "{{profile}}"),
            steps=((0.1, YELLOW), (0.25, RED)),
        ),
        lines(
            "Scores behind it",
            "In the window; below 200 no index is given.",
            q("min by (profile) (steering_probe_drift_samples{HERE})", "{{profile}}"),
            width=4,
        ),
        stacked(
            "Taken for",
            "Categories by who named them.",
            q(rate("steering_probe_categories_total", "category", "source"), "{{category}} ({{source}})"),
            width=4,
        ),
    ),
)

COST = Row(
    title="What steering costs",
    panels=(
        latencies(
            "First token, steered or not",
            "Of streams, from admission to the first confirmed token.",
            "steering_time_to_first_token_seconds",
            "steered",
            "steered: {{steered}}",
        ),
        latencies(
            "Whole answer, steered or not",
            "Prompts and lengths differ between the two: refusals are short.",
            "steering_request_duration_seconds",
            "steered",
            "steered: {{steered}}",
            where='HERE,endpoint=~"CHAT"',
        ),
        lines(
            "Stages, p99",
            "Where the gateway's own time goes.",
            q(quantile(0.99, "steering_stage_duration_seconds", "stage"), "{{stage}}"),
            unit="s",
        ),
        shares(
            "Prompt tokens from the prefix cache",
            "Steered prompts share their clean blocks; what lacks is the price of keeping edits apart.",
            q(
                "sum by (steered) (increase(steering_prompt_tokens_cached_total{HERE}[10m])) / "
                '(sum by (steered) (increase(steering_tokens_total{HERE,kind="prompt"}[10m])) > 0)',
                "steered: {{steered}}",
            ),
        ),
        stacked(
            "Tokens",
            "Read and written, per second.",
            q(rate("steering_tokens_total", "kind", "steered"), "{{kind}}, steered: {{steered}}"),
            unit="cps",
        ),
        lines(
            "Steered answers in flight",
            "Steered or observed, those in the engine's queue included; it has rows for twice as many as it runs.",
            q("sum(steering_rows_wanted{HERE})", "in flight"),
            q("sum(steering_rows_limit{HERE})", "rows"),
        ),
    ),
)

SERVICE = Row(
    title="Service",
    panels=(
        latencies(
            "Latency by endpoint",
            "From a request's first byte to its answer's last.",
            "steering_request_duration_seconds",
            "endpoint",
            "{{endpoint}}",
            where='HERE,endpoint=~"/v1/.*"',
        ),
        stacked(
            "Requests by status",
            "499 is a client that left.",
            q(rate("steering_requests_total", "status", where='HERE,endpoint=~"/v1/.*"'), "{{status}}"),
        ),
        stacked(
            "Errors by code",
            "Also those told in a stream, whose status was 200.",
            q(rate("steering_errors_total", "code"), "{{code}}"),
            unit="cps",
        ),
        lines(
            "Engine's queue",
            "By vLLM's own count.",
            q("sum(vllm:num_requests_running{HERE})", "running"),
            q("sum(vllm:num_requests_waiting{HERE})", "waiting"),
        ),
        lines(
            "Clients that left",
            "Before their answer was complete, or too slow to read it.",
            q(rate("steering_client_disconnects_total", "phase"), "left: {{phase}}"),
            q(rate("steering_stream_stalls_total"), "too slow"),
            unit="cps",
        ),
        stacked(
            "Turned away",
            "For want of a key or a permission, or over a key's limits.",
            q(rate("steering_rejections_total", "reason"), "{{reason}}"),
        ),
        lines(
            "Audit",
            "Records written; failures must be 0.",
            q(rate("steering_audit_records_total", "event"), "{{event}}"),
            q(rate("steering_audit_failures_total"), "failures"),
            unit="cps",
            width=6,
        ),
        lines(
            "Bundles loaded and unloaded",
            "While running, since the start.",
            q("sum by (action, result) (steering_bundle_loads_total{HERE})", "{{action}}: {{result}}"),
            width=6,
        ),
        table(
            "Bundles",
            "Loaded now.",
            servers=q("count by (bundle, version, transferred) (steering_bundle_info{HERE} == 1)"),
            width=7,
        ),
        table(
            "Versions",
            "Running now.",
            servers=q("count by (version, vllm) (steering_build_info{HERE})"),
            width=5,
        ),
    ),
)

JUDGE = Row(
    title="Judge (where one is configured; no request waits for it)",
    panels=(
        table(
            "Refused by category as the judge sees it, 1 d",
            "Of sampled answers, with n. Sampled by category: do not sum over categories.",
            refused=q("category:steering_judged_refusal:ratio1d", "{{category}}"),
            n=q("category:steering_judged:increase1d", "n {{category}}"),
            unit="percentunit",
        ),
        shares(
            "Agreement",
            "With people's labels at calibration, and with other detectors on the last answers.",
            q("min by (judge, against) (steering_judge_agreement_ratio{HERE})", "{{judge}}: {{against}}"),
        ),
        lines(
            "Sampled, failed, waiting",
            "Failures are no verdicts, and are counted by reason.",
            q(rate("steering_judge_sampled_total"), "sampled"),
            q(rate("steering_judge_failures_total", "reason"), "failed: {{reason}}"),
            q("sum(steering_judge_queue{HERE})", "waiting"),
        ),
    ),
)

ROWS = (NOW, REFUSALS, CANARY, GATE, COST, SERVICE, JUDGE)
