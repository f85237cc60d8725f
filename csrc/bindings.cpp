// The Python module moejet._C. Checks arguments with the GIL held, computes without it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sched.h>

#include <cmath>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention_bindings.h"
#include "bridge_bindings.h"
#include "expert_weights.h"
#include "gguf_blocks.h"
#include "isa.h"
#include "kernels.h"
#include "linear.h"
#include "memory_bindings.h"
#include "moe.h"
#include "ops_bindings.h"
#include "program_bindings.h"
#include "tensor.h"
#include "thread_pool.h"

namespace py = pybind11;

namespace moejet {

void register_ceilings(py::module_& m);  // bindings_ceilings.cpp

namespace {

Format parse_format(const std::string& name, const char* argument = "format") {
  std::string known;
  for (int i = 0; i < kNumFormats; ++i) {
    const Format format = static_cast<Format>(i);
    if (name == format_name(format)) return format;
    known += std::string(i == 0 ? "" : ", ") + format_name(format);
  }
  throw py::value_error(std::string(argument) + "='" + name + "' is unknown: use one of " + known);
}

constexpr const char* kArithmeticNames[] = {"bf16", "int8"};

Arithmetic parse_arithmetic(const std::string& name) {
  for (int i = 0; i < 2; ++i) {
    if (name == kArithmeticNames[i]) return static_cast<Arithmetic>(i);
  }
  throw py::value_error("arithmetic='" + name + "' is unknown: use one of bf16, int8");
}

Projection parse_projection(const std::string& name) {
  if (name == "gate") return Projection::kGate;
  if (name == "up") return Projection::kUp;
  if (name == "down") return Projection::kDown;
  throw py::value_error("projection='" + name + "' is unknown: use one of gate, up, down");
}

const KernelTable& table_of(const std::string& isa) { return *kernel_table(resolve_isa(isa, "")); }

py::dict cpu_info_dict() {
  const CpuInfo& info = cpu_info();
  py::dict isas;
  for (int i = 0; i < kNumIsas; ++i) {
    const IsaState& state = info.isas[i];
    isas[isa_name(static_cast<Isa>(i))] =
        py::dict(py::arg("compiled") = state.compiled, py::arg("usable") = state.usable,
                 py::arg("automatic") = state.automatic, py::arg("reason") = state.reason);
  }
  return py::dict(py::arg("features") = info.features, py::arg("isas") = isas,
                  py::arg("amx_permission") = info.amx_permission);
}

// A matrix of weights with, if it is fp8, the scales of its blocks. The tensors stay alive as long
// as this does.
class WeightSource {
 public:
  // rows, cols: the wanted shape. w_name: how messages call w. source_format: of GGUF's bytes.
  WeightSource(const py::object& w, const char* w_name, Tensor::Dim rows, Tensor::Dim cols,
               const py::object& scale_inv, const py::object& group_scales,
               const std::optional<std::string>& source_format)
      : w_(w, w_name) {
    if (!group_scales.is_none()) {
      if (!scale_inv.is_none()) throw py::value_error("give scale_inv or group_scales, not both");
      take_int4(group_scales, w_name, rows, cols);
      return;
    }
    const bool scaled = !scale_inv.is_none();
    if (source_format) {
      if (scaled) throw py::value_error("scale_inv does not go with source_format: leave it out");
      take_gguf(rows, cols, *source_format);
      return;
    }
    const std::string scales = "scale_inv, the fp32 scales [ceil(" + std::string(rows.letter) +
                               " / 128), ceil(" + cols.letter + " / 128)] of its blocks";
    if (w_.type() == ElementType::kFp8 && !scaled) {
      throw py::value_error(w_name + (" is float8_e4m3fn: pass " + scales));
    }
    if (scaled && w_.type() != ElementType::kFp8 && w_.type() != ElementType::kU8) {
      throw py::type_error(std::string("scale_inv belongs to float8_e4m3fn weights (or their bytes "
                                       "as uint8), but ") +
                           w_name + " is neither: leave it out");
    }
    if (!scaled) w_.expect_type({ElementType::kF32, ElementType::kBf16, ElementType::kF16});
    w_.expect_shape({rows, cols});
    w_.expect_rows();
    source_ = {w_.data(), w_.dtype(), w_.row_stride(), w_.dim(0), w_.dim(1), nullptr};
    if (scaled) take_scales(scale_inv);
  }
  const SourceMatrix& matrix() const { return source_; }

 private:
  // Codes, two in a byte, with one scale for each 32.
  void take_int4(const py::object& group_scales, const char* w_name, Tensor::Dim rows,
                 Tensor::Dim cols) {
    if (cols.size % kActGroup != 0) {
      throw py::value_error(std::string(w_name) + ": int4 codes need " + cols.letter + "=" +
                            std::to_string(cols.size) + " to be a multiple of 32");
    }
    w_.expect_type({ElementType::kU8});
    w_.expect_shape({rows, {"codes / 2", cols.size / 2}});
    w_.expect_rows();
    scales_.emplace(group_scales, "group_scales");
    scales_->expect_type({ElementType::kBf16});
    scales_->expect_shape({rows, {"groups of 32", cols.size / kActGroup}});
    scales_->expect_contiguous();
    const uint16_t* scales = static_cast<const uint16_t*>(scales_->data());
    const int64_t groups = cols.size / kActGroup;
    for (int64_t i = 0; i < rows.size * groups; ++i) {
      if ((scales[i] & 0x7f80) != 0x7f80) continue;
      throw py::value_error("group_scales[" + std::to_string(i / groups) + ", " +
                            std::to_string(i % groups) +
                            "] is NaN or infinite: check the checkpoint");
    }
    source_ = {w_.data(), DType::kInt4, w_.row_stride(), rows.size, cols.size, nullptr, scales};
  }

  void take_gguf(Tensor::Dim rows, Tensor::Dim cols, const std::string& source_format) {
    const Format format = parse_format(source_format, "source_format");
    if (!is_gguf(format)) {
      throw py::value_error("source_format='" + source_format +
                            "' is no format of GGUF files: leave it out for tensors");
    }
    const BlockShape block = gguf_file_block(format);
    if (cols.size % block.k != 0) {
      throw py::value_error(std::string(cols.letter) + "=" + std::to_string(cols.size) +
                            " is no multiple of " + std::to_string(block.k) + ", the block of " +
                            source_format + ": GGUF files hold such a matrix in another format");
    }
    w_.expect_type({ElementType::kU8});
    w_.expect_shape({rows, {"bytes of a row", cols.size / block.k * block.bytes}});
    w_.expect_rows();
    source_ = {w_.data(), DType::kGguf, w_.row_stride(), rows.size,
               cols.size, nullptr,      nullptr,         format};
  }

  void take_scales(const py::object& scale_inv) {
    scales_.emplace(scale_inv, "scale_inv");
    scales_->expect_type({ElementType::kF32});
    const int64_t rows = ceil_div(source_.rows, kFp8ScaleBlock);
    const int64_t cols = ceil_div(source_.cols, kFp8ScaleBlock);
    scales_->expect_shape({{"row blocks", rows}, {"column blocks", cols}});
    scales_->expect_contiguous();
    source_.scale_inv = static_cast<const float*>(scales_->data());
    for (int64_t i = 0; i < rows * cols; ++i) {
      const float scale = source_.scale_inv[i];
      if (std::isfinite(scale) && scale >= 0.f) continue;
      throw py::value_error("scale_inv[" + std::to_string(i / cols) + ", " +
                            std::to_string(i % cols) + "]=" + std::to_string(scale) +
                            " must be finite and not negative: check the checkpoint");
    }
  }

  Tensor w_;
  std::optional<Tensor> scales_;
  SourceMatrix source_;
};

void check_expert(const ExpertWeights& weights, int64_t expert) {
  if (expert < 0 || expert >= weights.num_experts()) {
    throw py::value_error("expert=" + std::to_string(expert) + " must be between 0 and " +
                          std::to_string(weights.num_experts() - 1));
  }
}

// name: how messages call the argument w.
void set_projection(ExpertWeights* weights, int64_t expert, Projection projection,
                    const py::object& w, const char* name, const py::object& scale_inv,
                    const py::object& group_scales, const std::optional<std::string>& source_format,
                    ThreadPool* pool, const KernelTable& table) {
  check_expert(*weights, expert);
  const bool down = projection == Projection::kDown;
  const WeightSource source(w, name, {down ? "D" : "I", weights->rows(projection)},
                            {down ? "I" : "D", weights->cols(projection)}, scale_inv, group_scales,
                            source_format);
  const py::gil_scoped_release release;
  weights->set_projection(expert, projection, source.matrix(), table, pool);
}

py::array_t<float> dequantize(const ExpertWeights& weights, int64_t expert, Projection projection) {
  py::array_t<float> out({weights.rows(projection), weights.cols(projection)});
  float* data = out.mutable_data();
  const py::gil_scoped_release release;
  weights.dequantize(expert, projection, data);
  return out;
}

// Ids as int32 after a range check; `converted` holds them if the tensor is int64.
const int32_t* checked_ids(const Tensor& ids, int64_t num_experts,
                           std::vector<int32_t>* converted) {
  const int64_t count = ids.dim(0) * ids.dim(1);
  const auto check = [&](int64_t id, int64_t i) {
    if (id >= -1 && id < num_experts) return;
    throw py::value_error("topk_ids[" + std::to_string(i / ids.dim(1)) + ", " +
                          std::to_string(i % ids.dim(1)) + "]=" + std::to_string(id) +
                          " must be -1 (skip) or an expert from 0 to " +
                          std::to_string(num_experts - 1));
  };
  if (ids.type() == ElementType::kI32) {
    const int32_t* data = static_cast<const int32_t*>(ids.data());
    for (int64_t i = 0; i < count; ++i) check(data[i], i);
    return data;
  }
  const int64_t* data = static_cast<const int64_t*>(ids.data());
  converted->resize(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    check(data[i], i);
    (*converted)[static_cast<size_t>(i)] = static_cast<int32_t>(data[i]);
  }
  return converted->data();
}

std::string moe_forward_py(const ExpertWeights& weights, const py::object& x,
                           const py::object& topk_ids, const py::object& topk_weights,
                           const py::object& out, ThreadPool& pool, const std::string& isa) {
  const KernelTable& table = table_of(isa);
  const int64_t hidden = weights.hidden_size();
  const Tensor xt(x, "x"), ids(topk_ids, "topk_ids"), scores(topk_weights, "topk_weights");
  const Tensor result(out, "out", /*writable=*/true);
  xt.expect_type({ElementType::kF32, ElementType::kBf16});
  xt.expect_shape({{"T", -1}, {"D", hidden}});
  xt.expect_rows();
  const int64_t num_tokens = xt.dim(0);
  ids.expect_type({ElementType::kI32, ElementType::kI64});
  ids.expect_shape({{"T", num_tokens}, {"K", -1}});
  ids.expect_contiguous();
  const int64_t top_k = ids.dim(1);
  scores.expect_type({ElementType::kF32});
  scores.expect_shape({{"T", num_tokens}, {"K", top_k}});
  scores.expect_contiguous();
  result.expect_type({ElementType::kF32, ElementType::kBf16});
  result.expect_shape({{"T", num_tokens}, {"D", hidden}});
  result.expect_rows();
  if (num_tokens > INT32_MAX / 2 || top_k > 4096) {
    throw py::value_error("topk_ids has shape [" + std::to_string(num_tokens) + ", " +
                          std::to_string(top_k) + "]: at most 2^30 tokens and 4096 experts each");
  }
  std::vector<int32_t> converted;
  MoeCall call{};
  call.num_tokens = num_tokens;
  call.top_k = top_k;
  call.topk_ids = checked_ids(ids, weights.num_experts(), &converted);
  call.topk_weights = static_cast<const float*>(scores.data());
  call.x = xt.data();
  call.x_dtype = xt.dtype();
  call.x_stride = xt.row_stride();
  call.out = result.data();
  call.out_dtype = result.dtype();
  call.out_stride = result.row_stride();
  {
    const py::gil_scoped_release release;
    moe_forward(weights, call, &pool, table);
  }
  return isa_name(table.isa);
}

std::string linear_forward_py(const LinearWeights& weights, const py::object& x,
                              const py::object& out, ThreadPool& pool, const std::string& isa) {
  const KernelTable& table = table_of(isa);
  const int64_t num_matrices = weights.num_matrices();
  const Tensor xt(x, "x"), result(out, "out", /*writable=*/true);
  xt.expect_type({ElementType::kF32, ElementType::kBf16});
  const bool shared = xt.num_dims() == 2;
  if (shared) {
    xt.expect_shape({{"T", -1}, {"cols", weights.cols()}});
  } else {
    xt.expect_shape({{"T", -1}, {"G", num_matrices}, {"cols", weights.cols()}});
  }
  xt.expect_adjacent();
  result.expect_type({ElementType::kF32, ElementType::kBf16});
  if (num_matrices == 1 && result.num_dims() == 2) {
    result.expect_shape({{"T", xt.dim(0)}, {"rows", weights.rows()}});
  } else {
    result.expect_shape({{"T", xt.dim(0)}, {"G", num_matrices}, {"rows", weights.rows()}});
  }
  result.expect_contiguous();
  LinearCall call{};
  call.num_tokens = xt.dim(0);
  call.x = xt.data();
  call.x_dtype = xt.dtype();
  call.x_stride = xt.stride(0);
  call.x_matrix_stride = shared || num_matrices == 1 ? 0 : xt.stride(1);
  call.out = result.data();
  call.out_dtype = result.dtype();
  call.out_stride = num_matrices * weights.rows();
  call.out_matrix_stride = weights.rows();
  {
    const py::gil_scoped_release release;
    linear_forward(weights, call, &pool, table);
  }
  return isa_name(table.isa);
}

void set_matrix(LinearWeights& weights, int64_t matrix, const py::object& w, ThreadPool* pool,
                const std::string& isa, const py::object& scale_inv, const py::object& group_scales,
                const std::optional<std::string>& source_format) {
  const KernelTable& table = table_of(isa);
  if (matrix < 0 || matrix >= weights.num_matrices()) {
    throw py::value_error("matrix=" + std::to_string(matrix) + " must be between 0 and " +
                          std::to_string(weights.num_matrices() - 1));
  }
  const WeightSource source(w, "w", {"rows", weights.rows()}, {"cols", weights.cols()}, scale_inv,
                            group_scales, source_format);
  const py::gil_scoped_release release;
  weights.set(matrix, source.matrix(), table, pool);
}

void register_linear(py::module_& m) {
  py::class_<LinearWeights>(m, "LinearWeights", "G packed matrices [rows, cols] of one shape.")
      .def(py::init([](int64_t num_matrices, int64_t rows, int64_t cols, const std::string& format,
                       const std::vector<int>& memory_nodes, const std::string& arithmetic) {
             return std::make_unique<LinearWeights>(num_matrices, rows, cols, parse_format(format),
                                                    memory_nodes, parse_arithmetic(arithmetic));
           }),
           py::arg("num_matrices"), py::arg("rows"), py::arg("cols"), py::arg("format"),
           py::arg("memory_nodes") = std::vector<int>{kAnyNode}, py::arg("arithmetic") = "bf16")
      .def("set", &set_matrix, py::arg("matrix"), py::arg("w"), py::arg("pool") = py::none(),
           py::arg("isa") = "auto", py::arg("scale_inv") = py::none(),
           py::arg("group_scales") = py::none(), py::arg("source_format") = py::none(),
           "Quantises and packs one matrix; fp32, bf16, fp16, float8_e4m3fn with scale_inv, int4 "
           "codes with group_scales, or GGUF's bytes with source_format.")
      .def(
          "dequantize",
          [](const LinearWeights& self, int64_t matrix) {
            if (matrix < 0 || matrix >= self.num_matrices()) {
              throw py::value_error("matrix=" + std::to_string(matrix) + " is out of range");
            }
            py::array_t<float> out({self.rows(), self.cols()});
            self.dequantize(matrix, out.mutable_data());
            return out;
          },
          py::arg("matrix"), "The values the kernels compute with, fp32 [rows, cols].")
      .def("fill_random", &LinearWeights::fill_random, py::arg("seed") = 0,
           py::arg("pool") = py::none(), py::call_guard<py::gil_scoped_release>(),
           "Plausible random weights, written in packed form.")
      .def_property_readonly("num_matrices", &LinearWeights::num_matrices)
      .def_property_readonly("rows", &LinearWeights::rows)
      .def_property_readonly("cols", &LinearWeights::cols)
      .def_property_readonly("format",
                             [](const LinearWeights& self) { return format_name(self.format()); })
      .def_property_readonly("arithmetic",
                             [](const LinearWeights& self) {
                               return kArithmeticNames[static_cast<int>(self.arithmetic())];
                             })
      .def_property_readonly("nbytes", &LinearWeights::bytes)
      .def_property_readonly("bind_error", &LinearWeights::bind_error);
}

std::vector<int> probe(ThreadPool& pool, std::optional<int> fail_worker) {
  std::vector<int> cpus(static_cast<size_t>(pool.num_threads()));
  const py::gil_scoped_release release;
  pool.acquire().run(1, [&](int, int worker) {
    if (worker == fail_worker) {
      throw std::runtime_error("worker " + std::to_string(worker) + " failed as asked");
    }
    cpus[static_cast<size_t>(worker)] = sched_getcpu();
  });
  return cpus;
}

void register_pool(py::module_& m) {
  py::class_<ThreadPool>(m, "ThreadPool",
                         "Worker threads, one per CPU in cpus. The calling thread is worker 0.")
      .def(py::init<std::vector<int>, bool, std::vector<int>, std::vector<int>>(), py::arg("cpus"),
           py::arg("pin") = true, py::arg("worker_nodes") = std::vector<int>{},
           py::arg("memory_nodes") = std::vector<int>{kAnyNode})
      .def_property_readonly("num_threads", &ThreadPool::num_threads)
      .def_property_readonly("worker_nodes", &ThreadPool::worker_nodes)
      .def_property_readonly("memory_nodes", &ThreadPool::memory_nodes)
      .def("close", &ThreadPool::close, py::call_guard<py::gil_scoped_release>(),
           "Ends the threads; idempotent. Later use raises RuntimeError.")
      .def("probe", &probe, py::arg("fail_worker") = py::none(),
           "The CPU that each worker runs on. Worker fail_worker raises RuntimeError instead.");
}

void register_weights(py::module_& m) {
  py::class_<ExpertWeights>(m, "ExpertWeights", "Packed routed experts of one MoE layer.")
      .def(py::init([](int64_t num_experts, int64_t hidden_size, int64_t intermediate_size,
                       const std::string& format, const std::vector<int>& memory_nodes,
                       const std::string& arithmetic,
                       const std::optional<std::string>& down_format) {
             ExpertFormats formats(parse_format(format));
             if (down_format) formats.down = parse_format(*down_format, "down_format");
             return std::make_unique<ExpertWeights>(num_experts, hidden_size, intermediate_size,
                                                    formats, memory_nodes,
                                                    parse_arithmetic(arithmetic));
           }),
           py::arg("num_experts"), py::arg("hidden_size"), py::arg("intermediate_size"),
           py::arg("format"), py::arg("memory_nodes") = std::vector<int>{kAnyNode},
           py::arg("arithmetic") = "bf16", py::arg("down_format") = py::none())
      .def(
          "set_projection",
          [](ExpertWeights& self, int64_t expert, const std::string& projection,
             const py::object& w, ThreadPool* pool, const std::string& isa,
             const py::object& scale_inv, const py::object& group_scales,
             const std::optional<std::string>& source_format) {
            set_projection(&self, expert, parse_projection(projection), w, "w", scale_inv,
                           group_scales, source_format, pool, table_of(isa));
          },
          py::arg("expert"), py::arg("projection"), py::arg("w"), py::arg("pool") = py::none(),
          py::arg("isa") = "auto", py::arg("scale_inv") = py::none(),
          py::arg("group_scales") = py::none(), py::arg("source_format") = py::none(),
          "Quantises and packs one matrix: gate or up [I, D], down [D, I]; fp32, bf16, fp16, "
          "float8_e4m3fn with scale_inv, int4 codes with group_scales, or GGUF's bytes with "
          "source_format.")
      .def(
          "set_expert",
          [](ExpertWeights& self, int64_t expert, const py::object& gate, const py::object& up,
             const py::object& down, ThreadPool* pool, const std::string& isa) {
            const KernelTable& table = table_of(isa);
            const py::object none = py::none();
            set_projection(&self, expert, Projection::kGate, gate, "gate", none, none, {}, pool,
                           table);
            set_projection(&self, expert, Projection::kUp, up, "up", none, none, {}, pool, table);
            set_projection(&self, expert, Projection::kDown, down, "down", none, none, {}, pool,
                           table);
          },
          py::arg("expert"), py::arg("gate"), py::arg("up"), py::arg("down"),
          py::arg("pool") = py::none(), py::arg("isa") = "auto")
      .def(
          "dequantize",
          [](const ExpertWeights& self, int64_t expert) {
            check_expert(self, expert);
            return py::make_tuple(dequantize(self, expert, Projection::kGate),
                                  dequantize(self, expert, Projection::kUp),
                                  dequantize(self, expert, Projection::kDown));
          },
          py::arg("expert"), "(gate, up, down) in fp32: the values the kernels compute with.")
      .def(
          "fill_random",
          [](ExpertWeights& self, uint64_t seed, ThreadPool* pool,
             std::optional<std::vector<int64_t>> experts) {
            if (experts) {
              for (const int64_t expert : *experts) check_expert(self, expert);
            }
            py::gil_scoped_release release;
            experts ? self.fill_random(seed, pool, *experts) : self.fill_random(seed, pool);
          },
          py::arg("seed") = 0, py::arg("pool") = py::none(), py::arg("experts") = py::none(),
          "Plausible random weights, written in packed form; of these experts, else of all.")
      .def("checksum", &ExpertWeights::checksum, py::arg("pool") = py::none(),
           py::call_guard<py::gil_scoped_release>(),
           "Sum of all 64-bit words: reads every packed byte once, at memory speed.")
      .def_property_readonly("num_experts", &ExpertWeights::num_experts)
      .def_property_readonly("hidden_size", &ExpertWeights::hidden_size)
      .def_property_readonly("intermediate_size", &ExpertWeights::intermediate_size)
      .def_property_readonly("format",
                             [](const ExpertWeights& self) { return format_name(self.format()); })
      .def_property_readonly(
          "down_format", [](const ExpertWeights& self) { return format_name(self.down_format()); })
      .def_property_readonly("arithmetic",
                             [](const ExpertWeights& self) {
                               return kArithmeticNames[static_cast<int>(self.arithmetic())];
                             })
      .def_property_readonly("nbytes", &ExpertWeights::bytes)
      .def_property_readonly("expert_nbytes", &ExpertWeights::expert_bytes)
      .def_property_readonly("bind_error", &ExpertWeights::bind_error);
}

}  // namespace
}  // namespace moejet

PYBIND11_MODULE(_C, m) {
  using namespace moejet;
  m.doc() = "CPU kernels of moejet. Tensors are anything with __dlpack__ in CPU memory.";
  // pybind11 would turn bad_alloc into MemoryError by itself, but only OutOfMemory says how much.
  m.def("cpu_info", &cpu_info_dict, "Features and instruction sets of this machine and build.");
  m.def(
      "resolve_isa",
      [](const std::string& name, const std::optional<std::string>& max_isa) {
        return std::string(isa_name(resolve_isa(name, max_isa.value_or(""))));
      },
      py::arg("name") = "auto", py::arg("max_isa") = py::none(),
      "The instruction set to use: the widest usable one for 'auto', else exactly name.");
  m.def(
      "min_tile_rows",
      [](const std::string& format, const std::string& isa, const std::string& arithmetic) {
        return kernels_of(table_of(isa), parse_format(format), parse_arithmetic(arithmetic))
            .min_tile_rows;
      },
      py::arg("format"), py::arg("isa") = "auto", py::arg("arithmetic") = "bf16",
      "Rows of one expert from which tile kernels compute it; 0: never.");
  register_pool(m);
  register_weights(m);
  register_linear(m);
  register_memory(m);
  register_ops(m);
  register_ceilings(m);
  register_program(m);
  register_bridge(m);
  m.def("linear_forward", &linear_forward_py, py::arg("weights"), py::arg("x"), py::arg("out"),
        py::arg("pool"), py::arg("isa") = "auto",
        "out[t, g] = W_g x[t, g] (x [T, cols]: all matrices read the same row); returns the "
        "instruction set used.");
  register_attention(m);
  m.def("moe_forward", &moe_forward_py, py::arg("weights"), py::arg("x"), py::arg("topk_ids"),
        py::arg("topk_weights"), py::arg("out"), py::arg("pool"), py::arg("isa") = "auto",
        "out[t] = sum_k topk_weights[t, k] * down(silu(gate x[t]) * up x[t]); returns the "
        "instruction set used.");
}
