// The AMX kernels over tiles in memory: tests their logic on processors without AMX.
#define MOEJET_ISA_NS amx_emulated
#define MOEJET_VEC_BITS 512
#include "attention-tiles-inl.h"
#include "attention-vectors-inl.h"
#include "fp8-tiles512-inl.h"
#include "gguf-tiles512-inl.h"
#include "int8-tiles512-inl.h"
#include "ops-inl.h"

namespace moejet {
namespace amx_emulated {

extern const KernelTable table = {
    Isa::kAmxEmulated,
    {format_kernels<Int4, Int4Tiles<TileBlocks<EmulatedTiles>>>(),
     format_kernels<Int8, Int8Tiles<TileBlocks<EmulatedTiles>>>(),
     format_kernels<Bf16, Bf16Tiles<TileBlocks<EmulatedTiles>>>(),
     format_kernels<Fp8, Fp8Tiles<TileBlocks<EmulatedTiles>>>(), format_kernels<Fp32, NoTiles>(),
     format_kernels<GgufPlain<Format::kQ4_0>,
                    GgufTiles<Format::kQ4_0, TileBlocks<EmulatedTiles>>>(),
     format_kernels<GgufPlain<Format::kQ8_0>,
                    GgufTiles<Format::kQ8_0, TileBlocks<EmulatedTiles>>>(),
     format_kernels<GgufMins<Format::kQ4K>, GgufTiles<Format::kQ4K, TileBlocks<EmulatedTiles>>>(),
     format_kernels<GgufMins<Format::kQ5K>, GgufTiles<Format::kQ5K, TileBlocks<EmulatedTiles>>>(),
     format_kernels<GgufQ6, GgufTiles<Format::kQ6K, TileBlocks<EmulatedTiles>>>()},
    op_kernels(),
    {attention_kernels<Fp32Dot>(), attention_kernels<TileDot<EmulatedTiles>>()},
    {format_kernels<Int4, Int4AsInt8<Int8TileBlocks<EmulatedTiles>>>(),
     format_kernels<Int8, Int8AsPacked<Int8TileBlocks<EmulatedTiles>>>()}};

}  // namespace amx_emulated
}  // namespace moejet
