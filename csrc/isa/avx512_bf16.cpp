// Kernels for AVX512_BF16 processors whose vdpbf16ps runs at full rate (AMD Zen 4 and later): 32
// multiply-adds an instruction, twice those of fp32. Experts with many rows multiply bf16 A rows
// with bf16 B tiles, both laid out as for AMX, in vector registers. Integer formats keep their
// 8-bit dot products, which do twice as much again.
#define MOEJET_ISA_NS avx512_bf16
#define MOEJET_VEC_BITS 512
#include "attention-vdpbf16-inl.h"
#include "fp8-tiles512-inl.h"
#include "gguf-avx512-inl.h"
#include "ops-inl.h"
#include "tiles512-inl.h"

namespace moejet {
namespace avx512_bf16 {
namespace {

// Tiles of k multiplied at a time: 8 x 2 KB of B, half of L1.
constexpr int kDotChunkTiles = 8;
constexpr int kDotRows = 8;  // 16 sums; two such groups are one tile of A

inline __m512bh pairs512(__m512i v) { return reinterpret_cast<__m512bh>(v); }

// Memory that is read next: every tile of k fetches some lines of it into L2.
struct Upcoming {
  const uint8_t* at;
  int lines;  // per tile of k
};

// Adds the products of MR rows of A and both panels, k_tiles tiles of k, to c. The order of
// additions does not depend on MR.
template <int MR>
void dot_rows(const uint16_t* a, const uint16_t* b, int64_t k_tiles, Upcoming* upcoming, float* c) {
  __m512 sum[MR][2];
  for (int m = 0; m < MR; ++m) {
    sum[m][0] = _mm512_loadu_ps(c + m * kPairCols);
    sum[m][1] = _mm512_loadu_ps(c + m * kPairCols + kPanelRows);
  }
  for (int64_t k = 0; k < k_tiles; ++k, a += kTileWords, b += 2 * kTileWords) {
    for (int i = 0; i < upcoming->lines; ++i, upcoming->at += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(upcoming->at), _MM_HINT_T1);
    }
#pragma GCC unroll 16
    for (int v = 0; v < kTileK / 2; ++v) {
      const __m512bh b0 = pairs512(load512(b + 32 * v));
      const __m512bh b1 = pairs512(load512(b + kTileWords + 32 * v));
      for (int m = 0; m < MR; ++m) {
        const __m512bh x =
            pairs512(broadcast_quad(reinterpret_cast<const int8_t*>(a + m * kTileK + 2 * v)));
        sum[m][0] = _mm512_dpbf16_ps(sum[m][0], x, b0);
        sum[m][1] = _mm512_dpbf16_ps(sum[m][1], x, b1);
      }
    }
  }
  for (int m = 0; m < MR; ++m) {
    _mm512_storeu_ps(c + m * kPairCols, sum[m][0]);
    _mm512_storeu_ps(c + m * kPairCols + kPanelRows, sum[m][1]);
  }
}

template <int MR>
void dot_rows_of(int mr, const uint16_t* a, const uint16_t* b, int64_t k_tiles, Upcoming* upcoming,
                 float* c) {
  if constexpr (MR > 1) {
    if (mr < MR) return dot_rows_of<MR - 1>(mr, a, b, k_tiles, upcoming, c);
  }
  dot_rows<MR>(a, b, k_tiles, upcoming, c);
}

struct Dots : Bf16TileRows {
  // Fewer rows leave the time to memory, which the vector kernels read faster.
  static constexpr int min_rows(Format format) { return format == Format::kFp8 ? 4 : 6; }

  // results[pair][m][0..31] = A B for rows [first, first + m) of A.
  template <class TileMk>
  void gemm(const PairRun& pairs, const TileActivations& acts, int64_t first, int m, float* results,
            uint8_t* unpacked) {
    const uint16_t* a = tile_row(acts.bf16, pairs.geometry->k_padded, first, 0);
    constexpr BlockShape kBlock = block_shape(TileMk::kFormat);
    constexpr int64_t kBlockTiles = kBlock.k / kTileK;
    const Chunks chunks = {pairs, kDotChunkTiles / kBlockTiles, 2 * kBlock.bytes};
    const int64_t row_words = pairs.geometry->k_padded / kTileK * kTileWords;
    const int groups = (m + kDotRows - 1) / kDotRows;
    std::memset(results, 0, pairs.num * result_stride(m) * sizeof(float));
    for (int64_t i = 0; i < chunks.count(); ++i) {
      const int64_t block = chunks.first_block(i), num_blocks = chunks.num_blocks(i);
      const uint16_t* b =
          TileMk::b_tiles(chunks.data(i), num_blocks, reinterpret_cast<uint16_t*>(unpacked));
      const int64_t lines = num_blocks * 2 * kBlock.bytes / 64;
      Upcoming upcoming = {chunks.data(i + 1 < chunks.count() ? i + 1 : i),
                           static_cast<int>(lines / (num_blocks * kBlockTiles * groups))};
      float* c = results + chunks.pair(i) * result_stride(m);
      for (int row = 0; row < m; row += kDotRows) {
        const uint16_t* a_row = a + row / kTileRows * row_words + row % kTileRows * kTileK;
        dot_rows_of<kDotRows>(static_cast<int>(smaller(kDotRows, m - row)),
                              a_row + block * kBlockTiles * kTileWords, b, num_blocks * kBlockTiles,
                              &upcoming, c + row * kPairCols);
      }
    }
  }
};

}  // namespace

extern const KernelTable table = {
    Isa::kAvx512Bf16,
    {format_kernels<Int4, NoTiles>(), format_kernels<Int8, NoTiles>(),
     format_kernels<Bf16, Bf16Tiles<Dots>>(), format_kernels<Fp8, Fp8Tiles<Dots>>(),
     format_kernels<Fp32, NoTiles>(), format_kernels<GgufPlain<Format::kQ4_0>, NoTiles>(),
     format_kernels<GgufPlain<Format::kQ8_0>, NoTiles>(),
     format_kernels<GgufMins<Format::kQ4K>, NoTiles>(),
     format_kernels<GgufMins<Format::kQ5K>, NoTiles>(), format_kernels<GgufQ6, NoTiles>()},
    op_kernels(),
    {attention_kernels<Fp32Dot>(), attention_kernels<Bf16Dot>()}};

}  // namespace avx512_bf16
}  // namespace moejet
