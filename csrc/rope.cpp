#include "rope.h"

#include "ggml-backend.h"
#include "ggml.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace mesa {

// of the model: it outlives the graph that it was found in
static bool is_weight(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE && !(t->flags & GGML_TENSOR_FLAG_INPUT);
}

llama_mesa_rope find_rope(const ggml_tensor * t, llama_mesa_rope res, int32_t offset) {
    const char * cannot_undo = "they change after their rotation in a way that cannot be undone";

    for (; t; t = t->src[0]) {
        switch (t->op) {
            case GGML_OP_ROPE:
                res.rotates = true;
                memcpy(res.op_params, t->op_params, sizeof(res.op_params));
                res.op_params[15] += offset; // see ggml_rope_set_offset
                res.factors = t->src[2];
                if (res.factors && !is_weight(res.factors)) {
                    res.problem = "their rotation has frequency factors that are computed anew for every batch";
                }
                return res;
            case GGML_OP_CONCAT:
                if (t->op_params[0] == 0) { // some dimensions of a head rotate, others do not
                    const auto first = find_rope(t->src[0], res, offset);
                    return first.rotates ? first : find_rope(t->src[1], res, offset + t->src[0]->ne[0]);
                }
                break;
            case GGML_OP_MUL:
                if (t->src[1]->ne[0] > 1) { // a norm's weight, or values of its own for each token
                    if (res.weight || !is_weight(t->src[1]) || ggml_nrows(t->src[1]) > 1) {
                        res.problem = cannot_undo;
                    }
                    res.weight = t->src[1];
                }
                break;
            case GGML_OP_ADD:
            case GGML_OP_NORM: res.problem = cannot_undo; break;
            // a rotation commutes with these
            case GGML_OP_CONT:
            case GGML_OP_CPY:
            case GGML_OP_DUP:
            case GGML_OP_L2_NORM:
            case GGML_OP_PERMUTE:
            case GGML_OP_REPEAT:
            case GGML_OP_RESHAPE:
            case GGML_OP_RMS_NORM:
            case GGML_OP_SCALE:
            case GGML_OP_TRANSPOSE:
            case GGML_OP_VIEW:      break;
            default:                return {};
        }
    }
    return {};
}

ggml_tensor * rope_move(
        ggml_context * ctx, const llama_mesa_rope & rope, ggml_tensor * k, ggml_tensor * pos, int32_t divisor) {
    const auto f32 = [&](int i) {
        float v;
        memcpy(&v, rope.op_params + i, sizeof(v));
        return v;
    };

    const float freq_scale = f32(6) / divisor;
    const float ext_factor = f32(7);

    // ggml multiplies by this when it mixes YaRN's two frequencies
    const float attn_factor = ext_factor != 0.0f ? 1.0f / (1.0f + 0.1f * logf(1.0f / freq_scale)) : 1.0f;

    const int32_t * p = rope.op_params;

    if (rope.weight) {
        k = ggml_div(ctx, k, rope.weight);
    }

    ggml_tensor * res;
    if (p[2] & GGML_ROPE_TYPE_MROPE) {
        int sections[GGML_MROPE_SECTIONS];
        std::copy_n(p + 11, GGML_MROPE_SECTIONS, sections);
        res = ggml_rope_multi(ctx, k, pos, rope.factors, p[1], sections, p[2], p[4], f32(5), freq_scale, ext_factor,
                attn_factor, f32(9), f32(10));
    } else {
        res = ggml_rope_ext(ctx, k, pos, rope.factors, p[1], p[2], p[4], f32(5), freq_scale, ext_factor, attn_factor,
                f32(9), f32(10));
    }
    if (p[15] != 0) {
        res = ggml_rope_set_offset(res, p[15]);
    }
    return rope.weight ? ggml_mul(ctx, res, rope.weight) : res;
}

void set_positions(ggml_tensor * t, std::vector<int32_t> & pos, uint32_t n_pos_per_embd) {
    if (n_pos_per_embd == 4) {
        const size_t n = pos.size();
        pos.resize(4 * n, 0);
        std::copy_n(pos.begin(), n, pos.begin() + n);
        std::copy_n(pos.begin(), n, pos.begin() + 2 * n);
    }
    ggml_backend_tensor_set(t, pos.data(), 0, ggml_nbytes(t));
}

} // namespace mesa
