"""What the benchmarks of `moejet serve` share."""
