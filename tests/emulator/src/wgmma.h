// What a warp knows of its wgmma: which are not waited for yet, and what that means for its registers.
#pragma once
#include <deque>
#include <memory>
#include <vector>

#include "matrix.h"
#include "ptx.h"

namespace emulator {

// A wgmma.mma_async as decoded.
struct WgmmaForm {
  const Instruction* instruction;
  MatrixFormat format;
  int n = 0;
  bool a_transposed = false, b_transposed = false;
  std::vector<int> accumulators;
  std::vector<int> fragments;  // the registers of A, none where it comes from shared memory
};

// One that a warp has executed and not waited for.
struct WgmmaIssue {
  std::shared_ptr<const WgmmaForm> form;
  uint64_t a, b;  // descriptors
  bool accumulate;
};

struct Code;

struct WgmmaState {
  // How wgmma sees a register. PTX wants a wgmma.fence between any other access and a wgmma that uses it; only
  // accumulators may go on to a wgmma of the same shape, and fragments of A be read again.
  struct Register {
    uint64_t accessed = 0;  // fences so far at the last access
    int user = 0;           // what that was: kOther, kFragment, or the shape of a wgmma that accumulated
    uint32_t accumulating = 0, reading = 0;  // wgmma not waited for that do
  };
  static constexpr int kOther = 0, kFragment = 1;

  std::deque<WgmmaIssue> issues;               // oldest first
  uint64_t issued = 0, done = 0, retired = 0;  // counts of wgmma; `issues` begins at `retired`
  std::vector<uint64_t> commits;               // `issued` at each commit that is not waited for
  uint64_t fences = 0;
  std::vector<Register> registers;  // empty before the first fence
  std::vector<uint32_t> values;     // [register][lane] of accumulators not waited for

  bool empty() const { return issues.empty(); }
  // Whether instructions must be checked at all: of each register that one names, and executes with in some lane, the
  // machine asks holds() before and calls touched() then. wgmma deals with accumulators and fragments itself.
  bool watches() const { return !registers.empty(); }
  bool holds(int index) const { return knows(index) && registers[index].accumulating + registers[index].reading > 0; }
  void touched(int index) {
    if (knows(index)) registers[index].accessed = fences, registers[index].user = kOther;
  }
  // Says which wgmma holds the register.
  std::string holder(const Code& code, int index) const;

 private:
  bool knows(int index) const { return static_cast<size_t>(index) < registers.size(); }
};

}  // namespace emulator
