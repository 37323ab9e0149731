"""Speed and memory benchmarks against other implementations and the machine's limits."""
