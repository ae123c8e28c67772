"""Every rule and every alert, by a real Prometheus on real programs: nothing is empty, and what should be silent is.

`promtool test rules` shows elsewhere *when* alerts fire. Here it is shown that the names and labels in rules are those
of the programs.
"""

import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from stillhouse import errors
from stillhouse.codec import encode_array
from stillhouse.v1 import teacher_pb2, teacher_pb2_grpc
from student_trainer import failures
from teacher_server import start_failures
from tests.deploy.live.live_stack import PROVOKED, RULES, RUNS, TEACHERS, LiveStack, Program, wait_until
from tests.deploy.live.test_dashboards import queries

pytestmark = pytest.mark.slow  # until the programs were seen at work; each test for itself takes no time

GROUPS = [group for path in sorted(RULES.glob("*.yaml")) for group in yaml.safe_load(path.read_text())["groups"]]
RECORDS = {rule["record"]: rule["expr"] for group in GROUPS for rule in group["rules"] if "record" in rule}
ALERTS = {rule["alert"]: rule["expr"] for group in GROUPS for rule in group["rules"] if "alert" in rule}

# Series that cannot be here, and what is made of them.
WITHOUT_VLLM = {"server:kv_cache_used:avg15m", "server:vllm_waiting:sum", "server:preempted:share15m"}
WITHOUT_VLLM_ROLLOUTS = {"run:handover_gap:avg15m", "stillhouse_student_handover_gap"}
NOT_HERE = WITHOUT_VLLM | WITHOUT_VLLM_ROLLOUTS

OF_THE_MACHINE = {"TeacherMemoryLow"}
"""Whether these are true is not for us to say."""

_COMPARISON = re.compile(r'"[^"]*"|\{[^}]*\}|(==|!=|<=|>=|<|>)(?!\s*bool)')
_SELECTOR = re.compile(r"(?<![\w\"])(stillhouse_\w+|process_\w+|vllm:\w+|\w+:\w+:\w+|up)\b(?:\{([^}]*)\})?")
_CONDITION = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_SUBQUERY = re.compile(r"\[\w+:\w+\]")


def with_bool(expression: str) -> str:
    """The same expression with comparisons that answer 0 or 1 instead of leaving series out.

    Subqueries with steps of minutes have no point in a time as short as a test's: theirs become a second.
    """
    answered = _COMPARISON.sub(lambda found: f"{found[1]} bool" if found[1] else found[0], expression)
    return _SUBQUERY.sub("[5m:1s]", answered)


@dataclass(frozen=True)
class Selector:
    """A name and its conditions: label, operator, value."""

    name: str
    conditions: tuple[tuple[str, str, str], ...]


def selectors(expression: str) -> set[Selector]:
    """What an expression reads: our series and our rules, those of processes and of vLLM, and `up`."""
    return {
        Selector(name, tuple(_CONDITION.findall(conditions)))
        for name, conditions in _SELECTOR.findall(re.sub(r"\$\w+", "", expression))
    }


def wait_for_alert(stack: LiveStack, name: str, true: Callable[[list[dict[str, str]]], bool]) -> None:
    """Returns once the series of the alert's expression are as asked for."""
    wait_until(
        lambda: true([labels for labels, _ in stack.prometheus.query(ALERTS[name])]),
        f"{name} did not become what was expected",
        stack.prometheus,
    )


def test_turning_comparisons_into_bool_leaves_everything_else() -> None:
    assert with_bool('a{b!="c>d"} >= 1 and b == bool 2') == 'a{b!="c>d"} >= bool 1 and b == bool 2'
    assert with_bool("max_over_time(a[8d:1h]) < 3") == "max_over_time(a[5m:1s]) < bool 3"


@pytest.mark.parametrize("record", RECORDS)
def test_every_recording_rule_records_something(stack: LiveStack, record: str) -> None:
    found = stack.prometheus.query(record, stack.seen_s)
    assert bool(found) != (record in NOT_HERE), RECORDS[record]


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_expression_has_data_to_judge(stack: LiveStack, alert: str) -> None:
    found = stack.prometheus.query(with_bool(ALERTS[alert]), stack.seen_s)
    asks_for_what_is_not_here = any(record in ALERTS[alert] for record in NOT_HERE)
    assert bool(found) != asks_for_what_is_not_here, ALERTS[alert]


ASKED = {
    selector
    for expression in (*RECORDS.values(), *ALERTS.values(), *(query.expression for query in queries()))
    for selector in selectors(expression)
    if selector.name not in NOT_HERE and not selector.name.startswith("vllm:")
}
"""What rules and panels read. Their own data does not show a wrong name: `a or 0 * b` has data without `a`."""


def test_every_name_and_every_label_that_is_asked_for_exists(stack: LiveStack) -> None:
    moments = {"start": str(stack.seen_s - 120), "end": str(stack.seen_s)}
    wrong = []
    for name in {selector.name for selector in ASKED}:
        found = stack.prometheus.get("series", **{"match[]": name}, **moments)
        labels = {label for one in found for label in one}
        asked = {label for selector in ASKED if selector.name == name for label, _, _ in selector.conditions}
        if not found or not asked <= labels:
            wrong.append(f"{name}: {sorted(asked - labels) if found else 'no series'}")
    assert not wrong, "\n".join(wrong)


def test_every_reason_and_code_that_is_asked_for_is_one_of_the_programs() -> None:
    known = {
        "code": {code.name for code in grpc.StatusCode},
        "method": set(teacher_pb2.DESCRIPTOR.services_by_name["TeacherService"].methods_by_name),
    }
    for selector in ASKED:
        known["reason"] = reasons_of(selector.name)
        for label, _, value in selector.conditions:
            assert label not in known or set(value.split("|")) <= {"", *known[label]}, selector


def reasons_of(name: str) -> set[str]:
    if "start_failed" in name:
        return set(start_failures.REASONS)
    if name.startswith(("stillhouse_student_", "run:", "reason:")):
        return set(failures.REASONS)
    return errors_by_reason()


def test_what_is_wrong_here_is_told_and_nothing_else(stack: LiveStack) -> None:
    true = {alert for alert, expression in ALERTS.items() if stack.prometheus.query(expression, stack.seen_s)}
    assert true - OF_THE_MACHINE == PROVOKED


def test_alerts_name_who_is_concerned(stack: LiveStack) -> None:
    told = {labels["alertname"]: labels for labels, _ in stack.prometheus.query("ALERTS", stack.seen_s)}
    assert set(told) - OF_THE_MACHINE == PROVOKED
    assert told["TeacherStartFailed"]["alertstate"] == "firing"  # there is nothing to wait for
    expected: dict[str, dict[str, str]] = {
        "TeacherStartFailed": {"namespace": TEACHERS, "teacher": "wrong", "pod": "wrong-0", "reason": "revision"},
        "TeacherServerNotReady": {"namespace": TEACHERS, "teacher": "wrong", "pod": "wrong-0"},
        "TenantQuotaExceeded": {"teacher": "sums", "tenant": "capped", "reason": "QUOTA_EXCEEDED"},
        "TenantInvalidRequests": {"teacher": "sums", "tenant": "product"},
        "TeacherAccessRefused": {"teacher": "sums", "reason": "UNAUTHENTICATED"},
        "RunFailed": {"namespace": RUNS, "run": "second", "reason": "teacher"},
    }
    for alert, labels in expected.items():
        assert labels.items() <= told[alert].items(), alert
        assert told[alert]["severity"] in ("page", "warning"), alert


def test_what_rules_say_fits_together(stack: LiveStack) -> None:
    """Numbers that are known: a rule may have data and be wrong."""

    def values(expression: str, *by: str) -> dict[tuple[str, ...], float]:
        found = stack.prometheus.query(expression, stack.seen_s)
        return {tuple(labels.get(name, "") for name in by): value for labels, value in found}

    assert values("teacher:servers_ready:sum", "teacher") == {("sums",): 2, ("wrong",): 0}
    assert values("teacher:servers:count", "teacher") == {("sums",): 2, ("wrong",): 1}
    assert values("teacher:revisions:count", "teacher") == {("sums",): 1}
    assert sum(values("tenant:used_tokens:share5m", "tenant").values()) == pytest.approx(1.0)
    assert set(values("tenant:used_tokens:share5m", "tenant")) == {("research",), ("product",), ("capped",)}
    assert values("run:running:bool", "run") == {("first",): 1, ("second",): 0}
    assert values("reason:runs_failed:count1h", "reason")[("teacher",)] == 1
    assert values("run:restarts:count2h", "run")[("first",)] == 0


def series(program: Program) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    """Name and labels of each series of the page. Fails if one is there twice."""
    samples = [sample for family in text_string_to_metric_families(program.page()) for sample in family.samples]
    found = [(sample.name, tuple(sorted(sample.labels.items()))) for sample in samples]
    assert len(found) == len(set(found)), [one for one in found if found.count(one) > 1]
    return set(found)


def test_every_page_can_be_read_and_has_each_series_once(stack: LiveStack) -> None:
    for program in (*stack.servers, stack.wrong):
        names = {name for name, _ in series(program)}
        assert {"stillhouse_teacher_ready", "process_start_time_seconds"} <= names
    for program in (stack.run, stack.failed):
        names = {name for name, _ in series(program)}
        assert {"stillhouse_student_step", "stillhouse_student_info"} <= names


def test_callers_cannot_add_series(stack: LiveStack) -> None:
    """Names of models and methods that do not exist, and credentials of nobody, leave no trace of themselves."""
    server = stack.servers[0]
    before = series(server)
    credentials = grpc.ssl_channel_credentials(stack.authority.certificate.read_bytes())
    refused: list[grpc.StatusCode] = []
    with grpc.secure_channel(server.listen, credentials) as channel:
        stub = teacher_pb2_grpc.TeacherServiceStub(channel)
        right = [("authorization", f"Bearer {stack.token_file('product').read_text()}")]
        tokens = encode_array(np.array([3, 4, 5], np.int32))
        for number in range(70):
            lost = teacher_pb2.ScoreRequest(model=f"made-up-{number}", token_ids=tokens, score_start=1, top_k=2)
            wrong = [("authorization", f"Bearer {number:064}")]
            unknown = channel.unary_unary(f"/stillhouse.v1.TeacherService/MadeUp{number}")
            calls: list[Callable[[], Any]] = [
                lambda request=lost: stub.Score(request, metadata=right, timeout=60),
                lambda nobody=wrong: stub.GetTeacher(teacher_pb2.GetTeacherRequest(), metadata=nobody, timeout=60),
                lambda method=unknown: method(b"", metadata=right, timeout=60),
            ]
            for call in calls:
                with pytest.raises(grpc.RpcError) as error:
                    call()
                refused.append(error.value.code())
    assert len(refused) == 210 and grpc.StatusCode.OK not in refused
    assert {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED} == set(refused)

    def named(found: set[tuple[str, tuple[tuple[str, str], ...]]]) -> set[tuple[str, str]]:
        """Without what the tables of codes and reasons bound: others' errors may be the first of their kind."""
        return {pair for _, labels in found for pair in labels if pair[0] not in ("code", "reason")}

    after = series(server)
    assert named(after) == named(before)
    reasons = {dict(labels).get("reason", "") for _, labels in after if "reason" in dict(labels)}
    assert reasons <= {"", *errors_by_reason(), *start_failures.REASONS}


def errors_by_reason() -> set[str]:
    def below(kind: type) -> set[type]:
        return {kind}.union(*(below(each) for each in kind.__subclasses__()))

    return {kind.reason for kind in below(errors.StillhouseError)}


def test_faults_become_alerts_and_a_normal_end_does_not(stack: LiveStack) -> None:
    """Last: the programs are not what they were afterwards."""
    prometheus, (first, second) = stack.prometheus, stack.servers

    second.process.kill()
    wait_for_alert(stack, "TeacherServerNotReady", lambda who: second.name in {labels["pod"] for labels in who})
    # One that were wrong would stay; one missed scrape of the other server makes it true for a second.
    wait_until(lambda: not prometheus.query('ALERTS{alertname="TeacherDown",teacher="sums"}'), "is down", prometheus)
    step = prometheus.wait_for('stillhouse_student_step{run="first"}')[0][1]
    prometheus.wait_for(f'stillhouse_student_step{{run="first"}} > {step + 3}')  # the run goes on without it

    stack.run.process.send_signal(signal.SIGTERM)
    assert stack.run.process.wait(timeout=120) == 0, stack.run.log
    wait_until(lambda: not prometheus.query('run:running:bool{run="first"} == 1'), "still runs", prometheus)
    true = {alert: prometheus.query(expression) for alert, expression in ALERTS.items() if alert.startswith("Run")}
    assert not [alert for alert, found in true.items() for labels, _ in found if labels.get("run") == "first"]
    assert {alert for alert, found in true.items() if found} == {"RunFailed"}  # of `second`, as before

    first.process.kill()
    wait_for_alert(stack, "TeacherDown", lambda who: {labels["teacher"] for labels in who} == {"sums"})
