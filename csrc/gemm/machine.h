// What the cost model knows of a GPU.
#pragma once
#include <string>

namespace fastfp8::gemm {

// Rates in clocks of an SM at its boost clock. Compute rates and HBM are the data sheets', the other numbers were
// measured by others on an H800 (arXiv 2402.13499, 2501.12084) and an H100; none was measured with this library.
struct Machine {
  const char* name;
  int num_sms;
  double clock_ghz;
  double tensor_flops;  // dense FP8, one SM, per clock
  double hbm_bytes;     // the whole chip, per clock: 0.9 of the data sheet's, the share that a copy reaches
  double l2_bytes;      // the whole chip, per clock
  double sm_bytes;      // what one SM takes from L2, per clock
  double latency;       // clocks from a TMA load's issue to its barrier, from HBM

  // H100 unless the device's name has another of the table.
  static const Machine& of(const std::string& device_name);
  // Raises std::runtime_error that lists the table where it has no such name.
  static const Machine& named(const std::string& name);
};

}  // namespace fastfp8::gemm
