"""The operator: geometry in integers, the reference, the merged form, the module, and the Triton kernels."""
