"""The dashboard *pool*: is it healthy, who uses what, where time goes, what is refused, is there room."""

from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.grafana.panels import (
    BYTES,
    COUNT,
    GREEN,
    ORANGE,
    REQUESTS_PER_S,
    SECONDS,
    SHARE,
    TOKENS,
    TOKENS_PER_S,
    Section,
    facts,
    make,
    number,
    quantile,
    series,
    states,
    variables,
)

_CHOSEN = 'namespace=~"$namespace",teacher=~"$teacher"'
_SERVERS = f'{{job="stillhouse-teacher",{_CHOSEN}}}'
_BY_TENANT = 'tenant=~"$tenant"'


def _of(name: str, *matchers: str) -> str:
    """The series of the chosen teachers that have this name."""
    return f"stillhouse_teacher_{name}{{{','.join((_CHOSEN, *matchers))}}}"


def _rate(name: str, *matchers: str) -> str:
    return f"rate({_of(name, *matchers)}[$__rate_interval])"


def _used(by: str) -> str:
    """Tokens a second, prompts included: what quotas and shares count."""
    scored, read = _rate("scored_tokens_total", _BY_TENANT), _rate("prompt_tokens_total", _BY_TENANT)
    return f"sum by ({by}) ({scored} + {read})"


def _refused(by: str) -> str:
    return f"sum by ({by}) ({_rate('refused_tokens_total', _BY_TENANT)})"


def _health() -> Section:
    ready = f"sum by (teacher) ({_of('ready')}) or 0 * sum by (teacher) (up{_SERVERS})"
    alerts = 'ALERTS{alertstate="firing",alertname=~"(Teacher|Tenant).+",namespace=~"$namespace|"}'
    return "Is the pool healthy?", [
        number(
            "Servers ready",
            "Ready servers of each teacher, as a share of those that Prometheus knows. Good: 100%. While servers are "
            "replaced it may be less; at 0% runs stand still (TeacherDown).",
            (f"({ready}) / count by (teacher) (up{_SERVERS})", "{{teacher}}"),
            unit=SHARE,
            bad_below=1.0,
            width=6,
        ),
        number(
            "Queue wait, p95",
            "From the arrival of a sequence to the start of its batch. Good: below the time of a training step, so "
            "that nobody notices.",
            (quantile(0.95, _of("queue_wait_seconds", _BY_TENANT)), "p95"),
            unit=SECONDS,
            alert="TenantQueueWait",
            bad_above=60,
            width=6,
        ),
        number(
            "Refused, of all tokens",
            "Tokens of well-formed requests that were refused or failed. Clients send refused requests again, so one "
            "request may count more than once. Good: near 0; a tenant at its quota has a share all the time.",
            (f"{_refused('')} / ({_refused('')} + {_used('')}) or vector(0)", "refused"),
            unit=SHARE,
            width=6,
        ),
        number(
            "Alerts that fire",
            "Of this project, about teachers. Each has a runbook page.",
            (f"count({alerts}) or vector(0)", "alerts"),
            unit=COUNT,
            bad_above=1,
            width=6,
        ),
        states(
            "Which servers were ready, and when?",
            "A band a server. A gap: Prometheus could not reach it. Good: green but for the minutes of a start.",
            (f"max by (pod) ({_of('ready')})", "{{pod}}"),
            names={1: ("ready", GREEN), 0: ("not ready", ORANGE)},
        ),
        facts(
            "Which servers could not start, and why?",
            "One row for each server that waits for somebody to mend what it was given; the first lines of its log say "
            "what. Good: empty.",
            f"max by (namespace, teacher, pod, reason) ({_of('start_failed')}) > 0",
            columns=("namespace", "teacher", "pod", "reason"),
            empty="every server started",
        ),
    ]


def _use() -> Section:
    by_tenant = _used("tenant")
    return "Who uses what?", [
        series(
            "How many tokens does each tenant use, of which model?",
            "Scored tokens and those of their prompts: what quotas and shares count. The sum is what the pool does.",
            (_used("tenant, model"), "{{tenant}}, {{model}}"),
            unit=TOKENS_PER_S,
            stacked=True,
            low=0,
        ),
        series(
            "What share does each tenant get?",
            "Of the tokens of all tenants. Only while all of them have work waiting should the shares be those of the "
            "weights in the file of tenants; while there is room everybody gets what he asks for.",
            (f"{by_tenant} / on () group_left () {_used('')}", "{{tenant}}"),
            unit=SHARE,
            stacked=True,
            low=0,
            high=1,
        ),
        series(
            "Who has work waiting or being scored?",
            "Tokens admitted and not yet answered. One tenant may have much here without harm to others: that is what "
            "shares are for.",
            (f"sum by (tenant) ({_of('tenant_pending_tokens', _BY_TENANT)})", "{{tenant}}"),
            unit=TOKENS,
            stacked=True,
            low=0,
        ),
    ]


def _time() -> Section:
    wait = _of("queue_wait_seconds", _BY_TENANT)
    batches = f"sum({_rate('batch_sequences_count')})"
    computed = f"sum({_rate('padding_tokens_total')}) / (sum({_rate('padding_tokens_total')}) + "
    return "Where does the time go?", [
        series(
            "How long does each tenant wait in the queue?",
            "From arrival to the start of the batch: half of the sequences, 19 of 20, 99 of 100. Good: a tenant within "
            "its share waits little whatever others send.",
            *((quantile(share, wait, "tenant"), f"{{{{tenant}}}} p{share * 100:.0f}") for share in (0.5, 0.95, 0.99)),
            unit=SECONDS,
            low=0,
        ),
        series(
            "How long do the engine and whole requests take?",
            "The engine's time on the batch of a sequence; the whole time of a request in the server. The difference "
            "is queue, decoding and encoding.",
            (quantile(0.5, _of("engine_seconds")), "engine p50"),
            (quantile(0.95, _of("engine_seconds")), "engine p95"),
            (quantile(0.95, _of("request_seconds"), "method"), "{{method}} p95"),
            unit=SECONDS,
            low=0,
        ),
        series(
            "How full are batches? (torch engine)",
            "Sequences a batch, and the share of padding in what was computed. Near 1 while tokens are pending: raise "
            "--max-batch-tokens. Much padding: sequences of very different lengths.",
            (f"sum({_rate('batch_sequences_sum')}) / {batches}", "sequences"),
            (computed + f"sum({_rate('batch_tokens_sum')}))", "padding"),
            unit=COUNT,
            low=0,
            other_units={"padding": SHARE},
        ),
    ]


def _refusals() -> Section:
    failed = _rate("requests_total", _BY_TENANT, 'code!="OK"')
    return "What is refused?", [
        series(
            "Whose tokens are refused, and why?",
            "QUOTA_EXCEEDED: the tenant asks for more than its quota. OVERLOADED: the queue is full, or a deadline "
            "cannot be met: more servers. PERMISSION_DENIED: a model that the file of tenants does not grant.",
            (_refused("tenant, reason"), "{{tenant}} {{reason}}"),
            unit=TOKENS_PER_S,
            alert="TenantOverloaded",
            stacked=True,
            low=0,
            width=12,
        ),
        series(
            "Which requests end with an error?",
            "All that were not answered, by the reason that the caller was told. Without a tenant: nobody that the "
            "server knows. ENGINE_FAILED, OUT_OF_MEMORY and NON_FINITE_SCORES are the server's own and should not be.",
            (f"sum by (tenant, reason) ({failed})", "{{tenant}} {{reason}}"),
            unit=REQUESTS_PER_S,
            alert="TeacherScoringErrors",
            low=0,
            width=12,
        ),
    ]


def _servers() -> Section:
    ends = _of("tls_certificate_expires_timestamp_seconds")
    return "What happens to servers?", [
        facts(
            "What is served?",
            "One row for each revision of a model in one precision. Good: one row a model; two for as long as servers "
            "are replaced one by one. Clients never mix them.",
            f"count by (teacher, model, revision, dtype, engine, version) ({_of('model_info')})",
            columns=("teacher", "model", "revision", "dtype", "engine", "version"),
            value="servers",
        ),
        series(
            "Is an engine stuck?",
            "Time with work and without ending any. Good: seconds. From --stall-s (300 s) on the server says that it "
            "is no longer alive, and is restarted.",
            (f"max by (pod) ({_of('engine_no_progress_seconds')})", "{{pod}}"),
            unit=SECONDS,
            alert="TeacherEngineStalled",
            bad_above=150,
            low=0,
            width=6,
        ),
        series(
            "Since when does each server run?",
            "Seconds since its program started. Good: lines that only rise. A drop is a restart: look at its log of "
            "before.",
            (f"time() - max by (pod) (process_start_time_seconds{_SERVERS})", "{{pod}}"),
            unit=SECONDS,
            alert="TeacherRestarts",
            low=0,
            width=6,
        ),
        series(
            "How long do certificates last?",
            "Until the end of the certificate in use. Good: more than a week. Servers without TLS are left out.",
            (f"min by (pod) ({ends} > 0) - time()", "{{pod}}"),
            unit=SECONDS,
            alert="TeacherCertificateExpires",
            bad_below=7 * 86400,
            width=12,
        ),
        series(
            "Were files taken over while serving?",
            "Certificates, rights and models that changed and were read again. Any `failed`: the old one is still in "
            "use, and what was meant to be taken away is still there.",
            (f"sum by (what, result) (increase({_of('reloads_total')}[$__rate_interval]))", "{{what}} {{result}}"),
            unit=COUNT,
            alert="TeacherReloadFailed",
            low=0,
            width=12,
        ),
    ]


def _room() -> Section:
    memory = f"{_of('memory_used_bytes')} / {_of('memory_limit_bytes')}"
    return "Is there room?", [
        series(
            "Does the engine keep up?",
            "Tokens a second that are done, beside the engine's own speed while it has work. Near it for long, with "
            "tokens pending: the pool is full, add servers. Far below: there is room.",
            (f"sum by (teacher) ({_rate('scored_tokens_total')} + {_rate('prompt_tokens_total')})", "{{teacher}} done"),
            (f"sum by (teacher) ({_of('engine_tokens_per_second')})", "{{teacher}} engine"),
            unit=TOKENS_PER_S,
            low=0,
            width=12,
        ),
        series(
            "How much is queued?",
            "Tokens admitted and not yet scored, and bytes of requests and answers to come, of each server. Bounded by "
            "--max-queue-tokens and --max-queue-bytes; at the bound callers are told to come again.",
            (f"sum by (pod) ({_of('pending_tokens')})", "{{pod}} tokens"),
            (f"sum by (pod) ({_of('pending_bytes')})", "{{pod}} bytes"),
            unit=TOKENS,
            low=0,
            other_units={".* bytes": BYTES},
            width=12,
        ),
        series(
            "How much memory is used?",
            "Of what the server may have: of its control group (or the machine) and of each device. Good: below 90%. "
            "vLLM takes its share of a device at the start and keeps it.",
            (f"max by (pod, device) ({memory})", "{{pod}} {{device}}"),
            unit=SHARE,
            alert="TeacherMemoryLow",
            bad_above=0.92,
            low=0,
            high=1,
            width=12,
        ),
        series(
            "How full is the KV cache? (vLLM engine)",
            "Share of vLLM's cache in use, and requests that wait for it. Full for long, with requests waiting: more "
            "memory for the cache, or more servers.",
            (f"max by (pod) (vllm:kv_cache_usage_perc{_SERVERS})", "{{pod}}"),
            (f"sum by (pod) (vllm:num_requests_waiting{_SERVERS})", "{{pod}} waiting"),
            unit=SHARE,
            alert="TeacherKvCachePressure",
            bad_above=0.9,
            low=0,
            other_units={".* waiting": COUNT},
            width=12,
        ),
    ]


def dashboard() -> Dashboard:
    """The dashboard."""
    return make(
        "Stillhouse: pool",
        "stillhouse-pool",
        "Teachers and who uses them. From the top: is it healthy, who uses what, where time goes, what is refused, "
        "what happens to servers, is there room. How to read it: docs/dashboards.md.",
        menus=variables(
            ("namespace", "Namespace", "label_values(stillhouse_teacher_ready, namespace)"),
            ("teacher", "Teacher", 'label_values(stillhouse_teacher_ready{namespace=~"$namespace"}, teacher)'),
            ("tenant", "Tenant", f"label_values({_of('tenant_pending_tokens')}, tenant)"),
        ),
        sections=[_health(), _use(), _time(), _refusals(), _servers(), _room()],
        other=("Runs", "stillhouse-run"),
    )
