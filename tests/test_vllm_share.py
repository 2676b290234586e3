"""How much time learning inside vLLM may take."""

import pytest

from ttspec.learning.update_schedule import FULL, SHARE, share_of_updates
from ttspec.vllm.settings import Settings
from ttspec.vllm.share import TimeShare


@pytest.fixture
def now(monkeypatch) -> list[float]:
    """A clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    return now


def test_by_default_learning_begins_as_in_ttspecs_own_engine() -> None:
    assert Settings().share == SHARE


def test_time_is_a_share_of_work_and_pauses_earn_little(now) -> None:
    share = TimeShare(0.04)
    share.spend(0.04, "reading")
    with share.charged("updates"):
        now[0] += 0.17  # of 0.16 that are left, and a share of these
    share.tick(0)
    assert not share.allows
    assert share.admits(needed=False)  # it took less time than updates
    now[0] += 3600  # counts as one second
    share.tick(0)
    assert share.allows
    assert share.worked == pytest.approx(1.17)
    share.spend(5.0, "updates")
    assert not share.allows


def test_reading_that_took_too_much_goes_on_later_although_nothing_is_updated(now) -> None:
    """Without something new to read there are no updates, and time alone fills the account."""
    share = TimeShare(0.06)
    share.spend(0.2, "updates")
    share.spend(0.5, "reading")
    waited = 0.0
    while not share.admits(needed=True):
        now[0] += 0.5
        waited += 0.5
        share.tick(60)
    assert waited == pytest.approx(0.4 / 0.06, abs=0.5)
    assert not share.admits(needed=False)
    share.spend(0.4, "updates")
    assert share.admits(needed=False)  # it is the cheaper part
    assert not share.allows


@pytest.mark.parametrize("given", [0.06, 0.5])
@pytest.mark.parametrize("reading", [0.0003, 0.03])
def test_the_more_was_learned_the_less_time_goes_into_it(now, given, reading) -> None:
    share, updates, left, new = TimeShare(given), 0, 0, 0
    for until in (FULL, 4 * FULL, 20 * FULL):
        began, spent, first = now[0], sum(share.spent.values()), updates
        while updates < until:  # steps of 20 ms; a request of 100 steps; an update takes 0.2 s
            now[0] += 0.02
            share.tick(updates)
            left = left - 1 if left else 100 * share.admits(needed=new < 8)
            if left:
                new += 1
                with share.charged("reading"):
                    now[0] += reading
            if new >= 8 and share.allows:
                updates, new = updates + 1, new - 8
                with share.charged("updates"):
                    now[0] += 0.2
        found = (sum(share.spent.values()) - spent) / (now[0] - began)
        may = [min(given, share_of_updates(n)) for n in range(first, until)]
        wanted = len(may) / sum(1 / m for m in may)  # all updates take as long
        assert found == pytest.approx(wanted, rel=0.25), until
    # At most half of it; or what is read for an update takes longer than the update.
    assert share.spent["reading"] < 1.1 * max(share.spent["updates"], updates * 8 * reading)
