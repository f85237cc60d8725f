#include "checksum.h"

#include <cstring>

namespace moejet {
namespace {

constexpr int kLanes = 8;  // independent chains hide the multiplication's latency
constexpr uint64_t kOdd = 0x9e3779b97f4a7c15ull;

// For every word a bijection of the state, so that a single changed word always shows.
uint64_t mix(uint64_t state, uint64_t word) {
  state = (state ^ word) * kOdd;
  return state ^ state >> 32;
}

void mix_stripe(const void* stripe, uint64_t* lanes) {
  uint64_t words[kLanes];
  std::memcpy(words, stripe, sizeof(words));
  for (int i = 0; i < kLanes; ++i) lanes[i] = mix(lanes[i], words[i]);
}

}  // namespace

uint64_t checksum(const void* data, int64_t bytes) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
  uint64_t lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = mix(kOdd, static_cast<uint64_t>(i));
  constexpr int64_t kStripe = kLanes * 8;
  int64_t done = 0;
  for (; done + kStripe <= bytes; done += kStripe) mix_stripe(p + done, lanes);
  if (done < bytes) {
    uint8_t last[kStripe] = {};
    std::memcpy(last, p + done, static_cast<size_t>(bytes - done));
    mix_stripe(last, lanes);
  }
  uint64_t sum = mix(kOdd, static_cast<uint64_t>(bytes));
  for (const uint64_t lane : lanes) sum = mix(sum, lane);
  return mix(sum, 0);
}

}  // namespace moejet
