"""What is said of answers without labels, against loops; the proxy A-distance at its ends."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lab.validators import ROWS, a_distance, entropies, entropy, information, neighbourhood_density, projected


def answers(count: int, classes: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(count, classes, generator=generator, dtype=torch.float64)).softmax(1)


def test_entropy_is_that_of_its_equation_and_of_certainty_nothing() -> None:
    p = answers(5)
    expected = [-sum(x * math.log(x) for x in row) for row in p.tolist()]
    assert entropies(p).tolist() == pytest.approx(expected, rel=1e-12)
    assert float(entropy(p)) == pytest.approx(sum(expected) / 5, rel=1e-12)
    assert float(entropy(torch.eye(3))) == 0


def test_information_is_all_where_sure_answers_are_shared_out_and_nothing_where_all_are_one() -> None:
    assert float(information(torch.eye(4).repeat(3, 1))) == pytest.approx(math.log(4))
    assert float(information(torch.eye(4)[:1].repeat(6, 1))) == 0
    assert float(information(torch.full((6, 4), 0.25))) == pytest.approx(0, abs=1e-7)
    p = answers(7)
    mean = p.mean(0)
    assert float(information(p)) == pytest.approx(float(-(mean * mean.log()).sum() - entropy(p)), rel=1e-12)


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_neighbourhood_density_is_that_of_a_loop(temperature: float) -> None:
    p = answers(9)
    total = 0.0
    for i, row in enumerate(p):
        others = [float(row @ p[j] / (row.norm() * p[j].norm())) / temperature for j in range(9) if j != i]
        exponentials = [math.exp(value) for value in others]
        shares = [value / sum(exponentials) for value in exponentials]
        total -= sum(q * math.log(q) for q in shares if q)
    assert float(neighbourhood_density(p, temperature)) == pytest.approx(total / 9, rel=1e-10)


def test_neighbourhood_density_is_the_same_in_parts() -> None:
    p = answers(ROWS + 300)
    unit = p / p.norm(dim=1, keepdim=True)
    similar = unit @ unit.T / 0.05
    similar.fill_diagonal_(-torch.inf)
    expected = torch.special.entr(similar.softmax(1)).sum(1).mean()
    torch.testing.assert_close(neighbourhood_density(p), expected)


def test_dense_neighbourhoods_score_higher_than_scattered_ones() -> None:
    assert neighbourhood_density(torch.eye(4).repeat(25, 1)) > neighbourhood_density(answers(100))


def test_the_a_distance_is_two_apart_about_nothing_alike_and_counts_domains_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(count, 5, generator=generator) for count in (600, 200))
    assert a_distance(one, other + 20) == 2
    assert abs(a_distance(one, other)) < 0.5
    assert a_distance(one, other, seed=3) == a_distance(one, other, seed=3)
    with pytest.raises(ValueError, match="600 and 1 samples"):
        a_distance(one, other[:1])


def test_the_a_distance_is_that_of_its_error() -> None:
    """On one feature with a known threshold: 2 (1 − 2ε) of the mean error of the two domains."""
    rng = np.random.default_rng(0)
    source, target = rng.normal(0, 1, 20_000), rng.normal(2, 1, 20_000)
    wrong = 0.158655  # Φ(−1), of either domain, at the threshold 1
    found = a_distance(torch.tensor(source)[:, None], torch.tensor(target)[:, None])
    assert found == pytest.approx(2 * (1 - 2 * wrong), abs=0.03)


def test_the_a_distance_of_a_rare_domain_is_that_of_a_common_one() -> None:
    """The same as above with a twentieth of the target's samples, which would be outvoted."""
    rng = np.random.default_rng(0)
    source, target = rng.normal(0, 1, 40_000), rng.normal(2, 1, 2_000)
    found = a_distance(torch.tensor(source)[:, None], torch.tensor(target)[:, None])
    assert found == pytest.approx(2 * (1 - 2 * 0.158655), abs=0.06)


def test_the_a_distance_is_asked_of_samples_that_were_not_learnt() -> None:
    """With more features than samples noise can be learnt by heart."""
    one, other = torch.randn(2, 60, 400, generator=torch.Generator().manual_seed(0))
    assert abs(a_distance(one, other)) < 0.7


def test_a_projection_is_on_the_principal_components() -> None:
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centred = (features - features.mean(0)).numpy()
    _, vectors = np.linalg.eigh(centred.T @ centred)
    plane = centred @ vectors[:, ::-1][:, :2]
    found = projected(features).numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(plane), atol=1e-9)
    for axis in np.linalg.lstsq(centred, found, rcond=None)[0].T:  # a picture is the same one twice
        assert axis[np.abs(axis).argmax()] > 0
    assert projected(torch.ones(5, 1)).shape == (5, 2)
