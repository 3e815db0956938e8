"""What each op is: shapes, types, options, outputs, FLOPs and bytes. No kernels, no dispatch."""
