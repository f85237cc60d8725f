#include "isa.h"

#include <cstdint>
#include <stdexcept>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moejet {
namespace {

constexpr const char* kNames[kNumIsas] = {"scalar",      "avx2", "avx512",
                                          "avx512_bf16", "amx",  "amx_emulated"};

struct Features {
  bool avx2 = false, fma = false, f16c = false;
  bool avx512f = false, avx512bw = false, avx512dq = false, avx512vl = false, avx512vnni = false;
  bool avx512bf16 = false, intel = false;
  bool amx_tile = false, amx_bf16 = false, amx_int8 = false;
  bool os_ymm = false, os_zmm = false, os_tiles = false;
};

#if defined(__x86_64__)
uint64_t read_xcr0() {
  uint32_t eax, edx;
  __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
  return (static_cast<uint64_t>(edx) << 32) | eax;
}

Features detect_features() {
  Features f;
  unsigned a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d)) return f;
  f.intel = b == signature_INTEL_ebx;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  const bool osxsave = c & (1u << 27);
  f.fma = c & (1u << 12);
  f.f16c = c & (1u << 29);
  if (osxsave) {
    const uint64_t xcr0 = read_xcr0();
    f.os_ymm = (xcr0 & 0x6) == 0x6;
    f.os_zmm = (xcr0 & 0xe6) == 0xe6;
    f.os_tiles = (xcr0 & 0x60000) == 0x60000;
  }
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return f;
  f.avx2 = b & (1u << 5);
  f.avx512f = b & (1u << 16);
  f.avx512dq = b & (1u << 17);
  f.avx512bw = b & (1u << 30);
  f.avx512vl = b & (1u << 31);
  f.avx512vnni = c & (1u << 11);
  f.amx_bf16 = d & (1u << 22);
  f.amx_tile = d & (1u << 24);
  f.amx_int8 = d & (1u << 25);
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avx512bf16 = a & (1u << 5);
  return f;
}

// Linux enables tile registers per process, on request (arch_prctl ARCH_REQ_XCOMP_PERM).
bool request_tile_permission() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
#else
  return false;
#endif
}
#else
Features detect_features() { return {}; }
bool request_tile_permission() { return false; }
#endif

// Appends what is missing, as "needs x, y".
void need(bool has, const char* name, std::string* reason) {
  if (has) return;
  *reason += reason->empty() ? "needs " : ", ";
  *reason += name;
}

std::string missing_avx512(const Features& f) {
  std::string r;
  need(f.avx512f, "avx512f", &r);
  need(f.avx512bw, "avx512bw", &r);
  need(f.avx512dq, "avx512dq", &r);
  need(f.avx512vl, "avx512vl", &r);
  need(f.avx512vnni, "avx512vnni", &r);
  need(f.os_zmm, "zmm state enabled by the operating system", &r);
  return r;
}

CpuInfo detect() {
  const Features f = detect_features();
  CpuInfo info;
  info.amx_permission = f.amx_tile && f.os_tiles && request_tile_permission();
  std::string reasons[kNumIsas];
  std::string& avx2 = reasons[static_cast<int>(Isa::kAvx2)];
  need(f.avx2, "avx2", &avx2);
  need(f.fma, "fma", &avx2);
  need(f.f16c, "f16c", &avx2);
  need(f.os_ymm, "ymm state enabled by the operating system", &avx2);
  reasons[static_cast<int>(Isa::kAvx512)] = missing_avx512(f);
  reasons[static_cast<int>(Isa::kAmxEmulated)] = missing_avx512(f);
  std::string& dots = reasons[static_cast<int>(Isa::kAvx512Bf16)];
  dots = missing_avx512(f);
  need(f.avx512bf16, "avx512_bf16", &dots);
  std::string& amx = reasons[static_cast<int>(Isa::kAmx)];
  amx = missing_avx512(f);
  need(f.amx_tile, "amx_tile", &amx);
  need(f.amx_bf16, "amx_bf16", &amx);
  need(f.amx_int8, "amx_int8", &amx);
  need(f.os_tiles, "tile state enabled by the operating system", &amx);
  need(info.amx_permission, "permission for tile data from the kernel", &amx);
  for (int i = 0; i < kNumIsas; ++i) {
    const bool compiled = kernel_table(static_cast<Isa>(i)) != nullptr;
    const std::string reason = compiled ? reasons[i] : "not part of this build";
    const bool usable = compiled && reason.empty();
    info.isas[i] = {compiled, usable, usable && static_cast<Isa>(i) != Isa::kAmxEmulated, reason};
  }
  // Intel's cores execute one vdpbf16ps in two cycles: fp32 multiply-adds are as fast and exact.
  if (f.intel) info.isas[static_cast<int>(Isa::kAvx512Bf16)].automatic = false;
  const struct {
    bool has;
    const char* name;
  } named[] = {
      {f.avx2 && f.os_ymm, "avx2"},
      {f.fma && f.os_ymm, "fma"},
      {f.f16c && f.os_ymm, "f16c"},
      {f.avx512f && f.os_zmm, "avx512f"},
      {f.avx512bw && f.os_zmm, "avx512bw"},
      {f.avx512dq && f.os_zmm, "avx512dq"},
      {f.avx512vl && f.os_zmm, "avx512vl"},
      {f.avx512vnni && f.os_zmm, "avx512vnni"},
      {f.avx512bf16 && f.os_zmm, "avx512_bf16"},
      {f.amx_tile && f.os_tiles, "amx_tile"},
      {f.amx_bf16 && f.os_tiles, "amx_bf16"},
      {f.amx_int8 && f.os_tiles, "amx_int8"},
  };
  for (const auto& entry : named) {
    if (entry.has) info.features.push_back(entry.name);
  }
  return info;
}

Isa parse_isa(const std::string& argument, const std::string& name) {
  for (int i = 0; i < kNumIsas; ++i) {
    if (name == kNames[i]) return static_cast<Isa>(i);
  }
  throw std::invalid_argument(
      argument + "='" + name +
      "' is unknown: use one of scalar, avx2, avx512, avx512_bf16, amx, amx_emulated");
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

const CpuInfo& cpu_info() {
  static const CpuInfo info = detect();
  return info;
}

Isa resolve_isa(const std::string& name, const std::string& max_isa) {
  const CpuInfo& info = cpu_info();
  const Isa limit = max_isa.empty() ? Isa::kAmx : parse_isa("max_isa", max_isa);
  if (limit == Isa::kAmxEmulated) {
    throw std::invalid_argument(
        "max_isa='amx_emulated' is no limit: use scalar, avx2, avx512, avx512_bf16, amx");
  }
  if (name == "auto") {
    for (int i = static_cast<int>(limit); i > 0; --i) {
      if (info.isas[i].automatic) return static_cast<Isa>(i);
    }
    return Isa::kScalar;
  }
  const Isa isa = parse_isa("isa", name);
  // Emulated tiles execute AVX-512 instructions.
  const Isa executed = isa == Isa::kAmxEmulated ? Isa::kAvx512 : isa;
  if (executed > limit) {
    throw std::invalid_argument("isa='" + name + "' is above max_isa='" + max_isa +
                                "': raise the limit or choose a narrower instruction set");
  }
  const IsaState& state = info.isas[static_cast<int>(isa)];
  if (!state.usable) {
    throw std::invalid_argument("isa='" + name + "' cannot run here (" + state.reason +
                                "): choose 'auto' or a narrower instruction set");
  }
  return isa;
}

}  // namespace moejet
