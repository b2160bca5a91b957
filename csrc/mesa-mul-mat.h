// Products of quantized weights and many columns on the CPU: what ggml-cpu computes GGML_OP_MUL_MAT and GGML_OP_MUL_MAT_ID (mixtures of
// experts) with where this kernel can (patches/0008-cpu-mul-mat.patch calls it).

#pragma once

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;
struct ggml_tensor;

// false: another operation, or ggml's own kernels are to do it; all threads of the graph get the same answer
bool mesa_mul_mat(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// the same of weights that ggml has repacked (Q4_0 and Q4_K, 8 rows together)
bool mesa_mul_mat_repacked(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// bytes of params->wdata that it needs with n_threads threads
size_t mesa_mul_mat_work_size(const struct ggml_tensor * dst, int n_threads);

#ifdef __cplusplus
}
#endif
