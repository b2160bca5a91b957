// The C API, llama-mesa.h.

#include "llama-mesa.h"

#include "cache.h"
#include "convert.h"
#include "last_error.h"
#include "plan.h"
#include "state.h"

#include "ggml-cpp.h"
#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>

using namespace mesa;

static thread_local std::string g_last_error;

int32_t mesa::fail(const std::string & what) {
    g_last_error = what;
    return -1;
}

static const char * const params_is_null = "params is NULL: llama_mesa_default_params makes some";
static const char * const no_length      = "the model is NULL: give one, or a train_length";

// layers that tell what a token attends to, to choose what is read: each of them reads all keys for it
static const int32_t n_layers_read_by = 2;

// false, and the last error is set: NULL
static bool has(const llama_context * ctx) {
    if (!ctx) {
        fail("the context is NULL");
    }
    return ctx != nullptr;
}

static int32_t copy_plan(
        const mesa::plan & pl, int32_t * chunk_starts, int32_t n_max, int32_t * anchor, int32_t * stair_width) {
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
    if (!mesa::method_name(method)) {
        fail("there is no method " + std::to_string(method));
        return {};
    }
    if (train_length < 1 && !model) {
        fail(no_length);
        return {};
    }
    return mesa::to_c(mesa::params_default(train_length > 0 ? train_length : model->hparams.n_ctx_train, method));
}

llama_mesa_params llama_mesa_unset_params(void) {
    return mesa::to_c(mesa::params_unset(mesa::unset));
}

int32_t llama_mesa_fill_params(const llama_model * model, llama_mesa_params * params) {
    if (!params) {
        return fail(params_is_null);
    }
    auto p = mesa::from_c(*params);
    if (p.train_length == mesa::unset) {
        if (!model) {
            return fail(no_length);
        }
        p.train_length = model->hparams.n_ctx_train;
    }
    try {
        p = mesa::fill(p);
        mesa::validate(p);
    } catch (const std::invalid_argument & err) {
        return fail(err.what());
    }
    *params = mesa::to_c(p);
    return 0;
}

const char * llama_mesa_method_name(int32_t method) {
    return mesa::method_name(method);
}

const char * llama_mesa_unsupported(const llama_model * model) {
    if (!model) {
        fail("the model is NULL");
        return "there is none: the model is NULL";
    }
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

// the layers whose attention is over the whole cache
static std::vector<int32_t> layers_that_see_everything(const llama_model & model) {
    const auto & hparams = model.hparams;

    std::vector<int32_t> res;
    for (uint32_t il = 0; il < hparams.n_layer(); ++il) {
        if (!hparams.is_swa(il) && hparams.n_head(il) > 0 && hparams.n_head_kv(il) > 0) {
            res.push_back((int32_t) il);
        }
    }
    return res;
}

// n at most: evenly of those between 40 and 80 % of the depth; where there are fewer, those that are nearest to that, too
static std::vector<int32_t> choose_layers(std::vector<int32_t> layers, int32_t n_layer, size_t n) {
    const auto away = [&](int32_t il) { return std::max(0.0, std::abs((il + 0.5) / n_layer - 0.6) - 0.2); };

    std::stable_sort(layers.begin(), layers.end(), [&](int32_t a, int32_t b) { return away(a) < away(b); });
    const size_t n_middle = std::count_if(layers.begin(), layers.end(), [&](int32_t il) { return away(il) < 1e-9; });

    std::vector<int32_t> res;
    for (size_t i = 0; i < std::min(n, layers.size()); ++i) {
        res.push_back(layers[n < n_middle ? (2 * i + 1) * n_middle / (2 * n) : i]);
    }
    std::sort(res.begin(), res.end());
    return res;
}

int32_t llama_mesa_enable(llama_context * ctx, const llama_mesa_params * params) {
    if (!has(ctx)) {
        return -1;
    }
    if (!params) {
        return fail(params_is_null);
    }
    const auto & model = ctx->get_model();

    if (const char * reason = llama_mesa_unsupported(&model)) {
        return fail(std::string("Mesa-Extrapolation does not support this model (architecture ") +
                    llm_arch_name(model.arch) + "): " + reason);
    }

    auto * kv = get_kv(*ctx);
    if (!kv) {
        return fail(std::string("Mesa-Extrapolation does not support this model (architecture ") +
                    llm_arch_name(model.arch) + "): it does not use the ordinary KV cache");
    }
    if (kv->get_n_seq_max() != 1) {
        return fail("Mesa-Extrapolation reads one sequence: the context was made for " +
                    std::to_string(kv->get_n_seq_max()) + " (n_seq_max)");
    }

    auto m = std::make_shared<llama_mesa>();
    try {
        m->params_own = m->params = mesa::from_c(*params);
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

    // what was read with a plan is not what stock llama.cpp would have read, and its keys stand elsewhere
    const auto before = ctx->get_cparams().mesa;
    if (before) {
        if (!sync_state(*ctx, *before)) {
            return -1;
        }
        if (!before->is_plain()) {
            return fail("the context holds " + std::to_string(before->n_past()) +
                        " tokens that were not read plainly: empty it first");
        }
        if (apply_key_moves(*ctx, *kv, *before, false) != 0) {
            return fail("the keys could not be moved back to where they were read: empty the context first");
        }
    }

    const int32_t n = kv->seq_pos_max(0) + 1;
    if (!cells_in_order(*kv, n)) {
        return fail("the context does not hold one sequence in order: empty it first");
    }
    if (n > m->params.train_length) {
        return fail(
                "the context holds " + std::to_string(n) + " tokens already, more than train_length: empty it first");
    }
    std::vector<int32_t> tokens(n);
    for (int32_t j = 0; j < n; ++j) {
        tokens[j] = kv->get_cells(0).ext_get(j).tok;
    }
    m->append(n, tokens.data());
    if (before) {
        m->key_moved = before->key_moved;
        m->tokens    = before->tokens;
    }

    m->rope.resize(model.hparams.n_layer_all);
    m->has_swa = get_kv_swa(*ctx) != nullptr;
    m->v_trans = is_v_trans(*kv);
    m->on_cpu  = model.devices.empty();
    m->n_pad   = m->v_trans || m->on_cpu ? 1 : 256;

    if (m->params.read_budget > 0) {
        m->read_by.layers =
                choose_layers(layers_that_see_everything(model), (int32_t) model.hparams.n_layer(), n_layers_read_by);
        m->read_by.kind = LLAMA_MESA_ATTENTION_MAX;
    }

    ctx->set_mesa(m);

    // builds the graphs, which shows how each layer rotates
    if (!ctx->mesa_reserve()) {
        ctx->set_mesa(before);
        return fail("there is too little memory for the compute buffers");
    }
    for (const auto & rope : m->rope) {
        if (rope.problem) {
            ctx->set_mesa(before);
            return fail(std::string("Mesa-Extrapolation does not support this model (architecture ") +
                        llm_arch_name(model.arch) + "): its keys cannot be rotated on: " + rope.problem);
        }
    }

    return 0;
}

void llama_mesa_disable(llama_context * ctx) {
    if (!has(ctx)) {
        return;
    }
    if (llama_mesa_enabled(ctx)) {
        ctx->set_mesa(nullptr);
        ctx->get_memory()->clear(true);
    }
}

bool llama_mesa_enabled(const llama_context * ctx) {
    return has(ctx) && ctx->get_cparams().mesa != nullptr;
}

llama_mesa * mesa::get_mesa_synced(llama_context * ctx) {
    if (!has(ctx)) {
        return nullptr;
    }
    llama_mesa * m = ctx->get_cparams().mesa.get();
    if (!m) {
        fail("Mesa-Extrapolation is not enabled on this context");
        return nullptr;
    }
    return sync_state(*ctx, *m) ? m : nullptr;
}

// false, and the last error is set: the context does not take a text of n_tokens tokens more
static bool takes(const llama_context & ctx, const llama_mesa & m, int32_t n_tokens) {
    if (n_tokens < 1) {
        fail("a text of " + std::to_string(n_tokens) + " tokens cannot be planned");
        return false;
    }
    const int64_t n = (int64_t) m.n_past() + n_tokens;
    if (n > ctx.n_ctx()) {
        fail("the text has " + std::to_string(n) + " tokens, more than n_ctx (" + std::to_string(ctx.n_ctx()) + ")");
        return false;
    }
    return true;
}

// a text that was planned by hand is being read
static bool is_by_hand(const llama_mesa & m) {
    return m.n_by_hand > 0 && m.n_past() > 0 && m.n_past() < m.plan.last_start();
}

int32_t llama_mesa_prompt(llama_context * ctx, int32_t n_tokens, const uint8_t * breaks) {
    llama_mesa * m = get_mesa_synced(ctx);
    if (!m || !takes(*ctx, *m, n_tokens)) {
        return -1;
    }
    if (m->n_past() < m->loaded_end()) {
        return fail(in_loaded(*m));
    }
    m->drop_unread(); // a text that was announced and not read
    if (is_by_hand(*m)) {
        return m->n_past();
    }

    const int32_t n_total = m->n_past() + n_tokens;
    // one alone is a generated one, also behind a text that was announced and read in part
    m->n_announced = n_tokens > 1 ? n_total : std::min(m->n_announced, m->n_past());

    // the text fits again, but some of it was read in chunks or on the stair: that is read anew, plainly
    if (n_total <= m->params.reading_length && m->n_by_hand == 0 && m->loaded.empty() &&
            m->n_past() > mesa::n_plain(m->plan)) {
        int32_t n_keep = mesa::n_plain(m->plan);
        if (!can_roll_back(*ctx, n_keep)) {
            n_keep = 0;
        }
        ctx->get_memory()->seq_rm(0, n_keep, -1);
        if (!sync_state(*ctx, *m)) {
            return -1;
        }
    }
    try {
        m->set_plan(mesa::extend(m->params, m->plan, m->n_past(), n_total, breaks, m->loaded_end()));
    } catch (const std::exception & err) {
        return fail(err.what());
    }
    return m->n_past();
}

int32_t llama_mesa_needs_breaks(llama_context * ctx, int32_t n_tokens) {
    const llama_mesa * m = get_mesa_synced(ctx);
    if (!m || !takes(*ctx, *m, n_tokens)) {
        return -1;
    }
    const int32_t n_total = m->n_past() + n_tokens;
    if (n_total <= m->params.reading_length || is_by_hand(*m)) {
        return 0;
    }
    const auto & plan = m->plan_read();
    try {
        return mesa::extend(m->params, plan, m->n_past(), n_total, nullptr, m->loaded_end()).chunk_starts !=
               plan.chunk_starts;
    } catch (const std::exception &) {
        return 0; // llama_mesa_prompt tells why
    }
}

int32_t llama_mesa_n_batch(llama_context * ctx, int32_t n_tokens, int32_t n_max) {
    if (!has(ctx)) {
        return -1;
    }
    if (n_tokens < 1 || n_max < 1) {
        return fail("a batch takes 1 token or more: n_tokens is " + std::to_string(n_tokens) + ", n_max is " +
                    std::to_string(n_max));
    }
    if (!llama_mesa_enabled(ctx)) {
        return std::min(n_tokens, n_max);
    }
    const llama_mesa * m = get_mesa_synced(ctx);
    if (!m || !takes(*ctx, *m, n_tokens)) {
        return -1;
    }
    return mesa::n_tokens_batch(m->plan, m->n_past(), n_tokens, n_max);
}

int32_t llama_mesa_set_plan(llama_context * ctx, const int32_t * chunk_starts, int32_t n_chunk_starts, int32_t anchor,
        int32_t stair_width, int32_t n_tokens) {
    llama_mesa * m = get_mesa_synced(ctx);
    if (!m) {
        return -1;
    }
    if (m->n_past() > 0) {
        return fail("a plan can be set before the first token is read only: " + std::to_string(m->n_past()) +
                    " are in the context");
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

    const int32_t n_pos = mesa::n_pos(m->plan, n_tokens);
    if (n_pos > m->params.train_length) {
        fail("the plan needs " + std::to_string(n_pos) + " positions, more than the " +
                std::to_string(m->params.train_length) +
                " that the model learned: make stair_width larger or move the anchor forward");
        return 1;
    }
    return 0;
}

int32_t llama_mesa_get_plan(
        llama_context * ctx, int32_t * chunk_starts, int32_t n_max, int32_t * anchor, int32_t * stair_width) {
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

int32_t llama_mesa_make_plan(const llama_mesa_params * params, int32_t n_tokens, const uint8_t * breaks,
        int32_t * chunk_starts, int32_t n_max, int32_t * anchor, int32_t * stair_width) {
    if (!params) {
        return fail(params_is_null);
    }
    try {
        const auto p = mesa::from_c(*params);
        mesa::validate(p);
        if (n_tokens < 1) {
            return fail("a text of " + std::to_string(n_tokens) + " tokens cannot be planned");
        }
        return copy_plan(mesa::make(p, n_tokens, breaks), chunk_starts, n_max, anchor, stair_width);
    } catch (const std::exception & err) { // memory may be short, too
        return fail(err.what());
    }
}

//
// attention
//

// Ask layers for what tokens attend to. false, and the last error is set
static bool set_layers(
        llama_context & ctx, llama_mesa_attention_rows & rows, std::vector<int32_t> layers, int32_t kind) {
    rows        = {};
    rows.layers = std::move(layers);
    rows.kind   = kind;

    ctx.set_mesa(ctx.get_cparams().mesa); // the graphs change
    try {
        ctx.sched_reserve();
    } catch (const std::exception & err) {
        fail(std::string("there is too little memory for the compute buffers: ") + err.what());
        return false;
    }
    for (size_t i = 0; i < rows.layers.size(); ++i) {
        if (!rows.built[i]) {
            fail("layer " + std::to_string(rows.layers[i]) + " has no attention over the whole text");
            return false;
        }
    }
    return true;
}

// the same, or back to what it was before, and the last error is set
static bool change_layers(
        llama_context & ctx, llama_mesa_attention_rows & rows, std::vector<int32_t> layers, int32_t kind) {
    const auto before = rows;
    if (set_layers(ctx, rows, std::move(layers), kind)) {
        return true;
    }
    const std::string why = g_last_error;
    set_layers(ctx, rows, before.layers, before.kind);
    fail(why);
    return false;
}

// each is one of all, and none is given twice; false, and the last error is set
static bool are_layers(const std::vector<int32_t> & chosen, const std::vector<int32_t> & all) {
    for (auto it = chosen.begin(); it != chosen.end(); ++it) {
        if (std::find(all.begin(), all.end(), *it) == all.end()) {
            std::string names;
            for (int32_t il : all) {
                names += (names.empty() ? "" : ", ") + std::to_string(il);
            }
            fail("layer " + std::to_string(*it) + " does not see the whole text: of this model these do: " + names);
            return false;
        }
        if (std::find(chosen.begin(), it, *it) != it) {
            fail("layer " + std::to_string(*it) + " is given twice");
            return false;
        }
    }
    return true;
}

static int32_t copy_layers(const std::vector<int32_t> & all, int32_t * layers, int32_t n_max) {
    if (layers) {
        std::copy_n(all.begin(), std::max(0, std::min((int32_t) all.size(), n_max)), layers);
    }
    return (int32_t) all.size();
}

int32_t llama_mesa_attention_enable(llama_context * ctx, const int32_t * layers, int32_t n_layers, int32_t kind) {
    llama_mesa * m = get_mesa_synced(ctx);
    if (!m) {
        return -1;
    }
    if (kind < LLAMA_MESA_ATTENTION_MEAN || kind > LLAMA_MESA_ATTENTION_HEADS) {
        return fail("there is no kind of attention " + std::to_string(kind));
    }
    if (n_layers < 0) {
        return fail("attention of " + std::to_string(n_layers) + " layers: give 1 or more, or 0 to switch it off");
    }
    const auto & model = ctx->get_model();
    const auto all     = layers_that_see_everything(model);

    std::vector<int32_t> chosen;
    if (layers) {
        chosen.assign(layers, layers + n_layers);
    } else if (n_layers > 0) {
        chosen = choose_layers(all, (int32_t) model.hparams.n_layer(), n_layers);
    }
    if (!are_layers(chosen, all)) {
        return -1;
    }
    const bool differs = chosen != m->attention.layers || kind != m->attention.kind;
    if (differs && !change_layers(*ctx, m->attention, std::move(chosen), kind)) {
        return -1;
    }
    return (int32_t) m->attention.layers.size();
}

int32_t llama_mesa_get_attention_layers(llama_context * ctx, int32_t * layers, int32_t n_max) {
    const llama_mesa * m = get_mesa_synced(ctx);
    if (!m) {
        return -1;
    }
    return copy_layers(m->attention.layers, layers, n_max);
}

int32_t llama_mesa_get_attention(llama_context * ctx, float * weights, int64_t n_max, int32_t * n_rows) {
    const llama_mesa * m = get_mesa_synced(ctx);
    if (!m) {
        return -1;
    }
    const auto & rows = m->attention;
    if (rows.layers.empty()) {
        return fail("nobody asked for what tokens attend to: call llama_mesa_attention_enable first");
    }
    if (m->n_past() > 0 && m->read.n_last == m->n_past()) {
        return fail("the last token in the context did not read everything (read_budget), and what it attended to is "
                    "not known");
    }
    if (rows.n_keys == 0 || rows.n_keys != m->n_past()) {
        return fail(
                "what the last token in the context attended to is not known: it was not read alone, or not just now");
    }
    if (n_rows) {
        *n_rows = rows.n_rows;
    }
    if (weights && n_max >= (int64_t) rows.data.size()) {
        std::copy(rows.data.begin(), rows.data.end(), weights);
    }
    return rows.n_keys;
}

//
// reading less
//

int32_t llama_mesa_get_read_ranges(llama_context * ctx, int32_t * ranges, int32_t n_max) {
    const llama_mesa * m = get_mesa_synced(ctx);
    if (!m) {
        return -1;
    }
    if (m->n_past() == 0 || m->read.n_last != m->n_past()) {
        return 0;
    }
    const auto & read = m->read.last;
    for (int32_t i = 0; ranges && i < std::min((int32_t) read.size(), n_max); ++i) {
        ranges[2 * i]     = read[i].from;
        ranges[2 * i + 1] = read[i].to;
    }
    return (int32_t) read.size();
}

int32_t llama_mesa_set_read_ranges(llama_context * ctx, const int32_t * ranges, int32_t n_ranges) {
    llama_mesa * m = get_mesa_synced(ctx);
    if (!m) {
        return -1;
    }
    if (!ranges) {
        m->read = {};
        return 0;
    }
    if (m->params.method != mesa::method_mesa) {
        return fail(std::string("ranges are chosen for the method mesa: ") + mesa::method_name(m->params.method) +
                    " reads everything");
    }
    llama_mesa_read read;
    read.n_keys  = m->n_past();
    read.by_hand = true;

    int32_t end = 0;
    for (int32_t i = 0; i < n_ranges; ++i) {
        const mesa::range r = { ranges[2 * i], ranges[2 * i + 1] };
        if (r.from < end || r.to < r.from || r.to > read.n_keys) {
            return fail("the range " + std::to_string(r.from) + " to " + std::to_string(r.to) +
                        " is out of order: ranges follow each other, within the " + std::to_string(read.n_keys) +
                        " tokens in the context");
        }
        end = r.to;
        read.ranges.push_back(r);
    }
    m->read = std::move(read);
    return 0;
}

int32_t llama_mesa_set_read_layers(llama_context * ctx, const int32_t * layers, int32_t n_layers) {
    llama_mesa * m = get_mesa_synced(ctx);
    if (!m) {
        return -1;
    }
    if (m->params.read_budget == 0) {
        return fail("read_budget is 0: every token reads everything, and no layer tells what to read");
    }
    const auto & model = ctx->get_model();
    const auto all     = layers_that_see_everything(model);

    std::vector<int32_t> chosen = choose_layers(all, (int32_t) model.hparams.n_layer(), n_layers_read_by);
    if (layers) {
        if (n_layers < 1) {
            return fail("what is read is told by " + std::to_string(n_layers) + " layers: give 1 or more");
        }
        chosen.assign(layers, layers + n_layers);
    }
    if (!are_layers(chosen, all)) {
        return -1;
    }
    if (chosen != m->read_by.layers) {
        m->read = {};
        if (!change_layers(*ctx, m->read_by, std::move(chosen), LLAMA_MESA_ATTENTION_MAX)) {
            return -1;
        }
    }
    return (int32_t) m->read_by.layers.size();
}

int32_t llama_mesa_get_read_layers(llama_context * ctx, int32_t * layers, int32_t n_max) {
    const llama_mesa * m = get_mesa_synced(ctx);
    return m ? copy_layers(m->read_by.layers, layers, n_max) : -1;
}
