// Kernels for AMX bf16 and int8 tiles beside AVX-512.
#define MOEJET_ISA_NS amx
#define MOEJET_VEC_BITS 512
#include "attention-tiles-inl.h"
#include "attention-vectors-inl.h"
#include "fp8-tiles512-inl.h"
#include "gguf-tiles512-inl.h"
#include "int8-tiles512-inl.h"
#include "ops-inl.h"

namespace moejet {
namespace amx {
namespace {

// Own assembly instead of compiler intrinsics, for two reasons. GCC 12's _tile_loadconfig declares
// 8 of the 64 bytes that the instruction reads, and its tile loads and stores do not declare memory
// at all, so the compiler may drop or move the writes that feed them. The "memory" clobber orders
// them.
class AmxTiles {
 public:
  AmxTiles() {
    const TileConfig config;
    __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  ~AmxTiles() { __asm__ volatile("tilerelease" : : : "memory"); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

  template <int T>
  void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
  }
  template <int T>
  void load(const void* p, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  void store(void* p, int64_t stride) const {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory");
  }
  // tdpbf16ps: C[m][n] += sum over k-pairs of A[m][2k] B[k][2n] + A[m][2k + 1] B[k][2n + 1]
  template <int C, int A, int B>
  void dot_bf16() {
    // AT&T order: the last operand is the destination, the middle one A, the first one B.
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
  // tdpbssd: C[m][n] += sum over j < 4, k of A[m][4k + j] B[k][4n + j], int8 to int32
  template <int C, int A, int B>
  void dot_int8() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  }
};

}  // namespace

extern const KernelTable table = {
    Isa::kAmx,
    {format_kernels<Int4, Int4Tiles<TileBlocks<AmxTiles>>>(),
     format_kernels<Int8, Int8Tiles<TileBlocks<AmxTiles>>>(),
     format_kernels<Bf16, Bf16Tiles<TileBlocks<AmxTiles>>>(),
     format_kernels<Fp8, Fp8Tiles<TileBlocks<AmxTiles>>>(), format_kernels<Fp32, NoTiles>(),
     format_kernels<GgufPlain<Format::kQ4_0>, GgufTiles<Format::kQ4_0, TileBlocks<AmxTiles>>>(),
     format_kernels<GgufPlain<Format::kQ8_0>, GgufTiles<Format::kQ8_0, TileBlocks<AmxTiles>>>(),
     format_kernels<GgufMins<Format::kQ4K>, GgufTiles<Format::kQ4K, TileBlocks<AmxTiles>>>(),
     format_kernels<GgufMins<Format::kQ5K>, GgufTiles<Format::kQ5K, TileBlocks<AmxTiles>>>(),
     format_kernels<GgufQ6, GgufTiles<Format::kQ6K, TileBlocks<AmxTiles>>>()},
    op_kernels(),
    {attention_kernels<Fp32Dot>(), attention_kernels<TileDot<AmxTiles>>()},
    {format_kernels<Int4, Int4AsInt8<Int8TileBlocks<AmxTiles>>>(),
     format_kernels<Int8, Int8AsPacked<Int8TileBlocks<AmxTiles>>>()}};

}  // namespace amx
}  // namespace moejet
