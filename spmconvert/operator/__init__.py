"""The operator: geometry in integers, reference, merged form, the module and the blocks it keeps, Triton kernels."""
