"""The Grafana dashboard "Promise and wall": `python deploy/grafana/promise_and_wall.py` writes it into dashboards/.

Promise: what users get, against what they were promised. Wall: what the machine does, against what physics allows. Both
rows repeat for every model that is chosen, so that no line mixes models. Where a recording rule has the value, it is used.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

with warnings.catch_warnings():  # the classic schema is what every Grafana in use can load
    warnings.simplefilter("ignore", DeprecationWarning)
    from grafana_foundation_sdk.builders import common, dashboard, stat, timeseries
    from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as models

TARGET = Path(__file__).parent / "dashboards" / "promise-and-wall.json"
SOURCE = shapes.DataSourceRef(type_val="prometheus", uid="prometheus")

MODEL = 'model=~"$model"'
TIER = 'model=~"$model", tier=~"$tier"'
WORKER = 'model=~"$model", worker=~"$worker"'
RATE = "[$__rate_interval]"

TOKENS_PER_SECOND = "suffix:tok/s"
TOKENS = "suffix:tok"
INTENSITY = "suffix:FLOP/B"

GREEN, ORANGE, RED, BLUE, PURPLE = "#73BF69", "#FF9830", "#F2495C", "#5794F2", "#B877D9"
TEAL, YELLOW, GREY, PALE, DARK = "#37B6A6", "#FADE2A", "#8E96A3", "#CCCCDC", "#464C54"
TIERS = {"priority": PURPLE, "default": BLUE, "flex": TEAL, "batch": GREY}
SECONDS = {
    "weights": BLUE,
    "kv": PURPLE,
    "compute": ORANGE,
    "comm": YELLOW,
    "phases": TEAL,
    "host": RED,
    "interference": "#C4162A",
    "unexplained": GREY,
    "idle": DARK,
}
BYTES = {"weights": BLUE, "kv_read": PURPLE, "kv_write": "#DEB6F2"}
REASONS = {
    "time_budget": ORANGE,
    "kv_footprint": PURPLE,
    "ttft_unreachable": YELLOW,
    "queue_full": RED,
    "rate_limit_exceeded": BLUE,
}
GATE_REASONS = "time_budget|kv_footprint|ttft_unreachable|queue_full"  # the gate's others are answered with 400
OUTCOMES = {"ok": GREEN, "refused": ORANGE, "cancelled": GREY, "error": RED, "invalid": YELLOW}
VIOLATIONS = {"schedule": ORANGE, "machine": YELLOW, "footprint": PURPLE, "KV dropped": RED}

GAP_MILLISECONDS = 30_000  # without a sample for so long, a line breaks

Property = models.DynamicConfigValue
Override = tuple[models.MatcherConfig, list[Property]]


@dataclass(frozen=True)
class Query:
    """One PromQL expression. `style`: plain, thin (context), faint (the same, not in the legend), or bound (a dashed line
    that others are compared with)."""

    expr: str
    legend: str
    style: str = "plain"


@dataclass(frozen=True)
class Chart:
    """A time series panel."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    colours: dict[str, str] = field(default_factory=dict)  # by the first word of a legend
    width: int = 8
    stack: str = ""  # "", "lines" or "bars"
    log: int = 0  # base of the axis
    least: float | None = None
    most: float | None = None
    lines: tuple[tuple[float, str], ...] = ()  # thresholds, drawn dashed


@dataclass(frozen=True)
class Figure:
    """A panel with one number, or a few."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    steps: tuple[tuple[float, str], ...] = ()  # from where on it has which colour
    base: str = GREEN
    decimals: int | None = None
    width: int = 3


# --- what users get ---------------------------------------------------------------------------------------------------

NOW = (
    Figure(
        "Slowest user over floor",
        "Speed of the slowest request that runs right now, as a multiple of the floor of its tier. 1 is the promise; below "
        "0.8 it is broken. Empty while no request with a floor runs.",
        "suffix:×",
        (Query(f"min(headgate_utps_slowest{{{TIER}}} / (headgate_tier_floor_utps > 0))", "slowest"),),
        ((0.8, ORANGE), (1, GREEN)),
        RED,
    ),
    Figure(
        "Floors broken",
        "Requests of the chosen time that ended slower than their tier promises. Any is worth a look at the panel Floors "
        "broken, which says the cause.",
        "suffix:requests",
        (Query(f"sum(increase(headgate_utps_floor_violations_total{{{TIER}}}[$__range]))", "broken"),),
        ((1, ORANGE), (10, RED)),
        decimals=0,
    ),
    Figure(
        "TTFT p99",
        "Time to first token that 99 of 100 answered requests stay under, of the slowest tier chosen. Aims are 2 s for "
        "priority and 10 s for default.",
        "s",
        (Query(f"max(model_tier:headgate_time_to_first_token_seconds:p99_1m{{{TIER}}})", "p99"),),
        ((2, ORANGE), (10, RED)),
    ),
    Figure(
        "Refused",
        "Share of requests that were answered with 429. Refusing is how promises are kept under overload; if it lasts, "
        "capacity is missing.",
        "percentunit",
        (Query(f"max(model:headgate_requests_refused:ratio1m{{{MODEL}}})", "refused"),),
        ((0.01, ORANGE), (0.1, RED)),
    ),
    Figure(
        "STPS",
        "Tokens generated per second by all chosen models, averaged over a minute.",
        TOKENS_PER_SECOND,
        (Query(f"sum(model:headgate_stps:rate1m{{{MODEL}}})", "STPS"),),
        base=BLUE,
    ),
    Figure(
        "Running, waiting",
        "Requests in the running batches, and requests that wait to be let in. Waiting is normal under load; a waiting list "
        "that only grows means refusals soon.",
        "short",
        (
            Query(f"sum(headgate_requests_running{{{TIER}}})", "running"),
            Query(f"sum(headgate_requests_waiting{{{TIER}}})", "waiting"),
        ),
        base=BLUE,
    ),
    Figure(
        "Distance to the limit",
        "Time that physics allows for the steps of the last minute over the time they took: 100 % is the wall. Low values mean "
        "time lost to something other than memory or arithmetic; see Step seconds by cause.",
        "percentunit",
        (Query(f"avg(model_worker:headgate_limit:ratio1m{{{WORKER}}})", "limit"),),
        ((0.3, ORANGE), (0.6, GREEN)),
        RED,
    ),
    Figure(
        "KV cache promised",
        "Share of the fullest KV cache that is reserved for what running requests will become. Near 100 % newcomers wait for "
        "memory, not for speed.",
        "percentunit",
        (Query(f"max(headgate_kv_predicted_peak_ratio{{{WORKER}}})", "promised"),),
        ((0.7, ORANGE), (0.95, RED)),
    ),
)

PROMISE = (
    Chart(
        "UTPS by tier against floors",
        "Tokens per second of single requests, of those that ended in the last minute: thick, what 95 of 100 exceed; thin, "
        "the median. Dashed: the floor of the tier. A thick line below its dashed one is a broken promise; see Floors broken.",
        TOKENS_PER_SECOND,
        (
            Query(f"model_tier:headgate_utps:p5_1m{{{TIER}}}", "{{tier}}"),
            Query(f"model_tier:headgate_utps:p50_1m{{{TIER}}}", "{{tier}} median", "faint"),
            Query(f"model_tier:headgate_tier_floor_utps:max{{{TIER}}}", "{{tier}} floor", "bound"),
        ),
        TIERS,
        log=2,
    ),
    Chart(
        "Slowest running request over its floor",
        "The slowest request that runs right now, as a multiple of its tier's floor. The gate lets in newcomers until this "
        "comes near 1, so a low value under load is good use of the machine; below 0.8 (red) the promise is broken.",
        "suffix:×",
        (
            Query(
                f"min by (tier) (headgate_utps_slowest{{{TIER}}} / (headgate_tier_floor_utps > 0))",
                "{{tier}}",
            ),
        ),
        TIERS,
        log=2,
        least=0.25,
        lines=((0.8, RED), (1, GREEN)),
    ),
    Chart(
        "Tokens per second",
        "Generated: STPS, for all users together. Prefill: prompt tokens computed. When prefill rises and generated falls, long "
        "prompts take turns with answers.",
        TOKENS_PER_SECOND,
        (
            Query(f"sum(rate(headgate_generation_tokens_total{{{WORKER}}}{RATE}))", "generated"),
            Query(f"sum(rate(headgate_prefill_tokens_total{{{WORKER}}}{RATE}))", "prefill", "thin"),
        ),
        {"generated": GREEN, "prefill": ORANGE},
        log=10,
    ),
    Chart(
        "Time to first token",
        "From a request's arrival at the gateway to its first token, waiting included: thick, p99; thin, the median. Dashed: what "
        "the tier aims at. Who could not make it was refused, and is not in these lines.",
        "s",
        (
            Query(f"model_tier:headgate_time_to_first_token_seconds:p99_1m{{{TIER}}}", "{{tier}}"),
            Query(f"model_tier:headgate_time_to_first_token_seconds:p50_1m{{{TIER}}}", "{{tier}} median", "faint"),
            Query(
                f"max by (tier) (headgate_tier_ttft_target_seconds{{{TIER}}} "
                "and on (model, tier) headgate_tier_floor_utps > 0)",
                "{{tier}} aim",
                "bound",
            ),
        ),
        TIERS,
        log=10,
    ),
    Chart(
        "Gaps between deliveries",
        "Time between two pieces of an answer, as the gateway sends them: thick, p99; thin, the median. Dashed: the "
        "longest that the floor allows on average. p99 far above the median means steps of very different length: long prompts, "
        "or a busy machine.",
        "s",
        (
            Query(f"model_tier:headgate_inter_token_latency_seconds:p99_1m{{{TIER}}}", "{{tier}}"),
            Query(f"model_tier:headgate_inter_token_latency_seconds:p50_1m{{{TIER}}}", "{{tier}} median", "faint"),
            Query(f"1 / model_tier:headgate_tier_floor_utps:max{{{TIER}}}", "{{tier}} floor", "bound"),
        ),
        TIERS,
        log=2,
    ),
    Chart(
        "Requests running and waiting",
        "Areas: requests in the running batch, by tier. Dashed: all that wait. Waiting while few run means that floors or memory "
        "hold newcomers back; the gate's decisions say which.",
        "short",
        (
            Query(f"sum by (tier) (headgate_requests_running{{{TIER}}})", "{{tier}}"),
            Query(f"sum(headgate_requests_waiting{{{TIER}}})", "waiting", "bound"),
        ),
        {**TIERS, "waiting": PALE},
        stack="lines",
        least=0,
    ),
    Chart(
        "Refusals by reason",
        "Requests per second that got 429 or 503. time_budget: floors of others would break. kv_footprint: no memory. "
        "ttft_unreachable: waited too long. queue_full: too many wait. rate_limit_exceeded: a tenant's own limit.",
        "reqps",
        (
            Query(
                f"sum by (reason) (rate(headgate_refusals_total{{{TIER}}}{RATE})) or sum by (reason) "
                f'(rate(headgate_admissions_total{{{MODEL}, decision=~"refused.*", reason=~"{GATE_REASONS}"}}{RATE}))',
                "{{reason}}",
            ),
        ),
        REASONS,
        width=6,
        stack="bars",
        least=0,
    ),
    Chart(
        "Decisions of the gate",
        "What the gate answered, per second: accepted at once, told to wait, refused at once, or refused after waiting "
        "(refused_late). refused_late means that waits were predicted too short.",
        "reqps",
        (Query(f"sum by (decision) (rate(headgate_admissions_total{{{WORKER}}}{RATE}))", "{{decision}}"),),
        {"accepted": GREEN, "waiting": BLUE, "refused": ORANGE, "refused_late": RED},
        width=6,
        stack="bars",
        least=0,
    ),
    Chart(
        "How requests ended",
        "Requests per second by outcome. cancelled: the client left. error: broken off or 503, which is our fault: look at the "
        "worker's log.",
        "reqps",
        (Query(f"sum by (outcome) (rate(headgate_requests_total{{{TIER}}}{RATE}))", "{{outcome}}"),),
        OUTCOMES,
        width=6,
        stack="bars",
        least=0,
    ),
    Chart(
        "Floors broken, KV dropped",
        "Requests per second that ended below their floor, by cause, and KV caches that were dropped and computed again. "
        "machine: steps took longer than predicted. schedule: too many were let in. footprint: memory ran short.",
        "reqps",
        (
            Query(
                f"sum by (cause) (rate(headgate_utps_floor_violations_total{{{TIER}}}{RATE}))",
                "{{cause}}",
            ),
            Query(f"sum(rate(headgate_preemptions_total{{{WORKER}}}{RATE}))", "KV dropped"),
        ),
        VIOLATIONS,
        width=6,
        stack="bars",
        least=0,
    ),
)

# --- what the machine does --------------------------------------------------------------------------------------------

CEILING = f"headgate_limit_bandwidth_bytes_per_second{{{WORKER}}}"
PEAK = f"headgate_limit_flops_per_second{{{WORKER}}}"
REACHED = f"model_worker:headgate_bandwidth_bytes_per_second:busy1m{{{WORKER}}}"
COMPUTED = f"model_worker:headgate_flops_per_second:busy1m{{{WORKER}}}"
ACHIEVED_INTENSITY = f"model_worker:headgate_arithmetic_intensity_flops_per_byte:rate1m{{{WORKER}}}"
UNDER_THE_SLOPE = f"{ACHIEVED_INTENSITY} * on (model, worker) {CEILING}"

WALL = (
    Chart(
        "Bandwidth achieved and measured",
        "Bytes moved per second of computing. Dashed: what the machine can read, as measured at start per memory level (weights: "
        "in the model's own order), and the highest seen since. Far below the dashed lines: see Step seconds by cause.",
        "Bps",
        (
            Query(f"avg({REACHED})", "achieved"),
            Query(
                f"avg by (level) (headgate_measured_bandwidth_bytes_per_second{{{WORKER}}})",
                "{{level}} measured",
                "bound",
            ),
            Query(f"avg({CEILING})", "highest seen", "bound"),
        ),
        {"achieved": GREEN, "highest": RED, "weights": BLUE},
        least=0,
    ),
    Chart(
        "Bytes by cause",
        "Bytes moved through memory per second, idle time included. Weights are read once per step however many users share "
        "it; KV grows with users and context. When KV dominates, more users no longer come for free.",
        "Bps",
        (Query(f"sum by (cause) (rate(headgate_bandwidth_bytes_total{{{WORKER}}}{RATE}))", "{{cause}}"),),
        BYTES,
        stack="lines",
        least=0,
    ),
    Chart(
        "Step seconds by cause",
        "Where the wall clock goes; the shares sum to 100 %. weights and kv: reading memory. compute: arithmetic. phases: cost "
        "per kernel. host: our own code. unexplained: what the model of the machine does not account for; if it grows, somebody "
        "else uses the machine.",
        "percentunit",
        tuple(
            Query(
                f'avg by (cause) (model_worker_cause:headgate_step_seconds:share1m{{{WORKER}, cause=~"{causes}"}})',
                "{{cause}}",
            )
            for causes in ("weights|kv|compute|comm|phases", "host|interference|unexplained", "idle")  # from below
        ),
        SECONDS,
        stack="lines",
        least=0,
        most=1,
    ),
    Chart(
        "Distance to the limit",
        "Thick: the time physics allows for the steps of the last minute over the time they took. Thin: bandwidth and "
        "arithmetic while computing, each as a share of the highest seen. 100 % is the wall: only fewer bytes per token help.",
        "percentunit",
        (
            Query(f"avg(model_worker:headgate_limit:ratio1m{{{WORKER}}})", "limit"),
            Query(f"avg({REACHED} / on (model, worker) {CEILING})", "bandwidth", "thin"),
            Query(f"avg({COMPUTED} / on (model, worker) {PEAK})", "arithmetic", "thin"),
        ),
        {"limit": GREEN, "bandwidth": BLUE, "arithmetic": ORANGE},
        least=0,
        most=1,
        lines=((0.6, GREEN),),
    ),
    Chart(
        "Arithmetic intensity",
        "Operations per byte moved. Dashed: the machine's ridge, peak arithmetic over bandwidth. Left of the ridge (below the "
        "line) memory is the wall and more tokens per step are nearly free; above it arithmetic is.",
        INTENSITY,
        (
            Query(f"avg({ACHIEVED_INTENSITY})", "achieved"),
            Query(f"avg({PEAK} / on (model, worker) {CEILING})", "ridge", "bound"),
        ),
        {"achieved": GREEN, "ridge": RED},
        log=2,
    ),
    Chart(
        "Roofline",
        "Operations per second of computing, under the roof over the intensity of the moment: bandwidth times intensity left of "
        "the ridge, peak arithmetic right of it. The gap between the lines is what better code could gain; a low roof means "
        "that steps carry too few tokens.",
        "flops",
        (
            Query(f"avg({COMPUTED})", "achieved"),
            Query(
                f"avg(({UNDER_THE_SLOPE} < on (model, worker) {PEAK}) "
                f"or on (model, worker) ({PEAK} and on (model, worker) {ACHIEVED_INTENSITY}))",
                "roof",
                "bound",
            ),
            Query(f"avg({PEAK})", "peak", "bound"),
        ),
        {"achieved": GREEN, "roof": ORANGE, "peak": RED},
        log=10,
    ),
    Chart(
        "Tokens per step and the ridge",
        "Tokens that a step computes, answers and prompts together: mean and p95. Dashed: the ridge, where arithmetic takes as "
        "long as reading the weights. Below it a step costs the same however many share it; throughput comes from here.",
        TOKENS,
        (
            Query(f"avg(model_worker:headgate_tokens_per_step:mean1m{{{WORKER}}})", "mean"),
            Query(f"max(model_worker:headgate_tokens_per_step:p95_1m{{{WORKER}}})", "p95", "thin"),
            Query(f"avg(headgate_ridge_tokens{{{WORKER}}})", "ridge", "bound"),
        ),
        {"mean": GREEN, "p95": BLUE, "ridge": RED},
        width=6,
        log=2,
    ),
    Chart(
        "Step time over its budget",
        "The longest step of a second over the time that the strictest floor allows, mean of a minute. Near 100 % floors bind: no room "
        "for another user. Above 100 % a gap was longer than a floor allows (the axis ends at 200 %). 0: no request with a floor ran.",
        "percentunit",
        (Query(f"max by (worker) (avg_over_time(headgate_bandwidth_budget_ratio{{{WORKER}}}[1m]))", "{{worker}}"),),
        width=6,
        least=0,
        most=2,
        lines=((1, RED),),
    ),
    Chart(
        "KV cache: used and promised",
        "Share of the KV cache that holds tokens, and that is reserved for what running requests will become. Promised at 95 % "
        "and more: newcomers wait for memory. A wide gap between the lines: answers end sooner than predicted.",
        "percentunit",
        (
            Query(f"max(headgate_kv_predicted_peak_ratio{{{WORKER}}})", "promised"),
            Query(f"max(headgate_kv_cache_usage_ratio{{{WORKER}}})", "used", "thin"),
        ),
        {"promised": PURPLE, "used": GREEN},
        width=6,
        least=0,
        most=1,
        lines=((0.95, RED),),
    ),
    Chart(
        "Error of the model",
        "How far predicted step times were off: median and p95. Dashed: the margin that the gate promises with. A margin "
        "above 30 % wastes capacity: look for other processes on the machine.",
        "percentunit",
        (
            Query(f"max(model_worker:headgate_step_error_ratio:p50_1m{{{WORKER}}})", "median"),
            Query(f"max(model_worker:headgate_step_error_ratio:p95_1m{{{WORKER}}})", "p95", "thin"),
            Query(f"max(avg_over_time(headgate_step_margin_ratio{{{WORKER}}}[1m]))", "margin", "bound"),
        ),
        {"median": GREEN, "p95": BLUE, "margin": ORANGE},
        width=6,
        least=0,
        most=1,
        lines=((0.3, RED),),
    ),
)

PROCESSES = (
    Chart(
        "Event loops",
        "How late timers run in gateways and worker fronts, p99. Every stream through the process hesitates that long. Above "
        "0.1 s: give it a core of its own, or run one more gateway.",
        "s",
        (Query("max by (job, instance) (instance:headgate_event_loop_stall_seconds:p99_1m)", "{{job}} {{instance}}"),),
        width=6,
        log=10,
        lines=((0.1, RED),),
    ),
    Chart(
        "Processes that answer",
        "Gateways and workers that Prometheus reaches. Dashed: those that it knows of. A line below its dashed one: a process is "
        "down, or cannot be reached; the alert HeadgateTargetDown names it.",
        "short",
        (
            Query('sum by (job) (up{job=~"gateway|worker"})', "{{job}}"),
            Query('count by (job) (up{job=~"gateway|worker"})', "{{job}} known", "bound"),
        ),
        {"gateway": BLUE, "worker": GREEN},
        width=6,
        least=0,
    ),
    Chart(
        "Step seconds by tenant",
        "Seconds of computing per second, by whose requests they were for: what fairness between tenants is about. A tenant that "
        "takes nearly all while others wait has a higher tier, or nobody else asks.",
        "percentunit",
        (Query(f"sum by (tenant) (rate(headgate_tenant_step_seconds_total{{{WORKER}}}{RATE}))", "{{tenant}}"),),
        width=6,
        stack="lines",
        least=0,
    ),
    Chart(
        "Tokens by tenant",
        "Tokens of answers per second, counted when an answer ends, so it moves in jumps. Beside step seconds it tells who "
        "sends long prompts: many seconds, few tokens.",
        TOKENS_PER_SECOND,
        (Query(f"sum by (tenant) (rate(headgate_completion_tokens_total{{{TIER}}}[1m]))", "{{tenant}}"),),
        width=6,
        stack="lines",
        least=0,
    ),
)


# --- into Grafana's terms ---------------------------------------------------------------------------------------------


def first_word(word: str) -> str:
    """A regular expression for legends that begin with this word."""
    return f"/^{word}( |$)/"


def coloured(word: str, colour: str) -> Override:
    value = {"mode": "fixed", "fixedColor": colour}
    return models.MatcherConfig("byRegexp", first_word(word)), [Property("color", value)]


def styled(ref: str, style: str, stacked: bool) -> Override:
    properties = [Property("custom.fillOpacity", 0), Property("custom.lineWidth", 1)]
    if style == "faint":
        properties.append(Property("custom.hideFrom", {"legend": True, "tooltip": False, "viz": False}))
    if style == "bound":
        properties.append(Property("custom.lineStyle", {"fill": "dash", "dash": [8, 6]}))
    if stacked:
        properties.append(Property("custom.stacking", {"mode": "none", "group": "A"}))
    return models.MatcherConfig("byFrameRefID", ref), properties


def thresholds(base: str | None, steps: tuple[tuple[float, str], ...]) -> dashboard.ThresholdsConfig:
    first = models.Threshold(value=None, color=base or "transparent")
    return (
        dashboard.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([first, *(models.Threshold(value=value, color=colour) for value, colour in steps)])
    )


def targets(queries: tuple[Query, ...]) -> list[Dataquery]:
    made = []
    for ref, query in zip("ABCDEF", queries, strict=False):
        made.append(Dataquery().ref_id(ref).expr(query.expr).legend_format(query.legend).datasource(SOURCE).range())
    return made


def chart_panel(chart: Chart) -> timeseries.Panel:
    panel = (
        timeseries.Panel()
        .title(chart.title)
        .description(chart.description)
        .datasource(SOURCE)
        .targets(targets(chart.queries))
        .unit(chart.unit)
        .line_width(2)
        .fill_opacity(60 if chart.stack else 0)
        .show_points(shapes.VisibilityMode.NEVER)
        .insert_nulls(float(GAP_MILLISECONDS))
        .color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.PALETTE_CLASSIC))
        .thresholds(thresholds(None, chart.lines))
        .legend(
            common.VizLegendOptions()
            .display_mode(shapes.LegendDisplayMode.LIST)
            .placement(shapes.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull"])
        )
        .tooltip(common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI).sort(shapes.SortOrder.DESCENDING))
    )
    add_axis(panel, chart)
    for word, colour in chart.colours.items():
        panel.with_override(*coloured(word, colour))
    for ref, query in zip("ABCDEF", chart.queries, strict=False):
        if query.style != "plain":
            panel.with_override(*styled(ref, query.style, bool(chart.stack)))
    return panel


def add_axis(panel: timeseries.Panel, chart: Chart) -> None:
    if chart.stack:
        panel.stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL).group("A")).line_width(0)
    if chart.stack == "bars":
        panel.draw_style(shapes.GraphDrawStyle.BARS).fill_opacity(90)
    if chart.log:
        panel.scale_distribution(
            common.ScaleDistributionConfig().type(shapes.ScaleDistribution.LOG).log(float(chart.log))
        )
    if chart.least is not None:
        panel.min(chart.least)
    if chart.most is not None:
        panel.max(chart.most)
    if chart.lines:
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(shapes.GraphThresholdsStyleMode.DASHED))


def figure_panel(figure: Figure) -> stat.Panel:
    panel = (
        stat.Panel()
        .title(figure.title)
        .description(figure.description)
        .datasource(SOURCE)
        .targets(targets(figure.queries))
        .unit(figure.unit)
        .no_value("–")
        .thresholds(thresholds(figure.base, figure.steps))
        .color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
        .color_mode(shapes.BigValueColorMode.VALUE)
        .graph_mode(shapes.BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    )
    return panel if figure.decimals is None else panel.decimals(figure.decimals)


def variable(name: str, label: str, query: str, description: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .description(description)
        .query(query)
        .datasource(SOURCE)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


class Grid:
    """Lays panels out from left to right, line by line, and numbers them."""

    def __init__(self, board: dashboard.Dashboard) -> None:
        self._board = board
        self._id = 0
        self._x = self._y = 0

    def row(self, title: str, repeat: str = "") -> None:
        row = dashboard.Row(title).id(self._next()).grid_pos(models.GridPos(h=1, w=24, x=0, y=self._y))
        self._board.with_row(row.repeat(repeat) if repeat else row)
        self._y += 1

    def add(self, panel: timeseries.Panel | stat.Panel, width: int, height: int) -> None:
        position = models.GridPos(h=height, w=width, x=self._x, y=self._y)
        self._board.with_panel(panel.id(self._next()).grid_pos(position))
        self._x += width
        if self._x == 24:
            self._x, self._y = 0, self._y + height

    def _next(self) -> int:
        self._id += 1
        return self._id


def build() -> models.Dashboard:
    board = (
        dashboard.Dashboard("Promise and wall")
        .uid("promise-and-wall")
        .description("What users get against what they were promised, and the machine against what physics allows.")
        .tags(["headgate"])
        .timezone("browser")
        .time("now-15m", "now")
        .refresh("5s")
        .readonly()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .variables(
            [
                variable(
                    "model", "Model", 'label_values(headgate_build_info{component="worker"}, model)', "One row each."
                ),
                variable("tier", "Tier", "label_values(headgate_tier_floor_utps, tier)", "For what users get."),
                variable(
                    "worker", "Worker", 'label_values(headgate_build_info{component="worker"}, worker)', "For the wall."
                ),
            ]
        )
    )
    grid = Grid(board)
    grid.row("Now")
    for figure in NOW:
        grid.add(figure_panel(figure), figure.width, 4)
    for title, repeat, charts in (
        ("Promise · $model", "model", PROMISE),
        ("Wall · $model", "model", WALL),
        ("Processes and tenants", "", PROCESSES),
    ):
        grid.row(title, repeat)
        for chart in charts:
            grid.add(chart_panel(chart), chart.width, 8)
    return board.build()


def render() -> str:
    """The dashboard as JSON, the same at every call."""
    return JSONEncoder(sort_keys=True, indent=2).encode(build()) + "\n"


if __name__ == "__main__":
    TARGET.write_text(render(), "utf-8")
