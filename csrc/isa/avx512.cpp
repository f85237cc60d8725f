// Kernels for AVX-512 F, BW, DQ, VL and VNNI.
#define MOEJET_ISA_NS avx512
#define MOEJET_VEC_BITS 512
#include "attention-vectors-inl.h"
#include "fp-avx512-inl.h"
#include "gguf-avx512-inl.h"
#include "ops-inl.h"

namespace moejet {
namespace avx512 {

extern const KernelTable table = {
    Isa::kAvx512,
    {format_kernels<Int4, NoTiles>(), format_kernels<Int8, NoTiles>(),
     format_kernels<Bf16, NoTiles>(), format_kernels<Fp8, NoTiles>(),
     format_kernels<Fp32, NoTiles>(), format_kernels<GgufPlain<Format::kQ4_0>, NoTiles>(),
     format_kernels<GgufPlain<Format::kQ8_0>, NoTiles>(),
     format_kernels<GgufMins<Format::kQ4K>, NoTiles>(),
     format_kernels<GgufMins<Format::kQ5K>, NoTiles>(), format_kernels<GgufQ6, NoTiles>()},
    op_kernels(),
    {attention_kernels<Fp32Dot>(), attention_kernels<Fp32Dot>()}};

}  // namespace avx512
}  // namespace moejet
