#pragma once

#include <cstdint>

namespace moejet {

// A 64-bit hash that sees flipped, missing and moved bytes; no protection from intent. Reads at
// about memory speed.
uint64_t checksum(const void* data, int64_t bytes);

}  // namespace moejet
