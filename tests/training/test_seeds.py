from __future__ import annotations

import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrmil.training.seeds import derive_seed, generators, seed_everything

SCOPES = st.lists(st.one_of(st.integers(0, 20), st.text(max_size=6)), max_size=3).map(tuple)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**40), SCOPES, st.integers(0, 2**40), SCOPES)
def test_every_scope_has_its_own_seed(seed, scope, other_seed, other_scope):
    same = (seed, *map(str, scope)) == (other_seed, *map(str, other_scope))
    assert (derive_seed(seed, *scope) == derive_seed(other_seed, *other_scope)) == same
    assert 0 <= derive_seed(seed, *scope) < 2**63


def test_seeds_stay_what_they_are():
    """A change here would silently change every published number."""
    assert derive_seed(0) == 5890107808445522655
    assert derive_seed(0, "stage1", 3) == derive_seed(0, "stage1", "3") == 4728418395237065409


def test_seed_plus_fold_does_not_collide():
    assert derive_seed(0, "fold", 1) != derive_seed(1, "fold", 0)
    assert derive_seed(0, "a", "b") != derive_seed(0, "ab") != derive_seed(0, "a,b")


def test_generators_reproduce_and_leave_the_global_ones_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = generators(0, "stage2", 1), generators(0, "stage2", 1), generators(0, "stage2", 2)
    assert torch.equal(before, torch.get_rng_state())
    draws = [(torch.rand(4, generator=g.torch), g.numpy.random(4)) for g in (one, same, other)]
    assert torch.equal(draws[0][0], draws[1][0])
    np.testing.assert_array_equal(draws[0][1], draws[1][1])
    assert not torch.equal(draws[0][0], draws[2][0])
    assert not np.array_equal(draws[0][1], draws[2][1])


def test_a_stage_that_draws_more_leaves_the_next_as_it_was():
    def run(draws):
        seed_everything(3, "stage1")
        torch.rand(draws)
        np.random.rand(draws)  # noqa: NPY002
        seed_everything(3, "stage2")
        return (
            torch.rand(2).tolist(),
            np.random.rand(2).tolist(),  # noqa: NPY002
            random.random(),
            torch.nn.Linear(2, 2).weight.tolist(),
        )

    assert run(1) == run(50)
