"""The few kinds of panels that both dashboards are made of, and how they look.

A panel says what it asks (`title`), what good looks like (`description`), and shows queries: pairs of an expression and
what its series are called. Where there is an alert the panel names it and shows the alert's threshold.
"""

from collections.abc import Sequence

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, statetimeline, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    GraphTresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

Query = tuple[str, str]
Panel = timeseries.Panel | stat.Panel | statetimeline.Panel | table.Panel
Section = tuple[str, Sequence[Panel]]

SECONDS, MILLISECONDS, SHARE, BYTES, COUNT = "s", "ms", "percentunit", "bytes", "short"
TOKENS, TOKENS_PER_S, NATS, STEPS = "count:tokens", "count:tokens/s", "suffix:nats", "count:steps"
REQUESTS_PER_S = "reqps"

GREEN, ORANGE, RED, GREY = "green", "orange", "red", "text"
_DATASOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH = 24


def series(
    title: str,
    description: str,
    *queries: Query,
    unit: str,
    alert: str = "",
    bad_above: float | None = None,
    bad_below: float | None = None,
    stacked: bool = False,
    low: float | None = None,
    high: float | None = None,
    other_units: dict[str, str] | None = None,
    width: int = 8,
) -> timeseries.Panel:
    """Lines over time. other_units: of series whose names match these regular expressions, on an axis at the right."""
    panel = timeseries.Panel()
    _fill(panel, title, _with_alert(description, alert), queries, unit, width, height=8)
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    panel.legend(legend.show_legend(True).calcs(["lastNotNull"]))
    panel.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    panel.line_width(1).fill_opacity(30 if stacked else 0).show_points(VisibilityMode.NEVER)
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL).group("A"))
    if low is not None:
        panel.min(low)
    if high is not None:
        panel.max(high)
    if bad_above is not None or bad_below is not None:
        panel.thresholds(_thresholds(bad_above, bad_below))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.DASHED))
    for name, other in (other_units or {}).items():
        properties = [("unit", other), ("custom.axisPlacement", "right")]
        panel.override_by_regexp(name, [model.DynamicConfigValue(id_val=key, value=value) for key, value in properties])
    return panel


def number(
    title: str,
    description: str,
    query: Query,
    *,
    unit: str,
    alert: str = "",
    bad_above: float | None = None,
    bad_below: float | None = None,
    width: int = 4,
) -> stat.Panel:
    """The newest value, large, with its course behind it."""
    panel = stat.Panel()
    _fill(panel, title, _with_alert(description, alert), [query], unit, width, height=5)
    panel.graph_mode(BigValueGraphMode.AREA).text_mode(BigValueTextMode.AUTO)
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False))
    panel.thresholds(_thresholds(bad_above, bad_below))
    graded = bad_above is not None or bad_below is not None
    panel.color_mode(BigValueColorMode.VALUE if graded else BigValueColorMode.NONE)
    return panel


def states(
    title: str, description: str, *queries: Query, names: dict[int, tuple[str, str]], width: int = 12
) -> statetimeline.Panel:
    """Bands that change colour. names: of each value, its word and colour."""
    panel = statetimeline.Panel()
    _fill(panel, title, description, queries, COUNT, width, height=8)
    options = {str(value): model.ValueMappingResult(text=word, color=colour) for value, (word, colour) in names.items()}
    panel.mappings([model.ValueMap(options=options)])
    panel.merge_values(True).show_value(VisibilityMode.NEVER).row_height(0.8).fill_opacity(70).line_width(0)
    panel.legend(common.VizLegendOptions().show_legend(True).placement(LegendPlacement.BOTTOM))
    panel.tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.SINGLE))
    return panel


def facts(
    title: str,
    description: str,
    query: str,
    *,
    columns: Sequence[str],
    value: str | None = None,
    empty: str | None = None,
    width: int = 12,
) -> table.Panel:
    """A table of the labels `columns` of each series of now, and of its value under this name, if it has one."""
    panel = table.Panel()
    _fill(panel, title, description, [(query, "")], COUNT, width, height=8, instant=True)
    order = {name: place for place, name in enumerate([*columns, "Value"])}
    shown = {"renameByName": {"Value": value} if value else {}, "indexByName": order}
    hidden = {"excludeByName": {"Time": True} if value else {"Time": True, "Value": True}}
    panel.with_transformation(model.DataTransformerConfig(id_val="organize", options=shown | hidden))
    panel.show_header(True)
    if empty is not None:
        panel.no_value(empty)
    return panel


def variables(*names: tuple[str, str, str]) -> list[dashboard.QueryVariable]:
    """Menus: a name, what it is called, and the query that lists its values. Several may be chosen, and all."""
    return [
        dashboard.QueryVariable(name)
        .id(name)  # all the same by default, and Grafana 10 keeps variables by it
        .label(label)
        .datasource(_DATASOURCE)
        .query(query)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(model.VariableOption(text=["All"], value=["$__all"], selected=True))
        for name, label, query in names
    ]


def make(
    title: str,
    uid: str,
    description: str,
    *,
    menus: Sequence[dashboard.QueryVariable],
    sections: Sequence[Section],
    other: tuple[str, str],
) -> model.Dashboard:
    """A dashboard of sections, from the answer to its causes. other: title and uid of the one that goes with it."""
    made = dashboard.Dashboard(title).uid(uid).description(description).tags(["stillhouse"]).editable()
    made.time("now-3h", "now").refresh("30s").timezone("browser").tooltip(model.DashboardCursorSync.CROSSHAIR)
    source = dashboard.DatasourceVariable("datasource").id("datasource").label("Prometheus").type("prometheus")
    made.with_variable(source)
    for menu in menus:
        made.with_variable(menu)
    link = dashboard.DashboardLink(other[0]).type(model.DashboardLinkType.LINK).url(f"/d/{other[1]}")
    made.link(link.keep_time(True))
    number = 0
    for name, panels in sections:
        number += 1
        made.with_row(dashboard.Row(name).id(number))
        for panel in panels:
            number += 1
            made.with_panel(panel.id(number))
    return made.build()


def text(made: model.Dashboard) -> str:
    """As the file holds it."""
    return JSONEncoder(sort_keys=True, indent=1).encode(made) + "\n"


def quantile(share: float, histogram: str, by: str = "") -> str:
    """A quantile of a histogram of the last minutes. histogram: its selector without `_bucket`."""
    name, brace, selector = histogram.partition("{")
    groups = ", ".join(filter(None, ["le", by]))
    return f"histogram_quantile({share}, sum by ({groups}) (rate({name}_bucket{brace}{selector}[$__rate_interval])))"


def _with_alert(description: str, alert: str) -> str:
    return f"{description} Alert: {alert}." if alert else description


def _fill(
    panel: Panel,
    title: str,
    description: str,
    queries: Sequence[Query],
    unit: str,
    width: int,
    *,
    height: int,
    instant: bool = False,
) -> None:
    panel.title(title).description(description).datasource(_DATASOURCE).span(width).height(height).unit(unit)
    for letter, (expression, name) in zip("ABCDEFGH"[: len(queries)], queries, strict=True):
        query = prometheus.Dataquery().expr(expression).ref_id(letter)
        if name:
            query.legend_format(name)
        if instant:
            query.instant().format(PromQueryFormat.TABLE)
        else:
            query.range()
        panel.with_target(query)


def _thresholds(bad_above: float | None, bad_below: float | None) -> dashboard.ThresholdsConfig:
    steps = [model.Threshold(value=None, color=RED if bad_below is not None else GREEN)]
    if bad_below is not None:
        steps.append(model.Threshold(value=bad_below, color=GREEN))
    if bad_above is not None:
        steps.append(model.Threshold(value=bad_above, color=RED))
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)
