"""What `pympa._core` and `pympa._cuda` both have: types and documentation, by family of kernels.

There are no such modules at run time: import from `pympa._core` and `pympa._cuda`.
"""
