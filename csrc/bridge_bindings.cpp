// Python's view of the bridge: checks buffers, keeps them and the weights alive.
#include "bridge_bindings.h"

#include <pybind11/stl.h>

#include <memory>
#include <numeric>
#include <optional>
#include <string>

#include "cuda_signals.h"
#include "expert_bridge.h"
#include "tensor.h"

namespace py = pybind11;

namespace moejet {
namespace {

class BoundSignals;

class BoundBridge {
 public:
  BoundBridge(const py::object& pool, const std::vector<py::object>& layers, const py::object& x,
              const py::object& topk_ids, const py::object& topk_weights, const py::object& out,
              const py::object& flags, const std::string& isa, double worker_timeout_s)
      : table_(*kernel_table(resolve_isa(isa, ""))),
        pool_(pool),
        layers_(layers),
        x_(x, "x"),
        ids_(topk_ids, "topk_ids"),
        weights_(topk_weights, "topk_weights"),
        out_(out, "out", /*writable=*/true),
        flags_(flags, "flags", /*writable=*/true),
        bridge_(pool.cast<ThreadPool*>(), weights(), table_, buffers(), worker_timeout_s) {
    all_layers_.resize(layers.size());
    std::iota(all_layers_.begin(), all_layers_.end(), 0);
  }

  ExpertBridge& bridge() { return bridge_; }
  const char* isa() const { return isa_name(table_.isa); }

  void run_step(int64_t num_tokens, const std::optional<std::vector<int>>& layers, double timeout_s,
                const py::object& query, const BoundSignals* signals,
                const std::vector<uintptr_t>& streams);
  void reset(double timeout_s, const py::object& query, const BoundSignals* signals,
             const std::vector<uintptr_t>& streams);

  py::dict counters() const {
    const BridgeCounters c = bridge_.counters();
    return py::dict(py::arg("steps") = c.steps, py::arg("layers") = c.layers,
                    py::arg("wait_s") = c.wait_s, py::arg("layer_s") = c.layer_s,
                    py::arg("distinct_experts") = c.distinct_experts,
                    py::arg("weight_bytes") = c.weight_bytes);
  }

 private:
  std::vector<const ExpertWeights*> weights() const {
    std::vector<const ExpertWeights*> result;
    for (const py::object& layer : layers_) result.push_back(layer.cast<const ExpertWeights*>());
    return result;
  }

  BridgeBuffers buffers() const {
    x_.expect_type({ElementType::kF32, ElementType::kBf16});
    x_.expect_shape({{"max_tokens", -1}, {"D", -1}});
    x_.expect_contiguous();
    const int64_t max_tokens = x_.dim(0), hidden = x_.dim(1);
    ids_.expect_type({ElementType::kI32});
    ids_.expect_shape({{"max_tokens", max_tokens}, {"K", -1}});
    ids_.expect_contiguous();
    weights_.expect_type({ElementType::kF32});
    weights_.expect_shape({{"max_tokens", max_tokens}, {"K", ids_.dim(1)}});
    weights_.expect_contiguous();
    out_.expect_type({ElementType::kF32, ElementType::kBf16});
    out_.expect_shape({{"max_tokens", max_tokens}, {"D", hidden}});
    out_.expect_contiguous();
    flags_.expect_type({ElementType::kI32});
    flags_.expect_shape({{"2 * layers + 1", num_flags(static_cast<int64_t>(layers_.size()))},
                         {"words", kFlagStride}});
    flags_.expect_contiguous();
    return {max_tokens,
            hidden,
            ids_.dim(1),
            x_.data(),
            x_.dtype(),
            static_cast<const int32_t*>(ids_.data()),
            static_cast<const float*>(weights_.data()),
            out_.data(),
            out_.dtype(),
            static_cast<uint32_t*>(flags_.data())};
  }

  const KernelTable& table_;
  const py::object pool_;
  const std::vector<py::object> layers_;
  const Tensor x_, ids_, weights_, out_, flags_;
  ExpertBridge bridge_;
  std::vector<int> all_layers_;
};

class BoundSignals {
 public:
  BoundSignals(py::object bridge, const std::string& library, uintptr_t stream, bool host_functions)
      : kept_(std::move(bridge)),
        signals_(make(&kept_.cast<BoundBridge&>().bridge(), library, stream, host_functions)) {}

  static CuStream handle(uintptr_t stream) { return reinterpret_cast<CuStream>(stream); }
  const char* mode() const {
    return signals_.mode() == SignalMode::kMemoryOperations ? "memory_operations"
                                                            : "host_functions";
  }
  const CudaSignals& signals() const { return signals_; }

 private:
  // Waits for the stream, with the interpreter free for what the stream may need of it.
  static CudaSignals make(ExpertBridge* bridge, const std::string& library, uintptr_t stream,
                          bool host_functions) {
    const py::gil_scoped_release release;
    return CudaSignals(bridge, library, handle(stream), host_functions);
  }

  const py::object kept_;
  const CudaSignals signals_;
};

// From a Python callable (True: idle), or by the driver (idle if all streams are), or none.
StreamQuery stream_query(const py::object& query, const BoundSignals* signals,
                         const std::vector<uintptr_t>& streams) {
  if (!query.is_none() && signals != nullptr) {
    throw py::value_error("give query or signals, not both");
  }
  if (signals != nullptr) {
    if (streams.empty()) throw py::value_error("streams is empty: name those that signals are for");
    return [signals, streams] {
      StreamState state = StreamState::kIdle;
      for (const uintptr_t stream : streams) {
        const StreamState one = signals->signals().query(BoundSignals::handle(stream));
        if (one == StreamState::kBusy) state = one;
      }
      return state;
    };
  }
  if (query.is_none()) return {};
  // The caller holds `query` for the length of the call.
  return [function = query.ptr()] {
    const py::gil_scoped_acquire acquire;
    const bool is_idle = py::reinterpret_borrow<py::object>(function)().cast<bool>();
    return is_idle ? StreamState::kIdle : StreamState::kBusy;
  };
}

void BoundBridge::run_step(int64_t num_tokens, const std::optional<std::vector<int>>& layers,
                           double timeout_s, const py::object& query, const BoundSignals* signals,
                           const std::vector<uintptr_t>& streams) {
  const StreamQuery state = stream_query(query, signals, streams);
  const py::gil_scoped_release release;
  bridge_.run_step(num_tokens, layers ? *layers : all_layers_, timeout_s, state);
}

void BoundBridge::reset(double timeout_s, const py::object& query, const BoundSignals* signals,
                        const std::vector<uintptr_t>& streams) {
  const StreamQuery state = stream_query(query, signals, streams);
  const py::gil_scoped_release release;
  bridge_.reset(timeout_s, state);
}

}  // namespace

void register_bridge(py::module_& m) {
  m.attr("FLAG_WORDS") = kFlagStride;
  py::class_<BoundBridge>(m, "ExpertBridge", "Routed experts on the CPU for steps on a stream.")
      .def(py::init<const py::object&, const std::vector<py::object>&, const py::object&,
                    const py::object&, const py::object&, const py::object&, const py::object&,
                    const std::string&, double>(),
           py::arg("pool"), py::arg("layers"), py::arg("x"), py::arg("topk_ids"),
           py::arg("topk_weights"), py::arg("out"), py::arg("flags"), py::arg("isa") = "auto",
           py::arg("worker_timeout_s") = ThreadPool::kNoLimit)
      .def("run_step", &BoundBridge::run_step, py::arg("num_tokens"),
           py::arg("layers") = py::none(), py::arg("timeout_s") = 30.0,
           py::arg("query") = py::none(), py::arg("signals") = py::none(),
           py::arg("streams") = py::list())
      .def("reset", &BoundBridge::reset, py::arg("timeout_s") = 5.0, py::arg("query") = py::none(),
           py::arg("signals") = py::none(), py::arg("streams") = py::list())
      .def(
          "submit",
          [](BoundBridge& self, int layer) {
            self.bridge().check_layer(layer);
            self.bridge().submit(layer);
          },
          py::arg("layer"))
      .def(
          "wait",
          [](BoundBridge& self, int layer) {
            self.bridge().check_layer(layer);
            const py::gil_scoped_release release;
            self.bridge().wait(layer);
          },
          py::arg("layer"))
      .def("counters", &BoundBridge::counters)
      .def(
          "fail_once",
          [](BoundBridge& self, int layer, int worker, double after_s) {
            self.bridge().fail_once(layer, worker, after_s);
          },
          py::arg("layer"), py::arg("worker"), py::arg("after_s") = 0.0)
      .def(
          "set_computing",
          [](BoundBridge& self, bool computes) { self.bridge().set_computing(computes); },
          py::arg("computes"))
      .def_property_readonly("num_layers",
                             [](BoundBridge& self) { return self.bridge().num_layers(); })
      .def_property_readonly("isa", &BoundBridge::isa);

  py::class_<BoundSignals>(m, "CudaSignals", "A bridge's operations on CUDA streams.")
      .def(py::init<py::object, const std::string&, uintptr_t, bool>(), py::arg("bridge"),
           py::arg("library"), py::arg("stream"), py::arg("host_functions") = false,
           "library: the driver; stream: a handle, not capturing, to try memory operations on.")
      .def(
          "submit",
          [](const BoundSignals& self, int layer, uintptr_t stream) {
            self.signals().submit(layer, BoundSignals::handle(stream));
          },
          py::arg("layer"), py::arg("stream"))
      .def(
          "wait",
          [](const BoundSignals& self, int layer, uintptr_t stream) {
            self.signals().wait(layer, BoundSignals::handle(stream));
          },
          py::arg("layer"), py::arg("stream"))
      .def_property_readonly("mode", &BoundSignals::mode)
      .def_property_readonly("reason",
                             [](const BoundSignals& self) { return self.signals().reason(); });
}

}  // namespace moejet
