"""Serving what `--model` names, also when it comes to name something else: load, check, switch, drain.

The path is a link, or lies below one, that somebody lets point at another directory once that is complete (Kubernetes
and `student-trainer`'s `checkpoints/latest` do it so). SIGHUP looks at once, and also loads anew if the link is the
same. A new model that cannot be loaded or fails its check leaves the old one in service.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

from teacher_server.engine import Engine
from teacher_server.options import Options
from teacher_server.serving import Serving

logger = logging.getLogger(__name__)

MakeEngine = Callable[[Options], Awaitable[Engine]]
"""Loads and checks the model that the options name."""


class Follower:
    """Watches `options.model` for one server. on_reload: called with whether a new model could be taken over."""

    def __init__(
        self, options: Options, make_engine: MakeEngine, serving: Serving, on_reload: Callable[[bool], None]
    ) -> None:
        self._options = options
        self._make_engine = make_engine
        self._serving = serving
        self._on_reload = on_reload
        self._serves = options.model.resolve()
        self._failed: Path | None = None
        self._asked = asyncio.Event()

    def look_now(self) -> None:
        """Looks at once, and loads anew whatever the link says."""
        self._asked.set()

    async def watch(self, every_s: float | None) -> None:
        """Follows until cancelled, looking every so many seconds; None: only when asked."""
        while True:
            try:
                await asyncio.wait_for(self._asked.wait(), every_s)
            except TimeoutError:
                asked = False
            else:
                asked = True
                self._asked.clear()
            target = self._options.model.resolve()
            if asked or target not in (self._serves, self._failed):
                await self._take_over(target)

    async def _take_over(self, target: Path) -> None:
        logger.info("another model is asked for: loading directory=%s", target)
        try:
            engine = await self._make_engine(replace(self._options, model=target))
        except Exception as error:  # whatever a library says of a damaged model
            self._failed = target
            self._on_reload(False)
            cause = " ".join(f"{type(error).__name__}: {error}".split())
            logger.error("directory=%s cannot be served, the old model stays: %s", target, cause)
            logger.debug("could not load", exc_info=error)
            return
        self._serves, self._failed = target, None
        before, now = self._serving.describe(), engine.describe()
        if before == now:
            logger.info("the same revision, nothing to switch: revision=%s", now.model_revision)
            await engine.close()
            return
        logger.info("switching: revision=%s to=%s", before.model_revision, now.model_revision)
        await self._serving.switch(engine, self._options.drain_s)
        self._on_reload(True)
        logger.info("switched: revision=%s", now.model_revision)
