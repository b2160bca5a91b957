#include "state.h"

#include "weave.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

void llama_mesa::set_plan(mesa::plan plan_new) {
    if (plan_new == plan) {
        return;
    }
    changes.push_back({ n_past(), std::move(plan) });
    plan       = std::move(plan_new);
    keys_stale = true;
}

void llama_mesa::roll_back(int32_t n_past_new) {
    if (n_past_new >= n_past()) {
        return;
    }
    while (!changes.empty() && changes.back().n_past >= n_past_new) {
        plan = std::move(changes.back().before);
        changes.pop_back();
        keys_stale = true;
    }
    while (!loaded.empty() && loaded.back().start >= n_past_new) {
        loaded.pop_back();
    }
    key_pos.resize(n_past_new);
    key_moved.resize(n_past_new);
    tokens.resize(n_past_new);
    if (read.n_keys > n_past_new) {
        read = {};
    }
    n_announced = std::min(n_announced, n_past_new);
    if (n_past_new == 0) {
        start_anew();
    }
}

void llama_mesa::start_anew() {
    n_by_hand = 0;
    params    = params_own;
}

bool llama_mesa::is_plain() const {
    const int32_t n = n_past();

    return plan == mesa::plan() &&
           (n == 0 || (mesa::all_true(params, plan, n - 1) && !(params.log_scaling && n > params.n_unscaled())));
}

const mesa::plan & llama_mesa::plan_read() const {
    const mesa::plan * res = &plan;
    for (auto it = changes.rbegin(); it != changes.rend() && it->n_past == n_past(); ++it) {
        res = &it->before;
    }
    return *res;
}

void llama_mesa::drop_unread() {
    while (!changes.empty() && changes.back().n_past == n_past()) {
        plan = std::move(changes.back().before);
        changes.pop_back();
        keys_stale = true;
    }
    if (n_past() == 0) {
        start_anew();
    }
}

void llama_mesa::append(int32_t n, const int32_t * tokens_new) {
    const int32_t n0 = n_past();

    key_moved.resize(n0 + n, 0);
    tokens.resize(n0 + n, -1);
    if (tokens_new) {
        std::copy_n(tokens_new, n, tokens.begin() + n0);
    }

    key_pos.resize(n0 + n);
    for (int32_t j = n0; j < n0 + n; ++j) {
        key_pos[j] = mesa::key_pos(plan, j);
    }
}

bool llama_mesa::reads_less(int32_t pos) const {
    if (read.n_keys == 0 || pos < read.n_keys || pos < plan.last_start() || pos < n_announced) {
        return false;
    }
    // note: what a text is read for is not what was read for before it
    return read.by_hand || (read.n_keys >= n_announced && pos < read.n_whole - 1 + params.read_interval());
}

bool llama_mesa::chooses(int32_t pos) const {
    // note: with the last token of a text everything is there that it can be chosen by
    return !read_by.layers.empty() && !read.by_hand && pos >= plan.last_start() && pos >= n_announced - 1 &&
           params.read_interval() > 1 && mesa::over_budget(params, plan, pos + 1);
}

bool llama_mesa::choose_again(int32_t pos, const float * weights) {
    if (!reads_less(pos) || !mesa::misses(params, plan, pos, weights, read.ranges)) {
        return false;
    }
    auto scores = read.scores;
    mesa::add_scores(params, plan, pos, weights, scores);
    read.ranges = mesa::choose(params, plan, pos, scores);
    read.n_keys = pos;
    return true;
}

void llama_mesa::note_read(int32_t pos, const float * weights) {
    const int32_t n_keys = pos + 1;

    read.n_last = 0;
    if (reads_less(pos)) {
        read.last = read.ranges;
        if (!read.last.empty() && read.last.back().to == read.n_keys) {
            read.last.back().to = n_keys;
        } else {
            read.last.push_back({ read.n_keys, n_keys });
        }
        read.n_last = n_keys;
    } else if (!read.by_hand) {
        read.n_whole = n_keys;
        if (read.n_keys < n_announced) {
            read.scores.clear();
        }
    }
    if (weights) {
        mesa::add_scores(params, plan, n_keys, weights, read.scores);
        read.ranges = mesa::choose(params, plan, n_keys, read.scores);
        read.n_keys = n_keys;
    }
}

void llama_mesa::move_key(int32_t j, int32_t delta) {
    key_pos[j] += delta;
    if (delta != 0) {
        key_moved[j] = 1;
    }
}

void llama_mesa::key_moves(std::vector<int32_t> & delta, int32_t & lo, int32_t & hi) const {
    delta.resize(key_pos.size());

    lo = (int32_t) key_pos.size();
    hi = 0;

    for (int32_t j = 0; j < (int32_t) key_pos.size(); ++j) {
        delta[j] = mesa::key_pos(plan, j) - key_pos[j];
        if (delta[j] != 0) {
            lo = std::min(lo, j);
            hi = j + 1;
        }
    }
}

int32_t llama_mesa::window_rows(int32_t pos, std::vector<int32_t> * rows) const {
    const int32_t c       = mesa::chunk_of(plan, pos);
    const int32_t n_first = c == 0 ? 0 : plan.chunk_starts[1];
    const int32_t start   = plan.chunk_starts[c];

    if (rows) {
        rows->clear();
        for (int32_t j = 0; j < n_first; ++j) {
            rows->push_back(j);
        }
        for (int32_t j = start; j < pos; ++j) {
            rows->push_back(j);
        }
    }
    return n_first + (pos - start);
}

llama_mesa_graph llama_mesa::graph(int32_t pos, int32_t n) const {
    llama_mesa_graph g;

    // within a chunk the two differ by a constant, and they differ at the end if they do anywhere
    g.swa = has_swa && this->pos(pos + n - 1) != pos + n - 1;

    if (pos >= plan.last_start()) {
        g.scale   = params.log_scaling && pos + n > params.n_unscaled();
        g.n_rules = mesa::all_true(params, plan, pos + n - 1) ? 0 : params.exact() ? 1 : 2;

        g.attention = n == 1 && !attention.layers.empty() && !reads_less(pos);
        g.choose    = n == 1 && chooses(pos);
        return g;
    }

    const int32_t n_rows = window_rows(pos, nullptr);

    g.window = true;
    if (v_trans) {
        g.n_prev = n_rows;
        g.start  = plan.chunk_starts[mesa::chunk_of(plan, pos)];
    } else {
        g.n_prev = (n_rows + n + n_pad - 1) / n_pad * n_pad - n;
    }

    return g;
}

llama_mesa_graph llama_mesa::graph_reserve(bool window, int32_t n_tokens, int32_t n_ctx) const {
    llama_mesa_graph g;

    g.swa = has_swa;

    if (window) {
        g.window = true;
        g.n_prev = (std::min(mesa::n_first_of(params, plan) + mesa::n_chunk_of(params, plan), n_ctx) + n_pad - 1) /
                   n_pad * n_pad;
        if (v_trans) {
            g.n_prev = std::min(g.n_prev, n_ctx);
        }
    } else {
        g.scale   = params.log_scaling;
        g.n_rules = params.method == mesa::method_mesa || params.method == mesa::method_star ? 0
                    : params.exact()                                                         ? 1
                                                                                             : 2;

        g.attention = n_tokens == 1 && !attention.layers.empty();
        g.choose    = n_tokens == 1 && !read_by.layers.empty();
    }
    return g;
}

//
// bytes
//

static const uint32_t MESA_STATE_MAGIC   = 0x4153454d; // "MESA"
static const uint32_t MESA_STATE_VERSION = 8;

// FNV-1a
static uint64_t checksum(const uint8_t * data, size_t size) {
    uint64_t h = 14695981039346656037ull;
    for (size_t i = 0; i < size; ++i) {
        h = (h ^ data[i]) * 1099511628211ull;
    }
    return h;
}

namespace {

struct writer {
    std::vector<uint8_t> buf;

    void raw(const void * p, size_t n) {
        const auto * b = (const uint8_t *) p;
        buf.insert(buf.end(), b, b + n);
    }
    void i32(int32_t v) { raw(&v, sizeof(v)); }
    void u64(uint64_t v) { raw(&v, sizeof(v)); }
    void f32(float v) { raw(&v, sizeof(v)); }
    void vec(const std::vector<int32_t> & v) {
        i32((int32_t) v.size());
        raw(v.data(), v.size() * sizeof(int32_t));
    }
    void params(const mesa::params & p) {
        i32(p.train_length);
        i32(p.reading_length);
        i32(p.method);
        i32(p.log_scaling);
        i32(p.n_unscaled());
        f32(p.stair_bias);
        i32(p.last_chunk);
        i32(p.window);
        i32(p.n_sinks);
        i32(p.first_chunk);
        i32(p.chunk);
        i32(p.stair_width);
        i32(p.room);
    }
    void plan(const mesa::plan & pl) {
        vec(pl.chunk_starts);
        i32(pl.anchor);
        i32(pl.stair_width);
    }
};

struct reader {
    const uint8_t * p;
    size_t n;

    void raw(void * dst, size_t size) {
        if (size > n) {
            throw std::runtime_error("the Mesa part of the state is cut short");
        }
        if (size > 0) { // dst may be null
            memcpy(dst, p, size);
        }
        p += size;
        n -= size;
    }
    int32_t i32() {
        int32_t v;
        raw(&v, sizeof(v));
        return v;
    }
    uint64_t u64() {
        uint64_t v;
        raw(&v, sizeof(v));
        return v;
    }
    float f32() {
        float v;
        raw(&v, sizeof(v));
        return v;
    }
    std::vector<int32_t> vec() {
        const int32_t size = i32();
        if (size < 0 || (size_t) size > n / sizeof(int32_t)) {
            throw std::runtime_error("the Mesa part of the state is damaged: a length is out of range");
        }
        std::vector<int32_t> v(size);
        raw(v.data(), v.size() * sizeof(int32_t));
        return v;
    }
    mesa::params params() {
        mesa::params p;
        p.train_length   = i32();
        p.reading_length = i32();
        p.method         = i32();
        p.log_scaling    = i32();
        p.log_length     = i32();
        p.stair_bias     = f32();
        p.last_chunk     = i32();
        p.window         = i32();
        p.n_sinks        = i32();
        p.first_chunk    = i32();
        p.chunk          = i32();
        p.stair_width    = i32();
        p.room           = i32();
        return p;
    }
    mesa::plan plan() {
        mesa::plan pl;
        pl.chunk_starts = vec();
        pl.anchor       = i32();
        pl.stair_width  = i32();

        bool ok = !pl.chunk_starts.empty() && pl.chunk_starts[0] == 0 && pl.anchor >= 0 && pl.stair_width >= 1;
        for (size_t c = 1; ok && c < pl.chunk_starts.size(); ++c) {
            ok = pl.chunk_starts[c] > pl.chunk_starts[c - 1];
        }
        if (!ok) {
            throw std::runtime_error("the Mesa part of the state is damaged: it holds an impossible plan");
        }
        return pl;
    }
};

} // namespace

std::vector<uint8_t> llama_mesa_pack(const llama_mesa & m) {
    writer w;

    w.params(m.params);
    w.i32(m.n_by_hand);
    w.plan(m.plan);
    w.vec(m.key_pos);
    w.raw(m.key_moved.data(), m.key_moved.size());
    w.raw(m.tokens.data(), m.tokens.size() * sizeof(int32_t));
    w.i32((int32_t) m.loaded.size());
    for (const auto & chunk : m.loaded) {
        w.i32(chunk.start);
        w.i32(chunk.end);
    }
    w.i32((int32_t) m.changes.size());
    for (const auto & ch : m.changes) {
        w.i32(ch.n_past);
        w.plan(ch.before);
    }

    w.i32(m.n_announced);
    w.i32(m.params.read_budget);
    w.i32(m.read.n_keys);
    w.i32(m.read.by_hand);
    w.i32((int32_t) m.read.ranges.size());
    for (const auto & r : m.read.ranges) {
        w.i32(r.from);
        w.i32(r.to);
    }
    w.i32(m.read.n_whole);
    w.i32((int32_t) m.read.scores.size());
    w.raw(m.read.scores.data(), m.read.scores.size() * sizeof(float));

    writer head;
    head.i32((int32_t) MESA_STATE_MAGIC);
    head.i32((int32_t) MESA_STATE_VERSION);
    head.u64(checksum(w.buf.data(), w.buf.size()));
    head.raw(w.buf.data(), w.buf.size());

    return head.buf;
}

void llama_mesa_unpack(llama_mesa & m, const uint8_t * data, size_t size) {
    reader r = { data, size };

    if ((uint32_t) r.i32() != MESA_STATE_MAGIC) {
        throw std::runtime_error("the state was not saved by a Mesa context");
    }
    const int32_t version = r.i32();
    if (version != 7 && (uint32_t) version != MESA_STATE_VERSION) {
        throw std::runtime_error("the Mesa part of the state has version " + std::to_string(version) +
                                 ", this library reads " + std::to_string(MESA_STATE_VERSION));
    }
    if (r.u64() != checksum(r.p, r.n)) {
        throw std::runtime_error("the Mesa part of the state is damaged: wrong checksum");
    }

    llama_mesa res;
    res.params = r.params();

    if (const auto diff = mesa::find_difference(res.params, m.params_own); diff.name) {
        throw std::runtime_error(
                std::string("the state was saved with ") + diff.name + " " + diff.a + ", this context has " + diff.b);
    }
    res.params.read_budget = m.params_own.read_budget;
    res.params.read_every  = m.params_own.read_every;
    try {
        mesa::validate(res.params);
    } catch (const std::invalid_argument & err) {
        throw std::runtime_error(std::string("the Mesa part of the state is damaged: ") + err.what());
    }

    res.n_by_hand = r.i32();
    res.plan      = r.plan();
    res.key_pos   = r.vec();

    res.key_moved.resize(res.key_pos.size());
    r.raw(res.key_moved.data(), res.key_moved.size());
    res.tokens.resize(res.key_pos.size());
    r.raw(res.tokens.data(), res.tokens.size() * sizeof(int32_t));

    const int32_t n_loaded = r.i32();
    for (int32_t i = 0; i < n_loaded; ++i) {
        const int32_t start = r.i32();
        const int32_t end   = r.i32();
        if (start < std::max(1, res.loaded_end()) || start >= res.n_past() || end <= start) {
            throw std::runtime_error("the Mesa part of the state is damaged: its loaded chunks are out of order");
        }
        res.loaded.push_back({ start, end });
    }

    const int32_t n_changes = r.i32();
    if (n_changes < 0) {
        throw std::runtime_error("the Mesa part of the state is damaged: a length is out of range");
    }
    for (int32_t i = 0; i < n_changes; ++i) {
        const int32_t n_past = r.i32();
        if (n_past < 0 || n_past > res.n_past() || (i > 0 && n_past < res.changes.back().n_past)) {
            throw std::runtime_error("the Mesa part of the state is damaged: its history is out of order");
        }
        res.changes.push_back({ n_past, r.plan() });
    }

    if (version > 7) { // before, everything was read
        res.n_announced      = r.i32();
        const int32_t budget = r.i32();
        res.read.n_keys      = r.i32();
        res.read.by_hand     = r.i32() != 0;
        const int32_t n      = r.i32();

        bool ok     = res.n_announced >= 0 && res.read.n_keys >= 0 && res.read.n_keys <= res.n_past() && n >= 0;
        int32_t end = 0;
        for (int32_t i = 0; ok && i < n; ++i) {
            const int32_t from = r.i32();
            const int32_t to   = r.i32();

            ok  = from >= end && to >= from && to <= res.read.n_keys;
            end = to;
            res.read.ranges.push_back({ from, to });
        }
        if (ok) {
            res.read.n_whole       = r.i32();
            const int32_t n_scores = r.i32();

            ok = n_scores >= 0 && (size_t) n_scores <= r.n / sizeof(float);
            if (ok) {
                res.read.scores.resize(n_scores);
                r.raw(res.read.scores.data(), n_scores * sizeof(float));
            }
        }
        if (!ok) {
            throw std::runtime_error("the Mesa part of the state is damaged: what is read is out of range");
        }
        if (!res.read.by_hand && budget != m.params_own.read_budget) {
            res.read = {};
        }
    }
    if (r.n != 0) {
        throw std::runtime_error("the Mesa part of the state is damaged: bytes are left over");
    }

    m.params    = res.params;
    m.plan      = std::move(res.plan);
    m.key_pos   = std::move(res.key_pos);
    m.key_moved = std::move(res.key_moved);
    m.tokens    = std::move(res.tokens);
    m.loaded    = std::move(res.loaded);
    m.changes   = std::move(res.changes);
    m.n_by_hand = res.n_by_hand;
    m.read      = std::move(res.read);

    m.n_announced = res.n_announced;
    if (m.n_past() == 0) {
        m.start_anew();
    }
}
