"""Every call by everybody at every kind of server: who is let in, what the others are told, and what is not."""

import contextlib
import datetime
import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from stillhouse.codec import ScoreTask, encode_request
from stillhouse.v1 import teacher_pb2 as pb
from tests.certificates import Authority, KeyPair, replace
from tests.chaos.attacked import (
    CHECK,
    GET_TEACHER,
    INTERNALS,
    REFLECTION,
    SCORE,
    WATCH,
    Attacked,
    Ending,
    attacked,
    ending_of,
    wait_for,
)

TEAMS = {"team-oak": "synthetic", "team-elm": "elm", "team-gone": "synthetic"}
"""The tenants, and the one model that each may use. The server's model is called synthetic."""
TOKENS = {team: hashlib.md5(team.encode()).hexdigest() for team in TEAMS}
HEALTH = health_pb2.HealthCheckRequest().SerializeToString()
LIST = reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()
OK = Ending("OK")
PAST = datetime.datetime(2001, 1, 1)


def score_bytes(model: str) -> bytes:
    task = ScoreTask(model=model, token_ids=np.arange(8, dtype=np.int32), score_start=3, top_k=2)
    return encode_request(task).SerializeToString()


def teacher_bytes(model: str) -> bytes:
    return pb.GetTeacherRequest(model=model).SerializeToString()


DENIED = ("PERMISSION_DENIED", "PERMISSION_DENIED")
NO_MODEL = ("NOT_FOUND", "UNKNOWN_MODEL")
NO_METHOD = ("UNIMPLEMENTED", "")
FINE = ("OK", "")

# path, request bytes, and (code, reason) for who may use the server's model, who may use another, and everybody.
CALLS: dict[str, tuple[Any, ...]] = {
    "score": (SCORE, score_bytes(""), FINE, DENIED, FINE),
    "score by name": (SCORE, score_bytes("synthetic"), FINE, DENIED, FINE),
    "score by another": (SCORE, score_bytes("elm"), DENIED, NO_MODEL, NO_MODEL),
    "teacher": (GET_TEACHER, teacher_bytes(""), FINE, DENIED, FINE),
    "teacher by name": (GET_TEACHER, teacher_bytes("synthetic"), FINE, DENIED, FINE),
    "another teacher": (GET_TEACHER, teacher_bytes("elm"), DENIED, NO_MODEL, NO_MODEL),
    "garbage": (SCORE, b"\xff\xff", *[("INVALID_ARGUMENT", "INVALID_REQUEST")] * 3),
    "check": (CHECK, HEALTH, FINE, FINE, FINE),
    "garbage check": (CHECK, b"\xff\xff", *[("INVALID_ARGUMENT", "INVALID_REQUEST")] * 3),
    "watch": (WATCH, HEALTH, FINE, FINE, FINE),
    "reflection": (REFLECTION, LIST, FINE, FINE, FINE),
    "no such method": ("/stillhouse.v1.TeacherService/Train", b"", NO_METHOD, NO_METHOD, NO_METHOD),
    "no such service": ("/stillhouse.v1.Admin/Stop", b"", NO_METHOD, NO_METHOD, NO_METHOD),
    "no path": ("/", b"", NO_METHOD, NO_METHOD, NO_METHOD),
}
COLUMNS = {"team-oak": 2, "team-elm": 3, "anybody": 4}
REFUSED = ("UNAUTHENTICATED", "UNAUTHENTICATED")
CLOSED = ("UNAVAILABLE", "")  # no connection: the client's own status


@dataclass(frozen=True)
class SetUp:
    """A kind of server: what it asks of its callers."""

    tls: bool = False
    certificates: bool = False
    tokens: bool = False


SET_UPS = {
    "open": SetUp(),
    "proxy": SetUp(tokens=True),
    "tls": SetUp(tls=True, tokens=True),
    "mtls": SetUp(tls=True, certificates=True),
    "both": SetUp(tls=True, certificates=True, tokens=True),
}
BEARER = {team: (("authorization", f"Bearer {token}"),) for team, token in TOKENS.items()}
WRONG = (("authorization", "Bearer 0123456789abcdef0123456789abcdef"),)


@dataclass(frozen=True)
class Caller:
    """What somebody shows, and as whom each kind of server takes him, in the order of SET_UPS.

    `certificate` is the name of one; callers with one always speak TLS, those without what the server speaks, unless
    `wrong_transport`.
    """

    certificate: str = ""
    metadata: tuple[tuple[str, str | bytes], ...] = ()
    taken_as: str = ""
    wrong_transport: bool = False

    def expected(self, set_up: str, call: str) -> tuple[str, str]:
        taken_as = self.taken_as.split()[list(SET_UPS).index(set_up)]
        if taken_as in ("closed", "refused"):
            return CLOSED if taken_as == "closed" else REFUSED
        return CALLS[call][COLUMNS[taken_as]]


NOBODY = "anybody refused refused closed closed"
CALLERS = {
    "nobody": Caller(taken_as=NOBODY),
    "unknown token": Caller(metadata=WRONG, taken_as=NOBODY),
    "no bearer": Caller(metadata=(("authorization", TOKENS["team-oak"]),), taken_as=NOBODY),
    "basic": Caller(metadata=(("authorization", "Basic b2FrOm9haw=="),), taken_as=NOBODY),
    "empty": Caller(metadata=(("authorization", ""),), taken_as=NOBODY),
    "bearer of nothing": Caller(metadata=(("authorization", "Bearer "),), taken_as=NOBODY),
    "bearer of two words": Caller(metadata=(("authorization", f"Bearer {TOKENS['team-oak']} x"),), taken_as=NOBODY),
    "token in capitals": Caller(metadata=(("authorization", f"Bearer {TOKENS['team-oak'].upper()}"),), taken_as=NOBODY),
    "hash for token": Caller(
        metadata=(("authorization", "Bearer " + hashlib.sha256(TOKENS["team-oak"].encode()).hexdigest()),),
        taken_as=NOBODY,
    ),
    "half a token": Caller(metadata=(("authorization", f"Bearer {TOKENS['team-oak'][:16]}"),), taken_as=NOBODY),
    "huge token": Caller(metadata=(("authorization", "Bearer " + "x" * 10_000),), taken_as=NOBODY),
    "quoted token": Caller(metadata=(("authorization", f'Bearer "{TOKENS["team-oak"]}"'),), taken_as=NOBODY),
    "other key": Caller(metadata=(("x-authorization", f"Bearer {TOKENS['team-oak']}"),), taken_as=NOBODY),
    "binary key": Caller(metadata=(("authorization-bin", b"Bearer " + TOKENS["team-oak"].encode()),), taken_as=NOBODY),
    "two entries": Caller(metadata=BEARER["team-oak"] * 2, taken_as=NOBODY),
    "two teams": Caller(metadata=BEARER["team-oak"] + BEARER["team-elm"], taken_as=NOBODY),
    "a good and a wrong one": Caller(metadata=BEARER["team-oak"] + WRONG, taken_as=NOBODY),
    "token": Caller(metadata=BEARER["team-oak"], taken_as="anybody team-oak team-oak closed closed"),
    "small letters": Caller(
        metadata=(("authorization", f"bearer   {TOKENS['team-oak']}"),),
        taken_as="anybody team-oak team-oak closed closed",
    ),
    "token without right": Caller(metadata=BEARER["team-elm"], taken_as="anybody team-elm team-elm closed closed"),
    "certificate": Caller("team-oak", taken_as="closed closed refused team-oak team-oak"),
    "certificate without right": Caller("team-elm", taken_as="closed closed refused team-elm team-elm"),
    "certificate of no tenant": Caller("stranger", taken_as="closed closed refused refused refused"),
    "tenant in the common name": Caller("common", taken_as="closed closed refused refused refused"),
    "certificate without names": Caller("nameless", taken_as="closed closed refused refused refused"),
    "certificate that is over": Caller("over", taken_as="closed closed refused closed closed"),
    "foreign authority": Caller("foreign", taken_as="closed closed refused closed closed"),
    "foreign authority, good token": Caller(
        "foreign", BEARER["team-oak"], taken_as="closed closed team-oak closed closed"
    ),
    "both of one team": Caller("team-oak", BEARER["team-oak"], taken_as="closed closed team-oak refused team-oak"),
    "both of two teams": Caller("team-oak", BEARER["team-elm"], taken_as="closed closed team-elm refused refused"),
    "certificate, wrong token": Caller("team-oak", WRONG, taken_as="closed closed refused refused refused"),
    "certificate, basic": Caller(
        "team-oak", (("authorization", "Basic eA=="),), taken_as="closed closed refused refused refused"
    ),
    "no tenant's certificate, token": Caller(
        "stranger", BEARER["team-oak"], taken_as="closed closed team-oak refused team-oak"
    ),
    "wrong transport": Caller(
        metadata=BEARER["team-oak"], taken_as="closed closed closed closed closed", wrong_transport=True
    ),
}


@dataclass(frozen=True)
class World:
    """A server of one kind, and the papers of everybody."""

    kind: str
    server: Attacked
    access: Path
    authority: Authority
    papers: dict[str, KeyPair]

    def channel(self, caller: Caller) -> grpc.Channel:
        tls = bool(caller.certificate) or SET_UPS[self.kind].tls != caller.wrong_transport
        if not tls:
            return grpc.insecure_channel(self.server.address)
        pair = self.papers.get(caller.certificate)
        credentials = grpc.ssl_channel_credentials(
            self.authority.certificate.read_bytes(),
            pair and pair.key.read_bytes(),
            pair and pair.certificate.read_bytes(),
        )
        return grpc.secure_channel(self.server.address, credentials)


def access_file(set_up: SetUp, teams: list[str]) -> bytes:
    lines = ["tenants:"]
    for team in teams:
        lines += [f"  {team}:", f"    models: [{TEAMS[team]}]"]
        if set_up.certificates:
            lines += [f"    certificates: ['spiffe://pool/{team}']"]
        if set_up.tokens:
            lines += [f"    tokens_sha256: ['{hashlib.sha256(TOKENS[team].encode()).hexdigest()}']"]
    return "\n".join(lines).encode()


@pytest.fixture(scope="module", params=SET_UPS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory, set_up = tmp_path_factory.mktemp("world"), SET_UPS[request.param]
    authority, foreign = Authority(directory / "pki"), Authority(directory / "foreign")
    papers = {team: authority.client(f"spiffe://pool/{team}", name=team) for team in TEAMS}
    papers["stranger"] = authority.client("spiffe://pool/team-oak/other", name="stranger")
    papers["common"] = authority.client("other.example", name="common", common_name="spiffe://pool/team-oak")
    papers["nameless"] = authority.client(name="nameless", common_name="team-oak")
    papers["over"] = authority.client("spiffe://pool/team-oak", name="over", ends=PAST)
    papers["foreign"] = foreign.client("spiffe://pool/team-oak", name="foreign")
    access = directory / "tenants.yaml"
    access.write_bytes(access_file(set_up, list(TEAMS)))
    options: list[object] = ["--log-level", "info", "--health-listen", "127.0.0.1:0"]
    if set_up != SetUp():
        options += ["--access", access]
    if set_up.tls:
        pair = authority.server()
        options += ["--tls-certificate", pair.certificate, "--tls-key", pair.key]
    if set_up.certificates:
        options += ["--tls-client-ca", authority.certificate]
    with attacked(directory, *options) as server:
        yield World(request.param, server, access, authority, papers)


def end_of(channel: grpc.Channel, call: str, metadata: tuple[tuple[str, str | bytes], ...]) -> Ending:
    """Makes the call, up to its first answer."""
    path, data, *_ = CALLS[call]
    try:
        if path == WATCH:
            answers = channel.unary_stream(path)(data, timeout=20, metadata=metadata)
            next(answers)
            answers.cancel()
        elif path == REFLECTION:
            assert b"stillhouse.v1.TeacherService" in next(
                channel.stream_stream(path)(iter([data]), timeout=20, metadata=metadata)
            )
        else:
            channel.unary_unary(path)(data, timeout=20, metadata=metadata)
    except grpc.RpcError as error:
        return ending_of(error)
    return OK


def check_tells_nothing(world: World, ending: Ending, own: str, call: str) -> None:
    """No secrets of the machine, and of the pool only what the caller brought along."""
    text = ending.everything
    assert not INTERNALS.search(text), text
    for team, token in TOKENS.items():
        assert token not in text
        assert hashlib.sha256(token.encode()).hexdigest() not in text
        assert team == own or team not in text
    assert str(world.access.parent) not in text
    if own not in ("team-oak", "team-gone", "anybody") and "by name" not in call:
        assert "synthetic" not in text, text
    if own == "refused":
        assert not re.search("stillhouse.v1|model|spiffe|tenant", text), text


@pytest.mark.parametrize("name", CALLERS)
def test_each_call_by_each_caller_ends_as_the_table_says_and_tells_no_more(world: World, name: str) -> None:
    caller = CALLERS[name]
    taken_as = caller.taken_as.split()[list(SET_UPS).index(world.kind)]
    counted = {reason: world.server.counted(reason=reason) for reason in ("UNAUTHENTICATED", "PERMISSION_DENIED")}
    logged = world.server.log.count("reason=UNAUTHENTICATED")
    endings = {}
    with world.channel(caller) as channel:
        for call in CALLS:
            endings[call] = end_of(channel, call, caller.metadata)
    got = {call: (ending.code, ending.reason) for call, ending in endings.items()}
    assert got == {call: caller.expected(world.kind, call) for call in CALLS}
    for call, ending in endings.items():
        if taken_as != "closed":  # then the text is of the client's own TLS
            check_tells_nothing(world, ending, taken_as, call)
    for reason, before in counted.items():
        assert world.server.counted(reason=reason) - before == [end for _, end in got.values()].count(reason)
    refusals = [end for _, end in got.values()].count("UNAUTHENTICATED")
    assert world.server.log.count("reason=UNAUTHENTICATED") - logged == refusals
    for token in TOKENS.values():
        assert token not in world.server.log
        assert token not in world.server.metrics
    assert "Traceback" not in world.server.log


def test_all_callers_without_an_identity_read_the_same_text(world: World) -> None:
    """What was wrong is for the log: a stranger learns nothing by trying."""
    texts = set()
    for caller in CALLERS.values():
        taken_as = caller.taken_as.split()[list(SET_UPS).index(world.kind)]
        if taken_as != "refused":
            continue
        with world.channel(caller) as channel:
            texts |= {end_of(channel, call, caller.metadata).everything for call in CALLS}
    # One for what was no bearer token at all, which its sender sees too, and one for all else.
    assert len(texts) == (0 if world.kind == "open" else 2), texts


def test_a_tenant_that_is_removed_is_refused_from_then_on_over_its_open_connection(world: World) -> None:
    set_up = SET_UPS[world.kind]
    token = Caller("stranger" if set_up.certificates else "", BEARER["team-gone"])
    certificate = Caller("team-gone")
    with contextlib.ExitStack() as stack:
        opened = [
            (stack.enter_context(world.channel(caller)), caller)
            for caller, known in ((token, set_up.tokens), (certificate, set_up.certificates))
            if known
        ]
        assert bool(opened) == (world.kind != "open")
        assert all(end_of(channel, "score", caller.metadata) == OK for channel, caller in opened)
        for teams, good in (["team-oak", "team-elm"], False), (list(TEAMS), True):
            before = world.server.log.count("access file reloaded")
            replace(world.access, access_file(set_up, teams))
            if opened:
                wait_for(lambda before=before: world.server.log.count("access file reloaded") > before, "the file")
            for call, (channel, caller) in itertools.product(CALLS, opened):
                ending = end_of(channel, call, caller.metadata)
                assert (ending.code, ending.reason) == (CALLS[call][COLUMNS["team-oak"]] if good else REFUSED), call
                check_tells_nothing(world, ending, "team-gone" if good else "refused", call)


def test_the_health_port_answers_everybody_and_nothing_but_health(world: World) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{world.server.said['health_port']}") as channel:
        for call in CALLS:
            ending = end_of(channel, call, ())
            if call == "check":
                assert ending == OK
            elif call == "garbage check":
                assert ending.code == "INVALID_ARGUMENT"
            else:
                assert (ending.code, ending.reason) == NO_METHOD, call
            assert not INTERNALS.search(ending.everything), ending
    assert "Traceback" not in world.server.log
