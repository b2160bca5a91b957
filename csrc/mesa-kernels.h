// The switch of the kernels that this project adds to ggml-cpu.

#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// Whether the CPU backend uses them; off: ggml's own, bit for bit. On, unless the environment says MESA_KERNELS=stock when first asked
// (mesa: on; anything else is warned of).
// Programs get the setter from the backend's registry, as "ggml_backend_cpu_set_mesa_kernels". Not while a graph is computed.
void mesa_kernels_set(bool on);
bool mesa_kernels_on(void);

struct ggml_compute_params;

// Between two parts of an operation that threads take by ggml_threadpool_chunk_add: where the abort callback wants the graph to end, there
// are no more parts. What the operation leaves then is thrown away.
void mesa_kernels_look(const struct ggml_compute_params * params);

#ifdef __cplusplus
}
#endif
