// What Mesa adds to the graphs of llama.cpp: its inputs, and the attention of a ubatch that is read in its chunk alone.

#include "llama-mesa-hooks.h"
#include "llama-mesa.h"
#include "mask.h"
#include "rope.h"
#include "state.h"
#include "weave.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <type_traits>

using namespace mesa;

// note: inputs outlive the ubatch that they were built for (graph reuse), so everything is read from the state when they are set
class llm_graph_input_mesa : public llm_graph_input_i {
public:
    llm_graph_input_mesa(const llama_mesa & m, bool use_alibi, uint32_t n_pos_per_embd) :
            m(m), use_alibi(use_alibi), n_pos_per_embd(n_pos_per_embd) {}
    virtual ~llm_graph_input_mesa() = default;

    void set_input(const llama_ubatch * ubatch) override;
    void set_rules(int32_t pos, int32_t n_tokens);

    // the shapes are compared in llm_graph_params::allow_reuse
    bool can_reuse(const llm_graph_params & params) override {
        return params.cparams.mesa.get() == &m && g.n_rules == 0;
    }

    const llama_mesa & m;
    const bool use_alibi;
    const uint32_t n_pos_per_embd;

    llama_mesa_graph g;

    // the ubatch's keys and values by the cache tensor that they go to: layers without keys of their own attend to them too
    struct fresh_kv {
        ggml_tensor * k = nullptr;
        ggml_tensor * v = nullptr;
        int il          = 0; // the layer that they are of
    };

    std::map<const ggml_tensor *, fresh_kv> fresh;

    ggml_tensor * q_scale    = nullptr; // F32 [1, 1, n_tokens]
    ggml_tensor * k_delta    = nullptr; // I32 [n_tokens*n_pos]  from the position in the chunk to the one in the cache
    ggml_tensor * swa_delta  = nullptr; // I32 [n_tokens*n_pos]  from the position that RoPE got to the logical one
    ggml_tensor * prev_rows  = nullptr; // I32 [n_prev]          cached rows that the ubatch's chunk attends to
    ggml_tensor * prev_delta = nullptr; // I32 [n_prev*n_pos]    from the position in the cache to the one in the chunk
    ggml_tensor * kq_mask    = nullptr; // F32/F16 [n_prev + n_tokens, n_tokens], with rules [n_kv, n_tokens]

    // from where queries and keys stand to where a rule wants them, by way of 0 if the rule divides positions
    struct rule_positions {
        ggml_tensor * q_delta = nullptr; // I32 [n_tokens*n_pos]
        ggml_tensor * k_delta = nullptr; // I32 [n_kv*n_pos]
        ggml_tensor * q_pos   = nullptr; // I32 [n_tokens*n_pos]
        ggml_tensor * k_pos   = nullptr; // I32 [n_kv*n_pos]
    };

    rule_positions rule;
    int32_t divisor        = 1;
    ggml_tensor * rule_far = nullptr; // F32 [n_kv, n_tokens]  1 where the key is far, else 0

    // outputs, by llama_mesa_attention_rows::layers: F32 [n_kv, 1], or [n_kv, 1, n_head]
    std::vector<ggml_tensor *> attention;
    std::vector<ggml_tensor *> read_by;

    ggml_tensor * read_mask = nullptr; // F32 [n_kv, 1]  of everything, whatever the token reads
};

template <typename T>
static T to(float v);

template <>
float to(float v) {
    return v;
}
template <>
ggml_fp16_t to(float v) {
    return ggml_fp32_to_fp16(v);
}

// calls fill(mask, data) with a mask of t's type, f32 or f16, and then sets t
template <typename F>
static void set_mask(ggml_tensor * t, const llama_mesa & m, bool use_alibi, F && fill) {
    std::vector<uint8_t> data(ggml_nbytes(t));
    if (t->type == GGML_TYPE_F16) {
        fill(mesa::mask<ggml_fp16_t>(m.params, m.plan, use_alibi, to<ggml_fp16_t>), (ggml_fp16_t *) data.data());
    } else {
        fill(mesa::mask<float>(m.params, m.plan, use_alibi, to<float>), (float *) data.data());
    }
    ggml_backend_tensor_set(t, data.data(), 0, data.size());
}

bool llama_mesa_set_mask(const llama_mesa * m, ggml_tensor * dst, const llama_ubatch & ubatch, bool use_alibi) {
    if (!m) {
        return false;
    }
    const auto fill = [&](auto && mask, auto * data) {
        for (uint32_t ii = 0; ii < ubatch.n_tokens; ++ii) {
            mask.row(ubatch.pos[ii], 0, dst->ne[0], data + ii * dst->ne[0]);
        }
        if (ubatch.n_tokens == 1 && m->reads_less(ubatch.pos[0])) {
            mesa::hide(m->read.ranges, m->read.n_keys, data, to<std::remove_pointer_t<decltype(data)>>(-INFINITY));
        }
    };
    // note: as llama.cpp does, into the buffer itself: of a long text the mask is large
    if (dst->type == GGML_TYPE_F16) {
        fill(mesa::mask<ggml_fp16_t>(m->params, m->plan, use_alibi, to<ggml_fp16_t>), (ggml_fp16_t *) dst->data);
    } else {
        fill(mesa::mask<float>(m->params, m->plan, use_alibi, to<float>), (float *) dst->data);
    }
    return true;
}

void llm_graph_input_mesa::set_input(const llama_ubatch * ubatch) {
    const int32_t n_tokens = ubatch->n_tokens;
    const int32_t pos      = ubatch->pos[0];

    if (q_scale && q_scale->buffer) {
        std::vector<float> data(n_tokens);
        for (int32_t ii = 0; ii < n_tokens; ++ii) {
            data[ii] = mesa::log_scale(m.params.n_unscaled(), pos + ii);
        }
        ggml_backend_tensor_set(q_scale, data.data(), 0, ggml_nbytes(q_scale));
    }

    if (k_delta && k_delta->buffer) {
        std::vector<int32_t> data(n_tokens);
        for (int32_t ii = 0; ii < n_tokens; ++ii) {
            data[ii] = mesa::key_pos(m.plan, pos + ii) - m.chunk_pos(pos + ii);
        }
        set_positions(k_delta, data, n_pos_per_embd);
    }

    if (swa_delta && swa_delta->buffer) {
        std::vector<int32_t> data(n_tokens);
        for (int32_t ii = 0; ii < n_tokens; ++ii) {
            data[ii] = pos + ii - m.pos(pos + ii);
        }
        set_positions(swa_delta, data, n_pos_per_embd);
    }

    if (read_mask && read_mask->buffer) {
        set_mask(read_mask, m, use_alibi, [&](auto && mask, auto * data) { mask.row(pos, 0, read_mask->ne[0], data); });
    }

    if (g.n_rules > 0) {
        set_rules(pos, n_tokens);
        return;
    }

    if (!kq_mask) {
        return;
    }

    std::vector<int32_t> rows;
    m.window_rows(pos, &rows);

    if (prev_rows && prev_rows->buffer) {
        std::vector<int32_t> data = rows;
        data.resize(g.n_prev, 0); // the padding reads row 0, and is masked
        ggml_backend_tensor_set(prev_rows, data.data(), 0, ggml_nbytes(prev_rows));
    }

    if (prev_delta && prev_delta->buffer) {
        std::vector<int32_t> data(g.n_prev, 0);
        for (size_t r = 0; r < rows.size(); ++r) {
            data[r] = m.chunk_pos(rows[r]) - m.key_pos[rows[r]];
        }
        set_positions(prev_delta, data, n_pos_per_embd);
    }

    if (kq_mask->buffer) {
        // columns: the cached rows (first chunk, then the rest of the ubatch's own chunk), the padding, the ubatch's own tokens
        const int32_t c0      = mesa::chunk_of(m.plan, pos);
        const int32_t start   = m.plan.chunk_starts[c0];
        const int32_t n_first = c0 == 0 ? 0 : m.plan.chunk_starts[1];
        const int64_t n_kv    = kq_mask->ne[0];

        set_mask(kq_mask, m, use_alibi, [&](auto && mask, auto * data) {
            const auto drop = to<std::remove_pointer_t<decltype(data)>>(-INFINITY);
            for (int32_t ii = 0; ii < n_tokens; ++ii) {
                auto * row = data + ii * n_kv;
                mask.row(pos + ii, 0, n_first, row);
                mask.row(pos + ii, start, pos, row + n_first);
                std::fill(row + rows.size(), row + g.n_prev, drop);
                mask.row(pos + ii, pos, pos + n_tokens, row + g.n_prev);
            }
        });
    }
}

void llm_graph_input_mesa::set_rules(int32_t pos, int32_t n_tokens) {
    const int64_t n_kv = kq_mask->ne[0];

    if (kq_mask->buffer) {
        set_mask(kq_mask, m, false, [&](auto && mask, auto * data) {
            for (int32_t ii = 0; ii < n_tokens; ++ii) {
                mask.row(pos + ii, 0, n_kv, data + ii * n_kv);
            }
        });
    }
    if (rule_far && rule_far->buffer) {
        std::vector<float> far(n_kv * n_tokens, 0.0f);
        for (int32_t ii = 0; ii < n_tokens; ++ii) {
            std::fill_n(far.begin() + ii * n_kv, mesa::window_start(m.params, pos + ii), 1.0f);
        }
        ggml_backend_tensor_set(rule_far, far.data(), 0, ggml_nbytes(rule_far));
    }

    std::vector<int32_t> q_delta(n_tokens, 0);
    std::vector<int32_t> k_delta(n_kv, 0);
    std::vector<int32_t> q_pos(n_tokens, 0);
    std::vector<int32_t> k_pos(n_kv, 0);

    // the ubatch's own keys are in the cache by now
    const auto stands = [&](int32_t j) { return j < m.n_past() ? m.key_pos[j] : mesa::key_pos(m.plan, j); };

    for (int32_t ii = 0; ii < n_tokens; ++ii) {
        const int32_t i = pos + ii;
        const int32_t q = g.n_rules == 1 ? 0 : mesa::weave(m.params, m.plan, i, 0).q;

        q_delta[ii] = (divisor > 1 ? 0 : q) - m.pos(i);
        q_pos[ii]   = q;
    }
    const int32_t last = pos + n_tokens - 1;
    for (int32_t j = 0; j <= last; ++j) {
        int32_t k;
        if (g.n_rules == 1) { // one query, at 0
            k = -(j < mesa::window_start(m.params, last) ? mesa::weave(m.params, m.plan, last, j).q : last - j);
        } else {
            k = mesa::weave(m.params, m.plan, last, j).k;
        }
        k_delta[j] = (divisor > 1 ? 0 : k) - stands(j);
        k_pos[j]   = k;
    }

    const auto set = [&](ggml_tensor * t, std::vector<int32_t> & data) {
        if (t && t->buffer) {
            set_positions(t, data, n_pos_per_embd);
        }
    };
    set(rule.q_delta, q_delta);
    set(rule.k_delta, k_delta);
    set(rule.q_pos, q_pos);
    set(rule.k_pos, k_pos);
}

llm_graph_input_mesa * llama_mesa_build_inp(const llm_graph_context & gctx, const llama_kv_cache_context * mctx) {
    const auto & cparams = gctx.cparams;

    if (!cparams.mesa || cparams.mesa_graph == llama_mesa_graph()) {
        return nullptr;
    }

    const int64_t n_pos = gctx.hparams.n_pos_per_embd();

    auto inp = std::make_unique<llm_graph_input_mesa>(*cparams.mesa, gctx.hparams.use_alibi, n_pos);

    inp->g = cparams.mesa_graph;
    if (inp->g.attention) {
        inp->attention.resize(cparams.mesa->attention.layers.size());
        cparams.mesa->attention.built.assign(inp->attention.size(), 0);
    }
    if (inp->g.choose) {
        inp->read_by.resize(cparams.mesa->read_by.layers.size());
        cparams.mesa->read_by.built.assign(inp->read_by.size(), 0);
    }

    auto * ctx0 = gctx.ctx0;

    const auto new_input = [&](ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, const char * name) {
        ggml_tensor * t = ggml_new_tensor_3d(ctx0, type, ne0, ne1, ne2);
        ggml_set_input(t);
        ggml_set_name(t, name);
        return t;
    };

    const int64_t n_tokens = gctx.n_tokens;
    const int64_t n_prev   = inp->g.n_prev;

    if (inp->g.choose) {
        inp->read_mask = new_input(GGML_TYPE_F32, mctx->get_n_kv(), 1, 1, "mesa_read_mask");
    }

    if (inp->g.scale) {
        inp->q_scale = new_input(GGML_TYPE_F32, 1, 1, n_tokens, "mesa_q_scale");
    }
    if (inp->g.window) {
        inp->k_delta = new_input(GGML_TYPE_I32, n_tokens * n_pos, 1, 1, "mesa_k_delta");
        // flash attention requires an f16 mask
        inp->kq_mask = new_input(
                cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32, n_prev + n_tokens, n_tokens, 1, "mesa_kq_mask");
        if (n_prev > 0) {
            inp->prev_rows  = new_input(GGML_TYPE_I32, n_prev, 1, 1, "mesa_prev_rows");
            inp->prev_delta = new_input(GGML_TYPE_I32, n_prev * n_pos, 1, 1, "mesa_prev_delta");
        }
    }
    if (inp->g.swa) {
        inp->swa_delta = new_input(GGML_TYPE_I32, n_tokens * n_pos, 1, 1, "mesa_swa_delta");
    }

    if (inp->g.n_rules > 0) {
        const int64_t n_kv = mctx->get_n_kv();

        inp->divisor = cparams.mesa->params.method == mesa::method_leaky_rerope ? cparams.mesa->plan.stair_width : 1;

        inp->kq_mask = new_input(cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32, n_kv, n_tokens, 1, "mesa_kq_mask");
        inp->rule.q_delta = new_input(GGML_TYPE_I32, n_tokens * n_pos, 1, 1, "mesa_rule_q_delta");
        inp->rule.k_delta = new_input(GGML_TYPE_I32, n_kv * n_pos, 1, 1, "mesa_rule_k_delta");
        if (inp->g.n_rules > 1) {
            inp->rule_far = new_input(GGML_TYPE_F32, n_kv, n_tokens, 1, "mesa_rule_far");
        }
        if (inp->divisor > 1) {
            inp->rule.q_pos = new_input(GGML_TYPE_I32, n_tokens * n_pos, 1, 1, "mesa_rule_q_pos");
            inp->rule.k_pos = new_input(GGML_TYPE_I32, n_kv * n_pos, 1, 1, "mesa_rule_k_pos");
        }
    }

    return (llm_graph_input_mesa *) gctx.res->add_input(std::move(inp));
}

// the cache of a layer that sees everything
struct mesa_cache {
    const llama_kv_cache_context * mctx;

    ggml_tensor * k_idxs;
    ggml_tensor * v_idxs;
    ggml_tensor * k_rot;
    ggml_tensor * v_rot;
};

// Attention over the whole cache whose distances are woven while it is read: slow, and for comparing methods. Far keys get a second
// matrix of scores, or, where every query has distances of its own, the ubatch is one query and its keys are moved for it.
static ggml_tensor * build_attn_rules(const llm_graph_context & gctx, llm_graph_input_mesa * inp_mesa,
        const mesa_cache & cache, ggml_tensor * q, ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * sinks,
        float kq_scale, int il) {
    auto * ctx0 = gctx.ctx0;
    auto * gf   = gctx.gf;

    const auto * mctx_cur = cache.mctx;
    const auto & rope     = inp_mesa->m.rope[il];

    if (k_cur) {
        if (cache.k_rot) {
            k_cur = llama_mul_mat_hadamard(ctx0, k_cur, cache.k_rot);
        }
        if (cache.v_rot) {
            v_cur = llama_mul_mat_hadamard(ctx0, v_cur, cache.v_rot);
        }
        ggml_build_forward_expand(gf, q);
        ggml_build_forward_expand(gf, mctx_cur->cpy_k(ctx0, k_cur, cache.k_idxs, il));
        ggml_build_forward_expand(gf, mctx_cur->cpy_v(ctx0, v_cur, cache.v_idxs, il));
    }

    ggml_tensor * k = ggml_cast(ctx0, mctx_cur->get_k(ctx0, il), GGML_TYPE_F32); // [n_embd_head_k, n_head_kv, n_kv, 1]
    if (cache.k_rot) {
        k = llama_mul_mat_hadamard(ctx0, k, cache.k_rot);
    }
    ggml_tensor * v = mctx_cur->get_v(ctx0, il);

    const int32_t divisor = inp_mesa->divisor;

    // a norm after the rotation has weights of its own for queries
    const auto q_rope = find_rope(q);
    if (q_rope.problem) {
        gctx.cparams.mesa->rope[il].problem = q_rope.problem; // told when Mesa is enabled
    }

    const auto move = [&](const llama_mesa_rope & rope, ggml_tensor * t, ggml_tensor * delta, ggml_tensor * pos) {
        t = rope_move(ctx0, rope, t, delta);
        return divisor > 1 ? rope_move(ctx0, rope, t, pos, divisor) : t;
    };

    if (ggml_is_quantized(v->type)) {
        v = ggml_cast(ctx0, v, GGML_TYPE_F32);
    }

    ggml_tensor * kq_b = nullptr;
    if (rope.rotates) {
        ggml_tensor * q_far = move(q_rope, q, inp_mesa->rule.q_delta, inp_mesa->rule.q_pos);
        ggml_tensor * k_far = move(rope, k, inp_mesa->rule.k_delta, inp_mesa->rule.k_pos);

        if (inp_mesa->g.n_rules == 1) {
            q = q_far;
            k = k_far;
        } else {
            // added to the scores: far - near where the key is far
            const auto scores = [&](ggml_tensor * q, ggml_tensor * k) {
                ggml_tensor * kq =
                        ggml_mul_mat(ctx0, ggml_permute(ctx0, k, 0, 2, 1, 3), ggml_permute(ctx0, q, 0, 2, 1, 3));
                ggml_prec_set_acc(kq, GGML_PREC_F32);
                return kq;
            };
            kq_b = ggml_mul(ctx0, ggml_sub(ctx0, scores(q_far, k_far), scores(q, k)), inp_mesa->rule_far);
        }
    }

    llama_mesa_build_attention(gctx, inp_mesa, q, k, kq_b, inp_mesa->kq_mask, sinks, kq_scale, il);

    ggml_tensor * cur = gctx.build_attn_mha(q, k, v, kq_b, inp_mesa->kq_mask, sinks, nullptr, 0, kq_scale, il);
    if (cache.v_rot) {
        cur = llama_mul_mat_hadamard(ctx0, cur, cache.v_rot);
    }
    gctx.cb(cur, "kqv_out", il);

    return cur;
}

static ggml_tensor * build_attn(const llm_graph_context & gctx, llm_graph_input_mesa * inp_mesa,
        const mesa_cache & cache, ggml_tensor *& q_cur, ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * kq_b,
        ggml_tensor * sinks, float kq_scale, int il) {
    auto * ctx0 = gctx.ctx0;
    auto * gf   = gctx.gf;

    if (inp_mesa->q_scale) {
        q_cur = ggml_mul(ctx0, q_cur, inp_mesa->q_scale);
    }

    if (inp_mesa->g.n_rules > 0) {
        return build_attn_rules(gctx, inp_mesa, cache, q_cur, k_cur, v_cur, sinks, kq_scale, il);
    }
    if (!inp_mesa->g.window) {
        return nullptr;
    }

    const auto & cparams  = gctx.cparams;
    const auto & hparams  = gctx.hparams;
    const auto * mctx_cur = cache.mctx;
    const auto & rope     = inp_mesa->m.rope[il];

    // keys and values go to the cache once, at the place where the last chunk will look for them
    if (k_cur) {
        ggml_tensor * k = rope.rotates ? rope_move(ctx0, rope, k_cur, inp_mesa->k_delta) : k_cur;
        ggml_tensor * v = v_cur;

        if (cache.k_rot) {
            k = llama_mul_mat_hadamard(ctx0, k, cache.k_rot);
        }
        if (cache.v_rot) {
            v = llama_mul_mat_hadamard(ctx0, v, cache.v_rot);
        }

        ggml_build_forward_expand(gf, q_cur);
        ggml_build_forward_expand(gf, v);
        ggml_build_forward_expand(gf, k);

        ggml_build_forward_expand(gf, mctx_cur->cpy_k(ctx0, k, cache.k_idxs, il));
        ggml_build_forward_expand(gf, mctx_cur->cpy_v(ctx0, v, cache.v_idxs, il));
    } else {
        // the layer attends to the keys of an earlier one
        const auto & fresh = inp_mesa->fresh[mctx_cur->get_k(ctx0, il)->view_src];

        k_cur = fresh.k;
        v_cur = fresh.v;
    }

    // attention sees the first chunk and the ubatch's own chunk, at the positions that the model learned
    ggml_tensor * k = k_cur;
    ggml_tensor * v = v_cur;

    const int64_t n_prev = inp_mesa->g.n_prev;

    if (n_prev > 0) {
        const int64_t n_embd_head_k = k_cur->ne[0];
        const int64_t n_embd_head_v = v_cur->ne[0];
        const int64_t n_head_kv     = k_cur->ne[1];

        // [n_embd_head_k, n_head_kv, n_kv, 1]
        ggml_tensor * k_cache = mctx_cur->get_k(ctx0, il);

        k_cache = ggml_view_2d(ctx0, k_cache, n_embd_head_k * n_head_kv, k_cache->ne[2], k_cache->nb[2], 0);

        ggml_tensor * k_prev = ggml_get_rows(ctx0, k_cache, inp_mesa->prev_rows); // F32
        k_prev               = ggml_reshape_3d(ctx0, k_prev, n_embd_head_k, n_head_kv, n_prev);
        if (cache.k_rot) {
            k_prev = llama_mul_mat_hadamard(ctx0, k_prev, cache.k_rot); // its own inverse
        }
        if (rope.rotates) {
            k_prev = rope_move(ctx0, rope, k_prev, inp_mesa->prev_delta);
        }
        gctx.cb(k_prev, "mesa_k_prev", il);

        ggml_tensor * v_cache = mctx_cur->get_v(ctx0, il);
        ggml_tensor * v_prev;

        if (!inp_mesa->m.v_trans) {
            // [n_embd_head_v, n_head_kv, n_kv, 1]
            v_cache = ggml_view_2d(ctx0, v_cache, n_embd_head_v * n_head_kv, v_cache->ne[2], v_cache->nb[2], 0);

            v_prev = ggml_get_rows(ctx0, v_cache, inp_mesa->prev_rows); // F32
        } else {
            // [n_kv, n_head_kv, n_embd_head_v, 1]: the first chunk's rows, then those of the chunk itself
            const int64_t start   = inp_mesa->g.start;
            const int64_t n_first = start == 0 ? 0 : inp_mesa->m.plan.chunk_starts[1];

            const auto range = [&](int64_t from, int64_t n) {
                ggml_tensor * t = ggml_view_2d(ctx0, v_cache, n, n_embd_head_v * n_head_kv, v_cache->nb[2],
                        from * ggml_type_size(v_cache->type));
                return ggml_cast(ctx0, ggml_transpose(ctx0, t), GGML_TYPE_F32);
            };

            v_prev = nullptr;
            if (n_first > 0) {
                v_prev = range(0, n_first);
            }
            if (n_prev > n_first) {
                ggml_tensor * v_own = range(start, n_prev - n_first);
                v_prev              = v_prev ? ggml_concat(ctx0, v_prev, v_own, 1) : v_own;
            }
        }
        v_prev = ggml_reshape_3d(ctx0, v_prev, n_embd_head_v, n_head_kv, n_prev);
        if (cache.v_rot) {
            v_prev = llama_mul_mat_hadamard(ctx0, v_prev, cache.v_rot);
        }
        gctx.cb(v_prev, "mesa_v_prev", il);

        k = ggml_concat(ctx0, k_prev, k_cur, 2);
        v = ggml_concat(ctx0, v_prev, v_cur, 2);
    }

    ggml_tensor * cur;
    if (cparams.flash_attn && kq_b == nullptr && inp_mesa->m.on_cpu) {
        // as in build_attn_mha, but the CPU kernel takes f32 keys and values as they are: no rounding, no copy
        cur = ggml_flash_attn_ext(ctx0, ggml_permute(ctx0, q_cur, 0, 2, 1, 3), ggml_permute(ctx0, k, 0, 2, 1, 3),
                ggml_permute(ctx0, v, 0, 2, 1, 3), inp_mesa->kq_mask, kq_scale, hparams.f_max_alibi_bias,
                hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f);
        ggml_flash_attn_ext_add_sinks(cur, sinks);
        ggml_prec_set_acc(cur, GGML_PREC_F32);
        cur = ggml_reshape_2d(ctx0, cur, cur->ne[0] * cur->ne[1], cur->ne[2]);
        ggml_build_forward_expand(gf, cur);
    } else {
        cur = gctx.build_attn_mha(q_cur, k, v, kq_b, inp_mesa->kq_mask, sinks, nullptr, 0, kq_scale, il);
    }
    gctx.cb(cur, "kqv_out", il);

    return cur;
}

static void learn_layer(const llm_graph_context & gctx, llm_graph_input_mesa * inp_mesa,
        const llama_kv_cache_context * mctx, ggml_tensor * k_cur, ggml_tensor * v_cur, int il) {
    auto & rope  = gctx.cparams.mesa->rope;
    auto & fresh = inp_mesa->fresh[mctx->get_k(gctx.ctx0, il)->view_src];

    if (k_cur) {
        fresh    = { k_cur, v_cur, il };
        rope[il] = find_rope(k_cur);
    } else {
        rope[il] = rope[fresh.il];
    }
}

ggml_tensor * llama_mesa_build_attn(const llm_graph_context & gctx, llm_graph_input_attn_kv * inp, ggml_tensor *& q_cur,
        ggml_tensor * k_cur, ggml_tensor * v_cur, ggml_tensor * kq_b, ggml_tensor * sinks, float kq_scale, int il) {
    if (!inp->mesa) {
        return nullptr;
    }
    learn_layer(gctx, inp->mesa, inp->mctx, k_cur, v_cur, il);

    const mesa_cache cache = { inp->mctx, inp->self_k_idxs, inp->self_v_idxs, inp->self_k_rot, inp->self_v_rot };

    return build_attn(gctx, inp->mesa, cache, q_cur, k_cur, v_cur, kq_b, sinks, kq_scale, il);
}

ggml_tensor * llama_mesa_build_attn(const llm_graph_context & gctx, llm_graph_input_attn_kv_iswa * inp,
        ggml_tensor *& q_cur, ggml_tensor *& k_cur, ggml_tensor * v_cur, ggml_tensor * kq_b, ggml_tensor * sinks,
        float kq_scale, int il) {
    if (!inp->mesa) {
        return nullptr;
    }

    learn_layer(
            gctx, inp->mesa, gctx.hparams.is_swa(il) ? inp->mctx->get_swa() : inp->mctx->get_base(), k_cur, v_cur, il);

    if (gctx.hparams.is_swa(il)) {
        // as trained: a window over the tokens in front, at their logical positions
        const auto to_logical = [&](ggml_tensor *& t) {
            const auto rope = find_rope(t);
            if (rope.problem) {
                gctx.cparams.mesa->rope[il].problem = rope.problem; // of a query: told when Mesa is enabled
            }
            if (rope.rotates) {
                t = rope_move(gctx.ctx0, rope, t, inp->mesa->swa_delta);
            }
        };
        if (inp->mesa->swa_delta) {
            to_logical(q_cur);
            if (k_cur) {
                to_logical(k_cur);
            }
        }
        return nullptr;
    }

    const mesa_cache cache = { inp->mctx->get_base(), inp->self_k_idxs, inp->self_v_idxs, inp->self_k_rot,
        inp->self_v_rot };

    return build_attn(gctx, inp->mesa, cache, q_cur, k_cur, v_cur, kq_b, sinks, kq_scale, il);
}

void llama_mesa_build_attention(const llm_graph_context & gctx, llm_graph_input_mesa * inp, ggml_tensor * q,
        ggml_tensor * k, ggml_tensor * kq_b, ggml_tensor * kq_mask, ggml_tensor * sinks, float kq_scale, int il) {
    if (!inp) {
        return;
    }
    auto & m = *gctx.cparams.mesa;

    const auto place = [il](bool on, const llama_mesa_attention_rows & wanted) {
        const auto it = std::find(wanted.layers.begin(), wanted.layers.end(), il);
        return on && it != wanted.layers.end() ? (int) (it - wanted.layers.begin()) : -1;
    };
    const int i_attention = place(inp->g.attention, m.attention);
    const int i_read      = place(inp->g.choose, m.read_by);
    if (i_attention < 0 && i_read < 0) {
        return;
    }

    auto * ctx0 = gctx.ctx0;

    const auto & hparams = gctx.hparams;

    // as build_attn_mha computes it without flash attention, but for the queries: of the one token those of the heads of a group are columns of
    // a product, so that each key is read once
    const int64_t n_head_kv = k->ne[1];
    const int64_t n_group   = q->ne[1] / n_head_kv;

    ggml_tensor * q_group = ggml_view_3d(ctx0, q, q->ne[0], n_group, n_head_kv, q->nb[1], n_group * q->nb[1], 0);
    ggml_tensor * kq      = ggml_mul_mat(ctx0, ggml_permute(ctx0, k, 0, 2, 1, 3), q_group);
    ggml_prec_set_acc(kq, GGML_PREC_F32);
    kq = ggml_reshape_3d(ctx0, kq, kq->ne[0], 1, n_group * n_head_kv); // [n_kv, 1, n_head]

    const float cap = hparams.f_attn_logit_softcapping;
    if (gctx.arch == LLM_ARCH_GROK) {
        kq = ggml_scale(ctx0, ggml_tanh(ctx0, ggml_scale(ctx0, kq, hparams.f_attn_out_scale / cap)), cap);
    }
    if (hparams.attn_soft_cap) {
        kq = ggml_scale(ctx0, ggml_tanh(ctx0, ggml_scale(ctx0, kq, 1.0f / cap)), cap);
    }
    if (kq_b) {
        kq = ggml_add(ctx0, kq, kq_b);
    }
    const auto output = [&](int32_t kind, ggml_tensor * mask) {
        ggml_tensor * rows = ggml_soft_max_ext(ctx0, kq, mask, kq_scale, hparams.f_max_alibi_bias); // [n_kv, 1, n_head]
        ggml_soft_max_add_sinks(rows, sinks);
        if (kind != LLAMA_MESA_ATTENTION_HEADS) {
            const auto op     = kind == LLAMA_MESA_ATTENTION_MAX ? GGML_OP_POOL_MAX : GGML_OP_POOL_AVG;
            const auto n_head = (int) kq->ne[2];

            rows = ggml_reshape_2d(ctx0, rows, kq->ne[0], n_head);
            rows = ggml_pool_2d(ctx0, rows, op, 1, n_head, 1, n_head, 0, 0); // [n_kv, 1]
        }
        gctx.cb(rows, "mesa_attention", il);
        ggml_set_output(rows);
        ggml_build_forward_expand(gctx.gf, rows);
        return rows;
    };
    if (i_attention >= 0) {
        m.attention.built[i_attention] = 1;
        inp->attention[i_attention]    = output(m.attention.kind, kq_mask);
    }
    if (i_read >= 0) {
        m.read_by.built[i_read] = 1;
        inp->read_by[i_read]    = output(m.read_by.kind, inp->read_mask);
    }
}

static void read_attention(llama_context & lctx, const std::vector<ggml_tensor *> & outputs,
        llama_mesa_attention_rows & res, int32_t n_keys) {
    ggml_backend_sched_synchronize(lctx.get_sched());

    res.n_keys = n_keys;
    res.n_rows = (int32_t) ggml_nrows(outputs.front());
    res.data.resize((size_t) outputs.size() * res.n_rows * n_keys);

    float * dst = res.data.data();
    for (const ggml_tensor * rows : outputs) {
        for (int32_t r = 0; r < res.n_rows; ++r) {
            ggml_backend_tensor_get(rows, dst, r * rows->ne[0] * sizeof(float), n_keys * sizeof(float));
            dst += n_keys;
        }
    }
}

void llama_mesa_ubatch_end(llama_context & lctx, const llm_graph_result & res, const llama_ubatch & ubatch) {
    auto & m = *lctx.get_cparams().mesa;

    const auto & g       = lctx.get_cparams().mesa_graph;
    const int32_t n_keys = (int32_t) ubatch.pos[0] + 1;

    const llm_graph_input_mesa * inp = nullptr;
    for (const auto & input : res.inputs) {
        inp = inp ? inp : dynamic_cast<const llm_graph_input_mesa *>(input.get());
    }

    m.attention.n_keys = 0;
    if (inp && g.attention) {
        read_attention(lctx, inp->attention, m.attention, n_keys);
    }

    std::vector<float> weights; // of all layers together
    const auto sum_up = [&]() {
        read_attention(lctx, inp->read_by, m.read_by, n_keys);

        weights.assign(n_keys, 0.0f);
        for (auto row = m.read_by.data.begin(); row != m.read_by.data.end(); row += n_keys) {
            std::transform(row, row + n_keys, weights.begin(), weights.begin(), std::plus<float>());
        }
    };
    if (inp && g.choose) {
        sum_up();
        if (m.choose_again(n_keys - 1, weights.data())) { // the same graph, another mask
            auto & graph = const_cast<llm_graph_result &>(res);
            graph.set_inputs(&ubatch);
            lctx.mesa_compute(graph.get_gf(), false);
            sum_up();
        }
    }
    if (ubatch.n_tokens == 1) {
        m.note_read(n_keys - 1, weights.empty() ? nullptr : weights.data());
    } else {
        m.read.n_last = 0;
    }
    m.append(ubatch.n_tokens, ubatch.token);
}

// What a layer gets beyond the stock graph, counted from the functions above; a rotation (rope_move) is 3 nodes at most (a norm's
// weight divided out, ROPE, multiplied in again), and so is a rotation of the cache (llama_mul_mat_hadamard: reshape, product, reshape).
//
//   queries scaled                                                                                             1
//   read in its chunk (build_attn)
//       keys rotated to where they stand                                                                       3
//       of a layer without keys: the view that its cache is known by                                           1
//       cached keys: view, rows (view, GET_ROWS, reshape), cache rotation, rotation                           10
//       cached values: view, two ranges (view, transpose, CPY), CONCAT, reshape, cache rotation               12
//       fresh ones behind them: CONCAT of keys, of values                                                      2
//                                                                                                             29
//   or read by rules (build_attn_rules)
//       keys and values of the cache: as f32, cache rotation of keys                                           5
//       queries and keys rotated, by way of 0                                                                 12
//       the scores of both: 2 permutes and a product each; their difference where it counts (SUB, MUL)         8
//       softmax instead of flash attention: product, added bias, cap (3), SOFT_MAX, product, CONT              8
//                                                                                                             34
//   or a sliding-window layer: queries and keys rotated                                                        6
//
// and where it is asked for, in some layers
//   what a token attends to: 2 views, permute, product, reshape, cap (3, twice), added bias, SOFT_MAX, reshape, POOL 16
//
// Graphs that move keys have 12 nodes a layer, and stock graphs far more. tests/test_graph_size.py counts.
static const uint32_t n_nodes_layer     = 40;
static const uint32_t n_nodes_attention = 16;

uint32_t llama_mesa_n_nodes_max(const llama_mesa & m, uint32_t n_layer) {
    return n_nodes_layer * n_layer +
           n_nodes_attention * (uint32_t) (m.attention.layers.size() + m.read_by.layers.size());
}

llama_mesa_woven::llama_mesa_woven(const llama_mesa * m, const llama_ubatch *& ubatch) {
    if (!m || !ubatch->pos) {
        return;
    }
    pos.resize(ubatch->n_tokens);
    for (uint32_t i = 0; i < ubatch->n_tokens; ++i) {
        pos[i] = m->pos(ubatch->pos[i]);
    }
    copy     = *ubatch;
    copy.pos = pos.data();
    ubatch   = &copy;
}
