"""Benchmarks: ``python -m bench COMMAND``, one file an op family. ``python -m bench --help`` lists the commands.

A family is a module with ``works(tiny)``, the list of what it can measure. Contestants of a case take turns in one
process and run, so that what else the machine does meets all of them alike. They give rows (`rows.py`); tables, plots,
history and the regression gate are views of them.
"""

SAMPLES = 21

FAMILIES = {
    "ceilings": "what the machine can do: copy bandwidth, tensor-core rates, launch latency",
    "gemm": "fastfp8.gemm beside cuBLASLt's block scaling, DeepGEMM, Triton and BF16",
    "grouped": "fastfp8.grouped_gemm and masked_grouped_gemm beside BF16 and a product a group",
    "wgrad": "fastfp8.grouped_wgrad beside DeepGEMM, BF16 and a product a group",
    "swiglu": "fastfp8.gemm_swiglu_quantize beside the same in three steps",
    "quantize": "fastfp8.quantize and dequantize beside a copy and torch.compile",
    "fused": "every op of one pass over memory beside torch.compile, torchao and TransformerEngine",
    "layer": "a training step of a layer of the 16B model beside BF16 and TransformerEngine, and its memory",
    "comm": "token exchange between ranks",
    "cpu": "the CPU ops beside torch, the cost of a call and of the import",
    "accuracy": "error of the product against the interval of promotion, by the model of the tensor core",
    "static": "registers, instructions and predictions, read off the compiled kernels",
    "traffic": "bytes that the fused ops move, counted on the emulator, beside the least and the same in steps",
    "emulator": "the tests' emulator: its counters for our kernels, and its own speed",
}
