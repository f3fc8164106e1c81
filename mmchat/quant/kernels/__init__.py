"""Matrix products with large weights and few tokens, and the next token's attention, for the CPU.

A language model that writes one token at a time reads every weight once for it, so its speed is
that of memory. torch's own products reach a fraction of it, or lack the format. Here are C kernels
(`linear.c`, `attention.c`, `quantize.c`), compiled on first use by `native`, and what stands in
for them where there is no compiler (`reference`, and torch's own kernels). `ops` picks one by what
the machine has; its `probe` says which and why.

Formats, all row-major, so that a tensor mapped from a file is used where it lies:
- bfloat16 [N, K];
- int8: whole numbers [N, K] with a float32 scale [N], w = q · scale;
- int4: uint8 [N, K/2], byte j holds the elements 2j (low half) and 2j + 1, each 0..15, with
  bfloat16 scale and zero [N, K/group], w = (q - 8) · scale + zero.
"""
