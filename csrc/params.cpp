#include "params.h"

#include "arithmetic.h"
#include "budget.h"

#include <algorithm>
#include <cstdio>

namespace mesa {

const char * method_name(int32_t method) {
    static const char * names[n_methods] = {
        "mesa",
        "mesa-exact",
        "star",
        "stair",
        "rerope",
        "leaky-rerope",
        "self-extend",
        "lm-infinite",
        "streaming-llm",
    };
    return method >= 0 && method < n_methods ? names[method] : nullptr;
}

// What is known of a model that nothing was measured of: R, and the longest chunk that is of use.
// note: models of a few thousand tokens are read in as few chunks as possible, which is speed; in a longer one it is the other way about:
// a chunk pays for every pair of its tokens, and longer ones do not answer better
static int32_t reading_length_auto(int32_t train_length) {
    return train_length;
}

static int32_t chunk_auto(int32_t train_length) {
    return train_length < 4096 ? train_length : 1024;
}

params params_default(int32_t train_length, int32_t method, int32_t reading_length) {
    params p;
    p.train_length   = train_length;
    p.reading_length = reading_length != unset ? reading_length : reading_length_auto(train_length);

    const int32_t R = std::max(0, p.reading_length); // validate refuses less

    p.method      = method;
    p.first_chunk = std::max(1, std::min(100, R / 16));
    p.chunk       = std::min(R - p.first_chunk, chunk_auto(train_length));
    p.last_chunk  = std::max(1, std::min(512, std::max(R / 8, std::min(256, R / 4)))); // it pays for every key
    p.room        = R / 4;

    switch (method) {
        case method_star:
            p.first_chunk = p.chunk = R / 2; // as long as a block
            p.last_chunk            = std::max(1, p.last_chunk / 2);
            p.room                  = p.room / 2;
            break;
        case method_mesa_exact:    p.window = p.last_chunk; break;
        case method_stair:
        case method_rerope:
        case method_leaky_rerope:
        case method_self_extend:   p.window = R / 2; break;
        case method_lm_infinite:
        case method_streaming_llm: p.window = R - p.n_sinks; break;
        case method_mesa:          // the three are not the paper's: docs/DESIGN.md
            p.room       = R / 2;
            p.stair_bias = 0.5f;
            p.log_length = (int32_t) std::min<int64_t>(INT32_MAX, 4 * (int64_t) R);
            break;
        default: break;
    }
    p.log_scaling = method == method_mesa || method == method_mesa_exact;
    return p;
}

params params_unset(int32_t train_length, int32_t method) {
    params p;
    p.train_length   = train_length;
    p.method         = method;
    p.reading_length = unset;
    p.first_chunk    = unset;
    p.chunk          = unset;
    p.last_chunk     = unset;
    p.stair_width    = unset;
    p.room           = unset;
    p.log_scaling    = unset;
    p.log_length     = unset;
    p.stair_bias     = unset;
    p.window         = unset;
    p.n_sinks        = unset;
    p.read_budget    = unset;
    p.read_every     = unset;
    return p;
}

params fill(const params & p) {
    const params d  = params_default(p.train_length, p.method, p.reading_length);
    const int64_t R = std::max(0, d.reading_length);

    const auto clip = [](int64_t v, int64_t most, int64_t least) {
        return (int32_t) std::max(least, std::min(v, most));
    };

    params res = p;

    res.reading_length = d.reading_length;
    if (p.first_chunk == unset) {
        res.first_chunk = clip(d.first_chunk, std::max<int64_t>(1, R - (p.chunk == unset ? 1 : p.chunk)), INT32_MIN);
    }
    if (p.chunk == unset) {
        res.chunk = clip(p.method == method_star ? d.chunk : chunk_auto(p.train_length), R - res.first_chunk, 1);
    }
    if (p.last_chunk == unset) {
        res.last_chunk = d.last_chunk;
    }
    if (p.stair_width == unset) {
        res.stair_width = 0;
    }
    if (p.room == unset) { // R/4 is the stair's, if it can be had
        res.room = clip(d.room, R - res.last_chunk - std::max<int64_t>(R / 4, (int64_t) res.first_chunk + 1), 0);
    }
    if (p.log_scaling == unset) {
        res.log_scaling = d.log_scaling;
    }
    if (p.log_length == unset) {
        res.log_length = d.log_length;
    }
    if (p.stair_bias == unset) {
        res.stair_bias = d.stair_bias;
    }
    if (p.n_sinks == unset) {
        res.n_sinks = d.n_sinks;
    }
    if (p.read_budget == unset) {
        res.read_budget = d.read_budget;
    }
    if (p.read_every == unset) {
        res.read_every = d.read_every;
    }
    if (p.window == unset) { // sinks and window share what there is
        res.window = p.forgets() ? (int32_t) std::min<int64_t>(INT32_MAX, (int64_t) d.window + d.n_sinks - res.n_sinks)
                                 : d.window;
    }
    return res;
}

void validate(const params & p) {
    if (p.train_length < 8) {
        invalid("train_length is " + str(p.train_length) +
                ": it must be the length that the model was trained at, 8 tokens or more");
    }
    if (p.reading_length < 8 || p.reading_length > p.train_length) {
        invalid("reading_length is " + str(p.reading_length) + ": it must lie between 8 and train_length (" +
                str(p.train_length) + ")");
    }
    if (p.first_chunk < 1) {
        invalid("first_chunk is " + str(p.first_chunk) + ": it must be 1 token or more");
    }
    if (p.chunk < 1) {
        invalid("chunk is " + str(p.chunk) + ": it must be 1 token or more");
    }
    if (p.first_chunk >= p.reading_length) {
        invalid("first_chunk is " + str(p.first_chunk) + ", not less than reading_length (" + str(p.reading_length) +
                "): nothing is left for the chunks after it");
    }
    if (p.first_chunk > p.reading_length - p.chunk) {
        invalid("first_chunk + chunk is " + std::to_string((int64_t) p.first_chunk + p.chunk) +
                ", more than reading_length (" + str(p.reading_length) +
                "): a middle chunk would leave the reading length; make chunk at most " +
                str(p.reading_length - p.first_chunk));
    }
    if (p.last_chunk < 1) {
        invalid("last_chunk is " + str(p.last_chunk) + ": it must be 1 token or more");
    }
    if (p.stair_width < 0) {
        invalid("stair_width is " + str(p.stair_width) + ": it must be 1 or more, or \"auto\"");
    }
    if (p.room < 0) {
        invalid("room is " + str(p.room) + ": it must be 0 tokens or more");
    }
    if (p.log_scaling != 0 && p.log_scaling != 1) {
        invalid("log_scaling is " + str(p.log_scaling) + ": it must be 0 or 1");
    }
    if (p.log_length < 0 || p.log_length == 1) {
        invalid("log_length is " + str(p.log_length) + ": it must be 2 tokens or more, or 0, which is reading_length");
    }
    if (!method_name(p.method)) {
        invalid("there is no method " + str(p.method));
    }
    if (!(p.stair_bias >= 0.0f && p.stair_bias <= 8.0f)) {
        invalid("stair_bias is " + std::to_string(p.stair_bias) + ": it must lie between 0 and 8");
    }
    if (p.stair_bias > 0.0f && p.method != method_mesa) {
        invalid(std::string("stair_bias is for the method mesa: ") + method_name(p.method) + " has none");
    }
    if (p.read_budget < 0 || (p.read_budget > 0 && p.read_budget < read_block)) {
        invalid("read_budget is " + str(p.read_budget) + ": it must be " + str(read_block) +
                " tokens or more, or 0, which is all of them");
    }
    if (p.read_budget > 0 && p.method != method_mesa) {
        invalid(std::string("read_budget is for the method mesa: ") + method_name(p.method) + " reads everything");
    }
    if (p.read_every < 0) {
        invalid("read_every is " + str(p.read_every) + ": it must be 1 token or more, or 0, which is " +
                str(params::read_every_default));
    }
    if (p.windowed()) {
        const int32_t n_sinks = p.forgets() ? p.n_sinks : 0;
        if (n_sinks < 0) {
            invalid("n_sinks is " + str(n_sinks) + ": it must be 0 or more");
        }
        if (p.window < 1 || p.window > p.reading_length - 1 - (n_sinks > 0 ? n_sinks - 1 : 0)) {
            invalid("window is " + str(p.window) + ": it must lie between 1 and " +
                    str(p.reading_length - 1 - (n_sinks > 0 ? n_sinks - 1 : 0)) + ", inside reading_length (" +
                    str(p.reading_length) + ")");
        }
    }
    if (p.method == method_star) {
        return; // what follows is about the stair
    }
    if ((int64_t) p.last_chunk + p.room + p.first_chunk >= p.reading_length) {
        invalid("first_chunk + last_chunk + room is " +
                std::to_string((int64_t) p.first_chunk + p.last_chunk + p.room) +
                ", which leaves nothing of reading_length (" + str(p.reading_length) +
                ") to the stair; make last_chunk smaller");
    }
}

difference find_difference(const params & a, const params & b) {
    const auto integer = [](int32_t v) { return str(v); };
    const auto on_off  = [](bool v) { return std::string(v ? "on" : "off"); };
    const auto real    = [](float v) {
        char text[32];
        snprintf(text, sizeof(text), "%.9g", v); // all of it: two that differ read differently
        return std::string(text);
    };
    const auto name = [](int32_t method) {
        const char * res = method_name(method);
        return std::string(res ? res : "unknown");
    };

    if (a.train_length != b.train_length) {
        return { "train_length", integer(a.train_length), integer(b.train_length) };
    }
    if (a.method != b.method) {
        return { "method", name(a.method), name(b.method) };
    }
    if (a.method == method_mesa_exact && a.reading_length != b.reading_length) { // the width of each query's stair
        return { "reading_length", integer(a.reading_length), integer(b.reading_length) };
    }
    if (a.log_scaling != b.log_scaling) {
        return { "log_scaling", on_off(a.log_scaling), on_off(b.log_scaling) };
    }
    if (a.log_scaling && a.n_unscaled() != b.n_unscaled()) {
        return { "log_length", integer(a.n_unscaled()), integer(b.n_unscaled()) };
    }
    if (a.stair_bias != b.stair_bias) {
        return { "stair_bias", real(a.stair_bias), real(b.stair_bias) };
    }
    if (a.chunked() && a.last_chunk != b.last_chunk) { // how far the bias reaches, and where the anchor stops
        return { "last_chunk", integer(a.last_chunk), integer(b.last_chunk) };
    }
    if (a.windowed() && a.window != b.window) {
        return { "window", integer(a.window), integer(b.window) };
    }
    if (a.forgets() && a.n_sinks != b.n_sinks) {
        return { "n_sinks", integer(a.n_sinks), integer(b.n_sinks) };
    }
    return {};
}

} // namespace mesa
