// What one call of gemm costs the host between its checked tensors and the launch, by part: bench/host.py compiles it
// with the library's own planner and driver code, and lets it find a libcuda that only pretends.
//
// host_cost M N K ROUNDS CALLS prints a line a round: the nanoseconds of each part, of a launch of a shape that was
// launched before, and of what a slow machine slows down alike.
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../csrc/common/driver.h"
#include "../csrc/gemm/plan.h"

namespace {

using namespace fastfp8;

constexpr uint64_t kAddress = 1 << 20;

TensorView view(DType dtype, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) {
  TensorView made;
  made.dtype = dtype, made.dim = 2, made.device = 0, made.address = kAddress;
  made.sizes = {rows, columns}, made.strides = {row_stride, column_stride};
  return made;
}

gemm::GemmOperands operands_of(int64_t m, int64_t n, int64_t k) {
  const int64_t blocks = ceil_div(k, 128);
  return {view(DType::kE4M3, m, k, k, 1),
          view(DType::kF32, m, blocks, 1, round_up(m, 4)),
          view(DType::kE4M3, n, k, k, 1),
          view(DType::kF32, ceil_div(n, 128), blocks, blocks, 1),
          std::nullopt,
          128,
          128,
          DType::kBF16};
}

template <class Call>
double nanoseconds(int calls, const Call& call) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < calls; ++i) call();
  return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count() / calls;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) return 2;
  const int m = std::atoi(argv[1]), n = std::atoi(argv[2]), k = std::atoi(argv[3]);
  const int rounds = std::atoi(argv[4]), calls = std::atoi(argv[5]);
  const driver::Binding bindings[] = {{"a", kAddress},       {"a_scale", kAddress}, {"b", kAddress},
                                      {"b_scale", kAddress}, {"out", kAddress},     {"c", 0}};
  const gemm::GemmOperands operands = operands_of(m, n, k);
  const gemm::Machine& machine = gemm::Machine::of(driver::device(0).name);
  const int num_sms = driver::device(0).num_sms;
  const gemm::GemmProblem problem = gemm::make_problem(operands, num_sms, machine);
  const gemm::GemmConfig config = gemm::select(problem);
  const LaunchPlan plan = gemm::plan(problem, config);
  const auto launch = [&](const LaunchPlan& made) { driver::launch(made, bindings, 6, nullptr); };
  // Every result is looked at, so that none is left out.
  volatile int seen = 0;
  launch(plan);  // loads the kernel
  for (int round = 0; round < rounds; ++round) {
    const std::array<double, 7> parts = {
        nanoseconds(calls, [&] { seen = gemm::make_problem(operands, num_sms, machine).m; }),
        nanoseconds(calls, [&] { seen = gemm::select(problem).grid; }),
        nanoseconds(calls, [&] { seen = gemm::plan(problem, config).argument_count; }),
        nanoseconds(calls, [&] { seen = gemm::planned(problem).argument_count; }),
        nanoseconds(calls, [&] { launch(plan); }),
        nanoseconds(calls, [&] { launch(gemm::planned(gemm::make_problem(operands, num_sms, machine))); }),
        nanoseconds(calls,
                    [&] {
                      for (int i = 0; i < 16; ++i) seen = static_cast<int>(std::vector<int>(64, i).back());
                    }),
    };
    for (double part : parts) std::printf("%.1f ", part);
    std::printf("\n");
  }
}
