// How a test starts the emulated device.

#pragma once

#include <cstdint>

#include <device.h>

namespace emulator {

struct Run {
  int64_t broken;  // enum Broken
  uint64_t seed;
};

// What went wrong, or null; `launch` launches.
template <typename Launch>
const char* run(const Run& how, Launch launch) {
  device.error.clear();
  device.running = nullptr;
  device.broken = static_cast<Broken>(how.broken);
  device.seed = how.seed;
  device.state = how.seed * 0x9e3779b97f4a7c15u + 88172645463325252u;
  launch();
  return device.error.empty() ? nullptr : device.error.c_str();
}

}  // namespace emulator
