// Plain reads for any processor.
#define MOEJET_ISA_NS scalar
#include "ceilings-inl.h"

namespace moejet {
namespace scalar {

extern const CeilingKernels ceilings = {
    &read_memory, {kNoLoop, kNoLoop}, {kNoLoop, kNoLoop}, {kNoLoop, kNoLoop}};

}  // namespace scalar
}  // namespace moejet
