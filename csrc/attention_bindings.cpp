#include "attention_bindings.h"

#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "attention.h"
#include "isa.h"
#include "tensor.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace moejet {
namespace {

void check_up_projection(const LinearWeights& w, const char* name, int64_t heads, int64_t rows,
                         int64_t cols) {
  if (w.num_matrices() == heads && w.rows() == rows && w.cols() == cols) return;
  const auto text = [](int64_t h, int64_t r, int64_t c) {
    return std::to_string(h) + " matrices [" + std::to_string(r) + ", " + std::to_string(c) + "]";
  };
  throw py::value_error(std::string(name) + " has " + text(w.num_matrices(), w.rows(), w.cols()) +
                        ", expected " + text(heads, rows, cols) +
                        " to match the other projections and v_head_dim");
}

// Lengths and block tables of all requests; returns the number of query tokens.
int64_t check_requests(const std::vector<int64_t>& query_lens,
                       const std::vector<int64_t>& context_lens, const Tensor& tables,
                       int64_t num_blocks, int64_t block_size) {
  const auto size = static_cast<int64_t>(query_lens.size());
  if (context_lens.size() != query_lens.size()) {
    throw py::value_error("context_lens has " + std::to_string(context_lens.size()) +
                          " entries, query_lens " + std::to_string(size) + ": one per request");
  }
  tables.expect_type({ElementType::kI64});
  tables.expect_shape({{"B", size}, {"max_blocks", -1}});
  tables.expect_contiguous();
  const int64_t width = tables.dim(1);
  const int64_t* blocks = static_cast<const int64_t*>(tables.data());
  int64_t total = 0;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t queries = query_lens[static_cast<size_t>(i)];
    const int64_t context = context_lens[static_cast<size_t>(i)];
    const std::string index = "[" + std::to_string(i) + "]=";
    if (queries < 1 || queries > context) {
      throw py::value_error("query_lens" + index + std::to_string(queries) +
                            " must be between 1 and context_lens" + index +
                            std::to_string(context));
    }
    const int64_t needed = (context - 1) / block_size + 1;
    if (needed > width) {
      throw py::value_error("context_lens" + index + std::to_string(context) + " needs " +
                            std::to_string(needed) + " blocks of " + std::to_string(block_size) +
                            " tokens, block_tables has " + std::to_string(width));
    }
    for (int64_t j = 0; j < needed; ++j) {
      const int64_t block = blocks[i * width + j];
      if (block >= 0 && block < num_blocks) continue;
      throw py::value_error("block_tables[" + std::to_string(i) + ", " + std::to_string(j) +
                            "]=" + std::to_string(block) + " must be a block from 0 to " +
                            std::to_string(num_blocks - 1));
    }
    total += queries;
  }
  return total;
}

std::string mla_attention_py(const LinearWeights& w_uk_transposed, const LinearWeights& w_uk,
                             const LinearWeights& w_uv, const py::object& q,
                             const py::object& latent_cache, const py::object& block_tables,
                             const std::vector<int64_t>& query_lens,
                             const std::vector<int64_t>& context_lens, float scale,
                             const py::object& out, ThreadPool& pool, const std::string& isa,
                             const std::string& form) {
  const KernelTable& table = *kernel_table(resolve_isa(isa, ""));
  const int64_t heads = w_uk.num_matrices(), nope = w_uk.rows(), rank = w_uk.cols();
  check_up_projection(w_uk_transposed, "w_uk_transposed", heads, rank, nope);
  check_up_projection(w_uv, "w_uv", heads, w_uv.rows(), rank);
  const Tensor queries(q, "q"), cache(latent_cache, "latent_cache");
  const Tensor tables(block_tables, "block_tables"), result(out, "out", /*writable=*/true);
  cache.expect_type({ElementType::kF32, ElementType::kBf16, ElementType::kU8});
  cache.expect_shape({{"blocks", -1}, {"block_size", -1}, {"row", -1}});
  queries.expect_shape({{"T", -1}, {"H", heads}, {"N+R", -1}});
  // A row of fp8 does not tell which part of it is k_pe.
  const bool is_fp8 = cache.type() == ElementType::kU8;
  const int64_t rope = is_fp8 ? queries.dim(2) - nope : cache.dim(2) - rank;
  if (rope < 0 || cache.dim(1) < 1) {
    throw py::value_error("latent_cache has block size " + std::to_string(cache.dim(1)) +
                          " and rows of " + std::to_string(cache.dim(2)) + ", q rows of " +
                          std::to_string(queries.dim(2)) + ": expected at least 1, kv_lora_rank=" +
                          std::to_string(rank) + " and qk_nope_head_dim=" + std::to_string(nope));
  }
  check_latent_cache(cache, rank, rope);
  const int64_t tokens =
      check_requests(query_lens, context_lens, tables, cache.dim(0), cache.dim(1));
  queries.expect_type({ElementType::kF32});
  queries.expect_shape({{"T", tokens}, {"H", heads}, {"N+R", nope + rope}});
  queries.expect_adjacent();
  result.expect_type({ElementType::kF32});
  result.expect_shape({{"T", tokens}, {"H", heads}, {"V", w_uv.rows()}});
  result.expect_contiguous();
  AttentionCall call{};
  call.num_requests = static_cast<int64_t>(query_lens.size());
  call.query_lens = query_lens.data();
  call.context_lens = context_lens.data();
  call.block_tables = static_cast<const int64_t*>(tables.data());
  call.table_width = tables.dim(1);
  call.q = static_cast<const float*>(queries.data());
  call.q_stride = queries.stride(0);
  call.q_head_stride = queries.stride(1);
  call.cache = cache.data();
  call.cache_dtype = cache.dtype();
  call.block_size = cache.dim(1);
  call.out = static_cast<float*>(result.data());
  call.out_stride = heads * w_uv.rows();
  call.out_head_stride = w_uv.rows();
  call.form = parse_attention_form(form);
  {
    const py::gil_scoped_release release;
    mla_attention({&w_uk_transposed, &w_uk, &w_uv, rope, scale}, call, &pool, table);
  }
  return isa_name(table.isa);
}

}  // namespace

AttentionForm parse_attention_form(const std::string& name) {
  if (name == "auto") return AttentionForm::kAuto;
  if (name == "absorbed") return AttentionForm::kAbsorbed;
  if (name == "expanded") return AttentionForm::kExpanded;
  if (name == "invariant") return AttentionForm::kInvariant;
  throw py::value_error("form='" + name +
                        "' is unknown: use one of auto, absorbed, expanded, invariant");
}

void register_attention(py::module_& m) {
  m.def("mla_attention", &mla_attention_py, py::arg("w_uk_transposed"), py::arg("w_uk"),
        py::arg("w_uv"), py::arg("q"), py::arg("latent_cache"), py::arg("block_tables"),
        py::arg("query_lens"), py::arg("context_lens"), py::arg("scale"), py::arg("out"),
        py::arg("pool"), py::arg("isa") = "auto", py::arg("form") = "auto",
        "Causal attention of each request's last query_lens[i] tokens over the paged latent cache; "
        "returns the instruction set used.");
}

}  // namespace moejet
