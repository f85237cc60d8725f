// Bindings of ceilings.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>

#include "ceilings.h"
#include "isa.h"

namespace py = pybind11;

namespace moejet {
namespace {

py::dict arithmetic_ceilings_dict() {
  py::dict all;
  for (const ArithmeticCeiling& ceiling : arithmetic_ceilings()) {
    all[ceiling.name.c_str()] =
        py::dict(py::arg("reason") = ceiling.reason, py::arg("variants") = ceiling.variants);
  }
  return all;
}

}  // namespace

void register_ceilings(py::module_& m) {
  m.def("arithmetic_ceilings", &arithmetic_ceilings_dict,
        "What can be measured, in which variants, or why not.");
  m.def(
      "measure_arithmetic",
      [](const std::string& name, const std::string& variant, double seconds, ThreadPool& pool) {
        return measure_arithmetic(name, variant, seconds, &pool);
      },
      py::arg("name"), py::arg("variant"), py::arg("seconds"), py::arg("pool"),
      py::call_guard<py::gil_scoped_release>(),
      "Samples of operations per second of all workers together, on random operands.");
  py::class_<ReadProbe>(m, "ReadProbe", "Memory that is read to find out how fast it can be read.")
      .def(py::init([](int64_t num_bytes, ThreadPool& pool) {
             const py::gil_scoped_release release;
             return std::make_unique<ReadProbe>(num_bytes, &pool);
           }),
           py::arg("num_bytes"), py::arg("pool"))
      .def_property_readonly("nbytes", &ReadProbe::bytes)
      .def(
          "measure",
          [](ReadProbe& self, int num_streams, int64_t prefetch_bytes, double seconds,
             ThreadPool& pool, const std::string& isa) {
            const CeilingKernels& kernels = *ceiling_kernels(resolve_isa(isa, ""));
            return self.measure(kernels, num_streams, prefetch_bytes, seconds, &pool);
          },
          py::arg("num_streams"), py::arg("prefetch_bytes"), py::arg("seconds"), py::arg("pool"),
          py::arg("isa") = "auto", py::call_guard<py::gil_scoped_release>(),
          "Samples of bytes per second of all workers together.");
}

}  // namespace moejet
