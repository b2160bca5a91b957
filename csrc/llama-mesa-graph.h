// The one part of the state that llama.cpp's headers know by value: see llama-cparams.h.

#pragma once

#include <cstdint>

struct llama_mesa; // state.h

// What of the state decides the shape of a ubatch's graph; two ubatches with equal values may share one graph.
struct llama_mesa_graph {
    bool window     = false; // the ubatch is read in its chunk alone, not against the whole cache
    bool scale      = false; // queries are scaled
    bool swa        = false; // sliding-window layers: positions differ from the logical ones
    bool attention  = false; // what the token attends to is an output
    bool choose     = false; // so it is for choosing what the next tokens read
    int32_t n_rules = 0; // 1: every query has keys of its own; 2: far keys have positions of their own; see mesa::weave
    int32_t n_prev  = 0; // window only: cached rows in front of the ubatch's own, padding included
    int32_t start   = 0; // window over a transposed V cache only: first cached row of the ubatch's first chunk

    bool operator==(const llama_mesa_graph & other) const {
        return window == other.window && scale == other.scale && swa == other.swa && n_rules == other.n_rules &&
               attention == other.attention && choose == other.choose && n_prev == other.n_prev && start == other.start;
    }
};
