"""One file an op family: the public function, the checks, the fake implementation, the choice of backend.

The schemas are in ``csrc/bindings/schema.cpp``. Every op has a CPU kernel (``fastfp8/reference``), a CUDA kernel
(Triton; for GEMMs on sm_90a the CUDA C++ one, registered in C++) and a fake one for ``torch.compile``.
"""
