"""Training on cached tokens: filled once, the same losses as without, and nothing but the right tokens."""

from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from frozen_toy import AlignConfig, Pairs, frozen_run, make_survey

from armillary.engine.data.format import codec
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.loading.loader import Loader, SequentialLoader
from armillary.engine.token_cache import fill as fill_module
from armillary.engine.token_cache import training as cache_training
from armillary.engine.token_cache.training import Interrupted, TokenCacheError, fill_token_cache
from armillary.engine.train.checks import method_problems, problems
from armillary.engine.train.trainer import open_loader
from armillary.engine.zero.processes import Ranks
from armillary.models.astroclip.astroclip import AstroCLIP
from armillary.models.specformer.specformer import SpecFormer
from armillary.models.vit.vit import ViT

CPU = torch.device("cpu")
ALONE = Ranks(rank=0, local_rank=0, world=1)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return make_survey(tmp_path_factory.mktemp("pairs") / "survey")


@pytest.fixture
def run(tmp_path, pairs, monkeypatch):
    """A run with a cache that is not filled; 7 samples a chunk."""
    monkeypatch.setattr(fill_module, "CHUNK_BYTES", 7 * 4 * 12 * (4 + 8))
    return frozen_run(tmp_path / "runs", pairs, tmp_path / "tokens")


def method_of(run):
    return run.method.build(run.views.input_spec(Survey.load(run.data.path)))


def fill(run, method=None, **options):
    fill_token_cache(run, method_of(run) if method is None else method, Survey.load(run.data.path), CPU, **options)


def with_data(run, **changes):
    return replace(run, data=replace(run.data, **changes))


def losses(run, method, loader, steps):
    """Losses and weights of plain descent."""
    method.train()
    torch.manual_seed(1)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 0.5)
    found = []
    with loader:
        for batch in islice(loader, steps):
            loss = method(batch, {}).total
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
    return found


def reading_loader(run, method):
    survey = Survey.load(run.data.path)
    return Loader(
        run.data.path,
        micro_batch=run.train.micro_batch,
        accumulation=run.accumulation(1),
        seed=run.seed,
        device="cpu",
        views=run.views.build(survey, CPU),
        modalities=run.views.modalities,
        reader="webdataset",
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_losses_are_those_of_training_without_the_cache(run, dtype):
    run = with_data(run, token_cache_dtype=dtype)
    method = method_of(run)
    without = losses(run, method, reading_loader(run, method), 20)
    method = method_of(run)
    fill(run, method)
    cached = losses(run, method, open_loader(run, method, Survey.load(run.data.path), CPU, ALONE), 20)
    if dtype == "float32":
        assert cached == pytest.approx(without, rel=1e-5)  # products of other batches may differ in the last bit
    else:
        assert cached != without and cached == pytest.approx(without, rel=2e-3)


def test_reading_needs_no_shard(run, tmp_path):
    fill(run)
    bare = tmp_path / "bare"
    bare.mkdir()
    Survey.load(run.data.path).save(bare)
    run = with_data(run, path=bare)
    fill(run)
    assert next(open_loader(run, method_of(run), Survey.load(bare), CPU, ALONE))["image_tokens"].shape == (4, 4, 12)


def test_modules_keep_their_mode_and_the_generator_its_state(run):
    method = method_of(run).train()
    method.image.eval()
    torch.manual_seed(4)
    before = torch.get_rng_state()
    fill(run, method)
    assert torch.equal(torch.get_rng_state(), before)
    assert method.training and method.dropout.training and not method.image.training


class Counted:
    """Counts the samples that a method makes tokens of."""

    def __init__(self, method):
        self.samples, self.original = 0, method.tokens
        method.tokens = self

    def __call__(self, batch):
        self.samples += len(batch["row"])
        return self.original(batch)


def test_a_stopped_fill_goes_on_where_it_was(run):
    method = method_of(run)
    asked = iter([False, False, True])
    with pytest.raises(Interrupted):
        fill(run, method, stop=lambda: next(asked))
    assert not (run.data.token_cache / "tokens.json").exists()
    counted, said = Counted(method), []
    fill(run, method, say=said.append)
    total = Survey.load(run.data.path).count("train")
    assert counted.samples == 2 + total - 21  # two made-up samples
    assert said[0] == f"token cache: 21 of {total} samples" and said[-1].startswith(f"token cache: {total} samples in")
    fill(run, method)
    assert counted.samples == 4 + total - 21


def changed_weights(run):
    method = method_of(run)
    with torch.no_grad():
        method.spectrum.bias[0] += 1e-3
    return run, method


def changed_crop(run):
    image = replace(run.views.image, stretch=replace(run.views.image.stretch, Q=10.0))
    run = replace(run, views=replace(run.views, image=image))
    return run, method_of(run)


def changed_setting(run):
    run = replace(run, method=AlignConfig(scale=1.1))
    return run, method_of(run)


@pytest.mark.parametrize("unfinished", [False, True], ids=["finished", "unfinished"])
@pytest.mark.parametrize(
    "change,message",
    [
        (changed_weights, "encoders.spectrum '.*' there"),
        (changed_crop, "views.image.stretch.Q 20.* there, 10.0 here"),
        (changed_setting, "gives other image_tokens .relative difference 0.1 on made-up samples"),
        (lambda run: (with_data(run, split="test"), method_of(run)), "split 'train' there, 'test' here|tokens of the"),
        (
            lambda run: (with_data(run, token_cache_dtype="float16"), method_of(run)),
            "dtype 'float32' there, 'float16' here",
        ),
    ],
    ids=["weights", "stretch", "setting", "split", "dtype"],
)
def test_features_of_something_else_are_refused(run, change, message, unfinished):
    if unfinished:
        with pytest.raises(Interrupted):
            fill(run, stop=lambda: True)
    else:
        fill(run)
    other, method = change(run)
    with pytest.raises(TokenCacheError, match=message):
        fill(other, method)


def test_heads_and_their_settings_may_change(run):
    fill(run)
    method = method_of(run)
    with torch.no_grad():
        method.heads["image"].weight.zero_()
    fill(run, method)


def test_another_survey_is_refused(run, tmp_path):
    fill(run)
    other = with_data(run, path=make_survey(tmp_path / "other", Pairs(41)))
    with pytest.raises(TokenCacheError, match="survey '.*' there|tokens of the"):
        fill(other)


def test_samples_without_a_modality_are_counted(run, tmp_path):
    run = with_data(run, path=make_survey(tmp_path / "gaps", Pairs(40, lacking=tuple(range(0, 40, 2)))))
    with pytest.raises(
        TokenCacheError, match=r"samples must have image and spectrum, got \d+ without spectrum among \d+"
    ):
        fill(run)
    assert not run.data.token_cache.exists() or not list(run.data.token_cache.iterdir())


def test_a_corrupt_sample_ends_the_fill(run, tmp_path):
    folder = make_survey(tmp_path / "broken")
    tar = folder / "train-000001.tar"
    offset, size = map(int, tar.with_suffix(".idx").read_text().splitlines()[3].split()[1:3])
    content = bytearray(tar.read_bytes())
    content[offset + size // 2] ^= 0x10
    tar.write_bytes(content)
    with pytest.raises(TokenCacheError, match="not filled: .*is corrupt") as error:
        fill(with_data(run, path=folder))
    assert isinstance(error.value.__cause__, codec.CorruptBlob)


def test_tokens_of_trained_encoders_are_refused(run):
    run = replace(run, method=AlignConfig(train_encoders=True))
    with pytest.raises(TokenCacheError, match="got image_tokens that depend on trained parameters"):
        fill(run)
    assert any(
        "frozen encoders, got 4 trained parameters, first image.weight" in p
        for p in method_problems(run, method_of(run))
    )


def augmented(run):
    return replace(run, views=replace(run.views, image=replace(run.views.image, hflip=0.5)))


@pytest.mark.parametrize(
    "change,message",
    [
        (augmented, "data.token_cache: must be None with augmentation, got ObjectViews"),
        (
            lambda run: replace(run, train=replace(run.train, zero_stage=3)),
            "train.zero_stage: must be 1 or 2 with data.token_cache",
        ),
        (lambda run: with_data(run, on_corrupt="skip"), 'data.on_corrupt: must be "error" with data.token_cache'),
        (
            lambda run: replace(run, views=replace(run.views, targets=("z",))),
            "views.targets: must be empty with data.token_cache",
        ),
        (
            lambda run: with_data(run, token_cache=run.data.path / "survey.json"),
            "data.token_cache: must be a folder, got",
        ),
    ],
    ids=["augmented", "zero-3", "skip", "targets", "file"],
)
def test_runs_that_cannot_use_a_cache(run, change, message):
    assert problems(run, 1) == []
    assert any(problem.startswith(message) for problem in problems(change(run), 1))
    free = with_data(change(run), token_cache=None)
    assert not any("tokens" in problem for problem in problems(free, 1))


def test_a_method_without_frozen_encoders(run, tmp_path, survey):
    import toy

    other = toy.toy_run(tmp_path / "runs", survey)
    other = with_data(other, token_cache=tmp_path / "f")
    found = method_problems(other, other.method.build(toy.ToyViews().input_spec(None)))
    assert any("a method with frozen encoders, got Toy, which has no tokens to cache" in problem for problem in found)
    assert method_problems(run, method_of(run)) == []


def test_tokens_reach_a_bfloat16_run_in_bfloat16(run):
    run = with_data(replace(run, train=replace(run.train, precision="bf16")), token_cache_dtype="float16")
    method = method_of(run).bfloat16()
    fill(run, method)
    survey = Survey.load(run.data.path)
    with open_loader(run, method, survey, CPU, ALONE) as cached, reading_loader(run, method) as reading:
        for a, b in islice(zip(cached, reading, strict=True), 3):
            for name, x in method.tokens(b).items():
                assert a[name].dtype == torch.bfloat16
                torch.testing.assert_close(a[name], x, rtol=0, atol=3e-8)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tokens_on_a_gpu(run, precision):
    run = replace(run, train=replace(run.train, precision=precision), device="cuda")
    device, survey = torch.device("cuda"), Survey.load(run.data.path)
    method = method_of(run).to(device)
    method = method.bfloat16() if precision == "bf16" else method
    fill_token_cache(run, method, survey, device)
    view, read = run.views.build(survey, device), {}
    for batch in SequentialLoader(
        run.data.path, split="train", batch=4, device=device, views=view, modalities=run.views.modalities
    ):
        for name, x in method.tokens(batch).items():
            read |= {(name, row): value for row, value in zip(batch["row"].tolist(), x, strict=True)}
    with open_loader(run, method, survey, device, ALONE) as cached:
        for batch in islice(cached, 6):
            for name in ("image_tokens", "spectrum_tokens"):
                wanted = torch.stack([read[name, row] for row in batch["row"].tolist()])
                torch.testing.assert_close(batch[name], wanted, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(
    "views,modalities,kind",
    [
        ({"image": None, "spectrum": False, "columns": ("z",)}, (), "CatalogLoader"),
        ({"image": None}, ("spectrum",), "Loader"),
    ],
    ids=["columns", "spectra"],
)
def test_the_trainer_opens_the_loader_that_the_views_need(run, views, modalities, kind):
    run = with_data(replace(run, views=replace(run.views, **views)), token_cache=None)
    assert run.views.modalities == modalities
    method = SimpleNamespace(prepare=lambda batch, key: batch)
    with open_loader(run, method, Survey.load(run.data.path), CPU, Ranks(0, 0, 1)) as loader:
        assert type(loader).__name__ == kind
        batch = next(loader)
    assert ("columns" in batch) == (kind == "CatalogLoader") and ("spectrum" in batch) == (kind == "Loader")
    assert len(batch["row"]) == run.train.micro_batch


def test_a_failure_of_one_rank_is_one_of_all(one_process):
    def fail():
        raise OSError(28, "No space left on device")

    assert cache_training._together(lambda: 3) == [3]
    with pytest.raises(TokenCacheError, match="data.token_cache: not filled: .*No space left"):
        cache_training._together(fail)


def test_another_reading_of_the_same_weights_is_refused(run, tmp_path):
    """AstroCLIP's image tokens with and without positions come from the same parameters."""
    shapes = {"image": ViT(image_size=8, patch_size=4, dim=16, depth=1, heads=2, drop_path=0.0)}
    shapes["spectrum"] = SpecFormer(dim=16, depth=1, heads=2, positions=50)
    nowhere = tmp_path / "weights"  # the trainer would fill them

    def aligned(tokens):
        config = AstroCLIP(
            **shapes, image_from=nowhere, spectrum_from=nowhere, embedding=8, heads=2, dropout=0.0, image_tokens=tokens
        )
        torch.manual_seed(0)
        return replace(run, method=config), method_of(replace(run, method=config))

    first, method = aligned("patches")
    without = losses(first, method, reading_loader(first, method), 6)
    first, method = aligned("patches")
    assert method_problems(first, method) == []
    fill(first, method)
    cached = losses(first, method, open_loader(first, method, Survey.load(run.data.path), CPU, ALONE), 6)
    assert cached == pytest.approx(without, rel=1e-5)  # 2e-7 apart with SSE4
    with pytest.raises(TokenCacheError, match="gives other image_tokens .relative difference .* from a setting"):
        fill(*aligned("positioned"))
