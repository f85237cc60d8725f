#include "memory_bindings.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <cstdint>
#include <string>
#include <system_error>
#include <vector>

#include "checksum.h"
#include "expert_weights.h"
#include "linear.h"

namespace py = pybind11;

namespace moejet {
namespace {

// Weights own their memory as long as an array of it lives.
template <class Weights>
py::list buffers(const py::object& self) {
  const NodeMemory& memory = self.cast<const Weights&>().memory();
  py::list arrays;
  for (int node = 0; node < memory.num_nodes(); ++node) {
    arrays.append(
        py::array_t<uint8_t>({memory.node_bytes(node)}, {1}, memory.slice(0, node), self));
  }
  return arrays;
}

template <class Weights>
void map_file(const Weights& weights, int fd, const std::vector<int64_t>& offsets) {
  const NodeMemory& memory = weights.memory();
  if (static_cast<int>(offsets.size()) != memory.num_nodes()) {
    throw py::value_error("offsets: " + std::to_string(offsets.size()) + " were given for " +
                          std::to_string(memory.num_nodes()) + " buffers");
  }
  try {
    for (int node = 0; node < memory.num_nodes(); ++node) {
      memory.map_file(node, fd, offsets[static_cast<size_t>(node)]);
    }
  } catch (const std::system_error& error) {
    PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), error.what()).ptr());
    throw py::error_already_set();
  }
}

template <class Weights>
void add_memory(const py::module_& m, const char* name) {
  auto weights = py::reinterpret_borrow<py::class_<Weights>>(m.attr(name));
  weights.def("buffers", &buffers<Weights>, "The packed bytes, one array for each memory node.");
  weights.def_property_readonly("is_placed",
                                [](const Weights& self) { return self.memory().is_placed(); });
  weights.def("map_file", &map_file<Weights>, py::arg("fd"), py::arg("offsets"),
              "Puts a private view of a file in place of the memory.");
}

uint64_t checksum_of(const py::buffer& data) {
  const py::buffer_info info = data.request();
  if (!PyBuffer_IsContiguous(info.view(), 'C')) throw py::value_error("data is not contiguous");
  const py::gil_scoped_release release;
  return checksum(info.ptr, info.size * info.itemsize);
}

}  // namespace

void register_memory(py::module_& m) {
  add_memory<ExpertWeights>(m, "ExpertWeights");
  add_memory<LinearWeights>(m, "LinearWeights");
  m.attr("PACK_LAYOUT_VERSION") = kPackLayoutVersion;
  m.def("checksum", &checksum_of, py::arg("data"),
        "A 64-bit hash of contiguous bytes against accidents, not attacks.");
}

}  // namespace moejet
