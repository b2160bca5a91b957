// The method as pure functions: which tokens are read together, at which positions, and who sees whom.
// Free of ggml and of llama.cpp, so that it can be read and tested alone.
//
// Source: "Mesa-Extrapolation: A Weave Position Encoding Method for Enhanced Extrapolation in LLMs"
// (NeurIPS 2024, arXiv 2410.15859). All positions and indices count tokens from 0.

#pragma once

#include "params.h"

#include <cstdint>
#include <vector>

namespace mesa {

// How a text is read. Chunk 0 is the first chunk, the last one the last chunk; generated tokens belong to the last chunk.
// A plan of one chunk that starts at 0, with the anchor at 0, is a plain causal reading.
struct plan {
    std::vector<int32_t> chunk_starts = { 0 };

    int32_t anchor      = 0; // a: keys before it stand on the stair, keys from it on at unit distance
    int32_t stair_width = 1; // E

    int32_t last_start() const { return chunk_starts.back(); }

    bool operator==(const plan & other) const {
        return chunk_starts == other.chunk_starts && anchor == other.anchor && stair_width == other.stair_width;
    }
    bool operator!=(const plan & other) const { return !(*this == other); }
};

// Throw std::invalid_argument that says what is wrong and what to do.
// note: a plan made by hand may lead past T (n_pos > train_length), as runs of the authors' program do; its chunks may not
void validate(const params & p, const plan & pl, int32_t n_tokens);

//
// positions (the anchored form of the paper's equation 3)
//

// A = ceil(a/E), the position of the anchor
int32_t anchor_pos(const plan & pl);

// position of key j as the last chunk and generated tokens see it
int32_t key_pos(const plan & pl, int32_t j);

// position of query i of the last chunk, i >= anchor
int32_t query_pos(const plan & pl, int32_t i);

// one more than the largest position that n_tokens tokens reach
int32_t n_pos(const plan & pl, int32_t n_tokens);

// index of the chunk that token i is read in
int32_t chunk_of(const plan & pl, int32_t i);

// position of token i, query and key, while its own chunk is read: the first chunk at 0 .. F-1, every middle chunk from F on
int32_t chunk_pos(const plan & pl, int32_t i);

// the keys that query i attends to: 0 .. n_first-1, and start .. i (the chunk-triangular mask)
struct seen {
    int32_t n_first = 0;
    int32_t start   = 0;
};

seen sees(const params & p, const plan & pl, int32_t i);

//
// logits and queries
//

// what is added to the logits of the keys before the anchor, as the last chunk and generated tokens see them
float stair_bias(const params & p, const plan & pl);

// the same of the keys from the anchor on, by distance from the query; from the end of the table on as on the stair
std::vector<float> near_bias(const params & p, const plan & pl);

// factor on the query at token index i: max(1, ln(i + 1)/ln(log_length))
float log_scale(int32_t log_length, int32_t i);

//
// plans
//

// breaks[i]: what ends with token i, so that a chunk may well start at i + 1; lines are preferred; may be null
enum : uint8_t { break_none = 0, break_sentence = 1, break_line = 2 };

// A border depends on the tokens of its own chunk only, never on the text after it; the last two borders
// depend on the length as well.

// Plan of n_tokens tokens, none of them read yet.
plan make(const params & p, int32_t n_tokens, const uint8_t * breaks);

// Plan of n_tokens tokens of which n_past were read under the plan old. What was read stays as it was read.
// The chunks up to n_loaded, if any, were loaded: the last of them does not go on.
plan extend(const params & p, const plan & old, int32_t n_past, int32_t n_tokens, const uint8_t * breaks,
        int32_t n_loaded = 0);

// Plan where the tokens n_past .. n_tokens-1 are a chunk that is loaded behind what was read under the plan old. Whatever is read next
// is the last chunk. Anchor and E depend on n_past and n_tokens alone, so that texts of different lengths after it move no key.
// n_past must be the end of a chunk, or of a text that was read plainly: that one is the first chunk.
plan append_chunk(const params & p, const plan & old, int32_t n_past, int32_t n_tokens);

// tokens in the first chunk, and the most in a middle chunk of a text that goes on
int32_t n_first_of(const params & p, const plan & pl);
int32_t n_chunk_of(const params & p, const plan & pl);

// do the positions of n_tokens tokens stay inside the reading length (where the method cares)?
bool fits(const params & p, const plan & pl, int32_t n_tokens);

// Move the anchor (and grow E if it must) so that n_tokens tokens fit into the reading length, no new chunk.
// n_tokens - n_past must fit in beside the stair, else std::invalid_argument.
plan advance(const params & p, const plan & old, int32_t n_past, int32_t n_tokens);

// How many tokens of a text that was read by this plan were certainly read as stock llama.cpp reads them: few enough that a text that
// goes on from there gets a plan of its own.
int32_t n_plain(const plan & pl);

// How many of the n_tokens tokens after n_past the next batch takes, n_max at most: one that does not take them all ends where a chunk
// does, if it can.
int32_t n_tokens_batch(const plan & pl, int32_t n_past, int32_t n_tokens, int32_t n_max);

// A ubatch takes tokens from one side of the last chunk's start only, and whole chunks where they fit.
// Returns how many of the tokens from pos on to take at most, 1 .. n_ubatch.
int32_t n_tokens_ubatch(const params & p, const plan & pl, int32_t pos, int32_t n_ubatch);

} // namespace mesa
