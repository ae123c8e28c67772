"""One engine after another: who answers what, when the old one closes, and what makes the server look for a new one."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks.synthetic_server import describe
from stillhouse.codec import Scores, ScoreTask, Teacher
from teacher_server.following import Follower
from teacher_server.options import Options
from teacher_server.serving import Serving


class Engine:
    """Closes and dies when it is told to."""

    def __init__(self, revision: str) -> None:
        self.revision = revision
        self.closed = 0
        self.death: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.on_close: Callable[[], None] = lambda: None

    def describe(self) -> Teacher:
        return describe("model", self.revision)

    async def score(self, task: ScoreTask) -> Scores:
        raise NotImplementedError

    async def check(self) -> float:
        return 0.0

    async def died(self) -> str:
        return await asyncio.shield(self.death)

    async def close(self) -> None:
        self.closed += 1
        self.on_close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.002)


async def test_a_request_keeps_its_engine_and_the_old_one_closes_after_its_last() -> None:
    told: list[str] = []
    old, new = Engine("r1"), Engine("r2")
    serving = Serving(old, on_switch=lambda teacher: told.append(teacher.model_revision))
    first, second = contextlib.ExitStack(), contextlib.ExitStack()
    assert first.enter_context(serving.engine()) is old
    assert second.enter_context(serving.engine()) is old
    switching = asyncio.create_task(serving.switch(new, drain_s=20))
    await until(lambda: told == ["r2"])
    assert serving.describe().model_revision == "r2"
    with serving.engine() as engine:
        assert engine is new
    first.close()
    await asyncio.sleep(0.1)
    assert not old.closed and not switching.done()
    second.close()
    await switching
    assert (old.closed, new.closed) == (1, 0)


async def test_an_old_engine_whose_requests_do_not_end_is_closed_after_the_drain_time() -> None:
    old, new = Engine("r1"), Engine("r2")
    serving, request = Serving(old), contextlib.ExitStack()
    request.enter_context(serving.engine())
    old.on_close = request.close  # closing fails what is left
    await serving.switch(new, drain_s=0.1)
    assert old.closed == 1


async def test_without_requests_the_old_engine_closes_at_once_and_the_new_one_at_the_end() -> None:
    old, new = Engine("r1"), Engine("r2")
    serving = Serving(old)
    await asyncio.wait_for(serving.switch(new, drain_s=1000), 10)
    await serving.close()
    assert (old.closed, new.closed) == (1, 1)


async def test_a_close_during_a_switch_closes_both() -> None:
    old, new = Engine("r1"), Engine("r2")
    serving, request = Serving(old), contextlib.ExitStack()
    request.enter_context(serving.engine())
    switching = asyncio.create_task(serving.switch(new, drain_s=1000))
    await until(lambda: serving.describe().model_revision == "r2")
    await serving.close()
    assert old.closed >= 1 and new.closed == 1
    request.close()
    await switching


async def test_only_the_death_of_the_engine_that_answers_now_counts() -> None:
    old, new = Engine("r1"), Engine("r2")
    serving = Serving(old)
    death = asyncio.create_task(serving.died())
    await asyncio.sleep(0)
    await serving.switch(new, drain_s=1)
    old.death.set_result("the old one")
    await asyncio.sleep(0.05)
    assert not death.done()
    new.death.set_result("the new one")
    assert await asyncio.wait_for(death, 10) == "the new one"


@dataclass(frozen=True)
class FollowedOptions:
    """Those of `Options` that following looks at."""

    model: Path
    drain_s: float = 5.0


class World:
    """Directories of models, a link to one of them, and a follower of it. A directory's name is its revision; one
    whose name has "broken" in it cannot be loaded."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.link = directory / "latest"
        self.loaded: list[Engine] = []
        self.attempts: list[str] = []
        self.reloads: list[bool] = []
        self.point_to("r1")
        self.first = Engine("r1")
        self.serving = Serving(self.first)
        options = cast(Options, FollowedOptions(self.link))
        self.follower = Follower(options, self.make_engine, self.serving, self.reloads.append)

    def point_to(self, name: str) -> None:
        (self.directory / name).mkdir(exist_ok=True)
        new = self.directory / "new"
        new.symlink_to(name)
        new.rename(self.link)

    async def make_engine(self, options: Any) -> Engine:
        name = options.model.name
        self.attempts.append(name)
        if "broken" in name:
            raise ValueError("two\nlines")
        self.loaded.append(Engine(name.partition("-")[0]))
        return self.loaded[-1]

    @property
    def revision(self) -> str:
        return self.serving.describe().model_revision


@contextlib.asynccontextmanager
async def following(directory: Path, every_s: float | None) -> AsyncIterator[World]:
    world = World(directory)
    watching = asyncio.create_task(world.follower.watch(every_s))
    yield world
    assert not watching.done()
    watching.cancel()


async def test_a_link_that_moved_brings_a_new_engine_once(tmp_path: Path) -> None:
    async with following(tmp_path, 0.01) as world:
        await asyncio.sleep(0.1)
        assert world.attempts == []
        world.point_to("r2")
        await until(lambda: world.reloads == [True])
        assert (world.revision, world.first.closed) == ("r2", 1)
        await asyncio.sleep(0.1)
        assert world.attempts == ["r2"]
        world.point_to("r1")  # and back
        await until(lambda: world.reloads == [True, True])
        assert world.revision == "r1"


async def test_a_broken_model_leaves_the_old_one_and_is_not_tried_again_until_the_link_moves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with following(tmp_path, 0.01) as world:
        world.point_to("broken")
        await until(lambda: world.reloads == [False])
        await asyncio.sleep(0.1)
        assert world.attempts == ["broken"]
        assert (world.revision, world.first.closed) == ("r1", 0)
        assert "cannot be served, the old model stays: ValueError: two lines" in caplog.text
        world.point_to("r3")
        await until(lambda: world.reloads == [False, True])
        assert world.revision == "r3"
        world.point_to("broken")
        await until(lambda: world.reloads == [False, True, False])
        assert world.revision == "r3"


async def test_whoever_asks_is_served_at_once_also_for_what_failed_before(tmp_path: Path) -> None:
    async with following(tmp_path, None) as world:
        world.point_to("broken")
        await asyncio.sleep(0.1)
        assert world.attempts == []  # nobody asked
        for times in (1, 2):
            world.follower.look_now()
            await until(lambda times=times: world.reloads == [False] * times)
        assert world.attempts == ["broken", "broken"]


async def test_the_same_revision_is_loaded_when_asked_for_and_nothing_is_switched(tmp_path: Path) -> None:
    async with following(tmp_path, None) as world:
        world.follower.look_now()
        await until(lambda: len(world.loaded) == 1 and bool(world.loaded[0].closed))
        assert (world.revision, world.first.closed, world.reloads) == ("r1", 0, [])
        world.point_to("r1-copy")
        world.follower.look_now()
        await until(lambda: len(world.loaded) == 2 and bool(world.loaded[1].closed))
        with world.serving.engine() as engine:
            assert engine is world.first


async def test_a_link_that_points_nowhere_is_refused_once_and_then_forgotten(tmp_path: Path) -> None:
    async with following(tmp_path, 0.01) as world:
        new = tmp_path / "new"
        new.symlink_to("broken-gone")
        new.rename(world.link)
        await until(lambda: world.reloads == [False])
        world.point_to("r1")
        await asyncio.sleep(0.1)
        assert world.revision == "r1" and world.reloads[0] is False
