#include "ops_bindings.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "ops.h"
#include "sampling.h"
#include "tensor.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace moejet {
namespace {

constexpr auto kF32 = ElementType::kF32;
constexpr auto kBf16 = ElementType::kBf16;

const OpKernels& ops_of(const std::string& isa) { return kernel_table(resolve_isa(isa, ""))->ops; }

[[noreturn]] void refuse(const std::string& name, const std::string& value,
                         const std::string& remedy) {
  throw py::value_error(name + "=" + value + " " + remedy);
}

// body(begin, end) on shares of 0 .. n - 1, none larger than `share`: by the pool's workers if
// there is a pool, else by the caller.
template <class Body>
void for_shares(ThreadPool* pool, int64_t n, int64_t share, Body&& body) {
  const py::gil_scoped_release release;
  if (pool == nullptr || n <= share) {
    for (int64_t begin = 0; begin < n; begin += share) body(begin, std::min(begin + share, n));
    return;
  }
  std::atomic<int64_t> next{0};
  pool->acquire().run(1, [&](int, int) {
    for (int64_t begin; (begin = next.fetch_add(share, std::memory_order_relaxed)) < n;) {
      body(begin, std::min(begin + share, n));
    }
  });
}

// Rows per share such that it has about this many values.
int64_t rows_of_share(int64_t row_values) {
  constexpr int64_t kShareValues = 16 * 1024;
  return std::max<int64_t>(1, kShareValues / std::max<int64_t>(1, row_values));
}

// body(row) for all rows of about row_values values each.
template <class Body>
void for_each_row(ThreadPool* pool, int64_t n, int64_t row_values, Body&& body) {
  for_shares(pool, n, rows_of_share(row_values), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// A checked fp32 tensor.
class Floats : public Tensor {
 public:
  Floats(const py::object& object, const char* name, std::initializer_list<Dim> dims,
         bool writable = false)
      : Tensor(object, name, writable) {
    expect_type({kF32});
    expect_shape(dims);
    if (dims.size() == 1) expect_contiguous();
    if (dims.size() == 2) expect_rows();
    if (dims.size() > 2) expect_adjacent();
  }
  float* row(int64_t i) const { return static_cast<float*>(data()) + i * step(); }

 private:
  int64_t step() const { return num_dims() == 2 ? row_stride() : stride(0); }
};

constexpr bool kWritable = true;

// The same where Python may pass None.
std::optional<Floats>& optional_floats(std::optional<Floats>* floats, const py::object& object,
                                       const char* name, std::initializer_list<Tensor::Dim> dims,
                                       bool writable = false) {
  if (!object.is_none()) floats->emplace(object, name, dims, writable);
  return *floats;
}
float* row_or_null(const std::optional<Floats>& floats, int64_t i) {
  return floats ? floats->row(i) : nullptr;
}

// Expert or token ids to write, [rows, K] of i32.
class Ids : public Tensor {
 public:
  Ids(const py::object& object, const char* name, int64_t rows) : Tensor(object, name, kWritable) {
    expect_type({ElementType::kI32});
    expect_shape({{"T", rows}, {"K", -1}});
    expect_rows();
  }
  int32_t* row(int64_t i) const { return static_cast<int32_t*>(data()) + i * row_stride(); }
};

// Indices [T] of i32 or i64, each in 0 .. limit - 1.
std::vector<int64_t> indices_argument(const py::object& object, const char* name, int64_t size,
                                      int64_t limit) {
  const Tensor tensor(object, name);
  tensor.expect_type({ElementType::kI32, ElementType::kI64});
  tensor.expect_shape({{"T", size}});
  std::vector<int64_t> indices(static_cast<size_t>(tensor.dim(0)));
  for (size_t i = 0; i < indices.size(); ++i) {
    const int64_t at = static_cast<int64_t>(i) * tensor.stride(0);
    indices[i] = tensor.type() == ElementType::kI32
                     ? static_cast<const int32_t*>(tensor.data())[at]
                     : static_cast<const int64_t*>(tensor.data())[at];
    if (indices[i] < 0 || indices[i] >= limit) {
      throw py::value_error(std::string(name) + "[" + std::to_string(i) +
                            "]=" + std::to_string(indices[i]) + " must be from 0 to " +
                            std::to_string(limit - 1));
    }
  }
  return indices;
}

void embed(const py::object& table, const py::object& token_ids, const py::object& out,
           ThreadPool* pool, const std::string& isa) {
  const OpKernels& ops = ops_of(isa);
  const Tensor weight(table, "table");
  weight.expect_type({kF32, kBf16});
  weight.expect_shape({{"V", -1}, {"D", -1}});
  weight.expect_rows();
  const std::vector<int64_t> tokens = indices_argument(token_ids, "token_ids", -1, weight.dim(0));
  const int64_t n = static_cast<int64_t>(tokens.size()), width = weight.dim(1);
  const Floats result(out, "out", {{"T", n}, {"D", width}}, kWritable);
  const EmbedTable embedding{weight.data(), weight.dtype(), weight.dim(0), width,
                             weight.row_stride()};
  for_each_row(pool, n, width, [&](int64_t t) {
    ops.embed_row(embedding, tokens[static_cast<size_t>(t)], result.row(t));
  });
}

void rms_norm(const py::object& x, const py::object& weight, float eps, const py::object& out,
              ThreadPool* pool, const std::string& isa) {
  const OpKernels& ops = ops_of(isa);
  const Floats input(x, "x", {{"T", -1}, {"D", -1}});
  const int64_t n = input.dim(0), width = input.dim(1);
  const Floats scale(weight, "weight", {{"D", width}});
  const Floats result(out, "out", {{"T", n}, {"D", width}}, kWritable);
  const RmsNorm norm{scale.row(0), width, eps};
  for_each_row(pool, n, width,
               [&](int64_t t) { ops.rms_norm_row(norm, input.row(t), result.row(t)); });
}

// h += a + b, then out = rms_norm(h) if there is a weight.
void add_rms_norm(const py::object& h, const py::object& a, const py::object& b,
                  const py::object& weight, float eps, const py::object& out, ThreadPool* pool,
                  const std::string& isa) {
  const OpKernels& ops = ops_of(isa);
  const Floats hidden(h, "h", {{"T", -1}, {"D", -1}}, kWritable);
  const int64_t n = hidden.dim(0), width = hidden.dim(1);
  const Floats first(a, "a", {{"T", n}, {"D", width}});
  std::optional<Floats> second, scale, result;
  optional_floats(&second, b, "b", {{"T", n}, {"D", width}});
  if (weight.is_none() != out.is_none()) {
    throw py::value_error("weight and out: pass both (sum and norm) or neither (sum only)");
  }
  optional_floats(&scale, weight, "weight", {{"D", width}});
  optional_floats(&result, out, "out", {{"T", n}, {"D", width}}, kWritable);
  const RmsNorm norm{row_or_null(scale, 0), width, eps};
  for_each_row(pool, n, width, [&](int64_t t) {
    if (result) {
      ops.add_rms_norm_row(norm, first.row(t), row_or_null(second, t), hidden.row(t),
                           result->row(t));
    } else {
      ops.add_row(width, first.row(t), row_or_null(second, t), hidden.row(t));
    }
  });
}

void check_rope_dim(const char* name, int64_t dim) {
  if (dim % 2 == 0 && dim <= kMaxRopeDim) return;
  refuse(std::string(name) + ".shape[-1]", std::to_string(dim),
         "must be even and at most " + std::to_string(kMaxRopeDim));
}

void rope(const py::object& x, const py::object& cos_sin, bool interleave, const py::object& out,
          ThreadPool* pool, const std::string& isa) {
  const OpKernels& ops = ops_of(isa);
  const Floats input(x, "x", {{"T", -1}, {"H", -1}, {"R", -1}});
  const int64_t n = input.dim(0), heads = input.dim(1), dim = input.dim(2);
  check_rope_dim("x", dim);
  const Floats angles(cos_sin, "cos_sin", {{"T", n}, {"R", dim}});
  const Floats result(out, "out", {{"T", n}, {"H", heads}, {"R", dim}}, kWritable);
  for_each_row(pool, n, heads * dim, [&](int64_t t) {
    ops.rope_row({angles.row(t), dim, interleave, heads, input.row(t), input.stride(1),
                  result.row(t), result.stride(1)});
  });
}

void store_latent(const py::object& c_kv, const py::object& k_pe, const py::object& cache,
                  const py::object& slots, const py::object& norm_weight, float eps,
                  const py::object& cos_sin, bool interleave, ThreadPool* pool,
                  const std::string& isa) {
  const OpKernels& ops = ops_of(isa);
  const Floats latent(c_kv, "c_kv", {{"T", -1}, {"C", -1}});
  const int64_t n = latent.dim(0), rank = latent.dim(1);
  const Floats keys(k_pe, "k_pe", {{"T", n}, {"R", -1}});
  const int64_t rope_dim = keys.dim(1);
  const Tensor target(cache, "cache", kWritable);
  const int64_t row_bytes = check_latent_cache(target, rank, rope_dim);
  const std::vector<int64_t> rows =
      indices_argument(slots, "slots", n, target.dim(0) * target.dim(1));
  std::optional<Floats> scale, angles;
  optional_floats(&scale, norm_weight, "norm_weight", {{"C", rank}});
  optional_floats(&angles, cos_sin, "cos_sin", {{"T", n}, {"R", rope_dim}});
  if (angles) check_rope_dim("k_pe", rope_dim);
  for_each_row(pool, n, rank + rope_dim, [&](int64_t t) {
    LatentRow row{};
    row.c_kv = latent.row(t);
    row.k_pe = keys.row(t);
    row.rank = rank;
    row.rope_dim = rope_dim;
    row.norm_weight = row_or_null(scale, 0);
    row.eps = eps;
    row.cos_sin = row_or_null(angles, t);
    row.interleave = interleave;
    row.out = static_cast<uint8_t*>(target.data()) + rows[static_cast<size_t>(t)] * row_bytes;
    row.out_dtype = target.dtype();
    ops.store_latent_row(row);
  });
}

void router_logits(const py::object& x, const py::object& weight, const py::object& out,
                   ThreadPool* pool, const std::string& isa) {
  const OpKernels& ops = ops_of(isa);
  const Floats input(x, "x", {{"T", -1}, {"D", -1}});
  const int64_t n = input.dim(0), width = input.dim(1);
  const Tensor matrix(weight, "weight");
  matrix.expect_type({kF32, kBf16});
  matrix.expect_shape({{"E", -1}, {"D", width}});
  matrix.expect_rows();
  const int64_t experts = matrix.dim(0);
  const Floats result(out, "out", {{"T", n}, {"E", experts}}, kWritable);
  const RouterMatrix router{matrix.data(), matrix.dtype(),     matrix.row_stride(),
                            width,         input.row(0),       input.row_stride(),
                            result.row(0), result.row_stride()};
  // One token: shares of experts, a multiple of 8. More: shares of tokens with all experts.
  constexpr int64_t kTokenShare = 48;
  const int64_t expert_share = std::max<int64_t>(1, rows_of_share(width) / 2) * 8;
  const bool one = n == 1;
  for_shares(pool, one ? experts : n, one ? expert_share : kTokenShare,
             [&](int64_t begin, int64_t end) {
               if (one) ops.router_logits(router, 0, 1, begin, end);
               if (!one) ops.router_logits(router, begin, end, 0, experts);
             });
}

Scoring parse_scoring(const std::string& name) {
  if (name == "softmax") return Scoring::kSoftmax;
  if (name == "sigmoid") return Scoring::kSigmoid;
  refuse("scoring", "'" + name + "'", "is unknown: use softmax or sigmoid");
}

GroupRank parse_group_rank(const std::string& name) {
  if (name == "none") return GroupRank::kNone;
  if (name == "best") return GroupRank::kBest;
  if (name == "best_two") return GroupRank::kBestTwo;
  refuse("group_rank", "'" + name + "'", "is unknown: use none, best or best_two");
}

void check_choice(const RouterChoice& c) {
  const std::string experts = std::to_string(c.num_experts);
  if (c.num_experts < 1 || c.num_experts > kMaxRouterExperts) {
    refuse("logits.shape[1]", experts, "must be from 1 to " + std::to_string(kMaxRouterExperts));
  }
  if (c.top_k < 1 || c.top_k > c.num_experts) {
    refuse("ids.shape[1]", std::to_string(c.top_k), "must be from 1 to " + experts + " experts");
  }
  if (c.group_rank == GroupRank::kNone) return;
  if (c.num_groups < 1 || c.num_experts % c.num_groups != 0) {
    refuse("num_groups", std::to_string(c.num_groups), "must divide " + experts + " experts");
  }
  if (c.top_groups < 1 || c.top_groups > c.num_groups) {
    refuse("top_groups", std::to_string(c.top_groups),
           "must be from 1 to num_groups=" + std::to_string(c.num_groups));
  }
}

void router_topk(const py::object& logits, const py::object& ids, const py::object& weights,
                 const std::string& scoring, const std::string& group_rank, int64_t num_groups,
                 int64_t top_groups, bool norm_topk_prob, float scaling_factor,
                 const py::object& bias, ThreadPool* pool, const std::string& isa) {
  const OpKernels& ops = ops_of(isa);
  const Floats input(logits, "logits", {{"T", -1}, {"E", -1}});
  const int64_t n = input.dim(0);
  const Ids chosen(ids, "ids", n);
  const int64_t top_k = chosen.dim(1);
  const Floats result(weights, "weights", {{"T", n}, {"K", top_k}}, kWritable);
  std::optional<Floats> offsets;
  const float* added =
      row_or_null(optional_floats(&offsets, bias, "bias", {{"E", input.dim(1)}}), 0);
  const RouterChoice choice = router_choice(input.dim(1), top_k, scoring, group_rank, num_groups,
                                            top_groups, norm_topk_prob, scaling_factor, added);
  // A row costs more than its number of values suggests.
  for_each_row(pool, n, 16 * choice.num_experts, [&](int64_t t) {
    ops.router_topk_row(choice, input.row(t), chosen.row(t), result.row(t));
  });
}

// logits [B, V] with V >= 1.
class Logits : public Floats {
 public:
  explicit Logits(const py::object& object) : Floats(object, "logits", {{"B", -1}, {"V", -1}}) {
    if (dim(1) < 1 || dim(1) > INT32_MAX) {
      refuse("logits.shape[1]", std::to_string(dim(1)), "must be from 1 to 2^31 - 1");
    }
  }
};

std::vector<int64_t> argmax(const py::object& logits, ThreadPool* pool, const std::string& isa) {
  const OpKernels& ops = ops_of(isa);
  const Logits input(logits);
  std::vector<int64_t> result(static_cast<size_t>(input.dim(0)));
  for_each_row(pool, input.dim(0), input.dim(1), [&](int64_t b) {
    const Argmax best = ops.argmax_row(input.row(b), input.dim(1));
    result[static_cast<size_t>(b)] = best.bad ? kBadLogits : best.index;
  });
  return result;
}

std::vector<double> top_logits(const py::object& logits, const py::object& ids,
                               const py::object& values, ThreadPool* pool, const std::string& isa) {
  const OpKernels& ops = ops_of(isa);
  const Logits input(logits);
  const int64_t n = input.dim(0), vocab = input.dim(1);
  const Ids chosen(ids, "ids", n);
  const int64_t k = chosen.dim(1);
  if (k > std::min(vocab, kMaxTopLogits)) {
    refuse("ids.shape[1]", std::to_string(k),
           "must be at most " + std::to_string(std::min(vocab, kMaxTopLogits)));
  }
  const Floats result(values, "values", {{"B", n}, {"K", k}}, kWritable);
  std::vector<double> log_sum(static_cast<size_t>(n));
  for_each_row(pool, n, vocab, [&](int64_t b) {
    const float max = ops.argmax_row(input.row(b), vocab).value;
    log_sum[static_cast<size_t>(b)] = max + std::log(ops.exp_sum_row(input.row(b), vocab, max, 1.));
    if (k > 0) ops.topk_row(input.row(b), vocab, k, chosen.row(b), result.row(b));
  });
  return log_sum;
}

std::vector<int64_t> sample(const py::object& logits, const std::vector<double>& temperature,
                            const std::vector<int64_t>& top_k, const std::vector<double>& top_p,
                            const std::vector<double>& min_p, const std::vector<double>& u,
                            ThreadPool* pool, const std::string& isa) {
  const OpKernels& ops = ops_of(isa);
  const Logits input(logits);
  const size_t n = static_cast<size_t>(input.dim(0));
  for (const size_t size :
       {temperature.size(), top_k.size(), top_p.size(), min_p.size(), u.size()}) {
    if (size != n) {
      throw py::value_error(
          "temperature, top_k, top_p, min_p and u must have one entry for each of " +
          std::to_string(n) + " rows of logits, got " + std::to_string(size));
    }
  }
  const auto check = [](bool ok, const char* name, size_t i, double value, const char* remedy) {
    if (!ok)
      refuse(std::string(name) + "[" + std::to_string(i) + "]", std::to_string(value), remedy);
  };
  for (size_t i = 0; i < n; ++i) {
    check(temperature[i] >= 0., "temperature", i, temperature[i], "must be at least 0");
    check(top_k[i] >= 0, "top_k", i, static_cast<double>(top_k[i]), "must be at least 0 (0: all)");
    check(top_p[i] > 0. && top_p[i] <= 1., "top_p", i, top_p[i], "must be above 0, at most 1");
    check(min_p[i] >= 0. && min_p[i] <= 1., "min_p", i, min_p[i], "must be from 0 to 1");
    check(u[i] >= 0. && u[i] < 1., "u", i, u[i], "must be at least 0 and below 1");
  }
  std::vector<int64_t> result(n);
  for_each_row(pool, input.dim(0), input.dim(1), [&](int64_t b) {
    const size_t i = static_cast<size_t>(b);
    result[i] = sample_row(ops, input.row(b), input.dim(1),
                           {temperature[i], top_k[i], top_p[i], min_p[i], u[i]});
  });
  return result;
}

}  // namespace

RouterChoice router_choice(int64_t num_experts, int64_t top_k, const std::string& scoring,
                           const std::string& group_rank, int64_t num_groups, int64_t top_groups,
                           bool norm_topk_prob, float scaling_factor, const float* bias) {
  const RouterChoice choice{
      num_experts, top_k,      parse_scoring(scoring), parse_group_rank(group_rank),
      num_groups,  top_groups, norm_topk_prob,         scaling_factor,
      bias};
  check_choice(choice);
  return choice;
}

void register_ops(py::module_& m) {
  m.attr("BAD_LOGITS") = kBadLogits;
  m.attr("UNDECIDED") = kUndecided;
  m.attr("MAX_TOP_LOGITS") = kMaxTopLogits;
  m.attr("MAX_ROPE_DIM") = kMaxRopeDim;
  m.attr("MAX_ROUTER_EXPERTS") = kMaxRouterExperts;
  const py::arg_v pool = py::arg("pool") = py::none();
  const py::arg_v isa = py::arg("isa") = "auto";
  m.def("embed", &embed, py::arg("table"), py::arg("token_ids"), py::arg("out"), pool, isa);
  m.def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("out"),
        pool, isa);
  m.def("add_rms_norm", &add_rms_norm, py::arg("h"), py::arg("a"), py::arg("b") = py::none(),
        py::arg("weight") = py::none(), py::arg("eps") = 0.f, py::arg("out") = py::none(), pool,
        isa);
  m.def("rope", &rope, py::arg("x"), py::arg("cos_sin"), py::arg("interleave"), py::arg("out"),
        pool, isa);
  m.def("store_latent", &store_latent, py::arg("c_kv"), py::arg("k_pe"), py::arg("cache"),
        py::arg("slots"), py::arg("norm_weight") = py::none(), py::arg("eps") = 0.f,
        py::arg("cos_sin") = py::none(), py::arg("interleave") = true, pool, isa);
  m.def("router_logits", &router_logits, py::arg("x"), py::arg("weight"), py::arg("out"), pool,
        isa);
  m.def("router_topk", &router_topk, py::arg("logits"), py::arg("ids"), py::arg("weights"),
        py::arg("scoring"), py::arg("group_rank"), py::arg("num_groups"), py::arg("top_groups"),
        py::arg("norm_topk_prob"), py::arg("scaling_factor"), py::arg("bias") = py::none(), pool,
        isa);
  m.def("argmax", &argmax, py::arg("logits"), pool, isa);
  m.def("top_logits", &top_logits, py::arg("logits"), py::arg("ids"), py::arg("values"), pool, isa);
  m.def("sample", &sample, py::arg("logits"), py::arg("temperature"), py::arg("top_k"),
        py::arg("top_p"), py::arg("min_p"), py::arg("u"), pool, isa);
}

}  // namespace moejet
