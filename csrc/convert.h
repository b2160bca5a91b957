#pragma once

// params as the C API has them, and back

#include "llama-mesa.h"
#include "params.h"

namespace mesa {

inline params from_c(const llama_mesa_params & c) {
    params p;
    p.train_length   = c.train_length;
    p.reading_length = c.reading_length;
    p.first_chunk    = c.first_chunk;
    p.chunk          = c.chunk;
    p.last_chunk     = c.last_chunk;
    p.stair_width    = c.stair_width;
    p.room           = c.room;
    p.log_scaling    = c.log_scaling;
    p.method         = c.method;
    p.window         = c.window;
    p.n_sinks        = c.n_sinks;
    p.stair_bias     = c.stair_bias;
    p.log_length     = c.log_length;
    p.read_budget    = c.read_budget;
    p.read_every     = c.read_every;
    return p;
}

inline llama_mesa_params to_c(const params & p) {
    return { p.train_length, p.first_chunk, p.chunk, p.last_chunk, p.stair_width, p.room, p.log_scaling, p.method,
        p.window, p.n_sinks, p.stair_bias, p.log_length, p.reading_length, p.read_budget, p.read_every };
}

} // namespace mesa
