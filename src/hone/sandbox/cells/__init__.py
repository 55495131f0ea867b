"""Cells: sandboxes made by the kernel's own means, their programs and their limits."""
