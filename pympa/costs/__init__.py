"""Seconds of kernels and messages on a cluster: data sheets, measured curves, cluster files."""
