"""Which drafts are kept: exact cases, laws in bulk, and properties."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toys import chi_square, prefill, total_variation, toy_engine

from ttspec.acceptance import accept_equal, accept_rejection, cut_at_end
from ttspec.config import GenerateConfig, LearnConfig
from ttspec.records import Proposal
from ttspec.sampling import ACCEPT, DRAFT, RESIDUAL, draw, exponential, fold, gumbel, uniform

V, G, MANY = 4, 3, 200_000


def one_hot(tokens: Tensor, size: int = V) -> Tensor:
    return torch.nn.functional.one_hot(tokens, size).float()


def laws(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (1.3 * torch.randn(*shape, V, generator=generator)).softmax(-1)


def noise(rows: int, length: int = G, size: int = V, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Fresh uniforms and exponentials, keyed as the decoder keys them."""
    key = fold(torch.tensor(seed), torch.arange(rows))
    u = uniform(fold(fold(key[:, None], ACCEPT, 0), torch.arange(length)))
    return u, exponential(fold(key, RESIDUAL, 0), size)


# Never, always, sometimes.


def test_drafts_that_the_target_never_says_are_never_kept():
    drafts = torch.tensor([[1, 2, 3]] * 50)
    p = one_hot(torch.zeros(50, G + 1, dtype=torch.long))
    for q in (None, one_hot(drafts)):
        accepted, tokens = accept_rejection(
            p, Proposal(tokens=drafts, count=torch.full((50,), G), q=q), *noise(50)
        )
        assert accepted.tolist() == [0] * 50
        assert tokens[:, 0].tolist() == [0] * 50


def test_drafts_that_the_target_always_says_are_always_kept_with_a_bonus():
    drafts = torch.tensor([[1, 2, 3]] * 50)
    p = one_hot(torch.tensor([[1, 2, 3, 2]] * 50))
    for q in (None, one_hot(drafts), laws(0, 50, G)):
        accepted, tokens = accept_rejection(
            p, Proposal(tokens=drafts, count=torch.full((50,), G), q=q), *noise(50)
        )
        assert accepted.tolist() == [G] * 50
        assert tokens.tolist() == [[1, 2, 3, 2]] * 50


@pytest.mark.parametrize(
    ("u", "wanted"),
    [
        ([0.49, 0.49, 0.49], 3),
        ([0.49, 0.49, 0.51], 2),
        ([0.51, 0.0, 0.0], 0),
        ([0.5, 0.0, 0.0], 0),  # u * q < p, strictly
        ([0.0, 0.5, 0.0], 1),
    ],
)
def test_a_draft_is_kept_where_u_q_is_below_p(u: list[float], wanted: int):
    drafts = torch.tensor([[0, 0, 0]])
    p = torch.tensor([0.5, 0.5, 0, 0]).expand(1, G + 1, V)
    for q, scale in ((None, 1.0), (torch.tensor([1.0, 0, 0, 0]).expand(1, G, V), 1.0)):
        proposal = Proposal(tokens=drafts, count=torch.tensor([G]), q=q)
        accepted, tokens = accept_rejection(p, proposal, scale * torch.tensor([u]), noise(1)[1])
        assert accepted.tolist() == [wanted]
        if wanted < G:
            assert tokens[0, wanted] == 1  # the residual holds nothing else


def test_a_draft_that_the_target_rules_out_is_not_kept_even_when_u_is_0():
    proposal = Proposal(tokens=torch.tensor([[2]]), count=torch.tensor([1]), q=laws(0, 1, 1))
    p = torch.tensor([[[0.5, 0.5, 0, 0], [1.0, 0, 0, 0]]])
    accepted, _ = accept_rejection(p, proposal, torch.zeros(1, 1), noise(1)[1])
    assert accepted.tolist() == [0]


@pytest.mark.parametrize(
    ("drafts", "chosen", "count", "wanted"),
    [
        ([1, 2, 3], [1, 2, 3, 0], 3, 3),
        ([1, 2, 3], [1, 2, 0, 3], 3, 2),
        ([1, 2, 3], [0, 2, 3, 1], 3, 0),
        ([1, 2, 3], [1, 2, 3, 0], 2, 2),
        ([1, 2, 3], [1, 2, 3, 0], 0, 0),
    ],
)
def test_equal_drafts_are_kept_up_to_the_first_difference(drafts, chosen, count, wanted):
    proposal = Proposal(tokens=torch.tensor([drafts]), count=torch.tensor([count]))
    accepted, tokens = accept_equal(torch.tensor([chosen]), proposal)
    assert accepted.tolist() == [wanted]
    assert tokens[0, : wanted + 1].tolist() == chosen[: wanted + 1]


def test_no_drafts_at_all_is_plain_sampling():
    p = laws(1, 1, 1).expand(MANY, 1, V)
    proposal = Proposal(
        tokens=torch.zeros(MANY, 0, dtype=torch.long), count=torch.zeros(MANY, dtype=torch.long)
    )
    accepted, tokens = accept_rejection(p, proposal, *noise(MANY, 0))
    assert not accepted.any()
    assert chi_square(torch.bincount(tokens[:, 0], minlength=V), p[0, 0]) > 1e-3


# Laws in bulk. p hangs on the position and the token before, q on the position.


def rounds(
    p: Tensor, q: Tensor, *, kept_q: Tensor | None, greedy: bool = False, count=None, seed=0
):
    """MANY rounds; returns accepted and tokens."""
    key = fold(torch.tensor(seed), torch.arange(MANY))
    drafts = q.argmax(-1).expand(MANY, G)
    if not greedy:
        fresh = gumbel(fold(fold(key[:, None], DRAFT, 0), torch.arange(G)), V)
        drafts = draw(q.log().expand(MANY, G, V), fresh)
    fed = torch.cat([torch.zeros(MANY, 1, dtype=torch.long), drafts], dim=1)
    count = torch.full((MANY,), G) if count is None else count
    proposal = Proposal(
        tokens=drafts, count=count, q=None if kept_q is None else kept_q.expand(MANY, G, V)
    )
    return accept_rejection(p[torch.arange(G + 1), fed], proposal, *noise(MANY, seed=seed))


def assert_lawful(p: Tensor, accepted: Tensor, tokens: Tensor, p_min: float = 1e-3) -> None:
    """First tokens, and what follows in rows that emitted more, have p's law."""
    for length in range(1, G + 2):
        full = tokens[accepted + 1 >= length, :length]
        # Rows that emit `length` tokens are chosen by what came before, not by the last one.
        before, last = full[:, :-1], full[:, -1]
        prev = before[:, -1] if length > 1 else torch.zeros(len(full), dtype=torch.long)
        for token in range(V):
            seen = last[prev == token]
            if len(seen) > 200:
                counts = torch.bincount(seen, minlength=V)
                assert chi_square(counts, p[length - 1, token]) > p_min, (length, token)


REDUCED = torch.tensor([0.6, 0.4, 0.0, 0.0])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["random q", "reduced support", "one-hot", "q is p"])
def test_emitted_tokens_have_the_law_of_the_target(kind: str, seed: int):
    p, q = laws(seed, G + 1, V), laws(seed + 50, G)
    if kind == "reduced support":
        q = REDUCED.expand(G, V)
    if kind == "q is p":
        p = p[:, :1].expand(G + 1, V, V)
        q = p[:G, 0]
    greedy = kind == "one-hot"
    accepted, tokens = rounds(p, q, kept_q=None if greedy else q, greedy=greedy, seed=seed)
    if kind == "q is p":
        assert (accepted == G).all()
    else:
        assert set(accepted.tolist()) == set(range(G + 1))
    assert_lawful(p, accepted, tokens)


def test_the_test_of_laws_finds_a_q_that_is_not_the_one_drawn_from():
    p, q = laws(0, G + 1, V), laws(50, G)
    other = (q.log() * 0.9).softmax(-1)
    with pytest.raises(AssertionError):
        assert_lawful(p, *rounds(p, q, kept_q=other), p_min=1e-9)


def test_acceptance_of_a_first_draft_is_one_minus_the_total_variation():
    p, q = laws(7, G + 1, V), laws(57, G)
    accepted, _ = rounds(p, q, kept_q=q)
    share = float((accepted > 0).float().mean())
    wanted = float(torch.minimum(p[0, 0], q[0]).sum())
    assert abs(share - wanted) < 4 * 0.5 / MANY**0.5


@pytest.mark.parametrize("kind", ["random q", "one-hot"])
def test_rows_with_fewer_drafts_take_their_bonus_from_the_full_p_of_their_own_last_row(kind):
    p, q = laws(3, G + 1, V), laws(53, G)
    count = torch.arange(MANY) % (G + 1)
    greedy = kind == "one-hot"
    accepted, tokens = rounds(p, q, kept_q=None if greedy else q, greedy=greedy, count=count)
    assert (accepted <= count).all()
    for n in range(G + 1):
        rows = count == n
        assert_lawful(p, accepted[rows], tokens[rows])
        whole = rows & (accepted == n)
        for token in range(V):
            prev = tokens[:, n - 1] if n else torch.zeros_like(accepted)
            chosen = tokens[whole & (prev == token), n]
            if len(chosen) > 200:
                counts = torch.bincount(chosen, minlength=V)
                assert chi_square(counts, p[n, token]) > 1e-3
                if n < G and not greedy:  # what a residual would have given is found
                    rest = (p[n, token] - q[n]).clamp(min=0)
                    assert total_variation(counts, rest) > 0.02


def test_an_empty_residual_falls_back_to_p():
    """Rounding can reject a draft although p - q has nothing left."""
    p = torch.tensor([0.25, 0.25, 0.25, 0.25]).expand(MANY, 2, V)
    q = p[:, :1] * (1 + 1e-6)
    proposal = Proposal(
        tokens=torch.zeros(MANY, 1, dtype=torch.long), count=torch.ones(MANY, dtype=torch.long), q=q
    )
    accepted, tokens = accept_rejection(p, proposal, torch.ones(MANY, 1), noise(MANY, 1)[1])
    assert not accepted.any()
    assert chi_square(torch.bincount(tokens[:, 0], minlength=V), p[0, 0]) > 1e-3


# Drafter-invariant sampling.


@pytest.mark.parametrize("drafter", ["coupled", "independent", "argmax", "constant"])
def test_the_emitted_tokens_are_the_targets_own_draws_for_any_proposal(drafter: str):
    rows = 20_000
    p, q = laws(4, rows, G + 1), laws(54, rows, G)
    key = fold(torch.tensor(3), torch.arange(rows))
    g = gumbel(fold(key[:, None], 0, torch.arange(G + 1)), V)
    own = draw(p.log(), g)
    drafts = {
        "coupled": draw(q.log(), g[:, :G]),
        "independent": draw(q.log(), gumbel(fold(key[:, None], 9, torch.arange(G)), V)),
        "argmax": q.argmax(-1),
        "constant": torch.zeros(rows, G, dtype=torch.long),
    }[drafter]
    accepted, tokens = accept_equal(own, Proposal(tokens=drafts, count=torch.full((rows,), G)))
    emitted = torch.arange(G + 1) <= accepted[:, None]
    assert torch.equal(tokens[emitted], own[emitted])
    within = torch.arange(G) < accepted[:, None]
    assert torch.equal(tokens[:, :G][within], drafts[within])
    assert len(set(accepted.tolist())) == G + 1


@pytest.mark.parametrize("seed", range(4))
def test_a_coupled_draft_agrees_as_often_as_promised(seed: int):
    p, q = laws(seed, 1)[0], laws(seed + 70, 1)[0]
    tv = float((p - q).abs().sum() / 2)
    g = gumbel(fold(torch.tensor(seed), torch.arange(MANY)), V)
    agree = float((draw(p.log().expand_as(g), g) == draw(q.log().expand_as(g), g)).float().mean())
    error = 4 * 0.5 / MANY**0.5
    assert (1 - tv) / (1 + tv) - error <= agree <= 1 - tv + error


def test_an_argmax_draft_agrees_as_often_as_p_says_it():
    p = laws(2, 1)[0]
    g = gumbel(fold(torch.tensor(8), torch.arange(MANY)), V)
    agree = float((draw(p.log().expand_as(g), g) == 1).float().mean())
    assert abs(agree - float(p[1])) < 4 * 0.5 / MANY**0.5


# The end of an answer.


@pytest.mark.parametrize(
    ("tokens", "emitted", "wanted", "ended"),
    [
        ([5, 6, 7, 8], 4, 4, False),
        ([5, 9, 7, 8], 4, 2, True),
        ([9, 9, 7, 8], 4, 1, True),
        ([5, 6, 7, 9], 4, 4, True),
        ([5, 6, 9, 8], 2, 2, False),  # an end token that is not emitted ends nothing
        ([5, 8, 9, 3], 3, 3, True),
        ([3, 6, 9, 3], 3, 1, True),  # several end tokens
        ([9, 6, 7, 8], 0, 0, False),
    ],
)
def test_emission_ends_with_the_first_end_token(tokens, emitted, wanted, ended):
    ends, heeded = torch.tensor([3, 9]), torch.tensor([True])
    found = cut_at_end(torch.tensor([tokens]), torch.tensor([emitted]), ends, heeded)
    assert [x.tolist() for x in found] == [[wanted], [ended]]


def test_without_end_tokens_nothing_ends():
    none, heeded = torch.empty(0, dtype=torch.long), torch.tensor([True])
    emitted, ended = cut_at_end(torch.tensor([[1, 2]]), torch.tensor([2]), none, heeded)
    assert emitted.tolist() == [2]
    assert ended.tolist() == [False]


def test_rows_at_rest_emit_nothing(toy_target_dir):
    engine = toy_engine(toy_target_dir)
    config = GenerateConfig(max_new_tokens=9, learn=LearnConfig(stride=1), ignore_eos=True)
    decoder = engine.decoder(config, 3, 4, sessions=False)
    prefill(decoder, [0, 1, 2], [[10, 20]] * 3, [1, 2, 3], [9, 1, 9])
    records = []
    absorb = decoder.drafter.absorb
    decoder.drafter.absorb = lambda state, v: (records.append(v), absorb(state, v))
    outcomes = decoder.round()
    assert set(outcomes) == {0, 2}
    assert records[0].emitted.tolist()[1] == records[0].accepted.tolist()[1] == 0
    assert decoder.rows.lengths[1] == 2
    assert decoder.rows.budget[1] == 0


# Properties.

CASES = st.integers(1, 5).flatmap(
    lambda rows: st.tuples(
        st.lists(
            st.lists(st.integers(0, V - 1), min_size=G, max_size=G), min_size=rows, max_size=rows
        ),
        st.lists(st.integers(0, G), min_size=rows, max_size=rows),
        st.integers(0, 10_000),
    )
)


@settings(max_examples=150, deadline=None)
@given(CASES, st.booleans())
def test_kept_drafts_are_a_prefix_of_the_proposal_and_no_longer_than_its_count(case, stored):
    drafts, count, seed = torch.tensor(case[0]), torch.tensor(case[1]), case[2]
    rows = len(drafts)
    p, q = laws(seed, rows, G + 1), laws(seed + 1, rows, G)
    proposal = Proposal(tokens=drafts, count=count, q=q if stored else None)
    chosen = draw(
        p.log(), gumbel(fold(torch.tensor(seed), torch.arange(rows * 4).view(rows, 4)), V)
    )
    for accepted, tokens in (
        accept_rejection(p, proposal, *noise(rows, seed=seed)),
        accept_equal(chosen, proposal),
    ):
        assert tokens.shape == (rows, G + 1)
        assert ((accepted >= 0) & (accepted <= count)).all()
        kept = torch.arange(G) < accepted[:, None]
        assert torch.equal(tokens[:, :G][kept], drafts[kept])
        assert ((tokens >= 0) & (tokens < V)).all()


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_a_row_is_judged_as_it_would_be_alone(case):
    drafts, count, seed = torch.tensor(case[0]), torch.tensor(case[1]), case[2]
    rows = len(drafts)
    p, q = laws(seed, rows, G + 1), laws(seed + 1, rows, G)
    u, fresh = noise(rows, seed=seed)
    accepted, tokens = accept_rejection(p, Proposal(tokens=drafts, count=count, q=q), u, fresh)
    for i in range(rows):
        one = slice(i, i + 1)
        alone = accept_rejection(
            p[one], Proposal(tokens=drafts[one], count=count[one], q=q[one]), u[one], fresh[one]
        )
        assert torch.equal(alone[0], accepted[one])
        assert torch.equal(alone[1], tokens[one])
