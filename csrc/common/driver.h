// The only place that talks to libcuda, opened at run time: nothing links it, so the extension imports everywhere.
#pragma once
#include <string>

#include "launch_plan.h"

namespace fastfp8::driver {

struct DeviceInfo {
  std::string name;
  int major, minor, num_sms;
};

// "" if libcuda can be opened, is new enough for our cubins and finds a device; else a sentence that says what is
// wrong.
const std::string& unusable_reason();

// The driver's CUDA version as 1000 * major + 10 * minor; 0 without a driver.
int version();

int device_count();

// Raises std::runtime_error if there is no such device.
const DeviceInfo& device(int index);

// Where the .cubin files are. To be called once, before the first launch.
void set_kernel_directory(const std::string& directory);

// The address bound to a slot of the plan.
struct Binding {
  const char* slot;
  uint64_t address;
};

// Encode the tensor maps and launch on `stream` of the current context. Asynchronous; raises std::runtime_error.
void launch(const LaunchPlan& plan, const Binding* bindings, int binding_count, void* stream);

}  // namespace fastfp8::driver
