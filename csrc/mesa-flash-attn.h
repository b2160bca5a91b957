// Attention on the CPU: what ggml-cpu computes GGML_OP_FLASH_ATTN_EXT with where this kernel can (patches/0007-cpu-attention.patch calls it).

#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;
struct ggml_tensor;

// false: ggml's own kernel is to do it; all threads of the graph get the same answer
bool mesa_flash_attn_ext(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// GGML_OP_MUL_MAT of a cache's keys with the queries of one token, as for what it attends to: each key is read once for all of them. false: as above
bool mesa_key_products(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// bytes of params->wdata that it needs with n_threads threads
size_t mesa_flash_attn_ext_work_size(const struct ggml_tensor * dst, int n_threads);

#ifdef __cplusplus
}
#endif
