"""Trying one key after another: how many each address may, and whom it holds up."""

from __future__ import annotations

import pytest

from serve_app.access import guessing
from serve_app.access.guessing import PERIOD_S, WRONG_KEYS, Guesses, TooManyGuesses

HOME, OFFICE = "203.0.113.7", "198.51.100.1"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def guesses(clock: Clock) -> Guesses:
    return Guesses(clock)


def use_up(guesses: Guesses, address: str | None, prefix: str = "") -> None:
    for number in range(WRONG_KEYS):
        guesses.wrong(address, f"{prefix}{number}")


def wait_s(guesses: Guesses, address: str | None, key: str = "one more") -> float:
    with pytest.raises(TooManyGuesses) as caught:
        guesses.wrong(address, key)
    return caught.value.retry_after_s


def test_some_wrong_keys_then_a_wait_that_is_true(guesses: Guesses, clock: Clock) -> None:
    use_up(guesses, HOME)
    assert wait_s(guesses, HOME) == PERIOD_S
    clock.now += PERIOD_S / 2
    assert wait_s(guesses, HOME) == PERIOD_S / 2  # a refused attempt adds nothing
    clock.now += PERIOD_S / 2
    guesses.wrong(HOME, "one more")
    assert wait_s(guesses, HOME, "and another") == PERIOD_S
    guesses.wrong(OFFICE, "one")


def test_a_right_key_is_not_told_while_its_address_waits(guesses: Guesses, clock: Clock) -> None:
    use_up(guesses, HOME)
    with pytest.raises(TooManyGuesses):
        guesses.right(HOME, "alice")
    guesses.right(OFFICE, "alice")
    clock.now += PERIOD_S
    guesses.right(HOME, "alice")


def test_a_caller_who_is_known_there_goes_on(guesses: Guesses, clock: Clock) -> None:
    guesses.right(HOME, "alice")
    use_up(guesses, HOME)
    guesses.right(HOME, "alice")
    clock.now += guessing.KNOWN_FOR_S
    use_up(guesses, HOME, "later")
    with pytest.raises(TooManyGuesses):
        guesses.right(HOME, "alice")


def test_a_program_that_repeats_one_wrong_key_holds_nobody_up(guesses: Guesses) -> None:
    for _ in range(100):
        guesses.wrong(HOME, "the old key")
    guesses.right(HOME, "alice")


def test_behind_an_address_that_all_share_right_keys_pass(guesses: Guesses) -> None:
    use_up(guesses, None)
    wait_s(guesses, None)
    guesses.right(None, "alice")


def test_memory_is_bounded(guesses: Guesses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guessing, "MOST_ADDRESSES", 3)
    monkeypatch.setattr(guessing, "MOST_KNOWN", 3)
    use_up(guesses, HOME)
    for number in range(3):
        guesses.right(OFFICE, f"caller {number}")
        guesses.wrong(f"address {number}", "x")
    guesses.right(HOME, "alice")  # its wrong keys are forgotten
    assert (len(guesses._addresses), len(guesses._known)) == (3, 3)
