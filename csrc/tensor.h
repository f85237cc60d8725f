// Tensors from Python, taken as DLPack capsules and checked. Nothing here copies or computes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "kernels.h"

namespace moejet {

enum class ElementType { kF32, kBf16, kF16, kFp8, kU8, kI32, kI64, kOther };  // kFp8: e4m3fn
const char* element_type_name(ElementType type);

// Keeps the exporter's memory alive until destroyed. Construct and destroy it with the GIL held.
class Tensor {
 public:
  // object: anything with __dlpack__ on the CPU. name: the argument, for messages. Throws
  // py::type_error if it is no tensor, py::value_error if it is not in CPU memory or, with
  // `writable`, read-only.
  Tensor(const pybind11::object& object, std::string name, bool writable = false);
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  // Checks; each throws py::value_error (py::type_error for dtypes) that names the argument.
  void expect_type(std::initializer_list<ElementType> types) const;
  // dims: wanted sizes with a letter each, for example {{"T", 3}, {"D", 64}}; -1 takes any size.
  struct Dim {
    const char* letter;
    int64_t size;
  };
  void expect_shape(std::initializer_list<Dim> dims) const;
  // Two-dimensional: elements of a row adjacent, rows in order and not overlapping.
  void expect_rows() const;
  void expect_contiguous() const;
  // Any shape: elements of the innermost dimension adjacent, no negative strides.
  void expect_adjacent() const;

  const std::string& name() const { return name_; }
  int64_t dim(int i) const { return shape_[i]; }
  int num_dims() const { return static_cast<int>(shape_.size()); }
  int64_t stride(int i) const { return strides_[i]; }
  int64_t row_stride() const;
  void* data() const { return data_; }
  ElementType type() const { return type_; }
  DType dtype() const;  // of a tensor that was checked to be fp32, bf16, fp16, or fp8 in any form

 private:
  // A DLPack managed tensor, released by its own deleter.
  struct Managed {
    Managed() = default;
    ~Managed();
    Managed(const Managed&) = delete;
    Managed& operator=(const Managed&) = delete;
    void reset(void* p, bool is_versioned) {
      pointer = p;
      versioned = is_versioned;
    }
    void* pointer = nullptr;
    bool versioned = false;
  };

  void take_capsule(const pybind11::object& capsule);
  std::string shape_text() const;

  std::string name_;
  Managed managed_;
  void* data_ = nullptr;
  ElementType type_ = ElementType::kOther;
  std::string type_text_;
  std::vector<int64_t> shape_, strides_;
};

// Of a cache [blocks, block_size, row] in the forms of latent_layout.h (fp8 as uint8); returns the
// bytes of a row.
int64_t check_latent_cache(const Tensor& cache, int64_t rank, int64_t rope);

}  // namespace moejet
