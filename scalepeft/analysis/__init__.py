"""Reports, comparisons and benchmarks: reads run folders."""
