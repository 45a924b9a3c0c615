"""The step benchmark at tiny sizes: every method, its phases, the cache against the encoders, the rows it writes."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from armillary.models.astroclip.astroclip import AstroCLIP
from armillary.models.dinov2.dino_head import Head
from armillary.models.dinov2.dinov2 import DINOv2
from armillary.models.method import InputSpec
from armillary.models.mmae.token_drop import TokenDropMMAE
from armillary.models.mosaic.mosaic import MOSAIC
from armillary.models.specformer.specformer import SpecFormer
from armillary.models.specformer.specformer_pretraining import SpecFormerPretraining
from armillary.models.vit.vit import ViT

CPU = torch.device("cpu")
VIT = ViT(image_size=8, patch_size=4, dim=32, depth=2, heads=2)
SPECFORMER = SpecFormer(dim=32, depth=2, heads=2, positions=40)
SPECTRA = InputSpec(pixels=301)
PAIRS = InputSpec(channels=3, global_size=8, n_global=1, pixels=301)
MMAE_TINY = TokenDropMMAE(dim=16, depth=1, heads=2, decoder_dim=8, decoder_depth=1, rest_points=20, rest_hidden=8)


def subject_of(method: str, folder: Path):
    from step_methods import (
        CachedCLIP,
        CLIPSubject,
        DINOv2Subject,
        GalaxyWalkerSubject,
        MMAESubject,
        MOSAICSubject,
        SpecFormerSubject,
    )

    if method == "dinov2":
        inputs = InputSpec(channels=3, global_size=8, n_global=2, local_size=4, n_local=1)
        return DINOv2Subject(DINOv2(vit=VIT, head=Head(64, 32, 16), koleo_weight=0.0), inputs)
    if method == "specformer":
        return SpecFormerSubject(SpecFormerPretraining(encoder=SPECFORMER, chunks=3, chunk_tokens=4), SPECTRA)
    if method == "mmae":
        return MMAESubject(MMAE_TINY)
    if method == "galaxy_walker":
        return GalaxyWalkerSubject()
    if method == "mosaic":
        return MOSAICSubject(MOSAIC(dim=16, depth=1, heads=2))
    recomputed = CLIPSubject(VIT, SPECFORMER, PAIRS, embedding=16, dropout=0.0)
    return recomputed if method == "recomputed" else CachedCLIP(recomputed, folder / "f", 3, 4, "float32")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["dinov2", "specformer", "mmae", "mosaic", "galaxy_walker", "recomputed", "cached"])
def test_phases_cover_the_step(tmp_path, method, precision):
    from step_training import Training, phase_columns

    subject = subject_of(method, tmp_path)
    training = Training(subject, precision, CPU, 4)
    steps = [training.step() for _ in range(4)]
    skipped = {"image encoder", "spectrum encoder"} if method == "cached" else set()
    for seconds in steps:
        assert set(seconds) == set(subject.phases) - skipped and min(seconds.values()) >= 0
    row = phase_columns(steps, 4, subject)
    assert row[f"ms_per_{subject.unit}"] > 0 and {f"{phase}_ms" for phase in subject.phases} < set(row)
    assert all(row[f"{phase}_ms"] == 0 for phase in skipped)


def test_cached_and_recomputed_steps_compute_the_same(tmp_path):
    from step_training import Training

    losses = {}
    for method in ("recomputed", "cached"):
        torch.manual_seed(0)
        training = Training(subject_of(method, tmp_path), "fp32", CPU, 4)
        losses[method] = []
        for _ in range(3):
            training.step()
            losses[method].append(training.loss)
    assert losses["cached"] == losses["recomputed"]


@pytest.mark.parametrize("method", ["dinov2", "specformer", "astroclip", "mmae", "mosaic", "galaxy_walker"])
def test_rows_say_what_was_timed(tmp_path, monkeypatch, capsys, method):
    import step
    import step_methods

    tiny = {name: lambda *_, name=name, **__: subject_of(name, tmp_path) for name in ("dinov2", "specformer")}
    monkeypatch.setattr(step, "DINOv2Subject", tiny["dinov2"])
    monkeypatch.setattr(step, "SpecFormerSubject", tiny["specformer"])
    monkeypatch.setattr(step, "SpecFormer", lambda: SPECFORMER)
    monkeypatch.setattr(step, "TokenDropMMAE", lambda **given: replace(MMAE_TINY, **given))
    monkeypatch.setattr(step, "MOSAIC", lambda **given: MOSAIC(dim=16, depth=1, heads=2, **given))
    monkeypatch.setattr(step, "MODELS", {"vits": VIT})
    monkeypatch.setattr(step_methods, "PAIRS", PAIRS)
    monkeypatch.setattr(step_methods, "AstroCLIP", lambda **given: AstroCLIP(**given, embedding=16))
    monkeypatch.setattr(
        step, "CLIPSubject", lambda image, spectrum: step_methods.CLIPSubject(image, spectrum, step_methods.PAIRS)
    )
    table = tmp_path / "step.csv"
    arguments = ["--method", method, "--batch", "4", "--repeats", "2", "--threads", "1", "--csv", str(table)]
    monkeypatch.setattr("sys.argv", ["step.py", *arguments, "--precision", "fp32"])
    step.main()
    with open(table, newline="") as f:
        rows = list(csv.DictReader(f))
    assert [row["benchmark"] for row in rows] == [f"{method} step"] * (
        1 if method in ("dinov2", "specformer", "galaxy_walker") else 2
    )
    printed = capsys.readouterr().out
    if method == "astroclip":
        assert [row["tokens"] for row in rows] == ["recomputed", "cached float16"]
        assert float(rows[1]["image encoder_ms"]) == 0 < float(rows[0]["image encoder_ms"])
        assert float(rows[1]["gb_per_pair"]) > 0 and "vits recomputed over vits cached:" in printed
    elif method == "mmae":
        assert [row["tokens"] for row in rows] == ["all", "shown"]
        assert float(rows[0]["gflop_per_pair"]) > float(rows[1]["gflop_per_pair"]) > 0
        assert "mmae all over mmae shown:" in printed
    elif method == "mosaic":
        assert [row["tokens"] for row in rows] == ["all", "half"]
        assert float(rows[0]["gflop_per_galaxy"]) > float(rows[1]["gflop_per_galaxy"]) > 0
        assert "mosaic all over mosaic half:" in printed
    else:
        unit = {"dinov2": "image", "specformer": "spectrum", "galaxy_walker": "galaxy"}[method]
        assert float(rows[0][f"ms_per_{unit}"]) > 0 and f"ms a {unit}" in printed
