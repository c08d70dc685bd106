"""fastfp8.check: what kernels reported, read once."""

from __future__ import annotations

import pytest
import torch

import fastfp8
from fastfp8 import error_word
from fastfp8.error_word import COUNTS, OFFSETS, QUANTIZE_OFFSETS, REQUANTIZE_OFFSETS, TOKEN_OFFSETS

CPU, FIRST, OTHER = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 3)
Words = dict[torch.device, torch.Tensor]


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Words:
    """Two GPUs that have had ops, their words on the CPU."""
    made = {device: torch.zeros(1, dtype=torch.int32) for device in (FIRST, OTHER)}
    monkeypatch.setattr(error_word, "_words", made)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    return made


def test_nothing_to_report(words: Words) -> None:
    assert fastfp8.check() is None


def test_a_report_is_raised_once(words: Words) -> None:
    words[OTHER].fill_(OFFSETS)
    with pytest.raises(ValueError, match=r"^fastfp8\.grouped_gemm: argument 'offsets': expected .*cuda:3[^;]*$"):
        fastfp8.check()
    fastfp8.check()


def test_every_op_and_device_is_named(words: Words) -> None:
    words[FIRST].fill_(OFFSETS | COUNTS | TOKEN_OFFSETS)
    words[OTHER].fill_(COUNTS)
    with pytest.raises(ValueError, match="cuda") as caught:
        fastfp8.check()
    offsets, counts, tokens, other = str(caught.value).split("; ")
    assert offsets.startswith("fastfp8.grouped_gemm: argument 'offsets'")
    assert "cuda:0" in offsets
    assert counts.startswith("fastfp8.masked_grouped_gemm: argument 'counts'")
    assert "cuda:0" in counts
    assert tokens.startswith("fastfp8.grouped_wgrad: argument 'offsets'")
    assert "cuda:0" in tokens
    assert other.startswith("fastfp8.masked_grouped_gemm: argument 'counts'")
    assert "cuda:3" in other
    assert not any(word.item() for word in words.values())


def test_both_quantisations_are_named(words: Words) -> None:
    words[FIRST].fill_(QUANTIZE_OFFSETS | REQUANTIZE_OFFSETS)
    with pytest.raises(ValueError, match="cuda:0") as caught:
        fastfp8.check()
    first, second = str(caught.value).split("; ")
    assert first.startswith("fastfp8.quantize_grouped_both: argument 'offsets'")
    assert second.startswith("fastfp8.requantize_transpose: argument 'offsets'")


def test_the_words_of_cpu_and_meta(words: Words) -> None:
    """That of the CPU is for torch.compile only; nothing sets it and check does not look at it."""
    word = error_word.error_word(CPU)
    assert word is error_word.error_word(CPU)
    word.fill_(OFFSETS)
    fastfp8.check()
    assert error_word.error_word(torch.device("meta")) is None


def test_a_device_has_one_word_and_none_is_made_in_a_capture(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    zeros, capturing = torch.zeros, [True]
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: zeros(*size, **options))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    assert error_word.error_word(torch.device("cuda", 1)) is None
    assert error_word.error_word(OTHER) is words[OTHER]
    capturing[0] = False
    made = error_word.error_word(torch.device("cuda", 1))
    assert (made.shape, made.dtype, made.item()) == ((1,), torch.int32, 0)
    capturing[0] = True
    assert error_word.error_word(torch.device("cuda", 1)) is made


def test_fake_tensors_make_no_word(words: Words) -> None:
    """A fake one would stay, and a real one cannot meet fake operands."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        a, b = fastfp8.quantize(torch.ones(8, 16)), fastfp8.quantize(torch.ones(2, 8, 16), (128, 128))
        ends = torch.zeros(2, dtype=torch.int32)
        assert fastfp8.grouped_gemm(a, b, ends).shape == (8, 8)
        stack = fastfp8.quantize(torch.ones(2, 5, 16))
        assert fastfp8.masked_grouped_gemm(stack, b, ends).shape == (2, 5, 8)
        assert fastfp8.quantize_grouped_both(torch.ones(5, 16), ends)[1].shape == (16, 256)
        assert fastfp8.requantize_transpose(a, ends)[0].shape == (16, 256)
        assert fastfp8.grouped_wgrad(a, a, ends, out=torch.ones(2, 8, 8)).shape == (2, 8, 8)
    assert set(words) == {FIRST, OTHER}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_report_from_compiled_code_arrives(words: Words, backend: str) -> None:
    """The word, made while the function is traced, is a constant of the graph: what an op writes there is the word's.

    So a second call has the same graph, though there is a word by then.
    """

    def report(x: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        error.fill_(OFFSETS)
        return x.clone()

    def call(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.fastfp8_test.report(x, error_word.error_word(x.device))

    with torch.library._scoped_library("fastfp8_test", "DEF") as library:
        library.define("report(Tensor x, Tensor(a!)? error) -> Tensor")
        library.impl("report", report, "CPU")
        torch.library.register_fake("fastfp8_test::report", lambda x, error: torch.empty_like(x), lib=library)
        torch._dynamo.reset()
        function = torch.compile(call, backend=backend, fullgraph=True)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for _ in range(2):
                function(torch.ones(3))
                assert words[CPU].item() == OFFSETS
                words[CPU].zero_()
