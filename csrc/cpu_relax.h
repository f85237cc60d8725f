// What a spinning thread does between two looks: leaves its core's resources to the other thread.
#pragma once

namespace moejet {

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

}  // namespace moejet
