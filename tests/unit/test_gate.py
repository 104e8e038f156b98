"""Requests that are held, drained and aborted around a commit."""

from __future__ import annotations

import asyncio

import pytest

from tink_rl import errors
from tink_rl.server.gate import Gate
from tink_rl.server.state import ServedState


def test_gate_waits_for_the_requests_that_it_is_given_however_many_come_after_them():
    async def run():
        gate = Gate()
        old = await gate.enter()
        before = gate.running()
        await gate.enter()
        assert not await gate.drained(0.01, before)
        gate.leave(old)
        assert await gate.drained(0.01, before)
        assert not await gate.drained(0.01)

    asyncio.run(run())


def test_gate_holds_new_requests_and_waits_only_for_older_ones():
    async def run():
        gate = Gate()
        old = await gate.enter()
        gate.close()
        held = asyncio.create_task(gate.enter())
        assert not await gate.drained(0.02)
        gate.leave(old)
        assert await gate.drained(1.0)
        assert not held.done()
        gate.open()
        ticket = await asyncio.wait_for(held, 1.0)
        gate.refusal = errors.NotReady("half a policy")
        with pytest.raises(errors.NotReady):
            await gate.enter()
        assert gate.num_running == 1
        gate.leave(ticket)

    asyncio.run(run())


class _Engine:
    """Aborts what is in it; what comes while it is paused waits until it is resumed."""

    def __init__(self, gate):
        self._gate = gate
        self._inside, self._waiting = [gate.enter()], [gate.enter()]

    async def arrive(self):
        self._inside = [await ticket for ticket in self._inside]
        self._waiting = [await ticket for ticket in self._waiting]

    async def pause_generation(self, *, mode, clear_cache):
        assert mode == "abort"
        for ticket in self._inside:
            self._gate.leave(ticket)
        self._inside = []

    async def resume_generation(self):
        self._inside, self._waiting = self._waiting, []


def test_abort_ends_requests_that_reach_the_engine_after_it():
    async def run():
        state = object.__new__(ServedState)
        state.gate = Gate()
        state.engine = engine = _Engine(state.gate)
        await engine.arrive()
        await state.hold(5.0, "abort")
        assert state.gate.num_running == 0

    asyncio.run(run())
