"""The page pool against a plain model of it, and page hashes."""

from __future__ import annotations

import pytest
from exploring import cases
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from serve_app.engine import kv_cache
from serve_app.engine.kv_cache import PagePool, page_hash, root_hash

PAGES = 12
in_both_modes = pytest.mark.parametrize("in_runs", [True, False])


class PoolMachine(RuleBasedStateMachine):
    """Random allocations, holds, releases and publications; the model is a dict of holders and one of contents."""

    @initialize(in_runs=st.booleans())
    def begin(self, in_runs: bool) -> None:
        self.pool = PagePool(PAGES, in_runs=in_runs)
        self.holders: dict[int, int] = {}
        self.contents: dict[bytes, int] = {}
        self.names = 0

    groups = Bundle("groups")

    @rule(target=groups, count=st.integers(0, 5), after=st.none() | st.integers(0, PAGES - 1))
    def allocate(self, count: int, after: int | None) -> tuple[int, ...]:
        available = self.pool.available
        pages = self.pool.allocate(count, after)
        if count > available:
            assert pages is None
            return ()
        assert pages is not None
        assert len(set(pages)) == count
        for page in pages:
            assert self.holders.get(page, 0) == 0, "a held page was given away"
            self.holders[page] = 1
        # What was handed out lost its old contents.
        self.contents = {name: page for name, page in self.contents.items() if page not in pages}
        return tuple(pages)

    @rule(target=groups, group=groups)
    def hold(self, group: tuple[int, ...]) -> tuple[int, ...]:
        held = tuple(page for page in group if self.holders.get(page, 0) > 0)
        self.pool.hold(held)
        for page in held:
            self.holders[page] += 1
        return held

    @rule(group=consumes(groups))
    def release(self, group: tuple[int, ...]) -> None:
        self.pool.release(group)
        for page in group:
            self.holders[page] -= 1

    @rule(group=groups)
    def publish(self, group: tuple[int, ...]) -> None:
        for page in group:
            if self.holders.get(page, 0) > 0 and page not in self.contents.values():
                name = self.names.to_bytes(4)
                self.names += 1
                self.pool.publish(page, name)
                self.contents[name] = page

    @rule(target=groups, data=st.data())
    def share(self, data: st.DataObject) -> tuple[int, ...]:
        if not self.contents:
            return ()
        name = data.draw(st.sampled_from(sorted(self.contents)))
        pages = self.pool.lookup([name])
        assert pages == [self.contents[name]], "a known page was forgotten or is another one"
        self.pool.hold(pages)
        self.holders[pages[0]] = self.holders.get(pages[0], 0) + 1
        return tuple(pages)

    @invariant()
    def counts_agree(self) -> None:
        used = sum(1 for count in self.holders.values() if count > 0)
        assert self.pool.used == used
        assert self.pool.available == PAGES - used
        assert self.pool.idle(range(PAGES)) == PAGES - used


PoolMachine.TestCase.settings = settings(max_examples=cases(60, exploring=300), stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase


def test_a_run_continues_after_the_last_page_when_it_can() -> None:
    pool = PagePool(16)
    first = pool.allocate(2)
    second = pool.allocate(2)
    assert first == [0, 1]
    assert second is not None
    assert second[0] > 2, "the second run leaves the first one room to grow"
    assert pool.allocate(1, after=first[-1]) == [2]


def test_without_runs_a_page_costs_the_same_however_many_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "_FREE_EXTENT", None)
    pool = PagePool(16, in_runs=False)
    first, second = pool.allocate(2), pool.allocate(2)
    assert (first, second) == ([0, 1], [2, 3])
    pool.release([0, 1])
    assert pool.allocate(1, after=3) == [0], "memory that was written to is used again first"


@in_both_modes
def test_the_least_recently_used_contents_go_first_and_prefixes_outlive_their_tails(in_runs: bool) -> None:
    pool = PagePool(4, in_runs=in_runs)
    old, new = pool.allocate(2), pool.allocate(2)
    assert old is not None
    assert new is not None
    for number, page in enumerate([*old, *new]):
        pool.publish(page, bytes([number]))
    pool.release(old)
    pool.release(new)
    assert pool.allocate(1) == [old[1]]
    assert pool.lookup([b"\x00", b"\x01"]) == [old[0]]
    assert pool.lookup([b"\x02", b"\x03"]) == new


@in_both_modes
def test_misuse_is_an_error_and_not_a_corruption(in_runs: bool) -> None:
    pool = PagePool(2, in_runs=in_runs)
    pages = pool.allocate(1)
    assert pages is not None
    pool.release(pages)
    with pytest.raises(ValueError, match="has no holder"):
        pool.release(pages)
    with pytest.raises(ValueError, match="is free"):
        pool.hold(pages)


def test_hashes_depend_on_the_salt_on_all_tokens_before_and_on_nothing_else() -> None:
    first = page_hash(root_hash(""), [1, 2, 3])
    assert first == page_hash(root_hash(""), [1, 2, 3])
    assert len({first, page_hash(root_hash("tenant"), [1, 2, 3]), page_hash(first, [1, 2, 3])}) == 3
    assert page_hash(root_hash(""), [1, 2, 4]) != first
