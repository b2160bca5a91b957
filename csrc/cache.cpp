// The KV cache's side: which tokens are read together, keys that move, and the state that is kept in step and saved beside the keys.

#include "cache.h"

#include "last_error.h"
#include "llama-mesa-hooks.h"
#include "llama-mesa.h"
#include "rope.h"

#include "llama-batch.h"
#include "llama-context.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

using namespace mesa;

llama_kv_cache * mesa::get_kv_swa(const llama_context & lctx) {
    const auto * iswa = dynamic_cast<llama_kv_cache_iswa *>(lctx.get_memory());
    return iswa ? iswa->get_swa() : nullptr;
}

llama_kv_cache * mesa::get_kv(const llama_context & lctx) {
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

llama_mesa_graph llama_mesa_ubatch_begin(const llama_mesa & m, const llama_ubatch & ubatch) {
    return m.graph(ubatch.pos[0], ubatch.n_tokens);
}

llama_mesa_graph llama_mesa_graph_reserve(const llama_mesa & m, bool window, uint32_t n_tokens, uint32_t n_ctx) {
    return m.graph_reserve(window, n_tokens, n_ctx);
}

bool llama_mesa_refuses(const llama_mesa * m, const char * what) {
    if (m) {
        LLAMA_LOG_ERROR("%s: not possible while Mesa-Extrapolation is on, nothing was changed\n", what);
    }
    return m != nullptr;
}

bool mesa::cells_in_order(const llama_kv_cache & kv, int32_t n) {
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

void mesa::fill_cells(
        llama_kv_cache & kv, uint32_t n_pos_per_embd, int32_t n_past, const std::vector<int32_t> & tokens) {
    const int32_t n_tokens = (int32_t) tokens.size();

    llama_batch_allocr balloc(n_pos_per_embd);

    // ref: llama_kv_cache::state_read_meta
    llama_ubatch ubatch = balloc.ubatch_reserve(n_tokens, 1);
    llama_seq_id seq_id = 0;

    llama_kv_cache::slot_info sinfo = {};
    sinfo.resize(1);
    for (int32_t i = 0; i < n_tokens; ++i) {
        for (uint32_t p = 0; p < n_pos_per_embd; ++p) { // of a text in M-RoPE three are equal, and the fourth is 0
            ubatch.pos[p * n_tokens + i] = p < 3 ? n_past + i : 0;
        }
        ubatch.token[i]    = tokens[i];
        ubatch.n_seq_id[i] = 1;
        ubatch.seq_id[i]   = &seq_id;

        sinfo.idxs[0].push_back(n_past + i);
    }
    kv.apply_ubatch(sinfo, ubatch);
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

bool mesa::move_keys(llama_context & lctx, llama_kv_cache & kv, const int32_t * delta, int32_t lo, int32_t hi) {
    const auto & hparams = lctx.get_model().hparams;
    const auto & rope    = lctx.get_cparams().mesa->rope;

    auto * sched = lctx.get_sched();
    auto * res   = lctx.get_gf_res_reserve();

    ggml_backend_sched_reset(sched);
    res->reset();

    auto * ctx = res->get_ctx();
    auto * gf  = res->get_gf();

    const int64_t n = hi - lo;

    auto inp            = std::make_unique<llm_graph_input_mesa_move>();
    inp->kv             = &kv;
    inp->data           = std::vector<int32_t>(delta + lo, delta + hi);
    inp->n_pos_per_embd = hparams.n_pos_per_embd();
    inp->delta          = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n * hparams.n_pos_per_embd());
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

        k = ggml_view_3d(ctx, k, n_embd_head, hparams.n_head_kv(il), n, ggml_row_size(k->type, n_embd_head), k->nb[1],
                lo * k->nb[1]);

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

    // note: of an aborted graph some layers' keys would have moved, and nobody would know which
    if (lctx.mesa_compute(gf, true) != GGML_STATUS_SUCCESS) {
        LLAMA_LOG_ERROR("%s: failed to move keys\n", __func__);
        return false;
    }
    lctx.synchronize();

    return true;
}

int32_t mesa::apply_key_moves(llama_context & lctx, llama_kv_cache & kv, llama_mesa & m, bool may_abort) {
    if (!m.keys_stale) {
        return 0;
    }

    std::vector<int32_t> delta;
    int32_t lo;
    int32_t hi;
    m.key_moves(delta, lo, hi);

    if (lo >= hi) {
        m.keys_stale = false;
        return 0;
    }

    lctx.synchronize();

    const int32_t n_rows_max = 2048; // bounds the memory of the f32 copies

    int32_t res = 0;
    for (int32_t i = lo; res == 0 && i < hi; i += n_rows_max) {
        const int32_t end = std::min(hi, i + n_rows_max);

        // rows in between may have to stay
        if (std::all_of(delta.begin() + i, delta.begin() + end, [](int32_t d) { return d == 0; })) {
            continue;
        }
        if (may_abort && lctx.mesa_aborted()) {
            res = 2;
        } else if (!move_keys(lctx, kv, delta.data(), i, end)) {
            res = -1;
        }
        for (int32_t j = i; res == 0 && j < end; ++j) {
            m.move_key(j, delta[j]);
        }
    }

    // the scheduler was used for another graph: reserve it again, as llama_context::memory_update does
    if (!lctx.mesa_reserve()) {
        LLAMA_LOG_ERROR("%s: failed to reserve the graph after moving keys\n", __func__);
        res = -1;
    }
    m.keys_stale = res != 0;
    return res;
}

bool mesa::can_roll_back(const llama_context & lctx, int32_t n) {
    const auto * kv_swa = get_kv_swa(lctx);

    return !kv_swa || kv_swa->seq_pos_min(0) <= std::max(0, n - (int32_t) lctx.get_model().hparams.n_swa + 1);
}

bool mesa::sync_state(const llama_context & lctx, llama_mesa & m) {
    const auto & kv = *get_kv(lctx);

    const int32_t n = kv.seq_pos_max(0) + 1;

    if (!can_roll_back(lctx, n)) {
        fail("tokens in front of position " + std::to_string(n) +
                " have left the sliding-window cache: to roll back, make the context with swa_full");
        return false;
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

std::string mesa::in_loaded(const llama_mesa & m) {
    const auto & chunk = m.loaded.back();

    return "token " + std::to_string(m.n_past()) + " lies in a chunk that was loaded (" + std::to_string(chunk.start) +
           " to " + std::to_string(chunk.end) + "), which cannot go on from its middle: roll back to " +
           std::to_string(chunk.start) + " or to a chunk's start before it";
}

int32_t llama_mesa_decode_begin(llama_context & lctx, const llama_batch & batch) {
    auto & m  = *lctx.get_cparams().mesa;
    auto & kv = *get_kv(lctx);

    if (!sync_state(lctx, m)) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, llama_mesa_last_error());
        return -1;
    }

    if (!batch.token && lctx.get_model().hparams.n_pos_per_embd() > 1) {
        fail("images and sounds have positions of their own in this model: a Mesa context reads tokens");
        LLAMA_LOG_ERROR("%s: %s\n", __func__, llama_mesa_last_error());
        return -1;
    }

    const int32_t n_past = m.n_past();
    const int32_t n_end  = n_past + batch.n_tokens;

    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        if (batch.pos[i] != n_past + i || batch.n_seq_id[i] != 1 || batch.seq_id[i][0] != 0) {
            fail("a Mesa context reads one sequence, number 0, whose tokens follow one another: the next position is " +
                    std::to_string(n_past + i));
            LLAMA_LOG_ERROR("%s: %s\n", __func__, llama_mesa_last_error());
            return -1;
        }
    }

    if (n_past < m.loaded_end()) {
        fail(in_loaded(m));
        LLAMA_LOG_ERROR("%s: %s\n", __func__, llama_mesa_last_error());
        return -1;
    }

    if (batch.n_tokens > 1) {
        m.n_announced = std::max(m.n_announced, n_end);
    }

    if (n_end > m.n_by_hand && n_end > m.plan.last_start() && !mesa::fits(m.params, m.plan, n_end)) {
        try {
            m.set_plan(mesa::advance(m.params, m.plan, n_past, n_end));
        } catch (const std::invalid_argument & err) {
            fail(std::string("a batch of ") + std::to_string(batch.n_tokens) +
                    " tokens cannot be read without a plan: " + err.what() + "; call llama_mesa_prompt first");
            LLAMA_LOG_ERROR("%s: %s\n", __func__, llama_mesa_last_error());
            return -1;
        }
    }

    if (!lctx.get_cparams().causal_attn && m.plan != mesa::plan()) {
        fail("what is read by a plan is read causally: llama_set_causal_attn(ctx, true)");
        LLAMA_LOG_ERROR("%s: %s\n", __func__, llama_mesa_last_error());
        return -1;
    }

    return apply_key_moves(lctx, kv, m, true);
}

void llama_context::set_mesa(std::shared_ptr<llama_mesa> mesa) {
    synchronize();

    auto * kv = get_kv(*this);

    kv->mesa = mesa.get();
    if (auto * kv_swa = get_kv_swa(*this)) {
        kv_swa->mesa = mesa.get();
    }
    cparams.mesa       = std::move(mesa);
    cparams.mesa_graph = {};

    sched_need_reserve = true; // the graphs change
}

bool llama_context::mesa_reserve() {
    const auto mctx = memory->init_full();

    const uint32_t n_tokens  = std::min(cparams.n_ctx, cparams.n_ubatch);
    const uint32_t n_outputs = std::min(n_tokens, cparams.n_outputs_max);

    const auto reserve = [&](uint32_t n_tokens, uint32_t n_outputs) {
        return graph_reserve(n_tokens, cparams.n_seq_max, n_outputs, mctx.get(), model.hparams.no_alloc) != nullptr;
    };

    // buffers only grow: first a ubatch that is read in its chunk, then a token of which we want to know what it attends to, then
    // the graph that the scheduler is left with
    mesa_window   = true;
    const bool ok = reserve(n_tokens, n_outputs);
    mesa_window   = false;

    const bool single = !cparams.mesa->attention.layers.empty() || !cparams.mesa->read_by.layers.empty();

    return ok && (!single || reserve(1, 1)) && reserve(n_tokens, n_outputs);
}

bool llama_context::mesa_aborted() const {
    return abort_callback && abort_callback(abort_callback_data);
}

ggml_status llama_context::mesa_compute(ggml_cgraph * gf, bool batched) {
    const auto callback = abort_callback;
    set_abort_callback(nullptr, abort_callback_data);

    const auto status = graph_compute(gf, batched);
    set_abort_callback(callback, abort_callback_data);

    return status;
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

std::shared_ptr<llama_mesa> llama_mesa_state_read(const llama_mesa & m, llama_io_read_i & io) {
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
    auto res = std::make_shared<llama_mesa>(m);
    try {
        llama_mesa_unpack(*res, bytes.data(), bytes.size());
    } catch (const std::runtime_error & err) {
        fail_state(err.what());
    }
    return res;
}

void llama_mesa_state_apply(llama_context & lctx, const llama_mesa * m_new) {
    auto & m  = *lctx.get_cparams().mesa;
    auto & kv = *get_kv(lctx);

    const int32_t n = kv.seq_pos_max(0) + 1;

    if (m_new && m_new->n_past() != n) {
        kv.clear(true);
        fail_state("the plan in the state is for " + std::to_string(m_new->n_past()) + " tokens, its KV data for " +
                   std::to_string(n));
    }
    if (!m_new && n > m.params.train_length) {
        kv.clear(true);
        fail_state("the state was saved without Mesa and holds " + std::to_string(n) +
                   " tokens, more than train_length (" + std::to_string(m.params.train_length) + ")");
    }
    if (!cells_in_order(kv, n)) {
        kv.clear(true);
        fail_state("the state does not hold one sequence in order");
    }

    if (m_new) {
        m.params    = m_new->params;
        m.plan      = m_new->plan;
        m.key_pos   = m_new->key_pos;
        m.key_moved = m_new->key_moved;
        m.tokens    = m_new->tokens;
        m.loaded    = m_new->loaded;
        m.changes   = m_new->changes;
        m.n_by_hand = m_new->n_by_hand;
        m.read      = m_new->read;

        m.n_announced = m_new->n_announced;
    } else {
        m.read        = {};
        m.n_announced = 0;
        m.start_anew();
        m.plan = {};
        m.changes.clear();
        m.loaded.clear();
        m.key_pos.resize(n);
        std::iota(m.key_pos.begin(), m.key_pos.end(), 0);
        m.key_moved.assign(n, 0);
        m.tokens.assign(n, -1);
    }
    m.keys_stale       = true;
    m.attention.n_keys = 0;

    // llama.cpp would look for free cells from the first one on, and take those that have left the window, though others are free
    if (auto * kv_swa = get_kv_swa(lctx);
            kv_swa && n > 0 && kv_swa->get_size() == kv.get_size() && cells_in_order(*kv_swa, n)) {
        const int32_t token = kv_swa->get_cells(0).ext_get(n - 1).tok;

        kv_swa->seq_rm(0, n - 1, -1);
        fill_cells(*kv_swa, lctx.get_model().hparams.n_pos_per_embd(), n - 1, { token });
    }
}
