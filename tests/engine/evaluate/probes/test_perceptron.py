import numpy as np
import pytest
import torch

from armillary.engine.evaluate.probes.perceptron import (
    PerceptronTraining,
    masked_mse,
    perceptron,
    soft_cross_entropy,
    train_perceptron,
)


def line(samples=300):
    x = np.random.default_rng(0).normal(size=(samples, 4)).astype(np.float32)
    return x, x @ np.array([[1.0], [-1.0], [0.5], [0.0]])


def test_layers_of_the_paper():
    model = perceptron(10, (64, 64), 4, 0.1)
    assert [type(m).__name__ for m in model] == ["Linear", "ReLU", "Dropout"] * 2 + ["Linear"]
    assert sum(p.numel() for p in model.parameters()) == 11 * 64 + 65 * 64 + 65 * 4


def test_masked_mse_is_the_mean_over_known_targets():
    predicted = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    target = torch.tensor([[0.0, float("nan")], [float("nan"), 6.0]])
    loss = masked_mse(predicted, target)
    loss.backward()
    assert loss.item() == (1 + 4) / 2
    np.testing.assert_array_equal(predicted.grad, [[1, 0], [0, -2]])
    assert masked_mse(predicted, torch.full((2, 2), float("nan"))).item() == 0


def test_soft_cross_entropy_is_least_at_the_shares():
    share = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64)
    entropy = -(share * share.log()).sum()
    assert soft_cross_entropy(share.log() + 5, share).item() == pytest.approx(entropy.item())
    assert soft_cross_entropy(share, share) > entropy
    logits = torch.randn(6, 3, dtype=torch.float64)
    hard = torch.tensor([0, 1, 2, 0, 1, 2])
    torch.testing.assert_close(
        soft_cross_entropy(logits, torch.eye(3, dtype=torch.float64)[hard]),
        torch.nn.functional.cross_entropy(logits, hard),
    )


def test_it_learns_a_line_and_repeats_whatever_the_global_seed():
    x, y = line()
    training = PerceptronTraining(epochs=40, batch=32, dropout=0.0, learning_rate=3e-3)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = train_perceptron(x, y, masked_mse, (32,), training)(x)
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random numbers were used"
    torch.manual_seed(2)
    np.testing.assert_array_equal(train_perceptron(x, y, masked_mse, (32,), training)(x), first)
    assert np.square(first - y).mean() < 0.005 * y.var()  # 0.0014 +- 0.0005 over 8 seeds
    assert first.shape == (300, 1)
    assert first.dtype == np.float64


def test_held_out_samples_choose_the_epoch():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 30)).astype(np.float32)
    y = rng.normal(size=(120, 1))  # nothing to learn: the longer the worse

    def error(held_out):
        training = PerceptronTraining(epochs=150, batch=16, dropout=0.0, learning_rate=1e-2, held_out=held_out)
        fresh = rng.normal(size=(500, 30)).astype(np.float32)
        return np.square(train_perceptron(x, y, masked_mse, (64,), training)(fresh)).mean()

    assert error(0.5) < 0.5 * error(0.0)  # 0.13 +- 0.06 over 8 seeds


def test_patience_ends_training_early_at_the_same_epoch():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 30)).astype(np.float32)
    y = rng.normal(size=(60, 1))  # nothing to learn: the held-out loss is least within a few epochs
    calls = []

    def loss(predicted, target):
        calls.append(len(predicted))
        return masked_mse(predicted, target)

    found = []
    for patience in (None, 20):
        training = PerceptronTraining(80, 60, 1e-2, dropout=0.0, held_out=0.3, patience=patience)
        found.append((train_perceptron(x, y, loss, (64,), training)(x), len(calls)))
        calls.clear()
    (whole, all_calls), (early, few_calls) = found
    np.testing.assert_array_equal(whole, early)
    assert few_calls < all_calls == 160


def test_dropout_is_off_when_predicting():
    x, y = line(50)
    run = train_perceptron(x, y, masked_mse, (16,), PerceptronTraining(epochs=1, dropout=0.5))
    np.testing.assert_array_equal(run(x), run(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs: must be 1 or more, got 0"),
        ({"batch": 0}, "batch: must be 1 or more"),
        ({"learning_rate": 0.0}, "learning_rate: must be positive"),
        ({"dropout": 1.0}, "dropout: must be at least 0 and less than 1, got 1.0"),
        ({"held_out": -0.1}, "held_out: must be at least 0"),
        ({"held_out": 0.1, "patience": 0}, "patience: must be 1 or more, with samples held out, got 0"),
        ({"patience": 3}, "patience: must be 1 or more, with samples held out, got 3"),
    ],
    ids=["epochs", "batch", "learning-rate", "dropout", "held-out", "patience", "patience-without-held-out"],
)
def test_bad_training(change, message):
    with pytest.raises(ValueError, match=message):
        PerceptronTraining(**change)


def test_bad_sizes():
    with pytest.raises(ValueError, match="hidden: need one or more widths"):
        perceptron(3, (), 1)
    x, y = line(4)
    with pytest.raises(ValueError, match="held_out: 0.1 of 4 training samples is 0; need more"):
        train_perceptron(x, y, masked_mse, (4,), PerceptronTraining(held_out=0.1))
    with pytest.raises(ValueError, match="choose a smaller learning_rate"):
        train_perceptron(x, y, masked_mse, (4,), PerceptronTraining(learning_rate=1e30))
