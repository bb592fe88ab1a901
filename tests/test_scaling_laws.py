"""Published laws, their closed forms, what nanoGPT's notebook made of one; a law fitted to runs whose law is known."""

import math

import numpy as np
import pytest

from nanogpt_fast.published_runs import (
    EDU,
    FINEWEB,
    OWT,
    RUNS,
    SPREAD,
    UNIQUE,
    above,
    data_named,
    expected,
    misfit,
    offset,
)
from nanogpt_fast.scaling_fit import bootstrap, fit, interval, parabola
from nanogpt_fast.scaling_laws import (
    C4,
    LAWS,
    REFIT,
    ROUNDED,
    ROWS,
    TABLE_A3,
    UNROUNDED,
    along,
    critical_batch,
    effective_tokens,
    on_a_grid,
    tokens_worth,
)

BUDGET = TABLE_A3[1]

# ---- laws ----


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
@pytest.mark.parametrize("flops", [1e17, 2.21e19, 5.88e23])
def test_the_closed_form_is_the_least_loss(law, flops):
    params = np.geomspace(1e6, 1e13, 400_001)
    best = params[np.argmin(law.loss(params, flops / 6 / params))]
    n, d = law.optimum(flops)
    assert n == pytest.approx(best, rel=1e-4) and 6 * n * d == pytest.approx(flops)
    assert law.tokens_for(n) == pytest.approx(d) and law.params_for(d) == pytest.approx(n)
    assert law.optimum(flops, each=7.0)[0] == pytest.approx(law.optimum(flops * 6 / 7)[0])
    assert math.log(law.optimum(10 * flops)[0] / n, 10) == pytest.approx(law.exponent)


def test_nanogpts_notebook_and_what_was_wrong_with_it():
    """Its cells 16, 19 and 25; the paper's row; the same by other constants."""
    assert on_a_grid(ROUNDED, BUDGET, 16) == pytest.approx((316.23e6, 11.65e9), rel=1e-3)
    assert ROUNDED.tokens_for(399.54e6) == pytest.approx(14.43e9, rel=0.005)  # its grid is 0.9% wide
    found = {law.name: law.optimum(BUDGET) for law in LAWS}
    assert found[ROUNDED.name] == pytest.approx((326e6, 11.29e9), rel=0.01)
    assert found[UNROUNDED.name] == pytest.approx((388e6, 9.47e9), rel=0.01)
    assert found[REFIT.name] == pytest.approx((393e6, 9.35e9), rel=0.01)
    assert found[UNROUNDED.name] == pytest.approx((TABLE_A3[0], TABLE_A3[2]), rel=0.035)
    n, d = np.log10(np.array(ROWS["approach 2"])).T
    slope, at_zero = np.polyfit(n, d, 1)
    assert (slope, at_zero) == pytest.approx((1.0409573, 0.9353887), rel=1e-6)


def test_at_chinchillas_own_budget_the_refit_agrees_with_the_other_approaches():
    of = [law.optimum(5.88e23)[0] / 1e9 for law in (ROUNDED, UNROUNDED, REFIT)]
    assert of == pytest.approx([32.5, 40.7, 73.0], rel=0.01)
    assert [along(rows, 5.88e23)[0] / 1e9 for rows in ROWS.values()] == pytest.approx([68.3, 64.1], rel=0.01)
    assert REFIT.exponent == pytest.approx(0.5126, abs=1e-4)  # as arXiv 2404.10102 gives it
    assert [along(rows, BUDGET)[2] for rows in ROWS.values()] == pytest.approx([0.50, 0.49], abs=0.005)  # the paper's


def test_muennighoffs_constants_are_the_printed_ones():
    assert [C4.E, C4.A, C4.B, C4.exponent] == pytest.approx([1.87, 521, 1488, 0.5], rel=1e-3)


def test_tokens_to_a_loss():
    loss = REFIT.loss(124e6, 1e10)
    assert REFIT.tokens_to_reach(124e6, loss) == pytest.approx(1e10)
    assert REFIT.tokens_to_reach(60e6, REFIT.loss(124e6, 1e13)) == math.inf


def test_data_seen_again_are_worth_less_and_less():
    assert effective_tokens(5.0, None) == effective_tokens(5.0, 10.0) == 5.0
    assert effective_tokens(40.0, 10.0) == pytest.approx(37.3, abs=0.1)  # four passes: almost new
    assert effective_tokens(1e9, 10.0) == pytest.approx(10 * 16.387756)
    for tokens in (7.0, 40.0, 300.0):
        assert tokens_worth(effective_tokens(tokens, 10.0), 10.0) == pytest.approx(tokens)
    assert tokens_worth(164.0, 10.0) == math.inf and tokens_worth(164.0, None) == 164.0


def test_the_critical_batch_grows_as_the_loss_falls():
    assert critical_batch(3.3) == pytest.approx(0.68e6, rel=0.01) and critical_batch(2.5) > 2 * critical_batch(3.0)


# ---- published runs ----


def test_an_expectation_holds_the_runs_that_it_was_told():
    for run in RUNS:
        found = expected(run.params, run.effective, run.data)
        if run.loss is None:
            assert not found.runs and found.added == 0 and found.low <= found.loss <= found.high
        else:
            assert found.low - 1e-9 <= run.loss <= found.high + 1e-9 and run.name in found.runs
    assert max(misfit(law) for law in SPREAD) < 0.02
    first, second = (run for run in RUNS if run.data == FINEWEB)
    blind = expected(second.params, second.effective, FINEWEB, without=second)
    assert blind.runs == (first.name,) and second.loss and abs(blind.loss - second.loss) < 0.05
    assert offset(REFIT, [first, second]) == pytest.approx((above(REFIT, first) + above(REFIT, second)) / 2)


def test_nanogpts_passes_are_counted_for_less():
    run = RUNS[0]
    assert run.tokens / UNIQUE[OWT] == pytest.approx(32.6, abs=0.1)
    assert run.effective == pytest.approx(130.3e9, rel=0.01) and run.params == 124_373_760


def test_hours_and_mfu_of_published_runs():
    """MFU as trainers.md's sources have it: nanoGPT 29.2%, llm.c's 124M 41.1%, its 350M 62.1%."""
    assert [round(run.mfu, 2) for run in RUNS if run.gpu] == [0.29, 0.41, 0.62, 0.50]
    assert RUNS[0].hours_at(0.5) == pytest.approx(RUNS[0].hours * RUNS[0].mfu / 0.5)


def test_what_a_folders_name_says():
    named = {"openwebtext": OWT, "owt": OWT, "fineweb10B": FINEWEB, "finewebedu": EDU, "edu_fineweb100B": EDU}
    assert {name: data_named(name) for name in named} == named and data_named("shakespeare") is None


# ---- a fit ----


def runs_of(law, noise: float, seed: int = 0):
    """8 sizes at 6 budgets: (params, tokens, losses)."""
    params = np.repeat(np.geomspace(5e7, 1e10, 8), 6)
    tokens = np.tile(np.geomspace(1e19, 3e21, 6), 8) / 6 / params
    return params, tokens, law.loss(params, tokens) * np.exp(noise * np.random.default_rng(seed).standard_normal(48))


def test_a_fit_finds_the_law_behind_runs_without_noise():
    found = fit(*runs_of(REFIT, 0.0), tries=3)
    for key in ("E", "A", "B", "alpha", "beta"):
        assert getattr(found.law, key) == pytest.approx(getattr(REFIT, key), rel=1e-6)
    assert found.objective < 1e-9 and found.gradient < 1e-2 and abs(found.residuals).max() < 1e-8


def test_its_interval_covers_the_law_behind_noisy_runs():
    """Of seeds 0 to 39, 60 samples each, the 95% intervals held E 40 times, a 36, and the best size 37 times."""
    runs = runs_of(UNROUNDED, 0.003, seed=2)
    found = fit(*runs, tries=3)
    laws = bootstrap(*runs, found, samples=40)
    for of in (lambda law: law.E, lambda law: law.exponent, lambda law: law.optimum(1e21)[0]):
        low, high = interval(laws, of)
        assert low < of(UNROUNDED) < high and low < of(found.law) < high
    low, high = interval(laws, lambda law: law.optimum(1e21)[0])
    assert high / low < 1.5  # and says something
    again = bootstrap(*runs, found, samples=2)
    assert again == laws[:2]


def test_one_wild_run_moves_it_little():
    """Huber: the squares of it would carry the fit away."""
    params, tokens, losses = runs_of(REFIT, 0.001)
    losses[5] *= 1.3
    found = fit(params, tokens, losses, tries=3)
    assert found.law.optimum(1e21)[0] == pytest.approx(REFIT.optimum(1e21)[0], rel=0.1)
    assert found.residuals.argmax() == 5 and found.residuals[5] == pytest.approx(math.log(1.3), abs=0.02)


def test_runs_that_cannot_tell_are_refused():
    params, tokens, losses = runs_of(REFIT, 0.0)
    for some in (slice(0, 5), slice(0, 6)):  # five runs; six of one size
        with pytest.raises(ValueError, match="cannot be told"):
            fit(params[some], tokens[some], losses[some])
    for bad in (-losses, losses * math.nan, losses[:-1]):
        with pytest.raises(ValueError, match=r"positive and finite|as many"):
            fit(params, tokens, bad)


def test_a_parabola_finds_the_best_size_of_a_budget():
    best = REFIT.optimum(BUDGET)[0]
    params = best * np.geomspace(0.5, 2, 7)
    losses = REFIT.loss(params, BUDGET / 6 / params)
    assert parabola(params, losses) == pytest.approx((best, REFIT.loss(*REFIT.optimum(BUDGET))), rel=2e-3)
    for given in ((params[:2], losses[:2]), (params, -losses)):
        with pytest.raises(ValueError, match=r"three sizes|no lowest point"):
            parabola(*given)
