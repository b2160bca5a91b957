// The method as pure functions: which tokens are read together, at which positions, and who sees whom.
// Free of ggml and of llama.cpp, so that it can be read and tested alone.
//
// Source: "Mesa-Extrapolation: A Weave Position Encoding Method for Enhanced Extrapolation in LLMs"
// (NeurIPS 2024, arXiv 2410.15859). All positions and indices count tokens from 0.

#pragma once

#include <cstdint>
#include <vector>

namespace mesa {

// Members of the weave family: who sees whom, and how far apart a query and a key are said to be. t = i - j is the distance.
enum method : int32_t {
    method_mesa          = 0, // chunks, then the anchored stair: this file
    method_mesa_exact    = 1, // chunks, then equation 3 with the same N for every query
    method_star          = 2, // chunks, then true distances (Star Attention: the first chunk is the anchor block)
    method_stair         = 3, // equation 3 for every query, no chunks
    method_rerope        = 4, // min(t, N)
    method_leaky_rerope  = 5, // t < N: t, else N + (t - N)/E
    method_self_extend   = 6, // t < N: t, else i/E - j/E + N - N/E, whole numbers
    method_lm_infinite   = 7, // sees the sinks and the last N tokens; min(t, N)
    method_streaming_llm = 8, // the same; sinks stand in front of the window
    n_methods            = 9,
};

const char * method_name(int32_t method); // null: there is no such method

// What a plan is made from. All lengths in tokens.
struct params {
    int32_t train_length = 0;    // T: positions 0 .. T-1 are the ones that the model learned
    int32_t first_chunk  = 0;    // F
    int32_t chunk        = 0;    // C, the longest middle chunk; F + C <= T
    int32_t last_chunk   = 0;    // the least length of the last chunk
    int32_t stair_width  = 0;    // E; 0: the smallest that fits
    int32_t room         = 0;    // positions that stay free for generation when a plan is made
    bool    log_scaling  = true; // scale queries by max(1, ln(i + 1)/ln(log_length))
    int32_t log_length   = 0;    // 0: T

    // logits of keys on the stair are lowered by stair_bias*ln(E): E keys share a position, and weigh as one (1) or as E (0)
    // so are those of keys in the last chunk that are last_chunk tokens or more behind the query, and less so from half of it on
    float   stair_bias   = 0.0f;

    int32_t method  = method_mesa;
    int32_t window  = 0; // N of the methods that have one
    int32_t n_sinks = 4; // first tokens that stay visible, for the methods that forget

    // a text is cut into chunks
    bool chunked() const { return method == method_mesa || method == method_mesa_exact || method == method_star; }

    // the scale of queries is 1 for the first tokens, this many
    int32_t n_unscaled() const { return log_length > 0 ? log_length : train_length; }

    // distances are woven for each query by itself
    bool exact() const { return method == method_mesa_exact || method == method_stair; }
};

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

// The numbers that are used where the user gave none, for a model trained at train_length.
params params_default(int32_t train_length, int32_t method = method_mesa);

// Throw std::invalid_argument that says what is wrong and what to do.
// note: a plan made by hand may lead past T (n_pos > train_length), as runs of the authors' program do; its chunks may not
void validate(const params & p);
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

// does query i attend to key j? (the chunk-triangular mask)
bool visible(const plan & pl, int32_t i, int32_t j);

//
// the other methods: keys stand at their token index, and distances are woven when a query reads them
//

// one distance as two positions, d = (q - k)/divisor
struct woven {
    int32_t q;
    int32_t k;
    int32_t divisor = 1;
};

// do queries up to token i see every key at its true distance (of the anchored stair, for method_mesa)?
bool all_true(const params & p, const plan & pl, int32_t i);

// is key j further from query i than the true distances go?
bool is_far(const params & p, int32_t i, int32_t j);

// does query i see key j at all? (j <= i)
bool is_kept(const params & p, int32_t i, int32_t j);

// the distance of a far key, with E = pl.stair_width; q depends on i and k on j only, but where params::exact
woven weave(const params & p, const plan & pl, int32_t i, int32_t j);

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
plan extend(const params & p, const plan & old, int32_t n_past, int32_t n_tokens, const uint8_t * breaks);

// do the positions of n_tokens tokens stay inside the trained range (where the method cares)?
bool fits(const params & p, const plan & pl, int32_t n_tokens);

// Move the anchor (and grow E if it must) so that n_tokens tokens fit into the trained range, no new chunk.
// n_tokens - n_past must fit in beside the stair, else std::invalid_argument.
plan advance(const params & p, const plan & old, int32_t n_past, int32_t n_tokens);

// A ubatch takes tokens from one side of the last chunk's start only, and whole chunks where they fit.
// Returns how many of the tokens from pos on to take at most, 1 .. n_ubatch.
int32_t n_tokens_ubatch(const params & p, const plan & pl, int32_t pos, int32_t n_ubatch);

} // namespace mesa
