// Python's view of Program: records on torch buffers, keeps them alive, checks every step.
#include "program_bindings.h"

#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "attention_bindings.h"
#include "ops_bindings.h"
#include "program.h"
#include "tensor.h"

namespace py = pybind11;

namespace moejet {
namespace {

// A recorded program with what it refers to. Sizes that steps are checked against are collected
// while recording.
class BoundProgram {
 public:
  BoundProgram(py::object pool, int64_t max_tokens, const std::string& isa,
               const std::string& attention_form)
      : table_(*kernel_table(resolve_isa(isa, ""))),
        max_tokens_(max_tokens),
        attention_form_(parse_attention_form(attention_form)),
        program_(pool.cast<ThreadPool*>(), table_) {
    if (max_tokens < 1) {
      throw py::value_error("max_tokens=" + std::to_string(max_tokens) + " must be at least 1");
    }
    keep(std::move(pool));
  }

  void embed(const py::object& weight, const py::object& out) {
    const Tensor& w = hold(weight, "weight");
    w.expect_type({ElementType::kF32, ElementType::kBf16});
    w.expect_shape({{"V", -1}, {"D", -1}});
    w.expect_rows();
    vocab_size_ = w.dim(0);
    program_.embed({w.data(), w.dtype(), w.dim(0), w.dim(1), w.row_stride()},
                   rows(out, "out", w.dim(1)));
  }

  void rms_norm(const py::object& h, const std::vector<py::object>& deltas,
                const py::object& weight, float eps, const py::object& out, bool only_logits_rows) {
    const Rows hidden = rows(h, "h", -1);
    if (deltas.size() > 2) throw py::value_error("deltas: at most two can be added at once");
    std::vector<Rows> added;
    for (const py::object& delta : deltas) added.push_back(rows(delta, "deltas", hidden.cols));
    program_.rms_norm(hidden, std::move(added),
                      {vector(weight, "weight", hidden.cols), hidden.cols, eps},
                      rows(out, "out", hidden.cols), only_logits_rows);
  }

  using ProjectionArgs = std::tuple<py::object, std::optional<py::object>, py::object, py::object>;
  void linear(const std::vector<ProjectionArgs>& projections) {
    std::vector<Program::Projection> bound;
    for (const auto& [weights, bias, x, out] : projections) {
      const LinearWeights& w = *weights.cast<LinearWeights*>();
      if (w.num_matrices() != 1) throw py::value_error("weights: one matrix per projection");
      keep(weights);
      bound.push_back({&w, bias ? vector(*bias, "bias", w.rows()) : nullptr, rows(x, "x", w.cols()),
                       rows(out, "out", w.rows())});
    }
    program_.linear(std::move(bound));
  }

  void rope_and_store(const py::object& q, int64_t heads, const py::object& latent, int64_t rank,
                      const py::object& norm_weight, float norm_eps, const py::object& cos_sin,
                      bool interleave, const py::object& cache) {
    Program::Latent l{};
    l.q = rows(q, "q", -1);
    l.heads = heads;
    if (heads < 1 || l.q.cols % heads != 0) {
      throw py::value_error("heads=" + std::to_string(heads) + " must divide q's " +
                            std::to_string(l.q.cols) + " columns");
    }
    l.head_dim = l.q.cols / heads;
    l.latent = rows(latent, "latent", -1);
    l.rank = rank;
    l.rope_dim = l.latent.cols - rank;
    if (rank < 1 || l.rope_dim < 2 || l.rope_dim % 2 != 0 || l.rope_dim > l.head_dim ||
        l.rope_dim > kMaxRopeDim) {
      throw py::value_error("rank=" + std::to_string(rank) + " does not fit latent's " +
                            std::to_string(l.latent.cols) + " columns: an even number of at most " +
                            "the head size must remain for the rotated part");
    }
    l.interleave = interleave;
    l.norm_weight = vector(norm_weight, "norm_weight", rank);
    l.norm_eps = norm_eps;
    const Tensor& table = hold(cos_sin, "cos_sin");
    table.expect_type({ElementType::kF32});
    table.expect_shape({{"positions", -1}, {"R", l.rope_dim}});
    table.expect_contiguous();
    l.cos_sin = static_cast<const float*>(table.data());
    num_positions_ = table.dim(0);
    const Tensor& rows_of_cache = latent_cache(cache, rank, l.rope_dim);
    l.cache = rows_of_cache.data();
    l.cache_dtype = rows_of_cache.dtype();
    program_.rope_and_store(l);
  }

  void attention(const py::object& w_uk_transposed, const py::object& w_uk, const py::object& w_uv,
                 const py::object& q, const py::object& cache, const py::object& out, float scale) {
    AttentionWeights w{matrices(w_uk_transposed), matrices(w_uk), matrices(w_uv), 0, scale};
    const Rows query = rows(q, "q", -1);
    const int64_t heads = w.heads(), head_dim = query.cols / heads;
    w.rope = head_dim - w.nope();
    const bool fit = w.w_uk_transposed->num_matrices() == heads &&
                     w.w_uk_transposed->rows() == w.rank() &&
                     w.w_uk_transposed->cols() == w.nope() && w.w_uv->num_matrices() == heads &&
                     w.w_uv->cols() == w.rank() && w.rope >= 0 && query.cols == heads * head_dim;
    if (!fit) {
      throw py::value_error(
          "attention: w_uk_transposed [H, C, N], w_uk [H, N, C], w_uv [H, V, C], "
          "q [T, H * (N + R)] do not agree");
    }
    const Tensor& c = latent_cache(cache, w.rank(), w.rope);
    const Rows result = rows(out, "out", heads * w.value());
    AttentionCall call{};
    call.q = query.data;
    call.q_stride = query.stride;
    call.q_head_stride = head_dim;
    call.cache = c.data();
    call.cache_dtype = c.dtype();
    call.block_size = c.dim(1);
    call.out = result.data;
    call.out_stride = result.stride;
    call.out_head_stride = w.value();
    call.form = attention_form_;
    program_.attention(w, call);
  }

  void router(const py::object& weight, const std::optional<py::object>& bias, const py::object& x,
              const py::object& logits, const py::object& topk_ids, const py::object& topk_weights,
              const std::string& scoring, const std::string& group_rank, int64_t num_groups,
              int64_t top_groups, bool norm_topk_prob, float scaling_factor) {
    const Tensor& w = hold(weight, "weight");
    w.expect_type({ElementType::kF32});
    w.expect_shape({{"E", -1}, {"D", -1}});
    w.expect_rows();
    const Rows input = rows(x, "x", w.dim(1));
    const Rows scores = rows(logits, "logits", w.dim(0));
    const Tensor& ids = ids_buffer(topk_ids, w.dim(0));
    const RouterChoice choice = router_choice(w.dim(0), ids.dim(1), scoring, group_rank, num_groups,
                                              top_groups, norm_topk_prob, scaling_factor,
                                              bias ? vector(*bias, "bias", w.dim(0)) : nullptr);
    program_.router({w.data(), w.dtype(), w.row_stride(), w.dim(1), input.data, input.stride,
                     scores.data, scores.stride},
                    choice, static_cast<int32_t*>(ids.data()),
                    weights_buffer(topk_weights, ids.dim(1)));
  }

  using ExpertArgs = std::tuple<py::object, py::object, py::object, py::object, py::object>;
  void experts(const std::vector<ExpertArgs>& groups) {
    std::vector<Program::Experts> bound;
    for (const auto& [weights, topk_ids, topk_weights, x, out] : groups) {
      const ExpertWeights& w = *weights.cast<ExpertWeights*>();
      keep(weights);
      const Tensor& ids = ids_buffer(topk_ids, w.num_experts());
      bound.push_back({&w, ids.dim(1), static_cast<const int32_t*>(ids.data()),
                       weights_buffer(topk_weights, ids.dim(1)), rows(x, "x", w.hidden_size()),
                       rows(out, "out", w.hidden_size())});
    }
    program_.experts(std::move(bound));
  }

  void lm_head(const py::object& weights, const py::object& x) {
    const LinearWeights& w = *weights.cast<LinearWeights*>();
    keep(weights);
    num_logits_ = w.rows();
    program_.lm_head(w, rows(x, "x", w.cols()));
  }

  void run(const py::object& token_ids, const py::object& positions, const py::object& slot_mapping,
           const py::object& query_lens, const py::object& context_lens,
           const py::object& block_tables, const py::object& logits_indices,
           const py::object& logits) {
    const Tensor ids(token_ids, "token_ids"), at(positions, "positions");
    const Tensor slots(slot_mapping, "slot_mapping"), queries(query_lens, "query_lens");
    const Tensor contexts(context_lens, "context_lens"), tables(block_tables, "block_tables");
    const Tensor wanted(logits_indices, "logits_indices"), result(logits, "logits", true);
    Step step{};
    step.num_tokens = ids.num_dims() == 1 ? ids.dim(0) : -1;
    if (step.num_tokens > max_tokens_) {
      throw py::value_error("token_ids has " + std::to_string(step.num_tokens) +
                            " tokens: this program takes at most " + std::to_string(max_tokens_));
    }
    if (step.num_tokens == 0) throw py::value_error("token_ids is empty: a step needs a token");
    step.token_ids = indices(ids, {"T", -1}, vocab_size_);
    step.positions = indices(at, {"T", step.num_tokens}, num_positions_);
    step.slot_mapping = indices(slots, {"T", step.num_tokens}, num_slots_);
    step.query_lens = indices(queries, {"B", -1}, max_tokens_ + 1);
    step.num_requests = queries.dim(0);
    step.context_lens = indices(contexts, {"B", step.num_requests}, num_positions_ + 1);
    step.logits_indices = indices(wanted, {"L", -1}, step.num_tokens);
    step.num_logits = wanted.dim(0);
    tables.expect_type({ElementType::kI64});
    tables.expect_shape({{"B", step.num_requests}, {"blocks", -1}});
    tables.expect_contiguous();
    step.block_tables = static_cast<const int64_t*>(tables.data());
    step.table_width = tables.dim(1);
    check_step(step);
    result.expect_type({ElementType::kF32});
    result.expect_shape({{"L", step.num_logits}, {"V", num_logits_}});
    result.expect_contiguous();
    const py::gil_scoped_release release;
    program_.run(step, static_cast<float*>(result.data()));
  }

  int64_t num_operations() const { return program_.num_operations(); }
  std::vector<std::pair<const char*, double>> operation_seconds() const {
    return program_.operation_seconds();
  }
  std::vector<std::pair<int64_t, int64_t>> expert_loads() const { return program_.expert_loads(); }
  const char* isa() const { return isa_name(table_.isa); }

 private:
  void keep(py::object object) { kept_.push_back(std::move(object)); }

  const Tensor& hold(const py::object& object, const char* name) {
    tensors_.push_back(std::make_unique<Tensor>(object, name));
    return *tensors_.back();
  }

  // A buffer of max_tokens rows; cols -1 takes any number.
  Rows rows(const py::object& object, const char* name, int64_t cols) {
    const Tensor& t = hold(object, name);
    t.expect_type({ElementType::kF32});
    t.expect_shape({{"max_tokens", max_tokens_}, {"columns", cols}});
    t.expect_rows();
    return {static_cast<float*>(t.data()), t.row_stride(), t.dim(1)};
  }

  const float* vector(const py::object& object, const char* name, int64_t size) {
    const Tensor& t = hold(object, name);
    t.expect_type({ElementType::kF32});
    t.expect_shape({{"size", size}});
    t.expect_contiguous();
    return static_cast<const float*>(t.data());
  }

  const LinearWeights* matrices(const py::object& weights) {
    keep(weights);
    return weights.cast<const LinearWeights*>();
  }

  const Tensor& ids_buffer(const py::object& object, int64_t num_experts) {
    const Tensor& t = hold(object, "topk_ids");
    t.expect_type({ElementType::kI32});
    t.expect_shape({{"max_tokens", max_tokens_}, {"K", -1}});
    t.expect_contiguous();
    if (t.dim(1) < 1 || t.dim(1) > num_experts) {
      throw py::value_error("topk_ids: K=" + std::to_string(t.dim(1)) +
                            " must be between 1 and the number of experts, " +
                            std::to_string(num_experts));
    }
    return t;
  }

  float* weights_buffer(const py::object& object, int64_t top_k) {
    const Tensor& t = hold(object, "topk_weights");
    t.expect_type({ElementType::kF32});
    t.expect_shape({{"max_tokens", max_tokens_}, {"K", top_k}});
    t.expect_contiguous();
    return static_cast<float*>(t.data());
  }

  const Tensor& latent_cache(const py::object& object, int64_t rank, int64_t rope) {
    const Tensor& t = hold(object, "cache");
    check_latent_cache(t, rank, rope);
    num_slots_ = t.dim(0) * t.dim(1);
    block_size_ = t.dim(1);
    return t;
  }

  // int64 numbers from 0 to limit - 1.
  static const int64_t* indices(const Tensor& t, Tensor::Dim dim, int64_t limit) {
    t.expect_type({ElementType::kI64});
    t.expect_shape({dim});
    t.expect_contiguous();
    const int64_t* data = static_cast<const int64_t*>(t.data());
    for (int64_t i = 0; i < t.dim(0); ++i) {
      if (data[i] < 0 || data[i] >= limit) {
        throw py::value_error(t.name() + "[" + std::to_string(i) + "]=" + std::to_string(data[i]) +
                              " must be between 0 and " + std::to_string(limit - 1));
      }
    }
    return data;
  }

  void check_step(const Step& step) const {
    int64_t total = 0;
    for (int64_t b = 0; b < step.num_requests; ++b) {
      const int64_t context = step.context_lens[b];
      total += step.query_lens[b];
      const std::string where = "request " + std::to_string(b) + ": ";
      if (step.query_lens[b] < 1 || context < step.query_lens[b]) {
        throw py::value_error(where + "query_lens=" + std::to_string(step.query_lens[b]) +
                              " must be between 1 and context_lens=" + std::to_string(context));
      }
      const int64_t num_blocks = (context + block_size_ - 1) / block_size_;
      if (num_blocks > step.table_width) {
        throw py::value_error(where + "context_lens=" + std::to_string(context) + " needs " +
                              std::to_string(num_blocks) + " blocks, block_tables has " +
                              std::to_string(step.table_width));
      }
      for (int64_t i = 0; i < num_blocks; ++i) {
        const int64_t block = step.block_tables[b * step.table_width + i];
        if (block < 0 || block >= num_slots_ / block_size_) {
          throw py::value_error(where + "block_tables names block " + std::to_string(block) +
                                " of " + std::to_string(num_slots_ / block_size_));
        }
      }
    }
    if (total != step.num_tokens) {
      throw py::value_error("query_lens add up to " + std::to_string(total) + ", token_ids has " +
                            std::to_string(step.num_tokens));
    }
  }

  const KernelTable& table_;
  const int64_t max_tokens_;
  const AttentionForm attention_form_;
  std::vector<py::object> kept_;
  std::vector<std::unique_ptr<Tensor>> tensors_;
  Program program_;
  int64_t vocab_size_ = 0, num_positions_ = 0, num_slots_ = 0, block_size_ = 1, num_logits_ = 0;
};

}  // namespace

void register_program(py::module_& m) {
  py::class_<BoundProgram>(m, "Program",
                           "A recorded forward pass; buffers and weights are kept alive.")
      .def(py::init<py::object, int64_t, const std::string&, const std::string&>(), py::arg("pool"),
           py::arg("max_tokens"), py::arg("isa") = "auto", py::arg("attention_form") = "auto")
      .def("embed", &BoundProgram::embed, py::arg("weight"), py::arg("out"))
      .def("rms_norm", &BoundProgram::rms_norm, py::arg("h"), py::arg("deltas"), py::arg("weight"),
           py::arg("eps"), py::arg("out"), py::arg("only_logits_rows") = false)
      .def("linear", &BoundProgram::linear, py::arg("projections"))
      .def("rope_and_store", &BoundProgram::rope_and_store, py::arg("q"), py::arg("heads"),
           py::arg("latent"), py::arg("rank"), py::arg("norm_weight"), py::arg("norm_eps"),
           py::arg("cos_sin"), py::arg("interleave"), py::arg("cache"))
      .def("attention", &BoundProgram::attention, py::arg("w_uk_transposed"), py::arg("w_uk"),
           py::arg("w_uv"), py::arg("q"), py::arg("cache"), py::arg("out"), py::arg("scale"))
      .def("router", &BoundProgram::router, py::arg("weight"), py::arg("bias"), py::arg("x"),
           py::arg("logits"), py::arg("topk_ids"), py::arg("topk_weights"), py::arg("scoring"),
           py::arg("group_rank"), py::arg("num_groups"), py::arg("top_groups"),
           py::arg("norm_topk_prob"), py::arg("scaling_factor"))
      .def("experts", &BoundProgram::experts, py::arg("groups"))
      .def("lm_head", &BoundProgram::lm_head, py::arg("weights"), py::arg("x"))
      .def("run", &BoundProgram::run, py::arg("token_ids"), py::arg("positions"),
           py::arg("slot_mapping"), py::arg("query_lens"), py::arg("context_lens"),
           py::arg("block_tables"), py::arg("logits_indices"), py::arg("logits"))
      .def_property_readonly("num_operations", &BoundProgram::num_operations)
      .def("operation_seconds", &BoundProgram::operation_seconds)
      .def("expert_loads", &BoundProgram::expert_loads)
      .def_property_readonly("isa", &BoundProgram::isa);
}

}  // namespace moejet
