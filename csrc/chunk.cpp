// Chunks that are kept: rows of the caches out, and in again behind another text. llama-mesa.h says what for.
//
// The bytes: int64 numbers (the header, see make_header), then by layer, in the header's order, the rows of the keys and the rows of the
// values, token after token, in the cache's own types. A transposed V is written as rows, too. All in the machine's byte order.

#include "llama-mesa.h"

#include "cache.h"
#include "last_error.h"
#include "plan.h"
#include "state.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "llama-context.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

using namespace mesa;

static const int64_t CHUNK_MAGIC   = 0x4b4e484341534d; // "MSACHNK"
static const int64_t CHUNK_VERSION = 1;

// Four lanes of 64-bit words: many GB/s, where FNV-1a over bytes takes longer than reading the file. Every step is a bijection of the word
// and of what came before it, so one changed word always shows.
static int64_t checksum(const uint8_t * data, size_t size) {
    const auto mix = [](uint64_t h, uint64_t word) {
        h = (h ^ word) * 0x9e3779b97f4a7c15ull;
        return h << 29 | h >> 35;
    };
    uint64_t lanes[4] = { 1, 2, 3, 4 };

    size_t i = 0;
    for (; i + 32 <= size; i += 32) {
        uint64_t words[4];
        memcpy(words, data + i, 32);
        for (int l = 0; l < 4; ++l) {
            lanes[l] = mix(lanes[l], words[l]);
        }
    }
    uint64_t res = size;
    for (; i < size; i += 8) {
        uint64_t word = 0;
        memcpy(&word, data + i, std::min<size_t>(8, size - i));
        res = mix(res, word);
    }
    for (uint64_t lane : lanes) {
        res = mix(res, lane);
    }
    return (int64_t) res;
}

namespace {

// one layer's keys and values in the cache
struct layer_rows {
    llama_kv_cache * kv;

    uint32_t il;
    ggml_tensor * k;
    ggml_tensor * v; // null: there are none
    size_t size_k;   // bytes of a token
    size_t size_v;
};

struct field {
    std::string name;
    int64_t value;
};

} // namespace

static std::vector<llama_kv_cache *> get_caches(const llama_context & lctx) {
    std::vector<llama_kv_cache *> res = { get_kv(lctx) };
    if (auto * kv_swa = get_kv_swa(lctx)) {
        res.push_back(kv_swa);
    }
    return res;
}

// layers that use the keys of another one have none of their own
static std::vector<layer_rows> get_layers(const llama_context & lctx) {
    const auto & hparams = lctx.get_model().hparams;

    const ggml_context_ptr ctx(ggml_init({ (hparams.n_layer_all + 1) * ggml_tensor_overhead(), nullptr, true }));

    std::vector<layer_rows> res;
    for (auto * kv : get_caches(lctx)) {
        for (uint32_t il : kv->get_layer_ids()) {
            layer_rows l = {};
            l.kv         = kv;
            l.il         = il;
            l.k          = kv->get_k_storage(il);
            l.v          = hparams.is_mla() ? nullptr : kv->get_v(ctx.get(), il, 1, {})->view_src;
            l.size_k     = ggml_row_size(l.k->type, hparams.n_embd_k_gqa(il));
            l.size_v     = l.v ? ggml_row_size(l.v->type, hparams.n_embd_v_gqa(il)) : 0;
            res.push_back(l);
        }
    }
    return res;
}

static size_t row_bytes(const std::vector<layer_rows> & layers) {
    size_t res = 0;
    for (const auto & l : layers) {
        res += l.size_k + l.size_v;
    }
    return res;
}

// the values of n_tokens tokens, as rows of a token each, or as columns (a transposed V) of n_tokens values each; returned the other way
static std::vector<uint8_t> transposed(const uint8_t * src, size_t n_rows, size_t n_columns, size_t n_el) {
    std::vector<uint8_t> res(n_rows * n_columns * n_el);
    for (size_t r = 0; r < n_rows; ++r) {
        for (size_t c = 0; c < n_columns; ++c) {
            memcpy(res.data() + (c * n_rows + r) * n_el, src + (r * n_columns + c) * n_el, n_el);
        }
    }
    return res;
}

static void read_rows(
        const std::vector<layer_rows> & layers, bool v_trans, int32_t from, int32_t n_tokens, uint8_t * rows) {
    for (const auto & l : layers) {
        ggml_backend_tensor_get(l.k, rows, from * l.size_k, n_tokens * l.size_k);
        rows += n_tokens * l.size_k;

        if (l.v && !v_trans) {
            ggml_backend_tensor_get(l.v, rows, from * l.size_v, n_tokens * l.size_v);
        } else if (l.v) { // [kv_size, n_embd_v_gqa]
            const size_t n_el   = ggml_type_size(l.v->type);
            const size_t n_embd = l.size_v / n_el;

            std::vector<uint8_t> columns(n_tokens * l.size_v);
            ggml_backend_tensor_get_2d(l.v, columns.data(), from * n_el, n_tokens * n_el, n_embd,
                    l.kv->get_size() * n_el, n_tokens * n_el);

            const auto turned = transposed(columns.data(), n_embd, n_tokens, n_el);
            std::copy(turned.begin(), turned.end(), rows);
        }
        rows += n_tokens * l.size_v;
    }
}

static void write_rows(
        const std::vector<layer_rows> & layers, bool v_trans, int32_t from, int32_t n_tokens, const uint8_t * rows) {
    for (const auto & l : layers) {
        ggml_backend_tensor_set(l.k, rows, from * l.size_k, n_tokens * l.size_k);
        rows += n_tokens * l.size_k;

        if (l.v && !v_trans) {
            ggml_backend_tensor_set(l.v, rows, from * l.size_v, n_tokens * l.size_v);
        } else if (l.v) {
            const size_t n_el   = ggml_type_size(l.v->type);
            const size_t n_embd = l.size_v / n_el;

            const auto columns = transposed(rows, n_tokens, n_embd, n_el);
            ggml_backend_tensor_set_2d(l.v, columns.data(), from * n_el, n_tokens * n_el, n_embd,
                    l.kv->get_size() * n_el, n_tokens * n_el);
        }
        rows += n_tokens * l.size_v;
    }
}

// the size of the Hadamard blocks that keys (values) in the cache are multiplied with; 0: they are not
static int64_t n_rot(
        ggml_context * ctx, ggml_tensor * (llama_kv_cache::*build)(ggml_context *) const, const llama_kv_cache & kv) {
    const ggml_tensor * t = (kv.*build)(ctx);
    return t ? t->ne[0] : 0;
}

static int64_t hash_of(const std::vector<int32_t> & tokens, int32_t from, int32_t to) {
    return checksum((const uint8_t *) (tokens.data() + from), (to - from) * sizeof(int32_t));
}

static int64_t hash_of(const llama_mesa_rope & rope) {
    if (!rope.rotates) {
        return 0;
    }
    std::string bytes((const char *) rope.op_params, sizeof(rope.op_params));
    if (rope.factors) {
        bytes += ggml_get_name(rope.factors); // LongRoPE has two sets
    }
    return checksum((const uint8_t *) bytes.data(), bytes.size());
}

// the fields that are checked one by one, before the others
enum {
    FIELD_MAGIC,
    FIELD_VERSION,
    FIELD_SIZE,
    FIELD_CHECKSUM,
    FIELD_N_TOKENS,
    FIELD_TOKENS,
    FIELD_N_FIRST,
    FIELD_FIRST,
    N_FIELDS_OWN
};

// What the bytes of a chunk begin with. tokens: of the chunk and of the first chunk; the checksum is left open.
static std::vector<field> make_header(const llama_context & lctx, const std::vector<layer_rows> & layers,
        int32_t n_tokens, int64_t tokens, int32_t n_first, int64_t first) {
    const auto & model = lctx.get_model();
    const auto & m     = *lctx.get_cparams().mesa;

    const std::string arch = llm_arch_name(model.arch);

    std::vector<field> res = {
        { "the magic number", CHUNK_MAGIC },
        { "the format's version", CHUNK_VERSION },
        { "the size in bytes", 0 },
        { "the checksum", 0 },
        { "the number of tokens", n_tokens },
        { "the tokens (hash)", tokens },
        { "the length of the first chunk", n_first },
        { "the first chunk's tokens (hash)", first },
        { "the architecture (hash)", checksum((const uint8_t *) arch.data(), arch.size()) },
    };

    const ggml_context_ptr ctx(ggml_init({ 8 * ggml_tensor_overhead(), nullptr, true }));
    for (const auto * kv : get_caches(lctx)) {
        res.push_back({ "the Hadamard block of keys", n_rot(ctx.get(), &llama_kv_cache::build_input_k_rot, *kv) });
        res.push_back({ "the Hadamard block of values", n_rot(ctx.get(), &llama_kv_cache::build_input_v_rot, *kv) });
    }

    res.push_back({ "the number of layers in the cache", (int64_t) layers.size() });

    for (const auto & l : layers) {
        const std::string of = " of layer " + std::to_string(l.il);

        res.push_back({ "the number" + of, l.il });
        res.push_back({ "the sliding window" + of, model.hparams.is_swa(l.il) ? model.hparams.n_swa : 0 });
        res.push_back({ "the rotation (hash)" + of, hash_of(m.rope[l.il]) });
        res.push_back({ "the type of keys" + of, l.k->type });
        res.push_back({ "the bytes of a token's keys" + of, (int64_t) l.size_k });
        res.push_back({ "the type of values" + of, l.v ? l.v->type : -1 });
        res.push_back({ "the bytes of a token's values" + of, (int64_t) l.size_v });
    }
    res[FIELD_SIZE].value = (int64_t) (row_bytes(layers) * n_tokens + res.size() * sizeof(int64_t));

    return res;
}

// null, and the last error is set, if chunks cannot be kept in this context
static llama_mesa * get_mesa_for_chunks(llama_context * ctx) {
    llama_mesa * m = get_mesa_synced(ctx);
    if (!m) {
        return nullptr;
    }
    if (m->params.method != method_mesa && m->params.method != method_mesa_exact) {
        fail(std::string("the method ") + method_name(m->params.method) + " keeps no chunks: mesa and mesa-exact do");
        return nullptr;
    }
    const auto * kv_swa = get_kv_swa(*ctx);
    if (kv_swa && kv_swa->get_size() != get_kv(*ctx)->get_size()) {
        fail("a cache that forgets what left the sliding window keeps no chunks: make the context with swa_full");
        return nullptr;
    }
    return m;
}

int64_t llama_mesa_chunk_size(llama_context * ctx, int32_t n_tokens) {
    const llama_mesa * m = get_mesa_for_chunks(ctx);
    if (!m) {
        return -1;
    }
    if (n_tokens < 1) {
        return fail("a chunk of " + std::to_string(n_tokens) + " tokens cannot be kept");
    }
    try {
        return make_header(*ctx, get_layers(*ctx), n_tokens, 0, 0, 0)[FIELD_SIZE].value;
    } catch (const std::exception & err) {
        return fail(err.what());
    }
}

// the tokens in front of the chunk from .. to-1 as it stands in the cache; throws std::invalid_argument if it is not as it was read
static int32_t check_kept(const llama_mesa & m, int32_t from, int32_t to) {
    const auto name = "the tokens " + std::to_string(from) + " to " + std::to_string(to);

    if (from < 0 || to <= from || to > m.n_past()) {
        throw std::invalid_argument(name + " cannot be kept: " + std::to_string(m.n_past()) + " are in the context");
    }

    const auto & cs = m.plan.chunk_starts;

    const bool loaded = std::any_of(
            m.loaded.begin(), m.loaded.end(), [&](const auto & c) { return c.start == from && c.end == to; });
    if (!loaded && cs.size() > 1 && to > cs[1]) {
        throw std::invalid_argument(name + " cannot be kept: they were not read plainly, nor are they one chunk that "
                                           "was loaded; read the chunk behind the first chunk alone");
    }
    if (to > m.params.train_length && !loaded) {
        throw std::invalid_argument(name +
                                    " cannot be kept: with what is in front of them they are more than train_length (" +
                                    std::to_string(m.params.train_length) + ")");
    }
    if (!loaded && m.params.log_scaling && to > m.params.n_unscaled()) {
        throw std::invalid_argument(name + " cannot be kept: queries were scaled from token " +
                                    std::to_string(m.params.n_unscaled()) + " on (log_length)");
    }

    const int32_t n_first = loaded ? cs[1] : from;

    for (int32_t j = loaded ? from : 0; j < to; ++j) {
        const int32_t pos = loaded ? n_first + (j - from) : j;
        if (m.key_moved[j] || m.key_pos[j] != pos) {
            throw std::invalid_argument("the keys of " + (j < from ? "what is in front of " + name : name) +
                                        " have moved since they were read, and were rounded again: empty the context, "
                                        "and read them anew (or load the first chunk)");
        }
    }
    for (int32_t j = 0; j < to; ++j) {
        if ((j < n_first || j >= from) && m.tokens[j] < 0) {
            throw std::invalid_argument(
                    "token " + std::to_string(j) +
                    " is not known: it was read as an embedding, or came with a state of stock llama.cpp");
        }
    }
    return n_first;
}

int64_t llama_mesa_chunk_save(llama_context * ctx, int32_t from, int32_t to, void * buf, size_t size) {
    const llama_mesa * m = get_mesa_for_chunks(ctx);
    if (!m) {
        return -1;
    }
    try {
        const int32_t n_first  = check_kept(*m, from, to);
        const int32_t n_tokens = to - from;

        const auto layers = get_layers(*ctx);

        auto header = make_header(
                *ctx, layers, n_tokens, hash_of(m->tokens, from, to), n_first, hash_of(m->tokens, 0, n_first));

        const size_t n_bytes = header[FIELD_SIZE].value;
        if (!buf || size < n_bytes) {
            return fail("the chunk takes " + std::to_string(n_bytes) + " bytes, the buffer has " +
                        std::to_string(buf ? size : 0));
        }

        ctx->synchronize();

        auto * dst = (uint8_t *) buf;

        read_rows(layers, m->v_trans, from, n_tokens, dst + header.size() * sizeof(int64_t));

        const auto put = [&](size_t i) { memcpy(dst + i * sizeof(int64_t), &header[i].value, sizeof(int64_t)); };

        for (size_t i = 0; i < header.size(); ++i) {
            put(i);
        }
        const size_t checked         = (FIELD_CHECKSUM + 1) * sizeof(int64_t);
        header[FIELD_CHECKSUM].value = checksum(dst + checked, n_bytes - checked);
        put(FIELD_CHECKSUM);

        return (int64_t) n_bytes;
    } catch (const std::exception & err) {
        return fail(err.what());
    }
}

static void refuse_bytes(const std::string & what) {
    throw std::runtime_error("the chunk cannot be loaded: " + what);
}

static int64_t get_field(const uint8_t * data, size_t i) {
    int64_t v;
    memcpy(&v, data + i * sizeof(v), sizeof(v));
    return v;
}

// throws std::runtime_error if the bytes are not a whole chunk
static void check_whole(const uint8_t * data, size_t size) {
    if (size < N_FIELDS_OWN * sizeof(int64_t)) {
        refuse_bytes("it is cut short or empty");
    }
    if (get_field(data, FIELD_MAGIC) != CHUNK_MAGIC) {
        refuse_bytes("these bytes are not a chunk");
    }
    if (get_field(data, FIELD_VERSION) != CHUNK_VERSION) {
        refuse_bytes("its format has version " + std::to_string(get_field(data, FIELD_VERSION)) +
                     ", this library reads " + std::to_string(CHUNK_VERSION));
    }
    if (get_field(data, FIELD_SIZE) != (int64_t) size) {
        refuse_bytes("it is damaged: it has " + std::to_string(size) + " bytes, its header says " +
                     std::to_string(get_field(data, FIELD_SIZE)));
    }
    const size_t checked = (FIELD_CHECKSUM + 1) * sizeof(int64_t);
    if (get_field(data, FIELD_CHECKSUM) != checksum(data + checked, size - checked)) {
        refuse_bytes("it is damaged: wrong checksum");
    }
}

// throws std::runtime_error if whole bytes are not of this context's model, KV types and RoPE
static void check_layout(
        const llama_context & lctx, const std::vector<layer_rows> & layers, const uint8_t * data, size_t size) {
    const auto header = make_header(lctx, layers, (int32_t) get_field(data, FIELD_N_TOKENS),
            get_field(data, FIELD_TOKENS), (int32_t) get_field(data, FIELD_N_FIRST), get_field(data, FIELD_FIRST));
    if (size < header.size() * sizeof(int64_t)) {
        refuse_bytes("it is of a model with fewer layers");
    }
    for (size_t i = 0; i < header.size(); ++i) {
        if (i != FIELD_CHECKSUM && i != FIELD_SIZE && get_field(data, i) != header[i].value) {
            refuse_bytes("it is of another model, KV type or RoPE: " + header[i].name + " is " +
                         std::to_string(get_field(data, i)) + ", this context has " + std::to_string(header[i].value));
        }
    }
    if (header[FIELD_SIZE].value != (int64_t) size) {
        refuse_bytes("it has " + std::to_string(size) + " bytes, this context has " +
                     std::to_string(header[FIELD_SIZE].value));
    }
}

// throws std::runtime_error if the bytes are not a whole chunk of these tokens that fits this context; returns the length of its first chunk
static int32_t check_bytes(const llama_context & lctx, const llama_mesa & m, const std::vector<layer_rows> & layers,
        const std::vector<int32_t> & tokens, const uint8_t * data, size_t size) {
    check_whole(data, size);

    if (get_field(data, FIELD_N_TOKENS) != (int64_t) tokens.size() ||
            get_field(data, FIELD_TOKENS) != hash_of(tokens, 0, (int32_t) tokens.size())) {
        refuse_bytes("it holds other tokens (" + std::to_string(get_field(data, FIELD_N_TOKENS)) +
                     ") than those given (" + std::to_string(tokens.size()) + ")");
    }
    const int64_t n_first = get_field(data, FIELD_N_FIRST);
    if (n_first == 0) {
        if (m.n_past() > 0) {
            refuse_bytes(
                    "it is a first chunk: empty the context, which holds " + std::to_string(m.n_past()) + " tokens");
        }
    } else {
        const auto & cs        = m.plan.chunk_starts;
        const int32_t n_before = cs.size() > 1 ? cs[1] : m.n_past();
        if (n_first != n_before) {
            refuse_bytes("it was read behind a first chunk of " + std::to_string(n_first) + " tokens, here are " +
                         std::to_string(n_before));
        }
    }
    if (get_field(data, FIELD_FIRST) != hash_of(m.tokens, 0, (int32_t) n_first)) {
        refuse_bytes("it was read behind a first chunk of other tokens");
    }

    check_layout(lctx, layers, data, size);
    return (int32_t) n_first;
}

// throws std::invalid_argument if no chunk of n_tokens can follow the ones in the context
static void check_place(const llama_context & lctx, const llama_mesa & m, int32_t n_tokens) {
    const auto refuse = [](const std::string & what) {
        throw std::invalid_argument("no chunk can be loaded here: " + what);
    };

    const auto & cs = m.plan.chunk_starts;

    const int32_t n_past = m.n_past();

    if (n_past < m.loaded_end()) {
        refuse(in_loaded(m));
    }
    if (m.n_by_hand > 0) {
        refuse("the plan was made by hand");
    }
    if ((int64_t) n_past + n_tokens > std::min(lctx.n_ctx(), get_kv(lctx)->get_size())) {
        refuse("the text would have " + std::to_string((int64_t) n_past + n_tokens) + " tokens, more than n_ctx (" +
                std::to_string(lctx.n_ctx()) + ")");
    }
    // a text that was read plainly is a first chunk, if it is as long as the chunk's own was; behind it only whole chunks
    const bool at_border =
            cs.size() == 1 ? m.plan == mesa::plan() : std::find(cs.begin() + 1, cs.end(), n_past) != cs.end();
    if (n_past > 0 && !at_border) {
        refuse("token " + std::to_string(n_past) +
                " does not follow the end of a chunk: load chunks before anything is read behind them");
    }
    const int32_t n_first = n_past == 0 ? 0 : cs.size() == 1 ? n_past : cs[1];
    if ((int64_t) n_first + n_tokens > m.params.train_length) {
        refuse("with the first chunk (" + std::to_string(n_first) + ") its " + std::to_string(n_tokens) +
                " tokens are more than train_length (" + std::to_string(m.params.train_length) + ")");
    }
    for (int32_t j = 0; j < n_first; ++j) {
        if (m.tokens[j] < 0) {
            refuse("token " + std::to_string(j) +
                    " of the first chunk is not known: it was read as an embedding, or came with a state of stock "
                    "llama.cpp");
        }
    }
    for (const auto * kv : get_caches(lctx)) {
        if (!cells_in_order(*kv, n_past)) {
            refuse("the cache does not hold one text in order");
        }
    }
}

// layers with a sliding window have the keys at their index in the text
static bool move_swa_keys(llama_context & lctx, llama_kv_cache & kv_swa, int32_t n_past, int32_t n_tokens, int32_t by) {
    const int32_t n_rows_max = 2048; // bounds the memory of the f32 copies

    const std::vector<int32_t> delta(n_past + n_tokens, by);
    for (int32_t lo = n_past; lo < n_past + n_tokens; lo += n_rows_max) {
        if (!move_keys(lctx, kv_swa, delta.data(), lo, std::min(n_past + n_tokens, lo + n_rows_max))) {
            return false;
        }
    }
    return true;
}

int32_t llama_mesa_chunk_load(
        llama_context * ctx, const llama_token * tokens_new, int32_t n_tokens, const void * buf, size_t size) {
    llama_mesa * m = get_mesa_for_chunks(ctx);
    if (!m) {
        return -1;
    }
    if (!tokens_new || n_tokens < 1) {
        return fail("a chunk of no tokens cannot be loaded");
    }
    for (int32_t i = 0; i < n_tokens; ++i) {
        if (tokens_new[i] < 0 || tokens_new[i] >= (int32_t) ctx->get_model().vocab.n_tokens()) {
            return fail("token " + std::to_string(tokens_new[i]) + " is not in the model's vocabulary");
        }
    }
    if (!buf) {
        return fail("the buffer is NULL");
    }

    const int32_t n_past = m->n_past();
    const int32_t end    = n_past + n_tokens;

    bool filled = false;
    bool moved  = false;
    try {
        const std::vector<int32_t> tokens(tokens_new, tokens_new + n_tokens);

        const auto layers = get_layers(*ctx);

        // everything is made and checked before anything changes
        llama_mesa res = *m;
        res.drop_unread(); // a text that was announced and not read

        check_place(*ctx, res, n_tokens);

        int32_t n_first;
        try {
            n_first = check_bytes(*ctx, res, layers, tokens, (const uint8_t *) buf, size);
        } catch (const std::runtime_error & err) {
            fail(err.what());
            return LLAMA_MESA_CHUNK_UNFIT;
        }

        // the keys come as they stand in the chunk, and move with the next decode
        res.append(n_tokens, tokens.data());
        for (int32_t j = n_past; j < end; ++j) {
            res.key_pos[j] = n_first + (j - n_past);
        }
        if (n_past > 0) {
            auto plan = mesa::append_chunk(res.params, res.plan, n_past, end);
            res.changes.push_back({ n_past, std::move(res.plan) });
            res.plan       = std::move(plan);
            res.keys_stale = true;
            res.loaded.push_back({ n_past, end });
        }

        auto * kv_swa = get_kv_swa(*ctx);

        const int32_t by = n_past - n_first;

        ctx->synchronize();

        filled = true;
        write_rows(layers, m->v_trans, n_past, n_tokens,
                (const uint8_t *) buf + size - (size_t) n_tokens * row_bytes(layers));
        for (auto * kv : get_caches(*ctx)) {
            fill_cells(*kv, ctx->get_model().hparams.n_pos_per_embd(), n_past, tokens);
        }
        if (kv_swa && by != 0) {
            moved = true;
            if (!move_swa_keys(*ctx, *kv_swa, n_past, n_tokens, by)) {
                throw std::runtime_error("the keys of layers with a sliding window could not be moved: too little "
                                         "memory for the compute buffers");
            }
            std::fill(res.key_moved.begin() + n_past, res.key_moved.end(), 1);
        }

        const bool longer_window = n_first > m->params.first_chunk;

        *m = std::move(res);

        if ((moved || longer_window) && !ctx->mesa_reserve()) {
            throw std::runtime_error("there is too little memory for the compute buffers");
        }
        return 0;
    } catch (const std::exception & err) {
        if (filled) {
            for (auto * kv : get_caches(*ctx)) {
                kv->seq_rm(0, n_past, -1);
            }
            m->roll_back(n_past);
            if (moved) {
                ctx->mesa_reserve();
            }
        }
        return fail(err.what());
    }
}

int32_t llama_mesa_get_loaded(llama_context * ctx, int32_t * ranges, int32_t n_max) {
    const llama_mesa * m = get_mesa_synced(ctx);
    if (!m) {
        return -1;
    }
    const int32_t n = (int32_t) m->loaded.size();
    for (int32_t i = 0; ranges && i < std::min(n, n_max); ++i) {
        ranges[2 * i]     = m->loaded[i].start;
        ranges[2 * i + 1] = m->loaded[i].end;
    }
    return n;
}

// where the values of a layer's tokens lie in the bytes of a chunk
struct value_rows {
    const layer_rows * l;
    int64_t offset;
    int64_t n_embd;
};

// of the last n_layers layers that keep some, the last one first
static std::vector<value_rows> get_value_rows(
        const llama_context & lctx, const std::vector<layer_rows> & layers, int64_t n_tokens, int32_t n_layers) {
    std::vector<value_rows> res;
    int64_t offset =
            (int64_t) make_header(lctx, layers, (int32_t) n_tokens, 0, 0, 0).size() * (int64_t) sizeof(int64_t);
    for (const auto & l : layers) {
        offset += n_tokens * (int64_t) l.size_k;
        if (l.v) {
            res.push_back({ &l, offset, lctx.get_model().hparams.n_embd_v_gqa(l.il) });
        }
        offset += n_tokens * (int64_t) l.size_v;
    }
    std::sort(res.begin(), res.end(), [](const auto & a, const auto & b) { return a.l->il > b.l->il; });
    if ((int64_t) res.size() > n_layers) {
        res.resize((size_t) n_layers);
    }
    return res;
}

// the values of one layer's tokens as floats, each width after the other
static void to_floats(const value_rows & rows, const uint8_t * data, int64_t n_tokens, int64_t width, float * values) {
    const auto type     = rows.l->v->type;
    const auto to_float = ggml_get_type_traits(type)->to_float;
    if (!to_float && type != GGML_TYPE_F32) {
        throw std::runtime_error(std::string("values of type ") + ggml_type_name(type) + " cannot be read");
    }
    for (int64_t t = 0; t < n_tokens; ++t) {
        const auto * src = data + t * (int64_t) rows.l->size_v;
        if (to_float) {
            to_float(src, values + t * width, rows.n_embd);
        } else {
            memcpy(values + t * width, src, rows.l->size_v);
        }
    }
}

int32_t llama_mesa_chunk_values_at(llama_context * ctx, int32_t n_tokens, int32_t n_layers, int64_t * ranges) {
    const llama_mesa * m = get_mesa_for_chunks(ctx);
    if (!m) {
        return -1;
    }
    if (n_tokens < 1 || n_layers < 1) {
        return fail("n_tokens and n_layers have to be at least 1");
    }
    try {
        const auto layers = get_layers(*ctx);
        const auto rows   = get_value_rows(*ctx, layers, n_tokens, n_layers);
        for (size_t i = 0; ranges && i < rows.size(); ++i) {
            ranges[2 * i]     = rows[i].offset;
            ranges[2 * i + 1] = n_tokens * (int64_t) rows[i].l->size_v;
        }
        return (int32_t) rows.size();
    } catch (const std::exception & err) {
        return fail(err.what());
    }
}

int64_t llama_mesa_chunk_values(llama_context * ctx, const void * buf, size_t size, int32_t n_tokens, int32_t n_layers,
        float * values, size_t n_values) {
    const llama_mesa * m = get_mesa_for_chunks(ctx);
    if (!m) {
        return -1;
    }
    if (!buf) {
        return fail("the buffer is NULL");
    }
    if (n_tokens < 1 || n_layers < 1) {
        return fail("n_tokens and n_layers have to be at least 1");
    }
    try {
        const auto layers = get_layers(*ctx);
        const auto rows   = get_value_rows(*ctx, layers, n_tokens, n_layers);

        int64_t width  = 0;
        size_t n_bytes = 0;
        for (const auto & r : rows) {
            width += r.n_embd;
            n_bytes += (size_t) n_tokens * r.l->size_v;
        }
        if (size != n_bytes) {
            return fail("the values of " + std::to_string(n_tokens) + " tokens are " + std::to_string(n_bytes) +
                        " bytes, not " + std::to_string(size));
        }
        if (!values) {
            return width;
        }
        if (n_values < (size_t) (n_tokens * width)) {
            return fail("the values are " + std::to_string(n_tokens * width) + " numbers, the buffer has room for " +
                        std::to_string(n_values));
        }
        const auto * data = (const uint8_t *) buf;
        int64_t at        = 0;
        for (const auto & r : rows) {
            to_floats(r, data, n_tokens, width, values + at);
            data += n_tokens * (int64_t) r.l->size_v;
            at += r.n_embd;
        }
        return width;
    } catch (const std::exception & err) {
        return fail(err.what());
    }
}
