// Attention over the latent cache, as templates over an arithmetic; see attention_kernels.h for the
// two forms and what each function does.
//
// Both products run through the same operands:
//   scores  S[key][row]    = sum_d K[key][d] Q[d][row]     16 query rows side by side
//   mix     O[row][column] = sum_t P[t][row] V[t][column]  16 columns side by side
// so a key row is read where it lies, the softmax runs over whole vectors (each lane is a query
// row), and its weights are the next product's operand as they stand. In bf16, an element holds two
// neighbours in the dimension that is summed: keys lie that way already, queries are packed so once
// per task, weights when they are rounded, and values are interleaved when they are loaded
// (vectors) or once per key block (tiles).
//
// An arithmetic is a struct with
//   Elem, Scalar, kPair      element, the scalars in it, and their number
//   kDimStep, kKeyBlock      see AttentionKernels
//   kKeyStep                 weights are padded with zeros to so many keys
//   kGroup                   so many key rows must lie equally far apart (1: anywhere)
//   kValueRows               values are read as rows, like keys; else set_values arranges them
//   Scope                    lives while a task uses scores and mix (tile configuration)
//   exp2(x)                  weights from scores
//   copy(src, dtype, n, dst) n values, fp32 or bf16, to scalars
//   pack_queries(staging, ld, elements, dst)   16 rows of fp32 to [element][16 rows]
//   store_weights, finish_weights              weights of a key pair; of all keys
//   scores, mix              the two products
//   mix_steps(...)           how often mix calls Ahead::step
#pragma once

#ifndef MOEJET_ISA_NS
#error "attention-inl.h belongs into a file of isa/"
#endif

#include "latent-fp8-inl.h"
#include "vec-inl.h"

namespace moejet {
namespace MOEJET_ISA_NS {

constexpr int kVecs = kQueryPanel / Vec::kWidth;  // of one panel

// Memory to bring into L2 while computing: rows of `bytes` bytes, a few cache lines at a time.
struct Ahead {
  const uint8_t* const* row;
  int64_t bytes, offset;
  int64_t lines_left;
  int lines_per_step;
  void step() {
    for (int i = 0; i < lines_per_step; ++i) {
      __builtin_prefetch(*row + offset, 0, 2);
      offset += 64;
      row += offset >= bytes;
      offset = offset >= bytes ? 0 : offset;
    }
    lines_left -= lines_per_step;
    lines_per_step = lines_left >= lines_per_step ? lines_per_step : 0;
  }
};

// The keys of one step and their values.
template <class A>
struct Keys {
  using Elem = typename A::Elem;
  int count;
  const Elem* rows[kMaxKeyBlock + 32];  // at least 16 behind the last are readable
  // kValueRows: rows (the last once more if their number is odd). Else: `values`, where columns
  // 16 p .. of all keys begin at p value_panel.
  const Elem* value_rows[kMaxKeyBlock + 1];
  const Elem* values;
  int64_t value_panel;
  Ahead ahead;  // what mix fetches meanwhile
};

// Running sums of a block of query rows: [rows, cols], rows `stride` elements apart.
struct Sums {
  float* data;
  int64_t stride;
  int rows;
  int64_t cols;
  bool first;  // nothing in data yet
};

// ---- Online softmax ----

// One panel: scores become weights, max and sum move on; decay is what earlier sums are worth now.
// limits: the last key of the block that each row sees; null if all rows see all keys.
template <class A>
void softmax_panel(int count, float* scores, const float* limits, float* max, float* sum,
                   float* decay, typename A::Elem* weights) {
  const Vec::V masked = Vec::broadcast(kMaskedScore);
  for (int lane = 0; lane < kQueryPanel; lane += Vec::kWidth) {
    float* s = scores + lane;
    const Vec::V before = Vec::load(max + lane);
    Vec::V m = before;
    for (int t = 0; t < count; ++t) {
      Vec::V score = Vec::load(s + t * kQueryPanel);
      if (limits != nullptr) {
        score = Vec::select_greater(Vec::broadcast(static_cast<float>(t)), Vec::load(limits + lane),
                                    masked, score);
        Vec::store(s + t * kQueryPanel, score);
      }
      m = Vec::max(score, m);
    }
    const auto weight = [&](int t) { return A::exp2(Vec::load(s + t * kQueryPanel) - m); };
    const Vec::V kept = A::exp2(before - m);
    Vec::V total = Vec::load(sum + lane) * kept;
    typename A::Elem* w = weights + lane;
    int t = 0;
    for (; t + A::kPair <= count; t += A::kPair, w += kQueryPanel) {
      const Vec::V first = weight(t);
      total = total + first;
      Vec::V second = Vec::zero();
      if constexpr (A::kPair == 2) {
        second = weight(t + 1);
        total = total + second;
      }
      A::store_weights(w, first, second);
    }
    for (; t < round_up(count, A::kKeyStep); t += A::kPair, w += kQueryPanel) {
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
void attend(typename A::Scope& scope, const typename A::Elem* queries, int64_t elements,
            const float* limits, float* max, float* sum, const Sums& sums, Keys<A>* keys,
            AttentionWorker* worker) {
  const int panels = (sums.rows + kQueryPanel - 1) / kQueryPanel;
  typename A::Elem* weights = static_cast<typename A::Elem*>(worker->weights);
  alignas(64) float decay[kQueryBlock];
  A::scores(scope, *keys, queries, elements, panels, worker);
  for (int p = 0; p < panels; ++p) {
    const int row = p * kQueryPanel;
    softmax_panel<A>(keys->count, worker->scores + row * A::kKeyBlock,
                     limits == nullptr ? nullptr : limits + row, max + row, sum + row, decay + row,
                     weights + row * (A::kKeyBlock / A::kPair));
  }
  A::finish_weights(weights, panels, keys->count);
  A::mix(scope, decay, sums, keys, worker);
}

inline void reset(float* max, float* sum, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) {
    max[i] = kMaskedScore;
    sum[i] = 0.f;
  }
}

// The two parts of a query row; null for a row of zeros.
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

// n values to scalars, then zeros up to `padded`.
template <class A>
void copy_padded(const void* src, DType dtype, int64_t n, int64_t padded, typename A::Scalar* dst) {
  A::copy(src, dtype, n, dst);
  for (int64_t i = n; i < padded; ++i) dst[i] = 0;
}

// The part of a latent row from k_pe on, up to `padded` scalars.
template <class A>
void copy_k_pe(const AttentionBatch& batch, const uint8_t* row, int64_t padded,
               typename A::Scalar* dst) {
  const DType dtype = batch.cache_dtype == DType::kFp8 ? DType::kBf16 : batch.cache_dtype;
  copy_padded<A>(row + batch.latent.k_pe, dtype, batch.rope, padded, dst);
}
// A whole latent row.
template <class A>
void copy_latent(const AttentionBatch& batch, const uint8_t* row, int64_t padded,
                 typename A::Scalar* dst) {
  if (batch.cache_dtype == DType::kFp8) {
    decode_latent(row, batch.latent, batch.rank, dst);
    copy_k_pe<A>(batch, row, padded - batch.rank, dst + batch.rank);
  } else {
    copy_padded<A>(row, batch.cache_dtype, batch.rank + batch.rope, padded, dst);
  }
}

// ---- Absorbed form ----

// Pointers to the latent rows of keys [begin, begin + count).
inline void latent_rows(const AttentionBatch& batch, const int64_t* blocks, int64_t begin,
                        int64_t count, const uint8_t** rows) {
  const int64_t bytes = batch.latent.bytes;
  int64_t block = begin / batch.block_size, offset = begin % batch.block_size;
  for (int64_t t = 0; t < count; ++block, offset = 0) {
    const uint8_t* p = static_cast<const uint8_t*>(batch.cache) +
                       (blocks[block] * batch.block_size + offset) * bytes;
    for (; offset < batch.block_size && t < count; ++offset, p += bytes) rows[t++] = p;
  }
}

// The keys of one step, `source` their latent rows, used in place where the arithmetic can read
// them so. The rows behind the last are those of the next step, if `available` counts them.
template <class A>
void set_latents(const AttentionBatch& batch, const uint8_t* const* source, int count,
                 int available, int64_t elements, AttentionWorker* worker, Keys<A>* keys) {
  using Elem = typename A::Elem;
  const int64_t dims = batch.rank + batch.rope;
  const bool fits =
      dtype_bytes(batch.cache_dtype) == sizeof(typename A::Scalar) && dims == elements * A::kPair;
  Elem* copies = static_cast<Elem*>(worker->keys);
  keys->count = count;
  for (int group = 0; group < count; group += A::kGroup) {
    bool in_place = fits && group + A::kGroup <= count;
    for (int t = group + 2; in_place && t < group + A::kGroup; ++t) {
      in_place = source[t] - source[t - 1] == source[t - 1] - source[t - 2];
    }
    for (int t = group; t < group + A::kGroup && t < count; ++t) {
      keys->rows[t] = in_place ? reinterpret_cast<const Elem*>(source[t]) : copies + t * elements;
      if (in_place) continue;
      copy_latent<A>(batch, source[t], elements * A::kPair,
                     reinterpret_cast<typename A::Scalar*>(copies + t * elements));
    }
  }
  // A group that is not whole consists of copies, whole it must be readable.
  for (int t = count; t < round_up(count, 16) + 16; ++t) {
    keys->rows[t] = A::kGroup > 1           ? copies + t % A::kKeyBlock * elements
                    : fits && t < available ? reinterpret_cast<const Elem*>(source[t])
                                            : keys->rows[count - 1];
  }
  if constexpr (A::kValueRows) {
    for (int t = 0; t < count; ++t) keys->value_rows[t] = keys->rows[t];
    keys->value_rows[count] = keys->rows[count - 1];
  } else {
    A::set_values(reinterpret_cast<const typename A::Scalar* const*>(keys->rows), count, batch.rank,
                  static_cast<Elem*>(worker->values), keys);
  }
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
inline int64_t split_begin(const AbsorbedPart& part, int64_t split) {
  const int64_t context = part.first_position + part.num_queries;
  if (split == part.num_splits) return context;
  return part.split_keys > 0 ? split * part.split_keys
                             : context * split / part.num_splits / 16 * 16;
}

// Rows to fetch during the last step before keys [begin, end): at most one key block.
template <class A>
int rows_ahead(const AttentionBatch& batch, const AbsorbedPart& part, int64_t begin, int64_t end,
               const uint8_t** rows) {
  const int64_t count = smaller(A::kKeyBlock, end - begin);
  latent_rows(batch, part.blocks, begin, count, rows);
  return static_cast<int>(count);
}
template <class A>
int rows_of_next_task(const AttentionBatch& batch, const AttentionWorker& worker,
                      const uint8_t** rows) {
  if (worker.next_part == nullptr) return 0;
  const AbsorbedPart& part = *worker.next_part;
  return rows_ahead<A>(batch, part, split_begin(part, worker.next_split),
                       split_begin(part, worker.next_split + 1), rows);
}

template <class A>
void absorbed(const AttentionBatch& batch, const AbsorbedPart& part, int64_t group, int64_t split,
              AttentionWorker* worker) {
  using Elem = typename A::Elem;
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
  const auto position = [&](int64_t row) {
    return part.first_position + (first_row + row) / batch.heads;
  };
  const int64_t begin = split_begin(part, split);
  const int64_t end = smaller(split_begin(part, split + 1), position(rows - 1) + 1);
  const int64_t state = split * round_up(all_rows, kQueryPanel) + first_row;
  float *max = part.max + state, *sum = part.sum + state;
  float* partial = part.partial + (split * all_rows + first_row) * cols;
  reset(max, sum, round_up(rows, kQueryPanel));

  typename A::Scope scope;
  Keys<A> keys;
  const uint8_t* source[2 * kMaxKeyBlock];
  alignas(64) float limits[kQueryBlock];
  for (int64_t key = begin; key < end; key += A::kKeyBlock) {
    const int count = static_cast<int>(smaller(A::kKeyBlock, end - key));
    latent_rows(batch, part.blocks, key, count, source);
    const int ahead = key + count < end
                          ? rows_ahead<A>(batch, part, key + count, end, source + count)
                          : rows_of_next_task<A>(batch, *worker, source + count);
    set_latents<A>(batch, source, count, count + ahead, elements, worker, &keys);
    const int64_t bytes = batch.latent.bytes;
    const int64_t lines = ahead * ((bytes + 63) / 64);
    const int64_t steps = A::mix_steps(rows, cols, count);
    keys.ahead = {source + count, bytes, 0, lines, static_cast<int>((lines + steps - 1) / steps)};
    for (int row = 0; row < rows; row += kQueryBlock) {
      const int block_rows = rows - row < kQueryBlock ? rows - row : kQueryBlock;
      if (position(row + block_rows - 1) < key) continue;
      const bool causal = position(row) < key + count - 1;
      for (int i = 0; causal && i < kQueryBlock; ++i) {
        limits[i] = static_cast<float>(position(row + i) - key);
      }
      const Sums sums = {partial + row * cols, cols, block_rows, cols, key == begin};
      attend<A>(scope, static_cast<const Elem*>(worker->queries) + row * elements, elements,
                causal ? limits : nullptr, max + row, sum + row, sums, &keys, worker);
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
    const auto max_of = [&](int64_t s) { return part.max[s * padded_rows + row]; };
    const auto sum_of = [&](int64_t s) { return part.sum[s * padded_rows + row]; };
    const auto counts = [&](int64_t s) {
      return max_of(s) > kMaskedScore || sum_of(s) != sum_of(s);
    };
    float largest = kMaskedScore;
    for (int64_t s = 0; s < part.num_splits; ++s) {
      largest = max_of(s) > largest ? max_of(s) : largest;
    }
    const auto share = [&](int64_t s) {
      float lanes[Vec::kWidth];
      Vec::store(lanes, Vec::exp2(Vec::broadcast(max_of(s) - largest)));
      return lanes[0];
    };
    float total = 0.f;
    for (int64_t s = 0; s < part.num_splits; ++s) {
      if (counts(s)) total += share(s) * sum_of(s);
    }
    float* mixed = part.mixed + row * batch.rank;
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

// Packed keys and values of sub-block `index` = head * sub-blocks + sub-block.
template <class A>
typename A::Elem* packed_keys(const ExpandedBlock& block, int64_t index, int64_t elements) {
  return static_cast<typename A::Elem*>(block.packed_keys) + index * A::kKeyBlock * elements;
}
template <class A>
typename A::Elem* packed_values(const AttentionBatch& batch, const ExpandedBlock& block,
                                int64_t index) {
  return static_cast<typename A::Elem*>(block.packed_values) +
         index * (A::kKeyBlock / A::kPair) * round_up(batch.value, kQueryPanel);
}

template <class A>
void pack_expanded(const AttentionBatch& batch, const ExpandedBlock& block, int64_t head,
                   int64_t sub_block) {
  using Elem = typename A::Elem;
  using Scalar = typename A::Scalar;
  const DType dtype = A::kPair == 1 ? DType::kF32 : DType::kBf16;
  const int64_t elements = round_up(batch.nope + batch.rope, A::kDimStep) / A::kPair;
  const int64_t sub_blocks = (block.num_keys + A::kKeyBlock - 1) / A::kKeyBlock;
  const int64_t index = head * sub_blocks + sub_block;
  const int64_t begin = sub_block * A::kKeyBlock;
  const int count = static_cast<int>(smaller(A::kKeyBlock, block.num_keys - begin));
  const uint8_t* latents[kMaxKeyBlock];
  latent_rows(batch, block.blocks, block.key_begin + begin, count, latents);

  Elem* rows = packed_keys<A>(block, index, elements);
  const Scalar* keys =
      static_cast<const Scalar*>(block.keys) + (begin * batch.heads + head) * batch.nope;
  for (int t = 0; t < count; ++t) {
    Scalar* dst = reinterpret_cast<Scalar*>(rows + t * elements);
    A::copy(keys + t * batch.heads * batch.nope, dtype, batch.nope, dst);
    copy_k_pe<A>(batch, latents[t], elements * A::kPair - batch.nope, dst + batch.nope);
  }

  Elem* packed = packed_values<A>(batch, block, index);
  const Scalar* values =
      static_cast<const Scalar*>(block.values) + (begin * batch.heads + head) * batch.value;
  const int64_t stride = batch.heads * batch.value, width = round_up(batch.value, kQueryPanel);
  if constexpr (A::kValueRows) {
    for (int t = 0; t < count; ++t) {
      copy_padded<A>(values + t * stride, dtype, batch.value, width,
                     reinterpret_cast<Scalar*>(packed) + t * width);
    }
  } else {
    const Scalar* value_rows[kMaxKeyBlock];
    for (int t = 0; t < count; ++t) value_rows[t] = values + t * stride;
    Keys<A> unused;
    A::set_values(value_rows, count, batch.value, packed, &unused);
  }
}

template <class A>
void set_packed(const AttentionBatch& batch, const ExpandedBlock& block, int64_t index,
                int64_t elements, int count, Keys<A>* keys) {
  const typename A::Elem* rows = packed_keys<A>(block, index, elements);
  keys->count = count;
  for (int t = 0; t < round_up(count, 16) + 16; ++t) keys->rows[t] = rows + t * elements;
  keys->values = packed_values<A>(batch, block, index);
  keys->value_panel = A::kKeyBlock / A::kPair * kQueryPanel;
  if constexpr (A::kValueRows) {
    const int64_t width = round_up(batch.value, kQueryPanel) / A::kPair;
    for (int t = 0; t < count; ++t) keys->value_rows[t] = keys->values + t * width;
    keys->value_rows[count] = keys->value_rows[count - 1];
  }
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
  using Elem = typename A::Elem;
  const int64_t elements = round_up(batch.nope + batch.rope, A::kDimStep) / A::kPair;
  const int64_t first = query_block * kQueryBlock;
  const int rows = static_cast<int>(smaller(kQueryBlock, block.num_queries - first));
  const int64_t position = block.first_position + first;  // of the first row
  const int64_t visible = smaller(block.num_keys, position + rows - block.key_begin);
  if (visible <= 0) return;

  Elem* queries = static_cast<Elem*>(worker->queries);
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
  keys.ahead = {};
  alignas(64) float limits[kQueryBlock];
  for (int64_t key = 0; key < visible; key += A::kKeyBlock) {
    const int count = static_cast<int>(smaller(A::kKeyBlock, visible - key));
    set_packed<A>(batch, block, head * sub_blocks + key / A::kKeyBlock, elements, count, &keys);
    const int64_t first_key = block.key_begin + key;
    const bool causal = position < first_key + count - 1;
    for (int i = 0; causal && i < kQueryBlock; ++i) {
      limits[i] = static_cast<float>(position + i - first_key);
    }
    sums.first = first_key == 0;
    attend<A>(scope, queries, elements, causal ? limits : nullptr, max, sum, sums, &keys, worker);
  }
  if (position + rows <= block.key_begin + block.num_keys) divide_rows(sums, sum);
}

template <class A>
void decode(const AttentionBatch& batch, const uint8_t* row, void* c_kv) {
  decode_latent(row, batch.latent, batch.rank, static_cast<typename A::Scalar*>(c_kv));
}

template <class A>
constexpr AttentionKernels attention_kernels() {
  return {A::kPair, A::kDimStep,      A::kKeyBlock, absorbed<A>,
          merge,    pack_expanded<A>, expanded<A>,  decode<A>};
}

}  // namespace MOEJET_ISA_NS
}  // namespace moejet
