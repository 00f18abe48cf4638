"""Each way of weighting tasks against its paper's formulas, on two quadratics whose solutions are known."""

import math

import pytest
import torch

from mm_transformers.training.weighting import (
    StepSignals,
    TaskWeighting,
    WeightedTasks,
    build_weighting,
    register_weighting,
)


KINDS = ["static", "uncertainty", "famo", "db_mtl", "gradnorm"]


def make(spec, scales=(1.0, 1.0), learning_rate=0.01) -> TaskWeighting:
    names = [f"task{i}" for i in range(len(scales))]
    return build_weighting(spec, WeightedTasks(names, list(scales), learning_rate))


def signals(losses, gradients=None, labelled=None, after=None) -> StepSignals:
    losses = torch.tensor(losses)
    return StepSignals(
        losses,
        torch.ones(len(losses), dtype=torch.bool) if labelled is None else torch.tensor(labelled),
        None if gradients is None else torch.tensor(gradients),
        None if after is None else torch.tensor(after),
    )


class Quadratics:
    """L_k = scale_k * |x - center_k|^2 + floor_k, for one shared vector x."""

    def __init__(self, centers, scales, floors=(0.0, 0.0)):
        self.centers, self.scales = torch.tensor(centers), torch.tensor(scales)
        self.floors = torch.tensor(floors)
        self.x = torch.zeros(self.centers.shape[1])

    def losses(self) -> torch.Tensor:
        return self.scales * (self.x - self.centers).square().sum(1) + self.floors

    def gradients(self) -> torch.Tensor:
        return 2 * self.scales[:, None] * (self.x - self.centers)

    def descend(self, weighting: TaskWeighting, rate: float, steps: int) -> None:
        for step in range(steps):
            now = StepSignals(self.losses(), torch.ones(len(self.scales), dtype=torch.bool), self.gradients())
            if weighting.merges_gradients:
                weights = weighting.merge((now.gradients @ now.gradients.T).double(), step).float()
            else:
                weights = weighting.weights(now if weighting.looks_ahead else None)
            self.x = self.x - rate * weights @ now.gradients
            weighting.update(now._replace(losses_after=self.losses()))


def test_static_minimises_the_sum():
    """The minimum of a |x - p|^2 + b |x - q|^2 is (a p + b q) / (a + b)."""
    problem = Quadratics([[1.0, 0.0], [0.0, 2.0]], [3.0, 1.0])
    problem.descend(make("static"), 0.05, 300)
    torch.testing.assert_close(problem.x, torch.tensor([0.75, 0.5]), atol=1e-4, rtol=0)


def test_uncertainty_follows_its_formula():
    """One step of Adam moves s by the learning rate against the sign of 1/2 - a exp(-s) L; weights are a exp(-s)."""
    weighting = make("uncertainty", scales=(1.0, 0.5))
    torch.testing.assert_close(weighting.weights(None), torch.tensor([1.0, 0.5]))
    weighting.update(signals([2.0, 0.5]))  # 1/2 - 2 < 0 < 1/2 - 1/4
    expected = torch.tensor([math.exp(-0.1), 0.5 * math.exp(0.1)])
    torch.testing.assert_close(weighting.weights(None), expected, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_uncertainty_finds_the_variance():
    """At the minimum over s, exp(s_k) = 2 a_k L_k: the noise of each task, here what it cannot get rid of."""
    weighting = make({"kind": "uncertainty", "learning_rate": 0.05}, scales=(0.5, 1.0))
    problem = Quadratics([[0.0], [0.0]], [1.0, 1.0], floors=(4.0, 0.25))
    problem.descend(weighting, 0.05, 2000)
    torch.testing.assert_close(weighting.weights(None), torch.tensor([0.5 / 4.0, 1.0 / 0.5]), rtol=1e-2, atol=0)


def test_uncertainty_stays_within_bounds():
    weighting = make({"kind": "uncertainty", "learning_rate": 10.0})
    for _ in range(5):
        weighting.update(signals([1e6, 0.0]))
    torch.testing.assert_close(weighting.weights(None), torch.tensor([math.exp(-5.0), math.exp(5.0)]))


def test_famo_follows_its_formula():
    """z = softmax(xi), weights c z / l with c = 1 / sum(z / l); xi moves against J^T (log l - log l'), by Adam."""
    weighting = make({"kind": "famo", "weight_decay": 0.0})
    step = signals([2.0, 0.5])
    torch.testing.assert_close(weighting.weights(step), torch.tensor([0.5 / 2.0, 0.5 / 0.5]) / 1.25)
    # Task 0 improved, task 1 did not: the gradient of xi is z * (gain - sum z gain) = (+, -), Adam's first step 0.025.
    weighting.update(step._replace(losses_after=torch.tensor([1.0, 0.5])))
    shares = torch.softmax(torch.tensor([-0.025, 0.025]), 0)
    expected = shares / torch.tensor([2.0, 0.5])
    torch.testing.assert_close(weighting.weights(step), expected / expected.sum(), rtol=1e-5, atol=0)


def test_famo_lets_all_tasks_improve_alike():
    """One loss is 100 times the other. Summed, the small one hardly improves; by FAMO, both fall by the same factor."""
    falls = {}
    for kind, rate in (("static", 2e-3), ("famo", 5e-2)):
        problem = Quadratics([[1.0, 0.0], [0.0, 1.0]], [100.0, 1.0], floors=(100.0, 1.0))
        before = problem.losses()
        problem.descend(make({"kind": kind} if kind == "static" else {"kind": kind, "learning_rate": 0.1}), rate, 200)
        falls[kind] = problem.losses() / before
    assert falls["static"][1] > 1.2  # got worse
    torch.testing.assert_close(falls["famo"][0], falls["famo"][1], rtol=0.05, atol=0)
    assert falls["famo"].max() < 0.8


def test_db_mtl_follows_its_formula():
    """log losses have the gradients g / l; they are scaled to the norm of the largest."""
    weighting = make({"kind": "db_mtl", "beta": 0.0})
    step = signals([2.0, 0.5], [[3.0, 4.0], [0.0, 1.0]])  # |grad log L| = 2.5 and 2
    torch.testing.assert_close(weighting.weights(step), torch.tensor([1.0 / 2.0, 2.5 / 2.0 / 0.5]))


def test_db_mtl_averages_gradients():
    weighting = make({"kind": "db_mtl", "beta": 0.5})
    skipped = signals([1.0, 1.0], [[9.0, 9.0], [9.0, 9.0]])
    weighting.weights(skipped)  # and no update: a step that the optimiser has skipped leaves no trace
    weighting.update(signals([1.0, 1.0], [[1.0, 0.0], [0.0, 2.0]]))
    # 0.5 * (0.5 * first) + 0.5 * second, over 1 - 0.5^2: opposite gradients nearly cancel.
    averages = torch.tensor([[0.25 * 1 - 0.5 * 1, 0.0], [0.0, 0.25 * 2 + 0.5 * 2]]) / 0.75
    norms = averages.norm(dim=1)
    found = weighting.weights(signals([1.0, 1.0], [[-1.0, 0.0], [0.0, 2.0]]))
    torch.testing.assert_close(found, norms.max() / norms)


def test_db_mtl_does_not_see_the_scale_of_a_loss():
    ends = []
    for scale in (1.0, 1000.0):
        problem = Quadratics([[1.0, 0.0], [0.0, 1.0]], [1.0, scale])
        problem.descend(make("db_mtl"), 0.01, 60)
        ends.append(problem.x)
    torch.testing.assert_close(*ends, rtol=1e-3, atol=1e-4)
    assert ends[0].abs().min() > 0.1


def test_gradnorm_follows_its_formula():
    """G = w |g|, target mean(G) r^alpha: the first step of Adam moves each w by the rate, then they sum to 2."""
    weighting = make({"kind": "gradnorm", "alpha": 1.0, "learning_rate": 0.1})
    gradients = [[3.0, 4.0], [0.0, 1.0]]
    weighting.update(signals([1.0, 1.0], gradients))  # G = (5, 1), targets 3 and 3: w = (0.9, 1.1)
    torch.testing.assert_close(weighting.weights(None), torch.tensor([0.9, 1.1]))


def test_gradnorm_equalises_gradients():
    """With alpha = 0, all weighted norms become those of their mean: w is as 1 / |g|."""
    weighting = make({"kind": "gradnorm", "alpha": 0.0, "learning_rate": 0.01})
    for _ in range(400):
        weighting.update(signals([1.0, 1.0], [[3.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(weighting.weights(None), torch.tensor([0.5, 1.5]), rtol=0.02, atol=0)


def test_gradnorm_helps_the_slow_task():
    weighting = make({"kind": "gradnorm", "alpha": 1.5})
    weighting.update(signals([1.0, 1.0], [[1.0, 0.0], [0.0, 1.0]]))
    for _ in range(20):
        weighting.update(signals([0.1, 0.9], [[1.0, 0.0], [0.0, 1.0]]))
    first, second = weighting.weights(None)
    assert second > first + 0.1


def project_by_loops(gradients: torch.Tensor, order) -> torch.Tensor:
    """Algorithm 1 of the paper, on the vectors themselves."""
    projected = gradients.clone()
    for i in range(len(gradients)):
        for j in order():
            if i != j and projected[i] @ gradients[j] < 0:
                projected[i] -= projected[i] @ gradients[j] / (gradients[j] @ gradients[j]) * gradients[j]
    return projected.sum(0)


@pytest.mark.parametrize("seed", range(5))
def test_pcgrad_is_the_algorithm(seed):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(4, 3, generator=generator, dtype=torch.float64)  # 4 in 3 dimensions: some must conflict
    coefficients = make("pcgrad", scales=(1.0,) * 4).merge(gradients @ gradients.T, step=seed)
    draws = torch.Generator().manual_seed(seed)  # as the class says: a function of seed (0) and step
    expected = project_by_loops(gradients, lambda: torch.randperm(4, generator=draws).tolist())
    torch.testing.assert_close(coefficients @ gradients, expected)
    assert not torch.allclose(coefficients, torch.ones_like(coefficients))


def test_pcgrad_of_two_conflicting_tasks():
    """g = (1, 0) and h = (-1, 1): each loses its part along the other, and the sum hurts neither."""
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    coefficients = make("pcgrad").merge(gradients @ gradients.T, step=0)
    merged = coefficients @ gradients
    torch.testing.assert_close(merged, torch.tensor([0.5, 1.5], dtype=torch.float64))  # (1/2, 1/2) + (0, 1)
    assert (gradients @ merged >= 0).all()
    agreeing = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    assert make("pcgrad").merge(agreeing @ agreeing.T, 0).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_without_labels_changes_nothing(kind):
    """In that step it has no loss, no gradient and no part in what is learned."""
    weighting = make(kind, scales=(1.0, 1.0, 1.0))
    step = signals([1.0, 0.5, 0.0], [[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], [True, True, False], [0.9, 0.5, 0.0])
    reference = make(kind, scales=(1.0, 1.0))
    two = signals([1.0, 0.5], [[1.0, 0.0], [0.0, 2.0]], [True, True], [0.9, 0.5])
    for _ in range(3):
        ahead = weighting.looks_ahead
        found, expected = weighting.weights(step if ahead else None), reference.weights(two if ahead else None)
        assert found.isfinite().all()
        torch.testing.assert_close(found[:2], expected, rtol=1e-5, atol=1e-6)
        weighting.update(step)
        reference.update(two)
    nothing = signals([0.0, 0.0, 0.0], [[0.0, 0.0]] * 3, [False] * 3, [0.0, 0.0, 0.0])
    assert weighting.weights(nothing if weighting.looks_ahead else None).isfinite().all()
    weighting.update(nothing)
    assert all(tensor.isfinite().all() for name, tensor in weighting.state_dict().items() if "first" not in name)


def test_a_task_seldom_seen_is_followed_as_if_alone():
    """Steps of others do not wear its momentum out: after 5 steps in 50, what 5 steps of PyTorch's Adam do."""
    weighting = make({"kind": "uncertainty", "learning_rate": 0.02})
    alone = torch.zeros((), requires_grad=True)
    adam = torch.optim.Adam([alone], lr=0.02)
    for i in range(50):
        rare = [0.1, 3.0, 0.2, 2.0, 0.4][i // 10]
        weighting.update(signals([1.0, rare if i % 10 == 0 else 0.0], labelled=[True, i % 10 == 0]))
        if i % 10 == 0:
            alone.grad = 0.5 - torch.exp(-alone.detach()) * rare
            adam.step()
    torch.testing.assert_close(weighting.weights(None)[1], torch.exp(-alone.detach()))


@pytest.mark.parametrize("kind", ["famo", "db_mtl", "gradnorm"])
def test_a_task_with_nothing_left_to_learn_leaves_the_others_alone(kind):
    """A loss of exactly 0 has no logarithm and is no share of any other."""
    weighting, reference = make(kind, scales=(1.0, 1.0, 1.0)), make(kind)
    for loss in (1.0, 0.8, 0.7):
        done = signals([loss, 0.5, 0.0], [[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]], after=[0.9 * loss, 0.5, 0.0])
        two = signals([loss, 0.5], [[1.0, 0.0], [0.0, 2.0]], after=[0.9 * loss, 0.5])
        ahead = weighting.looks_ahead
        found, expected = weighting.weights(done if ahead else None), reference.weights(two if ahead else None)
        torch.testing.assert_close(found[:2], expected)
        assert found[2] == (0.0 if ahead else 1.0)
        weighting.update(done)
        reference.update(two)
    assert weighting.weights(signals([0.0] * 3, [[0.0, 0.0]] * 3) if ahead else None).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_goes_on_the_same(kind):
    def run(weighting, steps):
        for i in steps:
            step = signals([1.0 / (i + 1), 0.5], [[1.0, float(i)], [0.3, 2.0]], after=[0.8 / (i + 1), 0.5])
            weights = weighting.weights(step if weighting.looks_ahead else None)
            weighting.update(step)
        return weights

    whole = run(make(kind), range(6))
    first = make(kind)
    run(first, range(3))
    second = make(kind)
    second.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()})
    assert torch.equal(run(second, range(3, 6)), whole)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nope", "Unknown task_weighting 'nope'; known are db_mtl, famo, gradnorm, pcgrad, static, uncertainty"),
        ({"kind": "famo", "alpha": 1}, "has no option 'alpha'; its options are learning_rate, weight_decay"),
        ({"kind": "static", "x": 1}, "its options are none"),
        ({"kind": "db_mtl", "beta": 1.0}, "beta must be at least 0.0 and less than 1.0, but is 1.0"),
        ({"kind": "gradnorm", "alpha": "high"}, "alpha must be at least 0.0, but is 'high'"),
        (3, "task_weighting must be a kind or"),
    ],
)
def test_a_wrong_weighting_is_told(spec, message):
    with pytest.raises(ValueError, match=message):
        make(spec)


def test_a_kind_of_ones_own():
    @register_weighting
    class FirstOnly(TaskWeighting):
        kind = "first_only_for_test"

        def __init__(self, tasks, *, power: float = 1.0):
            super().__init__(tasks)
            self.power = power

        def weights(self, step):
            return torch.tensor([self.power] + [0.0] * (len(self.tasks.names) - 1))

    assert make({"kind": "first_only_for_test", "power": 2.0}).weights(None).tolist() == [2.0, 0.0]
    with pytest.raises(ValueError, match="already taken"):

        @register_weighting
        class Other(TaskWeighting):
            kind = "first_only_for_test"
