#include "llama-mesa.h"
#include "llama-mesa-impl.h"
#include "mesa-params.h"
#include "mesa-state.h"

#include "ggml-cpp.h"
#include "llama-batch.h"
#include "llama-context.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache.h"
#include "llama-kv-cache-iswa.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <stdexcept>

static thread_local std::string g_last_error;

static int32_t fail(const std::string & what) {
    g_last_error = what;
    return -1;
}

//
// graph
//

// note: inputs outlive the ubatch that they were built for (graph reuse), so everything is read from the state when they are set
class llm_graph_input_mesa : public llm_graph_input_i {
public:
    llm_graph_input_mesa(const llama_mesa & m, bool use_alibi, uint32_t n_pos_per_embd) : m(m), use_alibi(use_alibi), n_pos_per_embd(n_pos_per_embd) {}
    virtual ~llm_graph_input_mesa() = default;

    void set_input(const llama_ubatch * ubatch) override;
    void set_rules(int32_t pos, int32_t n_tokens);

    // the shapes are compared in llm_graph_params::allow_reuse
    bool can_reuse(const llm_graph_params & params) override {
        return params.cparams.mesa.get() == &m && g.n_rules == 0;
    }

    const llama_mesa & m;
    const bool     use_alibi;
    const uint32_t n_pos_per_embd;

    llama_mesa_graph g;

    // the ubatch's keys and values by the cache tensor that they go to: layers without keys of their own attend to them too
    struct fresh_kv {
        ggml_tensor * k  = nullptr;
        ggml_tensor * v  = nullptr;
        int           il = 0; // the layer that they are of
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
    int32_t        divisor  = 1;
    ggml_tensor *  rule_far = nullptr; // F32 [n_kv, n_tokens]  1 where the key is far, else 0
};

// M-RoPE takes four positions for each token: of a text the first three are equal, and the fourth is 0
// ref: llm_graph_input_pos::set_input
static void set_positions(ggml_tensor * t, std::vector<int32_t> & pos, uint32_t n_pos_per_embd) {
    if (n_pos_per_embd == 4) {
        const size_t n = pos.size();
        pos.resize(4*n, 0);
        std::copy_n(pos.begin(), n, pos.begin() +   n);
        std::copy_n(pos.begin(), n, pos.begin() + 2*n);
    }
    ggml_backend_tensor_set(t, pos.data(), 0, ggml_nbytes(t));
}

// mesa::visible() for a whole ubatch, by ranges: the columns are the n_rows cached rows (first chunk, then the rest of the
// ubatch's own chunk), the padding, and the ubatch's own tokens
template <typename T>
static void set_window_mask(T * data, const llama_mesa & m, const std::vector<int32_t> & rows, int32_t n_prev, int32_t pos, int32_t n_tokens, bool use_alibi) {
    const T drop = llama_cast<T>(-INFINITY);

    const auto & cs = m.plan.chunk_starts;

    const int32_t c0        = mesa::chunk_of(m.plan, pos);
    const int32_t n_rows    = (int32_t) rows.size();
    const int32_t n_first   = c0 == 0 ? n_rows : cs[1]; // rows that every token sees
    const int32_t first_end = cs.size() > 1 ? cs[1] : 0;

    const int64_t n_kv = n_prev + n_tokens;

    for (int32_t ii = 0; ii < n_tokens; ++ii) {
        const int32_t i = pos + ii;
        const int32_t c = mesa::chunk_of(m.plan, i);

        T * row = data + ii*n_kv;
        std::fill(row, row + n_kv, drop);

        const auto keep = [&](int32_t from, int32_t to) { // columns
            if (!use_alibi) {
                std::fill(row + from, row + std::max(from, to), llama_cast<T>(0.0f));
                return;
            }
            for (int32_t jj = from; jj < to; ++jj) {
                const int32_t j = jj < n_prev ? rows[jj] : pos + jj - n_prev;
                row[jj] = llama_cast<T>((float) (m.chunk_pos(j) - m.chunk_pos(i)));
            }
        };

        keep(0, c == c0 ? n_rows : n_first);
        if (pos < first_end) {
            keep(n_prev, n_prev + std::min(first_end, i + 1) - pos);
        }
        keep(n_prev + std::max(pos, cs[c]) - pos, n_prev + ii + 1);
    }
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
        std::vector<uint8_t> data(ggml_nbytes(kq_mask));
        if (kq_mask->type == GGML_TYPE_F16) {
            set_window_mask((ggml_fp16_t *) data.data(), m, rows, g.n_prev, pos, n_tokens, use_alibi);
        } else {
            set_window_mask((float *)       data.data(), m, rows, g.n_prev, pos, n_tokens, use_alibi);
        }
        ggml_backend_tensor_set(kq_mask, data.data(), 0, data.size());
    }
}

void llm_graph_input_mesa::set_rules(int32_t pos, int32_t n_tokens) {
    const size_t n_kv = kq_mask->ne[0];

    std::vector<float> mask(n_kv*n_tokens, -INFINITY);
    std::vector<float> far (n_kv*n_tokens, 0.0f);

    for (int32_t ii = 0; ii < n_tokens; ++ii) {
        const int32_t i = pos + ii;
        for (int32_t j = 0; j <= i; ++j) {
            if (mesa::is_kept(m.params, i, j)) {
                mask[ii*n_kv + j] = 0.0f;
                far [ii*n_kv + j] = mesa::is_far(m.params, i, j);
            }
        }
    }

    if (kq_mask->buffer) {
        if (kq_mask->type == GGML_TYPE_F16) {
            std::vector<ggml_fp16_t> data(mask.size());
            ggml_fp32_to_fp16_row(mask.data(), data.data(), mask.size());
            ggml_backend_tensor_set(kq_mask, data.data(), 0, ggml_nbytes(kq_mask));
        } else {
            ggml_backend_tensor_set(kq_mask, mask.data(), 0, ggml_nbytes(kq_mask));
        }
    }
    if (rule_far && rule_far->buffer) {
        ggml_backend_tensor_set(rule_far, far.data(), 0, ggml_nbytes(rule_far));
    }

    std::vector<int32_t> q_delta(n_tokens, 0);
    std::vector<int32_t> k_delta(n_kv,     0);
    std::vector<int32_t> q_pos  (n_tokens, 0);
    std::vector<int32_t> k_pos  (n_kv,     0);

    // the ubatch's own keys are in the cache by now
    const auto stands = [&](int32_t j) { return j < m.n_past() ? m.key_pos[j] : mesa::key_pos(m.plan, j); };

    for (int32_t ii = 0; ii < n_tokens; ++ii) {
        const int32_t i = pos + ii;
        const int32_t q = g.n_rules == 1 ? 0 : mesa::weave(m.params, m.plan, i, 0).q;

        q_delta[ii] = (divisor > 1 ? 0 : q) - m.pos(i);
        q_pos  [ii] = q;
    }
    const int32_t last = pos + n_tokens - 1;
    for (int32_t j = 0; j <= last; ++j) {
        int32_t k;
        if (g.n_rules == 1) { // one query, at 0
            k = -(mesa::is_far(m.params, last, j) ? mesa::weave(m.params, m.plan, last, j).q : last - j);
        } else {
            k = mesa::weave(m.params, m.plan, last, j).k;
        }
        k_delta[j] = (divisor > 1 ? 0 : k) - stands(j);
        k_pos  [j] = k;
    }

    const auto set = [&](ggml_tensor * t, std::vector<int32_t> & data) {
        if (t && t->buffer) {
            set_positions(t, data, n_pos_per_embd);
        }
    };
    set(rule.q_delta, q_delta);
    set(rule.k_delta, k_delta);
    set(rule.q_pos,   q_pos);
    set(rule.k_pos,   k_pos);
}

llm_graph_input_mesa * llama_mesa_build_inp(const llm_graph_context & gctx, const llama_kv_cache_context * mctx) {
    const auto & cparams = gctx.cparams;

    if (!cparams.mesa || cparams.mesa_graph == llama_mesa_graph()) {
        return nullptr;
    }

    const int64_t n_pos = gctx.hparams.n_pos_per_embd();

    auto inp = std::make_unique<llm_graph_input_mesa>(*cparams.mesa, gctx.hparams.use_alibi, n_pos);

    inp->g = cparams.mesa_graph;

    auto * ctx0 = gctx.ctx0;

    const auto new_input = [&](ggml_type type, int64_t ne0, int64_t ne1, int64_t ne2, const char * name) {
        ggml_tensor * t = ggml_new_tensor_3d(ctx0, type, ne0, ne1, ne2);
        ggml_set_input(t);
        ggml_set_name(t, name);
        return t;
    };

    const int64_t n_tokens = gctx.n_tokens;
    const int64_t n_prev   = inp->g.n_prev;

    if (inp->g.scale) {
        inp->q_scale = new_input(GGML_TYPE_F32, 1, 1, n_tokens, "mesa_q_scale");
    }
    if (inp->g.window) {
        inp->k_delta = new_input(GGML_TYPE_I32, n_tokens*n_pos, 1, 1, "mesa_k_delta");
        // flash attention requires an f16 mask
        inp->kq_mask = new_input(cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32, n_prev + n_tokens, n_tokens, 1, "mesa_kq_mask");
        if (n_prev > 0) {
            inp->prev_rows  = new_input(GGML_TYPE_I32, n_prev,       1, 1, "mesa_prev_rows");
            inp->prev_delta = new_input(GGML_TYPE_I32, n_prev*n_pos, 1, 1, "mesa_prev_delta");
        }
    }
    if (inp->g.swa) {
        inp->swa_delta = new_input(GGML_TYPE_I32, n_tokens*n_pos, 1, 1, "mesa_swa_delta");
    }

    if (inp->g.n_rules > 0) {
        const int64_t n_kv = mctx->get_n_kv();

        inp->divisor = cparams.mesa->params.method == mesa::method_leaky_rerope ? cparams.mesa->plan.stair_width : 1;

        inp->kq_mask      = new_input(cparams.flash_attn ? GGML_TYPE_F16 : GGML_TYPE_F32, n_kv, n_tokens, 1, "mesa_kq_mask");
        inp->rule.q_delta = new_input(GGML_TYPE_I32, n_tokens*n_pos, 1, 1, "mesa_rule_q_delta");
        inp->rule.k_delta = new_input(GGML_TYPE_I32, n_kv*n_pos,     1, 1, "mesa_rule_k_delta");
        if (inp->g.n_rules > 1) {
            inp->rule_far = new_input(GGML_TYPE_F32, n_kv, n_tokens, 1, "mesa_rule_far");
        }
        if (inp->divisor > 1) {
            inp->rule.q_pos = new_input(GGML_TYPE_I32, n_tokens*n_pos, 1, 1, "mesa_rule_q_pos");
            inp->rule.k_pos = new_input(GGML_TYPE_I32, n_kv*n_pos,     1, 1, "mesa_rule_k_pos");
        }
    }

    return (llm_graph_input_mesa *) gctx.res->add_input(std::move(inp));
}

// The ROPE node that t [n_embd_head, n_head, n_tokens] went through, and no ROPE node if there is none. Architectures differ in which
// layers rotate, in base, scale, YaRN and dimensions of a layer, in where the rotated dimensions lie, and in what follows the rotation:
// the graph knows.
static llama_mesa_rope find_rope(const ggml_tensor * t, llama_mesa_rope res = {}, int32_t offset = 0) {
    for (; t; t = t->src[0]) {
        switch (t->op) {
            case GGML_OP_ROPE:
                res.rotates = true;
                memcpy(res.op_params, t->op_params, sizeof(res.op_params));
                res.op_params[15] += offset; // see ggml_rope_set_offset
                res.factors = t->src[2];
                return res;
            case GGML_OP_CONCAT:
                if (t->op_params[0] == 0) { // some dimensions of a head rotate, others do not
                    const auto first = find_rope(t->src[0], res, offset);
                    return first.rotates ? first : find_rope(t->src[1], res, offset + t->src[0]->ne[0]);
                }
                break;
            case GGML_OP_MUL:
                if (t->src[1]->ne[0] > 1) { // a norm's weight, or values of its own for each token
                    res.lossy  = res.lossy || res.weight || t->src[1]->op != GGML_OP_NONE || ggml_nrows(t->src[1]) > 1;
                    res.weight = t->src[1];
                }
                break;
            case GGML_OP_ADD:
            case GGML_OP_NORM:
                res.lossy = true;
                break;
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
            case GGML_OP_VIEW:
                break;
            default:
                return {};
        }
    }
    return {};
}

// Rotate keys (or queries) on by pos positions [n_embd_head_k, n_head_kv, n]. RoPE being a group, R(p + q) = R(p) R(q), for every kind
// of it, scaled or not. The attention factor was applied by the first rotation, so that this one must have magnitude 1.
static ggml_tensor * rope_move(ggml_context * ctx, const llama_mesa_rope & rope, ggml_tensor * k, ggml_tensor * pos, int32_t divisor = 1) {
    const auto f32 = [&](int i) { float v; memcpy(&v, rope.op_params + i, sizeof(v)); return v; };

    const float freq_scale = f32(6)/divisor;
    const float ext_factor = f32(7);

    // ggml multiplies by this when it mixes YaRN's two frequencies
    const float attn_factor = ext_factor != 0.0f ? 1.0f/(1.0f + 0.1f*logf(1.0f/freq_scale)) : 1.0f;

    const int32_t * p = rope.op_params;

    if (rope.weight) {
        k = ggml_div(ctx, k, rope.weight);
    }

    ggml_tensor * res;
    if (p[2] & GGML_ROPE_TYPE_MROPE) {
        int sections[GGML_MROPE_SECTIONS];
        std::copy_n(p + 11, GGML_MROPE_SECTIONS, sections);
        res = ggml_rope_multi(ctx, k, pos, rope.factors, p[1], sections, p[2], p[4], f32(5), freq_scale, ext_factor, attn_factor, f32(9), f32(10));
    } else {
        res = ggml_rope_ext(ctx, k, pos, rope.factors, p[1], p[2], p[4], f32(5), freq_scale, ext_factor, attn_factor, f32(9), f32(10));
    }
    if (p[15] != 0) {
        res = ggml_rope_set_offset(res, p[15]);
    }
    return rope.weight ? ggml_mul(ctx, res, rope.weight) : res;
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
static ggml_tensor * build_attn_rules(
        const llm_graph_context & gctx,
        llm_graph_input_mesa * inp_mesa,
        const mesa_cache & cache,
        ggml_tensor  * q,
        ggml_tensor  * k_cur,
        ggml_tensor  * v_cur,
        ggml_tensor  * sinks,
        float          kq_scale,
        int            il) {
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

    const auto move = [&](ggml_tensor * t, ggml_tensor * delta, ggml_tensor * pos) {
        t = rope_move(ctx0, rope, t, delta);
        return divisor > 1 ? rope_move(ctx0, rope, t, pos, divisor) : t;
    };

    if (ggml_is_quantized(v->type)) {
        v = ggml_cast(ctx0, v, GGML_TYPE_F32);
    }

    ggml_tensor * kq_b = nullptr;
    if (rope.rotates) {
        ggml_tensor * q_far = move(q, inp_mesa->rule.q_delta, inp_mesa->rule.q_pos);
        ggml_tensor * k_far = move(k, inp_mesa->rule.k_delta, inp_mesa->rule.k_pos);

        if (inp_mesa->g.n_rules == 1) {
            q = q_far;
            k = k_far;
        } else {
            // added to the scores: far - near where the key is far
            const auto scores = [&](ggml_tensor * q, ggml_tensor * k) {
                ggml_tensor * kq = ggml_mul_mat(ctx0, ggml_permute(ctx0, k, 0, 2, 1, 3), ggml_permute(ctx0, q, 0, 2, 1, 3));
                ggml_prec_set_acc(kq, GGML_PREC_F32);
                return kq;
            };
            kq_b = ggml_mul(ctx0, ggml_sub(ctx0, scores(q_far, k_far), scores(q, k)), inp_mesa->rule_far);
        }
    }

    ggml_tensor * cur = gctx.build_attn_mha(q, k, v, kq_b, inp_mesa->kq_mask, sinks, nullptr, 0, kq_scale, il);
    if (cache.v_rot) {
        cur = llama_mul_mat_hadamard(ctx0, cur, cache.v_rot);
    }
    gctx.cb(cur, "kqv_out", il);

    return cur;
}

static ggml_tensor * build_attn(
        const llm_graph_context & gctx,
        llm_graph_input_mesa * inp_mesa,
        const mesa_cache & cache,
        ggml_tensor *& q_cur,
        ggml_tensor  * k_cur,
        ggml_tensor  * v_cur,
        ggml_tensor  * kq_b,
        ggml_tensor  * sinks,
        float          kq_scale,
        int            il) {
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

        k_cache = ggml_view_2d(ctx0, k_cache, n_embd_head_k*n_head_kv, k_cache->ne[2], k_cache->nb[2], 0);

        ggml_tensor * k_prev = ggml_get_rows(ctx0, k_cache, inp_mesa->prev_rows); // F32
        k_prev = ggml_reshape_3d(ctx0, k_prev, n_embd_head_k, n_head_kv, n_prev);
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
            v_cache = ggml_view_2d(ctx0, v_cache, n_embd_head_v*n_head_kv, v_cache->ne[2], v_cache->nb[2], 0);

            v_prev = ggml_get_rows(ctx0, v_cache, inp_mesa->prev_rows); // F32
        } else {
            // [n_kv, n_head_kv, n_embd_head_v, 1]: the first chunk's rows, then those of the chunk itself
            const int64_t start   = inp_mesa->g.start;
            const int64_t n_first = start == 0 ? 0 : inp_mesa->m.plan.chunk_starts[1];

            const auto range = [&](int64_t from, int64_t n) {
                ggml_tensor * t = ggml_view_2d(ctx0, v_cache, n, n_embd_head_v*n_head_kv, v_cache->nb[2], from*ggml_type_size(v_cache->type));
                return ggml_cast(ctx0, ggml_transpose(ctx0, t), GGML_TYPE_F32);
            };

            v_prev = nullptr;
            if (n_first > 0) {
                v_prev = range(0, n_first);
            }
            if (n_prev > n_first) {
                ggml_tensor * v_own = range(start, n_prev - n_first);
                v_prev = v_prev ? ggml_concat(ctx0, v_prev, v_own, 1) : v_own;
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
        cur = ggml_flash_attn_ext(ctx0,
                ggml_permute(ctx0, q_cur, 0, 2, 1, 3), ggml_permute(ctx0, k, 0, 2, 1, 3), ggml_permute(ctx0, v, 0, 2, 1, 3),
                inp_mesa->kq_mask, kq_scale, hparams.f_max_alibi_bias, hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0f);
        ggml_flash_attn_ext_add_sinks(cur, sinks);
        ggml_prec_set_acc(cur, GGML_PREC_F32);
        cur = ggml_reshape_2d(ctx0, cur, cur->ne[0]*cur->ne[1], cur->ne[2]);
        ggml_build_forward_expand(gf, cur);
    } else {
        cur = gctx.build_attn_mha(q_cur, k, v, kq_b, inp_mesa->kq_mask, sinks, nullptr, 0, kq_scale, il);
    }
    gctx.cb(cur, "kqv_out", il);

    return cur;
}

static void learn_layer(
        const llm_graph_context & gctx,
        llm_graph_input_mesa * inp_mesa,
        const llama_kv_cache_context * mctx,
        ggml_tensor * k_cur,
        ggml_tensor * v_cur,
        int           il) {
    auto & rope  = gctx.cparams.mesa->rope;
    auto & fresh = inp_mesa->fresh[mctx->get_k(gctx.ctx0, il)->view_src];

    if (k_cur) {
        fresh    = { k_cur, v_cur, il };
        rope[il] = find_rope(k_cur);
    } else {
        rope[il] = rope[fresh.il];
    }
}

ggml_tensor * llama_mesa_build_attn(
        const llm_graph_context & gctx,
        llm_graph_input_attn_kv * inp,
        ggml_tensor *& q_cur,
        ggml_tensor  * k_cur,
        ggml_tensor  * v_cur,
        ggml_tensor  * kq_b,
        ggml_tensor  * sinks,
        float          kq_scale,
        int            il) {
    if (!inp->mesa) {
        return nullptr;
    }
    learn_layer(gctx, inp->mesa, inp->mctx, k_cur, v_cur, il);

    const mesa_cache cache = { inp->mctx, inp->self_k_idxs, inp->self_v_idxs, inp->self_k_rot, inp->self_v_rot };

    return build_attn(gctx, inp->mesa, cache, q_cur, k_cur, v_cur, kq_b, sinks, kq_scale, il);
}

ggml_tensor * llama_mesa_build_attn(
        const llm_graph_context & gctx,
        llm_graph_input_attn_kv_iswa * inp,
        ggml_tensor *& q_cur,
        ggml_tensor *& k_cur,
        ggml_tensor  * v_cur,
        ggml_tensor  * kq_b,
        ggml_tensor  * sinks,
        float          kq_scale,
        int            il) {
    if (!inp->mesa) {
        return nullptr;
    }

    learn_layer(gctx, inp->mesa, gctx.hparams.is_swa(il) ? inp->mctx->get_swa() : inp->mctx->get_base(), k_cur, v_cur, il);

    if (gctx.hparams.is_swa(il)) {
        // as trained: a window over the tokens in front, at their logical positions
        const auto to_logical = [&](ggml_tensor *& t) {
            const auto rope = find_rope(t);
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

    const mesa_cache cache = { inp->mctx->get_base(), inp->self_k_idxs, inp->self_v_idxs, inp->self_k_rot, inp->self_v_rot };

    return build_attn(gctx, inp->mesa, cache, q_cur, k_cur, v_cur, kq_b, sinks, kq_scale, il);
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

//
// cache
//

// sliding-window layers keep their keys apart
static llama_kv_cache * get_kv_swa(const llama_context & lctx) {
    const auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(lctx.get_memory());
    return iswa ? iswa->get_swa() : nullptr;
}

// the keys of the layers that see everything; null: a kind of memory that Mesa does not know
static llama_kv_cache * get_kv(const llama_context & lctx) {
    if (const auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(lctx.get_memory())) {
        return iswa->get_base();
    }
    return dynamic_cast<llama_kv_cache *>(lctx.get_memory());
}

uint32_t llama_mesa_n_ubatch(const llama_mesa & m, const llama_batch_allocr & balloc, uint32_t n_ubatch) {
    const auto & batch = balloc.get_batch();

    const uint32_t i = balloc.get_n_used();
    if (i >= (uint32_t) batch.n_tokens) {
        return n_ubatch;
    }
    return mesa::n_tokens_ubatch(m.params, m.plan, batch.pos[i], n_ubatch);
}

bool llama_mesa_refuses(const llama_mesa * m, const char * what) {
    if (m) {
        LLAMA_LOG_ERROR("%s: not possible while Mesa-Extrapolation is on, nothing was changed\n", what);
    }
    return m != nullptr;
}

// cell i holds token i, and nothing else is in the cache
static bool cells_in_order(const llama_kv_cache & kv, int32_t n) {
    const auto & cells = kv.get_cells(0);

    if ((int32_t) cells.get_used() != n || (int32_t) cells.used_max_p1() != n) {
        return false;
    }
    for (int32_t i = 0; i < n; ++i) {
        if (cells.is_empty(i) || cells.pos_get(i) != i || !cells.seq_has(i, 0)) {
            return false;
        }
    }
    return true;
}

class llm_graph_input_mesa_move : public llm_graph_input_i {
public:
    void set_input(const llama_ubatch * ubatch) override {
        GGML_UNUSED(ubatch);

        set_positions(delta, data, n_pos_per_embd);
        if (k_rot && k_rot->buffer) {
            kv->set_input_k_rot(k_rot);
        }
    }

    const llama_kv_cache * kv;

    uint32_t n_pos_per_embd;

    std::vector<int32_t> data;

    ggml_tensor * delta;           // I32 [n_rows*n_pos]
    ggml_tensor * k_rot = nullptr; // note: its own inverse
};

// rotate the cached keys lo .. hi-1 on by delta[lo .. hi-1]
static bool move_keys(llama_context & lctx, llama_kv_cache & kv, const int32_t * delta, int32_t lo, int32_t hi) {
    const auto & hparams = lctx.get_model().hparams;
    const auto & rope    = lctx.get_cparams().mesa->rope;

    auto * sched = lctx.get_sched();
    auto * res   = lctx.get_gf_res_reserve();

    ggml_backend_sched_reset(sched);
    res->reset();

    auto * ctx = res->get_ctx();
    auto * gf  = res->get_gf();

    const int64_t n = hi - lo;

    auto inp = std::make_unique<llm_graph_input_mesa_move>();
    inp->kv    = &kv;
    inp->data  = std::vector<int32_t>(delta + lo, delta + hi);
    inp->n_pos_per_embd = hparams.n_pos_per_embd();
    inp->delta = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n*hparams.n_pos_per_embd());
    ggml_set_input(inp->delta);
    inp->k_rot = kv.build_input_k_rot(ctx);

    bool any = false;
    for (uint32_t il : kv.get_layer_ids()) {
        if (!rope[il].rotates) {
            continue;
        }
        any = true;

        ggml_tensor * k = kv.get_k_storage(il); // [n_embd_k_gqa, kv_size, 1]

        const int64_t n_embd_head = hparams.n_embd_head_k(il);

        k = ggml_view_3d(ctx, k, n_embd_head, hparams.n_head_kv(il), n, ggml_row_size(k->type, n_embd_head), k->nb[1], lo*k->nb[1]);

        ggml_tensor * cur = ggml_cast(ctx, k, GGML_TYPE_F32);
        if (inp->k_rot) {
            cur = llama_mul_mat_hadamard(ctx, cur, inp->k_rot);
        }
        cur = rope_move(ctx, rope[il], cur, inp->delta);
        if (inp->k_rot) {
            cur = llama_mul_mat_hadamard(ctx, cur, inp->k_rot);
        }
        ggml_build_forward_expand(gf, ggml_cpy(ctx, cur, k));
    }
    if (!any) {
        return true;
    }

    res->add_input(std::move(inp));

    if (!ggml_backend_sched_alloc_graph(sched, gf)) {
        LLAMA_LOG_ERROR("%s: failed to allocate the graph that moves keys\n", __func__);
        return false;
    }
    res->set_inputs(nullptr);

    if (lctx.graph_compute(gf, true) != GGML_STATUS_SUCCESS) {
        LLAMA_LOG_ERROR("%s: failed to move keys\n", __func__);
        return false;
    }
    lctx.synchronize();

    return true;
}

// bring every cached key to where the plan wants it
static bool apply_key_moves(llama_context & lctx, llama_kv_cache & kv, llama_mesa & m) {
    if (!m.keys_stale) {
        return true;
    }

    std::vector<int32_t> delta;
    int32_t lo;
    int32_t hi;
    m.key_moves(delta, lo, hi);

    if (lo >= hi) {
        m.keys_stale = false;
        return true;
    }

    lctx.synchronize();

    const int32_t n_rows_max = 2048; // bounds the memory of the f32 copies

    bool ok = true;
    for (int32_t i = lo; ok && i < hi; i += n_rows_max) {
        const int32_t end = std::min(hi, i + n_rows_max);

        // rows in between may have to stay
        if (std::all_of(delta.begin() + i, delta.begin() + end, [](int32_t d) { return d == 0; })) {
            continue;
        }
        ok = move_keys(lctx, kv, delta.data(), i, end);
        for (int32_t j = i; ok && j < end; ++j) {
            m.key_pos[j] += delta[j];
        }
    }

    // the scheduler was used for another graph: reserve it again, as llama_context::memory_update does
    if (!lctx.mesa_reserve()) {
        LLAMA_LOG_ERROR("%s: failed to reserve the graph after moving keys\n", __func__);
        ok = false;
    }
    m.keys_stale = !ok;
    return ok;
}

// roll the state back to what is left in the cache
static bool sync_state(const llama_context & lctx, llama_mesa & m) {
    const auto & kv = *get_kv(lctx);

    const int32_t n = kv.seq_pos_max(0) + 1;

    // a sliding-window cache of less than full size forgets what left the window
    if (const auto * kv_swa = get_kv_swa(lctx)) {
        if (kv_swa->seq_pos_min(0) > std::max(0, n - (int32_t) lctx.get_model().hparams.n_swa + 1)) {
            fail("tokens in front of position " + std::to_string(n) + " have left the sliding-window cache: to roll back, make the context with swa_full");
            return false;
        }
    }

    if (n < m.n_past()) {
        m.roll_back(n);
        if (!cells_in_order(kv, n)) {
            fail("tokens were removed from the middle of the text: Mesa can only roll back to an earlier end of it");
            return false;
        }
    } else if ((int32_t) kv.get_cells(0).get_used() != n) {
        fail("tokens were removed from the middle of the text: Mesa can only roll back to an earlier end of it");
        return false;
    } else if (n > m.n_past()) {
        fail("the cache holds tokens that Mesa has not read");
        return false;
    }
    return true;
}

bool llama_mesa_decode_begin(llama_context & lctx, const llama_batch & batch) {
    auto & m  = *lctx.get_cparams().mesa;
    auto & kv = *get_kv(lctx);

    if (!sync_state(lctx, m)) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, llama_mesa_last_error());
        return false;
    }

    if (!batch.token && lctx.get_model().hparams.n_pos_per_embd() > 1) {
        fail("images and sounds have positions of their own in this model: a Mesa context reads tokens");
        LLAMA_LOG_ERROR("%s: %s\n", __func__, llama_mesa_last_error());
        return false;
    }

    const int32_t n_past = m.n_past();
    const int32_t n_end  = n_past + batch.n_tokens;

    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        if (batch.pos[i] != n_past + i || batch.n_seq_id[i] != 1 || batch.seq_id[i][0] != 0) {
            fail("a Mesa context reads one sequence, number 0, whose tokens follow one another: the next position is " + std::to_string(n_past + i));
            LLAMA_LOG_ERROR("%s: %s\n", __func__, llama_mesa_last_error());
            return false;
        }
    }

    if (n_end > m.n_by_hand && n_end > m.plan.last_start() && !mesa::fits(m.params, m.plan, n_end)) {
        try {
            m.set_plan(mesa::advance(m.params, m.plan, n_past, n_end));
        } catch (const std::invalid_argument & err) {
            fail(std::string("a batch of ") + std::to_string(batch.n_tokens) + " tokens cannot be read without a plan: " + err.what() + "; call llama_mesa_prompt first");
            LLAMA_LOG_ERROR("%s: %s\n", __func__, llama_mesa_last_error());
            return false;
        }
    }

    return apply_key_moves(lctx, kv, m);
}

void llama_context::set_mesa(std::shared_ptr<llama_mesa> mesa) {
    synchronize();

    auto * kv = get_kv(*this);

    kv->mesa           = mesa.get();
    if (auto * kv_swa = get_kv_swa(*this)) {
        kv_swa->mesa   = mesa.get();
    }
    cparams.mesa       = std::move(mesa);
    cparams.mesa_graph = {};

    sched_need_reserve = true; // the graphs change
}

bool llama_context::mesa_reserve() {
    const auto mctx = memory->init_full();

    const uint32_t n_tokens  = std::min(cparams.n_ctx, cparams.n_ubatch);
    const uint32_t n_outputs = std::min(n_tokens, cparams.n_outputs_max);

    // buffers only grow: first a ubatch that is read in its chunk, then the graph that the scheduler is left with
    mesa_window = true;
    const bool ok = graph_reserve(n_tokens, cparams.n_seq_max, n_outputs, mctx.get(), model.hparams.no_alloc) != nullptr;
    mesa_window = false;

    return ok && graph_reserve(n_tokens, cparams.n_seq_max, n_outputs, mctx.get(), model.hparams.no_alloc) != nullptr;
}

//
// state
//

// what fails is told by llama.cpp's own log, and kept for llama_mesa_last_error
[[noreturn]] static void fail_state(const std::string & what) {
    fail(what);
    throw std::runtime_error(what);
}

void llama_mesa_state_write(const llama_context & lctx, llama_io_write_i & io) {
    // tokens may have been removed since the last decode
    llama_mesa m = *lctx.get_cparams().mesa;
    m.roll_back(get_kv(lctx)->seq_pos_max(0) + 1);

    const auto bytes = llama_mesa_pack(m);

    const uint32_t size = bytes.size();
    io.write(&size, sizeof(size));
    io.write(bytes.data(), size);
}

void llama_mesa_state_read(llama_mesa & m, llama_io_read_i & io) {
    uint32_t size;
    io.read(&size, sizeof(size));
    if (size > (1u << 28)) {
        fail_state("the Mesa part of the state is missing or damaged");
    }
    // in pieces: a damaged size must not allocate more than there is to read
    std::vector<uint8_t> bytes;
    while (bytes.size() < size) {
        const size_t n = std::min<size_t>(size - bytes.size(), 1u << 16);
        bytes.resize(bytes.size() + n);
        io.read(bytes.data() + bytes.size() - n, n);
    }
    try {
        llama_mesa_unpack(m, bytes.data(), bytes.size());
    } catch (const std::runtime_error & err) {
        fail_state(err.what());
    }
}

void llama_mesa_state_apply(llama_context & lctx, const llama_mesa * m_new) {
    auto & m  = *lctx.get_cparams().mesa;
    auto & kv = *get_kv(lctx);

    const int32_t n = kv.seq_pos_max(0) + 1;

    if (m_new && m_new->n_past() != n) {
        kv.clear(true);
        fail_state("the plan in the state is for " + std::to_string(m_new->n_past()) + " tokens, its KV data for " + std::to_string(n));
    }
    if (!m_new && n > m.params.train_length) {
        kv.clear(true);
        fail_state("the state was saved without Mesa and holds " + std::to_string(n) + " tokens, more than train_length (" + std::to_string(m.params.train_length) + ")");
    }
    if (!cells_in_order(kv, n)) {
        kv.clear(true);
        fail_state("the state does not hold one sequence in order");
    }

    if (m_new) {
        m.plan      = m_new->plan;
        m.key_pos   = m_new->key_pos;
        m.changes   = m_new->changes;
        m.n_by_hand = m_new->n_by_hand;
    } else {
        m.plan      = {};
        m.n_by_hand = 0;
        m.changes.clear();
        m.key_pos.resize(n);
        std::iota(m.key_pos.begin(), m.key_pos.end(), 0);
    }
    m.keys_stale = true;
}

//
// C API
//

static int32_t copy_plan(const mesa::plan & pl, int32_t * chunk_starts, int32_t n_max, int32_t * anchor, int32_t * stair_width) {
    const int32_t n = (int32_t) pl.chunk_starts.size();

    if (chunk_starts) {
        std::copy_n(pl.chunk_starts.begin(), std::max(0, std::min(n, n_max)), chunk_starts);
    }
    if (anchor) {
        *anchor = pl.anchor;
    }
    if (stair_width) {
        *stair_width = pl.stair_width;
    }
    return n;
}

int32_t llama_mesa_version(void) {
    return LLAMA_MESA_VERSION;
}

const char * llama_mesa_last_error(void) {
    return g_last_error.c_str();
}

void llama_mesa_clear_error(void) {
    g_last_error.clear();
}

llama_mesa_params llama_mesa_default_params(const llama_model * model, int32_t train_length) {
    return llama_mesa_method_params(model, train_length, LLAMA_MESA_METHOD_MESA);
}

llama_mesa_params llama_mesa_method_params(const llama_model * model, int32_t train_length, int32_t method) {
    return mesa::to_c(mesa::params_default(train_length > 0 ? train_length : model->hparams.n_ctx_train, method));
}

const char * llama_mesa_method_name(int32_t method) {
    return mesa::method_name(method);
}

const char * llama_mesa_unsupported(const llama_model * model) {
    const auto & hparams = model->hparams;

    if (model->arch == LLM_ARCH_WAVTOKENIZER_DEC) {
        return "it makes sound of tokens, and has no cache";
    }
    if (hparams.vocab_only) {
        return "the model was loaded with its vocabulary only";
    }
    if (llama_model_has_encoder(model)) {
        return "it has an encoder, whose attention is not causal";
    }
    if (!hparams.causal_attn) {
        return "it is encoder-only: its attention is not causal";
    }
    if (llama_model_is_recurrent(model)) {
        return "it is recurrent: it keeps a state, not the keys of every token";
    }
    if (llama_model_is_hybrid(model)) {
        return "it is a hybrid of recurrent and attention layers, not supported yet";
    }
    if (llama_model_is_diffusion(model)) {
        return "it is a diffusion model: its attention is not causal";
    }
    if (model->arch == LLM_ARCH_DEEPSEEK4 || model->arch == LLM_ARCH_MINIMAX_M3) {
        return "its sparse attention keeps a cache of its own kind";
    }
    if (model->arch == LLM_ARCH_EAGLE3 || model->arch == LLM_ARCH_DFLASH || model->arch == LLM_ARCH_GEMMA4_ASSISTANT) {
        return "it is the draft head of another model, and reads that one's state";
    }
    if (hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
        bool all = true;
        for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
            all = all && hparams.is_swa(il);
        }
        if (all) {
            return "all of its layers have a sliding window: none of them sees further than that";
        }
        if (hparams.use_alibi) {
            return "it has both ALiBi and sliding-window layers";
        }
    }
    if (hparams.is_mla() || hparams.n_lora_kv > 0) {
        return "it has multi-head latent attention (MLA), whose cache holds no keys, not supported yet";
    }
    if (model->pos_embd) {
        return "it has learned absolute position embeddings: there is no relative distance to weave";
    }
    return nullptr;
}

// note: where flash attention is left to llama.cpp (auto), it makes the cache for it and may decide against it after that, so that
// flash_attn does not tell
static bool is_v_trans(const llama_kv_cache & kv) {
    const ggml_context_ptr ctx(ggml_init({ ggml_tensor_overhead(), nullptr, true }));

    const ggml_tensor * v = kv.get_v(ctx.get(), (int32_t) kv.get_layer_ids().front(), 1, {});
    return v->nb[1] > v->nb[2]; // as build_attn_mha tells
}

int32_t llama_mesa_enable(llama_context * ctx, const llama_mesa_params * params) {
    const auto & model = ctx->get_model();

    if (const char * reason = llama_mesa_unsupported(&model)) {
        return fail(std::string("Mesa-Extrapolation does not support this model (architecture ") + llm_arch_name(model.arch) + "): " + reason);
    }

    auto * kv = get_kv(*ctx);
    if (!kv) {
        return fail(std::string("Mesa-Extrapolation does not support this model (architecture ") + llm_arch_name(model.arch) + "): it does not use the ordinary KV cache");
    }
    if (kv->get_n_seq_max() != 1) {
        return fail("Mesa-Extrapolation reads one sequence: the context was made for " + std::to_string(kv->get_n_seq_max()) + " (n_seq_max)");
    }

    auto m = std::make_shared<llama_mesa>();
    try {
        m->params = mesa::from_c(*params);
        mesa::validate(m->params);
    } catch (const std::invalid_argument & err) {
        return fail(err.what());
    }

    if (m->params.method != mesa::method_mesa) {
        const auto & hparams = model.hparams;
        const auto & cparams = ctx->get_cparams();

        const std::string name = mesa::method_name(m->params.method);

        if (hparams.use_alibi) {
            return fail("the method " + name + " weaves RoPE: this model has ALiBi");
        }
        if (hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
            return fail("the method " + name + " is not made for models with sliding-window layers");
        }
        if ((hparams.attn_soft_cap || model.arch == LLM_ARCH_GROK) && !m->params.chunked() && !m->params.exact()) {
            return fail("the method " + name + " merges two scores: this model caps its scores");
        }
        if (m->params.method == mesa::method_leaky_rerope && cparams.yarn_ext_factor != 0.0f) {
            return fail("the method " + name + " divides positions: this model scales them already (YaRN)");
        }
    }

    const int32_t n = kv->seq_pos_max(0) + 1;
    if (!cells_in_order(*kv, n)) {
        return fail("the context does not hold one sequence in order: empty it first");
    }
    if (n > m->params.train_length) {
        return fail("the context holds " + std::to_string(n) + " tokens already, more than train_length: empty it first");
    }
    m->append(n);

    m->rope.resize(model.hparams.n_layer_all);
    m->has_swa = get_kv_swa(*ctx) != nullptr;
    m->v_trans = is_v_trans(*kv);
    m->on_cpu  = model.devices.empty();
    m->n_pad   = m->v_trans || m->on_cpu ? 1 : 256;

    ctx->set_mesa(m);

    // builds the graphs, which shows how each layer rotates
    if (!ctx->mesa_reserve()) {
        ctx->set_mesa(nullptr);
        return fail("there is too little memory for the compute buffers");
    }
    if (std::any_of(m->rope.begin(), m->rope.end(), [](const llama_mesa_rope & rope) { return rope.lossy; })) {
        ctx->set_mesa(nullptr);
        return fail(std::string("Mesa-Extrapolation does not support this model (architecture ") + llm_arch_name(model.arch) + "): its keys change after their rotation in a way that cannot be undone");
    }

    return 0;
}

void llama_mesa_disable(llama_context * ctx) {
    if (llama_mesa_enabled(ctx)) {
        ctx->set_mesa(nullptr);
        ctx->get_memory()->clear(true);
    }
}

bool llama_mesa_enabled(const llama_context * ctx) {
    return ctx->get_cparams().mesa != nullptr;
}

// null, and the last error is set, if there is none or the cache is not one text from its beginning
static llama_mesa * get_mesa_synced(llama_context * ctx) {
    llama_mesa * m = ctx->get_cparams().mesa.get();
    if (!m) {
        fail("Mesa-Extrapolation is not enabled on this context");
        return nullptr;
    }
    return sync_state(*ctx, *m) ? m : nullptr;
}

int32_t llama_mesa_prompt(llama_context * ctx, int32_t n_tokens, const uint8_t * breaks) {
    llama_mesa * m = get_mesa_synced(ctx);
    if (!m) {
        return -1;
    }
    if (n_tokens < 1) {
        return fail("a text of " + std::to_string(n_tokens) + " tokens cannot be planned");
    }
    if ((int64_t) m->n_past() + n_tokens > ctx->n_ctx()) {
        return fail("the text has " + std::to_string((int64_t) m->n_past() + n_tokens) + " tokens, more than n_ctx (" + std::to_string(ctx->n_ctx()) + ")");
    }
    m->drop_unread(); // a text that was announced and not read
    try {
        m->set_plan(mesa::extend(m->params, m->plan, m->n_past(), m->n_past() + n_tokens, breaks));
    } catch (const std::invalid_argument & err) {
        return fail(err.what());
    }
    return 0;
}

int32_t llama_mesa_set_plan(llama_context * ctx, const int32_t * chunk_starts, int32_t n_chunk_starts, int32_t anchor, int32_t stair_width, int32_t n_tokens) {
    llama_mesa * m = get_mesa_synced(ctx);
    if (!m) {
        return -1;
    }
    if (m->n_past() > 0) {
        return fail("a plan can be set before the first token is read only: " + std::to_string(m->n_past()) + " are in the context");
    }
    if (!chunk_starts || n_chunk_starts < 1) {
        return fail("chunk_starts must begin with 0");
    }
    mesa::plan pl;
    pl.chunk_starts.assign(chunk_starts, chunk_starts + n_chunk_starts);
    pl.anchor      = anchor;
    pl.stair_width = stair_width;
    try {
        mesa::validate(m->params, pl, n_tokens);
    } catch (const std::invalid_argument & err) {
        return fail(err.what());
    }
    m->set_plan(std::move(pl));
    m->n_by_hand = n_tokens;
    return 0;
}

int32_t llama_mesa_get_plan(llama_context * ctx, int32_t * chunk_starts, int32_t n_max, int32_t * anchor, int32_t * stair_width) {
    const llama_mesa * m = get_mesa_synced(ctx);

    return m ? copy_plan(m->plan, chunk_starts, n_max, anchor, stair_width) : -1;
}

int32_t llama_mesa_get_key_pos(llama_context * ctx, int32_t * key_pos, int32_t n_max) {
    const llama_mesa * m = get_mesa_synced(ctx);
    if (!m) {
        return -1;
    }
    if (key_pos) {
        std::copy_n(m->key_pos.begin(), std::max(0, std::min(m->n_past(), n_max)), key_pos);
    }
    return m->n_past();
}

int32_t llama_mesa_make_plan(const llama_mesa_params * params, int32_t n_tokens, const uint8_t * breaks, int32_t * chunk_starts, int32_t n_max, int32_t * anchor, int32_t * stair_width) {
    try {
        const auto p = mesa::from_c(*params);
        mesa::validate(p);
        if (n_tokens < 1) {
            return fail("a text of " + std::to_string(n_tokens) + " tokens cannot be planned");
        }
        return copy_plan(mesa::make(p, n_tokens, breaks), chunk_starts, n_max, anchor, stair_width);
    } catch (const std::invalid_argument & err) {
        return fail(err.what());
    }
}
