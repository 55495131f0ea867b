"""Float32 CPU kernels in C whose results for a row never depend on the rows beside it."""
