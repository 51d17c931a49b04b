"""The ingress's end of the channels: takes the messages of each model replica apart, into the inboxes of its attempts.

A channel is opened to a replica that answers two attempts or more, and ends by itself. Promises that an attempt whose
tokens were in a channel that broke is told so. Knows no text.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from typing import Any

from ray.serve.handle import DeploymentResponseGenerator

from serve_app.deployments.calls import caller_cancelled, cancel, in_its_own_right
from serve_app.deployments.inbox import Inbox
from serve_app.deployments.token_channels import ChannelItem, ChannelRequest
from serve_app.messages import TokenBatch

logger = logging.getLogger(__name__)

WORTHWHILE = 2
"""Attempts at one replica that a channel saves messages for."""
OPEN_S = 5.0
"""A channel that is not open after so long is given up, and another is tried so much later."""


class ChannelReader:
    """All channels of one caller, for its event loop."""

    def __init__(self, open_channel: Callable[[ChannelRequest], Any], caller: str) -> None:
        """`open_channel` makes Serve's streaming call; `caller` is "" where nobody can be told apart: no channels."""
        self._open_channel = open_channel
        self._caller = caller
        self._numbers = itertools.count(1)
        self._inboxes: dict[int, Inbox] = {}
        self._at: defaultdict[str, set[int]] = defaultdict(set)
        self._reading: dict[str, asyncio.Task[None]] = {}
        self._not_before: dict[str, float] = {}

    @contextmanager
    def attempt(self, first_index: int) -> Iterator[tuple[int, Inbox]]:
        """The number and the inbox of a new attempt, whose first token is to have that position."""
        number, inbox = next(self._numbers), Inbox(first_index)
        self._inboxes[number] = inbox
        try:
            yield number, inbox
        finally:
            del self._inboxes[number]
            inbox.release()
            for replica in [replica for replica, numbers in self._at.items() if number in numbers]:
                self._at[replica].discard(number)
                if not self._at[replica]:
                    del self._at[replica]

    def answered(self, number: int, replica: str) -> None:
        """This replica has said its first word to the attempt."""
        self._at[replica].add(number)
        worthwhile = self._caller and len(self._at[replica]) >= WORTHWHILE
        if worthwhile and replica not in self._reading and time.monotonic() >= self._not_before.get(replica, 0.0):
            self._not_before.pop(replica, None)
            # It belongs to no request, whoever started it.
            task = asyncio.create_task(self._read(replica), name=f"channel {replica}", context=Context())
            self._reading[replica] = task

    async def _read(self, replica: str) -> None:
        opened = ended = False
        response: DeploymentResponseGenerator[Any] | None = None
        try:
            response = in_its_own_right(lambda: self._open_channel(ChannelRequest(self._caller, replica)))
            async with asyncio.timeout(OPEN_S) as limit:
                async for items in response:
                    if not opened:
                        opened = True
                        limit.reschedule(None)
                    self._hand_out(items)
            ended = True
        except asyncio.CancelledError:
            if caller_cancelled():
                raise
            logger.info("replica %s cancelled its channel", replica)
        except Exception as error:  # noqa: BLE001 - a replica's exception arrives as itself, of any type
            logger.info(
                "the channel to replica %s %s: %r", replica, "broke" if opened else "could not be opened", error
            )
        finally:
            del self._reading[replica]
            if response is not None and not ended:
                cancel(response)
            if not opened:
                self._not_before[replica] = time.monotonic() + OPEN_S
            elif not ended:
                for number in self._at.get(replica, ()):
                    self._inboxes[number].lose()

    def _hand_out(self, items: tuple[ChannelItem, ...]) -> None:
        for number, first_index, token_ids, logprobs in items:
            if (inbox := self._inboxes.get(number)) is not None:
                inbox.put(TokenBatch(first_index, token_ids, logprobs))
