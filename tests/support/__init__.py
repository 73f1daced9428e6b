"""What tests share, and no tests: worlds, checks, rigs, emulated devices, jobs, drivers."""
