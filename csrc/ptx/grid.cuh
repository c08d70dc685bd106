// Grids that overlap: programmatic dependent launch. One function an instruction.
#pragma once

namespace fastfp8::ptx {

// Until the grids that this one was launched to follow are done and what they wrote can be seen. At once where the
// launch did not ask for overlap.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-griddepcontrol
__device__ __forceinline__ void wait_for_grids_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// When every CTA has said so or has ended, the next grid may start, if its launch asks for overlap. It says nothing of
// memory: the next grid still waits for the end of this one before it reads or writes what this one may touch.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-griddepcontrol
__device__ __forceinline__ void let_next_grid_start() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

}  // namespace fastfp8::ptx
