#include "kernels.h"

namespace moejet {

const KernelTable* kernel_table(Isa isa) {
#if defined(__x86_64__)
  static const KernelTable* const kTables[kNumIsas] = {&scalar::table, &avx2::table,
                                                       &avx512::table, &avx512_bf16::table,
                                                       &amx::table,    &amx_emulated::table};
  return kTables[static_cast<int>(isa)];
#else
  return isa == Isa::kScalar ? &scalar::table : nullptr;
#endif
}

const FormatKernels& kernels_of(const KernelTable& table, Format format, Arithmetic arithmetic) {
  const int f = static_cast<int>(format);
  static_assert(static_cast<int>(Format::kInt4G32) == 0 && static_cast<int>(Format::kInt8) == 1,
                "the order of int8_tiles");
  if (arithmetic == Arithmetic::kInt8 && f < 2 && table.int8_tiles[f].min_tile_rows > 0) {
    return table.int8_tiles[f];
  }
  return table.formats[f];
}

const CeilingKernels* ceiling_kernels(Isa isa) {
  if (isa == Isa::kScalar) return &scalar::ceilings;
#if defined(__x86_64__)
  return isa == Isa::kAvx2 ? &avx2::ceilings : &avx512::ceilings;
#else
  return nullptr;
#endif
}

}  // namespace moejet
