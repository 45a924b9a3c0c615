import numpy as np
import pytest
from sklearn.linear_model import Ridge as SkRidge
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

from armillary.engine.evaluate.baselines.judge import PERCEPTRON
from armillary.engine.evaluate.probes.perceptron import PerceptronTraining
from armillary.engine.evaluate.probes.probes import KNN, MLP, Ridge, labelled, nearest, standardised


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(200, 5)).astype(np.float32), rng.normal(size=(40, 5)).astype(np.float32)
    weights = rng.normal(size=5)
    return train, train @ weights, test, test @ weights


@pytest.mark.parametrize("weights", ["uniform", "distance"])
def test_euclidean_knn_is_scikit_learns(data, weights):
    train, label, test, _ = data
    expected = KNeighborsRegressor(7, weights=weights).fit(train.astype(np.float64), label).predict(test)
    np.testing.assert_allclose(KNN(7, "euclidean", weights).predict(train, label, test), expected, rtol=1e-4, atol=1e-5)


def test_cosine_knn_is_euclidean_on_unit_vectors(data):
    train, label, test, _ = data
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (train, test)]
    expected = KNeighborsRegressor(7).fit(unit[0], label).predict(unit[1])
    np.testing.assert_allclose(KNN(7, "cosine").predict(train, label, test), expected, rtol=1e-5)
    np.testing.assert_allclose(
        KNN(7, "cosine").predict(train, label, 100 * test), expected, rtol=1e-5, err_msg="length must not matter"
    )


def test_standardised_knn_ignores_units(data):
    train, label, test, _ = data
    probe = KNN(7, "euclidean", standardise=True)
    scale = np.array([1, 10, 100, 1e3, 1e4], np.float32)
    expected = KNeighborsRegressor(7).fit(StandardScaler().fit_transform(train), label)
    np.testing.assert_allclose(
        probe.predict(train * scale, label, test * scale),
        expected.predict(StandardScaler().fit(train).transform(test)),
        rtol=1e-4,
        atol=1e-5,
    )


def test_a_training_sample_is_its_own_nearest_neighbour(data):
    train, label, _, _ = data
    np.testing.assert_allclose(KNN(1, "euclidean").predict(train, label, train), label)
    np.testing.assert_allclose(KNN(16, "euclidean", "distance").predict(train, label, train[:3]), label[:3], rtol=1e-3)


@pytest.mark.parametrize("probe", [KNN(7), KNN(7, "euclidean", "distance", True)], ids=lambda p: p.name)
def test_equal_samples_share_their_votes_in_any_order(data, probe):
    train, label, test, _ = data
    train[40:160] = train[np.arange(120) % 40]  # four of each of the first forty
    straight = probe.predict(train, label, np.concatenate([test, train[:40]]))
    if probe.weights == "distance":  # those at the query's own place, and nothing else
        np.testing.assert_allclose(straight[40:], label[:160].reshape(4, 40).mean(0))
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(200)
        turned = probe.predict(train[order], label[order], np.concatenate([test, train[:40]]))
        np.testing.assert_allclose(turned, straight, rtol=1e-9)


def test_votes_beyond_the_last_neighbour_are_shared():
    train, label = np.array([[0.0], [1], [-1], [1], [9]]), np.array([0.0, 3, 6, 9, 100])
    at = np.array([[0.1]]), np.array([[0.0]])
    assert KNN(2, "euclidean").predict(train, label, at[1])[0] == pytest.approx((0 + 6) / 2)
    assert KNN(2, "euclidean").predict(train, label, at[0])[0] == pytest.approx((0 + 6) / 2)  # 3 and 9 are tied
    assert KNN(3, "euclidean").predict(train, label, at[1])[0] == pytest.approx((0 + 2 * 6) / 3)
    assert KNN(4, "euclidean").predict(train, label, at[1])[0] == pytest.approx((0 + 3 + 6 + 9) / 4)


def test_standardised_in_any_number_of_samples_and_without_constant_dimensions():
    rng = np.random.default_rng(0)
    train = np.float32(3) + rng.integers(0, 2, (1000, 1)).astype(np.float32) * np.spacing(np.float32(3))
    train = np.concatenate([train, rng.normal(5, 1e-3, (1000, 1))], 1).astype(np.float32)
    scaled, other = standardised(train, train[:10] + 1)
    assert not scaled[:, 0].any() and not other[:, 0].any()  # it varies in the last bit alone
    np.testing.assert_allclose(scaled[:, 1].astype(np.float64).mean(), 0, atol=1e-6)
    # Sums in float32 of as many samples as a survey has are off by 1e-3 of the spread; these by none.
    many = np.broadcast_to(train[:500, 1:], (2000, 500, 1)).reshape(-1, 1)
    mean, spread = train[:500, 1].astype(np.float64).mean(), train[:500, 1].astype(np.float64).std()
    np.testing.assert_allclose(standardised(many, many[:9])[1], (many[:9] - mean) / spread, rtol=1e-6, atol=1e-6)


def test_as_many_neighbours_as_samples_give_the_mean(data):
    train, label, test, _ = data
    np.testing.assert_allclose(KNN(200).predict(train, label, test), label.mean())


def test_ridge_recovers_a_linear_label(data):
    train, label, test, true = data
    predicted = Ridge().predict(train, label, test)
    np.testing.assert_allclose(predicted, true, atol=0.02)
    scaler = StandardScaler().fit(train)
    expected = SkRidge(0.01).fit(scaler.transform(train), label).predict(scaler.transform(test))
    np.testing.assert_allclose(Ridge((0.01,)).predict(train, label, test), expected, atol=1e-4)


def test_ridge_survives_constant_and_duplicate_dimensions(data):
    train, label, test, true = data
    odd = [np.concatenate([v, v[:, :1], np.full((len(v), 1), 3.0, np.float32)], 1) for v in (train, test)]
    np.testing.assert_allclose(Ridge().predict(odd[0], label, odd[1]), true, atol=0.05)


def test_mlp_learns_and_repeats(data):
    train, label, test, true = data
    probe = MLP((32,), PerceptronTraining(200, 200, dropout=0.0, held_out=0.1, patience=10))
    predicted = probe.predict(train, 100 + 50 * label, test)
    assert np.corrcoef(predicted, true)[0, 1] > 0.95  # 0.988 +- 0.008 over 8 seeds
    assert abs(predicted.mean() - 100 - 50 * true.mean()) < 10  # 1.5 +- 1.4
    np.testing.assert_array_equal(predicted, probe.predict(train, 100 + 50 * label, test))


@pytest.mark.parametrize(
    ("probe", "bound"),  # the largest errors of the perceptrons are 0.27 +- 0.09 and 0.12 +- 0.06 over 8 seeds
    [(KNN(3), 1e-6), (Ridge(), 1e-6), (MLP(), 0.7), (PERCEPTRON, 0.4)],
    ids=["knn", "ridge", "mlp", "perceptron"],
)
def test_constant_label(probe, bound, data):
    train, _, test, _ = data
    np.testing.assert_allclose(probe.predict(train, np.full(200, 2.5), test), 2.5, atol=bound, rtol=0)


def test_knn_of_64_weighted_by_distance_on_standardised_embeddings(data):
    train, label, test, _ = data
    scale = StandardScaler().fit(train.astype(np.float64))
    expected = KNeighborsRegressor(64, weights="distance").fit(scale.transform(train), label)
    np.testing.assert_allclose(
        KNN(64, "euclidean", "distance", standardise=True).predict(train, label, test),
        expected.predict(scale.transform(test)),
        rtol=1e-4,
        atol=1e-5,
    )


def some_unknown(label):
    labels = np.stack([label, label**2, -label, np.abs(label)], 1)
    labels[::3, 1] = np.nan
    labels[1::3, 2] = np.nan
    labels[::3, 3] = np.nan
    return labels


@pytest.mark.parametrize("probe", [KNN(5, "euclidean", "distance"), Ridge()], ids=lambda p: p.name)
def test_several_labels_are_predicted_as_each_alone(data, probe):
    train, label, test, _ = data
    labels = some_unknown(label)
    together = probe.predict_jointly(train, labels, test)
    for number in range(4):
        kept, known, _ = labelled(train, labels[:, number])
        np.testing.assert_allclose(together[:, number], probe.predict(kept, known, test), rtol=1e-6)


def test_joint_mlp_learns_labels_of_any_unit_some_unknown(data):
    train, label, test, true = data
    labels = np.stack([1e6 + 1e5 * label, 1e-3 * label, np.full(200, 4.0)], 1)
    labels[::2, 0] = np.nan
    probe = MLP((64, 64), PerceptronTraining(epochs=60, batch=16))
    predicted = probe.predict_jointly(train, labels, test)
    assert np.corrcoef(predicted[:, 0], true)[0, 1] > 0.9
    assert np.corrcoef(predicted[:, 1], true)[0, 1] > 0.9
    assert abs(predicted[:, 0].mean() - 1e6 - 1e5 * true.mean()) < 5e4
    np.testing.assert_allclose(predicted[:, 2], 4, atol=1)  # constant: its spread is taken for 1
    np.testing.assert_array_equal(predicted, probe.predict_jointly(train, labels, test))


def test_joint_mlp_ignores_what_stands_for_unknown(data):
    train, label, test, _ = data
    labels = some_unknown(label)
    infinite = np.where(np.isnan(labels), np.inf, labels)
    np.testing.assert_array_equal(
        MLP().predict_jointly(train, labels, test), MLP().predict_jointly(train, infinite, test)
    )


def test_joint_mlp_names_and_defaults():
    assert MLP().name == "MLP 32"
    assert MLP((64, 64)).name == "MLP 64-64"
    t = MLP().training
    assert (t.epochs, t.batch, t.learning_rate, t.dropout, t.held_out) == (10, 64, 1e-3, 0.1, 0.0)


def test_joint_prediction_of_what_is_known_of_too_few(data):
    train, label, test, _ = data
    labels = np.stack([label, label], 1)
    labels[4:, 1] = np.nan
    with pytest.raises(ValueError, match="labelled training samples, got 5 and 4"):
        KNN(5).predict_jointly(train, labels, test)
    labels[:, 1] = np.nan
    with pytest.raises(ValueError, match="labels: number 1 is known for none of 200 samples"):
        MLP().predict_jointly(train, labels, test)


def test_labelled_drops_what_is_unknown():
    vectors = np.arange(8.0).reshape(4, 2)
    kept, label, mask = labelled(vectors, np.array([1.0, np.nan, 3.0, np.inf]))
    np.testing.assert_array_equal(kept, vectors[[0, 2]])
    np.testing.assert_array_equal(label, [1, 3])
    np.testing.assert_array_equal(mask, [True, False, True, False])


def test_labelled_refuses_nothing_left():
    with pytest.raises(ValueError, match="none of 3 is known"):
        labelled(np.zeros((3, 2)), np.full(3, np.nan))
    with pytest.raises(ValueError, match="lengths differ, got 3 and 2"):
        labelled(np.zeros((3, 2)), np.zeros(2))


def test_nearest_is_sorted_and_finds_itself(data):
    train, _, _, _ = data
    index, distance = nearest(train, train[:5], 4)
    np.testing.assert_array_equal(index[:, 0], np.arange(5))
    assert (np.diff(distance, axis=1) >= 0).all()


@pytest.mark.parametrize("neighbours", [0, 201])
def test_neighbours_beyond_the_samples(data, neighbours):
    train, label, test, _ = data
    message = f"labelled training samples, got {neighbours} and 200"
    with pytest.raises(ValueError, match=message):
        KNN(neighbours).predict(train, label, test)
    with pytest.raises(ValueError, match=message):
        nearest(train, test, neighbours)


def test_bad_arrays(data):
    train, label, test, _ = data
    broken = train.copy()
    broken[3, 1] = np.nan
    with pytest.raises(ValueError, match="training embeddings: 1 of 200 samples hold non-finite"):
        KNN(3).predict(broken, label, test)
    with pytest.raises(ValueError, match="shapes: need"):
        Ridge().predict(train, label, test[:, :3])
    with pytest.raises(ValueError, match="held_out: 0.1 of 4 training samples is 0; need more samples"):
        PERCEPTRON.predict(train[:4], label[:4], test)
    with pytest.raises(ValueError, match="samples: need 1 or more"):
        KNN(1).predict(train[:1], label[:1], test[:0])
