"""Strategies: plain loops over kernels and a transport, one file for each way of splitting."""
