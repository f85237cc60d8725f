// Instruction sets: their names, which of them this machine can run, and the choice of one.
#pragma once

#include <string>
#include <vector>

namespace moejet {

// Narrow to wide. kAmxEmulated runs the AMX code over tiles written in C++: for tests only.
enum class Isa { kScalar = 0, kAvx2, kAvx512, kAvx512Bf16, kAmx, kAmxEmulated };
constexpr int kNumIsas = 6;

const char* isa_name(Isa isa);

struct IsaState {
  bool compiled;       // this build holds the kernels
  bool usable;         // compiled, and processor and kernel allow it
  bool automatic;      // usable, and "auto" may choose it
  std::string reason;  // why not usable; empty if it is
};

struct CpuInfo {
  std::vector<std::string> features;  // those that matter here, CPUID and XCR0 combined
  IsaState isas[kNumIsas];
  bool amx_permission;  // the kernel lets this process use tile registers
};

// Detected once; the first call asks the kernel for permission to use AMX tiles.
const CpuInfo& cpu_info();

// "auto" gives the widest automatic set, not above max_isa (empty: no limit). Any other name gives
// exactly that set. Throws std::invalid_argument if it is unknown, unusable or above max_isa.
Isa resolve_isa(const std::string& name, const std::string& max_isa);

}  // namespace moejet
