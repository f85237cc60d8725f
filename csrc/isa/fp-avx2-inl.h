// Vector microkernels for AVX2 of fp8 and fp32 weights times fp32 activations; the decoding of fp8
// is explained in fp-avx512-inl.h. Included by avx2.cpp.
#pragma once

#ifndef MOEJET_ISA_NS
#error "fp-avx2-inl.h belongs into a file of isa/"
#endif

struct Fp8 {
  static constexpr Format kFormat = Format::kFp8;
  static constexpr int kMr = 2;  // 8 sums of 16 registers
  static constexpr int kManyRows = 0;
  static constexpr float kFactor = 256.f;

  // 16 codes, widened with their signs and multiplied by 16, to bf16, as values / kFactor.
  static __m256i to_bf16(__m256i words) {
    const __m256i kept = _mm256_set1_epi16(static_cast<int16_t>(0x87f0));
    words = _mm256_or_si256(_mm256_and_si256(words, kept), _mm256_set1_epi16(0x3800));
    // Otherwise the compiler masks each half by itself, with more constants than there are
    // registers.
    __asm__("" : "+x"(words));
    return words;
  }

  // Corrects the lanes of decoded codes without exponent bits.
  static __m256 correct_small(__m256 v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i exponent = _mm256_and_si256(bits, _mm256_set1_epi32(0x07800000));
    const __m256i small = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
    // 2^-14 (1 + m / 8) - 2^-14, both with the code's sign.
    const __m256i next =
        _mm256_add_epi32(bits, _mm256_and_si256(small, _mm256_set1_epi32(0x00800000)));
    const __m256i sign = _mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0x80000000)));
    const __m256i one =
        _mm256_and_si256(small, _mm256_or_si256(sign, _mm256_set1_epi32(0x38800000)));
    return _mm256_sub_ps(_mm256_castsi256_ps(next), _mm256_castsi256_ps(one));
  }

  // Eight rows of eight vectors, 32 inputs; sums as in the AVX-512 kernel.
  template <int MR, bool kSmall>
  [[gnu::always_inline]] static void add_group(const uint8_t* codes, bool prefetching,
                                               const RowRefs& rows, int64_t k, __m256 (*sum)[4]) {
    for (int v = 0; v < 8; ++v) {
      if (prefetching) prefetch(codes + 64 * v);
      const __m256i w = load256(codes + 64 * v);
      const __m256i low = to_bf16(_mm256_maddubs_epi16(_mm256_set1_epi16(16), w));
      const __m256i high = to_bf16(_mm256_srai_epi16(w, 4));
      const auto add = [&](int j, __m256 weights) {
        const __m256 value = kSmall ? correct_small(weights) : weights;
        for (int m = 0; m < MR; ++m) {
          const __m256 x = _mm256_set1_ps(rows.f32[m][k + 4 * v + j]);
          sum[m][j] = _mm256_fmadd_ps(value, x, sum[m][j]);
        }
      };
      add(0, low_halves(low));
      add(1, high_halves(low));
      add(2, low_halves(high));
      add(3, high_halves(high));
    }
  }

  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    for (int m = 0; m < MR; ++m) std::memset(out + m * kPairCols, 0, kPairCols * sizeof(float));
    for (int64_t b = 0; b < num_blocks; ++b) {
      for (int part = 0; part < 4; ++part) {  // panel, half of its rows
        const Fp8Block<const uint8_t> block = fp8_block(pair + (2 * b + part / 2) * 2080);
        if (part == 0) prefetch(block.data);
        Fp8BlockData data;
        std::memcpy(&data, block.data, sizeof(data));
        __m256 sum[MR][4];
        for (int m = 0; m < MR; ++m) {
          for (int j = 0; j < 4; ++j) sum[m][j] = _mm256_setzero_ps();
        }
        for (int group = 0; group < 4; ++group, data.small >>= 8) {
          reload_activations();
          const uint8_t* codes = block.codes + 512 * group + part % 2 * 32;
          const int64_t k = 128 * b + 32 * group;
          if ((data.small & 255) == 0) {
            add_group<MR, false>(codes, part % 2 == 0, rows, k, sum);
          } else {
            add_group<MR, true>(codes, part % 2 == 0, rows, k, sum);
          }
        }
        const __m256 scale = _mm256_set1_ps(data.scale), factor = _mm256_set1_ps(kFactor);
        for (int m = 0; m < MR; ++m) {
          float* to = out + m * kPairCols + 8 * part;
          const __m256 in_block = _mm256_mul_ps(_mm256_add_ps(_mm256_add_ps(sum[m][0], sum[m][1]),
                                                              _mm256_add_ps(sum[m][2], sum[m][3])),
                                                factor);
          _mm256_storeu_ps(to, _mm256_fmadd_ps(in_block, scale, _mm256_loadu_ps(to)));
        }
      }
    }
  }
};

struct Fp32 {
  static constexpr Format kFormat = Format::kFp32;
  static constexpr int kMr = 3;  // 12 sums of 16 registers
  static constexpr int kManyRows = 0;
  template <int MR>
  static void tile(const uint8_t* pair, int64_t num_blocks, const RowRefs& rows, float* out) {
    __m256 sum[MR][4];
    for (int m = 0; m < MR; ++m) {
      for (int i = 0; i < 4; ++i) sum[m][i] = _mm256_setzero_ps();
    }
    const uint8_t* block = pair;
    for (int64_t b = 0; b < num_blocks; ++b) {
      // Panel after panel, in memory order: alternating between the two halves the rate from DRAM.
#pragma GCC unroll 2
      for (int panel = 0; panel < 2; ++panel, block += 2048) {
        reload_activations();
#pragma GCC unroll 4
        for (int v = 0; v < 32; ++v) {
          prefetch(block + 64 * v);
          const float* line = reinterpret_cast<const float*>(block + 64 * v);
          const __m256 w0 = _mm256_load_ps(line), w1 = _mm256_load_ps(line + 8);
          for (int m = 0; m < MR; ++m) {
            const __m256 x = _mm256_set1_ps(rows.f32[m][32 * b + v]);
            sum[m][2 * panel] = _mm256_fmadd_ps(w0, x, sum[m][2 * panel]);
            sum[m][2 * panel + 1] = _mm256_fmadd_ps(w1, x, sum[m][2 * panel + 1]);
          }
        }
      }
    }
    for (int m = 0; m < MR; ++m) {
      for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out + m * kPairCols + 8 * i, sum[m][i]);
    }
  }
};
