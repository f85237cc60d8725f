// The two products of attention on vectors, and fp32 arithmetic.
//
// A vector arithmetic Dot adds to what attention-inl.h asks for:
//   Operand                    a vector of elements
//   load, broadcast, add       sum + broadcast * columns
//   load_values<NP>(rows, column, dst)   NP panels of columns of kPair value rows
//   kMixPanels                 the most panels of such a load
#pragma once

#ifndef MOEJET_ISA_NS
#error "attention-vectors-inl.h belongs into a file of isa/"
#endif

#include "attention-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

// Rows of a register block: with kMaxPanels panels of columns and their operands they fill the
// registers.
constexpr int kMr = Vec::kWidth / 2;
constexpr int kMaxPanels = Vec::kWidth == 16 ? 3 : 1;

// out(i, v, sum over k of row i at k times column vector v at k) for kMr rows and NP panels.
// Rows: at(i, k), and step(k) once per k. Columns: load<NP>(k, dst).
template <class Dot, int NP, class Rows, class Columns, class Out>
inline void register_block(Rows* rows, const Columns& columns, int64_t count, const Out& out) {
  Vec::V sum[kMr][NP * kVecs];
  for (int i = 0; i < kMr; ++i) {
    for (int v = 0; v < NP * kVecs; ++v) sum[i][v] = Vec::zero();
  }
  for (int64_t k = 0; k < count; ++k) {
    rows->step(k);
    typename Dot::Operand column[NP * kVecs];
    columns.template load<NP>(k, column);
    for (int i = 0; i < kMr; ++i) {
      const typename Dot::Operand row = Dot::broadcast(rows->at(i, k));
      for (int v = 0; v < NP * kVecs; ++v) sum[i][v] = Dot::add(sum[i][v], row, column[v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kMr; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < NP * kVecs; ++v) out(i, v, sum[i][v]);
  }
}

template <class Dot>
struct KeyRows {
  const typename Dot::Elem* row[kMr];
  const typename Dot::Elem* const* next;  // the rows that come after these
  typename Dot::Elem at(int i, int64_t k) const { return row[i][k]; }
  // In the time of a cache line of every row, fetches that line of all the next rows.
  void step(int64_t k) const {
    constexpr int kLine = 64 / sizeof(typename Dot::Elem);
    constexpr int kEvery = kLine / kMr;
    if (k % kEvery == 0) __builtin_prefetch(next[k % kLine / kEvery] + k / kLine * kLine);
  }
};
template <class Dot>
struct QueryColumns {
  const typename Dot::Elem* data;  // [panel][k][16]
  int64_t panel;
  template <int NP>
  void load(int64_t k, typename Dot::Operand* dst) const {
    for (int v = 0; v < NP * kVecs; ++v) {
      dst[v] = Dot::load(data + k * kQueryPanel + v / kVecs * panel + v % kVecs * Vec::kWidth);
    }
  }
};
template <class Dot>
struct WeightRows {
  const typename Dot::Elem* data;  // [k][16]
  Ahead ahead;
  typename Dot::Elem at(int i, int64_t k) const { return data[k * kQueryPanel + i]; }
  void step(int64_t) { ahead.step(); }
};
template <class Dot>
struct ValueColumns {
  const typename Dot::Elem* const* rows;
  int64_t column;
  template <int NP>
  void load(int64_t k, typename Dot::Operand* dst) const {
    Dot::template load_values<NP>(rows + k * Dot::kPair, column, dst);
  }
};

// Not inlined: the loop needs all general registers for its pointers.
template <class Dot, int NP>
__attribute__((noinline)) void score_panels(const Keys<Dot>& keys,
                                            const typename Dot::Elem* queries, int64_t elements,
                                            float* scores) {
  constexpr int kPanelScores = Dot::kKeyBlock * kQueryPanel;
  const QueryColumns<Dot> columns = {queries, elements * kQueryPanel};
  for (int t = 0; t < keys.count; t += kMr) {
    KeyRows<Dot> rows;
    for (int i = 0; i < kMr; ++i) rows.row[i] = keys.rows[t + i];
    rows.next = keys.rows + t + kMr;
    float* s = scores + t * kQueryPanel;
    register_block<Dot, NP>(&rows, columns, elements, [s](int i, int v, Vec::V sum) {
      Vec::store(s + v / kVecs * kPanelScores + i * kQueryPanel + v % kVecs * Vec::kWidth, sum);
    });
  }
}

template <class Dot, int NP>
__attribute__((noinline)) void mix_panels(const typename Dot::Elem* weights, const float* decay,
                                          int64_t column, const Sums& sums, Keys<Dot>* keys) {
  const int64_t count = (keys->count + Dot::kPair - 1) / Dot::kPair;
  const ValueColumns<Dot> columns = {keys->value_rows, column};
  WeightRows<Dot> rows = {nullptr, keys->ahead};
  for (int row = 0; row < sums.rows; row += kMr) {
    rows.data = weights + row / kQueryPanel * (Dot::kKeyBlock / Dot::kPair * kQueryPanel) +
                row % kQueryPanel;
    float* dst = sums.data + row * sums.stride + column;
    const float* keep = decay + row;
    const auto whole = [&](int i, int v, Vec::V sum) {
      float* p = dst + i * sums.stride + v * Vec::kWidth;
      Vec::store(p, Vec::fma(Vec::load(p), Vec::broadcast(keep[i]), sum));
    };
    const auto part = [&](int i, int v, Vec::V sum) {
      const int64_t left = sums.cols - column - v * Vec::kWidth;
      if (row + i >= sums.rows || left <= 0) return;
      float* p = dst + i * sums.stride + v * Vec::kWidth;
      if (!sums.first) sum = Vec::fma(load_part(p, left), Vec::broadcast(keep[i]), sum);
      store_part(p, sum, left);
    };
    if (!sums.first && row + kMr <= sums.rows && column + NP * kQueryPanel <= sums.cols) {
      register_block<Dot, NP>(&rows, columns, count, whole);
    } else {
      register_block<Dot, NP>(&rows, columns, count, part);
    }
  }
  keys->ahead = rows.ahead;
}

template <int N>
struct Panels {
  static constexpr int kCount = N;
};
// run(Panels<N>, first panel) over all panels, N at most Most; four that are left are two and two.
template <int Most, class Run>
void for_panels(int64_t panels, const Run& run) {
  int64_t p = 0;
  if constexpr (Most >= 3) {
    for (; panels - p >= 3 && panels - p != 4; p += 3) run(Panels<3>(), p);
  }
  if constexpr (Most >= 2) {
    for (; panels - p >= 2; p += 2) run(Panels<2>(), p);
  }
  for (; p < panels; ++p) run(Panels<1>(), p);
}

template <class Dot>
struct VectorProducts {
  struct Scope {};
  static constexpr int kDimStep = 16, kGroup = 1;
  static constexpr bool kValueRows = true;

  template <class Elem>
  static void finish_weights(Elem*, int, int) {}

  template <class Elem>
  static void scores(Scope&, const Keys<Dot>& keys, const Elem* queries, int64_t elements,
                     int panels, AttentionWorker* worker) {
    for_panels<kMaxPanels>(panels, [&](auto group, int64_t p) {
      score_panels<Dot, decltype(group)::kCount>(keys, queries + p * elements * kQueryPanel,
                                                 elements,
                                                 worker->scores + p * Dot::kKeyBlock * kQueryPanel);
    });
  }
  static void mix(Scope&, const float* decay, const Sums& sums, Keys<Dot>* keys,
                  AttentionWorker* worker) {
    using Elem = typename Dot::Elem;
    const Elem* weights = static_cast<const Elem*>(worker->weights);
    for_panels<Dot::kMixPanels>(
        round_up(sums.cols, kQueryPanel) / kQueryPanel, [&](auto group, int64_t p) {
          mix_panels<Dot, decltype(group)::kCount>(weights, decay, p * kQueryPanel, sums, keys);
        });
  }
  static int64_t mix_steps(int64_t rows, int64_t cols, int64_t keys) {
    const int64_t panels = (cols / kQueryPanel + Dot::kMixPanels - 1) / Dot::kMixPanels;
    return panels * ((rows + kMr - 1) / kMr) * ((keys + Dot::kPair - 1) / Dot::kPair);
  }
};

struct Fp32Dot : VectorProducts<Fp32Dot> {
  using Elem = float;
  using Scalar = float;
  using Operand = Vec::V;
  static constexpr int kPair = 1, kKeyStep = 1, kKeyBlock = 64, kMixPanels = kMaxPanels;

  static Operand load(const Elem* p) { return Vec::load(p); }
  static Operand broadcast(Elem x) { return Vec::broadcast(x); }
  static Vec::V add(Vec::V sum, Operand a, Operand b) { return Vec::fma(a, b, sum); }
  template <int NP>
  static void load_values(const Elem* const* rows, int64_t column, Operand* dst) {
    for (int v = 0; v < NP * kVecs; ++v) dst[v] = Vec::load(rows[0] + column + v * Vec::kWidth);
  }
  static Vec::V exp2(Vec::V x) { return Vec::exp2(x); }
  static void copy(const void* src, DType dtype, int64_t n, float* dst) {
    if (dtype == DType::kF32) {
      std::memcpy(dst, src, n * sizeof(float));
      return;
    }
    const uint16_t* p = static_cast<const uint16_t*>(src);
    int64_t i = 0;
    for (; i + Vec::kWidth <= n; i += Vec::kWidth) Vec::store(dst + i, Vec::load_bf16(p + i));
    for (; i < n; ++i) dst[i] = element(src, dtype, i);
  }
  static void pack_queries(const float* staging, int64_t ld, int64_t elements, Elem* dst) {
    for (int64_t d = 0; d < elements; d += 16) {
      Vec::transpose16(staging + d, ld, dst + d * kQueryPanel);
    }
  }
  static void store_weights(Elem* dst, Vec::V w, Vec::V) { Vec::store(dst, w); }
};

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
