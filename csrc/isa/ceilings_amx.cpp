// Ceilings of AMX: a block of 2 x 2 tiles, its operands in tile registers or loaded from L1 before
// each round as a matrix product would.
#define MOEJET_ISA_NS amx
#include "ceilings-inl.h"

namespace moejet {
namespace amx {
namespace {

constexpr int kTileBytes = 1024;

// The architecture's tile configuration: palette 1, eight tiles of 16 rows x 64 bytes.
struct alignas(64) Configuration {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(Configuration) == 64, "the processor reads exactly 64 bytes");

// Own assembly for the reasons given in amx.cpp. Tiles 0..3 are sums, 4 and 5 hold A, 6 and 7 B.
inline void load_operands(const uint8_t* tiles) {
  __asm__ volatile(
      "tileloadd (%0,%1,1), %%tmm4\n\ttileloadd (%2,%1,1), %%tmm5\n\t"
      "tileloadd (%3,%1,1), %%tmm6\n\ttileloadd (%4,%1,1), %%tmm7"
      :
      : "r"(tiles), "r"(int64_t{64}), "r"(tiles + kTileBytes), "r"(tiles + 2 * kTileBytes),
        "r"(tiles + 3 * kTileBytes)
      : "memory");
}
inline void zero_sums() {
  __asm__ volatile("tilezero %tmm0\n\ttilezero %tmm1\n\ttilezero %tmm2\n\ttilezero %tmm3");
}
inline uint64_t fold_sums(uint8_t* buffer) {
  __asm__ volatile(
      "tilestored %%tmm0, (%0,%1,1)\n\ttilestored %%tmm1, (%2,%1,1)\n\t"
      "tilestored %%tmm2, (%3,%1,1)\n\ttilestored %%tmm3, (%4,%1,1)"
      :
      : "r"(buffer), "r"(int64_t{64}), "r"(buffer + kTileBytes), "r"(buffer + 2 * kTileBytes),
        "r"(buffer + 3 * kTileBytes)
      : "memory");
  return read_memory(buffer, 4 * kTileBytes, 1, 0);
}

struct Bf16 {
  static constexpr int64_t kOperations = 2 * 16 * 16 * 32;
  static void multiply() {
    __asm__ volatile(
        "tdpbf16ps %tmm6, %tmm4, %tmm0\n\ttdpbf16ps %tmm7, %tmm4, %tmm1\n\t"
        "tdpbf16ps %tmm6, %tmm5, %tmm2\n\ttdpbf16ps %tmm7, %tmm5, %tmm3");
  }
};

struct Int8 {
  static constexpr int64_t kOperations = 2 * 16 * 16 * 64;
  static void multiply() {
    __asm__ volatile(
        "tdpbssd %tmm6, %tmm4, %tmm0\n\ttdpbssd %tmm7, %tmm4, %tmm1\n\t"
        "tdpbssd %tmm6, %tmm5, %tmm2\n\ttdpbssd %tmm7, %tmm5, %tmm3");
  }
};

template <class Type, bool kResident>
uint64_t tile_block(int64_t steps, const uint8_t* operands) {
  constexpr int kSets = kCeilingOperandBytes / (4 * kTileBytes);
  const Configuration configuration;
  alignas(64) uint8_t sums[4 * kTileBytes];
  uint64_t digest = 0;
  __asm__ volatile("ldtilecfg %0" : : "m"(configuration) : "memory");
  load_operands(operands);
  for (int64_t step = 0; step < steps; ++step) {
    zero_sums();
    for (int round = 0; round < kRoundsPerStep; ++round) {
      if (!kResident) load_operands(operands + round % kSets * 4 * kTileBytes);
      Type::multiply();
    }
    digest ^= fold_sums(sums);
  }
  __asm__ volatile("tilerelease" : : : "memory");
  return digest;
}

template <class Type, bool kResident>
constexpr ArithmeticLoop tile_loop(const char* name) {
  return {name, int64_t{4} * kRoundsPerStep * Type::kOperations, &tile_block<Type, kResident>};
}

}  // namespace

extern const CeilingKernels ceilings = {
    &read_memory,
    {kNoLoop, kNoLoop},
    {tile_loop<Int8, true>("resident tiles"), tile_loop<Int8, false>("tiles loaded from L1")},
    {tile_loop<Bf16, true>("resident tiles"), tile_loop<Bf16, false>("tiles loaded from L1")}};

}  // namespace amx
}  // namespace moejet
