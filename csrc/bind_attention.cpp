// How long attention takes on this machine's CPU, as one operation (flash attention) and as products with a softmax between them: which of the
// two is faster depends on the processor and on the shape of the heads.

#include "bind.h"

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"

#include <chrono>
#include <cmath>
#include <stdexcept>
#include <string>

namespace {

// as llama.cpp's build_attn_mha computes them: keys and values lie in a cache, values transposed where attention is not one operation
ggml_tensor * build(ggml_context * ctx, bool flash, int64_t n_head, int64_t n_head_kv, int64_t n_k, int64_t n_v,
        ggml_type type_k, ggml_type type_v, int64_t n_queries, int64_t n_keys, ggml_tensor ** mask) {
    ggml_tensor * q = ggml_permute(ctx, ggml_new_tensor_3d(ctx, GGML_TYPE_F32, n_k, n_head, n_queries), 0, 2, 1, 3);
    ggml_tensor * k = ggml_permute(ctx, ggml_new_tensor_3d(ctx, type_k, n_k, n_head_kv, n_keys), 0, 2, 1, 3);

    const float scale = 1.0f / std::sqrt((float) n_k);
    *mask             = ggml_new_tensor_2d(ctx, flash ? GGML_TYPE_F16 : GGML_TYPE_F32, n_keys, n_queries);
    if (flash) {
        ggml_tensor * v = ggml_permute(ctx, ggml_new_tensor_3d(ctx, type_v, n_v, n_head_kv, n_keys), 0, 2, 1, 3);
        ggml_tensor * o = ggml_flash_attn_ext(ctx, q, k, v, *mask, scale, 0.0f, 0.0f);
        ggml_flash_attn_ext_set_prec(o, GGML_PREC_F32);
        return o;
    }
    ggml_tensor * v  = ggml_new_tensor_3d(ctx, type_v, n_keys, n_v, n_head_kv);
    ggml_tensor * kq = ggml_mul_mat(ctx, k, q);
    ggml_mul_mat_set_prec(kq, GGML_PREC_F32);
    kq = ggml_soft_max_ext(ctx, kq, *mask, scale, 0.0f);
    return ggml_cont(ctx, ggml_permute(ctx, ggml_mul_mat(ctx, v, kq), 0, 2, 1, 3));
}

} // namespace

void bind_attention(py::module_ & m) {
    m.def("time_attention",
            [](bool flash, int64_t n_head, int64_t n_head_kv, int64_t n_k, int64_t n_v, int type_k, int type_v,
                    int64_t n_queries, int64_t n_keys, int n_threads, int n_runs) {
        py::gil_scoped_release release;

        ggml_backend_ptr cpu(ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr));
        if (!cpu) {
            throw std::runtime_error("ggml has no CPU backend");
        }
        auto * reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu.get()));
        if (auto * set = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(
                    reg, "ggml_backend_set_n_threads")) {
            set(cpu.get(), n_threads);
        }
        ggml_context_ptr ctx(
                ggml_init({ 32 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, /*no_alloc*/ true }));

        ggml_tensor * mask;
        ggml_tensor * out = build(ctx.get(), flash, n_head, n_head_kv, n_k, n_v, (ggml_type) type_k, (ggml_type) type_v,
                n_queries, n_keys, &mask);
        ggml_cgraph * graph = ggml_new_graph(ctx.get());
        ggml_build_forward_expand(graph, out);

        ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(ctx.get(), cpu.get()));
        if (!buffer) {
            throw std::runtime_error("there is too little memory to measure attention");
        }
        ggml_backend_buffer_clear(buffer.get(), 0);

        std::vector<float> seen(n_keys * n_queries, 0.0f); // the queries are the last keys
        for (int64_t i = 0; i < n_queries; ++i) {
            for (int64_t j = n_keys - n_queries + i + 1; j < n_keys; ++j) {
                seen[i * n_keys + j] = -INFINITY;
            }
        }
        if (mask->type == GGML_TYPE_F32) {
            ggml_backend_tensor_set(mask, seen.data(), 0, ggml_nbytes(mask));
        } else {
            std::vector<ggml_fp16_t> halves(seen.size());
            ggml_fp32_to_fp16_row(seen.data(), halves.data(), (int64_t) seen.size());
            ggml_backend_tensor_set(mask, halves.data(), 0, ggml_nbytes(mask));
        }

        double least = INFINITY;
        for (int i = 0; i <= n_runs; ++i) { // the first one warms up
            const auto start = std::chrono::steady_clock::now();
            if (ggml_backend_graph_compute(cpu.get(), graph) != GGML_STATUS_SUCCESS) {
                throw std::runtime_error("ggml failed to compute attention");
            }
            const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
            least                                       = i == 0 ? least : std::min(least, seconds.count());
        }
        return least;
    },
            py::arg("flash"), py::arg("n_head"), py::arg("n_head_kv"), py::arg("n_k"), py::arg("n_v"),
            py::arg("type_k"), py::arg("type_v"), py::arg("n_queries"), py::arg("n_keys"), py::arg("n_threads"),
            py::arg("n_runs") = 5);
}
