"""A Hopper GPU on the CPU, as far as PTX can tell: runs kernels from their PTX text, strictly and at random timing."""

from .kernel import Counters, EmulationError, Kernel, Launch, Machine
from .plan import run_plan
from .tensor_map import TensorMap

__all__ = ["Counters", "EmulationError", "Kernel", "Launch", "Machine", "TensorMap", "run_plan"]
