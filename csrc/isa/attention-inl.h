// Attention over the latent cache, as templates over an arithmetic; see attention_kernels.h for the
// two forms and what each function does.
//
// Both products run through the same operands:
//   scores  S[key][row]    = sum_d K[key][d] Q[d][row]    keys broadcast, 16 query rows in a vector
//   mix     O[row][column] = sum_t P[t][row] V[t][column] rows broadcast, 16 columns in a vector
// so a key row is read where it lies, the softmax runs over whole vectors (each lane is a query
// row), and its weights are the next product's operand as they stand. In bf16, an element holds two
// neighbours in the dimension that is summed: keys lie that way already, queries are packed so once
// per task, weights when they are rounded, and only values must be interleaved, once per key block.
//
// An arithmetic is a struct with
//   Elem, Scalar, kPair           element, the scalars in it, and their number
//   kDimStep, kKeyBlock           see AttentionKernels
//   kKeyStep                      weights and values are padded with zeros to so many keys
//   kGroup                        so many key rows must lie equally far apart (1: anywhere)
//   exp2(x)                       weights from scores
//   copy(src, dtype, n, dst)      n values to scalars
//   Scope                         lives while a task uses scores and mix (tile configuration)
//   pack_queries, store_weights, load_latent_values, pack_values
//   scores, mix                   the two products
#pragma once

#ifndef MOEJET_ISA_NS
#error "attention-inl.h belongs into a file of isa/"
#endif

#include "vec-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

constexpr int kVecs = kQueryPanel / Vec::kWidth;  // of one panel

// The keys of one step and their values.
template <class A>
struct Keys {
  int count;
  const typename A::Elem* rows[kMaxKeyBlock];  // padded to a multiple of 16 with readable rows
  const typename A::Elem* values;              // of key pair k, columns 16 p ..:
  int64_t value_step, value_panel;             // values + k value_step + p value_panel
};

// Running sums of a block of query rows: [rows, cols], rows `stride` elements apart.
struct Sums {
  float* data;
  int64_t stride;
  int rows;
  int64_t cols;
  bool first;  // nothing in data yet
};

inline void store_part(float* dst, Vec::V v, int64_t n) {
  if (n >= Vec::kWidth) return Vec::store(dst, v);
  float all[Vec::kWidth];
  Vec::store(all, v);
  for (int64_t i = 0; i < n; ++i) dst[i] = all[i];
}
inline Vec::V load_part(const float* src, int64_t n) {
  if (n >= Vec::kWidth) return Vec::load(src);
  float all[Vec::kWidth] = {};
  for (int64_t i = 0; i < n; ++i) all[i] = src[i];
  return Vec::load(all);
}

// ---- The two products on vectors ----

// Rows of a register block of kMr x kPanels x kVecs sums, operands and a broadcast beside them.
constexpr int kMr = Vec::kWidth / 2;
constexpr int kPanels = Vec::kWidth == 16 ? 3 : 1;

template <class Elem>
struct RowOperand {  // one pointer per row
  const Elem* row[kMr];
  Elem at(int i, int64_t k) const { return row[i][k]; }
};
template <class Elem>
struct ColumnOperand {  // rows adjacent
  const Elem* data;
  Elem at(int i, int64_t k) const { return data[k * kQueryBlock + i]; }
};

// out(i, v, sum over k of a(i, k) * b(k, v)) for kMr rows and NP panels of b.
template <class Dot, int NP, class Operand, class Out>
inline void register_block(const Operand& a, const typename Dot::Elem* b, int64_t step,
                           int64_t panel, int64_t count, const Out& out) {
  Vec::V sum[kMr][NP * kVecs];
  for (int i = 0; i < kMr; ++i) {
    for (int v = 0; v < NP * kVecs; ++v) sum[i][v] = Vec::zero();
  }
  for (int64_t k = 0; k < count; ++k, b += step) {
    typename Dot::Operand columns[NP * kVecs];
    for (int v = 0; v < NP * kVecs; ++v) {
      columns[v] = Dot::load(b + v / kVecs * panel + v % kVecs * Vec::kWidth);
    }
    for (int i = 0; i < kMr; ++i) {
      const typename Dot::Operand row = Dot::broadcast(a.at(i, k));
      for (int v = 0; v < NP * kVecs; ++v) sum[i][v] = Dot::add(sum[i][v], row, columns[v]);
    }
  }
  for (int i = 0; i < kMr; ++i) {
    for (int v = 0; v < NP * kVecs; ++v) out(i, v, sum[i][v]);
  }
}

template <class Dot, int NP>
void score_panels(const Keys<Dot>& keys, const typename Dot::Elem* queries, int64_t elements,
                  float* scores) {
  for (int t = 0; t < keys.count; t += kMr) {
    RowOperand<typename Dot::Elem> a;
    for (int i = 0; i < kMr; ++i) a.row[i] = keys.rows[t + i];
    float* s = scores + t * kQueryBlock;
    register_block<Dot, NP>(
        a, queries, kQueryPanel, elements * kQueryPanel, elements,
        [s](int i, int v, Vec::V sum) { Vec::store(s + i * kQueryBlock + v * Vec::kWidth, sum); });
  }
}

template <class Dot, int NP>
void mix_panels(const Keys<Dot>& keys, const typename Dot::Elem* weights, const float* decay,
                int64_t panel, const Sums& sums) {
  const int64_t count = (keys.count + Dot::kPair - 1) / Dot::kPair;
  const int64_t column = panel * kQueryPanel;
  for (int row = 0; row < sums.rows; row += kMr) {
    const ColumnOperand<typename Dot::Elem> a = {weights + row};
    float* dst = sums.data + row * sums.stride + column;
    register_block<Dot, NP>(a, keys.values + panel * keys.value_panel, keys.value_step,
                            keys.value_panel, count, [&](int i, int v, Vec::V sum) {
                              const int64_t left = sums.cols - column - v * Vec::kWidth;
                              if (row + i >= sums.rows || left <= 0) return;
                              float* p = dst + i * sums.stride + v * Vec::kWidth;
                              if (!sums.first) {
                                sum = Vec::fma(load_part(p, left), Vec::broadcast(decay[row + i]),
                                               sum);
                              }
                              store_part(p, sum, left);
                            });
  }
}

template <class Dot>
void vector_scores(const Keys<Dot>& keys, const typename Dot::Elem* queries, int64_t elements,
                   int panels, float* scores) {
  for (int p = 0; p < panels;) {
    const typename Dot::Elem* q = queries + p * elements * kQueryPanel;
    float* s = scores + p * kQueryPanel;
    const int left = panels - p;
    if (kPanels >= 3 && left == 3) {
      score_panels<Dot, kPanels>(keys, q, elements, s);
      p += 3;
    } else if (kPanels >= 2 && left >= 2) {
      score_panels<Dot, kPanels >= 2 ? 2 : 1>(keys, q, elements, s);
      p += 2;
    } else {
      score_panels<Dot, 1>(keys, q, elements, s);
      ++p;
    }
  }
}

template <class Dot>
void vector_mix(const Keys<Dot>& keys, const typename Dot::Elem* weights, const float* decay,
                const Sums& sums) {
  const int64_t panels = (sums.cols + kQueryPanel - 1) / kQueryPanel;
  for (int64_t p = 0; p < panels;) {
    const int64_t left = panels - p;
    if (kPanels >= 3 && left >= 3 && left != 4) {
      mix_panels<Dot, kPanels>(keys, weights, decay, p, sums);
      p += 3;
    } else if (kPanels >= 2 && left >= 2) {
      mix_panels<Dot, kPanels >= 2 ? 2 : 1>(keys, weights, decay, p, sums);
      p += 2;
    } else {
      mix_panels<Dot, 1>(keys, weights, decay, p, sums);
      ++p;
    }
  }
}

// ---- fp32 arithmetic ----

struct Fp32Dot {
  using Elem = float;
  using Scalar = float;
  using Operand = Vec::V;
  struct Scope {};
  static constexpr int kPair = 1, kDimStep = 16, kKeyBlock = 64, kKeyStep = 1, kGroup = 1;

  static Operand load(const Elem* p) { return Vec::load(p); }
  static Operand broadcast(Elem x) { return Vec::broadcast(x); }
  static Vec::V add(Vec::V sum, Operand a, Operand b) { return Vec::fma(a, b, sum); }
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
  static void finish_weights(Elem*, int, int) {}
  // The latent rows, copied for the keys, are row-major values.
  static void load_latent_values(const AttentionBatch&, const uint8_t* const*, int64_t elements,
                                 AttentionWorker* worker, Keys<Fp32Dot>* keys) {
    keys->values = static_cast<const Elem*>(worker->keys);
    keys->value_step = elements;
    keys->value_panel = kQueryPanel;
  }
  static int64_t value_step(int64_t cols) { return round_up(cols, kQueryPanel); }
  static int64_t value_panel() { return kQueryPanel; }
  static void pack_values(const void* src, int64_t stride, int count, int64_t cols, Elem* dst) {
    const int64_t step = value_step(cols);
    for (int t = 0; t < count; ++t) {
      std::memcpy(dst + t * step, static_cast<const float*>(src) + t * stride, cols * 4);
      for (int64_t c = cols; c < step; ++c) dst[t * step + c] = 0.f;
    }
  }
  static void scores(Scope&, const Keys<Fp32Dot>& keys, const Elem* queries, int64_t elements,
                     int panels, AttentionWorker* worker) {
    vector_scores<Fp32Dot>(keys, queries, elements, panels, worker->scores);
  }
  static void mix(Scope&, const Keys<Fp32Dot>& keys, const float* decay, const Sums& sums,
                  AttentionWorker* worker) {
    vector_mix<Fp32Dot>(keys, static_cast<const Elem*>(worker->weights), decay, sums);
  }
};

// ---- Online softmax ----

// One panel: scores become weights, max and sum move on; decay is what earlier sums are worth now.
// limits: the last key of the block that each row sees; null if all rows see all keys.
template <class A>
void softmax_panel(int count, float* scores, const float* limits, float* max, float* sum,
                   float* decay, typename A::Elem* weights) {
  constexpr int kPairStep = kQueryBlock;
  const Vec::V masked = Vec::broadcast(kMaskedScore);
  for (int lane = 0; lane < kQueryPanel; lane += Vec::kWidth) {
    float* s = scores + lane;
    const Vec::V before = Vec::load(max + lane);
    Vec::V m = before;
    for (int t = 0; t < count; ++t) {
      Vec::V score = Vec::load(s + t * kQueryBlock);
      if (limits != nullptr) {
        score = Vec::select_greater(Vec::broadcast(static_cast<float>(t)), Vec::load(limits + lane),
                                    masked, score);
        Vec::store(s + t * kQueryBlock, score);
      }
      m = Vec::max(score, m);
    }
    const auto weight = [&](int t) { return A::exp2(Vec::load(s + t * kQueryBlock) - m); };
    const Vec::V kept = A::exp2(before - m);
    Vec::V total = Vec::load(sum + lane) * kept;
    typename A::Elem* w = weights + lane;
    int t = 0;
    for (; t + A::kPair <= count; t += A::kPair, w += kPairStep) {
      const Vec::V first = weight(t);
      total = total + first;
      Vec::V second = Vec::zero();
      if constexpr (A::kPair == 2) {
        second = weight(t + 1);
        total = total + second;
      }
      A::store_weights(w, first, second);
    }
    for (; t < round_up(count, A::kKeyStep); t += A::kPair, w += kPairStep) {
      Vec::V first = Vec::zero();
      if (t < count) total = total + (first = weight(t));
      A::store_weights(w, first, Vec::zero());
    }
    Vec::store(max + lane, m);
    Vec::store(sum + lane, total);
    Vec::store(decay + lane, kept);
  }
}

// A block of at most kQueryBlock rows over the keys of one step.
template <class A>
void attend(typename A::Scope& scope, const Keys<A>& keys, const typename A::Elem* queries,
            int64_t elements, const float* limits, float* max, float* sum, const Sums& sums,
            AttentionWorker* worker) {
  const int panels = (sums.rows + kQueryPanel - 1) / kQueryPanel;
  typename A::Elem* weights = static_cast<typename A::Elem*>(worker->weights);
  alignas(64) float decay[kQueryBlock];
  A::scores(scope, keys, queries, elements, panels, worker);
  for (int p = 0; p < panels; ++p) {
    const int row = p * kQueryPanel;
    softmax_panel<A>(keys.count, worker->scores + row, limits == nullptr ? nullptr : limits + row,
                     max + row, sum + row, decay + row, weights + row);
  }
  A::finish_weights(weights, panels, keys.count);
  A::mix(scope, keys, decay, sums, worker);
}

// Packs a panel of query rows; row(i) gives its two parts, or null parts for a row of zeros.
struct QueryRow {
  const float *head, *tail;
};
template <class A, class RowOf>
void pack_panel(const RowOf& row_of, int64_t head_dims, int64_t tail_dims, float scale,
                int64_t elements, float* staging, typename A::Elem* dst) {
  const int64_t ld = elements * A::kPair;
  for (int i = 0; i < kQueryPanel; ++i) {
    float* row = staging + i * ld;
    const QueryRow q = row_of(i);
    int64_t d = 0;
    if (q.head != nullptr) {
      for (int64_t j = 0; j < head_dims; ++j) row[d++] = q.head[j] * scale;
      for (int64_t j = 0; j < tail_dims; ++j) row[d++] = q.tail[j] * scale;
    }
    for (; d < ld; ++d) row[d] = 0.f;
  }
  A::pack_queries(staging, ld, elements, dst);
}

inline void reset(float* max, float* sum, int rows) {
  for (int i = 0; i < rows; ++i) {
    max[i] = kMaskedScore;
    sum[i] = 0.f;
  }
}

// ---- Absorbed form ----

inline const uint8_t* latent_row(const AttentionBatch& batch, const int64_t* blocks, int64_t key) {
  const int64_t slot = blocks[key / batch.block_size] * batch.block_size + key % batch.block_size;
  return static_cast<const uint8_t*>(batch.cache) +
         slot * (batch.rank + batch.rope) * dtype_bytes(batch.cache_dtype);
}

// Key rows and values of keys [begin, begin + count). Rows are used in place where the arithmetic
// can read them so.
template <class A>
void load_latents(const AttentionBatch& batch, const int64_t* blocks, int64_t begin, int count,
                  int64_t elements, AttentionWorker* worker, Keys<A>* keys) {
  const int64_t dims = batch.rank + batch.rope;
  using Elem = typename A::Elem;
  using Scalar = typename A::Scalar;
  const bool fits = dtype_bytes(batch.cache_dtype) == sizeof(Scalar) && A::kPair == 2 &&
                    dims == elements * A::kPair;
  keys->count = count;
  const uint8_t* row[kMaxKeyBlock];
  for (int t = 0; t < count; ++t) row[t] = latent_row(batch, blocks, begin + t);
  for (int group = 0; group < count; group += A::kGroup) {
    bool in_place = fits && group + A::kGroup <= count;
    for (int t = group + 2; in_place && t < group + A::kGroup; ++t) {
      in_place = row[t] - row[t - 1] == row[t - 1] - row[t - 2];
    }
    const int end = group + A::kGroup < count ? group + A::kGroup : count;
    for (int t = group; t < end; ++t) {
      if (in_place) {
        keys->rows[t] = reinterpret_cast<const Elem*>(row[t]);
        continue;
      }
      Elem* copy = static_cast<Elem*>(worker->keys) + t * elements;
      Scalar* scalars = reinterpret_cast<Scalar*>(copy);
      A::copy(row[t], batch.cache_dtype, dims, scalars);
      for (int64_t d = dims; d < elements * A::kPair; ++d) scalars[d] = 0;
      keys->rows[t] = copy;
    }
  }
  for (int t = count; t < round_up(count, 16); ++t) {
    keys->rows[t] = A::kGroup == 1 ? keys->rows[count - 1]
                                   : static_cast<const Elem*>(worker->keys) + t * elements;
  }
  A::load_latent_values(batch, row, elements, worker, keys);
}

template <class A>
void pack_absorbed_queries(const AttentionBatch& batch, const AbsorbedPart& part, int64_t first_row,
                           int rows, int64_t elements, AttentionWorker* worker) {
  typename A::Elem* dst = static_cast<typename A::Elem*>(worker->queries);
  for (int p = 0; p < rows; p += kQueryPanel) {
    const auto row_of = [&](int i) -> QueryRow {
      if (p + i >= rows) return {nullptr, nullptr};
      const int64_t row = first_row + p + i;
      const int64_t query = row / batch.heads, head = row % batch.heads;
      return {part.q_latent + row * batch.rank, batch.q + (part.token + query) * batch.q_stride +
                                                    head * batch.q_head_stride + batch.nope};
    };
    pack_panel<A>(row_of, batch.rank, batch.rope, batch.scale, elements, worker->staging,
                  dst + p * elements);
  }
}

// Splits begin at multiples of 16 keys, where tiles can read the cache in place.
inline int64_t split_begin(int64_t context, int64_t split, int64_t num_splits) {
  return split == num_splits ? context : context * split / num_splits / 16 * 16;
}

template <class A>
void absorbed(const AttentionBatch& batch, const AbsorbedPart& part, int64_t group, int64_t split,
              AttentionWorker* worker) {
  const int64_t elements = round_up(batch.rank + batch.rope, A::kDimStep) / A::kPair;
  const int64_t cols = round_up(batch.rank, kQueryPanel);
  const int64_t all_rows = part.num_queries * batch.heads;
  const int64_t first_row = group * kAbsorbedRows;
  const int rows = static_cast<int>(smaller(kAbsorbedRows, all_rows - first_row));
  if (worker->packed_part != &part || worker->packed_group != group) {
    pack_absorbed_queries<A>(batch, part, first_row, rows, elements, worker);
    worker->packed_part = &part;
    worker->packed_group = group;
  }
  const auto position = [&](int64_t row) { return part.first_position + row / batch.heads; };
  const int64_t context = part.first_position + part.num_queries;
  const int64_t begin = split_begin(context, split, part.num_splits);
  const int64_t end =
      smaller(split_begin(context, split + 1, part.num_splits), position(first_row + rows - 1) + 1);
  const int64_t state = split * round_up(all_rows, kQueryPanel) + first_row;
  float* partial = part.partial + (split * all_rows + first_row) * cols;
  reset(part.max + state, part.sum + state, static_cast<int>(round_up(rows, kQueryPanel)));

  typename A::Scope scope;
  Keys<A> keys;
  alignas(64) float limits[kQueryBlock];
  for (int64_t key = begin; key < end; key += A::kKeyBlock) {
    load_latents<A>(batch, part.blocks, key, static_cast<int>(smaller(A::kKeyBlock, end - key)),
                    elements, worker, &keys);
    for (int row = 0; row < rows; row += kQueryBlock) {
      const int block_rows = rows - row < kQueryBlock ? rows - row : kQueryBlock;
      if (position(first_row + row + block_rows - 1) < key) continue;
      const bool causal = position(first_row + row) < key + keys.count - 1;
      for (int i = 0; causal && i < kQueryBlock; ++i) {
        limits[i] = static_cast<float>(position(first_row + row + i) - key);
      }
      const Sums sums = {partial + row * cols, cols, block_rows, cols, key == begin};
      attend<A>(scope, keys, static_cast<const typename A::Elem*>(worker->queries) + row * elements,
                elements, causal ? limits : nullptr, part.max + state + row, part.sum + state + row,
                sums, worker);
    }
  }
}

// The weight of each split's sums is 2^(its maximum - the largest). A split without visible keys
// has undefined sums and counts as nothing, but a NaN must reach the result.
inline void merge(const AttentionBatch& batch, const AbsorbedPart& part, int64_t row_begin,
                  int64_t row_end) {
  const int64_t all_rows = part.num_queries * batch.heads;
  const int64_t padded_rows = round_up(all_rows, kQueryPanel);
  const int64_t cols = round_up(batch.rank, kQueryPanel);
  for (int64_t row = row_begin; row < row_end; ++row) {
    float* mixed = part.mixed + row * batch.rank;
    float largest = kMaskedScore;
    for (int64_t s = 0; s < part.num_splits; ++s) {
      const float m = part.max[s * padded_rows + row];
      largest = m > largest ? m : largest;
    }
    const auto share = [&](int64_t s) {
      float lanes[Vec::kWidth];
      const float m = part.max[s * padded_rows + row];
      Vec::store(lanes, Vec::exp2(Vec::broadcast(m - largest)));
      return lanes[0];
    };
    const auto counts = [&](int64_t s) {
      const float total = part.sum[s * padded_rows + row];
      return part.max[s * padded_rows + row] > kMaskedScore || total != total;
    };
    float total = 0.f;
    for (int64_t s = 0; s < part.num_splits; ++s) {
      if (counts(s)) total += share(s) * part.sum[s * padded_rows + row];
    }
    bool first = true;
    for (int64_t s = 0; s < part.num_splits; ++s) {
      if (!counts(s)) continue;
      const Vec::V factor = Vec::broadcast(share(s) / total);
      const float* src = part.partial + (s * all_rows + row) * cols;
      for (int64_t c = 0; c < batch.rank; c += Vec::kWidth) {
        Vec::V v = Vec::load(src + c) * factor;
        if (!first) v = v + load_part(mixed + c, batch.rank - c);
        store_part(mixed + c, v, batch.rank - c);
      }
      first = false;
    }
    for (int64_t c = 0; first && c < batch.rank; ++c) mixed[c] = __builtin_nanf("");
  }
}

// ---- Expanded form ----

template <class A>
void pack_expanded(const AttentionBatch& batch, const ExpandedBlock& block, int64_t head,
                   int64_t sub_block) {
  using Scalar = typename A::Scalar;
  const int64_t dims = batch.nope + batch.rope;
  const int64_t elements = round_up(dims, A::kDimStep) / A::kPair;
  const int64_t sub_blocks = (block.num_keys + A::kKeyBlock - 1) / A::kKeyBlock;
  const int64_t begin = sub_block * A::kKeyBlock;
  const int count = static_cast<int>(smaller(A::kKeyBlock, block.num_keys - begin));
  const int64_t index = head * sub_blocks + sub_block;
  const DType dtype = A::kPair == 1 ? DType::kF32 : DType::kBf16;

  typename A::Elem* rows =
      static_cast<typename A::Elem*>(block.packed_keys) + index * A::kKeyBlock * elements;
  const int64_t key_stride = batch.heads * batch.nope;
  const Scalar* nope = static_cast<const Scalar*>(block.keys) + begin * key_stride;
  for (int t = 0; t < count; ++t) {
    Scalar* dst = reinterpret_cast<Scalar*>(rows + t * elements);
    A::copy(nope + t * key_stride + head * batch.nope, dtype, batch.nope, dst);
    const uint8_t* latent = latent_row(batch, block.blocks, block.key_begin + begin + t);
    A::copy(latent + batch.rank * dtype_bytes(batch.cache_dtype), batch.cache_dtype, batch.rope,
            dst + batch.nope);
    for (int64_t d = dims; d < elements * A::kPair; ++d) dst[d] = 0;
  }
  typename A::Elem* values = static_cast<typename A::Elem*>(block.packed_values) +
                             index * (A::kKeyBlock / A::kPair) * round_up(batch.value, kQueryPanel);
  const int64_t value_stride = batch.heads * batch.value;
  A::pack_values(
      static_cast<const Scalar*>(block.values) + begin * value_stride + head * batch.value,
      value_stride, count, batch.value, values);
}

inline void divide_rows(const Sums& sums, const float* divisor) {
  for (int i = 0; i < sums.rows; ++i) {
    const Vec::V factor = Vec::broadcast(1.f / divisor[i]);
    float* row = sums.data + i * sums.stride;
    for (int64_t c = 0; c < sums.cols; c += Vec::kWidth) {
      store_part(row + c, load_part(row + c, sums.cols - c) * factor, sums.cols - c);
    }
  }
}

template <class A>
void expanded(const AttentionBatch& batch, const ExpandedBlock& block, int64_t head,
              int64_t query_block, AttentionWorker* worker) {
  const int64_t elements = round_up(batch.nope + batch.rope, A::kDimStep) / A::kPair;
  const int64_t first = query_block * kQueryBlock;
  const int rows = static_cast<int>(smaller(kQueryBlock, block.num_queries - first));
  const int64_t position = block.first_position + first;  // of the first row
  const int64_t visible = smaller(block.num_keys, position + rows - block.key_begin);
  if (visible <= 0) return;

  typename A::Elem* queries = static_cast<typename A::Elem*>(worker->queries);
  const float* q = batch.q + (block.token + first) * batch.q_stride + head * batch.q_head_stride;
  for (int p = 0; p < rows; p += kQueryPanel) {
    const auto row_of = [&](int i) -> QueryRow {
      if (p + i >= rows) return {nullptr, nullptr};
      const float* row = q + (p + i) * batch.q_stride;
      return {row, row + batch.nope};
    };
    pack_panel<A>(row_of, batch.nope, batch.rope, batch.scale, elements, worker->staging,
                  queries + p * elements);
  }
  const int64_t state = head * round_up(block.num_queries, kQueryBlock) + first;
  float *max = block.max + state, *sum = block.sum + state;
  if (block.key_begin == 0) reset(max, sum, kQueryBlock);
  Sums sums = {batch.out + (block.token + first) * batch.out_stride + head * batch.out_head_stride,
               batch.out_stride, rows, batch.value, false};

  const int64_t sub_blocks = (block.num_keys + A::kKeyBlock - 1) / A::kKeyBlock;
  typename A::Scope scope;
  Keys<A> keys;
  keys.value_step = A::value_step(batch.value);
  keys.value_panel = A::value_panel();
  alignas(64) float limits[kQueryBlock];
  for (int64_t key = 0; key < visible; key += A::kKeyBlock) {
    const int64_t index = head * sub_blocks + key / A::kKeyBlock;
    keys.count = static_cast<int>(smaller(A::kKeyBlock, visible - key));
    for (int t = 0; t < round_up(keys.count, 16); ++t) {
      keys.rows[t] = static_cast<const typename A::Elem*>(block.packed_keys) +
                     (index * A::kKeyBlock + t) * elements;
    }
    keys.values = static_cast<const typename A::Elem*>(block.packed_values) +
                  index * (A::kKeyBlock / A::kPair) * round_up(batch.value, kQueryPanel);
    const int64_t first_key = block.key_begin + key;
    const bool causal = position < first_key + keys.count - 1;
    for (int i = 0; causal && i < kQueryBlock; ++i) {
      limits[i] = static_cast<float>(position + i - first_key);
    }
    sums.first = first_key == 0;
    attend<A>(scope, keys, queries, elements, causal ? limits : nullptr, max, sum, sums, worker);
  }
  if (position + rows <= block.key_begin + block.num_keys) divide_rows(sums, sum);
}

template <class A>
constexpr AttentionKernels attention_kernels() {
  return {A::kPair, A::kDimStep, A::kKeyBlock, absorbed<A>, merge, pack_expanded<A>, expanded<A>};
}

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
