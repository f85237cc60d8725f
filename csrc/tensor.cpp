#include "tensor.h"

#include <utility>

namespace py = pybind11;

namespace moejet {
namespace {

// The DLPack binary interface (https://dmlc.github.io/dlpack), as far as we read it.
struct DlDevice {
  int32_t type;
  int32_t id;
};
struct DlDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct DlTensor {
  void* data;
  DlDevice device;
  int32_t ndim;
  DlDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: row-major
  uint64_t byte_offset;
};
struct DlManaged {
  DlTensor tensor;
  void* manager;
  void (*deleter)(DlManaged*);
};
struct DlManagedVersioned {
  uint32_t major, minor;
  void* manager;
  void (*deleter)(DlManagedVersioned*);
  uint64_t flags;
  DlTensor tensor;
};
// What a tensor type offers in its attribute __dlpack_c_exchange_api__ (DLPack 1.3): the same
// exchange without going through Python. The entries between and after those we use are not
// declared by type.
struct DlExchange {
  uint32_t major, minor;
  const DlExchange* previous;
  void* allocate;
  int (*from_py_object)(void* object, DlManagedVersioned** out);
};
constexpr uint64_t kFlagReadOnly = 1;
constexpr int32_t kDeviceCpu = 1;
constexpr int32_t kDeviceCudaHost = 3;  // pinned memory, which the CPU reads like any other

ElementType element_type(DlDataType t) {
  if (t.lanes != 1) return ElementType::kOther;
  if (t.code == 2 && t.bits == 32) return ElementType::kF32;
  if (t.code == 2 && t.bits == 16) return ElementType::kF16;
  if (t.code == 4 && t.bits == 16) return ElementType::kBf16;
  if (t.code == 10 && t.bits == 8) return ElementType::kFp8;
  if (t.code == 1 && t.bits == 8) return ElementType::kU8;
  if (t.code == 0 && t.bits == 32) return ElementType::kI32;
  if (t.code == 0 && t.bits == 64) return ElementType::kI64;
  return ElementType::kOther;
}

std::string type_text(DlDataType t) {
  const char* kind = "unknown";
  switch (t.code) {
    case 0:
      kind = "int";
      break;
    case 1:
      kind = "uint";
      break;
    case 2:
      kind = "float";
      break;
    case 4:
      kind = "bfloat";
      break;
    case 5:
      kind = "complex";
      break;
    case 6:
      kind = "bool";
      break;
    case 10:
      return "float8_e4m3fn";
    case 11:
      return "float8_e4m3fnuz";
    case 12:
      return "float8_e5m2";
    case 13:
      return "float8_e5m2fnuz";
    default:
      break;
  }
  return kind + std::to_string(t.bits);
}

// The exchange functions of the object's type, or null. The last type is remembered: in practice
// all arguments are torch tensors, and looking the attribute up costs more than the exchange.
const DlExchange* exchange_of(const py::object& object) {
  static PyTypeObject* last_type = nullptr;  // holds a reference, so its address is not reused
  static const DlExchange* last_exchange = nullptr;
  PyTypeObject* type = Py_TYPE(object.ptr());
  if (type == last_type) return last_exchange;
  const DlExchange* exchange = nullptr;
  const py::object capsule = py::getattr(py::handle(reinterpret_cast<PyObject*>(type)),
                                         "__dlpack_c_exchange_api__", py::none());
  if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
    exchange =
        static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (exchange != nullptr && exchange->major != 1) exchange = nullptr;
  }
  Py_INCREF(reinterpret_cast<PyObject*>(type));
  Py_XDECREF(reinterpret_cast<PyObject*>(last_type));
  last_type = type;
  last_exchange = exchange;
  return exchange;
}

py::object export_capsule(const py::object& object, const std::string& name) {
  if (!py::hasattr(object, "__dlpack__")) {
    throw py::type_error(name + " must be a tensor with __dlpack__ (torch, numpy), not " +
                         std::string(py::str(py::type::of(object).attr("__name__"))));
  }
  try {
    // Version 1 can say "read-only"; exporters from before it do not know the argument.
    return object.attr("__dlpack__")(py::arg("max_version") = py::make_tuple(1, 0));
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) {
      throw py::value_error(
          name + " cannot be read as a CPU tensor: " + std::string(py::str(error.value())));
    }
  }
  try {
    return object.attr("__dlpack__")();
  } catch (py::error_already_set& error) {
    throw py::value_error(
        name + " cannot be read as a CPU tensor: " + std::string(py::str(error.value())));
  }
}

}  // namespace

const char* element_type_name(ElementType type) {
  switch (type) {
    case ElementType::kF32:
      return "float32";
    case ElementType::kBf16:
      return "bfloat16";
    case ElementType::kF16:
      return "float16";
    case ElementType::kFp8:
      return "float8_e4m3fn";
    case ElementType::kU8:
      return "uint8";
    case ElementType::kI32:
      return "int32";
    case ElementType::kI64:
      return "int64";
    default:
      return "other";
  }
}

Tensor::Tensor(const py::object& object, std::string name, bool writable) : name_(std::move(name)) {
  if (const DlExchange* exchange = exchange_of(object)) {
    DlManagedVersioned* managed = nullptr;
    if (exchange->from_py_object(object.ptr(), &managed) != 0) {
      const py::error_already_set error;
      throw py::value_error(
          name_ + " cannot be read as a CPU tensor: " + std::string(py::str(error.value())));
    }
    managed_.reset(managed, /*versioned=*/true);
  } else {
    take_capsule(export_capsule(object, name_));
  }
  const DlTensor* t;
  if (managed_.versioned) {
    const auto* m = static_cast<DlManagedVersioned*>(managed_.pointer);
    if (m->major != 1) throw py::value_error(name_ + ": unsupported DLPack version");
    if (writable && (m->flags & kFlagReadOnly)) {
      throw py::value_error(name_ + " is read-only: pass a writable tensor");
    }
    t = &m->tensor;
  } else {
    t = &static_cast<DlManaged*>(managed_.pointer)->tensor;
  }
  if (t->device.type != kDeviceCpu && t->device.type != kDeviceCudaHost) {
    throw py::value_error(name_ + " is not in CPU memory: pass a CPU tensor");
  }
  shape_.assign(t->shape, t->shape + t->ndim);
  strides_.resize(t->ndim);
  int64_t stride = 1;
  for (int i = t->ndim - 1; i >= 0; --i) {
    strides_[i] = t->strides != nullptr ? t->strides[i] : stride;
    stride *= shape_[i];
  }
  data_ = static_cast<uint8_t*>(t->data) + t->byte_offset;
  type_ = element_type(t->dtype);
  type_text_ = type_text(t->dtype);
}

void Tensor::take_capsule(const py::object& capsule) {
  const char* kind = PyCapsule_GetName(capsule.ptr());
  if (kind == nullptr) PyErr_Clear();
  const std::string name = kind == nullptr ? "" : kind;
  const bool versioned = name == "dltensor_versioned";
  if (!versioned && name != "dltensor") {
    throw py::type_error(name_ + ": __dlpack__ did not return a DLPack capsule");
  }
  void* managed = PyCapsule_GetPointer(capsule.ptr(), kind);
  if (managed == nullptr) throw py::error_already_set();
  // A renamed capsule tells the exporter that its contents are ours to release.
  if (PyCapsule_SetName(capsule.ptr(), versioned ? "used_dltensor_versioned" : "used_dltensor")) {
    throw py::error_already_set();
  }
  managed_.reset(managed, versioned);
}

Tensor::Managed::~Managed() {
  if (pointer == nullptr) return;
  if (versioned) {
    auto* m = static_cast<DlManagedVersioned*>(pointer);
    if (m->deleter != nullptr) m->deleter(m);
  } else {
    auto* m = static_cast<DlManaged*>(pointer);
    if (m->deleter != nullptr) m->deleter(m);
  }
}

void Tensor::expect_type(std::initializer_list<ElementType> types) const {
  std::string wanted;
  for (const ElementType type : types) {
    if (type == type_) return;
    if (!wanted.empty()) wanted += " or ";
    wanted += element_type_name(type);
  }
  throw py::type_error(name_ + " has dtype " + type_text_ + ", expected " + wanted);
}

void Tensor::expect_shape(std::initializer_list<Dim> dims) const {
  bool ok = dims.size() == shape_.size();
  std::string wanted = "[";
  size_t i = 0;
  for (const Dim& dim : dims) {
    if (ok && dim.size >= 0 && shape_[i] != dim.size) ok = false;
    if (i > 0) wanted += ", ";
    wanted += dim.letter;
    if (dim.size >= 0) wanted += "=" + std::to_string(dim.size);
    ++i;
  }
  if (!ok)
    throw py::value_error(name_ + " has shape " + shape_text() + ", expected " + wanted + "]");
}

void Tensor::expect_rows() const {
  const bool empty = dim(0) == 0 || dim(1) == 0;
  const bool adjacent = dim(1) <= 1 || strides_[1] == 1;
  const bool ordered = dim(0) <= 1 || strides_[0] >= dim(1);
  if (!empty && !(adjacent && ordered)) {
    throw py::value_error(name_ + " has strides [" + std::to_string(strides_[0]) + ", " +
                          std::to_string(strides_[1]) +
                          "]: elements of a row must be adjacent and rows must not overlap; pass " +
                          name_ + ".contiguous()");
  }
}

void Tensor::expect_adjacent() const {
  bool ok = !shape_.empty() && (shape_.back() <= 1 || strides_.back() == 1);
  for (size_t i = 0; i < shape_.size(); ++i) ok = ok && (shape_[i] <= 1 || strides_[i] >= 0);
  if (!ok) {
    throw py::value_error(name_ +
                          " has elements that are not adjacent in its last dimension: pass " +
                          name_ + ".contiguous()");
  }
}

void Tensor::expect_contiguous() const {
  int64_t stride = 1;
  bool contiguous = true;
  for (size_t i = shape_.size(); i-- > 0;) {
    if (shape_[i] == 0) return;
    if (shape_[i] > 1 && strides_[i] != stride) contiguous = false;
    stride *= shape_[i];
  }
  if (!contiguous) {
    throw py::value_error(name_ + " is not contiguous: pass " + name_ + ".contiguous()");
  }
}

int64_t Tensor::row_stride() const { return dim(0) > 1 ? strides_[0] : dim(1); }

DType Tensor::dtype() const {
  switch (type_) {
    case ElementType::kF32:
      return DType::kF32;
    case ElementType::kBf16:
      return DType::kBf16;
    case ElementType::kFp8:
    case ElementType::kU8:
      return DType::kFp8;
    default:
      return DType::kF16;
  }
}

std::string Tensor::shape_text() const {
  std::string text = "[";
  for (size_t i = 0; i < shape_.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape_[i]);
  }
  return text + "]";
}

int64_t check_latent_cache(const Tensor& cache, int64_t rank, int64_t rope) {
  cache.expect_type({ElementType::kF32, ElementType::kBf16, ElementType::kU8});
  const int64_t bytes = latent_layout(rank, rope, dtype_bytes(cache.dtype())).bytes;
  const bool is_fp8 = cache.type() == ElementType::kU8;
  cache.expect_shape({{"blocks", -1},
                      {"block_size", -1},
                      {is_fp8 ? "row bytes" : "C + R", is_fp8 ? bytes : rank + rope}});
  cache.expect_contiguous();
  return bytes;
}

}  // namespace moejet
