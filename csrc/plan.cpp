#include "plan.h"

#include "arithmetic.h"
#include "weave.h"

#include <algorithm>
#include <cmath>

namespace mesa {

void validate(const params & p, const plan & pl, int32_t n_tokens) {
    const auto & cs = pl.chunk_starts;

    if (cs.empty() || cs[0] != 0) {
        invalid("chunk_starts must begin with 0");
    }
    for (size_t c = 1; c < cs.size(); ++c) {
        if (cs[c] <= cs[c - 1]) {
            invalid("chunk_starts must grow: " + str(cs[c]) + " follows " + str(cs[c - 1]));
        }
    }
    if (pl.stair_width < 1) {
        invalid("stair_width is " + str(pl.stair_width) + ": it must be 1 or more");
    }
    if (pl.anchor < 0 || pl.anchor > pl.last_start()) {
        invalid("anchor is " + str(pl.anchor) + ": it must lie between 0 and the last chunk's start (" +
                str(pl.last_start()) + ")");
    }
    if (cs.size() > 1 && cs[1] >= p.train_length) {
        invalid("the first chunk has " + str(cs[1]) + " tokens, not less than train_length (" + str(p.train_length) +
                ")");
    }
    for (size_t c = 1; c + 1 < cs.size(); ++c) {
        if ((int64_t) cs[1] + (cs[c + 1] - cs[c]) > p.train_length) {
            invalid("the chunk that starts at " + str(cs[c]) + " has " + str(cs[c + 1] - cs[c]) +
                    " tokens: with the first chunk (" + str(cs[1]) + ") that is more than train_length (" +
                    str(p.train_length) + ")");
        }
    }
    if (n_tokens > 0 && n_tokens < pl.last_start()) {
        invalid("the last chunk starts at " + str(pl.last_start()) + ", after the end of the text (" + str(n_tokens) +
                " tokens)");
    }
}

int32_t anchor_pos(const plan & pl) {
    return ceil_div(pl.anchor, pl.stair_width);
}

int32_t key_pos(const plan & pl, int32_t j) {
    const int32_t d = j - pl.anchor;

    return anchor_pos(pl) + (d < 0 ? floor_div(d, pl.stair_width) : d);
}

int32_t query_pos(const plan & pl, int32_t i) {
    return anchor_pos(pl) + (i - pl.anchor);
}

int32_t n_pos(const plan & pl, int32_t n_tokens) {
    return anchor_pos(pl) + std::max(0, n_tokens - pl.anchor);
}

int32_t chunk_of(const plan & pl, int32_t i) {
    const auto & cs = pl.chunk_starts;

    return (int32_t) (std::upper_bound(cs.begin(), cs.end(), i) - cs.begin()) - 1;
}

int32_t chunk_pos(const plan & pl, int32_t i) {
    const int32_t c = chunk_of(pl, i);

    return c == 0 ? i : pl.chunk_starts[1] + (i - pl.chunk_starts[c]);
}

seen sees(const params & p, const plan & pl, int32_t i) {
    if (i >= pl.last_start()) {
        return p.forgets() ? seen{ p.n_sinks, window_start(p, i) } : seen{};
    }
    const int32_t c = chunk_of(pl, i);

    return c == 0 ? seen{} : seen{ pl.chunk_starts[1], pl.chunk_starts[c] };
}

float stair_bias(const params & p, const plan & pl) {
    return pl.anchor > 0 ? -p.stair_bias * std::log((float) pl.stair_width) : 0.0f;
}

std::vector<float> near_bias(const params & p, const plan & pl) {
    const float bias = stair_bias(p, pl);

    std::vector<float> res(bias < 0.0f ? p.last_chunk : 0);
    for (int32_t d = 0; d < (int32_t) res.size(); ++d) {
        res[d] = bias * std::max(0.0f, 2.0f * d / p.last_chunk - 1.0f);
    }
    return res;
}

float log_scale(int32_t log_length, int32_t i) {
    if (i < log_length) {
        return 1.0f;
    }
    return (float) (std::log((double) i + 1.0) / std::log((double) log_length));
}

// the last start of a chunk in (lo, hi] that follows the end of a line, else of a sentence, else hi
static int32_t snap(const uint8_t * breaks, int32_t lo, int32_t hi) {
    int32_t sentence = 0;
    for (int32_t s = hi; breaks && s > lo; --s) {
        if (breaks[s - 1] == break_line) {
            return s;
        }
        if (breaks[s - 1] != 0 && sentence == 0) {
            sentence = s;
        }
    }
    return sentence > 0 ? sentence : hi;
}

// append chunk starts until the next one would be last_start, then last_start itself
// a chunk that was read in part ends where that part does, or later
static void append_chunks(
        std::vector<int32_t> & cs, int32_t chunk, int32_t n_past, int32_t last_start, const uint8_t * breaks) {
    while (last_start - cs.back() > chunk) {
        cs.push_back(snap(breaks, std::max(cs.back() + chunk / 2, n_past - 1), cs.back() + chunk));
    }
    if (last_start > cs.back()) {
        cs.push_back(last_start);
    }
}

// smallest E >= e_min with ceil(anchor/E) + (n_tokens - anchor) + room <= R
static int32_t stair_width_fit(const params & p, int32_t anchor, int32_t n_tokens, int32_t room, int32_t e_min) {
    const int32_t n_stair = p.reading_length - (n_tokens - anchor) - room;

    if (n_stair < 1) {
        invalid("the last " + str(n_tokens - anchor) + " tokens leave no position of reading_length (" +
                str(p.reading_length) + ") to the stair");
    }
    return std::max(std::max(1, e_min), ceil_div(anchor, n_stair));
}

static int32_t last_start_of(const params & p, int32_t lo, int32_t n_tokens, const uint8_t * breaks) {
    const int32_t s = std::max(lo, n_tokens - p.last_chunk);

    // a break up to half a last chunk earlier keeps a sentence in one piece, and the last chunk near its asked length
    return snap(breaks, std::max(lo, s - std::min(p.last_chunk, p.reading_length - p.last_chunk - p.room - 1) / 2), s);
}

int32_t n_first_of(const params & p, const plan & pl) {
    return pl.chunk_starts.size() > 1 ? pl.chunk_starts[1] : p.first_chunk;
}

int32_t n_chunk_of(const params & p, const plan & pl) {
    return std::min(p.chunk, p.reading_length - n_first_of(p, pl));
}

static plan make_from(
        const params & p, std::vector<int32_t> cs, int32_t n_past, int32_t n_tokens, const uint8_t * breaks) {
    plan pl;

    pl.chunk_starts = std::move(cs);

    const int32_t s = last_start_of(
            p, std::max(n_past, pl.chunk_starts.back() + (pl.chunk_starts.size() == 1 ? 1 : 0)), n_tokens, breaks);

    append_chunks(pl.chunk_starts, n_chunk_of(p, pl), n_past, s, breaks);

    if (p.method == method_star) {
        return pl; // every token at its own position
    }

    pl.anchor = pl.last_start();

    const int32_t e_fit = stair_width_fit(p, pl.anchor, n_tokens, p.room, 1);
    if (p.stair_width > 0 && ceil_div(pl.anchor, p.stair_width) + (n_tokens - pl.anchor) > p.reading_length) {
        invalid("stair_width " + str(p.stair_width) + " is too small for " + str(n_tokens) +
                " tokens: the stair would leave the reading length; use " + str(e_fit) + " or more, or \"auto\"");
    }
    pl.stair_width = p.stair_width > 0 ? p.stair_width : e_fit;

    return pl;
}

bool fits(const params & p, const plan & pl, int32_t n_tokens) {
    switch (p.method) {
        case method_mesa:
        case method_mesa_exact: return n_pos(pl, n_tokens) <= p.reading_length;
        default:                return width_fit(p, n_tokens) <= pl.stair_width;
    }
}

// note: as with chunks, a fixed E must fit the tokens that are there; only one that is chosen here leaves them room
static plan make_width(const params & p, const plan & old, int32_t n_tokens, int32_t room) {
    plan pl = old;

    const int32_t e_fit = width_fit(p, (int64_t) n_tokens + room);
    if (p.stair_width > 0 && p.stair_width < width_fit(p, n_tokens)) {
        invalid("stair_width " + str(p.stair_width) + " is too small for " + str(n_tokens) + " tokens: use " +
                str(e_fit) + " or more, or \"auto\"");
    }
    pl.stair_width = std::max(old.stair_width, p.stair_width > 0 ? p.stair_width : e_fit);
    return pl;
}

plan make(const params & p, int32_t n_tokens, const uint8_t * breaks) {
    if (n_tokens <= p.reading_length) {
        return {};
    }
    if (!p.chunked()) {
        return make_width(p, {}, n_tokens, p.room);
    }
    return make_from(p, { 0, p.first_chunk }, 0, n_tokens, breaks);
}

plan extend(const params & p, const plan & old, int32_t n_past, int32_t n_tokens, const uint8_t * breaks,
        int32_t n_loaded) {
    if (n_past == 0) {
        return make(p, n_tokens, breaks);
    }
    if (!p.chunked()) {
        return fits(p, old, n_tokens) ? old : make_width(p, old, n_tokens, p.room);
    }

    if (n_past >= old.last_start()) {
        if (p.method == method_star ? n_tokens <= p.reading_length : n_pos(old, n_tokens) <= p.reading_length) {
            return old;
        }
        // a short text is read in the last chunk, beside the stair; a longer one is chunked
        const int32_t n_last_max = std::max(p.last_chunk, (p.reading_length - n_first_of(p, old)) / 2 - p.room / 2);

        if (n_tokens - n_past <= std::min(n_chunk_of(p, old), n_last_max)) {
            return advance(p, old, n_past, n_tokens);
        }
    }

    // keep the borders of what was read; the chunk that n_past lies in goes on, the last chunk has become a chunk like others
    std::vector<int32_t> cs;
    for (int32_t s : old.chunk_starts) {
        if (s < n_past || s <= n_loaded) {
            cs.push_back(s);
        }
    }
    if (cs.size() == 1 && n_past < p.first_chunk + p.chunk) {
        cs.push_back(p.first_chunk); // all of it was read as the first chunk and the chunk after it would have been
    } else if (n_past > old.last_start()) {
        if (cs.size() == 1) {
            cs.push_back(p.first_chunk); // read plainly, longer than a first chunk and a chunk
        }
        if (n_past > cs.back()) {
            cs.push_back(n_past);
        }
    }
    if (n_tokens <= p.reading_length && cs.size() <= 2) {
        return {};
    }
    return make_from(p, std::move(cs), n_past, n_tokens, breaks);
}

plan append_chunk(const params & p, const plan & old, int32_t n_past, int32_t n_tokens) {
    plan pl;
    pl.chunk_starts.clear();

    for (int32_t s : old.chunk_starts) {
        if (s < n_past) {
            pl.chunk_starts.push_back(s);
        }
    }
    pl.chunk_starts.push_back(n_past);
    pl.chunk_starts.push_back(n_tokens);

    const int64_t n_last = (int64_t) n_tokens + p.last_chunk;
    if (n_last <= p.reading_length) {
        return pl; // distances are the true ones
    }
    if (n_last > INT32_MAX) {
        invalid("a text of " + str(n_tokens) + " tokens is too long");
    }

    // the chunk in front of the question stands at its true distance, if that leaves a quarter of the positions to the stair
    const bool is_near = n_last - n_past + p.room <= p.reading_length - p.reading_length / 4;
    pl.anchor          = is_near ? n_past : n_tokens;

    const int32_t e_fit = stair_width_fit(p, pl.anchor, n_last, p.room, 1);
    if (p.stair_width > 0 && ceil_div(pl.anchor, p.stair_width) + (n_last - pl.anchor) > p.reading_length) {
        invalid("stair_width " + str(p.stair_width) + " is too small for " + str(n_tokens) +
                " tokens and a last chunk; use " + str(e_fit) + " or more, or \"auto\"");
    }
    pl.stair_width = p.stair_width > 0 ? p.stair_width : e_fit;

    return pl;
}

plan advance(const params & p, const plan & old, int32_t n_past, int32_t n_tokens) {
    plan pl = old;

    if (n_past < old.last_start()) {
        invalid("the last chunk starts at " + str(old.last_start()) +
                ": the anchor cannot move while a chunk before it is being read (" + str(n_past) + " tokens so far)");
    }
    if (fits(p, old, n_tokens)) {
        return pl;
    }
    if (!p.chunked()) {
        return make_width(p, old, n_tokens, n_tokens / 4); // seldom
    }

    // as far forward as leaves last_chunk tokens at unit distance, in steps of E: no key on the stair moves
    const int32_t a_max = std::max(old.anchor, std::min(n_past, n_tokens - p.last_chunk));

    pl.anchor = old.anchor + (a_max - old.anchor) / old.stair_width * old.stair_width;

    if (pl.anchor == old.anchor || n_pos(pl, n_tokens) + std::min(p.room, p.last_chunk) > p.reading_length) {
        // E grows by a quarter more than it must, so that it seldom grows
        pl.anchor = a_max;
        if (p.stair_width > 0) {
            if (n_pos(pl, n_tokens) > p.reading_length) {
                invalid("stair_width " + str(p.stair_width) + " is too small for " + str(n_tokens) + " tokens; use " +
                        str(stair_width_fit(p, pl.anchor, n_tokens, 0, 1)) + " or more, or \"auto\"");
            }
        } else {
            const int32_t room  = std::min(p.room, std::max(0, (p.reading_length - (n_tokens - pl.anchor)) / 2));
            const int32_t e_fit = stair_width_fit(p, pl.anchor, n_tokens, room, old.stair_width);
            pl.stair_width      = e_fit + e_fit / 4;
        }
    }

    return pl;
}

int32_t n_plain(const plan & pl) {
    const auto & cs = pl.chunk_starts;

    if (cs.size() == 1) {
        return pl.anchor == 0 ? INT32_MAX : pl.anchor; // it moved later than this, and a roll-back takes that back
    }
    // the first chunk sees itself, the next one both
    return std::min(cs[cs.size() > 2 ? 2 : 1], pl.last_start() - 1);
}

int32_t n_tokens_batch(const plan & pl, int32_t n_past, int32_t n_tokens, int32_t n_max) {
    if (n_tokens <= n_max) {
        return n_tokens;
    }
    const auto & cs = pl.chunk_starts;

    const auto next =
            std::lower_bound(cs.begin(), cs.end(), n_past + n_max); // the border before it is the last one inside
    return next != cs.begin() && *(next - 1) > n_past ? *(next - 1) - n_past : n_max;
}

int32_t n_tokens_ubatch(const params & p, const plan & pl, int32_t pos, int32_t n_ubatch) {
    if (pos >= pl.last_start()) {
        if (p.exact() && !all_true(p, pl, pos + n_ubatch - 1)) { // beyond the window each query has keys of its own
            return std::max(1, std::min(n_ubatch, p.window + 1 - pos));
        }
        return n_ubatch;
    }

    const auto & cs = pl.chunk_starts;

    // the first chunk and the one after it are read as one
    size_t c = std::max(1, chunk_of(pl, pos)) + 1;

    const int32_t n_rest = cs[std::min(c, cs.size() - 1)] - pos;
    if (n_rest > n_ubatch) {
        const int32_t n_parts = ceil_div(n_rest, n_ubatch); // of even length
        return ceil_div(n_rest, n_parts);
    }

    while (c + 1 < cs.size() && cs[c + 1] - pos <= n_ubatch) {
        ++c;
    }
    return cs[std::min(c, cs.size() - 1)] - pos;
}

} // namespace mesa
